"""A run's life, read from its metrics: how the loss fell, and what the memory did meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..folders import all_checkpoints, step_of
from ..pictures import new_figure
from .metrics import read_metrics

__all__ = ["Moment", "life", "plot_life"]


@dataclass(frozen=True)
class Moment:
    """What was measured when a run had taken so many steps; None where it was not.

    Attributes:
        loss_nats, self_attention, slot_diversity, memory_gradient, tokens_seen, epoch, wall_seconds: as in
            :class:`~memformer.training.StepMetrics`.
        held_out_nats: the loss of an evaluation at just this step.
        kept: whether its checkpoint is there.
    """

    step: int
    loss_nats: float | None = None
    held_out_nats: float | None = None
    self_attention: float | None = None
    slot_diversity: float | None = None
    memory_gradient: float | None = None
    tokens_seen: int | None = None
    epoch: float | None = None
    wall_seconds: float | None = None
    kept: bool = False


def life(out: Path) -> list[Moment]:
    """One moment for each step of which a run's ``metrics.jsonl`` or its folder says something, in order.

    Raises:
        FileNotFoundError: there are no metrics.
        ValueError: there is none that can be read.
    """
    lines = read_metrics(out)
    steps = {line["step"]: line for line in lines if line.get("event") == "step"}
    held_out = {line["step"]: line for line in lines if line.get("event") == "held_out"}
    kept = {step_of(folder) for folder in all_checkpoints(out) if (folder / "config.json").is_file()}
    if not steps and not held_out:
        raise ValueError(f"{out / 'metrics.jsonl'}: no line of metrics in it")
    moments: list[Moment] = []
    names = ("loss_nats", "self_attention", "slot_diversity", "memory_gradient", "tokens_seen", "epoch", "wall_seconds")
    for step in sorted({*steps, *held_out, *kept}):
        values = {name: steps.get(step, {}).get(name) for name in names}
        moments.append(Moment(step, held_out_nats=held_out.get(step, {}).get("loss_nats"), kept=step in kept, **values))
    return moments


def plot_life(moments: Sequence[Moment], path: str | Path) -> None:
    """Draw a run's life into a file, PNG by its name; no window is opened.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the name's suffix is not of a picture that matplotlib can write.
    """
    figure = new_figure(9, 8)
    losses, memory, reach = figure.subplots(3, 1, sharex=True, height_ratios=[1.6, 1, 1])
    figure.suptitle(_message(moments), fontsize=12)
    _curve(losses, moments, "loss_nats", "training", "tab:blue")
    _curve(losses, moments, "held_out_nats", "held out", "tab:red", marker="o")
    losses.set(title="Loss", ylabel="nats per token")
    _curve(memory, moments, "self_attention", "attention on itself", "tab:blue")
    _curve(memory, moments, "slot_diversity", "slot diversity", "tab:red")
    most = max((m.slot_diversity or 0.0 for m in moments), default=0.0)
    memory.set(title="Memory: what slots keep, and how they differ", ylabel="share, 1 - cosine")
    memory.set_ylim(0, max(1.05, 1.05 * most))
    _curve(reach, moments, "memory_gradient", None, "tab:blue")
    reach.set(title="Credit that reaches a rollout's start", ylabel="gradient, start / end", xlabel="optimizer steps")
    if any((m.memory_gradient or 0.0) > 0 for m in moments):
        reach.set_yscale("log")
        for formatter in (reach.yaxis.set_major_formatter, reach.yaxis.set_minor_formatter):
            formatter("{x:g}")
    for axes in (losses, memory, reach):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _message(moments: Sequence[Moment]) -> str:
    """What the picture says, in one sentence."""
    scored = [(m.held_out_nats, m.step) for m in moments if m.held_out_nats is not None]
    if len(scored) > 1:
        best = min(scored)
        least, end = f"{best[0]:.3f}", f"{scored[-1][0]:.3f}"
        later = "" if least == end else f", and was {end} at the end"
        return f"The held-out loss came to {least} nats per token at step {best[1]:,}{later}"
    trained = [m.loss_nats for m in moments if m.loss_nats is not None]
    if not trained:
        return f"{moments[-1].step:,} steps"
    fell = f"{trained[0]:.3f} to {trained[-1]:.3f} nats per token"
    return f"The training loss went from {fell} in {moments[-1].step:,} steps"


def _curve(axes: Any, moments: Sequence[Moment], name: str, label: str | None, colour: str, marker: str = "") -> None:
    points = [(m.step, getattr(m, name)) for m in moments if getattr(m, name) is not None]
    if points:
        axes.plot(
            *zip(*points, strict=True), color=colour, label=label, marker=marker or ("." if len(points) < 60 else "")
        )
