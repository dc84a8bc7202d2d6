"""Where documents come from, and what becomes of them: read from files or rows, encoded, checked, and known again."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np

from ..checks import as_paths
from .documents import Document, FileTokens, ParsedText, Tokens, blocks
from .folders import Found, Tally, find_files, shown
from .kinds import Reading, UnreadableError, integer_type, kept, read_file, read_rows, read_text, row_text
from .tokenizers import ByteTokenizer, TokenIds, Tokenizer, tokenizer_fingerprint
from .unpacked import TextStore

__all__ = [
    "Document",
    "Tokens",
    "check_documents",
    "encode_documents",
    "fingerprint",
    "from_rows",
    "read_documents",
    "standard_library",
]

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_BLOCK = 1 << 20
"""Items read at once where a document is gone through."""
_AHEAD = 1 << 15
"""Items that a lane reads at once."""
_SAMPLE = 1 << 14
"""Items in each of the three blocks of a long document that its fingerprint knows."""
_SAMPLED_DOCUMENTS = 10_000


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


def standard_library() -> list[Document]:
    """The sources of the running Python's standard library, without its tests: long real documents, everywhere."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in root.rglob("*.py") if not _NOT_LIBRARY & set(f.relative_to(root).parts)]
    found = sorted((f.relative_to(root).as_posix(), f) for f in files)
    return [document for name, file in found for document in _python_text(file, name)]


def _python_text(file: Path, name: str) -> Iterator[Document]:
    try:
        yield from read_text(file, name)
    except UnreadableError:
        return


def read_documents(
    paths: str | Path | Iterable[str | Path],
    *,
    text_field: str = "text",
    separator: int | None = None,
    bin_dtype: str = "uint16",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strict: bool = False,
    content: Literal["text", "ids"] | None = None,
    out: str | Path | Iterable[str | Path] = (),
    all_match: bool = True,
) -> list[Document]:
    """Every named file, and every file below every named folder. Contents are read when needed.

    What the names end with, in any case, says what is inside; ``.gz``, ``.bz2``, ``.xz`` or ``.zst`` may follow.

    - ``.jsonl``, ``.ndjson``, ``.json`` (lines, an array or an object), ``.csv``, ``.tsv``, ``.parquet``, ``.arrow``:
      one document per row, its field ``text_field``; empty texts are left out;
    - ``.npy`` (one-dimensional) and ``.bin`` (of type ``bin_dtype``, or with llm.c's header): token ids, one document,
      or those between the tokens ``separator``;
    - anything else: UTF-8 text, one document. Archives, office documents, images and the like are no text.

    Of a folder, hidden files and what a run of this library wrote are never read. What cannot be read in it, and rows
    without a text, are left out; one warning counts them and names the first. A file that is named itself must be
    readable.

    Args:
        include, exclude: patterns such as ``"*.txt"`` or ``"drafts/*"``, of paths in the folders.
        strict: refuse what would be left out with a warning.
        content: what is wanted where both are found in a folder; the other is left out.
        out: folders of runs that are no data, though they may not look so yet.
        all_match: whether a pattern that matches nothing is an error.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a named file is not what its name says or is empty; none of the rows has a text in that field; token
            ids have another width; a file is given twice; a pattern matches nothing; ``separator`` has no array to cut;
            there is nothing to read at all; or ``strict``, and something would be left out.
        ImportError: ``.zst`` or ``.parquet`` needs a library that is not installed.
    """
    places = as_paths("data", paths)
    integer_type(bin_dtype)
    left_out, rows = Tally(), Tally()
    how = Reading(text_field=text_field, separator=separator, bin_dtype=bin_dtype, strict=strict, rows=rows)
    found = find_files(
        places, left_out, include=include, exclude=exclude, out=as_paths("out", out), all_match=all_match
    )
    read = _read_files(found, how, bool(include), left_out)
    if content is not None:
        read = _of_one_kind(read, content == "text", left_out)
    documents = [document for _, of_file in read for document in of_file]
    if not documents:
        hint = f"; left out: {left_out}" if len(left_out) else ""
        if not found and (include or exclude):
            hint += "; include and exclude together leave no file"
        raise ValueError(
            f"no text found in {', '.join(map(shown, places)) or 'no path at all'}: expected files of UTF-8 text, rows "
            f"(.jsonl, .csv, .parquet, ...) or token ids (.npy, .bin){hint}"
        )
    if separator is not None and all(document.text for document in documents):
        raise ValueError(f"separator: {separator} cuts .npy and .bin arrays, and there are none")
    arrays = [cast(FileTokens, document.content) for document in documents if not document.text]
    if separator is not None and all(map(_is_whole, arrays)):
        warnings.warn(
            f"separator: {separator} is nowhere in the arrays, such as {shown(arrays[0].path.name)}, so each is one "
            "document; is it the id that ends a text?",
            stacklevel=2,
        )
    _report(left_out, rows, strict)
    return documents


_Read = list[tuple[Found, list[Document]]]
"""Files, and the documents of each: at least one."""


def _read_files(found: Sequence[Found], how: Reading, include: bool, left_out: Tally) -> _Read:
    """What can be read of them. Raises what is wrong with a file that is named itself, or with any if it is strict."""
    read: _Read = []
    without_rows: list[UnreadableError] = []
    for file in found:
        try:
            read.append((file, list(read_file(file, how, include))))
        except (UnreadableError, PermissionError) as error:
            if file.named or how.strict:
                raise
            if isinstance(error, PermissionError):
                left_out.add("that cannot be opened", f"{shown(file.path)}: {error.strerror}")
                continue
            left_out.add(error.kind, shown(file.path))
            without_rows += [error] if error.rows else []
    if without_rows and not any(documents[-1].name != file.name and documents[-1].text for file, documents in read):
        raise without_rows[0]
    return read


def _is_whole(tokens: FileTokens) -> bool:
    """Whether they are all there are in their file."""
    return tokens.start == 0 and tokens.offset + tokens.stop * tokens.dtype.itemsize == tokens.path.stat().st_size


def _of_one_kind(read: _Read, text: bool, left_out: Tally) -> _Read:
    """Without what only lay in a folder and is of the other kind; named files stay, to be refused where they matter."""
    if not any(documents[0].text == text for _, documents in read):
        return read
    kept: _Read = []
    for file, documents in read:
        if file.named or documents[0].text == text:
            kept.append((file, documents))
        else:
            left_out.add("token ids beside text" if text else "text beside token ids", shown(file.path))
    return kept


def _report(left_out: Tally, rows: Tally, strict: bool) -> None:
    said = [f"{what} left out: {tally}" for what, tally in (("files", left_out), ("rows", rows)) if len(tally)]
    if said and strict:
        raise ValueError(f"strict: {'; '.join(said)}")
    if said:
        warnings.warn("; ".join(said), stacklevel=3)


def from_rows(
    rows: Iterable[Any], text_field: str = "text", *, name: str = "row", strict: bool = False
) -> list[Document]:
    """Documents of rows: texts, or mappings with a text in ``text_field``, such as a Hugging Face dataset.

    What can be indexed is, whenever a text is needed; long texts, and those of other iterables, are kept in a temporary
    file. Rows without a text are left out, and a warning counts them.

    Raises:
        ValueError: no row has a text; or ``strict``, and one has none.
    """
    if isinstance(rows, (str, bytes)) or not (isinstance(rows, Iterable) or hasattr(rows, "__getitem__")):
        raise ValueError(f"rows: expected a sequence or an iterable of texts or mappings, got {type(rows).__name__}")
    if isinstance(rows, Mapping):
        raise ValueError(f"rows: expected rows, got a mapping of {', '.join(map(repr, rows))}: give one of these")
    if hasattr(rows, "columns"):  # its rows are not what one gets by indexing
        raise ValueError(f"rows: expected rows, got {type(rows).__name__}: give its .to_dict('records')")
    how = Reading(text_field=text_field, strict=strict, rows=Tally())
    indexed = hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
    store = TextStore(Path(name))
    items = (rows[i] for i in range(len(rows))) if indexed else iter(rows)  # type: ignore[index, arg-type]
    found = ((i, functools.partial(row_text, row, text_field)) for i, row in enumerate(items))
    documents = []
    for i, text in read_rows(found, name, "row", how):
        again = functools.partial(_row_text, rows, i, text_field)
        documents.append(Document(f"{name}:{i}", kept(text, again, store) if indexed else store.add(text)))
    store.close()
    if not documents:
        raise ValueError("rows: expected at least one with a text, got none")
    _report(Tally(), how.rows, strict)
    return documents


def _row_text(rows: Any, index: int, field: str) -> str:
    return row_text(rows[index], field)


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> Sequence[Tokens]:
    """The documents' tokens, for :class:`~memformer.data.Lanes`.

    Text under :class:`~memformer.data.ByteTokenizer` and token ids are read while they stream; under another tokenizer
    all text is encoded here and its tokens stay in memory. A document that becomes no token is left out, with a
    warning. A token id of the corpus that the vocabulary does not have is found when it is read, or by
    :func:`check_documents`: a ValueError names document, position and id.

    Where the tokenizer has an ``end``, it follows the last token of every document; not that of the beginning of one,
    whose rest is held out or left unread.

    Raises:
        ValueError: text without a tokenizer for it, or token ids where the tokenizer has texts of its own; or no
            document becomes a token.
    """
    encoded: list[Tokens] = []
    without = Tally()
    for document in documents:
        tokens = _encode(document, tokenizer)
        if len(tokens) or not len(document):
            end = tokenizer.end if document.ends and len(tokens) else None
            encoded.append(tokens if end is None else _Ended(tokens, end))
        else:
            without.add("of which no token is left", document.name)
    if len(without):
        if not encoded:
            raise ValueError(f"documents: no token is left of any: {without}; choose another tokenizer")
        warnings.warn(f"documents left out: {without}", stacklevel=2)
    return _Encoded(encoded)


def _encode(document: Document, tokenizer: Tokenizer) -> Tokens:
    made_by = getattr(document.content, "tokenizer", None)  # where it was encoded ahead, see tokenfiles
    if made_by is not None and made_by == tokenizer_fingerprint(tokenizer):
        return document.content.tokens  # type: ignore[attr-defined, no-any-return]
    if made_by is not None and not document.text:
        raise ValueError(f"{document.name}: was encoded by another tokenizer than this one, so its ids mean other text")
    if not document.text:
        _check_kind(document, tokenizer)
        return _Checked(document, tokenizer.ordinary)
    if isinstance(tokenizer, ByteTokenizer):
        return document.content
    try:
        return tokenizer.encode(bytes(document))
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from error


def _check_kind(document: Document, tokenizer: Tokenizer) -> None:
    if isinstance(tokenizer, ByteTokenizer):
        raise ValueError(
            f"{document.name}: holds token ids, and the tokenizer is of bytes: choose the tokenizer.json that made "
            "them, or ids without a text (--tokenizer ids --vocabulary N; in Python TokenIds(N))"
        )


def check_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> None:
    """See now what would only be found when it is read: empty documents, unknown characters, ids out of range.

    Token ids are read through once, in blocks; text is encoded once unless any text can be, and not kept.

    Raises:
        ValueError: what is wrong, with document, position and id; of a ``.bin`` file, with the type that it seems to
            have.
    """
    for document in documents:
        if not len(document):
            raise ValueError(f"{document.name}: an empty document")
        if not document.text:
            _check_kind(document, tokenizer)
    texts = [document for document in documents if document.text]
    # One at a time, for nothing of it is kept.
    lengths = [] if isinstance(tokenizer, ByteTokenizer) else [len(_encode(document, tokenizer)) for document in texts]
    if lengths and not any(lengths) and len(texts) == len(documents):
        raise ValueError(f"documents: no token is left of any, such as {texts[0].name}; choose another tokenizer")
    files: dict[tuple[Path, str, int], list[Document]] = {}
    for document in documents:
        content = document.content
        if document.text:
            continue
        if isinstance(content, FileTokens):
            files.setdefault((content.path, content.dtype.str, content.offset), []).append(document)
        else:
            for _ in blocks(_Checked(document, tokenizer.ordinary), _BLOCK):
                pass
    for together in files.values():
        _check_file(together, tokenizer)


def _check_file(documents: list[Document], tokenizer: Tokenizer) -> None:
    """Those of one file, which is read through once: there may be more documents than blocks."""
    vocabulary = tokenizer.ordinary
    documents = sorted(documents, key=lambda document: cast(FileTokens, document.content).start)
    contents = [cast(FileTokens, document.content) for document in documents]
    starts, stops = np.array([c.start for c in contents]), np.array([c.stop for c in contents])
    first = int(starts[0])
    whole = contents[0].part(0, int(stops.max()) - first)
    for number, block in enumerate(blocks(whole, _BLOCK)):
        if block.max() < vocabulary and block.min() >= 0:
            continue
        wrong = np.flatnonzero((block >= vocabulary) | (block < 0))
        places = first + number * _BLOCK + wrong
        # What separates documents is in none of them.
        nearest = np.searchsorted(starts, places, side="right") - 1
        inside = np.flatnonzero(places < stops[nearest])
        if len(inside):
            at = inside[0]
            document, token = documents[nearest[at]], int(block[wrong[at]])
            said = _out_of_range(document, token, int(places[at] - starts[nearest[at]]), vocabulary)
            below = "; no id is below 0: leave out what is no token" if token < 0 else ""
            why = _likely_type(contents[0], vocabulary) or below or _likely_vocabulary(whole, tokenizer)
            raise ValueError(said + why)


def _likely_type(tokens: FileTokens, vocabulary: int) -> str:
    """Which type the ids of a .bin file would be in range with."""
    if tokens.offset:
        return ""
    size = tokens.path.stat().st_size
    sample = np.fromfile(tokens.path, np.uint8, min(size, _BLOCK) // 8 * 8)
    for name in ("int64", "uint32", "uint16", "uint8"):  # what fits a wide one fits those below
        kind = np.dtype(name)
        # With so large a vocabulary anything is in range.
        told = vocabulary <= np.iinfo(kind).max and not size % kind.itemsize and len(sample)
        if kind != tokens.dtype and told and (sample.view(kind) < vocabulary).all() and (sample.view(kind) >= 0).all():
            return f"; as {name} its ids are in range: is its --bin-dtype {name}?"
    return ""


def _likely_vocabulary(tokens: FileTokens, tokenizer: Tokenizer) -> str:
    if not isinstance(tokenizer, TokenIds):
        return "; did another tokenizer make them?"
    largest = max(int(block.max()) for block in blocks(tokens, _BLOCK))
    return f"; is --vocabulary larger? The largest id in this file is {largest}"


def _out_of_range(document: Document, token: int, position: int, vocabulary: int) -> str:
    return (
        f"{document.name}: token {token} at position {position} is not in the vocabulary of {vocabulary} "
        f"(ids 0 to {vocabulary - 1})"
    )


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
        return _reader(self._contents[index])


def _reader(content: Tokens) -> Tokens:
    if isinstance(content, _Ended):
        return _Ended(_reader(content.content), content.end)
    if isinstance(content, np.ndarray):
        return content
    # A line is decoded whole.
    return _Reader(content, len(content) if isinstance(content, ParsedText) else _AHEAD)


class _Ended:
    """A document's tokens and the one that ends it, without a copy of them."""

    def __init__(self, content: Tokens, end: int):
        self.content, self.end = content, end
        self.dtype = np.promote_types(content.dtype, np.min_scalar_type(end))

    def __len__(self) -> int:
        return len(self.content) + 1

    def __getitem__(self, place: slice) -> np.ndarray:
        wanted = range(len(self))[place]
        first, last = sorted((wanted[0], wanted[-1])) if wanted else (0, -1)
        tokens = self.content[first : last + 1].astype(self.dtype)
        if last == len(self.content):
            tokens = np.append(tokens, np.array(self.end, self.dtype))
        return tokens[:: wanted.step]


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
            raise ValueError(_out_of_range(self._document, int(tokens[wrong]), position, self._vocabulary))
        return tokens


def fingerprint(documents: Sequence[Document]) -> str:
    """A hash of the documents and their order: a run can go on only where it finds the same ones.

    It covers every name, kind and length, and a sample of the contents that is small enough for any corpus to take
    seconds: short documents whole, three blocks of 16,384 items at the start, middle and end of longer ones, of at most
    10,000 documents at even distances.
    """
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{shown(document.name)}\0{document.content.dtype}\0{document.text}\0{len(document)}\0".encode())
    for document in documents[:: -(-len(documents) // _SAMPLED_DOCUMENTS) or 1]:
        content, size = document.part(0, len(document)).content, len(document)
        starts = (0, size // 2 - _SAMPLE // 2, size - _SAMPLE) if size > 3 * _SAMPLE else range(0, size, _SAMPLE)
        for start in starts:
            digest.update(content[start : start + _SAMPLE].tobytes())
    return digest.hexdigest()
