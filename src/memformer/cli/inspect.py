"""memformer inspect."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import pictures
from ..checks import plural
from ..data import encode_documents
from ..inspection import KINDS, Inspection, inspect, kinds, plot
from ..training import life, plot_life
from ..training.history import Moment
from . import models
from .documents import DocumentOptions
from .progress import duration

__all__ = ["InspectCommand", "run"]

_SLOTS_PER_LINE = 4
_ROWS, _FEW = 30, 12
"""The most rows of a life with its evaluations, and how many it has at least where there is as much to show."""


@dataclass(frozen=True, kw_only=True)
class InspectCommand(DocumentOptions):
    """Show what a trained model's memory does: how slots are written, how they differ, how far gradients reach."""

    life: bool = False
    """Instead, how the run came there, from its metrics: loss, attention, diversity and reach, step by step."""
    segments: int = 32
    """How many segments of each document to read, from its start."""
    lanes: int = 4
    """How many documents to read side by side; the longest ones are taken."""
    plot: Path | None = None
    """Also draw the result into this PNG file."""
    base: Path | None = None
    """Of a memory around a pretrained model, the folder of that one where it has moved since the training."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""


def run(command: InspectCommand) -> int:
    """Print what a model's memory keeps; returns the exit status."""
    if command.lanes < 1:
        raise ValueError(f"lanes: expected at least 1, got {command.lanes}")
    pictures.check(command.plot)
    if command.life:
        return _show_life(command)
    model, tokenizer = models.load(command.checkpoint, command.device, base=command.base)
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


def _show_life(command: InspectCommand) -> int:
    out = command.checkpoint
    for f in dataclasses.fields(command):
        if f.name not in ("checkpoint", "life", "plot") and getattr(command, f.name) != f.default:
            flag = f"--{f.name.replace('_', '-')}"
            raise ValueError(f"life: reads the run's metrics, so {flag} has no meaning with it: leave it out")
    run_of_it = out.resolve().parent
    has = [(folder / "metrics.jsonl").is_file() for folder in (out, run_of_it)]
    moments = life(run_of_it if has == [False, True] else out)
    print(describe_life(moments))
    if command.plot is not None:
        plot_life(moments, command.plot)
        print(f"\nplot in {command.plot}")
    return 0


def describe_life(moments: Sequence[Moment]) -> str:
    """The table that the command prints of a run's life: its evaluations and checkpoints, and steps between them."""
    last = moments[-1]
    counted = next((m for m in reversed(moments) if m.tokens_seen), last)
    totals = [plural(last.step, "step") + ("" if counted is last else f"; at step {counted.step:,}")]
    totals += [] if not counted.tokens_seen else [plural(counted.tokens_seen, "token")]
    totals += [] if not counted.epoch else [f"{counted.epoch:.2f} times the documents"]
    totals += [] if not counted.wall_seconds else [duration(counted.wall_seconds)]
    scored = [m for m in moments if m.held_out_nats is not None]
    best = min(scored, key=lambda m: m.held_out_nats or 0.0).step if scored else None
    shown = {m for m in moments if m.kept or m.step == best or m is last}
    shown |= {*_spread(scored, _ROWS - len(shown))}
    shown |= {*_spread(moments, _FEW - len(shown))}
    rows = [
        [
            f"{m.step}",
            *(_cell(x, ".3f") for x in (m.loss_nats, m.held_out_nats, m.self_attention, m.slot_diversity)),
            _cell(m.memory_gradient, ".2g"),
            " ".join(["best"] * (m.step == best) + ["kept"] * m.kept),
        ]
        for m in sorted(shown, key=lambda m: m.step)
    ]
    head = ["step", "training", "held out", "on itself", "diversity", "reach", ""]
    return "\n".join(
        [
            ", ".join(totals),
            "",
            *("".join(f"{cell:>10}" for cell in row[:-1]) + f"  {row[-1]}".rstrip() for row in [head, *rows]),
            "",
            "training, held out: nats per token; on itself: the share of the writing attention that slots give",
            "themselves; reach: the gradient at a rollout's start by that at its end; kept: the checkpoint is there",
        ]
    )


def _spread(moments: Sequence[Moment], most: int) -> Sequence[Moment]:
    """At most so many of them, at even distances."""
    return moments[:: -(-len(moments) // most) or 1] if most > 0 else []


def _cell(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


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
    decays = "" if found.slot_parameter == "initial content" else ", which weight decay shrinks if it is decayed"
    head = f"{'slot':>6} {'on itself':>9} {'norm':>8}"
    layers = f" ({slots // found.memories} in each of {found.memories} layers, in their order)" * (found.memories > 1)
    return "\n".join(
        [
            f"{plural(slots, 'slot')}{layers}, read over {plural(segments, 'segment')} of {plural(lanes, 'document')}",
            "",
            f"slots attend, in the second half of the segments: {counts}",
            f"(on itself: the share of a slot's attention; norm: of its {found.slot_parameter}{decays})",
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
