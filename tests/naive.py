"""Slow references, one lane at a time and in loops, after the papers' equations. They share nothing but parameters.

Shapes: x, q, k, v (length, dim), memory (slots, dim), mask (length,), allowed (length, keys).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from memformer import CausalMemformer
from memformer.model import Memformer
from memformer.nn.blocks import Block
from memformer.nn.memory import GatedWriter, NormalisedWriter, PlacedWriter
from memformer.nn.positions import BucketedBias, RelativeEncoding, Rotary


def head(x: Tensor, h: int, heads: int) -> Tensor:
    width = x.shape[-1] // heads
    return x[..., h * width : (h + 1) * width]


# --- Positions: the logit of a pair, and the value that it brings -----------------------------------------------------

Logit = Callable[[Tensor, Tensor, int, int], Tensor]
Value = Callable[[Tensor, int], Tensor]


def position_terms(positions: nn.Module | None) -> tuple[Logit, Value]:
    """``logit(q_i, k_j, head, distance)`` and ``value(v_j, distance)``, each q_i, k_j, v_j (head_dim,)."""

    def plain(q: Tensor, k: Tensor, h: int, distance: int) -> Tensor:
        return q @ k / math.sqrt(len(q))

    def rotated(q: Tensor, k: Tensor, h: int, distance: int) -> Tensor:
        # Entries m and m + half are one complex number, turned by the position times a frequency.
        half = len(q) // 2
        frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones_like(frequency), distance * frequency)
        pairs = torch.complex(q[:half], q[half:]) * torch.complex(k[:half], -k[half:]) * turn
        return pairs.real.sum() / math.sqrt(len(q))

    def biased(q: Tensor, k: Tensor, h: int, distance: int) -> Tensor:
        return plain(q, k, h, distance) + positions.bias.weight[bucket(distance, positions.causal), h]

    def row(distance: int) -> Tensor:
        return positions.table[distance + positions.max_len - 1]

    if positions is None:
        return plain, lambda v, distance: v
    if isinstance(positions, Rotary):
        return rotated, lambda v, distance: v
    if isinstance(positions, BucketedBias):
        return biased, lambda v, distance: v
    assert isinstance(positions, RelativeEncoding)
    return lambda q, k, h, distance: plain(q, k + row(distance), h, distance), lambda v, distance: v + row(distance)


def bucket(distance: int, causal: bool, buckets: int = 32, max_distance: int = 128) -> int:
    """T5's buckets, one number at a time."""
    if not causal:
        buckets //= 2
    first = buckets if distance < 0 and not causal else 0
    size = max(distance, 0) if causal else abs(distance)
    exact = buckets // 2
    if size < exact:
        return first + size
    octaves = math.log(size / exact) / math.log(max_distance / exact)
    return first + min(exact + int(octaves * (buckets - exact)), buckets - 1)


# --- Attention and layers ---------------------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None = None, positions: nn.Module | None = None
) -> Tensor:
    """The queries are the last of the keys' positions."""
    logit, value = position_terms(positions)
    rows = []
    for i in range(len(q)):
        distance = [len(k) - len(q) + i - j for j in range(len(k))]
        seen = [j for j in range(len(k)) if allowed is None or allowed[i, j]]
        parts = []
        for h in range(heads):
            logits = [logit(head(q[i], h, heads), head(k[j], h, heads), h, distance[j]) for j in seen]
            weights = torch.stack(logits).softmax(0)
            parts.append(sum(w * value(head(v[j], h, heads), distance[j]) for w, j in zip(weights, seen, strict=True)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def block(
    layer: Block, x: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None, context_allowed: Tensor | None
) -> Tensor:
    own, other = layer.self_attention, layer.context_attention
    q, k, v = own.to_qkv(layer.self_norm(x)).chunk(3, -1)
    x = x + own.to_out(attention(q, k, v, own.heads, allowed, own.positions))
    q = other.to_q(layer.context_norm(x))
    x = x + other.to_out(attention(q, keys, values, other.heads, context_allowed))
    return x + layer.feed_forward(layer.feed_norm(x))


def layer_context(projection: nn.Linear, context: Tensor, index: int, dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, (rows, dim), from its own rows of the common projection."""
    first, second = (slice((2 * index + n) * dim, (2 * index + n + 1) * dim) for n in (0, 1))
    weight, bias = projection.weight, projection.bias
    return context @ weight[first].T + bias[first], context @ weight[second].T + bias[second]


def encode(model: Memformer, src: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
    """(length,) tokens of which at least one is kept -> (length, dim), zero where masked."""
    encoder, x = model.encoder, model.encoder.embedding.weight[src]
    kept = torch.ones(len(src), dtype=torch.bool) if mask is None else mask
    for i, layer in enumerate(encoder.layers):
        normed = encoder.memory_norm(memory)
        normed = torch.cat([torch.stack(slot.chunk(model.config.slot_parts)) for slot in normed])
        context = layer_context(encoder.memory_projection.to_kv, normed, i, model.config.dim)
        x = block(layer, x, *context, kept.expand(len(src), -1), None)
    return encoder.norm(x) * kept[:, None]


def loss(
    model: Memformer,
    src: Tensor,
    tgt: Tensor,
    enc_out: Tensor,
    src_mask: Tensor | None = None,
    tgt_mask: Tensor | None = None,
) -> Tensor:
    """The mean loss of one lane, each token predicted by a decoder that was given only the tokens before it."""
    kept = torch.ones(len(tgt), dtype=torch.bool) if tgt_mask is None else tgt_mask
    source = src if src_mask is None else src[src_mask]
    losses = []
    for n in range(1, len(tgt)):
        if kept[n] and kept[:n].any():
            before, exists = overlapped(model, source, tgt[:n]), torch.ones(model.config.dec_overlap, dtype=torch.bool)
            logits = last_logits(model, before, torch.cat([kept[:1], exists, kept[1:n]]), enc_out, src_mask)
            losses.append(-logits.log_softmax(0)[tgt[n]])
    return torch.stack(losses).mean()


def overlapped(model: Memformer, source: Tensor, tgt: Tensor) -> Tensor:
    """A target whose first token is followed by the last ones of a source that exists, or by itself in their place."""
    places = range(len(source) - model.config.dec_overlap, len(source))
    last = [source[i] if i >= 0 else tgt[0] for i in places]
    return torch.stack([tgt[0], *last, *tgt[1:]])


def last_logits(model: Memformer, tgt: Tensor, kept: Tensor, enc_out: Tensor, src_mask: Tensor | None) -> Tensor:
    decoder = model.decoder
    x = decoder.embedding.weight[tgt] * kept[:, None]
    allowed = torch.tensor([[i == j or bool(i > j and kept[j]) for j in range(len(tgt))] for i in range(len(tgt))])
    context_allowed = None if src_mask is None else src_mask.expand(len(tgt), -1)
    for i, layer in enumerate(decoder.layers):
        context = layer_context(decoder.context_projection.to_kv, enc_out, i, model.config.dim)
        x = block(layer, x, *context, allowed, context_allowed)
    return decoder.to_logits(decoder.norm(x[-1]))


# --- Memory -----------------------------------------------------------------------------------------------------------


def slot_attention(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None,
    temperature: float,
    places: Tensor | None = None,
) -> Tensor:
    """q, own_k, own_v (slots, dim): each slot alone before itself and the kept tokens (paper v2, section 3.3).

    places (slots, heads, 1 + length): what each head of a slot prefers, itself or where in the kept tokens.
    """
    kept = [j for j in range(len(k)) if mask is None or mask[j]]
    slots = []
    for i in range(len(q)):
        parts = []
        for h in range(heads):
            seen_k = torch.stack([head(own_k[i], h, heads), *(head(k[j], h, heads) for j in kept)])
            seen_v = torch.stack([head(own_v[i], h, heads), *(head(v[j], h, heads) for j in kept)])
            query = head(q[i], h, heads)
            logits = seen_k @ query / (math.sqrt(len(query)) * temperature)
            if places is not None:
                share = [(1 + math.floor(n / len(kept) * (places.shape[2] - 1) + 1e-9)) for n in range(len(kept))]
                logits = logits + places[i, h][[0, *share]]
            weights = logits.softmax(0)
            parts.append(weights @ seen_v)
        slots.append(torch.cat(parts))
    return torch.stack(slots)


def write(
    writer: NormalisedWriter | PlacedWriter | GatedWriter, memory: Tensor, x: Tensor, mask: Tensor | None = None
) -> Tensor:
    if isinstance(writer, PlacedWriter):
        k, v = writer.segment_to_kv(x).chunk(2, -1)
        nothing = torch.zeros_like(writer.queries)
        moved = slot_attention(
            writer.queries, nothing, memory, k, v, writer.heads, mask, writer.temperature, writer.places
        )
        return torch.stack([slot / slot.square().sum().sqrt() for slot in moved])
    normed = writer.norm(memory)
    if isinstance(writer, NormalisedWriter):
        names = torch.stack([math.sqrt(len(b)) * b / b.norm() for b in writer.bias])
        q, own_k = (0.3 * (normed + names) / math.sqrt(2) @ writer.slots_to_qk.weight.T).chunk(2, -1)
        k, v = (0.3 * x @ writer.segment_to_kv.weight.T).chunk(2, -1)
        moved = slot_attention(q, own_k, memory, k, v, writer.heads, mask, writer.temperature)
        return torch.stack([slot / slot.square().sum().sqrt() for slot in moved + writer.scale * writer.bias])
    k, v = writer.segment_kv(x).chunk(2, -1)
    q, own_k, own_v = writer.slot_qkv(normed).chunk(3, -1)
    found = writer.to_out(slot_attention(q, own_k, own_v, k, v, writer.heads, mask, writer.temperature))
    found = found + writer.feed_forward(writer.feed_norm(found))
    return torch.stack([gru(writer.gru, new, old) for new, old in zip(found, memory, strict=True)])


def gru(cell: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    """h' = (1 - z) n + z h, with z the part that is kept."""
    from_x = (cell.weight_ih @ x + cell.bias_ih).chunk(3)
    from_h = (cell.weight_hh @ h + cell.bias_hh).chunk(3)
    r, z = (torch.sigmoid(from_x[gate] + from_h[gate]) for gate in (0, 1))
    return (1 - z) * torch.tanh(from_x[2] + r * from_h[2]) + z * h


# --- Streams ----------------------------------------------------------------------------------------------------------


def causal_next_logits(model: CausalMemformer, text: list[int]) -> Tensor:
    """Of the token after a text, by whole segments; whatever stands where that token will be is not seen."""
    length, memory = model.config.max_seq_len, None
    whole = len(text) // length * length
    for begin in range(0, whole, length):
        _, memory = model.step(torch.tensor([text[begin : begin + length]]), memory)
    pending = text[whole:]
    hidden, _ = model.step(torch.tensor([[*pending, 0]]), memory)
    return model.head(hidden[0, len(pending)])


def next_logits(model: Memformer, text: list[int], start: int) -> Tensor:
    """Of the token after a text, everything computed anew from its beginning."""
    if isinstance(model, CausalMemformer):
        return causal_next_logits(model, text)
    length = min(model.config.enc_max_seq_len, model.config.dec_max_seq_len - 1)
    memory, source = model.get_initial_mem(1)[0], torch.tensor([start])
    for begin in range(0, len(text) - length + 1, length):
        encoding = encode(model, source, memory)
        for _ in range(model.config.num_mem_updates):
            memory = write(model.writer, memory, encoding)
        source = torch.tensor(text[begin : begin + length])
    pending = overlapped(model, source, torch.tensor([start, *text[len(text) // length * length :]]))
    return last_logits(model, pending, torch.ones(len(pending), dtype=torch.bool), encode(model, source, memory), None)
