"""A memory around pretrained language models: transformers' families, PEFT, checkpointing, and the replay of all of them."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from memformer import memory_replay_backprop, replay
from memformer.hf import MemoryCache, MemoryConfig, MemoryForCausalLM, PretrainedMemory, with_memory
from memformer.hf.bases import CACHE
from memformer.rollouts import rollout

TOKENS, LENGTH = 61, 8

SIZES = dict(
    vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = dict(num_key_value_heads=1)
FAMILIES = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | dict(head_dim=8),
    "mistral": GROUPED | dict(sliding_window=3),
    "gemma2": GROUPED | dict(head_dim=8, sliding_window=3, query_pre_attn_scalar=8),
    "gpt_neox": {},
    "gpt2": dict(n_positions=32, n_embd=16, n_layer=2, n_head=2),
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "granite": GROUPED | dict(logits_scaling=2.0, embedding_multiplier=3.0),
    "smollm3": GROUPED | dict(no_rope_layer_interval=2),
}
"""By their name in transformers, with what is theirs: windows shorter than a segment, logits behind the head."""


def base_of(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **settings: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {} if family == "gpt2" else {k: v for k, v in SIZES.items() if k not in settings}
    sizes |= dict(vocab_size=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model(family, **(sizes | FAMILIES.get(family, {}) | settings))
    base = AutoModelForCausalLM.from_config(config)
    for parameter in base.parameters():  # transformers begins with weights so small that nothing would be seen
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return base.to(dtype).eval()


def read_something(model: MemoryForCausalLM, seed: int = 1) -> MemoryForCausalLM:
    """As after some training: the memory is read, and what is written differs from slot to slot."""
    generator = torch.Generator().manual_seed(seed)
    for reader in model.readers.each:
        torch.nn.init.normal_(reader.to_out.weight, std=0.5, generator=generator)
    return model


def model_of(family: str = "llama", *, slots: int = 3, **settings: object) -> MemoryForCausalLM:
    model = with_memory(base_of(family, **settings), slots, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    return read_something(model)


def some_tokens(batch: int = 3, length: int = 5 * LENGTH - 3, seed: int = 2) -> Tensor:
    return torch.randint(3, TOKENS, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(tokens: Tensor, counts: list[int]) -> Tensor:
    """Which of the tokens exist: the last so many of each lane."""
    return torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(counts)[:, None]


def gradients(model: MemoryForCausalLM, method: replay.Method, mems: PretrainedMemory | None = None, **given: object):
    """The loss, and the gradients of all weights and of the first memory."""
    model.zero_grad()
    segments = model.segments(given.pop("src"), None, given.pop("src_mask", None), None, given.pop("reset", None), mems)
    outcome = rollout(model, segments, mems, method=method)
    outcome.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outcome.loss.detach(), found


def assert_replay_is_bptt(model: MemoryForCausalLM) -> dict[str, Tensor]:
    """With padding, a reset on the way, and the gradient by the memory before the first of five segments."""
    tokens = some_tokens()
    mask = left_padded(tokens, [tokens.shape[1], 11, 20])
    reset = [None, torch.tensor([True, False, False]), None, None, None]
    _, mems = model(some_tokens(seed=3), use_cache=False).to_tuple()[-2:]
    results = []
    for method in (replay.full_bptt, replay.memory_replay):
        start = PretrainedMemory(*(x.detach().clone().requires_grad_() for x in mems))
        loss, found = gradients(model, method, start, src=tokens, src_mask=mask, reset=reset)
        results.append((loss, found | {"slots": start.slots.grad, "last": start.last.grad}))
    (loss, expected), (other, found) = results
    torch.testing.assert_close(other, loss, rtol=0, atol=1e-12)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-10, msg=name)
    assert found["slots"].abs().amax((1, 2)).gt(1e-12).all()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_at_construction_it_is_its_base(family: str) -> None:
    base = base_of(family)
    tokens = some_tokens(2, LENGTH)
    expected = base(tokens, labels=tokens)
    model = with_memory(base, 4, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    output = model(tokens, labels=tokens)
    assert torch.equal(output.logits, expected.logits)
    torch.testing.assert_close(output.loss, expected.loss.double(), rtol=0, atol=1e-5)
    assert not torch.equal(read_something(model)(tokens).logits, expected.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_is_bptt(family: str) -> None:
    model = model_of(family)
    found = assert_replay_is_bptt(model)
    assert found.keys() == {name for name, _ in model.named_parameters()} | {"slots", "last"}
    assert all(grad.abs().max() > 0 for grad in found.values())


def with_lora(family: str = "llama") -> peft.PeftModel:
    base = base_of(family)
    names = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}.get(family, ["q_proj", "v_proj"])
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=names, fan_in_fan_out=family == "gpt2"))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return adapted.double().eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_base_with_lora(family: str) -> None:
    adapted, tokens = with_lora(family), some_tokens(2, LENGTH)
    expected = adapted(tokens).logits
    model = with_memory(adapted, 3, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    assert torch.equal(model(tokens).logits, expected)
    found = assert_replay_is_bptt(read_something(model).trainable("lora"))
    assert all("lora_" in name for name in found if name.startswith("base."))
    assert sum("lora_" in name for name in found) >= 4


def test_what_is_trained_is_one_word() -> None:
    model = with_memory(with_lora(), 3, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    trained = {}
    for part in ("memory", "lora", "all"):
        assert model.trainable(part) is model
        trained[part] = {name for name, p in model.named_parameters() if p.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    assert trained["memory"] == {name for name in everything if not name.startswith("base.")}
    assert trained["lora"] == trained["memory"] | {name for name in everything if "lora_" in name}
    assert trained["all"] == everything
    with pytest.raises(ValueError, match="expected one of memory, lora, all, got 'slots'"):
        model.trainable("slots")
    with pytest.raises(ValueError, match=r"the base has no LoRA; wrap it with peft\.get_peft_model before"):
        model_of().trainable("lora")


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family: str, before: bool) -> None:
    model = model_of(family).train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    plain = assert_replay_is_bptt(model)
    base, enable = model.base, "activation_checkpointing_enable"
    target = base if before else model
    enable = enable if hasattr(target, enable) else "gradient_checkpointing_enable"
    getattr(target, enable)()
    if before:
        other = with_memory(base, 3, LENGTH, read_dim=8, read_heads=2, write_heads=2)
        other.load_state_dict(model.state_dict())
        for layer in base.model.layers if family == "llama" else base.transformer.h:
            layer._forward_hooks.popitem(last=False)  # those of the first memory
        model = other
    assert base.is_gradient_checkpointing
    checkpointed = assert_replay_is_bptt(model)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=0, atol=1e-12, msg=name)


def test_memory_replay_backprop_and_one_call() -> None:
    """A call over several segments, and the rollout of them, are one computation."""
    model, tokens = model_of(), some_tokens()
    mask = left_padded(tokens, [tokens.shape[1], 11, 20])
    loss, mems = memory_replay_backprop(model, tokens, src_mask=mask, reduction="mean")
    output = model(tokens, attention_mask=mask, labels=tokens)
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.memory, mems, rtol=0, atol=1e-12)
    # And in two calls, of which the second predicts its first tokens from the first one's memory.
    first, second = tokens.split([2 * LENGTH, 3 * LENGTH - 3], 1)
    loss, mems = memory_replay_backprop(model, tokens, reduction="sum")
    one = model(first, labels=first)
    two = model(second, one.memory, labels=second)
    total = one.loss * 3 * (2 * LENGTH - 1) + two.loss * second.numel()
    torch.testing.assert_close(total, loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(two.memory, mems, rtol=0, atol=1e-12)


def test_lanes_do_not_see_each_others_padding() -> None:
    model, tokens = model_of("gemma2"), some_tokens()
    counts = [tokens.shape[1], 11, 20]
    mask = left_padded(tokens, counts)
    output = model(tokens, attention_mask=mask)
    for lane, count in enumerate(counts):
        alone = model(tokens[lane : lane + 1, -count:])
        torch.testing.assert_close(output.logits[lane, -count:], alone.logits[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(output.memory.slots[lane], alone.memory.slots[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(output.memory.last[lane], alone.memory.last[0], rtol=0, atol=1e-12)
    reset = torch.tensor([True, False, False])
    carried, fresh = model(tokens, output.memory, reset=reset), model(tokens)
    torch.testing.assert_close(carried.logits[0], fresh.logits[0], rtol=0, atol=1e-12)
    assert not torch.allclose(carried.logits[1], fresh.logits[1])


# --- Going on in a segment, and generate()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_pieces_are_the_whole(family: str, size: int) -> None:
    """Values and gradients, whatever the pieces; lanes of other lengths stand at other places of their segments."""
    model, tokens = model_of(family), some_tokens()
    mask = left_padded(tokens, [tokens.shape[1], 11, 20])
    weights = torch.randn(*tokens.shape, TOKENS, dtype=torch.float64) * mask[..., None]
    whole = model(tokens, attention_mask=mask)
    (whole.logits * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cache, logits = None, []
    for piece, kept in zip(tokens.split(size, 1), mask.split(size, 1), strict=True):
        output = model(piece, attention_mask=kept, use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        logits.append(output.logits)
        assert cache.hidden.shape[1] < LENGTH
    logits = torch.cat(logits, 1)
    torch.testing.assert_close(logits[mask], whole.logits[mask], rtol=0, atol=1e-11)
    (logits * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-9, msg=name)


GREEDY = dict(do_sample=False, max_new_tokens=2 * LENGTH + 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_crosses_segments(family: str) -> None:
    """Cached equals uncached, a batch with left padding equals one by one."""
    model, tokens = model_of(family), some_tokens(length=19)
    model.generation_config.eos_token_id = None
    mask = left_padded(tokens, [19, 4, 13])
    tokens = tokens.where(mask, 0)
    text = model.generate(tokens, attention_mask=mask.long(), **GREEDY)
    assert text.shape == (3, 19 + GREEDY["max_new_tokens"])
    assert torch.equal(model.generate(tokens, attention_mask=mask.long(), use_cache=False, **GREEDY), text)
    for lane, count in enumerate(mask.sum(1).tolist()):
        alone = model.generate(tokens[lane : lane + 1, -count:], **GREEDY)
        assert torch.equal(alone[0], text[lane, -len(alone[0]) :])
    assert len(set(text[0, 19:].tolist())) > 3


def test_beams_move_their_memory() -> None:
    model, tokens = model_of(), some_tokens(2, 13)
    model.generation_config.eos_token_id = None
    options = dict(num_beams=3, do_sample=False, max_new_tokens=LENGTH + 4, return_dict_in_generate=True, output_scores=True)
    cached = model.generate(tokens, **options)
    plain = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, rtol=0, atol=1e-5)
    assert not torch.equal(cached.sequences, model.generate(tokens, do_sample=False, max_new_tokens=LENGTH + 4))
    carried = model(some_tokens(2, 9, seed=5)).memory
    assert torch.equal(
        model.generate(tokens, memory=carried, **options).sequences,
        model.generate(tokens, memory=carried, use_cache=False, **options).sequences,
    )


def test_samples_are_those_of_the_seed() -> None:
    model, tokens = model_of(), some_tokens(2, 13)
    options = dict(do_sample=True, temperature=0.7, top_k=20, num_return_sequences=2, max_new_tokens=LENGTH + 4)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(6)
        texts.append(model.generate(tokens, use_cache=use_cache, **options))
    assert torch.equal(*texts)
    assert len(set(map(tuple, texts[0].tolist()))) == 4


def test_a_text_goes_on_from_its_state() -> None:
    """In pieces of any size it is the text that one call writes, and the given state stays as it is."""
    model, tokens = model_of(), some_tokens(2, 13)
    model.generation_config.eos_token_id = None
    whole = model.generate(tokens, do_sample=False, max_new_tokens=30)
    first = model.generate(tokens, do_sample=False, max_new_tokens=11, return_dict_in_generate=True)
    state, last = first[CACHE], first.sequences[:, -1:]
    assert isinstance(state, MemoryCache)
    kept = [state.slots.clone(), state.hidden.clone(), list(state.filled)]
    for _ in range(2):
        rest = model.generate(last, do_sample=False, max_new_tokens=19, **{CACHE: state})
        assert torch.equal(torch.cat([first.sequences, rest[:, 1:]], 1), whole)
    torch.testing.assert_close([state.slots, state.hidden], kept[:2], rtol=0, atol=0)
    assert state.filled == kept[2]
    read = model(tokens, use_cache=True, **{CACHE: None})[CACHE]
    read.reorder_cache(torch.tensor([1, 1]))
    swapped = model(tokens, use_cache=True, **{CACHE: read}).logits
    torch.testing.assert_close(swapped[0], model(tokens, use_cache=True, **{CACHE: model(tokens[[1, 1]], use_cache=True)[CACHE]}).logits[0])


def test_a_state_is_of_one_size_whatever_was_read() -> None:
    model, sizes = model_of(), set()
    with torch.no_grad():
        cache = None
        for length in (5, 3 * LENGTH, 40 * LENGTH):
            cache = model(some_tokens(2, length), use_cache=True, **{CACHE: cache})[CACHE]
            sizes.add(cache.nbytes)
    assert len(sizes) == 1
