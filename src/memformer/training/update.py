"""What a step does with the gradients once they are there, and the moving average of the weights that follows it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..model import Memformer
from ..parallel import full
from ..settings import TrainingConfig
from . import checkpoints
from .parts import Parts

__all__ = ["Update"]


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

        Raises:
            FloatingPointError: they are not finite.
        """
        parts, settings = self._parts, self._settings
        optimizer, scaler = parts.optimizer, parts.scaler
        scaler.unscale_(optimizer)
        limit = settings.optimizer.clip or math.inf
        norm = float(full(torch.nn.utils.clip_grad_norm_(parts.model.parameters(), limit)))
        if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
            raise FloatingPointError(
                f"step {parts.progress.step + 1}: the gradient is not finite (loss {float(loss):.3g}). "
                + checkpoints.after_divergence(settings.out, settings.optimizer.learning_rate)
            )
        # A parameter that no gradient reaches (the writer's, at horizon 1) has a zero one under DDP, and so here.
        for parameter in parts.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = rate
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def average(self) -> None:
        """Let the moving average of the weights follow the newest ones, after a step that is counted already."""
        decay, average, step = self._settings.optimizer.ema, self._parts.average, self._parts.progress.step
        for name, parameter in self._parts.model.named_parameters() if average else ():
            # Young averages forget faster, so that they do not remember the initial weights for long.
            weight = 1 - min(decay, step / (step + 9))
            average[name].lerp_(parameter.detach(), weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Memformer]:
        """The model with the weights' moving average in place of the newest, where the run keeps one."""
        model, average = self._parts.model, self._parts.average
        parameters = dict(model.named_parameters()) if average else {}
        newest = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(average[name])
        try:
            yield model
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(newest[name])
