"""What the decoder is to say about a segment: the paper's three objectives, drawn by odds for each lane and step.

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

    def draw(self, step: int, lanes: int) -> np.ndarray:
        """(lanes,) one :class:`Objective` for each lane."""
        uniform = np.random.default_rng([_STREAM, self.seed, step]).random(lanes)
        # The last sum may be 1 - 1e-16.
        return np.searchsorted(self.odds.cumsum()[:-1], uniform, side="right")

    def damage(self, source: np.ndarray, step: int, lane: int) -> np.ndarray:
        """A source with spans of it replaced by one mask token each; never longer than it was.

        Lengths are drawn from Poisson's distribution until the share is hidden, and the last one is cut to it. A span
        of length zero hides nothing and inserts a mask (as in BART). Between two spans some token is kept.
        """
        generator = np.random.default_rng([_STREAM, self.seed, step, lane + 1])
        size = len(source)
        budget = max(1, round(self.masked * size))
        hidden = np.minimum(generator.poisson(self.span, budget).cumsum(), budget)
        hidden = hidden[: int(np.searchsorted(hidden, budget)) + 1]
        # Each span lies in a gap of its own among the tokens that are kept.
        gaps = np.sort(generator.permutation(size - hidden[-1] + 1)[: len(hidden)])
        first = gaps + np.concatenate([[0], hidden[:-1]])
        edges = np.zeros(size + 1, np.int64)
        edges[first] += 1
        edges[gaps + hidden] -= 1
        kept = source[edges.cumsum()[:-1] == 0]
        return np.insert(kept.astype(np.int64), gaps, self.mask)
