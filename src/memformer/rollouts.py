"""Rollouts of a Memformer: the adapter between the model and the replay engine.

The encoder with its memory is the replay's cell, the critical path; the decoder and its loss are the readout.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Literal, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import replay
from .checks import as_mask, as_tokens, describe, ignored_as_masked
from .data.segments import Segment, Targets, cut
from .model import Memformer, token_losses
from .network import counted_targets
from .replay.inputs import Cell, Readout, weight_list
from .replay.options import OptionKeywords

__all__ = ["Tally", "memory_replay_backprop", "rollout", "verify_rollout"]

Reduction = Literal["segment_means", "mean", "sum"]

READOUT_TOKENS = 1024
"""Targets per call of the decoder in a rollout: enough for a matrix product to run at its full rate."""

Tally = Callable[[Tensor, Tensor, Tensor], None]
"""Given targets (rows, tokens), their tokens' losses and which of them count, to add up what it likes of them."""


def rollout(
    model: Memformer,
    segments: Sequence[Segment],
    mems: Tensor | None = None,
    *,
    divisor: Tensor | float | None = None,
    method: replay.Method = replay.memory_replay,
    options: replay.Options | None = None,
    tally: Tally | None = None,
    **keywords: Unpack[OptionKeywords],
) -> replay.Rollout:
    """Run a model with a decoder over segments that were checked already, and add up their losses.

    Args:
        segments: at least one with a target.
        mems: (batch, slots, dim), the memory before the first; None for the learned initial memory.
        divisor: what each segment's summed loss is divided by; None for its number of counted targets.
        method: :func:`~memformer.replay.memory_replay`, or one that equals it: :func:`~memformer.replay.full_bptt`,
            :func:`~memformer.replay.accumulate`.
        options: how the gradients travel, see :class:`~memformer.replay.Options`; its fields are keywords, too. Without
            ``readout_segments`` a call of the decoder takes as many segments as have READOUT_TOKENS targets.
        tally: called with the losses of each call of the decoder; twice in float16, where that runs twice.
    """
    options = replay.Options.of(options, keywords)
    if options.readout_segments is None:
        options = dataclasses.replace(options, readout_segments=_readout_segments(segments))
    cell, readout = _cell_and_readout(model, divisor, summed=options.segment_weights is None, tally=tally)
    return method(cell, segments, mems, readout, options=options)


def verify_rollout(model: Memformer, segments: Sequence[Segment], mems: Tensor | None = None) -> replay.Verdict:
    """Whether replay is right for a model with a decoder, on a few segments; see :func:`~memformer.replay.verify`.

    Args:
        segments: at least one with a target.
        mems: (batch, slots, dim), the memory before the first; None for the learned initial memory.
    """
    cell, readout = _cell_and_readout(model)
    verdict = replay.verify(cell, segments, mems, readout, readout_segments=_readout_segments(segments))
    summary = verdict.summary.replace(_encode.__qualname__, type(model).__name__, 1)  # the name that a user knows
    return dataclasses.replace(verdict, summary=summary)


def memory_replay_backprop(
    model: Memformer,
    src: Tensor,
    tgt: Targets = None,
    src_mask: Tensor | None = None,
    tgt_mask: Targets = None,
    *,
    reset: Targets = None,
    mems: Tensor | None = None,
    loss_fn: Callable[[int, Tensor], Tensor | None] | None = None,
    reduction: Reduction = "segment_means",
    scale: Callable[[Tensor], Tensor] | None = None,
    options: replay.Options | None = None,
    **keywords: Unpack[OptionKeywords],
) -> tuple[Tensor, Tensor]:
    """Back-propagate through a sequence of any length, holding the graph of one segment (paper, Algorithm 1, MRBP).

    The gradients are those of plain back-propagation through time, added to ``.grad`` as ``loss.backward()`` does.

    Args:
        model: a :class:`~memformer.Memformer`.
        src: (batch, length of any size) token ids, cut into segments of ``enc_max_seq_len``.
        tgt: (batch, length) for the last segment, or a list with one such tensor or None per segment. Ids of -100 count
            as masked.
        src_mask: like ``src``, True for tokens that exist: booleans, or integers of 0 and 1. ``tgt_mask``: the same for
            ``tgt``.
        reset: (batch,) of the same kind, lanes that begin the first segment with the learned initial memory (a new
            document), or a list with one such tensor or None per segment.
        mems: (batch, slots, dim), the memory to start from; None for the learned initial memory.
        loss_fn: ``loss_fn(index, enc_out) -> scalar or None``, in place of a target (for encoder-only models): called
            once per segment. Whatever it uses gets its gradients too.
        reduction: how the targets' losses become one: ``"segment_means"``, the sum of each segment's mean, in which a
            target counts more where its segment has few; ``"mean"`` over all targets that count, so that it does not
            matter how they are cut; or ``"sum"`` over them.
        scale: what is back-propagated in place of the loss, which is returned as it is: ``scaler.scale`` of a
            ``torch.amp.GradScaler``, or ``lambda loss: loss / 4`` to accumulate the mean over four calls.
        options: how the gradients travel, see :class:`~memformer.replay.Options`; its fields are keywords, too:
            ``schedule``, ``segment_weights``, ``memory_gradients``, ``check``, and, for targets, ``readout_segments``:
            how many segments one call of the decoder gets.

    Returns:
        ``(loss, mems)``, both detached: the loss in nats, as ``reduction`` and ``segment_weights`` say, and the final
        memory.

    Raises:
        ValueError: as :meth:`Memformer.forward`, or if there is nothing to predict.
        RuntimeError: ``check`` finds a segment whose replay differs.
    """
    options = replay.Options.of(options, keywords)
    if not isinstance(model, Memformer):
        raise ValueError(
            f"model: expected a Memformer, got {type(model).__name__}. Other models, and wrapped ones, go through "
            "memformer.replay.memory_replay"
        )
    if (loss_fn is None) == (tgt is None):
        raise ValueError("expected either tgt or loss_fn" + ("" if tgt is None else ", got both"))
    if tgt is None and tgt_mask is not None:
        raise ValueError("tgt_mask: given without tgt")
    if loss_fn is not None and options.readout_segments is not None:
        raise ValueError(
            "readout_segments: says how many segments the decoder gets at once, but loss_fn gets one by one"
        )
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: expected one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    if loss_fn is not None and reduction != "segment_means":
        raise ValueError(f"reduction: {reduction!r} is of targets; what loss_fn returns is added up as it is")
    if scale is not None and not callable(scale):
        raise ValueError(
            f"scale: expected a function of the loss, such as scaler.scale, got {describe(scale)}; for a number s, "
            "lambda loss: s * loss"
        )
    device = model.encoder.embedding.weight.device
    src, src_mask = as_tokens(src, device), as_mask("src_mask", src_mask, device)
    tgt, tgt_mask, reset = (
        _each_as_tokens(name, x, device) for name, x in (("tgt", tgt), ("tgt_mask", tgt_mask), ("reset", reset))
    )
    model.check_source(src, mems, src_mask, None, max_len=sys.maxsize)
    segments = [
        _checked(model, i, s)
        for i, s in enumerate(cut(model.config.enc_max_seq_len, src, tgt, src_mask, tgt_mask, reset))
    ]
    if loss_fn is not None:
        weights = weight_list(options.segment_weights, len(segments)) or [1.0] * len(segments)
        options = dataclasses.replace(options, segment_weights=None)
        outputs, memory = replay.scan(functools.partial(_encode, model), segments, mems, options=options)
        return _backprop_own_loss(loss_fn, outputs, weights, scale), memory.detach()
    outcome = rollout(model, segments, mems, divisor=_divisor(segments, reduction), options=options)
    (outcome.loss if scale is None else scale(outcome.loss)).backward()
    return outcome.loss.detach(), outcome.memory.detach()


def _each_as_tokens(name: str, given: Targets, device: torch.device) -> Targets:
    """One for one segment, or one for each: see :func:`~memformer.checks.as_tokens`."""
    if isinstance(given, (list, tuple)):
        return [as_tokens(x, device) for x in given]
    converted: Targets = as_tokens(given, device)
    if converted is not None and not isinstance(converted, Tensor):
        raise ValueError(f"{name}: expected one for one segment, or a list with one (or None) for each, got {given!r}")
    return converted


def _checked(model: Memformer, index: int, segment: Segment) -> Segment:
    """A segment of a source that was checked, with boolean masks."""
    segment = segment._replace(reset=as_mask("reset", segment.reset))
    if segment.reset is not None:
        model.check_source(segment.src, None, None, segment.reset)
    tgt, tgt_mask = segment.tgt, as_mask("tgt_mask", segment.tgt_mask)
    if tgt is not None:
        tgt, tgt_mask = ignored_as_masked(tgt, tgt_mask)
        model.check_target(tgt, tgt_mask, segment.src.shape[0])
    elif tgt_mask is not None:
        raise ValueError(f"tgt_mask: segment {index} has one, but no tgt")
    return segment._replace(tgt=tgt, tgt_mask=tgt_mask)


def _divisor(segments: Sequence[Segment], reduction: Reduction) -> Tensor | float | None:
    """What each segment's summed loss is divided by; None for its own number of targets that count."""
    if reduction == "segment_means":
        return None
    if reduction == "sum":
        return 1.0
    counts = [counted_targets(s.tgt, s.tgt_mask).sum() for s in segments if s.tgt is not None]
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
            (loss if scale is None else scale(loss)).backward()
            trains = True
        losses.append(loss.detach())
        if leaf.grad is not None and output.requires_grad:  # a frozen model's does not
            reached.append((output, leaf.grad))
    if not trains:
        raise ValueError("loss_fn: returned no loss that requires a gradient, so there is nothing to back-propagate")
    torch.autograd.backward([output for output, _ in reached], [grad for _, grad in reached])
    return torch.stack(losses).sum()


def _readout_segments(segments: Sequence[Segment]) -> int:
    most = max((s.tgt.numel() for s in segments if s.tgt is not None), default=1)
    return max(1, READOUT_TOKENS // most)


def _cell_and_readout(
    model: Memformer, divisor: Tensor | float | None = None, *, summed: bool = True, tally: Tally | None = None
) -> tuple[Cell, Readout]:
    """What the engine is given: the encoder with its memory, and the decoder's loss, one or one for each segment."""
    readout: Readout = functools.partial(_losses, model, divisor, tally)
    return functools.partial(_encode, model), functools.partial(_summed, readout) if summed else readout


def _encode(model: Memformer, segment: Segment, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    return model.step(segment.src, memory, segment.src_mask, segment.reset)


def _losses(
    model: Memformer,
    divisor: Tensor | float | None,
    tally: Tally | None,
    outputs: list[Tensor],
    segments: list[Segment],
) -> Tensor | None:
    """The decoder's loss on each of several segments, in one call; 0 for those without a target."""
    kept = [i for i, s in enumerate(segments) if s.tgt is not None]
    if not kept:
        return None
    assert model.decoder is not None  # there is a target, and targets are checked
    src_masks = [segments[i].src_mask for i in kept]
    enc_out, src_mask = _concatenate([outputs[i] for i in kept], src_masks)
    src, _ = _concatenate([segments[i].src for i in kept], src_masks)
    tgt, tgt_mask = _concatenate([s.tgt for s in segments if s.tgt is not None], [segments[i].tgt_mask for i in kept])
    losses, counted = token_losses(model.decoder, tgt, enc_out, src_mask, tgt_mask, src)
    if tally is not None:
        tally(tgt, losses, counted)
    per_segment = losses.unflatten(0, (len(kept), -1)).sum((1, 2))
    if divisor is None:
        divisor = counted.unflatten(0, (len(kept), -1)).sum((1, 2)).clamp(min=1)
    places = torch.tensor(kept, device=per_segment.device)
    return per_segment.new_zeros(len(segments)).index_put((places,), per_segment / divisor)


def _summed(losses: Readout, outputs: list[Tensor], segments: list[Segment]) -> Tensor | None:
    per_segment = losses(outputs, segments)
    return None if per_segment is None else per_segment.sum()


def _concatenate(tensors: list[Tensor], masks: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Along the batch, padded to the longest; the mask is None where nothing is masked or padded."""
    longest = max(x.shape[1] for x in tensors)
    if all(mask is None for mask in masks) and all(x.shape[1] == longest for x in tensors):
        return torch.cat(tensors), None
    padded, padded_masks = [], []
    for x, mask in zip(tensors, masks, strict=True):
        missing = longest - x.shape[1]
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        padded.append(F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)))
        padded_masks.append(F.pad(mask, (0, missing)))
    return torch.cat(padded), torch.cat(padded_masks)
