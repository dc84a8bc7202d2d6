"""``memformer bench text`` with other packages' models beside this one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

from memformer.bench import text

from .rivals import Folders

__all__ = ["Text", "run"]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Held-out bits per byte of real text: this model beside others of equal parameters and training FLOPs.

    The rivals are earlier, RMT, Compressive, and Transformer-XL with several sizes of state, as "Transformer-XL x 8".
    All whose folder is given take part in the study of peers by default.
    """

    folders: Folders = field(default_factory=Folders)
    transformer_xl: tuple[float, ...] = (1, 2, 4, 8)
    """Transformer-XL takes part once with each of these sizes of state, in multiples of this model's."""
    settings: text.TextBenchmark = field(default_factory=functools.partial(text.TextBenchmark, study="peers"))


def run(contest: Text) -> Iterator[str]:
    """Yield the lines of a report; errors are those of :func:`memformer.bench.text.run`."""
    named = contest.settings.contestants
    if not named and contest.settings.study == "peers":
        yield from contest.folders.missing
    yield from text.run(contest.settings, contest.folders.entrants(named, contest.transformer_xl))
