"""Memory replay here and in the earlier library (memformer 0.3.1), on its own README's example, in one run.

Each library lives in a process of its own; their runs take turns. Peak memory is the process's high-water mark during a
run, above what it held before (model and input loaded, no gradients). Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import memformer
from memformer import Memformer, replay
from memformer.bench.meters import (
    ProcessMeter,
    flops,
    gradient_difference,
    machine,
    seconds,
    spread,
    take_gradients,
)
from memformer.config import check_count
from memformer.data.segments import cut
from memformer.rollouts import rollout

from .example import SMALL, Example
from .rivals import INSTALL_EARLIER, earlier_settings, importing

__all__ = ["EarlierLibrary", "run"]


@dataclass(frozen=True, kw_only=True)
class EarlierLibrary:
    """Time and memory of one gradient by memory replay, here and in memformer 0.3.1.

    The folder is made by: pip install --no-deps --target FOLDER memformer==0.3.1 einops==0.8.2
    """

    earlier: Path | None = None
    """Folder of the earlier library."""
    runs: int = 7
    """How often each is timed; they take turns."""
    example: Example = field(default_factory=Example)

    def __post_init__(self) -> None:
        check_count("runs", self.runs)


def run(settings: EarlierLibrary) -> Iterator[str]:
    """Yield the lines of a report.

    Raises:
        ValueError: the earlier library is not in its folder.
        RuntimeError: on a small example, replay's gradients are not those of full BPTT.
    """
    if settings.earlier is None or not (settings.earlier / "memformer").is_dir():
        raise ValueError(f"earlier: expected a folder made by `{INSTALL_EARLIER}`, got {settings.earlier}")
    example, device = settings.example, torch.device("cpu")
    yield machine(device)
    yield f"replay equals full BPTT in float64: largest relative difference {_equality():.1e}"
    yield (
        f"example: {example.segments} segments of {example.segment_tokens}, {settings.runs} runs each after one that "
        "does not count, taking turns"
    )
    yield ""
    taken: dict[str, list[float]] = {"this": [], "earlier": []}
    bytes_: dict[str, list[float]] = {"this": [], "earlier": []}
    rates = []
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                ProcessPoolExecutor(
                    1, multiprocessing.get_context("spawn"), _load, (example, folder, torch.get_num_threads())
                )
            )
            for name, folder in (("this", None), ("earlier", settings.earlier))
        }
        for number in range(settings.runs + 1):
            for name, worker in workers.items():
                elapsed, grown = worker.submit(_measure).result()
                if number:
                    taken[name].append(elapsed)
                    bytes_[name].append(grown)
            rates.append(_matrix_rate(example))
    yield f"{'':10}{'seconds: min':>14}{'median':>9}{'max':>9}{'peak MB: min':>16}{'median':>9}{'max':>9}"
    for name in workers:
        s, m = spread(taken[name]), spread([x / 1e6 for x in bytes_[name]])
        yield f"{name:10}{s.least:14.2f}{s.median:9.2f}{s.most:9.2f}{m.least:16.0f}{m.median:9.0f}{m.most:9.0f}"
    faster = statistics.median(b / a for a, b in zip(taken["this"], taken["earlier"], strict=True))
    smaller = statistics.median(a / b for a, b in zip(bytes_["this"], bytes_["earlier"], strict=True))
    yield ""
    yield f"speed, this / earlier, median of pairs        {faster:.2f} x"
    yield f"extra peak memory, this / earlier             {smaller:.2f}"
    work, rate = _operations(example), statistics.median(rates)
    reached = work / statistics.median(taken["this"])
    yield f"arithmetic of one run                         {work / 1e9:,.0f} GFLOP"
    yield f"this machine's matrix-product rate            {rate / 1e9:,.0f} GFLOP/s, measured between the runs"
    yield f"fraction of it that a run here reaches        {reached / rate:.0%}"


_work: tuple[nn.Module, Callable[[], object]]
"""In a worker: a model, and what gives it its gradients once."""


def _load(example: Example, earlier: Path | None, threads: int) -> None:
    """Make a worker of this process, for this library or for the one in a folder."""
    global _work
    torch.set_num_threads(threads)
    config = example.config  # of this library, which is put away while the other is imported
    with contextlib.nullcontext(memformer) if earlier is None else importing(earlier, "memformer") as library:
        model: nn.Module = library.Memformer(**(config.to_dict() if earlier is None else earlier_settings(config)))
        src, tgt = example.tokens()
        masks = {"src_mask": torch.ones_like(src).bool(), "tgt_mask": torch.ones_like(tgt).bool()}
        _work = model, functools.partial(library.memory_replay_backprop, model, src=src, tgt=tgt, **masks)


def _measure() -> tuple[float, int]:
    """In a worker: seconds of one gradient, and by how many bytes the process grew at most."""
    model, step = _work
    model.zero_grad(set_to_none=True)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    meter = ProcessMeter()
    taken, grown = seconds(step, torch.device("cpu")), meter.grown()
    if grown is None:
        raise OSError("the memory of a process is measured on Linux only")
    return taken, grown


def _equality() -> float:
    """The largest difference of the gradients of replay and of full BPTT, on a small model."""
    torch.manual_seed(0)
    model = Memformer(**SMALL.config.to_dict()).double()
    segments = cut(SMALL.segment_tokens, *SMALL.tokens())
    gradients = []
    for method in (replay.full_bptt, replay.memory_replay):
        rollout(model, segments, method=method).loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(take_gradients(model))
    return gradient_difference("memory replay", gradients[1], gradients[0], most=1e-9)


def _operations(example: Example) -> float:
    """Multiplications and additions in the matrix products of one run here.

    Replay does what plain BPTT does, and the forward pass of all encoder segments but the last once more.
    """
    model, (src, tgt) = Memformer(**example.config.to_dict()), example.tokens()
    segments = cut(example.segment_tokens, src, tgt)

    def plain() -> None:
        rollout(model, segments, method=replay.full_bptt).loss.backward()  # type: ignore[no-untyped-call]

    with torch.no_grad():
        again = flops(lambda: model.encode(segments[0].src))
    return flops(plain) + (example.segments - 1) * again


def _matrix_rate(example: Example) -> float:
    """Operations per second of a product of this model's size: a segment through the feed-forward."""
    dim = example.model.dim
    a, b = torch.randn(example.segment_tokens, dim), torch.randn(dim, 4 * dim)
    a @ b
    return 100 * 2 * a.numel() * b.shape[1] / seconds(lambda: [a @ b for _ in range(100)], torch.device("cpu"))
