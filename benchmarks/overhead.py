"""What the engine costs beside the cell: microseconds per segment of tiny cells, where nothing hides it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memformer import replay
from memformer.bench.meters import gradient_difference, machine, spread, take_gradients
from memformer.config import check_count

__all__ = ["Overhead", "run"]


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """The replay engine's cost beside a tiny cell, in one thread.

    The second table is of a cell of two tensors that belongs to a module with many more. It is time of the processor:
    what else runs on the machine counts less.
    """

    segments: int = 500
    """Segments of a rollout."""
    tokens: int = 4
    """Tokens of a segment: the steps of the GRU."""
    dim: int = 8
    """Width of the GRU."""
    unused: int = 2000
    """Parameters that the owner of the second cell has and the cell does not use."""
    repeats: int = 7
    """How often each method is timed; they take turns."""

    def __post_init__(self) -> None:
        for name in ("segments", "tokens", "dim", "unused", "repeats"):
            check_count(name, getattr(self, name))


class _Recurrent(nn.Module):
    """A GRU over one segment, with a loss."""

    def __init__(self, dim: int):
        super().__init__()
        self.rnn = nn.GRU(dim, dim, batch_first=True)

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        out, memory = self.rnn(segment, memory)
        return out.square().mean(), memory


class _TwoOfMany(nn.Module):
    """Two tensors of many."""

    def __init__(self, dim: int, unused: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.unused = nn.ParameterList(nn.Parameter(torch.zeros(4)) for _ in range(unused))

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.tanh(self.linear(memory + segment[:, 0]))
        return memory.square().mean(), memory


Method = Callable[[nn.Module, list[Tensor], Tensor], Tensor]
"""The loss of a rollout of a cell over segments, from a memory."""


def _checkpointed(use_reentrant: bool) -> Method:
    def loss(cell: nn.Module, segments: list[Tensor], memory: Tensor) -> Tensor:
        losses = []
        for segment in segments:
            loss, memory = checkpoint(cell, segment, memory, use_reentrant=use_reentrant)
            losses.append(loss)
        return torch.stack(losses).sum()

    return loss


def _replayed(schedule: replay.Schedule) -> Method:
    return lambda cell, segments, memory: replay.memory_replay(cell, segments, memory, schedule=schedule).loss


METHODS: dict[str, Method] = {
    "plain BPTT": lambda cell, segments, memory: replay.full_bptt(cell, segments, memory).loss,
    "checkpoint per segment, reentrant": _checkpointed(True),
    "checkpoint per segment, not reentrant": _checkpointed(False),
    "memory replay": _replayed(replay.EveryMemory()),
    "memory replay, all graphs kept": _replayed(replay.EveryMemory(graphs=10**9)),
    "memory replay, 16 stored memories": _replayed(replay.Binomial(16)),
}


def run(settings: Overhead) -> Iterator[str]:
    """Yield the lines of two tables. Gradients are compared first.

    Raises:
        RuntimeError: a method's gradients are not those of plain BPTT.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield f"{machine(torch.device('cpu'))}; {settings.repeats} interleaved runs in one thread"
        torch.manual_seed(0)
        segments = list(torch.randn(settings.segments, 2, settings.tokens, settings.dim))
        shape = f"{settings.segments} segments of {settings.tokens} tokens, dim {settings.dim}"
        yield from ["", f"a GRU over {shape}"]
        memory = torch.zeros(1, 2, settings.dim).requires_grad_()  # for reentrant checkpoints
        yield from _table(METHODS, settings, _Recurrent(settings.dim), segments, memory)
        yield from ["", f"a linear layer whose owner has {settings.unused:,} parameters besides, {shape}"]
        two = {name: METHODS[name] for name in ("plain BPTT", "memory replay")}
        cell = _TwoOfMany(settings.dim, settings.unused)
        yield from _table(two, settings, cell, segments, torch.zeros(2, settings.dim))
    finally:
        torch.set_num_threads(threads)


def _table(
    methods: Mapping[str, Method], settings: Overhead, cell: nn.Module, segments: list[Tensor], memory: Tensor
) -> Iterator[str]:
    def microseconds(method: Method) -> float:
        gc.collect()  # and then not: a full collection takes as long as hundreds of segments, whenever it comes
        gc.disable()
        try:
            start = time.process_time()
            method(cell, segments, memory).backward()  # type: ignore[no-untyped-call]
            return 1e6 * (time.process_time() - start) / len(segments)
        finally:
            gc.enable()

    expected: dict[str, Tensor | None] = {}
    for name, method in methods.items():
        microseconds(method)
        found = take_gradients(cell)
        gradient_difference(name, found, expected := expected or found)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(settings.repeats):
        for name, method in methods.items():
            times[name].append(microseconds(method))
            take_gradients(cell)
    first = spread(times["plain BPTT"]).median
    yield f"{'method':<38} {'us per segment (min-median-max)':>32} {'of BPTT':>8}"
    for name, taken in times.items():
        least, median, most = spread(taken)
        yield f"{name:<38} {f'{least:,.0f}-{median:,.0f}-{most:,.0f}':>32} {median / first:>8.2f}"
