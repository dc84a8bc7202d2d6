"""Segments that are fetched when they are needed: exact, one at a time, and the same each time or refused."""

import collections
import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memformer import replay

COUNT, DIM = 12, 4
SCHEDULES = [
    replay.EveryMemory(),
    replay.EveryMemory(graphs=0),
    replay.EveryMemory(graphs=3),
    replay.Binomial(2),
    replay.EveryKth(3),
    replay.Budget(1000),
    replay.Offload(replay.EveryMemory()),
]


class Loads:
    """A data set: makes the segment that is asked for, and knows how many of them are alive."""

    def __init__(self, count: int = COUNT):
        self.count, self.asked = count, []
        self.alive = self.most = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, t: int) -> dict[str, Any]:
        self.asked.append(t)
        x = torch.sin(torch.arange(2 * DIM, dtype=torch.float64) * (t + 1)).view(2, DIM)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(x.untyped_storage(), self._gone)
        return {"x": x, "nan": torch.full((2,), float("nan")), "index": t, "words": "of a text"}

    def _gone(self) -> None:
        self.alive -= 1


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRUCell(DIM, DIM), nn.Linear(DIM, 1)

    def forward(self, segment: dict[str, Any], memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.rnn(segment["x"], memory)
        return self.head(memory).square().mean(), memory

    def encode(self, segment: dict[str, Any], memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.rnn(segment["x"], memory)
        return memory, memory

    def read_out(self, values: list[Tensor], segments: list[dict[str, Any]]) -> Tensor:
        return sum((self.head(v * s["x"]).square().mean() for v, s in zip(values, segments, strict=True)))


def gradients(cell: Cell) -> list[Tensor]:
    grads = [p.grad for p in cell.parameters()]
    cell.zero_grad()
    return grads


def run(method: Any, cell: Cell, segments: Any, at_once: int | None, **options: Any) -> list[Tensor]:
    memory = torch.ones(2, DIM, dtype=torch.float64)
    if at_once is None:
        rollout = method(cell, segments, memory, **options)
    else:
        rollout = method(cell.encode, segments, memory, cell.read_out, readout_segments=at_once, **options)
    if method is not replay.accumulate:
        rollout.loss.backward()
    return [rollout.loss.detach(), rollout.memory.detach(), *gradients(cell)]


@pytest.mark.parametrize("at_once", [None, 1, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fetched_segments_give_the_same_gradients(schedule: replay.Schedule, at_once: int | None) -> None:
    cell = Cell().double()
    expected = run(replay.full_bptt, cell, [Loads()[t] for t in range(COUNT)], at_once)
    for method in (replay.full_bptt, replay.memory_replay, replay.accumulate):
        for a, e in zip(run(method, cell, Loads(), at_once, schedule=schedule), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-15)


def test_scan_fetches_too() -> None:
    cell, loads = Cell().double(), Loads()
    values, _ = replay.scan(cell.encode, loads, torch.ones(2, DIM, dtype=torch.float64))
    torch.stack(values).sum().backward()
    assert loads.asked == [*range(COUNT), *reversed(range(COUNT - 1))]


def test_one_segment_is_held_at_a_time() -> None:
    """And is fetched once for each time that it is run."""
    cell = Cell().double()
    for method in (replay.memory_replay, replay.accumulate):
        loads = Loads()
        run(method, cell, loads, None, schedule=replay.EveryMemory(graphs=0))
        assert loads.asked == [*range(COUNT), *reversed(range(COUNT))]
        assert (loads.most, loads.alive) == (1, 0)
    loads = Loads()
    run(replay.memory_replay, cell, loads, 2, schedule=replay.EveryMemory(graphs=0))
    assert loads.asked == [*range(COUNT), *range(COUNT), *reversed(range(COUNT))]
    assert (loads.most, loads.alive) == (2, 0)  # the readout's
    loads = Loads()
    rollout = replay.memory_replay(cell, loads, torch.ones(2, DIM, dtype=torch.float64))
    assert loads.alive == 1, "that of the last segment's graph"
    del rollout
    assert loads.alive == 0


def test_a_segment_that_is_another_when_it_is_fetched_again() -> None:
    class Crops(Loads):
        def __getitem__(self, t: int) -> dict[str, Any]:
            return super().__getitem__(t) | {"x": random.random() * torch.ones(2, DIM, dtype=torch.float64)}

    with pytest.raises(RuntimeError, match=r"number 10 of the Crops is not the same when it is fetched again.*crops"):
        run(replay.memory_replay, Cell().double(), Crops(), None)


def test_a_segment_that_the_cell_changes_in_place() -> None:
    cell = Cell().double()

    def changes(segment: dict[str, Any], memory: Tensor) -> tuple[Tensor, Tensor]:
        segment["x"].mul_(2)
        return cell(segment, memory)

    assert run(replay.memory_replay, cell, Loads(), None)  # it is fetched anew
    rollout = replay.memory_replay(changes, Loads(), torch.ones(2, DIM, dtype=torch.float64), params=cell)
    expected = replay.full_bptt(changes, Loads(), torch.ones(2, DIM, dtype=torch.float64))
    rollout.loss.backward()
    actual = gradients(cell)
    expected.loss.backward()
    for a, e in zip(actual, gradients(cell), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-15)


def test_gradients_of_fetched_segments_are_refused() -> None:
    class Trained(Loads):
        def __getitem__(self, t: int) -> Tensor:
            return torch.ones(2, DIM, requires_grad=True)

    with pytest.raises(
        ValueError, match=r"number 0 requires a gradient, and would get none.*of a Trained .*list\(segm"
    ):
        replay.memory_replay(lambda x, m: (m.sum(), m * x), Trained(), torch.ones(2, DIM))


@pytest.mark.parametrize("make", [collections.deque, tuple, iter, torch.stack])
def test_collections_and_iterators_are_held(make: Any) -> None:
    """A gradient reaches what is in them."""
    segments = [torch.randn(2, DIM, requires_grad=True) for _ in range(3)]
    replay.memory_replay(lambda x, m: ((m * x).sum(), m + x), make(segments), torch.ones(2, DIM)).loss.backward()
    assert all(x.grad is not None for x in segments)


def test_an_empty_data_set() -> None:
    with pytest.raises(ValueError, match="expected at least one segment, got none"):
        replay.memory_replay(Cell(), Loads(0), None)
