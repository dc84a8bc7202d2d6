"""Gradients on their way: their sums over many graphs, and their norms at the boundaries between segments."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from .inputs import Grads, Tree, requires_grad


class MemoryGradients:
    """How far credit reaches: the norm of the loss's gradient by the memory at each boundary between segments.

    Pass one as ``memory_gradients=`` and read :attr:`norms` after backward. Leaves of the memory that are constant (a
    table, a mask) are not counted; to know them, a memory of several tensors is recorded with one graph at a time.

    Args:
        max_norm: clip the gradient to this norm at each boundary, on its way back; None leaves it exact.
    """

    def __init__(self, max_norm: float | None = None):
        if max_norm is not None and not (isinstance(max_norm, numbers.Real) and max_norm > 0):
            raise ValueError(f"max_norm: expected a positive number or None, got {max_norm!r}")
        self.max_norm = max_norm
        self._norms: list[Tensor | None] = []

    @property
    def norms(self) -> list[float]:
        """``norms[t]`` is that of the memory before segment t (before clipping), the last one of the final memory."""
        return [0.0 if norm is None else float(norm) for norm in self._norms]

    @property
    def on_device(self) -> list[Tensor | None]:
        """The same as tensors, which nobody waited for; what a captured step returns may be put here."""
        return self._norms

    @on_device.setter
    def on_device(self, norms: list[Tensor | None]) -> None:
        self._norms = norms

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
    positions = [i for i, x in enumerate(leaves) if requires_grad(x)]
    if watch is None or not positions:
        return memory
    passed = _Boundary.apply(watch, boundary, *(leaves[i] for i in positions))  # type: ignore[no-untyped-call]
    for i, x in zip(positions, passed, strict=True):
        leaves[i] = x
    return tree_unflatten(leaves, spec)


_current_task: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)

_run_backward: Callable[..., tuple[Tensor | None, ...]] | None = getattr(
    torch.autograd.graph, "_engine_run_backward", None
)

ADDED_AFTERWARDS = 4 * 1024 * 1024
"""Bytes of gradients, of small parameters, that a graph may hand over all at once."""


class GradientSums:
    """Sums of the gradients by some parameters over several graphs. Use it as a context: it leaves no hook behind.

    A large gradient is added as soon as autograd has it: beside the sums there is one gradient, not a second set. Sums
    of half precision are kept in float32 and rounded once.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)
        self._own = [False] * len(parameters)
        self._hooks: dict[int, _AddAtOnce] = {}
        self._small: dict[int, bool] = {}
        self._room = ADDED_AFTERWARDS
        self.task: int | None = None

    def __enter__(self) -> GradientSums:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks.values():
            hook.handle.remove()
        self._hooks = {}

    def totals(self) -> Grads:
        """The sums, in the parameters' types. They are handed over: nobody else holds them afterwards."""
        sums, self._sums = self._sums, []
        for i, total in enumerate(sums):
            if total is not None and total.dtype != self.parameters[i].dtype:
                sums[i] = total.to(self.parameters[i].dtype)
        return sums

    def differentiate(
        self,
        outputs: Sequence[Tensor],
        upstream: Sequence[Tensor | None],
        used: Sequence[int],
        sources: Sequence[Tensor],
    ) -> Grads:
        """Back-propagate through one graph, which ends in the parameters ``used`` and in ``sources``.

        Returns the gradients by ``sources``; those of the parameters are added up.
        """
        inputs = [*(self.parameters[i] for i in used), *sources]
        if not inputs:
            return []
        hooks = [self._hooks[i] for i in used if not self._is_small(i)]
        noting = self._note_the_task(outputs) if hooks else []
        try:
            grads = _differentiate(outputs, inputs, upstream)
        except RuntimeError as error:
            explain(error)
            raise
        finally:
            self.task = None
            for handle in noting:
                handle.remove()
        found = {}
        for i, grad in zip(used, grads, strict=False):
            hook = self._hooks.get(i)
            if hook is not None and hook.acted:
                hook.acted = False
            elif grad is not None:
                found[i] = grad
        self._add_all(found)
        return grads[len(used) :]

    def _is_small(self, i: int) -> bool:
        """Whether a parameter's gradient is added after the graph is done; a hook is put on the others."""
        if i not in self._small:
            p = self.parameters[i]
            size = p.numel() * p.element_size()
            self._small[i] = size <= self._room or _current_task is None
            if self._small[i]:
                self._room -= size
            else:
                self._hooks[i] = _AddAtOnce(self, i)
        return self._small[i]

    def _note_the_task(self, outputs: Sequence[Tensor]) -> list[RemovableHandle]:
        """The backward that comes next begins at one of these nodes, and there it tells its number."""

        def note(_: object) -> None:
            if self.task is None and _current_task is not None:
                self.task = _current_task()

        return [node.register_prehook(note) for node in {x.grad_fn for x in outputs} if node is not None]

    @contextlib.contextmanager
    def with_those_of_a_backward_inside(self) -> Iterator[None]:
        """A ``.backward()`` inside a graph (a reversible layer) adds to ``.grad``: here it adds to the sums instead."""
        before = [p.grad if p.is_leaf else None for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        try:
            yield
            for i, p in enumerate(self.parameters):
                if p.is_leaf and p.grad is not None:
                    self.add(i, p.grad)
        finally:
            for p, grad in zip(self.parameters, before, strict=True):
                p.grad = grad

    def _add_all(self, grads: dict[int, Tensor]) -> None:
        """:meth:`add` for each; those that are alike by one call, which on a card is a few kernels for all of them."""
        own: list[int] = []
        shared: list[int] = []
        for i, grad in grads.items():
            total = self._sums[i]
            if total is not None and _is_plain(total) and _is_plain(grad) and total.dtype == grad.dtype:
                (own if self._own[i] else shared).append(i)
            else:
                self.add(i, grad)

        def summands(which: list[int]) -> tuple[Any, Any]:
            return [self._sums[i] for i in which], [grads[i] for i in which]

        if own:
            torch._foreach_add_(*summands(own))
        if shared:
            for i, total in zip(shared, torch._foreach_add(*summands(shared)), strict=True):
                self._sums[i], self._own[i] = total, True

    def add(self, i: int, grad: Tensor) -> None:
        total, own = self._sums[i], self._own[i]
        if total is not None and total.is_sparse and not grad.is_sparse:
            total, grad, own = grad, total, False  # torch adds a sparse tensor to a dense one, and not the reverse
        if total is None:
            self._sums[i] = _widened(grad)
            self._own[i] = self._sums[i] is not grad
        elif own:
            total.add_(grad)
        else:  # autograd may hand out tensors that share their storage: the first summand is not ours to change
            self._sums[i] = _widened(total) + grad
            self._own[i] = True


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor and x.layout == torch.strided


def _widened(grad: Tensor) -> Tensor:
    return grad.float() if grad.layout == torch.strided and grad.dtype in (torch.bfloat16, torch.float16) else grad


class _AddAtOnce:
    """A hook that takes a parameter's gradient in the backward of its own graph, and in no other.

    A backward inside of that one (an adjoint solver, another replay) and a user's own are other tasks of autograd.
    """

    of_replay = True

    def __init__(self, sums: GradientSums, i: int):
        self.sums, self.i = sums, i
        self.acted = False
        self.handle = sums.parameters[i].register_hook(self)

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        if grad is None or _current_task is None or _current_task() != self.sums.task:
            return None
        self.acted = True
        self.sums.add(self.i, grad)
        # Autograd keeps what is returned until its end: something of that shape and almost no bytes.
        return grad.new_zeros(()).expand_as(grad) if grad.layout == torch.strided else grad


def _differentiate(outputs: Sequence[Tensor], inputs: list[Tensor], upstream: Sequence[Tensor | None]) -> Grads:
    """``torch.autograd.grad``; without its checks, where torch has the function behind it. It runs once per segment."""
    if _run_backward is None or any(grad is None for grad in upstream):
        return list(torch.autograd.grad(outputs, inputs, upstream, allow_unused=True))
    return list(
        _run_backward(tuple(outputs), tuple(upstream), False, False, tuple(inputs), True, accumulate_grad=False)
    )


def explain(error: RuntimeError) -> None:
    """Raise the error again with what it means in a replay, if that is known."""
    text = str(error)
    if "backward through the graph a second time" in text:
        raise RuntimeError(
            f"{text}\nIn a replay: the cell uses a tensor that was computed once, outside of it or in its first "
            "segment (a weight derived from a parameter?), in more than one segment. Compute it in each of them, "
            "return it as part of the memory, or compute it outside and name it in params=[...]."
        ) from error
    if "use_reentrant" in text:
        raise RuntimeError(
            f"{text}\nIn a replay: use checkpoint(..., use_reentrant=False) in the cell, or replay.accumulate."
        ) from error


@contextlib.contextmanager
def explaining_what_is_cut() -> Iterator[None]:
    """Adds the remedy to errors of a readout, whose values begin a graph of their own and all require a gradient."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "a leaf Variable that requires grad is being used in an in-place operation" in text:
            remedy = "a value of the cell is not to be changed in place: use an out-of-place operation, or a clone."
        elif "is not differentiable with respect to argument" in text or "on Tensor that requires grad" in text:
            remedy = "every value of the cell of a floating point type requires a gradient here: detach constant ones."
        else:
            raise
        raise RuntimeError(f"{text}\nIn the readout of a replay {remedy}") from error


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "backward was called with create_graph=True, but a replayed gradient has no graph of its own. For "
            "gradients of gradients use replay.full_bptt."
        )
