"""memformer evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checks import plural
from ..data import xz_bits_per_byte
from ..evaluation import HeldOut, evaluate
from . import models
from .documents import DocumentOptions

__all__ = ["EvaluateCommand", "describe", "run"]


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(DocumentOptions):
    """Bits per byte of a trained model on whole documents, with and without memory, and by depth in the document."""

    memory: Literal["on", "off", "both"] = "both"
    """on carries the memory from segment to segment; off begins each segment with the initial one; both compares."""
    lanes: int = 16
    """Read at most this many documents side by side."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""


def run(command: EvaluateCommand) -> int:
    """Print how well a model predicts documents, memory on and off; returns the exit status."""
    if command.lanes < 1:
        raise ValueError(f"lanes: expected at least 1, got {command.lanes}")
    model, tokenizer = models.load(command.checkpoint, command.device)
    documents = command.documents()
    for memory in {"on": [True], "off": [False], "both": [True, False]}[command.memory]:
        result = evaluate(model, documents, tokenizer, lanes=command.lanes, memory=memory)
        per_byte = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f} bits per byte, "
        print(
            f"memory {'on ' if memory else 'off'}  {per_byte}{result.loss_nats:.4f} nats per token, perplexity "
            f"{result.perplexity:.3f}, on {plural(result.tokens, 'token')} of {plural(result.documents, 'document')}, "
            f"{result.tokens / result.seconds:,.0f} tokens/s"
        )
        print(describe(result))
    if all(document.text for document in documents):
        print(f"xz          {xz_bits_per_byte([bytes(d) for d in documents]):.4f} bits per byte")
    return 0


def describe(result: HeldOut) -> str:
    """Bits per token by depth in the document, two lines."""
    names = [f"{d.first}-{d.last}" if d.last > d.first else f"{d.first}" for d in result.by_depth]
    numbers = [f"{d.bits_per_token:.3f}" for d in result.by_depth]
    widths = [max(len(a), len(b)) for a, b in zip(names, numbers, strict=True)]
    rows = (" ".join(cell.rjust(w + 1) for cell, w in zip(cells, widths, strict=True)) for cells in (names, numbers))
    return "\n".join(f"  {head:<16}{row}" for head, row in zip(("segment", "bits per token"), rows, strict=True))
