"""The readout after the recording: off the critical path, so it runs once, with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .environment import Environment
from .gradients import GradientSums, explaining_what_is_cut, refuse_double_backward
from .inputs import (
    Grads,
    Leaves,
    Readout,
    Tree,
    call_readout,
    captured_modules,
    chunks,
    requires_grad,
    sum_of_losses,
)
from .reach import Reach, runs_functions
from .segments import Segments
from .world import World


class ReadoutRun:
    """The readout over chunks of segments: its loss, and the gradients of values, segments and parameters.

    The loss is a scalar, so its gradients can be computed at once and only be scaled in backward. In float16 an
    unscaled gradient could underflow before a gradient scaler sees it: there the readout is run again in backward.
    """

    def __init__(
        self,
        readout: Readout,
        values: list[Tree],
        segments: Segments,
        size: int,
        weights: list[float] | None,
        parameters: list[Tensor],
        owned: Sequence[object],
    ):
        self.readout = readout
        self.parameters = parameters
        self.reach = Reach([readout], parameters)
        self.values = [Leaves(value) for value in values]
        self.segments: Segments | list[Leaves] = segments
        self.parts = list(chunks(len(segments), size))
        self.weights = weights
        given = [
            x for part in self.parts for leaves in (*self.values[part], *segments.held[part]) for x in leaves.tensors()
        ]
        self.inputs = parameters + [x for x in given if x.requires_grad]
        self.environment = Environment([*parameters, *given])
        self.random_state = self.environment.random_state()
        half = self.environment.uses_float16 or any(x.dtype == torch.float16 for x in self.inputs)
        self.runs_again = half and self.environment.grad_enabled
        self.world = World(owned, parameters, captured=captured_modules(readout))
        if self.runs_again:
            self.world.watch_buffers()
            self.world.refuse_masks_of_cudnn()
        self.buffers = self.world.buffer_state()
        self.grads: Grads | None = None
        self.has_graph = False

    def forward(self) -> Tensor:
        if not self.environment.grad_enabled:
            return sum_of_losses([self._call(part, Leaves.tree) for part in self.parts])
        loss = self.run(None)
        if not self.runs_again:
            self.values = self.segments = []
        self.inputs = []
        return loss

    def run(self, scale: Tensor | None) -> Tensor:
        """The loss; leaves the gradients, times ``scale``, in ``self.grads``."""
        losses: list[Tensor | None] = []
        others: Grads = []
        with GradientSums(self.parameters) as sums:
            for part in self.parts:
                sources: list[Tensor] = []

                def cut(leaves: Leaves, sources: list[Tensor] = sources) -> Tree:
                    tree, found = leaves.cut(requires_grad)
                    sources += found.values()
                    return tree

                with torch.enable_grad():
                    loss = self._call(part, cut)
                losses.append(None if loss is None else loss.detach())
                if loss is not None and loss.requires_grad:
                    self.has_graph = True
                    used = self.reach([loss], sources)
                    kept = sums.with_those_of_a_backward_inside() if runs_functions([loss]) else nullcontext()
                    with kept:
                        others += sums.differentiate([loss], [scale], used, sources)
                else:
                    others += [None] * len(sources)
                del loss  # and with it the graph, before the next one
        self.grads = sums.totals() + others
        return sum_of_losses(losses)

    def _call(self, part: slice, tree: Callable[[Leaves], Tree]) -> Tensor | None:
        with self.environment.restored(), explaining_what_is_cut():
            values, segments = ([tree(leaves) for leaves in of[part]] for of in (self.values, self.segments))
            return call_readout(self.readout, values, segments, self.weights and self.weights[part])

    def backward(self, scale: Tensor) -> Grads:
        if self.runs_again:
            with self.world.restored(), self.environment.random_numbers_kept():
                self.environment.set_random_state(self.random_state)
                self.world.put_buffers(self.buffers)
                self.run(scale)
            self.values = self.segments = []
        grads, self.grads = self.grads, None
        if grads is None:
            raise RuntimeError(
                "this rollout was already back-propagated: call backward once, on the sum of the losses."
            )
        if not self.runs_again:
            for i, grad in enumerate(grads):  # one by one, so that no second set of gradients exists
                grads[i] = None if grad is None else grad * scale
        return grads


class ReadOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: ReadoutRun, *inputs: Tensor) -> Tensor:
        ctx.run = run
        loss = run.forward()
        if not run.has_graph:  # a detached loss is one, as by plain autograd
            ctx.mark_non_differentiable(loss)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        return (None, *ctx.run.backward(scale))
