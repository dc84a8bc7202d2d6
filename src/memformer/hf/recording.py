"""What a model's layers computed in one call: hidden states and attention weights, for whoever asks for them.

Hooks look on while a call runs, so that no part of a model has to pass anything along.

Shapes: hidden states (batch, tokens, dim), attention weights (batch, heads, tokens, tokens).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..nn.causal import along
from .bases import decoder_of, layers_of
from .places import joined

__all__ = ["Seen", "States", "Which", "asked_for", "looking", "states_of", "wants_some"]

Which = bool | int | list[int] | None
"""Which hidden states: all, none, or those of so many layers alone, 0 being the embeddings."""

States = tuple[Tensor | None, ...]
"""One for each layer, or None where it was not asked for."""


@contextmanager
def states_of(layers: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """For each run of the layers in here: what the first one is given, and what each one gives."""
    runs: list[list[Tensor]] = []

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if layer is layers[0]:
            runs.append([args[0] if args else kwargs["hidden_states"]])
        runs[-1].append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Seen:
    """What :func:`looking` has seen of a base, for each run of its layers."""

    states: list[list[Tensor]] = field(default_factory=list)
    weights: list[tuple[Tensor, ...]] = field(default_factory=list)

    def hidden_states(self, last: Tensor, taken: Sequence[Sequence[int]], order: Tensor | None) -> list[Tensor]:
        """The embeddings and what each layer gave, (batch, tokens, dim) each, and ``last`` in place of the last one.

        Args:
            taken: how many tokens each lane has taken of each run.
            order: (batch, tokens), where each token of ``last`` stands among those of the runs; None: at its place.
        """
        layers = [joined(pieces, taken, last.shape[1]) for pieces in list(zip(*self.states, strict=True))[:-1]]
        return [*(x if order is None else along(x, order) for x in layers), last]

    def attentions(self, order: Tensor | None) -> tuple[Tensor, ...]:
        """Of each layer, (batch, heads, tokens, tokens); no run looks at another one's tokens."""
        return tuple(_on_the_diagonal(parts, order) for parts in zip(*self.weights, strict=True))


@contextmanager
def looking(base: PreTrainedModel, which: Which, attentions: bool) -> Iterator[Seen]:
    """Look at a base's hidden states and attention weights, as far as they are asked for."""
    with ExitStack() as opened:
        seen = Seen()
        if wants_some(which):
            seen.states = opened.enter_context(states_of(layers_of(base)))
        if attentions:
            implementation = str(base.config._attn_implementation)
            seen.weights = opened.enter_context(_attentions_of(decoder_of(base), implementation))
        yield seen


@contextmanager
def _attentions_of(decoder: nn.Module, implementation: str) -> Iterator[list[tuple[Tensor, ...]]]:
    """For each run of a base's decoder in here: its attention weights, one for each layer.

    A way of attending that keeps no weights gives none, with a warning, as in transformers.
    """
    runs: list[tuple[Tensor, ...]] = []

    def ask(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_attentions": True, "return_dict": True}

    def look(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found = tuple(x for x in output.attentions or () if x is not None)
        if not found:
            warnings.warn(
                f"output_attentions: {implementation} keeps no weights, so there are none; "
                "model.set_attn_implementation('eager') has them",
                stacklevel=2,
            )
        runs.append(found)

    hooks = [decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(look)]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


def wants_some(which: Which) -> TypeGuard[bool | int | list[int]]:
    """Whether any hidden states are asked for; 0 asks for the embeddings."""
    return which is not None and which is not False


def asked_for(states: Sequence[Tensor], which: Which) -> States | None:
    """Those that :data:`Which` says, in their places; numbers below 0 count from the end."""
    if not wants_some(which):
        return None
    if which is True:
        return tuple(states)
    wanted = {number % len(states) for number in (which if isinstance(which, list) else [which])}
    return tuple(x if number in wanted else None for number, x in enumerate(states))


def _on_the_diagonal(parts: Sequence[Tensor], order: Tensor | None) -> Tensor:
    """The weights of a text whose segments do not look at each other, (batch, heads, tokens, tokens).

    Args:
        parts: of each segment. order: (batch, tokens), where each token stands among those of the parts.
    """
    if len(parts) > 1:
        total, before, rows = sum(x.shape[-1] for x in parts), 0, []
        for x in parts:
            rows.append(F.pad(x, (before, total - before - x.shape[-1])))
            before += x.shape[-1]
        whole = torch.cat(rows, -2)
    else:
        whole = parts[0]
    if order is None:
        return whole
    places = order[:, None].expand(*whole.shape[:2], -1)
    return along(along(whole, places).mT, places).mT
