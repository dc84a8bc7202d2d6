"""The captured step of a token, on the CPU as a card: what is written is what is written eagerly."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from helpers import VOCABULARY, lively, lively_causal
from memformer import MemoryState, writing
from memformer.sampling import Choice, Sampling
from memformer.writing import Stream, Writing
from pretend_card import PretendCard, pretend_a_card

START = VOCABULARY - 1
TOKENS = 23  # over four ends of segments of five tokens
both = pytest.mark.parametrize("lively", [lively, lively_causal])
Lively = Callable[..., Any]

HOW: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0.0),
    "greedy with ends": dict(temperature=0.0, stop=[0, 3]),
    "drawn": dict(),
    "drawn with ends": dict(temperature=2.0, stop=[0, 3, START]),
    "all filters": dict(temperature=1.4, top_k=8, top_p=0.9, min_p=0.01, repetition_penalty=1.2, never=[3]),
    "a generator for each lane": dict(temperature=2.0, stop=[7]),
}


def prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(START, (n,), generator=generator) for n in lengths]


BEGUN = prompts(0, 4, 5, 11, 2)


def generators(name: str, device: torch.device | str = "cpu") -> Any:
    if "each" in name:
        return [torch.Generator(device).manual_seed(lane) for lane in range(len(BEGUN))]
    return torch.Generator(device).manual_seed(5)


def states(given: Any) -> list[Tensor]:
    return [g.get_state() for g in (given if isinstance(given, list) else [given])]


def assert_same_state(actual: MemoryState, expected: MemoryState) -> None:
    assert_close(actual.memory, expected.memory, rtol=1e-12, atol=1e-12)
    for name in ("segment", "pending", "position"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[], type[PretendCard]]:
    """Called, it makes the CPU a card: what is computed before is eager."""
    return functools.partial(pretend_a_card, monkeypatch)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """All that are made from now on."""
    made: list[Stream] = []
    init = Stream.__init__
    monkeypatch.setattr(Stream, "__init__", lambda self, *given, **named: made.append(self) or init(self, *given))
    return made


# --- Captured equals eager --------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", HOW)
def test_it_is_what_is_written_eagerly(
    lively: Lively,
    name: str,
    pretend: Callable[[], object],
    streams: list[Stream],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens, states and generators: in lanes whose segments end at different times, and that end at different times;
    and going on from the state. So does what runs eagerly on a card, where is looked now and then, too."""
    model, how = lively(), HOW[name]
    generator = generators(name)
    expected = model.generate(BEGUN, TOKENS, start=START, generator=generator, **how)
    drawn = states(generator)
    on = model.generate(None, 9, state=expected.state, generator=generator, **how)
    lengths = [len(lane) for lane in expected.tokens]
    assert (min(lengths) < max(lengths)) == ("stop" in how)
    pretend()
    monkeypatch.setattr(writing, "AHEAD", 3)
    for mode in ("on", "off"):
        streams.clear()
        generator = generators(name)
        found = model.generate(BEGUN, TOKENS, start=START, generator=generator, capture=mode, **how)
        assert_close(found.tokens, expected.tokens, rtol=0, atol=0)
        assert_same_state(found.state, expected.state)
        assert_close(states(generator), drawn, rtol=0, atol=0)
        after = model.generate(None, 9, state=found.state, generator=generator, capture=mode, **how)
        assert_close(after.tokens, on.tokens, rtol=0, atol=0)
        assert_same_state(after.state, on.state)
        launches = streams[0].launches
        # The first is eager, to see what logits are like; where the last lane ends may be seen late.
        assert max(lengths) - 1 <= launches < max(lengths) + 3 if mode == "on" else launches == 0


@both
@pytest.mark.parametrize("name", ["greedy with ends", "drawn with ends", "drawn"])
def test_a_stream_gives_each_token_as_it_comes(
    lively: Lively, name: str, pretend: Callable[[], object], streams: list[Stream]
) -> None:
    """And ends with the last lane; its state is at any time that of the tokens that came."""
    model, how = lively(), HOW[name]
    heard: list[Tensor] = []
    eager = model.stream(BEGUN, TOKENS, start=START, generator=generators(name), **how)
    expected = [(token, eager.state) for token in eager]
    pretend()
    stream = model.stream(BEGUN, TOKENS, start=START, generator=generators(name), capture="on", **how)
    for token, state in expected:
        assert torch.equal(next(stream), token)
        assert_same_state(stream.state, state)
    with pytest.raises(StopIteration):
        next(stream)
    assert stream.launches == len(expected) - 1
    given = dict(start=START, generator=generators(name), capture="on", **how)
    model.generate(BEGUN, TOKENS, callback=heard.append, **given)
    assert_close(heard, [token for token, _ in expected], rtol=0, atol=0)


@both
def test_a_weight_that_is_replaced_between_two_tokens(lively: Lively, pretend: Callable[[], object]) -> None:
    """To capture anew would write tokens."""
    found = []
    for mode in ("off", "on"):
        model = lively()
        if mode == "on":
            pretend()
        stream = model.stream(BEGUN, 8, start=START, temperature=0.0, capture=mode)
        tokens = [next(stream) for _ in range(4)]
        model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
        found.append([*tokens, *stream])
        assert stream.launches == (3 if mode == "on" else 0)
    assert_close(found[1], found[0], rtol=0, atol=0)


def test_one_lane_and_a_document_that_ends(pretend: Callable[[], object]) -> None:
    """The end is the start token: what goes on begins a new document."""
    model = lively()
    with torch.no_grad():
        model.decoder.to_logits.bias[START] += 6.0
    how = dict(start=START, temperature=3.0, stop=[START])
    generator = torch.Generator().manual_seed(0)
    expected = [model.generate(BEGUN[:1], 40, generator=generator, **how) for _ in range(4)]
    pretend()
    generator = torch.Generator().manual_seed(0)
    found = [model.generate(BEGUN[:1], 40, generator=generator, capture="on", **how) for _ in range(4)]
    assert_close([x.tokens for x in found], [x.tokens for x in expected], rtol=0, atol=0)
    assert [int(x.state.position) for x in found] == [int(x.state.position) for x in expected]
    assert 0 in [int(x.state.position) for x in found]


@both
def test_under_autocast(lively: Lively, pretend: Callable[[], object]) -> None:
    """Its noise is drawn in float32, whatever the logits are."""
    model = lively().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(BEGUN, TOKENS, start=START, generator=generators("")).tokens
        pretend()
        found = model.generate(BEGUN, TOKENS, start=START, generator=generators(""), capture="on").tokens
    assert_close(found, expected, rtol=0, atol=0)


# --- Waiting ----------------------------------------------------------------------------------------------------------


class NoCopies(TorchDispatchMode):
    """Refuses tensors that are made of Python's numbers, an index of a list among them: on a card they are copied."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.lift_fresh, torch.ops.aten.lift_fresh_copy):
            raise RuntimeError("numbers are copied to the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_numbers(lively: Lively) -> Iterator[Writing]:
    """Lanes whose tensors have shapes alone: to look at a number, as Python does for a condition, is an error."""
    model = lively()
    state = model.read(prompts(3, 7), start=START)
    opened = model.open(state)

    def faked(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype)

    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for name, p in module._parameters.items():
                module._parameters[name] = None if p is None else torch.nn.Parameter(faked(p))
            for name, b in module._buffers.items():
                module._buffers[name] = None if b is None else faked(b)
        lanes = Writing.__new__(Writing)
        lanes.model, lanes.opened, lanes.state = model, tree_map(faked, opened), state._map(faked)
        yield lanes


@both
@pytest.mark.parametrize("name", HOW)
def test_a_step_waits_for_nothing(lively: Lively, name: str) -> None:
    with without_numbers(lively) as lanes:
        choice = Choice(Sampling(**HOW[name]), lanes.model.config, START, torch.device("cpu"))
        going, noise = torch.ones(2, dtype=torch.bool), None
        if choice.draws:
            noise = torch.ones(2, VOCABULARY, dtype=torch.float64)
        with NoCopies():
            tokens, _, _ = writing._Step(lanes, choice).token(going, going.any(), noise)
        assert tokens.shape == (2,)


def test_what_waits_is_found() -> None:
    """What a step did before: a condition on the logits, ids that are copied to the card."""
    with without_numbers(lively) as lanes:
        logits = lanes.logits()
        with pytest.raises(DataDependentOutputException), NoCopies():
            bool(logits.isnan().any())
        for copies in (lambda: torch.tensor([1, 2]), lambda: logits[[1, 0]]):
            with pytest.raises(RuntimeError, match="numbers are copied"), NoCopies():
                copies()


@pytest.mark.parametrize(("name", "looks"), [("greedy", 3), ("greedy with ends", 3), ("drawn", 3), ("both", TOKENS)])
def test_how_often_is_looked(
    name: str, looks: int, pretend: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a segment, after some tokens, at the last one; or where chance must know who still draws."""
    how = HOW.get(name, dict(temperature=1.0, stop=[START]))
    model, seen = lively(enc_max_seq_len=18, dec_max_seq_len=19), Stream._seen
    asked: list[Stream] = []
    monkeypatch.setattr(Stream, "_seen", lambda self: asked.append(self) or seen(self))
    pretend()
    with torch.no_grad():
        model.decoder.to_logits.bias[[0, 3, START]] -= 100.0  # no end comes
    model.generate(BEGUN[:1], TOKENS, start=START, generator=generators(""), capture="on", **how)
    assert len(asked) == looks  # after 16 and 18, and at the end


# --- When, and when not -----------------------------------------------------------------------------------------------


def test_auto_captures_what_pays(monkeypatch: pytest.MonkeyPatch, streams: list[Stream]) -> None:
    model = lively()
    model.generate(BEGUN, writing.WORTH_CAPTURING + 1, start=START)
    pretend_a_card(monkeypatch)
    model.generate(BEGUN, writing.WORTH_CAPTURING, start=START)
    model.generate(BEGUN, writing.WORTH_CAPTURING + 1, start=START)
    model.generate(BEGUN, writing.WORTH_CAPTURING + 1, start=START, capture="off")
    model.generate(BEGUN, 1, start=START, capture="on")
    assert [stream.launches for stream in streams] == [0, 0, writing.WORTH_CAPTURING, 0, 0]


def test_what_waits_runs_eagerly_with_one_warning(
    pretend: Callable[[], object], streams: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively()
    expected = model.generate(BEGUN, 70, start=START, temperature=0).tokens
    ask = model.next_logits

    def waits(*given: Any) -> Tensor:
        if PretendCard.forbidding:
            raise RuntimeError("called a synchronizing CUDA operation")
        return ask(*given)

    model.next_logits = waits
    pretend()
    line = r"captured: .*test_captured_generation.py:\d+ \(.*\) waits for the card, .* in _Step.token"
    with pytest.warns(UserWarning, match=rf"{line}.*It runs eagerly") as said:
        found = model.generate(BEGUN, 70, start=START, temperature=0).tokens
    assert len(said) == 1
    assert_close(found, expected, rtol=0, atol=0)
    assert streams[-1].launches == 0
    with pytest.raises(ValueError, match=line):
        model.generate(BEGUN, 70, start=START, capture="on")


def test_what_is_refused(pretend: Callable[[], object]) -> None:
    model = lively()
    given = dict(prompt=BEGUN, max_new_tokens=3, start=START)
    with pytest.raises(ValueError, match="capture: expected one of auto, on, off, got 'yes'"):
        model.generate(**given, capture="yes")
    with pytest.raises(ValueError, match="capture: expected a CUDA device, got cpu; leave capture 'on' out"):
        model.stream(**given, capture="on")
    pretend()
    with pytest.raises(ValueError, match=r"capture: a beam search selects among its hypotheses .* leave capture 'on'"):
        model.generate(**given, beams=2, capture="on")
    model.steps_alike = False
    with pytest.raises(ValueError, match="capture: what a Memformer does for a token differs from token to token"):
        model.generate(**given, capture="on")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(BEGUN, 70, start=START)
        model.generate(**given, beams=2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_found_at_the_next_look(temperature: float, pretend: Callable[[], object]) -> None:
    """And nothing was written since."""
    pretend()
    model = lively()
    stream = model.stream(BEGUN[:1], TOKENS, start=START, temperature=temperature, capture="on")
    for _ in range(2):
        next(stream)
    before = stream.state
    with torch.no_grad():
        model.decoder.to_logits.bias.fill_(float("nan"))
    next(stream)
    with pytest.raises(ValueError, match="its weights have diverged"):
        list(stream)
    assert_same_state(stream.state, before)


def test_a_stream_that_is_dropped_lets_go_of_its_graph(pretend: Callable[[], object]) -> None:
    """At once: what it holds on a card is large, and no cycle may keep it."""
    pretend()
    stream = lively().stream(BEGUN, 70, start=START)
    next(stream)
    next(stream)
    assert stream.launches == 1
    kept = weakref.ref(stream)
    gc.disable()
    try:
        del stream
        assert kept() is None
    finally:
        gc.enable()


# --- The same numbers as before ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_drawn_is_what_torch_draws(dtype: torch.dtype) -> None:
    """``torch.multinomial`` draws the same numbers, and waits for the card to check the probabilities."""
    logits = 3 * torch.randn(7, 50, dtype=dtype)
    model = lively(enc_num_tokens=50, dec_num_tokens=50)
    choice = Choice(Sampling(top_k=20), model.config, 49, torch.device("cpu"))
    seen = torch.zeros(7, 1, dtype=torch.int64)
    drawing = [torch.Generator().manual_seed(3) for _ in range(2)]
    for _ in range(20):
        scores = choice.scores(logits, seen)
        probability = choice.sampling.kept(scores).softmax(-1)
        expected = torch.multinomial(probability, 1, generator=drawing[0])[:, 0]
        noise = torch.empty_like(logits).exponential_(generator=drawing[1])
        assert torch.equal(choice(scores, noise), expected)


# --- On a card --------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("captures nothing: run with --device cuda")
    return device


@both
@pytest.mark.parametrize("name", HOW)
def test_on_a_card_it_is_what_is_written_eagerly(
    card: torch.device, lively: Lively, name: str, streams: list[Stream]
) -> None:
    model, begun, found = lively().to(card), [lane.to(card) for lane in BEGUN], []
    for mode in ("off", "on"):
        generator = generators(name, card)
        tokens, state = model.generate(begun, TOKENS, start=START, generator=generator, capture=mode, **HOW[name])
        after = model.generate(None, 9, state=state, generator=generator, capture=mode, **HOW[name])
        found.append((tokens, after.tokens, states(generator), after.state))
    assert_close(found[1][:3], found[0][:3], rtol=0, atol=0)
    assert_same_state(found[1][3], found[0][3])
    assert [stream.launches > 0 for stream in streams] == [False, False, True, True]


@both
@pytest.mark.parametrize("mode", ["off", "on"])
def test_on_a_card_no_token_waits(card: torch.device, lively: Lively, mode: Any) -> None:
    sizes = {"max_seq_len": 40} if lively is lively_causal else {"enc_max_seq_len": 40, "dec_max_seq_len": 41}
    model, begun = lively(**sizes).to(card), [lane.to(card) for lane in BEGUN]
    stream = model.stream(begun, 25, start=START, generator=generators("", card), capture=mode)
    next(stream), next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(writing.AHEAD - 3):
            next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_a_card_streams_do_not_grow_memory(card: torch.device) -> None:
    model, sizes = lively().to(card), []
    for _ in range(6):
        model.generate([lane.to(card) for lane in BEGUN], TOKENS, start=START, capture="on")
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[-1] <= sizes[1]
