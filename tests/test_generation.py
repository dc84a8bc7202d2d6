"""Filters, and generation across segments: against everything computed anew, lane by lane, and by exhaustive search."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import naive
from helpers import POSITIONS, VOCABULARY, lively, lively_causal
from memformer import Memformer
from memformer.data import Lanes
from memformer.generation import (
    Sampling,
    SamplingKeywords,
    keep_allowed,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)
from memformer.state import MemoryState
from memformer.wavefront import Wavefront

START = VOCABULARY - 1
LENGTH = 5
LENGTHS = st.lists(st.integers(0, 13), min_size=1, max_size=4)
both = pytest.mark.parametrize("lively", [lively, lively_causal])
"""The two kinds of models: the test's own ``lively`` makes one."""
Lively = Callable[..., Any]
quick = settings(deadline=None, max_examples=10)


def prompts(*lengths: int) -> list[Tensor]:
    return [torch.randint(START, (n,)) for n in lengths]


def assert_same_state(actual: MemoryState, expected: MemoryState, tolerance: float = 1e-10) -> None:
    assert_close(actual.memory, expected.memory, rtol=tolerance, atol=tolerance)
    for name in ("segment", "pending", "position"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.start == expected.start


def recorded(model: Memformer) -> list[Tensor]:
    """The logits of every step from now on."""
    steps, ask = [], model.next_logits

    def recording(*arguments: Any) -> Tensor:
        steps.append(ask(*arguments))
        return steps[-1]

    model.next_logits = recording
    return steps


# --- Filters ----------------------------------------------------------------------------------------------------------


def test_filters_keep_what_their_names_say() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.25, 0.05]]).log()
    assert keep_top_k(logits, 2).isfinite().tolist() == [[True, False, True, False]]
    assert keep_top_k(logits, 9).isfinite().all()
    assert keep_top_p(logits, 0.7).isfinite().tolist() == [[True, False, True, False]]
    assert keep_top_p(logits, 0.76).isfinite().tolist() == [[True, True, True, False]]
    assert keep_top_p(logits, 1e-9).isfinite().tolist() == [[True, False, False, False]]
    assert keep_top_p(logits, 1.0).isfinite().all()
    many = 6 * torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0))
    assert keep_top_p(many, 1.0).isfinite().all()
    assert keep_min_p(logits, 0.45).isfinite().tolist() == [[True, False, True, False]]
    assert keep_min_p(logits, 1.0).isfinite().tolist() == [[True, False, False, False]]
    assert keep_min_p(logits, 0.09).isfinite().all()
    assert keep_allowed(logits, [0, 3]).isfinite().tolist() == [[False, True, True, False]]
    assert keep_allowed(logits, []).isfinite().all()


def test_top_p_sums_where_a_deterministic_sum_is() -> None:
    """On CUDA cumsum raises an error under torch.use_deterministic_algorithms(True)."""
    summed = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "cumsum":
                summed.append(args[0].device.type)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        for strict in (False, True):
            torch.use_deterministic_algorithms(strict)
            try:
                assert keep_top_p(torch.zeros(2, 5, device="cuda"), 0.5).device.type == "cuda"
            finally:
                torch.use_deterministic_algorithms(False)
    assert summed == ["cuda", "cpu"]


def test_what_filters_keep_is_unchanged() -> None:
    logits = torch.randn(3, 9)
    for kept in (keep_top_k(logits, 4), keep_top_p(logits, 0.8), keep_min_p(logits, 0.1), keep_allowed(logits, [2])):
        assert kept.isneginf().any()
        assert torch.equal(kept, torch.where(kept.isfinite(), logits, kept))


def test_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[0, 1, 0]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]
    assert penalise_repetition(logits, seen, 0.5).tolist() == [[4.0, -1.0, 2.0, -2.0]]


# --- Against everything computed anew ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("writer", "updates"), [("normalised", 1), ("gated", 2), ("placed", 1)])
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("overlap", [0, 1, LENGTH])
def test_each_step_is_what_the_whole_text_gives(kind: str, writer: str, updates: int, overlap: int) -> None:
    """Also right at a segment's end, in lanes whose segments end at different times."""
    settings = {"positions": kind, "memory_writer": writer, "num_mem_updates": updates, "dec_overlap": overlap}
    model, begun = lively(**settings), prompts(0, 4, 5, 11)
    steps = recorded(model)
    tokens, state = model.generate(begun, 8, start=START, temperature=0)
    for lane, prompt in enumerate(begun):
        text = prompt.tolist()
        for i, token in enumerate(tokens[lane].tolist()):
            expected = naive.next_logits(model, text, START)
            assert_close(steps[i][lane], expected, rtol=1e-10, atol=1e-10)
            assert token == expected[:START].argmax()
            text.append(token)
    assert_same_state(state, model.read([torch.cat(pair) for pair in zip(begun, tokens, strict=True)], start=START))


@pytest.mark.parametrize(("memory", "writer", "updates"), [("layers", "placed", 1), ("one", "gated", 2)])
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("overlap", [0, 2, LENGTH])
def test_each_step_of_a_causal_model_is_what_the_whole_text_gives(
    kind: str, memory: str, writer: str, updates: int, overlap: int
) -> None:
    settings = {"positions": kind, "memory": memory, "memory_writer": writer, "num_mem_updates": updates}
    model, begun = lively_causal(overlap=overlap, **settings), prompts(0, 4, 5, 11)
    steps = recorded(model)
    tokens, state = model.generate(begun, 8, start=START, temperature=0)
    for lane, prompt in enumerate(begun):
        text = prompt.tolist()
        for i, token in enumerate(tokens[lane].tolist()):
            expected = naive.next_logits(model, text, START)
            assert_close(steps[i][lane], expected, rtol=1e-10, atol=1e-10)
            assert token == expected[:START].argmax()
            text.append(token)
    assert_same_state(state, model.read([torch.cat(pair) for pair in zip(begun, tokens, strict=True)], start=START))


@torch.no_grad()
def test_what_was_trained_is_what_is_generated() -> None:
    """The logits of a stream are those of training's own segments of the document."""
    model, document = lively(), torch.randint(START, (13,))
    memory, expected = None, []
    for segment in Lanes([document.numpy()], lanes=1, length=LENGTH, start=START, epochs=1):
        encoded, memory = model.encode(segment.src, memory, segment.src_mask, segment.reset)
        kept = segment.tgt_mask[:, :-1]
        logits = model.decode(segment.tgt[:, :-1], encoded, segment.src_mask, kept, segment.src)
        expected.append(logits[segment.tgt_mask[:, 1:]])
    steps = recorded(model)
    for length in range(len(document)):
        model.generate(document[None, :length], 1, start=START)
    assert_close(torch.cat(steps), torch.cat(expected))


@pytest.mark.parametrize("kind", POSITIONS)
def test_single_precision_is_close(kind: str) -> None:
    model, single = lively(positions=kind), lively(positions=kind).float()
    exact, steps, begun = recorded(model), recorded(single), prompts(0, 7, 3)
    tokens = model.generate(begun, 12, start=START, temperature=0).tokens
    assert all(map(torch.equal, single.generate(begun, 12, start=START, temperature=0).tokens, tokens))
    for a, b in zip(steps, exact, strict=True):
        assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


@both
def test_the_tests_model_writes_a_varied_text(lively: Lively) -> None:
    """Otherwise much here could not fail."""
    tokens = lively().generate(prompts(3, 3), 40, start=START, temperature=0).tokens
    assert all(len(lane.unique()) >= 4 for lane in tokens)
    assert not torch.equal(*tokens)


# --- Lanes ------------------------------------------------------------------------------------------------------------


@both
@quick
@given(lengths=LENGTHS, count=st.integers(0, 12), seed=st.integers(0, 9), temperature=st.sampled_from([0.0, 1.3]))
def test_batched_equals_one_by_one(
    lively: Lively, lengths: list[int], count: int, seed: int, temperature: float
) -> None:
    model, begun = lively(seed), prompts(*lengths)

    def generator(lane: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(lane)]

    how = dict(start=START, temperature=temperature, stop=[0, 7], repetition_penalty=1.1, top_p=0.9)
    generators = [g for i in range(len(begun)) for g in generator(i)]
    together = model.generate(begun, count, generator=generators, **how)
    for lane, prompt in enumerate(begun):
        alone = model.generate([prompt], count, generator=generator(lane), **how)
        assert torch.equal(together.tokens[lane], alone.tokens[0])
        assert_same_state(together.state.select([lane]), alone.state)


def test_each_lane_keeps_its_generator_when_others_end() -> None:
    model, begun = lively(), prompts(2, 3, 4)
    how = dict(start=START, temperature=3.0)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(lane) for lane in range(3)]

    free = model.generate(begun, 20, generator=generators(), **how).tokens
    stop = next(
        int(token)
        for i, token in enumerate(free[0])
        if not torch.isin(token, torch.cat([free[1][: i + 3], free[2][: i + 3]]))
    )
    ended = model.generate(begun, 20, generator=generators(), stop=[stop], **how).tokens
    assert len(ended[0]) < min(len(ended[1]), len(ended[2]))
    for lane in range(3):
        assert torch.equal(ended[lane], free[lane][: len(ended[lane])])


@both
def test_a_mask_says_which_tokens_of_a_prompt_exist(lively: Lively) -> None:
    model, padded = lively(), torch.randint(START, (3, 7))
    kept = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 1]], dtype=torch.bool)
    masked = model.generate(padded, 9, start=START, prompt_mask=kept, temperature=0)
    listed = model.generate([padded[0], padded[1, :2], padded[2, [3, 4, 6]]], 9, start=START, temperature=0)
    assert all(map(torch.equal, masked.tokens, listed.tokens))
    assert_same_state(model.read(padded, start=START, mask=kept.long()), model.read(padded, start=START, mask=kept), 0)


@both
def test_a_lane_ends_with_a_stop_token_and_costs_nothing_from_then_on(lively: Lively) -> None:
    model, begun = lively(), prompts(1, 2, 3, 4)
    free = model.generate(begun, 12, start=START, temperature=0).tokens
    stop = int(free[1][2])
    steps = recorded(model)
    stream = model.stream(begun, 12, start=START, temperature=0, stop=[stop])
    shown = torch.stack(list(stream), 1)
    ends = [lane.tolist().index(stop) + 1 if stop in lane else 12 for lane in free]
    assert min(ends) < max(ends)
    for lane, end in enumerate(ends):
        assert torch.equal(shown[lane, :end], free[lane][:end])
        assert (shown[lane, end:] == -1).all()
    assert [len(step) for step in steps] == [sum(i < end for end in ends) for i in range(max(ends))]
    whole = [torch.cat([p, t[:end]]) for p, t, end in zip(begun, free, ends, strict=True)]
    assert_same_state(stream.state, model.read(whole, start=START))


@both
def test_a_streams_state_is_that_of_the_tokens_that_came(lively: Lively) -> None:
    model, begun = lively(), prompts(3, 9)
    stream = model.stream(begun, 20, start=START, temperature=0)
    assert_same_state(stream.state, model.read(begun, start=START))
    for came, tokens in enumerate(itertools.islice(stream, 8), start=1):
        begun = [torch.cat([prompt, token[None]]) for prompt, token in zip(begun, tokens, strict=True)]
        assert_same_state(stream.state, model.read(begun, start=START))
        assert stream.state.position.tolist() == [3 + came, 9 + came]


def test_the_callback_hears_every_token() -> None:
    heard: list[Tensor] = []
    tokens = lively().generate(prompts(2, 5), 7, start=START, callback=heard.append).tokens
    assert torch.equal(torch.stack(heard, 1), torch.stack(tokens))


# --- Reading ----------------------------------------------------------------------------------------------------------


@both
@quick
@given(data=st.data(), lanes=st.integers(1, 3), seed=st.integers(0, 9))
def test_pieces_of_any_size_are_read_as_the_whole(lively: Lively, data: st.DataObject, lanes: int, seed: int) -> None:
    model, whole, state = lively(seed), [torch.empty(0, dtype=torch.int64)] * lanes, None
    for _ in range(data.draw(st.integers(1, 4))):
        piece = prompts(*data.draw(st.lists(st.integers(0, 12), min_size=lanes, max_size=lanes)))
        whole = [torch.cat(pair) for pair in zip(whole, piece, strict=True)]
        state = model.read(piece, state, start=START)
    assert_same_state(state, model.read(whole, start=START))


@pytest.mark.parametrize("overlap", [1, LENGTH])
@both
def test_many_segments_are_read_as_one_by_one(lively: Lively, overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes of other lengths, begun in the middle of a segment, at a border, or anew; against token by token."""
    causal = lively is lively_causal
    model = lively(**{"overlap" if causal else "dec_overlap": overlap})
    begun = model.read(prompts(3, 0, 10, 7, 22, 9), start=START).reset([3])
    texts = prompts(41, 60, 2, 58, 19, 0)
    fronts: list[Any] = []
    made = Wavefront.__init__
    monkeypatch.setattr(Wavefront, "__init__", lambda self, *given: fronts.append(self) or made(self, *given))
    whole = model.read(texts, begun)
    assert len(fronts) == (3 if causal else 0), "for lanes 0, 1, 3 and 4; 0, 1 and 3; 1 and 3"
    state, fronts[:] = begun, []
    for k in range(60):
        state = model.read([text[k : k + 1] for text in texts], state)
    assert not fronts
    assert_same_state(whole, state, 1e-12)
    assert_close(
        model.generate(None, 7, state=whole, temperature=0)[0], model.generate(None, 7, state=state, temperature=0)[0]
    )


def test_reading_is_encoding_segment_by_segment() -> None:
    model, text = lively(), torch.randint(START, (2, 13))
    state = model.read(text, start=START)
    memory = model.encode(torch.full((2, 1), START)).mem
    memory = model.encode(text[:, :5], memory).mem
    assert_close(state.memory, memory)
    assert torch.equal(state.segment, text[:, 5:10])
    assert torch.equal(state.pending, torch.cat([text[:, 10:], torch.full((2, 2), START)], 1))


def test_an_encoder_only_model_reads() -> None:
    model = lively(encoder_only=True)
    state = model.read(torch.randint(START, (2, 17)), start=START)
    assert state.position.tolist() == [17, 17]


@both
@quick
@given(first=st.integers(0, 11), second=st.integers(0, 11), seed=st.integers(0, 9))
def test_going_on_equals_not_having_stopped(lively: Lively, first: int, second: int, seed: int) -> None:
    model, begun = lively(seed), prompts(2, 8)
    whole = model.generate(begun, first + second, start=START, temperature=0)
    part, state = model.generate(begun, first, start=START, temperature=0)
    rest = model.generate(prompts(0, 0), second, state=state, temperature=0)
    assert all(map(torch.equal, map(torch.cat, zip(part, rest.tokens, strict=True)), whole.tokens))
    assert_same_state(rest.state, whole.state)


@both
def test_a_state_that_was_given_stays_as_it_is(lively: Lively) -> None:
    model, state = lively(), lively().read(prompts(4, 9), start=START)
    before = state.clone()
    model.generate(prompts(3, 3), 9, state=state)
    model.generate(prompts(3, 3), 9, state=state, beams=2)
    model.read(prompts(9, 9), state)
    assert_same_state(state, before, 0)


def test_the_state_is_of_one_size_whatever_was_read() -> None:
    model = lively()
    short, long = (model.read(torch.randint(START, (1, n)), start=START) for n in (1, 3_000))
    config = model.config
    assert short.nbytes == long.nbytes == config.num_memory_slots * config.dim * 8 + (2 * LENGTH + 1) * 8


@both
def test_nothing_has_a_graph(lively: Lively) -> None:
    model, state = lively(), lively().read(prompts(12), start=START)
    tokens, after = model.generate(prompts(6), 6, state=state)
    streamed = model.stream(prompts(6), 6, start=START).state
    assert not any(x.requires_grad for x in (state.memory, after.memory, streamed.memory, *tokens))


# --- Sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_follows_its_generator() -> None:
    model, begun = lively(), prompts(2, 2, 2)
    first, again, other = (
        torch.stack(model.generate(begun, 12, start=START, generator=torch.Generator().manual_seed(seed)).tokens)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_with_any_great_temperature_all_that_may_be_written_is_as_likely() -> None:
    logits = torch.tensor([[3.0, -2.0, -math.inf, 0.5]])
    for temperature in (1e30, 1e40, 1e300):
        kept = Sampling(temperature=temperature).kept(logits)
        assert torch.equal(kept.softmax(-1), torch.tensor([[1.0, 1.0, 0.0, 1.0]]) / 3)


def test_a_sampling_is_its_keywords() -> None:
    model, begun = lively(), prompts(3, 8)
    how = dict(temperature=1.4, top_k=8, top_p=0.9, min_p=0.01, repetition_penalty=1.2, stop=[0], never=[3])
    assert set(how) == {field.name for field in dataclasses.fields(Sampling)} == set(SamplingKeywords.__annotations__)

    def written(call: Callable[..., Any], **keywords: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.stack(list(call(begun, 12, start=START, generator=generator, **keywords)), 1)

    def whole(*arguments: Any, **keywords: Any) -> list[Tensor]:
        rows = torch.nn.utils.rnn.pad_sequence(model.generate(*arguments, **keywords).tokens, True, -1)
        return list(rows.unbind(1))

    expected = written(model.stream, **how)
    for call in (model.stream, whole):
        for keywords in (
            how,
            dict(sampling=Sampling(**how)),
            dict(sampling=Sampling(**how | dict(top_k=2, stop=())), top_k=8, stop=[0]),
        ):
            assert torch.equal(written(call, **keywords), expected)
    plain = written(model.stream)
    assert not torch.equal(plain, expected)
    assert torch.equal(written(model.stream, sampling=Sampling(top_k=1), top_k=None), plain), "None is no filter"


def test_a_keyword_that_there_is_not_is_named() -> None:
    for call in (lively().generate, lively().stream):
        with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
            call(prompts(1), 3, start=START, temprature=0.9)


def test_a_sampling_is_frozen_and_checks_itself() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().temperature = 0.5  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"top_p: expected a share in \(0, 1\], got 1.5"):
        Sampling(top_p=1.5)
    with pytest.raises(TypeError, match="positional"):
        Sampling(0.5)  # type: ignore[misc]


def test_sampling_has_the_probabilities_of_the_filtered_logits() -> None:
    model, lanes = lively(), 4_000
    logits = naive.next_logits(model, [1, 2], START)[:START] / 1.5
    probability = keep_top_k(logits, 3).softmax(-1)
    text = torch.tensor([[1, 2]]).expand(lanes, -1)
    drawn = torch.cat(model.generate(text, 1, start=START, temperature=1.5, top_k=3).tokens)
    frequency = drawn.bincount(minlength=START) / lanes
    assert (frequency[probability == 0] == 0).all()
    assert_close(frequency.double(), probability.detach(), rtol=0, atol=4 * 0.5 / math.sqrt(lanes))


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.0), dict(beams=3)])
def test_what_must_not_come_never_comes(how: dict[str, Any]) -> None:
    model = lively()
    with torch.no_grad():
        model.decoder.to_logits.bias[[START, 2, 3]] += 100.0
    tokens = model.generate(prompts(2, 7), 30, start=START, never=[2, 3], **how).tokens
    assert not torch.isin(torch.cat(tokens), torch.tensor([START, 2, 3])).any()


def test_what_ends_a_text_may_come_though_it_must_not() -> None:
    """As a tokenizer has it whose special tokens, one of which is the end, must not be written."""
    model = lively()
    with torch.no_grad():
        model.decoder.to_logits.bias[2] += 100.0
    found = model.generate(prompts(2, 7), 30, start=START, never=[2, 3], stop=[2]).tokens
    assert [lane.tolist() for lane in found] == [[2], [2]]


def test_a_prompt_by_itself_with_its_mask() -> None:
    model, prompt, kept = lively(), torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 1, 1])
    found = model.generate(prompt, 9, start=START, prompt_mask=kept, temperature=0).tokens
    assert_close(found, model.generate(prompt[kept.bool()], 9, start=START, temperature=0).tokens)


def test_the_encoder_must_be_able_to_read_what_is_written() -> None:
    model = lively(dec_num_tokens=VOCABULARY + 3)
    with torch.no_grad():
        model.decoder.to_logits.bias[VOCABULARY:] += 100.0
    assert (torch.cat(model.generate(prompts(1, 2), 12, start=START).tokens) < START).all()


@both
def test_a_repetition_penalty_looks_at_the_last_whole_and_the_pending_segment(lively: Lively) -> None:
    model, text = lively(), [1, 2, 3, 4, 5, 6, 7]
    tokens = model.generate(torch.tensor([text]), 12, start=START, temperature=0, repetition_penalty=3.0).tokens[0]
    for token in tokens.tolist():
        held = torch.tensor([text[-(len(text) % LENGTH + LENGTH) :]])
        logits = penalise_repetition(naive.next_logits(model, text, START)[None, :START], held, 3.0)
        assert token == logits.argmax()
        text.append(token)


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    model, begun = lively().float(), prompts(3, 4)
    tokens = model.generate(begun, 9, start=START, temperature=temperature).tokens
    greedy = model.generate(begun, 9, start=START, temperature=0).tokens
    assert all(map(torch.equal, tokens, greedy)) == (temperature < 1)


# --- Beams ------------------------------------------------------------------------------------------------------------


@both
@quick
@given(lengths=LENGTHS, count=st.integers(0, 13), seed=st.integers(0, 9))
def test_one_beam_is_greedy(lively: Lively, lengths: list[int], count: int, seed: int) -> None:
    model, begun = lively(seed), prompts(*lengths)
    greedy = model.generate(begun, count, start=START, temperature=0, stop=[0, 7])
    beam = model.generate(begun, count, start=START, beams=1, stop=[0, 7])
    assert all(tokens.dtype == torch.int64 for tokens in beam.tokens)
    assert all(map(torch.equal, beam.tokens, greedy.tokens))
    assert_same_state(beam.state, greedy.state)


def log_probabilities(model: Memformer, start: int) -> Callable[[list[int], list[int]], float]:
    """Of new tokens after a text, each by everything computed anew; what was computed once is remembered."""

    @functools.cache
    def after(text: tuple[int, ...]) -> Tensor:
        logits = naive.next_logits(model, list(text), start)
        logits[start] = -math.inf
        return logits.log_softmax(-1)

    return lambda text, new: sum(float(after((*text, *new[:i]))[token]) for i, token in enumerate(new))


@pytest.mark.parametrize(("seed", "length_penalty"), [(0, 0.0), (1, 1.0), (2, 3.0)])
@torch.no_grad()
def test_wide_beams_find_what_exhaustive_search_finds(seed: int, length_penalty: float) -> None:
    """Over two ends of segments of 2 tokens, with a stop token: all 3^4 + 3^3 + 3^2 + ... hypotheses are tried."""
    sizes = dict(enc_num_tokens=5, dec_num_tokens=5, enc_max_seq_len=2, dec_max_seq_len=3)
    model, start, stop, count = lively(seed, **sizes), 4, 3, 4
    begun, log_probability = [[0], [1, 2]], log_probabilities(model, start)
    found = model.generate(
        [torch.tensor(p) for p in begun], count, start=start, stop=[stop], beams=200, length_penalty=length_penalty
    )
    for lane, text in enumerate(begun):
        every = [[*body, stop] for n in range(count) for body in itertools.product(range(3), repeat=n)]
        every += [list(body) for body in itertools.product(range(3), repeat=count)]
        scores = [log_probability(text, new) / len(new) ** length_penalty for new in every]
        best = max(range(len(every)), key=scores.__getitem__)
        assert found.tokens[lane].tolist() == every[best]
        assert_same_state(found.state.select([lane]), model.read([torch.tensor(text + every[best])], start=start))


@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_narrow_beams_keep_what_a_plain_search_keeps(seed: int) -> None:
    """Hypotheses change their order all the time, and each must keep its own segments and memory."""
    sizes = dict(enc_num_tokens=6, dec_num_tokens=6, enc_max_seq_len=2, dec_max_seq_len=3)
    model, start, stop, count, beams = lively(seed, **sizes), 5, 4, 9, 4
    begun, log_probability = [[0], [1, 2, 3]], log_probabilities(model, start)
    found = model.generate([torch.tensor(p) for p in begun], count, start=start, stop=[stop], beams=beams)
    for lane, text in enumerate(begun):
        kept: list[list[int]] = [[]]
        for _ in range(count):
            longer = [[*new, token] for new in kept if new[-1:] != [stop] for token in range(5)]
            ended = [new for new in kept if new[-1:] == [stop]]
            kept = sorted(longer + ended, key=lambda new: -log_probability(text, new))[:beams]
        best = max(kept, key=lambda new: log_probability(text, new) / len(new))
        assert found.tokens[lane].tolist() == best
        assert_same_state(found.state.select([lane]), model.read([torch.tensor(text + best)], start=start))


def test_batched_beams_equal_one_by_one() -> None:
    model, begun = lively(), prompts(3, 0, 9)
    together = model.generate(begun, 12, start=START, beams=4, stop=[0, 7])
    for lane, prompt in enumerate(begun):
        alone = model.generate([prompt], 12, start=START, beams=4, stop=[0, 7])
        assert torch.equal(together.tokens[lane], alone.tokens[0])
        assert_same_state(together.state.select([lane]), alone.state)


def test_more_beams_than_hypotheses() -> None:
    """What fills up the beams is not possible, so it must not be read either."""
    model = lively(enc_num_tokens=3, dec_num_tokens=7, enc_max_seq_len=2, dec_max_seq_len=3)
    tokens, state = model.generate(prompts(0), 5, start=2, beams=50)
    assert len(tokens[0]) == 5
    assert state.position.tolist() == [5]


def test_mixed_precision() -> None:
    """The cache keeps the model's dtype, whatever autocast makes of keys and values."""
    for kind in POSITIONS:
        model, text = lively(positions=kind).float(), torch.randint(START, (1, 8))
        with torch.autocast("cpu", torch.bfloat16):
            stream = model.stream(text, 7, start=START, temperature=0)
            source = model.encode(text[:, :5], model.encode(torch.tensor([[START]])).mem).enc_out
            whole = model.decode(torch.cat([torch.tensor([[START]]), text[:, 5:]], 1), source, src=text[:, :5])[0, -1]
            steps = recorded(model)
            assert len(list(stream)) == 7
        assert steps[0].dtype == torch.bfloat16
        assert_close(steps[0][0], whole, rtol=0.1, atol=0.2)


# --- Compiled ---------------------------------------------------------------------------------------------------------


def test_one_compilation_serves_a_whole_stream() -> None:
    """From a document's first token on, across segments."""
    model, counter = lively(), CompileCounter()
    expected = model.generate(prompts(0, 0), 17, start=START, temperature=0).tokens
    model.decoder.compile_step(backend=counter, fullgraph=True)
    compiled = model.generate(prompts(0, 0), 17, start=START, temperature=0).tokens
    assert all(map(torch.equal, compiled, expected))
    assert counter.frame_count == 1


# --- Mistakes ---------------------------------------------------------------------------------------------------------

ONE = torch.zeros(1, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens: expected a whole number of at least 0, got -1"),
        (dict(max_new_tokens=2.5), "max_new_tokens: expected a whole number of at least 0, got 2.5"),
        (dict(temperature=-0.5), "temperature: expected a finite number of at least 0 .*, got -0.5"),
        (dict(temperature=math.nan), "temperature: expected a finite number of at least 0 .*, got nan"),
        (dict(temperature=math.inf), "temperature: expected a finite number of at least 0 .*, got inf"),
        (dict(top_k=0), "top_k: expected a whole number of at least 1, got 0"),
        (dict(top_p=0.0), r"top_p: expected a share in \(0, 1\], got 0.0"),
        (dict(top_p=1.1), r"top_p: expected a share in \(0, 1\], got 1.1"),
        (dict(min_p=-0.1), r"min_p: expected a share in \(0, 1\], got -0.1"),
        (dict(min_p=math.nan), r"min_p: expected a share in \(0, 1\], got nan"),
        (dict(repetition_penalty=0), "repetition_penalty: expected a finite number above 0, got 0"),
        (dict(repetition_penalty=math.inf), "repetition_penalty: expected a finite number above 0, got inf"),
        (dict(stop=[11]), "stop: expected token ids from 0 to 10, got 11"),
        (dict(never=[-1]), "never: expected token ids from 0 to 10, got -1"),
        (dict(never=range(10)), "never: no token is left"),
        (dict(start=11), "start: expected token ids from 0 to 10, got 11"),
        (dict(start=None), "start: expected the token that started documents in training"),
        (dict(prompt=torch.zeros(1, 3)), "tokens: expected token ids, .* got torch.float32 of shape"),
        (
            dict(prompt=torch.zeros(1, 1, 3, dtype=torch.int64)),
            "tokens: expected token ids, .* got torch.int64 of shape",
        ),
        (dict(prompt=[[1.5, 2]]), "tokens: expected token ids .* got float64 of shape"),
        (dict(prompt=[]), "tokens: expected at least one lane, got none"),
        (dict(prompt=torch.full((1, 2), 11)), "tokens: expected token ids from 0 to 10, got 11"),
        (dict(prompt=torch.full((1, 70), -1)), "tokens: expected token ids from 0 to 10, got -1"),
        (dict(prompt_mask=torch.ones(1, 3, dtype=torch.bool)), "mask: expected torch.bool of the tokens' shape"),
        (dict(prompt_mask=torch.ones(1, 2)), "mask: expected torch.bool, or integers of 0 and 1, .* torch.float32"),
        (dict(prompt=[ONE[0]], prompt_mask=torch.ones(1, 2, dtype=torch.bool)), "mask: expected torch.bool"),
        (
            dict(generator=[torch.Generator()] * 2),
            "generator: expected a torch.Generator, or a list with one for each of 1 lanes",
        ),
        (dict(generator=3), "generator: expected a torch.Generator, .*, got 3"),
        (dict(stop=3), "stop: expected a list of token ids, got 3"),
        (dict(beams=0), "beams: expected a whole number of at least 1, got 0"),
        (dict(beams=2, top_k=3), "beams: a search does not sample"),
        (dict(beams=2, callback=print), "beams: a search does not sample"),
        (dict(beams=2, sampling=Sampling(temperature=0.5)), "beams: a search does not sample"),
        (dict(temperature=None), "temperature: expected a finite number of at least 0 .*, got None"),
        (
            dict(prompt_mask=torch.full((1, 2), 3)),
            "mask: expected torch.bool, .* got other integers, from 3 to 3",
        ),
        (dict(length_penalty=0.5), "length_penalty: 0.5 has no meaning without beams; leave it out"),
        (dict(beams=2, length_penalty=math.nan), "length_penalty: expected a finite number, got nan"),
        (dict(beams=2, max_new_tokens=-3), "max_new_tokens: expected a whole number of at least 0, got -3"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"prompt": ONE, "max_new_tokens": 2, "start": START, **arguments}
    with pytest.raises(ValueError, match=message):
        lively().generate(**given)


def test_a_state_that_does_not_fit_is_refused() -> None:
    model, state = lively(), lively().read(prompts(1, 2), start=START)
    with pytest.raises(ValueError, match=r"state: expected memory .* \(1, 3, 8\), \(1, 5\), .* got \(2, 3, 8\)"):
        model.read(prompts(3), state)
    with pytest.raises(ValueError, match=r"state: expected memory .* torch.float32, .* got .* torch.float64"):
        lively().float().read(prompts(3, 3), state)
    with pytest.raises(ValueError, match=r"state: expected memory .*\(2, 4\).*, got .*\(2, 5\)"):
        lively(enc_max_seq_len=4).read(prompts(3, 3), state)
    with pytest.raises(ValueError, match="start: expected 10, that of the state, got 3"):
        model.read(prompts(3, 3), state, start=3)


def test_an_encoder_only_model_cannot_generate() -> None:
    with pytest.raises(ValueError, match="no decoder"):
        lively(encoder_only=True).generate(ONE, 1, start=START)


def test_a_stream_of_inference_mode_goes_on_outside() -> None:
    model = lively()
    with torch.inference_mode():
        stream = model.stream(ONE, 20, start=START, temperature=0)
        next(stream)
        expected = model.generate(ONE, 20, start=START, temperature=0).tokens[0]
    assert torch.cat(list(stream)).equal(expected[1:])


def test_huge_numbers_of_tokens_are_a_stream_without_an_end() -> None:
    stream = lively().stream(ONE, 10**30, start=START)
    assert len(list(itertools.islice(stream, 60))) == 60


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"beams": 2}])
@pytest.mark.parametrize("bias", [math.nan, -math.inf])
def test_a_model_that_has_diverged_is_refused(options: dict[str, Any], bias: float) -> None:
    """Or one that rules out whatever may be generated, of which a token that is never to come would come."""
    model = lively()
    assert model.decoder is not None
    with torch.no_grad():
        model.decoder.to_logits.bias.fill_(bias)
        model.decoder.to_logits.bias[START] = 0
    with pytest.raises(ValueError, match="its weights have diverged"):
        model.generate(torch.tensor([[1]]), 3, start=START, **options)


def test_without_a_prompt_a_state_goes_on() -> None:
    model = lively()
    _, state = model.generate([torch.tensor([1, 2]), torch.tensor([3])], 3, start=START, temperature=0)
    empty = torch.empty(2, 0, dtype=torch.int64)
    for expected, got in zip(
        model.generate(empty, 9, state=state, temperature=0).tokens,
        model.generate(None, 9, state=state, temperature=0).tokens,
        strict=True,
    ):
        assert expected.equal(got)
    for prompt in (None, 3, torch.tensor(3)):
        with pytest.raises(ValueError, match=r"tokens: expected token ids .* or None to go on from a state"):
            model.generate(prompt, 3, start=START)
