"""One exact gradient through a very long sequence: an encoder with a loss at every segment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import replay
from ..model import Memformer
from .meters import ProcessMeter, machine, seconds

__all__ = ["MillionTokens", "run"]


@dataclass(frozen=True, kw_only=True)
class MillionTokens:
    """One training step over a million tokens, with the gradients of back-propagation through all of them."""

    tokens: int = 1_048_576
    """Length of the sequence."""
    segment_tokens: int = 512
    """Tokens in a segment."""
    dim: int = 128
    """Width of the model."""
    depth: int = 2
    """Encoder layers."""
    memory_slots: int = 32
    """Memory slots."""
    stored_memories: int | None = None
    """At most so many memories are stored, by the optimal schedule; None stores all."""
    seed: int = 0
    """For parameters and tokens."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.segment_tokens, self.dim, self.depth, self.memory_slots) < 1:
            raise ValueError("expected tokens, segment_tokens, dim, depth and memory_slots of at least 1")


class _Encoder(nn.Module):
    """A cell: the mean loss of predicting each byte of the segment after, and the memory."""

    def __init__(self, settings: MillionTokens):
        super().__init__()
        self.model = Memformer(
            dim=settings.dim,
            num_memory_slots=settings.memory_slots,
            enc_num_tokens=256,
            enc_max_seq_len=settings.segment_tokens,
            enc_depth=settings.depth,
            enc_heads=max(1, settings.dim // 64),
            encoder_only=True,
            mem_update_attn_heads=max(1, settings.dim // 64),
        )
        self.head = nn.Linear(settings.dim, 256)

    def forward(self, segment: tuple[Tensor, Tensor], memory: Tensor | None) -> tuple[Tensor, Tensor]:
        source, target = segment
        outputs, memory = self.model.step(source, memory)
        return F.cross_entropy(self.head(outputs).flatten(0, 1), target.flatten()), memory


def run(settings: MillionTokens) -> Iterator[str]:
    """Yield the lines of a report; the process's growth is honest in a fresh process (Linux).

    Raises:
        RuntimeError: on a short sequence, the gradients are not those of plain BPTT.
    """
    yield machine(torch.device("cpu"))
    torch.manual_seed(settings.seed)
    cell = _Encoder(settings)
    sequence = torch.randint(0, 256, (1, settings.tokens + settings.segment_tokens))
    source, target = sequence[:, : settings.tokens], sequence[:, settings.segment_tokens :]
    size = settings.segment_tokens
    segments = list(zip(source.split(size, 1), target.split(size, 1), strict=True))
    schedule: replay.Schedule = replay.EveryMemory()
    if settings.stored_memories is not None:
        schedule = replay.Binomial(settings.stored_memories)

    meter = ProcessMeter()
    yield f"gradients over 4 segments equal plain BPTT's to {_largest_difference(cell, segments[:4], schedule):.0e}"
    sizes = replay.measure(cell, segments[0], None)
    plan = schedule.plan(len(segments), *sizes)
    yield str(plan)

    def step() -> None:
        rollout = replay.memory_replay(cell, segments, None, schedule=schedule)
        rollout.loss.backward()  # type: ignore[no-untyped-call]

    cell.zero_grad()
    elapsed = seconds(step, torch.device("cpu"))
    grown = meter.grown()
    norms = [p.grad.norm() for p in cell.parameters() if p.grad is not None]
    yield (
        f"{settings.tokens:,} tokens in {len(segments)} segments of {size}, {settings.depth} layers, "
        f"dim {settings.dim}: {elapsed:.1f} s, {settings.tokens / elapsed:,.0f} tokens per second, "
        f"gradient norm {float(torch.stack(norms).norm()):.3g}"
    )
    if grown is not None:
        yield f"memory above the model and the input: {grown / 1e6:.0f} MB"
    yield f"plain BPTT would hold graphs of {len(segments)} segments: {len(segments) * sizes.graph_bytes / 1e9:,.1f} GB"


def _largest_difference(cell: nn.Module, segments: list[tuple[Tensor, Tensor]], schedule: replay.Schedule) -> float:
    """Of the parameters' gradients, relative to the largest entry of each."""
    grads: list[list[Tensor]] = []
    for rollout in (
        replay.memory_replay(cell, segments, None, schedule=schedule),
        replay.full_bptt(cell, segments, None),
    ):
        cell.zero_grad()
        rollout.loss.backward()  # type: ignore[no-untyped-call]
        grads.append([p.grad for p in cell.parameters() if p.grad is not None])
    worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(*grads, strict=True))
    if worst > 1e-3:
        raise RuntimeError(f"gradients differ from plain BPTT's by {worst:.1e}")
    return worst
