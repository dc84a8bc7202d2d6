"""What a run needs to go on: written with each checkpoint, checked and put back when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from ..data.lanes import LanesState
from ..model import Memformer
from ..parallel import Ranks, full, like
from ..settings import TrainingConfig, read_saved, to_plain
from . import checkpoints
from .parts import Best, Parts

__all__ = ["find_checkpoint", "load", "restore", "save", "saved_settings", "settings_of", "stopped_early"]

_FREE_ON_RESUME = {
    "steps", "out", "data", "resume", "device", "output", "compute.parallel", "evaluation.eval_every",
    "evaluation.patience", "rollout.schedule", "rollout.graphs", "rollout.offload",
    "optimizer.skip_non_finite",
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
    skipped: NotRequired[tuple[int, int]]
    """In all, and in a row; where there were any."""
    torch: str


class Saved(NamedTuple):
    """The state of a run beside its model's weights."""

    numbers: _Numbers
    tensors: dict[str, Tensor]


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
    return read_saved(checkpoints.load_numbers(checkpoint)["settings"])


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
    saved, given = _flat(to_plain(before)), _flat(to_plain(now))
    for name in saved:
        if name not in _FREE_ON_RESUME and name.split(".")[0] not in _FREE_ON_RESUME and saved[name] != given[name]:
            raise ValueError(f"{name}: the run in {now.out} has {saved[name]}, got {given[name]}; it cannot change")


def _flat(plain: Mapping[str, object], where: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return flat


# --- The state, written and read


def save(parts: Parts, settings: TrainingConfig) -> None:
    """Write a checkpoint: whole tensors, gathered from all processes and written by the first."""
    progress = parts.progress
    weights = {name: full(p.detach()).cpu() for name, p in parts.model.named_parameters()}
    average = {name: full(p).cpu() for name, p in parts.average.items()}
    tensors = {f"weights/{name}": p for name, p in weights.items()} if average else {}
    for name, parameter in parts.model.named_parameters():
        for key, value in parts.optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = full(value).cpu()
    assert progress.memory is not None
    tensors["memory"] = parts.ranks.gather(progress.memory).cpu()
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
    if progress.skipped:
        numbers["skipped"] = (progress.skipped, progress.skipped_in_a_row)
    if not parts.ranks.rank:
        with torch.random.fork_rng():
            plain = Memformer(**parts.model.config.to_dict())
        plain.load_state_dict(average or weights, strict=False)

        def write_model(folder: Path) -> None:
            plain.save_pretrained(folder)
            parts.tokenizer.save(folder)

        best = None if progress.best is None else progress.best["step"]
        keep = settings.output.keep
        checkpoints.save(settings.out, progress.step, write_model, numbers, tensors, keep=keep, best=best)
    parts.ranks.wait()


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
    loaded = Memformer.from_pretrained(checkpoint)
    if loaded.config != model.config:
        raise ValueError(f"{checkpoint}: its model is {loaded.config}, expected {model.config}")
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
    numbers, tensors = saved
    for name, parameter in parts.model.named_parameters():
        prefix = f"optimizer/{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        # AdamW keeps its step count on the CPU.
        parts.optimizer.state[parameter] = {k: like(v, parameter) if v.dim() else v for k, v in state.items()}
        if parts.average:
            parts.average[name] = like(tensors[f"average/{name}"], parameter)
    parts.stream.load_state_dict(numbers["stream"])
    parts.scaler.load_state_dict(numbers["scaler"])
    progress = parts.progress
    progress.memory = parts.ranks.own(tensors["memory"]).to(parts.device)
    progress.step, progress.best = numbers["step"], numbers["best"]
    progress.evaluations_since_best = numbers["evaluations_since_best"]
    progress.skipped, progress.skipped_in_a_row = numbers.get("skipped", (0, 0))
    if progress.step >= settings.steps:
        raise ValueError(f"the run in {settings.out} is at step {progress.step} already: raise --steps to go on")
    if stopped_early(parts, settings):
        raise ValueError(f"the run in {settings.out} stopped early, at step {progress.step}: raise --patience to go on")
