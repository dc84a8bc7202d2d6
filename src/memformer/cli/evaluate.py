"""memformer evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data import held_out_split, read_documents, standard_library, xz_bits_per_byte
from ..training import evaluate
from . import models

__all__ = ["EvaluateCommand", "run"]


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


def run(command: EvaluateCommand) -> int:
    if command.lanes < 1:
        raise ValueError(f"lanes: expected at least 1, got {command.lanes}")
    model = models.load(command.checkpoint, command.device)
    documents = read_documents(command.data) if command.data else held_out_split(standard_library())[1]
    result = evaluate(model, documents, lanes=command.lanes)
    print(f"{result.bits_per_byte:.4f} bits per byte ({result.loss_nats:.4f} nats) on {result.tokens:,} bytes of "
          f"{result.documents} documents, {result.tokens / result.seconds:,.0f} bytes/s")  # fmt: skip
    print(f"{xz_bits_per_byte([d.text for d in documents]):.4f} bits per byte with xz")
    return 0
