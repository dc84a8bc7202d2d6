"""Where documents come from, and which of them are held out. A document is a file's bytes; text must be UTF-8."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Document", "fingerprint", "held_out_split", "read_documents", "standard_library"]

HELD_OUT_SHARE = 48
"""One document in so many is held out, or the same share of the only document's end."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Document:
    """A named run of bytes."""

    name: str
    text: bytes


def standard_library() -> list[Document]:
    """The sources of the running Python's standard library, without its tests: long real documents, everywhere."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in root.rglob("*.py") if not _NOT_LIBRARY & set(f.relative_to(root).parts)]
    return _read([(f.relative_to(root).as_posix(), f) for f in files], strict=False)


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """Every named file, and every file below every named folder (hidden ones excepted), each as one document.

    A file in a folder that is empty or not UTF-8 text is left out.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a named file is not UTF-8 or is empty, or there is nothing to read at all.
    """
    documents = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [(f, f.relative_to(path)) for f in path.rglob("*") if f.is_file()]
            visible = [(name.as_posix(), f) for f, name in inside if not any(p.startswith(".") for p in name.parts)]
            documents += _read(visible, strict=False)
        elif path.is_file():
            documents += _read([(path.name, path)], strict=True)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    if not documents:
        raise ValueError(f"no text found in {', '.join(map(str, paths))}: expected files of UTF-8 text")
    return documents


def _read(files: list[tuple[str, Path]], strict: bool) -> list[Document]:
    documents = []
    for name, file in sorted(files):
        text = file.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            if strict:
                raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
            continue
        if text:
            documents.append(Document(name, text))
        elif strict:
            raise ValueError(f"{file}: empty")
    return documents


def held_out_split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """``(training, held_out)``, by the hash of each document's name, so that adding a document moves no other.

    Of a single document the end is held out.

    Raises:
        ValueError: too little text to hold anything out.
    """
    if len(documents) == 1:
        (document,) = documents
        cut = len(document.text) - len(document.text) // HELD_OUT_SHARE
        if cut == len(document.text):
            raise ValueError(f"{document.name}: {cut} bytes are too few to hold out one in {HELD_OUT_SHARE}")
        return [Document(document.name, document.text[:cut])], [Document(document.name, document.text[cut:])]
    ranks = {d.name: int.from_bytes(hashlib.sha256(d.name.encode()).digest()[:8], "big") for d in documents}
    held_out = [d for d in documents if ranks[d.name] % HELD_OUT_SHARE == 0]
    if not held_out or len(held_out) == len(documents):
        first = min(documents, key=lambda d: ranks[d.name])
        held_out = [first]
    names = {id(d) for d in held_out}
    return [d for d in documents if id(d) not in names], held_out


def fingerprint(documents: Sequence[Document]) -> str:
    """A hash of the documents and their order: a run can go on only where it finds the same ones."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{len(document.text)}\0".encode())
        digest.update(document.text)
    return digest.hexdigest()
