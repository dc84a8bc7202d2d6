"""A memory around pretrained language models: families, PEFT, checkpointing, and their replay."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import memformer
from memformer import MemoryState, generation, memory_replay_backprop, replay
from memformer.data import ByteTokenizer, Document
from memformer.evaluation import evaluate
from memformer.hf import MemoryCache, MemoryConfig, MemoryForCausalLM, PretrainedMemory, bases, with_memory
from memformer.hf.bases import CACHE
from memformer.nn import losses
from memformer.rollouts import rollout

# PEFT still calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

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
    "gemma2": GROUPED | dict(head_dim=8, sliding_window=3, query_pre_attn_scalar=8, tie_word_embeddings=False),
    "gpt_neox": {},
    "gpt2": dict(n_positions=32, n_embd=16, n_layer=2, n_head=2),
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "granite": GROUPED | dict(logits_scaling=2.0, embedding_multiplier=3.0),
    "smollm3": GROUPED | dict(no_rope_layer_interval=2),
    "opt": dict(ffn_dim=24, word_embed_proj_dim=16, dropout=0.0),
}
"""By their name in transformers, with what is theirs: windows shorter than a segment, logits behind the head."""


def base_of(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64, **settings: object
) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {} if family == "gpt2" else {k: v for k, v in SIZES.items() if k not in settings}
    sizes |= dict(vocab_size=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model(family, **(sizes | FAMILIES.get(family, {}) | settings))
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in base.parameters():  # transformers begins with weights so small that nothing would be seen
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return base.eval()


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


def test_slots_with_places_are_read_in_parts() -> None:
    base = base_of()
    model = with_memory(base, 3, LENGTH, read_dim=8, read_heads=2, write_heads=2, memory_writer="placed", slot_parts=2)
    assert model.readers.each[0].to_kv.in_features == model.dim // 2
    assert model.config.to_dict()["slot_parts"] == 2
    assert "slot_parts" not in model_of().config.to_dict(), "so a state from before there was that setting is its own"
    found = assert_replay_is_bptt(read_something(model))
    assert found["writer.places"].any(-1).all(), "each head of each slot"


def test_it_can_be_written_otherwise_than_in_training(tmp_path: Path) -> None:
    model, tokens = read_something(model_of()), some_tokens(1, 3 * LENGTH)
    assert "forgetting" not in model.config.to_dict(), "so a state from before there was that setting is its own"
    before = model(tokens).memory.slots
    model.set_writer(write_temperature=0.075, forgetting=0.0)
    after = model(tokens).memory.slots
    assert not torch.equal(before, after)
    model.save_pretrained(tmp_path)
    loaded = MemoryForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.write_temperature, loaded.config.forgetting) == (0.075, 0.0)
    assert torch.equal(loaded(tokens).memory.slots, after)
    with pytest.raises(ValueError, match="write_temperature: expected a finite number above 0, got 0"):
        model.set_writer(write_temperature=0)
    assert (model.config.write_temperature, model.writer.temperature, model.writer.scale) == (0.075, 0.075, 0.0)


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


def test_a_base_whose_lora_has_no_wrapper(tmp_path: Path) -> None:
    """As ``base.add_adapter`` of transformers leaves it; a merged one has none left."""
    wrapped, tokens = with_lora(), some_tokens(2, LENGTH)
    injected = peft.inject_adapter_in_model(wrapped.peft_config["default"], base_of())
    injected.load_state_dict(wrapped.get_base_model().state_dict())
    model = with_memory(injected.double().eval(), 3, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    assert torch.equal(model(tokens).logits, wrapped(tokens).logits)
    assert any("lora_" in name for name, p in model.trainable("lora").named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = MemoryForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    merged = with_lora().merge_and_unload()
    merged.peft_config = wrapped.peft_config  # as PEFT 0.18 leaves it
    assert with_memory(merged, 3, LENGTH).config.adapter is None


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


def test_a_first_token_counts_neither_with_the_initial_memory_given() -> None:
    """Nothing stands before it: not with the memory that None stands for, nor in a lane that had padding alone."""
    model, tokens = model_of(), some_tokens()
    initial = model.get_initial_mem(len(tokens))
    given, plain = (memory_replay_backprop(model, tokens, mems=mems, reduction="mean")[0] for mems in (initial, None))
    torch.testing.assert_close(given, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(tokens, initial, labels=tokens).loss, given, rtol=0, atol=1e-12)
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[1] = False
    _, mems = memory_replay_backprop(model, some_tokens(seed=3), src_mask=kept)
    with pytest.raises(ValueError, match="tgt: expected"):
        memory_replay_backprop(model, tokens, [tokens[:, :3]] + [None] * 4, mems=mems)
    for labels in (None, tokens):
        loss, _ = memory_replay_backprop(model, tokens, labels, mems=mems, reduction="mean")
        torch.testing.assert_close(model(tokens, mems, labels=tokens).loss, loss, rtol=0, atol=1e-12)


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
    # A lane without tokens keeps its memory, or has the first one where a document begins.
    empty = torch.tensor([False, False, True])[:, None].expand_as(tokens)
    after, first = model(tokens, output.memory, attention_mask=empty, reset=reset).memory, model.get_initial_mem(1)
    for part, before, initial in zip(after, output.memory, first, strict=True):
        assert torch.equal(part[0], initial[0])
        assert torch.equal(part[1], before[1])
        assert not torch.equal(part[2], before[2])


def naive_segment(model: MemoryForCausalLM, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """One lane of a Llama, one segment, layer by layer and slot by slot: its last hidden states and its slots."""
    llama = model.base.model
    x = llama.embed_tokens(tokens)
    place = torch.arange(len(tokens))[None]
    angles = llama.rotary_emb(x[None], position_ids=place)
    normed = model.readers.norm(slots)
    for layer, reader in zip(llama.layers, model.readers.each, strict=True):
        hidden = reader.norm(x)
        q, (k, v) = reader.to_q(hidden), reader.to_kv(normed).chunk(2, -1)
        found, width = [], q.shape[1] // reader.heads
        for head in range(reader.heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / width**0.5
            found.append(scores.softmax(-1) @ v[:, part])
        x = layer(x[None], position_embeddings=angles, position_ids=place)[0] + reader.to_out(torch.cat(found, -1))
    hidden = llama.norm(x)
    return hidden, model.writer(slots[None], model.write_norm(hidden)[None])[0]


def test_it_does_what_is_written_down() -> None:
    """Values, loss and gradients of a call over several segments, against plain loops over lanes and layers."""
    model, tokens = model_of(), some_tokens(2)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses = []
    for lane in range(2):
        slots, states = model.writer.initial(1)[0], []
        for segment in tokens[lane].split(LENGTH):
            hidden, slots = naive_segment(model, segment, slots)
            states.append(hidden)
        logits = model.base.lm_head(torch.cat(states))
        torch.testing.assert_close(output.logits[lane], logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(output.memory.slots[lane], slots, rtol=0, atol=1e-12)
        losses += [-logits[i].log_softmax(-1)[tokens[lane, i + 1]] for i in range(tokens.shape[1] - 1)]
    loss = torch.stack(losses).mean()
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-12)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-10, msg=name)


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
    exact = 1e-5 if family == "gemma2" else 1e-11  # its softmax is in float32, which rounds as a machine's kernels do
    torch.testing.assert_close(logits[mask], whole.logits[mask], rtol=0, atol=exact)
    (logits * weights).sum().backward()
    for name, parameter in model.named_parameters():
        atol = exact * max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# Without repeats, for tiny models write one token for ever.
GREEDY = dict(do_sample=False, max_new_tokens=LENGTH + 3, suppress_tokens=[0], no_repeat_ngram_size=2)


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
    options = dict(
        num_beams=3, do_sample=False, max_new_tokens=3 * LENGTH, return_dict_in_generate=True, output_scores=True
    )
    cached = model.generate(tokens, **options)
    plain = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, rtol=0, atol=1e-5)
    assert not torch.equal(cached.sequences, model.generate(tokens, do_sample=False, max_new_tokens=3 * LENGTH))
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
    torch.testing.assert_close(
        swapped[0], model(tokens, use_cache=True, **{CACHE: model(tokens[[1, 1]], use_cache=True)[CACHE]}).logits[0]
    )


def test_a_state_is_of_one_size_whatever_was_read() -> None:
    model, sizes = model_of(), set()
    with torch.no_grad():
        cache = None
        for length in (5, 3 * LENGTH, 40 * LENGTH):
            cache = model(some_tokens(2, length), use_cache=True, **{CACHE: cache})[CACHE]
            sizes.add(cache.nbytes)
    assert len(sizes) == 1


def test_the_library_s_own_state_and_streams(tmp_path: Path) -> None:
    """MemoryState, read and stream know this model as any other; greedy, they write what transformers writes."""
    model, tokens = model_of(), some_tokens(2, 13)
    model.generation_config.eos_token_id = None
    expected = model.generate(tokens, do_sample=False, max_new_tokens=2 * LENGTH, suppress_tokens=[0])
    state = generation.read(model, tokens[:, :9], start=0)
    state.save(tmp_path / "talk.state", model)
    state = MemoryState.load(tmp_path / "talk.state", model)
    found, after = generation.generate(model, tokens[:, 9:], 2 * LENGTH, state=state, temperature=0)
    assert torch.equal(torch.stack(found), expected[:, 13:])
    assert after.position.tolist() == [13 + 2 * LENGTH] * 2
    lanes = [tokens[0], tokens[1, :5]]
    found, _ = generation.generate(model, lanes, LENGTH, start=0, temperature=0)
    for lane, text in zip(lanes, found, strict=True):
        alone = model.generate(lane[None], do_sample=False, max_new_tokens=LENGTH, suppress_tokens=[0])
        assert torch.equal(text, alone[0, len(lane) :])
    with pytest.raises(ValueError, match="written with another model"):
        MemoryState.load(tmp_path / "talk.state", model_of(seed=5))
    with pytest.raises(ValueError, match="prompt: expected at least one token in each lane, such as"):
        generation.generate(model, [tokens[0], tokens[1, :0]], 3, start=0)


def test_documents_are_evaluated_whole() -> None:
    tokenizer = ByteTokenizer()
    model = model_of(vocab_size=tokenizer.vocabulary)
    texts = [b"Some text that is longer than a segment, and more than two." * 2, b"Short."]
    held_out = evaluate(model, [Document(str(i), text) for i, text in enumerate(texts)], tokenizer, lanes=2)
    total = 0.0
    for text in texts:
        tokens = torch.tensor([tokenizer.encode(text).tolist()])
        total += float(model(tokens, labels=tokens).loss.detach()) * (len(text) - 1)
    assert held_out.tokens == sum(map(len, texts)) - 2  # not a document's first
    assert held_out.loss_nats == pytest.approx(total / held_out.tokens, rel=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_logits_of_a_loss_are_made_in_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are those of all at once, also of logits that are capped behind the head."""
    model, tokens = model_of(family), some_tokens()
    results = []
    for fewest in (256, 7):
        monkeypatch.setattr(losses, "FEWEST_ROWS", fewest)
        monkeypatch.setattr(bases, "LOGITS_AT_ONCE", fewest * TOKENS)
        results.append(gradients(model, replay.memory_replay, src=tokens))
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        results.append((results[-1][0], {name: p.grad.clone() for name, p in model.named_parameters()}))
    for whole, parts in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


# --- In a folder


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = with_memory(with_lora("gpt2"), 3, LENGTH, read_dim=8, read_heads=2, write_heads=2, memory_writer="gated")
    tokens, model = some_tokens(), read_something(model).float()
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MemoryConfig)
    assert (config.base["model_type"], config.slots, config.adapter["peft_type"]) == ("gpt2", 3, "LORA")
    for loader in (AutoModelForCausalLM, MemoryForCausalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, MemoryForCausalLM)
        assert not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        torch.testing.assert_close(loaded(tokens)[:2], model(tokens)[:2], rtol=0, atol=0)
        assert loaded.base.lm_head.weight is loaded.base.transformer.wte.weight
    before = loaded(tokens, use_cache=True)[CACHE]
    loaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(tokens, use_cache=True)[CACHE].slots, before.slots, rtol=0, atol=0)


def test_what_a_checkpoint_lacks_is_as_at_construction(tmp_path: Path) -> None:
    """So a model around a base that is saved by itself begins as the base."""
    model = with_memory(base_of(dtype=torch.float32), 3, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if k.startswith("base.")})
    tokens = some_tokens(2, LENGTH)
    loaded = MemoryForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    slots = loaded.get_initial_mem(1).slots
    torch.testing.assert_close(slots.norm(dim=-1), torch.ones(1, 3))
    spread = [float(m.writer.segment_to_kv.weight.detach().std()) for m in (loaded, model)]
    assert spread[0] / spread[1] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_base_of_bfloat16_keeps_its_dtype_and_its_attention(attention: str, tmp_path: Path) -> None:
    base, tokens = base_of(dtype=torch.bfloat16, attn_implementation=attention), some_tokens()
    expected = base(tokens[:, :LENGTH]).logits
    model = with_memory(base, 3, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    assert torch.equal(model(tokens[:, :LENGTH]).logits, expected)
    memory = read_something(model)(tokens).memory
    # A slot moves by less than bfloat16 can hold.
    assert (memory.slots.dtype, memory.last.dtype) == (torch.float32, torch.bfloat16)
    assert model.readers.each[0].to_q.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert loaded.base.config._attn_implementation == attention
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    torch.testing.assert_close(loaded(tokens).memory, memory, rtol=0, atol=0)
    # Replay is within the rounding of one graph.
    results = [gradients(model, method, src=tokens) for method in (replay.full_bptt, replay.memory_replay)]
    (loss, expected), (other, found) = results
    torch.testing.assert_close(other, loss)
    for name, grad in expected.items():
        error, size = (found[name].float() - grad.float()).norm(), grad.float().norm()
        assert error <= 0.02 * size + 1e-6, name


def test_autocast_is_within_its_rounding() -> None:
    model, tokens = model_of(dtype=torch.float32), some_tokens()
    mask = left_padded(tokens, [tokens.shape[1], 11, 20])
    expected = model(tokens, attention_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens, attention_mask=mask)
        cached = model(tokens, attention_mask=mask, use_cache=True)
    assert found.memory.slots.dtype == torch.float32
    for logits in (found.logits, cached.logits):
        error = (logits.float() - expected.logits)[mask].norm() / expected.logits[mask].norm()
        assert error < 0.1


def test_a_copy_is_another_model() -> None:
    model, tokens = model_of(), some_tokens()
    other = copy.deepcopy(model)
    expected = model(tokens).logits
    torch.nn.init.zeros_(model.readers.each[0].to_out.weight)
    assert torch.equal(other(tokens).logits, expected)
    assert not torch.equal(model(tokens).logits, expected)


def test_its_base_is_the_base_by_itself() -> None:
    model, tokens = model_of(), some_tokens(2, LENGTH)
    assert torch.equal(model.base(tokens).logits, base_of()(tokens).logits)


def test_more_and_fewer_slots() -> None:
    model, tokens = model_of(), some_tokens()
    memory = model(tokens).memory
    model.resize_memory(5)
    assert (model.config.slots, model.get_initial_mem(2).slots.shape) == (5, (2, 5, 16))
    longer = model.resize_mems(memory)
    assert torch.equal(longer.slots[:, :3], memory.slots)
    assert model(tokens, longer).memory.slots.shape == (3, 5, 16)
    model.resize_memory(2)
    assert model(tokens, model.resize_mems(longer)).memory.slots.shape == (3, 2, 16)


def test_a_larger_vocabulary(tmp_path: Path) -> None:
    model = model_of("gpt2", dtype=torch.float32)
    model.resize_token_embeddings(TOKENS + 3, mean_resizing=False)
    assert (model.config.vocab_size, model(some_tokens() + 3).logits.shape[-1]) == (TOKENS + 3, TOKENS + 3)
    model.save_pretrained(tmp_path)
    loaded = MemoryForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(some_tokens() + 3).logits, model(some_tokens() + 3).logits)


# --- Who is refused


def other_model(family: str, **settings: object) -> PreTrainedModel:
    sizes = {k: v for k, v in SIZES.items() if k not in settings}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | settings))).eval()


def test_models_of_another_kind_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"base: MambaForCausalLM has (linear_attention|a state of its own); only models whose"
    ):
        with_memory(other_model("mamba", state_size=4), 4, LENGTH)
    with pytest.raises(ValueError, match=r"in BertLMHeadModel a token sees those after it; .*\(is_decoder=True\)"):
        with_memory(other_model("bert"), 4, LENGTH)
    with pytest.raises(
        ValueError, match=f"base: the decoder of BartForCausalLM takes no {CACHE}; a causal model that can write"
    ):
        with_memory(other_model("bart", d_model=16, decoder_layers=3, decoder_attention_heads=2), 4, LENGTH)
    with pytest.raises(
        ValueError, match=r"base: LlamaModel has no head that predicts tokens; load it with AutoModelForC"
    ):
        with_memory(base_of().model, 4, LENGTH)
    with pytest.raises(ValueError, match=r"expected a causal language model of transformers, .* got Linear"):
        with_memory(torch.nn.Linear(2, 2), 4, LENGTH)
    with pytest.raises(ValueError, match="base: MemoryForCausalLM has a state of its own"):
        with_memory(model_of(), 4, LENGTH)
    lfm2 = other_model("lfm2", layer_types=["conv", "full_attention"], num_key_value_heads=1)
    with pytest.raises(ValueError, match="base: Lfm2ForCausalLM has conv; only models whose layers all attend"):
        with_memory(lfm2, 4, LENGTH)


def test_adapters_of_another_kind_are_refused() -> None:
    with pytest.raises(
        ValueError, match="base: expected a LoRA in its layers alone, got PREFIX_TUNING; merge_and_unload"
    ):
        with_memory(
            peft.get_peft_model(base_of(), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
        )
    whole = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    with pytest.raises(ValueError, match="got LORA with modules_to_save; merge_and_unload it first"):
        with_memory(peft.get_peft_model(base_of(), whole))
    adapted = with_lora()
    adapted.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="expected one adapter, got default, second; merge or delete"):
        with_memory(adapted)


def test_wrong_settings_are_named() -> None:
    for settings, message in [
        (
            dict(segment_length=64),
            "segment_length: expected at most the base's 32 positions, got 64; the slots need none",
        ),
        (dict(segment_length=0), "segment_length: expected a whole number of at least 1, got 0"),
        (dict(slots=0), "slots: expected a whole number of at least 1, got 0"),
        (dict(read_dim=10), "read_heads: must divide read_dim, got 4 heads for 10"),
        (dict(write_heads=3), "write_heads: must divide the base's width, got 3 heads for 16"),
        (dict(memory_writer="gru"), "memory_writer: expected one of normalised, gated, placed, got 'gru'"),
        (dict(write_temperature=0), "write_temperature: expected a finite number above 0, got 0"),
        (dict(forgetting=-1), "forgetting: expected a finite number of at least 0, got -1"),
        (dict(forgetting=0.0, memory_writer="placed"), r"forgetting: 0\.0 has no meaning with the writer placed"),
        (dict(slot_parts=3), "slot_parts: must divide the base's width, got 3 for 16"),
        (dict(slot_parts=0), "slot_parts: expected a whole number of at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            with_memory(base_of(), **(dict(segment_length=LENGTH) | settings))


def test_wrong_inputs_are_named() -> None:
    model, tokens = model_of(), some_tokens(2, 20)
    memory = model(tokens).memory
    cache = model(tokens, use_cache=True)[CACHE]
    other = with_memory(base_of(hidden_size=8), 3, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    for given, message in [
        (dict(input_ids=tokens + TOKENS), "input_ids: token id .* is outside the table"),
        (dict(input_ids=tokens[0]), r"input_ids: expected token ids, .* got torch.int64 of shape \(20,\)"),
        (dict(attention_mask=torch.ones(2, 3)), "attention_mask: expected torch.bool, or integers of 0 and 1"),
        (
            dict(attention_mask=torch.ones(2, 3).bool()),
            r"attention_mask: expected torch.bool of its tokens' shape \(2, 20\)",
        ),
        (dict(labels=tokens[:, 1:]), r"labels: expected the shape of the tokens, \(2, 20\), got .* \(2, 19\)"),
        (dict(labels=tokens + TOKENS), "labels: token id"),
        (
            dict(reset=torch.ones(3).bool()),
            r"reset: expected torch.bool of shape \(2,\), one per lane of input_ids, got .*\(3,\)",
        ),
        (dict(memory=tuple(memory)), "memory: expected that of this model .* a PretrainedMemory with .*, got tuple"),
        (dict(memory=memory.slots), "memory: expected that of this model and this batch, .* got torch.float64"),
        (
            dict(memory=other(tokens).memory),
            r"memory: expected .* torch.float64 of shape \(2, 3, 16\), got .*\(2, 3, 8\)",
        ),
        (dict(memory=model(tokens[:1]).memory), r"memory: expected .* of shape \(2, 3, 16\), got .* \(1, 3, 16\)"),
        (
            dict(memory=PretrainedMemory(*(x.float() for x in memory))),
            "memory: expected .* torch.float64 .* got torch.float32",
        ),
        ({"cache": cache, "memory": memory}, "cache: expected a MemoryCache, .* without memory and reset beside it"),
        ({"cache": transformers.DynamicCache()}, "cache: expected a MemoryCache, .* got DynamicCache"),
        (
            {"cache": other(tokens, use_cache=True)[CACHE]},
            "cache: expected 2 lanes of 3 slots of 16, got 2 of .* another model",
        ),
        ({"cache": model(tokens[:1], use_cache=True)[CACHE]}, "cache: expected 2 lanes of 3 slots of 16, got 1 of"),
        (dict(cache=cache, past_key_values=cache), f"cache: past_key_values is its older name; .* {CACHE}"),
        (dict(logits_to_keep=-1), "logits_to_keep: expected a whole number of at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**(dict(input_ids=tokens) | given))
    with pytest.raises(TypeError, match="attention_mas"):
        model(tokens, attention_mas=tokens)
    for labels in (tokens[:, 1:], [tokens[:, :LENGTH], tokens[:, :3], None]):
        with pytest.raises(ValueError, match="tgt: expected the shape of the tokens"):
            memory_replay_backprop(model, tokens, labels)
    with pytest.raises(ValueError, match="tgt_mask: labels have the mask of their tokens"):
        memory_replay_backprop(model, tokens, tokens, tgt_mask=tokens > 0)


def test_a_cache_in_training_with_checkpointing_is_refused() -> None:
    model = model_of().train()
    enable = "activation_checkpointing_enable"
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
    with pytest.raises(ValueError, match=r"use_cache: with checkpointing of activations .*; call eval\(\) first"):
        model(some_tokens(), use_cache=True)
    assert model.eval()(some_tokens(), use_cache=True)[CACHE].filled == [5, 5, 5]


def test_assisted_decoding_is_refused() -> None:
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model_of().generate(some_tokens(1, 4), assistant_model=base_of(), max_new_tokens=3)


def test_it_is_imported_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """That ``import memformer`` leaves transformers alone is in test_architecture.py."""
    assert memformer.hf.with_memory is with_memory
    with pytest.raises(AttributeError, match="module 'memformer' has no attribute 'gg'"):
        _ = memformer.gg
    for name in [name for name in sys.modules if name.startswith("memformer.hf")]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "__version__", "4.57.6")
        with pytest.raises(ImportError, match=r"transformers 5\.0 or newer, found 4\.57\.6: pip install -U"):
            importlib.import_module("memformer.hf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"memformer\.hf needs transformers: pip install 'memformer-replay\[hf\]'"):
        importlib.import_module("memformer.hf")
