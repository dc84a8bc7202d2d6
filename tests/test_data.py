"""Documents, lanes and yardsticks: each byte of each document is a target exactly once, in order, in one lane."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer.data import (
    START,
    Document,
    Lanes,
    decode,
    encode,
    fingerprint,
    held_out_split,
    order2_bits_per_byte,
    read_documents,
    standard_library,
    xz_bits_per_byte,
)


def tokens(lengths):
    """Documents whose every token says which one it belongs to and where it stands."""
    return [1000 * (i + 1) + np.arange(length) for i, length in enumerate(lengths)]


def read_back(stream, steps=None):
    """Follow each lane; returns the documents in the order in which they ended, and checks what a step promises."""
    finished, current, previous = [], {}, {}
    for _, segment in zip(range(steps or 10**6), stream, strict=False):
        for lane in range(len(segment.src)):
            source = segment.src[lane][segment.src_mask[lane]].tolist()
            target = segment.tgt[lane][segment.tgt_mask[lane]].tolist()
            if not target:
                assert not source
                assert not segment.reset[lane]
                continue
            assert target[0] == START
            if segment.reset[lane]:
                assert source == [START]
                finished.append(current.pop(lane, []))
                current[lane] = []
            else:
                assert source == previous[lane], "the source is the segment that was predicted before"
            current[lane] += target[1:]
            previous[lane] = target[1:]
    return [document for document in [*finished, *current.values()] if document]


lengths = st.lists(st.integers(1, 23), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(lengths=lengths, lanes=st.integers(1, 5), length=st.integers(1, 9), seed=st.none() | st.integers(0, 3))
def test_each_token_is_a_target_once_per_epoch_in_order(lengths, lanes, length, seed):
    documents = tokens(lengths)
    stream = Lanes(documents, lanes=lanes, length=length, start=START, seed=seed, epochs=1)
    assert sorted(read_back(stream)) == sorted(d.tolist() for d in documents)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(lengths=lengths, lanes=st.integers(1, 4), before=st.integers(0, 20), seed=st.none() | st.integers(0, 3))
def test_a_resumed_stream_goes_on_exactly(lengths, lanes, before, seed):
    def stream():
        return Lanes(tokens(lengths), lanes=lanes, length=4, start=START, seed=seed)

    whole, resumed = stream(), stream()
    whole.rollout(before)
    resumed.load_state_dict(whole.state_dict())
    for expected, got in zip(whole.rollout(15), resumed.rollout(15), strict=True):
        for a, b in zip(expected, got, strict=True):
            assert a.equal(b)


def test_every_epoch_has_its_own_order_and_holds_all_documents():
    stream = Lanes(tokens([2] * 12), lanes=1, length=2, start=START, seed=0)
    first, second = ([d[0] for d in read_back(stream, 12)] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_lanes_without_a_document_are_masked_at_the_end():
    last = list(Lanes(tokens([9, 1]), lanes=2, length=3, start=START, epochs=1))[-1]
    assert last.tgt_mask.any(1).tolist() == [True, False]
    assert last.src_mask.any(1).tolist() == [True, False]


def test_lanes_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="expected at least one, got none"):
        Lanes([], lanes=1, length=1, start=START)
    with pytest.raises(
        ValueError, match=r"non-empty one-dimensional integer arrays, got int64 of shape \(0,\) at index 1"
    ):
        Lanes([np.arange(3), np.arange(0)], lanes=1, length=1, start=START)
    with pytest.raises(ValueError, match="lanes and length: expected at least 1, got 0 and 4"):
        Lanes([np.arange(3)], lanes=0, length=4, start=START)
    stream = Lanes(tokens([5]), lanes=2, length=2, start=START)
    with pytest.raises(ValueError, match="expected the 2 of the saved stream, got 3"):
        Lanes(tokens([5]), lanes=3, length=2, start=START).load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match="expected None, that of the saved stream, got 7"):
        Lanes(tokens([5]), lanes=2, length=2, start=START, seed=7).load_state_dict(stream.state_dict())


def test_text_survives_bytes():
    text = "naïve 🙂"
    assert decode([START, *encode(text).tolist()]) == text


def test_files_and_folders_are_read(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.txt").write_text("one")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").write_text("no")
    assert read_documents([tmp_path]) == [Document("a/c.txt", b"one"), Document("b.txt", b"two")]
    assert read_documents([tmp_path / "b.txt"]) == [Document("b.txt", b"two")]


def test_unreadable_files_are_refused_by_name(tmp_path):
    (tmp_path / "binary").write_bytes(b"ab\xff")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"binary: not UTF-8 text .*at byte 2"):
        read_documents([tmp_path / "binary"])
    with pytest.raises(ValueError, match=r"empty: empty"):
        read_documents([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no text found"):
        read_documents([tmp_path])
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        read_documents([tmp_path / "nowhere"])


def test_the_split_is_fixed_and_moves_no_document_when_one_is_added():
    documents = [Document(f"file{i}", b"x" * 10) for i in range(300)]
    training, held_out = held_out_split(documents)
    assert held_out
    assert {d.name for d in training} | {d.name for d in held_out} == {d.name for d in documents}
    assert not {d.name for d in training} & {d.name for d in held_out}
    _, with_more = held_out_split([*documents, Document("another", b"y")])
    assert {d.name for d in held_out} <= {d.name for d in with_more}


def test_few_documents_still_leave_one_held_out():
    training, held_out = held_out_split([Document("a", b"x"), Document("b", b"y")])
    assert len(training) == len(held_out) == 1
    (training,), (held_out,) = held_out_split([Document("one", bytes(range(96)))])
    assert training.text + held_out.text == bytes(range(96))
    assert len(held_out.text) == 2
    with pytest.raises(ValueError, match="one: 3 bytes are too few"):
        held_out_split([Document("one", b"abc")])


def test_the_fingerprint_knows_names_texts_and_order():
    a, b = Document("a", b"1"), Document("b", b"2")
    prints = [fingerprint(x) for x in ([a, b], [b, a], [a], [Document("a", b"3"), b], [Document("c", b"1"), b])]
    assert len(set(prints)) == len(prints)


def test_the_standard_library_is_long_real_documents():
    documents = standard_library()
    assert sum(len(d.text) for d in documents) > 5_000_000
    assert not [d.name for d in documents if d.name.startswith("test/")]
    assert "ast.py" in {d.name for d in documents}


def test_the_order2_model_against_a_dictionary():
    training, held_out = [b"abracadabra", b"abba"], [b"abracab", b"x"]
    bits, count = 0.0, 0
    for text in held_out:
        padded = b"\0\0" + text
        for i in range(2, len(padded)):
            probability = 1 / 256
            for order in (0, 1, 2):
                following = [
                    (b"\0\0" + t)[j]
                    for t in training
                    for j in range(2, len(t) + 2)
                    if (b"\0\0" + t)[j - order : j] == padded[i - order : i]
                ]
                n, distinct = len(following), len(set(following))
                if n:
                    probability = (following.count(padded[i]) + distinct * probability) / (n + distinct)
            bits -= math.log2(probability)
            count += 1
    assert order2_bits_per_byte(training, held_out) == pytest.approx(bits / count, rel=1e-12)


def test_xz_counts_all_documents_in_one_stream():
    noise = np.random.default_rng(0).bytes(20_000)
    assert 8 < xz_bits_per_byte([noise]) < 8.1
    assert 4 < xz_bits_per_byte([noise, noise]) < 4.1
