"""Each token of each document is a target once, in order, in one lane; ranks and resuming change nothing."""

import itertools
import json
import os
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from memformer.data import (
    ByteTokenizer,
    Document,
    Lanes,
    Mixture,
    TokenIds,
    encode_documents,
    read_documents,
)
from memformer.rollouts import rollout

START = 256


def tokens(lengths):
    """Documents whose every token says which one it belongs to and where it stands."""
    return [1000 * (i + 1) + np.arange(length) for i, length in enumerate(lengths)]


class Iterable:
    """Documents that can be gone through again and again, and do nothing else."""

    def __init__(self, documents):
        self.documents = documents

    def __iter__(self):
        return iter(self.documents)


def mixture(odds, seed=5):
    if odds is None:
        return None
    names = ("continuation", "infilling", "recall")
    return Mixture(TokenIds(100_000), **dict(zip(names, odds, strict=True)), seed=seed)


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


def assert_equal(expected, got):
    assert len(expected) == len(got)
    for one, other in zip(expected, got, strict=True):
        for name, a, b in zip(one._fields, one, other, strict=True):
            assert a.equal(b), name


lengths = st.lists(st.integers(1, 23), min_size=1, max_size=8)
unequal = lengths | st.lists(st.integers(1, 60), min_size=1, max_size=5)
all_odds = st.none() | st.sampled_from([(0.6, 0.3, 0.1), (0, 1, 1), (0, 1, 0)])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(lengths=lengths, lanes=st.integers(1, 5), length=st.integers(1, 9), seed=st.none() | st.integers(0, 3))
def test_each_token_is_a_target_once_per_epoch_in_order(lengths, lanes, length, seed):
    documents = tokens(lengths)
    stream = Lanes(documents, lanes=lanes, length=length, start=START, seed=seed, epochs=1)
    assert sorted(read_back(stream)) == sorted(d.tolist() for d in documents)
    if seed is None:
        stream = Lanes(Iterable(documents), lanes=lanes, length=length, start=START, epochs=2)
        assert sorted(read_back(stream)) == sorted([d.tolist() for d in documents] * 2)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    lengths=unequal,
    rows=st.integers(1, 3),
    ranks=st.integers(1, 4),
    seed=st.none() | st.integers(0, 3),
    epochs=st.integers(1, 3),
    odds=all_odds,
    spread=st.booleans(),
)
def test_ranks_together_are_one_process(lengths, rows, ranks, seed, epochs, odds, spread):
    """Each step's rows, the end of the stream and the state."""

    def stream(**rank):
        lanes = rows * ranks
        objectives = mixture(odds)
        given = dict(lanes=lanes, length=4, start=START, seed=seed, epochs=epochs, objectives=objectives)
        return Lanes(tokens(lengths), **given, spread=spread, **rank)

    whole, parts = stream(), [stream(rank=rank, world_size=ranks) for rank in range(ranks)]
    for expected in whole:
        got = [next(part) for part in parts]
        assert_equal([expected], [type(expected)(*map(torch.cat, zip(*got, strict=True)))])
        assert [part.state_dict() for part in parts] == [whole.state_dict()] * ranks
    assert [list(part) for part in parts] == [[]] * ranks


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    lengths=unequal,
    before=st.integers(0, 20),
    ranks=st.tuples(st.sampled_from([1, 2, 3, 6]), st.sampled_from([1, 2, 3, 6])),
    epochs=st.sampled_from([1, 3, None]),
    seed=st.none() | st.integers(0, 3),
    odds=all_odds,
    kind=st.sampled_from(["list", "iterable", "spread", "spread with ends"]),
)
def test_a_resumed_stream_goes_on_exactly(lengths, before, ranks, epochs, seed, odds, kind):
    """Stopped after any step, also inside a document or stretch, and shared by another number of ranks afterwards."""

    def stream(rank, world_size):
        documents, tokenizer = tokens(lengths), TokenIds(100_000).with_end()
        if kind == "iterable":
            documents = Iterable(documents)
        elif kind == "spread with ends":
            documents = encode_documents([Document("", ids, text=False) for ids in documents], tokenizer)
        return Lanes(
            documents, lanes=6, length=4, start=START, seed=None if kind == "iterable" else seed, epochs=epochs,
            rank=rank, world_size=world_size, objectives=mixture(odds), spread=kind.startswith("spread"),
        )  # fmt: skip

    first = stream(ranks[0] - 1, ranks[0])
    first.rollout(before)
    state = json.loads(json.dumps(first.state_dict()))
    for rank in range(ranks[1]):
        whole, resumed = (stream(rank, ranks[1]) for _ in range(2))
        whole.rollout(before)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert_equal(whole.rollout(15), resumed.rollout(15))
        assert resumed.state_dict() == whole.state_dict()


def test_an_iterator_is_resumed_by_another_that_starts_anew():
    """With one pass, for it can be gone through once; and it is not touched before it is needed."""
    touched = []

    def generate():
        for document in tokens([5, 9, 2, 7, 4, 3]):
            touched.append(document)
            yield document.tolist()

    whole, first, resumed = (Lanes(generate(), lanes=2, length=3, start=START, epochs=1) for _ in range(3))
    assert not touched
    first.rollout(3)
    whole.rollout(3)
    resumed.load_state_dict(first.state_dict())
    assert_equal(list(whole), list(resumed))


@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    lanes=st.integers(1, 3),
    which=st.integers(0, 4),
    seed=st.integers(0, 99),
    odds=all_odds,
)
def test_a_document_never_changes_another(lengths, lanes, which, seed, odds):
    """The loss of one document and its gradients stay as they are when all others have other contents."""
    torch.manual_seed(0)
    model, which, generator = helpers.tiny(), which % len(lengths), np.random.default_rng(seed)
    ids = TokenIds(helpers.VOCABULARY - 4)
    kept = generator.integers(0, ids.ordinary, lengths[which])

    def loss_of_it():
        documents = [generator.integers(0, ids.ordinary, length) for length in lengths]
        documents[which] = kept
        objectives = odds and Mixture(ids, continuation=odds[0], infilling=odds[1], recall=odds[2])
        stream = Lanes(documents, lanes=lanes, length=5, start=ids.start, seed=seed, epochs=1, objectives=objectives)
        segments = []
        for segment in stream:
            its_own = torch.tensor([lane["document"] == which for lane in stream.state_dict()["lanes"]])
            segments.append(segment._replace(tgt_mask=segment.tgt_mask & its_own[:, None]))
        loss = rollout(model, segments, divisor=1.0).loss
        loss.backward()
        return loss.detach(), helpers.take_grads(model)

    (loss, grads), (other_loss, other_grads) = loss_of_it(), loss_of_it()
    assert loss > 0
    torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=0)
    helpers.assert_same_grads(other_grads, grads)


def test_a_rank_keeps_the_documents_of_its_own_lanes_alone():
    alive = []

    class Fresh:
        def __iter__(self):
            for i in range(2):
                document = np.arange(9) + i
                alive.append(weakref.ref(document))
                yield document
                del document

    stream = Lanes(Fresh(), lanes=2, length=2, start=START, epochs=1, rank=1, world_size=2)
    stream.rollout(2)
    assert [document() is None for document in alive] == [True, False]


def test_every_epoch_has_its_own_order_and_holds_all_documents():
    stream = Lanes(tokens([2] * 12), lanes=1, length=2, start=START, seed=0)
    first, second = ([d[0] for d in read_back(stream, 12)] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_lanes_without_a_document_are_masked_at_the_end():
    last = list(Lanes(tokens([9, 1]), lanes=2, length=3, start=START, epochs=1))[-1]
    assert last.tgt_mask.any(1).tolist() == [True, False]
    assert last.src_mask.any(1).tolist() == [True, False]


@pytest.mark.parametrize("wrap", [list, np.ndarray.tolist, torch.from_numpy, lambda x: {"text": x}, tuple])
def test_documents_are_any_arrays_of_integers(wrap):
    documents = tokens([5, 1, 8])
    wrapped = [wrap(d) for d in documents]
    encode = (lambda row: row["text"]) if isinstance(wrapped[0], dict) else None
    for given_ in (wrapped, Iterable(wrapped)):
        stream = Lanes(given_, lanes=2, length=3, start=START, epochs=1, encode=encode)
        assert sorted(read_back(stream)) == sorted(d.tolist() for d in documents)


def test_a_data_set_with_rows_is_shuffled_and_encoded_when_a_row_is_due():
    """As a Hugging Face dataset: it has a length, takes an index, and is no list."""
    tokenizer, asked = ByteTokenizer(), []

    class Rows:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            assert type(index) is int
            asked.append(index)
            return {"text": "row " + "x" * index}

    stream = Lanes(
        Rows(), lanes=1, length=8, start=START, seed=0, epochs=1, encode=lambda r: tokenizer.encode(r["text"])
    )
    assert not asked
    found = [tokenizer.decode(d) for d in read_back(stream)]
    assert sorted(found) == sorted("row " + "x" * i for i in range(5))
    assert found != sorted(found)
    assert sorted(asked) == list(range(5))


def test_no_empty_document_passes():
    with pytest.raises(
        ValueError, match=r"non-empty one-dimensional integer arrays, got int64 of shape \(0,\) at inde"
    ):
        Lanes([np.arange(3), []], lanes=1, length=1, start=START)
    stream = Lanes(Iterable([[1], [2], []]), lanes=1, length=1, start=START)
    stream.rollout(2)
    with pytest.raises(ValueError, match=r"got int64 of shape \(0,\) at index 2"):
        next(stream)


def test_a_document_of_one_token_is_one_step():
    (segment,) = Lanes([[7]], lanes=1, length=4, start=START, epochs=1)
    assert segment.src.tolist() == [[START, 0, 0, 0]]
    assert segment.src_mask.tolist() == [[True, False, False, False]]
    assert segment.tgt[segment.tgt_mask].tolist() == [START, 7]
    assert segment.reset.tolist() == [True]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([np.arange(3), np.zeros((1, 1), int)], r"got int64 of shape \(1, 1\) at index 1"),
        ([np.zeros(2)], r"got float64 of shape \(2,\) at index 0"),
        ([{"text": "x"}], "got dict at index 0; encode= takes a function that makes one of it"),
        (["text"], "got str at index 0; encode="),
        ([[1, 2], [[1, 2], [3]]], "got list at index 1; encode="),
        ([Document("a", b"x")], r"got Document at index 0; encode_documents\(documents, tokenizer\)"),
        ([], "documents: expected at least one, got none"),
    ],
)
def test_what_is_no_array_of_integers_is_refused_by_index(documents, message):
    with pytest.raises(ValueError, match=message):
        Lanes(documents, lanes=1, length=1, start=START)
    with pytest.raises(ValueError, match=message):
        Lanes(Iterable(documents), lanes=1, length=1, start=START).rollout(9)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (dict(lanes=0), "lanes and length: expected at least 1, got 0 and 4"),
        (dict(length=0), "lanes and length: expected at least 1, got 2 and 0"),
        (dict(rank=2, world_size=2), "rank: expected 0 to world_size - 1, got 2 of 2"),
        (dict(world_size=3), "lanes: expected a multiple of the 3 ranks that share them, got 2"),
        (dict(epochs=0), "epochs: expected at least 1, or None for ever, got 0"),
        (dict(documents=Iterable(tokens([3])), seed=1), "seed: documents that cannot be indexed cannot be shuffled"),
        (dict(documents=iter(tokens([3]))), "epochs: an iterator can be gone through once, so expected 1, got None"),
        (dict(documents=iter(tokens([3])), epochs=2), "epochs: an iterator can be gone through once"),
    ],
)
def test_lanes_refuse_settings_that_do_not_fit(given_, message):
    with pytest.raises(ValueError, match=message):
        Lanes(**{**dict(documents=tokens([5]), lanes=2, length=4, start=START), **given_})


def test_a_state_of_another_stream_is_refused():
    def stream(lengths=(5, 9, 3), lanes=2, length=2, seed=None, wrap=list):
        return Lanes(wrap(tokens(lengths)), lanes=lanes, length=length, start=START, seed=seed)

    saved = stream()
    saved.rollout(4)
    state = saved.state_dict()
    for other, message in [
        (stream(lanes=3), "lanes: expected the 2 of the saved stream, got 3"),
        (stream(seed=7), "seed: expected None, that of the saved stream, got 7"),
        (stream(length=3), "length: expected 2, that of the saved stream, got 3"),
        (stream(lengths=(5, 9)), "documents: not those of the saved stream, there were more"),
        (stream(lengths=(5, 9), wrap=Iterable), "documents: not those of the saved stream, there were more"),
        (stream(lengths=(5, 3, 1)), "documents: not those of the saved stream, document 2 was longer"),
    ]:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


def test_a_data_set_of_nothing_is_not_waited_for():
    with pytest.raises(ValueError, match="expected at least one, got none"):
        next(Lanes(Iterable([]), lanes=1, length=1, start=START))


def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("name", ["corpus.bin", "corpus.txt", "corpus.npy"])
def test_two_gigabytes_stream_at_flat_memory(tmp_path, name):
    """Sparse arrays take no room on the disk; whoever maps them still pays for the pages that he touches."""
    file, size = tmp_path / name, 2 << 30
    if name.endswith(".npy"):
        np.lib.format.open_memmap(file, mode="w+", dtype=np.uint16, shape=(size // 2,))
    elif name.endswith(".txt"):  # which has to be one
        with open(file, "wb") as out:
            for _ in range(size >> 20):
                out.write(b"remember" * (1 << 17))
    else:
        with open(file, "wb") as out:
            out.truncate(size)
    documents = read_documents([file])
    tokenizer = ByteTokenizer() if name.endswith(".txt") else TokenIds(50)
    count = 16
    parts = [
        documents[0].part(i * len(documents[0]) // count, (i + 1) * len(documents[0]) // count) for i in range(count)
    ]
    stream = Lanes(encode_documents(parts, tokenizer), lanes=count, length=1 << 16, start=START, epochs=1)
    resident, seen = [], 0
    for segment in stream:
        seen += int(segment.tgt_mask[:, 1:].sum())
        resident.append(resident_mb())
    assert seen == len(documents[0])
    half = len(resident) // 2
    assert len(resident) >= 1000
    assert max(resident[half:]) - max(resident[5:half]) < 20
    assert max(resident) - resident[5] < 100


@pytest.mark.slow
def test_mapped_pages_would_be_seen(tmp_path):
    """The test above can fail: reading through a map grows by what was read."""
    file = tmp_path / "corpus.npy"
    np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(1 << 28,))
    mapped = np.load(file, mmap_mode="r")
    before = resident_mb()
    for start in itertools.islice(range(0, len(mapped), 1 << 20), 256):
        mapped[start : start + (1 << 20)].max()
    assert resident_mb() - before > 200
