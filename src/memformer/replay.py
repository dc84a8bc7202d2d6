"""Memory replay back-propagation (MRBP) for any recurrent cell: exact gradients, one segment's graph alive at a time.

A *cell* maps ``(segment, memory)`` to ``(value, memory)``. Three functions run it over a rollout and agree in every number:

- :func:`full_bptt` is plain autograd: the reference, whose graph grows with the number of segments;
- :func:`memory_replay` records the memories without a graph, then replays segment by segment (paper, Algorithm 1);
- :func:`scan` does the same for outputs that are used further downstream.

Memories, segments and values are pytrees of tensors (tuples, lists, dicts, ``None``). This file imports torch alone.

How it works. One ``torch.autograd.Function`` has the parameters, the initial memory and the segments as inputs, so that
each gradient leaves it once: an optimiser, a gradient scaler, clipping and DistributedDataParallel see an ordinary loss.
Its forward keeps the memory before each segment; only the last segment is run with a graph, and is not computed twice.
Its backward walks from the last segment to the first and frees each graph before it builds the next.

What is not known here: whether replaying a cell gives the same numbers as recording it. Random numbers of torch's
own generators and autocast are put back; a cell that keeps other state of its own (a Python counter, BatchNorm's running
statistics, a private ``torch.Generator``) is outside what can be replayed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Rollout", "detach", "full_bptt", "memory_replay", "scan"]

Tree = Any
"""A pytree: a tensor, or tuples, lists and dicts of them; ``None`` and plain numbers are allowed as leaves."""

Cell = Callable[[Tree, Tree], tuple[Tree, Tree]]
Readout = Callable[[list[Tree], list[Tree]], "Tensor | None"]
Params = Iterable["Tensor | nn.Module"]


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


def detach(memory: Tree) -> Tree:
    """The same memory, cut from the graph: the boundary between two rollouts in truncated BPTT."""
    leaves, spec = tree_flatten(memory)
    return tree_unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def full_bptt(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    readout: Readout | None = None,
    *,
    readout_segments: int = 1,
    params: Params = (),
) -> Rollout:
    """Back-propagation through time by plain autograd: the reference that :func:`memory_replay` equals.

    Arguments, result and errors are those of :func:`memory_replay`; ``params`` is accepted and not needed.
    """
    segments = _segment_list(segments)
    values = []
    for segment in segments:
        value, memory = _call(cell, segment, memory)
        values.append(value)
    if readout is None:
        return Rollout(_sum_of_losses(values), memory)
    losses = [_call_readout(readout, *chunk) for chunk in _chunks(values, segments, readout_segments)]
    return Rollout(_sum_of_losses(losses), memory)


def memory_replay(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    readout: Readout | None = None,
    *,
    readout_segments: int = 1,
    params: Params = (),
) -> Rollout:
    """Run ``cell`` over ``segments`` with the gradients of BPTT and the graph of one segment (paper, Algorithm 1, MRBP).

    Args:
        cell: ``cell(segment, memory) -> (value, memory)``. Without ``readout``, ``value`` is the segment's scalar loss or
            ``None``. An ``nn.Module``, a method bound to one, or a ``functools.partial`` of these; a plain function must
            name what it trains in ``params``.
        segments: one pytree per segment.
        memory: the memory before the first segment, a pytree; may be ``None`` if the cell then makes its own.
        readout: ``readout(values, segments) -> scalar loss or None`` over lists of equal length. What only the loss needs
            (a decoder) belongs here: it is off the critical path, so it runs once, and never while memories are recorded.
        readout_segments: how many segments one call of ``readout`` gets; the losses of the calls are added. More is
            faster on short segments, and the readout's graph grows with it.
        params: further tensors or modules that ``cell`` or ``readout`` use and that are to be trained.

    Raises:
        ValueError: no segments, no loss anywhere, a loss that is not a scalar, a tensor that needs a gradient and would
            get none (its name is given), a memory changed in place, a cell wrapped in DistributedDataParallel.
        RuntimeError: in backward, if the rollout was already back-propagated or its tensors were changed since.
    """
    segments = _segment_list(segments)
    values, memory = scan(cell, segments, memory, params=params)
    if readout is None:
        return Rollout(_sum_of_losses(values), memory)
    return Rollout(_read_out(readout, values, segments, readout_segments, params), memory)


def scan(cell: Cell, segments: Sequence[Tree], memory: Tree, *, params: Params = ()) -> tuple[list[Tree], Tree]:
    """Run ``cell`` over ``segments``; the outputs stay differentiable, by replay.

    Returns ``(values, memory)``: one value per segment and the final memory. Any loss on any of them has the gradients
    of plain autograd, and models may be put in series. The values are kept, their graphs are not.
    Arguments and errors are those of :func:`memory_replay`.
    """
    recording = _Recording(cell, _segment_list(segments), memory, _trained_tensors(cell, params))
    return recording.outputs(_Replay.apply(recording, *recording.inputs))  # type: ignore[no-untyped-call]


# --- The critical path: record, then replay ----------------------------------------------------------------------------


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
        """The tree with its tensors cut from their graph, and by position those of them that now collect a gradient."""
        leaves, sources = list(self.leaves), {}
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                leaves[i] = leaf.detach()
                if wants_grad(leaf):
                    sources[i] = leaves[i].requires_grad_()
        return tree_unflatten(leaves, self.spec), sources


@dataclass
class _Graph:
    """One segment's graph: its outputs, and the leaves it starts from besides the parameters."""

    value: _Leaves
    memory: _Leaves
    memory_sources: dict[int, Tensor]
    segment_sources: dict[int, Tensor]


class _Recording:
    """A rollout's inputs, the memory before each of its segments, and what else it takes to run a segment again."""

    def __init__(self, cell: Cell, segments: list[Tree], memory: Tree, parameters: list[Tensor]):
        self.cell = cell
        self.parameters = parameters
        self.parameter_versions = [_version(p) for p in parameters]
        self.segments = [_Leaves(segment) for segment in segments]
        self.memories = [_memory_leaves(memory, "the initial memory")]
        self.values: list[_Leaves] = []
        self.random_states: list[list[Tensor]] = []
        self.last_graph: _Graph | None = None
        self.spent = False
        given = [x for part in (self.memories[0], *self.segments) for x in part.tensors()]
        self.inputs = parameters + [x for x in given if x.requires_grad]
        self.environment = _Environment([*parameters, *given])

    def record(self) -> list[Any]:
        """Run every segment, the last one with its graph. Returns the leaves of all values and of the final memory."""
        last = len(self.segments) - 1
        for t in range(last):
            self.random_states.append(self.environment.random_state(self.random_states))
            with torch.no_grad():
                self._keep(t, *_call(self.cell, self.segments[t].tree(), self.memories[t].tree()))
        # A weight that autocast converted without a graph must not serve the segment that has one.
        torch.clear_autocast_cache()
        if self.environment.grad_enabled:
            self.last_graph = self.graph(last)
            self._keep(last, self.last_graph.value.tree(), self.last_graph.memory.tree())
        else:
            self._keep(last, *_call(self.cell, self.segments[last].tree(), self.memories[last].tree()))
        return [leaf for part in (*self.values, self.memories[-1]) for leaf in part.leaves]

    def _keep(self, t: int, value: Tree, memory: Tree) -> None:
        if self.memories[t].changed():
            raise ValueError(
                f"the cell changed its memory in place in segment {t}, and replay needs that memory again. "
                "Return a new tensor: use out-of-place operations, or work on a clone."
            )
        self.values.append(_Leaves(detach(value)))
        self.memories.append(_memory_leaves(detach(memory), f"the memory after segment {t}"))

    def outputs(self, leaves: Sequence[Any]) -> tuple[list[Tree], Tree]:
        """The trees of :meth:`record`'s leaves, after these went through the autograd function."""
        trees, start = [], 0
        for part in (*self.values, self.memories[-1]):
            trees.append(tree_unflatten(leaves[start : start + len(part.leaves)], part.spec))
            start += len(part.leaves)
        return trees[:-1], trees[-1]

    def graph(self, t: int) -> _Graph:
        """Run segment ``t`` with a graph that starts at the memory before it."""
        segment, segment_sources = self.segments[t].cut(lambda x: x.requires_grad)
        memory, memory_sources = self.memories[t].cut(_carries_grad if t else lambda x: x.requires_grad)
        with torch.enable_grad():
            value, after = map(_Leaves, _call(self.cell, segment, memory))
        graph = _Graph(value, after, memory_sources, segment_sources)
        known = [*self.parameters, *memory_sources.values(), *segment_sources.values()]
        _check_reach(self.cell, value.tensors() + after.tensors(), known)
        return graph

    def replay(self, output_grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Walk from the last segment to the first; returns the gradient of each of ``self.inputs``."""
        self._check_unspent()
        sizes = [len(value.leaves) for value in self.values]
        starts = [sum(sizes[:t]) for t in range(len(sizes) + 1)]
        carry = list(output_grads[starts[-1] :])
        parameter_grads = _GradientSums(len(self.parameters))
        segment_grads: list[list[Tensor | None]] = []
        with self.environment.random_numbers_kept():
            for t in reversed(range(len(self.segments))):
                upstream = [*output_grads[starts[t] : starts[t + 1]], *carry]
                grads, carry, of_segment = self._replay_segment(t, upstream)
                parameter_grads.add(grads)
                segment_grads.append(of_segment)
        of_memory = [g for g, leaf in zip(carry, self.memories[0].leaves, strict=True) if _requires_grad(leaf)]
        return [*parameter_grads.totals, *of_memory, *(grad for grads in reversed(segment_grads) for grad in grads)]

    def _replay_segment(self, t: int, upstream: list[Tensor | None]) -> tuple[list, list, list]:
        """Gradients of the parameters, of all leaves of the memory before ``t``, and of the segment's trained leaves."""
        of_memory: list[Tensor | None] = [None] * len(self.memories[t].leaves)
        of_segment: list[Tensor | None] = [None] * sum(x.requires_grad for x in self.segments[t].tensors())
        nothing = [None] * len(self.parameters), of_memory, of_segment
        graph, self.last_graph = self.last_graph, None
        if all(grad is None for grad in upstream):
            return nothing
        if graph is None:
            if self.memories[t].changed() or self.segments[t].changed():
                raise RuntimeError(
                    f"segment {t} or the memory before it was changed in place after it was recorded, so it cannot be "
                    "replayed. Call backward first, or change a clone."
                )
            with self.environment.restored(self.random_states[t]):
                graph = self.graph(t)
        outputs = graph.value.leaves + graph.memory.leaves
        if len(outputs) != len(upstream):
            raise RuntimeError(
                f"segment {t} returned {len(outputs)} leaves in replay and {len(upstream)} when it was recorded: "
                "the cell is not a function of segment and memory alone."
            )
        pairs = [(x, g) for x, g in zip(outputs, upstream, strict=True) if g is not None and _requires_grad(x)]
        if not pairs:
            return nothing
        sources = [*self.parameters, *graph.memory_sources.values(), *graph.segment_sources.values()]
        grads = torch.autograd.grad(
            [x for x, _ in pairs], sources, [g for _, g in pairs], allow_unused=True, materialize_grads=False
        )
        first = len(self.parameters)
        for i, grad in zip(graph.memory_sources, grads[first:], strict=False):
            of_memory[i] = grad
        return list(grads[:first]), of_memory, list(grads[first + len(graph.memory_sources) :])

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


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, *inputs: Tensor) -> tuple[Any, ...]:
        ctx.recording = recording
        ctx.set_materialize_grads(False)
        leaves = recording.record()
        ctx.mark_non_differentiable(*(x for x in leaves if isinstance(x, Tensor) and not _carries_grad(x)))
        return tuple(leaves)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Any, ...]:
        _refuse_double_backward()
        return (None, *ctx.recording.replay(output_grads))


# --- The readout: off the critical path, so it runs once, with its gradient ----------------------------------------------


class _ReadoutRun:
    """The readout over chunks of segments: its loss, and the gradients of values, segments and parameters.

    The loss is a scalar, so its gradients can be computed at once and only be scaled in backward. In float16 an unscaled
    gradient could underflow before a gradient scaler sees it: there the readout is run again in backward instead.
    """

    def __init__(self, readout: Readout, values: list[Tree], segments: list[Tree], size: int, parameters: list[Tensor]):
        self.readout = readout
        self.parameters = parameters
        self.values = [_Leaves(value) for value in values]
        self.segments = [_Leaves(segment) for segment in segments]
        self.size = size
        parts = [part for pair in zip(self.values, self.segments, strict=True) for part in pair]
        given = [x for part in parts for x in part.tensors()]
        self.inputs = parameters + [x for x in given if x.requires_grad]
        self.environment = _Environment([*parameters, *given])
        self.random_state = self.environment.random_state([])
        self.half = self.environment.uses_float16 or any(x.dtype == torch.float16 for x in self.inputs)
        self.grads: list[Tensor | None] | None = None

    def forward(self) -> Tensor:
        if not self.environment.grad_enabled:
            values, segments = ([part.tree() for part in parts] for parts in (self.values, self.segments))
            return _sum_of_losses([_call_readout(self.readout, *c) for c in _chunks(values, segments, self.size)])
        loss = self.run(None)
        if not self.half:
            self.values = self.segments = []
        return loss

    def run(self, scale: Tensor | None) -> Tensor:
        """The loss; leaves the gradients, times ``scale``, in ``self.grads``."""
        losses: list[Tensor | None] = []
        parameter_grads = _GradientSums(len(self.parameters))
        others: list[Tensor | None] = []
        for values, segments in _chunks(self.values, self.segments, self.size):
            pairs = [
                (value.cut(_requires_grad), part.cut(_requires_grad))
                for value, part in zip(values, segments, strict=True)
            ]
            sources = [x for pair in pairs for _, found in pair for x in found.values()]
            with torch.enable_grad():
                loss = _call_readout(self.readout, [v for (v, _), _ in pairs], [s for _, (s, _) in pairs])
            grads: Sequence[Tensor | None] = [None] * (len(self.parameters) + len(sources))
            losses.append(loss if loss is None else loss.detach())
            if loss is not None:
                _check_reach(self.readout, [loss], [*self.parameters, *sources])
            if loss is not None and loss.requires_grad:
                grads = torch.autograd.grad(loss, [*self.parameters, *sources], scale, allow_unused=True)
            del loss
            parameter_grads.add(grads[: len(self.parameters)])
            others += grads[len(self.parameters) :]
        self.grads = parameter_grads.totals + others
        return _sum_of_losses(losses)

    def backward(self, scale: Tensor) -> list[Tensor | None]:
        if self.half:
            with self.environment.random_numbers_kept(), self.environment.restored(self.random_state):
                self.run(scale)
            self.values = self.segments = []
        grads, self.grads = self.grads, None
        if grads is None:
            raise RuntimeError(
                "this rollout was already back-propagated: call backward once, on the sum of the losses."
            )
        return grads if self.half else [None if grad is None else grad * scale for grad in grads]


class _ReadOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _ReadoutRun, *inputs: Tensor) -> Tensor:
        ctx.run = run
        return run.forward()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        _refuse_double_backward()
        return (None, *ctx.run.backward(scale))


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "backward was called with create_graph=True, but a replayed gradient has no graph of its own. For gradients "
            "of gradients use replay.full_bptt."
        )


# --- The environment of a run: random numbers, autocast, grad mode -------------------------------------------------------


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

    def random_state(self, earlier: Sequence[list[Tensor]]) -> list[Tensor]:
        """The generators' states now; a state equal to the latest earlier one is shared with it."""
        states = [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self.devices)]
        latest = earlier[-1] if earlier else states
        return [old if torch.equal(old, new) else new for old, new in zip(latest, states, strict=True)]

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    @contextlib.contextmanager
    def random_numbers_kept(self) -> Iterator[None]:
        """Replays inside leave the generators as they were."""
        states = self.random_state([])
        try:
            yield
        finally:
            self._set_random_state(states)

    @contextlib.contextmanager
    def restored(self, random_state: list[Tensor]) -> Iterator[None]:
        self._set_random_state(random_state)
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield


# --- What the user handed in -------------------------------------------------------------------------------------------


def _segment_list(segments: Sequence[Tree]) -> list[Tree]:
    if isinstance(segments, (dict, str)) or not isinstance(segments, Iterable):
        raise ValueError(f"segments: expected a sequence with one pytree per segment, got {type(segments).__name__}")
    result = list(segments)
    if not result:
        raise ValueError("segments: expected at least one segment, got none")
    return result


def _memory_leaves(memory: Tree, what: str) -> _Leaves:
    leaves = _Leaves(memory)
    for leaf in leaves.leaves:
        if leaf is not None and not isinstance(leaf, (Tensor, bool, int, float, str)):
            raise ValueError(
                f"{what} holds a {type(leaf).__name__}, through which no gradient could flow: expected a pytree of "
                "tensors (tuples, lists, dicts, None). Register the type with torch.utils._pytree, or return its fields."
            )
    return leaves


def _call(cell: Cell, segment: Tree, memory: Tree) -> tuple[Tree, Tree]:
    result = cell(segment, memory)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        got = f"{len(result)} values" if isinstance(result, (tuple, list)) else type(result).__name__
        raise ValueError(f"a cell returns (value, memory); {_name(cell)} returned {got}")
    return result[0], result[1]


def _call_readout(readout: Readout, values: list[Tree], segments: list[Tree]) -> Tensor | None:
    loss = readout(values, segments)
    if loss is not None and (not isinstance(loss, Tensor) or loss.dim()):
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"a readout returns a scalar loss or None; {_name(readout)} returned {got}")
    return loss


def _sum_of_losses(losses: Sequence[Tensor | None]) -> Tensor:
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
        total = loss if total is None else total + loss
    if total is None:
        raise ValueError("no segment of the rollout has a loss: every value was None")
    return total


def _chunks(values: list[Any], segments: list[Any], size: int) -> Iterator[tuple[list[Any], list[Any]]]:
    if size < 1:
        raise ValueError(f"readout_segments: expected at least 1, got {size}")
    for start in range(0, len(values), size):
        yield values[start : start + size], segments[start : start + size]


def _read_out(readout: Readout, values: list[Tree], segments: list[Tree], size: int, params: Params) -> Tensor:
    run = _ReadoutRun(readout, values, segments, size, _trained_tensors(readout, params))
    return _ReadOut.apply(run, *run.inputs)  # type: ignore[no-untyped-call]


# --- Which tensors are trained, and whether any was forgotten ------------------------------------------------------------


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
                "the cell is wrapped in DistributedDataParallel, which would synchronise once per segment. Wrap instead "
                "the module whose forward calls the replay, and give the replay the bare cell."
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
            f"{_name(function)} uses {names}, which requires a gradient and would get none. Name it in params=[...], "
            "or pass an nn.Module (or a method bound to one) that owns it."
        )


def _describe(function: Any, leaf: Tensor, graph: Container[Any]) -> str:
    """The name under which a callable sees a leaf, or a tensor derived from it, for error messages."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        function = getattr(type(function), "forward", None) or getattr(type(function), "__call__", None)
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


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _carries_grad(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


class _GradientSums:
    """Sums of gradients, one per input; the second summand makes a sum our own, and later ones are added in place.

    Not the first: autograd may hand out tensors that share their storage.
    """

    def __init__(self, count: int):
        self.totals: list[Tensor | None] = [None] * count
        self._own = [False] * count

    def add(self, grads: Sequence[Tensor | None]) -> None:
        for i, grad in enumerate(grads):
            total = self.totals[i]
            if grad is None:
                continue
            if total is None:
                self.totals[i] = grad
            elif self._own[i]:
                total.add_(grad)
            else:
                self.totals[i] = total + grad
                self._own[i] = True
