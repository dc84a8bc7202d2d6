"""How gradients travel, as one value: what every function that runs a rollout is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypedDict

from .gradients import MemoryGradients
from .inputs import Weights
from .schedules import EveryMemory, Schedule, at_least, check_schedule

__all__ = ["OptionKeywords", "Options"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """How the gradients of a rollout travel; each field is a keyword of the functions that run one, too.

    Attributes:
        schedule: which memories and graphs to keep; more of them is faster.
            ``print(schedule.plan(len(segments)))`` says what one costs.
        measure_at: the segment by whose memory and graph a schedule that needs sizes is planned; give the one where
            they are largest. The segments before it are run once more for it. None: the first, or what the caller
            chooses (a model's rollout).
        readout_segments: how many segments one call of the readout gets; the losses of the calls are added. More is
            faster on short segments, and the readout's graph grows with it. None: 1, or what the caller chooses
            (a Memformer's rollout).
        keep_values: whether the readout runs once, on the values of all segments, which are kept for it, and then
            their gradients until backward. False: it runs with the cell, a segment at a time, once without a graph and
            once with one; of a segment its memory and its loss are kept, and nothing that grows with its tokens. None:
            True, or what the caller chooses (a model's rollout).
        segment_weights: one factor per segment for its loss. A readout over several segments then returns one loss
            per segment, shape (segments of the call,).
        memory_gradients: takes down the norm of the memory's gradient between segments, and clips it if asked.
        check: compare all that the cell returns in replay with its recording, which is kept for it: for debugging. The
            first replayed segment is compared in any case, at a few numbers.

    Raises:
        ValueError: a field is not what it should be.
    """

    schedule: Schedule = dataclasses.field(default_factory=EveryMemory)
    measure_at: int | None = None
    readout_segments: int | None = None
    keep_values: bool | None = None
    segment_weights: Weights | None = None
    memory_gradients: MemoryGradients | None = None
    check: bool = False

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if self.measure_at is not None:
            at_least("measure_at", self.measure_at, 0)
        if self.readout_segments is not None:
            at_least("readout_segments", self.readout_segments)
        if not isinstance(self.keep_values, bool | None):
            raise ValueError(f"keep_values: expected True, False or None, got {self.keep_values!r}")
        if self.keep_values is False and (self.readout_segments or 1) > 1:
            raise ValueError(
                f"readout_segments: expected 1 with keep_values=False, where each segment is read out as soon as the "
                f"cell has run, got {self.readout_segments}"
            )
        if not isinstance(self.memory_gradients, MemoryGradients | None):
            raise ValueError(f"memory_gradients: expected a replay.MemoryGradients, got {self.memory_gradients!r}")

    @classmethod
    def of(cls, options: Options | None, keywords: OptionKeywords) -> Options:
        """``options``, changed by the keywords. A keyword that is None changes nothing."""
        given = {name: value for name, value in keywords.items() if value is not None}
        unknown = sorted(set(keywords) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            known = ", ".join(field.name for field in dataclasses.fields(cls))
            raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}; the options are {known}")
        if not isinstance(options, Options | None):
            raise ValueError(f"options: expected replay.Options, got {options!r}; each of them is a keyword, too")
        return dataclasses.replace(options or cls(), **given)  # type: ignore[arg-type]


class OptionKeywords(TypedDict, total=False):
    """The fields of :class:`Options` as keywords, for type checkers; None stands for the default."""

    schedule: Schedule | None
    measure_at: int | None
    readout_segments: int | None
    keep_values: bool | None
    segment_weights: Weights | None
    memory_gradients: MemoryGradients | None
    check: bool | None
