"""Tasks of random symbols: copying, retrieval, one fact, and as many pairs as a memory can hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import check_count
from .base import ASK, BLANK, SYMBOLS, Episode, Metric, Task, at_most, stage

__all__ = ["AssociativeRetrieval", "Copy", "KeyValue", "OneFact", "Reverse"]


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    """The same numbers whatever the default dtype is: half precision would draw some of them often."""
    return torch.rand(*shape, generator=generator, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """Segments of random symbols, then a segment that asks, then the same segments again.

    Attributes:
        symbols: different symbols.
        per_segment: symbols per segment.
    """

    segments: int = 4
    symbols: int = 8
    per_segment: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("symbols", self.symbols)
        check_count("per_segment", self.per_segment)

    @property
    def vocabulary(self) -> int:
        return SYMBOLS + self.symbols

    @property
    def length(self) -> int:
        return self.per_segment

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def _draw(self, batch_size: int, segments: int, generator: torch.Generator) -> Episode:
        shape = (batch_size, segments, self.length)
        given = _symbols(self.symbols, shape, generator)
        ask = torch.full((batch_size, 1, self.length), ASK)
        wanted = self._wanted(given)
        return Episode(
            torch.cat([given, ask, wanted], 1),
            torch.cat([torch.zeros_like(given), torch.zeros_like(ask), torch.ones_like(wanted)], 1).bool(),
        )

    @staticmethod
    def _wanted(given: Tensor) -> Tensor:
        return given


@dataclass(frozen=True, kw_only=True)
class Reverse(Copy):
    """As :class:`Copy`, but the whole sequence comes back in reverse."""

    @staticmethod
    def _wanted(given: Tensor) -> Tensor:
        return given.flip(1, 2)


@dataclass(frozen=True, kw_only=True)
class AssociativeRetrieval(Task):
    """Segments that each bind a key to a value; then one key is given, and its value is wanted.

    Segments beyond ``pairs`` hold noise, at random places. Keys differ, unless ``rewrite``: then each is drawn anew,
    and the value that a key was given last is wanted.

    Attributes:
        pairs: segments that bind a key, at most; an episode of fewer segments has one pair in each.
        keys, values: different keys and values.
        rewrite: whether a key may be bound again.
    """

    segments: int = 8
    pairs: int = 8
    keys: int = 8
    values: int = 8
    rewrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pairs", "keys", "values"):
            check_count(name, getattr(self, name))
        if self.pairs > self.segments:
            raise ValueError(f"pairs: a segment holds one, so at most segments ({self.segments}), got {self.pairs}")
        if self.pairs > self.keys and not self.rewrite:
            raise ValueError(
                f"pairs: their keys differ, so at most keys ({self.keys}), got {self.pairs}. Raise keys, or set "
                "rewrite=True"
            )

    @property
    def vocabulary(self) -> int:
        return SYMBOLS + self.keys + 2 * self.values

    @property
    def length(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 1 / self.values

    def exercise(self, batch_size: int, generator: torch.Generator) -> Episode:
        """One batch in three has fewer pairs than segments, and so noise."""
        segments = at_most(self.segments, generator)
        pairs = min(self.pairs, segments)
        if at_most(3, generator) == 1:
            pairs = at_most(pairs, generator)
        return dataclasses.replace(self, pairs=pairs).draw(batch_size, generator, segments)

    def _draw(self, batch_size: int, segments: int, generator: torch.Generator) -> Episode:
        pairs = min(self.pairs, segments)
        if self.rewrite:
            keys = torch.randint(self.keys, (batch_size, pairs), generator=generator)
        else:
            keys = _uniform(batch_size, self.keys, generator=generator).argsort(1)[:, :pairs]
        values = torch.randint(self.values, (batch_size, pairs), generator=generator)
        asked = keys.gather(1, torch.randint(pairs, (batch_size, 1), generator=generator))
        last = (keys == asked).long().mul(torch.arange(1, pairs + 1)).argmax(1, keepdim=True)
        wanted = values.gather(1, last)

        first_value, first_noise = SYMBOLS + self.keys, SYMBOLS + self.keys + self.values
        tokens = first_noise + torch.randint(self.values, (batch_size, segments, 2), generator=generator)
        places = _uniform(batch_size, segments, generator=generator).argsort(1)[:, :pairs].sort(1).values
        bound = torch.stack([SYMBOLS + keys, first_value + values], -1)
        tokens = tokens.scatter(1, places[..., None].expand(-1, -1, 2), bound)
        question = torch.stack([torch.full_like(asked, ASK), SYMBOLS + asked], -1)
        answer = torch.stack([first_value + wanted, torch.full_like(wanted, BLANK)], -1)
        tokens = torch.cat([tokens, question, answer], 1)
        answers = torch.zeros_like(tokens, dtype=torch.bool)
        answers[:, -1, 0] = True
        return Episode(tokens, answers)


@dataclass(frozen=True, kw_only=True)
class KeyValue(Task):
    """Pairs of a key and a value of two symbols each, all in one segment; then a key again, and its value is wanted.

    The task of GradMem (ICML 2026) in 8 vectors: how much fits into a memory at once. Keys differ; keys and values are
    of the same symbols, and where they stand tells one from the other. An answer is right if both symbols are. Further
    ``segments`` are blank: an encoder-decoder needs one, for it answers with the segment before in front of it.

    Attributes:
        pairs: how many there are.
        places: how many a segment has room for; 0: as many as there are. Where there are fewer pairs, they are told
            several times, in random order.
        symbols: different symbols, of which ``symbols ** 2`` keys and values are made.
        questions: pairs that are asked at once in :meth:`exercise`, each a signal at nearly no cost. :meth:`draw` asks
            one.
    """

    segments: int = 1
    pairs: int = 16
    places: int = 0
    symbols: int = 62
    questions: int = 1
    metric: ClassVar[Metric] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pairs", "symbols", "questions"):
            check_count(name, getattr(self, name))
        check_count("places", self.places, least=0)
        if 0 < self.places < self.pairs:
            raise ValueError(f"places: expected 0 or at least as many as pairs ({self.pairs}), got {self.places}")
        if self.pairs > self.symbols**2:
            raise ValueError(f"pairs: their keys differ, so at most symbols ** 2 ({self.symbols**2}), got {self.pairs}")
        if self.questions > self.pairs:
            raise ValueError(f"questions: expected at most pairs ({self.pairs}), got {self.questions}")

    @property
    def vocabulary(self) -> int:
        return SYMBOLS + self.symbols

    @property
    def length(self) -> int:
        return 4 * (self.places or self.pairs)

    @property
    def chance(self) -> float:
        return 1 / self.symbols**2

    def eased(self, progress: float) -> KeyValue:
        """Two pairs for a tenth of the training, then twice as many, and so on; all of them after two tenths.

        How a value is found by its key is learned from two within minutes, and among many hardly ever. All places are
        filled from the start, with the same pairs again: so each place is learned at once, and stays right later.
        """
        fewer = (self.pairs - 1).bit_length() - 1  # powers of two below, from 2 on
        pairs = min(self.pairs, 2 << stage(progress, 0.1, 0.1, fewer))
        places, questions = self.places or self.pairs, min(pairs, self.questions)
        return dataclasses.replace(self, pairs=pairs, places=places, questions=questions)

    def exercise(self, batch_size: int, generator: torch.Generator) -> Episode:
        """As :meth:`draw`, but with ``questions`` of them."""
        return self._of(batch_size, self.segments, self.questions, generator)

    def _draw(self, batch_size: int, segments: int, generator: torch.Generator) -> Episode:
        return self._of(batch_size, segments, 1, generator)

    def _of(self, batch_size: int, segments: int, asked: int, generator: torch.Generator) -> Episode:
        with torch.device("cpu"):
            tokens = torch.full((batch_size, segments + 1, self.length), BLANK)
            answers = torch.zeros_like(tokens, dtype=torch.bool)
            keys = _uniform(batch_size, self.symbols**2, generator=generator).topk(self.pairs).indices
            values = torch.randint(self.symbols**2, (batch_size, self.pairs), generator=generator)
            chosen = _uniform(batch_size, self.pairs, generator=generator).topk(asked).indices
            bound = torch.cat([self._two(keys), self._two(values)], 2)  # (batch, pairs, 4)
            lanes, told = torch.arange(batch_size)[:, None], torch.arange(self.length // 4).expand(batch_size, -1)
            if self.places > self.pairs:
                told = _uniform(batch_size, self.places, generator=generator).argsort(1) % self.pairs
            tokens[:, 0] = bound[lanes, told].flatten(1)
            tokens[:, -1, : 4 * asked] = bound[lanes, chosen].flatten(1)
            answers[:, -1, : 4 * asked].unflatten(1, (asked, 4))[..., 2:] = True
        return Episode(tokens, answers)

    def _two(self, numbers: Tensor) -> Tensor:
        """Each number as two symbols."""
        return SYMBOLS + torch.stack([numbers // self.symbols, numbers % self.symbols], -1)


@dataclass(frozen=True, kw_only=True)
class OneFact(Task):
    """One fact in the first segment, noise around it and in all others, then the question what it was.

    Attributes:
        facts, noise: different facts, and different tokens of noise.
    """

    segments: int = 32
    facts: int = 16
    noise: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("facts", self.facts)
        check_count("noise", self.noise)

    @property
    def vocabulary(self) -> int:
        return SYMBOLS + self.facts + self.noise

    @property
    def length(self) -> int:
        return 4

    @property
    def chance(self) -> float:
        return 1 / self.facts

    @property
    def solved(self) -> float:
        return 0.95

    def _draw(self, batch_size: int, segments: int, generator: torch.Generator) -> Episode:
        shape = (batch_size, segments + 2, self.length)
        tokens = SYMBOLS + self.facts + torch.randint(self.noise, shape, generator=generator)
        place = torch.randint(self.length, (batch_size,), generator=generator)
        fact = _symbols(self.facts, (batch_size,), generator)
        tokens[torch.arange(batch_size), 0, place] = fact
        tokens[:, -2], tokens[:, -1], tokens[:, -1, 0] = ASK, BLANK, fact
        answers = torch.zeros_like(tokens, dtype=torch.bool)
        answers[:, -1, 0] = True
        return Episode(tokens, answers)


def _symbols(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return SYMBOLS + torch.randint(count, shape, generator=generator)
