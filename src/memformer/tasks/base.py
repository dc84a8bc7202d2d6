"""What the tasks share: an episode, and what a task is asked for. Knows no model.

Shapes: tokens (batch, segments, length).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..config import check_count

__all__ = ["ASK", "BLANK", "START", "SYMBOLS", "Episode", "Metric", "Task", "at_most", "stage"]

START, ASK, BLANK, SYMBOLS = range(4)
"""Token ids: what starts a decoder (in no episode), what asks, what fills a segment, the first of a task's symbols."""


Metric = Literal["accuracy", "exact", "bits"]
"""What a task counts: see :class:`Task`."""


class Episode(NamedTuple):
    """A batch of sequences.

    Attributes:
        tokens: (batch, segments, length) token ids. The first segment is never an answer.
        answers: boolean like ``tokens``, True for those to be predicted.
    """

    tokens: Tensor
    answers: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What the tasks share.

    Attributes:
        segments: segments of information, at most; questions and answers come on top.
        metric: what ``chance`` and ``solved`` are: the accuracy over all answers, or the share of episodes of which all
            answers are right (exact), where more is better; or the bits (mean -log2 of the predicted probability) per
            answer, where less is.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    segments: int
    metric: ClassVar[Metric] = "accuracy"

    def __post_init__(self) -> None:
        check_count("segments", self.segments)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Tokens per segment."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """What the best guess by a model without a memory gets."""
        raise NotImplementedError

    @property
    def solved(self) -> float:
        """From here on the task counts as solved."""
        return 0.99

    def solves(self, score: float) -> bool:
        """Whether a score, in the task's metric, is at least as good as ``solved``."""
        return score <= self.solved if self.metric == "bits" else score >= self.solved

    def draw(self, batch_size: int, generator: torch.Generator, segments: int | None = None) -> Episode:
        """A batch of new episodes, on the CPU.

        Args:
            batch_size: number of episodes.
            generator: on the CPU; in the same state it gives the same episodes.
            segments: segments of information in place of the task's own.

        Raises:
            ValueError: there is no such batch; the message says why.
        """
        segments = self.segments if segments is None else segments
        check_count("batch_size", batch_size)
        check_count("segments", segments)
        check_generator(generator)
        with torch.device("cpu"):  # whatever the default device is
            return self._draw(batch_size, segments, generator)

    def exercise(self, batch_size: int, generator: torch.Generator) -> Episode:
        """A batch to train on: as :meth:`draw`, of 1 to ``self.segments`` segments, so that easy ones teach what hard
        ones need. It does not depend on what was learned so far: the same generator gives the same batches."""
        return self.draw(batch_size, generator, at_most(self.segments, generator))

    def eased(self, progress: float) -> Task:
        """What to train on when so much of a training is done, from 0 to 1: this task, or easier ones before it."""
        return self

    def _draw(self, batch_size: int, segments: int, generator: torch.Generator) -> Episode:
        raise NotImplementedError


def at_most(count: int, generator: torch.Generator) -> int:
    """One of 1 to ``count``."""
    return 1 + int(torch.randint(count, (), generator=generator, device="cpu"))


def check_generator(generator: object) -> None:
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator: expected a torch.Generator, like torch.Generator().manual_seed(0), got {generator!r}"
        )


def stage(progress: float, first: float, others: float, count: int) -> int:
    """At which of ``count`` easier tasks, counted from 0, a training is: at the first until a share of ``first`` is
    done, at the others in equal parts of the share ``others`` after that; ``count`` or more from then on.

    Raises:
        ValueError: ``progress`` is no share of a training.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress: expected 0 (a training begins) to 1 (it ends), got {progress}")
    if progress < first:
        return 0
    return 1 + int((progress - first) / others * max(0, count - 1)) if others else max(1, count)
