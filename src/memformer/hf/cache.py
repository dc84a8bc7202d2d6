"""What a model carries from call to call while transformers' ``generate`` writes: of fixed size, whatever was read.

Shapes: slots (batch, slots, dim), the pending segment's hidden states (batch, columns, dim). A lane's pending tokens
are the last of the columns; lanes may stand at different places of their segments.
"""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..checks import describe, is_tensor
from ..nn.attention import KeysValues
from .bases import CACHE

__all__ = [
    "Carried",
    "CarriedGenerationMixin",
    "MemoryCache",
    "MemoryOutput",
    "PretrainedMemory",
    "check_memory",
    "check_no_embeds",
]


class Carried(Cache):
    """A cache whose lanes can be selected, and that was never given the tokens that it has read."""

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__(layers=DynamicCache().layers)

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """How many lanes there are."""

    @abstractmethod
    def copy(self) -> Self:
        """Another one; what is done to it leaves this one as it is."""

    @abstractmethod
    def select(self, lanes: Tensor) -> None:
        """Go on with those lanes alone, in that order; a lane may come more than once. In place."""

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """0: of the tokens that are given, none was read before."""
        return 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams that live on: lane i continues lane ``beam_idx[i]``."""
        self.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each lane as many times."""
        self.select(torch.arange(self.batch_size).repeat_interleave(repeats))


class CarriedGenerationMixin(GenerationMixin):
    """``generate`` of transformers for a model with a :class:`Carried` cache, which its first call makes.

    Such a model says ``_is_stateful = True`` itself: its ``PreTrainedModel``, which comes first, has the word, too.
    """

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, *args: Any) -> Any:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "cache_implementation: expected none, because this model makes its own cache, of one size whatever is "
                f"read; got {generation_config.cache_implementation!r}"
            )
        return super()._prepare_cache_for_generation(generation_config, *args)

    def _prepare_model_inputs(self, inputs: Any = None, bos_token_id: Any = None, model_kwargs: Any = None) -> Any:
        given = model_kwargs or {}
        check_no_embeds(given.get("inputs_embeds"))
        if given.get("position_ids") is not None:
            raise ValueError(
                "position_ids: expected none, because this model counts the places of a segment itself, from its "
                f"attention_mask; leave them out, got {describe(given['position_ids'])}"
            )
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The tokens that were not read yet."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        known = inspect.signature(self.forward).parameters  # type: ignore[attr-defined]
        return {name: value for name, value in inputs.items() if name in known}

    def _expand_inputs_for_generation(self, expand_size: int = 1, **given: Any) -> tuple[Tensor, dict[str, Any]]:
        input_ids, given = super()._expand_inputs_for_generation(expand_size=expand_size, **given)
        if isinstance(given.get(CACHE), Carried):  # the caller's stays as it is
            given[CACHE] = given[CACHE].copy()
            if expand_size > 1:
                given[CACHE].batch_repeat_interleave(expand_size)
        return input_ids, given


class PretrainedMemory(NamedTuple):
    """What is carried from segment to segment, of one size whatever was read.

    Attributes:
        slots: (batch, slots, dim).
        last: (batch, dim), the hidden state of the last token that was read, from which the next segment's first token
            is predicted; zero where a document has just begun.
    """

    slots: Tensor
    last: Tensor


@dataclass
class MemoryOutput(CausalLMOutputWithPast):
    """What a :class:`MemoryForCausalLM` returns.

    Attributes:
        memory: after all tokens, for the next call; None with ``use_cache``, where the cache has it.
    """

    memory: PretrainedMemory | None = None


class MemoryCache(Carried):
    """The memory, and the pending segment's keys, values and hidden states. A call returns a new one.

    Give it to the next call, or to ``generate``, with new tokens alone: what was read before is not given again.

    Attributes:
        slots: (batch, slots, dim), after each lane's last whole segment.
        last: (batch, dim), the last hidden state of each lane; zero in those that have read nothing.
        contexts: the slots' keys and values for each layer.
        hidden: (batch, columns, dim), of the pending tokens.
        filled: for each lane, how many tokens are pending.
    """

    def __init__(self, slots: Tensor, last: Tensor, contexts: list[KeysValues]):
        super().__init__()
        self.slots, self.last, self.contexts = slots, last, contexts
        self.hidden = last[:, None][:, :0]
        self.filled = [0] * len(last)

    @property
    def batch_size(self) -> int:
        """How many lanes there are."""
        return len(self.filled)

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes; bounded by the length of a segment."""
        parts = [self.slots, self.last, self.hidden, *(x for pair in self.contexts for x in pair)]
        return sum(x.nbytes for x in parts) + sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def copy(self) -> MemoryCache:
        """Another one, of which any part may be replaced."""
        other = copy.copy(self)
        other.layers, other.filled = [copy.copy(layer) for layer in self.layers], list(self.filled)
        return other

    def pending(self) -> DynamicCache:
        """The base's own cache of the pending tokens; it extends this one's layers."""
        cache = DynamicCache()
        cache.layers = self.layers
        return cache

    def visible(self) -> Tensor | None:
        """(batch, columns), True where a lane's pending tokens stand; None: everywhere."""
        columns = self.hidden.shape[1]
        if all(count == columns for count in self.filled):
            return None
        place = torch.arange(columns, device=self.hidden.device)
        return place >= columns - torch.tensor(self.filled, device=place.device)[:, None]

    def align(self, places: list[list[int]]) -> None:
        """Keep those columns of each lane, and put them last. In place."""
        columns = max(map(len, places))
        self.filled = [len(lane) for lane in places]
        before = self.hidden.shape[1]
        if columns == before and all(lane == list(range(before)) for lane in places):
            return
        if not columns:
            self.layers = DynamicCache().layers
            self.hidden = self.hidden[:, :0]
            return
        index = torch.tensor([[0] * (columns - len(lane)) + lane for lane in places], device=self.hidden.device)
        self._columns(lambda x: x.gather(-2, _like(index, x)))

    def select(self, lanes: Tensor) -> None:
        """Go on with those lanes alone, in that order; a lane may come more than once. In place."""
        lanes = lanes.to(self.last.device)
        self.slots, self.last = self.slots[lanes], self.last[lanes]
        self.contexts = tree_map(lambda x: x[lanes.to(x.device)], self.contexts)
        self._columns(lambda x: x[lanes.to(x.device)])
        self.filled = [self.filled[lane] for lane in lanes.tolist()]

    def _columns(self, change: Callable[[Tensor], Tensor]) -> None:
        self.hidden = change(self.hidden)
        for layer in self.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)


def _like(index: Tensor, x: Tensor) -> Tensor:
    """(batch, columns), to gather columns of (batch, ..., columns, width)."""
    index = index.to(x.device).view(len(index), *[1] * (x.dim() - 3), index.shape[1], 1)
    return index.expand(*x.shape[:-2], index.shape[-2], x.shape[-1])


def check_memory(memory: object, *likes: tuple[tuple[int, ...], torch.dtype]) -> None:
    """Refuse with a ValueError what is not a :class:`PretrainedMemory` with parts of these shapes and dtypes."""
    parts = memory if isinstance(memory, PretrainedMemory) else (None, None)
    for part, (shape, dtype) in zip(parts, likes, strict=True):
        if not is_tensor(part, shape, dtype):
            got = describe(memory) if part is None else describe(part)
            raise ValueError(
                f"memory: expected that of this model and this batch, a PretrainedMemory with {dtype} of shape "
                f"{shape}, got {got}"
            )


def check_no_embeds(inputs_embeds: object) -> None:
    """Refuse them with a ValueError; PEFT gives None."""
    if inputs_embeds is not None:
        raise ValueError(
            f"inputs_embeds: expected none, for a memory is of tokens: give input_ids, got {describe(inputs_embeds)}"
        )
