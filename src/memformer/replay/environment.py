"""What a cell sees besides its arguments and its modules: random numbers, autocast, grad mode, caches, cuDNN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

_left_alone: set[torch.device] = set()


@contextlib.contextmanager
def left_alone(device: torch.device) -> Iterator[None]:
    """A step that draws no random numbers on a device is captured: its generator is neither read nor set inside."""
    _left_alone.add(device)
    try:
        yield
    finally:
        _left_alone.discard(device)


def may_wait() -> bool:
    """Whether Python may wait for a card: not in a step that is captured, nor where torch is told to refuse it."""
    if not torch.cuda.is_initialized():
        return True
    return not (torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() == 2)


class Environment:
    """What a cell sees besides its arguments, captured when the rollout starts and put back for a replay."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.grad_enabled = torch.is_grad_enabled()
        self.devices = sorted({x.device for x in tensors if x.device.type not in ("cpu", "meta")}, key=str)
        types = {"cpu", *(device.type for device in self.devices)}
        self.kinds = [kind for kind in sorted(types) if torch.amp.is_autocast_available(kind)]
        self.autocast = self._autocast_now()
        self.uses_float16 = any(enabled and dtype == torch.float16 for _, dtype, enabled in self.autocast)
        self.precision = max((torch.finfo(dtype).eps for _, dtype, enabled in self.autocast if enabled), default=0.0)
        self.caches_casts = torch.is_autocast_cache_enabled()
        self.uses_cudnn = torch.backends.cudnn.enabled  # which draws its own random numbers
        self.caches_weights = _weights_are_cached()
        self.weights: dict[tuple[int, str], Tensor] = {}
        _refuse_transforms(tensors)

    def random_state(self) -> list[Tensor]:
        """The generators' states now."""
        devices = (d for d in self.devices if d not in _left_alone)
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in devices)]

    def set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        devices = [d for d in self.devices if d not in _left_alone]
        for device, state in zip(devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    @contextlib.contextmanager
    def random_numbers_kept(self) -> Iterator[None]:
        """What is run inside leaves the generators as they were."""
        states = self.random_state()
        try:
            yield
        finally:
            self.set_random_state(states)

    def _autocast_now(self) -> list[tuple[str, torch.dtype, bool]]:
        return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in self.kinds]

    @contextlib.contextmanager
    def casts_kept(self) -> Iterator[None]:
        """Weights that autocast converts inside serve until the end, not until it is left next."""
        if not self.caches_casts or not any(enabled for _, _, enabled in self.autocast):
            yield
            return
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()

    def restored(self) -> contextlib.AbstractContextManager[object]:
        """Autocast, cuDNN and the caching of parametrised weights as they were when the rollout started."""
        same_autocast = self.autocast == self._autocast_now()
        same_cudnn = self.uses_cudnn == torch.backends.cudnn.enabled
        caches_weights = self.caches_weights or _weights_are_cached()
        if same_autocast and same_cudnn and not caches_weights:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        if not same_autocast:
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self.caches_casts))
        if not same_cudnn:
            stack.enter_context(_cudnn(self.uses_cudnn))
        if caches_weights:
            stack.enter_context(self._own_weights())
        return stack

    @contextlib.contextmanager
    def _own_weights(self) -> Iterator[None]:
        """A cache of parametrised weights that serves one run of the cell.

        Inside ``parametrize.cached()`` a weight that was computed while recording has no graph, and one with a graph
        would be back-propagated through more than once. So each run computes its own, which must be the same again.
        """
        before = parametrize._cache_enabled, parametrize._cache
        own: dict[tuple[int, str], Tensor] = {}
        parametrize._cache_enabled, parametrize._cache = int(self.caches_weights), own  # type: ignore[assignment]
        try:
            yield
        finally:
            parametrize._cache_enabled, parametrize._cache = before
        for key, weight in own.items():
            if not torch.equal(self.weights.setdefault(key, weight.detach()), weight):
                raise RuntimeError(
                    f"inside parametrize.cached() the parametrised weight '{key[1]}' is random or changes by itself: "
                    "replay computes it once per run of the cell and got another one. Use cached() inside the cell."
                )


@contextlib.contextmanager
def _cudnn(enabled: bool) -> Iterator[None]:
    """Of its switches this one alone: ``torch.backends.cudnn.flags`` sets all of them."""
    before = torch.backends.cudnn.set_flags(_enabled=enabled)[0]
    try:
        yield
    finally:
        torch.backends.cudnn.set_flags(_enabled=before)


def _weights_are_cached() -> bool:
    return bool(parametrize._cache_enabled)


def _refuse_transforms(tensors: Sequence[Tensor]) -> None:
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            "torch.func (grad, vmap, jvp, ...) is around this rollout, which replay cannot run under. Use "
            "replay.full_bptt; in the cell torch.func may be used."
        )
    if getattr(forward_ad, "_current_level", -1) < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise ValueError(
            "a tensor of the rollout carries a forward-mode tangent, which replay would drop. Use replay.full_bptt."
        )
