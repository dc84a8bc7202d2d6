"""memformer train."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data import Document, order2_bits_per_byte, xz_bits_per_byte
from ..data.corpora import limited
from ..evaluation import HeldOut
from ..parallel import joined
from ..settings import RECIPES, TrainingConfig, read_yaml
from ..training import Run, StepMetrics, checkpoints, saved_settings, shards
from . import models
from .evaluate import describe
from .generate import GenerateCommand, write

__all__ = ["TrainCommand", "defaults", "run"]

HANDED_ON_SECONDS = 10
"""A signal that comes again within so many seconds is the same one, handed on by a launcher."""

ORDER2_BYTES = 50_000_000
"""The order-2 model counts over at most this much training text."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainingConfig):
    """Train on long documents by memory replay, with the memory carried from rollout to rollout.

    Flags override --config, which overrides --recipe. Under torchrun the same command uses all processes.
    """

    recipe: Literal["tiny", "paper-v1", "paper-v2"] = "tiny"
    """Settings to start from, by name."""
    config: Path | None = None
    """A YAML file of settings, such as the run.yaml that every run leaves in its --out."""
    verify: bool = False
    """First compare the gradients of replay with those of plain autograd on three segments; if they differ, stop."""

    def settings(self) -> TrainingConfig:
        """The settings alone, without where they came from."""
        return TrainingConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrainingConfig)})


def defaults(arguments: Sequence[str]) -> TrainCommand:
    """What the flags change: the settings of the resumed run, of the YAML file, or of the recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--out", type=Path, default=TrainingConfig.out)
    parser.add_argument("--resume", action="store_true")
    try:
        given, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return TrainCommand()  # the real parser says what is wrong
    if {"-h", "--help"} & set(arguments) or given.recipe not in RECIPES:
        return TrainCommand()
    settings = RECIPES[given.recipe]
    if given.config is not None:
        settings = read_yaml(given.config, settings)
    if given.resume:
        if given.config is not None or given.recipe != "tiny":
            raise ValueError("--resume goes on with the settings saved in --out: leave --config and --recipe out")
        settings = dataclasses.replace(saved_settings(given.out), out=given.out)
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return TrainCommand(**{**values, "resume": False}, recipe=given.recipe, config=given.config)


def run(command: TrainCommand) -> int:
    """Train, or go on training; returns the exit status, 130 for a run that was stopped and saved."""
    with joined(command.device, command.compute.timeout):
        training_run = Run(command.settings())
        if command.verify:
            _verify(training_run)
        return _lead(training_run) if not training_run.parts.ranks.rank else _follow(training_run)


def _verify(training_run: Run) -> None:
    verdict = training_run.verify()
    if not training_run.parts.ranks.rank:
        print(verdict)
    if not verdict.ok:
        raise ValueError("verify: replay is wrong for this model, as printed above, so nothing was trained")


def _follow(training_run: Run) -> int:
    """A process that is not the first one does the same work and says nothing."""
    with _stopping(training_run):
        for _ in training_run.train():
            pass
    return 130 if _interrupted(training_run) else 0


def _lead(training_run: Run) -> int:
    settings = training_run.settings
    for reason in training_run.parts.refused:
        print(f"refused     {reason}; going on from the one before")
    source = "the Python standard library" if not settings.data else ", ".join(map(str, settings.data))
    training, held_out = (f"{len(d):,} documents ({_size(d)})" for d in (training_run.training, training_run.held_out))
    print(f"data        {source}: {training} to train on, {held_out} held out")
    parameters = sum(p.numel() for p in training_run.model.parameters())
    ranks = training_run.parts.ranks
    where = f"{training_run.parts.device}" + (
        f", {ranks.size} processes ({settings.compute.parallel})" * (ranks.size > 1)
    )
    slots = f"{settings.model.slots} memory slots of {settings.model.dim}"
    print(f"model       {parameters:,} parameters, {training_run.tokenizer.vocabulary:,} tokens, {slots}, on {where}")
    shape = settings.rollout
    rollouts = f"{shape.lanes} lanes x {shape.horizon} segments x {shape.segment_length} tokens"
    start = f", from step {training_run.step:,}" if training_run.step else ""
    print(f"training    {settings.steps:,} steps of {rollouts}{start}; metrics in {settings.out / 'metrics.jsonl'}")
    with _stopping(training_run), _progress(settings, training_run.step) as show:
        for metrics in training_run.train():
            show(metrics)
            if isinstance(metrics, HeldOut):
                result = metrics
    if _interrupted(training_run):
        again = f"memformer train --resume --out {settings.out}"
        print(f"\nstopped and saved at step {training_run.step:,}. Go on with:\n  {again}")
        return 130
    if training_run.stopped_early:
        assert training_run.best is not None
        best = f"the best evaluation was at step {training_run.best['step']:,}, see {settings.out / 'best'}"
        print(f"\nstopped early at step {training_run.step:,}: {best}")
    _report(training_run, result)
    prompt = "" if settings.data else " --prompt 'def main('"
    print(f"\ncheckpoint  {checkpoints.newest(settings.out)}. Try:")
    print(f"  memformer generate --checkpoint {settings.out}{prompt}")
    return 0


def _interrupted(training_run: Run) -> bool:
    return training_run.step < training_run.settings.steps and not training_run.stopped_early


def _report(training_run: Run, result: HeldOut) -> None:
    """How well the model does on held-out documents, beside two yardsticks where they are text; and a sample."""
    settings = training_run.settings
    print(f"\nheld out    {result.tokens:,} tokens of {result.documents} documents")
    if result.bits_per_byte is None:
        print(f"  this model          {result.perplexity:.3f} perplexity, {result.bits_per_token:.3f} bits per token")
    else:
        texts = [bytes(document) for document in training_run.held_out]
        counted = limited(training_run.training, ORDER2_BYTES)
        order2 = order2_bits_per_byte((bytes(d) for d in counted), texts)
        over = "the" if len(counted) == len(training_run.training) else f"the first {ORDER2_BYTES:,} bytes of the"
        print(f"  this model          {result.bits_per_byte:.3f} bits per byte")
        print(f"  order-2 byte model  {order2:.3f}   (counts over {over} training documents)")
        print(f"  xz                  {xz_bits_per_byte(texts):.3f}   (the held-out documents in one stream)")
    print(describe(result))
    # A model that is divided among processes may be too large for one.
    if settings.output.sample_tokens and not shards.divided(training_run.parts):
        prompt, length = "" if settings.data else "def ", settings.output.sample_tokens
        sample = GenerateCommand(checkpoint=settings.out, prompt=prompt, max_new_tokens=length, device=settings.device)
        print("\nsample")
        # As it was saved: under FSDP the model at hand is in parts, and the other processes have left.
        write(*models.load(settings.out, str(training_run.parts.device)), sample)


@contextlib.contextmanager
def _stopping(training_run: Run) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) finishes and saves the step under way; a second one interrupts at once.

    A launcher hands its signals on to the processes, which a terminal or SLURM has told already: that is one signal.
    """
    told: dict[int, float] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        training_run.stop()
        first = told.setdefault(number, time.monotonic())
        if training_run.parts.ranks.size == 1:
            signal.signal(number, signal.default_int_handler)
        elif time.monotonic() - first > HANDED_ON_SECONDS:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(settings: TrainingConfig, step: int) -> Iterator[Callable[[StepMetrics | HeldOut], None]]:
    """A bar on a terminal, plain lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        yield lambda metrics: print(_line(metrics, settings.steps), flush=True)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=settings.steps, completed=step)

        def show(metrics: StepMetrics | HeldOut) -> None:
            if isinstance(metrics, HeldOut):
                bar.console.print(_line(metrics, settings.steps), highlight=False)
            else:
                bar.update(task, completed=metrics.step, description=_numbers(metrics))

        yield show


def _numbers(metrics: StepMetrics) -> str:
    return (
        f"{metrics.loss_nats:.3f} nats  {metrics.bits_per_token:.3f} bits/token  "
        f"{metrics.tokens_per_second:,.0f} tokens/s  gradient {metrics.gradient_norm:.2f}"
    )


def _line(metrics: StepMetrics | HeldOut, steps: int) -> str:
    if isinstance(metrics, HeldOut):
        held_out = f"{metrics.loss_nats:.4f} nats, {metrics.bits_per_token:.4f} bits/token"
        return f"{metrics.step:>6}/{steps}  held out: {held_out}"
    return f"{metrics.step:>6}/{steps}  {_numbers(metrics)}  rate {metrics.learning_rate:.1e}"


def _size(documents: Sequence[Document]) -> str:
    unit = "bytes" if all(document.text for document in documents) else "ids"
    return f"{sum(len(document) for document in documents):,} {unit}"
