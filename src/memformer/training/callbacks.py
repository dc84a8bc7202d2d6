"""What looks on while a run trains: loggers, displays, whatever a user writes. It is told, and changes nothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..evaluation import HeldOut
from ..settings import TrainingConfig
from .metrics import StepMetrics
from .parts import Parts

__all__ = ["Callback", "Callbacks", "Report", "Watched", "nothing"]


class Report(Protocol):
    """What long work calls as it goes on: ``report("encoding", 3, 12)``; a total of None is not known."""

    def __call__(self, name: str, done: int = 0, total: int | None = None) -> None: ...


def nothing(name: str, done: int = 0, total: int | None = None) -> None:
    """A :class:`Report` to nobody."""


class Watched(Protocol):
    """What a callback sees of its :class:`~memformer.training.Run`."""

    settings: TrainingConfig
    parts: Parts

    @property
    def step(self) -> int:
        """How many steps were taken."""

    def stop(self) -> None:
        """Save and end after the next step."""


class Callback:
    """Override what you want to hear of; each method does nothing by itself. Of several processes the first one calls.

    An exception in :meth:`start` ends the run before its first step. Later ones are warned of once, and the callback is
    left out from then on: training goes on.
    """

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """What the run does now: reading, training a BPE, encoding, training, evaluating, sampling, saving.

        It comes again as that goes on, after each step with "training", and before :meth:`start` already. A total of
        None is not known.
        """

    def start(self, run: Watched) -> None:
        """Training begins, or goes on after ``run.step`` steps; lines of later steps, which were lost, come again."""

    def metrics(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        """One more line of metrics; the event is "step" or "held_out"."""

    def sample(self, text: str, step: int) -> None:
        """What the model writes after that many steps."""

    def checkpoint(self, folder: Path) -> None:
        """A checkpoint was written."""

    def end(self, run: Watched) -> None:
        """Training ended: done, stopped, or by an exception."""


class Callbacks(Callback):
    """Several callbacks as one, each of which may fail without the run."""

    def __init__(self, callbacks: Sequence[Callback] = ()):
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ValueError(
                    f"callbacks: expected objects of a class derived from memformer.training.Callback, got {callback!r}"
                )
        self._active = list(callbacks)

    def start(self, run: Watched) -> None:
        given, self._active = self._active, []
        try:
            for callback in given:
                callback.start(run)
                self._active.append(callback)
        except BaseException:
            self.end(run)  # of those that had started
            raise

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        self._tell("phase", name, done, total)

    def metrics(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        self._tell("metrics", event, metrics)

    def sample(self, text: str, step: int) -> None:
        self._tell("sample", text, step)

    def checkpoint(self, folder: Path) -> None:
        self._tell("checkpoint", folder)

    def end(self, run: Watched) -> None:
        self._tell("end", run)

    def _tell(self, method: str, *arguments: object) -> None:
        for callback in list(self._active):
            try:
                getattr(callback, method)(*arguments)
            except Exception as error:
                self._active.remove(callback)
                warnings.warn(
                    f"{type(callback).__name__} is switched off, for its {method}() failed ({type(error).__name__}: "
                    f"{error}); training goes on",
                    stacklevel=2,
                )
