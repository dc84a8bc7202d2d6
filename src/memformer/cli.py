"""The command line: the only place that prints."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import bench, checkpoints
from .bench.million import MillionTokens
from .bench.replay import ReplayBenchmark
from .config import TrainingConfig
from .data import (
    START,
    VOCABULARY,
    Document,
    encode,
    held_out_split,
    order2_bits_per_byte,
    read_documents,
    standard_library,
    xz_bits_per_byte,
)
from .generation import generate
from .model import Memformer
from .training import Run, StepMetrics, choose_device, evaluate, saved_settings

__all__ = ["main"]


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Bits per byte of a trained model on documents read whole, the memory carried from segment to segment."""

    checkpoint: Path
    """A run's folder, or one checkpoint in it."""
    data: tuple[Path, ...] = ()
    """Files and folders of UTF-8 text; by default the held-out part of the Python standard library's sources."""
    lanes: int = 16
    """At most so many documents are read side by side."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue a prompt, for any length at constant memory; the text is printed as it comes."""

    checkpoint: Path
    """A run's folder, or one checkpoint in it."""
    prompt: str = ""
    """The text to continue; empty begins a document."""
    max_new_tokens: int = 300
    """How many bytes to write."""
    temperature: float = 0.9
    """0 always takes the most likely byte; higher is wilder."""
    top_k: int | None = None
    """Choose among so many most likely bytes."""
    top_p: float | None = 0.95
    """Choose among the most likely bytes that together have this probability."""
    seed: int = 0
    """Of the choices."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """Measure on this machine what the documents claim."""

    benchmark: (
        Annotated[ReplayBenchmark, tyro.conf.subcommand("replay")]
        | Annotated[MillionTokens, tyro.conf.subcommand("million")]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 for a user's mistake, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = _parse(arguments)
        run: Callable[[Any], int] = _RUN[type(command)]
        return run(command)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"memformer: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(arguments: list[str]) -> Any:
    parse = _parser(TrainingConfig())
    if arguments[:1] != ["train"] or "--resume" not in arguments or {"-h", "--help"} & set(arguments):
        return parse(arguments)
    # A resumed run has the settings that were saved with it, and flags only say what is to differ.
    out = parse(arguments).out
    return _parser(dataclasses.replace(saved_settings(out), out=out, resume=False))(arguments)


def _parser(training: TrainingConfig) -> Callable[[list[str]], Any]:
    commands = (
        Annotated[TrainingConfig, tyro.conf.subcommand("train", default=training)]
        | Annotated[EvaluateCommand, tyro.conf.subcommand("evaluate")]
        | Annotated[GenerateCommand, tyro.conf.subcommand("generate")]
        | Annotated[BenchCommand, tyro.conf.subcommand("bench")]
    )
    options: dict[str, Any] = {
        "prog": "memformer",
        "description": "Train and use models that read sequences of any length with a memory of fixed size.",
        "config": (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    }
    return lambda arguments: tyro.cli(commands, args=arguments, **options)


def _train(settings: TrainingConfig) -> int:
    run = Run(settings)
    source = "the Python standard library" if not settings.data else ", ".join(map(str, settings.data))
    training, held_out = (f"{len(d):,} documents ({_size(d):,} bytes)" for d in (run.training, run.held_out))
    print(f"data        {source}: {training} to train on, {held_out} held out")
    parameters = sum(p.numel() for p in run.model.parameters())
    print(f"model       {parameters:,} parameters, {settings.slots} memory slots of {settings.dim}, on {run.device}")
    start = f", from step {run.step:,}" if run.step else ""
    rollouts = f"{settings.lanes} lanes x {settings.horizon} segments x {settings.segment_length} bytes"
    print(f"training    {settings.steps:,} steps of {rollouts}{start}; metrics in {settings.out / 'metrics.jsonl'}")
    with _stopping(run), _progress(settings, run.step) as show:
        for metrics in run.train():
            show(metrics)
    if run.step < settings.steps:
        print(f"\nstopped and saved at step {run.step:,}. Go on with:\n  memformer train --resume --out {settings.out}")
        return 130
    result = evaluate(run.model, run.held_out)
    run.log("held_out", result)
    texts = [document.text for document in run.held_out]
    order2, xz = order2_bits_per_byte((d.text for d in run.training), texts), xz_bits_per_byte(texts)
    print(f"\nheld out    {result.tokens:,} bytes of {result.documents} documents, in bits per byte:")
    print(f"  this model          {result.bits_per_byte:.3f}")
    print(f"  order-2 byte model  {order2:.3f}   (counts over the training documents)")
    print(f"  xz                  {xz:.3f}   (the held-out documents in one stream)")
    if settings.sample_bytes:
        print("\nsample")
        _write(run.model, GenerateCommand(checkpoint=settings.out, prompt="def ", max_new_tokens=settings.sample_bytes))
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


def _evaluate(command: EvaluateCommand) -> int:
    if command.lanes < 1:
        raise ValueError(f"lanes: expected at least 1, got {command.lanes}")
    model = _load(command.checkpoint, command.device)
    documents = read_documents(command.data) if command.data else held_out_split(standard_library())[1]
    result = evaluate(model, documents, lanes=command.lanes)
    print(f"{result.bits_per_byte:.4f} bits per byte ({result.loss_nats:.4f} nats) on {result.tokens:,} bytes of "
          f"{result.documents} documents, {result.tokens / result.seconds:,.0f} bytes/s")  # fmt: skip
    print(f"{xz_bits_per_byte([d.text for d in documents]):.4f} bits per byte with xz")
    return 0


def _generate(command: GenerateCommand) -> int:
    _write(_load(command.checkpoint, command.device), command)
    return 0


def _bench(command: BenchCommand) -> int:
    benchmark = command.benchmark
    lines = bench.replay.run(benchmark) if isinstance(benchmark, ReplayBenchmark) else bench.million.run(benchmark)
    for line in lines:
        print(line, flush=True)
    return 0


def _write(model: Memformer, command: GenerateCommand) -> None:
    """Print the prompt and its continuation byte by byte, each character when it is whole."""
    device = next(model.parameters()).device
    prompt = torch.tensor([[int(byte) for byte in encode(command.prompt)]], dtype=torch.int64, device=device)
    tokens = generate(
        model.eval(),
        prompt,
        command.max_new_tokens,
        start=START,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        generator=torch.Generator(device).manual_seed(command.seed),
    )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sys.stdout.write(command.prompt)
    for token in tokens:
        sys.stdout.write(decoder.decode(bytes([int(token)])))
        sys.stdout.flush()
    print(decoder.decode(b"", final=True))


def _load(checkpoint: Path, device: str) -> Memformer:
    model = Memformer.from_pretrained(checkpoints.find(checkpoint)).to(choose_device(device)).eval()
    if model.config.dec_num_tokens != VOCABULARY:
        raise ValueError(f"{checkpoint}: expected a model of bytes with a decoder, as memformer train makes it")
    return model


def _size(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)


_RUN: dict[type, Callable[[Any], int]] = {
    TrainingConfig: _train,
    EvaluateCommand: _evaluate,
    GenerateCommand: _generate,
    BenchCommand: _bench,
}
