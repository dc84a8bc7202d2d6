"""Cells of every kind, drawn by hypothesis, under every way to replay them, against a loop written out here.

The loop is plain autograd and shares nothing with the package: not ``full_bptt``, nor how losses are added or weighed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from memformer import replay

BATCH, DIM = 2, 3
LEAVES = [
    "growing", "view", "halves", "alias", "part", "expanded", "constant", "trained constant", "integers", "number",
    "complex", "late", "gone", "none", "nested", "transposed", "half precision",
]  # fmt: skip
VALUES = ["state", "view", "tree"]
PLACES = ["plain", "checkpoint", "inner gradient", "fast weights"]


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    wanted: tuple[bool, ...]
    leaves: tuple[str, ...]
    as_dict: bool
    value: str
    place: str
    dropout: bool
    resets: tuple[bool, ...]
    starts_itself: bool
    memory_grad: bool
    input_grad: bool
    at_once: int | None
    weights: tuple[float, ...] | None
    autocast: bool
    final_loss: bool
    schedule: replay.Schedule
    seed: int

    @property
    def count(self) -> int:
        return len(self.wanted)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 6))
    wanted = draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))
    some = st.integers(1, 4)
    inner = st.one_of(
        st.builds(replay.EveryMemory, st.integers(0, count + 1)),
        st.builds(replay.EveryKth, some, st.integers(0, 2)),
        st.builds(replay.Binomial, some, st.integers(0, 2)),
        st.sampled_from([replay.Budget(2000), replay.Budget(20_000), replay.Budget(10**9)]),
    )
    return Case(
        wanted=tuple(wanted),
        leaves=tuple(draw(st.lists(st.sampled_from(LEAVES), max_size=4))),
        as_dict=draw(st.booleans()),
        value=draw(st.sampled_from(VALUES)),
        place=draw(st.sampled_from(PLACES)),
        dropout=draw(st.booleans()),
        resets=tuple(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        starts_itself=draw(st.booleans()),
        memory_grad=draw(st.booleans()),
        input_grad=draw(st.booleans()),
        at_once=draw(st.sampled_from([None, 1, 2, 3])),
        weights=draw(st.none() | st.lists(st.floats(-2, 2), min_size=count, max_size=count).map(tuple)),
        autocast=draw(st.booleans()),
        final_loss=draw(st.booleans()),
        schedule=draw(inner | st.builds(replay.Offload, inner)),
        seed=draw(st.integers(0, 10**6)),
    )


class Cell(nn.Module):
    """A state, and beside it further leaves of the memory, each of which is made anew and used in every segment."""

    def __init__(self, case: Case):
        super().__init__()
        self.case = case
        self.read, self.keep = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, 1)
        self.initial = nn.Parameter(torch.randn(DIM))
        self.unused = nn.Parameter(torch.randn(DIM))
        self.frozen = nn.Parameter(torch.randn(DIM), requires_grad=False)
        self.register_buffer("scale", torch.rand(DIM))
        self.dropout = nn.Dropout(0.5 if case.dropout else 0.0)

    def start(self) -> Any:
        return self.pack([self.initial.expand(BATCH, DIM), *(self.first(kind) for kind in self.case.leaves)])

    def first(self, kind: str) -> Any:
        """What a leaf of that kind is before the first segment."""
        shape = {"growing": (BATCH, 1, DIM), "part": (BATCH, DIM - 1), "transposed": (DIM, BATCH)}
        match kind:
            case "constant":
                return torch.full((BATCH, DIM), 0.5, dtype=torch.float64)
            case "trained constant":
                return self.initial.exp()
            case "integers":
                return torch.arange(BATCH)
            case "number":
                return 1
            case "complex":
                return torch.ones(BATCH, DIM, dtype=torch.complex128)
            case "none" | "late":
                return None
            case "nested":
                return {"a": (torch.ones(BATCH, DIM, dtype=torch.float64), None), "b": [torch.zeros(1).double()]}
            case "halves":
                return tuple(torch.ones(BATCH, DIM, dtype=torch.float64) for _ in range(2))
            case "half precision":
                return torch.ones(BATCH, DIM, dtype=torch.bfloat16)
            case _:
                return torch.ones(shape.get(kind, (BATCH, DIM)), dtype=torch.float64)

    def used(self, kind: str, leaf: Any) -> Any:
        """What a leaf adds to the state."""
        match kind:
            case "growing":
                return leaf.square().mean(1)
            case "part":
                return leaf.sum(1, keepdim=True)
            case "transposed":
                return leaf.T
            case "integers":
                return leaf[:, None] % 3
            case "complex":
                return leaf.real * leaf.imag
            case "nested":
                return leaf["a"][0] * leaf["b"][0]
            case "halves":
                return leaf[0] - leaf[1].square()
            case "half precision":
                return leaf.double().detach()
            case _:
                return 0 if leaf is None else leaf

    def next(self, kind: str, leaf: Any, state: Tensor, x: Tensor) -> Any:
        """That leaf after the segment."""
        wide = torch.cat([x * state, state, state.sin()], 1)
        match kind:
            case "growing":
                return torch.cat([leaf, state[:, None]], 1)
            case "view":
                return wide[:, DIM : 2 * DIM]
            case "halves":
                return wide[:, DIM:].chunk(2, 1)
            case "alias":
                return state
            case "part":
                return state[:, 1:]
            case "expanded":
                return wide[:1, :DIM].expand(BATCH, DIM)
            case "constant" | "trained constant" | "none":
                return leaf
            case "integers" | "number":
                return leaf + 1
            case "complex":
                return torch.complex(state, wide[:, :DIM]).conj()
            case "late":
                return wide[:, -DIM:]
            case "gone":
                return None if leaf is None or state.sum() > 0 else state.cos()
            case "nested":
                return {"a": (wide[:, :DIM], None), "b": [state.mean(0)]}
            case "transposed":
                return wide.T[:DIM]
            case "half precision":
                return state.detach().to(torch.bfloat16)
        raise AssertionError(kind)

    def pack(self, leaves: list[Any]) -> Any:
        return {str(i): x for i, x in enumerate(leaves)} if self.case.as_dict else tuple(leaves)

    def forward(self, segment: dict[str, Any], memory: Any) -> tuple[Any, Any]:
        if memory is None:
            memory = self.start()
        state, *others = memory.values() if self.case.as_dict else memory
        x = segment["x"]
        if segment["reset"] is not None:
            state = torch.where(segment["reset"][:, None], self.initial, state)
        inside = state + sum((self.used(kind, leaf) for kind, leaf in zip(self.case.leaves, others, strict=True)), 0)
        after = self.compute(x, inside)
        others = [self.next(kind, leaf, after, x) for kind, leaf in zip(self.case.leaves, others, strict=True)]
        return self.value(after, segment), self.pack([after, *others])

    def compute(self, x: Tensor, state: Tensor) -> Tensor:
        match self.case.place:
            case "checkpoint":
                return checkpoint(self.step, x, state, use_reentrant=False)
            case "inner gradient":
                with torch.enable_grad():
                    point = state if state.requires_grad else state.detach().requires_grad_()
                    energy = self.step(x, point).square().sum()
                    (force,) = torch.autograd.grad(energy, point, create_graph=True)
                return torch.tanh(state - 0.1 * force)
            case "fast weights":
                fast = {"weight": self.keep.weight + x.T @ state, "bias": self.keep.bias}
                return torch.tanh(torch.func.functional_call(self.keep, fast, (state,)) + self.read(x))
        return self.step(x, state)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self.dropout(self.read(x)) * self.scale + self.keep(state) + self.frozen)

    def value(self, state: Tensor, segment: dict[str, Any]) -> Any:
        if self.case.at_once is None:
            return self.loss(state, segment) if self.case.wanted[segment["index"]] else None
        match self.case.value:
            case "view":
                return torch.cat([state, state], 1)[:, :DIM]
            case "tree":
                return {"state": state, "index": segment["index"], "nothing": None, "count": torch.arange(2)}
        return state

    def loss(self, state: Tensor, segment: dict[str, Any]) -> Tensor:
        return (self.head(self.dropout(state)) * segment["x"]).square().mean()

    def read_out(self, values: list[Any], segments: list[dict[str, Any]]) -> Tensor | None:
        states = [value["state"] if isinstance(value, dict) else value for value in values]
        losses = [
            self.loss(state, segment) if self.case.wanted[segment["index"]] else None
            for state, segment in zip(states, segments, strict=True)
        ]
        if all(loss is None for loss in losses):
            return None
        losses = [self.head.weight.new_zeros(()) if loss is None else loss for loss in losses]
        return torch.stack(losses) if self.case.weights is not None else sum(losses)


def inputs(case: Case, cell: Cell) -> tuple[list[Any], Any]:
    segments = [
        {
            "x": torch.randn(BATCH, DIM, dtype=torch.float64).requires_grad_(case.input_grad),
            "reset": torch.rand(BATCH) < 0.5 if reset else None,
            "index": t,
        }
        for t, reset in enumerate(case.resets)
    ]
    if case.starts_itself:
        return segments, None

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().clone()
        return x.requires_grad_(case.memory_grad and x.dtype in (torch.float64, torch.complex128))

    return segments, tree_map(leaf, cell.start())


def by_hand(case: Case, cell: Cell, segments: list[Any], memory: Any) -> tuple[Tensor, Any]:
    """The loss and the final memory, by plain autograd."""
    values, total = [], torch.zeros((), dtype=torch.float64)
    for segment in segments:
        value, memory = cell(segment, memory)
        values.append(value)
    weights = case.weights or (1.0,) * case.count
    if case.at_once is None:
        for weight, value in zip(weights, values, strict=True):
            total = total if value is None else total + weight * value
        return total, memory
    for start in range(0, case.count, case.at_once):
        part = slice(start, start + case.at_once)
        loss = cell.read_out(values[part], segments[part])
        if loss is not None:
            total = total + (
                loss if case.weights is None else (loss * torch.tensor(weights[part], dtype=torch.float64)).sum()
            )
    return total, memory


def by_replay(method: Callable[..., replay.Rollout]) -> Callable[..., tuple[Tensor, Any]]:
    def run(case: Case, cell: Cell, segments: list[Any], memory: Any) -> tuple[Tensor, Any]:
        readout = {} if case.at_once is None else {"readout": cell.read_out, "readout_segments": case.at_once}
        rollout = method(cell, segments, memory, segment_weights=case.weights, schedule=case.schedule, **readout)
        return rollout.loss, rollout.memory

    return run


def outcome(case: Case, run: Callable[..., tuple[Tensor, Any]], *, at_once: bool = False) -> dict[str, Any]:
    """Everything that two ways must agree on. ``at_once``: the way has already back-propagated."""
    torch.manual_seed(case.seed)
    cell = Cell(case).double()
    segments, memory = inputs(case, cell)
    torch.manual_seed(case.seed + 1)
    with torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext():
        loss, after = run(case, cell, segments, memory)
    drawn = torch.get_rng_state()
    if not at_once:
        total = loss
        if case.final_loss:
            for x in tree_leaves(after):
                if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) and x.dtype != torch.bfloat16:
                    total = total + x.abs().square().sum()
        total.backward()
    assert torch.equal(drawn, torch.get_rng_state()), "backward moved the generator"
    given = [x.grad for x in tree_leaves((segments, memory)) if isinstance(x, Tensor)]
    return {
        "loss": loss.detach(),
        "memory": [x.detach() if isinstance(x, Tensor) else x for x in tree_leaves(after)],
        "gradients": {name: p.grad for name, p in cell.named_parameters()},
        "inputs": given,
        "random": drawn,
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, e in expected.items():
        a = actual[name]
        pairs = zip(tree_leaves(a), tree_leaves(e), strict=True)
        for x, y in pairs:
            if isinstance(x, Tensor) and y is None:  # plain autograd left it out
                assert not x.any(), name
            elif isinstance(y, Tensor):
                assert isinstance(x, Tensor), f"{name}: no gradient"
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")
            else:
                assert x == y, name


def check(case: Case) -> None:
    assert_same(outcome(case, by_replay(replay.memory_replay)), outcome(case, by_hand))


def check_accumulate(case: Case) -> None:
    """Its inputs need no gradient, and gradients must reach the first segment and the last readout."""
    case = changed(
        case,
        wanted=(True, *case.wanted[1:-1], True)[: case.count],
        input_grad=False,
        memory_grad=False,
        final_loss=False,
        weights=case.weights and tuple(weight or 1.0 for weight in case.weights),
    )
    assert_same(outcome(case, by_replay(replay.accumulate), at_once=True), outcome(case, by_hand))


FAST = settings(max_examples=100, deadline=None, derandomize=True)
LONG = settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FAST
@given(cases())
def test_replay_equals_a_plain_loop(case: Case) -> None:
    check(case)


@FAST
@given(cases())
def test_accumulate_equals_a_plain_loop(case: Case) -> None:
    check_accumulate(case)


@pytest.mark.slow
@LONG
@given(cases())
def test_replay_equals_a_plain_loop_wherever_one_looks(case: Case) -> None:
    check(case)


@pytest.mark.slow
@LONG
@given(cases())
def test_accumulate_equals_a_plain_loop_wherever_one_looks(case: Case) -> None:
    check_accumulate(case)
