"""memformer average."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..data import load_tokenizer
from ..folders import NUMBERS, all_checkpoints
from ..training import average

__all__ = ["AverageCommand", "run"]


@dataclass(frozen=True, kw_only=True)
class AverageCommand:
    """Write the mean of a run's last checkpoints as one model, for evaluate, generate, export and inspect."""

    checkpoint: Path
    """A run's folder."""
    last: int | None = None
    """How many of its newest checkpoints; by default all (train keeps --keep of them, and the best one)."""
    out: Path
    """Folder for the model and its tokenizer; it may not hold anything yet."""


def run(command: AverageCommand) -> int:
    """Write the mean; returns the exit status."""
    if command.last is not None and command.last < 2:
        raise ValueError(f"last: expected at least 2 checkpoints to average, got {command.last}")
    found = all_checkpoints(command.checkpoint)
    wanted = 2 if command.last is None else command.last
    if len(found) < wanted:
        raise ValueError(
            f"{command.checkpoint}: expected a run with at least {wanted} checkpoints, got {len(found)}; memformer "
            "train keeps --keep of them"
        )
    if command.out.exists() and (not command.out.is_dir() or any(command.out.iterdir())):
        raise ValueError(f"out: {command.out} holds something already; choose another folder")
    folders = found[-wanted:] if command.last else found
    average(folders).save_pretrained(command.out)
    load_tokenizer(folders[-1]).save(command.out)
    shutil.copyfile(folders[-1] / NUMBERS, command.out / NUMBERS)  # what the run held out
    print(f"{command.out}  the mean of {', '.join(folder.name for folder in folders)}. Try:")
    print(f"  memformer evaluate --checkpoint {shlex.quote(str(command.out))}")
    return 0
