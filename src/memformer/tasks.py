"""Tasks that only a memory can solve: sequences of segments, and the tokens in them that must be predicted.

Knows no model. An :class:`Episode` is the same for all of them: an encoder-decoder reads a segment and predicts the
next one, a decoder-only model reads the tokens in a row. Only tokens marked as answers count.

Shapes: tokens (batch, segments, length).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .config import check_count

__all__ = [
    "ASK",
    "BLANK",
    "START",
    "TASKS",
    "AssociativeRetrieval",
    "Copy",
    "Episode",
    "OneFact",
    "Pixels",
    "Reverse",
    "Task",
    "digits",
]

START, ASK, BLANK, SYMBOLS = range(4)
"""Token ids: what starts a decoder (in no episode), what asks, what fills a segment, the first of a task's symbols."""

HELD_OUT_SHARE = 5
"""Of each class, one image in this many is held out."""


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
        metric: what ``chance`` and ``solved`` are: the accuracy over all answers, where more is better, or the bits
            (mean -log2 of the predicted probability) per answer, where less is.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    segments: int
    metric: ClassVar[Literal["accuracy", "bits"]] = "accuracy"

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
        return score >= self.solved if self.metric == "accuracy" else score <= self.solved

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
        with torch.device("cpu"):  # whatever the default device is
            return self._draw(batch_size, segments, generator)

    def exercise(self, batch_size: int, generator: torch.Generator) -> Episode:
        """A batch to train on: as :meth:`draw`, of 1 to ``self.segments`` segments, so that easy ones teach what hard
        ones need. It does not depend on what was learned so far: the same generator gives the same batches."""
        return self.draw(batch_size, generator, _at_most(self.segments, generator))

    def _draw(self, batch_size: int, segments: int, generator: torch.Generator) -> Episode:
        raise NotImplementedError


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
        segments = _at_most(self.segments, generator)
        pairs = min(self.pairs, segments)
        if _at_most(3, generator) == 1:
            pairs = _at_most(pairs, generator)
        return dataclasses.replace(self, pairs=pairs).draw(batch_size, generator, segments)

    def _draw(self, batch_size: int, segments: int, generator: torch.Generator) -> Episode:
        pairs = min(self.pairs, segments)
        if self.rewrite:
            keys = torch.randint(self.keys, (batch_size, pairs), generator=generator)
        else:
            keys = torch.rand(batch_size, self.keys, generator=generator).argsort(1)[:, :pairs]
        values = torch.randint(self.values, (batch_size, pairs), generator=generator)
        asked = keys.gather(1, torch.randint(pairs, (batch_size, 1), generator=generator))
        last = (keys == asked).long().mul(torch.arange(1, pairs + 1)).argmax(1, keepdim=True)
        wanted = values.gather(1, last)

        first_value, first_noise = SYMBOLS + self.keys, SYMBOLS + self.keys + self.values
        tokens = first_noise + torch.randint(self.values, (batch_size, segments, 2), generator=generator)
        places = torch.rand(batch_size, segments, generator=generator).argsort(1)[:, :pairs].sort(1).values
        bound = torch.stack([SYMBOLS + keys, first_value + values], -1)
        tokens = tokens.scatter(1, places[..., None].expand(-1, -1, 2), bound)
        question = torch.stack([torch.full_like(asked, ASK), SYMBOLS + asked], -1)
        answer = torch.stack([first_value + wanted, torch.full_like(wanted, BLANK)], -1)
        tokens = torch.cat([tokens, question, answer], 1)
        answers = torch.zeros_like(tokens, dtype=torch.bool)
        answers[:, -1, 0] = True
        return Episode(tokens, answers)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels(Task):
    """An image, pixel by pixel: every segment but the first is predicted from all before it.

    The paper's image generation as a sequence (v2). One object per split: see :func:`digits`. An
    episode of n ``segments`` is the first n + 1 segments of an image: the last one is only predicted, never read. The
    images of a batch differ.

    Attributes:
        images: (count, pixels) integer grey levels, in the order in which they are predicted.
        levels: number of grey levels.
        per_segment: pixels per segment.
        counted: images like ``images`` whose grey levels ``chance`` counts: those for training. Default ``images``.
        solved_share: ``solved`` as a share of ``chance``. No share by itself proves a memory, for neighbours in one
            segment tell much as well; the difference to the same model without its memory does.
    """

    images: Tensor = field(repr=False)
    levels: int
    per_segment: int
    counted: Tensor | None = field(default=None, repr=False)
    solved_share: float = 0.8
    segments: int = field(init=False)
    metric: ClassVar[Literal["accuracy", "bits"]] = "bits"

    def __post_init__(self) -> None:
        check_count("levels", self.levels)
        check_count("per_segment", self.per_segment)
        _check_images("images", self.images, self.levels)
        pixels = self.images.shape[1]
        if pixels % self.per_segment or pixels == self.per_segment:
            raise ValueError(
                f"per_segment: must cut the {pixels} pixels of an image into two equal segments or more, got "
                f"{self.per_segment}"
            )
        if self.counted is not None:
            _check_images("counted", self.counted, self.levels)
            if self.counted.shape[1] != pixels:
                raise ValueError(f"counted: expected images of {pixels} pixels, got {self.counted.shape[1]}")
        if not 0 < self.solved_share <= 1:
            raise ValueError(f"solved_share: expected a number above 0 and at most 1, got {self.solved_share!r}")
        object.__setattr__(self, "segments", pixels // self.per_segment - 1)

    @property
    def vocabulary(self) -> int:
        return SYMBOLS + self.levels

    @property
    def length(self) -> int:
        return self.per_segment

    @cached_property
    def chance(self) -> float:
        """Bits per pixel if each is coded by how often its place has its level in ``counted``, each level once more."""
        counted = self.images if self.counted is None else self.counted
        place = self.levels * torch.arange(counted.shape[1], device=counted.device)
        counts = 1.0 + torch.bincount((place + counted).flatten(), minlength=self.levels * len(place))
        share = counts / (len(counted) + self.levels)
        return -share.log2()[place + self.images][:, self.per_segment :].mean().item()

    @property
    def solved(self) -> float:
        return self.solved_share * self.chance

    def _draw(self, batch_size: int, segments: int, generator: torch.Generator) -> Episode:
        count = len(self.images)
        if batch_size > count:
            raise ValueError(f"batch_size: expected at most the number of images ({count}), got {batch_size}")
        if segments > self.segments:
            raise ValueError(
                f"segments: an image has {self.segments} that tell of later ones, got {segments}. Ask for no more"
            )
        chosen = self.images[torch.randperm(count, generator=generator)[:batch_size]]
        tokens = SYMBOLS + chosen.long().unflatten(1, (-1, self.per_segment))[:, : segments + 1]
        answers = torch.ones_like(tokens, dtype=torch.bool)
        answers[:, 0] = False
        return Episode(tokens, answers)


def digits(per_segment: int = 8) -> tuple[Pixels, Pixels]:
    """Handwritten digits of 8 x 8 pixels in 17 grey levels, from scikit-learn: tasks for training and held-out images.

    Every fifth image of each class is held out: the split is not random, and never changes.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("digits need scikit-learn: pip install 'memformer-replay[digits]'", name="sklearn") from error
    images, classes = (torch.from_numpy(array).long() for array in load_digits(return_X_y=True))
    of_class = [images[classes == digit] for digit in range(10)]
    held = [torch.arange(len(some), device=some.device) % HELD_OUT_SHARE == HELD_OUT_SHARE - 1 for some in of_class]
    train = torch.cat([some[~out] for some, out in zip(of_class, held, strict=True)])
    held_out = torch.cat([some[out] for some, out in zip(of_class, held, strict=True)])
    return (
        Pixels(images=train, levels=17, per_segment=per_segment),
        Pixels(images=held_out, levels=17, per_segment=per_segment, counted=train),
    )


TASKS: dict[str, Task] = {
    "copy": Copy(),
    "reverse": Reverse(),
    "retrieval": AssociativeRetrieval(),
    "rewrite": AssociativeRetrieval(rewrite=True),
    "one-fact": OneFact(),
}
"""The tasks in their standard sizes. Pixels come with images: :func:`digits`."""


def _symbols(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return SYMBOLS + torch.randint(count, shape, generator=generator)


def _at_most(count: int, generator: torch.Generator) -> int:
    """One of 1 to ``count``."""
    return 1 + int(torch.randint(count, (), generator=generator, device="cpu"))


def _check_images(name: str, images: Tensor, levels: int) -> None:
    if images.dim() != 2 or images.numel() == 0 or images.is_floating_point() or images.dtype == torch.bool:
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"{name}: expected whole numbers of shape (count, pixels), got {got}")
    # Not compared as they are: one byte would wrap at 256 levels.
    least, most = images.min().item(), images.max().item()
    if least < 0 or most >= levels:
        raise ValueError(f"{name}: expected grey levels from 0 to {levels - 1}, got {least} to {most}")
