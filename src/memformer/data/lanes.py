"""Documents streamed into the lanes of a batch, segment by segment.

In each step every lane holds one segment of its document as source and, for continuation, the next one as target. A
document's first step has the start token alone as its source, so that every token of every document is predicted once;
it carries the lane's reset flag. When a document ends, the next one starts in that lane; nothing waits for the longest.
A document that is long for the number of lanes may be cut into stretches, which are streamed as documents are, but for
their first source: the segment of text before the stretch.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
import torch

from ..config import check_count
from .documents import Document, Tokens
from .objectives import Mixture, Objective
from .segments import Segment

__all__ = ["Lanes", "LanesState"]


class LanePlace(TypedDict):
    """Where a lane stands: its document, -1 for none, and how many of the document's tokens were targets."""

    document: int
    position: int
    begin: NotRequired[int]
    """Where its stretch begins, in a stream with stretches."""


class LanesState(TypedDict):
    """Where a stream stands, as numbers alone; the same on every rank."""

    step: int
    epoch: int
    drawn: int
    """Documents, or stretches, of this epoch that were begun."""
    stretches: NotRequired[int]
    """How many there are, where a document was cut."""
    seed: int | None
    length: int
    lanes: list[LanePlace]


class _Stretch(NamedTuple):
    """Tokens ``begin`` to ``end`` of a document; the whole one where nothing was cut."""

    document: int
    begin: int
    end: int | None


@dataclass
class _Lane:
    document: int = -1
    """Its document; -1 before the first and after the last."""
    begin: int = 0
    """Where in the document its stretch begins, at the border of a segment."""
    position: int = 0
    """The place in the document of the next target."""
    end: int = 0
    """The place after the stretch's last token."""
    tokens: Tokens | None = None
    """The document, where the lane is this rank's."""


class Lanes:
    """An iterator of :class:`~memformer.data.segments.Segment`, resumable in the middle of a document.

    Every rank follows all lanes and returns its own rows. Together the ranks do what one process would, and each has
    the same state. A Segment has ``src`` (lanes of the rank, length) and ``tgt`` (lanes of the rank, length + 1),
    whose first token is the objective's start token.

    Attributes:
        sizes: (documents,), how many tokens each has; None where that is known only when its turn comes.

    Args:
        documents: the tokens of each: a one-dimensional integer array (or list, tensor, or what
            :func:`~memformer.data.encode_documents` returns); none may be empty. A sequence, or any iterable; one that
            cannot be indexed cannot be shuffled, and a resumed stream goes through it again up to its place.
        lanes: batch size of all ranks together.
        length: tokens per segment.
        start: id of the token that starts a document, and the decoder for continuation.
        seed: shuffles the documents, anew in every epoch; None keeps their order.
        epochs: how often to go through them; None for ever. At the end, lanes without a document are masked.
        rank, world_size: which process this is, of how many.
        objectives: what the targets are; None for text continuation alone.
        encode: makes such an array of an item of ``documents``, as
            ``encode=lambda row: tokenizer.encode(row["text"])`` of a row of a Hugging Face dataset. It runs when the
            item's turn comes, on every rank.
        spread: cut documents that are longer than their fair share (all tokens / lanes, rounded up to whole segments)
            into stretches of about equal length, so that the lanes read different text. A stretch is streamed as a
            document is, but its first source is the segment before it. Where no document is so long, nothing changes.
            Only a list of arrays, or the like, can be cut: other lengths are not known before their turn comes.
        stretch: with ``spread``, segments of a stretch at most, so that memories often begin anew; where they seldom
            do, a model does not learn to begin. None for no other limit than the share.

    Raises:
        ValueError: a setting is out of range, or a document is empty or not such an array (at once where the documents
            are a list or the like, else when its turn comes).
    """

    def __init__(
        self,
        documents: Iterable[Any],
        *,
        lanes: int,
        length: int,
        start: int,
        seed: int | None = None,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        objectives: Mixture | None = None,
        encode: Callable[[Any], object] | None = None,
        spread: bool = False,
        stretch: int | None = None,
    ):
        if lanes < 1 or length < 1:
            raise ValueError(f"lanes and length: expected at least 1, got {lanes} and {length}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to world_size - 1, got {rank} of {world_size}")
        if lanes % world_size:
            raise ValueError(f"lanes: expected a multiple of the {world_size} ranks that share them, got {lanes}")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs: expected at least 1, or None for ever, got {epochs}")
        if stretch is not None:
            check_count("stretch", stretch)
            if not spread:
                raise ValueError("stretch: documents that are not spread are not cut; leave one of the two out")
        self.documents, self.length, self.start, self.seed, self.epochs = documents, length, start, seed, epochs
        # Continuation alone needs no draws.
        self.objectives = objectives if objectives is not None and objectives.odds[Objective.CONTINUATION] < 1 else None
        self._encode = encode
        self._indexed = hasattr(documents, "__len__") and hasattr(documents, "__getitem__")
        if not self._indexed and seed is not None:
            raise ValueError("seed: documents that cannot be indexed cannot be shuffled; leave the seed out")
        if not self._indexed and epochs != 1 and iter(documents) is documents:
            raise ValueError(
                f"epochs: an iterator can be gone through once, so expected 1, got {epochs}; give something that "
                "starts anew at each iter()"
            )
        if self._indexed and not len(documents):  # type: ignore[arg-type]
            raise ValueError("documents: expected at least one, got none")
        self.sizes: np.ndarray | None = None
        self._cuts: np.ndarray | None = None
        if isinstance(documents, Sequence) and encode is None:
            sizes = [len(self._tokens(index, item)) for index, item in enumerate(documents)]
            self.sizes = np.array(sizes, np.int64)
            self._cuts = _cuts(self.sizes, lanes, length, stretch) if spread else None
        elif spread:
            raise ValueError(
                "spread: expected a list of arrays, or the like, whose lengths are known without reading; leave it out "
                "for an iterable, and with encode="
            )
        rows = lanes // world_size
        self._own = range(rank * rows, (rank + 1) * rows)
        self._lanes = [_Lane() for _ in range(lanes)]
        self._step = self._epoch = self._drawn = 0
        self._pass: Iterator[tuple[_Stretch, object]] | None = None

    def __iter__(self) -> Iterator[Segment]:
        return self

    def __next__(self) -> Segment:
        for i, lane in enumerate(self._lanes):
            if lane.position >= lane.end:
                self._lanes[i] = self._draw(i)
        if all(lane.document < 0 for lane in self._lanes):
            raise StopIteration
        segment = self._segment()
        for lane in self._lanes:
            lane.position = min(lane.position + self.length, lane.end)
        self._step += 1
        return segment

    def rollout(self, horizon: int) -> list[Segment]:
        """The next ``horizon`` segments; fewer at the end, and none after it."""
        return list(itertools.islice(self, horizon))

    def _segment(self) -> Segment:
        """The lanes' places as arrays: src, and its mask (rows, length), tgt and its mask (rows, length + 1)."""
        count, length, mixture = len(self._own), self.length, self.objectives
        src, src_mask = np.zeros((count, length), np.int64), np.zeros((count, length), np.bool_)
        tgt, tgt_mask = np.zeros((count, length + 1), np.int64), np.zeros((count, length + 1), np.bool_)
        reset = np.zeros(count, np.bool_)
        drawn = None if mixture is None else mixture.draw(self._step, len(self._lanes), length)
        reach = length if mixture is None else 2 * length
        for row, i in enumerate(self._own):
            lane = self._lanes[i]
            if lane.tokens is None:
                continue
            begin = max(lane.position - reach, lane.begin)
            window = lane.tokens[begin : min(lane.position + length, lane.end)]
            past, target, first = window[: lane.position - begin], window[lane.position - begin :], self.start
            source, earlier = past[-length:], past[:-length]
            if mixture is not None and drawn is not None:
                objectives, uniform = drawn
                if objectives[i] == Objective.INFILLING and len(source):
                    first, target = mixture.starts[Objective.INFILLING], source
                    source = mixture.damage(source, uniform[i])
                elif objectives[i] == Objective.RECALL and len(earlier):
                    first, target = mixture.starts[Objective.RECALL], earlier
            if lane.position == lane.begin:
                reset[row] = True
                source = lane.tokens[begin - length : begin] if begin else np.array([self.start])
            src[row, : len(source)], src_mask[row, : len(source)] = source, True
            tgt[row, 0], tgt[row, 1 : 1 + len(target)], tgt_mask[row, : 1 + len(target)] = first, target, True
        return Segment(*map(torch.from_numpy, (src, src_mask, reset, tgt, tgt_mask)))

    def _open(self, i: int, stretch: _Stretch, tokens: Tokens, position: int) -> _Lane:
        """Lane ``i`` at a place in a document."""
        document, begin, end = stretch
        own = tokens if i in self._own else None
        return _Lane(document, begin, position, len(tokens) if end is None else end, own)

    def _draw(self, i: int) -> _Lane:
        """Lane ``i`` at the beginning of the next stretch, or empty when there is none."""
        while self.epochs is None or self._epoch < self.epochs:
            if self._pass is None:
                self._pass = self._begin()
            for stretch, item in self._pass:
                self._drawn += 1
                return self._open(i, stretch, self._tokens(stretch.document, item), stretch.begin)
            if not self._drawn:
                raise ValueError("documents: expected at least one, got none")
            self._pass, self._epoch, self._drawn = None, self._epoch + 1, 0
        return _Lane()

    def _begin(self) -> Iterator[tuple[_Stretch, object]]:
        """The rest of the epoch's stretches, each with its document."""
        count = self.stretches
        if count is None:
            return ((_Stretch(i, 0, None), item) for i, item in enumerate(self.documents))
        order: Sequence[int] | np.ndarray = range(count)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self._epoch]).permutation(count)
        stretches = (self._stretch(int(i)) for i in order[self._drawn :])
        return ((stretch, self.documents[stretch.document]) for stretch in stretches)  # type: ignore[index]

    def _stretch(self, index: int) -> _Stretch:
        return _Stretch(index, 0, None) if self._cuts is None else _Stretch(*self._cuts[index].tolist())

    def _tokens(self, index: int, item: object) -> Tokens:
        """An item as tokens that can be sliced."""
        if self._encode is not None:
            item = self._encode(item)
        if isinstance(item, list | tuple):
            with contextlib.suppress(ValueError):  # lists of unequal lengths in it: no array
                item = np.asarray(item, None if len(item) else np.int64)
        elif isinstance(item, torch.Tensor):
            item = item.numpy(force=True)
        dtype, dimensions = getattr(item, "dtype", None), getattr(item, "ndim", 1)
        if dtype is not None and np.issubdtype(dtype, np.integer) and dimensions == 1 and len(cast(Tokens, item)):
            return cast(Tokens, item)
        got = type(item).__name__
        if dtype is not None:
            got = f"{dtype} of shape {getattr(item, 'shape', (len(cast(Tokens, item)),))}"
        hint = ""
        if isinstance(item, Document):
            hint = "; encode_documents(documents, tokenizer) makes arrays of them"
        elif dtype is None and self._encode is None:
            hint = "; encode= takes a function that makes one of it"
        raise ValueError(
            f"documents: expected non-empty one-dimensional integer arrays, got {got} at index {index}{hint}"
        )

    @property
    def rows(self) -> int:
        """How many of the lanes are this rank's: the batch size of its segments."""
        return len(self._own)

    @property
    def stretches(self) -> int | None:
        """How many stretches an epoch has, an uncut document being one; None where documents cannot be counted."""
        if not self._indexed:
            return None
        return len(self.documents) if self._cuts is None else len(self._cuts)  # type: ignore[arg-type]

    @property
    def epochs_read(self) -> float:
        """How many times the documents were gone through; each stretch counts alike, by the share of it that was read.

        Raises:
            ValueError: the documents cannot be counted.
        """
        count = self.stretches
        if count is None:
            raise ValueError("epochs_read: the number of documents that cannot be indexed is not known")
        reading = [lane for lane in self._lanes if lane.document >= 0]
        unread = sum((lane.end - lane.position) / (lane.end - lane.begin) for lane in reading)
        return self._epoch + (self._drawn - unread) / count

    def state_dict(self) -> LanesState:
        """Where the stream stands, as numbers alone; the same on every rank."""
        lanes: list[LanePlace] = [{"document": lane.document, "position": lane.position} for lane in self._lanes]
        state: LanesState = {
            "step": self._step,
            "epoch": self._epoch,
            "drawn": self._drawn,
            "seed": self.seed,
            "length": self.length,
            "lanes": lanes,
        }
        if self._cuts is not None:
            state["stretches"] = len(self._cuts)
            for lane, place in zip(self._lanes, lanes, strict=True):
                place["begin"] = lane.begin
        return state

    def load_state_dict(self, state: LanesState) -> None:
        """Go on from where :meth:`state_dict` was taken, over the same documents; the number of ranks may differ.

        Raises:
            ValueError: the state has another number of lanes, another length of segments, another seed or other
                stretches, or the documents are not the same.
        """
        if len(state["lanes"]) != len(self._lanes):
            raise ValueError(f"lanes: expected the {len(state['lanes'])} of the saved stream, got {len(self._lanes)}")
        for name, before, now in (("seed", state["seed"], self.seed), ("length", state["length"], self.length)):
            if before != now:
                raise ValueError(f"{name}: expected {before}, that of the saved stream, got {now}")
        before, now = state.get("stretches"), None if self._cuts is None else len(self._cuts)
        if before != now:
            expected = "whole documents" if before is None else before
            raise ValueError(f"stretches: expected {expected}, those of the saved stream, got {self.stretches}")
        cuts = () if self._cuts is None else self._cuts.tolist()
        stretches = {(document, begin): _Stretch(document, begin, end) for document, begin, end in cuts}
        self._step, self._epoch, self._drawn = state["step"], state["epoch"], state["drawn"]
        found = self._find({lane["document"] for lane in state["lanes"]} - {-1})
        for i, lane in enumerate(state["lanes"]):
            document, begin = lane["document"], lane.get("begin", 0)
            if document < 0:
                self._lanes[i] = _Lane()
                continue
            stretch = stretches.get((document, begin)) if stretches else _Stretch(document, 0, None)
            if stretch is None:
                raise ValueError(
                    f"stretches: not those of the saved stream, document {document} has none that begins at {begin}"
                )
            self._lanes[i] = self._open(i, stretch, found[document], lane["position"])
            if self._lanes[i].position > self._lanes[i].end:
                raise ValueError(f"documents: not those of the saved stream, document {document} was longer")

    def _find(self, wanted: set[int]) -> dict[int, Tokens]:
        """The documents of these indices, the pass standing behind those that were drawn."""
        missing = "documents: not those of the saved stream, there were more"
        if self._indexed:
            self._pass = None
            if max(wanted, default=-1) >= len(self.documents):  # type: ignore[arg-type]
                raise ValueError(missing)
            return {i: self._tokens(i, self.documents[i]) for i in wanted}  # type: ignore[index]
        self._pass = self._begin()
        drawn = itertools.islice(self._pass, self._drawn)
        found = {i: self._tokens(i, item) for (i, _, _), item in drawn if i in wanted}
        # The others are of the epoch before.
        rest = wanted - found.keys()
        again = itertools.islice(self._begin(), max(rest) + 1) if rest else ()
        found |= {i: self._tokens(i, item) for (i, _, _), item in again if i in rest}
        if wanted - found.keys():
            raise ValueError(missing)
        return found


def _cuts(sizes: np.ndarray, lanes: int, length: int, most: int | None) -> np.ndarray | None:
    """(stretches, 3), the document, begin and end of each, in order; None where nothing is cut, for no document is
    longer than its share, or has more than ``most`` segments.

    Borders are borders of segments, so the segments are those of whole documents.
    """
    total = int(sizes.sum())
    share = -(-total // (lanes * length)) * length
    segments = -(-sizes // length)
    pieces = np.where(sizes > share, np.minimum(-(-sizes * lanes // total), segments), 1)
    if most is not None:
        pieces = np.maximum(pieces, -(-segments // most))
    if pieces.max() == 1:
        return None
    document = np.repeat(np.arange(len(sizes)), pieces)
    index = np.arange(len(document)) - (pieces.cumsum() - pieces)[document]
    begin, end = (i * segments[document] // pieces[document] * length for i in (index, index + 1))
    return np.stack([document, begin, np.minimum(end, sizes[document])], 1)
