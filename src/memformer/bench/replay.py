"""Speed and memory of the ways to get a gradient through a Memformer's rollout: the paper's Table 3, and beyond."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import replay
from ..config import check_count
from ..data.segments import Segment
from ..device import choose_device
from ..model import Memformer
from ..replay.inputs import Cell, Readout, Tree
from ..rollouts import rollout
from ..settings import ModelSettings
from .meters import (
    check_no_dropout,
    gradient_difference,
    live_bytes,
    machine,
    peak_bytes,
    spread,
    take_gradients,
    taking_turns,
)

__all__ = ["ReplayBenchmark", "run"]

MODEL = ModelSettings(dim=256, slots=32, enc_depth=4, dec_depth=8, heads=4, dec_overlap=0, tie_embeddings=False)


@dataclass(frozen=True, kw_only=True)
class ReplayBenchmark:
    """Gradients of one rollout by plain BPTT, checkpointing and memory replay: time, live graph and peak memory."""

    horizons: tuple[int, ...] = (4, 16)
    """Segments in a rollout; a table for each."""
    batch_size: int = 2
    """Lanes."""
    segment_tokens: int = 64
    """Tokens in a segment, and in its target."""
    vocabulary: int = 512
    """Number of token ids."""
    model: ModelSettings = MODEL
    readout_segments: int = 3
    """Segments that one call of the decoder gets, where calls are batched."""
    repeats: int = 3
    """How often each method is timed; the methods take turns, and the median counts."""
    device: str = "cpu"
    """Where to run."""
    seed: int = 0
    """For parameters and tokens."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "vocabulary", "readout_segments", "repeats"):
            check_count(name, getattr(self, name))
        if self.segment_tokens < 2 or not self.horizons or min(self.horizons) < 1:
            raise ValueError("expected segments of at least 2 tokens, and horizons of at least 1 segment")
        check_no_dropout(self.model)


Step = Callable[[], Tensor]
"""Runs a rollout and its backward; returns the loss."""


def run(settings: ReplayBenchmark) -> Iterator[str]:
    """Yield the lines of one table per horizon. Gradients are compared first.

    Raises:
        RuntimeError: a method's gradients are not those of plain BPTT.
    """
    device, sizes = choose_device(settings.device), settings.model
    yield machine(device)
    yield (
        f"{sizes.enc_depth}+{sizes.dec_depth} layers, dim {sizes.dim}, batch {settings.batch_size}, "
        f"{settings.segment_tokens}-token segments, {sizes.slots} slots, float32; "
        f"{settings.repeats} runs each, taking turns; gradients equal plain BPTT's"
    )
    torch.manual_seed(settings.seed)
    model = Memformer(**sizes.memformer_config(settings.vocabulary, settings.segment_tokens).to_dict()).to(device)
    shape = (settings.batch_size, settings.segment_tokens)
    for horizon in settings.horizons:
        src, tgt = torch.randint(0, settings.vocabulary, (2, horizon, *shape)).to(device)
        segments = [Segment(s, tgt=t) for s, t in zip(src, tgt, strict=True)]
        yield ""
        yield from _table(settings, model, segments, device)


def _table(settings: ReplayBenchmark, model: Memformer, segments: list[Segment], device: torch.device) -> Iterator[str]:
    methods = _methods(model, segments, settings.readout_segments)
    live = _live_bytes_of_equal(methods)
    peaks = {name: peak_bytes(step, device, owner) for name, (owner, step) in methods.items()}
    steps = {name: step for name, (_, step) in methods.items()}
    times = taking_turns(steps, settings.repeats, device, warm_up=0)  # all have run already
    first = next(iter(methods))
    fastest = spread(times[first]).median
    yield f"horizon {len(segments)}"
    yield (
        f"{'method':<34} {'seconds (min-median-max)':>26} {'speed':>6} "
        f"{'live graph':>12} {'of BPTT':>8} {'tensor peak':>10} {'of BPTT':>7}"
    )
    for name in methods:
        least, median, most = spread(times[name])
        taken = f"{least:.2f}-{median:.2f}-{most:.2f}"
        graph = f"{live[name] / 1e6:>9.1f} MB {live[name] / live[first]:>8.3f}"
        yield (
            f"{name:<34} {taken:>26} {fastest / median:>6.2f} {'' if name.startswith('checkpoint') else graph:>21} "
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
    segments: Sequence[Tree],
    memory: Tree,
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
    reference: dict[str, Tensor | None] | None = None
    for name, (owner, step) in methods.items():
        live[name] = live_bytes(step, list(owner.parameters()))
        gradients = take_gradients(owner)
        reference = reference or gradients
        gradient_difference(name, gradients, reference)
    return live
