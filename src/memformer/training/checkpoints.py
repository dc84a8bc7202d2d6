"""A training run on disk: one folder per checkpoint, written under another name and then renamed. Never pickle.

``OUT/step-000200/`` holds what ``Memformer.from_pretrained`` and ``load_tokenizer`` read, ``training.json`` and
``training.safetensors`` with everything else that the run needs to go on, and ``checksums.json`` over all of them.
Where the run evaluates, ``OUT/best`` leads to the one with the lowest held-out loss: a link, or a file with its name on
systems that have no links for everybody.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import flush_to_disk, replace_file

__all__ = ["find", "load_state", "lock", "newest", "newest_sound", "save", "set_aside_newer"]

_CHECKSUMS = "checksums.json"
_BEST = "best"


def save(
    out: Path,
    step: int,
    write_model: Callable[[Path], None],
    numbers: Mapping[str, object],
    tensors: dict[str, Tensor],
    *,
    keep: int = 2,
    best: int | None = None,
) -> Path:
    """Write ``OUT/step-NNNNNN``, whole or not at all, then delete all but the newest ``keep`` and the best.

    Args:
        write_model: writes the model's own files into the folder that it is given.
        numbers: whatever JSON can hold.
        best: the step of the best checkpoint, which OUT/best then leads to, and which is kept.

    Raises:
        OSError: the disk is full, the folder cannot be written, ...; the checkpoints before are untouched.
    """
    folder = out / f"step-{step:06d}"
    unfinished = out / f".unfinished-{step:06d}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_model(unfinished)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / "training.safetensors")
        (unfinished / "training.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        files = sorted(file for file in unfinished.rglob("*") if file.is_file())
        sums = {file.relative_to(unfinished).as_posix(): _checksum(file) for file in files}
        (unfinished / _CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        for file in [*unfinished.rglob("*"), unfinished]:
            flush_to_disk(file)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        flush_to_disk(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{folder}: cannot be written ({error}); the checkpoints before it are untouched") from error
    if best is not None:
        _lead(out / _BEST, f"step-{best:06d}")
    for old in _checkpoints(out)[:-keep]:
        if _step(old) != best:
            shutil.rmtree(old)
    for stale in out.glob(".unfinished-*"):
        shutil.rmtree(stale)
    return folder


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if each file is as it was written."""
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        wrong = [name for name, checksum in sums.items() if checksum != _checksum(folder / name)]
    except (OSError, ValueError, AttributeError) as error:
        return f"{folder}: damaged ({error})"
    return f"{folder}: damaged ({', '.join(wrong)}: another checksum)" if wrong else None


def newest(out: Path) -> Path | None:
    """The newest checkpoint in a run's folder, sound or not, or None."""
    found = _checkpoints(out)
    return found[-1] if found else None


def newest_sound(out: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with the newer ones.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    refused: list[str] = []
    for folder in reversed(_checkpoints(out)):
        if (damage := _damage(folder)) is None:
            return folder, refused
        refused.append(damage)
    if refused:
        raise ValueError(f"no sound checkpoint: {'; '.join(refused)}")
    return None, refused


def set_aside_newer(out: Path, sound: Path) -> None:
    """Rename the checkpoints that are newer than a sound one, so that they are neither found nor counted any more."""
    for folder in _checkpoints(out):
        if _step(folder) > _step(sound):
            aside = out / f"damaged-{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def find(path: Path) -> Path:
    """The folder of a model: ``path`` itself, or the newest checkpoint in it; a run's is checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the message names a sound one, if there is one.
    """
    if path.name == _BEST and path.is_file():  # where there are no links
        path = path.with_name(path.read_text(encoding="utf-8"))
    folder = path if (path / "config.json").is_file() else newest(path)
    if folder is None:
        raise FileNotFoundError(f"{path}: no checkpoint there; expected config.json, or folders named step-000200")
    of_a_run = folder is not path or (folder / _CHECKSUMS).is_file()  # else of save_pretrained, without checksums
    if of_a_run and (damage := _damage(folder)) is not None:
        sound = next((other for other in reversed(_checkpoints(folder.parent)) if _damage(other) is None), None)
        raise ValueError(f"{damage}; " + ("there is no sound one" if sound is None else f"use {sound}"))
    return folder


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold a run's folder for this process.

    Raises:
        BlockingIOError: another process holds it.
    """
    held = FileLock(out / ".lock", timeout=0, thread_local=False)  # a generator may end in another thread
    try:
        held.acquire()
    except Timeout as error:
        raise BlockingIOError(f"{out}: another process trains there at this moment; choose another --out") from error
    try:
        yield
    finally:
        held.release()


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(numbers, tensors)`` as given to :func:`save`.

    Raises:
        ValueError: the files are missing or damaged.
    """
    try:
        numbers = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        return numbers, load_file(folder / "training.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: the state of its training run is missing or damaged ({error})") from error


def _checkpoints(out: Path) -> list[Path]:
    return sorted((f for f in out.glob("step-*") if f.is_dir() and re.fullmatch(r"step-\d+", f.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _lead(link: Path, target: str) -> None:
    """Let a path lead to its neighbour, in one step: as a symbolic link if this system makes one, else as a file."""
    new = link.with_name(f".{link.name}-new")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(target)
    except (OSError, NotImplementedError):  # Windows asks for a privilege
        replace_file(link, target)
    else:
        new.replace(link)
