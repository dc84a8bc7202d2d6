"""The memory's writers: how M_{t-1} and a segment's encoding become M_t (paper v2, section 3.3).

Shapes: memory (batch, slots, dim), x (batch, tokens, dim), mask (batch, tokens), True where x is kept.
A writer is a module with ``initial(batch_size)`` and ``forward(memory, x, mask)``, which writes once. Parameters with
a row per slot are named; all others are shared, so the number of slots may change (:meth:`SlotWriter.resize`).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import merge_heads, split_heads
from .blocks import feed_forward

__all__ = [
    "GatedWriter",
    "NormalisedWriter",
    "PlacedWriter",
    "SlotWriter",
    "begun",
    "new_writer",
    "normalise",
    "slot_attention",
    "slot_attention_weights",
    "writes",
]


def slot_attention(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    preference: Tensor | None = None,
) -> Tensor:
    """Memory slot attention: slot i attends itself and the whole segment, never another slot.

        a_i = softmax([q_i . k_i ; q_i . k_x] / (sqrt(head_dim) temperature)) ;  m_i' = a_i [v_i ; v_x]

    Args:
        q, own_k, own_v: (batch, heads, slots, head_dim), each slot's query, key and value.
        k, v: (batch, heads, tokens, head_dim), the segment's.
        mask: (batch, tokens), True where the segment is kept; None keeps all.
        temperature: below 1 sharpens the attention.
        preference: added to the logits of the slot itself and of the segment, (batch, heads, slots, 1 + tokens).

    Returns:
        (batch, heads, slots, head_dim).
    """
    on_itself, on_segment = slot_attention_weights(
        q, own_k, k, mask=mask, temperature=temperature, preference=preference
    )
    return on_itself * own_v + on_segment @ v  # (batch, heads, slots, head_dim)


def slot_attention_weights(
    q: Tensor,
    own_k: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    preference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights a_i of :func:`slot_attention`: on the slot itself, (batch, heads, slots, 1), and on the segment,
    (batch, heads, slots, tokens). Together they are 1."""
    q = q / (math.sqrt(q.shape[-1]) * temperature)
    to_itself = (q * own_k).sum(-1, keepdim=True)  # (batch, heads, slots, 1)
    to_segment = q @ k.transpose(-1, -2)  # (batch, heads, slots, tokens)
    if preference is not None:
        to_itself, to_segment = to_itself + preference[..., :1], to_segment + preference[..., 1:]
    if mask is not None:
        to_segment = to_segment.masked_fill(~mask[..., None, None, :], float("-inf"))
    on_itself, on_segment = torch.cat([to_itself, to_segment], -1).softmax(-1).split([1, k.shape[-2]], -1)
    return on_itself, on_segment


def normalise(memory: Tensor, bias: Tensor) -> Tensor:
    """Biased memory normalisation, the forgetting mechanism: (m + b) / |m + b|.

    ``memory``, and the result: (batch, slots, dim); ``bias``: (slots, dim) or (1, slots, dim).
    """
    return F.normalize(memory + bias, dim=-1)


class SlotWriter(nn.Module):
    """What the writers share: slot attention, and a parameter with a row per slot.

    Attributes:
        per_slot: the name of that parameter, (slots, dim).
        role: what a row of it is to its slot, in words.
        scale: what it is multiplied with where it is used.
    """

    per_slot: ClassVar[str]
    role: ClassVar[str]
    scale: float = 1.0

    def __init__(self, heads: int, temperature: float):
        super().__init__()
        self.heads, self.temperature = heads, temperature

    @staticmethod
    def new_slots(slots: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
        """The per-slot parameter's first values, (slots, dim)."""
        raise NotImplementedError

    def initial(self, batch_size: int) -> Tensor:
        """The memory before a document, (batch, slots, dim)."""
        raise NotImplementedError

    def projected(self, memory: Tensor, x: Tensor) -> list[Tensor]:
        """q, own_k, own_v, (batch, heads, slots, head_dim), and k, v, (batch, heads, tokens, head_dim), of
        :func:`slot_attention`."""
        raise NotImplementedError

    def preference(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Where the slots look, whatever stands there: added to the logits of :func:`slot_attention`; None: nothing."""
        return None

    def attend(self, memory: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the slots find in themselves and in the segment, (batch, slots, dim)."""
        parts, preference = self.projected(memory, x), self.preference(x, mask)
        return merge_heads(slot_attention(*parts, mask=mask, temperature=self.temperature, preference=preference))

    def attention_on_itself(self, memory: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The share of each slot's attention that is on the slot itself, (batch, slots), the mean over heads.

        The rest is on the tokens. It is 1 where the whole segment is masked.
        """
        q, own_k, _, k, _ = self.projected(memory, x)
        on_itself, _ = slot_attention_weights(
            q, own_k, k, mask=mask, temperature=self.temperature, preference=self.preference(x, mask)
        )
        return on_itself.squeeze(-1).mean(1)

    def write_with(self, temperature: float, forgetting: float) -> None:
        """Write at another temperature; where there is a bias vector, also with one of another length."""
        self.temperature = temperature

    def resize(self, slots: int, generator: torch.Generator | None = None) -> None:
        """Keep the first ``slots`` slots; where there are fewer, add new ones as at construction."""
        old = getattr(self, self.per_slot)
        new = self.new_slots(max(0, slots - len(old)), old.shape[1], generator).to(old)
        setattr(self, self.per_slot, nn.Parameter(torch.cat([old.detach()[:slots], new]), old.requires_grad))


SPEED = 0.3
"""What a slow map's output is multiplied by."""


def slow_linear(dim: int, out: int) -> nn.Linear:
    """A linear map without a bias, which begins larger by as much as :data:`SPEED` makes its output smaller.

    Together they are any linear map, but an optimizer whose steps do not know a gradient's size (Adam) changes it
    ``SPEED`` times as fast. The module is a plain ``nn.Linear``, so that others (a LoRA that is merged) know what it
    computes.
    """
    made = nn.Linear(dim, out, bias=False)
    with torch.no_grad():
        made.weight /= SPEED
    return made


class NormalisedWriter(SlotWriter):
    """Slot attention with the slot's own value unprojected, then biased normalisation (paper v2).

    A slot that attends itself alone is only pulled towards its bias, so it holds content over many segments; slots live
    on the unit sphere, and with nothing written drift back to where they began, faster where the bias is longer.
    The bias vector b is ``scale``, the forgetting, times the parameter ``bias``: it begins 0.001 long, so that content
    which is kept outlives hundreds of segments, and an optimizer whose steps do not know a gradient's size (Adam)
    changes it as slowly; a parameter of that length would be a hundred times longer within 100 steps.
    A slot's query and own key are made from its content and from the direction of its bias vector, its name: slots that
    hold the same would attend the same and hold the same for ever. They, and the segment's keys and values, are learned
    slowly as well: at the speed of the other weights attention hardens before it is useful.
    There is no projection after the heads: it would change a slot that keeps its content.
    """

    per_slot, role = "bias", "bias vector"

    def __init__(self, dim: int, slots: int, heads: int, temperature: float, forgetting: float = 0.001):
        super().__init__(heads, temperature)
        self.scale = forgetting
        self.norm = nn.LayerNorm(dim)
        self.slots_to_qk = slow_linear(dim, 2 * dim)
        self.segment_to_kv = slow_linear(dim, 2 * dim)
        self.bias = nn.Parameter(self.new_slots(slots, dim))
        with torch.no_grad():
            # x has norm sqrt(dim); its values must be of the size of a slot, which is 1, or one write would erase it.
            self.segment_to_kv.weight[dim:].normal_(std=1 / dim / SPEED)
            # Each slot's key is parallel to its query, so that it gives itself half of its attention or more at any
            # width; with independent ones it gives itself a few percent, and two writes leave all slots the same.
            query, own_key = self.slots_to_qk.weight.chunk(2)
            own_key.copy_(15 * temperature / math.sqrt(dim / heads) * query)

    @staticmethod
    def new_slots(slots: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
        return F.normalize(_randn(slots, dim, generator), dim=-1)

    def write_with(self, temperature: float, forgetting: float) -> None:
        self.temperature, self.scale = temperature, forgetting

    def initial(self, batch_size: int) -> Tensor:
        return F.normalize(self.bias, dim=-1).expand(batch_size, -1, -1)

    def projected(self, memory: Tensor, x: Tensor) -> list[Tensor]:
        # (1, slots, dim), each as long as a normalised slot.
        name = math.sqrt(memory.shape[-1]) * F.normalize(self.bias, dim=-1).unsqueeze(-3)
        of_slots = SPEED * self.slots_to_qk((self.norm(memory) + name) / math.sqrt(2))  # (batch, slots, 2 dim)
        (q, own_k), (k, v) = of_slots.chunk(2, -1), (SPEED * self.segment_to_kv(x)).chunk(2, -1)
        return [split_heads(part, self.heads) for part in (q, own_k, memory, k, v)]

    def forward(self, memory: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return normalise(self.attend(memory, x, mask), self.scale * self.bias.unsqueeze(-3))


class PlacedWriter(SlotWriter):
    """Slot attention whose heads begin with places of their own in a segment, and normalisation.

    Slots that find out by content alone where to look begin as mixtures of the same tokens, and a key that is mixed
    with others is not found again. Here each head of each slot prefers one stretch of a segment, in order: ``places``
    (slots, heads, 1 + length) are added to the logits of the slot itself and of the tokens, and learned. They are
    shares of the tokens that exist: a segment is divided among all slots however short it is. Queries are learned too,
    (slots, dim), whatever a slot holds.

        a_i = softmax([p_i0 ; q_i . k_x / (sqrt(head_dim) temperature) + p_i]) ;  m_i <- a_i [m_i ; v_x] / norm

    A new slot is nearly replaced by each write; what it keeps is learned. So it holds much of the last segment rather
    than a little of all.

    Args:
        length: tokens of a segment, at most.
    """

    per_slot, role = "slots", "initial content"
    strength: ClassVar[float] = 4.0
    """By how much the place of a new slot is preferred, in logits; the slot itself by half as much."""

    def __init__(self, dim: int, slots: int, heads: int, temperature: float, length: int):
        super().__init__(heads, temperature)
        self.segment_to_kv = nn.Linear(dim, 2 * dim)
        self.queries = nn.Parameter(_randn(slots, dim, None))
        self.slots = nn.Parameter(self.new_slots(slots, dim))
        self.places = nn.Parameter(self._new_places(slots, length))
        with torch.no_grad():  # x has norm sqrt(dim); its values are to be of the size of a slot, which is 1
            self.segment_to_kv.weight[dim:].normal_(std=1 / dim)

    new_slots = staticmethod(NormalisedWriter.new_slots)

    def _new_places(self, slots: int, length: int) -> Tensor:
        """(slots, heads, 1 + length). Stretches overlap by half a token at either end, and none is empty."""
        pieces = slots * self.heads
        # Half precision, if that is the default, cannot tell far places apart.
        centre = (torch.arange(pieces, dtype=torch.float32) + 0.5) * length / pieces
        middle = torch.arange(length, dtype=torch.float32) + 0.5
        distance = (centre[:, None] - middle).abs()  # (pieces, length), in tokens
        near = distance <= max(length / pieces / 2, 0.5) + 0.5
        places = F.pad(self.strength * near, (1, 0), value=self.strength / 2)
        return places.to(torch.get_default_dtype()).view(slots, self.heads, -1)

    def initial(self, batch_size: int) -> Tensor:
        return F.normalize(self.slots, dim=-1).expand(batch_size, -1, -1)

    def projected(self, memory: Tensor, x: Tensor) -> list[Tensor]:
        k, v = self.segment_to_kv(x).chunk(2, -1)
        queries = self.queries.unsqueeze(-3).expand_as(memory)
        q, own_v, k, v = (split_heads(part, self.heads) for part in (queries, memory, k, v))
        return [q, torch.zeros_like(q), own_v, k, v]

    def preference(self, x: Tensor, mask: Tensor | None) -> Tensor:
        places = self.places.transpose(-3, -2).unsqueeze(-4)  # (1, heads, slots, 1 + length)
        length, tokens = places.shape[-1] - 1, x.shape[-2]
        if mask is None:
            if tokens == length:
                return places
            return places[..., F.pad(1 + torch.arange(tokens, device=x.device) * length // tokens, (1, 0))]
        rank, count = (mask.cumsum(-1) - 1).clamp(min=0), mask.sum(-1, keepdim=True).clamp(min=1)
        where = F.pad(1 + rank * length // count, (1, 0))[..., None, None, :]  # (batch, 1, 1, 1 + tokens)
        shape = (*mask.shape[:-1], *places.shape[-3:-1])
        return places.expand(*shape, -1).gather(-1, where.expand(*shape, -1))

    def forward(self, memory: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.normalize(self.attend(memory, x, mask), dim=-1)

    def resize(self, slots: int, generator: torch.Generator | None = None) -> None:
        """As for any writer; new slots have the places that they have in a new memory of that size."""
        super().resize(slots, generator)
        queries, places = self.queries, self.places
        new = _randn(max(0, slots - len(queries)), queries.shape[1], generator).to(queries)
        self.queries = nn.Parameter(torch.cat([queries.detach()[:slots], new]), queries.requires_grad)
        new = self._new_places(slots, places.shape[-1] - 1).to(places)[len(places) :]
        self.places = nn.Parameter(torch.cat([places.detach()[:slots], new]), places.requires_grad)


class GatedWriter(SlotWriter):
    """Slot attention with projected values, a feed-forward, and a GRU that gates the write (the earlier library).

    The GRU comes last, so that a slot stays a gated mean of bounded candidates however often it is written.
    """

    per_slot, role = "slots", "initial content"

    def __init__(self, dim: int, slots: int, heads: int, temperature: float):
        super().__init__(heads, temperature)
        self.norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.slot_qkv = nn.Linear(dim, 3 * dim)
        self.segment_kv = nn.Linear(dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.feed_forward = feed_forward(dim)
        self.gru = nn.GRUCell(dim, dim)
        self.slots = nn.Parameter(self.new_slots(slots, dim))

    @staticmethod
    def new_slots(slots: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
        return _randn(slots, dim, generator)

    def initial(self, batch_size: int) -> Tensor:
        return self.slots.expand(batch_size, -1, -1)

    def projected(self, memory: Tensor, x: Tensor) -> list[Tensor]:
        slots = self.slot_qkv(self.norm(memory)).chunk(3, -1)  # each (batch, slots, dim)
        segment = self.segment_kv(x).chunk(2, -1)  # each (batch, tokens, dim)
        return [split_heads(part, self.heads) for part in (*slots, *segment)]

    def forward(self, memory: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found = self.to_out(self.attend(memory, x, mask))  # (batch, slots, dim)
        found = found + self.feed_forward(self.feed_norm(found))
        return self.gru(found.flatten(-3, -2), memory.flatten(-3, -2)).view_as(memory)  # of (batch * slots, dim)


def new_writer(
    kind: str, dim: int, slots: int, heads: int, temperature: float, forgetting: float, length: int
) -> SlotWriter:
    """A writer by the name that a configuration has for it (``config.Writer``), for segments of ``length`` tokens.

    Raises:
        ValueError: there is none of that name.
    """
    if kind == "placed":
        return PlacedWriter(dim, slots, heads, temperature, length)
    if kind == "gated":
        return GatedWriter(dim, slots, heads, temperature)
    if kind == "normalised":
        return NormalisedWriter(dim, slots, heads, temperature, forgetting)
    raise ValueError(f"kind: expected normalised, placed or gated, got {kind!r}")


def _randn(slots: int, dim: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(slots, dim, generator=generator, device=None if generator is None else generator.device)


def begun(memory: Tensor | None, initial: Tensor, reset: Tensor | None) -> Tensor:
    """What is carried into a segment: ``initial`` where there is nothing yet, or a reset.

    Args:
        memory: (batch, ...), after the segment before; None for nothing.
        initial: what a document begins with, of that shape.
        reset: (batch,), True in lanes that begin anew; None for none.
    """
    if memory is None:
        return initial
    return memory if reset is None else torch.where(reset.view(-1, *[1] * (memory.dim() - 1)), initial, memory)


def writes(writer: SlotWriter, updates: int, memory: Tensor, x: Tensor, kept: Tensor | None) -> Tensor:
    """The slots after some writes of a segment; where nothing of it is kept, the slots as they were.

    Args:
        memory: (..., batch, slots, dim), before the segment.
        x: (..., batch, tokens, dim), what is written of it.
        kept: (..., batch, tokens), True for tokens that exist; None for all.
    """
    written = memory
    for _ in range(updates):
        written = writer(written, x, kept)
    written = written.to(memory.dtype)
    return written if kept is None else torch.where(kept.any(-1)[..., None, None], written, memory)
