"""Kinds of files: what is read of each, what is never learned as text, and which rows are passed over."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout

from memformer.data import Document, from_rows, read_documents, unpacked

ROWS = [{"id": 1, "text": "naïve\n"}, {"id": 2, "text": ""}, {"id": 3, "text": "end"}]
TEXTS = ["naïve\n".encode(), b"end"]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def texts(documents: list[Document]) -> list[bytes]:
    return [bytes(document) for document in documents]


def read(path: Path, **how: Any) -> list[bytes]:
    return texts(read_documents(path, **how))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonlines", "a.json", "a.JSONL", "a.Json", "a.NDJSON"])
def test_lines_of_json_under_all_their_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LINES)
    documents = read_documents(tmp_path / name)
    assert texts(documents) == TEXTS
    assert [d.name for d in documents] == [f"{name}:1", f"{name}:3"]
    (tmp_path / name).write_text(LINES[: LINES.index("\n")])
    assert read(tmp_path / name) == TEXTS[:1]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_that_is_an_array_or_an_object(tmp_path: Path, indent: int | None) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(ROWS, indent=indent))
    assert read(file) == TEXTS
    file.write_text(json.dumps(ROWS[0], indent=indent))
    assert read(file) == TEXTS[:1]
    file.write_text(json.dumps(["one", "two"], indent=indent))
    assert read(file) == [b"one", b"two"]
    file.write_text(json.dumps({"data": ROWS}, indent=indent))
    with pytest.raises(ValueError, match=r"a\.json.*: expected an object with text .* got fields \['data'\]"):
        read(file)


def test_json_that_is_too_large_to_parse_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memformer.data.kinds._JSON_AT_ONCE", 20)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with pytest.raises(ValueError, match=r"a\.json: one array or object of \d+ bytes is too large .* write JSON Lines"):
        read(tmp_path / "a.json")


def test_a_table(tmp_path: Path) -> None:
    for name, delimiter in (("a.csv", ","), ("a.TSV", "\t")):
        long = 'x, "quoted"\n' * 20_000  # longer than the csv module takes by default
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerows([["id", "text"], ["1", "naïve\n"], ["2", ""], ["3", long]])
        before = csv.field_size_limit()
        assert read(tmp_path / name) == [TEXTS[0], long.encode()]
        assert csv.field_size_limit() == before
    (tmp_path / "b.csv").write_text("id;text\n1;a\n")
    with pytest.raises(ValueError, match=r"b\.csv, line 2: expected an object .* got fields \['id;text'\]"):
        read(tmp_path / "b.csv")


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_text_that_was_not_quoted_is_not_cut(tmp_path: Path, name: str, separator: str) -> None:
    rows = ["id,text", "1,Hello, world, and more", '2,"quoted, fine"', "3,plain,", ""]
    (tmp_path / name).write_text("\n".join(rows).replace(",", separator))
    message = rf"rows left out: 1 with more cells than the header \(.*{name}, line 2\)"
    with pytest.warns(UserWarning, match=message):
        assert read(tmp_path / name) == [f"quoted{separator} fine".encode(), b"plain"]
    with pytest.raises(ValueError, match=rf"{name}, line 2: 2 cells more than the header; .* has to be quoted"):
        read_documents(tmp_path / name, strict=True)


def test_a_header_that_names_the_text_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\nthis,or that\n")
    with pytest.raises(ValueError, match=r"a\.csv: its header names 'text' more than once"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_quote_that_is_never_closed(tmp_path: Path, name: str, separator: str) -> None:
    """It would make one text of all rows that follow."""
    rows = ["id,text", '1,one "word" in it', '2,"two', "3,three", ""]
    (tmp_path / name).write_text("\n".join(rows).replace(",", separator))
    with pytest.raises(ValueError, match=rf"{name}, after line 2: not a table \(unexpected end of data\)"):
        read(tmp_path / name)


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    pack = PACKERS[ending]
    for name, content, expected in [
        ("a.txt", b"some text" * 1000, [b"some text" * 1000]),
        ("a.JSONL", LINES.encode(), TEXTS),
        ("a.csv", b"text\none\n", [b"one"]),
        ("noname", b"text", [b"text"]),
    ]:
        (tmp_path / (name + ending)).write_bytes(pack(content))
        documents = read_documents(tmp_path / (name + ending))
        assert texts(documents) == expected
        assert documents[0].name.startswith(name + ending)
    (tmp_path / f"a.bin{ending.upper()}").write_bytes(pack(np.arange(9, dtype=np.uint16).tobytes()))
    assert read_documents(tmp_path / f"a.bin{ending.upper()}")[0].content[:].tolist() == list(range(9))
    damaged = tmp_path / f"cut.txt{ending}"
    damaged.write_bytes(pack(np.random.default_rng(0).bytes(100_000))[:-50])
    with pytest.raises(ValueError, match=r"cut\.txt.*: damaged, it cannot be unpacked"):
        read(damaged)
    damaged.write_bytes(b"this is no such thing")
    with pytest.raises(ValueError, match=r"cut\.txt.*: damaged, it cannot be unpacked"):
        read(damaged)
    (tmp_path / f"a.tar{ending}").write_bytes(pack(b"x"))
    with pytest.raises(ValueError, match=r"a\.tar.*: an archive: unpack it first"):
        read(tmp_path / f"a.tar{ending}")


def test_unpacked_files_are_read_in_pieces_and_go_with_the_process(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"0123456789"))
    (document,) = read_documents(tmp_path)
    assert bytes(document.part(2, 5)) == b"234"
    assert bytes(pickle.loads(pickle.dumps(document))) == b"0123456789"
    assert [file for file in unpacked._folder().iterdir() if file.read_bytes() == b"0123456789"]


def test_what_a_killed_process_unpacked_is_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each start of a run that is stopped often would leave a copy of its data."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    here = unpacked._PREFIX
    killed, held, young, elsewhere = (tmp_path / name for name in (f"{here}a", f"{here}b", f"{here}c", "memformer-x-d"))
    for made in (killed, held, young, elsewhere):
        made.mkdir()
        (made / ".lock").touch()
        (made / "content").touch()
    with FileLock(held / ".lock"):
        for made in (killed, held, elsewhere):
            os.utime(made / ".lock", (0, 0))
        folder = unpacked._folder.__wrapped__()
        assert sorted(tmp_path.iterdir()) == sorted([folder, held, young, elsewhere])
    with pytest.raises(Timeout):
        FileLock(folder / ".lock", timeout=0).acquire()
    unpacked._remove(folder, FileLock(folder / ".lock"), os.getpid() + 1)
    assert folder.exists(), "a process that was forked ends"
    unpacked._remove(folder, FileLock(folder / ".lock"), os.getpid())
    assert not folder.exists()


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x" * 100_000))
    monkeypatch.setattr(unpacked, "_new_file", lambda: Path("/dev/full"))
    with pytest.raises(OSError, match=r"a\.txt\.gz: cannot be unpacked into .* \(No space left .* set TMPDIR"):
        read_documents(tmp_path)


def test_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(part) for part in (LINES[:20].encode(), LINES[20:].encode())]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "a.jsonl.zst") == TEXTS
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames)[:-3])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: damaged"):
        read(tmp_path / "a.jsonl.zst")
    (tmp_path / "a.jsonl.zst").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: damaged"):
        read(tmp_path / "a.jsonl.zst")


def test_zst_and_parquet_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zstandard", "compression", "compression.zstd", "pyarrow", "pyarrow.ipc", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, extra in (("a.txt.zst", "zst"), ("a.parquet", "parquet"), ("a.arrow", "parquet")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ImportError, match=rf"a\..*: .*pip install 'memformer-replay\[{extra}\]'"):
            read(tmp_path / name)


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"id": i, "text": f"text {i}" if i % 3 else None} for i in range(200)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=30)
    with pytest.warns(UserWarning, match=r"^rows left out: 67 without text .* \(such as .*a\.parquet, row 1\)$"):
        documents = read_documents(tmp_path)
    assert [(d.name, bytes(d)) for d in documents[:2]] == [("a.parquet:2", b"text 1"), ("a.parquet:3", b"text 2")]
    assert len(documents) == 133
    with pytest.raises(
        ValueError, match=r"a\.parquet: expected rows .* got fields \['id', 'text'\]; text_field names the field"
    ):
        read(tmp_path, text_field="body")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"a\.parquet: not a Parquet file"):
        read(tmp_path / "a.parquet")


def test_what_datasets_saves_to_disk(tmp_path: Path) -> None:
    pyarrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    table = pyarrow.Table.from_pylist(ROWS)
    with ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as file:
        file.write_table(table)
    (tmp_path / "state.json").write_text('{"_fingerprint": "x"}')
    with pytest.warns(UserWarning, match=r"^files left out: 1 without text in field 'text' \(.*state\.json\)$"):
        assert read(tmp_path) == TEXTS
    with ipc.new_file(str(tmp_path / "b.feather"), table.schema) as file:
        file.write_table(table)
    assert read(tmp_path / "b.feather") == TEXTS


CONTAINERS = {
    "a.zip": "an archive: unpack it first", "a.TAR": "an archive", "a.tgz": "an archive",
    "a.pdf": "not plain text: save its text", "a.docx": "not plain text",
    "a.html": "markup, not text", "a.safetensors": "holds arrays, not text", "a.pt": "holds arrays",
    "a.npz": "holds arrays, not text; one array of token ids can be a .npy file", "a.idx": "the index of a token file",
    "a.ipynb": "a notebook: save its text", "a.png": "not text", "a.sqlite": "a database",
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_is_never_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("it could be read as text")
    with pytest.raises(ValueError, match=rf"{name}: {CONTAINERS[name]}"):
        read(tmp_path / name)
    (tmp_path / "a.txt").write_text("text")
    with pytest.warns(UserWarning, match=rf"^files left out: 1 [\w ]+ \(.*{name}\)$"):
        assert read(tmp_path) == [b"text"]


BEGINNINGS = {
    b"PK\x03\x04": "a zip archive", b"%PDF-1.7": "a PDF", b"\x1f\x8b\x08": "ends in .gz",
    b"SQLite format 3\0": "a database", b"{\\rtf1": "rich text", b"\x93NUMPY": "ends in .npy", b"\x89PNG": "an image",
}  # fmt: skip


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("name", ["a.txt", "noname"])
def test_a_container_under_another_name(tmp_path: Path, beginning: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(beginning + b" and so on")
    with pytest.raises(ValueError, match=rf"{name}: not text but .*{BEGINNINGS[beginning]}"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jl", "a.log", "noname"])
def test_rows_under_another_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(LINES)
    with pytest.raises(ValueError, match=rf"{name}: JSON Lines, not text: give it a name that ends in \.jsonl"):
        read(tmp_path / name)
    (tmp_path / "b.txt").write_text("text")
    with pytest.warns(UserWarning, match=rf"^files left out: 1 JSON Lines under another name \(.*{name}\)$"):
        assert read(tmp_path) == [b"text"]
    assert read(tmp_path / name, text_field="body") == [LINES.encode()], "lines of something else are text"


@pytest.mark.parametrize(
    "beginning", ["PAR1", "GIF8", "{", '{"text"', "BZh9", "Rar!", "PK", "SQLite format 3", "ARROW1"]
)
def test_a_text_may_begin_as_it_likes(tmp_path: Path, beginning: str) -> None:
    (tmp_path / "a.txt").write_text(f"{beginning} is a text")
    assert read(tmp_path) == [f"{beginning} is a text".encode()]


def test_a_zero_byte_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\0c")
    with pytest.raises(ValueError, match=r"a\.txt: not text, byte 5 is 0"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_the_mark_at_the_beginning_of_a_text(tmp_path: Path, name: str) -> None:
    content = {"a.txt": "one", "a.csv": "text\none\n"}.get(name, '{"text": "one"}\n')
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    (document,) = read_documents(tmp_path / name)
    assert bytes(document) == b"one"
    assert bytes(document.part(1, 2)) == b"n"
    (tmp_path / name).write_bytes(content.encode("utf-16"))
    with pytest.raises(ValueError, match=rf"{name}: UTF-16, not UTF-8 text: convert it, as iconv"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match=rf"{name}: empty"):
        read(tmp_path / name)


BAD = ['{"text": null}', '{"text": "\\ud800"}', '{"body": "x"}', '{"text": 1', '["x"]']


def test_bad_rows_are_counted_and_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "one"}', *BAD, '{"text": "two"}']))
    expected = (
        r"^rows left out: 3 without text in field 'text' \(such as .*a\.jsonl, line 2\), 1 with half a surrogate pair "
        r"\(.*a\.jsonl, line 3\), 1 not JSON \(.*a\.jsonl, line 5\)$"
    )
    with pytest.warns(UserWarning, match=expected):
        documents = read_documents(tmp_path / "a.jsonl")
    assert [(d.name, bytes(d)) for d in documents] == [("a.jsonl:1", b"one"), ("a.jsonl:7", b"two")]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected an object .* got NoneType"):
        read_documents(tmp_path / "a.jsonl", strict=True)


def test_a_wrong_field_is_an_error(tmp_path: Path) -> None:
    """Not a corpus without these files."""
    (tmp_path / "README.md").write_text("about this data")
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 3}\n' * 3)
    (tmp_path / "package.json").write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"line 1: .* got fields \['body', 'id'\]; none of its rows has a text"):
        read(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    with pytest.warns(UserWarning, match=r"2 without text in field 'text' \(such as .*a\.jsonl\)"):
        assert read(tmp_path) == [b"about this data", b"x"]
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected an object"):
        read(tmp_path, strict=True)


# --- Rows in Python


class Dataset:
    """As those of the datasets library: rows by index, made anew each time."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows, self.read = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read += 1
        return dict(self.rows[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


def test_rows_are_documents() -> None:
    rows = Dataset(ROWS)
    documents = from_rows(rows)
    assert rows.read == 3
    assert [(d.name, bytes(d)) for d in documents] == [("row:0", TEXTS[0]), ("row:2", TEXTS[1])]
    assert rows.read == 5, "a text is read where it is needed"
    assert bytes(documents[0].part(2, 4)) == "ï".encode()
    streamed = from_rows(iter([{"body": "one"}, "two"]), "body", name="stream")
    assert [(d.name, bytes(d)) for d in streamed] == [("stream:0", b"one"), ("stream:1", b"two")]
    with pytest.warns(UserWarning, match=r"rows left out: 1 without text in field 'text' \(row, row 1\)"):
        assert texts(from_rows(["one", None])) == [b"one"]


def test_a_long_row_is_not_parsed_anew_for_each_part(tmp_path: Path) -> None:
    """To train a BPE on 30 MB in one line, and to encode them, was to parse them thirty times each."""
    long = "é" * (1 << 19)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", long)))
    documents = read_documents(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    assert bytes(documents[1].part(2, 6)) == "éé".encode()
    assert bytes(documents[1]) == long.encode()
    rows = Dataset([{"text": "short"}, {"text": long}])
    documents, read = from_rows(rows), rows.read
    assert [len(bytes(document)) for document in documents] == [5, 1 << 20]
    assert rows.read == read + 1, "the short one alone"


def test_what_are_no_rows() -> None:
    with pytest.raises(ValueError, match="rows: expected a sequence or an iterable of texts or mappings, got str"):
        from_rows("text")
    with pytest.raises(ValueError, match="got a mapping of 'train', 'test': give one of these"):
        from_rows({"train": [], "test": []})
    with pytest.raises(ValueError, match="rows: expected at least one with a text, got none"):
        from_rows([])
    with pytest.raises(ValueError, match=r"row, row 0: expected an object .* got fields \['a'\]"):
        from_rows([{"a": 1}])


def test_no_warning_where_all_is_well(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path)
