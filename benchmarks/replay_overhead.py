"""What the engine costs beside the cell: microseconds per segment of a tiny cell, where nothing hides it.

``python benchmarks/replay_overhead.py [--segments 500] [--repeats 7]``. Every method is first held to the gradients of
plain BPTT. Then they take turns, in one thread; the table has the median of the repeats, with the least and the most.
It is time of the processor: what else runs on the machine counts less.
The second part runs a cell of two tensors that is bound to a module of 2,002: what is not used should cost nothing.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memformer import replay

Method = Callable[["Rollout"], Tensor]


@dataclass(frozen=True)
class Overhead:
    """The settings of the benchmark."""

    segments: int = 500
    """Segments of one rollout."""

    tokens: int = 4
    """Tokens of one segment: the GRU takes this many steps."""

    dim: int = 8
    """Width of the GRU."""

    repeats: int = 7
    """How often each method runs."""

    unused: int = 2000
    """Parameters that the owner of the second cell has and the cell does not use."""


class Cell(nn.Module):
    """A GRU over one segment, with a loss; the owner may have parameters that nobody uses."""

    def __init__(self, dim: int, unused: int = 0):
        super().__init__()
        self.rnn = nn.GRU(dim, dim, batch_first=True)
        self.unused = nn.ParameterList(nn.Parameter(torch.zeros(4)) for _ in range(unused))

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        out, memory = self.rnn(segment, memory)
        return out.square().mean(), memory


class Two(nn.Module):
    """Two tensors of many."""

    def __init__(self, dim: int, unused: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.unused = nn.ParameterList(nn.Parameter(torch.zeros(4)) for _ in range(unused))

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.tanh(self.linear(memory + segment[:, 0]))
        return memory.square().mean(), memory


@dataclass(frozen=True)
class Rollout:
    """What every method runs."""

    cell: nn.Module
    segments: list[Tensor]
    memory: Tensor


def loop(rollout: Rollout) -> Tensor:
    return checkpointed(rollout, None)


def checkpointed(rollout: Rollout, use_reentrant: bool | None) -> Tensor:
    memory, losses = rollout.memory, []
    for segment in rollout.segments:
        if use_reentrant is None:
            loss, memory = rollout.cell(segment, memory)
        else:
            loss, memory = checkpoint(rollout.cell, segment, memory, use_reentrant=use_reentrant)
        losses.append(loss)
    return torch.stack(losses).sum()


def replayed(schedule: replay.Schedule) -> Method:
    def run(rollout: Rollout) -> Tensor:
        return replay.memory_replay(rollout.cell, rollout.segments, rollout.memory, schedule=schedule).loss

    return run


METHODS: dict[str, Method] = {
    "full BPTT": loop,
    "checkpoint per segment, reentrant": lambda rollout: checkpointed(rollout, True),
    "checkpoint per segment, not reentrant": lambda rollout: checkpointed(rollout, False),
    "memory replay": replayed(replay.EveryMemory()),
    "memory replay, all graphs kept": replayed(replay.EveryMemory(graphs=10**9)),
    "memory replay, 16 stored memories": replayed(replay.Binomial(16)),
}


def seconds(method: Method, rollout: Rollout) -> float:
    rollout.cell.zero_grad()
    start = time.process_time()
    method(rollout).backward()  # type: ignore[no-untyped-call]
    return time.process_time() - start


def check(methods: dict[str, Method], rollout: Rollout) -> None:
    """AssertionError unless all methods have the gradients of the plain loop."""
    gradients = []
    for method in methods.values():
        seconds(method, rollout)
        gradients.append([p.grad for p in rollout.cell.parameters() if p.grad is not None])
    for grads in gradients[1:]:
        torch.testing.assert_close(grads, gradients[0], rtol=1e-4, atol=1e-6)


def table(methods: dict[str, Method], rollout: Rollout, repeats: int) -> list[str]:
    """One line per method: median, least and most microseconds per segment, and the share of the first one's median."""
    check(methods, rollout)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            times[name].append(1e6 * seconds(method, rollout) / len(rollout.segments))
    first = statistics.median(next(iter(times.values())))
    lines = ["| method | us per segment | least | most | beside full BPTT |", "| --- | --- | --- | --- | --- |"]
    for name, taken in times.items():
        median = statistics.median(taken)
        lines.append(f"| {name} | {median:,.0f} | {min(taken):,.0f} | {max(taken):,.0f} | {median / first:.2f} x |")
    return lines


def main(settings: Overhead) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, one thread")
    segments = list(torch.randn(settings.segments, 2, settings.tokens, settings.dim))
    print(f"\n{settings}\n\nA GRU, all of whose parameters are used:\n")
    rollout = Rollout(Cell(settings.dim), segments, torch.zeros(1, 2, settings.dim).requires_grad_())
    print("\n".join(table(METHODS, rollout, settings.repeats)))
    print(f"\nA linear layer, whose owner has {settings.unused} parameters besides:\n")
    rollout = Rollout(Two(settings.dim, settings.unused), segments, torch.zeros(2, settings.dim))
    few = {name: METHODS[name] for name in ("full BPTT", "memory replay")}
    print("\n".join(table(few, rollout, settings.repeats)))


if __name__ == "__main__":
    main(tyro.cli(Overhead))
