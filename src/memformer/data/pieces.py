"""A long text encoded in pieces, with the ids that it would have as a whole.

Two neighboring blocks overlap. Where both find the same tokens at the same characters, far from the end of one and from
the beginning of the other, the text is cut: from there on the second block goes on as the first one would. That is no
assumption about newlines or spaces, it is looked at at each cut, so it holds for any pre-tokenizer and normalizer.

What it rests on: a cut is between words of the pre-tokenizer, which says where a word ends by at most ``OVERLAP / 4``
characters around; or it is inside a word of a BPE, between two tokens of the whole. No merge ever crossed such a place,
so the merges on either side do not know of the other. (The best path of a unigram model does: its words stay whole.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["BLOCK", "OVERLAP", "Encoded", "Piece", "encode_in_pieces"]

BLOCK = 1 << 18
"""Characters that are encoded at once: an encoding takes over a hundred bytes for each."""
OVERLAP = 1 << 12
"""Characters that two blocks share. They must agree on the third quarter of them."""

_TRIES = 4
"""Places where the second block may begin."""
_MOST_BLOCKS = 4
"""A block without a place to cut grows to so many, and is then cut anyway."""


class Encoded(NamedTuple):
    """A text's tokens, and the characters that they stand for."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    """(length,) where each token's characters begin in the text, never falling."""
    ends: np.ndarray
    """(length,) where they end."""
    cuts: np.ndarray
    """(length,) whether the text may be cut before each: what follows then does not depend on what is before it."""

    def reach(self, place: int) -> int:
        """How many tokens begin before a character."""
        return int(np.searchsorted(self.starts, place))

    def within(self, start: int, end: int, shift: int = 0) -> np.ndarray:
        """(4, n) all of the tokens that have a character from ``start`` to ``end``, the text having ``shift`` more
        characters in front."""
        starts, ends = self.starts + shift, self.ends + shift
        chosen = (ends > start) & (starts < end)
        return np.stack([self.ids[chosen], starts[chosen], ends[chosen], self.cuts[chosen]])


class Piece(NamedTuple):
    """Tokens ``first`` to ``end`` of a block that begins at character ``place`` of the text."""

    block: Encoded
    first: int
    end: int
    place: int

    @property
    def ids(self) -> np.ndarray:
        return self.block.ids[self.first : self.end]


class _Next(NamedTuple):
    """How one block is followed by another."""

    cut: int
    """Tokens of the block that count."""
    begin: int
    """Where the next block begins in it."""
    block: Encoded
    first: int
    """The first token of the next block that counts."""


def encode_in_pieces(encode: Callable[[str], Encoded], texts: Iterable[str]) -> Iterator[Piece]:
    """The tokens of ``texts``, joined, in pieces; at most ``4 * BLOCK`` characters are encoded at once.

    Args:
        encode: the tokens of one text.

    A text without any place where two blocks agree (a word of a million letters, under a tokenizer that puts a space in
    front) is cut between two tokens, with a warning: the ids around that place may not be those of the whole.
    """
    characters, place, first = _Characters(texts), 0, 0
    block = encode(characters.take(BLOCK))
    while rest := characters.take(BLOCK - OVERLAP):
        following = _follow(encode, block, rest)
        if following is None and len(block.text) + len(rest) <= _MOST_BLOCKS * BLOCK:
            block = encode(block.text + rest)
            continue
        if following is None:
            following = _force(encode, block, rest)
            warnings.warn(
                f"a text was cut at character {place + following.begin:,}, where this tokenizer may give other tokens "
                "than for the whole: there is no better place nearby",
                stacklevel=2,
            )
        yield Piece(block, first, following.cut, place)
        block, first, place = following.block, following.first, place + following.begin
    yield Piece(block, first, len(block.ids), place)


def _follow(encode: Callable[[str], Encoded], block: Encoded, rest: str) -> _Next | None:
    """The next block, if there is one that agrees with this one in their overlap."""
    size = len(block.text)
    start, end = size - OVERLAP // 2, size - OVERLAP // 4
    expected = block.within(start, end)
    before = cut = block.reach(start)
    if expected.size:  # else the text there is white space that this tokenizer drops
        places = np.flatnonzero(block.cuts[before : block.reach(end)])
        if not len(places):
            return None
        cut += int(places[0])

    def agrees(other: Encoded, begin: int) -> bool:
        return np.array_equal(other.within(start, end, begin), expected)

    # It begins where a token does, so that a long run of one letter goes on in step.
    starts = block.starts[block.reach(size - OVERLAP) : block.reach(size - 3 * OVERLAP // 4)]
    starts = np.append(starts, size - OVERLAP) if not len(starts) else starts
    for begin in np.unique(starts[np.arange(_TRIES) * len(starts) // _TRIES]).tolist():
        # The overlap and a little more first, which costs little.
        if agrees(encode(block.text[begin:] + rest[:OVERLAP]), begin):
            other = encode(block.text[begin:] + rest)
            if agrees(other, begin):
                return _Next(cut, begin, other, other.reach(start - begin) + cut - before)
    return None


def _force(encode: Callable[[str], Encoded], block: Encoded, rest: str) -> _Next:
    start = len(block.text) - OVERLAP // 2
    cut = block.reach(start)
    begin = int(block.starts[cut]) if cut < len(block.ids) else start
    return _Next(cut, begin, encode(block.text[begin:] + rest), 0)


class _Characters:
    """Takes so many characters at once from texts of any lengths."""

    def __init__(self, texts: Iterable[str]):
        self._texts, self._text, self._place = iter(texts), "", 0

    def take(self, count: int) -> str:
        """The next ``count`` characters; fewer at the end."""
        parts = []
        while count:
            if self._place == len(self._text):
                found = next(self._texts, None)
                if found is None:
                    break
                self._text, self._place = found, 0
            parts.append(self._text[self._place : self._place + count])
            self._place += len(parts[-1])
            count -= len(parts[-1])
        return "".join(parts)
