"""Schedules: which memories to keep, and which segments to run again.

A schedule is a frozen value with one method, ``plan(num_segments) -> Plan``: simple actions, which the engine carries
out one by one and which are made only then, and what they cost, which is known before. There is no tensor here.
Every schedule is the same walk from the last segment to the first (:class:`_Walk`); they differ in which memories a
sweep stores on its way.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Literal, NamedTuple, Protocol, overload


class Action(NamedTuple):
    """One step of the engine, which stands before some segment with the memory that it has there.

    It can ``store`` that memory, ``load`` one that was stored (to stand there again) or ``drop`` it; ``advance``: run
    the segment without a graph; ``graph``: run it with a graph, and keep the graph; ``backward``: back-propagate
    through the graph of a segment, and free it.
    """

    kind: Literal["store", "load", "drop", "advance", "graph", "backward"]
    segment: int


class Actions(Sequence[Action]):
    """Actions that are made while they are carried out: a plan of many segments is never a list, unless asked for."""

    def __init__(self, make: Callable[[], Iterator[Action]]):
        self._make = make

    @functools.cached_property
    def _all(self) -> tuple[Action, ...]:
        return tuple(self._make())

    def __iter__(self) -> Iterator[Action]:
        return self._make()

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> Action: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Action, ...]: ...
    def __getitem__(self, index: int | slice) -> Action | tuple[Action, ...]:
        return self._all[index]

    def __add__(self, others: Iterable[Action]) -> tuple[Action, ...]:
        return (*self, *others)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._all == tuple(other)

    def __hash__(self) -> int:
        return hash(self._all)


@dataclass(frozen=True)
class Counts:
    """What a plan needs, in numbers of cells, memories and graphs.

    Attributes:
        evaluations: how often the cell is run.
        recording, replay: what is held, until the first memory is loaded and then, at the moments when it is most:
            pairs of how many memories are stored and how many graphs are alive.
    """

    evaluations: int
    recording: frozenset[tuple[int, int]]
    replay: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, actions: Iterable[Action]) -> Counts:
        """Of actions, one by one."""
        evaluations = memories = graphs = 0
        recording, replay = {(0, 0)}, set[tuple[int, int]]()
        held = recording
        for kind, _ in actions:
            evaluations += kind in ("advance", "graph")
            memories += (kind == "store") - (kind == "drop")
            graphs += (kind == "graph") - (kind == "backward")
            if kind == "load":
                held = replay
            held.add((memories, graphs))
        return cls(evaluations, frozenset(recording), frozenset(replay))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a schedule does for a number of segments, and what it costs. ``print(plan)`` says it in a line.

    Attributes:
        num_segments: segments of the rollout.
        recording: the actions of the forward pass; every segment is run once.
        replay: the actions of the backward pass.
        memory_bytes, graph_bytes: size of one memory and of one segment's graph, 0 if they were not given.
        store_on: where stored memories are kept: "device" (where they are), "cpu", or a folder.
        counts: what the actions come to, where that is known without going through them; None: they are counted.
    """

    num_segments: int
    recording: Sequence[Action] = dataclasses.field(repr=False)
    replay: Sequence[Action] = dataclasses.field(repr=False)
    memory_bytes: int = 0
    graph_bytes: int = 0
    store_on: str = "device"
    counts: Counts | None = dataclasses.field(default=None, repr=False, compare=False)

    @functools.cached_property
    def _counts(self) -> Counts:
        return self.counts or Counts.of(itertools.chain(self.recording, self.replay))

    @property
    def evaluations(self) -> int:
        """How often the cell is run in both passes together, with or without a graph."""
        return self._counts.evaluations

    @property
    def stored_memories(self) -> int:
        """The most memories that are stored at once."""
        return max(memories for memories, _ in self._counts.recording | self._counts.replay)

    @property
    def live_graphs(self) -> int:
        """The most segments whose graphs are alive at once."""
        return max(graphs for _, graphs in self._counts.recording | self._counts.replay)

    @property
    def bytes(self) -> int:
        """The most bytes of memories and graphs on the device at once.

        Of memories that are stored elsewhere one is there, while it is fetched for the segment that is next.
        """
        most = 0
        for held, fetched in ((self._counts.recording, 0), (self._counts.replay, 1)):
            for memories, graphs in held:
                here = memories if self.store_on == "device" else min(memories, fetched)
                most = max(most, here * self.memory_bytes + graphs * self.graph_bytes)
        return most

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
        walk = _Walk(num_segments, self.graphs, lambda first, stop, _: range(first + 1, stop - 1))
        return walk.plan(walk.replayed, walk.replayed, walk.replayed, memory_bytes, graph_bytes)


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

        walk = _Walk(num_segments, self.graphs, stores)
        replayed = walk.replayed
        if replayed < self.k:
            return walk.plan(replayed, replayed, replayed, memory_bytes, graph_bytes)
        blocks = -(-replayed // self.k)
        last = replayed - self.k * (blocks - 1)
        # In a block all memories are stored but its first, which is there, and its last, whose graph is built at once.
        most = max(blocks + max(last - 2, 0), blocks - 1 + max(self.k - 2, 0) if blocks > 1 else 0)
        return walk.plan(2 * replayed - blocks, blocks, most, memory_bytes, graph_bytes)


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
                if remaining <= 1:
                    return
                remaining -= _first_stretch(remaining, slots)
                if remaining > 1:
                    yield stop - remaining

        walk = _Walk(num_segments, self.graphs, stores)
        most = min(self.memories, walk.replayed)
        return walk.plan(_advances(walk.replayed + 1, self.memories), most, most, memory_bytes, graph_bytes)


@dataclass(frozen=True)
class Budget:
    """The fewest evaluations within a number of bytes, for stored memories and segments' graphs together.

    Keeps graphs where there is room for them, else every memory, else as many as fit. The sizes are measured on the
    first segment, or on that of ``measure_at``, at the price of one evaluation; the readout's graph, gradients and
    values come on top.
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
        graphs = num_segments
        if graphs * graph_bytes > self.bytes:
            graphs = self._fastest(num_segments, memory_bytes, graph_bytes)
        memories = self._room(graphs, num_segments, memory_bytes, graph_bytes)
        return Binomial(max(1, memories), graphs).plan(num_segments, memory_bytes, graph_bytes)

    def _room(self, graphs: int, num_segments: int, memory_bytes: int, graph_bytes: int) -> int:
        """How many memories fit beside that many graphs, of those that are of use."""
        needed = num_segments - graphs
        return min(needed, (self.bytes - graphs * graph_bytes) // memory_bytes) if memory_bytes else needed

    def _fastest(self, num_segments: int, memory_bytes: int, graph_bytes: int) -> int:
        """How many graphs leave the fewest evaluations, if not all of them fit beside at least one memory.

        More graphs leave fewer segments to reverse, and less room for memories. So no number in a range is better than
        the segments at its end with the room at its beginning: most ranges need not be looked into.
        """

        def advances(most_graphs: int, least_graphs: int) -> int:
            room = self._room(least_graphs, num_segments, memory_bytes, graph_bytes)
            return _advances(num_segments - most_graphs + 1, max(1, room))

        best, fewest = 1, advances(1, 1)
        ranges = [(1, min(num_segments - 1, (self.bytes - memory_bytes) // graph_bytes))]
        while ranges:
            least, most = ranges.pop()
            if advances(most, least) >= fewest:
                continue
            middle = (least + most) // 2
            if (here := advances(middle, middle)) < fewest:
                best, fewest = middle, here
            ranges += [(a, b) for a, b in ((middle + 1, most), (least, middle - 1)) if a <= b]
        return best


@dataclass(frozen=True)
class Offload:
    """Another schedule, with its stored memories moved away from the device.

    In backward the next memory is fetched while a segment is computed, so one more memory is alive than without.

    Args:
        schedule: the schedule whose plan is carried out.
        to: "cpu" (pinned memory and asynchronous copies, where the memory lives on a GPU), or a folder on a disk, in
            which each rollout makes a temporary folder of its own, and from which a thread of its own reads.

    Raises:
        ValueError: ``schedule`` is none; ``to`` is no folder's name, or the name of another device.
    """

    schedule: Schedule
    to: str | PathLike[str] = "cpu"

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if not isinstance(self.to, str | PathLike):
            raise ValueError(f"offload: expected cpu or a folder, got {self.to!r}")
        if isinstance(self.to, str) and re.fullmatch(r"(cuda|gpu|mps|xpu|hpu|meta)(:\d+)?", self.to):
            raise ValueError(
                f"offload: expected cpu or a folder, got {self.to!r}, which is a device; memories stay where they are "
                f"without an offload. A folder of that name is ./{self.to}"
            )

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


class _Walk:
    """From the last segment to the first: load the nearest stored memory, sweep up to the segment, back-propagate it.

    The first sweep is the forward pass. It ends with the graphs of the last segments, which count as one; the
    ``replayed`` segments before them are run again.
    """

    def __init__(self, num_segments: int, graphs: int, stores: Stores):
        at_least("num_segments", num_segments)
        self.num_segments = num_segments
        self.graphs = min(graphs, num_segments)
        self.replayed = num_segments - self.graphs
        self.stores = stores

    def plan(self, evaluations: int, recorded: int, most: int, memory_bytes: int, graph_bytes: int) -> Plan:
        """The plan, with what is known of it: evaluations in the backward pass, memories that forward stores, and the
        most that backward has."""
        counts = Counts(
            self.num_segments + evaluations,
            recording=frozenset([(recorded, self.graphs)]),
            replay=frozenset([(most, 1)] if self.replayed else ()),
        )
        return Plan(
            num_segments=self.num_segments,
            recording=Actions(self._recording),
            replay=Actions(self._replay),
            memory_bytes=memory_bytes,
            graph_bytes=graph_bytes,
            counts=counts,
        )

    def _recording(self) -> Iterator[Action]:
        if self.replayed:
            stored = [0]
            yield Action("store", 0)
            yield from self._sweep(stored, self.replayed + 1)
        yield from (Action("graph", t) for t in range(self.replayed, self.num_segments))

    def _replay(self) -> Iterator[Action]:
        yield from (Action("backward", t) for t in reversed(range(self.replayed, self.num_segments)))
        stored = [0, *self.stores(0, self.replayed + 1, 1)] if self.replayed else []
        for stop in range(self.replayed, 0, -1):
            yield Action("load", stored[-1])
            yield from self._sweep(stored, stop)
            yield Action("graph", stop - 1)
            yield Action("backward", stop - 1)
            while stored and stored[-1] >= stop - 1:
                yield Action("drop", stored.pop())

    def _sweep(self, stored: list[int], stop: int) -> Iterator[Action]:
        """From the last stored memory to the last segment before ``stop``, storing more."""
        at = stored[-1]
        for position in self.stores(at, stop, len(stored)):
            yield from (Action("advance", t) for t in range(at, position))
            yield Action("store", position)
            stored.append(position)
            at = position
        yield from (Action("advance", t) for t in range(at, stop - 1))


def _reach(memories: int, repetitions: int) -> int:
    """How many segments ``memories`` reverse if none is run without a graph more than ``repetitions`` times."""
    return math.comb(memories + repetitions, memories)


def _repetitions(segments: int, memories: int) -> int:
    """The fewest repetitions with which ``memories`` reverse ``segments``, by bisection."""
    enough = 1
    while _reach(memories, enough) < segments:
        enough *= 2
    return bisect.bisect_left(range(enough), segments, key=lambda r: _reach(memories, r))


def _first_stretch(segments: int, memories: int) -> int:
    """How far an optimal sweep over ``segments`` (> 1) goes before it stores its second memory."""
    r = _repetitions(segments, memories)
    return min(_reach(memories, r - 1), segments - _reach(memories - 1, r - 1))


def _advances(segments: int, memories: int) -> int:
    """The fewest runs without a graph that reverse ``segments``: Griewank and Walther's closed form."""
    r = _repetitions(segments, memories)
    return r * segments - _reach(memories + 1, r - 1) if r else 0


def check_schedule(schedule: object) -> None:
    """ValueError unless it is one."""
    if isinstance(schedule, type) or not hasattr(schedule, "plan"):
        raise ValueError(f"schedule: expected a schedule, such as replay.Binomial(8), got {schedule!r}")


def at_least(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
