"""Runs on whatever a folder is kept: without links, locks or deletion, read-only, full, or held by another program."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from filelock import FileLock

from memformer import folders
from memformer.files import delete_folder, move, replace_file
from memformer.training import checkpoints
from memformer.training.metrics import Changed, MetricsLog

NO_LINKS = [
    OSError(errno.EPERM, "Operation not permitted"), OSError(errno.EOPNOTSUPP, "Operation not supported"),
    OSError(errno.ENOSYS, "Function not implemented"), OSError(errno.EACCES, "a required privilege is not held"),
    OSError(errno.EINVAL, "Invalid argument"), NotImplementedError("symlink() not available"),
]  # fmt: skip


def write(out: Path, step: int, best: int | None = None, **options: Any) -> Path:
    def model(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    numbers = {"step": step, "settings": {"evaluation": {"eval_every": 1}}, "best": best and {"step": best}}
    return checkpoints.save(out, step, model, numbers, {"a": torch.ones(2)}, best=best, **options)


def names(out: Path) -> list[str]:
    return sorted(file.name for file in out.iterdir())


@pytest.mark.parametrize("error", NO_LINKS, ids=str)
def test_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    write(tmp_path, 1, best=1)  # a link, from where there were some

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    for step in (2, 3, 4):
        write(tmp_path, step, best=2, keep=1)
    assert names(tmp_path) == ["best", "step-000002", "step-000004"]
    assert folders.find(tmp_path / "best") == folders.find(tmp_path) == tmp_path / "step-000002"


# --- What cannot be deleted


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr("memformer.files.shutil.rmtree", lambda f, **k: None if k.get("ignore_errors") else refuse(f))
        with pytest.warns(UserWarning, match=r"step-000001: cannot be deleted \(.*Permission denied.*, and so is kept"):
            write(tmp_path, 2, keep=1)
    assert [f.name for f in folders.all_checkpoints(tmp_path)] == ["step-000002"]
    write(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-000003"], "what was left is deleted when that is possible again"


def test_a_read_only_checkpoint_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path, 1)
    monkeypatch.setattr("memformer.files.os.access", lambda path, mode: Path(path) != first)
    with pytest.warns(UserWarning, match="cannot be deleted"):
        write(tmp_path, 2, keep=1)
    assert folders.damage(first) is None


def test_what_is_gone_already_needs_no_deletion(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = tmp_path / "a"
        folder.mkdir()
        delete_folder(folder)
    assert names(tmp_path) == []


# --- What another program holds for a moment


@pytest.mark.parametrize("failures", [2, 99])
def test_a_name_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    replace, left = Path.replace, [failures]

    def held(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(13, "The process cannot access the file")
        return replace(self, target)

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("pathlib.Path.replace", held)
    (tmp_path / "a").write_text("a")
    if failures == 2:
        move(tmp_path / "a", tmp_path / "b")
        replace_file(tmp_path / "b", "c")
        assert (tmp_path / "b").read_text() == "c"
    else:
        with pytest.raises(PermissionError):
            move(tmp_path / "a", tmp_path / "b")
        assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As on some network folders, which flush files but not names; a broken disk is another matter."""
    fsync = os.fsync

    def flush(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    if number == errno.EIO:
        with pytest.raises(OSError, match=r"cannot be written \(.*Input/output error"):
            write(tmp_path, 1)
    else:
        assert folders.damage(write(tmp_path, 1)) is None


def test_a_network_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    """What is written there would be on this disk, under the folder that comes back."""
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", 1)
    (tmp_path / "run").rename(tmp_path / "away")
    with pytest.raises(OSError, match=r"step-000002: cannot be written .*the checkpoints before it are untouched"):
        write(tmp_path / "run", 2)
    assert names(tmp_path) == ["away"]


# --- Locks


NO_LOCKS = [
    OSError(errno.ENOSYS, "Function not implemented"), OSError(errno.ENOLCK, "No locks available"),
    OSError(errno.EOPNOTSUPP, "Operation not supported"), NotImplementedError("use SoftFileLock instead"),
    filelock.Timeout("any lock is refused"),
]  # fmt: skip


@pytest.mark.parametrize("error", NO_LOCKS, ids=str)
def test_without_locks_a_warning_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(self: FileLock, *_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="this file system has no locks"), checkpoints.lock(tmp_path):
        pass


def test_a_held_lock_is_no_lack_of_locks(tmp_path: Path) -> None:
    with (
        checkpoints.lock(tmp_path),
        pytest.raises(BlockingIOError, match="another process trains"),
        checkpoints.lock(tmp_path),
    ):
        pass
    assert names(tmp_path) == [".lock"]


def test_a_folder_is_looked_at_and_left_as_it_was(tmp_path: Path) -> None:
    checkpoints.check_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    checkpoints.check_folder(tmp_path / "a")
    assert names(tmp_path / "a") == [".lock", "mine"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file.*: cannot be made \(.*; choose another --out"):
        checkpoints.check_folder(tmp_path / "file" / "run")


@pytest.mark.parametrize("failing", ["mkdir", "acquire"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """A read-only disk; permissions do not bind the superuser."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    if failing == "acquire":
        monkeypatch.setattr(FileLock, "acquire", refuse)
    else:
        mkdir: Callable[..., None] = Path.mkdir
        monkeypatch.setattr(Path, "mkdir", lambda p, **k: refuse() if "probe" in p.name else mkdir(p, **k))
    with pytest.raises(OSError, match=r"cannot be written \(.*Read-only"):
        checkpoints.check_folder(tmp_path)


# --- Damage, and numbers that are replaced


def test_numbers_are_replaced_at_any_moment_soundly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, 1)
    replace, left = checkpoints.replace_file, 0

    def until(file: Path, content: str) -> None:
        nonlocal left
        if not left:
            raise OSError(28, "No space left on device")
        left -= 1
        replace(file, content)

    monkeypatch.setattr(checkpoints, "replace_file", until)
    for left in (0, 1, 2):
        now = left
        with pytest.raises(OSError, match="No space left"):
            checkpoints.record(folder, {"step": 1, "best": now})
        assert folders.damage(folder) is None
        assert checkpoints.load_numbers(folder)["best"] == (2 if now == 2 else None)
    left = 3
    checkpoints.record(folder, {"step": 1, "best": 7})
    assert folders.damage(folder) is None
    assert isinstance(json.loads((folder / "checksums.json").read_text())["training.json"], str)
    (folder / "training.json").write_text('{"step": 1, "best": 8}')
    assert "training.json: another checksum" in str(folders.damage(folder))


def test_a_best_that_is_gone_is_not_found(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step, best=1)
    assert folders.find(tmp_path) == tmp_path / "step-000001"
    shutil.rmtree(tmp_path / "step-000001")
    assert folders.find(tmp_path) == tmp_path / "step-000002"
    assert folders.model_in(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_a_run_is_found_before_what_else_is_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert folders.find(tmp_path) == tmp_path
    write(tmp_path, 1)
    assert folders.find(tmp_path) == tmp_path / "step-000001"


def test_metrics_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    log = MetricsLog(tmp_path, 0)
    with pytest.raises(OSError, match=r"metrics\.jsonl: cannot be written .*the checkpoints are untouched"):
        log.write("changed", Changed(1, {}))
