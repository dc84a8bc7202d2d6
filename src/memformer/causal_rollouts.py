"""Rollouts of a CausalMemformer: its layers and memories as the engine's cell, its logits and loss as the readout."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from . import replay
from .causal import CausalMemformer, CausalMemory, causal_losses
from .checks import as_mask
from .data.segments import Segment, Targets, cut
from .nn.causal import MemoryInEachLayer
from .replay.inputs import Cell, Readout
from .replay.options import OptionKeywords
from .wavefront import Diagonal, Wavefront

__all__ = ["causal_replay_backprop", "causal_rollout", "pays"]

READOUT_TOKENS = 1024
"""Tokens per call of the readout: enough for a matrix product to run at its full rate."""


def causal_rollout(
    model: CausalMemformer,
    segments: Sequence[Segment],
    mems: CausalMemory | None = None,
    *,
    divisor: Tensor | float | None = None,
    wavefront: bool | None = None,
    method: replay.Method = replay.memory_replay,
    options: replay.Options | None = None,
    **keywords: Unpack[OptionKeywords],
) -> replay.Rollout:
    """Run a causal model over segments that were checked already, and add up their losses.

    Args:
        segments: their sources are the tokens, their targets the labels; without a target the tokens are.
        mems: the memory before the first; None for the learned initial memory.
        divisor: what each segment's summed loss is divided by; None for its number of counted labels.
        wavefront: run all layers at once, each on another segment; None: where it pays, see :func:`pays`. The schedule
            then counts steps, of which there are ``depth - 1`` more than segments.
        method, options: as in :func:`~memformer.rollouts.rollout`.
    """
    options = replay.Options.of(options, keywords)
    batch, length = segments[0].src.shape
    if options.readout_segments is None:
        options = dataclasses.replace(options, readout_segments=max(1, READOUT_TOKENS // (batch * length)))
    summed = options.segment_weights is None
    if wavefront is None:
        wavefront = pays(model, len(segments)) and summed and options.memory_gradients is None
    if not wavefront:
        readout: Readout = functools.partial(_losses, model, divisor, summed)
        return method(functools.partial(_read, model), segments, mems, readout, options=options)
    front = Wavefront(model, batch)
    diagonals = front.diagonals(segments)
    cell: Cell = functools.partial(_advance, model, front)
    readout = functools.partial(_losses_of_leaving, model, divisor)
    run = functools.partial(method, params=front.parameters)
    outcome = run(cell, diagonals, front.start(mems), readout, options=options)
    return dataclasses.replace(outcome, memory=front.end(outcome.memory))


def pays(model: CausalMemformer, segments: int) -> bool:
    """Whether a wavefront over so many segments is expected to be the faster way.

    It saves calls where there are several layers and several segments; docs/results.md has the measurements.
    """
    return isinstance(model.stack, MemoryInEachLayer) and model.config.depth >= 3 and segments >= 3


def causal_replay_backprop(
    model: CausalMemformer,
    tokens: Tensor,
    labels: Targets = None,
    mask: Tensor | None = None,
    *,
    reset: Targets = None,
    mems: CausalMemory | None = None,
    wavefront: bool | None = None,
    options: replay.Options | None = None,
    **keywords: Unpack[OptionKeywords],
) -> tuple[Tensor, CausalMemory]:
    """:func:`~memformer.memory_replay_backprop` of a causal model, in which each token is a target.

    Args:
        tokens: (batch, length of any size) token ids, cut into segments of ``max_seq_len``.
        labels: like ``tokens``, or a list with one tensor per segment; None: the tokens. -100 does not count.
        mask: like ``tokens``, True for tokens that exist.
        reset: (batch,), for the first segment, or a list with one such tensor or None per segment.
        mems: the memory to start from; None for the learned initial memory.
        wavefront, options: as in :func:`causal_rollout`.

    Returns:
        ``(loss, mems)``, both detached: the weighted sum of the segments' mean losses in nats, and the final memory.

    Raises:
        ValueError: as :meth:`CausalMemformer.forward`.
    """
    mask = as_mask("mask", mask)
    model.check(tokens, mems, mask, max_len=sys.maxsize)
    length = model.config.max_seq_len
    targets = labels.split(length, 1) if isinstance(labels, Tensor) else labels
    segments = [s._replace(reset=as_mask("reset", s.reset)) for s in cut(length, tokens, targets, mask, None, reset)]
    for s in segments:
        model.check(s.src, None, s.src_mask, s.reset, s.tgt)
    outcome = causal_rollout(model, segments, mems, wavefront=wavefront, options=options, **keywords)
    outcome.loss.backward()
    return outcome.loss.detach(), CausalMemory(*(part.detach() for part in outcome.memory))


def _read(model: CausalMemformer, segment: Segment, memory: CausalMemory | None) -> tuple[Tensor, CausalMemory]:
    return model.step(segment.src, memory, segment.src_mask, segment.reset)


def _advance(_: CausalMemformer, front: Wavefront, diagonal: Diagonal, flight: object) -> object:
    return front(diagonal, flight)  # type: ignore[arg-type]


def _losses(
    model: CausalMemformer,
    divisor: Tensor | float | None,
    summed: bool,
    hidden: Sequence[Tensor],
    segments: Sequence[Segment],
) -> Tensor:
    """The losses of several segments, from one call of the head; one for each segment, or their sum."""
    lengths = [segment.src.shape[1] for segment in segments]
    longest = max(lengths)
    logits = model.head(torch.cat([F.pad(h, (0, 0, 0, longest + model.has_overlap - h.shape[1])) for h in hidden]))
    labels = torch.cat([_padded(s.src if s.tgt is None else s.tgt, longest, -100) for s in segments])
    mask = None
    if any(s.src_mask is not None for s in segments) or min(lengths) < longest:
        masks = [torch.ones_like(s.src, dtype=torch.bool) if s.src_mask is None else s.src_mask for s in segments]
        mask = torch.cat([_padded(m, longest, False) for m in masks])
    losses, counted = causal_losses(logits, longest, labels, mask)
    per_segment = losses.unflatten(0, (len(segments), -1)).sum((1, 2))
    if divisor is None:
        divisor = counted.unflatten(0, (len(segments), -1)).sum((1, 2)).clamp(min=1)
    per_segment = per_segment / divisor
    return per_segment.sum() if summed else per_segment


def _losses_of_leaving(
    model: CausalMemformer,
    divisor: Tensor | float | None,
    hidden: Sequence[Tensor | None],
    diagonals: Sequence[Diagonal],
) -> Tensor | None:
    """:func:`_losses` of those that come out of the last layer."""
    left = [(h, d.leaving) for h, d in zip(hidden, diagonals, strict=True) if h is not None and d.leaving is not None]
    if not left:
        return None
    return _losses(model, divisor, True, [h for h, _ in left], [s for _, s in left])


def _padded(x: Tensor, length: int, value: float) -> Tensor:
    return F.pad(x, (0, length - x.shape[1]), value=value)
