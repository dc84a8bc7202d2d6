"""The bytes that a plan promises are those that are alive: also where memories are views of something larger."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memformer import replay
from memformer.bench.meters import peak_bytes

BATCH, SLOTS, TOKENS, WIDTH = 2, 4, 12, 16
SCHEDULES = [replay.EveryMemory(), replay.EveryMemory(graphs=0), replay.Binomial(2), replay.EveryMemory(graphs=100)]


class SlotsOfHidden(nn.Module):
    """Recurrent memory tokens (Bulatov et al. 2022): memory and value are views of one hidden state."""

    def __init__(self, depth: int = 1):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.mix = nn.Linear(SLOTS + TOKENS, SLOTS + TOKENS)

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.cat([segment, memory], 1)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden) + self.mix(hidden.mT).mT)
        return hidden[:, 0], hidden[:, -SLOTS:]


def read_out(values: list[Tensor], segments: list[Tensor]) -> Tensor:
    return torch.cat(values).square().mean()


def rollout_of(cell: nn.Module, count: int, schedule: replay.Schedule) -> int:
    """The most bytes that a rollout makes beside its inputs, if nobody needs its values."""
    segments, memory = list(torch.randn(count, BATCH, TOKENS, WIDTH)), torch.randn(BATCH, SLOTS, WIDTH)

    def without_values(segment: Tensor, memory: Tensor) -> tuple[None, Tensor]:
        return None, cell(segment, memory)[1]

    def step(segments: list[Tensor]) -> None:
        _, after = replay.scan(without_values, segments, memory, schedule=schedule, params=cell)
        after.square().mean().backward()

    step(segments[:1])  # makes the parameters' gradients, which stay
    return peak_bytes(lambda: step(segments), torch.device("cpu"))


def sizes_of(cell: nn.Module) -> replay.Sizes:
    return replay.measure(cell, torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, SLOTS, WIDTH))


def test_a_memory_that_is_a_view_keeps_itself_alone() -> None:
    """A quarter of a hidden state is memory, and the rest is not kept."""
    cell, count = SlotsOfHidden(), 500
    sizes = sizes_of(cell)
    assert sizes.memory_bytes == BATCH * SLOTS * WIDTH * 4
    plan = replay.EveryMemory().plan(count, *sizes)
    assert rollout_of(cell, count, replay.EveryMemory()) == pytest.approx(plan.bytes, rel=0.1)


def test_a_budget_is_kept_by_memories_that_are_views() -> None:
    cell, budget = SlotsOfHidden(), 250_000
    plan = replay.Budget(budget).plan(500, *sizes_of(cell))
    assert 0.95 * budget < plan.bytes <= budget
    assert rollout_of(cell, 500, replay.Budget(budget)) == pytest.approx(plan.bytes, rel=0.1)


def test_plan_and_bytes_alive_where_the_graph_is_most(tmp_path: Path) -> None:
    """Graphs kept, a budget for some of them, and memories in files: within a tenth of what the plan says."""
    cell = SlotsOfHidden(depth=8)
    sizes = sizes_of(cell)
    for schedule in (
        replay.EveryMemory(graphs=20),
        replay.Budget(8 * sizes.graph_bytes),
        replay.Offload(replay.EveryMemory(graphs=5), to=tmp_path),
    ):
        plan = schedule.plan(20, *sizes)
        assert rollout_of(cell, 20, schedule) == pytest.approx(plan.bytes, rel=0.1), schedule


def test_a_value_that_is_a_view_keeps_itself_alone() -> None:
    cell, values = SlotsOfHidden(), []
    segments, memory = list(torch.randn(100, BATCH, TOKENS, WIDTH)), torch.randn(BATCH, SLOTS, WIDTH)
    values, _ = replay.scan(cell, segments, memory)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in values[:-1]), "the last one has a graph"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_views_change_no_gradient(schedule: replay.Schedule) -> None:
    torch.manual_seed(1)
    cell = SlotsOfHidden(depth=2).double()
    segments = [x.double().requires_grad_() for x in torch.randn(6, BATCH, TOKENS, WIDTH)]
    memory = torch.randn(BATCH, SLOTS, WIDTH).double().requires_grad_()
    inputs = [*cell.parameters(), *segments, memory]
    expected = replay.full_bptt(cell, segments, memory, read_out)
    actual = replay.memory_replay(cell, segments, memory, read_out, schedule=schedule)
    for a, e in zip(
        torch.autograd.grad(actual.loss + actual.memory.sum(), inputs),
        torch.autograd.grad(expected.loss + expected.memory.sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


def test_leaves_that_share_a_storage_share_it_still() -> None:
    """Copied is only what keeps more alive than it is: not two halves of one tensor, nor what the caller holds."""
    table, stored = torch.randn(100, 8), []

    def halves(segment, memory):
        stored.append([weakref.ref(x.untyped_storage()) for x in memory[:2]])
        state = torch.tanh(torch.cat(memory[:2]) + segment)
        return state.mean(), (*state.split(2), table[:3])

    initial = (torch.zeros(2, 8), torch.zeros(2, 8), table[:3])
    rollout = replay.memory_replay(
        halves, [torch.ones(4, 8, requires_grad=True), *torch.ones(3, 4, 8)], initial, schedule=replay.EveryMemory(0)
    )
    for first, second in stored[1:]:
        assert first() is second() is not None
    assert rollout.memory[2].untyped_storage().data_ptr() == table.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", ["expanded", "transposed", "complex", "same twice", "integers"])
def test_copies_look_as_the_views_did(layout: str) -> None:
    """Shape and the order of strides stay, so that a cell sees in replay what it saw."""

    def cell(segment, memory):
        state = memory["state"] if isinstance(memory, dict) else memory
        wide = torch.tanh(torch.cat([state, segment, segment]))
        after = {
            "expanded": lambda: {"state": wide[:2], "more": wide[:1].expand(2, -1)},
            "transposed": lambda: {"state": wide[:2], "more": wide.T[:, :3]},
            "complex": lambda: {"state": wide[:2], "more": torch.complex(wide, wide)[1:3].conj()},
            "same twice": lambda: {"state": wide[:2], "more": wide[:2]},
            "integers": lambda: {"state": wide[:2], "more": (100 * wide).long()[:2]},
        }[layout]()
        loss = after["state"].sum()
        if isinstance(memory, dict):
            more = memory["more"]
            seen.append((more.shape, more.stride()[0] < more.stride()[1], 0 in more.stride()))
            loss = loss + more.abs().sum()
        return loss, after

    seen: list[object] = []
    inputs = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    results = []
    for method, options in [(replay.full_bptt, {}), *((replay.memory_replay, {"schedule": s}) for s in SCHEDULES)]:
        rollout = method(cell, inputs[1:], inputs[0], **options)
        results.append(torch.autograd.grad(rollout.loss + rollout.memory["state"].sum(), inputs))
        assert len(set(seen)) == 1
    for result in results[1:]:
        for a, e in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("kind", ["sparse", "compressed", "jagged"])
def test_measure_counts_what_is_not_strided(kind: str) -> None:
    """Of a sparse or nested tensor its parts are stored, and not the dense shape."""
    dense = torch.eye(50)
    make = {
        "sparse": lambda x: (dense * x).to_sparse(),
        "compressed": lambda x: (dense * x).to_sparse_csr(),
        "jagged": lambda x: torch.nested.nested_tensor([dense[:2] * x, dense[:1] * x], layout=torch.jagged),
    }[kind]
    sizes = replay.measure(lambda segment, memory: (segment.square(), make(segment)), torch.tensor(2.0), None)
    assert 50 * 4 <= sizes.memory_bytes < dense.nbytes / 4
