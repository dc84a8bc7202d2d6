"""A memory in a folder without its base, which is named there."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config

from memformer.hf import MemoryForCausalLM, reference, with_memory
from test_hf import LENGTH, TOKENS, base_of, read_something, some_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
SIZES = dict(read_dim=8, read_heads=2, write_heads=2)


def saved_base(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    base_of(dtype=dtype, seed=seed).save_pretrained(folder, max_shard_size="5KB")
    return folder


@pytest.mark.parametrize("lora", [False, True], ids=["memory", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_memory_is_saved_without_its_base(lora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "base", dtype))
    if lora:
        base = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = read_something(with_memory(base, 3, LENGTH, **SIZES)).trainable("lora" if lora else "memory").eval()
    tokens = some_tokens()
    expected = model(tokens)
    model.save_pretrained(tmp_path / "memory", base="referenced")
    size, whole = (
        sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("memory", "base")
    )
    assert size < whole
    reference = json.loads((tmp_path / "memory" / "config.json").read_text())["reference"]
    assert reference["name"] == str(tmp_path / "base")
    for loader in (AutoModelForCausalLM, MemoryForCausalLM):
        loaded = loader.from_pretrained(tmp_path / "memory")
        found = loaded(tokens)
        torch.testing.assert_close((found.logits, found.memory), (expected.logits, expected.memory), rtol=0, atol=0)
        assert not loaded.training
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    # It can be saved again, in either way.
    loaded.save_pretrained(tmp_path / "again", base="referenced")
    loaded.save_pretrained(tmp_path / "whole", max_shard_size="5KB")
    for name in ("again", "whole"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(again(tokens).logits, expected.logits, rtol=0, atol=0)
        assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert json.loads((tmp_path / "whole" / "config.json").read_text()).get("reference") is None
    # The base may have moved.
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=r"memory: holds a memory alone; its base .* was not found .*base_model=\.\.\."
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    for base in (tmp_path / "moved", AutoModelForCausalLM.from_pretrained(tmp_path / "moved")):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "memory", base_model=base)
        torch.testing.assert_close(loaded(tokens).logits, expected.logits, rtol=0, atol=0)
    # Not its settings.
    settings = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    for base in (tmp_path / "moved", AutoModelForCausalLM.from_pretrained(tmp_path / "moved")):
        with pytest.raises(ValueError, match=r"around a base with rms_norm_eps 1e-06, and .* has 0.5, with the same"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "memory", base_model=base)


def test_a_quantised_base_is_not_written(tmp_path: Path) -> None:
    """What transformers would write of it is read as weights without their scales."""
    base = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "base"))
    base.hf_quantizer = "pretended"
    model, tokens = read_something(with_memory(base, 3, LENGTH, **SIZES)).trainable("memory").eval(), some_tokens()
    with pytest.raises(ValueError, match=r"base: expected 'referenced', because this one is quantised"):
        model.save_pretrained(tmp_path / "memory", base="saved")
    model.save_pretrained(tmp_path / "memory")  # as Trainer calls it
    assert not any(name.startswith("base.") for name in load_file(tmp_path / "memory" / "model.safetensors"))
    loaded = MemoryForCausalLM.from_pretrained(tmp_path / "memory", base_model=base)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "base"))
    model = with_memory(base, 3, LENGTH, **SIZES)
    with pytest.raises(ValueError, match=r"base: expected a frozen one, .* call trainable\('memory'\)"):
        model.save_pretrained(tmp_path / "memory", base="referenced")
    model.trainable("memory").save_pretrained(tmp_path / "memory", base="referenced")
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(ValueError, match=r"was trained around .* with other weights than those of"):
        MemoryForCausalLM.from_pretrained(tmp_path / "memory", base_model=base)
    with pytest.raises(ValueError, match="base: expected 'saved' or 'referenced', got 'none'"):
        model.save_pretrained(tmp_path / "x", base="none")
    nameless = with_memory(base_of(), 3, LENGTH, **SIZES).trainable("memory")
    with pytest.raises(ValueError, match=r"base: expected one that from_pretrained has loaded .* without a name"):
        nameless.save_pretrained(tmp_path / "x", base="referenced")
    nameless.save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match=r"base_model: expected none, because .*x holds one, got "):
        MemoryForCausalLM.from_pretrained(tmp_path / "x", base_model=base)
    (tmp_path / "memory" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"memory: expected the weights of its config\.json; .*do not fit"):
        MemoryForCausalLM.from_pretrained(tmp_path / "memory")


def test_a_base_with_another_vocabulary_is_not_named(tmp_path: Path) -> None:
    base, tokens = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "base")), some_tokens()
    base.resize_token_embeddings(TOKENS + 3, mean_resizing=False)
    model = with_memory(base, 3, LENGTH, **SIZES).trainable("memory").eval()
    with pytest.raises(
        ValueError, match=rf"base: expected the {TOKENS} tokens of .*base', .* got {TOKENS + 3} tokens; save it"
    ):
        model.save_pretrained(tmp_path / "memory", base="referenced")
    assert not (tmp_path / "memory").exists()
    model.save_pretrained(tmp_path / "memory")
    assert torch.equal(MemoryForCausalLM.from_pretrained(tmp_path / "memory")(tokens).logits, model(tokens).logits)
    (tmp_path / "base").rename(tmp_path / "moved")  # then there is nothing to compare with
    model.save_pretrained(tmp_path / "named", base="referenced")


@pytest.mark.parametrize("name", ["somebody/llama", "models/llama", ""])
def test_a_folder_has_a_card(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a hub reads it: what it is, and of which model it was made if that has a name there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    model = with_memory(base_of(), 3, LENGTH, **SIZES)
    model.base.name_or_path = name
    model.save_pretrained("mine")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == "transformers"
    assert set(card.data.tags) >= {"memformer", "memory"}
    assert card.data.base_model == (name if name == "somebody/llama" else None)
    assert "from_pretrained('mine')" in card.text
    assert f"3 memory slots, read beside each layer, written after each {LENGTH} tokens" in card.text
    assert f"# A memory{' around llama' if name else ''}\n" in card.text
    assert "not in this folder" not in card.text
    (tmp_path / "mine" / "README.md").write_text("my own words")
    model.save_pretrained("mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own words"
    model.save_pretrained("theirs", is_main_process=False)
    assert not (tmp_path / "theirs" / "README.md").exists()


def test_a_base_that_was_changed_is_not_named(tmp_path: Path) -> None:
    """Its weights would be lost, and what was written could not be loaded."""
    model = with_memory(AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "base")), 3, LENGTH, **SIZES)
    model.trainable("memory").eval().save_pretrained(tmp_path / "memory", base="referenced")
    with torch.no_grad():
        model.base.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(
        ValueError, match=r"base: expected the weights of .*base', .* got one that was trained or chang"
    ):
        model.save_pretrained(tmp_path / "again", base="referenced")
    named = with_memory(base_of(dtype=torch.float32), 3, LENGTH, **SIZES).trainable("memory")
    named.base.save_pretrained(tmp_path / "later")
    named.base.name_or_path = str(tmp_path / "later")  # a base that has a name since
    named.save_pretrained(tmp_path / "named", base="referenced")
    AutoModelForCausalLM.from_pretrained(tmp_path / "named")
    model.save_pretrained(tmp_path / "whole")
    whole = MemoryForCausalLM.from_pretrained(tmp_path / "whole").trainable("memory").eval()
    with pytest.raises(ValueError, match=r"base: expected the weights of .* got one that was saved with its memory"):
        whole.save_pretrained(tmp_path / "again", base="referenced")
    tokens = some_tokens()
    assert torch.equal(whole(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(("saved", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_a_memory_without_its_base_in_another_dtype(saved: str, asked: str, tmp_path: Path) -> None:
    """As one that is saved whole."""
    base = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "base", getattr(torch, saved)))
    model = read_something(with_memory(base, 3, LENGTH, **SIZES)).trainable("memory").eval()
    model.save_pretrained(tmp_path / "memory", base="referenced")
    model.save_pretrained(tmp_path / "whole")
    load, dtype, tokens = AutoModelForCausalLM.from_pretrained, getattr(torch, asked), some_tokens()
    whole, found = (load(tmp_path / folder, dtype=dtype) for folder in ("whole", "memory"))
    torch.testing.assert_close(found(tokens).logits, whole(tokens).logits, rtol=0, atol=0)
    assert found.dtype is dtype
    assert {n: p.dtype for n, p in found.named_parameters()} == {n: p.dtype for n, p in whole.named_parameters()}
    found.trainable("memory").save_pretrained(tmp_path / "again", base="referenced")
    torch.testing.assert_close(load(tmp_path / "again")(tokens).logits, found(tokens).logits, rtol=0, atol=0)
    saved_base(tmp_path / "other", getattr(torch, saved), seed=1)
    with pytest.raises(ValueError, match=r"other weights than .* with --base$"):
        load(tmp_path / "memory", base_model=tmp_path / "other", dtype=dtype)
    base = load(tmp_path / "base", dtype=dtype)
    if saved == "bfloat16":  # then float32 has the same numbers
        given = load(tmp_path / "memory", base_model=base)
        torch.testing.assert_close(given(tokens).logits, whole(tokens).logits, rtol=0, atol=0)
        return
    with pytest.raises(ValueError, match=f"other weights than .* They were {saved} there, and are {asked} here"):
        load(tmp_path / "memory", base_model=base)


def test_a_base_that_has_one_way_of_attending(tmp_path: Path) -> None:
    """It is loaded with that, where none is asked for."""
    sizes = dict(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    gemma = Gemma2Config(**sizes, num_key_value_heads=1, head_dim=8, intermediate_size=32, max_position_embeddings=64)
    for config in (gemma, BloomConfig(**sizes)):
        model = with_memory(AutoModelForCausalLM.from_config(config), 3, LENGTH, **SIZES).eval()
        model.save_pretrained(tmp_path / "memory")
        for loader in (AutoModelForCausalLM, MemoryForCausalLM):
            loaded, tokens = loader.from_pretrained(tmp_path / "memory"), some_tokens()
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        made = MemoryForCausalLM(loaded.config)
        made.load_state_dict(loaded.state_dict())
        assert torch.equal(made.eval()(tokens).logits, model(tokens).logits)
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "memory", attn_implementation="sdpa")


def test_settings_of_parts_are_compared_one_by_one() -> None:
    settings = {
        "a": 1,
        "dtype": "x",
        "text_config": {"rope_theta": 2, "dtype": "x", "use_cache": True, "rope": {"b": 3}},
    }
    assert reference._leaves(settings) == {"a": 1, "text_config.rope_theta": 2, "text_config.rope.b": 3}
