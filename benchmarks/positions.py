"""What each position encoding costs: the earlier library's replay example with all three, taking turns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

import torch

from memformer import Memformer, memory_replay_backprop
from memformer.bench.meters import machine, spread, taking_turns
from memformer.config import Positions, check_count

from .example import Example

__all__ = ["PositionsBenchmark", "run"]


@dataclass(frozen=True, kw_only=True)
class PositionsBenchmark:
    """Seconds of one gradient by memory replay with each position encoding.

    What they learn is compared by memformer train --positions NAME --out runs/NAME, with the same seed.
    """

    runs: int = 5
    """How often each is timed; they take turns."""
    example: Example = field(default_factory=Example)

    def __post_init__(self) -> None:
        check_count("runs", self.runs)


def run(settings: PositionsBenchmark) -> Iterator[str]:
    """Yield the lines of a report."""
    src, tgt = settings.example.tokens()
    config, device = settings.example.config, torch.device("cpu")
    models = {name: Memformer(**dataclasses.replace(config, positions=name).to_dict()) for name in get_args(Positions)}
    steps = {name: functools.partial(_gradient, model, src, tgt) for name, model in models.items()}
    yield f"{machine(device)}; {settings.runs} runs each, taking turns"
    seconds = {name: spread(times) for name, times in taking_turns(steps, settings.runs, device).items()}
    yield f"{'':10}{'parameters':>12}{'seconds: min':>14}{'median':>9}{'max':>9}{'relative':>10}"
    fastest = min(taken.median for taken in seconds.values())
    for name, (least, median, most) in seconds.items():
        parameters = sum(p.numel() for p in models[name].parameters())
        yield f"{name:10}{parameters:12,}{least:14.2f}{median:9.2f}{most:9.2f}{median / fastest:9.2f}x"


def _gradient(model: Memformer, src: torch.Tensor, tgt: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    memory_replay_backprop(model, src=src, tgt=tgt)
