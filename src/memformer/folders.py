"""How a training run's folder is laid out, and which of its models is meant. Imports nothing of the project.

``RUN/step-000200/`` is a checkpoint, with ``checksums.json`` over its files and the run's state in ``training.json``;
``RUN/best`` leads to that of the best evaluation.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

__all__ = [
    "BEST",
    "CHECKSUMS",
    "NUMBERS",
    "all_checkpoints",
    "best",
    "checkpoint",
    "checksum",
    "damage",
    "find",
    "model_in",
    "newest",
    "newest_sound",
    "step_of",
]

CHECKSUMS = "checksums.json"
"""In a checkpoint: the checksums of its other files."""
NUMBERS = "training.json"
"""In a checkpoint: the step, the settings and whatever else of the run's state is no tensor."""
BEST = "best"
"""In a run: what leads to the checkpoint of its best evaluation."""


def checkpoint(out: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return out / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(folder.name.removeprefix("step-"))


def all_checkpoints(out: Path) -> list[Path]:
    """A run's checkpoints, sound or not, the newest last."""
    return sorted((f for f in out.glob("step-*") if f.is_dir() and re.fullmatch(r"step-\d+", f.name)), key=step_of)


def newest(out: Path) -> Path | None:
    """The newest checkpoint in a run's folder, sound or not, or None."""
    found = all_checkpoints(out)
    return found[-1] if found else None


def newest_sound(out: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and what is wrong with the newer ones.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    refused: list[str] = []
    for folder in reversed(all_checkpoints(out)):
        if (wrong := damage(folder)) is None:
            return folder, refused
        refused.append(wrong)
    if refused:
        raise ValueError(
            f"no sound checkpoint: {'; '.join(refused)}; put them back from a copy, or start in another --out"
        )
    return None, refused


def best(out: Path) -> Path | None:
    """The checkpoint of the best evaluation of a run that evaluates on its way; None if there is none."""
    found = newest(out)
    if found is None:
        return None
    try:
        numbers = json.loads((found / NUMBERS).read_text(encoding="utf-8"))
        if not numbers["settings"]["evaluation"]["eval_every"] or numbers["best"] is None:
            return None
        folder = checkpoint(out, numbers["best"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whoever takes the newest one finds out what is wrong with it
    return folder if folder.is_dir() else None


def find(path: str | Path) -> Path:
    """The folder of a model: ``path`` itself, or a run's best checkpoint if it evaluates on its way, else its newest.

    That of a run is checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the message names a sound one, if there is one.
    """
    path = Path(path)
    if path.name == BEST and path.is_file():  # where there are no links
        path = path.with_name(path.read_text(encoding="utf-8"))
    # What else a run's folder holds is not its model.
    folder = best(path) or newest(path) or (path if (path / "config.json").is_file() else None)
    if folder is None:
        raise FileNotFoundError(f"{path}: no checkpoint there; expected config.json, or folders named step-000200")
    of_a_run = folder is not path or (folder / CHECKSUMS).is_file()  # else of save_pretrained, without checksums
    if of_a_run and (wrong := damage(folder)) is not None:
        sound = next((other for other in reversed(all_checkpoints(folder.parent)) if damage(other) is None), None)
        raise ValueError(f"{wrong}; " + ("there is no sound one" if sound is None else f"use {sound}"))
    return folder


def model_in(path: str | Path) -> Path:
    """What :func:`find` gives for a run's folder; any other path as it is."""
    path = Path(path)
    return find(path) if path.is_file() or newest(path) is not None else path


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if each file is as it was written."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        # A file that is being replaced has two: it is sound before and after.
        wrong = [name for name, sums in sums.items() if checksum(folder / name) not in _list(sums)]
    except (OSError, ValueError, AttributeError) as error:
        return f"{folder}: damaged ({error})"
    return f"{folder}: damaged ({', '.join(wrong)}: another checksum)" if wrong else None


def checksum(file: Path) -> str:
    """The SHA-256 of a file, as ``checksums.json`` has it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _list(sums: str | list[str]) -> list[str]:
    return [sums] if isinstance(sums, str) else sums
