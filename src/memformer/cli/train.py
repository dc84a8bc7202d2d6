"""memformer train."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from ..checks import plural
from ..data import Document, Tokenizer, folders, order2_bits_per_byte, xz_bits_per_byte
from ..data.documents import limited
from ..evaluation import HeldOut, evaluate
from ..interface import SegmentModel
from ..parallel import Ranks, joined
from ..pretrained import divided
from ..settings import RECIPES, TrainingConfig, build, read_yaml, to_plain
from ..training import Run, checkpoints, last_settings, sized_as
from ..training.metrics import held_out_at
from ..training.parts import trained
from . import models
from .evaluate import describe, perplexity
from .generate import GenerateCommand, write
from .output import complain, if_heard, let_go
from .progress import duration, shown
from .typed import check_typed

__all__ = ["TrainCommand", "check_typed", "defaults", "run"]

HANDED_ON_SECONDS = 10
"""A signal that comes again within so many seconds is the same one, handed on by a launcher."""

_OF_ONE_START = ("resume", "auto_resume", "new_data")
"""What no file of settings says, for it is not of a run but of one command."""

ORDER2_BYTES = 50_000_000
"""The order-2 model counts over at most this much training text."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainingConfig):
    """Train on long documents by memory replay, with the memory carried from rollout to rollout.

    Flags override --config, which overrides --recipe. Under torchrun the same command uses all processes.
    """

    recipe: Literal["tiny", "paper-v1", "paper-v2", "causal-tiny", "causal"] = "tiny"
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
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--auto-resume", "--auto_resume", action="store_true")
    parser.add_argument("--init-from", "--init_from", type=Path)
    try:
        given, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return TrainCommand()  # the real parser says what is wrong
    if {"-h", "--help"} & set(arguments) or given.recipe not in RECIPES:
        return TrainCommand()
    if given.resume and (given.config is not None or given.recipe != "tiny"):
        raise ValueError("--resume goes on with the settings saved in --out: leave --config and --recipe out")

    def with_file(settings: TrainingConfig) -> TrainingConfig:
        if given.config is None:
            return settings
        read = read_yaml(given.config, settings)
        for name in _OF_ONE_START:
            if getattr(read, name):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{given.config}: {name}: is said of one start alone; give {flag} on the command line")
        return read

    settings = RECIPES[given.recipe]
    out = given.out or with_file(settings).out
    if given.resume or (given.auto_resume and checkpoints.newest(out) is not None):
        # What is given again, the recipe and the file included, is what was given on purpose.
        recipe = _differences(to_plain(RECIPES["tiny"]), to_plain(settings))
        settings = build(TrainingConfig, recipe, base=last_settings(out))
    elif given.init_from is not None:
        settings = sized_as(settings, given.init_from)
    settings = dataclasses.replace(with_file(settings), out=out)
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return TrainCommand(**{**values, **dict.fromkeys(_OF_ONE_START, False)}, recipe=given.recipe, config=given.config)


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, object]:
    """What is another value in ``now``, nested as they are."""
    found: dict[str, object] = {}
    for name, value in now.items():
        old = before[name]
        if isinstance(value, dict) and isinstance(old, dict):
            found[name] = _differences(old, value)
        elif value != old:
            found[name] = value
    return found


def run(command: TrainCommand) -> int:
    """Train, or go on training; returns the exit status.

    130: a run that was stopped and saved; 141: the same, because whoever read the output has left.
    """
    with joined(command.device, command.compute.timeout):
        return _follow(command) if Ranks().rank else _lead(command)


def _follow(command: TrainCommand) -> int:
    """A process that is not the first one does the same work and says nothing."""
    warnings.filterwarnings("ignore", "(files|rows|documents) left out")  # the first one says it
    training_run = Run(command.settings())
    if command.verify:
        _verify(training_run)
    with _stopping(training_run):
        for _ in training_run.train():
            pass
    if _interrupted(training_run):
        return 130
    _tested(training_run)
    return 0


def _lead(command: TrainCommand) -> int:
    settings = command.settings()
    source = ", ".join(map(folders.shown, settings.data)) or "the Python standard library"
    with if_heard():
        print(f"reading     {source}")
    with shown(settings.steps) as display:
        training_run = Run(settings, callbacks=[display])
        if command.verify:
            _verify(training_run)
        with if_heard():
            print("\n".join(_introduction(training_run)))
        result: HeldOut | None = None
        with _stopping(training_run):
            for metrics in training_run.train():
                if isinstance(metrics, HeldOut):
                    result = _best(training_run, metrics)
        if _interrupted(training_run):
            return _stopped(training_run, display.unheard)
        if result is None:  # --auto-resume
            with if_heard():
                print(f"\n{_at_its_end(training_run)}")
            return 0
        display.phase("comparing")
        with contextlib.suppress(BrokenPipeError):  # the training is done and saved, whoever listens
            report = [*_report(training_run, result), *_tested(training_run)]
    with contextlib.suppress(BrokenPipeError), if_heard():
        print("\n".join(report), flush=True)
        _show_sample(training_run)
        print("\n" + "\n".join(_what_next(training_run)))
    let_go()
    return 0


def _verify(training_run: Run) -> None:
    verdict = training_run.verify()
    if not training_run.parts.ranks.rank:
        with if_heard():
            print(verdict)
    if not verdict.ok:
        raise ValueError("verify: replay is wrong for this model, as printed above, so nothing was trained")


def _introduction(training_run: Run) -> Iterator[str]:
    settings = training_run.settings
    for reason in training_run.parts.refused:
        yield f"refused     {reason}; going on from the one before"
    for change in training_run.parts.changes:
        yield f"changed     {change} from step {training_run.step:,} on"
    # With a limit, what is evaluated is not all that is kept from the training.
    limit, whole = settings.evaluation.eval_limit, training_run.parts.all_held_out
    limited_to = f", of which the first {limit:,} are evaluated" if 0 < limit < sum(map(len, whole)) else ""
    training, held_out = (
        f"{plural(len(d), 'document')} ({_size(d)})"
        for d in (training_run.training, whole if limited_to else training_run.held_out)
    )
    stretches = training_run.parts.stream.stretches
    cut = "" if stretches in (None, len(training_run.training)) else f" in {stretches:,} stretches"
    yield f"data        {training}{cut} to train on, {held_out} held out{_held_out_of(training_run)}{limited_to}"
    parameters = sum(p.numel() for p in training_run.model.parameters())
    ranks = training_run.parts.ranks
    where = f"{training_run.parts.device}" + (
        f", {ranks.size} processes ({settings.compute.parallel})" * (ranks.size > 1)
    )
    dim = getattr(training_run.model.config, "hidden_size", settings.model.dim)
    slots = f"{plural(settings.model.slots, 'memory slot')} of {dim}"
    if settings.around.base is not None:
        named = settings.around.base / (settings.around.gguf or "")
        count, how = sum(p.numel() for _, p in trained(training_run.model)), settings.around.trained
        what = "trained" if how == "all" else "frozen" if how == "memory" else "frozen under a LoRA"
        yield f"base        {named}, {what}; {count:,} parameters are trained"
    yield f"model       {parameters:,} parameters, {training_run.tokenizer.vocabulary:,} tokens, {slots}, on {where}"
    shape = settings.rollout
    rollouts = " x ".join(
        [plural(shape.lanes, "lane"), plural(shape.horizon, "segment"), plural(shape.segment_length, "token")]
    )
    start = f", from step {training_run.step:,}" if training_run.step else ""
    if training_run.parts.changes:
        start += f" at a learning rate of {training_run.learning_rate(training_run.step):.1e}"
    steps = plural(settings.steps, "step")
    yield f"training    {steps} of {rollouts}{start}; metrics in {settings.out / 'metrics.jsonl'}"


def _at_its_end(training_run: Run) -> str:
    """A run that has nothing left to do says what would go on with it."""
    step, steps = training_run.step, training_run.settings.steps
    if step < steps:
        return f"stopped early at step {step:,} of {steps:,}; a higher --patience goes on"
    return f"finished    at step {step:,} already; more --steps go on"


def _stopped(training_run: Run, unheard: bool) -> int:
    """A run that is not at its end says how to go on; to whom, if whoever read the output has left?"""
    out, step = shlex.quote(str(training_run.settings.out)), training_run.step
    again = f"stopped and saved at step {step:,}. Go on with:\n  memformer train --resume --out {out}"
    if unheard:
        complain(f"whoever read the output has left: {again}")
        let_go()
        return 141
    with if_heard():
        print(f"\n{again}")
    let_go()
    return 130


def _held_out_of(training_run: Run) -> str:
    """Where the held-out documents come from, if not whole from the data."""
    given = training_run.settings.documents.held_out_data
    if given:
        return f" ({', '.join(map(folders.shown, given))})"
    cut = {d.name for d in training_run.held_out[:1]} & {d.name for d in training_run.training}
    return f" (the end of {cut.pop()})" if cut and len(training_run.held_out) == 1 else ""


def _best(training_run: Run, result: HeldOut) -> HeldOut:
    """The evaluation of the model that a user of the run's folder gets: of the best one, or else the newest."""
    settings, best = training_run.settings, training_run.best
    if not settings.evaluation.eval_every or best is None or best["step"] == result.step:
        return result
    return held_out_at(settings.out, best["step"]) or result


def _interrupted(training_run: Run) -> bool:
    return training_run.step < training_run.settings.steps and not training_run.stopped_early


def _report(training_run: Run, result: HeldOut) -> list[str]:
    """How well the model does on held-out documents, beside two yardsticks where they are text."""
    lines = []
    if training_run.stopped_early:
        lines += ["", f"stopped early at step {training_run.step:,}"]
    read = f"{plural(result.tokens, 'token')} of {plural(result.documents, 'document')}"
    best = "" if result.step == training_run.step else ", the best evaluation"
    lines += ["", f"held out    {read}, read by the model of step {result.step:,}{best}"]
    if result.bits_per_byte is None:
        numbers = f"{perplexity(result)} perplexity, {result.bits_per_token:.3f} bits per token"
        lines.append(f"  this model          {numbers}")
    elif not all(document.text for document in training_run.held_out):  # encoded ahead
        numbers = f"{result.bits_per_byte:.3f} bits per byte, {result.bits_per_token:.3f} per token"
        lines.append(f"  this model          {numbers}")
    else:
        texts = [bytes(document) for document in training_run.held_out]
        counted = limited(training_run.training, ORDER2_BYTES)
        order2 = order2_bits_per_byte((bytes(d) for d in counted), texts)
        over = "the" if len(counted) == len(training_run.training) else f"the first {ORDER2_BYTES:,} bytes of the"
        lines += [
            f"  this model          {result.bits_per_byte:.3f} bits per byte",
            f"  order-2 byte model  {order2:.3f}   (counts over {over} training documents)",
            f"  xz                  {xz_bits_per_byte(texts):.3f}   (the held-out documents in one stream)",
        ]
    lines.append(describe(result))
    return lines


def _show_sample(training_run: Run) -> None:
    """What the model writes. Where it cannot, the training is done all the same."""
    settings = training_run.settings
    # A model that is divided among processes may be too large for one.
    if not settings.output.sample_tokens or divided(training_run.model):
        return
    prompt, length = "" if settings.data else "def ", settings.output.sample_tokens
    sample = GenerateCommand(checkpoint=settings.out, prompt=prompt, max_new_tokens=length, device=settings.device)
    print("\nsample")
    try:
        # As it was saved: under FSDP the model at hand is in parts, and the other processes have left.
        write(*_saved(training_run), sample)
    except BrokenPipeError:
        raise
    except Exception as error:
        complain(f"no sample ({type(error).__name__}: {error})")


def _saved(training_run: Run) -> tuple[SegmentModel, Tokenizer]:
    """The model of the best checkpoint, which may have been written before the base moved."""
    settings = training_run.settings
    base = None if settings.around.train_base else settings.around.base  # a base that was trained is in the checkpoint
    return models.load(checkpoints.find(settings.out), str(training_run.parts.device), base=base)


def _what_next(training_run: Run) -> list[str]:
    settings, progress = training_run.settings, training_run.parts.progress
    epochs = f"{training_run.parts.stream.epochs_read:.2f} times the training documents"
    prompt = "" if settings.data else " --prompt 'def main('"
    return [
        f"took        {duration(progress.seconds)} for {plural(progress.tokens, 'token')}, {epochs}",
        f"checkpoint  {models.described(settings.out, checkpoints.find(settings.out))}. Try:",
        f"  memformer generate --checkpoint {shlex.quote(str(settings.out))}{prompt}",
    ]


def _tested(training_run: Run) -> list[str]:
    """How well the best checkpoint does on what training never looked at; all processes read it together."""
    if not training_run.parts.test:
        return []
    out = training_run.settings.out
    folder = checkpoints.find(out)
    model, tokenizer = _saved(training_run)
    result = evaluate(model, training_run.parts.test, tokenizer)
    per_byte = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.3f} bits per byte, "
    read = f"{plural(result.tokens, 'token')} of {plural(result.documents, 'document')}"
    numbers = f"{per_byte}{perplexity(result)} perplexity, by {models.described(out, folder)}"
    return ["", f"test        {read}: {numbers}"]


@contextlib.contextmanager
def _stopping(training_run: Run) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) finishes and saves the step under way; a second one interrupts at once.

    So does a terminal that is closed, unless nohup was to keep it from that. A launcher hands its signals on to the
    processes, which a terminal or SLURM has told already: that is one signal.
    """
    told: dict[int, float] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        training_run.stop()
        first = told.setdefault(number, time.monotonic())
        if training_run.parts.ranks.size == 1:
            signal.signal(number, signal.default_int_handler)
        elif time.monotonic() - first > HANDED_ON_SECONDS:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _size(documents: Sequence[Document]) -> str:
    """The bytes of the texts and the ids of the others, each where there are any."""
    sizes = {
        unit: sum(len(document) for document in documents if document.text == text)
        for unit, text in (("byte", True), ("id", False))
    }
    return " and ".join(plural(size, unit) for unit, size in sizes.items() if size) or plural(0, "byte")
