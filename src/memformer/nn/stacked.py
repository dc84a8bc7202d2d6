"""Several layers of one kind as one: their weights stacked, so that each product is one for all of them.

:func:`twin` makes such a module of a layer; :func:`stack` gives it weights. What it is given has a first dimension
more, the layers: (layers, batch, tokens, dim). Only the leaves differ from a single layer, everything else is the code
of the parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OWN", "Stack", "difference", "has_hook", "stack", "twin"]

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
    nn.LayerNorm: _LayerNorm,
    nn.Embedding: _Embedding,
    nn.GRUCell: _GRUCell,
}


def difference(layers: Sequence[nn.Module]) -> str | None:
    """Why layers cannot be one, in words; None where they can.

    One stands for all of them. So they have to be alike in everything but the numbers in their parameters, and made of
    parts that are known here: a hook would be called once for all layers, and what a user put in may do anything.
    This is asked before each rollout, so it is plain.
    """
    todo: list[tuple[str, Sequence[nn.Module]]] = [("", layers)]
    for name, parts in todo:
        kind, first = type(parts[0]), vars(parts[0])
        if not (kind in _LEAVES or kind in _ALIKE or kind.__module__.startswith(OWN)):
            return f"'{name}' is a {kind.__name__}, which is not known here"
        if kind in _LEAVES and kind is not nn.Linear and None in first["_parameters"].values():
            return f"'{name}' is a {kind.__name__} without a weight or a bias, which is not known here"
        plain = [(key, x) for key, x in first.items() if key not in _OF_EVERY_MODULE and isinstance(x, _PLAIN)]
        shapes = _shapes(first)
        for part in parts:
            own = vars(part)
            if has_hook(part):
                return f"'{name}' has a hook, or a forward of its own"
            if part is parts[0]:
                continue
            alike = type(part) is kind and own["training"] == first["training"] and len(own) == len(first)
            alike = alike and _names(own) == _names(first) and _shapes(own) == shapes
            if not alike or any(own.get(key) != x for key, x in plain):
                return f"'{name}' is not the same in all of them"
        todo += [(f"{name}.{key}".strip("."), [vars(x)["_modules"][key] for x in parts]) for key in _names(first)]
    return None


def has_hook(module: nn.Module) -> bool:
    """Whether a module does more in its call than its class says: it has a hook, or a forward of its own."""
    own = vars(module)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


def _names(own: dict[str, Any]) -> list[str]:
    """Of a module's parts."""
    return [name for name, part in own["_modules"].items() if part is not None]


def _shapes(own: dict[str, Any]) -> dict[str, object]:
    """Of a module's own parameters."""
    return {name: p if p is None else (p.shape, p.dtype) for name, p in own["_parameters"].items()}


_ALIKE = {
    *(nn.ModuleList, nn.Sequential, nn.Identity, nn.Dropout),
    *(nn.GELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus),
}
"""Torch's modules that compute with one dimension more as they do without."""
OWN = __name__.partition(".")[0] + "."
"""How the modules begin whose classes compute with one dimension more as they do without."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, tuple, type(None), FunctionType, BuiltinFunctionType)


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
