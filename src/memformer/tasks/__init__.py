"""Tasks that only a memory can solve: sequences of segments, and the tokens in them that must be predicted.

Knows no model. An :class:`Episode` is the same for all of them: an encoder-decoder reads a segment and predicts the
next one, a decoder-only model reads the tokens in a row. Only tokens marked as answers count.
"""

from .base import ASK, BLANK, START, SYMBOLS, Episode, Task
from .images import Pixels, digits
from .prose import InProse, Prose, Telling, in_prose, prose_of, read_prose
from .symbols import AssociativeRetrieval, Copy, KeyValue, OneFact, Reverse
from .worlds import WORLDS, Asked, SingleFacts, Story, ThreeFacts, TwoFacts, Values, Whereabouts, World

__all__ = [
    "ASK",
    "BLANK",
    "START",
    "SYMBOLS",
    "TASKS",
    "WORLDS",
    "Asked",
    "AssociativeRetrieval",
    "Copy",
    "Episode",
    "InProse",
    "KeyValue",
    "OneFact",
    "Pixels",
    "Prose",
    "Reverse",
    "SingleFacts",
    "Story",
    "Task",
    "Telling",
    "ThreeFacts",
    "TwoFacts",
    "Values",
    "Whereabouts",
    "World",
    "digits",
    "in_prose",
    "prose_of",
    "read_prose",
]

TASKS: dict[str, Task] = {
    "copy": Copy(),
    "reverse": Reverse(),
    "retrieval": AssociativeRetrieval(),
    "rewrite": AssociativeRetrieval(rewrite=True),
    "retrieval-16": AssociativeRetrieval(keys=16, values=16),
    "one-fact": OneFact(),
    **{f"pairs-{pairs}": KeyValue(pairs=pairs) for pairs in (4, 8, 16, 32)},
}
"""The tasks in their standard sizes. Pixels come with images: :func:`digits`; facts with prose: :func:`in_prose`."""
