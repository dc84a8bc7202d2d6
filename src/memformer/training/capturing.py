"""A rollout of training as one launch of a CUDA graph: how a step asks for it, and where it cannot."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import replay
from ..checks import check_tokens
from ..data.segments import Segment
from ..interface import Memory
from ..replay import capture
from ..settings import TrainingConfig
from .metrics import ByObjective
from .parts import Parts, differentiate, only_finite

__all__ = ["LaunchedRollout", "captures"]


def captures(parts: Parts, settings: TrainingConfig) -> bool:
    """Whether a run's rollouts are captured; with a warning where ``auto`` finds on a card that they cannot be.

    Raises:
        ValueError: they are to be ``on``, and cannot be.
    """
    mode = settings.compute.capture
    if mode == "off":
        return False
    reason = None
    if not capture.can_capture(parts.device):
        if mode == "auto":
            return False
        reason = f"expected a CUDA device, got {parts.device}"
    elif parts.ranks.size > 1:
        reason = "several processes exchange gradients in each step, which is not captured"
    elif parts.scaler.is_enabled():
        reason = "the gradient scaler of fp16 looks at the gradients in each step; use --precision bf16"
    if reason is None:
        return True
    if mode == "on":
        raise ValueError(f"capture: {reason}; leave --capture on out")
    warnings.warn(f"capture: {reason}. Steps run eagerly", stacklevel=2)
    return False


class LaunchedRollout:
    """A rollout and its backward, captured at the first call for a horizon.

    Args:
        by_objective: takes down the losses of objectives; None without a mixture.
    """

    def __init__(self, parts: Parts, settings: TrainingConfig, by_objective: ByObjective | None):
        self._parts, self._by_objective = parts, by_objective
        self._step = replay.captured(self._run, mode=settings.compute.capture)
        self._horizon = 0

    @property
    def launches(self) -> int:
        """How many rollouts were launches; the others ran eagerly."""
        return self._step.launches

    def forget(self) -> None:
        """Drop what is captured."""
        self._step.forget()

    def segments(self, segments: Sequence[Segment]) -> list[Segment]:
        """Segments of the stream as the model reads them, checked, and on their way to the card without waiting for it.

        A launch cannot check them. The host goes on while the card computes, so they are copied ahead of their use.
        """
        parts, of_model = self._parts, []
        for segment in map(parts.model.of_stream, segments):
            most = max(segment.src.shape[1], 0 if segment.tgt is None else segment.tgt.shape[1])
            for name, ids in (("src", segment.src), ("tgt", segment.tgt)):
                if ids is not None:
                    check_tokens(name, ids, parts.model.config.vocabulary, most, "")
            pinned = Segment(*(_pinned(part, parts.device) for part in segment))  # type: ignore[arg-type]
            of_model.append(pinned.to(parts.device))
        return of_model

    def __call__(
        self, segments: list[Segment], divisor: float, watch: replay.MemoryGradients | None
    ) -> tuple[Tensor, Tensor]:
        """``(loss, lost)``: the rollout's loss, and in how many lanes the memory was not finite. Leaves gradients.

        The memory that the run carries is then the one after the rollout.
        """
        if len(segments) != self._horizon:  # a horizon that grows does not come back
            self._step.forget()
            self._horizon = len(segments)
        progress, by_objective = self._parts.progress, self._by_objective
        by = torch.full((), divisor, dtype=torch.float32, device=self._parts.device)
        sums = None if by_objective is None else by_objective.of_step
        # A memory that the model makes itself is that of the first step alone: not worth a graph.
        run = self._run if progress.memory is None else self._step
        loss, progress.memory, lost, norms, sums = run(segments, progress.memory, by, sums)
        if by_objective is not None:
            by_objective.of_step = sums
        if watch is not None:
            watch.on_device = norms
        return loss, lost

    def _run(self, segments: list[Segment], memory: Memory | None, divisor: Tensor, sums: Tensor | None) -> Any:
        watch, tally = replay.MemoryGradients(), None
        if sums is not None and self._by_objective is not None:
            tally = functools.partial(self._by_objective.add_to, sums)
        loss, memory = differentiate(self._parts, segments, memory, divisor, True, watch, tally)
        memory, lost = only_finite(memory)
        return loss, memory, lost, watch.on_device, sums


def _pinned(part: Tensor | None, device: torch.device) -> Tensor | None:
    # What is not contiguous would be copied on its way, to memory that is not pinned.
    return part if part is None or device.type != "cuda" else part.contiguous().pin_memory()
