"""Files that are replaced whole or not at all, on whatever a folder is kept. Imports nothing of the project."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import warnings
from pathlib import Path

__all__ = ["delete_folder", "flush_to_disk", "move", "replace_file"]

_LOST = {getattr(errno, name, None) for name in ("EIO", "ENOSPC", "EDQUOT")}
_TRIES = 8
"""How often a name is asked for that another program holds for a moment: a scanner of viruses, a backup."""


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
        move(unfinished, file)
    finally:
        with contextlib.suppress(OSError):  # the error before says what is wrong
            unfinished.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name, in the place of a file that has it; Windows may have to be asked again.

    Raises:
        OSError: it cannot be renamed.
    """
    for left in reversed(range(_TRIES)):
        try:
            source.replace(target)
            return
        except PermissionError:
            if not left:
                raise
            time.sleep(0.01 * 2 ** (_TRIES - left))


def delete_folder(folder: Path) -> None:
    """Delete a folder with all that is in it. What cannot be deleted stays, and a warning names it."""
    error: OSError | None = None
    try:
        if os.access(folder, os.W_OK):
            gone = folder.with_name(f".gone-{folder.name.removeprefix('.gone-')}")
            if gone != folder:
                if gone.exists():
                    shutil.rmtree(gone)
                move(folder, gone)  # so that a half of it is never found
            shutil.rmtree(gone)
            return
    except FileNotFoundError:
        return
    except OSError as caught:
        error = caught
    warnings.warn(f"{folder}: cannot be deleted ({error or 'it is read-only'}), and so is kept", stacklevel=2)


def flush_to_disk(path: Path) -> None:
    """Make what was written to a file, or the names in a folder, survive a crash of the machine."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except OSError:
        if folder:  # Windows opens none
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno in _LOST:  # else a network folder, which flushes none
            raise
    finally:
        os.close(handle)
