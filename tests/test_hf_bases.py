"""Language models of transformers that cannot get a memory: each is refused with what it is that does not fit."""

from __future__ import annotations

import pytest

from memformer.hf import with_memory
from test_hf import LENGTH, other_model

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
