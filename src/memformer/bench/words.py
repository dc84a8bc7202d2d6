"""On which tokens does a memory help? Whether their word is known from training, and stood in the text before."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

__all__ = ["KINDS", "word_kinds", "words_of"]

KINDS = (
    "between words",
    "known, first",
    "known, near",
    "known, far",
    "new, first",
    "new, near",
    "new, far",
)
"""Known: a word of the training text. First: the document did not have it before; near: it did, and that begins in the
same segment or in the one before; far: it did, further back, where only a memory can have it from."""

_WORD = re.compile(rb"[A-Za-z_\x80-\xff][\w\x80-\xff]*")


def words_of(texts: Iterable[bytes]) -> set[bytes]:
    """All words of some texts, as they are written: letters, and digits and underscores after one."""
    return {word for text in texts for word in _WORD.findall(text)}


def word_kinds(text: bytes, sizes: np.ndarray, known: set[bytes], length: int) -> np.ndarray:
    """Of each token of a document its kind, a place in :data:`KINDS`: that of the byte with which the token ends.

    Args:
        text: the document's bytes, from its beginning.
        sizes: how many of them each token stands for, (tokens,).
        known: words of the training text.
        length: tokens in a segment.
    """
    ends = sizes.cumsum()
    segment_ends = ends[length - 1 :: length]
    kinds = np.zeros(len(text), np.int64)
    last: dict[bytes, int] = {}
    for found in _WORD.finditer(text):
        word, segment = found.group(), int(np.searchsorted(segment_ends, found.start(), side="right"))
        before = last.get(word)
        kind = 1 if before is None else 2 if segment - before <= 1 else 3
        kinds[found.start() : found.end()] = kind if word in known else 3 + kind
        last[word] = segment
    return kinds[ends - 1]
