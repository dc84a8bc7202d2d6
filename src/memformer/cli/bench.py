"""memformer bench."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from ..bench import generation, learn, million, reach, replay, text

__all__ = ["BenchCommand", "run"]


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """Measure on this machine what the documentation claims."""

    benchmark: (
        Annotated[replay.ReplayBenchmark, tyro.conf.subcommand("replay")]
        | Annotated[million.MillionTokens, tyro.conf.subcommand("million")]
        | Annotated[generation.GenerationBenchmark, tyro.conf.subcommand("generate")]
        | Annotated[learn.LearningBenchmark, tyro.conf.subcommand("learn")]
        | Annotated[reach.ReachBenchmark, tyro.conf.subcommand("reach")]
        | Annotated[text.TextBenchmark, tyro.conf.subcommand("text")]
    )


_RUN: dict[type, Callable[[Any], Iterator[str]]] = {
    replay.ReplayBenchmark: replay.run,
    million.MillionTokens: million.run,
    generation.GenerationBenchmark: generation.run,
    learn.LearningBenchmark: learn.run,
    reach.ReachBenchmark: reach.run,
    text.TextBenchmark: text.run,
}


def run(command: BenchCommand) -> int:
    """Print a benchmark's lines as they come; returns the exit status."""
    for line in _RUN[type(command.benchmark)](command.benchmark):
        print(line, flush=True)
    return 0
