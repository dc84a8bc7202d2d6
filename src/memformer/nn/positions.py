"""Positions in attention, three interchangeable parts: rotary, relative (paper v1), bucketed.

Each is a :class:`~memformer.nn.attention.Positional`, where the shapes are told. Only distances matter, so padding on
either side of a sequence changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Places, Positional, attend, relative_distance, with_causal

__all__ = ["BucketedBias", "RelativeEncoding", "Rotary", "positions"]


class Rotary(Positional):
    """Queries and keys are rotated by their positions, so that q_i . k_j depends on i - j (Su et al., 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_len: int, base: float = 10_000.0):
        super().__init__()
        self.head_dim, self.max_len, self.base = head_dim, max_len, base
        for name, table in zip(("cos", "sin"), self._tables(), strict=True):
            table = table.to(torch.get_default_device(), torch.get_default_dtype())
            self.register_buffer(name, table, persistent=False)

    def _frequencies(self) -> Tensor:
        """(head_dim / 2,), in radians per token, falling from 1."""
        # On the CPU whatever the default device is: not all others know double precision.
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu")
        return self.base ** (-pairs / self.head_dim)

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of all positions' angles, both (max_len, head_dim), in double precision."""
        position = torch.arange(self.max_len, dtype=torch.float64, device="cpu")
        angles = position[:, None] * self._frequencies()  # (max_len, head_dim / 2)
        return torch.cat([angles.cos(), angles.cos()], -1), torch.cat([-angles.sin(), angles.sin()], -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # A cast starts from full precision: in a float64 model, tables that were float32 once would be wrong by 1e-8.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.cos, self.sin = (table.to(self.cos) for table in self._tables())
        return self

    def follow(self, weight: Tensor) -> None:
        if (self.cos.device, self.cos.dtype) != (weight.device, weight.dtype):
            self.cos, self.sin = (table.to(weight.device, weight.dtype) for table in self._tables())

    def rotate(self, x: Tensor, start: int = 0) -> Tensor:
        """(batch, heads, tokens, head_dim), the first of them at position ``start``."""
        stop = start + x.shape[-2]
        return _turned(x, self.cos[start:stop], self.sin[start:stop])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return attend(self.rotate(q, k.shape[-2] - q.shape[-2]), self.rotate(k), v, mask, causal)

    def preferring(self, distance: int) -> tuple[Tensor, Tensor]:
        """By up to 8 in the logits. Only rotations that come round within 70 tokens take part: slower ones do not tell
        neighbours apart.
        """
        frequencies = self._frequencies()
        fast = frequencies > 2 * math.pi / 70
        size = (fast * (8 * math.sqrt(self.head_dim) / fast.sum()).sqrt()).to(frequencies)
        angles = -distance * frequencies
        query = torch.cat([size * angles.cos(), size * angles.sin()])
        return query, torch.cat([size, torch.zeros_like(size)])

    def places(self, position: Tensor, keys: Tensor) -> Places:
        rotation = self.cos[position][:, None], self.sin[position][:, None]
        return super().places(position, keys)._replace(rotation=rotation)

    def place(self, x: Tensor, at: Places) -> Tensor:
        assert at.rotation is not None, "of other positions"
        return _turned(x, *at.rotation)

    def look_back(self, q: Tensor, k: Tensor, v: Tensor, at: Places) -> Tensor:
        return attend(q, k, v, at.ahead)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` (..., head_dim) turned by angles whose cosines and signed sines broadcast to it."""
    one, other = x.chunk(2, -1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat([other, one], -1), sin.to(x.dtype))


class BucketedBias(Positional):
    """A learned bias per head and bucket of distances, added to the logits (Raffel et al., T5; the earlier library).

    Half of the buckets count single distances, the rest grow logarithmically up to ``max_distance``. Without
    ``causal`` the future has buckets of its own. The bias needs a gradient, so attention leaves torch's fast path.
    """

    def __init__(self, heads: int, causal: bool, buckets: int = 32, max_distance: int = 128):
        super().__init__()
        self.causal, self.buckets, self.max_distance = causal, buckets, max_distance
        self.bias = nn.Embedding(buckets, heads)
        nn.init.normal_(self.bias.weight, std=0.02)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance i - j (positive: the past)."""
        buckets, offset = self.buckets, torch.zeros_like(distance)
        if self.causal:
            distance = distance.clamp(min=0)
        else:
            buckets //= 2
            offset = (distance < 0) * buckets
            distance = distance.abs()
        exact = buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + ratio * (buckets - exact)).long().clamp(max=buckets - 1)
        return offset + torch.where(distance < exact, distance, far)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        distance = relative_distance(q.shape[-2], k.shape[-2], q.device)  # (tokens, keys)
        bias = self.bias(self.bucket(distance)).movedim(-1, -3).to(q.dtype).unsqueeze(-4)  # (1, heads, tokens, keys)
        if causal:
            mask = with_causal(mask, q, k)
        if mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
        return attend(q, k, v, bias)

    def look_back(self, q: Tensor, k: Tensor, v: Tensor, at: Places) -> Tensor:
        bias = self.bias(self.bucket(at.distance[:, 0])).permute(0, 3, 1, 2)  # (batch, heads, tokens, keys)
        return attend(q, k, v, (bias + at.ahead).to(q.dtype))


class RelativeEncoding(Positional):
    """The paper's simplified relative encoding (v1, section 2.1): one table R of distances, for keys and values.

    A_ij = q_i . (k_j + R_{i-j}) ; out_i = sum_j softmax(A)_ij (v_j + R_{i-j}). The table is shared by the heads.
    """

    def __init__(self, head_dim: int, max_len: int):
        super().__init__()
        self.max_len = max_len
        self.table = nn.Parameter(torch.randn(2 * max_len - 1, head_dim) * 0.02)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        tokens, keys = q.shape[-2], k.shape[-2]
        # The table's rows for the distances keys - 1 down to 1 - tokens: key j of query i is then at column
        # tokens - 1 - i + j, so that one shift per row turns distances into keys.
        rows = self.table[..., self.max_len - tokens : self.max_len + keys - 1, :].flip(-2)
        rows = rows[..., None, None, :, :]  # (1, 1, distances, head_dim)
        by_distance = q @ rows.mT  # (batch, heads, tokens, distances)
        logits = (q @ k.transpose(-1, -2) + _distance_to_key(by_distance, keys)) / math.sqrt(q.shape[-1])
        if causal:
            mask = with_causal(mask, q, k)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        weights = logits.softmax(-1)  # (batch, heads, tokens, keys)
        return weights @ v + _key_to_distance(weights) @ rows

    def look_back(self, q: Tensor, k: Tensor, v: Tensor, at: Places) -> Tensor:
        # Key and distance back are each the position less the other, so one gather turns either into the other.
        distance = at.distance.expand(-1, q.shape[1], -1, -1)  # (batch, heads, tokens, keys)
        ahead, distance = distance < 0, distance.clamp(min=0)
        rows = self.table[self.max_len - 1 : self.max_len - 1 + k.shape[-2]]  # (keys, head_dim), by distance back
        logits = (q @ k.transpose(-1, -2) + (q @ rows.T).gather(-1, distance)) / math.sqrt(q.shape[-1])
        weights = logits.masked_fill(ahead, float("-inf")).softmax(-1)
        return weights @ v + weights.gather(-1, distance).masked_fill(ahead, 0) @ rows


def _distance_to_key(x: Tensor, keys: int) -> Tensor:
    """(..., tokens, distances) -> (..., tokens, keys): row i is read from tokens - 1 - i on.

    There are tokens + keys - 1 distances. One row after the other, each begins one entry earlier: a view.
    """
    tokens, distances = x.shape[-2:]
    if torch.compiler.is_exporting():
        return _from(tokens - 1 - torch.arange(tokens, device=x.device), keys, x)
    if tokens == 1:
        return x
    flat = x.flatten(-2)[..., tokens - 1 : tokens * distances - 1]
    return flat.unflatten(-1, (tokens, distances - 1))[..., :keys]


def _key_to_distance(x: Tensor) -> Tensor:
    """The transpose of :func:`_distance_to_key`: row i is written from tokens - 1 - i on, the rest is zero."""
    tokens, keys = x.shape[-2:]
    distances = tokens + keys - 1
    if torch.compiler.is_exporting():
        return _from(torch.arange(tokens, device=x.device), distances, F.pad(x, (tokens - 1, tokens - 1)))
    if tokens == 1:
        return x
    flat = F.pad(F.pad(x, (0, tokens - 2)).flatten(-2), (tokens - 1, 1))
    return flat.unflatten(-1, (tokens, distances))


def _from(first: Tensor, count: int, x: Tensor) -> Tensor:
    """``count`` entries of each row of ``x`` (..., rows, any), from its place in ``first`` (rows,) on.

    To shift flattened rows is faster, but where sizes are free the tracer cannot show that it divides them evenly.
    """
    places = first[:, None] + torch.arange(count, device=x.device)
    return x.gather(-1, places.expand(*x.shape[:-1], count))


def positions(kind: str, heads: int, head_dim: int, max_len: int, causal: bool) -> Positional:
    """The part that a configuration has a name for (``config.Positions``)."""
    if kind == "bucketed":
        return BucketedBias(heads, causal)
    return {"rotary": Rotary, "relative": RelativeEncoding}[kind](head_dim, max_len)
