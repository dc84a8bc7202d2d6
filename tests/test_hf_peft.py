"""PEFT and the models of ``memformer.hf``: adapters around them, and those in a base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from memformer.hf import MemoryForCausalLM, with_memory
from test_hf import LENGTH, base_of, model_of, some_tokens
from test_hf_own import adapter, some

# PEFT still calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.mark.parametrize(
    ("make", "target", "tokens"),
    [
        (model_of, "q_proj", some_tokens),
        (lambda: adapter("causal"), "to_q", some),
        (lambda: adapter("memformer"), "to_q", some),
    ],
    ids=["pretrained", "causal", "memformer"],
)
def test_an_adapter_for_a_causal_language_model(make: Callable, target: str, tokens: Callable) -> None:
    """With the task that PEFT calls a causal language model, it is called, writes and learns as it does by itself."""
    plain, wrapped = (
        make(),
        peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM")),
    )
    given = tokens(2, 12)
    expected = plain(given, labels=given)
    found = wrapped(given, labels=given, attention_mask=torch.ones_like(given))
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits), rtol=0, atol=1e-6)
    found.loss.backward()
    assert any(p.grad.abs().max() > 0 for name, p in wrapped.named_parameters() if "lora_B" in name)
    options = dict(do_sample=False, max_new_tokens=10)
    assert torch.equal(wrapped.generate(input_ids=given, **options), plain.generate(given, **options))
    with pytest.raises(ValueError, match=r"inputs_embeds: expected none, .*: give input_ids, got torch\.float32"):
        wrapped(given, inputs_embeds=torch.zeros(2, 12, 16))


LAYERS = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("config", "got"),
    [
        (peft.IA3Config(target_modules=LAYERS, feedforward_modules=[]), "IA3"),
        (peft.LoHaConfig(r=2, target_modules=LAYERS), "LOHA"),
        (peft.LoKrConfig(r=2, target_modules=LAYERS), "LOKR"),
        (peft.VeraConfig(r=2, target_modules=["q_proj"]), "VERA"),
        (peft.OFTConfig(r=2, oft_block_size=0, target_modules=LAYERS), "OFT"),
        (peft.AdaLoraConfig(target_modules=LAYERS, total_step=9), "ADALORA"),
        (peft.LoraConfig(target_modules=LAYERS, trainable_token_indices=[1]), "LORA with trainable_token_indices"),
        (peft.LoraConfig(target_modules=LAYERS, bias="all"), "LORA with bias"),
    ],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "",
)
def test_only_a_lora_is_known_in_a_base(config: peft.PeftConfig, got: str) -> None:
    with pytest.raises(ValueError, match=f"base: expected a LoRA in its layers alone, got {got}; merge_and_unload it"):
        with_memory(peft.get_peft_model(base_of(dtype=torch.float32), config), 3, LENGTH)


@pytest.mark.filterwarnings("ignore::UserWarning")  # so does PEFT warn of it
def test_a_lora_in_a_head_that_is_tied_is_refused() -> None:
    base = base_of(dtype=torch.float32, tie_word_embeddings=True)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"no LoRA in the head, .* leave it out of target_modules, got \{'lm_head'\}"):
        with_memory(wrapped, 3, LENGTH)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_lora_that_has_rewritten_its_base_is_saved_with_it_alone(start: str, tmp_path: Path) -> None:
    base_of(dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    model = with_memory(peft.get_peft_model(base, lora), 3, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    model, tokens = model.trainable("lora").eval(), some_tokens()
    with pytest.raises(ValueError, match=f"its LoRA has left as it was, .* got init_lora_weights='{start}'; save it"):
        model.save_pretrained(tmp_path / "memory", base="referenced")
    model.save_pretrained(tmp_path / "memory")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_lora_in_another_state_than_it_is_loaded_in_is_not_saved(tmp_path: Path) -> None:
    """Merged, it would be written into the weights and beside them, and loaded twice; switched off, it would be on."""
    base_of(dtype=torch.float32).save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model = with_memory(adapted, 3, LENGTH, read_dim=8, read_heads=2, write_heads=2).trainable("lora").eval()
    adapted.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"lora: expected it .* on, as it will be loaded; it is switched off"):
        model.save_pretrained(tmp_path / "memory", base="referenced")
    adapted.base_model.enable_adapter_layers()
    model.trainable("lora").save_pretrained(tmp_path / "memory", base="referenced")
    adapted.merge_adapter()
    with pytest.raises(ValueError, match=r"lora: expected it beside .*; it is merged into them: unmerge_adapter\(\)"):
        model.save_pretrained(tmp_path / "whole")
    adapted.unmerge_adapter()
    with pytest.raises(ValueError, match=r"got one that was trained or changed since"):  # by what rounding does
        model.save_pretrained(tmp_path / "again", base="referenced")
    model.save_pretrained(tmp_path / "whole")
    tokens = some_tokens()
    for folder in ("memory", "whole"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    half = [AutoModelForCausalLM.from_pretrained(tmp_path / f, dtype=torch.bfloat16) for f in ("memory", "whole")]
    dtypes, expected = ({name: p.dtype for name, p in one.named_parameters()} for one in half)
    assert dtypes == expected
    adapted.merge_and_unload()
    with pytest.raises(ValueError, match=r"lora: expected it .* it is no longer there: call with_memory again"):
        model.save_pretrained(tmp_path / "unloaded")


@pytest.mark.parametrize("targets", ["all-linear", ["segment_to_kv"], ["slots_to_qk"]])
@pytest.mark.parametrize(
    ("make", "tokens"),
    [(model_of, some_tokens), (lambda: adapter("causal"), some), (lambda: adapter("memformer"), some)],
    ids=["pretrained", "causal", "memformer"],
)
def test_a_lora_in_the_memory_is_the_same_model_merged(make: Callable, tokens: Callable, targets: Any) -> None:
    lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted, given = peft.get_peft_model(make(), lora).eval().double(), tokens(2, 30)
    expected = adapted(given).logits
    torch.testing.assert_close(adapted.merge_and_unload()(given).logits, expected)


def test_a_lora_that_came_after_the_memory_is_not_lost_on_saving(tmp_path: Path) -> None:
    model = with_memory(base_of(dtype=torch.float32), 3, LENGTH, read_dim=8, read_heads=2, write_heads=2).eval()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"lora: this model got one after its memory, .* merge it"):
        model.save_pretrained(tmp_path / "inner")
    assert not (tmp_path / "inner").exists()
    adapted.save_pretrained(tmp_path / "adapter")
    merged, tokens = adapted.merge_and_unload(), some_tokens()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(tokens).logits, merged(tokens).logits)


@pytest.mark.parametrize("option", [{"subfolder": "x"}, {"variant": "fp16"}, {"output_loading_info": True}])
def test_options_that_a_referenced_base_does_not_take(option: dict[str, Any], tmp_path: Path) -> None:
    base_of(dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = with_memory(base, 3, LENGTH, read_dim=8, read_heads=2, write_heads=2).trainable("memory")
    folder = tmp_path / "memory" / option.get("subfolder", "")
    model.save_pretrained(folder, base="referenced")
    with pytest.raises(ValueError, match=rf"{next(iter(option))}: not known for a folder with the memory alone"):
        MemoryForCausalLM.from_pretrained(tmp_path / "memory", **option)
