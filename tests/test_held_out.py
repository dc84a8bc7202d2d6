"""What is held out: how much, which documents, and when it moves; what of it is evaluated."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer.data import Document, held_out_split, read_documents, standard_library
from memformer.data.documents import limited


def test_the_split_is_fixed_and_moves_no_document_when_one_is_added():
    documents = [Document(f"file{i}", b"x" * 10) for i in range(300)]
    training, held_out = held_out_split(documents)
    assert held_out
    assert {d.name for d in training} | {d.name for d in held_out} == {d.name for d in documents}
    assert not {d.name for d in training} & {d.name for d in held_out}
    _, with_more = held_out_split([*documents, Document("another", b"y")])
    assert {d.name for d in held_out} <= {d.name for d in with_more}
    assert len(held_out_split(documents, share=3)[1]) > 70


def test_few_documents_still_leave_one_held_out():
    training, held_out = held_out_split([Document("a", b"x"), Document("b", b"y")])
    assert len(training) == len(held_out) == 1
    (training,), (held_out,) = held_out_split([Document("one", bytes(range(96)))])
    assert bytes(training) + bytes(held_out) == bytes(range(96))
    assert len(held_out) == 2
    (training,), (held_out,) = held_out_split([Document("one", np.arange(96), text=False)])
    assert held_out.content.tolist() == [94, 95]
    with pytest.raises(ValueError, match="one: 3 bytes are too few"):
        held_out_split([Document("one", b"abc")])
    with pytest.raises(ValueError, match="share: expected one in at least 2, got one in 1"):
        held_out_split([Document("one", b"abc")], share=1)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(text=st.text(min_size=1, max_size=12), share=st.integers(2, 6))
def test_the_only_document_is_cut_between_characters(text, share):
    raw = text.encode()
    try:
        (training,), (held_out,) = held_out_split([Document("one", raw)], share=share)
    except ValueError:
        assert len(raw) < share or len(text) == 1 or len(text[0].encode()) > len(raw) - len(raw) // share
        return
    assert bytes(training).decode() + bytes(held_out).decode() == text
    assert 0 <= len(held_out) - len(raw) // share <= 3


def test_the_split_reads_no_contents(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("x" * 50)
    documents = read_documents([tmp_path])
    for i in range(5):
        (tmp_path / f"{i}.txt").unlink()
    training, held_out = held_out_split(documents, share=5)
    assert len(training) + len(held_out) == 5
    with pytest.raises(FileNotFoundError):
        bytes(training[0])


def test_a_limit_cuts_the_last_document():
    documents = [Document("a", b"12345"), Document("b", b"123456"), Document("c", b"123")]
    assert [bytes(d) for d in limited(documents, 8)] == [b"12345", b"123"]
    assert [bytes(d) for d in limited(documents, 5)] == [b"12345"]
    assert limited(documents, 0) == documents
    assert [bytes(d).decode() for d in limited([Document("é", "aé".encode())], 2)] == ["a"]


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def size(documents: list[Document]) -> int:
    return sum(map(len, documents))


def test_of_a_book_and_a_readme_the_end_of_the_book_is_held_out() -> None:
    book, readme = Document("book.txt", "ä".encode() * 378_505), Document("README", b"x" * 65)
    for documents in ([book, readme], [readme, book]):
        training, held_out = held_out_split(documents)
        assert sorted(names(training)) == ["README", "book.txt"]
        assert names(held_out) == ["book.txt"]
        assert size(held_out) == pytest.approx(size(documents) / 48, abs=3)
        assert size(training) + size(held_out) == size(documents)
        bytes(held_out[0]).decode()


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 100_000), min_size=1, max_size=60), share=st.integers(2, 60), seed=st.integers(0, 9)
)
def test_about_one_nth_of_the_bytes_is_held_out(sizes: list[int], share: int, seed: int) -> None:
    documents = [Document(f"{seed}/{i}", np.zeros(n, np.uint8)) for i, n in enumerate(sizes)]
    if size(documents) < 4 * share:
        return
    training, held_out = held_out_split(documents, share)
    assert training
    assert held_out
    assert all(map(len, [*training, *held_out]))
    assert size(training) + size(held_out) == size(documents)
    assert size(documents) / share / 2 - 1 <= size(held_out) <= 2 * size(documents) / share + 1


def test_by_name_sizes_do_not_matter() -> None:
    """As earlier versions chose."""
    documents = [Document("book.txt", b"x" * 757_011), Document("README", b"x" * 65)]
    assert [names(part) for part in held_out_split(documents, by="name")] == [["book.txt"], ["README"]]
    with pytest.raises(ValueError, match="by: expected 'size' or 'name', got 'hash'"):
        held_out_split(documents, by="hash")  # type: ignore[arg-type]


def test_of_many_similar_documents_the_choice_is_that_of_their_names() -> None:
    documents = [Document(f"file{i}", b"x" * (900 + i)) for i in range(500)]
    assert [names(part) for part in held_out_split(documents)] == [
        names(part) for part in held_out_split(documents, by="name")
    ]


def test_what_is_held_out_of_the_standard_library_stays() -> None:
    """All results on it are of this choice; it depends on names alone, and those differ by Python's version."""
    documents = standard_library()
    chosen = [d for d in documents if int(hashlib.sha256(d.name.encode()).hexdigest()[:16], 16) % 48 == 0]
    assert names(held_out_split(documents, by="name")[1]) == names(chosen)


def test_a_share_that_numpy_counted() -> None:
    assert len(held_out_split([Document("one", bytes(range(96)))], np.int64(48))[1][0]) == 2  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="documents: expected at least one, got none"):
        held_out_split([])


def test_a_limit_leaves_no_document_without_a_character() -> None:
    documents = [Document("a", b"1"), Document("b", "é".encode()), Document("c", b"23")]
    assert [bytes(d) for d in limited(documents, 2)] == [b"1"]
    assert limited(documents[1:], 1) == []
