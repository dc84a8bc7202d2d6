"""Reading and writing streams of any length: constant memory, and constant time per token.

A segment is decoded token by token with a cache of its own; when it is full it is encoded, the memory advances, and the
next one begins. :func:`read`, :func:`stream` and :func:`generate` are methods of the models, too. Filters are pure
functions of logits (..., vocabulary), named by what they keep; the rest becomes minus infinity. What is *not* known
here: how a model computes. It is asked only for what a :class:`~memformer.interface.SegmentModel` has for this.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, Unpack, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .checks import as_mask, as_tokens, describe, is_tensor
from .config import ModelConfig, check_count, check_number, is_count
from .data.segments import Segment
from .device import summing_device
from .interface import SegmentModel
from .pretrained import unwrapped
from .state import MemoryState
from .wavefront import read_segments

__all__ = [
    "Filters",
    "Generated",
    "Sampling",
    "SamplingKeywords",
    "Stream",
    "generate",
    "keep_allowed",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalise_repetition",
    "read",
    "stream",
]

Generators = torch.Generator | Sequence[torch.Generator] | None
Tokens = Tensor | Sequence[Tensor]
"""(batch, tokens) token ids, or one (tokens,) per lane."""


class Generated(NamedTuple):
    """What :func:`generate` returns.

    Attributes:
        tokens: for each lane its new tokens (count,), with the stop token if it ended with one.
        state: of all lanes after these tokens; give it to the next call to go on.
    """

    tokens: list[Tensor]
    state: MemoryState


# --- How a token is chosen --------------------------------------------------------------------------------------------


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The ``k`` most likely tokens; more where several are as likely as the last of them."""
    check_count("top_k", k, 1)
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of most likely tokens whose probabilities reach ``p`` (nucleus sampling)."""
    check_number("top_p", p)
    if not 0 < p <= 1:
        raise ValueError(f"top_p: expected a share in (0, 1], got {p}")
    ordered, order = logits.sort(descending=True)
    probability = ordered.softmax(-1)
    # CUDA adds up numbers with a point in an order of its own, and refuses to where all is to be deterministic.
    summed = probability.cpu() if torch.are_deterministic_algorithms_enabled() else probability
    beyond = summed.cumsum(-1).to(probability.device) - probability >= p
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least ``p`` times as likely as the likeliest."""
    check_number("min_p", p)
    if not 0 < p <= 1:
        raise ValueError(f"min_p: expected a share in (0, 1], got {p}")
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), float("-inf"))


def keep_allowed(logits: Tensor, never: Sequence[int]) -> Tensor:
    """All tokens but those."""
    return logits.index_fill(-1, torch.tensor(never, dtype=torch.int64, device=logits.device), float("-inf"))


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Tokens in ``seen`` (batch, any number) become less likely for a ``penalty`` above 1 (Keskar et al., 2019)."""
    check_number("repetition_penalty", penalty)
    if not 0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty: expected a finite number above 0, got {penalty}")
    at_seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, seen, True)
    return torch.where(at_seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """How likely each token is to be chosen, given the model's logits."""

    # The numbers of a Sampling, which checks them; the command line has them without its token ids.
    temperature: float = 1.0
    """0 always takes the most likely token; higher is wilder."""
    top_k: int | None = None
    """Choose among this many most likely tokens."""
    top_p: float | None = None
    """Choose among the most likely tokens that together have this probability."""
    min_p: float | None = None
    """Choose among tokens that are at least this many times as likely as the likeliest one (0 to 1)."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of this segment and the one before become less likely."""

    def penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits (batch, vocabulary) after the repetition penalty; ``seen`` (batch, any number): the tokens before."""
        return logits if self.repetition_penalty == 1 else penalise_repetition(logits, seen, self.repetition_penalty)

    def kept(self, logits: Tensor) -> Tensor:
        """Logits (batch, vocabulary) after temperature, top-k, top-p and min-p, in this order."""
        if self.temperature > 0:
            # The greatest is moved to 0 first: no temperature is then too low for the numbers' range.
            logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, 1e-30)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return logits


@dataclass(frozen=True, kw_only=True)
class Sampling(Filters):
    """How tokens are chosen, and which ones end a text. Each field is a keyword of :func:`generate`, too.

    >>> Sampling(temperature=0.8, top_p=0.95, stop=[10])
    Sampling(temperature=0.8, top_k=None, top_p=0.95, min_p=None, repetition_penalty=1.0, stop=[10], never=())

    Attributes:
        temperature: 0 takes the likeliest token; higher is wilder.
        top_k, top_p, min_p: :func:`keep_top_k`, :func:`keep_top_p`, :func:`keep_min_p`; None keeps all. Applied in this
            order, after the temperature.
        repetition_penalty: above 1 makes the tokens of the last whole and of the pending segment less likely: what the
            state holds.
        stop: a lane ends with any of these token ids, which is its last. The start token among them is the end of a
            document (a tokenizer's ``end``): what then goes on from the lane's state begins a new one.
        never: token ids that are not generated, such as a tokenizer's ``special``. The start token is always among
            them unless ``stop`` has it, and so is what the encoder could not read.

    Raises:
        ValueError: a number is out of range; the message names it.
    """

    stop: Sequence[int] = ()
    """Token ids that end a text."""
    never: Sequence[int] = ()
    """Token ids that must not be written."""

    def __post_init__(self) -> None:
        for name in ("stop", "never"):
            ids = getattr(self, name)
            if isinstance(ids, np.ndarray | Tensor):
                object.__setattr__(self, name, ids.tolist())
            elif not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
                raise ValueError(f"{name}: expected a list of token ids, got {ids!r}")
        for name in ("top_p", "min_p", "repetition_penalty"):
            number = getattr(self, name)
            if number is not None or name == "repetition_penalty":
                check_number(name, number)
        if (
            isinstance(self.temperature, bool)
            or not isinstance(self.temperature, numbers.Real)
            or not 0 <= self.temperature < math.inf
        ):
            raise ValueError(
                f"temperature: expected a finite number of at least 0 (0 takes the likeliest), got {self.temperature}"
            )
        # Each filter checks its own number.
        logits = torch.zeros(1, 1, device="cpu")
        seen = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        self.penalised(logits, seen)
        self.kept(logits)

    @classmethod
    def of(cls, sampling: Sampling | None, keywords: SamplingKeywords) -> Sampling:
        """``sampling``, changed by the keywords. Raises TypeError, which names it, for an unknown one."""
        if not isinstance(sampling, Sampling | None):
            raise ValueError(f"sampling: expected a Sampling, got {sampling!r}")
        return dataclasses.replace(sampling or cls(), **keywords)


class SamplingKeywords(TypedDict, total=False):
    """The fields of :class:`Sampling` as keywords, for type checkers."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop: Sequence[int]
    never: Sequence[int]


class _Choice:
    """A :class:`Sampling` for one model and one start token; checks that they fit."""

    def __init__(self, sampling: Sampling, config: ModelConfig, start: int):
        _check_ids("never", sampling.never, config)
        _check_ids("stop", sampling.stop, config)
        self.sampling, self.readable, self.start = sampling, config.vocabulary, start
        self.never = [x for x in (start, *sampling.never) if x != start or start not in sampling.stop]
        if len(set(self.never)) == self.readable:
            raise ValueError("never: no token is left that may be generated")

    def scores(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits of what may be generated at all: tokens that the encoder can read, without ``never``."""
        if logits.isnan().any():
            raise ValueError("the model's logits are not numbers (nan): its weights have diverged")
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        penalised = self.sampling.penalised(logits, seen)
        if penalised is not logits:
            # The start token fills up what the state holds, and is no repetition.
            penalised[..., self.start] = logits[..., self.start]
        logits = penalised
        return keep_allowed(logits, [*self.never, *range(self.readable, logits.shape[-1])])

    def __call__(self, logits: Tensor, seen: Tensor, generator: Generators) -> Tensor:
        """(batch, vocabulary) -> (batch,). One generator draws for all lanes, or each lane has its own."""
        logits = self.sampling.kept(self.scores(logits, seen))
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        probability = logits.softmax(-1)
        if generator is None or isinstance(generator, torch.Generator):
            return torch.multinomial(probability, 1, generator=generator)[:, 0]
        return torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(probability, generator, strict=True)])


# --- Lanes ------------------------------------------------------------------------------------------------------------


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

    The given state is written in place.
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
        self.state.pending[index, self.state.filled[index]] = tokens
        self.state.position[index] += 1
        for i in lanes:
            self.filled[i] = (self.filled[i] + 1) % self.state.length
        full = [i for i in lanes if not self.filled[i]]
        if full:
            index = torch.tensor(full, device=tokens.device)
            self.state.advance(index, self.opened.memory[index])
            new = self.model.open(self.state.select(index))
            tree_map(lambda old, x: old.index_copy_(0, index, x), self.opened, new)

    def select(self, lanes: Tensor) -> None:
        """Go on with those lanes alone, in that order; a lane may come more than once."""
        self.state = self.state.select(lanes)
        self.filled = [self.filled[i] for i in lanes.tolist()]
        self.opened = tree_map(lambda x: x[lanes], self.opened)


# --- Streams and beams ------------------------------------------------------------------------------------------------


class Stream(Iterator[Tensor]):
    """The tokens of :func:`stream`, one (batch,) tensor at a time, with -1 in lanes that have ended.

    Lanes that have ended are dropped from the batch, so they cost nothing.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: SegmentModel,
        state: MemoryState,
        max_new_tokens: int,
        choice: _Choice,
        generator: Generators,
    ):
        self._writing = Writing(model, state)
        self._left, self._choice, self._generator = max_new_tokens, choice, generator
        self._lanes = list(range(state.batch_size))
        self._ended: dict[int, MemoryState] = {}

    @property
    def state(self) -> MemoryState:
        """Of all lanes, after the tokens that came so far; a copy."""
        parts = MemoryState.cat([self._writing.state, *self._ended.values()])
        lanes = [*self._lanes, *self._ended]
        return parts.select(sorted(range(len(lanes)), key=lanes.__getitem__))

    @property
    def nbytes(self) -> int:
        """Of what is kept from token to token: the state, the decoder's cache, and what is computed once per segment.

        Lanes that have ended count their state alone.
        """
        return self.state.nbytes + sum(x.nbytes for x in tree_leaves(self._writing.opened))

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if not self._left or not self._lanes:
            raise StopIteration
        self._left -= 1
        writing, generator = self._writing, self._generator
        if isinstance(generator, Sequence):
            generator = [generator[lane] for lane in self._lanes]
        tokens = self._choice(writing.logits(), writing.seen(), generator)
        writing.append(range(len(self._lanes)), tokens)
        result = tokens.new_full((len(self._lanes) + len(self._ended),), -1)
        result[self._lanes] = tokens
        if self._choice.sampling.stop:
            self._drop(tokens)
        return result

    def _drop(self, tokens: Tensor) -> None:
        """Lanes that end with these tokens leave the batch."""
        ends = torch.isin(tokens, torch.tensor(self._choice.sampling.stop, device=tokens.device))
        if ends.any():
            for i in ends.nonzero()[:, 0].tolist():
                self._ended[self._lanes[i]] = _after(self._writing.state.select([i]), int(tokens[i]))
            going = (~ends).nonzero()[:, 0]
            self._writing.select(going)
            self._lanes = [self._lanes[i] for i in going.tolist()]


_History = tuple[int, "_History"] | None
"""A hypothesis' last token and what came before; hypotheses share their beginnings."""


def _beam_search(
    model: SegmentModel,
    state: MemoryState,
    max_new_tokens: int,
    choice: _Choice,
    beams: int,
    length_penalty: float,
) -> Generated:
    """The likeliest ``beams`` hypotheses are kept, ended ones among them; a lane is done when all of its have ended."""
    writing, device = Writing(model, state), state.position.device
    place = summing_device(device)  # of what is known of hypotheses; the model's own is on its device
    lanes = torch.arange(state.batch_size, device=place)
    found: dict[int, tuple[Tensor, MemoryState]] = {}
    # These are (lanes, width), width growing to ``beams``; writing and histories have a row for each, lane by lane.
    scores = torch.zeros(state.batch_size, 1, dtype=torch.float64, device=place)
    ended, count = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores)
    histories: list[_History] = [None] * state.batch_size
    stops = torch.tensor(choice.sampling.stop, dtype=torch.int64, device=place)

    for step in range(max_new_tokens + 1):
        rows = torch.arange(scores.numel(), device=place).view_as(scores)
        done = ended.all(1) | (step == max_new_tokens)
        if done.any():
            best = (scores / count.clamp(min=1) ** length_penalty).argmax(1, keepdim=True)
            for lane, row in zip(lanes[done].tolist(), rows.gather(1, best)[done, 0].tolist(), strict=True):
                written = _tokens(histories[row])
                tokens = torch.tensor(written, dtype=torch.int64, device=device)
                found[lane] = tokens, _after(writing.state.select([row]), *written[-1:])
            lanes, scores, ended, count, rows = (x[~done] for x in (lanes, scores, ended, count, rows))
            writing.select(rows.flatten().to(device))
            histories = [histories[row] for row in rows.flatten().tolist()]
            rows = torch.arange(scores.numel(), device=place).view_as(scores)
        if not len(lanes):
            break
        gains = choice.scores(writing.logits(), writing.seen()).to(place).double().log_softmax(-1)
        vocabulary = gains.shape[-1]
        # A hypothesis that has ended has one continuation, itself: the first column, for nothing.
        stays = torch.where(torch.arange(vocabulary, device=place) == 0, 0.0, -math.inf).double()
        gains = torch.where(ended[..., None], stays, gains.unflatten(0, scores.shape))
        scores, best = (scores[..., None] + gains).flatten(1).topk(min(beams, scores.shape[1] * vocabulary))
        parent, token = best // vocabulary, best % vocabulary
        # Where there are fewer than ``beams`` possible ones, impossible ones fill up; they must not be written.
        ended = ended.gather(1, parent) | scores.isneginf()
        count = count.gather(1, parent) + ~ended
        rows = rows.gather(1, parent).flatten()
        writing.select(rows.to(device))
        going = (~ended).flatten().nonzero()[:, 0]
        writing.append(going.tolist(), token.flatten()[going].to(device))
        histories = [
            histories[row] if over else (new, histories[row])
            for row, new, over in zip(rows.tolist(), token.flatten().tolist(), ended.flatten().tolist(), strict=True)
        ]
        ended = ended | torch.isin(token, stops)
    results = [found[lane] for lane in range(state.batch_size)]
    return Generated([tokens for tokens, _ in results], MemoryState.cat([after for _, after in results]))


def _after(state: MemoryState, *last: int) -> MemoryState:
    """The state of one lane after its last token: the start token has ended a document, and begins the next one."""
    return state.reset([0]) if last == (state.start,) else state


def _tokens(history: _History) -> list[int]:
    tokens = []
    while history is not None:
        token, history = history
        tokens.append(token)
    return tokens[::-1]


# --- What a model can be asked for ------------------------------------------------------------------------------------


@torch.no_grad()
def read(
    model: SegmentModel,
    tokens: Tokens,
    state: MemoryState | None = None,
    *,
    start: int | None = None,
    mask: Tensor | None = None,
) -> MemoryState:
    """Read tokens of any length and in pieces of any size: pieces leave the state that the whole would.

    Without gradients, and with the model as it is: call ``eval()`` first.

    >>> state = model.read(torch.tensor([[72, 101, 108, 108, 111]]), start=256)
    >>> state = model.read(torch.tensor([[33]]), state)
    >>> state.position
    tensor([6])

    Args:
        model: one that was trained to continue text; a compiled or wrapped one is the model inside.
        tokens: (batch, tokens) token ids, none at all included, or a list with one (tokens,) per lane; one (tokens,) by
            itself is of one lane. Tensors, arrays (as ``tokenizer.encode`` gives them) or lists of integers.
        state: from earlier tokens; it stays as it is. None begins a document in every lane.
        start: the token that started documents and decoder in training; a given state knows it.
        mask: like ``tokens``, boolean or integer, True or 1 for tokens that exist, wherever they stand.

    Raises:
        ValueError: an argument does not fit the model or the others; the message says what was expected.
    """
    model = _of_kind(model)
    lanes, state = _begin(model, tokens, state, start, mask)
    return read_lanes(model, lanes, state)


def stream(
    model: SegmentModel,
    prompt: Tokens | None,
    max_new_tokens: int,
    *,
    start: int | None = None,
    prompt_mask: Tensor | None = None,
    state: MemoryState | None = None,
    sampling: Sampling | None = None,
    generator: Generators = None,
    **keywords: Unpack[SamplingKeywords],
) -> Stream:
    """The tokens after a prompt as they come: an iterator of (batch,), with -1 in lanes that have ended.

    The prompt is read before this returns. At any time its ``state`` is the one after the tokens that came so far.

    >>> stream = model.stream(torch.tensor([[72, 105]]), 5, start=256, top_k=40)
    >>> [token.shape for token in stream]
    [torch.Size([1]), torch.Size([1]), torch.Size([1]), torch.Size([1]), torch.Size([1])]
    >>> stream.state.position
    tensor([7])

    Args:
        model: one that predicts, in ``eval()`` mode.
        prompt, prompt_mask, state, start: the tokens, mask, state and start of :func:`read`; None as a prompt goes on
            from the state alone.
        max_new_tokens: per lane. However many, the state stays of one size.
        sampling: how tokens are chosen; its fields are keywords, too: ``temperature``, ``top_k``, ``top_p``, ``min_p``,
            ``repetition_penalty``, ``stop``, ``never``. See :class:`Sampling`.
        generator: draws for all lanes that have not ended, in turn; or a list with one per lane, whose tokens then do
            not depend on the other lanes. On the model's device.

    Raises:
        ValueError: as :func:`read`, and where the model cannot write.
        TypeError: a keyword is unknown.
    """
    model, choice = _of_kind(model), Sampling.of(sampling, keywords)
    lanes, state = _begin(model, prompt, state, start, prompt_mask)
    _check_writing(model, max_new_tokens)
    each = generator if isinstance(generator, Sequence) else [generator] * len(lanes)
    if len(each) != len(lanes) or not all(isinstance(g, torch.Generator | None) for g in each):
        raise ValueError(
            f"generator: expected a torch.Generator, or a list with one for each of {len(lanes)} lanes, "
            f"got {generator!r}"
        )
    chosen = _Choice(choice, model.config, state.start)
    with torch.no_grad():
        return Stream(model, read_lanes(model, lanes, state), max_new_tokens, chosen, generator)


@torch.no_grad()
def generate(
    model: SegmentModel,
    prompt: Tokens | None,
    max_new_tokens: int,
    *,
    start: int | None = None,
    prompt_mask: Tensor | None = None,
    state: MemoryState | None = None,
    sampling: Sampling | None = None,
    generator: Generators = None,
    callback: Callable[[Tensor], object] | None = None,
    beams: int | None = None,
    length_penalty: float = 1.0,
    **keywords: Unpack[SamplingKeywords],
) -> Generated:
    """The tokens after a prompt, and the state after them: all of a :func:`stream`, or the best of a beam search.

    >>> prompts = [torch.tensor([72, 105]), torch.tensor([79])]
    >>> tokens, state = model.generate(prompts, 5, start=256, top_p=0.9)
    >>> [len(lane) for lane in tokens], state.position
    ([5, 5], tensor([7, 6]))
    >>> tokens, state = model.generate(None, 5, state=state, sampling=Sampling(temperature=0))

    Args:
        model, prompt, max_new_tokens, start, prompt_mask, state, sampling, generator: as in :func:`stream`.
        callback: called with each (batch,) tensor of the stream as it comes.
        beams: search for the likeliest continuation with this many hypotheses per lane; one is greedy. Nothing is
            sampled then: of the sampling only ``repetition_penalty``, ``stop`` and ``never`` have a place.
        length_penalty: the search ends with the hypothesis of the greatest log-probability / length ** this; above 0
            favours longer ones.

    Raises:
        ValueError: as :func:`stream`, and for anything that samples beside ``beams``.
        TypeError: a keyword is unknown.
    """
    model, sampling = _of_kind(model), Sampling.of(sampling, keywords)
    if beams is None:
        steps = []
        tokens = stream(
            model,
            prompt,
            max_new_tokens,
            start=start,
            prompt_mask=prompt_mask,
            state=state,
            sampling=sampling,
            generator=generator,
        )
        for token in tokens:
            steps.append(token)
            if callback is not None:
                callback(token)
        after = tokens.state
        table = torch.stack(steps, 1) if steps else after.pending[:, :0]  # (batch, count)
        return Generated([row[row >= 0] for row in table], after)
    kept = {name: getattr(sampling, name) for name in ("repetition_penalty", "stop", "never")}
    if sampling != Sampling(**kept) or generator is not None or callback is not None:
        raise ValueError(
            "beams: a search does not sample; expected no temperature, top_k, top_p, min_p, generator or callback "
            "beside it"
        )
    check_count("beams", beams, 1)
    if not isinstance(length_penalty, numbers.Real) or not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty: expected a finite number, got {length_penalty}")
    lanes, state = _begin(model, prompt, state, start, prompt_mask)
    _check_writing(model, max_new_tokens)
    choice = _Choice(sampling, model.config, state.start)
    return _beam_search(model, read_lanes(model, lanes, state), int(max_new_tokens), choice, beams, length_penalty)


# --- Checks -----------------------------------------------------------------------------------------------------------


def _of_kind(model: nn.Module) -> SegmentModel:
    return cast(SegmentModel, unwrapped(model))


def _begin(
    model: SegmentModel, tokens: Tokens | None, state: MemoryState | None, start: int | None, mask: Tensor | None
) -> tuple[list[Tensor], MemoryState]:
    """Each lane's tokens, and the state before them."""
    if state is not None and not isinstance(state, MemoryState):
        raise ValueError(f"state: expected a MemoryState, got {type(state).__name__}")
    if tokens is None and state is not None:
        tokens = state.pending.new_empty(state.batch_size, 0)
    if isinstance(tokens, np.ndarray) or (isinstance(tokens, Sequence) and len(tokens)):
        tokens = as_tokens(tokens)
    if isinstance(tokens, Tensor) and tokens.dim() == 1 and mask is None:
        tokens = tokens[None]  # of one lane, as tokenizer.encode gives them
    if isinstance(tokens, str | bytes):
        raise ValueError("tokens: expected token ids, got text: tokenizer.encode makes ids of it")
    if not isinstance(tokens, Tensor | Sequence) or (isinstance(tokens, Tensor) and tokens.dim() == 0):
        raise ValueError(
            "tokens: expected token ids (batch, tokens), a list with one (tokens,) per lane, or None to go on from a "
            f"state, got {describe(tokens)}"
        )
    batch = len(tokens)
    if not batch:
        raise ValueError("tokens: expected at least one lane, got none; a lane's tokens may be empty")
    if state is None:
        if start is None:
            raise ValueError("start: expected the token that started documents in training, or a state that knows it")
        _check_ids("start", [start], model.config)
        state = model.new_state(batch, int(start))
    elif start not in (None, state.start):
        raise ValueError(f"start: expected {state.start}, that of the state, got {start}")
    sizes, given = _sizes(model.new_state(batch, state.start)), _sizes(state)
    if given != sizes:
        names = "memory (batch, slots, dim), pending (batch, segment length), dtype and device"
        raise ValueError(
            f"state: expected {names} {_words(sizes)} for this model and these tokens, got {_words(given)}"
        )
    mask = as_mask("mask", mask, None if not isinstance(tokens, Tensor) else tokens.device)
    if mask is not None and not (isinstance(tokens, Tensor) and is_tensor(mask, tuple(tokens.shape), torch.bool)):
        raise ValueError(
            "mask: expected torch.bool of the tokens' shape (batch, tokens), True for tokens that exist, "
            f"got {describe(mask)}"
        )
    lanes = []
    for i, lane in enumerate(map(as_tokens, tokens)):
        if not isinstance(lane, Tensor) or lane.dim() != 1 or lane.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "tokens: expected token ids, torch.int64 or int32 of shape (batch, tokens), or a list with one "
                f"(tokens,) per lane, got {describe(lane)} in lane {i}"
            )
        kept = lane if mask is None else lane[mask[i]]
        if len(kept):
            _check_ids("tokens", [int(x) for x in kept.aminmax()], model.config)
        lanes.append(kept.to(state.position.device, torch.int64))
    return lanes, state


def _sizes(state: MemoryState) -> tuple[object, ...]:
    return tuple(state.memory.shape), tuple(state.pending.shape), state.memory.dtype, state.memory.device


def _words(x: object) -> str:
    return ", ".join(map(str, x)) if isinstance(x, tuple) else str(x)


def _check_writing(model: SegmentModel, max_new_tokens: int) -> None:
    model.check_writes("generate")
    check_count("max_new_tokens", max_new_tokens, 0)


def _check_ids(name: str, ids: Sequence[int], config: ModelConfig) -> None:
    if not isinstance(ids, Sequence):
        raise ValueError(f"{name}: expected a list of token ids, got {ids!r}")
    for x in ids:
        if not is_count(x, 0) or x >= config.vocabulary:
            raise ValueError(f"{name}: expected token ids from 0 to {config.vocabulary - 1}, got {x!r}")
