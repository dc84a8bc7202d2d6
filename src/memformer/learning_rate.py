"""The one curve of learning rates here. Imports nothing of the project."""

from __future__ import annotations

import math

__all__ = ["warmup_cosine"]


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
