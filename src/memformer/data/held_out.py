"""Which documents are held out, and how much of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from numbers import Integral
from typing import Literal

from .documents import Document
from .folders import shown

__all__ = ["HELD_OUT_SHARE", "held_out_split"]

HELD_OUT_SHARE = 48
"""One Nth of the documents is held out; of a single document, that fraction of its end."""


def held_out_split(
    documents: Sequence[Document], share: int = HELD_OUT_SHARE, by: Literal["size", "name"] = "size"
) -> tuple[list[Document], list[Document]]:
    """``(training, held_out)``: about one byte (or id) in ``share`` is held out. Names and sizes alone are looked at.

    First the hash of each name decides, one in ``share``; then a new document moves no other. Where those hold less
    than half or more than twice what is wanted, documents are taken in the order of their hashes as long as they fit,
    until there is enough; then a new one may move others. Where none fit (a book and a README), the end of the longest
    document is held out, from the beginning of a character on.

    Args:
        by: ``"name"`` leaves it at the first, whatever the sizes, with at least one document.

    Raises:
        ValueError: too little to hold anything out.
    """
    if not isinstance(share, Integral) or share < 2:
        raise ValueError(f"share: expected one in at least 2, got one in {share}")
    share = int(share)
    if by not in ("size", "name"):
        raise ValueError(f"by: expected 'size' or 'name', got {by!r}")
    if not documents:
        raise ValueError("documents: expected at least one, got none")
    if len(documents) == 1:
        return _cut(documents, 0, len(documents[0]) // share, share)
    ranks = [int.from_bytes(hashlib.sha256(shown(d.name).encode()).digest()[:8], "big") for d in documents]
    chosen = {i for i, rank in enumerate(ranks) if rank % share == 0}
    if by == "name":
        if not chosen or len(chosen) == len(documents):
            chosen = {min(range(len(documents)), key=ranks.__getitem__)}
        return _divided(documents, chosen)
    sizes = list(map(len, documents))
    wanted = max(sum(sizes) // share, 1)
    if chosen and wanted <= 2 * sum(sizes[i] for i in chosen) <= 4 * wanted and len(chosen) < len(documents):
        return _divided(documents, chosen)
    chosen, held = set(), 0
    for i in sorted(range(len(documents)), key=lambda i: (ranks[i] % share, ranks[i])):
        if held < wanted and 2 * (held + sizes[i]) <= 3 * wanted:
            chosen.add(i)
            held += sizes[i]
    if 2 * held >= wanted:
        return _divided(documents, chosen)
    longest = max(range(len(documents)), key=sizes.__getitem__)
    try:
        return _cut(documents, longest, wanted, share)
    except ValueError:  # a few characters in all
        return _divided(documents, {min(range(len(documents)), key=ranks.__getitem__)})


def _divided(documents: Sequence[Document], chosen: set[int]) -> tuple[list[Document], list[Document]]:
    training = [document for i, document in enumerate(documents) if i not in chosen]
    return training, [document for i, document in enumerate(documents) if i in chosen]


def _cut(documents: Sequence[Document], index: int, wanted: int, share: int) -> tuple[list[Document], list[Document]]:
    """The end of one document is held out."""
    document, training = documents[index], list(documents)
    size = len(document)
    beginning = document.beginning(size - wanted)
    cut = len(beginning)
    if not 0 < cut < size:
        unit = "bytes" if document.text else "tokens"
        raise ValueError(f"{document.name}: {size} {unit} are too few to hold out one in {share}")
    training[index] = beginning
    return training, [document.part(cut, size)]
