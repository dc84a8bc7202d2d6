"""Files that are replaced whole or not at all. Imports nothing of the project."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["flush_to_disk", "replace_file"]


def replace_file(file: str | Path, content: bytes | str) -> None:
    """Write a file whole or not at all, text as UTF-8: under another name first, then flushed to the disk and renamed.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    file = Path(file).resolve()
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as opened:
            opened.write(content.encode() if isinstance(content, str) else content)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Make what was written to a file, or the names in a folder, survive a crash of the machine."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:  # Windows opens none
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
