"""Multi-head attention, of a sequence over itself and over a context whose keys and values are given.

Shapes: x (batch, length, dim); heads split dim. The context's keys and values come from outside because one product
serves all layers of a stack (:class:`ContextProjection`), and because they need to be computed once per segment only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .positions import Positional, attend

__all__ = ["ContextProjection", "CrossAttention", "SelfAttention", "merge_heads", "split_heads"]

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, each (batch, heads, keys, head_dim)."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, dim) -> (batch, heads, length, dim / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, length, head_dim) -> (batch, length, heads * head_dim)."""
    return x.transpose(1, 2).flatten(-2)


class SelfAttention(nn.Module):
    """Attention of a sequence over itself; ``positions`` does the attending (see ``positions.py``)."""

    def __init__(self, dim: int, heads: int, positions: Positional):
        super().__init__()
        self.heads = heads
        self.positions = positions
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)

    @torch.no_grad()
    def begin_with_copies(self) -> None:
        """New weights with which a token takes from another that one's own vector.

        So tokens that stand together in a segment look alike, and one of them finds what was stored with the other.
        """
        out = self.to_out.weight
        # Drawn in single precision at least: the decomposition behind it knows no half precision.
        out.copy_(nn.init.orthogonal_(torch.empty_like(out, dtype=torch.promote_types(out.dtype, torch.float32))))
        self.to_qkv.weight[2 * len(out) :] = out.T

    @torch.no_grad()
    def begin_with_neighbours(self) -> None:
        """New biases with which head h first looks at the token h + 1 before its own, if the positions know how.

        What comes next depends on the last few tokens more than on all else, and so it need not be found out.
        """
        q, k, _ = self.to_qkv.bias.view(3, self.heads, -1)
        for head in range(self.heads):
            preferred = self.positions.preferring(head + 1)
            if preferred is not None:
                q[head], k[head] = preferred

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, -1))
        return self.to_out(merge_heads(self.positions(q, k, v, mask, causal)))

    def extend(self, x: Tensor, cache: KeysValues, position: Tensor) -> Tensor:
        """Causal attention of new tokens over themselves and what the cache holds before them.

        Args:
            x: (batch, new, dim).
            cache: of fixed size; the new keys and values are written into it. Beyond the last position it may hold
                anything.
            position: (batch, new), where each new token stands, and so its place in the cache.
        """
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, -1))
        keys, values = cache
        lane = torch.arange(x.shape[0], device=x.device)[:, None]
        q, k = self.positions.place(q, k, position)
        # Autocast may make them of another dtype than the cache.
        keys[lane, :, position] = k.transpose(1, 2).to(keys.dtype)
        values[lane, :, position] = v.transpose(1, 2).to(values.dtype)
        return self.to_out(merge_heads(self.positions.look_back(q, keys, values, position)))


class CrossAttention(nn.Module):
    """Attention of a sequence over given keys and values, without positions."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: KeysValues, mask: Tensor | None = None) -> Tensor:
        return self.to_out(merge_heads(attend(split_heads(self.to_q(x), self.heads), *context, mask)))


class ContextProjection(nn.Module):
    """Keys and values of one context for all layers of a stack, by one product."""

    def __init__(self, dim: int, heads: int, layers: int):
        super().__init__()
        self.heads, self.layers = heads, layers
        self.to_kv = nn.Linear(dim, 2 * layers * dim)

    def forward(self, context: Tensor) -> list[KeysValues]:
        """(batch, keys, dim) -> one pair per layer."""
        parts = self.to_kv(context).chunk(2 * self.layers, -1)
        heads = [split_heads(part, self.heads) for part in parts]
        return list(zip(heads[::2], heads[1::2], strict=True))
