"""What is in a file, by its name, and how it is read.

A new kind is a function in :data:`KINDS`. What is no text, and what no function reads, is never learned as text: it is
told by its name or by its first bytes.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import functools
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..checks import plural
from .documents import Document, FileTokens, LazyTokens, ParsedText
from .folders import Found, Tally, shown
from .unpacked import COMPRESSED, TextStore, unpack

__all__ = [
    "KINDS",
    "ROWS",
    "Reading",
    "UnreadableError",
    "integer_type",
    "kept",
    "kind_of",
    "read_file",
    "read_rows",
    "read_text",
    "row_text",
]

_BLOCK = 1 << 20
"""Items or bytes read at once where a file is gone through."""
_LONG_ROW = 1 << 20
"""Bytes of a text from which on it is kept apart, for to read a part of it its row would be parsed whole each time."""
_JSON_AT_ONCE = 1 << 28
"""Bytes of a .json file that is one array or object; it is parsed whole."""


class UnreadableError(ValueError):
    """A file that cannot be data. In a folder it is left out and counted, under ``kind``.

    Attributes:
        rows: whether it has rows, none of which holds a text: then the field's name is probably wrong.
    """

    def __init__(self, kind: str, message: str, rows: bool = False):
        super().__init__(message)
        self.kind, self.rows = kind, rows


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files are read; see :func:`~memformer.data.read_documents`."""

    text_field: str = "text"
    separator: int | None = None
    bin_dtype: str = "uint16"
    strict: bool = False
    rows: Tally
    """Gets the rows that are passed over."""


@dataclass(frozen=True)
class _Source:
    path: Path
    """The file's name for messages."""
    name: str
    """The documents' name."""
    content: Path
    """Where the bytes are: the file itself, or where it was unpacked."""

    def __str__(self) -> str:
        return shown(self.path)


_Reader = Callable[[_Source, Reading], Iterator[Document]]


def kind_of(path: Path) -> str:
    """What a name ends with, in lower case and without what compressed it: the key of :data:`KINDS`."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def read_file(found: Found, how: Reading, include: bool = False) -> Iterator[Document]:
    """The documents of one file.

    Args:
        include: whether a pattern asks for it; then markup is text.

    Raises:
        UnreadableError: it is empty or not what its name says, or its kind cannot be read.
        ValueError: its tokens have another width; or ``how`` is strict, and a row is wrong.
    """
    suffix, packed = kind_of(found.path), found.path.suffix.lower() in COMPRESSED
    kind, remedy = _REFUSED.get(suffix, ("", ""))
    if kind and not (include and suffix in _MARKUP):
        raise UnreadableError(kind, f"{shown(found.path)}: {remedy}")
    try:
        content = unpack(found.path) if packed else found.path
    except ValueError as error:
        raise UnreadableError("damaged compressed file(s)", str(error)) from error
    documents = KINDS.get(suffix, _text)(_Source(found.path, found.name, content), how)
    first = next(documents, None)
    if first is None:
        raise UnreadableError("empty", f"{shown(found.path)}: empty")
    yield first
    yield from documents


# --- Text


_START = 16
_BOM = codecs.BOM_UTF8
_MAGIC: dict[bytes, str] = {
    b"PK\x03\x04": "a zip archive (perhaps of an office program): unpack it, or save its text",
    b"%PDF": "a PDF: save its text",
    b"\x1f\x8b": "compressed by gzip: give it a name that ends in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: give it a name that ends in .zst",
    b"\xfd7zXZ\x00": "compressed by xz: give it a name that ends in .xz",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!\x1a\x07": "a rar archive: unpack it",
    b"ARROW1\0": "Arrow: give it a name that ends in .arrow",
    b"\x93NUMPY": "a numpy array: give it a name that ends in .npy",
    b"{\\rtf": "rich text: save it as plain text",
    b"SQLite format 3\0": "a database: write its texts into JSON Lines",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x7fELF": "a program",
    b"\xd0\xcf\x11\xe0": "an office document: save its text",
}
"""What is not text, by its first bytes, none of which a text could begin with."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _start(source: _Source) -> int:
    """Where the text begins: after the mark of UTF-8, if there is one. Raises UnreadableError: it is no UTF-8 text."""
    with source.content.open("rb") as file:
        start = file.read(_START)
    if start.startswith(_UTF16):
        raise UnreadableError(
            "not UTF-8 text", f"{source}: UTF-16, not UTF-8 text: convert it, as iconv -f UTF-16 -t UTF-8 does"
        )
    for magic, what in _MAGIC.items():
        if start.startswith(magic):
            raise UnreadableError("not text", f"{source}: not text but {what}")
    return len(_BOM) if start.startswith(_BOM) else 0


def read_text(path: Path, name: str) -> Iterator[Document]:
    """A file of UTF-8 text, whatever its name is. Raises UnreadableError: it is none."""
    return _text(_Source(path, name, path), Reading(rows=Tally()))


def _text(source: _Source, how: Reading) -> Iterator[Document]:
    size = source.content.stat().st_size
    begin = _start(source)
    content = FileTokens(source.content, np.dtype(np.uint8), 0, begin, size)
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(content), _BLOCK):
        pending = len(decoder.getstate()[0])
        block = content[start : start + _BLOCK].tobytes()
        try:
            decoder.decode(block, final=start + _BLOCK >= len(content))
        except UnicodeDecodeError as error:
            place = begin + start - pending + error.start
            raise UnreadableError(
                "not UTF-8 text",
                f"{source}: not UTF-8 text ({error.reason} at byte {place}); if it is Latin-1, convert it, as "
                "iconv -f LATIN1 -t UTF-8 does",
            ) from error
        if b"\0" in block:
            place = begin + start + block.index(b"\0")
            raise UnreadableError("not text", f"{source}: not text, byte {place} is 0")
        if not start and _is_row(block, how.text_field):
            raise UnreadableError(
                "JSON Lines under another name", f"{source}: JSON Lines, not text: give it a name that ends in .jsonl"
            )
    if len(content):
        yield Document(source.name, content)


def _is_row(block: bytes, field: str) -> bool:
    """Whether the first line is an object of JSON that has the field."""
    try:
        return block.startswith(b"{") and field in json.loads(block.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False


# --- Rows


class _RowError(ValueError):
    """What is wrong with a row; ``kind`` is what it is counted as."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


_Row = tuple[int, Callable[[], str]]
"""A row's number, and what gives its text or raises a fault."""


def row_text(row: object, field: str) -> str:
    """A row that is a text, or the text in a field of it. Raises what is counted where it has none."""
    expected = f"expected an object with text in field {field!r}, got"
    kind = f"without text in field {field!r}"
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise _RowError(kind, f"{expected} {type(row).__name__}")
    if field not in row:
        raise _RowError(kind, f"{expected} fields {sorted(map(str, row))}")
    text = row[field]
    if not isinstance(text, str):
        raise _RowError(kind, f"{expected} {type(text).__name__} in it")
    return text


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _RowError("with half a surrogate pair", "half a surrogate pair is not text") from error


def read_rows(
    texts: Iterable[_Row], where: str, unit: str, how: Reading, single: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each row's text; empty ones are left out, wrong ones are passed over and counted.

    Args:
        where, unit: the file and what its rows are called, for messages.
        single: whether the file may be something else than rows.

    Raises:
        UnreadableError: all rows are wrong.
        ValueError: a row is wrong, and ``how`` is strict.
    """
    fine, wrong, first = 0, Tally(), ""
    for number, text in texts:
        try:
            encoded = _utf8(text())
        except _RowError as fault:
            message = f"{where}, {unit} {number}: {fault}"
            if how.strict:
                raise ValueError(message) from fault
            first = first or message
            wrong.add(fault.kind, f"{where}, {unit} {number}")
        else:
            fine += 1
            if encoded:
                yield number, encoded
    if len(wrong) and not fine:
        raise UnreadableError(
            f"without text in field {how.text_field!r}",
            f"{first}; none of its rows has a text: text_field names the field",
            rows=not single,
        )
    how.rows.update(wrong)


def kept(text: bytes, parse: Callable[[], str], store: TextStore) -> LazyTokens:
    """A row's text: parsed where it is needed, or in the store if it is long."""
    return ParsedText(parse, 0, len(text)) if len(text) < _LONG_ROW else store.add(text)


def _stored(rows: Iterable[_Row], source: _Source, unit: str, how: Reading) -> Iterator[Document]:
    """Rows that cannot be read at random places: their texts are kept in a temporary file."""
    store = TextStore(source.path)
    try:
        for number, text in read_rows(rows, str(source), unit, how):
            yield Document(f"{source.name}:{number}", store.add(text))
    finally:
        store.close()


def _of_line(line: bytes, field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _RowError("not JSON", f"not JSON ({error})") from error
    return row_text(row, field)


def _read_line(source: _Source, number: int, field: str, offset: int, size: int) -> str:
    """The text in a line that lies in these bytes of a file."""
    line = FileTokens(source.content, np.dtype(np.uint8), offset, 0, size)[:].tobytes()
    try:
        return _of_line(line, field)
    except _RowError as fault:
        raise ValueError(f"{source}, line {number}: was changed since it was opened: {fault}") from fault


def _lines(source: _Source, how: Reading, single: bool = False) -> Iterator[Document]:
    """JSON Lines, read in place: a line is parsed again where its text is needed, unless that is long."""
    offset, size, store = 0, 0, TextStore(source.path)

    def rows() -> Iterator[_Row]:
        nonlocal offset, size
        offset = _start(source)
        with source.content.open("rb") as lines:
            lines.seek(offset)
            for number, line in enumerate(lines, 1):
                size = len(line)
                if line.strip():
                    yield number, functools.partial(_of_line, line, how.text_field)
                offset += size

    try:
        for number, text in read_rows(rows(), str(source), "line", how, single):
            # Where the row is that was read last.
            parse = functools.partial(_read_line, source, number, how.text_field, offset, size)
            yield Document(f"{source.name}:{number}", kept(text, parse, store))
    finally:
        store.close()


def _json(source: _Source, how: Reading) -> Iterator[Document]:
    """JSON Lines under another name; or one array of objects, or one object."""
    begin, size = _start(source), source.content.stat().st_size
    with source.content.open("rb") as file:
        file.seek(begin)
        line = next((line for line in file if line.strip()), b"").strip()
        more = bool(file.read(1))
    if line[:1] == b"{" and _is_json(line):
        yield from _lines(source, how, single=not more)
        return
    if size > _JSON_AT_ONCE:
        raise UnreadableError(
            "JSON that is too large to parse whole",
            f"{source}: one array or object of {size:,} bytes is too large to parse whole (at most "
            f"{_JSON_AT_ONCE:,}): write JSON Lines, as jq -c '.[]' does",
        )
    try:
        rows = json.loads(source.content.read_bytes()[begin:]) if line else []
    except (ValueError, RecursionError) as error:
        raise UnreadableError("not JSON", f"{source}: not JSON ({error})") from error
    if isinstance(rows, list):
        numbered = ((i, functools.partial(row_text, row, how.text_field)) for i, row in enumerate(rows, 1))
        yield from _stored(numbered, source, "row", how)
        return
    try:
        text = _utf8(row_text(rows, how.text_field))
    except _RowError as fault:
        raise UnreadableError(
            "JSON without rows of text", f"{source}: {fault}, or an array or lines of such"
        ) from fault
    store = TextStore(source.path)
    if text:
        yield Document(source.name, store.add(text))
    store.close()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _csv(source: _Source, how: Reading, delimiter: str = ",") -> Iterator[Document]:
    """A table whose first row names the fields."""
    _start(source)

    def rows() -> Iterator[_Row]:
        # Documents are longer than the 128 KB that fields may have.
        before = csv.field_size_limit(2**31 - 1)
        try:
            with source.content.open(encoding="utf-8-sig", newline="") as file:
                table = csv.DictReader(file, delimiter=delimiter, strict=True)
                if (table.fieldnames or []).count(how.text_field) > 1:
                    raise UnreadableError(
                        "table(s) with a field twice", f"{source}: its header names {how.text_field!r} more than once"
                    )
                for row in table:
                    yield table.line_num, functools.partial(_of_table, row, how.text_field)
        except UnicodeDecodeError as error:
            raise UnreadableError("not UTF-8 text", f"{source}: not UTF-8 text ({error.reason})") from error
        except csv.Error as error:
            # Such as a quote that is never closed, and would take all rows after it into one text.
            raise UnreadableError(
                "damaged table(s)", f"{source}, after line {table.line_num}: not a table ({error})"
            ) from error
        finally:
            csv.field_size_limit(before)

    yield from _stored(rows(), source, "line", how)


def _of_table(row: dict[str | None, Any], field: str) -> str:
    """The text in a row. Raises what is counted where it has more cells than the header: then a text was cut."""
    if surplus := [cell for cell in row.get(None, ()) if cell]:  # an empty one is a separator at the end of a line
        raise _RowError(
            "with more cells than the header",
            f"{plural(len(surplus), 'cell')} more than the header; a text with a separator in it has to be quoted",
        )
    return row_text(row, field)


def _pyarrow(source: _Source, module: str) -> ModuleType:
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise ImportError(
            f"{source}: needs the pyarrow library: pip install 'memformer-replay[parquet]'", name="pyarrow"
        ) from error


def _column(batches: Iterable[Any], field: str) -> Iterator[_Row]:
    values = (value for batch in batches for value in batch.column(field).to_pylist())
    return ((i, functools.partial(row_text, {field: value}, field)) for i, value in enumerate(values, 1))


def _parquet(source: _Source, how: Reading) -> Iterator[Document]:
    library = _pyarrow(source, "parquet")
    try:
        table = library.ParquetFile(source.content)
    except ValueError as error:  # pyarrow's errors are such
        raise UnreadableError("damaged table(s)", f"{source}: not a Parquet file ({error})") from error
    with table:
        _check_column(source, how, table.schema_arrow.names)
        yield from _stored(
            _column(table.iter_batches(64, columns=[how.text_field]), how.text_field), source, "row", how
        )


def _arrow(source: _Source, how: Reading) -> Iterator[Document]:
    """As ``datasets`` keeps its rows: a stream of batches, or a file of them."""
    library = _pyarrow(source, "ipc")
    with source.content.open("rb") as file:
        try:
            whole = file.read(6) == b"ARROW1"
            file.seek(0)
            opened = (library.open_file if whole else library.open_stream)(file)
        except (ValueError, OSError) as error:
            raise UnreadableError("damaged table(s)", f"{source}: not an Arrow file ({error})") from error
        _check_column(source, how, opened.schema.names)
        batches = (opened.get_batch(i) for i in range(opened.num_record_batches)) if whole else opened
        yield from _stored(_column(batches, how.text_field), source, "row", how)


def _check_column(source: _Source, how: Reading, names: list[str]) -> None:
    if how.text_field not in names:
        raise UnreadableError(
            f"without text in field {how.text_field!r}",
            f"{source}: expected rows with text in field {how.text_field!r}, got fields {sorted(names)}; "
            "text_field names the field",
            rows=True,
        )


# --- Token ids


def integer_type(name: str) -> np.dtype:
    """The type of a .bin file's tokens. Raises ValueError: it is no type of integers."""
    with contextlib.suppress(TypeError):
        if np.issubdtype(kind := np.dtype(name), np.integer):
            return kind
    raise ValueError(f"bin_dtype: expected a type of integers such as uint16 or uint32, got {name!r}")


def _npy(source: _Source, how: Reading) -> Iterator[Document]:
    try:
        mapped = np.lib.format.open_memmap(source.content, mode="r")
    except Exception as error:  # whatever a damaged header makes numpy's parser raise
        raise UnreadableError(
            "array(s) without token ids", f"{source}: not an array that can be read in pieces ({error})"
        ) from error
    if mapped.ndim != 1 or not np.issubdtype(mapped.dtype, np.integer):
        raise UnreadableError(
            "array(s) without token ids",
            f"{source}: expected one dimension of integers, got {mapped.dtype} of shape {mapped.shape}",
        )
    return _cut(FileTokens(source.content, mapped.dtype, mapped.offset, 0, len(mapped)), source.name, how.separator)


_LLM_C: dict[int, np.dtype] = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
"""The types of llm.c's token files, by their first number: then follow a header of 256 int32, and the tokens."""
_LLM_C_HEADER = 1024


def _bin(source: _Source, how: Reading) -> Iterator[Document]:
    index = source.path.with_suffix(".idx")
    if index.is_file() and index.read_bytes()[:6] in (b"MMIDID", b"TNTIDX"):
        raise ValueError(
            f"{source}: beside it lies {shown(index.name)}, the index of Megatron's format, which says what its tokens "
            "are and where documents end; write them into a .npy or .bin file without an index, with a separator. "
            "Where each document ends with an id of its own, a link to the .bin in another folder is such a file"
        )
    size = source.content.stat().st_size
    header = np.fromfile(source.content, "<i4", 3) if size >= _LLM_C_HEADER else np.zeros(3, np.int32)
    if int(header[0]) in _LLM_C:
        kind = _LLM_C[int(header[0])]
        if _LLM_C_HEADER + int(header[2]) * kind.itemsize != size:
            raise ValueError(
                f"{source}: begins as a token file of llm.c, with {int(header[2]):,} tokens of {kind}, but has "
                f"{size:,} bytes: is it cut?"
            )
        return _cut(FileTokens(source.content, kind, _LLM_C_HEADER, 0, int(header[2])), source.name, how.separator)
    kind = integer_type(how.bin_dtype)
    count, rest = divmod(size, kind.itemsize)
    if rest:
        raise UnreadableError(
            "not whole tokens", f"{source}: {size} bytes are not a whole number of {kind} tokens (bin_dtype)"
        )
    tokens = FileTokens(source.content, kind, 0, 0, count)
    if (likely := _wider(tokens)) is not None:
        raise ValueError(
            f"{source}: read as {kind}, every second token or more is 0 or next to it, as in a file of {likely}: is "
            f"its --bin-dtype {likely}? If it is {kind} indeed, save it as a .npy file"
        )
    return _cut(tokens, source.name, how.separator)


def _wider(tokens: FileTokens) -> str | None:
    """The wider type that tokens seem to have, for what would be its higher parts is next to nothing.

    Of vocabularies beyond 65,536 the higher part is not always 0, but small, and the lower part is anything.
    """
    size = tokens.dtype.itemsize
    if len(tokens) < 32 or size > 4:
        return None
    block = _BLOCK // 8 * 8
    places = sorted({0, len(tokens) // 2 // 8 * 8, max(len(tokens) - block, 0) // 8 * 8})
    sample = [tokens[place : place + block] for place in places]
    for factor in (4, 2):
        if len(tokens) % factor or size * factor > 8:
            continue
        lower, higher, *rest = (max(int(part[i::factor].max(initial=0)) for part in sample) for i in range(factor))
        nearly = size == 2 and lower >= 1024 and higher <= 3
        if not any(rest) and ((lower and not higher) or nearly):
            return {2: "uint16", 4: "uint32", 8: "int64"}[size * factor]
    return None


def _cut(tokens: FileTokens, name: str, separator: int | None) -> Iterator[Document]:
    if separator is None:
        cuts = [np.array([len(tokens)])]
    else:
        blocks = ((i, tokens[i : i + _BLOCK]) for i in range(0, len(tokens), _BLOCK))
        cuts = [*(i + np.flatnonzero(block == separator) for i, block in blocks), np.array([len(tokens)])]
    start = number = 0
    for stop in map(int, np.concatenate(cuts)):
        if stop > start:
            yield Document(name if separator is None else f"{name}:{number}", tokens.part(start, stop), text=False)
            number += 1
        start = stop + 1


# --- Which is which


KINDS: dict[str, _Reader] = {
    ".jsonl": _lines, ".ndjson": _lines, ".jsonlines": _lines, ".json": _json, ".csv": _csv,
    ".tsv": functools.partial(_csv, delimiter="\t"),
    ".parquet": _parquet, ".arrow": _arrow, ".feather": _arrow, ".npy": _npy, ".bin": _bin,
}  # fmt: skip
"""How a file is read, by the end of its name in any case; anything else is text."""
ROWS = KINDS.keys() - {".npy", ".bin"}
"""Those that hold rows, of which a field is the text."""

_MARKUP = {".html", ".htm", ".xhtml"}


_NO_TEXT = [
    ("archive(s)", "an archive: unpack it first", ".zip .tar .tgz .tbz2 .txz .7z .rar .jar .whl .egg"),
    ("office document(s)", "not plain text: save its text",
     ".pdf .doc .docx .odt .rtf .epub .mobi .xls .xlsx .ppt .pptx"),
    ("markup", "markup, not text: save its text; to learn the markup itself, give its folder with --include '*.html'",
     " ".join(_MARKUP)),
    ("notebook(s)", "a notebook: save its text, as jupyter nbconvert --to script does", ".ipynb"),
    ("weights", "holds arrays, not text; one array of token ids can be a .npy file",
     ".safetensors .pt .pth .ckpt .onnx .gguf .h5 .hdf5 .npz .pkl .pickle .msgpack"),
    ("index file(s)", "the index of a token file, not data; see --data's .bin", ".idx"),
    ("database(s)", "a database: write its texts into JSON Lines", ".db .sqlite .sqlite3 .lmdb .mdb"),
    ("picture(s) or sound(s)", "not text",
     ".png .jpg .jpeg .gif .bmp .tif .tiff .webp .ico .mp3 .wav .flac .ogg .mp4 .avi .mkv .mov .woff .woff2 .ttf"),
    ("program(s)", "not text", ".exe .dll .so .dylib .o .a .pyc .class"),
]  # fmt: skip
_REFUSED = {suffix: (kind, remedy) for kind, remedy, suffixes in _NO_TEXT for suffix in suffixes.split()}
"""``(kind, what to do)`` of what is never text, by the end of its name."""
