"""Gradients on their way: their sums over many graphs, and their norms at the boundaries between segments."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .inputs import Grads, Tree, carries_grad


class MemoryGradients:
    """How far credit reaches: the norm of the loss's gradient by the memory at each boundary between segments.

    Pass one as ``memory_gradients=`` and read :attr:`norms` after backward.

    Args:
        max_norm: clip the gradient to this norm at each boundary, on its way back; None leaves it exact.
    """

    def __init__(self, max_norm: float | None = None):
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm: expected a positive number or None, got {max_norm}")
        self.max_norm = max_norm
        self._norms: list[Tensor | None] = []

    @property
    def norms(self) -> list[float]:
        """``norms[t]`` is that of the memory before segment t (before clipping), the last one of the final memory."""
        return [0.0 if norm is None else float(norm) for norm in self._norms]

    def start(self, num_segments: int) -> None:
        """Forget the rollout before."""
        self._norms = [None] * (num_segments + 1)

    def passing(self, boundary: int, grads: Sequence[Tensor | None]) -> Grads:
        """Take down the norm of these gradients, one per leaf of the memory, and return what is to be passed on."""
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).float()
            for g in grads
            if g is not None
        ]
        if not norms:
            return list(grads)
        norm = self._norms[boundary] = torch.linalg.vector_norm(torch.stack(norms))
        if self.max_norm is None:
            return list(grads)
        factor = (self.max_norm / norm.clamp(min=1e-30)).clamp(max=1.0)
        return [None if g is None else g * factor.to(g.dtype) for g in grads]


class _Boundary(torch.autograd.Function):
    """The identity on a memory in plain autograd, for :class:`MemoryGradients`."""

    @staticmethod
    def forward(ctx: Any, watch: MemoryGradients, boundary: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.watch, ctx.boundary = watch, boundary
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (None, None, *ctx.watch.passing(ctx.boundary, grads))


def watched(watch: MemoryGradients | None, boundary: int, memory: Tree) -> Tree:
    leaves, spec = tree_flatten(memory)
    positions = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and carries_grad(x)]
    if watch is None or not positions:
        return memory
    passed = _Boundary.apply(watch, boundary, *(leaves[i] for i in positions))  # type: ignore[no-untyped-call]
    for i, x in zip(positions, passed, strict=True):
        leaves[i] = x
    return tree_unflatten(leaves, spec)


class GradientSums:
    """Sums of the gradients by some parameters over several graphs.

    Each gradient is added as soon as autograd has it: beside the sums there is one gradient, not a second set.
    """

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.totals: list[Tensor | None] = [None] * len(parameters)
        self._own = [False] * len(parameters)

    def differentiate(
        self, outputs: Sequence[Tensor], upstream: Sequence[Tensor | None], sources: list[Tensor]
    ) -> Grads:
        """Back-propagate through one graph; returns the gradients by ``sources``."""
        hooks = [x.register_hook(functools.partial(self._add, i)) for i, x in enumerate(self.parameters)]
        try:
            grads = torch.autograd.grad(outputs, [*self.parameters, *sources], upstream, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return list(grads[len(self.parameters) :])

    def _add(self, i: int, grad: Tensor) -> Tensor:
        total = self.totals[i]
        if total is None:
            self.totals[i] = grad
        elif self._own[i]:
            total.add_(grad)
        else:  # autograd may hand out tensors that share their storage: the first summand is not ours to change
            self.totals[i] = total + grad
            self._own[i] = True
        # Autograd keeps what is returned until its end: something of that shape and almost no bytes.
        return grad.new_zeros(()).expand_as(grad) if grad.layout == torch.strided else grad


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "backward was called with create_graph=True, but a replayed gradient has no graph of its own. For "
            "gradients of gradients use replay.full_bptt."
        )
