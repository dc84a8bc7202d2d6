"""What a run needs to go on: written with each checkpoint, checked and put back when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

import torch
from torch import Tensor

from ..data.lanes import LanesState
from ..model import Memformer
from ..parallel import Ranks, like
from ..settings import TrainingConfig, read_saved, to_flat, to_plain
from . import checkpoints, shards
from .parts import Best, Parts

__all__ = ["find_checkpoint", "load", "restore", "save", "saved_settings", "settings_of", "stopped_early"]

_FREE_ON_RESUME = {
    "steps", "out", "data", "resume", "device", "output", "compute.parallel", "compute.timeout",
    "evaluation.eval_every", "evaluation.patience", "rollout.schedule", "rollout.graphs", "rollout.offload",
}  # fmt: skip
"""Settings that may differ from the saved run's: they change no number of a run that ends at the same step. The data
may have moved, but must be the same documents."""


class _Numbers(TypedDict):
    """What ``training.json`` holds."""

    step: int
    settings: dict[str, object]
    documents: str
    stream: LanesState
    scaler: dict[str, float]
    best: Best | None
    evaluations_since_best: int
    torch: str


class Saved(NamedTuple):
    """The state of a run beside its model's weights."""

    numbers: _Numbers
    tensors: dict[str, Tensor]
    parts: Path | None = None
    """A checkpoint that several processes wrote a part of each: its tensors are read when the model is divided."""


# --- Which checkpoint, and does it fit


def saved_settings(out: Path) -> TrainingConfig:
    """The settings of the newest sound checkpoint of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: all of them are damaged.
    """
    checkpoint, _ = checkpoints.newest_sound(out)
    if checkpoint is None:
        raise FileNotFoundError(f"{out}: no checkpoint to resume")
    return settings_of(checkpoint)


def settings_of(checkpoint: Path) -> TrainingConfig:
    """The settings of the run that wrote a checkpoint; what it could not set yet is as it was then.

    Raises:
        ValueError: they are missing or damaged.
    """
    return read_saved(checkpoints.load_state(checkpoint)[0]["settings"])


def find_checkpoint(settings: TrainingConfig, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """``(checkpoint, refused)``: the one to go on from, and what is wrong with newer ones, which are set aside.

    Raises:
        FileExistsError: the folder holds a run already, and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set, and there is no checkpoint.
        ValueError: all checkpoints are damaged.
    """
    if not settings.resume:
        if checkpoint := checkpoints.newest(settings.out):
            raise FileExistsError(
                f"{settings.out} holds a run already ({checkpoint.name}): add --resume to go on with it, or choose "
                "another --out"
            )
        return None, []
    checkpoint, refused = checkpoints.newest_sound(settings.out)
    if checkpoint is None:
        raise FileNotFoundError(f"{settings.out}: no checkpoint to resume")
    ranks.wait()  # all have looked before one changes what there is
    if not ranks.rank:
        checkpoints.set_aside_newer(settings.out, checkpoint)
    return checkpoint, refused


def stopped_early(parts: Parts, settings: TrainingConfig) -> bool:
    """Whether the last ``patience`` evaluations were no better than the best one."""
    return 0 < settings.evaluation.patience <= parts.progress.evaluations_since_best


def _check_settings(before: TrainingConfig, now: TrainingConfig) -> None:
    saved, given = to_flat(before), to_flat(now)
    for name in saved:
        if name not in _FREE_ON_RESUME and name.split(".")[0] not in _FREE_ON_RESUME and saved[name] != given[name]:
            raise ValueError(f"{name}: the run in {now.out} has {saved[name]}, got {given[name]}; it cannot change")


# --- The state, written and read


def save(parts: Parts, settings: TrainingConfig) -> None:
    """Write a checkpoint: whole tensors by the first process or, where FSDP divides the model, each process its part.

    Raises:
        OSError: it cannot be written; all processes raise it, and the checkpoints before are untouched.
    """
    if shards.divided(parts):
        _save_in_parts(parts, settings)
    else:
        _save_whole(parts, settings)


def _save_whole(parts: Parts, settings: TrainingConfig) -> None:
    weights = {name: p.detach().cpu() for name, p in parts.model.named_parameters()}
    average = {name: p.cpu() for name, p in parts.average.items()}
    tensors = {f"weights/{name}": p for name, p in weights.items()} if average else {}
    for name, parameter in parts.model.named_parameters():
        for key, value in parts.optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value.cpu()
    assert parts.progress.memory is not None
    tensors["memory"] = parts.ranks.gather(parts.progress.memory).cpu()
    with parts.ranks.together():
        if not parts.ranks.rank:
            with torch.random.fork_rng(), torch.device("cpu"):
                plain = Memformer(**parts.model.config.to_dict())
            plain.load_state_dict(average or weights, strict=False)
            _write(parts, settings, plain.save_pretrained, tensors)


def _save_in_parts(parts: Parts, settings: TrainingConfig) -> None:
    written = settings.out / f".unfinished-{parts.progress.step:06d}-{shards.SHARDS}"
    shards.write(parts, written)

    def write_model(folder: Path) -> None:
        written.rename(folder / shards.SHARDS)
        parts.model.write_config(folder)

    with parts.ranks.together():
        if not parts.ranks.rank:
            _write(parts, settings, write_model, {})


def _write(
    parts: Parts, settings: TrainingConfig, write_model: Callable[[Path], None], tensors: dict[str, Tensor]
) -> None:
    """What one process writes: the folder with everything in it."""
    progress = parts.progress
    numbers: _Numbers = {
        "step": progress.step,
        "settings": to_plain(settings),
        "documents": parts.fingerprint,
        "stream": parts.stream.state_dict(),
        "scaler": parts.scaler.state_dict(),
        "best": progress.best,
        "evaluations_since_best": progress.evaluations_since_best,
        "torch": torch.__version__,
    }

    def write_folder(folder: Path) -> None:
        write_model(folder)
        parts.tokenizer.save(folder)

    best = None if progress.best is None else progress.best["step"]
    keep = settings.output.keep
    checkpoints.save(settings.out, progress.step, write_folder, numbers, tensors, keep=keep, best=best)


def load(checkpoint: Path, settings: TrainingConfig, documents: str, model: Memformer) -> Saved:
    """Check that a checkpoint is of this run, and take its weights into the model; returns the rest of its state.

    Args:
        documents: the fingerprint of the training documents.

    Raises:
        ValueError: a setting differs that must not, the documents or the model are not the same, or it is damaged.
    """
    numbers, tensors = checkpoints.load_state(checkpoint)
    _check_settings(read_saved(numbers["settings"]), settings)
    if numbers["documents"] != documents:
        raise ValueError(f"the training documents are not those of {settings.out}: was the data changed?")
    config = Memformer.saved_config(checkpoint)
    if config != model.config:
        raise ValueError(f"{checkpoint}: its model is {config}, expected {model.config}")
    if shards.found_in(checkpoint):
        return Saved(cast(_Numbers, numbers), tensors, checkpoint)
    loaded = Memformer.from_pretrained(checkpoint)
    model.load_state_dict(loaded.state_dict())
    averages = {f"average/{name}": parameter.detach() for name, parameter in loaded.named_parameters()}
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    if weights:  # then the model's own files hold the average
        model.load_state_dict(weights, strict=False)
    return Saved(cast(_Numbers, numbers), tensors | averages)


def restore(parts: Parts, saved: Saved, settings: TrainingConfig) -> None:
    """Put everything but the weights back.

    Raises:
        ValueError: the run is at its end already.
    """
    numbers, tensors, in_parts = saved
    if in_parts is not None:
        shards.load(parts, in_parts)
    for name, parameter in parts.model.named_parameters() if in_parts is None else ():
        prefix = f"optimizer/{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        # AdamW keeps its step count on the CPU.
        parts.optimizer.state[parameter] = {k: like(v, parameter) if v.dim() else v for k, v in state.items()}
        if parts.average:
            parts.average[name] = like(tensors[f"average/{name}"], parameter)
    parts.stream.load_state_dict(numbers["stream"])
    parts.scaler.load_state_dict(numbers["scaler"])
    progress = parts.progress
    if in_parts is None:
        progress.memory = parts.ranks.own(tensors["memory"]).to(parts.device)
    progress.step, progress.best = numbers["step"], numbers["best"]
    progress.evaluations_since_best = numbers["evaluations_since_best"]
    if progress.step >= settings.steps:
        raise ValueError(f"the run in {settings.out} is at step {progress.step} already: raise --steps to go on")
    if stopped_early(parts, settings):
        raise ValueError(f"the run in {settings.out} stopped early, at step {progress.step}: raise --patience to go on")
