"""Documents: what is read from files, piece by piece; what is held out; what is refused, and how."""

import errno
import io
import json

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from memformer.data import (
    BPETokenizer,
    ByteTokenizer,
    Document,
    Lanes,
    TokenIds,
    documents,
    encode_documents,
    fingerprint,
    kinds,
    read_documents,
    standard_library,
)


def contents(documents):
    return [(d.name, bytes(d) if d.text else d.content[:].tolist()) for d in documents]


def test_files_and_folders_are_read(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.txt").write_text("one")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").write_text("no")
    said = r"^files left out: 1 not UTF-8 text \(.*binary\), 1 empty \(.*empty\)$"
    with pytest.warns(UserWarning, match=said):
        assert contents(read_documents([tmp_path])) == [("a/c.txt", b"one"), ("b.txt", b"two")]
    assert contents(read_documents([str(tmp_path / "b.txt")])) == [("b.txt", b"two")]


def test_each_line_of_jsonl_is_a_document(tmp_path):
    rows = ['{"text": "na\\u00efve\\n", "id": 1}', "", '{"text": ""}', '{"other": 0, "text": "end"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = read_documents([tmp_path])
    assert contents(found) == [("a.jsonl:1", "naïve\n".encode()), ("a.jsonl:4", b"end")]
    assert [d.num_bytes for d in found] == [7, 3]
    assert bytes(found[0].part(2, 4)) == "ï".encode()
    (tmp_path / "b.jsonl").write_text('{"body": "x"}')
    assert contents(read_documents([tmp_path / "b.jsonl"], text_field="body")) == [("b.jsonl:1", b"x")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 1', r"a\.jsonl, line 2: not JSON"),
        (b"\xff", r"a\.jsonl, line 2: not JSON"),
        ('["x"]', r"a\.jsonl, line 2: expected an object with text in field 'text', got list"),
        (
            '{"body": "x", "id": 3}',
            r"line 2: expected an object with text in field 'text', got fields \['body', 'id'\]",
        ),
        ('{"text": null}', r"line 2: expected an object with text in field 'text', got NoneType in it"),
        ('{"text": "\\ud800"}', r"line 2: half a surrogate pair"),
    ],
)
def test_a_bad_line_is_refused_by_number(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=message):
        read_documents([tmp_path], strict=True)


def test_token_arrays_are_documents(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, 0, 7], np.int32))
    np.array([1, 70000], np.uint32).tofile(tmp_path / "b.bin")
    a, b = read_documents([tmp_path], bin_dtype="uint32")
    assert contents([a, b]) == [("a.npy", [5, 0, 7]), ("b.bin", [1, 70000])]
    assert (a.text, a.num_bytes, len(a)) == (False, None, 3)
    assert a.part(1, 3).content[0:5].tolist() == [0, 7]
    assert read_documents([tmp_path / "b.bin"])[0].content[:].tolist() == [1, 0, 70000 % 65536, 1]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=30), block=st.integers(1, 5))
def test_a_separator_cuts_a_token_array(tmp_path_factory, tokens, block):
    file = tmp_path_factory.mktemp("separated") / "a.bin"
    np.array(tokens, np.uint16).tofile(file)
    expected = [[int(c) for c in part] for part in "".join(map(str, tokens)).split("0") if part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memformer.data.kinds._BLOCK", block)
        if not expected:
            with pytest.raises(ValueError, match="empty"):
                read_documents([file], separator=0)
            return
        found = read_documents([file], separator=0)
    assert contents(found) == [(f"a.bin:{i}", part) for i, part in enumerate(expected)]


def test_token_arrays_that_do_not_fit_are_refused_by_name(tmp_path):
    for name, array, message in [
        ("floats.npy", np.zeros(3), "floats.npy: expected one dimension of integers, got float64"),
        ("square.npy", np.zeros((2, 2), int), r"square.npy: expected one dimension of integers, got int64 of shape"),
        ("objects.npy", np.array([None]), "objects.npy: not an array that can be read in pieces"),
        ("none.npy", np.zeros(0, int), "none.npy: empty"),
    ]:
        np.save(tmp_path / name, array)
        with pytest.raises(ValueError, match=message):
            read_documents([tmp_path / name])
    (tmp_path / "no.npy").write_text("text")
    with pytest.raises(ValueError, match=r"no\.npy: not an array"):
        read_documents([tmp_path / "no.npy"])
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"odd.bin: 3 bytes are not a whole number of uint16 tokens"):
        read_documents([tmp_path / "odd.bin"])
    for wrong in ("float32", "abacus"):
        with pytest.raises(ValueError, match=f"bin_dtype: expected a type of integers .* got '{wrong}'"):
            read_documents([tmp_path / "odd.bin"], bin_dtype=wrong)


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


@example(raw="a€".encode()[:-1], block=3)
@example(raw="a€".encode()[:-1], block=2)
@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    raw=st.binary(min_size=1, max_size=12) | st.text(min_size=1, max_size=6).map(str.encode), block=st.integers(1, 4)
)
def test_utf8_is_checked_across_blocks(tmp_path_factory, raw, block):
    """As Python checks it whole, the place of the error among it."""
    assume(b"\0" not in raw and not raw.startswith((b"\xff\xfe", b"\xfe\xff", *kinds._MAGIC)))
    file = tmp_path_factory.mktemp("utf8") / "a.txt"
    file.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memformer.data.kinds._BLOCK", block)
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            with pytest.raises(ValueError, match=rf"not UTF-8 text .*at byte {error.start}\)"):
                read_documents([file])
        else:
            assert bytes(read_documents([file])[0]) == raw


def test_a_part_is_read_only_where_it_is_sliced(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    (document,) = read_documents([tmp_path])
    part = document.part(2, 100).part(1, 5)
    assert (len(part), bytes(part), part.name) == (4, b"3456", "a.txt")
    assert part.content[1:].tobytes() == b"456"
    assert part.content[-2:].tobytes() == b"56"
    assert part.content[3:1].tobytes() == b""
    assert np.asarray(part.content).tobytes() == b"3456"
    (tmp_path / "a.txt").write_text("01234")
    with pytest.raises(ValueError, match=r"a\.txt: has become shorter since it was opened"):
        bytes(part)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ('{"text": "o"}\n{"text": "t"}\n', r"a\.jsonl, line 1: was changed since it was opened: not JSON"),
        ('{"tex": "one"}  \n' * 2, r"a\.jsonl, line 1: was changed since it was opened: .* got fields \['tex'\]"),
        ('{"text": "o"}  \n' * 2, "a text has become shorter since it was opened"),
    ],
)
def test_rows_that_are_changed_while_they_are_read(tmp_path, changed, message):
    """A text that is quietly shorter would be another one under the same fingerprint."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (one, _) = read_documents([tmp_path])
    (tmp_path / "a.jsonl").write_text(changed)
    with pytest.raises(ValueError, match=message):
        bytes(one)


def test_a_disk_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    class Broken(io.FileIO):
        def readinto(self, buffer):
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a.txt").write_text("one")
    (document,) = read_documents([tmp_path])
    monkeypatch.setattr(documents, "open", lambda path, *_, **__: Broken(path), raising=False)
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.txt'"):
        bytes(document)


def test_documents_check_themselves():
    assert len(Document("a", b"abc")) == 3
    with pytest.raises(ValueError, match="a: expected bytes or one dimension of uint8, got int64"):
        Document("a", np.arange(3))
    with pytest.raises(ValueError, match="a: expected one dimension of integers, got float64"):
        Document("a", np.zeros(3), text=False)
    with pytest.raises(ValueError, match="in 2 dimensions"):
        Document("a", np.zeros((1, 3), int), text=False)


def encoded(documents, tokenizer):
    return [tokens[:].tolist() for tokens in encode_documents(documents, tokenizer)]


def test_documents_are_encoded_by_what_they_hold(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "naïve naïve"}))
    text = [Document("t", b"ab"), *read_documents([tmp_path])]
    ids = [Document("i", np.array([1, 2]), text=False)]
    assert encoded(text, ByteTokenizer()) == [[97, 98], list("naïve naïve".encode())]
    bpe = BPETokenizer.train(["naïve naïve"], 270)
    assert encoded(text, bpe) == [bpe.encode("ab").tolist(), bpe.encode("naïve naïve").tolist()]
    assert encoded(ids, TokenIds(3)) == encoded(ids, bpe) == [[1, 2]]
    with pytest.raises(ValueError, match="i: holds token ids, and the tokenizer is of bytes"):
        encode_documents(ids, ByteTokenizer())
    with pytest.raises(ValueError, match="t: this vocabulary is token ids without a text form"):
        encode_documents(text, TokenIds(3))


@pytest.mark.parametrize("wrong", [10, 13, -1])
def test_a_token_beyond_the_vocabulary_is_found_when_it_is_read(wrong, monkeypatch):
    """10 would be the start token."""
    monkeypatch.setattr("memformer.data.corpora._AHEAD", 5)
    ids = np.zeros(100, np.int64)
    ids[57] = wrong
    documents = encode_documents(
        [Document("good", np.zeros(3, int), text=False), Document("a", ids, False)], TokenIds(10)
    )
    stream = Lanes(documents, lanes=1, length=10, start=10)
    with pytest.raises(
        ValueError, match=rf"a: token {wrong} at position 57 is not in the vocabulary of 10 \(ids 0 to 9"
    ):
        stream.rollout(20)
    assert stream.state_dict()["lanes"][0]["position"] == 50


def test_a_line_stays_decoded_for_the_lane_that_reads_it_alone(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": str(i) * 9}) + "\n" for i in range(4)))
    documents = encode_documents(read_documents([tmp_path]), ByteTokenizer())
    parsed = []
    loads = json.loads
    monkeypatch.setattr("json.loads", lambda line: parsed.append(line) or loads(line))
    list(Lanes(documents, lanes=2, length=2, start=256, epochs=1))
    assert len(parsed) == 4
    documents[0][:1]
    assert len(parsed) == 5, "nothing is kept once the lane has gone on"


@settings(deadline=None, max_examples=60, derandomize=True)
@given(ahead=st.integers(1, 30), places=st.lists(st.tuples(st.integers(-25, 25), st.integers(-25, 25)), max_size=8))
def test_reading_ahead_changes_nothing(tmp_path_factory, ahead, places):
    file = tmp_path_factory.mktemp("ahead") / "a.bin"
    np.arange(20, dtype=np.uint16).tofile(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memformer.data.corpora._AHEAD", ahead)
        (tokens,) = encode_documents(read_documents([file]), TokenIds(20))
    for start, stop in places:
        assert tokens[start:stop].tolist() == list(range(20))[start:stop]


def test_the_fingerprint_knows_names_texts_and_order():
    a, b = Document("a", b"1"), Document("b", b"2")
    prints = [fingerprint(x) for x in ([a, b], [b, a], [a], [Document("a", b"3"), b], [Document("c", b"1"), b])]
    assert len(set(prints)) == len(prints)
    ids = [Document("a", np.array([49], np.uint8), text=False), b]
    assert fingerprint(ids) not in prints
    assert fingerprint([Document("a", b"1"), Document("b", b"2")]) == prints[0]


def test_the_fingerprint_samples_long_documents():
    content = np.zeros(1_000_000, np.uint8)
    before = fingerprint([Document("a", content)])
    for place, known in [(0, True), (999_999, True), (500_000, True), (200_000, False)]:
        changed = content.copy()
        changed[place] = 1
        assert (fingerprint([Document("a", changed)]) != before) == known
    assert fingerprint([Document("a", content[:-1])]) != before


def test_the_standard_library_is_long_real_documents():
    documents = standard_library()
    assert sum(len(d) for d in documents) > 5_000_000
    assert not [d.name for d in documents if d.name.startswith("test/")]
    assert "ast.py" in {d.name for d in documents}


def test_a_file_given_twice_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    for paths in ([tmp_path / "a.txt"] * 2, [tmp_path, tmp_path / "a.txt"]):
        with pytest.raises(ValueError, match=r"a\.txt: given twice"):
            read_documents(paths)


def test_a_separator_needs_an_array(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="separator: 0 cuts"):
        read_documents([tmp_path], separator=0)


@pytest.mark.parametrize("content", [b"PK\x03\x04garbage", b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', (", b"[" * 9, b""])
def test_a_damaged_array_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy: (not an array|empty)"):
        read_documents([tmp_path / "a.npy"])


def test_json_that_is_too_deep_is_refused_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not JSON"):
        read_documents([tmp_path / "a.jsonl"])
