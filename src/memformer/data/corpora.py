"""Where documents come from, and which of them are held out.

Files are read piece by piece where a document's tokens are needed, and closed again: nothing stays mapped, so the
resident memory does not grow with what was read (the pages of a map count as resident).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import DTypeLike

from .tokenizers import ByteTokenizer, Tokenizer, tokenizer_fingerprint

__all__ = [
    "Document",
    "Tokens",
    "encode_documents",
    "fingerprint",
    "held_out_split",
    "limited",
    "read_documents",
    "standard_library",
]

HELD_OUT_SHARE = 48
"""One document in this many is held out; of a single document, that fraction of its end."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_BLOCK = 1 << 20
"""Items or bytes read at once where a file is gone through."""
_AHEAD = 1 << 15
"""Items that a lane reads at once."""
_SAMPLE = 1 << 14
"""Items in each of the three blocks of a long document that its fingerprint knows."""
_SAMPLED_DOCUMENTS = 10_000


class Tokens(Protocol):
    """A document's tokens: a one-dimensional integer array, or what can be sliced to one."""

    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, place: slice, /) -> np.ndarray: ...


class _Lazy:
    """Tokens ``start`` to ``stop`` of something that is read when it is sliced."""

    dtype: np.dtype

    def __init__(self, start: int, stop: int):
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, step = place.indices(len(self))
        return self._read(self._start + start, max(stop - start, 0))[::step]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def _read(self, start: int, count: int) -> np.ndarray:
        raise NotImplementedError

    def part(self, start: int, stop: int) -> _Lazy:
        """A part of it, without reading."""
        raise NotImplementedError


class _FileTokens(_Lazy):
    """Items of one type in a file, from a byte offset on."""

    def __init__(self, path: Path, dtype: np.dtype, offset: int, start: int, stop: int):
        super().__init__(start, stop)
        self.path, self.dtype, self._offset = path, dtype, offset

    def _read(self, start: int, count: int) -> np.ndarray:
        items = np.empty(count, self.dtype)
        rest = items.view(np.uint8).data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._offset + start * self.dtype.itemsize)
            while len(rest):
                count = file.readinto(rest)
                if not count:
                    raise ValueError(f"{self.path}: has become shorter since it was opened")
                rest = rest[count:]
        return items

    def part(self, start: int, stop: int) -> _FileTokens:
        return _FileTokens(self.path, self.dtype, self._offset, self._start + start, self._start + stop)


class _LineText(_Lazy):
    """The text of one line of a JSONL file, decoded whenever it is read."""

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, field: str, line: tuple[int, int], start: int, stop: int):
        super().__init__(start, stop)
        self._path, self._field, self._line = path, field, line

    def _read(self, start: int, count: int) -> np.ndarray:
        offset, size = self._line
        raw = _FileTokens(self._path, self.dtype, offset, 0, size)[:]
        text = json.loads(raw.tobytes())[self._field].encode()
        return np.frombuffer(text, np.uint8)[start : start + count]

    def part(self, start: int, stop: int) -> _LineText:
        return _LineText(self._path, self._field, self._line, self._start + start, self._start + stop)


class _Reader:
    """Reads ahead, for one lane that goes through a document; what was read is freed with it."""

    def __init__(self, content: Tokens, ahead: int):
        self._content, self._ahead, self.dtype = content, ahead, content.dtype
        self._first, self._block = 0, np.empty(0, content.dtype)

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, step = place.indices(len(self))
        stop = max(start, stop)
        if start < self._first or stop > self._first + len(self._block):
            self._first, self._block = start, self._content[start : max(stop, start + self._ahead)]
        return self._block[start - self._first : stop - self._first : step]


@dataclass(frozen=True, eq=False, init=False)
class Document:
    """A named run of tokens.

    Attributes:
        name: unique in its corpus, because the held-out split depends on it.
        content: its UTF-8 bytes (bytes, or an array of uint8), or token ids (a one-dimensional integer array); either
            may be read lazily.
        text: whether the content is text.
    """

    name: str
    content: Tokens
    text: bool = True

    def __init__(self, name: str, content: Tokens | bytes, text: bool = True):
        array = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content
        kind, dimensions = np.uint8 if text else np.integer, getattr(array, "ndim", 1)
        if not np.issubdtype(array.dtype, kind) or dimensions != 1:
            expected = "bytes or one dimension of uint8" if text else "one dimension of integers"
            raise ValueError(f"{name}: expected {expected}, got {array.dtype} in {dimensions} dimensions")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "content", array)
        object.__setattr__(self, "text", text)

    def __len__(self) -> int:
        """Bytes of a text, tokens of an array."""
        return len(self.content)

    def __bytes__(self) -> bytes:
        """All of the content."""
        return self.content[:].tobytes()

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the text, also of one that was encoded ahead; None for other token ids."""
        return len(self.content) if self.text else getattr(self.content, "num_bytes", None)

    def part(self, start: int, stop: int) -> Document:
        """Bytes (or tokens) ``start`` to ``stop``, under the same name, without reading them."""
        start, stop, _ = slice(start, stop).indices(len(self))
        content = self.content
        part = content.part(start, max(start, stop)) if isinstance(content, _Lazy) else content[start:stop]
        return Document(self.name, part, self.text)

    def beginning(self, size: int) -> Document:
        """At most ``size`` bytes (or tokens) of the beginning; of a text, up to the end of a character."""
        if self.text and size < len(self):
            # The bytes 10xxxxxx go on with a character.
            before = self.content[max(size - 3, 0) : size + 1][::-1]
            size -= int(np.argmax(before & 0xC0 != 0x80))
        return self.part(0, size)


def standard_library() -> list[Document]:
    """The sources of the running Python's standard library, without its tests: long real documents, everywhere."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in root.rglob("*.py") if not _NOT_LIBRARY & set(f.relative_to(root).parts)]
    found = sorted((f.relative_to(root).as_posix(), f) for f in files)
    return [document for name, file in found for document in _read_text(file, name, strict=False)]


def read_documents(
    paths: Iterable[str | Path],
    *,
    text_field: str = "text",
    separator: int | None = None,
    bin_dtype: str = "uint16",
) -> list[Document]:
    """Every named file, and every file below every named folder (hidden ones excepted). Contents are read when needed.

    - ``.jsonl``: one document per line, the field ``text_field`` of an object; empty texts are left out;
    - ``.npy``: token ids, one-dimensional; ``.bin``: token ids of type ``bin_dtype`` without a header. Either is one
      document, or as many as ``separator`` cuts it into (the separator itself is in none of them);
    - anything else: UTF-8 text, one document. In a folder, a file that is empty or not UTF-8 is left out, and a warning
      says how many were.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a named file is not what its name says or is empty, a line is not an object with that field, a file
            is given twice, ``separator`` has no array to cut, or there is nothing to read at all.
    """
    places = [Path(path) for path in paths]
    documents: list[Document] = []
    seen: set[Path] = set()
    left_out: list[Path] = []
    for path in places:
        if path.is_dir():
            inside = [(f.relative_to(path), f) for f in path.rglob("*") if f.is_file()]
            visible = [(name.as_posix(), f) for name, f in inside if not any(p.startswith(".") for p in name.parts)]
        elif path.is_file():
            visible = [(path.name, path)]
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
        for name, file in sorted(visible):
            strict, before = file == path, len(documents)
            if file.resolve() in seen:
                raise ValueError(f"{file}: given twice, so one copy might be held out and the other trained on")
            seen.add(file.resolve())
            if file.suffix == ".jsonl":
                documents += _read_lines(file, name, text_field)
            elif file.suffix == ".npy":
                documents += _cut(_npy(file), name, separator)
            elif file.suffix == ".bin":
                documents += _cut(_bin(file, bin_dtype), name, separator)
            else:
                documents += _read_text(file, name, strict)
            if len(documents) == before:
                if strict:
                    raise ValueError(f"{file}: empty")
                left_out.append(file)
    if not documents:
        raise ValueError(
            f"no text found in {', '.join(map(str, places))}: expected files of UTF-8 text, .jsonl, .npy or .bin"
        )
    if separator is not None and all(document.text for document in documents):
        raise ValueError(f"separator: {separator} cuts .npy and .bin arrays, and there are none")
    if left_out:
        warnings.warn(
            f"{len(left_out)} files, such as {left_out[0]}, were left out: empty or not UTF-8 text", stacklevel=2
        )
    return documents


def _read_text(file: Path, name: str, strict: bool) -> list[Document]:
    size = file.stat().st_size
    content = _FileTokens(file, np.dtype(np.uint8), 0, 0, size)
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, size, _BLOCK):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(content[start : start + _BLOCK].tobytes(), final=start + _BLOCK >= size)
        except UnicodeDecodeError as error:
            if strict:
                place = start - pending + error.start
                raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {place})") from error
            return []
    return [Document(name, content)] if size else []


def _read_lines(file: Path, name: str, field: str) -> Iterator[Document]:
    offset = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                got = f"fields {sorted(row)}" if isinstance(row, dict) else type(row).__name__
                if isinstance(row, dict) and field in row:
                    got = f"{type(row[field]).__name__} in it"
                raise ValueError(f"{file}, line {number}: expected an object with text in field {field!r}, got {got}")
            try:
                size = len(row[field].encode())
            except UnicodeEncodeError as error:
                raise ValueError(f"{file}, line {number}: half a surrogate pair is not text") from error
            if size:
                yield Document(f"{name}:{number}", _LineText(file, field, (start, len(line)), 0, size))


def _npy(file: Path) -> _FileTokens:
    try:
        mapped = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # whatever a damaged header makes numpy's parser raise
        raise ValueError(f"{file}: not an array that can be read in pieces ({error})") from error
    if mapped.ndim != 1 or not np.issubdtype(mapped.dtype, np.integer):
        raise ValueError(f"{file}: expected one dimension of integers, got {mapped.dtype} of shape {mapped.shape}")
    return _FileTokens(file, mapped.dtype, mapped.offset, 0, len(mapped))


def _bin(file: Path, dtype: str) -> _FileTokens:
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"bin_dtype: expected a type of integers such as uint16 or uint32, got {dtype!r}") from error
    if not np.issubdtype(kind, np.integer):
        raise ValueError(f"bin_dtype: expected a type of integers such as uint16 or uint32, got {dtype!r}")
    count, rest = divmod(file.stat().st_size, kind.itemsize)
    if rest:
        raise ValueError(f"{file}: {file.stat().st_size} bytes are not a whole number of {kind} tokens")
    return _FileTokens(file, kind, 0, 0, count)


def _cut(tokens: _FileTokens, name: str, separator: int | None) -> Iterator[Document]:
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


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> Sequence[Tokens]:
    """The documents' tokens, for :class:`~memformer.data.Lanes`.

    Text under :class:`~memformer.data.ByteTokenizer` and token ids are read while they stream; under another tokenizer
    all text is encoded here and its tokens stay in memory. A token id of the corpus that the vocabulary does not have
    is found when it is read: a ValueError names document, position and id.

    Raises:
        ValueError: text without a tokenizer for it, or token ids where the tokenizer has texts of its own.
    """
    return _Encoded([_encode(document, tokenizer) for document in documents])


def _encode(document: Document, tokenizer: Tokenizer) -> Tokens:
    made_by = getattr(document.content, "tokenizer", None)  # where it was encoded ahead, see tokenfiles
    if made_by is not None and made_by == tokenizer_fingerprint(tokenizer):
        return document.content.tokens  # type: ignore[attr-defined, no-any-return]
    if made_by is not None and not document.text:
        raise ValueError(f"{document.name}: was encoded by another tokenizer than this one, so its ids mean other text")
    if not document.text:
        if isinstance(tokenizer, ByteTokenizer):
            raise ValueError(
                f"{document.name}: holds token ids, and the tokenizer is of bytes: choose the tokenizer that made "
                "them, or TokenIds(size)"
            )
        return _Checked(document, tokenizer.ordinary)
    if isinstance(tokenizer, ByteTokenizer):
        return document.content
    try:
        tokens = tokenizer.encode(bytes(document))
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from error
    if not len(tokens):
        raise ValueError(f"{document.name}: no token is left of its {len(document)} bytes; leave it out")
    return tokens


class _Encoded(Sequence[Tokens]):
    """What is read lazily has a reader of its own for each who asks for it."""

    def __init__(self, contents: list[Tokens]):
        self._contents = contents

    def __len__(self) -> int:
        return len(self._contents)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | Sequence[Tokens]:
        if isinstance(index, slice):
            return _Encoded(self._contents[index])
        content = self._contents[index]
        if isinstance(content, np.ndarray):
            return content
        # A line is decoded whole.
        return _Reader(content, len(content) if isinstance(content, _LineText) else _AHEAD)


class _Checked:
    """Token ids that are compared with the vocabulary when they are read."""

    def __init__(self, document: Document, vocabulary: int):
        self._document, self._vocabulary, self.dtype = document, vocabulary, document.content.dtype

    def __len__(self) -> int:
        return len(self._document)

    def __getitem__(self, place: slice) -> np.ndarray:
        tokens = self._document.content[place]
        if len(tokens) and not (tokens.max() < self._vocabulary and tokens.min() >= 0):
            wrong = int(np.flatnonzero((tokens >= self._vocabulary) | (tokens < 0))[0])
            position = place.indices(len(self))[0] + wrong
            raise ValueError(
                f"{self._document.name}: token {int(tokens[wrong])} at position {position} is not in the vocabulary "
                f"of {self._vocabulary} (ids 0 to {self._vocabulary - 1})"
            )
        return tokens


def held_out_split(documents: Sequence[Document], share: int = HELD_OUT_SHARE) -> tuple[list[Document], list[Document]]:
    """``(training, held_out)``: one document in ``share``, by the hash of its name, so that a new one moves no other.

    Of a single document the end is held out, from the beginning of a character on.

    Raises:
        ValueError: too little text to hold anything out.
    """
    if share < 2:
        raise ValueError(f"share: expected one in at least 2, got one in {share}")
    if len(documents) == 1:
        (document,) = documents
        size = len(document)
        beginning = document.beginning(size - size // share)
        cut = len(beginning)
        if not 0 < cut < size:
            unit = "bytes" if document.text else "tokens"
            raise ValueError(f"{document.name}: {size} {unit} are too few to hold out one in {share}")
        return [beginning], [document.part(cut, size)]
    ranks = {d.name: int.from_bytes(hashlib.sha256(d.name.encode()).digest()[:8], "big") for d in documents}
    held_out = [d for d in documents if ranks[d.name] % share == 0]
    if not held_out or len(held_out) == len(documents):
        held_out = [min(documents, key=lambda d: ranks[d.name])]
    chosen = {id(d) for d in held_out}
    return [d for d in documents if id(d) not in chosen], held_out


def limited(documents: Sequence[Document], limit: int) -> list[Document]:
    """The first documents that hold ``limit`` bytes (or ids) together, the last one cut to fit; all if it is 0."""
    kept, left = [], limit
    for document in documents:
        if limit and left <= 0:
            break
        kept.append(document.beginning(left) if limit and len(document) > left else document)
        left -= len(document)
    return kept


def fingerprint(documents: Sequence[Document]) -> str:
    """A hash of the documents and their order: a run can go on only where it finds the same ones.

    It covers every name, kind and length, and a sample of the contents that is small enough for any corpus to take
    seconds: short documents whole, three blocks of 16,384 items at the start, middle and end of longer ones, of at most
    10,000 documents at even distances.
    """
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.content.dtype}\0{document.text}\0{len(document)}\0".encode())
    for document in documents[:: -(-len(documents) // _SAMPLED_DOCUMENTS) or 1]:
        content, size = document.part(0, len(document)).content, len(document)
        starts = (0, size // 2 - _SAMPLE // 2, size - _SAMPLE) if size > 3 * _SAMPLE else range(0, size, _SAMPLE)
        for start in starts:
            digest.update(content[start : start + _SAMPLE].tobytes())
    return digest.hexdigest()
