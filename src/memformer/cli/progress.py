"""What a run shows while it works: one line that moves, on a terminal; lines, one after the other, elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..evaluation import HeldOut
from ..training import Callback, StepMetrics
from ..training.callbacks import Watched

__all__ = ["Lines", "Status", "duration", "shown"]

PATIENCE = 10.0
"""Seconds without a word, after which a line is printed about work that reports how far it is."""
NARROWEST_BAR = 12
"""Columns; where fewer are left there is no bar."""


def duration(seconds: float) -> str:
    """0:07, 1:02:03 or 3 d 4 h."""
    hours, rest = divmod(round(seconds), 3600)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


@contextlib.contextmanager
def shown(steps: int) -> Iterator[Lines]:
    """Show what a run of so many steps tells its callbacks, to whatever standard output is."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        yield Lines(steps)
        return
    status = Status(steps)
    console = Console(highlight=False, markup=False)
    live = Live(
        console=console,
        get_renderable=lambda: Text(status.line(console.width - 1), no_wrap=True, overflow="crop"),
        refresh_per_second=4,
        transient=True,
    )
    live.start()
    try:
        yield status
    finally:
        with contextlib.suppress(OSError):  # the terminal may be gone
            live.stop()


class Lines(Callback):
    """A line for each line of metrics, and some in between where work takes long.

    Attributes:
        unheard: whether whoever read the output has left, as ``head`` does; the run then saves and stops.
    """

    def __init__(self, steps: int):
        self.steps, self.unheard = steps, False
        self._run: Watched | None = None
        self._phase, self._spoken = "", time.monotonic()

    def say(self, line: str) -> None:
        """Print a line, if anyone listens."""
        self._spoken = time.monotonic()
        try:
            print(line, flush=True)
        except BrokenPipeError:
            self.unheard = True
            if self._run is not None:
                self._run.stop()
        except (OSError, ValueError):  # a terminal that is gone, a full disk: no reason to end a training
            pass

    def start(self, run: Watched) -> None:
        self._run = run

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        new, self._phase = name != self._phase, name
        if name == "training":
            return
        if (new and self._run is None and name != "reading") or time.monotonic() - self._spoken > PATIENCE:
            self.say(f"{name}{_share(done, total)} ...")

    def metrics(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        place = f"{metrics.step:>6}/{self.steps}"
        if isinstance(metrics, HeldOut):
            self.say(f"{place}  held out: {metrics.loss_nats:.4f} nats, {metrics.bits_per_token:.4f} bits/token")
        elif isinstance(metrics, StepMetrics):
            self._step(place, metrics)

    def _step(self, place: str, metrics: StepMetrics) -> None:
        left = "" if metrics.seconds_left is None else f"  {duration(metrics.seconds_left)} left"
        self.say(
            f"{place}  {metrics.loss_nats:.3f} nats  {metrics.bits_per_token:.3f} bits/token  "
            f"{metrics.tokens_per_second:,.0f} tokens/s  gradient {metrics.gradient_norm:.2f}  "
            f"rate {metrics.learning_rate:.1e}{left}"
        )

    def sample(self, text: str, step: int) -> None:
        short = text if len(text) <= 60 else text[:57] + "..."
        self.say(f"{step:>6}/{self.steps}  sample: {short!r}")


class Status(Lines):
    """The line that moves: where the run is, or what it does beside training."""

    def __init__(self, steps: int):
        super().__init__(steps)
        self._done, self._total, self._since = 0, steps, time.monotonic()
        self._share: tuple[int, int | None] = (0, None)
        self._last: StepMetrics | None = None
        self._last_at = 0.0

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        if name != self._phase:
            self._phase, self._since = name, time.monotonic()
        self._share = (done, total)
        if name == "training":
            self._done = done

    def _step(self, place: str, metrics: StepMetrics) -> None:
        self._last, self._last_at = metrics, time.monotonic()

    def line(self, width: int) -> str:
        """What fits of it, by what matters most; never more than ``width`` columns."""
        now, last = time.monotonic(), self._last
        training = self._phase == "training"
        parts: dict[str, str] = {}
        if training or self._run is not None:
            parts["step"] = f"{self._done}/{self.steps}"
            parts["percent"] = f"{self._done / self.steps:.0%}"
        if not training:
            parts["doing"] = f"{self._phase}{_share(*self._share)}, {duration(now - self._since)}"
        if training and last is None:
            parts["left"] = f"{duration(now - self._since)} since the start"
        if last is not None:
            parts["loss"] = f"{last.loss_nats:.3f} nats"
            parts["speed"] = f"{last.tokens_per_second:,.0f} tokens/s"
            if last.seconds_left is not None:
                parts["left"] = f"{duration(max(0.0, last.seconds_left - (now - self._last_at)))} left"
        kept: set[str] = set()
        for name in ("step", "doing", "left", "loss", "percent", "speed"):
            if name in parts and sum(len(parts[k]) + 2 for k in kept) + len(parts[name]) <= width:
                kept.add(name)
        texts = [text for name, text in parts.items() if name in kept]
        bar = width - len("  ".join(texts)) - 4
        if "percent" in kept and bar >= NARROWEST_BAR:
            filled = bar * self._done // self.steps
            texts.insert(2, f"[{'#' * filled}{'.' * (bar - filled)}]")
        return "  ".join(texts)[:width]


def _share(done: int, total: int | None) -> str:
    """How far work is, where that is known."""
    if total is not None and total > 0:
        return f" {done / total:.0%}" if total > 9999 else f" {done}/{total}"
    return f" {done:,}" if done else ""
