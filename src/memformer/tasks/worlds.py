"""Small worlds told in sentences: who is where, who has what, and what is asked of it. Words only, no tokens.

The questions are those of bAbI's first three tasks (arXiv 1502.05698), which BABILong scatters in books (arXiv
2406.10149), and of a needle with several values. Names, wording and generator are this project's own. No rule knows one
place, person, thing or secret from another, so answers are equally likely whatever is asked.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Self

from ..config import check_count

__all__ = [
    "NAMES",
    "WORDS",
    "WORLDS",
    "Asked",
    "SingleFacts",
    "Story",
    "ThreeFacts",
    "TwoFacts",
    "Values",
    "Whereabouts",
    "World",
]

PEOPLE = ("ada", "bruno", "clara", "dario", "edith", "felix", "greta", "hugo")
PLACES = ("harbour", "orchard", "chapel", "cellar", "tower", "meadow", "bakery", "stable")
THINGS = ("lantern", "violin", "basket", "compass", "kettle", "ladder", "pillow", "trumpet")
SECRETS = (
    *("amber", "birch", "cobalt", "dahlia", "ember", "falcon", "garnet", "heron"),
    *("indigo", "jasper", "lilac", "maple", "nutmeg", "opal", "pepper", "quartz"),
)
NAMES = frozenset((*PEOPLE, *PLACES, *THINGS, *SECRETS))
"""What facts are about. A sentence with one of these is no background."""
MOVED = ("went to the", "walked to the", "hurried to the", "came to the")
TOOK = ("took the", "picked up the")
LEFT = ("put down the", "left the")
WORDS = (
    *sorted(NAMES),
    *sorted(set(" ".join((*MOVED, *TOOK, *LEFT, "where is was before what are secret secrets of a . ?")).split())),
)
"""All words of all worlds. "what" and "are" are told no more, and stay: without them all words had other tokens."""


class Asked(NamedTuple):
    """A question, its answer, and the facts from which it follows, by their numbers, in the order told."""

    question: tuple[str, ...]
    answer: tuple[str, ...]
    needed: tuple[int, ...]


class Story(NamedTuple):
    """Facts in the order told, and what is asked after them: at least one question, all different."""

    facts: list[tuple[str, ...]]
    asked: list[Asked]


@dataclass(frozen=True, kw_only=True)
class World:
    """What the worlds share.

    Attributes:
        least, most: facts in a story; their number is drawn.
        longest_fact, longest_question: how many words they have at most.
        easing: shares of a training: with the lessons, and then with longer segments and more facts up to the task,
            which has the rest.
    """

    least: int = 2
    most: int = 10
    longest_fact: ClassVar[int] = 6
    longest_question: ClassVar[int] = 8
    easing: ClassVar[tuple[float, float]] = (0.4, 0.3)

    def __post_init__(self) -> None:
        check_count("least", self.least, self.needed)
        check_count("most", self.most, self.least)

    @property
    def needed(self) -> int:
        """Facts from which an answer follows."""
        raise NotImplementedError

    @property
    def answer_words(self) -> int:
        """Words of an answer."""
        return 1

    @property
    def lessons(self) -> tuple[World, ...]:
        """Easier worlds that a training begins with, the easiest first: this one, with as few facts as there are."""
        return (self.eased(0),)

    def eased(self, doubled: int) -> World:
        """This world with at most ``least * 2**doubled`` facts, and never more than ``most``."""
        most = min(self.most, self.least << doubled)
        return self if most == self.most else dataclasses.replace(self, most=most)

    @property
    def chance(self) -> float:
        """How often the best guess of a whole answer is right for who has read no fact."""
        raise NotImplementedError

    def tell(self, rng: random.Random, questions: int = 1) -> Story:
        """A new story with so many questions, or fewer where it holds no more.

        Raises:
            ValueError: no question is asked for.
        """
        check_count("questions", questions)
        while True:
            story = self._tell(rng, rng.randint(self.least, self.most), questions)
            if story.asked:
                return story

    def _tell(self, rng: random.Random, count: int, questions: int) -> Story:
        raise NotImplementedError


def _check_names(**given: tuple[int, int, Sequence[str]]) -> None:
    for name, (count, least, names) in given.items():
        check_count(name, count, least)
        if count > len(names):
            raise ValueError(f"{name}: there are names for {len(names)}, got {count}")


def _sentence(*words: str) -> tuple[str, ...]:
    return tuple(" ".join((*words, ".")).split())


def _ask(*words: str) -> tuple[str, ...]:
    return tuple(" ".join((*words, "?")).split())


def doublings(first: int, below: int) -> list[int]:
    """The first number and what doubling makes of it, as long as it is below the other."""
    return [number for i in range(below.bit_length()) if (number := first << i) < below]


def _some(rng: random.Random, asked: Sequence[Asked], questions: int) -> list[Asked]:
    return rng.sample(asked, min(questions, len(asked)))


@dataclass(frozen=True, kw_only=True)
class Whereabouts(World):
    """People go from place to place: where is one of them? The last fact about that person says it (QA1).

    Attributes:
        people, places: how many there are.
    """

    people: int = 4
    places: int = 6
    longest_question: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_names(people=(self.people, 1, PEOPLE), places=(self.places, 2, PLACES))

    @property
    def needed(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        return 1 / self.places

    def _tell(self, rng: random.Random, count: int, questions: int) -> Story:
        facts, where = [], dict[str, tuple[str, int]]()
        for number in range(count):
            person = rng.choice(PEOPLE[: self.people])
            place = _elsewhere(rng, self.places, where.get(person))
            facts.append(_sentence(person, rng.choice(MOVED), place))
            where[person] = place, number
        asked = [Asked(_ask("where is", who), (place,), (number,)) for who, (place, number) in where.items()]
        return Story(facts, _some(rng, asked, questions))


def _elsewhere(rng: random.Random, places: int, now: tuple[str, int] | None) -> str:
    return rng.choice([place for place in PLACES[:places] if now is None or place != now[0]])


class _Now(NamedTuple):
    """Where all is at one time of a story, with the facts that say so, by their numbers.

    Attributes:
        at: each person's place.
        held: who has a thing, and since when.
        lying: where a thing is that nobody has any more.
        moves: of a thing, in order: from where, to where.
    """

    at: dict[str, tuple[str, int]]
    held: dict[str, tuple[str, int]]
    lying: dict[str, tuple[str, tuple[int, int]]]
    moves: dict[str, list[tuple[str, str, tuple[int, int, int]]]]


@dataclass(frozen=True, kw_only=True)
class _Things(World):
    """What worlds with things share.

    Attributes:
        people, places, things: how many there are.
    """

    people: int = 4
    places: int = 6
    things: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_names(people=(self.people, 1, PEOPLE), places=(self.places, 3, PLACES), things=(self.things, 1, THINGS))

    def with_few_names(self) -> Self:
        """As few facts as there are ever, of two people, or one, and of so many things."""
        return dataclasses.replace(self, most=self.least, people=min(self.people, 2), things=min(self.things, 2))


@dataclass(frozen=True, kw_only=True)
class SingleFacts(_Things):
    """A lesson for worlds with things: in a story either all facts are of people who go to places, or of people who
    take things. Where is a person: at a place. Where is a thing: with a person.

    An answer follows from one fact, the last about what is asked. So each kind of fact is learned before two are
    joined; where they are met together, what joins them is not found.
    """

    most: int = 4
    longest_question: ClassVar[int] = 5

    @property
    def needed(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        return (1 / self.places + 1 / self.people) / 2

    def _tell(self, rng: random.Random, count: int, questions: int) -> Story:
        people, places, things = PEOPLE[: self.people], PLACES[: self.places], THINGS[: self.things]
        going = rng.random() < 0.5
        facts, last = [], dict[str, tuple[str, int]]()
        for number in range(count):
            who, what = rng.choice(people), rng.choice(places if going else things)
            facts.append(_sentence(who, rng.choice(MOVED if going else TOOK), what))
            about, answer = (who, what) if going else (what, who)
            last[about] = answer, number
        ask = "where is" if going else "where is the"
        asked = [Asked(_ask(ask, about), (answer,), (number,)) for about, (answer, number) in last.items()]
        return Story(facts, _some(rng, asked, questions))


@dataclass(frozen=True, kw_only=True)
class _WithThings(_Things):
    """People go, take a thing where they are, carry it along, and put it down.

    A thing is where it was put down; before anybody took it, nobody knows. Whoever has not been seen at a place yet
    goes to one first.
    """

    easing: ClassVar[tuple[float, float]] = (0.85, 0.15)

    def _tell(self, rng: random.Random, count: int, questions: int) -> Story:
        facts: list[tuple[str, ...]] = []
        at, held, lying, moves = now = _Now({}, {}, {}, {})
        for number in range(count):
            person = rng.choice(PEOPLE[: self.people])
            mine = [thing for thing, (who, _) in held.items() if who == person]
            here = at[person][0] if person in at else None
            free = [t for t in THINGS[: self.things] if t not in held and (t not in lying or lying[t][0] == here)]
            what = rng.random()
            if here is not None and mine and what < 0.2:
                thing = rng.choice(mine)
                facts.append(_sentence(person, rng.choice(LEFT), thing))
                del held[thing]
                lying[thing] = here, (at[person][1], number)
            elif here is not None and free and what < 0.55:
                thing = rng.choice(free)
                facts.append(_sentence(person, rng.choice(TOOK), thing))
                lying.pop(thing, None)
                held[thing] = person, number
            else:
                place = _elsewhere(rng, self.places, at.get(person))
                facts.append(_sentence(person, rng.choice(MOVED), place))
                for thing in mine:
                    assert here is not None, "who has a thing was somewhere"
                    needed = at[person][1], held[thing][1], number
                    moves.setdefault(thing, []).append((here, place, needed))
                at[person] = place, number
        return Story(facts, _some(rng, self._questions(now), questions))

    def _questions(self, now: _Now) -> list[Asked]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TwoFacts(_WithThings):
    """Where is a thing? Who has it, and where that person went; or who put it down, and where that was (QA2)."""

    least: int = 4
    most: int = 16
    longest_question: ClassVar[int] = 5

    @property
    def needed(self) -> int:
        return 2

    @property
    def lessons(self) -> tuple[World, ...]:
        """Single facts, of few names, then of all, then more of them; two facts joined, of two people, then of all, and
        ever more of them. With all names from the start each takes many times as long."""
        single = SingleFacts(people=self.people, places=self.places, things=self.things)
        few = dataclasses.replace(single.with_few_names(), places=3)
        return few, single.eased(0), single, self.with_few_names(), self.eased(1), self.eased(2)

    @property
    def chance(self) -> float:
        return 1 / self.places

    def _questions(self, now: _Now) -> list[Asked]:
        known = [(thing, *found) for thing, found in now.lying.items()]
        known += [(thing, now.at[who][0], (now.at[who][1], since)) for thing, (who, since) in now.held.items()]
        return [Asked(_ask("where is the", t), (place,), tuple(sorted(needed))) for t, place, needed in known]


@dataclass(frozen=True, kw_only=True)
class ThreeFacts(_WithThings):
    """Where was a thing before it came to a place? Who took it, went there, and was where before (QA3).

    A place is asked only if the thing came there once, and was not there at first.
    """

    least: int = 8
    most: int = 24

    @property
    def needed(self) -> int:
        return 3

    @property
    def lessons(self) -> tuple[World, ...]:
        """Those of two facts; three facts joined, of two people, then of all, and ever more of them."""
        simpler = TwoFacts(people=self.people, places=self.places, things=self.things)
        return *simpler.lessons, self.with_few_names(), self.eased(0), self.eased(1), self.eased(2)

    @property
    def chance(self) -> float:
        return 1 / (self.places - 1)

    def _questions(self, now: _Now) -> list[Asked]:
        asked = []
        for thing, path in now.moves.items():
            been = [path[0][0], *(to for _, to, _ in path)]
            for before, place, needed in path:
                if been.count(place) == 1:
                    question = _ask("where was the", thing, "before the", place)
                    asked.append(Asked(question, (before,), tuple(sorted(needed))))
        return asked


@dataclass(frozen=True, kw_only=True)
class Values(World):
    """A needle of several values: each of some people has several secrets, told one by one; what are those of one?

    They are wanted in the order told, and differ.

    Attributes:
        people: whose secrets are told, all of them, in any order.
        names: how many there are; the people of a story have some of them.
        each: secrets of each person.
        secrets: how many there are to choose from.
    """

    least: int = field(init=False)
    most: int = field(init=False)
    people: int = 2
    names: int = 8
    each: int = 4
    secrets: int = 16
    longest_fact: ClassVar[int] = 7
    longest_question: ClassVar[int] = 4
    easing: ClassVar[tuple[float, float]] = (0.85, 0.15)

    def __post_init__(self) -> None:
        _check_names(people=(self.people, 1, PEOPLE), secrets=(self.secrets, 1, SECRETS))
        _check_names(names=(self.names, self.people, PEOPLE))
        check_count("each", self.each)
        if self.each > self.secrets:
            raise ValueError(f"each: expected 1 to secrets ({self.secrets}), got {self.each!r}")
        for name in ("least", "most"):  # all are told
            object.__setattr__(self, name, self.people * self.each)

    @property
    def needed(self) -> int:
        return self.each

    @property
    def answer_words(self) -> int:
        return self.each

    @property
    def lessons(self) -> tuple[World, ...]:
        """With one secret each and no more names than people, then with twice as many names, and so on; then with two
        secrets each, with four. With many names from the start it is learned which secrets were told, not whose."""
        names = (*doublings(self.people, self.names), self.names)
        one = [dataclasses.replace(self, each=1, names=count) for count in names]
        more = [dataclasses.replace(self, each=each) for each in (*doublings(2, self.each), self.each) if each > 1]
        return *one, *more

    @property
    def chance(self) -> float:
        return 1 / math.perm(self.secrets, self.each)

    def _tell(self, rng: random.Random, count: int, questions: int) -> Story:
        people = rng.sample(PEOPLE[: self.names], self.people)
        told = {who: rng.sample(SECRETS[: self.secrets], self.each) for who in people}
        turns = rng.sample([who for who in people for _ in range(self.each)], count)
        numbers = {who: [n for n, turn in enumerate(turns) if turn == who] for who in people}
        facts = [_sentence("a secret of", who, "is", told[who][numbers[who].index(n)]) for n, who in enumerate(turns)]
        asked = [Asked(_ask("secrets of", w), tuple(told[w]), tuple(numbers[w])) for w in people]
        return Story(facts, _some(rng, asked, questions))


WORLDS: dict[str, World] = {"qa1": Whereabouts(), "qa2": TwoFacts(), "qa3": ThreeFacts(), "needle": Values()}
"""The worlds in their standard sizes."""
