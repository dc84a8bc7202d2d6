"""One step of training, whole or not at all: the gradients of its rollouts, then the update of the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .. import replay
from ..data.lanes import LanesState
from ..data.segments import Segment
from ..device import seeded
from ..interface import Memory
from ..settings import TrainingConfig
from .capturing import LaunchedRollout, captures
from .metrics import ByObjective
from .parts import Parts, Progress, differentiate, only_finite
from .update import Update, not_interrupted

__all__ = ["Step", "Stepper"]


class Step(NamedTuple):
    """What one step was like."""

    nats: Tensor
    """Scalar: this process's part of the summed loss."""
    tokens: int
    """Targets that count, of all processes."""
    judged: Tensor | int
    """How many of them the summed loss is of: none, in a step that was left out because its loss is not finite."""
    gradient_norm: Tensor | float
    learning_rate: float
    horizon: int
    segment: Segment
    """The last rollout's first one, and the memory before it."""
    memory: Memory | None
    stopping: bool
    """Whether some process was asked to stop."""


class Stepper:
    """Takes the steps of a run, in this process's lanes.

    Attributes:
        half_updated: whether an exception came in the middle of an update, after which nothing may be trained on.
        by_objective: the losses since it was last asked; None without a mixture of objectives.
        lost_memories: how many lanes' memories were not finite, on the device, since it was last set to zero.
    """

    def __init__(self, parts: Parts, settings: TrainingConfig, update: Update):
        self._parts, self._settings, self._update = parts, settings, update
        mixed = parts.stream.objectives is not None
        self.by_objective = ByObjective(parts.tokenizer, parts.device) if mixed else None
        # Without captured steps, what a step was like is read at its end; with them, when somebody asks.
        self._launched = LaunchedRollout(parts, settings, self.by_objective) if captures(parts, settings) else None
        self.waits = not (self._launched is not None and update.can_go_on)
        self.lost_memories = torch.zeros((), dtype=torch.int64, device=parts.device)
        self._updating = self.half_updated = False
        parts.optimizer.register_step_pre_hook(self._begins_to_update)

    def take(self, watch: replay.MemoryGradients | None = None, stop: bool = False) -> Step:
        """One update, of as many rollouts as the settings accumulate.

        Args:
            watch: takes down the norms of the memory's gradient in the last rollout.
            stop: whether this process is asked to stop; all of them learn of it.

        Raises:
            FloatingPointError: see :meth:`Update.step`.
        """
        settings, progress = self._settings, self._parts.progress
        place, before = self._parts.stream.state_dict(), dataclasses.replace(progress)
        rate = settings.optimizer.learning_rate_at(progress.step, settings.steps)
        horizon = settings.rollout.horizon_at(progress.step)
        self._updating = whole = False
        try:
            rollouts = [self._parts.stream.rollout(horizon) for _ in range(settings.rollout.accumulate)]
            tokens, stopping = self._counted(rollouts, stop)
            loss, first, memory = self._differentiate(rollouts, tokens, watch)
            with not_interrupted():
                norm: Tensor | float
                norm = self._update.step(rate, loss) if self.waits else self._update.step_unseen(rate, loss)
                self._count(tokens)
                self._update.average()
                whole = True
        except BaseException:
            if not whole:
                self._take_back(place, before)
            raise
        ranks = self._parts.ranks
        judged: Tensor | int
        nats, judged = loss / ranks.size * tokens, tokens
        if isinstance(norm, Tensor):
            counts = norm.isfinite() | nats.isfinite()
            nats, judged = torch.where(counts, nats, 0), tokens * counts
        elif not math.isfinite(norm) and not ranks.sum(nats.clone()).isfinite():
            nats, judged = torch.zeros_like(nats), 0
        if self.by_objective is not None:
            self.by_objective.end_step(counts=judged > 0)
        return Step(nats, tokens, judged, norm, rate, horizon, first, memory, stopping)

    def settle(self) -> None:
        """Wait for the steps so far, and count those that were left out.

        Raises:
            FloatingPointError: see :meth:`Update.step`; the message names the step.
        """
        self._update.settle()

    @property
    def launches(self) -> int:
        """How many rollouts were launches of a captured one."""
        return 0 if self._launched is None else self._launched.launches

    def _counted(self, rollouts: list[list[Segment]], stop: bool) -> tuple[int, bool]:
        """How many targets of all processes count, and whether one of these is asked to stop."""
        masks = [segment.tgt_mask for segments in rollouts for segment in segments]
        own = sum(int(mask[:, 1:].sum()) for mask in masks if mask is not None)
        if self._parts.ranks.size == 1:
            return own, stop
        both = torch.tensor([own, stop], device=self._parts.device)
        tokens, stopping = self._parts.ranks.sum(both).tolist()
        return tokens, bool(stopping)

    def _differentiate(
        self, rollouts: list[list[Segment]], tokens: int, watch: replay.MemoryGradients | None
    ) -> tuple[Tensor, Segment, Memory | None]:
        """The gradients of a step. Returns the loss, the last rollout's first segment, and the memory before it."""
        settings, ranks, device = self._settings, self._parts.ranks, self._parts.device
        progress = self._parts.progress
        loss = torch.zeros((), device=device)
        # Dropout is drawn from a seed of its own in each step, so that a resumed run needs no generator's state.
        # Python hashes a tuple of integers alike in every process and version, and saved runs rely on it.
        seed = hash((settings.seed, progress.step, ranks.rank))
        with seeded(seed, device) if settings.model.dropout > 0 else contextlib.nullcontext():
            for i, segments in enumerate(rollouts):
                last = i == len(rollouts) - 1
                if self._launched is not None:
                    segments, before = self._launched.segments(segments), progress.memory
                    of_rollout, lost = self._launched(segments, tokens / ranks.size, watch if last else None)
                    loss += of_rollout
                    self.lost_memories += lost
                    continue
                segments, before = [self._parts.model.of_stream(x).to(device) for x in segments], progress.memory
                loss += self._back_propagate(segments, tokens / ranks.size, last, watch if last else None)
        return loss, segments[0], before

    def _back_propagate(
        self, segments: list[Segment], divisor: float, last: bool, watch: replay.MemoryGradients | None
    ) -> Tensor:
        """One rollout's gradients; processes exchange them after the last one of the step."""
        module, progress = self._parts.rollouts, self._parts.progress
        tally = None if self.by_objective is None else self.by_objective.add
        waits = module.no_sync() if isinstance(module, DistributedDataParallel) and not last else None
        with waits or contextlib.nullcontext():
            loss, memory = differentiate(self._parts, segments, progress.memory, divisor, last, watch, tally)
        progress.memory, lost = only_finite(memory)
        self.lost_memories += lost
        return loss

    def _count(self, tokens: int) -> None:
        settings, progress = self._settings, self._parts.progress
        progress.step += 1
        progress.tokens += tokens
        eval_every = settings.evaluation.eval_every
        progress.due = progress.step == settings.steps or bool(eval_every and progress.step % eval_every == 0)

    def _begins_to_update(self, *_: object) -> None:
        self._updating = True

    def _take_back(self, place: LanesState, before: Progress) -> None:
        """After an exception in a step: as before it. What was begun of an update of the weights cannot be."""
        parts = self._parts
        self.half_updated = self._updating
        try:
            parts.stream.load_state_dict(place)
        except Exception:  # documents that can be gone through once
            self.half_updated = True
        vars(parts.progress).update(vars(before))
        parts.model.zero_grad(set_to_none=True)
        if self._launched is not None:
            self._launched.forget()
        if self.by_objective is not None:
            self.by_objective.end_step(counts=False)
        if parts.scaler.is_enabled():  # a new one knows of no gradients that it has unscaled
            scaler = torch.amp.GradScaler(parts.device.type)
            scaler.load_state_dict(parts.scaler.state_dict())
            vars(parts.scaler).update(vars(scaler))
