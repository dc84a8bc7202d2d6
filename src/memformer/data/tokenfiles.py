"""Documents that were encoded once: a folder with all their ids, which every process and every later run reads.

``tokens.bin`` holds the ids of one document after the other, little-endian, of the smallest unsigned type and without a
header; ``documents.jsonl`` one line for each document: its name, how many tokens it has, the bytes of its text (null
where it was none), and whether it ends where the document does. Beside them are the tokenizer's own files, and
``tokens.json`` with sizes, checksums and fingerprints. Never pickle, and nothing is held or mapped whole.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import flush_to_disk
from ..folders import checksum
from .corpora import _encode, fingerprint
from .documents import Document, FileTokens, LazyTokens, Tokens, blocks
from .folders import HEADER
from .tokenizers import BPETokenizer, Tokenizer, load_tokenizer, tokenizer_fingerprint

__all__ = ["HEADER", "TokenFiles", "is_token_folder", "open_tokens", "read_any", "with_tokens", "write_tokens"]

IDS, INDEX = "tokens.bin", "documents.jsonl"

_FORMAT = 1
_BLOCK = 1 << 20
"""Bytes or ids that are gone through at once."""
_ABANDONED = 3600.0
"""An unfinished folder in which nothing was written for so many seconds is one of a process that ended."""


class TokenFiles:
    """A folder of token files, as :func:`open_tokens` finds it.

    Attributes:
        folder: where it is.
        documents: as token ids, read where they are sliced; those without a token are left out. They know the bytes of
            their text, so bits per byte can be told.
        num_tokens: of all of them.
        num_bytes: of the texts; None if any was not text.
        data_fingerprint: of the documents that were encoded.
        tokenizer_fingerprint: of the tokenizer; :func:`~memformer.data.encode_documents` refuses another one.
    """

    def __init__(self, folder: Path, header: dict[str, Any], lines: Sequence[tuple[str, int, int | None, bool]]):
        self.folder = folder
        self.num_tokens: int = header["tokens"]
        self.data_fingerprint: str = header["data"]
        self.tokenizer_fingerprint: str = header["tokenizer"]
        sizes = [size for _, _, size, _ in lines]
        self.num_bytes = None if None in sizes else sum(size for size in sizes if size is not None)
        dtype, place = np.dtype(header["dtype"]), 0
        self._all: list[Document] = []
        for name, count, size, ends in lines:
            content = _StoredTokens(self, dtype, place, place + count, size)
            self._all.append(Document(name, content, text=False, ends=ends))
            place += count
        self.documents = [document for document in self._all if len(document)]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids. Raises as :func:`~memformer.data.load_tokenizer`."""
        return load_tokenizer(self.folder)

    @functools.cached_property
    def _token_bytes(self) -> np.ndarray | None:
        tokenizer = self.tokenizer
        return tokenizer.token_bytes if isinstance(tokenizer, BPETokenizer) and tokenizer.byte_level else None

    def count_bytes(self, ids: np.ndarray) -> int:
        """The bytes of the text that ids stand for."""
        sizes = self._token_bytes
        return len(self.tokenizer.decode(ids).encode()) if sizes is None else int(sizes[ids].sum())


class _StoredTokens(FileTokens):
    """Ids in a folder of token files, that know which tokenizer made them and of how many bytes."""

    def __init__(self, files: TokenFiles, dtype: np.dtype, start: int, stop: int, size: int | None, whole: bool = True):
        super().__init__(files.folder / IDS, dtype, 0, start, stop)
        self._files, self._size, self._whole = files, size, whole

    @property
    def tokenizer(self) -> str:
        """The fingerprint of the tokenizer that made them."""
        return self._files.tokenizer_fingerprint

    @property
    def tokens(self) -> Tokens:
        return self

    @functools.cached_property
    def num_bytes(self) -> int | None:
        """Bytes of the text; None if it was none. Those of a part are counted in its tokens."""
        if self._size is None or self._whole:
            return self._size
        return sum(map(self._files.count_bytes, blocks(self, _BLOCK)))

    def part(self, start: int, stop: int) -> _StoredTokens:
        whole = self._whole and (start, stop) == (0, len(self))
        return _StoredTokens(self._files, self.dtype, self.start + start, self.start + stop, self._size, whole)


class _Slice(LazyTokens):
    """Bytes ``start`` to ``stop`` of a text."""

    dtype = np.dtype(np.uint8)

    def __init__(self, text: Tokens, start: int, stop: int):
        super().__init__(start, stop)
        self._text = text

    def _read(self, start: int, count: int) -> np.ndarray:
        return self._text[start : start + count]

    def part(self, start: int, stop: int) -> _Slice:
        return _Slice(self._text, self.start + start, self.start + stop)


class _TextWithTokens(_Slice):
    """A text whose ids stand in a folder of token files; which of them are a part's is for the tokenizer to say."""

    def __init__(self, text: Tokens, tokens: _StoredTokens):
        super().__init__(text, 0, len(text))
        self.tokens, self.tokenizer = tokens, tokens.tokenizer


def with_tokens(documents: Sequence[Document], files: TokenFiles) -> list[Document | None]:
    """The same documents, which need not be encoded any more; None for one without a token.

    Raises:
        ValueError: they are not the documents of these files.
    """
    if [d.name for d in documents] != [d.name for d in files._all]:
        raise ValueError(f"{files.folder}: holds the tokens of other documents")
    known: list[Document | None] = []
    for document, stored in zip(documents, files._all, strict=True):
        assert isinstance(stored.content, _StoredTokens)
        content = _TextWithTokens(document.content, stored.content)
        known.append(Document(document.name, content, ends=document.ends) if len(stored) else None)
    return known


def read_any(
    paths: Iterable[str | Path], read: Callable[[Sequence[str | Path]], Sequence[Document]], *, check: bool = False
) -> list[Document]:
    """The documents of folders of token files, and what ``read`` makes of the other paths.

    Raises:
        ValueError: a folder is given twice; or as :func:`open_tokens` and ``read``.
    """
    folders: list[str | Path] = []
    others: list[str | Path] = []
    for path in paths:
        (folders if is_token_folder(path) else others).append(path)
    for folder in folders:
        if sum(Path(folder).samefile(other) for other in folders) > 1:
            raise ValueError(f"{folder}: given twice, so one copy might be held out and the other trained on")
    documents = [document for folder in folders for document in open_tokens(folder, check=check).documents]
    return [*documents, *(read(others) if others or not folders else ())]


def is_token_folder(path: str | Path) -> bool:
    """Whether a path is a folder of token files."""
    return (Path(path) / HEADER).is_file()


def write_tokens(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    progress: Callable[[int], None] | None = None,
) -> TokenFiles:
    """Encode documents into a folder, whole or not at all; a folder of token files that is there is replaced.

    Neither a text nor its ids are ever held whole. Ids are passed on; they must be in the tokenizer's vocabulary.

    Args:
        progress: is told, now and then, how many bytes (or ids) of the documents were read.

    Raises:
        ValueError: no document, or one of them cannot be encoded; the message names it.
        FileExistsError: the folder holds something else.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    if not documents:
        raise ValueError("documents: expected at least one, got none")
    if folder.exists() and not is_token_folder(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: holds something else than token files; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.unfinished")
    try:
        unfinished.mkdir()
        _fill(unfinished, documents, tokenizer, progress or (lambda read: None))
        replaced = unfinished.with_name(f"{unfinished.name}.replaced")
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        flush_to_disk(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return open_tokens(folder)


def _remove_abandoned(folder: Path) -> None:
    """What was left of the folder by processes that were killed while they wrote it, or replaced it."""
    for other in folder.parent.glob(f".{glob.escape(folder.name)}.*.unfinished*"):
        with contextlib.suppress(OSError):  # another process may be faster
            if time.time() - max(f.stat().st_mtime for f in [other, *other.iterdir()]) > _ABANDONED:
                shutil.rmtree(other)


def _fill(folder: Path, documents: Sequence[Document], tokenizer: Tokenizer, progress: Callable[[int], None]) -> None:
    dtype = np.min_scalar_type(tokenizer.ordinary - 1).newbyteorder("<")
    sums = {name: hashlib.sha256() for name in (IDS, INDEX)}
    tokens = read = 0
    with open(folder / IDS, "wb") as ids, open(folder / INDEX, "wb") as index:
        for document in documents:
            count = 0
            for piece, size in _pieces(document, tokenizer):
                raw = piece.astype(dtype).tobytes()
                ids.write(raw)
                sums[IDS].update(raw)
                count, read = count + len(piece), read + size
                progress(read)
            line = [document.name, count, document.num_bytes, document.ends]
            raw = (json.dumps(line) + "\n").encode()
            index.write(raw)
            sums[INDEX].update(raw)
            tokens += count
    tokenizer.save(folder)
    own = {name: digest.hexdigest() for name, digest in sums.items()}
    others = {f.name: checksum(f) for f in folder.iterdir() if f.name not in own}
    header = {
        "format": _FORMAT,
        "dtype": dtype.str,
        "tokens": tokens,
        "documents": len(documents),
        "data": fingerprint(documents),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "files": {name: [(folder / name).stat().st_size, digest] for name, digest in sorted((own | others).items())},
    }
    (folder / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    for file in [*folder.iterdir(), folder]:
        flush_to_disk(file)


def _pieces(document: Document, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """Ids, and how much of the document was read for them."""
    if not (document.text and isinstance(tokenizer, BPETokenizer)):
        content = _encode(document, tokenizer)
        for block in blocks(content, _BLOCK):
            yield block, len(block) * len(document) // len(content)
        return
    taken = 0

    def parts() -> Iterator[bytes]:
        nonlocal taken
        for block in blocks(document.content, _BLOCK):
            taken += len(block)
            yield block.tobytes()

    try:
        for piece in tokenizer.encode_pieces(parts()):
            size, taken = taken, 0
            yield piece, size
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from error


def open_tokens(folder: str | Path, *, check: bool = False) -> TokenFiles:
    """What :func:`write_tokens` wrote.

    Args:
        check: read all files and compare their checksums; without it, their sizes.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is damaged, or of a newer version.
    """
    folder = Path(folder)
    if not is_token_folder(folder):
        raise FileNotFoundError(f"{folder}: no {HEADER}, so these are no token files; memformer encode makes them")
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["format"] != _FORMAT:
            raise ValueError(f"of format {header['format']}, expected {_FORMAT}: another version of memformer wrote it")
        for name, (size, digest) in header["files"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has {(folder / name).stat().st_size:,} bytes, expected {size:,}")
            if check and digest != checksum(folder / name):
                raise ValueError(f"{name}: another checksum")
        with open(folder / INDEX, encoding="utf-8") as lines:
            index = [(name, count, size, ends) for name, count, size, ends in map(json.loads, lines)]
        ids = header["files"][IDS][0] // np.dtype(header["dtype"]).itemsize
        counts = (len(index), sum(count for _, count, _, _ in index), ids)
        if counts != (header["documents"], header["tokens"], header["tokens"]):
            raise ValueError(f"{INDEX} has other counts than {HEADER}")
        return TokenFiles(folder, header, index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: damaged ({error})") from error
