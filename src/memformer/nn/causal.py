"""Causal stacks with memories: what a layer of a :class:`~memformer.CausalMemformer` is, and where its slots are.

Shapes: x (batch, tokens, dim), memories (layers, batch, slots, dim); one memory for all layers counts as one layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import ContextProjection, KeysValues, causal_mask
from .blocks import Block
from .memory import SlotWriter

__all__ = [
    "CausalLayer",
    "CausalMemory",
    "MemoryInEachLayer",
    "OneMemory",
    "begun",
    "last_tokens",
    "visible_to",
    "writes",
]

NOTHING = -1
"""In place of a token before a document's first."""


class CausalMemory(NamedTuple):
    """What a causal model carries from segment to segment: of fixed size, and all that it knows of what it read.

    Attributes:
        slots: (batch, layers, slots, dim); one layer where all share a memory.
        last: (batch, overlap), the last tokens that were read, -1 where a document has just begun.
    """

    slots: Tensor
    last: Tensor


def visible_to(kept: Tensor) -> Tensor:
    """(..., tokens), True for tokens that exist -> (..., 1, tokens, tokens): each sees those before it, and itself."""
    tokens = kept.shape[-1]
    itself = torch.eye(tokens, dtype=torch.bool, device=kept.device)
    return (kept[..., None, None, :] & causal_mask(tokens, tokens, kept.device)) | itself


def last_tokens(last: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The last ``overlap`` tokens that exist, of those before a segment and those in it."""
    overlap, read = last.shape[1], torch.cat([last.to(tokens.dtype), tokens], 1)
    if mask is None:
        return read[:, read.shape[1] - overlap :]
    # Those before the segment all exist, so there are enough. Without a sort, which ONNX does not have.
    kept = F.pad(mask, (overlap, 0), value=True)
    place = torch.arange(kept.shape[1], device=kept.device).where(kept, -1)
    return read.gather(1, place.topk(overlap).values.flip(1))


def begun(writer: SlotWriter, memory: Tensor | None, reset: Tensor | None, batch_size: int) -> Tensor:
    """The memory before a segment, (batch, slots, dim): the learned initial one where there is none, or a reset.

    Args:
        memory: (batch, slots, dim), after the segment before; None for none.
        reset: (batch,), True in lanes that begin anew; None for none.
    """
    if memory is None:
        return writer.initial(batch_size)
    return memory if reset is None else torch.where(reset[:, None, None], writer.initial(batch_size), memory)


def writes(writer: SlotWriter, updates: int, memory: Tensor, x: Tensor, kept: Tensor | None) -> Tensor:
    """The memory after some writes of a segment; where nothing of it is kept, the memory as it was.

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


class CausalLayer(nn.Module):
    """A block that reads slots of its own, and writes into them what it made of the segment.

    Args:
        updates: how often the memory is written per segment.
    """

    def __init__(self, dim: int, heads: int, block: Block, writer: SlotWriter, updates: int):
        super().__init__()
        self.updates = updates
        self.memory_norm = nn.LayerNorm(dim)
        self.memory_projection = ContextProjection(dim, heads, 1)
        self.block = block
        self.norm = nn.LayerNorm(dim)
        self.writer = writer

    def initial(self, batch_size: int) -> Tensor:
        """The learned memory before a document, (batch, slots, dim)."""
        return self.writer.initial(batch_size)

    def context(self, memory: Tensor) -> KeysValues:
        """(batch, slots, dim) -> their keys and values."""
        return self.memory_projection(self.memory_norm(memory))[0]

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        visible: Tensor | None,
        kept: Tensor | None,
        overlap: int,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(batch, overlap + tokens, dim) and (batch, slots, dim) -> the same, after the layer.

        Args:
            memory: None for the initial one, which ``reset`` (batch,) puts into the lanes that begin anew: a layer
                takes it from its own writer, whose weights are at hand in here alone where FSDP divides the model.
            visible: (batch, 1, overlap + tokens, overlap + tokens), where self-attention may look; None for the past.
            kept: (batch, tokens), True for tokens that exist.
            overlap: how many of the tokens are of the segment before, and so are in the memory already.
        """
        memory = begun(self.writer, memory, reset, x.shape[0])
        x = self.block(x, self.context(memory), visible)
        return x, writes(self.writer, self.updates, memory, self.norm(x[..., overlap:, :]), kept)


class MemoryInEachLayer(nn.Module):
    """Layers that each remember for themselves: of the segment before, a layer needs only what it wrote itself."""

    def __init__(self, layers: Sequence[CausalLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def initial(self, batch_size: int) -> Tensor:
        """The learned memories before a document, (layers, batch, slots, dim)."""
        return torch.stack([layer.initial(batch_size) for layer in self._layers])

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        visible: Tensor | None,
        kept: Tensor | None,
        overlap: int,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(batch, overlap + tokens, dim) and (layers, batch, slots, dim) -> the same; see :class:`CausalLayer`."""
        written = []
        each = [None] * len(self.layers) if memory is None else memory.unbind(0)
        for layer, slots in zip(self._layers, each, strict=True):
            x, new = layer(x, slots, visible, kept, overlap, reset)
            written.append(new)
        return x, torch.stack(written)

    def contexts(self, memory: Tensor) -> list[KeysValues]:
        """(layers, batch, slots, dim) -> the slots' keys and values for each layer."""
        return [layer.context(slots) for layer, slots in zip(self._layers, memory.unbind(0), strict=True)]

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
    """All layers read one memory, and it is written from the last one (as a Memformer's encoder does)."""

    def __init__(self, dim: int, heads: int, blocks: Sequence[Block], writer: SlotWriter, updates: int):
        super().__init__()
        self.updates = updates
        self.memory_norm = nn.LayerNorm(dim)
        self.memory_projection = ContextProjection(dim, heads, len(blocks))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.writer = writer

    def initial(self, batch_size: int) -> Tensor:
        """The learned memory before a document, (1, batch, slots, dim)."""
        return self.writer.initial(batch_size)[None]

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None,
        visible: Tensor | None,
        kept: Tensor | None,
        overlap: int,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(batch, overlap + tokens, dim) and (1, batch, slots, dim) -> the same; see :class:`CausalLayer`."""
        slots = begun(self.writer, None if memory is None else memory[0], reset, x.shape[0])
        for block, context in zip(self.blocks, self.contexts(slots[None]), strict=True):
            x = block(x, context, visible)
        return x, writes(self.writer, self.updates, slots, self.norm(x[:, overlap:]), kept)[None]

    def contexts(self, memory: Tensor) -> list[KeysValues]:
        """(1, batch, slots, dim) -> the slots' keys and values for each layer."""
        return self.memory_projection(self.memory_norm(memory[0]))

    def each_block(self) -> list[Block]:
        """The layers without their memory."""
        return list(self.blocks)  # type: ignore[arg-type]

    def writers(self) -> list[SlotWriter]:
        """The one there is."""
        return [self.writer]
