"""Metrics in other programs: TensorBoard, Weights & Biases, trackio. Each is imported only where it is asked for."""

from __future__ import annotations

import html
import importlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..evaluation import HeldOut
from ..files import replace_file
from ..settings import TrainingConfig, to_flat
from .callbacks import Callback, Watched
from .metrics import StepMetrics, scalars

__all__ = ["TensorBoardLogger", "TrackioLogger", "WandbLogger", "loggers"]


def loggers(settings: TrainingConfig) -> list[Callback]:
    """Those that settings name.

    Raises:
        ValueError: one is not installed; the message has the command.
    """
    names = {*settings.output.loggers, *(["tensorboard"] if settings.output.tensorboard else [])}
    return [make() for name, make in _LOGGERS.items() if name in names]


class TensorBoardLogger(Callback):
    """Writes OUT/tensorboard: the metrics as curves, hyper-parameters, samples as text.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        self._library = _library("tensorboard", "torch.utils.tensorboard")
        self._writer: Any = None

    def start(self, run: Watched) -> None:
        from torch.utils.tensorboard.summary import hparams

        folder = run.settings.out / "tensorboard"
        self._writer = self._library.SummaryWriter(str(folder), purge_step=run.step + 1)
        # Not by add_hparams, which writes them into a folder of their own, beside the curves they belong to.
        for summary in hparams(_plain(run.settings), {"held_out/loss_nats": None, "step/loss_nats": None}):
            self._writer.file_writer.add_summary(summary)

    def metrics(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        for name, value in scalars(metrics).items():
            self._writer.add_scalar(f"{event}/{name}", value, metrics.step)

    def sample(self, text: str, step: int) -> None:
        self._writer.add_text("sample", f"<pre>{html.escape(text)}</pre>", step)

    def end(self, run: Watched) -> None:
        self._writer.close()


class WandbLogger(Callback):
    """Weights & Biases, with its own settings (WANDB_PROJECT, WANDB_MODE=offline, ...); a resumed run goes on there.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self) -> None:
        self._library = _library("wandb", "wandb")
        self._run: Any = None

    def start(self, run: Watched) -> None:
        out = run.settings.out
        self._run = self._library.init(
            project=os.environ.get("WANDB_PROJECT", "memformer"),
            name=out.resolve().name,
            id=_identity(out, "wandb"),
            resume="allow",
            config=_plain(run.settings),
            allow_val_change=True,  # as of the number of steps
        )
        # Its own count of steps may not go back, as that of a resumed run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def metrics(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        self._run.log({"step": metrics.step, **{f"{event}/{name}": x for name, x in scalars(metrics).items()}})

    def sample(self, text: str, step: int) -> None:
        self._run.log({"step": step, "sample": self._library.Html(f"<pre>{html.escape(text)}</pre>")})

    def end(self, run: Watched) -> None:
        self._run.finish()


class TrackioLogger(Callback):
    """trackio, with its own settings; a resumed run goes on there.

    Raises:
        ValueError: trackio is not installed.
    """

    def __init__(self) -> None:
        self._library = _library("trackio", "trackio")
        self._run: Any = None

    def start(self, run: Watched) -> None:
        out = run.settings.out
        name = f"{out.resolve().name}-{_identity(out, 'trackio')}"
        project = os.environ.get("TRACKIO_PROJECT", "memformer")
        self._run = self._library.init(project=project, name=name, resume="allow", config=_plain(run.settings))

    def metrics(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        self._run.log({f"{event}/{name}": x for name, x in scalars(metrics).items()}, step=metrics.step)

    def sample(self, text: str, step: int) -> None:
        self._run.log({"sample": self._library.Markdown(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def end(self, run: Watched) -> None:
        self._run.finish()


_LOGGERS: dict[str, Callable[[], Callback]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "trackio": TrackioLogger,
}


def _library(extra: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{extra}: not installed; pip install 'memformer-replay[{extra}]'") from error


def _identity(out: Path, name: str) -> str:
    """By which a logger knows a run again after a resume; kept in the run's folder."""
    file = out / f"{name}-run.txt"
    if not file.is_file():
        replace_file(file, secrets.token_hex(4) + "\n")
    return file.read_text(encoding="utf-8").strip()


def _plain(settings: TrainingConfig) -> dict[str, int | float | str | bool]:
    """Settings as loggers take them: lists and None as text."""
    return {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in to_flat(settings).items()}
