"""A stricter card than the pretended one: a launch repeats the operations of the capture, and no Python."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from memformer.replay import capture, environment, fingerprint, storage, world
from pretend_card import CPU, look_at_little

WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}
"""Operations after which Python knows a value of the card."""


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Takes down operations that write, with the very tensors.

    Attributes:
        made: tensors that did not exist before, which are a graph's own memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.dtype == torch.uint8 for x in tensors):
            return function(*args, **kwargs)  # states of generators, which are the CPU's
        given = {storage_of(x) for x in tensors}
        if function in WAITING:
            raise RuntimeError(f"called a synchronizing CUDA operation: {function}")
        result = function(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        fresh = [storage_of(x) not in given for x in outputs]
        if any(fresh) or any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments):
            with _disable_current_modes():
                args, kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
                old = [x.detach() if new else None for x, new in zip(outputs, fresh, strict=True)]

            def again() -> None:
                found = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
                for x, now in zip(old, found, strict=True):
                    if x is not None:
                        x.copy_(now)

            self.operations.append(again)
            self.made += [x for x in old if x is not None]
        return result


@contextlib.contextmanager
def generators_taped(tape: Tape) -> Iterator[None]:
    """What is read of the generator in a capture, and set, is in each launch what it is then."""
    read, write = torch.get_rng_state, torch.set_rng_state
    states: dict[int, list[Tensor]] = {}

    def get() -> Tensor:
        with _disable_current_modes():
            state = read()
        states[id(state)] = box = [state]
        tape.operations.append(lambda: box.__setitem__(0, read()))
        return state

    def put(state: Tensor) -> None:
        box = states.get(id(state), [state])
        with _disable_current_modes():
            write(state)
        tape.operations.append(lambda: write(box[0]))

    torch.get_rng_state, torch.set_rng_state = get, put
    held = states  # so that no other state gets a number of one of these
    try:
        yield
    finally:
        torch.get_rng_state, torch.set_rng_state = read, write
        del held


class StrictCard(capture.Card):
    """The CPU as a card. What is made in a capture is not a number until a launch, as memory of a graph may be."""

    records = 0

    @property
    def generator(self) -> torch.Generator:
        return torch.default_generator

    def rehearse(self, function: Callable[[], Any], strict: bool = False) -> Any:
        return function()

    def record(self, function: Callable[[], list[Any]], draws: bool) -> tuple[list[Any], Callable[[], None]]:
        tape, state = Tape(), torch.get_rng_state()
        with pytest.MonkeyPatch.context() as patched, generators_taped(tape):
            for module in (environment, fingerprint, storage, world):
                patched.setattr(module, "may_wait", lambda: False)
            patched.setattr(Tensor, "is_cuda", True, raising=False)
            with tape:
                static = function()
        torch.set_rng_state(state)
        type(self).records += 1
        with torch.no_grad():
            for x in tape.made:
                if x.is_floating_point():
                    x.fill_(math.nan)

        def launch() -> None:
            with torch.no_grad():
                for operation in tape.operations:
                    operation()

        return static, launch


@pytest.fixture
def strict_card(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> type[StrictCard]:
    """Makes the CPU a strict card for one test."""
    if device.type != "cpu":
        pytest.skip("the CPU stands for a card here")
    look_at_little(monkeypatch)
    monkeypatch.setattr(capture, "Card", StrictCard)
    monkeypatch.setattr(capture, "can_capture", lambda device: device == CPU)
    monkeypatch.setattr(StrictCard, "records", 0)
    return StrictCard
