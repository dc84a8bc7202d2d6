"""Token files are looked at before they are read: their width, their header, and whether each id is known."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memformer.data import (
    BPETokenizer,
    ByteTokenizer,
    Document,
    TokenIds,
    Tokenizer,
    check_documents,
    encode_documents,
    read_documents,
)

IDS = np.random.default_rng(0).integers(0, 50_000, 500)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("<u4", "uint16"),
        ("<i4", "uint16"),
        ("<i8", "uint16"),
        ("<i8", "uint32"),
        ("<u2", "uint8"),
        ("<i8", "int32"),
    ],
)
@pytest.mark.parametrize("largest", [65, 50_000, 130_000])
def test_a_file_of_wider_tokens(tmp_path: Path, written: str, read: str, largest: int) -> None:
    """130,000: of today's vocabularies the higher half of an id is not always 0."""
    if written == "<u2" and largest > 256:
        pytest.skip("such ids fill both bytes")
    (IDS % largest + (largest > 65_536) * 65_536 * (IDS % 2)).astype(written).tofile(tmp_path / "a.bin")
    likely = {"<u4": "uint32", "<i4": "uint32", "<i8": "int64", "<u2": "uint16"}[written]
    with pytest.raises(ValueError, match=rf"a\.bin: read as {read}, every second token .* its --bin-dtype {likely}\?"):
        read_documents(tmp_path, bin_dtype=read)
    assert len(read_documents(tmp_path, bin_dtype="int64" if written == "<i8" else likely)[0]) == len(IDS)


def test_tokens_of_the_right_width_pass(tmp_path: Path) -> None:
    for name, array in {"a": IDS, "zeros": np.zeros(500), "small": IDS % 3, "one": np.ones(500)}.items():
        array.astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    np.array([5, 0] * 15, np.uint16).tofile(tmp_path / "short.bin")
    assert len(read_documents(tmp_path)) == 5


@pytest.mark.parametrize(("magic", "kind"), [(20240520, np.uint16), (20240801, np.uint32)])
def test_the_header_of_llm_c(tmp_path: Path, magic: int, kind: Any) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = magic, 1, len(IDS)
    (tmp_path / "a.bin").write_bytes(header.tobytes() + IDS.astype(kind).tobytes())
    (document,) = read_documents(tmp_path / "a.bin", bin_dtype="uint8")
    assert document.content[:].tolist() == IDS.tolist()
    first, *_ = read_documents(tmp_path / "a.bin", separator=int(IDS[7]))
    assert first.content[:].tolist() == IDS[:7].tolist()
    (tmp_path / "a.bin").write_bytes(header.tobytes() + IDS[:-1].astype(kind).tobytes())
    with pytest.raises(ValueError, match=r"a\.bin: begins as a token file of llm\.c, with 500 tokens of uint"):
        read_documents(tmp_path)


def test_megatrons_index(tmp_path: Path) -> None:
    IDS.astype(np.uint16).tofile(tmp_path / "a.bin")
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\x00\x00" + bytes(30))
    for path in (tmp_path, tmp_path / "a.bin"):
        with pytest.raises(ValueError, match=r"a\.bin: beside it lies a\.idx, the index of Megatron's format"):
            read_documents(path)
    (tmp_path / "a.idx").write_bytes(b"of something else")
    with pytest.warns(UserWarning, match=r"files left out: 1 index file \(.*a\.idx\)"):
        assert len(read_documents(tmp_path)) == 1


def test_ids_beyond_the_vocabulary_are_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memformer.data.corpora._BLOCK", 7)
    ids = np.arange(1, 101, dtype=np.uint16)
    ids[57] = 0
    ids.tofile(tmp_path / "a.bin")
    documents = read_documents(tmp_path, separator=0)
    check_documents(documents, TokenIds(101))
    with pytest.raises(ValueError, match=r"^a\.bin:1: token 91 at position 32 is not in the vocabulary of 91 \(ids"):
        check_documents(documents, TokenIds(91))
    check_documents(documents[:1], TokenIds(58))
    with pytest.raises(ValueError, match="token -1 at position 8 is not in the vocabulary of 5"):
        check_documents([Document("a", np.array([1] * 8 + [-1]), text=False)], TokenIds(5))


def test_what_separates_documents_need_not_be_known(tmp_path: Path) -> None:
    np.array([1, 2, 9, 3, 9, 9, 4], np.uint16).tofile(tmp_path / "a.bin")
    documents = read_documents(tmp_path, separator=9)
    check_documents(documents, TokenIds(5))
    check_documents(documents[::-1], TokenIds(5))
    with pytest.raises(ValueError, match=r"a\.bin:2: token 4 at position 0"):
        check_documents(documents[::-1], TokenIds(4))


@pytest.mark.parametrize(("written", "read"), [("uint16", "uint32"), ("uint16", "int64"), ("uint32", "int64")])
def test_the_likely_type_is_named(tmp_path: Path, written: str, read: str) -> None:
    (IDS % 1000).astype(written).tofile(tmp_path / "a.bin")
    documents = read_documents(tmp_path, bin_dtype=read)
    with pytest.raises(ValueError, match=rf"as {written} its ids are in range: is its --bin-dtype {written}\?"):
        check_documents(documents, TokenIds(1000))
    (IDS + 1000).astype(read).tofile(tmp_path / "a.bin")
    largest = int(IDS.max()) + 1000
    larger = (
        rf"position 0 is not in the vocabulary of 1000 .*; is --vocabulary larger\? The largest id .* is {largest}$"
    )
    with pytest.raises(ValueError, match=larger):
        check_documents(read_documents(tmp_path, bin_dtype=read), TokenIds(1000))


def test_a_separator_that_is_nowhere_is_told(tmp_path: Path) -> None:
    """One that is wrong would silently make one document of all texts."""
    IDS.astype(np.uint16).tofile(tmp_path / "a.bin")
    with pytest.warns(UserWarning, match=r"separator: 60000 is nowhere in the arrays, such as a\.bin, so each is one"):
        assert len(read_documents(tmp_path, separator=60000)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_documents(tmp_path, separator=int(IDS[-1]))


def test_ids_beyond_the_vocabulary_of_a_file_are_not_said_to_want_another_size(tmp_path: Path) -> None:
    """--vocabulary does nothing beside a tokenizer.json."""
    pytest.importorskip("tokenizers")
    np.save(tmp_path / "a.npy", np.array([1, 2, 50256]))
    bpe = BPETokenizer.train(["a text"], 256)
    with pytest.raises(ValueError, match=r"token 50256 at position 2 .*; did another tokenizer make them\?"):
        check_documents(read_documents(tmp_path), bpe)
    with pytest.raises(ValueError, match=r"is --vocabulary larger\? The largest id in this file is 50256"):
        check_documents(read_documents(tmp_path), TokenIds(256))


def test_no_vocabulary_is_said_to_have_ids_below_0(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, -100, 2]))
    with pytest.raises(ValueError, match=r"token -100 at position 1 .*; no id is below 0: leave out what is no token$"):
        check_documents(read_documents(tmp_path), TokenIds(5))


def test_the_check_looks_at_texts_too() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer: Tokenizer = BPETokenizer(plain)
    fine, unknown, spaces = Document("fine", b"a a"), Document("unknown", b"a b"), Document("spaces", b"   ")
    check_documents([fine], tokenizer)
    with pytest.raises(ValueError, match="unknown: this tokenizer has no token for 'b'"):
        check_documents([fine, unknown], tokenizer)
    with pytest.warns(UserWarning, match=r"documents left out: 1 of which no token is left \(spaces\)"):
        assert len(encode_documents([fine, spaces], tokenizer)) == 1
    with pytest.raises(ValueError, match=r"no token is left of any: 1 of which no token is left \(spaces\)"):
        encode_documents([spaces], tokenizer)
    with pytest.raises(ValueError, match="no token is left of any"):
        check_documents([spaces], tokenizer)
    for documents in ([Document("none", b"")], [fine, Document("none", b"")]):
        with pytest.raises(ValueError, match="none: an empty document"):
            check_documents(documents, ByteTokenizer())
    with pytest.raises(ValueError, match=r"ids: holds token ids, and the tokenizer is of bytes.*--tokenizer ids"):
        check_documents([Document("ids", IDS, text=False)], ByteTokenizer())
