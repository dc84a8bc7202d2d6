"""memformer train."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import checkpoints
from ..config import TrainingConfig
from ..data import Document, order2_bits_per_byte, xz_bits_per_byte
from ..training import Run, StepMetrics, evaluate
from .generate import GenerateCommand, write

__all__ = ["run"]


def run(settings: TrainingConfig) -> int:
    training_run = Run(settings)
    source = "the Python standard library" if not settings.data else ", ".join(map(str, settings.data))
    training, held_out = (
        f"{len(d):,} documents ({_size(d):,} bytes)" for d in (training_run.training, training_run.held_out)
    )
    print(f"data        {source}: {training} to train on, {held_out} held out")
    parameters = sum(p.numel() for p in training_run.model.parameters())
    print(
        f"model       {parameters:,} parameters, {settings.slots} memory slots of {settings.dim}, on {training_run.device}"
    )
    start = f", from step {training_run.step:,}" if training_run.step else ""
    rollouts = f"{settings.lanes} lanes x {settings.horizon} segments x {settings.segment_length} bytes"
    print(f"training    {settings.steps:,} steps of {rollouts}{start}; metrics in {settings.out / 'metrics.jsonl'}")
    with _stopping(training_run), _progress(settings, training_run.step) as show:
        for metrics in training_run.train():
            show(metrics)
    if training_run.step < settings.steps:
        print(
            f"\nstopped and saved at step {training_run.step:,}. Go on with:\n  memformer train --resume --out {settings.out}"
        )
        return 130
    result = evaluate(training_run.model, training_run.held_out)
    training_run.log("held_out", result)
    texts = [document.text for document in training_run.held_out]
    order2, xz = order2_bits_per_byte((d.text for d in training_run.training), texts), xz_bits_per_byte(texts)
    print(f"\nheld out    {result.tokens:,} bytes of {result.documents} documents, in bits per byte:")
    print(f"  this model          {result.bits_per_byte:.3f}")
    print(f"  order-2 byte model  {order2:.3f}   (counts over the training documents)")
    print(f"  xz                  {xz:.3f}   (the held-out documents in one stream)")
    if settings.sample_bytes:
        print("\nsample")
        write(
            training_run.model,
            GenerateCommand(checkpoint=settings.out, prompt="def ", max_new_tokens=settings.sample_bytes),
        )
    print(f"\ncheckpoint  {checkpoints.newest(settings.out)}. Try:")
    print(f"  memformer generate --checkpoint {settings.out} --prompt 'def main('")
    return 0


@contextlib.contextmanager
def _stopping(run: Run) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) lets the step under way end and be saved; a second one interrupts at once."""

    def stop(number: int, frame: Any) -> None:
        run.stop()
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(settings: TrainingConfig, step: int) -> Iterator[Callable[[StepMetrics], None]]:
    """A bar on a terminal, plain lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        yield lambda metrics: print(_line(metrics, settings.steps), flush=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=settings.steps, completed=step)
        yield lambda m: bar.update(task, completed=m.step, description=_numbers(m))


def _numbers(metrics: StepMetrics) -> str:
    return (
        f"{metrics.loss_nats:.3f} nats  {metrics.bits_per_byte:.3f} bits/byte  "
        f"{metrics.tokens_per_second:,.0f} bytes/s  gradient {metrics.gradient_norm:.2f}"
    )


def _line(metrics: StepMetrics, steps: int) -> str:
    return f"{metrics.step:>6}/{steps}  {_numbers(metrics)}  rate {metrics.learning_rate:.1e}"


def _size(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)
