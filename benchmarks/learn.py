"""``memformer bench learn`` with other packages' models beside this one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from memformer.bench import learn

from .rivals import Folders

__all__ = ["Learn", "run"]


@dataclass(frozen=True, kw_only=True)
class Learn:
    """Train this model and its rivals on tasks that only a memory solves: same data, steps, parameters, in one run.

    The rivals are earlier, RMT, Transformer-XL and Compressive; all whose folder is given take part by default.
    """

    folders: Folders = field(default_factory=Folders)
    settings: learn.LearningBenchmark = field(default_factory=learn.LearningBenchmark)


def run(contest: Learn) -> Iterator[str]:
    """Yield the lines of a report; errors are those of :func:`memformer.bench.learn.run`."""
    named = contest.settings.contestants
    if not named:
        yield from contest.folders.missing
    yield from learn.run(contest.settings, contest.folders.entrants(named))
