"""Long documents are cut into stretches, so that lanes read different text; short ones stream as if nothing was cut."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import training_settings
from memformer.cli import main
from memformer.data import (
    ByteTokenizer,
    Document,
    Lanes,
    Mixture,
    TokenIds,
    encode_documents,
    held_out_split,
    read_documents,
    standard_library,
)
from memformer.settings import TrainingConfig, read_saved
from memformer.training import Run

IDS = TokenIds(100_000)
START = IDS.start


def tokens(lengths):
    """Documents whose every token says which one it belongs to and where it stands."""
    return [1000 * (i + 1) + np.arange(length) for i, length in enumerate(lengths)]


def ending(lengths):
    """The same, read from documents whose end is learned."""
    return encode_documents([Document(f"{i}", x, text=False) for i, x in enumerate(tokens(lengths))], IDS.with_end())


def mixture(odds):
    if odds is None:
        return None
    return Mixture(IDS, **dict(zip(("continuation", "infilling", "recall"), odds, strict=True)), seed=5)


def assert_equal(expected, got):
    assert len(expected) == len(got)
    for one, other in zip(expected, got, strict=True):
        for name, a, b in zip(one._fields, one, other, strict=True):
            assert a.equal(b), name


def stretches_of(stream):
    """Follow each lane of a stream of continuation: the tokens of each stretch, and its first source."""
    found, current, previous = [], {}, {}
    for segment in stream:
        for lane in range(len(segment.src)):
            source = segment.src[lane][segment.src_mask[lane]].tolist()
            target = segment.tgt[lane][segment.tgt_mask[lane]].tolist()
            if not target:
                assert not source
                assert not segment.reset[lane]
                continue
            assert target[0] == START
            if segment.reset[lane]:
                current[lane] = (source, [])
                found.append(current[lane])
            else:
                assert source == previous[lane], "the source is the segment that was predicted before"
            current[lane][1].extend(target[1:])
            previous[lane] = target[1:]
    return found


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=5)
all_odds = st.none() | st.sampled_from([(0.6, 0.3, 0.1), (0, 1, 1), (0, 1, 0)])
seeds = st.none() | st.integers(0, 3)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    lengths=lengths,
    lanes=st.integers(1, 13),
    length=st.integers(1, 7),
    seed=seeds,
    epochs=st.integers(1, 2),
    ends=st.booleans(),
    most=st.none() | st.integers(1, 4),
)
def test_each_token_is_a_target_once_per_epoch_in_order(lengths, lanes, length, seed, epochs, ends, most):
    """Stretches lie side by side and are one document together; each begins with the segment before it."""
    documents = ending(lengths) if ends else tokens(lengths)
    given_ = dict(lanes=lanes, length=length, start=START, seed=seed, epochs=epochs)
    stream = Lanes(documents, **given_, spread=True, stretch=most)
    count, found = stream.stretches, stretches_of(stream)
    assert len(found) == epochs * count
    share = max(1, math.ceil(sum(map(len, documents)) / lanes / length)) * length
    share = share if most is None else min(share, most * length)
    whole = [document[:].tolist() for document in documents]
    where = {}  # of each stretch, by its first target; an end alone is told by its source
    for source, targets in found:
        first = targets[0] if targets[0] != START else source[-1] + 1
        number, place = first // 1000 - 1, first % 1000
        document = whole[number]
        assert targets == document[place : place + len(targets)]
        assert place % length == 0
        assert source == (document[max(place - length, 0) : place] or [START])
        where.setdefault(number, []).append((place, place + len(targets)))
    for number, document in enumerate(whole):
        pieces = sorted(where[number])
        assert pieces[::epochs] == pieces[epochs - 1 :: epochs]
        borders = pieces[::epochs]
        assert [begin for begin, _ in borders] == [0, *(end for _, end in borders[:-1])]
        assert borders[-1][1] == len(document)
        segments = [math.ceil((end - begin) / length) for begin, end in borders]
        assert max(segments) - min(segments) <= 1
        assert max(end - begin for begin, end in borders) <= share
        assert (len(borders) == 1) == (len(document) <= share)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    lengths=lengths,
    lanes=st.integers(1, 9),
    length=st.integers(2, 7),
    seed=seeds,
    odds=all_odds,
    ends=st.booleans(),
)
def test_nothing_of_elsewhere_is_in_a_stretch(lengths, lanes, length, seed, odds, ends):
    """From a reset to the next one: no token of another document, none from before the stretch but its first source,
    none twice, and under every objective one step for each segment."""
    documents = ending(lengths) if ends else tokens(lengths)
    given_ = dict(lanes=lanes, length=length, start=START, seed=seed, epochs=1, spread=True)
    stream, plain = (Lanes(documents, **given_, objectives=mixture(o)) for o in (odds, None))
    begun: dict[int, int] = {}
    last: dict[int, int] = {}
    for segment, clean in zip(stream, plain, strict=True):
        assert segment.reset.equal(clean.reset)
        for lane in range(lanes):
            source = [t for t in segment.src[lane][segment.src_mask[lane]].tolist() if t < IDS.ordinary]
            target = [t for t in segment.tgt[lane][segment.tgt_mask[lane]].tolist() if t < IDS.ordinary]
            if not segment.tgt_mask[lane].any():
                continue
            if segment.reset[lane]:
                assert segment.tgt[lane][0] == START, "the first step continues: nothing else has what it needs"
                assert segment.src[lane].equal(clean.src[lane])
                begun[lane] = last[lane] = target[0] if target else source[-1] + 1
                assert all(t // 1000 == (begun[lane] - 1) // 1000 and t < begun[lane] for t in source)
                source = []
            for t in (*source, *target):
                assert t // 1000 == begun[lane] // 1000
                assert t >= begun[lane]
            if segment.tgt[lane][0] == START and target:
                assert target[0] >= last[lane]
                last[lane] = target[-1] + 1


@settings(deadline=None, max_examples=60, derandomize=True)
@given(lengths=lengths, lanes=st.integers(1, 3), length=st.integers(1, 7), seed=seeds, odds=all_odds)
def test_where_no_document_is_longer_than_its_share_nothing_changes(lengths, lanes, length, seed, odds):
    """The stream, its state, and that either kind of stream goes on from the other's."""
    documents = tokens([*lengths, *[max(lengths)] * lanes])
    given_ = dict(lanes=lanes, length=length, start=START, seed=seed, epochs=2, objectives=mixture(odds))
    spread, plain = (Lanes(documents, **given_, spread=spread) for spread in (True, False))
    assert spread.stretches == plain.stretches == len(documents)
    for _ in range(3):
        assert_equal([next(plain)], [next(spread)])
        state = plain.state_dict()
        assert spread.state_dict() == state
        spread.load_state_dict(state)
        plain.load_state_dict(spread.state_dict())
    assert_equal(list(plain), list(spread))


def test_the_standard_library_is_not_cut():
    training, _ = held_out_split(standard_library())
    documents = encode_documents(training, ByteTokenizer())
    assert Lanes(documents, lanes=12, length=32, start=256, seed=0, spread=True).stretches == len(documents)


def test_lanes_read_different_text():
    """One book in four lanes: without stretches all four read the same."""

    def read(**given_):
        return Lanes(tokens([400]), lanes=4, length=5, start=START, seed=0, **given_).rollout(20)

    same = torch.stack([segment.tgt[:, 1:] for segment in read()])
    assert (same == same[:, :1]).all()
    targets = torch.cat([segment.tgt[:, 1:].flatten() for segment in read(spread=True)])
    assert sorted(targets.tolist()) == list(range(1000, 1400))


def test_a_book_beside_short_texts_is_cut_alone():
    stream = Lanes(tokens([900, 5, 30]), lanes=4, length=5, start=START, epochs=1, spread=True)
    assert stream.stretches == 6
    first = next(stream)
    assert first.reset.all()
    assert first.tgt[:, 1].tolist() == [1000, 1225, 1450, 1675]
    assert first.src[1].tolist() == list(range(1220, 1225))


def test_stretches_are_shuffled_anew_in_each_epoch():
    stream = Lanes(tokens([400]), lanes=8, length=5, start=START, seed=3, spread=True)
    firsts = [next(stream).tgt[:, 1].tolist()]
    stream.rollout(9)
    firsts.append(next(stream).tgt[:, 1].tolist())
    assert sorted(firsts[0]) == sorted(firsts[1]) == list(range(1000, 1400, 50))
    assert firsts[0] != firsts[1] != sorted(firsts[1])


def test_more_lanes_than_segments():
    """Each segment is a stretch; lanes without one are masked in the only epoch."""
    (segment,) = Lanes(tokens([13]), lanes=5, length=5, start=START, epochs=1, spread=True)
    assert segment.tgt_mask.any(1).tolist() == [True, True, True, False, False]
    assert segment.tgt[:, 1].tolist() == [1000, 1005, 1010, 0, 0]


def test_nothing_is_read_to_make_stretches(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("a" * 10_000)
    documents = encode_documents(read_documents([file]), ByteTokenizer())
    file.write_text("b" * 10_000)
    stream = Lanes(documents, lanes=4, length=10, start=256, spread=True)
    assert stream.stretches == 4
    assert next(stream).tgt[:, 1].tolist() == [ord("b")] * 4


def test_epochs_are_counted_in_stretches():
    stream = Lanes(tokens([400, 40]), lanes=4, length=10, start=START, seed=0, spread=True)
    read = [stream.epochs_read]
    for _ in range(22):
        next(stream)
        read.append(stream.epochs_read)
    assert read[0] == 0
    assert all(0 < after - before <= 4 / stream.stretches for before, after in itertools.pairwise(read))
    assert 1.5 < read[-1] < 2.5


class Iterable:
    def __iter__(self):
        return iter(tokens([5]))


@pytest.mark.parametrize(
    "given_",
    [dict(documents=Iterable()), dict(documents=iter(tokens([5])), epochs=1), dict(encode=lambda x: x)],
)
def test_what_has_no_known_lengths_cannot_be_spread(given_):
    with pytest.raises(ValueError, match="spread: expected a list of arrays, or the like, whose lengths are known"):
        Lanes(**{**dict(documents=tokens([5]), lanes=2, length=4, start=START, spread=True), **given_})
    assert Lanes(Iterable(), lanes=2, length=4, start=START).stretches is None


def test_a_stretch_has_as_many_segments_as_one_says_and_no_more():
    stream = Lanes(tokens([900, 5, 30]), lanes=4, length=5, start=START, epochs=1, spread=True, stretch=16)
    assert stream.stretches == 12 + 1 + 1, "of at most 80 tokens; a share would be 235"
    with pytest.raises(ValueError, match="stretch: documents that are not spread are not cut"):
        Lanes(tokens([900]), lanes=4, length=5, start=START, stretch=16)
    with pytest.raises(ValueError, match="stretch: with --no-spread documents are not cut"):
        training_settings(spread=False, stretch=16)
    with pytest.raises(ValueError, match="stretch: expected a whole number of at least 1, got 0"):
        training_settings(stretch=0)


def test_a_state_of_other_stretches_is_refused():
    def stream(lengths, spread=True):
        return Lanes(tokens(lengths), lanes=4, length=5, start=START, spread=spread)

    def state(*given_):
        saved = stream(*given_)
        saved.rollout(3)
        return saved.state_dict()

    cases = [
        (state([200]), stream([200], False), "stretches: expected 4, those of the saved stream, got 1"),
        (state([200], False), stream([200]), "stretches: expected whole documents, those of the saved stream, got 4"),
        (state([200]), stream([240]), "stretches: not those of the saved stream, document 0 has none that begins at"),
        (state([40, 200]), stream([200, 40]), "stretches: not those of the saved stream, document 1 has none"),
    ]
    for saved, other, message in cases:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(saved)


def test_a_state_is_numbers_alone():
    stream = Lanes(tokens([200]), lanes=4, length=5, start=START, spread=True)
    stream.rollout(2)
    state = stream.state_dict()
    assert state["stretches"] == 4
    assert state["lanes"][1] == {"document": 0, "begin": 50, "position": 60}
    assert all(type(x) is int for lane in state["lanes"] for x in lane.values())


# --- Training


@pytest.fixture
def book(tmp_path):
    """Settings of a tiny run on one file; ``book(steps=3)`` changes some."""
    (tmp_path / "book.txt").write_text("".join(f"{i} is a number of the book. " for i in range(400)))

    def make(**changes):
        given = dict(
            data=(tmp_path / "book.txt",), out=tmp_path / "run", steps=4, dim=16, slots=3, enc_depth=1, dec_depth=1,
            heads=2, lanes=4, segment_length=8, horizon=3, log_every=1, device="cpu", eval_limit=100,
        )  # fmt: skip
        return training_settings(**{**given, **changes})

    return make


@pytest.mark.parametrize(
    "kind", [{}, {"architecture": "causal", "depth": 3, "dec_depth": 2}], ids=["memformer", "causal"]
)
def test_a_run_on_one_book_reads_it_in_every_lane_and_goes_on_where_it_stopped(book, tmp_path, kind):
    book = functools.partial(book, **kind)
    whole = Run(book(out=tmp_path / "whole"))
    assert whole.parts.stream.stretches == 4
    list(whole.train())
    first = Run(book())
    for metrics in first.train():
        if metrics.step == 1:
            first.stop()
    second = Run(book(resume=True))
    assert second.step == 2
    list(second.train())
    for name, parameter in whole.model.state_dict().items():
        assert second.model.state_dict()[name].equal(parameter), name
    assert second.parts.stream.state_dict() == whole.parts.stream.state_dict()
    assert Run(book(out=tmp_path / "before", spread=False)).parts.stream.stretches == 1


def test_a_run_that_was_saved_before_is_not_spread():
    assert TrainingConfig().rollout.spread
    assert not read_saved({"rollout": {"lanes": 3}}).rollout.spread
    assert read_saved({"rollout": {"spread": True}}).rollout.spread


def test_the_start_of_a_run_says_how_many_stretches_there_are(book, capsys):
    settings = book(steps=1)
    assert main(["train", "--data", str(settings.data[0]), "--out", str(settings.out), "--steps", "1", "--lanes", "4",
                 "--horizon", "2", "--eval-limit", "50", "--sample-tokens", "0"]) == 0  # fmt: skip
    assert "1 document (11,251 bytes) in 4 stretches to train on" in capsys.readouterr().out


def test_stretches_and_ends_may_change_on_purpose(book):
    """The documents then begin anew, with the tokenizer that the settings ask for."""
    list(Run(book(steps=2)).train())
    assert Run(book(resume=True, stretch=5)).parts.stream.stretches > 4
    run = Run(book(resume=True, spread=False, end=False))
    assert (run.parts.stream.stretches, run.parts.stream.state_dict()["epoch"], run.tokenizer.end) == (1, 1, None)
    list(run.train())
    assert Run(book(resume=True, steps=5)).tokenizer.end == 256
