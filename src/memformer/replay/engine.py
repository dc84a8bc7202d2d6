"""The critical path: record, then replay."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from .boundary import detach
from .environment import Environment
from .fingerprint import Fingerprint, check_same
from .gradients import GradientSums, explain, refuse_double_backward
from .inputs import (
    Cell,
    Grads,
    Leaves,
    Readout,
    Tree,
    call_cell,
    call_readout,
    carries_grad,
    check_leaves,
    requires_grad,
    version,
)
from .options import Options
from .reach import Reach, check_hooks
from .schedules import Action, Plan, Schedule
from .segments import Segments
from .sizes import measure
from .storage import Compact, Shelf
from .world import BufferState, World


@dataclass
class Graph:
    """One segment's graph: the leaves of its value and memory, and what it starts from.

    ``parameters`` are those that it reaches, by position; ``sources`` the leaves of memory and segment, by position.
    """

    outputs: list[object]
    parameters: list[int]
    memory_sources: dict[int, Tensor]
    segment_sources: dict[int, Tensor]

    def sources(self) -> list[Tensor]:
        return [*self.memory_sources.values(), *self.segment_sources.values()]


_WANTS_A_GRAPH = ("does not require grad", "doesn't require gradient", "has requires_grad=False")
"""What torch says of a tensor without a graph where a cell differentiates something itself, or puts a hook on one."""


class Inside(NamedTuple):
    """A readout that is a part of the cell: its loss stands in place of the segment's value."""

    readout: Readout
    weights: list[float] | None

    def loss(self, t: int, value: Tree, segment: Tree) -> Tensor | None:
        """The loss of segment ``t``, weighed."""
        return call_readout(self.readout, [value], [segment], self.weights and self.weights[t : t + 1])


class Run:
    """A rollout in progress: carries out the actions of a plan, those of forward and then those of backward.

    It stands before some segment, with ``memory`` as it is there, and in backward with ``carry``, the loss's gradient
    by each leaf of the memory after the segment that is next. ``parameters`` are None where gradients are added to
    ``.grad`` on the spot (:func:`accumulate`); ``owned`` and ``captured`` hold the modules whose modes and
    buffers the cell sees. With ``inside`` the losses are the values, and whatever the readout is and trains is to be
    among these, too. A cell that is ``alone`` has no readout behind it, which could be all that a loss is to train.
    """

    def __init__(
        self,
        cell: Cell,
        segments: Segments,
        memory: Tree,
        options: Options,
        parameters: list[Tensor] | None,
        owned: Sequence[object],
        captured: Sequence[nn.Module] = (),
        sync: Callable[[bool], None] | None = None,
        inside: Inside | None = None,
        alone: bool = True,
    ):
        self.cell, self.inside, self.alone = cell, inside, alone
        self.segments = segments
        self.initial = self.memory = Leaves(memory)
        check_leaves(self.initial, "the initial memory")
        self.initial_wants = list(map(requires_grad, self.initial.leaves))  # whatever is done to them until backward
        self.in_place = parameters is None
        self.loss_has_graph = True  # of a readout inside, where the cell has one
        self.first_sources: list[Tensor] = []  # where the graph of the first segment's recording starts
        self.measured: tuple[int, Fingerprint] | None = None
        self.parameters = parameters or []
        self.reach = Reach([cell, *([] if inside is None else [inside.readout])], self.parameters)
        given = [*self.initial.tensors(), *segments.tensors()]
        self.inputs = self.parameters + [x for x in given if x.requires_grad]
        used = [p for owner in owned if isinstance(owner, nn.Module) for p in owner.parameters()]  # tell the devices
        self.sharded = any(hasattr(p, "placements") for p in used)  # by FSDP, which expects a backward of each graph
        self.environment = Environment([*self.parameters, *used, *given, *segments.first().tensors()])
        leaves = {id(p): p for p in (*self.parameters, *used) if p.is_leaf}
        self.grads_before = [(p, p.grad, version(p.grad)) for p in leaves.values()]
        self.differentiable = self.environment.grad_enabled and bool(self.in_place or self.inputs)
        self.world = World(owned, self.parameters, captured=captured, watch_parameters=not self.in_place)
        self.plan = self._plan(options.schedule, options.measure_at or 0)
        if self.differentiable:  # the recording, too, may run segments again
            self.world.watch_buffers()
        self.runs_again = any(action.kind in ("advance", "graph") for action in self.plan.replay)
        if self.runs_again:
            self.world.refuse_masks_of_cudnn()
        self.glance_at = next((action.segment for action in self.plan.replay if action.kind == "graph"), None)
        self.shelf = Shelf(self.plan)
        self.compact = Compact([*self.parameters, *given])
        self.returned = self.memory  # the same before it was made compact
        self.buffers: dict[int, BufferState] = {}
        self.graphs: dict[int, Graph] = {}
        self.recording = True
        self.casts_lack_graphs = True  # of the weights that autocast has converted and kept
        self.watch = options.memory_gradients
        self.records_with_graph = False
        self.carrying: list[list[bool]] | None = None  # which leaves of a memory need a gradient, once that is known
        several = self.watch is not None and len(self.initial.tensors()) != 1  # of which some may be constant
        if self.environment.grad_enabled and (several or not self.differentiable or self.world.has_a_fast_path()):
            self.records_with_graph, self.carrying = True, [self.initial_wants]
        self.spent = self.arrived = False
        self.recorded: list[_Recorded] = []
        self.kept: list[list[object]] | None = [] if options.check else None
        # A segment that is run again for its memory alone needs no loss, unless that draws numbers for what comes next.
        again = inside is not None and any(action.kind == "advance" for action in self.plan.replay)
        self.loss_leaves_no_trace = again and self.kept is None
        self.sync = sync
        if self.watch is not None:
            self.watch.start(len(segments))

    def _plan(self, schedule: Schedule, measure_at: int) -> Plan:
        count = len(self.segments)
        if not self.differentiable:
            forward = tuple(Action("advance", t) for t in range(count))
            return Plan(num_segments=count, recording=forward, replay=())
        if measure_at >= count:
            raise ValueError(f"measure_at: expected one of the {count} segments, counted from 0, got {measure_at}")
        if not schedule.needs_sizes:
            return schedule.plan(count)
        self.world.watch_buffers()
        cell: Cell = self.cell
        if self.inside is not None:
            cell = functools.partial(_judged, cell, *self.inside)
        with self.world.restored(), self.environment.random_numbers_kept():
            memory = self.initial.tree()
            for t in range(measure_at):
                with torch.enable_grad():  # a cell may differentiate something itself
                    _, memory = call_cell(self.cell, self.segments.tree(t), detach(memory))
                self.world.look_closely()
            outcomes: list[Tree] = []
            cell = functools.partial(_noted, cell, outcomes)
            sizes = measure(cell, self.segments[measure_at].tree(), memory, params=self.parameters)
        self.segments.draw_again()
        if self.inside is None or measure_at == 0:  # otherwise a loss may have drawn numbers before
            self.measured = measure_at, Fingerprint(Leaves(outcomes[-1]).leaves, self.environment.precision)
        return schedule.plan(count, *sizes)

    # Forward

    def record(self) -> list[object]:
        """The forward pass. Returns the leaves of all values and of the final memory."""
        values: list[object] = []
        self.start = self.environment.random_state(), self.world.buffer_state()
        for action in self.plan.recording:
            values += self._do(action)
        # A weight that autocast converted here must not serve others: it may lack a graph, or keep ours alive.
        torch.clear_autocast_cache()
        self.world.check_recorded(self.runs_again)
        self._check_no_backward_inside()
        self.recording, self.casts_lack_graphs = False, True
        self.segments.let_go()
        leaves = values + self.memory.leaves
        self.memory = self.returned = self.initial
        return leaves

    def _check_no_backward_inside(self) -> None:
        """ValueError if the cell has called backward, and is run more than once."""
        ran_again = self.runs_again or self.measured is not None or self.carrying is not None
        if ran_again and any(p.grad is not grad or version(p.grad) != before for p, grad, before in self.grads_before):
            raise ValueError(
                "the cell itself calls backward: a parameter's gradient changed while it was recorded, and each replay "
                "would add to it again. Return that loss with the value, or keep all graphs "
                "(schedule=EveryMemory(graphs=len(segments)), or replay.full_bptt)."
            )
        del self.grads_before

    def outputs(self, leaves: Sequence[object]) -> tuple[list[Tree], Tree]:
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
        if self.spent:
            raise RuntimeError(
                "this rollout was already back-propagated (or its backward was begun, and failed) and its memories are "
                "freed. If a later rollout started from "
                "its memory, cut there: start from replay.detach(rollout.memory). Otherwise call backward once, on the "
                "sum of the losses."
            )
        self.spent = True
        ends = list(itertools.accumulate(recorded.value.num_leaves for recorded in self.recorded))
        self.value_grads = [list(output_grads[a:b]) for a, b in itertools.pairwise([0, *ends])]
        self.segment_grads: list[Grads] = []
        self._carry_to(len(self.segments), list(output_grads[ends[-1] :]))
        self.parameter_grads = GradientSums(self.parameters)
        # Where FSDP gathers the weights for each segment, they are not to be kept in another form.
        kept = contextlib.nullcontext() if self.in_place else self.environment.casts_kept()
        with self.world.restored(), self.environment.random_numbers_kept(), kept, self.parameter_grads:
            for action in self.plan.replay:
                self._do(action)
        if self.alone and not self.arrived and any(grad is not None for grad in output_grads):
            warnings.warn(
                "no gradient reaches the cell: everything that it returned is detached (a detach, torch.no_grad or "
                ".data inside?)",
                stacklevel=2,
            )
        of_memory = itertools.compress(self.carry, self.initial_wants)
        of_segments = [grad for grads in reversed(self.segment_grads) for grad in grads]
        grads = [*self.parameter_grads.totals(), *of_memory, *of_segments]
        # Held by nobody else, a gradient becomes the parameter's .grad without a copy.
        del self.parameter_grads, self.carry, self.segment_grads, self.value_grads
        # Whoever keeps the loss, to log it, does not keep the texts.
        del self.segments, self.initial, self.memory, self.returned, self.inputs, self.compact, self.start, self.kept
        del self.first_sources
        return grads

    # The actions

    def _do(self, action: Action) -> list[object]:
        """Carry out one action. Returns the leaves of the value that it computed, if any."""
        kind, t = action
        if kind == "store":
            self.shelf.put(t, self.memory, self.environment.random_state())
            self.buffers[t] = self.world.buffer_state()
        elif kind == "load":
            self.memory = self.returned = self.shelf.get(t)
            self.segments.draw_again()
            self.environment.set_random_state(self.shelf.random_states[t])
            self.world.put_buffers(self.buffers[t])
        elif kind == "drop":
            self.shelf.drop(t)
            del self.buffers[t]
        elif kind == "advance":
            return self._advance(t)
        elif kind == "graph" and self._needs_graph(t):
            return self._build_graph(t)
        elif kind == "backward":
            self._back_propagate(t)
        return []

    def _advance(self, t: int) -> list[object]:
        """Run segment ``t`` without a graph."""
        with_loss = self.recording or not self.loss_leaves_no_trace
        if self.records_with_graph:
            return self._advance_in_grad_mode(t, with_loss)
        try:
            if self.recording and t == 0 and self.differentiable and not self.sharded:
                # What a cell computes there and keeps (a weight, a context) has a graph, as by plain autograd. By that
                # it is seen in later segments.
                self.loss_has_graph = False
                return self._advance_in_grad_mode(t, with_loss)
            self.casts_lack_graphs = True
            with torch.no_grad():
                value, after = self._call_cell(t, self.segments.tree(t), self.memory.tree(), with_loss)
        except RuntimeError as error:
            if not self.recording or not any(text in str(error) for text in _WANTS_A_GRAPH):
                raise
            self.loss_has_graph = True
            self._run_up_to(t)
            self.records_with_graph = True  # a cell that differentiates something itself
            return self._advance_in_grad_mode(t, with_loss)
        finally:
            self.loss_has_graph = True
        return self._step(t, value, after, self.compact.copy, with_loss)

    def _advance_in_grad_mode(self, t: int, with_loss: bool) -> list[object]:
        """The same for a cell that needs grad mode, and where nothing is known that could need a gradient."""
        self._forget_casts_without_graphs()
        with torch.enable_grad(), _explaining_changes_in_place(t):
            value, after, *sources = self._call_cut(t, with_loss)
        if not self.differentiable:  # a tensor that the cell captured may need one nevertheless
            self.reach([*value.leaves, *after.leaves], list(sources[0].values()))
        if self.recording and t == 0:
            self.first_sources = [x for found in sources for x in found.values()]
        return self._step(t, value, after, self.compact.copy, with_loss)

    def _build_graph(self, t: int) -> list[object]:
        """Run segment ``t`` with a graph that starts at the memory before it."""
        self._forget_casts_without_graphs()
        self.segments.fetch(t)  # an error in it is not the cell's
        with torch.enable_grad(), _explaining_changes_in_place(t):
            try:
                value, after, memory_sources, segment_sources = self._call_cut(t)
            except (RuntimeError, AssertionError, BufferError) as error:
                if isinstance(error, torch.OutOfMemoryError) or not self._learn_what_carries(t):
                    raise
                value, after, memory_sources, segment_sources = self._call_cut(t)
        self.world.refuse_graphs_in_buffers()
        graph = Graph(value.leaves + after.leaves, [], memory_sources, segment_sources)
        if self.in_place:
            check_hooks(graph.outputs)
        else:
            graph.parameters = self.reach(graph.outputs, graph.sources(), self.first_sources)
        self.graphs[t] = graph
        if self.recording and t == 0:
            self.first_sources = graph.sources()
        return self._step(t, value, after)

    def _forget_casts_without_graphs(self) -> None:
        """Of the weights that autocast has converted and kept; several segments' graphs may share what has one."""
        if self.casts_lack_graphs or self.in_place:
            torch.clear_autocast_cache()
            self.casts_lack_graphs = False

    def _call_cut(self, t: int, with_loss: bool = True) -> tuple[Leaves, Leaves, dict[int, Tensor], dict[int, Tensor]]:
        """Call the cell on copies cut from their graphs. Also returns the leaves of both where its graph starts."""
        segment, segment_sources = self.segments.cut(t)
        if self.carrying is not None and t < len(self.carrying):
            memory, memory_sources = self.memory.cut(self.carrying[t])
        else:
            memory, memory_sources = self.memory.cut(carries_grad if t else self.initial_wants)
        value, after = self._call_cell(t, segment, memory, with_loss)
        if self.carrying is not None and len(self.carrying) == t + 1:
            self.carrying.append([requires_grad(leaf) for leaf in after.leaves])
        return value, after, memory_sources, segment_sources

    def _call_cell(self, t: int, segment: Tree, memory: Tree, with_loss: bool) -> tuple[Leaves, Leaves]:
        """The leaves of value and memory, taken apart in the grad mode of the call."""
        if not self.recording and (self.memory.changed() or self.segments[t].changed()):
            raise RuntimeError(
                f"segment {t} or the memory before it was changed in place, by the cell itself or after it was "
                "recorded, so it cannot be replayed. Change a clone, or call backward first."
            )
        with self.environment.restored():
            value, after = self._call_user(t, segment, memory, with_loss)
            return Leaves(value), Leaves(after)

    def _call_user(self, t: int, segment: Tree, memory: Tree, with_loss: bool = True) -> tuple[Tree, Tree]:
        """The cell, and the readout where it is a part of it and its loss is asked for."""
        value, after = call_cell(self.cell, segment, memory)
        if self.inside is None:
            return value, after
        if not with_loss:
            return None, after
        with contextlib.nullcontext() if self.loss_has_graph else torch.no_grad():
            return self._loss(self.inside, t, value, segment), after

    def _loss(self, inside: Inside, t: int, value: Tree, segment: Tree) -> Tensor | None:
        if not (self.recording and self.loss_leaves_no_trace):
            return inside.loss(t, value, segment)
        (random, buffers), loss = self._trace(), inside.loss(t, value, segment)
        random_after, buffers_after = self._trace()
        same = all(map(torch.equal, random, random_after)) and all(map(_is_same_state, buffers, buffers_after))
        self.loss_leaves_no_trace = same
        return loss

    def _trace(self) -> tuple[list[Tensor], BufferState]:
        """What a readout could change for the cell."""
        return self.environment.random_state(), self.world.buffer_state()

    def _learn_what_carries(self, t: int) -> bool:
        """Which leaves of the memories up to ``t`` need a gradient, asked if the cell cannot have one for some of them.

        It runs the segments before ``t`` again, each with a graph, and leaves everything as it is before ``t``. False
        if there is nothing to learn: so far every leaf of a floating point type was made to require a gradient.
        """
        if self.carrying is not None or t == 0 or not any(map(carries_grad, self.memory.tensors())):
            return False
        self._run_up_to(t)
        return True

    def _run_up_to(self, t: int) -> None:
        """Run the segments before ``t`` again, each with a graph: so ``carrying`` is known up to the memory there."""
        here, self.memory = self.memory, self.initial
        random, buffers = self.start
        self.environment.set_random_state(random)
        self.world.put_buffers(buffers)
        self.carrying = [self.initial_wants]
        with torch.enable_grad():
            for s in range(t):
                _, after, *_ = self._call_cut(s)
                self.memory = after.detached()
        self.memory = here

    def _step(
        self,
        t: int,
        value: Leaves,
        after: Leaves,
        keep: Callable[[Leaves], Leaves] | None = None,
        with_loss: bool = True,
    ) -> list[object]:
        """Stand before segment ``t + 1``. Returns the leaves of the value of ``t``.

        Without a graph, which holds what they are views of anyway, ``keep`` makes both what is kept. Where no loss was
        asked for, there is no value to compare with the recorded one.
        """
        if self.memory.changed() or (self.returned is not self.memory and self.returned.changed()):
            raise ValueError(
                f"the cell changed its memory in place in segment {t}, and replay needs that memory again. "
                "Return a new tensor: use out-of-place operations, or work on a clone."
            )
        recorded = _Recorded(value.spec if with_loss else self.recorded[t].value, after.spec)
        value, self.memory = value.detached(), after.detached()
        self.returned = self.memory
        if keep is not None:
            value, self.memory = keep(value), keep(self.memory)
        leaves = value.leaves + self.memory.leaves
        if self.recording:
            if t == 0:
                self.world.look_closely()
            check_leaves(value, f"the value of segment {t}", is_value=True)
            check_leaves(self.memory, f"the memory after segment {t}")
            if self.measured is not None and t == self.measured[0]:  # which a state of the cell's own would show in
                self.measured[1].check(t, self.memory.leaves)
            self.recorded.append(recorded)
            if self.kept is not None:
                self.kept.append([*value.detached().leaves, *self.memory.detached().leaves])  # not what autograd gets
            elif t == self.glance_at:
                self.glance = Fingerprint(leaves, self.environment.precision)
        elif recorded != self.recorded[t]:
            raise RuntimeError(
                f"segment {t} returned other leaves in replay than when it was recorded: {recorded}, was "
                f"{self.recorded[t]}. The cell is not a function of segment and memory alone."
            )
        elif self.kept is not None:
            check_same(t, leaves, self.kept[t])
        elif t == self.glance_at:
            self.glance.check(t, leaves)
        return value.leaves

    def _needs_graph(self, t: int) -> bool:
        """Whether a gradient could come to segment ``t``, as far as is known before those after it are through; and the
        one that is compared with its recording."""
        if self.recording or t == self.glance_at or t + 1 != self.boundary:
            return True
        return any(grad is not None for grad in (*self.value_grads[t], *self.carry))

    def _back_propagate(self, t: int) -> None:
        """From the gradients by segment ``t``'s outputs to those by what its graph starts from; frees the graph."""
        graph = self.graphs.pop(t, None)
        before = self.recorded[t - 1].memory if t else self.initial.spec
        of_memory: Grads = [None] * before.num_leaves
        of_segment: Grads = [None] * self.segments.gradients(t)
        outputs = [] if graph is None else zip(graph.outputs, [*self.value_grads[t], *self.carry], strict=True)
        pairs = [(x, g) for x, g in outputs if g is not None and requires_grad(x)]
        if graph is not None and pairs:
            self.arrived = True
            grads = self._gradients(graph, [x for x, _ in pairs], [g for _, g in pairs], last=t == 0)
            for i, grad in zip(graph.memory_sources, grads, strict=False):
                of_memory[i] = grad
            of_segment = grads[len(graph.memory_sources) :]
        elif self.sync is not None and t == 0:
            raise ValueError(
                "accumulate: no gradient reaches the first segment, so the gradients were not synchronised"
            )
        self.segment_grads.append(of_segment)
        self._carry_to(t, of_memory)

    def _gradients(self, graph: Graph, outputs: list[Tensor], upstream: list[Tensor], last: bool) -> Grads:
        """The gradients by the graph's sources; those of the parameters are added up."""
        sources = graph.sources()
        if not self.in_place:
            return self.parameter_grads.differentiate(outputs, upstream, graph.parameters, sources)
        if self.sync is not None:
            self.sync(last)
        try:
            torch.autograd.backward(outputs, upstream)
        except RuntimeError as error:
            explain(error)
            raise
        return [source.grad for source in sources]

    def _carry_to(self, boundary: int, grads: Grads) -> None:
        if self.watch is not None:
            if self.carrying is not None and boundary < len(self.carrying):
                both = zip(grads, self.carrying[boundary], strict=True)
                grads = [grad if carries else None for grad, carries in both]
            grads = self.watch.passing(boundary, grads)
        self.carry = grads
        self.boundary = boundary


@contextlib.contextmanager
def _explaining_changes_in_place(t: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "a leaf Variable that requires grad is being used in an in-place operation" not in str(error):
            raise
        raise ValueError(
            f"{error}\nIn a replay each segment begins a graph of its own. The cell changed its memory, or an input, "
            f"in place in segment {t}: use out-of-place operations, or work on a clone."
        ) from error


def _noted(cell: Cell, outcomes: list[Tree], segment: Tree, memory: Tree) -> tuple[Tree, Tree]:
    """What the cell gives; the memory is added to the outcomes. A partial of this says whom it trains."""
    value, memory = call_cell(cell, segment, memory)
    outcomes.append(detach(memory))
    return value, memory


def _judged(
    cell: Cell, readout: Readout, weights: list[float] | None, segment: Tree, memory: Tree
) -> tuple[Tensor | None, Tree]:
    """The first segment's loss and the memory after it; a partial of this says whom it trains."""
    value, memory = call_cell(cell, segment, memory)
    return Inside(readout, weights).loss(0, value, segment), memory


def _is_same_state(before: tuple[object, object], after: tuple[object, object]) -> bool:
    return before[0] is after[0] and before[1] is after[1]


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
