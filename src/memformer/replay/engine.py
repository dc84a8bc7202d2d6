"""The critical path: record, then replay."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from .boundary import detach
from .environment import Environment
from .gradients import GradientSums, refuse_double_backward
from .inputs import (
    Cell,
    Grads,
    Leaves,
    Tree,
    call_cell,
    carries_grad,
    check_reach,
    memory_leaves,
    requires_grad,
    version,
)
from .options import Options
from .schedules import Action, Plan, Schedule
from .sizes import measure
from .storage import Shelf


@dataclass
class Graph:
    """One segment's graph: the leaves of its value and memory, and those it starts from besides the parameters."""

    outputs: list[Any]
    memory_sources: dict[int, Tensor]
    segment_sources: dict[int, Tensor]

    def sources(self) -> list[Tensor]:
        return [*self.memory_sources.values(), *self.segment_sources.values()]


class Run:
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
        options: Options,
        parameters: list[Tensor] | None,
        sync: Callable[[bool], None] = lambda last: None,
    ):
        self.cell = cell
        self.segments = [Leaves(segment) for segment in segments]
        self.initial = self.memory = memory_leaves(memory, "the initial memory")
        self.in_place = parameters is None
        self.parameters = parameters or []
        self.parameter_versions = [version(p) for p in self.parameters]
        given = [x for part in (self.initial, *self.segments) for x in part.tensors()]
        self.inputs = self.parameters + [x for x in given if x.requires_grad]
        self.environment = Environment([*self.parameters, *given])
        self.plan = self._plan(options.schedule)
        self.shelf = Shelf(self.plan)
        self.graphs: dict[int, Graph] = {}
        self.recording = True
        self.spent = False
        self.recorded: list[_Recorded] = []
        self.kept: list[list[Any]] | None = [] if options.check else None
        self.sync = sync
        self.watch = options.memory_gradients
        if self.watch is not None:
            self.watch.start(len(segments))

    def _plan(self, schedule: Schedule) -> Plan:
        count = len(self.segments)
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
        self.parameter_grads = GradientSums(self.parameters)
        self.segment_grads: list[Tensor | None] = []
        self._carry_to(len(self.segments), list(output_grads[ends[-1] :]))
        with self.environment.random_numbers_kept():
            for action in self.plan.replay:
                self._do(action)
        self.memory = self.initial
        of_memory = [g for g, leaf in zip(self.carry, self.initial.leaves, strict=True) if requires_grad(leaf)]
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
        if self.parameter_versions != [version(p) for p in self.parameters]:
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
            return call_cell(self.cell, segment, memory)
        if self.memory.changed() or self.segments[t].changed():
            raise RuntimeError(
                f"segment {t} or the memory before it was changed in place after it was recorded, so it cannot be "
                "replayed. Call backward first, or change a clone."
            )
        with self.environment.autocast_restored():
            return call_cell(self.cell, segment, memory)

    def _step(self, t: int, value: Tree, memory: Tree) -> list[Any]:
        """Stand before segment ``t + 1``. Returns the leaves of the value of ``t``."""
        if self.memory.changed():
            raise ValueError(
                f"the cell changed its memory in place in segment {t}, and replay needs that memory again. "
                "Return a new tensor: use out-of-place operations, or work on a clone."
            )
        of_value = Leaves(detach(value))
        self.memory = memory_leaves(detach(memory), f"the memory after segment {t}")
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
        segment, segment_sources = self.segments[t].cut(requires_grad)
        memory, memory_sources = self.memory.cut(carries_grad if t else requires_grad)
        with torch.enable_grad():
            value, after = self._call_cell(t, segment, memory)
        graph = self.graphs[t] = Graph(tree_leaves((value, after)), memory_sources, segment_sources)
        if not self.in_place:
            outputs = [x for x in graph.outputs if isinstance(x, Tensor)]
            check_reach(self.cell, outputs, [*self.parameters, *graph.sources()])
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
        pairs = [(x, g) for x, g in outputs if g is not None and requires_grad(x)]
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


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rollout: Run, *inputs: Tensor) -> tuple[Any, ...]:
        ctx.rollout = rollout
        ctx.set_materialize_grads(False)
        leaves = rollout.record()
        ctx.mark_non_differentiable(*(x for x in leaves if isinstance(x, Tensor) and not carries_grad(x)))
        return tuple(leaves)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Any, ...]:
        refuse_double_backward()
        return (None, *ctx.rollout.replay(output_grads))


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
