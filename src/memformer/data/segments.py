"""Cutting sequences, masks and targets into segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import as_tokens

__all__ = ["Segment", "Targets", "cut", "each_as_tokens", "padded"]

Targets = Tensor | Sequence["Tensor | None"] | None
"""One tensor for one of the segments, or one or None for each."""


class Segment(NamedTuple):
    """What a model reads in one step of a rollout, and what it then predicts.

    Attributes:
        src: (batch, length) token ids.
        src_mask: (batch, length) boolean, True for tokens that exist; None for all.
        reset: (batch,) boolean, lanes that start from the initial memory; None for none.
        tgt, tgt_mask: (batch, target length), the target and its mask; None without one.
    """

    src: Tensor
    src_mask: Tensor | None = None
    reset: Tensor | None = None
    tgt: Tensor | None = None
    tgt_mask: Tensor | None = None

    def to(self, device: torch.device) -> Segment:
        """The segment on a device; from pinned memory the copy runs beside what follows."""
        others = (None if part is None else part.to(device, non_blocking=True) for part in self[1:])
        return Segment(self.src.to(device, non_blocking=True), *others)


def cut(
    length: int,
    src: Tensor,
    tgt: Targets = None,
    src_mask: Tensor | None = None,
    tgt_mask: Targets = None,
    reset: Targets = None,
) -> list[Segment]:
    """Cut a source into segments of at most ``length`` tokens, and give each its target.

    ``tgt`` is one tensor, for the last segment, or a sequence with one target or None per segment; ``tgt_mask`` alike.
    ``reset`` is one tensor, for the first segment, or such a sequence.

    Raises:
        ValueError: the sequences' lengths differ from the number of segments, or a mask alone is given for several
            targets.
    """
    sources = src.split(length, 1)
    count = len(sources)
    targets = 0 if tgt is None or isinstance(tgt, Tensor) else sum(x is not None for x in tgt)
    if isinstance(tgt_mask, Tensor) and targets > 1:
        raise ValueError(
            f"tgt_mask: expected one (or None) for each segment, as there are {targets} targets, got one alone"
        )
    return list(
        map(
            Segment,
            sources,
            [None] * count if src_mask is None else src_mask.split(length, 1),
            _per_segment("reset", reset, count, at=0),
            _per_segment("tgt", tgt, count, at=-1),
            _per_segment("tgt_mask", tgt_mask, count, at=-1),
        )
    )


def _per_segment(name: str, given: Targets, count: int, at: int) -> list[Tensor | None]:
    """One entry per segment; a single tensor is that of the segment ``at``."""
    items: list[Tensor | None]
    if given is None or isinstance(given, Tensor):
        items = [None] * count
        items[at] = given
        return items
    items = list(given)
    if len(items) != count:
        raise ValueError(f"{name}: expected one entry (or None) for each of the {count} segments, got {len(items)}")
    return items


def each_as_tokens(name: str, given: Targets, device: torch.device) -> Targets:
    """One for one segment, or one for each: see :func:`~memformer.checks.as_tokens`."""
    if isinstance(given, (list, tuple)):
        return [as_tokens(x, device) for x in given]
    converted: Targets = as_tokens(given, device)
    if converted is not None and not isinstance(converted, Tensor):
        raise ValueError(f"{name}: expected one for one segment, or a list with one (or None) for each, got {given!r}")
    return converted


def padded(x: Tensor, length: int, value: float) -> Tensor:
    """(batch, tokens), filled up to that length."""
    return F.pad(x, (0, length - x.shape[1]), value=value)
