"""Reading and writing streams of any length: constant memory, and constant time per token.

:func:`read`, :func:`stream` and :func:`generate` are methods of the models, too. How a token is chosen is in
``sampling.py``, how lanes are written in ``writing.py``. What is *not* known here: how a model computes. It is asked
only for what a :class:`~memformer.interface.SegmentModel` has for this.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from .checks import as_mask, as_tokens, describe, is_tensor
from .config import check_count
from .device import summing_device
from .interface import SegmentModel, segment_model
from .sampling import (
    Choice,
    Filters,
    Sampling,
    SamplingKeywords,
    check_ids,
    keep_allowed,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)
from .state import MemoryState
from .writing import Capture, Generators, Stream, Writing, after_last, check_capture, diverged, read_lanes

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


# --- Beams ------------------------------------------------------------------------------------------------------------


_History = tuple[int, "_History"] | None
"""A hypothesis' last token and what came before; hypotheses share their beginnings."""


def _beam_search(
    model: SegmentModel,
    state: MemoryState,
    max_new_tokens: int,
    choice: Choice,
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
                found[lane] = tokens, after_last(writing.state.select([row]), *written[-1:])
            lanes, scores, ended, count, rows = (x[~done] for x in (lanes, scores, ended, count, rows))
            writing.select(rows.flatten().to(device))
            histories = [histories[row] for row in rows.flatten().tolist()]
            rows = torch.arange(scores.numel(), device=place).view_as(scores)
        if not len(lanes):
            break
        allowed = choice.scores(writing.logits(), writing.seen())
        if choice.spoiled(allowed).any():
            raise diverged()
        gains = allowed.to(place).double().log_softmax(-1)
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
    model = segment_model(model)
    lanes, state = _begin(model, tokens, state, start, mask)
    return read_lanes(model, lanes, state)


@torch.inference_mode(False)  # its tensors are written on wherever it is asked for more
@torch.no_grad()
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
    capture: Capture = "auto",
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
        capture: whether the step of a token is captured on a card, as one CUDA graph that is launched for each token:
            "auto" where that pays and can be, with one warning where it cannot; "on" raises then; "off" never. Captured
            or not, the same generators draw the same tokens. Lanes that have ended then stay in the batch.

    Raises:
        ValueError: as :func:`read`, and where the model cannot write. On a card, where the logits are no numbers it
            comes up to 16 tokens late.
        TypeError: a keyword is unknown.
    """
    sampling = Sampling.of(sampling, keywords)
    model = segment_model(model)
    lanes, state = _begin(model, prompt, state, start, prompt_mask)
    _check_writing(model, max_new_tokens)
    check_capture(capture, model, state.position.device)
    each = generator if isinstance(generator, Sequence) else [generator] * len(lanes)
    if len(each) != len(lanes) or not all(isinstance(g, torch.Generator | None) for g in each):
        raise ValueError(
            f"generator: expected a torch.Generator, or a list with one for each of {len(lanes)} lanes, "
            f"got {generator!r}"
        )
    choice = Choice(sampling, model.config, state.start, state.position.device)
    return Stream(model, read_lanes(model, lanes, state), max_new_tokens, choice, generator, capture)


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
    capture: Capture = "auto",
    **keywords: Unpack[SamplingKeywords],
) -> Generated:
    """The tokens after a prompt, and the state after them: all of a :func:`stream`, or the best of a beam search.

    >>> prompts = [torch.tensor([72, 105]), torch.tensor([79])]
    >>> tokens, state = model.generate(prompts, 5, start=256, top_p=0.9)
    >>> [len(lane) for lane in tokens], state.position
    ([5, 5], tensor([7, 6]))
    >>> tokens, state = model.generate(None, 5, state=state, sampling=Sampling(temperature=0))

    Args:
        model, prompt, max_new_tokens, start, prompt_mask, state, sampling, generator, capture: as in :func:`stream`.
            Beams are not captured.
        callback: called with each (batch,) tensor of the stream as it comes.
        beams: search for the likeliest continuation with this many hypotheses per lane; one is greedy. Nothing is
            sampled then: of the sampling only ``repetition_penalty``, ``stop`` and ``never`` have a place.
        length_penalty: the search ends with the hypothesis of the greatest log-probability / length ** this; above 0
            favours longer ones.

    Raises:
        ValueError: as :func:`stream`, for anything that samples beside ``beams``, and for a penalty without them.
        TypeError: a keyword is unknown.
    """
    model, sampling = segment_model(model), Sampling.of(sampling, keywords)
    if beams is None:
        if length_penalty != 1:
            raise ValueError(f"length_penalty: {length_penalty} has no meaning without beams; leave it out")
        tokens = stream(
            model,
            prompt,
            max_new_tokens,
            start=start,
            prompt_mask=prompt_mask,
            state=state,
            sampling=sampling,
            generator=generator,
            capture=capture,
        )
        table = tokens.rest(callback)  # (batch, count)
        return Generated([row[row >= 0] for row in table], tokens.state)
    kept = {name: getattr(sampling, name) for name in ("repetition_penalty", "stop", "never")}
    if sampling != Sampling(**kept) or generator is not None or callback is not None:
        raise ValueError(
            "beams: a search does not sample; expected no temperature, top_k, top_p, min_p, generator or callback "
            "beside it"
        )
    check_count("beams", beams, 1)
    if capture == "on":
        raise ValueError(
            "capture: a beam search selects among its hypotheses at each token, which is not captured; leave capture "
            "'on' out"
        )
    if not isinstance(length_penalty, numbers.Real) or not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty: expected a finite number, got {length_penalty}")
    lanes, state = _begin(model, prompt, state, start, prompt_mask)
    _check_writing(model, max_new_tokens)
    check_capture(capture, model, state.position.device)
    choice = Choice(sampling, model.config, state.start, state.position.device)
    return _beam_search(model, read_lanes(model, lanes, state), int(max_new_tokens), choice, beams, length_penalty)


# --- Checks -----------------------------------------------------------------------------------------------------------


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
    mask = as_mask("mask", mask, None if not isinstance(tokens, Tensor) else tokens.device)
    if isinstance(tokens, Tensor) and tokens.dim() == 1 and (mask is None or mask.dim() == 1):
        tokens = tokens[None]  # of one lane, as tokenizer.encode gives them
        mask = None if mask is None else mask[None]
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
        check_ids("start", [start], model.config)
        state = model.new_state(batch, int(start))
    elif start not in (None, state.start):
        raise ValueError(f"start: expected {state.start}, that of the state, got {start}")
    sizes, given = _sizes(model.new_state(batch, state.start)), _sizes(state)
    if given != sizes:
        names = "memory (batch, slots, dim), pending (batch, segment length), dtype and device"
        raise ValueError(
            f"state: expected {names} {_words(sizes)} for this model and these tokens, got {_words(given)}"
        )
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
            check_ids("tokens", [int(x) for x in kept.aminmax()], model.config)
        lanes.append(kept.to(state.position.device, torch.int64))
    return lanes, state


def _sizes(state: MemoryState) -> tuple[object, ...]:
    return tuple(state.memory.shape), tuple(state.pending.shape), state.memory.dtype, state.memory.device


def _words(x: object) -> str:
    return ", ".join(map(str, x)) if isinstance(x, tuple) else str(x)


def _check_writing(model: SegmentModel, max_new_tokens: int) -> None:
    model.check_writes("generate")
    check_count("max_new_tokens", max_new_tokens, 0)
