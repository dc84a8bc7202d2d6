"""The model that a command works with."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data import Tokenizer, load_tokenizer
from ..device import choose_device
from ..folders import find, newest
from ..interface import SegmentModel
from ..models import load_model

__all__ = ["WriterOptions", "described", "load"]


@dataclass(frozen=True, kw_only=True)
class WriterOptions:
    """How the memory is written, where it is to be otherwise than in training."""

    write_temperature: float | None = None
    """Temperature of the writing attention, in place of that in training; lower: slots keep longer what they hold."""
    forgetting: float | None = None
    """Forgetting of the normalised writer, in place of that in training; 0: only what is written over is forgotten."""


def load(
    checkpoint: Path, device: str, writer: WriterOptions | None = None, base: Path | None = None
) -> tuple[SegmentModel, Tokenizer]:
    """A trained model, ready to use, and its tokenizer.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, of another kind, or the device is not there; it has no writer as it is asked for.
    """
    folder = find(checkpoint)
    if folder != checkpoint:
        print(f"model       {described(checkpoint, folder)}", file=sys.stderr)
    model, tokenizer = load_model(folder, base).to(choose_device(device)).eval(), load_tokenizer(folder)
    *_, (name, size) = model.config.vocabularies.items()
    if size != tokenizer.vocabulary:
        raise ValueError(
            f"{folder}: expected a model that predicts one of {tokenizer.vocabulary} tokens, as memformer train makes "
            f"it, got {name} {size}"
        )
    if writer is not None:
        model.set_writer(**asdict(writer))
    return model, tokenizer


def described(run: Path, folder: Path) -> str:
    """A run's checkpoint, and which of them it is."""
    last = newest(run)
    best = "" if last is None or last == folder else f", the best evaluation of {run} (the newest is {last.name})"
    return f"{folder}{best}"
