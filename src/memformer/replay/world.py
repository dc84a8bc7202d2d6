"""The modules that a cell owns, as they were when it was recorded: modes, parameters, buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .inputs import version

BufferState = list[tuple[Tensor | None, Tensor | None]]
"""The buffers before some segment: the tensor that each was, and what stood in it."""


class World:
    """What a cell's modules look like, so that its replay meets the same.

    Modes, ``requires_grad`` and buffers are put back for the replay, and as they were found after it. Buffers that the
    cell itself changes (running statistics) are carried along like random numbers. Parameters that were changed in
    place cannot be put back: that is refused.
    """

    def __init__(self, owners: Sequence[Any], parameters: Sequence[Tensor], *, watch_parameters: bool = True):
        modules = list(dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module)))
        self.modes = [(module, module.training) for owner in modules for module in owner.modules()]
        named = {id(p): ("a tensor of params=", p) for p in parameters}
        if watch_parameters:
            named |= {id(p): (f"parameter '{name}'", p) for owner in modules for name, p in owner.named_parameters()}
        self.parameters = [(name, p, version(p), p.requires_grad) for name, p in named.values()]
        self.modules = modules
        self.buffers: list[_Buffer] = []

    # Before and during the recording

    def watch_buffers(self) -> None:
        """From here on :meth:`buffer_state` tells what stands in the buffers."""
        found = {}
        for module in (part for owner in self.modules for part in owner.modules()):
            # Their running statistics change without a new version.
            unnoticed = isinstance(module, _NormBase) and module.track_running_stats and module.training
            for name, x in module._buffers.items():
                if x is not None:
                    found[id(module), name] = _Buffer(module, name, unnoticed)
        self.buffers = list(found.values())

    def buffer_state(self) -> BufferState:
        return [buffer.state() for buffer in self.buffers]

    # Before and during the replay

    def check_unchanged(self) -> None:
        for name, p, before, _ in self.parameters:
            if version(p) != before:
                raise RuntimeError(
                    f"{name}, a parameter, was changed in place between the rollout and its backward (an optimiser "
                    "step?). Replay runs the cell again and needs the same parameters: call backward first."
                )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Modes and ``requires_grad`` as they were; whatever happens to the buffers inside is undone."""
        self.check_unchanged()
        modes = [(module, module.training) for module, before in self.modes if module.training != before]
        frozen = [p for _, p, _, before in self.parameters if p.is_leaf and p.requires_grad != before]
        found = self.buffer_state()
        try:
            for module, now in modes:
                module.training = not now
            for p in frozen:
                p.requires_grad_(not p.requires_grad)
            yield
        finally:
            for module, now in modes:
                module.training = now
            for p in frozen:
                p.requires_grad_(not p.requires_grad)
            self.put_buffers(found)

    def put_buffers(self, state: BufferState) -> None:
        for buffer, then in zip(self.buffers, state, strict=True):
            buffer.put(*then)


class _Buffer:
    """A buffer of a module, and a copy of what stood in it when it was last looked at."""

    def __init__(self, module: nn.Module, name: str, unnoticed: bool):
        self.module, self.name, self.unnoticed = module, name, unnoticed
        self.changes = False
        self._look()

    def _look(self) -> None:
        self.tensor = self.module._buffers[self.name]
        self.version = version(self.tensor)
        self.content = None if self.tensor is None else self.tensor.detach().clone()

    def state(self) -> tuple[Tensor | None, Tensor | None]:
        now = self.module._buffers[self.name]
        if self.unnoticed or now is not self.tensor or version(now) != self.version:
            self.changes = True
            self._look()
        return self.tensor, self.content

    def put(self, tensor: Tensor | None, content: Tensor | None) -> None:
        self.state()
        if not self.changes or (content is self.content and tensor is self.tensor):
            return
        self.module._buffers[self.name] = self.tensor = tensor
        self.content = content
        if tensor is not None and content is not None:
            # The same numbers return before anybody else looks: a graph that saved the buffer need not know.
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):  # type: ignore[attr-defined]
                tensor.copy_(content)
        self.version = version(tensor)
