"""Speed and memory of the ways to get a gradient through a Memformer's rollout: the paper's Table 3, and beyond."""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import replay
from ..data.segments import Segment
from ..model import Memformer
from ..replay.inputs import Cell, Readout
from ..rollouts import rollout
from .meters import live_bytes, machine, peak_bytes, seconds

__all__ = ["ReplayBenchmark", "run"]


@dataclass(frozen=True, kw_only=True)
class ReplayBenchmark:
    """Gradients of one rollout by plain BPTT, checkpointing and memory replay: time, live graph and peak memory."""

    horizons: tuple[int, ...] = (4, 16)
    """Segments in a rollout; a table for each."""
    batch_size: int = 2
    """Lanes."""
    segment_tokens: int = 64
    """Tokens in a segment, and in its target."""
    dim: int = 256
    """Width of the model; heads have 64 each."""
    enc_depth: int = 4
    """Encoder layers."""
    dec_depth: int = 8
    """Decoder layers."""
    memory_slots: int = 32
    """Memory slots."""
    num_tokens: int = 512
    """Vocabulary."""
    readout_segments: int = 3
    """Segments in one call of the decoder, where it is batched."""
    repeats: int = 3
    """Timed runs of each method; they are interleaved, and the median counts."""
    device: str = "cpu"
    """Where to run."""
    seed: int = 0
    """For parameters and tokens."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "dim",
            "enc_depth",
            "dec_depth",
            "memory_slots",
            "num_tokens",
            "readout_segments",
            "repeats",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.segment_tokens < 2 or not self.horizons or min(self.horizons) < 1:
            raise ValueError("expected segments of at least 2 tokens, and horizons of at least 1 segment")


Step = Callable[[], Tensor]
"""Runs a rollout and its backward; returns the loss."""


def run(settings: ReplayBenchmark) -> Iterator[str]:
    """Yield the lines of one table per horizon. Gradients are compared first.

    Raises:
        RuntimeError: a method's gradients are not those of plain BPTT.
    """
    device = torch.device(settings.device)
    yield machine(device)
    yield (
        f"{settings.enc_depth}+{settings.dec_depth} layers, dim {settings.dim}, batch {settings.batch_size}, "
        f"{settings.segment_tokens}-token segments, {settings.memory_slots} slots, float32; "
        f"{settings.repeats} interleaved runs; gradients equal plain BPTT's"
    )
    torch.manual_seed(settings.seed)
    heads = max(1, settings.dim // 64)
    model = Memformer(
        dim=settings.dim,
        num_memory_slots=settings.memory_slots,
        enc_num_tokens=settings.num_tokens,
        enc_max_seq_len=settings.segment_tokens,
        enc_depth=settings.enc_depth,
        enc_heads=heads,
        dec_num_tokens=settings.num_tokens,
        dec_max_seq_len=settings.segment_tokens,
        dec_depth=settings.dec_depth,
        dec_heads=heads,
        mem_update_attn_heads=heads,
    ).to(device)
    shape = (settings.batch_size, settings.segment_tokens)
    for horizon in settings.horizons:
        src, tgt = torch.randint(0, settings.num_tokens, (2, horizon, *shape)).to(device)
        segments = [Segment(s, tgt=t) for s, t in zip(src, tgt, strict=True)]
        yield ""
        yield from _table(settings, model, segments, device)


def _table(settings: ReplayBenchmark, model: Memformer, segments: list[Segment], device: torch.device) -> Iterator[str]:
    methods = _methods(model, segments, settings.readout_segments)
    live = _live_bytes_of_equal(methods)
    peaks = {name: peak_bytes(step, device) for name, (_, step) in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(settings.repeats):
        for name, (_, step) in methods.items():
            times[name].append(seconds(step, device))
    first = next(iter(methods))
    fastest = statistics.median(times[first])
    yield f"horizon {len(segments)}"
    yield (
        f"{'method':<34} {'seconds (min-median-max)':>26} {'speed':>6} "
        f"{'live graph':>12} {'of BPTT':>8} {'tensor peak':>10} {'of BPTT':>7}"
    )
    for name in methods:
        median = statistics.median(times[name])
        spread = f"{min(times[name]):.2f}-{median:.2f}-{max(times[name]):.2f}"
        graph = f"{live[name] / 1e6:>9.1f} MB {live[name] / live[first]:>8.3f}"
        yield (
            f"{name:<34} {spread:>26} {fastest / median:>6.2f} {'' if name.startswith('checkpoint') else graph:>21} "
            f"{peaks[name] / 1e6:>7.1f} MB {peaks[name] / peaks[first]:>8.3f}"
        )
    yield "(checkpoint's graph is out of reach of the hooks that count live graphs: compare its peak)"


def _methods(model: Memformer, segments: list[Segment], batched: int) -> dict[str, tuple[nn.Module, Step]]:
    """By name: the model whose gradients a method fills, and the step that does."""
    horizon = len(segments)
    layered = copy.deepcopy(model)
    assert layered.decoder is not None
    for layer in [*layered.encoder.layers.children(), *layered.decoder.layers.children()]:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]

    def step(run: Callable[[], replay.Rollout], owner: nn.Module = model) -> tuple[nn.Module, Step]:
        def once() -> Tensor:
            owner.zero_grad()
            loss = run().loss
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        return owner, once

    def replayed(schedule: replay.Schedule, readout_segments: int = batched) -> tuple[nn.Module, Step]:
        options = replay.Options(schedule=schedule, readout_segments=readout_segments)
        return step(lambda: rollout(model, segments, method=replay.memory_replay, options=options))

    every = replay.EveryMemory
    methods = {
        "plain BPTT": step(lambda: rollout(model, segments, method=replay.full_bptt, readout_segments=1)),
        "checkpoint per layer": step(
            lambda: rollout(layered, segments, method=replay.full_bptt, readout_segments=1), layered
        ),
        "checkpoint per segment": step(lambda: rollout(model, segments, method=_checkpointed)),
        "memory replay": replayed(every(), 1),
        f"memory replay, readout of {batched}": replayed(every()),
        "  + no graph of the cell beside it": replayed(every(graphs=0)),
        **{f"  + graphs of the last {n}": replayed(every(graphs=n)) for n in (horizon // 2, horizon) if n > 1},
    }
    if horizon > 4:
        methods["  + 4 stored memories (binomial)"] = replayed(replay.Binomial(4))
    return methods


def _checkpointed(
    cell: Cell,
    segments: Sequence[Any],
    memory: Any,
    readout: Readout | None = None,
    *,
    options: replay.Options | None = None,
) -> replay.Rollout:
    """The whole segment, decoder included, is run again in backward: only memories are kept between segments."""

    assert readout is not None

    def whole(segment: Segment, memory: Tensor | None) -> tuple[Tensor | None, Tensor]:
        value, memory = cell(segment, memory)
        return readout([value], [segment]), memory

    def segment_wise(segment: Segment, memory: Tensor | None) -> tuple[Tensor | None, Tensor]:
        return checkpoint(whole, segment, memory, use_reentrant=False)  # type: ignore[no-any-return]

    return replay.full_bptt(segment_wise, segments, memory)


def _live_bytes_of_equal(methods: dict[str, tuple[nn.Module, Step]]) -> dict[str, int]:
    """The bytes that autograd holds at most in each method, whose gradients are compared with the first one's."""
    live: dict[str, int] = {}
    reference: list[Tensor | None] = []
    for name, (owner, step) in methods.items():
        live[name] = live_bytes(step, list(owner.parameters()))
        grads = [None if p.grad is None else p.grad.clone() for p in owner.parameters()]
        reference = reference or grads
        for (parameter, _), got, expected in zip(owner.named_parameters(), grads, reference, strict=True):
            if expected is None and got is None:
                continue
            if expected is None or got is None:
                raise RuntimeError(
                    f"{name}: {parameter} has a gradient where plain BPTT has none, or none where it has"
                )
            distance = float((got - expected).norm() / expected.norm().clamp(min=1e-12))
            if distance > 1e-3:
                raise RuntimeError(f"{name}: the gradient of {parameter} is off by {distance:.1e} of its norm")
    return live
