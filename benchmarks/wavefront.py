"""All layers of a causal model at once beside one after the other: reading, and training as memformer train does it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memformer import CausalMemformer, replay
from memformer.bench.meters import gradient_difference, machine, spread, take_gradients, taking_turns
from memformer.config import check_count
from memformer.data.segments import Segment
from memformer.rollouts import rollout
from memformer.wavefront import Wavefront

__all__ = ["WavefrontBenchmark", "run"]


@dataclass(frozen=True, kw_only=True)
class WavefrontBenchmark:
    """Time of reading and of a gradient by replay, the layers one after the other and all at once, taking turns."""

    depths: tuple[int, ...] = (3, 6, 12, 24)
    """Layers."""
    batches: tuple[int, ...] = (1, 4, 12)
    """Lanes."""
    dim: int = 64
    """Width of the model."""
    slots: int = 5
    """Memory slots of each layer."""
    segment_tokens: int = 32
    """Tokens per segment."""
    reading: int = 64
    """Segments that are read."""
    horizon: int = 6
    """Segments of the rollout whose gradients are taken."""
    runs: int = 5
    """How often each is timed."""
    device: str = "cpu"
    """Where to run."""

    def __post_init__(self) -> None:
        for name in ("dim", "slots", "segment_tokens", "reading", "horizon", "runs"):
            check_count(name, getattr(self, name))
        for name in ("depths", "batches"):
            for value in getattr(self, name):
                check_count(name, value)


def run(settings: WavefrontBenchmark) -> Iterator[str]:
    """Yield the lines of a report.

    Raises:
        RuntimeError: the two ways do not give the same gradients in float64.
    """
    device = torch.device(settings.device)
    yield machine(device)
    yield f"in float64 the gradients differ by {_difference(settings):.1e} at most, relative to their norm"
    yield (
        f"width {settings.dim}, {settings.slots} slots a layer, segments of {settings.segment_tokens}; medians of "
        f"{settings.runs} in milliseconds, and how many times as fast all layers at once are"
    )
    yield ""
    read, train = f"reading {settings.reading} segments", f"gradients of {settings.horizon} segments"
    yield f"{'layers':>6}{'batch':>7}{read:>32}{train:>32}"
    for depth in settings.depths:
        model = _model(settings, depth).to(device)
        for batch in settings.batches:
            cells = []
            for count, step in ((settings.reading, _read), (settings.horizon, _train)):
                segments = _segments(settings, batch, count, device)
                ways = {
                    name: functools.partial(step, model, segments, name == "all at once")
                    for name in ("one after the other", "all at once")
                }
                taken = taking_turns(ways, settings.runs, device)
                one, every = (spread(taken[name]).median for name in ways)
                cells.append(f"{1e3 * one:.1f} -> {1e3 * every:.1f} {one / every:6.2f} x")
            yield f"{depth:6}{batch:7}" + "".join(f"{cell:>32}" for cell in cells)


def _model(settings: WavefrontBenchmark, depth: int) -> CausalMemformer:
    torch.manual_seed(0)
    heads = max(1, settings.dim // 16)
    return CausalMemformer(
        dim=settings.dim,
        num_memory_slots=settings.slots,
        num_tokens=260,
        max_seq_len=settings.segment_tokens,
        depth=depth,
        heads=heads,
        mem_update_attn_heads=heads,
        overlap=min(4, settings.segment_tokens),
    )


def _segments(settings: WavefrontBenchmark, batch: int, count: int, device: torch.device) -> list[Segment]:
    # With masks and resets, as lanes have them.
    shape = batch, settings.segment_tokens
    kept = torch.ones(shape, dtype=torch.bool, device=device)
    none = torch.zeros(batch, dtype=torch.bool, device=device)
    return [Segment(torch.randint(260, shape, device=device), kept, none) for _ in range(count)]


@torch.no_grad()
def _read(model: CausalMemformer, segments: list[Segment], wavefront: bool) -> None:
    if not wavefront:
        memory = None
        for segment in segments:
            _, memory = model.cell(segment, memory)
        return
    front = Wavefront(model, len(segments[0].src))
    flight = front.start(None)
    for diagonal in front.diagonals(segments):
        _, flight = front(diagonal, flight)


def _train(model: CausalMemformer, segments: list[Segment], wavefront: bool) -> None:
    rollout(model, segments, wavefront=wavefront).loss.backward()
    model.zero_grad(set_to_none=True)


def _difference(settings: WavefrontBenchmark) -> float:
    model = _model(settings, min(settings.depths)).double()
    segments = _segments(settings, 2, 4, torch.device("cpu"))
    found: list[dict[str, Tensor | None]] = []
    for wavefront, method in ((False, replay.full_bptt), (True, replay.memory_replay)):
        rollout(model, segments, wavefront=wavefront, method=method).loss.backward()
        found.append(take_gradients(model))
    return gradient_difference("all layers at once", found[1], found[0], 1e-10)
