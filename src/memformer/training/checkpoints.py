"""A training run on disk: one folder per checkpoint, written under another name and then renamed. Never pickle.

``OUT/step-000200/`` holds what ``Memformer.from_pretrained`` and ``load_tokenizer`` read, ``training.json`` and
``training.safetensors`` with everything else that the run needs to go on, and ``checksums.json`` over all of them.
Where the run evaluates, ``OUT/best`` leads to the one with the lowest held-out loss: a link, or a file with its name on
systems that have no links for everybody. ``folders.py`` finds them again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import delete_folder, flush_to_disk, move, replace_file
from ..folders import (
    BEST,
    CHECKSUMS,
    NUMBERS,
    all_checkpoints,
    checkpoint,
    checksum,
    find,
    newest,
    newest_sound,
    step_of,
)

__all__ = [
    "after_divergence",
    "check_folder",
    "find",
    "keep_only",
    "load_numbers",
    "load_state",
    "lock",
    "newest",
    "newest_finite",
    "newest_sound",
    "record",
    "save",
    "set_aside",
]

_NO_LOCKS = {getattr(errno, name, None) for name in ("ENOSYS", "ENOLCK", "ENOTSUP", "EOPNOTSUPP", "EINVAL")}


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
    """Write ``OUT/step-NNNNNN``, whole or not at all, then :func:`keep_only` some.

    Args:
        write_model: writes the model's own files into the folder that it is given.
        numbers: whatever JSON can hold.

    Raises:
        OSError: the disk is full, the folder cannot be written, ...; the checkpoints before are untouched.
    """
    folder = checkpoint(out, step)
    unfinished = out / f".unfinished-{step:06d}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()  # not its parents: a network folder that is gone must not come again on this disk
        write_model(unfinished)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / "training.safetensors")
        (unfinished / NUMBERS).write_text(_json(numbers), encoding="utf-8")
        files = sorted(file for file in unfinished.rglob("*") if file.is_file())
        sums = {file.relative_to(unfinished).as_posix(): checksum(file) for file in files}
        (unfinished / CHECKSUMS).write_text(_json(sums), encoding="utf-8")
        for file in [*unfinished.rglob("*"), unfinished]:
            flush_to_disk(file)
        if folder.exists():
            delete_folder(folder)
        move(unfinished, folder)
        flush_to_disk(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{folder}: cannot be written ({error}); the checkpoints before it are untouched") from error
    keep_only(out, keep, best)
    return folder


def record(folder: Path, numbers: Mapping[str, object]) -> None:
    """Replace a checkpoint's numbers. At every moment it is sound, with the former ones or with these.

    Raises:
        OSError: they cannot be written; the former ones are untouched.
    """
    text = _json(numbers)
    now = hashlib.sha256(text.encode()).hexdigest()
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        replace_file(folder / CHECKSUMS, _json({**sums, NUMBERS: [checksum(folder / NUMBERS), now]}))
        replace_file(folder / NUMBERS, text)
        replace_file(folder / CHECKSUMS, _json({**sums, NUMBERS: now}))
    except OSError as error:
        raise OSError(f"{folder}: its {NUMBERS} cannot be written ({error}); the former one is untouched") from error


def keep_only(out: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the newest ``keep`` and the best; what cannot be deleted is a warning.

    Args:
        best: the step of the best checkpoint, which OUT/best then leads to.
    """
    if best is not None:
        _lead(out / BEST, checkpoint(out, best).name)
    for old in all_checkpoints(out)[:-keep]:
        if step_of(old) != best:
            delete_folder(old)
    for stale in [*out.glob(".unfinished-*"), *out.glob(".gone-*")]:
        delete_folder(stale)


def set_aside(out: Path, refused: list[Path]) -> None:
    """Rename damaged checkpoints, so that they are neither found nor counted any more."""
    for folder in refused:
        aside = out / f"damaged-{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        move(folder, aside)


def newest_finite(out: Path) -> Path | None:
    """The newest checkpoint that is sound and has no weight, moment or memory that is infinite or no number."""
    for folder in reversed(all_checkpoints(out)):
        try:
            files = [load_file(file) for file in folder.rglob("*.safetensors")]  # FSDP has a file for each process
        except (OSError, SafetensorError):
            continue
        if files and all(bool(tensor.isfinite().all()) for tensors in files for tensor in tensors.values()):
            return folder
    return None


def after_divergence(out: Path, rate: float) -> str:
    """What to do where training fails at a learning rate."""
    sound = newest_finite(out)
    if sound is None:
        return "Lower --learning-rate; there is no checkpoint yet"
    command = f"memformer train --resume --out {shlex.quote(str(out))} --learning-rate {rate / 3:.1g}"
    return f"Lower --learning-rate; the newest checkpoint, from before, is {sound}. Go on with: {command}"


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold a run's folder for this process, where its file system has locks; else a warning says so.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the folder cannot be written.
    """
    held = FileLock(out / ".lock", timeout=0, thread_local=False)  # a generator may end in another thread
    busy = f"{out}: another process trains there at this moment; choose another --out"
    try:
        held.acquire()
    except Timeout as error:
        if _locks_work(out):
            raise BlockingIOError(busy) from error
        _warn_of_no_locks(out)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise OSError(f"{out}: cannot be written ({error})") from error
        _warn_of_no_locks(out)
    try:
        yield
    finally:
        held.release()


def check_folder(out: Path) -> None:
    """Whether a run's folder can be written, and nobody trains there. It is afterwards as before.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made, or not be written.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{out}: cannot be made ({error}); choose another --out") from error
    try:
        with lock(out):
            probe = out / ".unfinished-probe"
            try:
                probe.mkdir(exist_ok=True)
                probe.rmdir()
            except OSError as error:
                raise OSError(f"{out}: cannot be written ({error}); choose another --out") from error
    except BlockingIOError:
        missing = []  # another process has made them by now
        raise
    finally:
        with contextlib.suppress(OSError):
            if missing:
                (out / ".lock").unlink(missing_ok=True)
            for folder in missing:
                folder.rmdir()  # which is empty, or stays


def load_numbers(folder: Path) -> dict[str, Any]:
    """The numbers that were given to :func:`save`.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: the state of its training run is missing or damaged ({error})") from error
    if not isinstance(numbers, dict):
        raise ValueError(f"{folder}: the state of its training run is damaged (expected a JSON object)")
    return numbers


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(numbers, tensors)`` as given to :func:`save`.

    Raises:
        ValueError: the files are missing or damaged.
    """
    try:
        mapped = load_file(folder / "training.safetensors")
        # Copies, or the file would be held as long as the run goes on, and could not be deleted on a network folder.
        return load_numbers(folder), {name: tensor.clone() for name, tensor in mapped.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the state of its training run is missing or damaged ({error})") from error


def _json(values: Mapping[str, object]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _locks_work(out: Path) -> bool:
    """Whether a lock that nobody else knows is given: not on some network folders, which refuse all of them."""
    file = out / ".lock-tried"
    try:
        with FileLock(file, timeout=0):
            return True
    except (OSError, NotImplementedError):
        return False
    finally:
        file.unlink(missing_ok=True)


def _warn_of_no_locks(out: Path) -> None:
    warnings.warn(f"{out}: this file system has no locks, so take care that no other training runs there", stacklevel=4)


def _lead(link: Path, target: str) -> None:
    """Let a path lead to its neighbour, in one step: as a symbolic link if this system makes one, else as a file."""
    new = link.with_name(f".{link.name}-new")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(target)
        move(new, link)
    except (OSError, NotImplementedError):  # Windows asks for a privilege, and some file systems have none
        new.unlink(missing_ok=True)
        if link.is_symlink():
            link.unlink()
        replace_file(link, target)
