"""``replay.verify``: right where replay is right, and otherwise a sentence about what is wrong."""

import functools
import gc
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memformer import replay
from replay_cells import CELLS, problem

DIM = 4


class Cell(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.rnn = nn.GRUCell(DIM, DIM)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(DIM, 1)

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.rnn(self.dropout(segment), memory)
        return self.head(memory).square().mean(), memory


def inputs(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    return list(torch.randn(3, 2, DIM, dtype=dtype)), torch.randn(2, DIM, dtype=dtype)


@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_that_is_right(kind: str, at_once: int | None) -> None:
    model, segments, memory = problem(kind, [True, False, True], dropout=0.3)
    readout = {} if at_once is None else {"readout": model.read_out, "readout_segments": at_once, "params": model}
    verdict = replay.verify(model if at_once is None else model.encode, segments, memory, **readout)
    assert verdict.ok, str(verdict)
    assert str(verdict).startswith("replay is right for")
    assert len(verdict.outcomes) == 8
    assert all(outcome.error < 1e-12 for outcome in verdict.outcomes.values())
    verdict.raise_if_wrong()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tolerance_goes_by_the_coarsest_numbers(dtype: torch.dtype) -> None:
    verdict = replay.verify(Cell(0.2).to(dtype), *inputs(dtype))
    assert verdict.ok, str(verdict)
    assert verdict.tolerance == {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    with torch.autocast("cpu", torch.bfloat16):
        assert replay.verify(Cell(), *inputs(torch.float32)).tolerance == 5e-2


def test_values_may_be_anything_without_a_readout() -> None:
    cell = Cell().double()
    verdict = replay.verify(lambda x, m: ({"out": (m * x, None)}, cell(x, m)[1]), *inputs(), params=cell)
    assert verdict.ok, str(verdict)


# --- What is wrong is found, and named


class Scaled(nn.Module):
    """Its gradient is wrong where no graph of all segments is built: a stand-in for any fault of the engine."""

    def __init__(self, of: nn.Module, wrong: dict[str, bool]):
        super().__init__()
        self.of, self.wrong = of, wrong

    def forward(self, segment: Tensor, memory: Tensor) -> Any:
        loss, memory = self.of(segment, memory)
        if self.wrong["now"]:
            memory.register_hook(lambda grad: 2 * grad)
        return loss, memory


def test_a_gradient_that_is_off_is_named_with_its_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"now": False}
    cell = Scaled(Cell(), wrong).double()

    def scan(*args: Any, **keywords: Any) -> Any:
        wrong["now"] = True
        try:
            return replay.scan(*args, **keywords)
        finally:
            wrong["now"] = False

    monkeypatch.setattr("memformer.replay.verdict.scan", scan)
    segments, memory = inputs()
    verdict = replay.verify(cell, segments, memory.requires_grad_(), schedules=[replay.EveryMemory(graphs=3)])
    (outcome,) = verdict.outcomes.values()
    assert not verdict.ok
    assert outcome.error > 0.1
    assert "the gradient of parameter 'of.rnn.weight_hh' is off by" in str(verdict)
    assert "the gradient of the initial memory is off by" in str(verdict)
    assert "Under every schedule" in str(verdict)
    assert "Nothing that the cell keeps for itself was seen to change" in str(verdict)
    with pytest.raises(RuntimeError, match=r"replay is WRONG for Scaled: 3 segments, float64"):
        verdict.raise_if_wrong()


class Keeps(Cell):
    """State of its own, of a kind."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.calls, self.draws = kind, 0, itertools.count()
        self.generator, self.python, self.numpy = torch.Generator(), random.Random(1), np.random.default_rng(1)
        self.history: list[Tensor] = []
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += self.kind == "counter"
        noise = {
            "counter": lambda: self.calls,
            "iterator": lambda: next(self.draws),
            "generator": lambda: torch.randn((), generator=self.generator).item(),
            "own python": self.python.random,
            "own numpy": self.numpy.random,
            "python": random.random,
            "numpy": np.random.rand,
        }[self.kind]()
        return super().forward(segment * (1 + noise), memory)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("counter", "attribute 'calls' of Keeps"),
        ("iterator", "attribute 'draws' of Keeps"),
        ("generator", "attribute 'generator' of Keeps"),
        ("own python", "attribute 'python' of Keeps"),
        ("own numpy", "attribute 'numpy' of Keeps"),
        ("python", "the state of Python's random numbers"),
        ("numpy", "the state of numpy's random numbers"),
    ],
)
def test_hidden_state_is_found_and_named_and_generators_are_put_back(kind: str, named: str) -> None:
    cell = Keeps(kind).double()

    def states() -> list[Any]:
        generators = [random.getstate(), np.random.get_state()[1].tolist(), cell.python.getstate()]
        return [*generators, cell.numpy.bit_generator.state, cell.generator.get_state().tolist()]

    before = states()
    verdict = replay.verify(cell, *inputs())
    assert states() == before
    assert verdict.suspects == (named,)
    assert not verdict.ok
    assert "Two plain runs differ: the gradient of parameter" in str(verdict)
    assert f"A run of the cell changes {named}, and replay runs it again" in str(verdict)


def test_a_generator_that_a_function_closes_over() -> None:
    cell, generator = Cell().double(), torch.Generator()

    def noisy(segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return cell(segment * torch.randn((), generator=generator), memory)

    verdict = replay.verify(noisy, *inputs(), params=cell)
    assert len(verdict.suspects) == 1
    assert "'generator' that test_a_generator" in verdict.suspects[0]


class Counts(Cell):
    """Two plain runs agree, for the first segment resets the count; a replay backwards does not."""

    def forward(self, segment: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        if memory is None:
            self.calls, memory = 0, torch.zeros(2, DIM, dtype=segment.dtype)
        self.calls += 1
        return super().forward(segment * self.calls, memory)


def test_state_that_two_plain_runs_do_not_show() -> None:
    cell = Counts().double()
    cell.calls = 0
    verdict = replay.verify(cell, inputs()[0], None)
    assert not verdict.problems
    assert verdict.outcomes[replay.EveryMemory()].error > 1e-3
    assert "attribute 'calls' of Counts" in str(verdict)


class CountsInABuffer(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            self.seen += 1
        return super().forward(segment, memory)


def test_a_buffer_that_is_left_otherwise() -> None:
    verdict = replay.verify(CountsInABuffer().double(), *inputs(), schedules=[replay.EveryMemory()])
    assert "left otherwise than by a plain run: buffer 'seen'" in str(verdict)


def test_random_numbers_that_stand_elsewhere() -> None:
    def cell(segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            torch.rand(())
        return memory.sum(), memory * segment

    segments, memory = inputs()
    verdict = replay.verify(cell, segments, memory.requires_grad_(), schedules=[replay.EveryMemory()])
    assert "torch's random numbers stand elsewhere afterwards" in str(verdict)


def test_a_refusal_is_the_verdict_and_needs_no_other_advice() -> None:
    weight = torch.ones(DIM, dtype=torch.float64, requires_grad=True)
    segments, memory = inputs()
    verdict = replay.verify(
        lambda x, m: ((m * weight).sum(), m * x), segments, memory.requires_grad_(), schedules=[replay.EveryMemory()]
    )
    (outcome,) = verdict.outcomes.values()
    assert outcome.refused
    assert "'weight' of shape (4,), which requires a gradient and would get none" in str(verdict)
    assert "Nothing that the cell keeps" not in str(verdict)


def test_a_missing_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd reaches and replay does not, whoever knows of it."""
    weight = torch.ones(DIM, dtype=torch.float64, requires_grad=True)

    def forgets(cell: Any, segments: Any, memory: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return [memory.sum() + weight.sum() for _ in segments], memory

    monkeypatch.setattr("memformer.replay.verdict.scan", forgets)
    segments, memory = inputs()
    verdict = replay.verify(
        lambda x, m: (m.sum() + weight.sum(), m), segments, memory, schedules=[replay.EveryMemory()]
    )
    assert "the gradient of captured tensor 1 of shape (4,) is missing; plain autograd's has norm 6" in str(verdict)


def test_a_cell_that_holds_on_to_what_it_returned() -> None:
    kept: list[Tensor] = []

    class Hoards(Cell):
        def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            loss, memory = super().forward(segment, memory)
            kept.append(memory.repeat(1, 1000))
            return loss, kept[-1][:, :DIM]

    verdict = replay.verify(Hoards().double(), *inputs(), schedules=[replay.EveryMemory(), replay.EveryMemory(0)])
    assert "between forward and backward, where memories and graphs have" in str(verdict)
    assert "something holds on to what it was given or returned" in str(verdict)


def test_a_cell_that_makes_cycles_is_not_to_blame() -> None:
    """They are freed some time later, by the garbage collector."""

    class Cycles(Cell):
        def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            loss, memory = super().forward(segment, memory)
            cycle: list[Any] = [wide := memory.repeat(1, 1000)]
            cycle.append(cycle)
            return loss, wide[:, :DIM]

    gc.disable()
    try:
        verdict = replay.verify(Cycles().double(), *inputs(), schedules=[replay.EveryMemory(), replay.EveryMemory(0)])
    finally:
        gc.enable()
    assert verdict.ok, str(verdict)


# --- Nothing is left behind


def test_everything_is_as_before() -> None:
    cell = nn.Sequential(Cell(0.5), nn.BatchNorm1d(DIM)).double()
    norm, graph = cell[1], cell[0].head.weight.sum()

    def step(segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return cell[0](norm(segment), memory)

    for p in cell.parameters():
        p.grad = torch.ones_like(p)
    grads = [p.grad for p in cell.parameters()]
    segments, memory = inputs()
    memory.requires_grad_().grad = torch.ones_like(memory)
    values = [x.clone() for x in cell.state_dict().values()]
    buffers, state = list(norm.buffers()), torch.get_rng_state()
    replay.verify(step, segments, memory, params=cell)
    assert all(p.grad is grad for p, grad in zip(cell.parameters(), grads, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in [*cell.parameters(), memory])
    assert all(map(torch.equal, cell.state_dict().values(), values))
    assert all(a is b for a, b in zip(norm.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    graph.backward()  # no parameter was touched


def test_a_buffer_that_the_cell_replaces_is_put_back() -> None:
    class Replaces(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            self.seen = self.seen + 1
            return super().forward(segment, memory)

    cell = Replaces().double()
    before = cell.seen
    replay.verify(cell, *inputs())
    assert cell.seen is before
    assert cell.seen == 0


def test_a_tensor_derived_before_the_rollout_serves_two_plain_runs() -> None:
    cell, log = Cell().double(), torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    decay = log.exp()
    verdict = replay.verify(lambda x, m: cell(x, m * decay), *inputs(), params=[cell, log])
    assert not verdict.problems
    assert verdict.outcomes


def test_parameters_that_are_derived() -> None:
    """They have no ``.grad``, about which torch warns, and what they are made of gets its gradient through them."""
    weight = torch.randn(DIM, DIM, dtype=torch.float64, requires_grad=True)
    derived = weight / weight.norm()

    def cell(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        m = torch.tanh(x @ derived + m)
        return m.square().sum(), m

    verdict = replay.verify(cell, *inputs(), params=[derived])
    assert verdict.ok, str(verdict)
    assert "tensors with a gradient: 2" in verdict.summary  # the derived one, and the one that it is made of


def test_segments_of_which_the_first_is_the_shortest() -> None:
    """A schedule of bytes plans by the first segment's sizes, as it does in replay."""

    def cell(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        m = torch.tanh(x @ rnn.weight + m)
        return m.square().sum(), m.mean(0, keepdim=True)

    rnn = nn.Linear(32, 32, bias=False, dtype=torch.float64)
    segments = [torch.randn(length, 32, dtype=torch.float64) for length in (1, 64, 64, 64, 64, 64)]
    verdict = replay.verify(cell, segments, torch.zeros(1, 32, dtype=torch.float64), params=rnn)
    assert verdict.ok, str(verdict)


def test_a_memory_with_a_graph_of_the_callers_can_still_be_used() -> None:
    cell = Cell().double()
    initial = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    memory = initial.exp().expand(2, -1)
    verdict = replay.verify(cell, inputs()[0], memory)
    assert verdict.ok, str(verdict)
    replay.memory_replay(cell, inputs()[0], memory).loss.backward()
    assert initial.grad.norm() > 0


def test_parameters_of_one_name_in_two_modules() -> None:
    cell, head = nn.GRUCell(DIM, DIM).double(), nn.GRUCell(DIM, DIM).double()

    def step(segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = cell(segment, memory)
        return head(segment, memory).sum(), memory

    verdict = replay.verify(step, *inputs(), params=[cell, head])
    assert verdict.ok
    assert "tensors with a gradient: 8" in str(verdict)


def test_a_partial_is_known_by_what_it_calls() -> None:
    def scaled(by: float, cell: nn.Module, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return cell(by * segment, memory)

    verdict = replay.verify(functools.partial(functools.partial(scaled, 2.0), Cell().double()), *inputs())
    assert "scaled: 3 segments, float64, tensors with a gradient: 6" in str(verdict)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"under plain autograd .* gives nothing that requires a gradient"):
        replay.verify(lambda x, m: (m.sum(), m), *inputs())
    with pytest.raises(ValueError, match="expected at least one segment"):
        replay.verify(Cell(), [], None)


def test_a_graph_that_a_run_leaves_behind_is_named():
    """An auxiliary loss as an attribute: under graphs=0 it would get no gradient, without a word."""

    class Leaves(nn.Module):
        def __init__(self, cut):
            super().__init__()
            self.linear, self.cut = nn.Linear(3, 3).double(), cut

        def forward(self, segment, memory):
            memory = torch.tanh(self.linear(memory + segment))
            self.aux = memory.square().mean()
            if self.cut:
                self.aux = self.aux.detach()
            return memory.sum(), memory

    segments, memory = list(torch.randn(3, 2, 3).double()), torch.zeros(2, 3).double()
    verdict = replay.verify(Leaves(cut=False), segments, memory)
    assert verdict.ok
    assert verdict.graphs_left == ("attribute 'aux' of Leaves",)
    assert "leaves a graph in attribute 'aux' of Leaves. A loss that is made of it" in str(verdict)
    assert replay.verify(Leaves(cut=True), segments, memory).graphs_left == ()
