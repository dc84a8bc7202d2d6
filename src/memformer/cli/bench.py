"""memformer bench."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from .. import bench
from ..bench.million import MillionTokens
from ..bench.replay import ReplayBenchmark

__all__ = ["BenchCommand", "run"]


@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """Measure on this machine what the documents claim."""

    benchmark: (
        Annotated[ReplayBenchmark, tyro.conf.subcommand("replay")]
        | Annotated[MillionTokens, tyro.conf.subcommand("million")]
    )


def run(command: BenchCommand) -> int:
    benchmark = command.benchmark
    lines = bench.replay.run(benchmark) if isinstance(benchmark, ReplayBenchmark) else bench.million.run(benchmark)
    for line in lines:
        print(line, flush=True)
    return 0
