"""What the decoder predicts from a segment: the paper's three objectives, drawn by odds for each lane and step.

The stream of sources advances alike under all of them; an objective chooses the target, and infilling damages the
source.
"""

from __future__ import annotations

import enum

import numpy as np

from .tokenizers import Tokenizer

__all__ = ["Mixture", "Objective"]

_STREAM = 0x6D656D66
"""Keeps these draws apart from others of the same seed."""


class Objective(enum.IntEnum):
    """Which target a source s_t has."""

    CONTINUATION = 0
    """s_{t+1}, after the start token."""
    INFILLING = 1
    """s_t, after the infill token; the source has lost spans of it."""
    RECALL = 2
    """s_{t-1}, after the recall token: only the memory knows it."""


class Mixture:
    """Odds of the objectives, and how a source is damaged for infilling.

    Every draw is decided by seed, step and lane alone, so it does not depend on how many processes share the lanes, or
    on where a run was resumed. Where an objective has nothing to work on (no source yet, or none before it),
    continuation takes its place.

    Args:
        tokenizer: whose ``infill``, ``recall`` and ``mask`` ids are used.
        continuation, infilling, recall: odds, at least 0; they need not add up to 1.
        masked: share of a source's tokens that infilling hides, at most a half.
        span: mean length of a hidden span (Poisson).
        seed: of the draws.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        continuation: float = 1.0,
        infilling: float = 0.0,
        recall: float = 0.0,
        masked: float = 0.3,
        span: float = 3.5,
        seed: int = 0,
    ):
        odds = (continuation, infilling, recall)
        if not (all(0 <= x < np.inf for x in odds) and sum(odds) > 0):
            raise ValueError(f"continuation, infilling, recall: expected odds of at least 0, some above, got {odds}")
        if not 0 < masked <= 0.5:
            raise ValueError(f"masked: expected a share above 0 and at most 0.5, got {masked}")
        if not 0 < span < np.inf:
            raise ValueError(f"span: expected a mean length above 0, got {span}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        self.starts = {Objective.INFILLING: tokenizer.infill, Objective.RECALL: tokenizer.recall}
        self.mask, self.masked, self.span, self.seed = tokenizer.mask, masked, span, seed
        self.odds = np.array(odds) / sum(odds)
        # Its distribution function, as far as it is below 1 in double precision.
        lengths = np.arange(1, int(span + 12 * np.sqrt(span)) + 20)
        self._poisson = np.exp(np.append(0, np.log(span / lengths)).cumsum() - span).cumsum()

    def draw(self, step: int, lanes: int, length: int) -> tuple[list[int], np.ndarray]:
        """``(objectives, uniform)``: one :class:`Objective` for each lane, and (lanes, n) what :meth:`damage` needs.

        ``length`` is that of the segments.
        """
        generator = np.random.default_rng([_STREAM, self.seed, step])
        uniform = generator.random((lanes, 1 + self._hidden(length) + length + 1))
        objectives = np.searchsorted(self.odds.cumsum()[:-1], uniform[:, 0], side="right")
        return objectives.tolist(), uniform[:, 1:]

    def damage(self, source: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """A source with spans of it replaced by one mask token each; never longer than it was.

        Lengths are drawn from Poisson's distribution until the share is hidden, and the last one is fitted to it. A
        span of length zero hides nothing and inserts a mask (as in BART). Between two spans some token is kept.

        Args:
            source: (length,) tokens.
            uniform: independent numbers in [0, 1), at least as many as hidden and all tokens of the source, and one.
        """
        limit = self._hidden(len(source))
        kept = len(source) - limit
        ends = np.minimum(np.searchsorted(self._poisson, uniform[:limit], side="right").cumsum(), limit)
        ends = ends[: int(np.searchsorted(ends, limit)) + 1]
        ends[-1] = limit
        # Each span lies in a gap of its own among the tokens that are kept.
        gaps = uniform[limit : limit + kept + 1].argsort()[: len(ends)]
        spans = np.zeros(kept + 1, np.int64)
        spans[gaps] = 1
        before = spans.cumsum()[:kept]  # how many spans lie before each kept token
        damaged = np.full(kept + len(ends), self.mask, np.int64)
        place = np.arange(kept)
        damaged[place + before] = source[place + np.append(0, ends)[before]]
        return damaged

    def _hidden(self, length: int) -> int:
        return max(1, round(self.masked * length))
