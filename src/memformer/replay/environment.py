"""What a cell sees besides its arguments: random numbers, autocast, grad mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Environment:
    """What a cell sees besides its arguments, captured when the rollout starts and put back for a replay."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.grad_enabled = torch.is_grad_enabled()
        self.devices = sorted({x.device for x in tensors if x.device.type not in ("cpu", "meta")}, key=str)
        types = {"cpu", *(device.type for device in self.devices)}
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted(types)
            if torch.amp.is_autocast_available(kind)
        ]
        self.uses_float16 = any(enabled and dtype == torch.float16 for _, dtype, enabled in self.autocast)

    def random_state(self) -> list[Tensor]:
        """The generators' states now."""
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self.devices)]

    def set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    @contextlib.contextmanager
    def random_numbers_kept(self) -> Iterator[None]:
        """What is run inside leaves the generators as they were."""
        states = self.random_state()
        try:
            yield
        finally:
            self.set_random_state(states)

    @contextlib.contextmanager
    def autocast_restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield
