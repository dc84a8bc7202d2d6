"""keep_values=False: the readout runs with the cell, so that of a segment only memory and loss are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from helpers import lively, lively_causal, tiny, tokens
from memformer import memory_replay_backprop, replay, rollouts
from memformer.bench.meters import kept_bytes, peak_bytes
from memformer.data.segments import Segment
from memformer.wavefront import Wavefront
from replay_cells import CELLS, assert_equal, by, problem

SCHEDULES = [
    replay.EveryMemory(),
    replay.EveryMemory(graphs=0),
    replay.EveryMemory(graphs=3),
    replay.EveryKth(3),
    replay.Binomial(2),
    replay.Binomial(3, graphs=0),
    replay.Budget(6_000),
    replay.Offload(replay.EveryMemory()),
]
WANTED = [True, False, True, True, False, True, True]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_equals_bptt(kind: str, schedule: replay.Schedule, dropout: float) -> None:
    """Loss, memory, all gradients and the random numbers, with dropout in the cell and in the readout."""
    options = {"keep_values": False, "check": dropout > 0 and kind == "gru"}
    made = problem(kind, WANTED, dropout=dropout)
    expected = by(replay.full_bptt, *made, 1, **options)
    assert_equal(by(replay.memory_replay, *made, 1, schedule=schedule, **options), expected)
    if not dropout:  # then it does not matter when the readout runs
        assert_equal(by(replay.full_bptt, *made, 3), expected)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, -1.0, 0.0, 1.0, 3.0, 0.25]])
def test_weights_norms_and_accumulate(weights: list[float] | None) -> None:
    model, segments, memory = problem("gru", [True] * 7, inputs_need_grad=False)
    found = []
    for method, kept in ((replay.full_bptt, True), (replay.memory_replay, False), (replay.accumulate, False)):
        watch = replay.MemoryGradients()
        options = replay.Options(keep_values=kept, segment_weights=weights, memory_gradients=watch)
        rollout = method(model.encode, segments, memory, model.read_out, options=options, params=[model])
        if rollout.loss.requires_grad:
            rollout.loss.backward()
        found.append([rollout.loss.detach(), *(p.grad for p in model.parameters()), torch.tensor(watch.norms[1:])])
        model.zero_grad()
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_segment_run_again_for_its_memory_alone_has_no_loss_unless_that_draws_numbers(dropout: float) -> None:
    model, segments, memory = problem("gru", [True] * 7, dropout=dropout)
    calls = 0

    def read_out(values: list, segments: list) -> Tensor | None:
        nonlocal calls
        calls += 1
        return model.read_out(values, segments)

    schedule = replay.Binomial(1)
    rollout = replay.memory_replay(
        model.encode, segments, memory, read_out, schedule=schedule, keep_values=False, params=[model]
    )
    rollout.loss.backward()
    assert calls == (schedule.plan(7).evaluations if dropout else 7 + 6)


def test_statistics_in_the_readout_advance_once() -> None:
    """A readout with buffers that change: they are put back for a segment that is run again."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, values: list, segments: list) -> Tensor:
            return (self.norm(values[0].flatten(0, 1)) * segments[0][1].flatten(0, 1)).square().mean()

    found = []
    for method in (replay.full_bptt, replay.memory_replay):
        model, segments, memory = problem("gru", [True] * 5)
        readout = Normed().double()
        rollout = method(model.encode, segments, memory, readout, keep_values=False, schedule=replay.Binomial(2))
        rollout.loss.backward()
        found.append([*(p.grad for p in (*model.cell.parameters(), *readout.parameters())), *readout.buffers()])
    assert_equal(found[1], found[0])


# --- What is kept -----------------------------------------------------------------------------------------------------


def test_of_a_segment_memory_and_loss_are_kept() -> None:
    """Bytes that are alive between forward and backward, and at the most in both: they grow by no value."""
    cell = CELLS["gru"](0.0).double()
    most = {}
    for kept in (False, True):
        sizes = []
        for count in (8, 24):
            memory, segments = torch.randn(1, 2, 4).double(), list(torch.randn(count, 2, 50, 4).double())

            def forward(memory: Tensor = memory, segments: list = segments, kept: bool = kept) -> replay.Rollout:
                return replay.memory_replay(cell, segments, memory, _squares, keep_values=kept)

            sizes.append((kept_bytes(forward), peak_bytes(lambda f=forward: f().loss.backward(), torch.device("cpu"))))
            cell.zero_grad(set_to_none=False)
        most[kept] = [(many - few) / 16 for few, many in zip(*sizes, strict=True)]
    memory_and_loss, value = 2 * 4 * 8 + 8, 2 * 50 * 4 * 8
    assert max(most[False]) <= memory_and_loss
    assert most[True][0] >= value, "the count counts"
    assert most[True][1] >= 2 * value, "a value and its gradient"


def _squares(values: list[Tensor], segments: list[Tensor]) -> Tensor:
    return torch.stack([(v * s).square().mean() for v, s in zip(values, segments, strict=True)]).sum()


def around_a_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    from memformer import hf

    torch.manual_seed(3)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    return hf.with_memory(base.double(), 3, 5).trainable("all").double()


MODELS: dict[str, Callable[[], Any]] = {"memformer": lively, "causal": lively_causal, "llama": around_a_llama}


def text_of(model: Any, count: int) -> list[Segment]:
    """Segments of five tokens, the first with another document in one lane; and targets where they are needed."""
    torch.manual_seed(count)
    ids = torch.randint(8, (2, 5 * count))
    targets = None if model.reads_its_targets else [torch.randint(8, (2, 4)) for _ in range(count)]
    return model.segments(ids, targets, None, None, [torch.tensor([t == 2, False]) for t in range(count)], None)


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str) -> None:
    """Gradients equal those of plain BPTT, a tally counts once, and of a segment no output is kept."""
    model = MODELS[kind]()
    ways: list[tuple[Any, dict[str, Any]]] = [(replay.full_bptt, {"wavefront": False, "keep_values": True})]
    ways += [
        (replay.memory_replay, {"keep_values": False, "wavefront": w}) for w in (None, *[True] * (kind == "causal"))
    ]
    found = []
    for method, options in ways:
        seen: list[Tensor] = []
        model.zero_grad()
        outcome = rollouts.rollout(
            model,
            text_of(model, 6),
            method=method,
            tally=lambda targets, losses, counted, seen=seen: seen.append(torch.stack([losses.sum(), counted.sum()])),
            **options,
        )
        outcome.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append([outcome.loss.detach(), torch.stack(seen).sum(0), grads])
    for others in found[1:]:
        assert_equal(others, found[0], rtol=1e-10, atol=1e-12)
    grown = {}
    for kept in (False, True):
        few, many = (
            kept_bytes(lambda t=text: rollouts.rollout(model, t, wavefront=False, keep_values=kept))  # noqa: B023
            for text in (text_of(model, 4), text_of(model, 12))
        )
        grown[kept] = (many - few) / 8
    carried = sum(x.nbytes for x in tree_leaves(outcome.memory))
    assert grown[False] <= carried + 64
    assert grown[True] >= grown[False] + 2 * 5 * 8 * 8 - 8, "the count counts"


def test_outputs_are_kept_while_they_are_little() -> None:
    model = tiny()  # one layer of each kind, width 8 in float64

    def kept(count: int, *shape: int, schedule: replay.Schedule = SCHEDULES[0]) -> bool:
        segments = [Segment(torch.zeros((), dtype=torch.long).expand(shape))] * count
        return rollouts.keeps_outputs(model, segments, schedule)

    many = rollouts.SEGMENTS_PER_LAYER * model.depth + 1
    tokens_of = rollouts.FEW_BYTES // (2 * many * 8 * 8)
    assert not kept(many, 1, tokens_of + 1)
    assert kept(many, 1, tokens_of + 1, schedule=replay.EveryMemory(graphs=2)), "who keeps graphs is after time"
    assert not kept(many, 1, tokens_of + 1, schedule=replay.Budget(10**9))
    assert kept(many, 1, tokens_of)
    assert kept(many - 1, 8, tokens_of)


def test_a_long_rollout_keeps_no_outputs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit that a few bytes exceed: from then on the readout gets segments one by one, and twice."""
    monkeypatch.setattr(rollouts, "FEW_BYTES", 0)
    model = lively_causal(depth=3)
    calls: list[int] = []
    of_all = model.token_losses
    monkeypatch.setattr(
        model, "token_losses", lambda outputs, *rest: calls.append(len(outputs)) or of_all(outputs, *rest)
    )
    for count, expected in ((12, [12]), (13, [1] * 25)):
        calls.clear()
        rollouts.rollout(model, text_of(model, count), wavefront=None if count > 12 else False).loss.backward()
        assert calls == expected
    calls.clear()
    rollouts.rollout(model, text_of(model, 13), readout_tokens=40).loss.backward()
    assert max(calls) > 1, "who says how much the readout gets has the outputs kept"


# --- A budget for all layers at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_a_budget_is_measured_where_most_layers_work(kept: bool) -> None:
    """At the first step only one layer does; by that the graphs of the others would exceed the budget."""
    model = lively_causal(depth=4, dim=16, tie_embeddings=True)
    planned: list[tuple[int, int]] = []

    class Noting:
        needs_sizes = True

        def plan(self, num_segments: int, memory_bytes: int = 0, graph_bytes: int = 0) -> replay.Plan:
            planned.append((memory_bytes, graph_bytes))
            return replay.EveryMemory().plan(num_segments, memory_bytes, graph_bytes)

    text = text_of(model, 9)
    rollouts.rollout(model, text, wavefront=True, schedule=Noting(), keep_values=kept).loss.backward()
    front = Wavefront(model, 2)
    flight, sizes = front.start(None), []
    for diagonal in front.diagonals(text):
        sizes.append(replay.measure(front, diagonal, flight, params=[*front.parameters, model]))
        _, flight = front(diagonal, replay.detach(flight))
    [(memory_bytes, graph_bytes)] = planned
    assert memory_bytes >= max(size.memory_bytes for size in sizes)
    assert graph_bytes >= 0.99 * max(size.graph_bytes for size in sizes)
    assert graph_bytes > 3 * sizes[0].graph_bytes
    # Whoever says where is heard.
    rollouts.rollout(model, text, wavefront=True, schedule=Noting(), keep_values=kept, measure_at=0)
    assert planned[1][1] < graph_bytes / 2


# --- The caller's mistakes --------------------------------------------------------------------------------------------


def test_what_does_not_fit() -> None:
    model, segments, memory = problem("gru", [False, True], inputs_need_grad=False)
    with pytest.raises(ValueError, match=r"readout_segments: expected 1 with keep_values=False, .*, got 3"):
        replay.Options(keep_values=False, readout_segments=3)
    with pytest.raises(ValueError, match="keep_values: expected True, False or None, got 'no'"):
        replay.Options(keep_values="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_values: expected True, False or None, got 0"):
        replay.Options(keep_values=0)  # type: ignore[arg-type]
    assert replay.Options(readout_segments=np.int64(2)).readout_segments == 2  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"measure_at: expected one of the 2 segments, counted from 0, got 2"):
        replay.memory_replay(model, segments, memory, schedule=replay.Budget(10**9), measure_at=2)
    with pytest.raises(ValueError, match=r"scan: .* neither segment_weights nor readout_segments or keep_values"):
        replay.scan(model.encode, segments, memory, keep_values=False)
    with pytest.raises(ValueError, match="accumulate: the first segment has no loss"):
        replay.accumulate(model.encode, segments, memory, model.read_out, keep_values=False, params=[model])
    stray = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"<lambda> uses 'stray' of shape \(\), which requires a gradient"):
        replay.memory_replay(
            model.encode, segments, memory, lambda v, s: stray * v[0].sum(), keep_values=False, params=[model]
        )
    own = tiny(encoder_only=True)
    with pytest.raises(ValueError, match="keep_values: says when the decoder runs"):
        memory_replay_backprop(own, tokens(1, 4), loss_fn=lambda i, x: x.sum(), keep_values=False)
    with pytest.raises(ValueError, match="readout_tokens: expected none with keep_values=False"):
        rollouts.rollout(tiny(), [Segment(tokens(1, 3), tgt=tokens(1, 3))], keep_values=False, readout_tokens=9)
