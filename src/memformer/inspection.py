"""What a memory does: how its slots attend when they are written, how they differ, and how far gradients reach.

The analysis of paper v2's writer. Everything here watches the model's own step, in evaluation mode and without touching
parameters, gradients or generators. Shapes: memory (batch, slots, dim).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import Memformer
from .segments import Segment

__all__ = ["MemoryHealth", "memory_health", "slot_diversity"]


@dataclass(frozen=True)
class MemoryHealth:
    """A memory in a few numbers, for the metrics of training.

    Attributes:
        self_attention: the share of the writing attention that is on the slots themselves, between 0 and 1, the mean
            over slots and lanes; the rest is on the tokens. Near 0 the past is overwritten, near 1 nothing is written.
        self_attention_min, self_attention_max: of the slot with the least and the most, each the mean over lanes.
        slot_diversity: see :func:`slot_diversity`; the mean over lanes. Near 0 all slots hold the same.
    """

    self_attention: float
    self_attention_min: float
    self_attention_max: float
    slot_diversity: float


def memory_health(model: Memformer, segment: Segment, memory: Tensor | None) -> MemoryHealth:
    """Encode one segment and watch how the memory is written; lanes without a token in it are left out.

    Args:
        segment: its source, masks and reset flags; a target is not used.
        memory: (batch, slots, dim), the memory before the segment; None for the learned initial memory.
    """
    with _in_evaluation(model), torch.no_grad():
        shares, written = _watched_step(model, segment, memory)
    if segment.src_mask is not None and (busy := segment.src_mask.any(1)).any():
        shares, written = shares[busy], written[busy]
    by_slot = shares.mean(0)
    numbers = torch.stack([by_slot.mean(), by_slot.min(), by_slot.max(), slot_diversity(written).mean()])
    return MemoryHealth(*numbers.tolist())


def slot_diversity(memory: Tensor) -> Tensor:
    """How much the slots of a memory differ: 1 - the mean cosine of all pairs, (batch, slots, dim) -> (batch,).

    0 where all point the same way, 1 where they are orthogonal on average. A single slot has no pair: 0.
    """
    slots = memory.shape[1]
    if slots == 1:
        return memory.new_zeros(len(memory))
    # The squared length of a sum of unit vectors is their number plus the cosine of each pair, twice.
    total = F.normalize(memory, dim=-1).sum(1).square().sum(-1)
    return 1 - (total - slots) / (slots * (slots - 1))


def _watched_step(model: Memformer, segment: Segment, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """The model's step: each slot's attention on itself, (batch, slots), the mean over its writes, and the memory."""
    writes: list[tuple[Tensor, Tensor, Tensor | None]] = []
    hook = model.writer.register_forward_pre_hook(lambda writer, inputs: writes.append(inputs))
    try:
        _, written = model.step(segment.src, memory, segment.src_mask, segment.reset)
    finally:
        hook.remove()
    shares = torch.stack([model.writer.attention_on_itself(*inputs) for inputs in writes])
    return shares.float().mean(0), written.float()


@contextlib.contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each part is in the mode in which it was."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
