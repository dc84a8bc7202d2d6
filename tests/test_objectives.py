"""The three objectives: what source and target are, by which odds, and that the stream under them is the same."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer.data import ByteTokenizer, Lanes, Mixture, Objective, TokenIds

IDS = TokenIds(100_000)


def mixture(*odds, seed=0, **given_):
    names = ("continuation", "infilling", "recall")
    return Mixture(IDS, **dict(zip(names, odds, strict=True)), seed=seed, **given_)


def row(segment, lane):
    return (
        segment.src[lane][segment.src_mask[lane]].tolist(),
        segment.tgt[lane][segment.tgt_mask[lane]].tolist(),
    )


def streams(*odds, lengths=(50, 3, 21, 34), lanes=3, length=5, seed=0):
    """The stream under these odds, and the plain one."""
    documents = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    given_ = dict(lanes=lanes, length=length, start=IDS.start, epochs=2, seed=1)
    return Lanes(documents, **given_, objectives=mixture(*odds, seed=seed)), Lanes(documents, **given_)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 99), length=st.integers(1, 12))
def test_each_objective_has_its_source_and_target(seed, length):
    """Against the plain stream beside it, which knows what every segment is."""
    mixed, plain = streams(1, 1, 1, length=length, seed=seed)
    before, seen = {}, set()
    for segment, reference in zip(mixed, plain, strict=True):
        assert segment.reset.equal(reference.reset)
        assert segment.src.shape == reference.src.shape
        assert segment.tgt.shape == reference.tgt.shape
        for lane in range(len(segment.src)):
            (source, target), (clean, following) = row(segment, lane), row(reference, lane)
            if reference.reset[lane]:
                before[lane] = []
            if not target:
                assert not following
                continue
            seen.add(target[0])
            if target[0] == IDS.start:
                assert (source, target) == (clean, following)
            elif target[0] == IDS.recall:
                assert source == clean
                assert target[1:] == before[lane][-1]
                assert len(before[lane]) > 0
            else:
                assert target == [IDS.infill, *clean]
                assert clean != [IDS.start]
                check_damage(clean, source)
            if clean != [IDS.start]:
                before[lane].append(clean)
    assert IDS.start in seen
    if length == 5:
        assert seen == {IDS.start, IDS.infill, IDS.recall}


def check_damage(clean, damaged):
    """What is kept stands in order; every mask stands for what is missing there; masks do not touch."""
    assert IDS.mask in damaged
    assert len(damaged) <= len(clean)
    kept = [token for token in damaged if token != IDS.mask]
    rest = iter(clean)
    assert all(token in rest for token in kept)
    assert all(a != IDS.mask or b != IDS.mask for a, b in itertools.pairwise(damaged))
    # Where two kept tokens are neighbours in the source and nothing is masked between them, nothing is missing.
    for a, b in itertools.pairwise(damaged):
        if IDS.mask not in (a, b):
            assert clean.index(b) == clean.index(a) + 1
    if damaged[0] != IDS.mask:
        assert damaged[0] == clean[0]
    if damaged[-1] != IDS.mask:
        assert damaged[-1] == clean[-1]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(size=st.integers(1, 70), seed=st.integers(0, 10**6), masked=st.sampled_from([0.01, 0.3, 0.5]))
def test_a_damaged_source_keeps_what_is_not_masked(size, seed, masked):
    objectives = mixture(0, 1, 0, masked=masked)
    clean = np.arange(size)
    check_damage(clean.tolist(), objectives.damage(clean, np.random.default_rng(seed).random(2 * size + 2)).tolist())


def test_spans_are_poisson_and_hide_the_share():
    """On long sources, where the cut of the last span is seldom: mean, share of zeros, and the whole histogram."""
    objectives, generator, size = mixture(0, 1, 0), np.random.default_rng(0), 20_000
    clean = np.arange(size)
    damaged = objectives.damage(clean, generator.random(2 * size + 2))
    masks = np.flatnonzero(damaged == IDS.mask)
    edged = np.concatenate([[-1], damaged, [size]])
    spans = edged[masks + 2] - edged[masks] - 1
    assert (damaged != IDS.mask).sum() == size - 6000
    assert spans.sum() == 6000
    assert spans.mean() == pytest.approx(3.5, abs=0.15)
    poisson = np.array([np.exp(-3.5) * 3.5**k / np.prod(np.arange(1, k + 1)) for k in range(9)])
    found = np.array([(spans == k).mean() for k in range(9)])
    assert np.abs(found - poisson).max() < 0.03
    # And they lie anywhere.
    assert masks.mean() == pytest.approx(len(damaged) / 2, rel=0.05)
    many = np.array([(objectives.damage(np.arange(40), generator.random(82)) != IDS.mask).sum() for _ in range(50)])
    assert (many == 28).all()


def test_where_a_span_lies_says_nothing_about_its_length():
    objectives, generator, clean = mixture(0, 1, 0), np.random.default_rng(0), np.arange(64)
    found = []
    for _ in range(3000):
        damaged = np.append(objectives.damage(clean, generator.random(130)), 64)
        first = int(np.argmax(damaged == IDS.mask))
        found.append((first, damaged[first + 1] - first))
    place, length = np.array(found).T
    assert length.mean() == pytest.approx(3.5, abs=0.12)
    assert length[place == 0].mean() == pytest.approx(3.5, abs=0.35)
    assert length[place > 8].mean() == pytest.approx(3.5, abs=0.25)
    assert 0.08 < (place == 0).mean() < 0.18


def test_objectives_come_by_their_odds():
    objectives = mixture(6, 3, 1)
    drawn = np.concatenate([objectives.draw(step, 50, 8)[0] for step in range(400)])
    share = np.bincount(drawn, minlength=3) / len(drawn)
    assert np.abs(share - [0.6, 0.3, 0.1]).max() < 0.012
    for only, odds in enumerate(np.eye(3)):
        assert set(mixture(*odds).draw(0, 500, 8)[0]) == {only}
    assert set(mixture(0, 1, 1).draw(0, 500, 8)[0]) == {Objective.INFILLING, Objective.RECALL}


def test_a_draw_is_decided_by_seed_step_and_lane_alone():
    few, many = mixture(1, 1, 1).draw(7, 3, 16), mixture(1, 1, 1).draw(7, 200, 16)
    assert few[0] == many[0][:3]
    assert np.array_equal(few[1], many[1][:3])
    others = [mixture(1, 1, 1).draw(8, 200, 16), mixture(1, 1, 1, seed=1).draw(7, 200, 16)]
    assert all(other[0] != many[0] for other in others)
    assert len(np.unique(many[1])) == many[1].size


def test_a_mixture_of_continuation_alone_is_the_plain_stream():
    for segment, reference in zip(*streams(1, 0, 0), strict=True):
        for a, b in zip(segment, reference, strict=True):
            assert a.equal(b)


def test_infilling_reads_the_damaged_source_and_recall_the_clean_one():
    """By hand, on bytes."""
    tokenizer = ByteTokenizer()
    text = [tokenizer.encode("abcdefghijkl")]
    given_ = dict(lanes=1, length=4, start=tokenizer.start, epochs=1)
    infilling = list(Lanes(text, **given_, objectives=Mixture(tokenizer, continuation=0, infilling=1)))
    assert [tokenizer.decode(s.tgt[s.tgt_mask]) for s in infilling] == ["abcd", "abcd", "efgh"]
    assert [int(s.tgt[0, 0]) for s in infilling] == [256, 257, 257]
    assert all((s.src == tokenizer.mask).sum() == 1 for s in infilling[1:])
    recall = list(Lanes(text, **given_, objectives=Mixture(tokenizer, continuation=0, recall=1)))
    assert [tokenizer.decode(s.tgt[s.tgt_mask]) for s in recall] == ["abcd", "efgh", "abcd"]
    assert [int(s.tgt[0, 0]) for s in recall] == [256, 256, 258]
    assert [tokenizer.decode(s.src[s.src_mask]) for s in recall] == ["", "abcd", "efgh"]
    assert all(s.src.dtype == s.tgt.dtype == torch.int64 for s in recall)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (dict(infilling=-0.1), r"expected odds of at least 0, some above, got \(1.0, -0.1, 0.0\)"),
        (dict(continuation=0.0), "expected odds of at least 0, some above"),
        (dict(recall=float("nan")), "expected odds"),
        (dict(recall=float("inf")), "expected odds"),
        (dict(masked=0.0), "masked: expected a share above 0 and at most 0.5, got 0.0"),
        (dict(masked=0.6), "masked: expected a share above 0 and at most 0.5, got 0.6"),
        (dict(span=0.0), "span: expected a mean length above 0, got 0.0"),
        (dict(seed=-1), "seed: expected at least 0, got -1"),
    ],
)
def test_a_mixture_checks_itself(given_, message):
    with pytest.raises(ValueError, match=message):
        Mixture(IDS, **given_)
