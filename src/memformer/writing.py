"""Lanes that are written: what is opened once per segment, and the step of a token, captured on a card where it pays.

A segment is decoded token by token with a cache of its own; when it is full it is encoded, the memory advances, and the
next one begins. On a card a token costs little and a launch much: there the step of a token is captured as one CUDA
graph, and nothing that is only to be known now and then (which lanes have ended) is waited for at each token.

What is *not* known here: how a model computes; and of the replay engine all but how a function is captured.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .data.segments import Segment
from .interface import SegmentModel
from .replay import capture
from .sampling import Choice
from .state import MemoryState
from .wavefront import read_segments

__all__ = [
    "AHEAD",
    "WORTH_CAPTURING",
    "Capture",
    "Generators",
    "Stream",
    "Writing",
    "after_last",
    "check_capture",
    "diverged",
    "read_lanes",
]

Capture = capture.Mode
"""Whether the step of a token is captured: "auto", "on" or "off"."""

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One that draws for all lanes, or one for each."""

AHEAD = 16
"""On a card, tokens between two looks at which lanes have ended, where nothing else needs to know it."""
WORTH_CAPTURING = 64
"""Tokens still to come that make up for a capture: it takes as long as some dozens of eager ones (an estimate)."""


def read_lanes(model: SegmentModel, lanes: Sequence[Tensor], state: MemoryState) -> MemoryState:
    """The state after these tokens. Each lane's last whole segment stays unread, as a state has it.

    Lanes read together, and where it pays with all layers at once, until the first of them has no more to read.
    """
    state, length, begun = state.clone(), state.length, state.filled.tolist()
    texts = [torch.cat([row[:n], lane]) for row, n, lane in zip(state.pending, begun, lanes, strict=True)]
    whole = [len(text) // length for text in texts]
    going, done = [i for i, count in enumerate(whole) if count], 0
    segments, memory = model.resumed(state.select(going)) if going else ([], None)
    while going:
        until = min(whole[i] for i in going) - 1
        for k in range(done, until):
            segments.append(Segment(torch.stack([texts[i][k * length : (k + 1) * length] for i in going])))
        memory = read_segments(model, segments, memory, each=lambda output: None)
        index, left = torch.tensor([(i, whole[i] - 1 > until) for i in going], device=state.position.device).unbind(1)
        over, goes_on = index[left == 0], left == 1
        state.memory[over] = model.packed(memory)[~goes_on]
        memory = tree_map(operator.itemgetter(goes_on), memory)
        going, segments, done = index[goes_on].tolist(), [], until
    state.extend(lanes)
    return state


class Writing:
    """Lanes that are being written: their state, and what the network opens once per segment.

    The given state is written in place: until lanes are selected, all tensors stay where they are.

    Attributes:
        filled: how many tokens are pending in each lane, as far as Python knows.
    """

    def __init__(self, model: SegmentModel, state: MemoryState):
        self.model, self.state = model, state
        self.filled: list[int] = state.filled.tolist()
        self.opened = model.open(state)

    def logits(self) -> Tensor:
        """Of the next token of each lane, (batch, vocabulary)."""
        return self.model.next_logits(self.state, self.opened)

    def seen(self) -> Tensor:
        """The tokens of the last whole and of the pending segment (batch, 2 length)."""
        return torch.cat([self.state.segment, self.state.pending], 1)

    def append(self, lanes: Sequence[int], tokens: Tensor) -> None:
        """One more token in each of ``lanes``; where that makes a segment full, the memory advances."""
        index = torch.tensor(lanes, dtype=torch.int64, device=tokens.device)
        going = torch.zeros_like(self.state.position, dtype=torch.bool).index_fill_(0, index, True)
        self.put(going, torch.zeros_like(self.state.position).index_copy_(0, index, tokens))
        self.turn(self.count(lanes))

    def put(self, going: Tensor, tokens: Tensor) -> None:
        """One more token in each lane that goes on, (batch,) both; without waiting for a card."""
        pending, filled = self.state.pending, self.state.filled[:, None]
        here = (torch.arange(self.state.length, device=pending.device) == filled) & going[:, None]
        pending.copy_(torch.where(here, tokens[:, None], pending))
        self.state.position.add_(going)

    def count(self, lanes: Sequence[int]) -> list[int]:
        """Count a token in each of these lanes; those whose segment is full now."""
        for i in lanes:
            self.filled[i] = (self.filled[i] + 1) % self.state.length
        return [i for i in lanes if not self.filled[i]]

    def turn(self, full: Sequence[int]) -> None:
        """The memory of those lanes advances, and their next segment begins."""
        if full:
            index = torch.tensor(full, device=self.state.position.device)
            self.state.advance(index, self.opened.memory[index])
            new = self.model.open(self.state.select(index))
            tree_map(lambda old, x: old.index_copy_(0, index, x), self.opened, new)

    def select(self, lanes: Tensor) -> None:
        """Go on with those lanes alone, in that order; a lane may come more than once."""
        self.state = self.state.select(lanes)
        self.filled = [self.filled[i] for i in lanes.tolist()]
        self.opened = tree_map(lambda x: x[lanes], self.opened)


def after_last(state: MemoryState, *last: int) -> MemoryState:
    """The state of one lane after its last token: the start token has ended a document, and begins the next one."""
    return state.reset([0]) if last == (state.start,) else state


def diverged() -> ValueError:
    """What is wrong with a model of whose logits nothing can be chosen."""
    return ValueError(
        "the model's logits are not numbers (nan or inf), or -inf for all that may be generated: its weights have "
        "diverged, or rule out every such token"
    )


def check_capture(mode: str, model: SegmentModel, device: torch.device) -> None:
    """Raise ValueError where ``mode`` is none of "auto", "on", "off", or is "on" where nothing can be captured."""
    if mode not in get_args(capture.Mode):
        raise ValueError(f"capture: expected one of {', '.join(get_args(capture.Mode))}, got {mode!r}")
    if mode != "on":
        return
    if not capture.can_capture(device):
        raise ValueError(f"capture: expected a CUDA device, got {device}; leave capture 'on' out")
    if not model.steps_alike:
        raise ValueError(
            f"capture: what a {type(model).__name__} does for a token differs from token to token, which is not "
            "captured; leave capture 'on' out"
        )


class _Step:
    """A token of each lane, chosen and written. All of it is computed on the device, and nothing is waited for."""

    def __init__(self, writing: Writing, choice: Choice):
        self.model, self.writing, self.choice = writing.model, writing, choice  # capturing looks at the model's mode

    @torch.no_grad()
    def token(self, going: Tensor, spoiled: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`write`, given the model's logits."""
        return self.write(self.writing.logits(), going, spoiled, noise)

    def write(
        self, logits: Tensor, going: Tensor, spoiled: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(tokens, going, spoiled)``: (batch,) with -1 in lanes that do not go on, and the other two afterwards.

        Args:
            logits: (batch, vocabulary).
            going: (batch,), the lanes that go on.
            spoiled: scalar, whether in some lane nothing could be chosen. From then on nothing is written.
            noise: see :class:`~memformer.sampling.Choice`.
        """
        scores = self.choice.scores(logits, self.writing.seen())
        spoiled = spoiled | (self.choice.spoiled(scores) & going).any()
        going = going & ~spoiled
        tokens = self.choice(scores, noise)
        self.writing.put(going, tokens)
        ends = (tokens[:, None] == self.choice.stops).any(-1)
        return torch.where(going, tokens, -1), going & ~ends, spoiled


class Stream(Iterator[Tensor]):
    """The tokens of :func:`~memformer.generation.stream`, one (batch,) tensor at a time, -1 in lanes that have ended.

    Lanes that have ended are dropped from the batch, so they cost nothing; where steps are captured they stay in it.

    Args:
        state: is written in place.
        mode: whether to capture the step of a token, as :func:`~memformer.replay.captured` has it; checked already.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: SegmentModel,
        state: MemoryState,
        max_new_tokens: int,
        choice: Choice,
        generator: Generators,
        mode: Capture = "auto",
    ):
        self._writing, self._choice, self._generator = Writing(model, state), choice, generator
        self._step = _Step(self._writing, choice)
        self._left, self._mode = max_new_tokens, mode if model.steps_alike else "off"
        self._captured: capture.Captured | None = None
        self._like: Tensor | None = None  # what noise is to be like, once a token has come
        # Of each lane of the batch: which one of the stream it is, and whether it goes on.
        self._lanes = list(range(state.batch_size))
        self._going = torch.ones_like(state.position, dtype=torch.bool)
        self._rows = list(self._lanes)  # those that go on, as far as Python knows
        self._batch = state.batch_size
        self._spoiled = torch.zeros((), dtype=torch.bool, device=state.position.device)
        self._ended: dict[int, MemoryState] = {}
        self._waits = capture.can_capture(state.position.device)  # to look at something there takes time
        self._ahead = AHEAD if self._waits and not choice.stops.numel() else 1
        self._unseen = 0

    def __getstate__(self) -> dict[str, object]:
        """For a copy, which goes on eagerly: a launch would write into the original's state."""
        return {**vars(self), "_captured": None}

    @property
    def state(self) -> MemoryState:
        """Of all lanes, after the tokens that came so far; a copy."""
        if self._unseen:
            self._look([])
        all_go_on = len(self._rows) == len(self._lanes)
        going = self._writing.state if all_go_on else self._writing.state.select(self._index)
        parts = MemoryState.cat([going, *self._ended.values()])
        lanes = [*(self._lanes[row] for row in self._rows), *self._ended]
        return parts.select(sorted(range(len(lanes)), key=lanes.__getitem__))

    @property
    def nbytes(self) -> int:
        """Of what is kept from token to token: the state, the decoder's cache, and what is computed once per segment.

        Lanes that have ended count their state alone.
        """
        return self.state.nbytes + sum(x.nbytes for x in tree_leaves(self._writing.opened))

    @property
    def launches(self) -> int:
        """How many tokens came from a launch of the captured step."""
        return 0 if self._captured is None else self._captured.launches

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if not self._left or not self._rows:
            raise StopIteration
        if self._like is not None and self._mode != "off":
            self._capture(self._like)
        self._left -= 1
        tokens = self._take()
        if len(self._lanes) < self._batch:
            tokens = tokens.new_full((self._batch,), -1).index_copy_(0, self._places, tokens)
        full = self._writing.count(self._rows)
        self._unseen += 1
        if full or self._unseen == self._ahead or not self._left:
            self._look(full)
        return tokens

    def rest(self, callback: Callable[[Tensor], object] | None = None) -> Tensor:
        """All tokens that are still to come, (batch, any number), with -1 behind the end of a lane.

        Args:
            callback: called with each (batch,) tensor as it comes. Without one it is looked at now and then which
                lanes have ended, if nothing is drawn: some columns of -1 may be at the end.
        """
        if callback is None and self._waits and not self._choice.draws:
            self._ahead = AHEAD
        columns = []
        for tokens in self:
            columns.append(tokens)
            if callback is not None:
                callback(tokens)
        return torch.stack(columns, 1) if columns else self._going.new_empty((self._batch, 0), dtype=torch.int64)

    def _take(self) -> Tensor:
        """The next token of each lane of the batch."""
        given = self._going, self._spoiled
        if self._captured is not None and self._like is not None:
            tokens, self._going, self._spoiled = self._captured(*given, self._noise(self._like))
        else:
            logits = self._writing.logits()
            self._like = self._choice.precise(logits)
            tokens, self._going, self._spoiled = self._step.write(logits, *given, self._noise(self._like))
        return tokens

    def _noise(self, like: Tensor) -> Tensor | None:
        """For the lanes that go on, as ``torch.multinomial`` would draw it; outside of what is captured.

        So any generator draws what it would draw eagerly.
        """
        if not self._choice.draws:
            return None
        if isinstance(self._generator, Sequence):
            each = [self._generator[self._lanes[row]] for row in self._rows]
            drawn = torch.stack([torch.empty_like(like[0]).exponential_(generator=g) for g in each])
        else:
            drawn = torch.empty_like(like[: len(self._rows)]).exponential_(generator=self._generator)
        return drawn if len(drawn) == len(like) else torch.ones_like(like).index_copy_(0, self._index, drawn)

    def _capture(self, like: Tensor) -> None:
        """Capture the step of a token, where that is asked for, pays and can be."""
        mode, self._mode = self._mode, "off"
        if mode == "auto" and self._left < WORTH_CAPTURING:
            return
        captured = capture.captured(self._step.token, mode=mode, most=1)
        # Where no lane goes on nothing is written, however often it is run.
        noise = torch.ones_like(like) if self._choice.draws else None
        captured.prepare(torch.zeros_like(self._going), self._spoiled, noise)
        captured.most = 0  # captured anew, where a weight was replaced, it would write tokens: it then runs eagerly
        if captured.graphs:
            self._captured = captured

    def _look(self, full: Sequence[int]) -> None:
        """Wait for the tokens that came, and learn which lanes have ended and whose segment is full.

        Args:
            full: the lanes of the batch whose segment is full if they went on so far.

        Raises:
            ValueError: some logits were not numbers. The state is the one before them.
        """
        writing, self._unseen = self._writing, 0
        position, going, spoiled = self._seen()
        writing.filled = [x % writing.state.length for x in position]
        if spoiled:
            raise diverged()
        writing.turn([row for row in full if not writing.filled[row]])
        ended = [row for row in self._rows if not going[row]]
        if not ended:
            return
        for row in ended:
            self._ended[self._lanes[row]] = self._after(row)
        self._rows = [row for row in self._rows if going[row]]
        self._index = torch.tensor(self._rows, dtype=torch.int64, device=writing.state.position.device)
        if self._captured is None:
            self._drop()

    def _seen(self) -> tuple[list[int], list[int], int]:
        """Positions, which lanes go on, and whether something was spoiled; in one transfer from the device."""
        position = self._writing.state.position
        numbers = torch.cat([position, self._going.to(position), self._spoiled[None].to(position)]).tolist()
        return numbers[: len(position)], numbers[len(position) : -1], numbers[-1]

    def _drop(self) -> None:
        """The lanes that have ended leave the batch."""
        self._writing.select(self._index)
        self._lanes = [self._lanes[row] for row in self._rows]
        self._rows = list(range(len(self._lanes)))
        self._going = self._going[self._index]
        self._like = None if self._like is None else self._like[self._index]
        self._places = torch.tensor(self._lanes, dtype=torch.int64, device=self._index.device)

    def _after(self, row: int) -> MemoryState:
        """:func:`after_last`, of one of the lanes."""
        state, filled = self._writing.state.select([row]), self._writing.filled[row]
        if self._choice.start not in self._choice.sampling.stop:
            return state
        last = state.pending[0, filled - 1] if filled else state.segment[0, -1]
        return after_last(state, int(last))
