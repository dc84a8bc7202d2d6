"""Facts in prose: another reader finds the same answers, nothing leaks, lengths are exact, memory is constant."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from memformer import tasks
from memformer.tasks import (
    ASK,
    BLANK,
    WORLDS,
    Episode,
    InProse,
    SingleFacts,
    ThreeFacts,
    TwoFacts,
    Values,
    Whereabouts,
    World,
)
from memformer.tasks.worlds import LEFT, MOVED, NAMES, PLACES, TOOK, WORDS

NOISE = ("he said so", "the sea was calm today", "nothing of it is known , and nobody asks", "they sang", "who was it")
TEXT = "\n\n".join(
    f"{a.capitalize()} and {b}. Then {b}{' again' * (n % 4)}!\nWas it so that {a}?"
    for n, (a, b) in enumerate((a, b) for a in NOISE for b in NOISE)
)
TRAIN, HELD_OUT = tasks.prose_of([TEXT], words=len(WORDS) + 12)
each_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def task_of(world: World, segments: int = 4, per_segment: int = 64, **sizes: int) -> InProse:
    return InProse(world=world, prose=TRAIN, segments=segments, per_segment=per_segment, **sizes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def found(text: str, verbs: Sequence[str]) -> list[tuple[int, str, str]]:
    """Facts with one of these verbs: where, who, what."""
    pattern = rf"\b(\w+) (?:{'|'.join(verbs)}) (\w+) \."
    return [(match.start(), match[1], match[2]) for match in re.finditer(pattern, text)]


def reader(text: str, question: str) -> list[str]:
    """The answer, by plain search in the text. Knows nothing of how it was made."""
    moved, took, left = (found(text, verbs) for verbs in (MOVED, TOOK, LEFT))
    if took and not moved:  # in a lesson, where nobody is at a place: who has a thing
        match = re.fullmatch(r"where is the (\w+) \?", question)
        assert match, question
        return [[who for _, who, what in took if what == match[1]][-1]]
    if match := re.fullmatch(r"where is (\w+) \?", question):
        return [[place for _, who, place in moved if who == match[1]][-1]]
    if match := re.fullmatch(r"secrets of (\w+) \?", question):
        return re.findall(rf"a secret of {match[1]} is (\w+) \.", text)
    if match := re.fullmatch(r"where is the (\w+) \?", question):
        # Backwards: who had it last, and the last place of that person until then or, if carried, at all.
        last, who, how = max((at, who, how) for how in (took, left) for at, who, what in how if what == match[1])
        until = len(text) if how is took else last
        return [[place for at, mover, place in moved if mover == who and at < until][-1]]
    match = re.fullmatch(r"where was the (\w+) before the (\w+) \?", question)
    assert match, question
    events = [(at, "moved", who, what) for at, who, what in moved]
    events += [(at, how, who, what) for how, those in (("took", took), ("left", left)) for at, who, what in those]
    places: dict[str, str] = {}
    has, answer = "", []
    for _, how, who, what in sorted(events):
        if how == "moved":
            if who == has and what == match[2]:
                answer = [places.get(who, "nobody knows")]
            places[who] = what
        elif what == match[1]:
            has = who if how == "took" else ""
    return answer


def texts(task: InProse, episode: Episode) -> list[tuple[str, list[str], list[str]]]:
    """Of each episode the text, the questions, and the words of the answers."""
    out = []
    for tokens, answers in zip(*episode, strict=True):
        words = task.prose.decode(tokens[:-2].flatten().tolist())
        asked = [t for t in tokens[-2].tolist() if t != BLANK]
        cuts = [i for i, token in enumerate(asked) if token == ASK] + [len(asked)]
        questions = [" ".join(task.prose.decode(asked[a + 1 : b])) for a, b in itertools.pairwise(cuts)]
        assert asked[0] == ASK
        out.append((" ".join(words), questions, task.prose.decode(tokens[answers].tolist())))
        last, wanted = tokens[-1].tolist(), answers[-1].tolist()
        again = [token for token, is_answer in zip(last, wanted, strict=True) if not is_answer and token != BLANK]
        assert again == asked, "the last segment asks the same again"
        for begin in (i for i, is_answer in enumerate(wanted) if is_answer and not wanted[i - 1]):
            assert task.prose.decode(last[begin - 1 : begin]) == ["?"], "an answer follows its question"
        assert wanted.count(True) == int(answers.sum())
    return out


@each_world
def test_answers_follow_from_the_text_by_another_reader(world: World) -> None:
    task = task_of(world, per_segment=60, questions=3)
    made = [task.draw(30, generator(1)), task.draw(5, generator(2), 17), task.exercise(5, generator(3))]
    kinds = set()
    for episode in made:
        for text, questions, answers in texts(task, episode):
            assert [word for question in questions for word in reader(text, question)] == answers
            assert len(set(questions)) == len(questions)
            kinds.add(len(questions))
    assert kinds > {1}, "exercises ask several"
    assert all(len(questions) == 1 for _, questions, _ in texts(task, made[0]))


@pytest.mark.parametrize("questions", [0, -1])
def test_no_question_is_refused(questions):
    with pytest.raises(ValueError, match=f"questions: expected a whole number of at least 1, got {questions}"):
        task_of(WORLDS["qa1"]).tell(1, torch.Generator(), questions=questions)


@each_world
def test_the_needed_facts_suffice_and_stand_where_it_is_said(world: World) -> None:
    task = task_of(world)
    told = task.tell(40, generator(), 30)
    (text, asked) = told.parts(30)
    assert told.places.shape == (40, world.needed)
    for lane, places in enumerate(told.places.tolist()):
        assert places == sorted(set(places))
        flat = text.tokens[lane].flatten().tolist()
        stops = [flat.index(task.prose.ids["."], place) + 1 for place in places]
        few = " ".join(" ".join(task.prose.decode(flat[a:b])) for a, b in zip(places, stops, strict=True))
        alone = Episode(*(torch.cat([x[lane : lane + 1] for x in both], 1) for both in zip(text, asked, strict=True)))
        ((_, questions, answers),) = texts(task, alone)
        assert reader(few, questions[0]) == answers


def test_the_last_fact_about_a_person_wins() -> None:
    changed = 0
    for text, (question,), (answer,) in texts(task_of(WORLDS["qa1"]), task_of(WORLDS["qa1"]).draw(60, generator())):
        person = question.split()[2]
        places = [place for _, who, place in found(text, MOVED) if who == person]
        assert places[-1] == answer
        changed += places[0] != answer
    assert changed > 10


@each_world
def test_facts_stand_between_sentences_and_nothing_else_has_their_names(world: World) -> None:
    task = task_of(world, per_segment=50)
    dots = {task.prose.ids[mark] for mark in (".", "!", "?") if mark in task.prose.ids}
    names = {task.prose.ids[name] for name in NAMES}
    for prose in (TRAIN, HELD_OUT):
        assert not names.intersection(prose.tokens.tolist())
        assert set(prose.tokens[prose.starts[1:] - 1].tolist()) <= dots
    for text, _, _ in texts(task, task.draw(40, generator())):
        facts = list(re.finditer(rf"\b(\w+) (?:{'|'.join((*MOVED, *TOOK, *LEFT))}) (\w+) \.|a secret of", text))
        assert all(fact.start() == 0 or text[fact.start() - 2] in ".!?" for fact in facts)
        assert world.least <= len(facts) <= world.most


def test_the_length_is_exact_and_parts_are_the_whole() -> None:
    task = task_of(WORLDS["qa2"], per_segment=100)
    for segments in (1, 2, 7):
        whole = task.draw(3, generator(5), segments)
        assert whole.tokens.shape == (3, segments + 2, 100)
        assert BLANK not in whole.tokens[:, :-2], "all of it is text"
        for at_once in (1, 3, 100):
            parts = list(task.tell(3, generator(5), segments).parts(at_once))
            assert torch.equal(torch.cat([part.tokens for part in parts], 1), whole.tokens)
            assert torch.equal(torch.cat([part.answers for part in parts], 1), whole.answers)
            assert {part.tokens.shape[1] for part in parts[:-2]} <= {at_once}
            assert [part.tokens.shape[1] for part in parts[-1:]] == [2]


def test_without_its_facts_a_text_is_the_prose_in_its_circle() -> None:
    task = task_of(Whereabouts(least=1, most=3), segments=9)
    circle = TRAIN.tokens.tolist()
    for tokens in task.draw(20, generator()).tokens[:, :-2].flatten(1).tolist():
        text = " ".join(task.prose.decode(tokens))
        background = re.sub(rf"\b(\w+) (?:{'|'.join(MOVED)}) (\w+) \. ?", "", text).split()
        begins = [int(s) for s in TRAIN.starts[:-1]]
        assert any(
            task.prose.decode([circle[(begin + i) % len(circle)] for i in range(len(background))]) == background
            for begin in begins
        )


def test_a_million_tokens_take_no_more_memory_than_a_thousand() -> None:
    task = task_of(WORLDS["qa3"], segments=2, per_segment=256)
    peaks = []
    for segments in (8, 4096):
        tracemalloc.start()
        count = sum(part.tokens.shape[1] for part in task.tell(2, generator(), segments).parts(4))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == segments + 2
    assert peaks[1] < peaks[0] + 50_000


def test_the_same_seed_tells_the_same_and_lanes_differ() -> None:
    task = task_of(WORLDS["qa3"])
    torch.manual_seed(1)
    random.seed(1)
    first = task.draw(4, generator(7))
    torch.manual_seed(2)
    random.seed(2)
    again, other = task.draw(4, generator(7)), task.draw(4, generator(8))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert len({tuple(lane) for lane in first.tokens.flatten(1).tolist()}) == 4


def spread(counts: np.ndarray) -> float:
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize(
    ("world", "choices"),
    [
        (Whereabouts(), 6),
        (TwoFacts(), 6),
        (ThreeFacts(), 5),
        (Values(each=2, secrets=4), 12),
        (SingleFacts(people=6), 6),
    ],
    ids=["qa1", "qa2", "qa3", "needle", "single"],
)
def test_chance_is_one_of_all_answers_whatever_is_asked(world: World, choices: int) -> None:
    """Answers are equally likely, given the question: the best guess without a memory has nothing to go by."""
    rng, counts = random.Random(0), dict[str, dict[str, int]]()
    for _ in range(6000):
        ((question, answer, _),) = world.tell(rng).asked
        of_question = counts.setdefault(" ".join(question), {})
        of_question[" ".join(answer)] = of_question.get(" ".join(answer), 0) + 1
    assert world.chance == pytest.approx(1 / choices)
    for question, answers in counts.items():
        if sum(answers.values()) > 10 * choices:
            assert len(answers) == choices, question
            assert spread(np.array(list(answers.values()))) < 5, question


@pytest.mark.parametrize(
    ("name", "facts", "words", "after", "last", "any_told"),
    [
        ("qa1", 6.0, 36, 1.5, 0.46, 0.34),
        ("qa2", 10.3, 61, 5.7, 0.35, 0.29),
        ("qa3", 16.8, 99, 12.0, 0.16, 0.22),
        ("needle", 8, 56, 6.2, 0, 0),
    ],
)
def test_the_statistics_in_the_documentation(
    name: str, facts: float, words: float, after: float, last: float, any_told: float
) -> None:
    rng, rows = random.Random(0), []
    for _ in range(2000):
        story = WORLDS[name].tell(rng)
        answer, needed = story.asked[0].answer[0], story.asked[0].needed
        told = [word for fact in story.facts for word in fact if word in PLACES] or [""]
        count = len(story.facts)
        guesses = told[-1] == answer, told.count(answer) / len(told)
        rows.append((count, sum(map(len, story.facts)), count - 1 - needed[0], *guesses))
    found = np.mean(rows, 0)
    assert found[:3] == pytest.approx([facts, words, after], rel=0.05)
    assert found[3:] == pytest.approx([last, any_told], abs=0.03)


@each_world
def test_the_longest_facts_and_questions_are_as_long_as_is_said(world: World) -> None:
    rng = random.Random(0)
    stories = [world.tell(rng) for _ in range(200)]
    assert max(len(fact) for story in stories for fact in story.facts) == world.longest_fact
    assert max(len(story.asked[0].question) for story in stories) == world.longest_question
    assert {len(story.asked[0].answer) for story in stories} == {world.answer_words}


@each_world
def test_the_first_needed_fact_stands_anywhere(world: World) -> None:
    task = task_of(world, segments=2000)
    places = torch.cat([task.tell(100, generator(seed)).places[:, 0] for seed in range(8)])
    deciles = np.bincount((10 * places / (2000 * 64)).long().numpy(), minlength=10)
    assert spread(deciles) < 4
    for depth in (0.0, 0.25, 1.0):
        places = task.tell(20, generator(), depth=depth).places[:, 0]
        torch.testing.assert_close(places / (2000 * 64), torch.full((20,), depth), atol=0.005, rtol=0)


def test_half_of_the_exercises_are_half_as_long() -> None:
    one = generator()
    lengths = [task_of(WORLDS["qa1"], segments=12).practice(1, one).tokens // 64 for _ in range(60)]
    assert set(lengths) == {12, 6}
    assert 15 < lengths.count(6) < 45
    assert {task_of(WORLDS["qa1"], segments=1).practice(1, one).tokens // 64 for _ in range(20)} == {1}


@each_world
def test_eased_texts_have_each_fact_whole_in_a_segment_of_its_own(world: World) -> None:
    task, shortest, most = task_of(world, segments=30, per_segment=100, questions=3), 0, 0
    lessons, others = world.easing
    for progress in (0, *(lessons + others * part for part in (0.1, 0.5, 0.95))):
        easier = task.eased(progress)
        assert shortest < easier.length < task.length, "ever longer"
        assert most <= easier.world.most <= easier.segments < task.segments, "ever more facts"
        shortest, most = easier.length, easier.world.most
        told = easier.tell(12, generator(), questions=easier.questions)
        episode = Episode(*(torch.cat(parts, 1) for parts in zip(*told.parts(3), strict=True)))
        for tokens, (text, questions, answers) in zip(episode.tokens, texts(easier, episode), strict=True):
            assert [word for question in questions for word in reader(text, question)] == answers
            segments = [" ".join(easier.prose.decode(segment)) for segment in tokens[:-2].tolist()]
            facts = [len(NAMES & set(segment.split())) for segment in segments]
            assert set(facts) <= {0, 2}, "a fact has two names, and no other is with it"
            assert easier.world.least <= facts.count(2) <= easier.world.most
        for lane, places in enumerate(told.places.tolist()):
            for place in places:
                segment = " ".join(easier.prose.decode(episode.tokens[lane, place // easier.length].tolist()))
                assert len(NAMES & set(segment.split())) == 2
    assert easier.least_segments < easier.segments or world.least < easier.world.most, "some segments have no fact"
    assert task.eased(min(1, lessons + others + 0.01)) is task
    assert task.eased(1) is task


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_lessons_come_in_turn_and_are_right(world: World) -> None:
    """In the shortest segments there are, each for the same share; answers are found by another reader."""
    task, lessons = task_of(world, segments=30, per_segment=100), world.lessons
    seen = [task.eased(world.easing[0] * (n + 0.5) / len(lessons)) for n in range(len(lessons))]
    assert tuple(easier.world for easier in seen) == lessons
    for easier, lesson in zip(seen, lessons, strict=True):
        assert easier.length == max(lesson.longest_fact, 1 + lesson.longest_question + lesson.answer_words)
    kinds = set()
    for easier in seen:
        for text, questions, answers in texts(easier, easier.exercise(40, generator())):
            assert [word for question in questions for word in reader(text, question)] == answers
            if isinstance(easier.world, SingleFacts):
                kinds.add((any(verb in text for verb in MOVED), any(verb in text for verb in TOOK)))
    things = isinstance(world, TwoFacts | ThreeFacts)
    assert kinds == ({(True, False), (False, True)} if things else set()), "one kind of fact in a story"


def test_what_is_joined_is_learned_apart_first() -> None:
    """Things without places come before things that are carried, few names before many, and few facts before many."""
    single = SingleFacts(people=2, places=3, things=2, most=2), SingleFacts(most=2), SingleFacts()
    two = TwoFacts(people=2, things=2, most=4), TwoFacts(most=8), TwoFacts(most=16)
    assert WORLDS["qa2"].lessons == (*single, *two)
    three = ThreeFacts(people=2, things=2, most=8), ThreeFacts(most=8), ThreeFacts(most=16), ThreeFacts()
    assert WORLDS["qa3"].lessons == (*single, *two, *three)
    of_two = TwoFacts(people=2, places=3, things=1)
    assert of_two.lessons[0] == SingleFacts(people=2, places=3, things=1, most=2)
    assert WORLDS["qa1"].lessons == (Whereabouts(most=2),)
    few_names = Values(each=1, names=2), Values(each=1, names=4)
    assert WORLDS["needle"].lessons == (*few_names, Values(each=1), Values(each=2), Values())
    assert Values(each=3).lessons == (*few_names, Values(each=1), Values(each=2), Values(each=3))
    assert Values(each=1, names=2).lessons == (Values(each=1, names=2),)
    assert Values(people=3, names=7, each=1).lessons == tuple(Values(people=3, names=n, each=1) for n in (3, 6, 7))


def test_the_easiest_texts_are_two_facts_and_nothing_else() -> None:
    easiest = task_of(WORLDS["qa1"], per_segment=100).eased(0)
    assert (easiest.segments, easiest.length, easiest.world.most, easiest.questions) == (2, 6, 2, 1)
    stages = [task_of(WORLDS["qa1"], per_segment=100).eased(p) for p in (0.39, 0.41, 0.5, 0.6, 0.65, 0.71)]
    assert [task.length for task in stages] == [6, 12, 24, 48, 96, 100]
    assert [task.world.most for task in stages] == [2, 4, 8, 10, 10, 10]


@pytest.mark.parametrize("name", ["qa1", "qa2", "needle"])
def test_lessons_come_where_no_segment_is_shorter(name: str) -> None:
    shortest = task_of(WORLDS[name], per_segment=100).eased(0.99 * WORLDS[name].easing[0]).length
    short = task_of(WORLDS[name], segments=30, per_segment=shortest)
    first, _ = WORLDS[name].easing
    assert short.eased(0).world == WORLDS[name].lessons[0]
    assert short.eased(0.99 * first).world == WORLDS[name].lessons[-1]
    assert short.eased(1.01 * first) is short


def test_a_world_may_have_no_share_for_longer_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Whereabouts, "easing", (0.7, 0.0))
    task = task_of(WORLDS["qa1"], per_segment=100)
    assert [task.eased(progress).length for progress in (0, 0.69, 0.7, 1)] == [6, 6, 100, 100]


def test_words_are_the_most_frequent_ones_of_the_training_prose() -> None:
    assert TRAIN.words is HELD_OUT.words
    assert TRAIN.words[: len(WORDS)] == WORDS
    assert len(TRAIN.words) == len(WORDS) + 12
    assert TRAIN.decode(TRAIN.encode(["so", "zebra", "ada"])) == ["so", "[unknown]", "ada"]
    assert (TRAIN.tokens == 3).any(), "rare words are unknown"
    assert len(HELD_OUT.starts) - 1 == (len(TRAIN.starts) - 1 + len(HELD_OUT.starts) - 1) // 5


def test_prose_by_default_and_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(
        TEXT + "\n\nAda\u2019s tower. Bruno slept a lot here.\n\nA HEADING\n\na, b, c (table)\n"
    )
    assert tasks.read_prose(tmp_path)[0].startswith("He said so")
    train, held_out = tasks.in_prose("needle", tmp_path, words=100, per_segment=80)
    assert (train.world, train.segments, held_out.chance) == (WORLDS["needle"], 4, 1 / 43680)
    assert "slept" not in train.prose.words, "a sentence with a name is none of the prose"
    train, held_out = tasks.in_prose("qa1")
    assert len(train.prose.tokens) > 30_000
    assert len(held_out.prose.tokens) > 5_000
    assert (train.prose.tokens == 3).mean() < 0.05
    assert train.prose.words == held_out.prose.words
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ImportError, match="Python comes without: give a path"):
        tasks.read_prose()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Whereabouts(people=9), "people: there are names for 8, got 9"),
        (lambda: Whereabouts(places=1), "places: expected a whole number of at least 2, got 1"),
        (lambda: Whereabouts(least=5, most=4), "most: expected a whole number of at least 5, got 4"),
        (lambda: TwoFacts(least=1), "least: expected a whole number of at least 2, got 1"),
        (lambda: SingleFacts(people=9), "people: there are names for 8, got 9"),
        (lambda: SingleFacts(places=9), "places: there are names for 8, got 9"),
        (lambda: ThreeFacts(things=0), "things: expected a whole number of at least 1, got 0"),
        (lambda: Values(each=5, secrets=4), r"each: expected 1 to secrets \(4\), got 5"),
        (lambda: Values(names=9), "names: there are names for 8, got 9"),
        (lambda: Values(people=3, names=2), "names: expected a whole number of at least 3, got 2"),
        (lambda: Values(each=2.0), r"each: expected a whole number of at least 1, got 2.0"),
        (lambda: tasks.prose_of("One text."), "texts: expected several, got one str: put it into a list"),
        (lambda: dataclasses.replace(task_of(WORLDS["qa1"]), world="qa1"), "world: expected a World, .*, got 'qa1'"),
        (lambda: task_of(WORLDS["qa1"]).tell(2, 0), "generator: expected a torch.Generator"),
        (lambda: tasks.in_prose("qa9"), "world: expected one of qa1, qa2, qa3, needle, got 'qa9'"),
        (lambda: tasks.prose_of([TEXT], words=3), f"words: expected a whole number of at least {len(WORDS)}, got 3"),
        (lambda: tasks.prose_of(["One sentence is here."]), "texts: expected 10 sentences .* got 1"),
        (lambda: task_of(WORLDS["qa1"], per_segment=20, questions=4), "per_segment: questions .* 24 tokens, got 20"),
        (lambda: task_of(WORLDS["qa3"], segments=1), "segments: the facts alone may fill 3 segments of 64, got 1"),
        (lambda: task_of(WORLDS["qa1"]).tell(1, generator(), depth=1.5), r"depth: expected 0 .* got 1.5"),
        (lambda: task_of(WORLDS["qa1"]).eased(0).tell(1, generator(), depth=0.5), "depth: facts that are apart"),
        (lambda: task_of(WORLDS["qa1"]).eased(-0.1), r"progress: expected 0 .* to 1 .*, got -0.1"),
        (lambda: task_of(WORLDS["qa1"]).eased(1.1), r"progress: expected 0 .* to 1 .*, got 1.1"),
        (lambda: task_of(WORLDS["qa1"]).eased(math.nan), r"progress: expected 0 .* to 1 .*, got nan"),
        (lambda: tasks.KeyValue(pairs=4).eased(math.nan), r"progress: expected 0 .* to 1 .*, got nan"),
        (lambda: TRAIN.decode([4, 99999]), r"tokens: expected ids from 0 to \d+, got 99999"),
        (lambda: TRAIN.decode([-1]), r"tokens: expected ids from 0 to \d+, got -1"),
        (
            lambda: task_of(WORLDS["qa3"]).draw(1, generator(), 2),
            "segments: expected a whole number of at least 3, got 2",
        ),
    ],
)
def test_mistakes_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_tasks_with_prose_are_equal_only_to_themselves() -> None:
    task = task_of(WORLDS["qa1"])
    assert task == task != dataclasses.replace(task)
