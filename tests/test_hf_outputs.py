"""What a user of transformers asks a model and its configuration for, besides logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from memformer.hf import MemoryConfig, MemoryForCausalLM, with_memory
from memformer.hf.bases import CACHE
from test_hf import LENGTH, TOKENS, base_of, left_padded, model_of, some_tokens
from test_hf_own import adapter, both, some

SIZES = dict(read_dim=8, read_heads=2, write_heads=2)


def naive_states(model: MemoryForCausalLM, tokens: Tensor) -> list[Tensor]:
    """One lane of a Llama, layer by layer, segment by segment: (tokens, dim) before and after each layer."""
    llama, memory, each = model.base.model, model.get_initial_mem(1), []
    for segment in tokens.split(LENGTH):
        x = llama.embed_tokens(segment)[None]
        place = torch.arange(len(segment))[None]
        angles = llama.rotary_emb(x, position_ids=place)
        contexts, states = model.readers.contexts(memory.slots), [x[0]]
        for layer, reader, context in zip(llama.layers, model.readers.each, contexts, strict=True):
            x = layer(x, position_embeddings=angles, position_ids=place) + reader(x, context)
            states.append(x[0])
        states[-1] = llama.norm(x)[0]
        each.append(states)
        _, memory = model.step(segment[None], memory)
    return [torch.cat(parts) for parts in zip(*each, strict=True)]


def test_hidden_states_have_what_was_read() -> None:
    """With padding and several segments, at once and in pieces behind a cache."""
    model, tokens = model_of(), some_tokens()
    counts = [tokens.shape[1], 11, 20]
    mask = left_padded(tokens, counts)
    output = model(tokens, attention_mask=mask, output_hidden_states=True)
    assert [x.shape for x in output.hidden_states] == [(3, tokens.shape[1], 16)] * 3
    torch.testing.assert_close(model.base.lm_head(output.hidden_states[-1]), output.logits, rtol=0, atol=1e-12)
    for lane, count in enumerate(counts):
        for found, expected in zip(output.hidden_states, naive_states(model, tokens[lane, -count:]), strict=True):
            torch.testing.assert_close(found[lane, -count:], expected, rtol=0, atol=1e-12)
    pieces, cache = [], None
    for piece, kept in zip(tokens.split(7, 1), mask.split(7, 1), strict=True):
        one = model(piece, attention_mask=kept, use_cache=True, output_hidden_states=True, **{CACHE: cache})
        cache = one[CACHE]
        pieces.append(one.hidden_states)
    for found, expected in zip(zip(*pieces, strict=False), output.hidden_states, strict=False):
        torch.testing.assert_close(torch.cat(found, 1)[mask], expected[mask], rtol=0, atol=1e-11)
    some_of_them = model(tokens, attention_mask=mask, output_hidden_states=[0, -1]).hidden_states
    assert some_of_them[1] is None
    assert torch.equal(some_of_them[2], output.hidden_states[2])
    assert model(tokens).hidden_states is None
    assert all(len(layer._forward_hooks) == 1 for layer in model.base.model.layers)  # nobody looks on any more
    model.config.output_hidden_states = True
    assert torch.equal(model(tokens, attention_mask=mask).hidden_states[1], output.hidden_states[1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_attentions_are_the_base_s_in_each_segment(family: str) -> None:
    base = base_of(family)
    # Most families take their softmax in float32, which rounds as a machine's kernels do.
    atol = 1e-12 if family == "gpt2" else 1e-6
    base.set_attn_implementation("eager")
    model, tokens = with_memory(base, 3, LENGTH, **SIZES), some_tokens(2, LENGTH + 5)
    found = model(tokens, output_attentions=True).attentions
    parts = [base(x, output_attentions=True).attentions for x in tokens.split(LENGTH, 1)]
    for layer, (first, second) in enumerate(zip(*parts, strict=True)):
        assert found[layer].shape == (2, 2, LENGTH + 5, LENGTH + 5)
        torch.testing.assert_close(found[layer][..., :LENGTH, :LENGTH], first, rtol=0, atol=atol)
        torch.testing.assert_close(found[layer][..., LENGTH:, LENGTH:], second, rtol=0, atol=atol)
        assert not found[layer][..., :LENGTH, LENGTH:].any()
        assert not found[layer][..., LENGTH:, :LENGTH].any()
    mask = left_padded(tokens, [LENGTH + 5, 4])
    alone = model(tokens[1:, -4:], output_attentions=True).attentions[1]
    padded = model(tokens, attention_mask=mask, output_attentions=True).attentions[1]
    torch.testing.assert_close(padded[1:, :, -4:, -4:], alone, rtol=0, atol=atol)
    assert not padded[1, :, -4:, :-4].any()
    with pytest.raises(ValueError, match="output_attentions: expected no cache beside it"):
        model(tokens, output_attentions=True, use_cache=True)


def test_a_way_of_attending_without_weights_gives_none() -> None:
    with pytest.warns(
        UserWarning, match=r"output_attentions: sdpa keeps no weights, .*set_attn_implementation\('eager'\)"
    ):
        assert model_of()(some_tokens(), output_attentions=True).attentions == ()


def test_generate_gives_them_too() -> None:
    model = model_of()
    model.generation_config.eos_token_id = None
    options = dict(do_sample=False, max_new_tokens=LENGTH, output_hidden_states=True, return_dict_in_generate=True)
    tokens = some_tokens(2, 5)
    cached = model.generate(tokens, **options).hidden_states
    for step, states in enumerate(model.generate(tokens, use_cache=False, **options).hidden_states):
        for found, expected in zip(cached[step], states, strict=True):
            torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=0, atol=1e-11)


@both
def test_hidden_states_of_the_library_s_own(kind: str) -> None:
    """Those of a lane with padding are those of the lane alone, and logits are made from the last."""
    model, tokens = adapter(kind), some(2, 13)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, [0, 1, 6]] = False
    output = model(tokens, attention_mask=mask, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(model._logits(output.hidden_states[-1]), output.logits, rtol=0, atol=1e-12)
    alone = model(tokens[1:, mask[1]], output_hidden_states=True)
    for found, expected in zip(output.hidden_states, alone.hidden_states, strict=True):
        assert found.shape == (2, 13, model.config.hidden_size)
        torch.testing.assert_close(found[1, mask[1]], expected[0], rtol=0, atol=1e-12)
    only = model(tokens, attention_mask=mask, output_hidden_states=1).hidden_states
    assert only[0] is None
    assert torch.equal(only[1], output.hidden_states[1])
    with pytest.raises(ValueError, match="output_hidden_states: expected no cache beside them"):
        model(tokens, use_cache=True, output_hidden_states=True)
    with pytest.raises(ValueError, match="output_attentions: expected none, for the models of this library"):
        model(tokens, output_attentions=True)


def test_a_causal_model_s_states_layer_by_layer() -> None:
    model, tokens = adapter("causal"), some(2, 13)
    found, inner = model(tokens, output_hidden_states=True).hidden_states, model.memformer
    segment = tokens[:, : inner.config.max_seq_len]
    x = inner.embedding(segment)
    for number, layer in enumerate(inner.stack.layers):
        torch.testing.assert_close(found[number][:, : segment.shape[1]], x, rtol=0, atol=1e-12)
        x, _ = layer(x, None, None, None)
    torch.testing.assert_close(found[-1][:, : segment.shape[1]], x, rtol=0, atol=1e-12)


def test_a_memory_s_configuration_has_its_base_s_sizes(tmp_path: Path) -> None:
    model = model_of()
    config = model.config
    sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    assert sizes == (TOKENS, 16, 2, 2)
    assert model.vocab_size == TOKENS
    config.save_pretrained(tmp_path)
    assert MemoryConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    config.vocab_size, config.tie_word_embeddings = 40, True
    made = MemoryForCausalLM(config)
    assert made.get_input_embeddings().weight.shape == (40, 16)
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
    head = torch.nn.Linear(16, 40)
    made.set_output_embeddings(head)
    assert made.base.lm_head is head
    assert not hasattr(MemoryConfig(), "vocab_size")
    with pytest.raises(AttributeError, match="base: expected the configuration of a language model, got none"):
        MemoryConfig(vocab_size=3)


def test_a_base_s_folder_has_no_memory(tmp_path: Path) -> None:
    base_of().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a folder of a memformer_memory, got that of a llama .*with_memory"):
        MemoryForCausalLM.from_pretrained(tmp_path)


def test_what_from_pretrained_takes_of_every_model(tmp_path: Path) -> None:
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    for dtype in ("auto", "bfloat16", torch.bfloat16):
        older = MemoryForCausalLM.from_pretrained(tmp_path, torch_dtype=dtype)
        newer = MemoryForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert [p.dtype for p in older.parameters()] == [p.dtype for p in newer.parameters()]
        assert {p.dtype for p in older.writer.parameters()} == {torch.float32}
    assert older.dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, output_hidden_states=True)
    assert len(loaded(some_tokens()).hidden_states) == 3
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = MemoryForCausalLM(older.config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in made.writer.parameters()} == {torch.float32}
    assert made.base.lm_head.weight.dtype == torch.bfloat16
