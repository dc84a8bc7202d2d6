"""The curves of learning rates: shares of the peak, by step. Imports nothing of the project."""

from __future__ import annotations

import math

__all__ = ["warmup_constant", "warmup_cosine", "warmup_stable_decay"]


def warmup_cosine(step: int, steps: int, warmup: int, least: float = 0.0) -> float:
    """The share of the peak learning rate at a step, counted from 0: a line up to 1, then a cosine down to ``least``.

    Args:
        steps: of the whole training.
        warmup: steps of the rise; at most ``steps - 1`` of them are taken.
        least: the share at the end.
    """
    warmup = min(warmup, steps - 1)
    if step < warmup:
        return (step + 1) / warmup
    fall = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
    return least + (1 - least) * fall


def warmup_stable_decay(step: int, steps: int, warmup: int, decay: float, least: float = 0.0) -> float:
    """A line up to 1, the peak for as long as there is, and over the last steps a line down to ``least``.

    Before the fall it does not depend on ``steps``: a training that is made longer in time has the rates of one that
    was longer from its first step.

    Args:
        steps: of the whole training.
        warmup: steps of the rise.
        decay: steps of the fall; where it meets the rise, the peak is not reached.
        least: the share at the end.
    """
    return min(warmup_constant(step, warmup), least + (1 - least) * min(1.0, (steps - step) / decay))


def warmup_constant(step: int, warmup: int) -> float:
    """A line up to 1, which is then the share for ever: no end needs to be known."""
    return min(1.0, (step + 1) / max(warmup, 1))
