"""Several layers of one kind as one: their weights stacked, so that each product is one for all of them.

:func:`twin` makes such a module of a layer; :func:`stack` gives it weights. What it is given has a first dimension
more, the layers: (layers, batch, tokens, dim). Only the leaves differ from a single layer, everything else is the code
of the parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .memory import SlowLinear

__all__ = ["Stack", "stack", "twin"]

M = TypeVar("M", bound=nn.Module)
Stack = dict[str, Tensor]
"""The parameters of some layers by name, the layers as their first dimension."""


class _Leaf(nn.Module):
    """A module without parameters of its own: :func:`call` lends it those of several layers."""

    def __init__(self, _: nn.Module):
        super().__init__()


class _Linear(_Leaf):
    weight: Tensor
    bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(layers, ..., in) -> (layers, ..., out)."""
        flat, weight = x.flatten(1, -2), self.weight.mT
        out = flat @ weight if self.bias is None else torch.baddbmm(self.bias[:, None], flat, weight)
        return out.view(*x.shape[:-1], -1)


class _SlowLinear(_Linear):
    def forward(self, x: Tensor) -> Tensor:
        return SlowLinear.speed * super().forward(x)


class _LayerNorm(_Leaf):
    weight: Tensor
    bias: Tensor

    def __init__(self, of: nn.LayerNorm):
        super().__init__(of)
        self._shape, self._eps = of.normalized_shape, of.eps

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (part[:, None, None] for part in (self.weight, self.bias))  # (layers, 1, 1, dim)
        return torch.addcmul(shift, F.layer_norm(x, self._shape, eps=self._eps), scale)


class _Embedding(_Leaf):
    weight: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """The same ids for all layers: (...) -> (layers, ..., dim)."""
        return self.weight[:, ids]


class _GRUCell(_Leaf):
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """(layers, rows, dim), twice -> the same."""
        new = torch.baddbmm(self.bias_ih[:, None], x, self.weight_ih.mT).chunk(3, -1)
        old = torch.baddbmm(self.bias_hh[:, None], h, self.weight_hh.mT).chunk(3, -1)
        reset, update = ((a + b).sigmoid() for a, b in zip(new[:2], old[:2], strict=True))
        candidate = (new[2] + reset * old[2]).tanh()
        return candidate + update * (h - candidate)


_LEAVES: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Linear: _Linear,
    SlowLinear: _SlowLinear,
    nn.LayerNorm: _LayerNorm,
    nn.Embedding: _Embedding,
    nn.GRUCell: _GRUCell,
}


def twin(layer: M) -> M:
    """A module like this layer, for several layers at once; without weights, which :func:`call` gets.

    Raises:
        TypeError: a part of it has weights and is of a kind that has no stacked form here.
    """
    kind = _LEAVES.get(type(layer))
    if kind is not None:
        return kind(layer)  # type: ignore[return-value]
    if type(layer).__module__.startswith("torch.") and next(layer.parameters(recurse=False), None) is not None:
        raise TypeError(f"{type(layer).__name__} has no form for several layers at once")
    made = copy.copy(layer)
    made._modules = {name: None if part is None else twin(part) for name, part in layer._modules.items()}
    made._parameters = {}
    return made


def stack(layers: Sequence[nn.Module]) -> Stack:
    """The parameters of layers of one kind, as their twin takes them; gradients go to the layers."""
    named = [dict(layer.named_parameters()) for layer in layers]
    return {name: torch.stack([parameters[name] for parameters in named]) for name in named[0]}


def part(stacked: Stack, first: int, last: int) -> Stack:
    """Those of the layers ``first`` to ``last``, both included."""
    return {name: tensor[first : last + 1] for name, tensor in stacked.items()}


def call(twin: nn.Module, stacked: Stack, *args: Any) -> Any:
    """The twin's forward with these weights, which it holds until the next call.

    They are put in as plain attributes: :func:`torch.func.functional_call` takes a twentieth of a small model's step.
    """
    for name, weight in stacked.items():
        owner, _, own_name = name.rpartition(".")
        vars(twin.get_submodule(owner))[own_name] = weight
    return twin(*args)
