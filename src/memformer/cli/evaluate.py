"""memformer evaluate."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ..checks import plural
from ..data import xz_bits_per_byte
from ..data.documents import limited
from ..device import choose_precision
from ..evaluation import HeldOut, evaluate
from ..training import checkpoints
from ..training.metrics import as_json
from . import models
from .documents import DocumentOptions

__all__ = ["EvaluateCommand", "describe", "perplexity", "run"]

XZ_BYTES = 16_000_000
"""xz compresses at most this much text: it takes a minute."""


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(DocumentOptions):
    """Bits per byte of a trained model on whole documents, with and without memory, and by depth in the document."""

    memory: Literal["on", "off", "both"] = "both"
    """on carries the memory from segment to segment; off begins each segment with the initial one; both compares."""
    limit: int = 0
    """Read at most this many bytes (or ids), from the first documents on; 0: all."""
    lanes: int = 16
    """Read at most this many documents side by side."""
    precision: Literal["auto", "float32", "bf16", "fp16"] = "float32"
    """Type for autocast; auto is bf16 on an accelerator that computes it natively, as in training."""
    json: bool = False
    """Print one JSON object with every number, and nothing else."""
    base: Path | None = None
    """Of a memory around a pretrained model, the folder of that one where it has moved since the training."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""
    writer: models.WriterOptions = field(default_factory=models.WriterOptions)


def run(command: EvaluateCommand) -> int:
    """Print how well a model predicts documents, memory on and off; returns the exit status."""
    if command.lanes < 1:
        raise ValueError(f"lanes: expected at least 1, got {command.lanes}")
    if command.limit < 0:
        raise ValueError(f"limit: expected a number of bytes of at least 0 (0: all), got {command.limit}")
    folder = checkpoints.find(command.checkpoint)
    model, tokenizer = models.load(command.checkpoint, command.device, command.writer, command.base)
    documents = limited(command.documents(), command.limit)
    device = next(model.parameters()).device
    precision, found = choose_precision(command.precision, device), dict[str, object]()
    for memory in {"on": [True], "off": [False], "both": [True, False]}[command.memory]:
        name = "on" if memory else "off"
        autocast = torch.autocast(device.type, precision, enabled=precision is not torch.float32)
        with _progress(f"memory {name}") as progress, autocast:
            result = evaluate(model, documents, tokenizer, lanes=command.lanes, memory=memory, progress=progress)
        found[f"memory_{name}"] = {k: v for k, v in dataclasses.asdict(result).items() if k != "step"} | {
            "by_depth": [depth._asdict() for depth in result.by_depth]
        }
        if not command.json:
            _print(result, name)
    if all(document.text for document in documents):
        compressed = min(sum(map(len, documents)), XZ_BYTES)
        with _progress("xz") as progress:
            xz = xz_bits_per_byte(documents, XZ_BYTES)
        found["xz"] = {"bits_per_byte": xz, "bytes": compressed}
        if not command.json:
            first = f" (the first {compressed:,} bytes)" if compressed < sum(map(len, documents)) else ""
            print(f"xz          {xz:.4f} bits per byte{first}")
    if command.json:
        about: dict[str, object] = {"checkpoint": str(folder), "precision": str(precision).removeprefix("torch.")}
        about |= {name: getattr(model.config, name) for name in ("write_temperature", "forgetting")}
        print(as_json(about | found), end="")
    return 0


def _print(result: HeldOut, memory: str) -> None:
    per_byte = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f} bits per byte, "
    print(
        f"memory {memory:<3}  {per_byte}{result.loss_nats:.4f} nats per token, perplexity "
        f"{perplexity(result)}, on {plural(result.tokens, 'token')} of {plural(result.documents, 'document')}, "
        f"{result.tokens / result.seconds:,.0f} tokens/s"
    )
    print(describe(result), flush=True)


def perplexity(result: HeldOut) -> str:
    """That of a model that diverged has hundreds of digits."""
    return f"{result.perplexity:.3f}" if result.perplexity < 1e6 else f"{result.perplexity:.2e}"


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A line on a terminal that says how far it is, and goes when that is done."""
    if not sys.stderr.isatty():
        yield None
        return
    shown = 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= 0.5:
            shown = time.monotonic()
            print(f"\r{name}: {done:,} of {total:,} tokens", end="", file=sys.stderr, flush=True)

    print(f"\r{name} ...", end="", file=sys.stderr, flush=True)
    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def describe(result: HeldOut) -> str:
    """Bits per token by depth in the document, two lines."""
    names = [f"{d.first}-{d.last}" if d.last > d.first else f"{d.first}" for d in result.by_depth]
    numbers = [f"{d.bits_per_token:.3f}" for d in result.by_depth]
    widths = [max(len(a), len(b)) for a, b in zip(names, numbers, strict=True)]
    rows = (" ".join(cell.rjust(w + 1) for cell, w in zip(cells, widths, strict=True)) for cells in (names, numbers))
    return "\n".join(f"  {head:<16}{row}" for head, row in zip(("segment", "bits per token"), rows, strict=True))
