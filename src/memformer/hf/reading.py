"""How a language model reads a memory: attention over the slots beside each layer, which adds nothing at first.
And what writes it.

Shapes: x (batch, tokens, dim), slots (batch, slots, dim).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.attention import KeysValues, attend, in_parts, merge_heads, split_heads
from ..nn.memory import SlotWriter, new_writer
from .configuration import MemoryConfig

__all__ = ["Reader", "Readers", "writer_of"]

HALF = (torch.float16, torch.bfloat16)


class ZeroLinear(nn.Linear):
    """A linear map that begins as zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class Reader(nn.Module):
    """Attention of a layer's tokens over the slots. Its output map begins as zero, so it begins as nothing."""

    def __init__(self, dim: int, read_dim: int, heads: int, parts: int):
        super().__init__()
        self.heads, self.parts = heads, parts
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, read_dim, bias=False)
        self.to_kv = nn.Linear(dim // parts, 2 * read_dim, bias=False)
        self.to_out = ZeroLinear(read_dim, dim, bias=False)

    def context(self, slots: Tensor) -> KeysValues:
        """The keys and values of the slots, or of their parts, each (batch, heads, slots * parts, read_dim / heads)."""
        keys, values = self.to_kv(in_parts(slots.to(self.to_kv.weight.device), self.parts)).chunk(2, -1)
        return split_heads(keys, self.heads), split_heads(values, self.heads)

    def forward(self, x: Tensor, context: KeysValues) -> Tensor:
        """What the tokens find, (batch, tokens, dim)."""
        return self.to_out(merge_heads(attend(split_heads(self.to_q(self.norm(x)), self.heads), *context)))


class Readers(nn.Module):
    """A :class:`Reader` beside each layer: ``layer(x)`` becomes ``layer(x) + reader(x)`` while slots are being read.

    They are attached by hooks, so a layer keeps its place, its name and its kind.
    """

    def __init__(self, layers: Sequence[nn.Module], dim: int, read_dim: int, heads: int, parts: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.each = nn.ModuleList(Reader(dim, read_dim, heads, parts) for _ in layers)
        self.open: list[KeysValues] | None = None
        for number, layer in enumerate(layers):
            layer.register_forward_hook(functools.partial(self._beside, number), with_kwargs=True)

    def contexts(self, slots: Tensor) -> list[KeysValues]:
        """The slots' keys and values for each layer, computed once for all tokens that read them."""
        slots = self.norm(slots.to(self.norm.weight))
        return [reader.context(slots) for reader in self.each]  # type: ignore[operator]

    @contextmanager
    def reading(self, contexts: list[KeysValues] | None) -> Iterator[None]:
        """The layers that run inside read those."""
        before, self.open = self.open, contexts
        try:
            yield
        finally:
            self.open = before

    def checkpointing(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A function for activation checkpointing whose second run of a layer reads what the first one read."""
        return functools.partial(_checkpointed, self, checkpoint)

    def _beside(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.open is None:
            return None  # the base by itself
        x = args[0] if args else kwargs["hidden_states"]
        found = self.each[number](x, self.open[number])
        return (output[0] + found, *output[1:]) if isinstance(output, tuple) else output + found


def _checkpointed(readers: Readers, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(functools.partial(_with, readers, readers.open, function), *args)


def _with(readers: Readers, contexts: list[KeysValues] | None, function: Callable[..., Any], *args: Any) -> Any:
    with readers.reading(contexts):
        return function(*args)


def writer_of(config: MemoryConfig) -> SlotWriter:
    """A new writer of these settings; in single precision where half is the default, for it adds up over segments."""
    writer = new_writer(
        config.memory_writer,
        config.hidden_size,
        config.slots,
        config.write_heads,
        config.write_temperature,
        config.forgetting,
        config.segment_length,
    )
    return writer.float() if torch.get_default_dtype() in HALF else writer
