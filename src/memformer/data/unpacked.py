"""What cannot be read at random places is unpacked once, into a temporary folder that goes with the process.

Compressed files, CSV, JSON arrays and Parquet: reading a document in the middle of one of them would mean reading what
stands before it. Only a block is in memory at a time. The folder lies where the system keeps temporary files; TMPDIR
says where that is. A process that is killed leaves its folder behind, and the next one removes it.
"""

from __future__ import annotations

import atexit
import bz2
import contextlib
import functools
import gzip
import importlib
import lzma
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from .documents import FileTokens

__all__ = ["COMPRESSED", "TextStore", "unpack"]


_PREFIX = "memformer-"
_LOCK = ".lock"
"""Held by the process as long as it lives."""
_YOUNG = 60.0
"""Seconds in which a folder may not be locked yet."""


@functools.cache
def _folder() -> Path:
    """Removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = FileLock(folder / _LOCK, timeout=0, thread_local=False)
    with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks
        lock.acquire()
    atexit.register(_remove, folder, lock, os.getpid())
    for other in folder.parent.glob(f"{_PREFIX}*/{_LOCK}"):
        # One's own alone: nobody else can have put a link there.
        if other.parent != folder and other.parent.lstat().st_uid == folder.lstat().st_uid:
            _remove_abandoned(other)
    return folder


def _remove(folder: Path, lock: FileLock, owner: int) -> None:
    if os.getpid() == owner:  # not at the end of a process that was forked
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(lock: Path) -> None:
    with contextlib.suppress(OSError, NotImplementedError, Timeout):
        if time.time() - lock.stat().st_mtime > _YOUNG:
            with FileLock(lock, timeout=0):
                shutil.rmtree(lock.parent, ignore_errors=True)


def _new_file() -> Path:
    handle, name = tempfile.mkstemp(dir=_folder())
    os.close(handle)
    return Path(name)


def _stream(opened: Callable[[Path, str], Any], file: Path) -> Iterator[bytes]:
    with opened(file, "rb") as packed:
        yield from iter(functools.partial(packed.read, 1 << 20), b"")


def _zst(file: Path) -> Iterator[bytes]:
    """Of all frames, for parallel compressors write many."""
    try:
        new = importlib.import_module("compression.zstd").ZstdDecompressor  # of Python 3.14
    except ImportError:
        try:
            library = importlib.import_module("zstandard")
        except ImportError as error:
            raise ImportError(
                f"{file}: .zst needs the zstandard library: pip install 'memformer-replay[zst]'", name="zstandard"
            ) from error

        def new() -> Any:
            return library.ZstdDecompressor().decompressobj()

    frame = None
    for block in _stream(open, file):
        rest = block
        while rest:
            frame = new() if frame is None else frame
            yield frame.decompress(rest)
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends too early")


COMPRESSED: dict[str, Callable[[Path], Iterator[bytes]]] = {
    ".gz": functools.partial(_stream, gzip.open),
    ".bz2": functools.partial(_stream, bz2.open),
    ".xz": functools.partial(_stream, lzma.open),
    ".zst": _zst,
}
"""What a compressed file holds, in blocks, by the end of its name; what is before that says what is inside."""


def unpack(file: Path) -> Path:
    """A temporary file with what a compressed file holds.

    Raises:
        ValueError: it is damaged, or cut.
        ImportError: a library is missing.
        OSError: it cannot be read, or there is no room.
    """
    target = _new_file()
    with target.open("wb") as unpacked:
        for block in _sound(COMPRESSED[file.suffix.lower()](file), file):
            try:
                unpacked.write(block)
            except OSError as error:
                raise _no_room(error, file) from error
    return target


def _sound(blocks: Iterator[bytes], file: Path) -> Iterator[bytes]:
    try:
        yield from blocks
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{file}: damaged, it cannot be unpacked ({error})") from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2 say so that it is none of theirs
            raise ValueError(f"{file}: damaged, it cannot be unpacked ({error})") from error
        raise
    except Exception as error:  # of a library that may not be there
        if type(error).__name__ == "ZstdError":
            raise ValueError(f"{file}: damaged, it cannot be unpacked ({error})") from error
        raise


def _no_room(error: OSError, file: Path) -> OSError:
    folder = _folder()
    return OSError(
        f"{file}: cannot be unpacked into {folder} ({error.strerror}, {shutil.disk_usage(folder).free / 1e6:,.0f} MB "
        "are free): set TMPDIR to a folder with more room, or unpack it yourself"
    )


class TextStore:
    """Texts one after the other in a temporary file.

    Args:
        file: where they come from, for messages.
    """

    def __init__(self, file: Path):
        self._file, self._target, self._size = file, _new_file(), 0
        self._opened: IO[bytes] | None = None

    def add(self, text: bytes) -> FileTokens:
        """The text, to be read when it is needed, once the store is closed."""
        if self._opened is None:
            self._opened = self._target.open("wb")
        try:
            self._opened.write(text)
        except OSError as error:
            raise _no_room(error, self._file) from error
        self._size += len(text)
        return FileTokens(self._target, np.dtype(np.uint8), self._size - len(text), 0, len(text))

    def close(self) -> None:
        """Write what is still held back."""
        if self._opened is not None:
            try:
                self._opened.close()
            except OSError as error:
                raise _no_room(error, self._file) from error
