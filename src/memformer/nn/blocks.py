"""The layers of encoder and decoder: pre-norm residual blocks (paper, section 3.2). Shapes: x (batch, tokens, dim)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .attention import CrossAttention, KeysValues, Places, Positional, SelfAttention

__all__ = ["Block", "embedding_table", "feed_forward"]


def embedding_table(tokens: int, dim: int) -> nn.Embedding:
    """A vector for each token, about 1 long."""
    embedding = nn.Embedding(tokens, dim)
    nn.init.normal_(embedding.weight, std=dim**-0.5)
    return embedding


def feed_forward(dim: int, factor: float = 4) -> nn.Sequential:
    """dim -> factor * dim, to the nearest whole number -> dim."""
    width = round(factor * dim)
    return nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))


class Block(nn.Module):
    """Self-attention, attention over a context, feed-forward.

    In the encoder the context is the memory (memory reading) and self-attention is bidirectional; in the decoder the
    context is the encoder's output and self-attention is causal.
    """

    def __init__(self, dim: int, heads: int, positions: Positional, causal: bool, dropout: float, factor: float = 4):
        super().__init__()
        self.causal = causal
        self.self_norm, self.context_norm, self.feed_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = SelfAttention(dim, heads, positions)
        self.context_attention = CrossAttention(dim, heads)
        self.feed_forward = feed_forward(dim, factor)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        context: KeysValues,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """(batch, tokens, dim), of the same shape as ``x``.

        ``mask`` is for self-attention, ``context_mask`` for the context; both boolean, True where one may look.
        ``last`` (batch, any number, dim) is what the layer got of the tokens before, which self-attention sees, too.
        """
        if last is None:
            x = self._add(x, self.self_norm, lambda y: self.self_attention(y, mask, self.causal))
        else:
            seen = self.self_norm(torch.cat([last.to(x.dtype), x], -2))
            x = x + self.dropout(self.self_attention(seen, mask, self.causal, last.shape[-2]))
        return self._after_self_attention(x, context, context_mask)

    def places(self, position: Tensor, cache: KeysValues) -> Places:
        """For :meth:`extend`: where new tokens stand, (batch, new). Of one layer of a stack, and good for all of it."""
        return self.self_attention.positions.places(position, cache[0])

    def remember(self, last: Tensor, cache: KeysValues, at: Places) -> None:
        """Begin a cache with what the layer got of the tokens before; see :meth:`SelfAttention.remember`."""
        self.self_attention.remember(self.self_norm(last), cache, at)

    def extend(
        self, x: Tensor, cache: KeysValues, at: Places, context: KeysValues, context_mask: Tensor | None = None
    ) -> Tensor:
        """New tokens of a causal sequence; see :meth:`SelfAttention.extend`."""
        x = self._add(x, self.self_norm, lambda y: self.self_attention.extend(y, cache, at))
        return self._after_self_attention(x, context, context_mask)

    def _after_self_attention(self, x: Tensor, context: KeysValues, context_mask: Tensor | None) -> Tensor:
        x = self._add(x, self.context_norm, lambda y: self.context_attention(y, context, context_mask))
        return self._add(x, self.feed_norm, self.feed_forward)

    def _add(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.dropout(part(norm(x)))
