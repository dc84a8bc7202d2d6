"""The tasks: right answers, nothing that gives them away, and the scores that they name."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from memformer import Memformer, tasks
from memformer.tasks import (
    ASK,
    BLANK,
    START,
    SYMBOLS,
    TASKS,
    AssociativeRetrieval,
    Copy,
    Episode,
    KeyValue,
    OneFact,
    Pixels,
    Reverse,
    Task,
)

DOTS = torch.arange(600).mul(7).remainder(11).remainder(4).reshape(50, 12)
SMALL = {
    "copy": Copy(segments=3, symbols=5, per_segment=4),
    "reverse": Reverse(segments=3, symbols=5, per_segment=4),
    "retrieval": AssociativeRetrieval(segments=6, pairs=4, keys=5, values=3),
    "rewrite": AssociativeRetrieval(segments=6, pairs=5, keys=2, values=3, rewrite=True),
    "one fact": OneFact(segments=5, facts=3, noise=4),
    "pairs": KeyValue(pairs=2, symbols=3),
    "pixels": Pixels(images=DOTS, levels=4, per_segment=3),
}
each_task = pytest.mark.parametrize("task", SMALL.values(), ids=SMALL.keys())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lanes(episode: Episode) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Of each episode its segments, and its answers in order."""
    for tokens, answers in zip(*episode, strict=True):
        yield tokens.tolist(), tokens[answers].tolist()


def flat(segments: list[list[int]]) -> list[int]:
    return [token for segment in segments for token in segment]


def read_pairs(tokens: list[list[int]], answers: list[int], symbols: int, pairs: int, asked: int) -> None:
    """One episode of pairs, read word by word."""
    given, *between, question = tokens
    assert set(flat(between)) <= {BLANK}
    bound = {}
    for place in range(0, 4 * pairs, 4):
        first, second, *value = given[place : place + 4]
        assert all(SYMBOLS <= symbol < SYMBOLS + symbols for symbol in (first, second, *value))
        assert (first, second) not in bound, "keys differ"
        bound[first, second] = value
    assert len(given) == 4 * pairs
    keys = [tuple(question[place : place + 2]) for place in range(0, 4 * asked, 4)]
    assert len(set(keys)) == asked
    assert question == [*flat([[*key, *bound[key]] for key in keys]), *[BLANK] * (4 * (pairs - asked))]
    assert answers == flat([bound[key] for key in keys])


seeds = st.integers(0, 2**31)
counts = st.integers(1, 6)


class TestRight:
    """Answers against the plainest way of finding them."""

    @given(seed=seeds, segments=counts, symbols=counts, per_segment=counts, batch=counts)
    @settings(deadline=None, max_examples=30)
    def test_copy_and_reverse(self, seed: int, segments: int, symbols: int, per_segment: int, batch: int) -> None:
        sizes = {"segments": segments, "symbols": symbols, "per_segment": per_segment}
        for task in (Copy(**sizes), Reverse(**sizes)):
            for tokens, answers in lanes(task.draw(batch, generator(seed))):
                given_symbols = flat(tokens[:segments])
                assert all(SYMBOLS <= symbol < SYMBOLS + symbols for symbol in given_symbols)
                assert tokens[segments] == [ASK] * per_segment
                wanted = given_symbols if type(task) is Copy else given_symbols[::-1]
                assert flat(tokens[segments + 1 :]) == answers == wanted

    @given(seed=seeds, segments=counts, pairs=counts, keys=counts, values=counts, rewrite=st.booleans(), batch=counts)
    @settings(deadline=None, max_examples=60)
    def test_retrieval(
        self, seed: int, segments: int, pairs: int, keys: int, values: int, rewrite: bool, batch: int
    ) -> None:
        pairs = min(pairs, segments) if rewrite else min(pairs, segments, keys)
        task = AssociativeRetrieval(segments=segments, pairs=pairs, keys=keys, values=values, rewrite=rewrite)
        for drawn in (segments, segments + 3, 1):
            for tokens, answers in lanes(task.draw(batch, generator(seed), drawn)):
                *information, (ask, asked), (answer, blank) = tokens
                assert (ask, blank) == (ASK, BLANK)
                assert len(information) == drawn
                bound: dict[int, int] = {}
                written = 0
                for key, value in information:
                    if key < SYMBOLS + keys:
                        assert SYMBOLS <= key < SYMBOLS + keys <= value < SYMBOLS + keys + values
                        bound[key] = value
                        written += 1
                    else:
                        assert SYMBOLS + keys + values <= min(key, value), "noise has tokens of its own"
                assert written == min(pairs, drawn)
                assert rewrite or len(bound) == written, "keys differ"
                assert [bound[asked]] == answers == [answer]

    @given(seed=seeds, segments=counts, facts=counts, noise=counts, batch=counts)
    @settings(deadline=None, max_examples=30)
    def test_one_fact(self, seed: int, segments: int, facts: int, noise: int, batch: int) -> None:
        task = OneFact(segments=segments, facts=facts, noise=noise)
        for tokens, answers in lanes(task.draw(batch, generator(seed))):
            assert tokens[-2:] == [[ASK] * 4, [*answers, BLANK, BLANK, BLANK]]
            fact = [token for token in flat(tokens[:segments]) if token < SYMBOLS + facts]
            assert fact == answers
            assert set(tokens[0]) & set(fact)

    @given(seed=seeds, pairs=counts, symbols=st.integers(3, 9), asked=counts, batch=counts)
    @settings(deadline=None)
    def test_pairs(self, seed: int, pairs: int, symbols: int, asked: int, batch: int) -> None:
        task = KeyValue(pairs=pairs, symbols=symbols, questions=min(pairs, asked))
        for drawn in (None, 1, 3):
            episode = task.draw(batch, generator(seed), drawn)
            assert episode.tokens.shape == (batch, (drawn or 1) + 1, task.length)
            for tokens, answers in lanes(episode):
                read_pairs(tokens, answers, symbols, pairs, 1)
        counts = []
        for progress in (0, 0.09, 0.11, 0.19, 0.2, 0.99):
            easier = task.eased(progress)
            episode = easier.exercise(batch, generator(seed))
            counts.append(easier.pairs)
            assert episode.tokens.shape == (batch, 2, task.length), "all places are there from the beginning"
            for (given_, asks), answers in lanes(episode):
                told = Counter(zip(*[iter(given_)] * 4, strict=True))
                assert set(told.values()) <= {pairs // easier.pairs, -(-pairs // easier.pairs)}, "all as often"
                question, rest = asks[: 4 * easier.pairs], asks[4 * easier.pairs :]
                assert rest == [BLANK] * (4 * (pairs - easier.pairs))
                read_pairs([flat(told), question], answers, symbols, easier.pairs, min(easier.pairs, asked))
        assert counts == [min(pairs, n) for n in (2, 2, 4, 4, pairs, pairs)]

    def test_pairs_are_doubled_in_equal_steps(self) -> None:
        task = KeyValue(pairs=16)
        counts = [task.eased(progress).pairs for progress in (0, 0.099, 0.101, 0.149, 0.151, 0.199, 0.2, 1)]
        assert counts == [2, 2, 4, 4, 8, 8, 16, 16]
        assert [KeyValue(pairs=20).eased(progress).pairs for progress in (0.12, 0.15, 0.18, 0.21)] == [4, 8, 16, 20]

    def test_rewrite_wants_the_last_value(self) -> None:
        """Keys are indeed bound more than once, and their first value is not what is wanted."""
        firsts = 0
        for tokens, answers in lanes(SMALL["rewrite"].draw(200, generator())):
            asked = tokens[-2][1]
            values = [value for key, value in tokens[:-2] if key == asked]
            firsts += values[0] != answers[0]
        assert firsts > 50

    def test_pixels(self) -> None:
        images = torch.arange(24).reshape(2, 12)
        task = Pixels(images=images, levels=24, per_segment=3)
        assert (task.segments, task.length, task.vocabulary) == (3, 3, SYMBOLS + 24)
        tokens, answers = task.draw(2, generator())
        assert sorted((tokens - SYMBOLS).flatten(1).tolist()) == images.tolist()
        assert answers.tolist() == [[[False] * 3, *[[True] * 3] * 3]] * 2
        shorter = task.draw(2, generator(), segments=1)
        assert torch.equal(shorter.tokens, tokens[:, :2])
        assert torch.equal(shorter.answers, answers[:, :2])


class TestShape:
    @each_task
    def test_what_holds_for_all(self, task: Task) -> None:
        for segments in (None, 1, 2):
            tokens, answers = task.draw(50, generator(), segments)
            assert tokens.shape == answers.shape
            assert tokens.shape[::2] == (50, task.length)
            assert (tokens.dtype, answers.dtype) == (torch.long, torch.bool)
            assert START not in tokens, "what starts a decoder must not be read from an episode"
            assert tokens.max() < task.vocabulary
            assert not answers[:, 0].any(), "nothing stands before the first segment"
            assert answers[:, -1].any(1).all()

    @each_task
    def test_the_vocabulary_has_no_token_too_many(self, task: Task) -> None:
        tokens = task.draw(50, generator()).tokens
        more = torch.cat([task.draw(50, generator(seed)).tokens for seed in range(20)])
        used = set(torch.cat([tokens, more]).unique().tolist()) | {START, ASK, BLANK}
        assert used == set(range(task.vocabulary))

    @each_task
    def test_same_generator_same_episodes(self, task: Task) -> None:
        one = generator(3)
        first, second = task.draw(20, one), task.draw(20, one)
        torch.manual_seed(1)
        again = generator(3)
        for episode in (first, second):
            repeated = task.draw(20, again)
            assert torch.equal(episode.tokens, repeated.tokens)
            assert torch.equal(episode.answers, repeated.answers)
        assert not torch.equal(first.tokens, second.tokens)

    def test_more_segments_than_pairs(self) -> None:
        task = AssociativeRetrieval()
        assert task.draw(3, generator(), 16).tokens.shape == (3, 18, 2)

    def test_the_table_of_standard_sizes(self) -> None:
        assert {"copy", "reverse", "retrieval", "rewrite", "one-fact"} <= TASKS.keys()
        sixteen = TASKS["retrieval-16"]
        assert isinstance(sixteen, AssociativeRetrieval)
        assert (sixteen.pairs, sixteen.segments, sixteen.keys, sixteen.values) == (8, 8, 16, 16)
        retrieval = TASKS["retrieval"]
        assert isinstance(retrieval, AssociativeRetrieval)
        assert (retrieval.pairs, retrieval.segments) == (8, 8)
        shapes = {name: tuple(task.draw(1, generator()).tokens[0].shape) for name, task in TASKS.items()}
        assert shapes == {
            "copy": (9, 6), "reverse": (9, 6), "retrieval": (10, 2), "rewrite": (10, 2), "one-fact": (34, 4),
            "retrieval-16": (10, 2), "pairs-4": (2, 16), "pairs-8": (2, 32), "pairs-16": (2, 64), "pairs-32": (2, 128),
        }  # fmt: skip
        assert all(2 * task.chance < task.solved < 1 for task in TASKS.values())


def spread(counts: Tensor) -> float:
    """How far counts are from equal, in standard deviations of a fair draw (chi-square, normal approximation)."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


class TestFair:
    """What is drawn is uniform, and tells nothing of the answer but by way of the memory."""

    COUNT = 20_000

    def test_keys_and_places_asked(self) -> None:
        task = AssociativeRetrieval(segments=6, pairs=3, keys=7, values=5)
        tokens, answers = task.draw(self.COUNT, generator())
        asked = tokens[:, -2, 1]
        place = (tokens[:, :-2, 0] == asked[:, None]).long().argmax(1)
        assert spread((asked - SYMBOLS).bincount(minlength=7)) < 4
        assert spread(place.bincount(minlength=6)) < 4
        assert spread((tokens[answers] - SYMBOLS - 7).bincount(minlength=5)) < 4

    def test_pairs_told_twice_stand_anywhere(self) -> None:
        tokens = KeyValue(pairs=2, places=3, symbols=9).draw(300, generator()).tokens[:, 0].unflatten(1, (3, 4))
        alone = torch.stack([(tokens == tokens.roll(by, 1)).all(2).logical_not() for by in (1, 2)]).all(0)
        assert (alone.sum(1) == 1).all()
        assert alone.sum(0).min() > 70

    def test_pairs_asked_and_their_symbols(self) -> None:
        task = KeyValue(pairs=4, symbols=3)
        tokens, answers = task.draw(self.COUNT, generator())
        given = tokens[:, 0].unflatten(1, (4, 2, 2)) - SYMBOLS
        asked = tokens[:, -1, :2] - SYMBOLS
        place = (given[:, :, 0] == asked[:, None]).all(2).long().argmax(1)
        assert spread(place.bincount(minlength=4)) < 4
        numbers = 3 * given[..., 0] + given[..., 1]
        for column in numbers.flatten(1).T:
            assert spread(column.bincount(minlength=9)) < 4
        wanted = tokens[answers].view(-1, 2) - SYMBOLS
        assert spread((3 * wanted[:, 0] + wanted[:, 1]).bincount(minlength=9)) < 4
        assert task.chance == pytest.approx(1 / 9)
        both = 9 * (3 * asked[:, 0] + asked[:, 1]) + 3 * wanted[:, 0] + wanted[:, 1]
        assert spread(both.bincount(minlength=81)) < 4, "the key tells nothing of its value"

    def test_symbols_facts_and_their_places(self) -> None:
        copied, _ = SMALL["copy"].draw(self.COUNT, generator())
        for place in range(4):
            assert spread((copied[:, 1, place] - SYMBOLS).bincount(minlength=5)) < 4
        tokens, answers = SMALL["one fact"].draw(self.COUNT, generator())
        assert spread((tokens[answers] - SYMBOLS).bincount(minlength=3)) < 4
        assert spread((tokens[:, 0] < SYMBOLS + 3).long().argmax(1).bincount(minlength=4)) < 4

    def test_images(self) -> None:
        images = torch.arange(10)[:, None].expand(10, 2)
        task, one = Pixels(images=images, levels=10, per_segment=1), generator()
        drawn = torch.cat([task.draw(4, one).tokens[:, 0, 0] for _ in range(5000)])
        assert spread((drawn - SYMBOLS).bincount(minlength=10)) < 4
        whole = task.draw(10, one).tokens[:, 0, 0]
        assert whole.unique().numel() == 10, "the images of a batch differ"

    @pytest.mark.parametrize("name", ["retrieval", "rewrite", "one fact"])
    def test_noise_never_reveals_the_answer(self, name: str) -> None:
        """Each token of noise and the answer are independent: a table of both is as flat as chance makes it."""
        task = SMALL[name]
        tokens, answers = task.draw(self.COUNT, generator())
        wanted = tokens[answers]
        choices = wanted.unique()
        first_noise = SYMBOLS + (task.facts if isinstance(task, OneFact) else task.keys + task.values)
        noise = task.vocabulary - first_noise
        for segment in range(task.segments):
            for place in range(task.length):
                here = tokens[:, segment, place]
                is_noise = here >= first_noise
                if not is_noise.any():
                    continue
                both = (wanted[is_noise] - choices[0]) * noise + here[is_noise] - first_noise
                assert spread(both.bincount(minlength=len(choices) * noise)) < 5

    @pytest.mark.parametrize("name", ["copy", "reverse", "retrieval", "rewrite", "one fact"])
    def test_chance_is_the_best_guess_without_a_memory(self, name: str) -> None:
        """Learned by counting, from the last three tokens before an answer, in its segment and the one before."""
        task = SMALL[name]
        seen: dict[tuple, Tensor] = {}
        for seed, role in enumerate(("count", "guess")):
            tokens, answers = task.draw(self.COUNT, generator(seed))
            # The last segment's last answer: the most is known there.
            place = int(answers[0, -1].nonzero().max())
            context = torch.cat([tokens[:, -2], tokens[:, -1, :place]], 1)[:, -3:]
            right = 0
            for key, wanted in zip(map(tuple, context.tolist()), tokens[:, -1, place].tolist(), strict=True):
                if role == "count":
                    seen.setdefault(key, torch.zeros(task.vocabulary))[wanted] += 1
                elif key in seen:
                    right += int(seen[key].argmax()) == wanted
        assert right / self.COUNT == pytest.approx(task.chance, abs=0.015)


class TestScores:
    def test_bits_by_chance_counted_by_hand(self) -> None:
        """Two places after the first; levels 0, 0, 1 of two at one and 1, 1, 1 at the other, each level once more."""
        train = torch.tensor([[0, 0, 1], [0, 0, 1], [1, 1, 1]])
        task = Pixels(images=torch.tensor([[1, 1, 0]]), levels=2, per_segment=1, counted=train)
        assert task.chance == pytest.approx(-(torch.tensor(2 / 5).log2() + torch.tensor(1 / 5).log2()).item() / 2)
        assert task.solved == pytest.approx(0.8 * task.chance)

    def test_either_metric(self) -> None:
        accuracy, bits = SMALL["copy"], SMALL["pixels"]
        assert (accuracy.metric, bits.metric) == ("accuracy", "bits")
        assert accuracy.solves(1.0)
        assert accuracy.solves(accuracy.solved)
        assert not accuracy.solves(0.98)
        assert bits.solves(0.0)
        assert not bits.solves(bits.chance)

    def test_grey_levels_of_one_byte(self) -> None:
        images = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8)
        task = Pixels(images=images, levels=256, per_segment=1)
        assert task.draw(2, generator()).tokens.max() == SYMBOLS + 255
        assert task.chance == pytest.approx(-torch.tensor(2 / 258).log2().item())


IMAGES = torch.zeros(3, 4, dtype=torch.long)


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Copy(segments=0), "segments: expected a whole number of at least 1, got 0"),
            (lambda: Copy(symbols=2.0), "symbols: expected a whole number"),  # type: ignore[arg-type]
            (lambda: Reverse(per_segment=-1), "per_segment: expected a whole number"),
            (lambda: OneFact(facts=0), "facts: expected"),
            (lambda: OneFact(noise=0), "noise: expected"),
            (lambda: AssociativeRetrieval(pairs=0), "pairs: expected"),
            (lambda: AssociativeRetrieval(keys=0), "keys: expected"),
            (lambda: AssociativeRetrieval(values=True), "values: expected"),
            (lambda: AssociativeRetrieval(pairs=9), r"pairs: .*at most segments \(8\), got 9"),
            (lambda: AssociativeRetrieval(keys=7), r"pairs: .*at most keys \(7\), got 8. .*rewrite=True"),
            (lambda: KeyValue(pairs=0), "pairs: expected"),
            (lambda: KeyValue(pairs=5, symbols=2), r"pairs: .*at most symbols \*\* 2 \(4\), got 5"),
            (lambda: KeyValue(pairs=5, questions=6), r"questions: expected at most pairs \(5\), got 6"),
            (lambda: KeyValue(pairs=5, places=4), r"places: expected 0 or at least as many as pairs \(5\), got 4"),
            (lambda: Pixels(images=IMAGES, levels=0, per_segment=2), "levels: expected"),
            (lambda: Pixels(images=IMAGES, levels=2, per_segment=0), "per_segment: expected"),
            (lambda: Pixels(images=IMAGES, levels=2, per_segment=3), "per_segment: must cut the 4 pixels.* got 3"),
            (lambda: Pixels(images=IMAGES, levels=2, per_segment=4), "per_segment: must cut the 4 pixels.* got 4"),
            (lambda: Pixels(images=IMAGES[0], levels=2, per_segment=2), r"images: .*\(count, pixels\), got .*\(4,\)"),
            (lambda: Pixels(images=IMAGES[:0], levels=2, per_segment=2), r"images: .*got .*\(0, 4\)"),
            (lambda: Pixels(images=IMAGES / 2, levels=2, per_segment=2), "images: expected whole numbers.*float32"),
            (lambda: Pixels(images=IMAGES > 0, levels=2, per_segment=2), "images: expected whole numbers.*bool"),
            (lambda: Pixels(images=IMAGES + 2, levels=2, per_segment=2), "images: .*from 0 to 1, got 2 to 2"),
            (lambda: Pixels(images=IMAGES - 1, levels=2, per_segment=2), "images: .*from 0 to 1, got -1 to -1"),
            (lambda: Pixels(images=IMAGES, levels=2, per_segment=2, counted=IMAGES[:, :2]), "counted: .*4 pix.*got 2"),
            (lambda: Pixels(images=IMAGES, levels=2, per_segment=2, counted=IMAGES + 2), "counted: .*got 2 to 2"),
            (lambda: Pixels(images=IMAGES, levels=2, per_segment=2, solved_share=1.5), "solved_share: .*got 1.5"),
        ],
    )  # fmt: skip
    def test_settings(self, make: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()

    @each_task
    def test_draws(self, task: Task) -> None:
        with pytest.raises(ValueError, match="batch_size: expected a whole number of at least 1, got 0"):
            task.draw(0, generator())
        with pytest.raises(ValueError, match="segments: expected a whole number of at least 1, got 0"):
            task.draw(1, generator(), segments=0)

    def test_more_than_there_are_images_and_pixels(self) -> None:
        task = Pixels(images=IMAGES, levels=2, per_segment=2)
        with pytest.raises(ValueError, match=r"batch_size: .*number of images \(3\), got 4"):
            task.draw(4, generator())
        with pytest.raises(ValueError, match="segments: an image has 1 that tell of later ones, got 2"):
            task.draw(1, generator(), segments=2)

    def test_tasks_of_images_are_equal_only_to_themselves(self) -> None:
        first, second = (Pixels(images=IMAGES.clone(), levels=2, per_segment=2) for _ in range(2))
        assert first == first
        assert first != second
        assert len({first, second}) == 2
        assert Copy() == Copy() != Copy(symbols=2)
        assert Copy() != Reverse()

    @each_task
    def test_nothing_can_be_changed(self, task: Task) -> None:
        with pytest.raises(AttributeError):
            task.segments = 3  # type: ignore[misc]


def same_images(left: Pixels, right: Pixels) -> set[tuple[int, ...]]:
    return set(map(tuple, left.images.tolist())) & set(map(tuple, right.images.tolist()))


class TestDigits:
    def test_small_ones(self) -> None:
        load_digits = pytest.importorskip("sklearn.datasets").load_digits
        train, held_out = tasks.digits()
        again, _ = tasks.digits(per_segment=4)
        assert (len(train.images), len(held_out.images)) == (1442, 355)
        assert (train.segments, again.segments, train.vocabulary) == (7, 15, 20)
        assert torch.equal(train.images, again.images), "the split is fixed"
        assert not same_images(train, held_out)
        images, classes = load_digits(return_X_y=True)
        first = images[classes == 0]
        assert train.images[:4].tolist() == first[:4].tolist()
        assert held_out.images[0].tolist() == first[4].tolist(), "every fifth of each class"
        assert held_out.counted is train.images
        # Coding held-out images by the counts of the training images costs a little more than coding those.
        assert 2.4 < train.chance < held_out.chance < 2.5
        assert held_out.solved < held_out.chance

    def test_without_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("sklearn", "sklearn.datasets"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"scikit-learn: pip install 'memformer-replay\[digits\]'") as caught:
            tasks.digits()
        assert caught.value.name == "sklearn"


def answer(model: Memformer, episode: Episode, memory: bool) -> tuple[Tensor, Tensor]:
    """Logits of the answers, and the answers; without a memory each segment is read from the initial one."""
    mems, logits, wanted = None, [], []
    segments = list(zip(episode.tokens.unbind(1), episode.answers.unbind(1), strict=True))
    for (segment, _), (following, answers) in itertools.pairwise(segments):
        read = model(segment, mems=mems if memory else None)
        mems = read.mem
        if answers.any():
            logits.append(model.decode(F.pad(following[:, :-1], (1, 0), value=START), read.enc_out)[answers])
            wanted.append(following[answers])
    return torch.cat(logits), torch.cat(wanted)


def learn(task: Task, steps: int, learning_rate: float, memory: bool = True) -> Memformer:
    stack = {"num_tokens": task.vocabulary, "depth": 1, "heads": 4}
    model = Memformer(
        dim=32, num_memory_slots=8, mem_update_attn_heads=4,
        enc_max_seq_len=task.length, dec_max_seq_len=task.length + 1,
        **{f"{part}_{name}": value for part in ("enc", "dec") for name, value in stack.items()},
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0)
    one = generator()
    for _ in range(steps):
        segments = int(torch.randint(1, task.segments + 1, (), generator=one))
        loss = F.cross_entropy(*answer(model, task.draw(64, one, segments), memory))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Memformer, task: Task, segments: int | None = None, memory: bool = True) -> float:
    logits, wanted = answer(model, task.draw(1000, generator(1), segments), memory)
    return (logits.argmax(-1) == wanted).float().mean().item()


class TestLearning:
    def test_one_pair_with_and_without_a_memory(self) -> None:
        task = AssociativeRetrieval(segments=1, pairs=1, keys=4, values=4)
        model = learn(task, 60, 5e-3)
        assert task.solves(accuracy(model, task))
        # Three standard deviations of a thousand guesses are 0.04.
        assert accuracy(model, task, memory=False) < task.chance + 0.05
        forgetful = learn(task, 40, 5e-3, memory=False)
        assert accuracy(forgetful, task, memory=False) == pytest.approx(task.chance, abs=0.05)

    @pytest.mark.slow
    def test_one_fact_over_eight_segments(self) -> None:
        task = OneFact(segments=8)
        model = learn(task, 500, 3e-3)
        assert task.solves(accuracy(model, task))
        forgetful = learn(task, 500, 3e-3, memory=False)
        assert accuracy(forgetful, task, memory=False) == pytest.approx(task.chance, abs=0.03)


def test_an_exercise_has_up_to_all_segments_and_noise_in_every_third_batch() -> None:
    task, generator = AssociativeRetrieval(), torch.Generator().manual_seed(0)
    first_noise = 3 + task.keys + task.values
    lengths, noisy = set(), 0
    for _ in range(300):
        tokens = task.exercise(2, generator).tokens[:, :-2]
        lengths.add(tokens.shape[1])
        noisy += bool((tokens >= first_noise).any())
    assert lengths == set(range(1, 9))
    # A third has fewer pairs, and of these one in n, for n segments, has all the same.
    assert 50 < noisy < 100
    assert {Copy().exercise(2, generator).tokens.shape[1] for _ in range(100)} == {3, 5, 7, 9}


@pytest.mark.parametrize("name", ["retrieval", "rewrite", "one-fact", "pairs-16"])
def test_the_default_dtype_does_not_matter(name: str) -> None:
    expected = TASKS[name].draw(8, torch.Generator().manual_seed(3))
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert_close(TASKS[name].draw(8, torch.Generator().manual_seed(3)), expected, rtol=0, atol=0)
        finally:
            torch.set_default_dtype(torch.float32)


def test_what_is_no_generator_or_no_image_is_named() -> None:
    with pytest.raises(ValueError, match=r"generator: expected a torch.Generator, like .*, got 0"):
        Copy().draw(4, 0)
    with pytest.raises(ValueError, match=r"images: expected a tensor, got ndarray: torch.from_numpy makes one"):
        Pixels(images=torch.zeros(2, 8, dtype=torch.uint8).numpy(), levels=2, per_segment=4)
