"""Where the tokens of a segment stand, where padding is among them, and which labels count.

Shapes: labels and mask (batch, tokens), the mask True for tokens that exist; hidden states (batch, tokens, dim).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import IGNORED
from ..nn.causal import along

__all__ = ["before_each", "counted_labels", "joined", "kept_first"]


def before_each(hidden: Tensor, last: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The hidden state of the last token before each of a segment's, (batch, tokens, dim), and of the last of all.

    Args:
        hidden: (batch, tokens, dim). last: (batch, dim), before the segment. mask: (batch, tokens).
    """
    states = torch.cat([last[:, None].to(hidden.dtype), hidden], 1)
    if mask is not None:
        newest = (torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask).cummax(1).values
        states = along(states, F.pad(newest, (1, 0)))
    return states[:, :-1], states[:, -1].to(last.dtype)


def kept_first(mask: Tensor) -> Tensor:
    """(batch, tokens), the order in which those that exist come first."""
    return (~mask).byte().argsort(dim=1, stable=True)


def joined(pieces: Sequence[Tensor], taken: Sequence[Sequence[int]], length: int) -> Tensor:
    """Pieces one behind the other, (batch, length, dim); behind a lane's tokens anything.

    Args:
        pieces: (batch, any number, dim) each, of which a lane has taken the first few.
        taken: for each piece, how many tokens each lane has taken.
    """
    rows = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), 1)
    if rows.shape[1] == length and all(n == x.shape[1] for x, each in zip(pieces, taken, strict=True) for n in each):
        return rows
    place = torch.arange(max(x.shape[1] for x in pieces), device=rows.device)
    kept = torch.cat(
        [
            place[: x.shape[1]] < torch.tensor(each, device=rows.device)[:, None]
            for x, each in zip(pieces, taken, strict=True)
        ],
        1,
    )
    missing = max(0, length - rows.shape[1])
    order = kept_first(F.pad(kept, (0, missing)))[:, :length]
    return along(F.pad(rows, (0, 0, 0, missing)), order)


def counted_labels(labels: Tensor, mask: Tensor | None, fresh: Tensor | None) -> Tensor:
    """Which labels count, (batch, tokens). ``fresh``: (batch,), lanes before whose first token nothing stands."""
    counted = labels != IGNORED
    kept = torch.ones_like(counted) if mask is None else mask
    if fresh is not None:
        first = kept & (kept.cumsum(1) == 1)
        counted = counted & ~(first & fresh[:, None])
    return counted & kept
