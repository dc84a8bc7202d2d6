"""Causal stacks with memories: what a layer of a :class:`~memformer.CausalMemformer` is, and what it carries.

Shapes: x (batch, tokens, dim), slots (layers, batch, slots, dim), what a layer got of the last tokens (layers, batch,
overlap, dim); one memory for all layers counts as one layer's slots. Where some tokens do not exist, those that do come
first: what is carried stands right before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import ContextProjection, KeysValues
from .blocks import Block
from .memory import SlotWriter, begun, writes

__all__ = [
    "Carried",
    "CausalLayer",
    "CausalMemory",
    "MemoryInEachLayer",
    "OneMemory",
    "Remembered",
    "along",
    "as_they_stood",
    "last_rows",
    "predicting",
    "tokens_first",
]

Remembered = tuple[Tensor, Tensor]
"""What layers carry: slots (..., batch, slots, dim), and their input at the last tokens (..., batch, overlap, dim)."""

Carried = tuple[Tensor, Tensor, Tensor]
"""The parts of a :class:`CausalMemory`, the first two with the layers as their first dimension."""


class CausalMemory(NamedTuple):
    """What a causal model carries from segment to segment: of fixed size, and all that it knows of what it read.

    Attributes:
        slots: (batch, layers, slots, dim); one layer where all share a memory.
        last: (batch, depth, overlap, dim), what each layer got of the last tokens that were read: its self-attention
            looks at them from the next segment, too.
        output: (batch, dim), the last layer's at the last token, from which the next one is predicted.
    """

    slots: Tensor
    last: Tensor
    output: Tensor


def tokens_first(tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (batch, tokens) with those that exist before the others, in their order; and ``kept`` for these."""
    # Without a sort, which ONNX does not have: how many come before each.
    count = kept.sum(1, keepdim=True)
    rank = torch.where(kept, kept.cumsum(1), count + (~kept).cumsum(1)) - 1
    return torch.zeros_like(tokens).scatter(1, rank, tokens), torch.arange(kept.shape[1], device=kept.device) < count


def as_they_stood(hidden: Tensor, kept: Tensor) -> Tensor:
    """What :func:`predicting` found, (batch, tokens + 1, dim), for the places that tokens had before they came first.

    Args:
        kept: (batch, tokens), True for tokens that exist, where they stood.
    """
    return along(hidden, F.pad(kept.cumsum(1), (1, 0)))


def last_rows(last: Tensor, x: Tensor, kept: Tensor | None) -> Tensor:
    """The last of (..., overlap, dim) and then (..., tokens, dim): as many as there were, of tokens that exist."""
    overlap, rows = last.shape[-2], torch.cat([last, x.to(last.dtype)], -2)
    if kept is None:
        return rows[..., rows.shape[-2] - overlap :, :]
    return along(rows, kept.sum(-1, keepdim=True) + torch.arange(overlap, device=kept.device))


def predicting(output: Tensor, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output at the last token before each of a segment's and before the one after them, which predicts it: (batch,
    tokens + 1, dim). And the one behind the last token that exists, to be carried.

    Args:
        output: (batch, dim), before the segment.
        x: (batch, tokens, dim), the last layer's.
        kept: (batch, tokens), True for tokens that exist; None for all.
    """
    hidden = torch.cat([output[:, None].to(x.dtype), x], 1)
    last = hidden[:, -1] if kept is None else along(hidden, kept.sum(1, keepdim=True))[:, 0]
    return hidden, last.to(output.dtype)


def along(rows: Tensor, places: Tensor) -> Tensor:
    """(..., rows, dim), at those places (..., any number)."""
    return rows.gather(-2, places[..., None].expand(*places.shape, rows.shape[-1]))


class CausalLayer(nn.Module):
    """A block that reads slots of its own, and writes into them what it made of the segment.

    Args:
        updates: how often the slots are written per segment.
        overlap: how many of the last tokens its self-attention still sees.
        parts: in how many parts a slot is read.
    """

    def __init__(self, dim: int, heads: int, block: Block, writer: SlotWriter, updates: int, overlap: int, parts: int):
        super().__init__()
        self.updates, self.overlap = updates, overlap
        self.memory_norm = nn.LayerNorm(dim)
        self.memory_projection = ContextProjection(dim, heads, 1, parts)
        self.block = block
        self.norm = nn.LayerNorm(dim)
        self.writer = writer
        self.before = nn.Parameter(_vectors(dim))  # in place of tokens before a document

    def initial(self, batch_size: int) -> Remembered:
        """What is learned for a document's beginning: (batch, slots, dim) and (batch, overlap, dim)."""
        return self._initial(batch_size)

    def _initial(self, batch_size: int) -> Remembered:
        """:meth:`initial` from inside of ``forward``: FSDP divides the weights again after a call of that."""
        return self.writer.initial(batch_size), self.before.repeat(batch_size, self.overlap, 1)

    def context(self, memory: Tensor) -> KeysValues:
        """(batch, slots, dim) -> their keys and values."""
        return self.memory_projection(self.memory_norm(memory))[0]

    def forward(
        self,
        x: Tensor,
        memory: Remembered | None,
        visible: Tensor | None,
        kept: Tensor | None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Remembered]:
        """(batch, tokens, dim) and what is carried -> the same, after the layer.

        Args:
            memory: None for the initial one, which ``reset`` (batch,) puts into the lanes that begin anew: a layer
                takes it from its own weights, which are at hand in here alone where FSDP divides the model.
            visible: (batch, 1, tokens, overlap + tokens), where self-attention may look; None for the past.
            kept: (batch, tokens), True for tokens that exist, which come first.
        """
        if memory is None or reset is not None:
            given = (None, None) if memory is None else memory
            slots, last = (begun(*both, reset) for both in zip(given, self._initial(x.shape[0]), strict=True))
        else:
            slots, last = memory
        after = last_rows(last, x, kept)
        x = self.block(x, self.context(slots), visible, last=last)
        return x, (writes(self.writer, self.updates, slots, self.norm(x), kept), after)


class MemoryInEachLayer(nn.Module):
    """Layers that each remember for themselves: of the segment before, a layer needs only what it kept itself."""

    def __init__(self, layers: Sequence[CausalLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.beginning = nn.Parameter(torch.zeros(layers[0].before.shape))  # in place of an output before a document

    def initial(self, batch_size: int) -> Carried:
        """What is learned for a document's beginning."""
        # Copies, not views: FSDP frees the weights again.
        return *_stacked([layer.initial(batch_size) for layer in self._layers]), self.beginning.repeat(batch_size, 1)

    def forward(
        self,
        x: Tensor,
        memory: Carried | None,
        visible: Tensor | None,
        kept: Tensor | None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Carried]:
        """(batch, tokens, dim) -> what predicts them, (batch, tokens + 1, dim), see :func:`predicting`; and the memory.

        The arguments are those of :class:`CausalLayer`.
        """
        found = []
        each = [None] * len(self.layers) if memory is None else list(zip(*memory[:2], strict=True))
        output = begun(None if memory is None else memory[2], self.beginning.expand(x.shape[0], -1), reset)
        for layer, own in zip(self._layers, each, strict=True):
            x, after = layer(x, own, visible, kept, reset)
            found.append(after)
        hidden, output = predicting(output, x, kept)
        return hidden, (*_stacked(found), output)

    def contexts(self, slots: Tensor) -> list[KeysValues]:
        """(layers, batch, slots, dim) -> the slots' keys and values for each layer."""
        return [layer.context(own) for layer, own in zip(self._layers, slots.unbind(0), strict=True)]

    def each_block(self) -> list[Block]:
        """The layers without their memories."""
        return [layer.block for layer in self._layers]

    def writers(self) -> list[SlotWriter]:
        """One for each memory."""
        return [layer.writer for layer in self._layers]

    @property
    def _layers(self) -> list[CausalLayer]:
        return list(self.layers)  # type: ignore[arg-type]


class OneMemory(nn.Module):
    """All layers read the same slots, which are written from the last one (as a Memformer's encoder does)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        blocks: Sequence[Block],
        writer: SlotWriter,
        updates: int,
        overlap: int,
        parts: int,
    ):
        super().__init__()
        self.updates, self.overlap = updates, overlap
        self.memory_norm = nn.LayerNorm(dim)
        self.memory_projection = ContextProjection(dim, heads, len(blocks), parts)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.writer = writer
        self.before = nn.Parameter(_vectors(len(blocks), dim))  # in place of tokens before a document
        self.beginning = nn.Parameter(torch.zeros(dim))  # in place of an output

    def initial(self, batch_size: int) -> Carried:
        """What is learned for a document's beginning; the slots are of one layer."""
        return self._initial(batch_size)

    def _initial(self, batch_size: int) -> Carried:
        last = self.before[:, None, None].repeat(1, batch_size, self.overlap, 1)
        return self.writer.initial(batch_size)[None], last, self.beginning.repeat(batch_size, 1)

    def forward(
        self,
        x: Tensor,
        memory: Carried | None,
        visible: Tensor | None,
        kept: Tensor | None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Carried]:
        """(batch, tokens, dim) -> what predicts them, and the memory; see :class:`MemoryInEachLayer`."""
        initial = self._initial(x.shape[0])
        slots, last, output = (None, None, None) if memory is None else memory
        slots = begun(None if slots is None else slots[0], initial[0][0], reset)
        after = []
        for i, (block, context) in enumerate(zip(self.blocks, self.contexts(slots[None]), strict=True)):
            own = begun(None if last is None else last[i], initial[1][i], reset)
            after.append(last_rows(own, x, kept))
            x = block(x, context, visible, last=own)
        hidden, output = predicting(begun(output, initial[2], reset), x, kept)
        written = writes(self.writer, self.updates, slots, self.norm(x), kept)
        return hidden, (written[None], torch.stack(after), output)

    def contexts(self, slots: Tensor) -> list[KeysValues]:
        """(1, batch, slots, dim) -> the slots' keys and values for each layer."""
        return self.memory_projection(self.memory_norm(slots[0]))

    def each_block(self) -> list[Block]:
        """The layers without their memory."""
        return list(self.blocks)  # type: ignore[arg-type]

    def writers(self) -> list[SlotWriter]:
        """The one there is."""
        return [self.writer]


def _stacked(each: Sequence[Remembered]) -> Remembered:
    slots, last = zip(*each, strict=True)
    return torch.stack(slots), torch.stack(last)


def _vectors(*shape: int) -> Tensor:
    """About as long as an embedding."""
    return torch.randn(shape) * shape[-1] ** -0.5
