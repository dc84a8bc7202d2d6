"""How a token is chosen: filters of logits, and their settings.

Filters are pure functions of logits (..., vocabulary), named by what they keep; the rest becomes minus infinity. What
is *not* known here: where logits come from, and what is done with a token.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig, check_count, check_number, check_positive, is_count

__all__ = [
    "Choice",
    "Filters",
    "Sampling",
    "SamplingKeywords",
    "check_ids",
    "keep_allowed",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalise_repetition",
]


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
    if p == 1:  # to which no sum of rounded numbers adds up
        return logits
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


def keep_allowed(logits: Tensor, never: Sequence[int] | Tensor) -> Tensor:
    """All tokens but those."""
    return logits.index_fill(-1, torch.as_tensor(never, dtype=torch.int64, device=logits.device), float("-inf"))


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Tokens in ``seen`` (batch, any number) become less likely for a ``penalty`` above 1 (Keskar et al., 2019)."""
    check_positive("repetition_penalty", penalty)
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
            # The greatest is moved to 0 first: no temperature is then too low for the numbers' range, nor too high.
            logits = (logits - logits.amax(-1, keepdim=True)) / min(max(self.temperature, 1e-30), 1e30)
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
        never: token ids that are not generated, such as a tokenizer's ``special``, unless ``stop`` has them. The start
            token is always among them, and so is what the encoder could not read.

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


class Choice:
    """A :class:`Sampling` for one model, one start token and one device; checks that they fit.

    Attributes:
        stops: (any number,), the tokens that end a text, on the device.

    Raises:
        ValueError: the model lacks such a token, or none is left that may be generated.
    """

    def __init__(self, sampling: Sampling, config: ModelConfig, start: int, device: torch.device):
        check_ids("never", sampling.never, config)
        check_ids("stop", sampling.stop, config)
        self.sampling, self.readable, self.start = sampling, config.vocabulary, start
        never = [x for x in (start, *sampling.never) if x not in sampling.stop]
        if len(set(never)) == self.readable:
            raise ValueError("never: no token is left that may be generated")
        self.never, self.stops = (torch.tensor(x, dtype=torch.int64, device=device) for x in (never, sampling.stop))

    @property
    def draws(self) -> bool:
        """Whether chance has a part in it."""
        return self.sampling.temperature > 0

    def spoiled(self, scores: Tensor) -> Tensor:
        """(batch,), True in lanes of whose :meth:`scores` (batch, vocabulary) nothing can be chosen."""
        best = scores.amax(-1)  # NaN where there is one
        return ~best.isfinite() if self.draws else best.isnan() | best.isneginf()

    def scores(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits of what may be generated at all: tokens that the encoder can read, without ``never``."""
        logits = self.precise(logits)
        penalised = self.sampling.penalised(logits, seen)
        if penalised is not logits:
            # The start token fills up what the state holds, and is no repetition.
            penalised[..., self.start] = logits[..., self.start]
        kept = keep_allowed(penalised, self.never)
        kept[..., self.readable :].fill_(float("-inf"))
        return kept

    def precise(self, logits: Tensor) -> Tensor:
        """The logits in the precision in which a token is chosen, and noise is drawn: float32 at least."""
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def __call__(self, scores: Tensor, noise: Tensor | None) -> Tensor:
        """(batch, vocabulary) -> (batch,).

        Args:
            scores: from :meth:`scores`.
            noise: of their shape, drawn from an exponential distribution: ``torch.multinomial`` divides the
                probabilities by the same numbers, but waits for the card. None where nothing is drawn.
        """
        logits = self.sampling.kept(scores)
        return (logits if noise is None else logits.softmax(-1) / noise).argmax(-1)


def check_ids(name: str, ids: Sequence[int], config: ModelConfig) -> None:
    """Raise ValueError, which names them, where these are no token ids of the model."""
    if not isinstance(ids, Sequence):
        raise ValueError(f"{name}: expected a list of token ids, got {ids!r}")
    for x in ids:
        if not is_count(x, 0) or x >= config.vocabulary:
            raise ValueError(f"{name}: expected token ids from 0 to {config.vocabulary - 1}, got {x!r}")
