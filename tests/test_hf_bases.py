"""Language models of transformers that cannot get a memory: each is refused with what it is that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from memformer.hf import with_memory
from test_hf import LENGTH, TOKENS, other_model

LLAMA4 = dict(num_key_value_heads=1, head_dim=8, num_local_experts=2, intermediate_size_mlp=24)


def test_a_decoder_under_another_name() -> None:
    for kind in ("chunked_attention", "full_attention"):
        base = other_model("llama4_text", layer_types=[kind] * 2, **LLAMA4)
        with pytest.raises(
            ValueError, match=r"base: the decoder of Llama4ForCausalLM is not its 'language_model', as .*; such a model"
        ):
            with_memory(base, 4, LENGTH)


def test_what_cannot_be_run_in_two_parts_is_refused_with_its_cause() -> None:
    base = other_model("cpmant", dim_head=8, dim_ff=24, prompt_length=2, prompt_types=2, segment_types=2)
    with pytest.raises(
        ValueError, match=r"base: CpmAntForCausalLM cannot be run as .* its head after it, got [A-Z]\w+Error: "
    ) as refused:
        with_memory(base, 4, LENGTH)
    assert isinstance(refused.value.__cause__, Exception)
    assert any(part.training for part in base.modules()) is base.training


def test_a_head_that_reads_another_width() -> None:
    base = other_model("opt", ffn_dim=24, word_embed_proj_dim=8)
    with pytest.raises(ValueError, match="base: what the head of OPTForCausalLM reads is 8 wide, expected 16, as its"):
        with_memory(base, 4, LENGTH)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_positions_that_do_not_begin_at_0(kind: str) -> None:
    """They would be others with a cache than without."""
    base = other_model(kind, is_decoder=True)
    with pytest.raises(ValueError, match=r"base: \w+ForCausalLM does not count positions from 0; such a model cannot"):
        with_memory(base, 4, LENGTH)


def test_layers_that_give_more_than_one_input_at_a_time() -> None:
    sizes = dict(
        num_key_value_heads=1, head_dim=8, num_kv_shared_layers=0, vocab_size_per_layer_input=TOKENS, laurel_rank=4,
        hidden_size_per_layer_input=4, layer_types=["sliding_attention", "full_attention"], altup_num_inputs=4,
        activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    base = other_model("gemma3n_text", **sizes)
    with pytest.raises(ValueError, match=r"base: the layers of Gemma3n\w+ give \(4, 2, 3, 16\) for tokens of \(2, 3\)"):
        with_memory(base, 4, LENGTH)


def test_a_loss_of_a_router_is_not_left_out_silently() -> None:
    base = other_model("mixtral", num_local_experts=2, num_key_value_heads=1, output_router_logits=True)
    model = with_memory(base, 4, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    with pytest.raises(ValueError, match=r"trainable: expected a base without output_router_logits"):
        model.trainable("all")
    model.trainable("memory")
    model.base.config.output_router_logits = False
    assert model.trainable("all") is model


def test_a_changed_setting_of_the_base_is_saved(tmp_path: Path) -> None:
    base = other_model("gemma2", num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0)
    model = with_memory(base, 4, LENGTH, read_dim=8, read_heads=2, write_heads=2).eval()
    model.base.config.final_logit_softcapping = 1.0
    tokens = torch.arange(LENGTH)[None]
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, expected)


def test_the_special_tokens_and_positions_of_the_base_are_those_of_the_model(tmp_path: Path) -> None:
    base = other_model("llama", num_key_value_heads=1, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    config = with_memory(base, 4, LENGTH, read_dim=8, read_heads=2, write_heads=2).config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
        assert getattr(config, name) == getattr(base.config, name)
    config.pad_token_id = 7
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).pad_token_id == 7
