"""Multi-head attention, of a sequence over itself and over a context whose keys and values are given.

Shapes: x (batch, tokens, dim); heads split dim. The context's keys and values come from outside because one product
serves all layers of a stack (:class:`ContextProjection`), and because they need to be computed once per segment only.
Any of these parts may stand for several layers at once, with a first dimension more in its parameters and in everything
that it is given (``stacked.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ContextProjection",
    "CrossAttention",
    "Places",
    "Positional",
    "SelfAttention",
    "attend",
    "causal_mask",
    "in_parts",
    "merge_heads",
    "split_heads",
    "visible_to",
]

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, each (batch, heads, keys, head_dim)."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, dim) -> (batch, heads, tokens, dim / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim) -> (batch, tokens, heads * head_dim)."""
    return x.transpose(-3, -2).flatten(-2)


def in_parts(rows: Tensor, parts: int) -> Tensor:
    """(batch, rows, dim) -> (batch, rows * parts, dim / parts)."""
    return rows if parts == 1 else rows.unflatten(-1, (parts, -1)).flatten(-3, -2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention without positions; shapes as in :class:`Positional`. All its cases stay on torch's fast path."""
    if causal and (mask is not None or q.shape[-2] != k.shape[-2]):
        mask, causal = with_causal(mask, q, k), False
    if q.dim() == 4:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # Several layers at once: for torch's fast path they are more of the batch.
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    if mask is not None and mask.dim() > 2:
        mask = mask.expand(*q.shape[:2], *mask.shape[-3:]).flatten(0, 1)
    return F.scaled_dot_product_attention(flat[0], flat[1], flat[2], mask, is_causal=causal).unflatten(0, q.shape[:2])


def causal_mask(tokens: int, keys: int, device: torch.device) -> Tensor:
    """(tokens, keys), True where query ``i``, at position ``keys - tokens + i``, may see key ``j``."""
    return relative_distance(tokens, keys, device) >= 0


def visible_to(kept: Tensor) -> Tensor:
    """(..., tokens), True for tokens that exist -> (..., 1, tokens, tokens): each sees those before it, and itself."""
    tokens = kept.shape[-1]
    itself = torch.eye(tokens, dtype=torch.bool, device=kept.device)
    return (kept[..., None, None, :] & causal_mask(tokens, tokens, kept.device)) | itself


def with_causal(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """``mask``, and no query sees a key that lies ahead of it."""
    allowed = causal_mask(q.shape[-2], k.shape[-2], q.device)
    return allowed if mask is None else mask & allowed


def relative_distance(tokens: int, keys: int, device: torch.device) -> Tensor:
    """(tokens, keys): i - j, positive where the key lies in the query's past."""
    i = torch.arange(keys - tokens, keys, device=device)
    return i[:, None] - torch.arange(keys, device=device)


def blocked(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as the numbers that are added to logits of the same dtype as ``like``: 0 where it is True, else -inf.

    Torch makes them of a boolean one in each call; of one that several layers share they are made once.
    """
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, float("-inf"))


class Places(NamedTuple):
    """Where new tokens stand in caches of one size: what layers of one kind share of it.

    Attributes:
        position: (batch, new); lanes may differ.
        lane: (batch, 1), the numbers of the lanes.
        distance: (batch, 1, new, keys), back to each key; negative where the key lies ahead.
        ahead: the same as numbers that are added to logits: -inf where the key lies ahead, else 0.
        rotation: what rotary positions turn queries and keys by, two of (batch, 1, new, head_dim).
    """

    position: Tensor
    lane: Tensor
    distance: Tensor
    ahead: Tensor
    rotation: tuple[Tensor, Tensor] | None


class Positional(nn.Module):
    """How positions enter attention: a part that is called as ``(q, k, v, mask, causal)`` and does the attending.

    Shapes: q (batch, heads, tokens, head_dim), k and v (batch, heads, keys, head_dim); the result has q's shape. The
    queries are the last ``tokens`` of the ``keys`` positions, so a cached prefix needs no offset. ``mask`` is boolean,
    True where a query may look, and broadcasts to (batch, heads, tokens, keys). A cache of fixed size needs
    :meth:`places`, once for all layers of a stack, :meth:`place` and :meth:`look_back`. The three kinds are in
    ``positions.py``.
    """

    def follow(self, weight: Tensor) -> None:
        """Bring what is neither a parameter nor in a state dict to the device and dtype of the weights beside it."""

    def places(self, position: Tensor, keys: Tensor) -> Places:
        """Where new tokens stand: at ``position`` (batch, new) of a cache ``keys`` (batch, heads, keys, head_dim)."""
        device = position.device
        distance = (position[..., None] - torch.arange(keys.shape[2], device=device))[:, None]
        lane = torch.arange(position.shape[0], device=device)[:, None]
        return Places(position, lane, distance, blocked(distance >= 0, keys), None)

    def place(self, x: Tensor, at: Places) -> Tensor:
        """Queries and keys (batch, heads, new, head_dim) as they are compared, and keys as a cache is to keep them."""
        return x

    def preferring(self, distance: int) -> tuple[Tensor, Tensor] | None:
        """Two vectors (head_dim,): added to all queries and to all keys, before they are placed, they make each query
        prefer the key that stands ``distance`` before it. None: these positions do not know how.
        """
        return None

    def look_back(self, q: Tensor, k: Tensor, v: Tensor, at: Places) -> Tensor:
        """Causal attention where key j stands at position j; what lies ahead of a query may be anything finite."""
        raise NotImplementedError


class SelfAttention(nn.Module):
    """Attention of a sequence over itself; ``positions`` does the attending."""

    def __init__(self, dim: int, heads: int, positions: Positional):
        super().__init__()
        self.heads = heads
        self.positions = positions
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.register_load_state_dict_post_hook(_positions_follow)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def begin_with_copies(self) -> None:
        """Initialise so that attending to a token copies its vector.

        Tokens that stand together in a segment then look alike, and one of them finds what was stored with the other.
        """
        out = self.to_out.weight
        # Drawn in single precision at least: the decomposition behind it knows no half precision.
        out.copy_(nn.init.orthogonal_(torch.empty_like(out, dtype=torch.promote_types(out.dtype, torch.float32))))
        self.to_qkv.weight[2 * len(out) :] = out.T

    @torch.no_grad()
    def begin_with_neighbours(self) -> None:
        """Initialise so that head h looks at the token h + 1 before its own, if the positions know how.

        What comes next depends on the last few tokens more than on all else, so the model need not learn it.
        """
        q, k, _ = self.to_qkv.bias.view(3, self.heads, -1)
        for head in range(self.heads):
            preferred = self.positions.preferring(head + 1)
            if preferred is not None:
                q[head], k[head] = preferred

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, first: int = 0) -> Tensor:
        """(batch, tokens - first, dim): of all tokens but the ``first`` ones, which the others see.

        ``mask`` is as in :class:`Positional`.
        """
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, -1))  # (batch, heads, tokens, ...)
        return self.to_out(merge_heads(self.positions(q[..., first:, :], k, v, mask, causal)))

    def remember(self, x: Tensor, cache: KeysValues, at: Places) -> Tensor:
        """Write the keys and values of new tokens (batch, new, dim) into a cache, as :meth:`extend` does.

        Returns:
            Their queries (batch, heads, new, head_dim).
        """
        keys, values = cache  # (batch, heads, keys, head_dim)
        both, v = split_heads(self.to_qkv(x), 3 * self.heads).split([2 * self.heads, self.heads], 1)
        q, k = self.positions.place(both, at).chunk(2, 1)
        # Autocast may make them of another dtype than the cache.
        keys[at.lane, :, at.position] = k.transpose(1, 2).to(keys.dtype)  # (batch, new, heads, head_dim)
        values[at.lane, :, at.position] = v.transpose(1, 2).to(values.dtype)
        return q

    def extend(self, x: Tensor, cache: KeysValues, at: Places) -> Tensor:
        """Causal attention of new tokens over themselves and what the cache holds before them.

        Args:
            x: (batch, new, dim).
            cache: of fixed size; the new keys and values are written into it. Beyond the last position it may hold
                anything.
            at: where each new token stands, and so its place in the cache; from :meth:`Positional.places`.

        Returns:
            (batch, new, dim).
        """
        return self.to_out(merge_heads(self.positions.look_back(self.remember(x, cache, at), *cache, at)))


def _positions_follow(attention: SelfAttention, _: object) -> None:
    """After ``load_state_dict(assign=True)`` weights may be of another device or dtype than before."""
    attention.positions.follow(attention.to_qkv.weight)


class CrossAttention(nn.Module):
    """Attention of a sequence over given keys and values, without positions."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: KeysValues, mask: Tensor | None = None) -> Tensor:
        """(batch, tokens, dim), of the same shape as ``x``; ``mask`` broadcasts to (batch, heads, tokens, keys)."""
        return self.to_out(merge_heads(attend(split_heads(self.to_q(x), self.heads), *context, mask)))


class ContextProjection(nn.Module):
    """Keys and values of one context for all layers of a stack, by one product.

    Args:
        parts: each row of the context is so many keys, of ``dim / parts`` numbers each.
    """

    def __init__(self, dim: int, heads: int, layers: int, parts: int = 1):
        super().__init__()
        self.heads, self.layers, self.parts = heads, layers, parts
        self.to_kv = nn.Linear(dim // parts, 2 * layers * dim)

    def forward(self, context: Tensor) -> list[KeysValues]:
        """(batch, rows, dim) -> one pair per layer, of rows * parts keys."""
        parts = self.to_kv(in_parts(context, self.parts)).chunk(2 * self.layers, -1)  # each (batch, keys, dim)
        heads = [split_heads(part, self.heads) for part in parts]
        return list(zip(heads[::2], heads[1::2], strict=True))
