"""What a run measures, and its own record of it: ``metrics.jsonl``."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import plural
from ..data.objectives import Objective
from ..data.tokenizers import Tokenizer
from ..evaluation import Depth, HeldOut
from ..files import replace_file

__all__ = [
    "ByObjective",
    "Changed",
    "MetricsLog",
    "Pace",
    "StepMetrics",
    "as_json",
    "held_out_at",
    "read_metrics",
    "scalars",
]


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics: averages since the previous line, unless marked as the last step's, or as of the whole run.

    A number that is not finite is null in the file. Of steps that were left out because their loss is not finite, no
    loss counts.
    """

    step: int
    loss_nats: float
    bits_per_token: float
    tokens_per_second: float
    learning_rate: float
    """The last step's."""
    gradient_norm: float
    """The last step's, before clipping."""
    horizon: int
    """The last step's."""
    memory_gradient: float | None
    """How far credit reaches: the gradient's norm at the memory before the last rollout's second segment, divided by
    the norm before its last segment. None where a rollout has fewer than three segments, and where it runs all layers
    of a causal model at once."""
    self_attention: float
    """The share of the writing attention that slots give themselves, in the last segment: 1 keeps all, 0 nothing."""
    slot_diversity: float
    """1 - the mean cosine of two slots: 0 where all hold the same."""
    skipped: int = 0
    """Steps since the run began that changed nothing, because their gradient was not finite."""
    tokens_seen: int = 0
    """Targets that counted since the run began."""
    epoch: float = 0.0
    """How many times the training documents were gone through since the run began; a document counts by its share."""
    wall_seconds: float = 0.0
    """Time that the run has trained, evaluated and saved, over all its resumes; not the time between them."""
    seconds_left: float | None = None
    """To the last step, at the pace of the last ten lines, evaluations and checkpoints included."""
    continuation_nats: float | None = None
    """The loss per token of the continued targets; this and the next two are None without a mixture of objectives."""
    infilling_nats: float | None = None
    recall_nats: float | None = None
    peak_memory_bytes: int | None = None
    """The most that the first process's tensors took on its card since it started; None without CUDA."""


@dataclass(frozen=True)
class Changed:
    """What a resumed run changed on purpose."""

    step: int
    """From which on."""
    settings: dict[str, tuple[object, object]]
    """By name, the former value and the new one."""


def scalars(metrics: StepMetrics | HeldOut) -> dict[str, float]:
    """The numbers of a line by name, without its step and what was not measured: what loggers draw."""
    plain = dataclasses.asdict(metrics)
    return {k: v for k, v in plain.items() if isinstance(v, (int, float)) and k != "step"}


class ByObjective:
    """The loss of each :class:`~memformer.data.objectives.Objective`, added up on the device, without waiting for it.

    Those of a step, ``of_step``, are kept at its end, or they are not: see :meth:`end_step`.

    Args:
        tokenizer: whose special tokens begin the objectives' targets.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device):
        starts = torch.zeros(tokenizer.vocabulary, dtype=torch.long, device="cpu")
        starts[tokenizer.infill], starts[tokenizer.recall] = Objective.INFILLING, Objective.RECALL
        self._starts = starts.to(device)
        self.sums = torch.zeros(2, len(Objective), dtype=torch.float32, device=device)
        self.of_step = torch.zeros_like(self.sums)

    def add(self, tgt: Tensor, losses: Tensor, counted: Tensor) -> None:
        """Targets (rows, tokens), the losses of their tokens, and which of these count."""
        self.add_to(self.of_step, tgt, losses, counted)

    def add_to(self, sums: Tensor, tgt: Tensor, losses: Tensor, counted: Tensor) -> None:
        """The same, added to other sums: where a step is captured, those of this step are an input and an output."""
        objective = self._starts[tgt[:, 0]]
        sums[0].index_add_(0, objective, losses.detach().sum(1, dtype=sums.dtype))
        sums[1].index_add_(0, objective, counted.sum(1, dtype=sums.dtype))

    def end_step(self, counts: bool | Tensor) -> None:
        """Keep what was added since the step before, where it counts; a tensor says so without being waited for."""
        if isinstance(counts, Tensor):
            self.sums += torch.where(counts, self.of_step, 0)
        elif counts:
            self.sums += self.of_step
        self.of_step = torch.zeros_like(self.of_step)

    def take(self, sums: Tensor) -> dict[str, float | None]:
        """The means by their names in :class:`StepMetrics`, given the sums of all processes; it then starts anew."""
        nats, counts = sums.tolist()
        self.sums = torch.zeros_like(self.sums)
        return {f"{o.name.lower()}_nats": nats[o] / counts[o] if counts[o] else None for o in Objective}


class Pace:
    """How long a run will take, by its last lines.

    Args:
        step, seconds: where it starts.
    """

    def __init__(self, step: int, seconds: float):
        self._marks = collections.deque([(step, seconds)], maxlen=11)
        self._first = True

    def left(self, step: int, seconds: float, steps: int) -> float | None:
        """Seconds from here to the last step; None before there is a step to judge by."""
        (before, began) = self._marks[0]
        left = None if step <= before else (steps - step) * (seconds - began) / (step - before)
        if self._first:  # the first step warms up: later ones are not judged by it
            self._marks.clear()
            self._first = False
        self._marks.append((step, seconds))
        return left


class MetricsLog:
    """Appends metrics to ``OUT/metrics.jsonl``, after those of its first ``step`` steps; what a lost step wrote goes.

    So do its samples, in ``OUT/samples.jsonl``.

    Each line is JSON as other programs read it: a number that is not finite becomes null.

    Args:
        again: the events of the last of these steps that will be written again.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, out: Path, step: int, again: Collection[str] = ()):
        self._file = out / "metrics.jsonl"
        for file in (self._file, out / "samples.jsonl"):
            if file.is_file():
                lines = [line for line in _lines(file) if line["step"] <= step]
                kept = [line for line in lines if line["step"] < step or line.get("event") not in again]
                replace_file(file, "".join(as_json(line) for line in kept))

    def write(self, event: str, metrics: StepMetrics | HeldOut | Changed) -> None:
        """One more line, of an event such as "step"."""
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(as_json({"event": event, **dataclasses.asdict(metrics)}))
        except OSError as error:
            raise OSError(f"{self._file}: cannot be written ({error}); the checkpoints are untouched") from error


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; a line that is not whole is left out, with a warning.

    Raises:
        FileNotFoundError: there is no such file.
    """
    file = out / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{out}: no metrics.jsonl there, which every run writes")
    return _lines(file)


def held_out_at(out: Path, step: int) -> HeldOut | None:
    """The evaluation after a step, from a run's ``metrics.jsonl``; None where it is not there."""
    file, names = out / "metrics.jsonl", {f.name for f in dataclasses.fields(HeldOut)}
    for line in reversed(_lines(file) if file.is_file() else []):
        if line.get("event") == "held_out" and line["step"] == step and names <= line.keys():
            depths = tuple(Depth(*depth) for depth in line["by_depth"])
            return HeldOut(**{**{name: line[name] for name in names}, "by_depth": depths})
    return None


def _lines(file: Path) -> list[dict[str, Any]]:
    found, bad = [], []
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line) if line.strip() else None
        except ValueError:
            values = ()
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
        elif values is not None and number < len(lines):  # the last one a killed process was writing
            bad.append(number)
    if bad:
        lines_left = plural(len(bad), "line")
        warnings.warn(f"{file}: {lines_left}, the first is line {bad[0]}, left out: not metrics", stacklevel=3)
    return found


def as_json(values: dict[str, Any]) -> str:
    """A line of JSON that any program reads: null for a number that is not finite."""
    return json.dumps(_finite(values), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Plain data with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
