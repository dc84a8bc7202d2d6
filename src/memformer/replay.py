"""Memory replay back-propagation (MRBP) for any recurrent cell: exact gradients, at the memory that you choose.

A *cell* maps ``(segment, memory)`` to ``(value, memory)``. Three functions run it over a rollout and agree in every
number:

- :func:`full_bptt` is plain autograd: the reference, whose graph grows with the number of segments;
- :func:`memory_replay` records memories without a graph, then replays segment by segment (paper, Algorithm 1);
- :func:`scan` does the same for outputs that are used further downstream.

:func:`accumulate` is memory replay that adds to ``.grad`` on the spot, for parameters that FSDP shards.
Memories, segments and values are pytrees of tensors (tuples, lists, dicts, ``None``). This file needs torch alone, and
works by itself.

How it works. One ``torch.autograd.Function`` has the parameters, the initial memory and the segments as inputs, so that
each gradient leaves it once: an optimiser, a gradient scaler, clipping and DistributedDataParallel see an ordinary
loss. A schedule's plan lists the actions of its forward and of its backward (:class:`_Rollout` carries them out): by
default forward stores the memory before each segment, and only the last segment is run with a graph, and not twice;
backward walks from the last segment to the first and frees each graph before it builds the next.

What is not known here: whether replaying a cell gives the same numbers as recording it. Random numbers of torch's own
generators and autocast are put back; a cell that keeps other state of its own (a Python counter, BatchNorm's running
statistics, a private ``torch.Generator``) is outside what can be replayed. ``check=True`` finds it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = [
    "Action",
    "Binomial",
    "Budget",
    "EveryKth",
    "EveryMemory",
    "MemoryGradients",
    "Offload",
    "Plan",
    "Rollout",
    "Schedule",
    "Sizes",
    "accumulate",
    "burn_in",
    "check_equal_across_ranks",
    "detach",
    "full_bptt",
    "measure",
    "memory_replay",
    "reset",
    "scan",
]

Tree = Any
"""A pytree: a tensor, or tuples, lists and dicts of them; ``None`` and plain numbers are allowed as leaves."""

Cell = Callable[[Tree, Tree], tuple[Tree, Tree]]
Readout = Callable[[list[Tree], list[Tree]], "Tensor | None"]
Params = Iterable["Tensor | nn.Module"]
"""Tensors and modules that are to be trained; a single one may be given as it is."""

Grads = list["Tensor | None"]
Weights = Sequence[float] | Tensor


@dataclass(frozen=True)
class Rollout:
    """The outcome of a run over several segments.

    Attributes:
        loss: differentiable scalar, the sum of the segments' (or the readout's) losses.
        memory: the memory after the last segment. It stays differentiable, so a loss on it is exact; :func:`detach` it
            before it starts the next rollout (truncated back-propagation through time).
    """

    loss: Tensor
    memory: Tree


# --- The functions ----------------------------------------------------------------------------------------------------


def full_bptt(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    readout: Readout | None = None,
    *,
    readout_segments: int = 1,
    segment_weights: Weights | None = None,
    memory_gradients: MemoryGradients | None = None,
    params: Params = (),
) -> Rollout:
    """Back-propagation through time by plain autograd: the reference that :func:`memory_replay` equals.

    Arguments, result and errors are those of :func:`memory_replay`; ``params`` is accepted and not needed.
    """
    segments = _segment_list(segments)
    weights = weight_list(segment_weights, len(segments))
    if memory_gradients is not None:
        memory_gradients.start(len(segments))
    values = []
    for t, segment in enumerate(segments):
        memory = _watched(memory_gradients, t, memory)
        value, memory = _call(cell, segment, memory)
        values.append(value)
    memory = _watched(memory_gradients, len(segments), memory)
    if readout is None:
        return Rollout(_sum_of_losses(values, weights), memory)
    losses = [
        _call_readout(readout, values[part], segments[part], weights and weights[part])
        for part in _chunks(len(segments), readout_segments)
    ]
    return Rollout(_sum_of_losses(losses), memory)


def memory_replay(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    readout: Readout | None = None,
    *,
    readout_segments: int = 1,
    segment_weights: Weights | None = None,
    schedule: Schedule | None = None,
    memory_gradients: MemoryGradients | None = None,
    check: bool = False,
    params: Params = (),
) -> Rollout:
    """Run ``cell`` over ``segments`` with the gradients of BPTT and few graphs alive (paper, Algorithm 1, MRBP).

    Args:
        cell: ``cell(segment, memory) -> (value, memory)``. Without ``readout``, ``value`` is the segment's scalar loss
            or ``None``. An ``nn.Module``, a method bound to one, or a ``functools.partial`` of these; a plain function
            must name what it trains in ``params``.
        segments: one pytree per segment.
        memory: the memory before the first segment, a pytree; may be ``None`` if the cell then makes its own.
        readout: ``readout(values, segments) -> scalar loss or None`` over lists of equal length. What only the loss
            needs (a decoder) belongs here: it is off the critical path, so it runs once, and never while memories are
            recorded.
        readout_segments: how many segments one call of ``readout`` gets; the losses of the calls are added. More is
            faster on short segments, and the readout's graph grows with it.
        segment_weights: one factor per segment for its loss. A readout over several segments then returns one loss
            per segment, shape (segments of the call,).
        schedule: which memories and graphs to keep; more of them is faster. None for :class:`EveryMemory`;
            ``print(schedule.plan(len(segments)))`` says what one costs.
        memory_gradients: takes down the norm of the memory's gradient between segments, and clips it if asked.
        check: compare what the cell returns in replay with its recording, which is kept for it: for debugging.
        params: further tensors or modules that ``cell`` or ``readout`` use and that are to be trained.

    Raises:
        ValueError: no segments, no loss anywhere, a loss that is not a scalar, a tensor that needs a gradient and would
            get none (its name is given), a memory changed in place, a cell wrapped in DistributedDataParallel or FSDP.
        RuntimeError: in backward, if the rollout was already back-propagated, its tensors were changed since, gradients
            of gradients are asked for, or ``check`` finds a segment whose replay differs.
    """
    segments = _segment_list(segments)
    weights = weight_list(segment_weights, len(segments))
    values, memory = scan(
        cell, segments, memory, schedule=schedule, memory_gradients=memory_gradients, check=check, params=params
    )
    if readout is None:
        return Rollout(_sum_of_losses(values, weights), memory)
    run = _ReadoutRun(readout, values, segments, readout_segments, weights, _trained_tensors(readout, params))
    return Rollout(_ReadOut.apply(run, *run.inputs), memory)  # type: ignore[no-untyped-call]


def scan(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    *,
    schedule: Schedule | None = None,
    memory_gradients: MemoryGradients | None = None,
    check: bool = False,
    params: Params = (),
) -> tuple[list[Tree], Tree]:
    """Run ``cell`` over ``segments``; the outputs stay differentiable, by replay.

    Returns ``(values, memory)``: one value per segment and the final memory. Any loss on any of them has the gradients
    of plain autograd, and models may be put in series. The values are kept, their graphs are not.
    Arguments and errors are those of :func:`memory_replay`.
    """
    rollout = _Rollout(
        cell,
        _segment_list(segments),
        memory,
        schedule or EveryMemory(),
        memory_gradients,
        check,
        _trained_tensors(cell, params),
    )
    return rollout.outputs(_Replay.apply(rollout, *rollout.inputs))  # type: ignore[no-untyped-call]


def accumulate(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    readout: Readout | None = None,
    *,
    readout_segments: int = 1,
    segment_weights: Weights | None = None,
    schedule: Schedule | None = None,
    memory_gradients: MemoryGradients | None = None,
    check: bool = False,
    sync: Callable[[bool], None] = lambda last: None,
) -> Rollout:
    """Memory replay with its backward at once, which adds to ``.grad`` segment by segment: for FSDP2 (``fully_shard``).

    FSDP delivers gradients by hooks of its own when a graph is back-propagated, so they cannot leave through one
    autograd function. Give its switch: ``accumulate(..., sync=model.set_requires_gradient_sync)``. Nothing needs to be
    named in ``params``: whatever a graph reaches gets its gradient.

    Args:
        sync: called with False before a backward that others follow, with True before the last one of the readout and
            the last one of the cell.
        others: as for :func:`memory_replay`; memory and segments are inputs, and none of them may require a gradient.
            The loss is back-propagated as it is: a gradient scaler's factor goes into ``segment_weights``.

    Returns:
        The loss and the final memory, both detached.

    Raises:
        ValueError: as :func:`memory_replay`; also if an input requires a gradient, if ranks have different numbers of
            segments (each segment is a collective operation), or if the last call of the readout has no loss or no
            gradient reaches the first segment, where the gradients would be synchronised.
        RuntimeError: ``check`` finds a segment whose replay differs.
    """
    segments = _segment_list(segments)
    weights = weight_list(segment_weights, len(segments))
    check_equal_across_ranks(len(segments), "the number of segments")
    if any(_requires_grad(leaf) for leaf in tree_leaves((segments, memory))):
        raise ValueError("accumulate: memory and segments are inputs here and get no gradient: detach them")
    rollout = _Rollout(cell, segments, memory, schedule or EveryMemory(), memory_gradients, check, None, sync)
    values, memory = rollout.outputs(rollout.record())
    cut = [_Leaves(value).cut(_carries_grad) for value in values]
    losses: list[Tensor | None] = []
    parts = list(_chunks(len(segments), len(segments) if readout is None else readout_segments))
    for part in parts:
        inputs = [value for value, _ in cut[part]]
        if readout is None:
            loss: Tensor | None = _sum_of_losses(inputs, weights)
        else:
            loss = _call_readout(readout, inputs, segments[part], weights and weights[part])
            sync(part == parts[-1])
        if loss is not None and loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        elif readout is not None and part == parts[-1] and rollout.environment.grad_enabled:
            raise ValueError(
                "accumulate: the last call of the readout gave no loss that requires a gradient, so the readout's "
                "gradients were not synchronised. Leave segments without a loss to the beginning, or use a larger "
                "readout_segments"
            )
        losses.append(None if loss is None else loss.detach())
        del loss
    grads = [
        leaf.grad if (leaf := found.get(i)) is not None else None
        for (value, found) in cut
        for i in range(len(tree_leaves(value)))
    ]
    rollout.replay([*grads, *[None] * len(tree_leaves(memory))])
    return Rollout(_sum_of_losses(losses), memory)


# --- Between rollouts -------------------------------------------------------------------------------------------------


def detach(memory: Tree) -> Tree:
    """The same memory, cut from the graph: the boundary between two rollouts in truncated BPTT."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, memory)


def reset(memory: Tree, initial: Tree, lanes: Tensor) -> Tree:
    """The memory, with ``initial`` (same shapes) in those lanes of the batch, dimension 0, where ``lanes`` is True.

    Gradients go on to whichever of the two a lane takes: an initial memory that is learned is trained.
    """

    def choose(old: Any, new: Any) -> Any:
        if not isinstance(old, Tensor):
            return old
        if old.shape[:1] != lanes.shape or lanes.dtype != torch.bool:
            raise ValueError(
                f"lanes: expected a boolean tensor of shape {tuple(old.shape[:1])}, one entry per lane of the memory, "
                f"got {lanes.dtype} of shape {tuple(lanes.shape)}"
            )
        return torch.where(lanes.view(-1, *[1] * (old.dim() - 1)), new, old)

    return tree_map(choose, memory, initial)


def burn_in(cell: Cell, segments: Sequence[Tree], memory: Tree) -> Tree:
    """The memory after ``segments``, without gradients or losses: overlap with the rollout before.

    A carried memory was written by older parameters. To refresh it, keep the memory from some segments before the end
    of a rollout, and run these again: ``memory = burn_in(cell, last_segments, older_memory)``.
    """
    with torch.no_grad():
        for segment in segments:
            _, memory = _call(cell, segment, memory)
    return memory


class MemoryGradients:
    """How far credit reaches: the norm of the loss's gradient by the memory at each boundary between segments.

    Pass one as ``memory_gradients=`` and read :attr:`norms` after backward.

    Args:
        max_norm: clip the gradient to this norm at each boundary, on its way back; None leaves it exact.
    """

    def __init__(self, max_norm: float | None = None):
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm: expected a positive number or None, got {max_norm}")
        self.max_norm = max_norm
        self._norms: list[Tensor | None] = []

    @property
    def norms(self) -> list[float]:
        """``norms[t]`` is that of the memory before segment t (before clipping), the last one of the final memory."""
        return [0.0 if norm is None else float(norm) for norm in self._norms]

    def start(self, num_segments: int) -> None:
        """Forget the rollout before."""
        self._norms = [None] * (num_segments + 1)

    def passing(self, boundary: int, grads: Sequence[Tensor | None]) -> Grads:
        """Take down the norm of these gradients, one per leaf of the memory, and return what is to be passed on."""
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).float()
            for g in grads
            if g is not None
        ]
        if not norms:
            return list(grads)
        norm = self._norms[boundary] = torch.linalg.vector_norm(torch.stack(norms))
        if self.max_norm is None:
            return list(grads)
        factor = (self.max_norm / norm.clamp(min=1e-30)).clamp(max=1.0)
        return [None if g is None else g * factor.to(g.dtype) for g in grads]


def check_equal_across_ranks(number: int, what: str) -> None:
    """Raise ValueError on every rank unless all ranks of the default process group give the same number.

    Ranks whose rollouts differ in length are right under DistributedDataParallel. Where a segment is itself a
    collective operation (FSDP, synchronised normalisation) they would wait for each other for ever: check before.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    numbers: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(numbers, number)
    if len(set(numbers)) > 1:
        raise ValueError(f"{what} differs between ranks, which would wait for each other for ever: {numbers}")


class Sizes(NamedTuple):
    """Bytes of one memory and of one segment's graph: ``schedule.plan(num_segments, *sizes)``."""

    memory_bytes: int
    graph_bytes: int


def measure(cell: Cell, segment: Tree, memory: Tree, *, params: Params = ()) -> Sizes:
    """Run one segment and count: the memory that it returns, and what autograd keeps of it besides parameters."""
    storages: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()

    environment = _Environment([x for x in tree_leaves((segment, memory)) if isinstance(x, Tensor)])
    trained = _trained_tensors(cell, params)
    memory, _ = _Leaves(memory).cut(_carries_grad)
    with environment.random_numbers_kept(), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            value, after = _call(cell, segment, memory)
        for x in [*trained, *tree_leaves(segment)]:
            if isinstance(x, Tensor):
                storages.pop(x.untyped_storage().data_ptr(), None)
        memory_bytes = sum(x.numel() * x.element_size() for x in tree_leaves(after) if isinstance(x, Tensor))
        del value, after
    return Sizes(memory_bytes, sum(storages.values()))


# --- Schedules: which memories to keep, and which segments to run again -----------------------------------------------

# A schedule is a frozen value with one method, plan(num_segments) -> Plan: a list of simple actions, which the engine
# carries out, and which says beforehand what they cost. There is no tensor in this section. Every schedule is the same
# walk from the last segment to the first (_walk); they differ in which memories a sweep stores on its way.


class Action(NamedTuple):
    """One step of the engine, which stands before some segment with the memory that it has there.

    It can ``store`` that memory, ``load`` one that was stored (to stand there again) or ``drop`` it; ``advance``: run
    the segment without a graph; ``graph``: run it with a graph, and keep the graph; ``backward``: back-propagate
    through the graph of a segment, and free it.
    """

    kind: Literal["store", "load", "drop", "advance", "graph", "backward"]
    segment: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a schedule does for a number of segments, and what it costs. ``print(plan)`` says it in a line.

    Attributes:
        num_segments: segments of the rollout.
        recording: the actions of the forward pass; every segment is run once.
        replay: the actions of the backward pass.
        memory_bytes, graph_bytes: size of one memory and of one segment's graph, 0 if they were not given.
        store_on: where stored memories are kept: "device" (where they are), "cpu", or a folder.
    """

    num_segments: int
    recording: tuple[Action, ...]
    replay: tuple[Action, ...]
    memory_bytes: int = 0
    graph_bytes: int = 0
    store_on: str = "device"

    @functools.cached_property
    def evaluations(self) -> int:
        """How often the cell is run in both passes together, with or without a graph."""
        return sum(action.kind in ("advance", "graph") for action in self.recording + self.replay)

    @property
    def stored_memories(self) -> int:
        """The most memories that are stored at once."""
        return self._peak[0]

    @property
    def live_graphs(self) -> int:
        """The most segments whose graphs are alive at once."""
        return self._peak[1]

    @property
    def bytes(self) -> int:
        """The most bytes of stored memories (if they stay on the device) and graphs at once."""
        return self._peak[2]

    @functools.cached_property
    def _peak(self) -> tuple[int, int, int]:
        memories = graphs = 0
        peak = (0, 0, 0)
        on_device = self.memory_bytes if self.store_on == "device" else 0
        for action in self.recording + self.replay:
            memories += {"store": 1, "drop": -1}.get(action.kind, 0)
            graphs += {"graph": 1, "backward": -1}.get(action.kind, 0)
            now = (memories, graphs, memories * on_device + graphs * self.graph_bytes)
            peak = (max(peak[0], now[0]), max(peak[1], now[1]), max(peak[2], now[2]))
        return peak

    def __str__(self) -> str:
        where = {"device": "", "cpu": " on the CPU"}.get(self.store_on, f" in {self.store_on}")
        size = f", {self.bytes / 1e6:,.1f} MB" if self.memory_bytes or self.graph_bytes else ""
        return (
            f"{self.num_segments} segments: {self.evaluations} evaluations "
            f"({self.evaluations / self.num_segments:.2f} per segment), at most {self.stored_memories} stored memories"
            f"{where} and {self.live_graphs} live graphs{size}"
        )


class Schedule(Protocol):
    """What ``schedule=`` expects."""

    needs_sizes: bool
    """Whether the plan depends on the sizes; the engine then measures them on the first segment."""

    def plan(self, num_segments: int, memory_bytes: int = 0, graph_bytes: int = 0) -> Plan:
        """The actions for a rollout of ``num_segments``; sizes are those of one memory and of one segment's graph."""
        ...


@dataclass(frozen=True)
class EveryMemory:
    """Store the memory before every segment: the paper's Algorithm 1, and the fewest evaluations for one live graph.

    Args:
        graphs: how many of the last segments keep their graph from the forward pass, so that they are not run twice.
            With all of them (any number above the number of segments) nothing is run twice, as in plain BPTT; with 0
            no graph of the cell is alive beside the readout's.
    """

    graphs: int = 1
    needs_sizes = False

    def __post_init__(self) -> None:
        _at_least("graphs", self.graphs, 0)

    def plan(self, num_segments: int, memory_bytes: int = 0, graph_bytes: int = 0) -> Plan:
        return _walk(
            num_segments, self.graphs, lambda first, stop, _: range(first + 1, stop - 1), memory_bytes, graph_bytes
        )


@dataclass(frozen=True)
class EveryKth:
    """Store every k-th memory; a block of k is recomputed, and stored for a while, when it is its turn.

    About ``num_segments / k + k`` stored memories for one more evaluation per segment; fewest with k near the root of
    ``num_segments``. :class:`Binomial` is at least as good at every size; this one is simple to reason about.
    """

    k: int
    graphs: int = 1
    needs_sizes = False

    def __post_init__(self) -> None:
        _at_least("k", self.k)
        _at_least("graphs", self.graphs, 0)

    def plan(self, num_segments: int, memory_bytes: int = 0, graph_bytes: int = 0) -> Plan:
        def stores(first: int, stop: int, stored: int) -> range:
            recording = stored == 1 and stop > self.k
            return range(self.k, stop - 1, self.k) if recording else range(first + 1, stop - 1)

        return _walk(num_segments, self.graphs, stores, memory_bytes, graph_bytes)


@dataclass(frozen=True)
class Binomial:
    """At most ``memories`` stored memories, with the fewest evaluations that this allows.

    The optimal schedule of Griewank and Walther (Algorithm 799: revolve, ACM TOMS 26, 2000). With c memories and
    ``binomial(c + r, c)`` segments, none is run more than r times without a graph. The memory before the first segment
    counts, although the caller holds it anyway.
    """

    memories: int
    graphs: int = 1
    needs_sizes = False

    def __post_init__(self) -> None:
        _at_least("memories", self.memories)
        _at_least("graphs", self.graphs, 0)

    def plan(self, num_segments: int, memory_bytes: int = 0, graph_bytes: int = 0) -> Plan:
        def stores(first: int, stop: int, stored: int) -> Iterable[int]:
            remaining = stop - first
            for slots in range(self.memories - stored + 1, 1, -1):
                if remaining > 1:
                    remaining -= _first_stretch(remaining, slots)
                if remaining > 1:
                    yield stop - remaining

        return _walk(num_segments, self.graphs, stores, memory_bytes, graph_bytes)


@dataclass(frozen=True)
class Budget:
    """The fewest evaluations within a number of bytes, for stored memories and segments' graphs together.

    Keeps graphs where there is room for them, else every memory, else as many as fit. The sizes are measured on the
    first segment, at the price of one evaluation; the readout's graph, gradients and values come on top.
    """

    bytes: int
    needs_sizes = True

    def __post_init__(self) -> None:
        _at_least("bytes", self.bytes)

    def plan(self, num_segments: int, memory_bytes: int = 0, graph_bytes: int = 0) -> Plan:
        if memory_bytes + graph_bytes < 1:
            raise ValueError(
                "Budget: expected the sizes memory_bytes and graph_bytes, got 0. Ask replay.measure for them"
            )
        smallest = graph_bytes + (memory_bytes if num_segments > 1 else 0)
        if smallest > self.bytes:
            raise ValueError(
                f"Budget: {self.bytes} bytes hold less than one segment's graph and one memory, which need {smallest}. "
                "Cut shorter segments, or allow more"
            )
        choices = []
        most_graphs = min(num_segments, self.bytes // graph_bytes) if graph_bytes else num_segments
        for graphs in range(1, most_graphs + 1):
            room = (self.bytes - graphs * graph_bytes) // max(memory_bytes, 1)
            memories = max(1, min(room, num_segments - graphs))
            if room or graphs == num_segments:
                choices.append((_advances(num_segments - graphs + 1, memories), Binomial(memories, graphs)))
        _, best = min(choices, key=lambda choice: choice[0])
        return best.plan(num_segments, memory_bytes, graph_bytes)


@dataclass(frozen=True)
class Offload:
    """Another schedule, with its stored memories moved away from the device.

    In backward the next memory is fetched while a segment is computed, so one more memory is alive than without.

    Args:
        schedule: the schedule whose plan is carried out.
        to: "cpu" (pinned memory and asynchronous copies, where the memory lives on a GPU), or a folder on a disk, in
            which each rollout makes a temporary folder of its own, and from which a thread of its own reads.
    """

    schedule: Schedule
    to: str | PathLike[str] = "cpu"

    @property
    def needs_sizes(self) -> bool:
        return self.schedule.needs_sizes

    def plan(self, num_segments: int, memory_bytes: int = 0, graph_bytes: int = 0) -> Plan:
        plan = self.schedule.plan(num_segments, memory_bytes, graph_bytes)
        return dataclasses.replace(plan, store_on=str(self.to))


Stores = Callable[[int, int, int], Iterable[int]]
"""``stores(first, stop, stored)``: where a sweep from ``first`` that ends with the graph of ``stop - 1``
stores memories.

The memory before ``first`` is stored already; ``stored`` counts all that are.
"""


def _walk(num_segments: int, graphs: int, stores: Stores, memory_bytes: int, graph_bytes: int) -> Plan:
    """From the last segment to the first: load the nearest stored memory, sweep up to the segment, back-propagate it.

    The first sweep is the forward pass. It ends with the graphs of the last ``graphs`` segments, which count as one.
    """
    _at_least("num_segments", num_segments)
    stop = num_segments - min(graphs, num_segments) + 1
    actions: list[Action] = []
    recorded = 0
    stored: list[int] = []

    def do(kind: str, segments: Iterable[int]) -> None:
        actions.extend(Action(kind, t) for t in segments)  # type: ignore[arg-type]

    while stop > 0:
        if recorded:
            do("load", stored[-1:])
        elif stop > 1:
            stored.append(0)
            do("store", [0])
        at = stored[-1] if stored else 0
        for position in stores(at, stop, len(stored)):
            do("advance", range(at, position))
            do("store", [position])
            stored.append(position)
            at = position
        do("advance", range(at, stop - 1))
        last = stop if recorded else num_segments
        do("graph", range(stop - 1, last))
        recorded = recorded or len(actions)
        do("backward", reversed(range(stop - 1, last)))
        stop -= 1
        while stored and stored[-1] >= stop:
            do("drop", [stored.pop()])
    return Plan(
        num_segments=num_segments,
        recording=tuple(actions[:recorded]),
        replay=tuple(actions[recorded:]),
        memory_bytes=memory_bytes,
        graph_bytes=graph_bytes,
    )


def _reach(memories: int, repetitions: int) -> int:
    """How many segments ``memories`` reverse if none is run without a graph more than ``repetitions`` times."""
    return math.comb(memories + repetitions, memories)


def _repetitions(segments: int, memories: int) -> int:
    r = 0
    while _reach(memories, r) < segments:
        r += 1
    return r


def _first_stretch(segments: int, memories: int) -> int:
    """How far an optimal sweep over ``segments`` (> 1) goes before it stores its second memory."""
    r = _repetitions(segments, memories)
    return min(_reach(memories, r - 1), segments - _reach(memories - 1, r - 1))


def _advances(segments: int, memories: int) -> int:
    """The fewest runs without a graph that reverse ``segments``: Griewank and Walther's closed form."""
    r = _repetitions(segments, memories)
    return r * segments - _reach(memories + 1, r - 1) if r else 0


def _at_least(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


# --- The critical path: record, then replay ---------------------------------------------------------------------------


class _Leaves:
    """A flattened pytree, and the versions of its tensors when it was made."""

    def __init__(self, tree: Tree):
        self.leaves, self.spec = tree_flatten(tree)
        self.versions = [_version(leaf) for leaf in self.leaves]

    def tree(self) -> Tree:
        return tree_unflatten(self.leaves, self.spec)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def changed(self) -> bool:
        return self.versions != [_version(leaf) for leaf in self.leaves]

    def cut(self, wants_grad: Callable[[Tensor], bool]) -> tuple[Tree, dict[int, Tensor]]:
        """The tree with its tensors cut from their graph; by position, those of them that now collect a gradient."""
        leaves, sources = list(self.leaves), {}
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                leaves[i] = leaf.detach()
                if wants_grad(leaf):
                    sources[i] = leaves[i].requires_grad_()
        return tree_unflatten(leaves, self.spec), sources


@dataclass
class _Graph:
    """One segment's graph: the leaves of its value and memory, and those it starts from besides the parameters."""

    outputs: list[Any]
    memory_sources: dict[int, Tensor]
    segment_sources: dict[int, Tensor]

    def sources(self) -> list[Tensor]:
        return [*self.memory_sources.values(), *self.segment_sources.values()]


class _Rollout:
    """A rollout in progress: carries out the actions of a plan, those of forward and then those of backward.

    It stands before some segment, with ``memory`` as it is there, and in backward with ``carry``, the loss's gradient
    by each leaf of the memory after the segment that is next. ``parameters`` are None where gradients are added to
    ``.grad`` on the spot (:func:`accumulate`).
    """

    def __init__(
        self,
        cell: Cell,
        segments: list[Tree],
        memory: Tree,
        schedule: Schedule,
        watch: MemoryGradients | None,
        check: bool,
        parameters: list[Tensor] | None,
        sync: Callable[[bool], None] = lambda last: None,
    ):
        self.cell = cell
        self.segments = [_Leaves(segment) for segment in segments]
        self.initial = self.memory = _memory_leaves(memory, "the initial memory")
        self.in_place = parameters is None
        self.parameters = parameters or []
        self.parameter_versions = [_version(p) for p in self.parameters]
        given = [x for part in (self.initial, *self.segments) for x in part.tensors()]
        self.inputs = self.parameters + [x for x in given if x.requires_grad]
        self.environment = _Environment([*self.parameters, *given])
        self.plan = self._plan(schedule)
        self.shelf = _Shelf(self.plan)
        self.graphs: dict[int, _Graph] = {}
        self.recording = True
        self.spent = False
        self.recorded: list[_Recorded] = []
        self.kept: list[list[Any]] | None = [] if check else None
        self.sync = sync
        self.watch = watch
        if watch is not None:
            watch.start(len(segments))

    def _plan(self, schedule: Schedule) -> Plan:
        count = len(self.segments)
        if isinstance(schedule, type) or not hasattr(schedule, "plan"):
            raise ValueError(f"schedule: expected a schedule, such as replay.Binomial(8), got {schedule!r}")
        if not self.environment.grad_enabled:
            forward = tuple(Action("advance", t) for t in range(count))
            return Plan(num_segments=count, recording=forward, replay=())
        if not schedule.needs_sizes:
            return schedule.plan(count)
        return schedule.plan(
            count, *measure(self.cell, self.segments[0].tree(), self.initial.tree(), params=self.parameters)
        )

    # Forward

    def record(self) -> list[Any]:
        """The forward pass. Returns the leaves of all values and of the final memory."""
        values: list[Any] = []
        for action in self.plan.recording:
            values += self._do(action)
        # A weight that autocast converted here must not serve others: it may lack a graph, or keep ours alive.
        torch.clear_autocast_cache()
        self.recording = False
        leaves = values + self.memory.leaves
        self.memory = self.initial
        return leaves

    def outputs(self, leaves: Sequence[Any]) -> tuple[list[Tree], Tree]:
        """The trees of :meth:`record`'s leaves, after these went through the autograd function."""
        specs = [*(recorded.value for recorded in self.recorded), self.recorded[-1].memory]
        trees, start = [], 0
        for spec in specs:
            trees.append(tree_unflatten(leaves[start : start + spec.num_leaves], spec))
            start += spec.num_leaves
        return trees[:-1], trees[-1]

    # Backward

    def replay(self, output_grads: Sequence[Tensor | None]) -> Grads:
        """The backward pass; returns the gradient of each of ``self.inputs``."""
        self._check_unspent()
        ends = list(itertools.accumulate(recorded.value.num_leaves for recorded in self.recorded))
        self.value_grads = [list(output_grads[a:b]) for a, b in itertools.pairwise([0, *ends])]
        self.parameter_grads = _GradientSums(self.parameters)
        self.segment_grads: list[Tensor | None] = []
        self._carry_to(len(self.segments), list(output_grads[ends[-1] :]))
        with self.environment.random_numbers_kept():
            for action in self.plan.replay:
                self._do(action)
        self.memory = self.initial
        of_memory = [g for g, leaf in zip(self.carry, self.initial.leaves, strict=True) if _requires_grad(leaf)]
        grads = [*self.parameter_grads.totals, *of_memory, *self.segment_grads]
        # Held by nobody else, a gradient becomes the parameter's .grad without a copy.
        del self.parameter_grads, self.carry, self.segment_grads, self.value_grads
        return grads

    def _check_unspent(self) -> None:
        if self.spent:
            raise RuntimeError(
                "this rollout was already back-propagated and its memories are freed. If a later rollout started from "
                "its memory, cut there: start from replay.detach(rollout.memory). Otherwise call backward once, on the "
                "sum of the losses."
            )
        self.spent = True
        if self.parameter_versions != [_version(p) for p in self.parameters]:
            raise RuntimeError(
                "a parameter was changed in place between the rollout and its backward (an optimiser step?). "
                "Replay runs the cell again and needs the same parameters: call backward first."
            )

    # The actions

    def _do(self, action: Action) -> list[Any]:
        """Carry out one action. Returns the leaves of the value that it computed, if any."""
        kind, t = action
        if kind == "store":
            self.shelf.put(t, self.memory, self.environment.random_state())
        elif kind == "load":
            self.memory = self.shelf.get(t)
            self.environment.set_random_state(self.shelf.random_states[t])
        elif kind == "drop":
            self.shelf.drop(t)
        elif kind == "advance":
            with torch.no_grad():
                return self._step(t, *self._call_cell(t, self.segments[t].tree(), self.memory.tree()))
        elif kind == "graph" and (self.recording or self._upstream(t)):
            return self._build_graph(t)
        elif kind == "backward":
            self._back_propagate(t)
        return []

    def _call_cell(self, t: int, segment: Tree, memory: Tree) -> tuple[Tree, Tree]:
        if self.recording:
            return _call(self.cell, segment, memory)
        if self.memory.changed() or self.segments[t].changed():
            raise RuntimeError(
                f"segment {t} or the memory before it was changed in place after it was recorded, so it cannot be "
                "replayed. Call backward first, or change a clone."
            )
        with self.environment.autocast_restored():
            return _call(self.cell, segment, memory)

    def _step(self, t: int, value: Tree, memory: Tree) -> list[Any]:
        """Stand before segment ``t + 1``. Returns the leaves of the value of ``t``."""
        if self.memory.changed():
            raise ValueError(
                f"the cell changed its memory in place in segment {t}, and replay needs that memory again. "
                "Return a new tensor: use out-of-place operations, or work on a clone."
            )
        of_value = _Leaves(detach(value))
        self.memory = _memory_leaves(detach(memory), f"the memory after segment {t}")
        recorded = _Recorded(of_value.spec, self.memory.spec)
        leaves = of_value.leaves + self.memory.leaves
        if self.recording:
            self.recorded.append(recorded)
            if self.kept is not None:
                self.kept.append(leaves)
        elif recorded != self.recorded[t]:
            raise RuntimeError(
                f"segment {t} returned other leaves in replay than when it was recorded: {recorded}, was "
                f"{self.recorded[t]}. The cell is not a function of segment and memory alone."
            )
        elif self.kept is not None:
            _check_same(t, leaves, self.kept[t])
        return of_value.leaves

    def _build_graph(self, t: int) -> list[Any]:
        """Run segment ``t`` with a graph that starts at the memory before it."""
        torch.clear_autocast_cache()  # of weights that were converted without a graph
        segment, segment_sources = self.segments[t].cut(_requires_grad)
        memory, memory_sources = self.memory.cut(_carries_grad if t else _requires_grad)
        with torch.enable_grad():
            value, after = self._call_cell(t, segment, memory)
        graph = self.graphs[t] = _Graph(tree_leaves((value, after)), memory_sources, segment_sources)
        if not self.in_place:
            outputs = [x for x in graph.outputs if isinstance(x, Tensor)]
            _check_reach(self.cell, outputs, [*self.parameters, *graph.sources()])
        return self._step(t, value, after)

    def _upstream(self, t: int) -> bool:
        return any(grad is not None for grad in (*self.value_grads[t], *self.carry))

    def _back_propagate(self, t: int) -> None:
        """From the gradients by segment ``t``'s outputs to those by what its graph starts from; frees the graph."""
        graph = self.graphs.pop(t, None)
        before = self.recorded[t - 1].memory if t else self.initial.spec
        of_memory: Grads = [None] * before.num_leaves
        of_segment: Grads = [None] * sum(x.requires_grad for x in self.segments[t].tensors())
        outputs = [] if graph is None else zip(graph.outputs, [*self.value_grads[t], *self.carry], strict=True)
        pairs = [(x, g) for x, g in outputs if g is not None and _requires_grad(x)]
        if graph is not None and pairs:
            sources = graph.sources()
            grads = self._gradients([x for x, _ in pairs], [g for _, g in pairs], sources, last=t == 0)
            for i, grad in zip(graph.memory_sources, grads, strict=False):
                of_memory[i] = grad
            of_segment = grads[len(graph.memory_sources) :]
        elif self.in_place and t == 0:
            raise ValueError(
                "accumulate: no gradient reaches the first segment, so the gradients were not synchronised"
            )
        self.segment_grads = of_segment + self.segment_grads
        self._carry_to(t, of_memory)

    def _gradients(self, outputs: list[Tensor], upstream: list[Tensor], sources: list[Tensor], last: bool) -> Grads:
        """The gradients by ``sources``; those of the parameters are added up."""
        if self.in_place:
            self.sync(last)
            torch.autograd.backward(outputs, upstream)
            return [source.grad for source in sources]
        return self.parameter_grads.differentiate(outputs, upstream, sources)

    def _carry_to(self, boundary: int, grads: Grads) -> None:
        self.carry = grads if self.watch is None else self.watch.passing(boundary, grads)


class _Recorded(NamedTuple):
    """The structure of what a segment returned."""

    value: TreeSpec
    memory: TreeSpec


Begin = Callable[[], Callable[[], _Leaves]]
"""Begins to fetch a memory; what it returns waits for it."""


class _Shelf:
    """Stored memories with the state of the generators there, on the device, on the CPU, or in files.

    The plan says which is loaded next: that one is on its way while the segment before is computed.
    """

    def __init__(self, plan: Plan):
        self.place = plan.store_on
        self.loads = collections.deque(action.segment for action in plan.replay if action.kind == "load")
        self.begin: dict[int, Begin] = {}
        self.begun: dict[int, Callable[[], _Leaves]] = {}
        self.random_states: dict[int, list[Tensor]] = {}
        self.latest: list[Tensor] = []
        self.folder: Path | None = None

    def put(self, t: int, memory: _Leaves, random_state: list[Tensor]) -> None:
        if self.latest:  # equal states are shared: without dropout they all are
            pairs = zip(self.latest, random_state, strict=True)
            random_state = [old if torch.equal(old, new) else new for old, new in pairs]
        self.latest = self.random_states[t] = random_state
        if t == 0 or self.place == "device":  # the first memory is the caller's, who holds it anyway
            self.begin[t] = lambda: lambda: memory
        elif self.place == "cpu":
            self.begin[t] = _moved_to_cpu(memory)
        else:
            self.begin[t] = self._moved_to_disk(t, memory)

    def get(self, t: int) -> _Leaves:
        memory = (self.begun.pop(t, None) or self.begin[t]())()
        self.loads.popleft()
        if self.loads and self.loads[0] in self.begin:  # or it is stored later
            self.begun[self.loads[0]] = self.begin[self.loads[0]]()
        return memory

    def drop(self, t: int) -> None:
        del self.begin[t], self.random_states[t]
        if self.folder is not None:
            (self.folder / f"{t}.pt").unlink(missing_ok=True)

    def _moved_to_disk(self, t: int, memory: _Leaves) -> Begin:
        if self.folder is None:
            Path(self.place).mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="memories-", dir=self.place))
            self.reader = concurrent.futures.ThreadPoolExecutor(max_workers=1)  # its thread ends with the shelf
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        file, reader = self.folder / f"{t}.pt", self.reader
        spec, leaves = memory.spec, [x.device if isinstance(x, Tensor) else x for x in memory.leaves]
        torch.save([x.clone() for x in memory.tensors()], file)  # a view would be saved with all that it is a view of

        def begin() -> Callable[[], _Leaves]:
            stored = reader.submit(torch.load, file, weights_only=True)

            def finish() -> _Leaves:
                try:
                    tensors = iter(stored.result())
                except Exception as error:
                    raise RuntimeError(f"the memory before segment {t} cannot be read from {file}: {error}") from error
                back = [next(tensors).to(x) if isinstance(x, torch.device) else x for x in leaves]
                return _Leaves(tree_unflatten(back, spec))

            return finish

        return begin


def _moved_to_cpu(memory: _Leaves) -> Begin:
    """Copies in pinned memory; the host waits for neither way. Those back run on a stream of their own."""
    on_gpu = {i: x.device for i, x in enumerate(memory.leaves) if isinstance(x, Tensor) and x.is_cuda}
    if not on_gpu:
        return lambda: lambda: memory
    leaves, spec = list(memory.leaves), memory.spec
    for i in on_gpu:
        leaves[i] = torch.empty_like(leaves[i], device="cpu", pin_memory=True).copy_(leaves[i], non_blocking=True)

    def begin() -> Callable[[], _Leaves]:
        streams = {device: torch.cuda.Stream(device) for device in on_gpu.values()}
        back = list(leaves)
        for i, device in on_gpu.items():
            streams[device].wait_stream(torch.cuda.current_stream(device))  # which may still copy it away
            with torch.cuda.stream(streams[device]):
                back[i] = leaves[i].to(device, non_blocking=True)

        def finish() -> _Leaves:
            for i, device in on_gpu.items():
                current = torch.cuda.current_stream(device)
                current.wait_stream(streams[device])
                back[i].record_stream(current)
            return _Leaves(tree_unflatten(back, spec))

        return finish

    return begin


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rollout: _Rollout, *inputs: Tensor) -> tuple[Any, ...]:
        ctx.rollout = rollout
        ctx.set_materialize_grads(False)
        leaves = rollout.record()
        ctx.mark_non_differentiable(*(x for x in leaves if isinstance(x, Tensor) and not _carries_grad(x)))
        return tuple(leaves)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Any, ...]:
        _refuse_double_backward()
        return (None, *ctx.rollout.replay(output_grads))


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "backward was called with create_graph=True, but a replayed gradient has no graph of its own. For "
            "gradients of gradients use replay.full_bptt."
        )


class _Boundary(torch.autograd.Function):
    """The identity on a memory in plain autograd, for :class:`MemoryGradients`."""

    @staticmethod
    def forward(ctx: Any, watch: MemoryGradients, boundary: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.watch, ctx.boundary = watch, boundary
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (None, None, *ctx.watch.passing(ctx.boundary, grads))


def _watched(watch: MemoryGradients | None, boundary: int, memory: Tree) -> Tree:
    leaves, spec = tree_flatten(memory)
    positions = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and _carries_grad(x)]
    if watch is None or not positions:
        return memory
    passed = _Boundary.apply(watch, boundary, *(leaves[i] for i in positions))  # type: ignore[no-untyped-call]
    for i, x in zip(positions, passed, strict=True):
        leaves[i] = x
    return tree_unflatten(leaves, spec)


def _check_same(t: int, replayed: list[Any], recorded: list[Any]) -> None:
    for new, old in zip(replayed, recorded, strict=True):
        try:
            torch.testing.assert_close(new, old, equal_nan=True)
        except AssertionError as error:  # noqa: PERF203
            raise RuntimeError(
                f"segment {t} differs in replay from its recording, so its gradient would be wrong: {error}\nThe cell "
                "uses something besides segment, memory, parameters and torch's own generators (a counter, running "
                "statistics, a private generator, numpy's or Python's random numbers)."
            ) from error


# --- The readout: off the critical path, so it runs once, with its gradient -------------------------------------------


class _ReadoutRun:
    """The readout over chunks of segments: its loss, and the gradients of values, segments and parameters.

    The loss is a scalar, so its gradients can be computed at once and only be scaled in backward. In float16 an
    unscaled gradient could underflow before a gradient scaler sees it: there the readout is run again in backward.
    """

    def __init__(
        self,
        readout: Readout,
        values: list[Tree],
        segments: list[Tree],
        size: int,
        weights: list[float] | None,
        parameters: list[Tensor],
    ):
        self.readout = readout
        self.parameters = parameters
        self.values = [_Leaves(value) for value in values]
        self.segments = [_Leaves(segment) for segment in segments]
        self.parts = list(_chunks(len(segments), size))
        self.weights = weights
        given = [
            x for part in self.parts for leaves in (*self.values[part], *self.segments[part]) for x in leaves.tensors()
        ]
        self.inputs = parameters + [x for x in given if x.requires_grad]
        self.environment = _Environment([*parameters, *given])
        self.random_state = self.environment.random_state()
        self.half = self.environment.uses_float16 or any(x.dtype == torch.float16 for x in self.inputs)
        self.grads: Grads | None = None

    def forward(self) -> Tensor:
        if not self.environment.grad_enabled:
            return _sum_of_losses([self._call(part, _Leaves.tree) for part in self.parts])
        loss = self.run(None)
        if not self.half:
            self.values = self.segments = []
        return loss

    def run(self, scale: Tensor | None) -> Tensor:
        """The loss; leaves the gradients, times ``scale``, in ``self.grads``."""
        losses: list[Tensor | None] = []
        parameter_grads = _GradientSums(self.parameters)
        others: Grads = []
        for part in self.parts:
            sources: list[Tensor] = []

            def cut(leaves: _Leaves, sources: list[Tensor] = sources) -> Tree:
                tree, found = leaves.cut(_requires_grad)
                sources += found.values()
                return tree

            with torch.enable_grad():
                loss = self._call(part, cut)
            losses.append(None if loss is None else loss.detach())
            if loss is not None and loss.requires_grad:
                _check_reach(self.readout, [loss], [*self.parameters, *sources])
                others += parameter_grads.differentiate([loss], [scale], sources)
            else:
                others += [None] * len(sources)
            del loss  # and with it the graph, before the next one
        self.grads = parameter_grads.totals + others
        return _sum_of_losses(losses)

    def _call(self, part: slice, tree: Callable[[_Leaves], Tree]) -> Tensor | None:
        values, segments = ([tree(leaves) for leaves in of[part]] for of in (self.values, self.segments))
        return _call_readout(self.readout, values, segments, self.weights and self.weights[part])

    def backward(self, scale: Tensor) -> Grads:
        if self.half:
            with self.environment.random_numbers_kept(), self.environment.autocast_restored():
                self.environment.set_random_state(self.random_state)
                self.run(scale)
            self.values = self.segments = []
        grads, self.grads = self.grads, None
        if grads is None:
            raise RuntimeError(
                "this rollout was already back-propagated: call backward once, on the sum of the losses."
            )
        if not self.half:
            for i, grad in enumerate(grads):  # one by one, so that no second set of gradients exists
                grads[i] = None if grad is None else grad * scale
        return grads


class _ReadOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _ReadoutRun, *inputs: Tensor) -> Tensor:
        ctx.run = run
        return run.forward()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        _refuse_double_backward()
        return (None, *ctx.run.backward(scale))


# --- The environment of a run: random numbers, autocast, grad mode ----------------------------------------------------


class _Environment:
    """What a cell sees besides its arguments, captured when the rollout starts and put back for a replay."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.grad_enabled = torch.is_grad_enabled()
        self.devices = sorted({x.device for x in tensors if x.device.type not in ("cpu", "meta")}, key=str)
        types = {"cpu", *(device.type for device in self.devices)}
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted(types)
            if torch.amp.is_autocast_available(kind)
        ]
        self.uses_float16 = any(enabled and dtype == torch.float16 for _, dtype, enabled in self.autocast)

    def random_state(self) -> list[Tensor]:
        """The generators' states now."""
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self.devices)]

    def set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    @contextlib.contextmanager
    def random_numbers_kept(self) -> Iterator[None]:
        """What is run inside leaves the generators as they were."""
        states = self.random_state()
        try:
            yield
        finally:
            self.set_random_state(states)

    @contextlib.contextmanager
    def autocast_restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield


# --- What a callable trains, and whether a gradient would be lost on the way ------------------------------------------


def _owners(function: Any) -> list[Any]:
    """The modules and tensors that a callable is, is bound to, or carries as arguments of a ``functools.partial``."""
    if isinstance(function, (nn.Module, Tensor)):
        return [function]
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.values()]
        return [owner for part in parts for owner in _owners(part)]
    bound = getattr(function, "__self__", None)
    wrapped = getattr(function, "__wrapped__", None)
    return [owner for part in (bound, wrapped) if part is not None for owner in _owners(part)]


def _trained_tensors(function: Any, params: Params) -> list[Tensor]:
    """The tensors that require a gradient, each once, of a callable's owners and of ``params``."""
    extra = [params] if isinstance(params, (nn.Module, Tensor)) else list(params)
    found: dict[int, Tensor] = {}
    for owner in [*_owners(function), *extra]:
        if isinstance(owner, DistributedDataParallel):
            raise ValueError(
                "the cell is wrapped in DistributedDataParallel, which would synchronise once per segment. Wrap "
                "instead the module whose forward calls the replay, and give the replay the bare cell."
            )
        if isinstance(owner, nn.Module) and _is_sharded(owner):
            raise ValueError(
                "the cell or readout is sharded by FSDP, which delivers gradients by hooks of its own: use "
                "replay.accumulate(..., sync=model.set_requires_gradient_sync)."
            )
        if not isinstance(owner, (nn.Module, Tensor)):
            raise ValueError(f"params: expected tensors or modules, got {type(owner).__name__}")
        named = owner.named_parameters() if isinstance(owner, nn.Module) else [("tensor", owner)]
        for name, tensor in named:
            if tensor.requires_grad:
                found[id(tensor)] = tensor
                if tensor.is_leaf and tensor._backward_hooks:
                    raise ValueError(
                        f"parameter '{name}' has a tensor hook, which replay would run once per segment and once more. "
                        "Use register_post_accumulate_grad_hook, which runs once."
                    )
    return list(found.values())


def _is_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if nobody imported it, nothing is sharded by it
    return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in module.modules())


def _check_reach(function: Any, outputs: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Raise if the outputs' graph ends in a leaf that is not among ``known``: its gradient would be lost."""
    leaves = {id(x) for x in known}
    seen = {x.grad_fn for x in known if x.grad_fn is not None}
    stack = [x.grad_fn for x in outputs if x.grad_fn is not None]
    stray = [x for x in outputs if x.is_leaf and x.requires_grad and id(x) not in leaves]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in leaves:
            stray.append(variable)
        stack.extend(following for following, _ in node.next_functions if following is not None)
    if stray:
        names = ", ".join(_describe(function, x, seen) for x in stray)
        raise ValueError(
            f"{_name_of(function)} uses {names}, which requires a gradient and would get none. "
            "Name it in params=[...], or pass an nn.Module (or a method bound to one) that owns it."
        )


def _describe(function: Any, leaf: Tensor, graph: Container[Any]) -> str:
    """The name under which a callable sees a leaf, or a tensor derived from it, for error messages."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        function = getattr(type(function), "forward", None) or type(function).__call__
    scope: dict[str, Any] = {}
    if inspect.isfunction(function):
        seen = inspect.getclosurevars(function)
        defaults = {k: v.default for k, v in inspect.signature(function).parameters.items()}
        scope = {**seen.globals, **seen.nonlocals, **defaults}
    for name, value in scope.items():
        inner = value.named_parameters() if isinstance(value, nn.Module) else ()
        for full_name, x in [(name, value), *((f"{name}.{part}", x) for part, x in inner)]:
            if x is leaf or (isinstance(x, Tensor) and x.grad_fn in graph):
                return f"'{full_name}' of shape {tuple(x.shape)}"
    return f"a tensor of shape {tuple(leaf.shape)}"


def _name_of(function: Any) -> str:
    """What to call a callable in an error message."""
    return getattr(function, "__qualname__", None) or type(function).__name__


# --- What the user handed in ------------------------------------------------------------------------------------------


def _segment_list(segments: Sequence[Tree]) -> list[Tree]:
    if isinstance(segments, (dict, str)) or not isinstance(segments, Iterable):
        raise ValueError(f"segments: expected a sequence with one pytree per segment, got {type(segments).__name__}")
    result = list(segments)
    if not result:
        raise ValueError("segments: expected at least one segment, got none")
    return result


def weight_list(weights: Weights | None, count: int) -> list[float] | None:
    """The weights as numbers; ValueError unless there is one for each of ``count`` segments."""
    if weights is None:
        return None
    result = [float(w) for w in weights]
    if len(result) != count:
        raise ValueError(f"segment_weights: expected one for each of the {count} segments, got {len(result)}")
    return result


def _memory_leaves(memory: Tree, what: str) -> _Leaves:
    leaves = _Leaves(memory)
    for leaf in leaves.leaves:
        if leaf is not None and not isinstance(leaf, (Tensor, bool, int, float, str)):
            raise ValueError(
                f"{what} holds a {type(leaf).__name__}, through which no gradient could flow: expected a pytree of "
                "tensors (tuples, lists, dicts, None). Register it with torch.utils._pytree, or return its fields."
            )
    return leaves


def _call(cell: Cell, segment: Tree, memory: Tree) -> tuple[Tree, Tree]:
    result = cell(segment, memory)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        got = f"{len(result)} values" if isinstance(result, (tuple, list)) else type(result).__name__
        raise ValueError(f"a cell returns (value, memory); {_name_of(cell)} returned {got}")
    return result[0], result[1]


def _call_readout(
    readout: Readout, values: list[Tree], segments: list[Tree], weights: list[float] | None
) -> Tensor | None:
    loss = readout(values, segments)
    if loss is None:
        return None
    shapes = [()] if weights is None else [(len(segments),)] if len(segments) > 1 else [(1,), ()]
    if not isinstance(loss, Tensor) or loss.shape not in shapes:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        expected = (
            "a scalar loss" if weights is None else f"with segment_weights one loss per segment, shape {shapes[0]},"
        )
        raise ValueError(f"a readout returns {expected} or None; {_name_of(readout)} returned {got}")
    return loss if weights is None else (loss * loss.new_tensor(weights)).sum()


def _sum_of_losses(losses: Sequence[Tensor | None], weights: list[float] | None = None) -> Tensor:
    total: Tensor | None = None
    for t, loss in enumerate(losses):
        if loss is None:
            continue
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"segment {t}: without a readout a cell's value is the segment's scalar loss or None, got {got}. "
                "Use replay.scan to get the values themselves."
            )
        term = loss if weights is None else loss * weights[t]
        total = term if total is None else total + term
    if total is None:
        raise ValueError("no segment of the rollout has a loss: every value was None")
    return total


def _chunks(count: int, size: int) -> Iterator[slice]:
    if size < 1:
        raise ValueError(f"readout_segments: expected at least 1, got {size}")
    return (slice(start, start + size) for start in range(0, count, size))


def _requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _carries_grad(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


class _GradientSums:
    """Sums of the gradients by some parameters over several graphs.

    Each gradient is added as soon as autograd has it: beside the sums there is one gradient, not a second set.
    """

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.totals: list[Tensor | None] = [None] * len(parameters)
        self._own = [False] * len(parameters)

    def differentiate(
        self, outputs: Sequence[Tensor], upstream: Sequence[Tensor | None], sources: list[Tensor]
    ) -> Grads:
        """Back-propagate through one graph; returns the gradients by ``sources``."""
        hooks = [x.register_hook(functools.partial(self._add, i)) for i, x in enumerate(self.parameters)]
        try:
            grads = torch.autograd.grad(outputs, [*self.parameters, *sources], upstream, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return list(grads[len(self.parameters) :])

    def _add(self, i: int, grad: Tensor) -> Tensor:
        total = self.totals[i]
        if total is None:
            self.totals[i] = grad
        elif self._own[i]:
            total.add_(grad)
        else:  # autograd may hand out tensors that share their storage: the first summand is not ours to change
            self.totals[i] = total + grad
            self._own[i] = True
        # Autograd keeps what is returned until its end: something of that shape and almost no bytes.
        return grad.new_zeros(()).expand_as(grad) if grad.layout == torch.strided else grad
