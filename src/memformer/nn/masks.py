"""Masks and targets as other libraries write them: 0 and 1, and -100 for what does not count."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["IGNORED", "as_mask", "ignored_as_masked"]

IGNORED = -100
"""The target id that ``torch.nn.functional.cross_entropy`` and Hugging Face's collators give to what does not count."""


def as_mask(name: str, mask: Tensor | None) -> Tensor | None:
    """A mask of integers 0 and 1 as booleans; booleans and None as they are.

    Raises:
        ValueError: integers besides 0 and 1, or floating-point numbers; ``name`` is what the message calls the mask.
    """
    if not isinstance(mask, Tensor) or mask.dtype is torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex() or ((mask != 0) & (mask != 1)).any():
        got = str(mask.dtype) if mask.is_floating_point() or mask.is_complex() else "other integers"
        raise ValueError(
            f"{name}: expected torch.bool, or integers of 0 and 1, True or 1 for what exists, got {got}. Of a "
            "mask that is added to scores, pass mask == 0"
        )
    return mask.bool()


def ignored_as_masked(tgt: Tensor, tgt_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Targets of :data:`IGNORED` as masked ones: they start nothing, are not seen, and are not predicted.

    ``tgt`` and ``tgt_mask`` (batch, length) with a boolean mask; both come back as they are where nothing is ignored.
    """
    ignored = tgt == IGNORED
    if not ignored.any():
        return tgt, tgt_mask
    if tgt_mask is None:
        tgt_mask = ~ignored
    elif tgt_mask.shape == tgt.shape:  # else it is refused later
        tgt_mask = tgt_mask & ~ignored
    return tgt.masked_fill(ignored, 0), tgt_mask
