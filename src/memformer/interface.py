"""What training, evaluation and generation ask of a model: every model of this library is a :class:`SegmentModel`.

A model reads a stream segment by segment and carries a memory of fixed size: a tensor, or a named tuple of them. What
is *not* known here: how a model computes, and the replay engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .checks import IGNORED
from .data.segments import Segment, Targets, padded
from .nn.attention import KeysValues
from .nn.memory import SlotWriter
from .pretrained import Pretrained, unwrapped
from .state import MemoryState

__all__ = [
    "Axes",
    "Divisor",
    "LanguageModel",
    "Memory",
    "SegmentModel",
    "Step",
    "TokenLosses",
    "as_pairs",
    "as_tensor",
    "in_evaluation",
    "segment_model",
]

Memory = Any
"""A tensor, or a named tuple of tensors, batch first: what :meth:`SegmentModel.get_initial_mem` returns."""


Divisor = Callable[[Tensor], "Tensor | float"]
"""Given which predictions count, (segments * batch, predictions), what each loss is divided by in their sum."""

Axes = dict[int, str]
"""The free axes of a tensor, by name: "batch", "length" (of a segment), or one more than it, "length + 1"."""


class Step(NamedTuple):
    """What a model does at once with tensors alone, so that it can be written as a file.

    What is carried from call to call goes in as ``x`` and comes out as ``x_after``.

    Attributes:
        module: its positional arguments are the inputs, its tuple the outputs.
        inputs: an example of each in order, with two lanes and up to two tokens, and its free axes; by name.
        outputs: the free axes of each in order, by name.
    """

    module: nn.Module
    inputs: dict[str, tuple[Tensor, Axes]]
    outputs: dict[str, Axes]


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each part is in the mode in which it was."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def as_tensor(pairs: Sequence[KeysValues]) -> Tensor:
    """Keys and values of each layer, (batch, heads, keys, head_dim), as (layers, 2, batch, heads, keys, head_dim)."""
    return torch.stack([torch.stack(pair) for pair in pairs])


def as_pairs(stacked: Tensor) -> list[KeysValues]:
    """What :func:`as_tensor` was given."""
    return [(pair[0], pair[1]) for pair in stacked]


class TokenLosses(NamedTuple):
    """The losses of some segments' predictions, segment after segment, lane after lane.

    Attributes:
        targets: (segments * batch, any number), as the model takes them.
        losses: (segments * batch, predictions), in nats, zero where it does not count.
        counted: (segments * batch, predictions), whether it counts.
        total: the sum of the losses, each divided by its divisor, a scalar; None without divisors.
    """

    targets: Tensor
    losses: Tensor
    counted: Tensor
    total: Tensor | None


class SegmentModel(Pretrained):
    """A model with a memory. Its ``config`` has ``segment_length``, ``vocabulary`` and ``vocabularies``.

    Attributes:
        reads_its_targets: whether what it reads is what it predicts, so that no target has to be given.
        steps_alike: whether :meth:`next_logits` does the same for each token, with tensors that stay where they are, so
            that it can be captured as a CUDA graph.
    """

    reads_its_targets: ClassVar[bool]
    steps_alike: ClassVar[bool] = False

    def resize_memory(self, num_memory_slots: int, *, generator: torch.Generator | None = None) -> None:
        """Give the memory, or each of several, another number of slots, in place.

        The first slots are kept, with what they have learned; if there are to be more, new ones are added as at
        construction, drawn from ``generator``; if there are to be fewer, the last ones are dropped. Slots never see
        each other when they are written, so a kept slot begins as before and, from the same layer's output, is written
        as before. A layer reads all slots at once, so its output changes with the new slots, or without the dropped
        ones. To grow and then to shrink again gives back the same model, bit by bit.

        A memory that was carried so far needs ``resize_mems``. Build optimizers, and wrap the model for
        distributed training, after this call: the parameter of the slots is a new one.

        >>> mems = model.get_initial_mem(2)
        >>> model.resize_memory(6)
        >>> model.resize_mems(mems).shape, model.config.num_memory_slots
        (torch.Size([2, 6, 32]), 6)

        Raises:
            ValueError: ``num_memory_slots`` is not a whole number of at least 1.
        """
        config = dataclasses.replace(self.config, num_memory_slots=num_memory_slots)
        if config != self.config:
            for writer in self.writers():
                writer.resize(num_memory_slots, generator)
            self.config = config

    def set_writer(self, *, write_temperature: float | None = None, forgetting: float | None = None) -> None:
        """Change how the memory, or each of several, is written, in place: for texts much longer than in training.

        What a slot keeps leaks: a thousandth of its attention on other tokens replaces all of it within some thousand
        segments, and a bias vector of 0.001 pulls it back as soon. Training on dozens of segments does not teach
        against that; a lower temperature and no forgetting prevent it (docs/decisions/0024). Steps that were captured,
        compiled or exported before go on to write as they did, and states that were saved are another model's.

        >>> model.set_writer(write_temperature=0.075, forgetting=0.0)
        >>> model.config.write_temperature, model.config.forgetting
        (0.075, 0.0)

        Args:
            write_temperature, forgetting: as in the model's configuration; None leaves it as it is.

        Raises:
            ValueError: out of range, or the writer has no bias vector.
        """
        given = {"write_temperature": write_temperature, "forgetting": forgetting}
        self.config = self._config_with({name: value for name, value in given.items() if value is not None})
        for writer in self.writers():
            writer.write_with(self.config.write_temperature, self.config.forgetting)

    def _config_with(self, changes: Mapping[str, Any]) -> Any:
        """The model's configuration with some settings changed. Raises ValueError where it would not be one."""
        return dataclasses.replace(self.config, **changes)

    @abstractmethod
    def resize_mems(self, mems: Memory) -> Memory:
        """A memory carried from before :meth:`resize_memory`, for the model as it is now."""

    # --- What a rollout asks for ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many layers there are between a segment and its losses: a graph grows with them."""

    @abstractmethod
    def get_initial_mem(self, batch_size: int) -> Memory:
        """The learned memory before a document."""

    @abstractmethod
    def forget(self, memory: Memory) -> Memory:
        """The initial slots in place of those of a memory, and whatever else it holds."""

    @abstractmethod
    def cell(self, segment: Segment, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Read a segment and write the memory, the critical path: what the losses need, and the memory after it."""

    @abstractmethod
    def target(self, segment: Segment) -> Tensor | None:
        """What is predicted in a segment, (batch, any number); None where there is nothing."""

    @abstractmethod
    def counted(self, segment: Segment) -> Tensor:
        """Which of the predictions in a segment with a target count, (batch, predictions)."""

    @abstractmethod
    def token_losses(
        self, outputs: Sequence[Tensor], segments: Sequence[Segment], divisor: Divisor | None = None
    ) -> TokenLosses:
        """The losses of segments with targets, which need not be of one length, given what :meth:`cell` made of them.

        The readout, off the critical path; one call for all of them. With a ``divisor`` there is a total, whose
        gradient takes less time and memory than one by the losses.
        """

    @abstractmethod
    def segments(
        self,
        src: Any,
        tgt: Targets,
        src_mask: Any,
        tgt_mask: Targets,
        reset: Targets,
        mems: Memory | None,
    ) -> list[Segment]:
        """What a caller gives for a sequence of any length, checked and cut.

        Raises:
            ValueError: something does not fit; the message says what was expected.
        """

    @abstractmethod
    def silent(self, segment: Segment) -> Segment:
        """A segment of which nothing is predicted, or nothing that counts."""

    @abstractmethod
    def of_stream(self, segment: Segment) -> Segment:
        """A segment of :class:`~memformer.data.Lanes`, with continuation as its target, as this model reads it."""

    @abstractmethod
    def compile_parts(self) -> None:
        """Compile, in place, the parts in which a rollout spends its time; see :meth:`torch.nn.Module.compile`."""

    # --- What is looked at ------------------------------------------------------------------------------------------

    @abstractmethod
    def writers(self) -> list[SlotWriter]:
        """One for each memory, in the order of :meth:`slots_of`."""

    @abstractmethod
    def slots_of(self, memory: Memory) -> Tensor:
        """The slots of a memory, (batch, memories, slots, dim)."""

    # --- What generation asks for -----------------------------------------------------------------------------------

    @abstractmethod
    def check_writes(self, purpose: str) -> None:
        """Raise ValueError, which names the purpose, where the model cannot write text."""

    @abstractmethod
    def new_state(self, batch_size: int, start: int) -> MemoryState:
        """Lanes that have read nothing."""

    @abstractmethod
    def packed(self, memory: Memory) -> Tensor:
        """A memory as a state has it: one tensor, batch first."""

    @abstractmethod
    def resumed(self, state: MemoryState) -> tuple[list[Segment], Memory | None]:
        """What is to be read first in going on from a state, each lane's last whole segment; and the memory before it.

        A lane that has none yet gets what begins a document. At most one segment; none where there is nothing to read.
        """

    @abstractmethod
    def open(self, state: MemoryState) -> Any:
        """All that is needed to go on from a state, computed once for the rest of the pending segments.

        A tree of tensors, batch first; its ``memory`` are the slots after each lane's last whole segment, as a state
        holds them.
        """

    @abstractmethod
    def next_logits(self, state: MemoryState, opened: Any) -> Tensor:
        """Logits of each lane's next token, (batch, vocabulary). What was opened takes in each lane's last token."""

    # --- What an export asks for ------------------------------------------------------------------------------------

    @abstractmethod
    def steps(self) -> dict[str, Step]:
        """``encode``, which reads a segment and writes the memory, and, where text can be written, ``decode``, which
        takes one token per lane and gives the logits of the next.
        """


def segment_model(model: nn.Module) -> SegmentModel:
    """A model out of its wrappers. Raises ValueError where it is none of this library."""
    inner = unwrapped(model)
    if not isinstance(inner, SegmentModel):
        raise ValueError(f"model: expected a Memformer or a CausalMemformer, got {type(inner).__name__}")
    return inner


class LanguageModel(SegmentModel):
    """A model that predicts what it reads: its targets are labels, of the shape of their segment."""

    reads_its_targets = True

    def target(self, segment: Segment) -> Tensor:
        """The labels; where there are none, the tokens themselves."""
        return segment.src if segment.tgt is None else segment.tgt

    def silent(self, segment: Segment) -> Segment:
        """The segment with labels that do not count."""
        return segment._replace(tgt=torch.full_like(segment.src, IGNORED))

    def joined_labels(self, segments: Sequence[Segment], length: int) -> tuple[Tensor, Tensor]:
        """The labels of segments of any length, and which of them count: both (segments * batch, length)."""
        labels = torch.cat([padded(self.target(segment), length, IGNORED) for segment in segments])
        return labels, torch.cat([padded(self.counted(segment), length, False) for segment in segments])

    def of_stream(self, segment: Segment) -> Segment:
        """The tokens that a decoder would write of the segment: each of a document comes once."""
        assert segment.tgt is not None
        mask = None if segment.tgt_mask is None else segment.tgt_mask[:, 1:]
        return Segment(segment.tgt[:, 1:], mask, segment.reset)

    def check_writes(self, purpose: str) -> None:
        """Every such model writes text."""

    @staticmethod
    def refuse_mask_of_labels(tgt_mask: object) -> None:
        """Raise ValueError where labels come with a mask."""
        if tgt_mask is not None:
            raise ValueError("tgt_mask: labels have the mask of their tokens, src_mask; one of -100 does not count")
