"""A document: a named run of tokens, read piece by piece where it is sliced.

A file is opened for a block and closed again: nothing stays mapped, so the resident memory does not grow with what was
read (the pages of a map count as resident).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

__all__ = ["Document", "FileTokens", "LazyTokens", "ParsedText", "Tokens", "blocks", "limited"]


class Tokens(Protocol):
    """A document's tokens: a one-dimensional integer array, or what can be sliced to one."""

    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, place: slice, /) -> np.ndarray: ...


def blocks(tokens: Tokens, size: int) -> Iterator[np.ndarray]:
    """All of them, ``size`` at once."""
    return (tokens[start : start + size] for start in range(0, len(tokens), size))


class LazyTokens:
    """Tokens ``start`` to ``stop`` of something that is read when it is sliced."""

    dtype: np.dtype

    def __init__(self, start: int, stop: int):
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, step = place.indices(len(self))
        return self._read(self.start + start, max(stop - start, 0))[::step]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def _read(self, start: int, count: int) -> np.ndarray:
        raise NotImplementedError

    def part(self, start: int, stop: int) -> LazyTokens:
        """A part of it, without reading."""
        raise NotImplementedError


class FileTokens(LazyTokens):
    """Items of one type in a file, from a byte offset on."""

    def __init__(self, path: Path, dtype: np.dtype, offset: int, start: int, stop: int):
        super().__init__(start, stop)
        self.path, self.dtype, self.offset = path, dtype, offset

    def _read(self, start: int, count: int) -> np.ndarray:
        items = np.empty(count, self.dtype)
        rest = items.view(np.uint8).data
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset + start * self.dtype.itemsize)
                while len(rest):
                    count = file.readinto(rest)
                    if not count:
                        raise ValueError(f"{self.path}: has become shorter since it was opened")
                    rest = rest[count:]
        except OSError as error:  # of a broken disk, or a network folder that is gone, which does not say where
            error.filename = error.filename or str(self.path)
            raise
        return items

    def part(self, start: int, stop: int) -> FileTokens:
        return FileTokens(self.path, self.dtype, self.offset, self.start + start, self.start + stop)


class ParsedText(LazyTokens):
    """A text that is parsed whole whenever a part of it is read: a line of JSON, or a row of something.

    Args:
        text: gives the text.
        start, stop: bytes of it, as UTF-8.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, text: Callable[[], str], start: int, stop: int):
        super().__init__(start, stop)
        self._text = text

    def _read(self, start: int, count: int) -> np.ndarray:
        items = np.frombuffer(self._text().encode(), np.uint8)[start : start + count]
        if len(items) < count:
            raise ValueError("a text has become shorter since it was opened: was its file or data set changed?")
        return items

    def part(self, start: int, stop: int) -> ParsedText:
        return ParsedText(self._text, self.start + start, self.start + stop)


@dataclass(frozen=True, eq=False, init=False)
class Document:
    """A named run of tokens.

    Attributes:
        name: unique in its corpus, because the held-out split depends on it.
        content: its UTF-8 bytes (bytes, or an array of uint8), or token ids (a one-dimensional integer array); either
            may be read lazily.
        text: whether the content is text.
        ends: whether it ends where the document does; the beginning of one does not.
    """

    name: str
    content: Tokens
    text: bool = True
    ends: bool = True

    def __init__(self, name: str, content: Tokens | bytes, text: bool = True, ends: bool = True):
        array = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content
        if not hasattr(array, "dtype"):
            hint = ": text.encode() makes bytes of a text" if isinstance(content, str) else ""
            raise ValueError(f"{name}: expected bytes or an array of integers, got {type(content).__name__}{hint}")
        kind, dimensions = np.uint8 if text else np.integer, getattr(array, "ndim", 1)
        if not np.issubdtype(array.dtype, kind) or dimensions != 1:
            expected = "bytes or one dimension of uint8" if text else "one dimension of integers"
            raise ValueError(f"{name}: expected {expected}, got {array.dtype} in {dimensions} dimensions")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "content", array)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "ends", ends)

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
        part = content.part(start, max(start, stop)) if isinstance(content, LazyTokens) else content[start:stop]
        return Document(self.name, part, self.text, self.ends and stop == len(self))

    def beginning(self, size: int) -> Document:
        """At most ``size`` bytes (or tokens) of the beginning; of a text, up to the end of a character."""
        if self.text and size < len(self):
            # The bytes 10xxxxxx go on with a character.
            before = self.content[max(size - 3, 0) : size + 1][::-1]
            size -= int(np.argmax(before & 0xC0 != 0x80))
        return self.part(0, size)


def limited(documents: Sequence[Document], limit: int) -> list[Document]:
    """The first documents that hold ``limit`` bytes (or ids) together, the last one cut to fit; all if it is 0.

    A document of which not even the first character fits is left out, so none has length zero.
    """
    kept, left = [], limit
    for document in documents:
        if limit and left <= 0:
            break
        cut = document.beginning(left) if limit and len(document) > left else document
        if len(cut) or not len(document):
            kept.append(cut)
        left -= len(document)
    return kept
