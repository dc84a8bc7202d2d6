"""A training run on disk: one folder per checkpoint, written under another name and then renamed. Never pickle.

``OUT/step-000200/`` holds ``config.json`` and ``model.safetensors``, as ``Memformer.save_pretrained`` writes them, and
``training.json`` and ``training.safetensors``, everything else that the run needs to go on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .model import Memformer

__all__ = ["find", "load_state", "newest", "save"]


def save(
    out: Path, step: int, model: Memformer, numbers: dict[str, Any], tensors: dict[str, Tensor], keep: int = 2
) -> Path:
    """Write ``OUT/step-NNNNNN``, whole or not at all, then delete all but the newest ``keep``."""
    folder = out / f"step-{step:06d}"
    unfinished = out / f".unfinished-{step:06d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / "training.safetensors")
    (unfinished / "training.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    for file in unfinished.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    for old in _checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    for stale in out.glob(".unfinished-*"):
        shutil.rmtree(stale)
    return folder


def newest(out: Path) -> Path | None:
    """The newest checkpoint in a run's folder, or None."""
    found = _checkpoints(out)
    return found[-1] if found else None


def find(path: Path) -> Path:
    """The folder of a model: ``path`` itself, or the newest checkpoint in it.

    Raises:
        FileNotFoundError: there is none.
    """
    if (path / "config.json").is_file():
        return path
    folder = newest(path)
    if folder is None:
        raise FileNotFoundError(f"{path}: no checkpoint there; expected config.json, or folders named step-000200")
    return folder


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
    """Sorted by step."""
    found = [(int(m[1]), f) for f in out.glob("step-*") if f.is_dir() and (m := re.fullmatch(r"step-(\d+)", f.name))]
    return [folder for _, folder in sorted(found)]


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's tensors, by parameter name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer/{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_state` gave. Raises ValueError where it does not fit the model."""
    for name, parameter in model.named_parameters():
        prefix = f"optimizer/{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if not state or any(value.dim() and value.shape != parameter.shape for value in state.values()):
            raise ValueError(f"the optimiser's saved state does not fit parameter {name}")
        # AdamW keeps its step count on the CPU.
        optimizer.state[parameter] = {k: v.to(parameter.device) if v.dim() else v for k, v in state.items()}
