"""One exact gradient through a very long sequence: an encoder with a loss at every segment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import replay
from ..config import check_count
from ..model import Memformer
from .meters import ProcessMeter, gradient_difference, machine, seconds, take_gradients

__all__ = ["MillionTokens", "run"]


@dataclass(frozen=True, kw_only=True)
class MillionTokens:
    """One training step over a million tokens, with the gradients of back-propagation through all of them."""

    tokens: int = 1_048_576
    """Length of the sequence."""
    segment_tokens: int = 512
    """Tokens in a segment."""
    dim: int = 128
    """Width of the model; heads have 64 each."""
    depth: int = 2
    """Encoder layers."""
    memory_slots: int = 32
    """Memory slots."""
    stored_memories: int | None = None
    """Store at most this many memories, by the optimal schedule; by default all are stored."""
    seed: int = 0
    """For parameters and tokens."""

    def __post_init__(self) -> None:
        for name in ("tokens", "segment_tokens", "dim", "depth", "memory_slots"):
            check_count(name, getattr(self, name))


class _Encoder(nn.Module):
    """A cell: the mean loss of predicting each byte of the segment after, and the memory."""

    def __init__(self, settings: MillionTokens):
        super().__init__()
        heads = max(1, settings.dim // 64)
        self.model = Memformer(
            dim=settings.dim,
            num_memory_slots=settings.memory_slots,
            enc_num_tokens=256,
            enc_max_seq_len=settings.segment_tokens,
            enc_depth=settings.depth,
            enc_heads=heads,
            encoder_only=True,
            mem_update_attn_heads=heads,
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
    gradients = []
    for method in (replay.full_bptt, replay.memory_replay):
        rollout = method(cell, segments[:4], None, options=replay.Options(schedule=schedule))
        rollout.loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(take_gradients(cell))
    difference = gradient_difference("memory replay", gradients[1], gradients[0])
    yield f"gradients over 4 segments equal plain BPTT's to {difference:.0e}"
    sizes = replay.measure(cell, segments[0], None)
    yield str(schedule.plan(len(segments), *sizes))

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
