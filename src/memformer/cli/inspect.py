"""memformer inspect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import pictures
from ..data import encode_documents
from ..inspection import KINDS, Inspection, inspect, kinds, plot
from . import models
from .documents import DocumentOptions

__all__ = ["InspectCommand", "run"]

_SLOTS_PER_LINE = 4


@dataclass(frozen=True, kw_only=True)
class InspectCommand(DocumentOptions):
    """Show what a trained model's memory does: how slots are written, how they differ, how far gradients reach."""

    segments: int = 32
    """How many segments of each document to read, from its start."""
    lanes: int = 4
    """How many documents to read side by side; the longest ones are taken."""
    plot: Path | None = None
    """Also draw the result into this PNG file."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""


def run(command: InspectCommand) -> int:
    """Print what a model's memory keeps; returns the exit status."""
    if command.lanes < 1:
        raise ValueError(f"lanes: expected at least 1, got {command.lanes}")
    pictures.check(command.plot)
    model, tokenizer = models.load(command.checkpoint, command.device)
    longest = sorted(command.documents(), key=lambda document: -len(document))[: command.lanes]
    sequences = encode_documents(longest, tokenizer)
    # In a document of one segment no memory is read, and the shortest decides how far all of them are.
    long = [tokens for tokens in sequences if len(tokens) >= 2 * model.config.segment_length] or sequences
    found = inspect(model, long, start=tokenizer.start, segments=command.segments)
    print(describe(found))
    if command.plot is not None:
        plot(found, command.plot)
        print(f"\nplot in {command.plot}")
    return 0


def describe(found: Inspection) -> str:
    """The tables that the command prints."""
    lanes, segments, slots = found.self_attention.shape
    kind = kinds(found.by_slot)
    counts = ", ".join(f"{int((kind == i).sum())} {name}" for i, name in enumerate(KINDS))
    by_segment = found.self_attention.mean((0, 2))
    depths, back = ([*_powers_of_two(segments - first), segments - first] for first in (0, 1))
    slot_lines = [
        f"{slot:>6} {float(found.by_slot[slot]):9.3f} {float(found.slot_norms[slot]):8.3g}"
        for slot in found.by_slot.argsort(descending=True, stable=True).tolist()
    ]
    head = f"{'slot':>6} {'on itself':>9} {'norm':>8}"
    return "\n".join(
        [
            f"{slots} slots, read over {segments} segments of {lanes} documents",
            "",
            f"slots attend, in the second half of the segments: {counts}",
            f"(on itself: the share of a slot's attention; norm: of its {found.slot_parameter})",
            "  ".join([head] * min(_SLOTS_PER_LINE, slots)),
            *("  ".join(slot_lines[i : i + _SLOTS_PER_LINE]) for i in range(0, slots, _SLOTS_PER_LINE)),
            "",
            _row("segment", [f"{n}" for n in depths]),
            _row("attention on itself", [f"{float(by_segment[n - 1]):.3f}" for n in depths]),
            _row("slot diversity", [f"{float(found.diversity[:, n - 1].mean()):.3f}" for n in depths]),
            "",
            _row("segments back", [f"{n}" for n in [0, *back]]),
            _row("|d loss / d memory|", [f"{float(found.gradient_reach[n]):.1e}" for n in [0, *back]]),
        ]
    )


def _powers_of_two(below: int) -> list[int]:
    """1, 2, 4, ..., all of them less than ``below``."""
    return [1 << n for n in range((below - 1).bit_length())] if below > 1 else []


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<20}" + "".join(f"{cell:>8}" for cell in cells)
