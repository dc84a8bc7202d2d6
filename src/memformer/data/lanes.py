"""Documents streamed into the lanes of a batch, segment by segment, for text continuation.

In each step every lane holds one segment of its document as source and the next one as target. A document's first step
has the start token alone as its source, so that every token of every document is predicted exactly once; it carries the
lane's reset flag. When a document ends, the next one starts in that lane; nothing waits for the longest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..segments import Segment

__all__ = ["Lanes"]


@dataclasses.dataclass
class _Lane:
    document: int = -1
    """Its document; -1 before the first and after the last."""
    position: int = 0
    """How many of the document's tokens were targets already."""


class Lanes:
    """An iterator of :class:`~memformer.segments.Segment`, resumable in the middle of a document.

    Args:
        documents: the tokens of each, as one-dimensional integer arrays; none may be empty.
        lanes: batch size.
        length: tokens per segment.
        start: id of the token that starts a document and the decoder.
        seed: shuffles the documents, anew in every epoch; None keeps their order.
        epochs: how often to go through them; None for ever. At the end, lanes without a document are masked.

    Raises:
        ValueError: a setting is out of range, or a document is empty.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        *,
        lanes: int,
        length: int,
        start: int,
        seed: int | None = None,
        epochs: int | None = None,
    ):
        if not documents:
            raise ValueError("documents: expected at least one, got none")
        for i, document in enumerate(documents):
            if document.ndim != 1 or not len(document) or not np.issubdtype(document.dtype, np.integer):
                got = f"{document.dtype} of shape {document.shape}"
                raise ValueError(
                    f"documents: expected non-empty one-dimensional integer arrays, got {got} at index {i}"
                )
        if lanes < 1 or length < 1:
            raise ValueError(f"lanes and length: expected at least 1, got {lanes} and {length}")
        self.documents, self.length, self.start, self.seed, self.epochs = documents, length, start, seed, epochs
        self._lanes = [_Lane() for _ in range(lanes)]
        self._epoch, self._drawn = 0, 0
        self._order = self._shuffled()

    def __iter__(self) -> Iterator[Segment]:
        return self

    def __next__(self) -> Segment:
        for lane in self._lanes:
            if lane.document < 0 or lane.position >= len(self.documents[lane.document]):
                lane.document, lane.position = self._draw(), 0
        if all(lane.document < 0 for lane in self._lanes):
            raise StopIteration
        count, length = len(self._lanes), self.length
        src, src_mask = np.zeros((count, length), np.int64), np.zeros((count, length), np.bool_)
        tgt, tgt_mask = np.zeros((count, length + 1), np.int64), np.zeros((count, length + 1), np.bool_)
        reset = np.zeros(count, np.bool_)
        for i, lane in enumerate(self._lanes):
            if lane.document < 0:
                continue
            tokens = self.documents[lane.document]
            reset[i] = lane.position == 0
            source = tokens[lane.position - length : lane.position] if lane.position else [self.start]
            target = tokens[lane.position : lane.position + length]
            src[i, : len(source)], src_mask[i, : len(source)] = source, True
            tgt[i, 0], tgt[i, 1 : 1 + len(target)], tgt_mask[i, : 1 + len(target)] = self.start, target, True
            lane.position += len(target)
        return Segment(*map(torch.from_numpy, (src, src_mask, reset, tgt, tgt_mask)))

    def rollout(self, horizon: int) -> list[Segment]:
        """The next ``horizon`` segments; fewer at the end, and none after it."""
        return [segment for _, segment in zip(range(horizon), self, strict=False)]

    def _draw(self) -> int:
        """The next document's index, or -1 when there is none."""
        if self._drawn == len(self._order):
            self._epoch, self._drawn = self._epoch + 1, 0
            self._order = self._shuffled()
        if self.epochs is not None and self._epoch >= self.epochs:
            self._drawn = len(self._order)
            return -1
        self._drawn += 1
        return int(self._order[self._drawn - 1])

    def _shuffled(self) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self.documents))
        return np.random.default_rng([self.seed, self._epoch]).permutation(len(self.documents))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as numbers alone."""
        lanes = [dataclasses.asdict(lane) for lane in self._lanes]
        return {"epoch": self._epoch, "drawn": self._drawn, "seed": self.seed, "lanes": lanes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken, over the same documents.

        Raises:
            ValueError: the state has another number of lanes or another seed.
        """
        if len(state["lanes"]) != len(self._lanes):
            raise ValueError(f"lanes: expected the {len(state['lanes'])} of the saved stream, got {len(self._lanes)}")
        if state["seed"] != self.seed:
            raise ValueError(f"seed: expected {state['seed']}, that of the saved stream, got {self.seed}")
        self._epoch, self._drawn = state["epoch"], state["drawn"]
        self._lanes = [_Lane(**lane) for lane in state["lanes"]]
        self._order = self._shuffled()
