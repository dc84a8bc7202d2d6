"""All layers of a causal stack at once, each at work on another segment (a wavefront; compare arXiv 2506.05229).

Where each layer has slots of its own, layer l at segment t needs only layer l - 1 at segment t and its own slots after
segment t - 1. So the layers of a diagonal, t + l = s, run as one step with stacked weights: T + N - 1 steps for T
segments and N layers, each of one product where one after the other would be N. The values are the same.

To the replay engine a diagonal is a segment, and the memory is :class:`Flight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import IGNORED
from .config import CausalConfig
from .data.segments import Segment
from .interface import Memory, SegmentModel
from .nn.causal import (
    CausalLayer,
    CausalMemory,
    MemoryInEachLayer,
    OneMemory,
    as_they_stood,
    predicting,
    tokens_first,
)
from .nn.memory import begun
from .nn.stacked import OWN, call, difference, has_hook, part, stack, twin
from .pretrained import divided

__all__ = ["Diagonal", "Flight", "Wavefront", "pays", "read_segments"]


class _Layered(Protocol):
    """What is asked of a model: a :class:`~memformer.CausalMemformer` has it."""

    config: CausalConfig
    embedding: nn.Embedding

    def get_initial_mem(self, batch_size: int) -> CausalMemory: ...

    def embed(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor: ...

    def visible(self, mask: Tensor) -> Tensor: ...


class Diagonal(NamedTuple):
    """One step of all layers.

    Attributes:
        entering: the segment that comes to the first layer; None when there are no more.
        leaving: the one that comes out of the last layer; None before the first does.
        layers: (2,) on the CPU, the first and the last layer that have a segment.
    """

    entering: Segment | None
    leaving: Segment | None
    layers: Tensor


class Flight(NamedTuple):
    """What a wavefront carries from step to step.

    Attributes:
        slots: (layers, batch, slots, dim).
        last: (layers, batch, overlap, dim), what each layer got of the last tokens that it has seen.
        output: (batch, dim), of the last token that came out of the last layer.
        x: (segments, batch, tokens, dim), on their way to the next layer, the newest first; None for none.
        kept: (segments, batch, tokens), which of their tokens exist, which come first; None for all.
        reset: (segments, batch), which lanes begin with the initial memory; None for none.
    """

    slots: Tensor
    last: Tensor
    output: Tensor
    x: Tensor | None = None
    kept: Tensor | None = None
    reset: Tensor | None = None


class Wavefront:
    """A causal model's layers with their weights stacked, for one rollout.

    Args:
        model: a :class:`~memformer.CausalMemformer` with a memory in each layer.

    Attributes:
        parameters: the stacked weights and what else was made of the model's parameters, for the engine's ``params=``.

    Raises:
        ValueError: another model; it has one memory for all layers, which wait for each other; FSDP divides it; or its
            layers differ in more than the numbers in their parameters, or have a hook or a part of another library.
    """

    def __init__(self, model: SegmentModel, batch_size: int):
        stacked = getattr(model, "stack", None)
        if not isinstance(stacked, MemoryInEachLayer | OneMemory):
            raise ValueError(f"wavefront: expected a CausalMemformer, got {type(model).__name__}")
        if isinstance(stacked, OneMemory):
            raise ValueError("wavefront: layers that share a memory wait for each other; expected memory='layers'")
        if divided(model):
            raise ValueError(
                "wavefront: FSDP divides this model, whose layers are gathered one after the other; leave it out"
            )
        layers = list(stacked.layers)
        if (why := _changed(model, stacked) or difference(layers)) is not None:
            raise ValueError(f"wavefront: one layer stands for all of them, and {why}; leave it out")
        assert isinstance(layers[0], CausalLayer)
        self.model, self.depth = cast(_Layered, model), len(layers)
        self._twin, self._stacked = twin(layers[0]), stack(layers)
        self._initial = self.model.get_initial_mem(batch_size)
        self.parameters = [*self._stacked.values(), *self._initial, *self.model.embedding.parameters()]

    def diagonals(self, segments: Sequence[Segment]) -> list[Diagonal]:
        """The steps that take segments through all layers, padded to one length."""
        return list(self._diagonals(_alike(segments)))

    def _diagonals(self, segments: Sequence[Segment]) -> Iterator[Diagonal]:
        count, depth = len(segments), self.depth
        for step in range(count + depth - 1):
            first, last = max(0, step - count + 1), min(depth - 1, step)
            yield Diagonal(
                segments[step] if step < count else None,
                segments[step - depth + 1] if step >= depth - 1 else None,
                torch.tensor(
                    [first, last], device="cpu"
                ),  # numbers for Python, also where another device is the default
            )

    def start(self, mems: CausalMemory | None) -> Flight:
        """Before the first step: nothing is on its way."""
        slots, last, output = self._initial if mems is None else mems
        return Flight(slots.transpose(0, 1), last.transpose(0, 1), output)

    def end(self, flight: Flight) -> CausalMemory:
        """The memory after the last step."""
        return CausalMemory(flight.slots.transpose(0, 1), flight.last.transpose(0, 1), flight.output)

    def __call__(self, diagonal: Diagonal, flight: Flight) -> tuple[Tensor | None, Flight]:
        """One step: ``(hidden, flight)``, of the segment that leaves as the model's cell gives it."""
        model, (first, final) = self.model, diagonal.layers.tolist()
        slots, last, output, x, kept, reset = flight
        if diagonal.entering is not None:
            ids, mask, begins, _, _ = diagonal.entering
            ids, mask = (ids, None) if mask is None else tokens_first(ids, mask)
            x, kept, reset = _before(model.embed(ids, mask), x), _before(mask, kept), _before(begins, reset)
        assert x is not None
        every = (first, final) == (0, self.depth - 1)
        active = [whole if every else whole[first : final + 1] for whole in (slots, last)]
        if reset is not None:
            initial = (of_all.transpose(0, 1)[first : final + 1] for of_all in self._initial[:2])
            active = [torch.where(reset[..., None, None], *both) for both in zip(initial, active, strict=True)]
        visible = None if kept is None else model.visible(kept)
        weights = self._stacked if every else part(self._stacked, first, final)
        x, after = call(self._twin, weights, x, active, visible, kept)
        if not every:
            whole = zip((slots, last), after, strict=True)
            after = [torch.cat([old[:first], new, old[final + 1 :]]) for old, new in whole]
        slots, last = after
        hidden = None
        if diagonal.leaving is not None:
            output = begun(output, self._initial.output, None if reset is None else reset[-1])
            hidden, output = predicting(output, x[-1], None if kept is None else kept[-1])
            if diagonal.leaving.src_mask is not None:
                hidden = as_they_stood(hidden, diagonal.leaving.src_mask)
            x, kept, reset = (None if p is None or len(p) == 1 else p[:-1] for p in (x, kept, reset))
        return hidden, Flight(slots, last, output, x, kept, reset)


def pays(model: SegmentModel, segments: int) -> bool:
    """Whether a wavefront over so many segments is expected to be the faster way.

    It saves calls where there are several layers and several segments; docs/causal.md has the measurements, in which it
    was never slower from three layers on. Where FSDP divides a model it never does: its stacked weights would be the
    whole model, gathered in each process. A compiled stack is faster one layer after the other: each number of layers
    that work at once would be compiled anew. And layers of which one cannot stand for all run one by one.
    """
    stacked = getattr(model, "stack", None)
    if not isinstance(stacked, MemoryInEachLayer) or stacked._compiled_call_impl is not None:
        return False
    if len(stacked.layers) < 3 or segments < 3 or divided(model):
        return False
    return (_changed(model, stacked) or difference(list(stacked.layers))) is None


def _changed(model: SegmentModel, stacked: nn.Module) -> str | None:
    """What of a model's ways around its layers, which are not gone here, is not this library's; None where all is."""
    if type(stacked) is not MemoryInEachLayer or has_hook(stacked):
        return "'stack' has a hook, or a forward of its own"
    for name in ("cell", "step"):
        if name in vars(model) or not getattr(type(model), name).__module__.startswith(OWN):
            return f"the model has a {name} of its own"
    return None


def read_segments(
    model: SegmentModel, segments: Sequence[Segment], mems: Memory | None, each: Callable[[Tensor], object]
) -> Memory:
    """The memory after segments that were checked already, read the fastest way, without gradients or with plain ones.

    Args:
        mems: the memory before the first; None for the learned initial memory.
        each: called with what the model's cell makes of each segment, in their order.
    """
    if not pays(model, len(segments)):
        for segment in segments:
            output, mems = model.cell(segment, mems)
            each(output)
        return mems
    front = Wavefront(model, len(segments[0].src))
    flight, longest, lengths = front.start(mems), max(s.src.shape[1] for s in segments), iter(segments)
    for diagonal in front.diagonals(segments):
        hidden, flight = front(diagonal, flight)
        if hidden is not None:
            each(hidden[:, : hidden.shape[1] - longest + next(lengths).src.shape[1]])
    return front.end(flight)


def _before(new: Tensor | None, others: Tensor | None) -> Tensor | None:
    """The newest segment before those that are on their way."""
    if new is None:
        return None
    return new[None] if others is None else torch.cat([new[None], others])


def _alike(segments: Sequence[Segment]) -> list[Segment]:
    """Segments of one length, all with a mask or none, all with resets or none."""
    longest = max(s.src.shape[1] for s in segments)
    masked = any(s.src_mask is not None or s.src.shape[1] < longest for s in segments)
    resets = any(s.reset is not None for s in segments)
    made = []
    for segment in segments:
        src, mask, reset, tgt, _ = segment
        missing = longest - src.shape[1]
        if masked:
            mask = F.pad(torch.ones_like(src, dtype=torch.bool) if mask is None else mask, (0, missing))
        if resets and reset is None:
            reset = torch.zeros_like(src[:, 0], dtype=torch.bool)
        tgt = None if tgt is None else F.pad(tgt, (0, missing), value=IGNORED)
        made.append(Segment(F.pad(src, (0, missing)), mask, reset, tgt))
    return made
