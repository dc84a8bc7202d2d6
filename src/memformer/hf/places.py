"""Where the tokens of a segment stand, where padding is among them, and which labels count.

Shapes: labels and mask (batch, tokens), the mask True for tokens that exist; hidden states (batch, tokens, dim).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import IGNORED
from ..nn.causal import along, predicting

__all__ = ["along", "before_each", "counted_labels", "kept_first"]


def before_each(hidden: Tensor, last: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The hidden state of the last token before each of a segment's, (batch, tokens, dim), and of the last of all.

    Args:
        hidden: (batch, tokens, dim). last: (batch, dim), before the segment. mask: (batch, tokens).
    """
    states, after = predicting(last, hidden, mask)
    return states[:, :-1], after


def kept_first(mask: Tensor) -> Tensor:
    """(batch, tokens), the order in which those that exist come first."""
    return (~mask).byte().argsort(dim=1, stable=True)


def counted_labels(labels: Tensor, mask: Tensor | None, fresh: Tensor | None) -> Tensor:
    """Which labels count, (batch, tokens). ``fresh``: (batch,), lanes before whose first token nothing stands."""
    counted = labels != IGNORED
    kept = torch.ones_like(counted) if mask is None else mask
    if fresh is not None:
        first = kept & (kept.cumsum(1) == 1)
        counted = counted & ~(first & fresh[:, None])
    return counted & kept
