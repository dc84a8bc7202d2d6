"""What a run needs to go on: written with each checkpoint, checked and put back when it is resumed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import folders
from ..data import Document, fingerprint
from ..data.lanes import LanesState
from ..interface import SegmentModel
from ..parallel import like
from ..pretrained import divided
from ..settings import TrainingConfig, absolute, read_saved, read_yaml, to_flat, to_plain
from . import checkpoints, shards
from .parts import Best, Change, Parts, by_name, from_names, only_finite, trained

__all__ = [
    "ON_RESUMING",
    "as_kept",
    "changes_since",
    "check_documents_of",
    "find_checkpoint",
    "last_settings",
    "load",
    "on_resuming",
    "record_evaluation",
    "restore",
    "save",
    "saved_settings",
    "settings_of",
    "stopped_early",
]

Kind = Literal["exact", "stretch", "stream", "best", "documents", "fixed"]

ON_RESUMING: dict[str, Kind] = {
    "data": "documents", "out": "exact", "steps": "stretch", "seed": "stream", "resume": "exact",
    "auto_resume": "exact", "new_data": "exact", "init_from": "fixed", "device": "exact",
    "documents": "documents", "documents.tokenizer": "fixed", "documents.vocabulary": "fixed",
    "documents.end": "stream",
    "model": "fixed", "model.dropout": "stretch",
    "around": "fixed", "around.base": "exact", "around.gguf": "exact",
    "objective": "stretch",
    "rollout": "stretch", "rollout.lanes": "stream", "rollout.segment_length": "fixed", "rollout.spread": "stream",
    "rollout.stretch": "stream",
    "rollout.schedule": "exact", "rollout.graphs": "exact", "rollout.offload": "exact",
    "optimizer": "stretch", "optimizer.optimizer": "fixed", "optimizer.skip_non_finite": "exact",
    "compute": "exact", "compute.precision": "stretch",
    "evaluation": "exact", "evaluation.eval_limit": "best",
    "output": "exact",
}  # fmt: skip
"""What a setting may do on resuming; one that is not named is as its group is.

- ``exact``: it changes no number of a run that ends at the same step (but for rounding, on another device).
- ``stretch``: it may change on purpose; from here on the run is another one than it would have been.
- ``stream``: the same, and the documents begin anew: with the next epoch, and with new memories.
- ``best``: evaluations before and after cannot be compared, so the best one is looked for anew.
- ``documents``: free as long as the documents are the same; other ones need ``new_data``.
- ``fixed``: it belongs to the weights.
"""

_FOLLOWS = {
    "stream": "a new epoch of the documents begins, with new memories",
    "best": "the best evaluation is looked for anew",
}


_HELD_OUT = "held-out documents"


class _Numbers(TypedDict):
    """What ``training.json`` holds."""

    step: int
    settings: dict[str, object]
    documents: str
    held_out: NotRequired[str]
    test: NotRequired[str]
    stream: LanesState
    scaler: dict[str, float]
    best: Best | None
    evaluations_since_best: int
    skipped: NotRequired[tuple[int, int]]
    """In all, and in a row; where there were any."""
    due: NotRequired[bool]
    torch: str
    tokens: NotRequired[int]
    seconds: NotRequired[float]


class Saved(NamedTuple):
    """The state of a run beside its model's weights, and what is changed in it on purpose."""

    numbers: _Numbers
    tensors: dict[str, Tensor]
    changes: list[Change]
    kinds: set[Kind]
    parts: Path | None = None
    """A checkpoint that several processes wrote a part of each: its tensors are read when the model is divided."""


# --- Which checkpoint, and does it fit


def saved_settings(out: str | Path) -> TrainingConfig:
    """The settings of the newest sound checkpoint of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: all of them are damaged.
    """
    checkpoint, _ = checkpoints.newest_sound(Path(out))
    if checkpoint is None:
        raise FileNotFoundError(f"{out}: no checkpoint to resume")
    return settings_of(checkpoint)


def last_settings(out: Path) -> TrainingConfig:
    """The settings with which a run was started or resumed last, maybe after its newest checkpoint.

    Raises:
        FileNotFoundError, ValueError: as :func:`saved_settings`, or its run.yaml is damaged.
    """
    saved, file = saved_settings(out), out / "run.yaml"
    return read_yaml(file, saved) if file.is_file() else saved


def settings_of(checkpoint: str | Path) -> TrainingConfig:
    """The settings of the run that wrote a checkpoint; what it could not set yet is as it was then.

    Raises:
        ValueError: they are missing or damaged.
    """
    return read_saved(checkpoints.load_numbers(folders.model_in(checkpoint))["settings"])


def as_kept(settings: TrainingConfig) -> TrainingConfig:
    """Settings as a run keeps them: found from any working directory, without what is said of one start alone."""
    return absolute(dataclasses.replace(settings, resume=False, auto_resume=False, new_data=False))


def find_checkpoint(settings: TrainingConfig) -> tuple[Path | None, list[str]]:
    """``(checkpoint, refused)``: the one to go on from, and what is wrong with newer ones.

    Raises:
        FileExistsError: the folder holds a run already, and neither ``resume`` nor ``auto_resume`` is set; or another
            model.
        FileNotFoundError: ``resume`` is set, and there is no checkpoint.
        ValueError: all checkpoints are damaged.
    """
    there = checkpoints.newest(settings.out)
    if not settings.resume and (there is None or not settings.auto_resume):
        if there is not None:
            raise FileExistsError(
                f"{settings.out} holds a run already ({there.name}): add --resume to go on with it, or choose "
                "another --out"
            )
        if (settings.out / "config.json").exists():
            raise FileExistsError(
                f"{settings.out} holds a config.json, so it is the folder of a model, or of something else: choose "
                "another --out"
            )
        return None, []
    checkpoint, refused = checkpoints.newest_sound(settings.out)
    if checkpoint is None:
        raise FileNotFoundError(f"{settings.out}: no checkpoint to resume")
    return checkpoint, refused


def stopped_early(parts: Parts, settings: TrainingConfig) -> bool:
    """Whether the last ``patience`` evaluations were no better than the best one."""
    return 0 < settings.evaluation.patience <= parts.progress.evaluations_since_best


def on_resuming(name: str) -> Kind:
    """What a setting such as ``rollout.lanes`` may do on resuming, see :data:`ON_RESUMING`."""
    return ON_RESUMING[name] if name in ON_RESUMING else ON_RESUMING[name.split(".")[0]]


def _changes(before: TrainingConfig, now: TrainingConfig) -> tuple[list[Change], set[Kind]]:
    """The settings that are others on purpose, and of which kinds they are."""
    saved, given = to_flat(absolute(before)), to_flat(absolute(now))
    changes: list[Change] = []
    kinds: set[Kind] = set()
    for name in saved:
        kind = on_resuming(name)
        if saved[name] == given[name] or kind in ("exact", "documents"):
            continue
        if kind == "fixed":
            raise ValueError(f"{name}: the run in {now.out} has {saved[name]}, got {given[name]}; it cannot change")
        changes.append(Change(name, saved[name], given[name], _FOLLOWS.get(kind, "")))
        kinds.add(kind)
    return changes, kinds


# --- The state, written and read


def save(parts: Parts, settings: TrainingConfig) -> None:
    """Write a checkpoint: whole tensors by the first process or, where FSDP divides the model, each process its part.

    Raises:
        OSError: it cannot be written; all processes raise it, and the checkpoints before are untouched.
        FloatingPointError: a weight is not finite, so the former checkpoints are better.
    """
    with parts.ranks.together():
        for name, parameter in trained(parts.model):
            own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if not own.isfinite().all():
                raise FloatingPointError(f"step {parts.progress.step}: {name} is not finite, so nothing is saved")
    if divided(parts.model):
        _save_in_parts(parts, settings)
    else:
        _save_whole(parts, settings)


def _save_whole(parts: Parts, settings: TrainingConfig) -> None:
    average = parts.average
    tensors = {f"weights/{name}": p.detach().cpu() for name, p in trained(parts.model) if average}
    for name, parameter in trained(parts.model):
        for key, value in parts.optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value.cpu()
    assert parts.progress.memory is not None
    tensors |= {name: parts.ranks.gather(part).cpu() for name, part in by_name(parts.progress.memory).items()}
    with parts.ranks.together():
        if not parts.ranks.rank:
            written = {name: p.detach() for name, p in parts.model.named_parameters()} | average
            _write(parts, settings, lambda folder: parts.model.save_with(folder, written), tensors)


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
        "settings": to_plain(as_kept(settings)),
        "documents": parts.fingerprint,
        "held_out": parts.held_out_fingerprint,
        "stream": parts.stream.state_dict(),
        "scaler": parts.scaler.state_dict(),
        "best": progress.best,
        "evaluations_since_best": progress.evaluations_since_best,
        "torch": torch.__version__,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
    }
    if parts.test:
        numbers["test"] = parts.test_fingerprint
    if progress.skipped:
        numbers["skipped"] = (progress.skipped, progress.skipped_in_a_row)
    if progress.due:
        numbers["due"] = True

    def write_folder(folder: Path) -> None:
        write_model(folder)
        parts.tokenizer.save(folder)

    best = None if progress.best is None else progress.best["step"]
    keep = settings.output.keep
    checkpoints.save(settings.out, progress.step, write_folder, numbers, tensors, keep=keep, best=best)


def record_evaluation(parts: Parts, settings: TrainingConfig) -> None:
    """Write what the evaluation found to the checkpoint that it was of, which :func:`save` wrote before.

    A run that is killed before makes the evaluation again.
    """
    progress = parts.progress
    with parts.ranks.together():
        if parts.ranks.rank:
            return
        folder = folders.checkpoint(settings.out, progress.step)
        numbers = checkpoints.load_numbers(folder)
        numbers.pop("due", None)
        found = {"best": progress.best, "evaluations_since_best": progress.evaluations_since_best}
        checkpoints.record(folder, {**numbers, **found})
        checkpoints.keep_only(settings.out, settings.output.keep, progress.best and progress.best["step"])


def changes_since(
    checkpoint: Path, settings: TrainingConfig, documents: str, held_out: str
) -> tuple[list[Change], set[Kind]]:
    """What is another setting, or are other documents, than in a checkpoint, and of which kinds that is.

    Args:
        documents, held_out: the fingerprints of the documents.

    Raises:
        ValueError: a setting differs that must not, or the documents are not the same.
    """
    numbers = checkpoints.load_numbers(checkpoint)
    changes, kinds = _changes(read_saved(numbers["settings"]), settings)
    for name, kind, now in (("documents", "stream", documents), ("held_out", "best", held_out)):
        before = numbers.get(name, now)  # older runs do not know what they held out
        if before == now:
            continue
        what = "training documents" if name == "documents" else _HELD_OUT
        follows = _FOLLOWS[kind]
        if not settings.new_data:
            raise ValueError(
                f"the {what} are not those of {settings.out}: was the data changed? If so on purpose, add "
                f"--new-data: {follows}"
            )
        changes.append(Change(what, "", "", follows))
        kinds.add(cast(Kind, kind))
    return changes, kinds


def load(checkpoint: Path, settings: TrainingConfig, documents: str, held_out: str, model: SegmentModel) -> Saved:
    """Check that a checkpoint is of this run, and take its weights into the model; returns the rest of its state.

    Args:
        documents, held_out: the fingerprints of the documents.

    Raises:
        ValueError: a setting differs that must not, the documents or the model are not the same, or it is damaged.
    """
    numbers, tensors = checkpoints.load_state(checkpoint)
    changes, kinds = changes_since(checkpoint, settings, documents, held_out)
    model.load_saved(checkpoint)
    if shards.found_in(checkpoint):
        return Saved(cast(_Numbers, numbers), tensors, changes, kinds, checkpoint)
    averages = {f"average/{name}": p.detach().clone() for name, p in trained(model) if settings.optimizer.ema}
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    if weights:  # then the model's own files hold the average
        model.load_state_dict(weights, strict=False)
    return Saved(cast(_Numbers, numbers), tensors | averages, changes, kinds)


def restore(parts: Parts, saved: Saved, settings: TrainingConfig) -> None:
    """Put everything but the weights back.

    Raises:
        ValueError: the run is at its end already.
    """
    numbers, tensors, changes, kinds, in_parts = saved
    progress = parts.progress
    if any(change.name == _HELD_OUT for change in changes) and not parts.ranks.rank:
        warnings.warn(
            "the held-out documents are others than before: some may have been trained on before step "
            f"{numbers['step']}, so figures on them may be too good",
            stacklevel=2,
        )
    if in_parts is not None:
        tensors = shards.load(parts, in_parts)
    else:
        _restore_optimizer(parts, tensors)
        for name, parameter in trained(parts.model) if parts.average else ():
            parts.average[name] = like(tensors[f"average/{name}"], parameter)
    saved_memory = from_names(tensors, parts.model.get_initial_mem(1))
    progress.memory = tree_map(lambda part: parts.ranks.own(part).to(parts.device), saved_memory)
    if "stream" in kinds:
        progress.memory = None
        state, before = parts.stream.state_dict(), numbers["stream"]
        parts.stream.load_state_dict({**state, "step": before["step"], "epoch": before["epoch"] + 1})
    else:
        parts.stream.load_state_dict(numbers["stream"])
        assert progress.memory is not None
        progress.memory, _ = only_finite(progress.memory)
    if numbers["scaler"]:  # else it was trained in another precision
        parts.scaler.load_state_dict(numbers["scaler"])
    progress.step, progress.best = numbers["step"], numbers["best"]
    progress.evaluations_since_best = numbers["evaluations_since_best"]
    progress.skipped, progress.skipped_in_a_row = numbers.get("skipped", (0, 0))
    progress.tokens, progress.seconds = numbers.get("tokens", 0), numbers.get("seconds", 0.0)
    if "best" in kinds:
        progress.best, progress.evaluations_since_best = None, 0
    # An evaluation that failed need not be made where none are wanted on the way.
    at_end = progress.step >= settings.steps
    progress.due = numbers.get("due", False) and bool(settings.evaluation.eval_every or at_end)
    if progress.due or settings.auto_resume:
        return
    if at_end:
        raise ValueError(f"the run in {settings.out} is at step {progress.step} already: raise --steps to go on")
    if stopped_early(parts, settings):
        raise ValueError(f"the run in {settings.out} stopped early, at step {progress.step}: raise --patience to go on")


def _restore_optimizer(parts: Parts, tensors: Mapping[str, Tensor]) -> None:
    """What the optimizer knows of each parameter; it moves it to where it keeps it (a fused one's steps are there)."""
    names = {parameter: name for name, parameter in parts.model.named_parameters()}
    parameters = [parameter for group in parts.optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        prefix = f"optimizer/{names[parameter]}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            states[index] = {k: like(v, parameter) if v.dim() else v for k, v in state.items()}
    groups = parts.optimizer.state_dict()["param_groups"]
    parts.optimizer.load_state_dict({"state": states, "param_groups": groups})


def check_documents_of(checkpoint: Path, **documents: Sequence[Document]) -> None:
    """Whether documents are those of the run that wrote a checkpoint: ``documents``, ``held_out``, ``test``, by name.

    Raises:
        ValueError: they were changed since, so that what it held out cannot be told.
    """
    numbers = checkpoints.load_numbers(checkpoint)
    whats = {"documents": "trained on", "held_out": "held out", "test": "was to be tested on"}
    for name, found in documents.items():
        now = fingerprint(found)
        if numbers.get(name, now) != now:
            raise ValueError(
                f"{checkpoint}: the documents are not those that this run {whats[name]} (was the data changed?), so "
                "what it held out cannot be told; name documents with --data"
            )
