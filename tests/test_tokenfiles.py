"""Documents that were encoded once: what is written is what encoding gives, and nothing else is trusted."""

import json
import os

import numpy as np
import pytest

from memformer.data import (
    BPETokenizer,
    ByteTokenizer,
    Document,
    TokenIds,
    encode_documents,
    fingerprint,
    held_out_split,
    load_tokenizer,
    open_tokens,
    read_documents,
    tokenizer_fingerprint,
    write_tokens,
)
from memformer.data.tokenfiles import with_tokens

TEXTS = ["the memory of a segment is read by every layer. " * 30, "naïve 🙂\n\nof a memory\r\n", "a"]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TEXTS, 300)


@pytest.fixture
def documents(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    return read_documents([tmp_path / f"{i}.txt" for i in range(len(TEXTS))])


def tokens_of(documents, tokenizer):
    return [np.asarray(tokens[:]).tolist() for tokens in encode_documents(documents, tokenizer)]


@pytest.fixture
def files(documents, bpe, tmp_path):
    return write_tokens(documents, bpe, tmp_path / "encoded")


def test_the_files_hold_what_encoding_gives(files, documents, bpe, tmp_path):
    expected = tokens_of(documents, bpe)
    for found in (files, open_tokens(str(tmp_path / "encoded"), check=True)):
        assert tokens_of(found.documents, bpe) == expected
        assert [(d.name, d.text, d.num_bytes) for d in found.documents] == [
            (f"{i}.txt", False, len(text.encode())) for i, text in enumerate(TEXTS)
        ]
        assert (found.num_tokens, found.num_bytes) == (sum(map(len, expected)), sum(len(t.encode()) for t in TEXTS))
        assert found.data_fingerprint == fingerprint(documents)
        assert found.tokenizer_fingerprint == tokenizer_fingerprint(found.tokenizer) == tokenizer_fingerprint(bpe)
    # For other programs the ids are a plain array.
    assert np.fromfile(tmp_path / "encoded" / "tokens.bin", "<u2").tolist() == [i for ids in expected for i in ids]
    assert sorted(f.name for f in (tmp_path / "encoded").iterdir()) == [
        "documents.jsonl", "tokenizer.json", "tokenizer_config.json", "tokens.bin", "tokens.json",
    ]  # fmt: skip
    assert not list(tmp_path.glob(".*"))


def test_nothing_is_held_whole(bpe, tmp_path, monkeypatch):
    """A long document is read, encoded and written in blocks, each a hundredth of it."""
    monkeypatch.setattr("memformer.data.tokenfiles._BLOCK", 500)
    monkeypatch.setattr("memformer.data.pieces.BLOCK", 600)
    monkeypatch.setattr("memformer.data.pieces.OVERLAP", 160)
    text = ("a memory, naïve 🙂 " * 3 + "\n") * 1000
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    (document,) = read_documents([tmp_path / "long.txt"])
    read, seen = [], []
    whole = type(document.content)._read
    monkeypatch.setattr(
        type(document.content), "_read", lambda self, start, count: seen.append(count) or whole(self, start, count)
    )
    files = write_tokens([document], bpe, tmp_path / "encoded", read.append)
    assert max(seen) <= 1 << 14  # the fingerprint's samples
    assert read == sorted(read)
    assert read[-1] == len(text.encode())
    assert len(read) > 50
    assert files.documents[0].content[:].tolist() == bpe.encode(text).tolist()


def test_bits_per_byte_of_a_part_are_known(files, bpe):
    """A single document is cut where its tokens are, and its bytes are counted there."""
    training, held_out = held_out_split(files.documents[:1], 4)
    assert (len(training), len(held_out)) == (1, 1)
    sizes = [training[0].num_bytes, held_out[0].num_bytes]
    assert sizes == [len(bpe.decode(d.content[:]).encode()) for d in (training[0], held_out[0])]
    assert sum(sizes) == files.documents[0].num_bytes == files.documents[0].part(0, 10**9).num_bytes


def test_ids_are_passed_on_and_checked(tmp_path, bpe):
    ids = Document("ids", np.array([3, 4, 290]), text=False)
    mixed = write_tokens([ids, Document("text", b"memory")], bpe, tmp_path / "mixed")
    assert mixed.documents[0].content[:].tolist() == [3, 4, 290]
    assert [d.num_bytes for d in mixed.documents] == [None, 6]
    assert mixed.num_bytes is None
    plain = write_tokens([ids], TokenIds(300), tmp_path / "ids")
    assert plain.documents[0].content[:].tolist() == [3, 4, 290]
    assert write_tokens([Document("text", b"abc")], ByteTokenizer(), tmp_path / "bytes").documents[0].num_bytes == 3
    for tokenizer, message in [
        (TokenIds(290), "ids: token 290 at position 2 is not in the vocabulary of 290"),
        (ByteTokenizer(), "ids: holds token ids, and the tokenizer is of bytes"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_tokens([ids], tokenizer, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_document_without_a_token_is_left_out(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "[UNK]": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = BPETokenizer(made)
    documents = [Document("blank", b" \n "), Document("one", b"one one")]
    files = write_tokens(documents, words, tmp_path / "encoded")
    assert [(d.name, len(d)) for d in files.documents] == [("one", 2)]
    assert [d and d.name for d in with_tokens(documents, files)] == [None, "one"]
    with pytest.raises(ValueError, match=r"three: this tokenizer has no token for 'three'"):
        write_tokens([Document("three", b"one three")], words, tmp_path / "refused")


def test_documents_know_their_tokens(files, documents, bpe, monkeypatch):
    known = with_tokens(documents, files)
    assert [bytes(d) for d in known] == [t.encode() for t in TEXTS]
    assert fingerprint(known) == fingerprint(documents)
    expected, cut = tokens_of(documents, bpe), tokens_of([documents[0].part(3, 50)], bpe)
    other = BPETokenizer.train(TEXTS, 290)
    assert tokens_of(known, other) == tokens_of(documents, other)
    assert tokens_of([known[0].part(3, 50)], bpe) == cut
    assert bytes(known[0].part(3, 50).part(1, 4)) == TEXTS[0][4:7].encode()
    monkeypatch.setattr(BPETokenizer, "encode", lambda *_: pytest.fail("encoded again"))
    assert tokens_of(known, bpe) == expected
    with pytest.raises(ValueError, match="holds the tokens of other documents"):
        with_tokens(documents[1:], files)


def test_ids_of_another_tokenizer_are_refused(files):
    for tokenizer in (ByteTokenizer(), BPETokenizer.train(TEXTS, 290), TokenIds(300)):
        with pytest.raises(ValueError, match=r"0\.txt: was encoded by another tokenizer than this one"):
            encode_documents(files.documents, tokenizer)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.jsonl", "tokenizer.json", "tokens.json"])
def test_damage_is_found(files, tmp_path, name):
    file = tmp_path / "encoded" / name
    raw = file.read_bytes()
    for content in (raw[:-2], raw + b"\n{", b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="encoded: damaged"):
            open_tokens(tmp_path / "encoded", check=True)
    file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    if name != "tokens.json":
        with pytest.raises(ValueError, match=rf"damaged \({name}: another checksum\)"):
            open_tokens(tmp_path / "encoded", check=True)
    file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"damaged|no tokens\.json"):
        open_tokens(tmp_path / "encoded")


def test_a_header_of_another_kind_is_refused(files, tmp_path):
    header = tmp_path / "encoded" / "tokens.json"
    saved = json.loads(header.read_text())
    for changed, message in [
        ({"format": 2}, "of format 2, expected 1: another version of memformer wrote it"),
        ({"tokens": 1}, "has other counts than"),
        ({"dtype": "<u4"}, "has other counts than"),
        ({"files": []}, "damaged"),
    ]:
        header.write_text(json.dumps(saved | changed))
        with pytest.raises(ValueError, match=message):
            open_tokens(tmp_path / "encoded")


def test_what_fails_leaves_nothing_and_what_was_there(files, documents, bpe, tmp_path, monkeypatch):
    before = (tmp_path / "encoded" / "tokens.bin").read_bytes()
    broken = [*documents, Document("broken", np.frombuffer(b"\xff\xfe", np.uint8))]
    with pytest.raises(ValueError, match=r"broken: .*invalid start byte"):
        write_tokens(broken, bpe, tmp_path / "encoded")
    assert (tmp_path / "encoded" / "tokens.bin").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    write_tokens(documents[1:], bpe, tmp_path / "encoded")
    assert len(open_tokens(tmp_path / "encoded").documents) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="mine: holds something else than token files"):
        write_tokens(documents, bpe, tmp_path / "mine")
    with pytest.raises(ValueError, match="expected at least one, got none"):
        write_tokens([], bpe, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"mine: no tokens\.json, so these are no token files"):
        open_tokens(tmp_path / "mine")


def test_what_killed_processes_left_is_removed(documents, bpe, tmp_path):
    folder = tmp_path / "one [of many]"
    left = [tmp_path / f".{folder.name}.{end}" for end in ("a.unfinished", "b.unfinished.replaced", "young.unfinished")]
    for other in left:
        other.mkdir()
        (other / "tokens.bin").write_bytes(b"1")
        if "young" not in other.name:
            for file in (other / "tokens.bin", other):
                os.utime(file, (0, 0))
    write_tokens(documents, bpe, folder)
    assert list(tmp_path.glob(".*")) == left[2:]


def test_the_tokenizer_comes_with_them(files, bpe, tmp_path):
    loaded = load_tokenizer(tmp_path / "encoded")
    assert loaded.encode(TEXTS[0]).tolist() == bpe.encode(TEXTS[0]).tolist()
