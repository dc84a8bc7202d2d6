"""What a step does with the gradients once they are there, and the moving average of the weights that follows it."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ..interface import SegmentModel
from ..pretrained import full
from ..settings import TrainingConfig
from . import checkpoints
from .parts import Parts, trained

__all__ = ["Update", "not_interrupted"]


class Update:
    """The update of a run's weights.

    Args:
        parts: the run's; their model, optimizer, scaler and average are changed in place.
        settings: the run's.
    """

    def __init__(self, parts: Parts, settings: TrainingConfig):
        self._parts, self._settings = parts, settings
        self._unseen: list[tuple[int, Tensor, Tensor]] = []

    @property
    def can_go_on(self) -> bool:
        """Whether a step can be left out on the device, so that nobody waits: of fused AdamW, without fp16's scaler."""
        of_adam = isinstance(self._parts.optimizer, torch.optim.AdamW)
        return of_adam and not self._parts.scaler.is_enabled() and self._parts.ranks.size == 1

    def step(self, rate: float, loss: Tensor) -> float:
        """The optimizer's step with the gradients that are there, which are then cleared; returns their norm.

        Gradients that are not finite change no weight and no state of the optimizer. Their norm is of all processes, so
        all of them leave the step out, or none. That fp16 overflows until its scale is low enough is no fault; whatever
        else is not finite counts against ``skip_non_finite``.

        Raises:
            FloatingPointError: they are not finite, and that may not be passed over (any more).
        """
        progress = self._parts.progress
        optimizer, scaler = self._parts.optimizer, self._parts.scaler
        scaler.unscale_(optimizer)
        norm = float(full(self._clip()))
        if math.isfinite(norm):
            progress.skipped_in_a_row = 0
            self._make_ready(rate)
            scaler.step(optimizer)
        else:
            if not scaler.is_enabled() or scaler.get_scale() < 1:
                self._pass_over(progress.step + 1, loss)
            progress.skipped += 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def step_unseen(self, rate: float, loss: Tensor) -> Tensor:
        """The same without waiting for the device: whether gradients are finite is seen there, and here in settle."""
        optimizer = self._parts.optimizer
        norm = self._clip()
        self._make_ready(rate)
        # As a gradient scaler tells a fused optimizer: where it is 1, the step changes nothing.
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)
        self._unseen.append((self._parts.progress.step + 1, norm, loss))
        return norm

    def settle(self) -> None:
        """Look at the norms of the steps since the last time, in order, and count those that changed nothing.

        Raises:
            FloatingPointError: as in :meth:`step`. Steps after the one that it names were taken, without its gradient.
        """
        unseen, self._unseen = self._unseen, []
        norms = torch.stack([norm for _, norm, _ in unseen]).tolist() if unseen else []
        for (step, _, loss), norm in zip(unseen, norms, strict=True):
            if math.isfinite(norm):
                self._parts.progress.skipped_in_a_row = 0
            else:
                self._pass_over(step, loss)
                self._parts.progress.skipped += 1

    def _clip(self) -> Tensor:
        """The norm of the gradients, which are then no longer than the settings allow."""
        limit = self._settings.optimizer.clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self._parts.model.parameters(), limit)

    def _make_ready(self, rate: float) -> None:
        # A parameter that no gradient reaches (the writer's, at horizon 1) has a zero one under DDP, and so here.
        for _, parameter in trained(self._parts.model):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for group in self._parts.optimizer.param_groups:
            group["lr"] = rate

    def _pass_over(self, step: int, loss: Tensor) -> None:
        """Count one more gradient that is not finite, or raise FloatingPointError if there were too many in a row."""
        settings, progress = self._settings, self._parts.progress
        allowed = settings.optimizer.skip_non_finite
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row <= allowed:
            return
        after = (
            f", after {allowed} such steps in a row that were left out"
            if allowed
            else "; --skip-non-finite passes over a rare one"
        )
        raise FloatingPointError(
            f"step {step}: the gradient is not finite (loss {float(loss):.3g}){after}. "
            + checkpoints.after_divergence(settings.out, settings.optimizer.learning_rate)
        )

    def average(self) -> None:
        """Let the moving average of the weights follow the newest ones, after a step that is counted already."""
        decay, average, step = self._settings.optimizer.ema, self._parts.average, self._parts.progress.step
        for name, parameter in trained(self._parts.model) if average else ():
            # Young averages forget faster, so that they do not remember the initial weights for long.
            weight = 1 - min(decay, step / (step + 9))
            average[name].lerp_(parameter.detach(), weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[SegmentModel]:
        """The model with the weights' moving average in place of the newest, where the run keeps one."""
        model, average = self._parts.model, self._parts.average
        parameters = dict(trained(model)) if average else {}
        newest = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(average[name])
            yield model
        finally:
            with not_interrupted(), torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(newest[name])


@contextlib.contextmanager
def not_interrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of what is inside, where it would raise KeyboardInterrupt in the middle of it."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt
