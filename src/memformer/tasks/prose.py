"""Facts scattered in real prose, and a question at the end: a text of any length, made while it is read.

The kind of task that BABILong is (arXiv 2406.10149). Words are the tokens; rare ones are one token, unknown.

Shapes: tokens (batch, segments, length).
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import check_count
from ..data.corpora import read_documents
from .base import ASK, BLANK, SYMBOLS, Episode, Metric, Task, at_most, check_generator, stage
from .worlds import NAMES, WORDS, WORLDS, Asked, World, doublings

__all__ = ["InProse", "Prose", "Telling", "in_prose", "prose_of", "read_prose"]

UNKNOWN, FIRST_WORD = SYMBOLS, SYMBOLS + 1
LONGEST, SHORTEST = 60, 4
"""Tokens of a sentence of prose, at most and at least: what is longer is a table or a program."""
_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[.,;:!?]")


@dataclass(frozen=True, eq=False)
class Prose:
    """Sentences to scatter facts among, none of which has the name of anything that facts are about.

    Attributes:
        words: the words that are tokens, those of all facts and questions first; word i is token ``FIRST_WORD + i``.
        tokens: the sentences' token ids, one after the other.
        starts: where each sentence starts in ``tokens``, and where the last one ends.
    """

    words: tuple[str, ...] = field(repr=False)
    tokens: np.ndarray = field(repr=False)
    starts: np.ndarray = field(repr=False)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Of each word its token."""
        return {word: FIRST_WORD + i for i, word in enumerate(self.words)}

    def encode(self, words: Iterable[str]) -> np.ndarray:
        """Token ids of words."""
        return np.array([self.ids.get(word, UNKNOWN) for word in words], np.int64)

    def decode(self, tokens: Iterable[int]) -> list[str]:
        """The words of token ids; what is no word is shown in brackets.

        Raises:
            ValueError: there is no such token.
        """
        shown = ("[start]", "[ask]", "[blank]", "[unknown]", *self.words)
        tokens = list(tokens)
        if wrong := [token for token in tokens if not 0 <= token < len(shown)]:
            raise ValueError(f"tokens: expected ids from 0 to {len(shown) - 1}, got {wrong[0]}")
        return [shown[token] for token in tokens]


def prose_of(texts: Iterable[str], words: int = 2000, held_out_share: int = 5) -> tuple[Prose, Prose]:
    """Prose for training, and held-out prose: the last part of the sentences; both with the words of the first.

    Small letters only. A sentence ends with a full stop, a question mark, an exclamation mark or its paragraph; of the
    paragraphs those count that end in such a mark.

    Args:
        texts: in their order; their paragraphs are apart by blank lines.
        words: different words that are tokens, with those of the facts; the most frequent ones of the training prose.
        held_out_share: hold out one sentence in this many.

    Raises:
        ValueError: a number is out of range, or there are too few sentences.
    """
    if isinstance(texts, str):
        raise ValueError("texts: expected several, got one str: put it into a list")
    check_count("words", words, len(WORDS))
    check_count("held_out_share", held_out_share, 2)
    sentences = [s for text in texts for s in _sentences(text) if NAMES.isdisjoint(w.split("'")[0] for w in s)]
    cut = len(sentences) - len(sentences) // held_out_share
    if len(sentences) < 2 * held_out_share:
        raise ValueError(
            f"texts: expected {2 * held_out_share} sentences of prose or more, of {SHORTEST} to {LONGEST} tokens, in "
            f"paragraphs with blank lines between them, got {len(sentences)}"
        )
    counts = collections.Counter(word for sentence in sentences[:cut] for word in sentence)
    for word in WORDS:
        del counts[word]
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[: words - len(WORDS)]
    vocabulary = (*WORDS, *frequent)
    return _encoded(vocabulary, sentences[:cut]), _encoded(vocabulary, sentences[cut:])


def _sentences(text: str) -> Iterator[list[str]]:
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.rstrip().endswith((".", "!", "?")):
            continue  # a heading, a table, a program
        sentence: list[str] = []
        for token in [*_TOKEN.findall(paragraph.lower().replace("\u2019", "'")), "."]:
            sentence.append(token)
            if token in (".", "!", "?"):
                if SHORTEST <= len(sentence) <= LONGEST:
                    yield sentence
                sentence = []


def _encoded(words: tuple[str, ...], sentences: Sequence[Sequence[str]]) -> Prose:
    new = Prose(words, np.empty(0, np.int64), np.empty(0, np.int64))
    starts = np.cumsum([0, *map(len, sentences)])
    return dataclasses.replace(new, tokens=new.encode(word for s in sentences for word in s), starts=starts)


def read_prose(
    paths: str | Path | Iterable[str | Path] = (), *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """The texts of files and folders; without any, the language reference that comes with Python, all in English.

    Args:
        paths: of files and folders.
        include, exclude: what is read of folders, see :func:`~memformer.data.read_documents`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: what is there is no text; a pattern matches nothing, or there is no folder for it.
        ImportError: this Python comes without its reference (a minimal system package).
    """
    if not paths:
        for name, patterns in (("include", include), ("exclude", exclude)):
            if patterns:
                raise ValueError(f"{name}: says what is read of folders of prose, and none was given")
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ImportError(
                "the prose by default is Python's language reference, which this Python comes without: give a path to "
                "texts, or install the whole standard library",
                name=error.name,
            ) from error
        return [topics[name] for name in sorted(topics)]
    documents = read_documents(paths, include=include, exclude=exclude, content="text")
    return [bytes(document).decode() for document in documents]


class _Lane:
    """One text: facts among the sentences of a prose that goes round in a circle. Any part of it can be had."""

    def __init__(self, prose: Prose, begin: int, facts: Sequence[np.ndarray], offsets: Sequence[int], length: int):
        """``begin``: the first sentence; ``offsets``: tokens of prose before each fact, ascending."""
        self.prose, self.length = prose, length
        background = length - sum(map(len, facts))
        first = int(prose.starts[begin])
        pieces = list[tuple[int, np.ndarray | int]]()  # where each begins, and what it is: a fact, or a place in prose
        at = told = 0
        self.places = []
        for fact, before in zip(facts, offsets, strict=True):
            if before > at:
                pieces.append((at + told, first + at))
            self.places.append(before + told)
            pieces.append((before + told, fact))
            at, told = before, told + len(fact)
        if background > at:
            pieces.append((at + told, first + at))
        self._begins, self._whats = [begins for begins, _ in pieces], [what for _, what in pieces]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Its tokens from ``start`` up to ``stop``."""
        out = np.empty(stop - start, np.int64)
        number = bisect.bisect_right(self._begins, start) - 1
        while start < stop:
            begins, what = self._begins[number], self._whats[number]
            ends = self._begins[number + 1] if number + 1 < len(self._begins) else self.length
            until = min(ends, stop)
            to = out[len(out) - (stop - start) :][: until - start]
            if isinstance(what, np.ndarray):
                to[:] = what[start - begins : until - begins]
            else:
                np.take(self.prose.tokens, np.arange(what + start - begins, what + until - begins), mode="wrap", out=to)
            start, number = until, number + 1
        return out


def _between_sentences(prose: Prose, begin: int, offset: int, most: int) -> int:
    """Tokens of prose, from the sentence ``begin`` on, after which a sentence ends: ``offset`` or the next more; if
    that is above ``most``, the most up to there."""
    first, starts, tokens = int(prose.starts[begin]), prose.starts, len(prose.tokens)
    rounds, rest = divmod(first + offset, tokens)
    found = rounds * tokens + int(starts[np.searchsorted(starts, rest)]) - first
    if found > most:
        rounds, rest = divmod(first + most, tokens)
        found = rounds * tokens + int(starts[np.searchsorted(starts, rest, "right") - 1]) - first
    return found


class Telling(NamedTuple):
    """A batch of texts, with facts and questions, of which no more is there than where all stands.

    Attributes:
        places: (batch, needed) the tokens before each of the facts from which the first answer follows.
        tokens: of a text without questions.
    """

    places: Tensor
    tokens: int
    lanes: list[_Lane]
    asked: Episode

    def parts(self, at_once: int = 1) -> Iterator[Episode]:
        """The texts in parts of so many segments, then the two segments of questions and answers."""
        check_count("at_once", at_once)
        length = self.asked.tokens.shape[2]
        for start in range(0, self.tokens, at_once * length):
            stop = min(start + at_once * length, self.tokens)
            read = torch.from_numpy(np.stack([lane.read(start, stop) for lane in self.lanes]))
            tokens = read.unflatten(1, (-1, length))
            yield Episode(tokens, torch.zeros_like(tokens, dtype=torch.bool))
        yield self.asked


@dataclass(frozen=True, kw_only=True, eq=False)
class InProse(Task):
    """Facts of a small world, scattered in prose in the order told; then a segment that asks, and one that asks the
    same again and answers. So an encoder-decoder, which answers from the segment before, reads the question with its
    memory, and a causal model has it in sight.

    The first fact that the answer needs stands anywhere with the same probability; the facts before it stand anywhere
    before, those after it anywhere after. Each stands between two sentences. The text has ``segments * per_segment``
    tokens, always; its prose begins at any sentence, and at its end begins anew. An answer is right if all its words
    are.

    Attributes:
        world: what the facts are about.
        prose: what they stand in.
        segments: of information, at most.
        per_segment: tokens in a segment.
        questions: asked at once in :meth:`exercise`, at most; :meth:`draw` asks one.
        apart: whether each fact stands whole in a segment of its own, anywhere in it, and not between two sentences.
    """

    world: World
    prose: Prose
    segments: int = 4
    per_segment: int = 256
    questions: int = 1
    apart: bool = False
    metric: ClassVar[Metric] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.world, World):
            raise ValueError(f"world: expected a World, as in WORLDS, got {self.world!r}; in_prose takes its name")
        check_count("per_segment", self.per_segment)
        check_count("questions", self.questions)
        asked = self.questions * _asked(self.world)
        if asked > self.per_segment:
            raise ValueError(
                f"per_segment: questions and answers stand in one segment, and may have {asked} tokens, got "
                f"{self.per_segment}"
            )
        if self.least_segments > self.segments:
            raise ValueError(
                f"segments: the facts alone may fill {self.least_segments} segments of {self.per_segment}, got "
                f"{self.segments}"
            )

    @property
    def least_segments(self) -> int:
        """Segments that hold the longest story."""
        return self.world.most if self.apart else -(-self.world.most * self.world.longest_fact // self.per_segment)

    @property
    def vocabulary(self) -> int:
        return FIRST_WORD + len(self.prose.words)

    @property
    def length(self) -> int:
        return self.per_segment

    @property
    def chance(self) -> float:
        return self.world.chance

    @property
    def solved(self) -> float:
        return 0.95

    def eased(self, progress: float) -> InProse:
        """The world's lessons in turn, each fact alone in a segment that is as short as can be; then the world itself,
        with segments twice as long and twice as many facts, and so on; the task itself at last, if there is time left.
        The world says how they share the training (``easing``): the lessons have 0.4 and longer segments 0.3, if it
        says nothing else; the task itself has the rest.

        Who is where is learned within minutes from segments that hold little else, and stays right in longer ones. From
        long ones a model learns which places were told, and no more.
        """
        world, shortest = self.world, _shortest(self.world)
        lengths = doublings(shortest, max(self.per_segment, shortest + 1))  # the lessons come in any case
        first, others = world.easing
        doubled = stage(progress, first, others, len(lengths))
        if doubled >= len(lengths):
            return self
        lessons = world.lessons
        easier = world.eased(doubled) if doubled else lessons[int(progress / first * len(lessons))]
        length = lengths[doubled] if doubled else _shortest(easier)
        return dataclasses.replace(
            self,
            world=easier,
            # Of longer segments some have no fact, even where stories have all the same number of them.
            segments=max(easier.most, 2 * easier.least) if doubled else easier.most,
            per_segment=length,
            questions=min(self.questions, length // _asked(easier)),
            apart=True,
        )

    def exercise(self, batch_size: int, generator: torch.Generator) -> Episode:
        """A batch of ``segments`` segments or, as often, half as many, with 1 to ``questions`` questions.

        In fewer segments most facts share one with another: that is harder than what long texts ask.
        """
        told = self.practice(batch_size, generator)
        return _whole(told)

    def practice(self, batch_size: int, generator: torch.Generator) -> Telling:
        """What :meth:`exercise` gives, to be read in parts."""
        half = self.segments // 2
        segments = half if half >= self.least_segments and at_most(2, generator) == 1 else self.segments
        return self.tell(batch_size, generator, segments, questions=at_most(self.questions, generator))

    def tell(
        self,
        batch_size: int,
        generator: torch.Generator,
        segments: int | None = None,
        depth: float | None = None,
        questions: int = 1,
    ) -> Telling:
        """What :meth:`draw` gives, to be read in parts: texts of any length take no more memory than short ones.

        Args:
            batch_size, generator, segments: as for :meth:`draw`.
            depth: where the first needed fact stands, 0 at the start and 1 at the end; None for anywhere.
            questions: asked of each text, or fewer where its story holds no more.

        Raises:
            ValueError: there is no such batch; the message says why.
        """
        segments = self.segments if segments is None else segments
        check_count("batch_size", batch_size)
        check_count("segments", segments, self.least_segments)
        check_generator(generator)
        if depth is not None and self.apart:
            raise ValueError("depth: facts that are apart stand in any segments; leave it out")
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth: expected 0 (the start) to 1 (the end), got {depth}")
        seeds = torch.randint(2**62, (batch_size,), generator=generator, device="cpu").tolist()
        lanes, places, asked = [], [], []
        for seed in seeds:
            rng = random.Random(seed)
            story = self.world.tell(rng, questions)
            facts = [self.prose.encode(fact) for fact in story.facts]
            background = segments * self.per_segment - sum(map(len, facts))
            if self.apart:
                offsets = self._apart(rng, facts, segments)
            else:
                first, place = story.asked[0].needed[0], rng.random() if depth is None else depth
                before = sorted(place * rng.random() for _ in range(first))
                after = sorted(place + (1 - place) * rng.random() for _ in facts[first + 1 :])
                offsets = [int(background * x) for x in (*before, place, *after)]
            begin = rng.randrange(len(self.prose.starts) - 1)
            if not self.apart:
                offsets = [_between_sentences(self.prose, begin, offset, background) for offset in offsets]
            lanes.append(_Lane(self.prose, begin, facts, offsets, segments * self.per_segment))
            places.append([lanes[-1].places[number] for number in story.asked[0].needed])
            asked.append(story.asked)
        return Telling(torch.tensor(places, device="cpu"), segments * self.per_segment, lanes, self._ask(asked))

    def _apart(self, rng: random.Random, facts: Sequence[np.ndarray], segments: int) -> list[int]:
        """Tokens of prose before each fact, where each has a segment of its own."""
        offsets, told = [], 0
        for fact, segment in zip(facts, sorted(rng.sample(range(segments), len(facts))), strict=True):
            offsets.append(segment * self.per_segment + rng.randrange(self.per_segment - len(fact) + 1) - told)
            told += len(fact)
        return offsets

    def _draw(self, batch_size: int, segments: int, generator: torch.Generator) -> Episode:
        return _whole(self.tell(batch_size, generator, segments))

    def _ask(self, asked: Sequence[Sequence[Asked]]) -> Episode:
        """The two last segments: the questions, and once more, each with its answer."""
        tokens = torch.full((len(asked), 2, self.per_segment), BLANK, device="cpu")
        answers = torch.zeros_like(tokens, dtype=torch.bool)
        for lane, questions in enumerate(asked):
            first, second, wanted = list[int](), list[int](), list[bool]()
            for question, answer, _ in questions:
                words = [ASK, *self.prose.encode(question)]
                first += words
                second += [*words, *self.prose.encode(answer)]
                wanted += [False] * len(words) + [True] * len(answer)
            tokens[lane, 0, : len(first)] = torch.tensor(first, device="cpu")
            tokens[lane, 1, : len(second)] = torch.tensor(second, device="cpu")
            answers[lane, 1, : len(wanted)] = torch.tensor(wanted, device="cpu")
        return Episode(tokens, answers)


def _asked(world: World) -> int:
    """Tokens of a question and its answer, at most."""
    return 1 + world.longest_question + world.answer_words


def _shortest(world: World) -> int:
    """Tokens of the shortest segment that holds any fact, and any question with its answer."""
    return max(world.longest_fact, _asked(world))


def _whole(told: Telling) -> Episode:
    text, asked = told.parts(told.tokens)
    return Episode(torch.cat([text.tokens, asked.tokens], 1), torch.cat([text.answers, asked.answers], 1))


def in_prose(
    world: str | World,
    paths: str | Path | Iterable[str | Path] = (),
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    words: int = 2000,
    segments: int = 4,
    per_segment: int = 256,
    questions: int = 1,
) -> tuple[InProse, InProse]:
    """A task for training, and the held-out one: the same facts in other prose.

    Args:
        world: one of :data:`~memformer.tasks.WORLDS` by its name, or another.
        paths, include, exclude: files and folders of texts, and what is read of these; see :func:`read_prose`.
        words: see :func:`prose_of`.
        segments, per_segment, questions: see :class:`InProse`.

    Raises:
        FileNotFoundError, ImportError: as :func:`read_prose`.
        ValueError: no such world, or as :func:`prose_of` and :class:`InProse`.
    """
    if isinstance(world, str):
        if world not in WORLDS:
            raise ValueError(f"world: expected one of {', '.join(WORLDS)}, got {world!r}")
        world = WORLDS[world]
    train, held_out = (
        InProse(world=world, prose=prose, segments=segments, per_segment=per_segment, questions=questions)
        for prose in prose_of(read_prose(paths, include=include, exclude=exclude), words)
    )
    return train, held_out
