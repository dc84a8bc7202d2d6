"""The functions that run a cell over segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Unpack

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .boundary import check_equal_across_ranks
from .engine import Inside, Replay, Run
from .gradients import explaining_what_is_cut, watched
from .inputs import (
    Cell,
    Leaves,
    Params,
    Readout,
    Tree,
    call_cell,
    call_readout,
    captured_modules,
    carries_grad,
    chunks,
    owners,
    param_list,
    refuse_inside_wrapped,
    refuse_wrapped,
    requires_grad,
    sum_of_losses,
    trained_tensors,
    weight_list,
)
from .options import OptionKeywords, Options
from .reach import check_hooks, refuse_hooks_of
from .readout import ReadOut, ReadoutRun
from .segments import Segments, segment_list, trees


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


class Method(Protocol):
    """What :func:`memory_replay`, :func:`full_bptt` and :func:`accumulate` have in common: one can replace another."""

    def __call__(
        self,
        cell: Cell,
        segments: Sequence[Tree],
        memory: Tree,
        readout: Readout | None = None,
        *,
        options: Options | None = None,
    ) -> Rollout:
        """Run a rollout."""
        ...


def full_bptt(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    readout: Readout | None = None,
    *,
    options: Options | None = None,
    params: Params = (),
    **keywords: Unpack[OptionKeywords],
) -> Rollout:
    """Back-propagation through time by plain autograd: the reference that :func:`memory_replay` equals.

    Arguments, result and errors are those of :func:`memory_replay`. What a replay alone needs (``params``, the schedule
    and ``check``) changes nothing here, and ``keep_values`` only when the readout runs, and so which random numbers it
    draws.
    """
    options = Options.of(options, keywords)
    segments, watch = segment_list(segments), options.memory_gradients
    weights = weight_list(options.segment_weights, len(segments))
    if watch is not None:
        watch.start(len(segments))
    inside, values = _inside(readout, weights, options), []
    for t, segment in enumerate(segments):
        memory = watched(watch, t, memory)
        value, memory = call_cell(cell, segment, memory)
        values.append(value if inside is None else inside.loss(t, value, segment))
    memory = watched(watch, len(segments), memory)
    if readout is None or inside is not None:
        return Rollout(sum_of_losses(values, None if inside else weights), memory)
    losses = [
        call_readout(readout, values[part], segments[part], weights and weights[part])
        for part in chunks(len(segments), options.readout_segments or 1)
    ]
    return Rollout(sum_of_losses(losses), memory)


def memory_replay(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    readout: Readout | None = None,
    *,
    options: Options | None = None,
    params: Params = (),
    **keywords: Unpack[OptionKeywords],
) -> Rollout:
    """Run ``cell`` over ``segments`` with the gradients of BPTT and few graphs alive (paper, Algorithm 1, MRBP).

    Args:
        cell: ``cell(segment, memory) -> (value, memory)``. Without ``readout``, ``value`` is the segment's scalar loss
            or ``None``. An ``nn.Module``, a method bound to one, or a ``functools.partial`` of these; a plain function
            must name what it trains in ``params``.
        segments: one pytree per segment, in a list (an iterator is made one). Of another object with a length and an
            index, such as a data set that loads what it is asked for, each is fetched when it is needed, in forward and
            again in backward, and one is held at a time. It must be the same each time (a few of its numbers are
            compared), and may not require a gradient.
        memory: the memory before the first segment, a pytree; may be ``None`` if the cell then makes its own.
        readout: ``readout(values, segments) -> scalar loss or None`` over lists of equal length. What only the loss
            needs (a decoder) belongs here: it is off the critical path, so it runs once, and never while memories are
            recorded. With ``keep_values=False`` it runs twice, and no value is kept.
        options: how the gradients travel, see :class:`Options`; its fields are keywords, too.
        params: further tensors or modules that ``cell`` or ``readout`` use and that are to be trained.

    Raises:
        ValueError: no segments, no loss anywhere, a loss that is not a scalar, a tensor that needs a gradient and would
            get none (its name is given), a memory changed in place, a value or memory that is an opaque object, a
            parameter that is lazy or has a tensor hook, a buffer that keeps a graph, forward-mode tangents, a cell
            wrapped in DistributedDataParallel or FSDP. In backward, too, where a segment is first run with a graph.
        RuntimeError: in backward, if the rollout was already back-propagated, its tensors were changed since, gradients
            of gradients are asked for, a replayed segment differs from its recording, or something that the cell uses
            cannot be back-propagated once per segment.
    """
    options = Options.of(options, keywords)
    parts = Segments(segments)
    weights = weight_list(options.segment_weights, len(parts))
    params = param_list(params)
    inside = _inside(readout, weights, options)
    values, memory = _replayed(cell, parts, memory, options, params, inside, alone=readout is None)
    if readout is None or inside is not None:
        return Rollout(sum_of_losses(values, None if inside else weights), memory)
    trained, owned = trained_tensors(readout, params), owners(readout, params)
    run = ReadoutRun(readout, values, parts, options.readout_segments or 1, weights, trained, owned)
    return Rollout(ReadOut.apply(run, *run.inputs), memory)  # type: ignore[no-untyped-call]


def scan(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    *,
    options: Options | None = None,
    params: Params = (),
    **keywords: Unpack[OptionKeywords],
) -> tuple[list[Tree], Tree]:
    """Run ``cell`` over ``segments``; the outputs stay differentiable, by replay.

    Returns ``(values, memory)``: one value per segment and the final memory. Any loss on any of them has the gradients
    of plain autograd, and models may be put in series. The values are kept, their graphs are not.
    Arguments and errors are those of :func:`memory_replay`; there is no readout here and no loss, so that options for
    these are a ``ValueError``.
    """
    options = Options.of(options, keywords)
    if any(x is not None for x in (options.segment_weights, options.readout_segments, options.keep_values)):
        raise ValueError(
            "scan: has no loss to weigh and no readout, so expected neither segment_weights nor readout_segments or "
            "keep_values. Weigh the losses that you make of its outputs, or use memory_replay"
        )
    return _replayed(cell, Segments(segments), memory, options, params)


def _replayed(
    cell: Cell,
    segments: Segments,
    memory: Tree,
    options: Options,
    params: Params,
    inside: Inside | None = None,
    alone: bool = True,
) -> tuple[list[Tree], Tree]:
    params, seen = _trained(cell, params, inside)
    trained, owned = trained_tensors(cell, params), owners(cell, params)
    run = Run(cell, segments, memory, options, trained, owned, seen, inside=inside, alone=alone)
    return run.outputs(Replay.apply(run, *run.inputs))  # type: ignore[no-untyped-call]


def _inside(readout: Readout | None, weights: list[float] | None, options: Options) -> Inside | None:
    """The readout as a part of the cell, where the options say so; ValueError without one, and if it is no function."""
    if readout is not None and not callable(readout):
        raise ValueError(
            f"readout: expected a function of values and segments, got {readout!r}; a schedule is given by schedule="
        )
    if readout is None and (options.readout_segments, options.keep_values) != (None, None):
        raise ValueError(
            "readout_segments, keep_values: say how a readout runs, and there is none: leave them out, or pass readout="
        )
    return None if readout is None or options.keep_values is not False else Inside(readout, weights)


def _trained(cell: Cell, params: Params, inside: Inside | None) -> tuple[list[Tensor | nn.Module], list[nn.Module]]:
    """What is trained beside the cell, and modules that are merely seen."""
    params, seen = param_list(params), captured_modules(cell)
    if inside is None:
        return params, seen
    return [*params, *owners(inside.readout, ())], [*seen, *captured_modules(inside.readout)]


def accumulate(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    readout: Readout | None = None,
    *,
    options: Options | None = None,
    params: Params = (),
    sync: Callable[[bool], None] | None = None,
    **keywords: Unpack[OptionKeywords],
) -> Rollout:
    """Memory replay with its backward at once, which adds to ``.grad`` segment by segment: for FSDP2 (``fully_shard``).

    FSDP delivers gradients by hooks of its own when a graph is back-propagated, so they cannot leave through one
    autograd function. Give its switch: ``accumulate(..., sync=model.set_requires_gradient_sync)``. Nothing needs to be
    named in ``params``, which changes nothing here: whatever a graph reaches gets its gradient.

    Args:
        sync: called with False before a backward that others follow, with True before the last one of the readout and
            the last one of the cell. None: nobody waits for these.
        others: as for :func:`memory_replay`; memory and segments are inputs, and none of them may require a gradient.
            The loss is back-propagated as it is: a gradient scaler's factor goes into ``segment_weights``.

    Returns:
        The loss and the final memory, both detached.

    Raises:
        ValueError: as :func:`memory_replay`; also if an input requires a gradient, if ranks have different numbers of
            segments (each segment is a collective operation), if a parameter has hooks on its gradient, in the forward
            of a DistributedDataParallel, which would not exchange these gradients, or, with
            ``sync``, if the last call of the readout has no loss or no gradient reaches the first segment, where the
            gradients would be synchronised.
        RuntimeError: a replayed segment differs from its recording.
    """
    options = Options.of(options, keywords)
    taken = Segments(segments)
    weights = weight_list(options.segment_weights, len(taken))
    check_equal_across_ranks(len(taken), "the number of segments")
    if any(map(requires_grad, [*taken.tensors(), *tree_leaves(memory)])):
        raise ValueError("accumulate: memory and segments are inputs here and get no gradient: detach them")
    inside = _inside(readout, weights, options)
    params, seen = _trained(cell, params, inside)
    owned = owners(cell, params)
    called = [*owned, *owners(readout, ())]
    refuse_inside_wrapped("accumulate")
    refuse_wrapped(called)
    refuse_hooks_of(called)
    rollout = Run(cell, taken, memory, options, None, owned, seen, sync, inside, alone=readout is None)
    values, memory = rollout.outputs(rollout.record())
    if inside is not None:
        if values[0] is None:
            raise ValueError(
                "accumulate: the first segment has no loss, so the readout's gradients were not synchronised. With "
                "keep_values=False begin with a segment that has one"
            )
        readout, weights = None, None  # which the values are by now
    cut = [Leaves(value).cut(carries_grad) for value in values]
    losses: list[Tensor | None] = []
    parts = list(chunks(len(taken), len(taken) if readout is None else options.readout_segments or 1))
    for part in parts:
        inputs = [value for value, _ in cut[part]]
        if readout is None:
            loss: Tensor | None = sum_of_losses(inputs, weights)
        else:
            with explaining_what_is_cut():
                loss = call_readout(readout, inputs, trees(taken[part]), weights and weights[part])
            if sync is not None:
                sync(part == parts[-1])
        if loss is not None and loss.requires_grad:
            if readout is not None:
                check_hooks([loss])
            loss.backward()  # type: ignore[no-untyped-call]
        elif sync is not None and readout is not None and part == parts[-1] and rollout.environment.grad_enabled:
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
    return Rollout(sum_of_losses(losses), memory)
