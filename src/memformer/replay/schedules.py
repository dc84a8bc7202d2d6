"""Schedules: which memories to keep, and which segments to run again.

A schedule is a frozen value with one method, ``plan(num_segments) -> Plan``: a list of simple actions, which the engine
carries out, and which says beforehand what they cost. There is no tensor here. Every schedule is the same walk from the
last segment to the first (:func:`_walk`); they differ in which memories a sweep stores on its way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Literal, NamedTuple, Protocol


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

    @property
    def needs_sizes(self) -> bool:
        """Whether the plan depends on the sizes; the engine then measures them on the first segment."""
        ...

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
        at_least("graphs", self.graphs, 0)

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
        at_least("k", self.k)
        at_least("graphs", self.graphs, 0)

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
        at_least("memories", self.memories)
        at_least("graphs", self.graphs, 0)

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
        at_least("bytes", self.bytes)

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
    at_least("num_segments", num_segments)
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


def at_least(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
