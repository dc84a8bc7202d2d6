"""Rollouts: the adapter between the models and the replay engine.

A model's memory is the replay's critical path, its cell; its losses are the readout. A causal model may run all its
layers at once, see ``wavefront.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack, cast, get_args

import torch
from torch import Tensor

from . import replay
from .checks import describe
from .data.segments import Segment, Targets
from .interface import Divisor, Memory, SegmentModel, TokenLosses
from .pretrained import divided
from .replay.inputs import Cell, Readout, refuse_inside_wrapped, weight_list
from .replay.options import OptionKeywords
from .replay.schedules import at_least
from .replay.segments import segment_list
from .wavefront import Diagonal, Flight, Wavefront, pays

__all__ = ["Tally", "keeps_outputs", "layers_at_once", "memory_replay_backprop", "rollout", "verify_rollout"]

Reduction = Literal["segment_means", "mean", "sum"]

ENOUGH_TOKENS = 1024
"""On a CPU, targets in one call of the readout: with more of them, its products are no faster per token."""
ENOUGH_ON_A_CARD = 16_384
"""The same on any other device (one H100: docs/log.md)."""

SEGMENTS_PER_LAYER = 4
"""With more of them, outputs and their gradients are half of a segment's graph, see :func:`keeps_outputs`."""
FEW_BYTES = 2**24
"""Of outputs and gradients: not worth computing a loss twice."""

Tally = Callable[[Tensor, Tensor, Tensor], None]
"""Given targets (rows, tokens), their tokens' losses and which of them count, to add up what it likes of them."""


def rollout(
    model: SegmentModel,
    segments: Sequence[Segment],
    mems: Memory | None = None,
    *,
    divisor: Tensor | float | None = None,
    wavefront: bool | None = None,
    method: replay.Method = replay.memory_replay,
    options: replay.Options | None = None,
    readout_tokens: int | None = None,
    tally: Tally | None = None,
    **keywords: Unpack[OptionKeywords],
) -> replay.Rollout:
    """Run a model over segments that were checked already, and add up their losses.

    Args:
        model: a :class:`~memformer.Memformer` with a decoder, or a :class:`~memformer.CausalMemformer`, which predicts
            ``src`` itself where a segment has no ``tgt``.
        segments: at least one with a target.
        mems: the memory before the first, as the model returns it; None for the learned initial memory.
        divisor: what each segment's summed loss is divided by; None for its number of counted targets.
        wavefront: run all layers of a causal model at once, each on another segment; None: :func:`layers_at_once`
            decides. A schedule then counts steps, of which there are ``depth - 1`` more than segments.
        method: :func:`~memformer.replay.memory_replay`, or one that equals it: :func:`~memformer.replay.full_bptt`,
            :func:`~memformer.replay.accumulate`.
        options: how the gradients travel, see :class:`~memformer.replay.Options`; its fields are keywords, too. Where
            ``keep_values`` is None and nothing is said of the readout's size, :func:`keeps_outputs` decides.
        readout_tokens: how many targets one call of the decoder gets at most, in whole segments and at least one of
            them, in place of ``readout_segments``. Fewer take less memory. None for what suits the device: enough to
            keep it busy, and on a card no more than half of the rollout.
        tally: called with the losses of each call of the decoder; twice in float16, where that runs twice. Without
            ``keep_values`` once, where a segment is run with a graph, maybe in backward.

    Returns:
        The loss, a scalar whose backward replays, and the memory after the last segment.

    Raises:
        ValueError: no segments; both ``readout_tokens`` and ``readout_segments``; a wavefront with
            ``segment_weights`` or ``memory_gradients``; whatever the method refuses.
    """
    if not hasattr(segments, "__len__") or not len(segments):  # a data set stays one, of which one segment is held
        segments = segment_list(segments)
    options = _with_readout(replay.Options.of(options, keywords), model, segments, readout_tokens)
    if tally is not None and options.keep_values is False and torch.is_grad_enabled():
        tally = functools.partial(_where_it_trains, tally)
    each = options.segment_weights is not None
    readout: Readout = functools.partial(_of_each if each else _total, model, divisor, tally)
    if wavefront is None:
        wavefront = layers_at_once(model, segments, options)
    if not wavefront:
        return method(functools.partial(_read, model), segments, mems, readout, options=options)
    if each or options.memory_gradients is not None:
        raise ValueError("wavefront: its steps are no segments; leave segment_weights and memory_gradients out")
    front = Wavefront(model, len(segments[0].src))
    run: Any = functools.partial(cast(Any, method), params=front.parameters)  # which every method takes
    if options.measure_at is None:  # the first step in which as many layers work as ever
        options = dataclasses.replace(options, measure_at=min(front.depth, len(segments)) - 1)
    outcome = run(*_steps(front, segments, mems, readout), options=options)
    return dataclasses.replace(outcome, memory=front.end(outcome.memory))


def verify_rollout(
    model: SegmentModel, segments: Sequence[Segment], mems: Memory | None = None, *, wavefront: bool | None = None
) -> replay.Verdict:
    """Whether replay is right for a model, on a few segments; see :func:`~memformer.replay.verify`.

    Args:
        segments: at least one with a target.
        mems: the memory before the first, as the model returns it; None for the learned initial memory.
        wavefront: as for :func:`rollout`, and what that decides where it is None.

    Returns:
        The verdict: ``verdict.ok``, ``print(verdict)``, ``verdict.raise_if_wrong()``.

    Raises:
        ValueError: no segments, none of them with a target, or nothing of the model is trained.
    """
    segments, readout = segment_list(segments), functools.partial(_total, model, None, None)
    at_once = _readout_segments(model, segments, None)
    if wavefront is None:
        wavefront = layers_at_once(model, segments, replay.Options())
    if wavefront:
        front = Wavefront(model, len(segments[0].src))
        steps = _steps(front, segments, mems, readout)
        verdict = replay.verify(*steps, params=front.parameters, readout_segments=at_once)
    else:
        verdict = replay.verify(functools.partial(_read, model), segments, mems, readout, readout_segments=at_once)
    _, _, found = verdict.summary.partition(": ")
    if wavefront:
        found = f"all layers at once, {len(segments)} segments in {found.replace('segments', 'steps', 1)}"
    return dataclasses.replace(verdict, summary=f"{type(model).__name__}: {found}")  # the name that a user knows


def memory_replay_backprop(
    model: SegmentModel,
    src: Tensor,
    tgt: Targets = None,
    src_mask: Tensor | None = None,
    tgt_mask: Targets = None,
    *,
    reset: Targets = None,
    mems: Memory | None = None,
    loss_fn: Callable[[int, Tensor], Tensor | None] | None = None,
    reduction: Reduction = "segment_means",
    scale: Callable[[Tensor], Tensor] | None = None,
    options: replay.Options | None = None,
    readout_tokens: int | None = None,
    **keywords: Unpack[OptionKeywords],
) -> tuple[Tensor, Any]:
    """Back-propagate through a sequence of any length, holding the graph of one segment (paper, Algorithm 1, MRBP).

    The gradients are those of plain back-propagation through time, added to ``.grad`` as ``loss.backward()`` does.

    Args:
        model: a :class:`~memformer.Memformer`, or a :class:`~memformer.CausalMemformer`.
        src: (batch, length of any size) token ids, cut into segments of ``enc_max_seq_len`` or ``max_seq_len``.
        tgt: (batch, length) for the last segment, or a list with one such tensor or None per segment. Ids of -100 count
            as masked. A causal model's targets are labels like ``src``, or a list with such a tensor per segment; None
            stands for ``src`` itself, each token of which is a target.
        src_mask: like ``src``, True for tokens that exist: booleans, or integers of 0 and 1. ``tgt_mask``: the same for
            ``tgt``, of which a causal model's labels have none.
        reset: (batch,) of the same kind, lanes that begin the first segment with the learned initial memory (a new
            document), or a list with one such tensor or None per segment.
        mems: the memory to start from, as the model returns it; None for the learned initial memory.
        loss_fn: ``loss_fn(index, enc_out) -> scalar or None``, in place of a target (for encoder-only models): called
            once per segment, with the last layer's output. Whatever it uses gets its gradients too. A causal model's
            output has one place more, the first: that of the last token before the segment, as in its ``step``.
        reduction: how the targets' losses become one: ``"segment_means"``, the sum of each segment's mean, in which a
            target counts more where its segment has few; ``"mean"`` over all targets that count, so that it does not
            matter how they are cut; or ``"sum"`` over them.
        scale: gives a multiple of the loss, which is back-propagated in its place; the loss is returned as it is:
            ``scaler.scale`` of a ``torch.amp.GradScaler``, or ``lambda loss: loss / 4`` to accumulate the mean over
            four calls. With ``loss_fn`` it gets each segment's loss.
        options: how the gradients travel, see :class:`~memformer.replay.Options`; its fields are keywords, too:
            ``schedule``, ``segment_weights``, ``memory_gradients``, ``check``, and, for targets, ``readout_segments``:
            how many segments one call of the decoder gets, and ``keep_values``: whether the losses are computed once,
            of outputs that are kept for it, or twice (None: :func:`keeps_outputs` decides).
        readout_tokens: or how many targets, see :func:`rollout`.

    Returns:
        ``(loss, mems)``, both detached: the loss in nats, as ``reduction`` and ``segment_weights`` say, and the final
        memory.

    Raises:
        ValueError: as the model's ``forward``, or if there is nothing to predict, or nothing to train, or in the
            forward of a DistributedDataParallel, which would not exchange these gradients.
        RuntimeError: ``check`` finds a segment whose replay differs.
    """
    options = replay.Options.of(options, keywords)
    if not isinstance(model, SegmentModel):
        raise ValueError(
            f"model: expected a Memformer or a CausalMemformer, got {type(model).__name__}. Other models, and "
            "wrapped ones, go through memformer.replay.memory_replay"
        )
    given = tgt is not None or (loss_fn is None and model.reads_its_targets)
    if (loss_fn is not None) == given:
        raise ValueError("expected either tgt or loss_fn" + ("" if tgt is None else ", got both"))
    if tgt is None and tgt_mask is not None:
        raise ValueError("tgt_mask: given without tgt")
    for name, given_size in (("readout_segments", options.readout_segments), ("readout_tokens", readout_tokens)):
        if loss_fn is not None and given_size is not None:
            raise ValueError(f"{name}: says how much the decoder gets at once, but loss_fn gets segments one by one")
    if loss_fn is not None and options.keep_values is not None:
        raise ValueError("keep_values: says when the decoder runs, but loss_fn gets each segment's output once")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: expected one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    if loss_fn is not None and reduction != "segment_means":
        raise ValueError(f"reduction: {reduction!r} is of targets; what loss_fn returns is added up as it is")
    if scale is not None and not callable(scale):
        raise ValueError(
            f"scale: expected a function of the loss, such as scaler.scale, got {describe(scale)}; for a number s, "
            "lambda loss: s * loss"
        )
    refuse_inside_wrapped("memory_replay_backprop")
    segments = model.segments(src, tgt, src_mask, tgt_mask, reset, mems)
    if loss_fn is not None:
        weights = weight_list(options.segment_weights, len(segments)) or [1.0] * len(segments)
        options = dataclasses.replace(options, segment_weights=None)
        outputs, memory = replay.scan(functools.partial(_read, model), segments, mems, options=options)
        return _backprop_own_loss(loss_fn, outputs, weights, scale), replay.detach(memory)
    outcome = rollout(
        model,
        segments,
        mems,
        divisor=_divisor(model, segments, reduction),
        options=options,
        readout_tokens=readout_tokens,
    )
    if not outcome.loss.requires_grad:
        raise ValueError("nothing to train: all parameters are frozen, or gradients are off here (torch.no_grad?)")
    _scaled(outcome.loss, scale).backward()
    return outcome.loss.detach(), replay.detach(outcome.memory)


def _divisor(model: SegmentModel, segments: Sequence[Segment], reduction: Reduction) -> Tensor | float | None:
    """What each segment's summed loss is divided by; None for its own number of targets that count."""
    if reduction == "segment_means":
        return None
    if reduction == "sum":
        return 1.0
    counts = [model.counted(segment).sum() for segment in segments if model.target(segment) is not None]
    return torch.stack(counts).sum().clamp(min=1) if counts else None


def _backprop_own_loss(
    loss_fn: Callable[[int, Tensor], Tensor | None],
    outputs: list[Tensor],
    weights: list[float],
    scale: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    losses, reached, trains = [], [], False
    for i, (output, weight) in enumerate(zip(outputs, weights, strict=True)):
        # Each loss is back-propagated to the encoder's output and freed at once, by plain autograd.
        leaf = output.detach().requires_grad_()
        loss = loss_fn(i, leaf)
        if loss is None:
            continue
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn: expected a scalar loss or None for segment {i}, got {got}")
        loss = loss * weight
        if loss.requires_grad:
            _scaled(loss, scale).backward()
            trains = True
        losses.append(loss.detach())
        if leaf.grad is not None and output.requires_grad:  # a frozen model's does not
            reached.append((output, leaf.grad))
    if not trains:
        raise ValueError("loss_fn: returned no loss that requires a gradient, so there is nothing to back-propagate")
    torch.autograd.backward([output for output, _ in reached], [grad for _, grad in reached])
    return torch.stack(losses).sum()


def _scaled(loss: Tensor, scale: Callable[[Tensor], Tensor] | None) -> Any:
    """What is back-propagated."""
    scaled = loss if scale is None else scale(loss)
    if not isinstance(scaled, Tensor) or scaled.dim() or not scaled.requires_grad:
        got = describe(scaled) if not isinstance(scaled, Tensor) or scaled.dim() else "one without a graph"
        raise ValueError(f"scale: expected a multiple of the loss, a scalar tensor with its graph, got {got}")
    return scaled


def _with_readout(
    options: replay.Options, model: SegmentModel, segments: Sequence[Segment], tokens: int | None
) -> replay.Options:
    """The options, with what they leave open about the readout: when it runs, and over how many segments."""
    if options.readout_segments is not None:
        if tokens is not None:
            raise ValueError("readout_tokens: expected either readout_segments or this, got both")
        return options
    if options.keep_values is None and tokens is None:
        options = dataclasses.replace(options, keep_values=keeps_outputs(model, segments, options.schedule))
    if options.keep_values is False:
        if tokens is not None:
            raise ValueError("readout_tokens: expected none with keep_values=False, where a call gets one segment")
        return options
    return dataclasses.replace(options, readout_segments=_readout_segments(model, segments, tokens))


def layers_at_once(model: SegmentModel, segments: Sequence[Segment], options: replay.Options) -> bool:
    """Whether a rollout that leaves it open runs all layers of a causal model at once.

    It does where that pays, see :func:`~memformer.wavefront.pays`; but not without ``keep_values``, for what is on its
    way between the layers would be kept, nor where something is asked of single segments, which no step is.
    """
    if options.segment_weights is not None or options.memory_gradients is not None:
        return False
    return pays(model, len(segments)) and _with_readout(options, model, segments, None).keep_values is not False


def keeps_outputs(model: SegmentModel, segments: Sequence[Segment], schedule: replay.Schedule) -> bool:
    """Whether a rollout that leaves it open keeps the segments' outputs, so that the losses are computed once.

    With their gradients these are two tensors (batch, tokens, dim) for each segment, and a segment's graph is some
    sixteen for each layer. So they are kept unless they are half as much as that, and more than a few bytes. A schedule
    that keeps the graphs of several segments is after time: then they are kept, too.
    """
    if len(segments) <= SEGMENTS_PER_LAYER * model.depth or divided(model):  # which would gather weights for each loss
        return True
    slots = model.writers()[0].initial(1)
    if 2 * len(segments) * segments[0].src.numel() * slots.shape[-1] * slots.element_size() <= FEW_BYTES:
        return True
    return not schedule.needs_sizes and schedule.plan(len(segments)).live_graphs > 1


def _readout_segments(model: SegmentModel, segments: Sequence[Segment], tokens: int | None) -> int:
    """How many segments a call of the readout gets: with at most so many targets, or with None as suits the device."""
    most = max((target.numel() for target in map(model.target, segments) if target is not None), default=1)
    if tokens is not None:
        at_least("readout_tokens", tokens)
        return max(1, tokens // most)
    if segments[0].src.device.type == "cpu":
        return math.ceil(ENOUGH_TOKENS / most)
    # There the graph of the readout is what the memory goes to.
    return max(1, min(math.ceil(ENOUGH_ON_A_CARD / most), len(segments) // 2))


def _read(model: SegmentModel, segment: Segment, memory: Memory | None) -> tuple[Tensor, Memory]:
    return model.cell(segment, memory)


def _where_it_trains(tally: Tally, *of_a_call: Tensor) -> None:
    """Of a readout that runs twice for a segment, the time with a graph."""
    if torch.is_grad_enabled():
        tally(*of_a_call)


def _losses(
    model: SegmentModel,
    tally: Tally | None,
    outputs: Sequence[Tensor],
    segments: Sequence[Segment],
    divisor: Divisor | None = None,
) -> tuple[list[int], TokenLosses] | None:
    """Which segments have a target, and their losses, from one call of the readout; None if there are none."""
    kept = [i for i, segment in enumerate(segments) if model.target(segment) is not None]
    if not kept:
        return None
    found = model.token_losses([outputs[i] for i in kept], [segments[i] for i in kept], divisor)
    if tally is not None:
        tally(found.targets, found.losses.detach(), found.counted)
    return kept, found


def _counts(counted: Tensor, batch: int) -> Tensor:
    """How many predictions count in each segment, (segments,); 1 where none does."""
    return counted.unflatten(0, (-1, batch)).sum((1, 2)).clamp(min=1)


def _total(
    model: SegmentModel,
    divisor: Tensor | float | None,
    tally: Tally | None,
    outputs: Sequence[Tensor],
    segments: Sequence[Segment],
) -> Tensor | None:
    """The summed loss of several segments."""
    batch = len(segments[0].src)

    def of_each(counted: Tensor) -> Tensor | float:
        if divisor is not None:
            return divisor
        return _counts(counted, batch).repeat_interleave(batch, output_size=len(counted))[:, None]

    found = _losses(model, tally, outputs, segments, of_each)
    return None if found is None else found[1].total


def _of_each(
    model: SegmentModel,
    divisor: Tensor | float | None,
    tally: Tally | None,
    outputs: Sequence[Tensor],
    segments: Sequence[Segment],
) -> Tensor | None:
    """One loss per segment, (segments,); 0 for those without a target."""
    found = _losses(model, tally, outputs, segments)
    if found is None:
        return None
    kept, (_, losses, counted, _) = found
    per_segment = losses.unflatten(0, (len(kept), -1)).sum((1, 2))
    if divisor is None:
        divisor = _counts(counted, len(segments[0].src))
    if len(kept) == len(segments):
        return per_segment / divisor
    # Put in their places without an index, which would be copied to the device: that waits for it.
    found, nothing = iter((per_segment / divisor).unbind()), per_segment.new_zeros(())
    return torch.stack([next(found) if i in kept else nothing for i in range(len(segments))])


def _steps(
    front: Wavefront, segments: Sequence[Segment], mems: Memory | None, readout: Readout
) -> tuple[Cell, list[Diagonal], Flight, Readout]:
    """What a rollout by all layers at once gives to replay: the cell, its segments and memory, and their readout."""
    cell, of_leaving = functools.partial(_advance, front), functools.partial(_of_leaving, readout)
    return cell, front.diagonals(segments), front.start(mems), of_leaving


def _advance(front: Wavefront, diagonal: Diagonal, flight: Any) -> tuple[Tensor | None, Any]:
    return front(diagonal, flight)


def _of_leaving(readout: Readout, hidden: Sequence[Tensor | None], diagonals: Sequence[Diagonal]) -> Tensor | None:
    """The readout of those segments that come out of the last layer."""
    left = [(h, d.leaving) for h, d in zip(hidden, diagonals, strict=True) if h is not None and d.leaving is not None]
    return readout([h for h, _ in left], [segment for _, segment in left]) if left else None
