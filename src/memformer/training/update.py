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
from ..parallel import full
from ..settings import TrainingConfig
from . import checkpoints
from .parts import Parts

__all__ = ["Update", "not_interrupted"]


class Update:
    """The update of a run's weights.

    Args:
        parts: the run's; their model, optimizer, scaler and average are changed in place.
        settings: the run's.
    """

    def __init__(self, parts: Parts, settings: TrainingConfig):
        self._parts, self._settings = parts, settings

    def step(self, rate: float, loss: Tensor) -> float:
        """The optimizer's step with the gradients that are there, which are then cleared; returns their norm.

        Gradients that are not finite change no weight and no state of the optimizer. Their norm is of all processes, so
        all of them leave the step out, or none. That fp16 overflows until its scale is low enough is no fault; whatever
        else is not finite counts against ``skip_non_finite``.

        Raises:
            FloatingPointError: they are not finite, and that may not be passed over (any more).
        """
        parts, progress = self._parts, self._parts.progress
        optimizer, scaler = parts.optimizer, parts.scaler
        scaler.unscale_(optimizer)
        limit = self._settings.optimizer.clip or math.inf
        norm = float(full(torch.nn.utils.clip_grad_norm_(parts.model.parameters(), limit)))
        if math.isfinite(norm):
            progress.skipped_in_a_row = 0
            # A parameter that no gradient reaches (the writer's, at horizon 1) has a zero one under DDP, and so here.
            for parameter in parts.model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            for group in optimizer.param_groups:
                group["lr"] = rate
            scaler.step(optimizer)
        else:
            if not scaler.is_enabled() or scaler.get_scale() < 1:
                self._pass_over(loss)
            progress.skipped += 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _pass_over(self, loss: Tensor) -> None:
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
            f"step {progress.step + 1}: the gradient is not finite (loss {float(loss):.3g}){after}. "
            + checkpoints.after_divergence(settings.out, settings.optimizer.learning_rate)
        )

    def average(self) -> None:
        """Let the moving average of the weights follow the newest ones, after a step that is counted already."""
        decay, average, step = self._settings.optimizer.ema, self._parts.average, self._parts.progress.step
        for name, parameter in self._parts.model.named_parameters() if average else ():
            # Young averages forget faster, so that they do not remember the initial weights for long.
            weight = 1 - min(decay, step / (step + 9))
            average[name].lerp_(parameter.detach(), weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[SegmentModel]:
        """The model with the weights' moving average in place of the newest, where the run keeps one."""
        model, average = self._parts.model, self._parts.average
        parameters = dict(model.named_parameters()) if average else {}
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
