"""What benchmarks measure and compare: seconds, operations, bytes of autograd, process or device, and gradients."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..settings import ModelSettings

__all__ = [
    "ProcessMeter",
    "Spread",
    "check_no_dropout",
    "flops",
    "gradient_difference",
    "kept_bytes",
    "live_bytes",
    "machine",
    "peak_bytes",
    "seconds",
    "spread",
    "take_gradients",
    "taking_turns",
]


def check_no_dropout(model: ModelSettings) -> None:
    """For benchmarks of speed, which compare what must be equal. Raises ValueError."""
    if model.dropout:
        raise ValueError(f"dropout: expected 0, for methods are compared that must give the same, got {model.dropout}")


def machine(device: torch.device) -> str:
    """Hardware and versions, for the head of a table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def taking_turns(
    steps: Mapping[str, Callable[[], object]], runs: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each step's runs, by its name. Each round runs all steps once; ``warm_up`` rounds come before."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm_up + runs):
        for name, step in steps.items():
            taken = seconds(step, device)
            if number >= warm_up:
                times[name].append(taken)
    return times


class Spread(NamedTuple):
    """What the tables print of several measurements."""

    least: float
    median: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Of one or more."""
    return Spread(min(values), statistics.median(values), max(values))


def take_gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """The gradients by the parameters' names; the module then has none."""
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return gradients


def gradient_difference(
    method: str, found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], most: float = 1e-3
) -> float:
    """How far a method's gradients are from those of plain BPTT: the largest distance, as a part of the norm.

    Args:
        method: its name, for the error.
        found, expected: gradients by the names of parameters.
        most: the largest difference that rounding explains.

    Raises:
        RuntimeError: a gradient is further off, or only one of the two is there.
    """
    worst = 0.0
    for name, right in expected.items():
        gradient = found[name]
        if gradient is None or right is None:
            if gradient is not right:
                raise RuntimeError(f"{method}: {name} has a gradient where plain BPTT has none, or none where it has")
            continue
        distance = float((gradient - right).norm() / right.norm().clamp(min=1e-12))
        if not distance <= most:
            raise RuntimeError(f"{method}: the gradient of {name} is off by {distance:.1e} of its norm")
        worst = max(worst, distance)
    return worst


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in ``step``, a multiplication and an addition being two.

    Attention is computed by its plain products meanwhile: torch's counter does not see into the CPU's fused kernel.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


class _Alive:
    """Counts storages by the objects that use them: ``now`` bytes, and ``most`` so far."""

    def __init__(self, without: Iterable[Tensor] = ()):
        self.now = self.most = 0
        self._not_counted = {x.untyped_storage().data_ptr() for x in without}
        self._users: dict[int, int] = {}

    def add(self, storage: torch.UntypedStorage, user: object) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._not_counted:
            return
        if not self._users.get(key):
            self.now += size
            self.most = max(self.most, self.now)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(user, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self.now -= size


def live_bytes(step: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """The most bytes that autograd keeps at once during ``step``: each storage once, parameters not counted.

    Blind to what ``torch.utils.checkpoint`` keeps when it runs a part again.
    """
    alive = _Alive(without=parameters)

    class Held:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor.detach())
        alive.add(tensor.untyped_storage(), held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        step()
    return alive.most


class _CountTensors(TorchDispatchMode):
    def __init__(self, alive: _Alive):
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive, self.seen = alive, weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):  # what is older than the step is not its own, nor are views of it
            self.seen.add(storage)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self.seen:
                self.seen.add(storage)
                self.alive.add(storage, storage)
        return result


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


def peak_bytes(step: Callable[[], object], device: torch.device, model: nn.Module | None = None) -> int:
    """The most bytes of tensors that ``step`` makes and that exist at once: graphs, values, gradients, and the rest.

    Args:
        model: whose gradients the step replaces. Those of a step before are freed first: else, on a card, the second of
            two equal steps would seem to need less, by all that it frees.
    """
    if model is not None:
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    alive = _Alive()
    with _CountTensors(alive):
        step()
    return alive.most


def kept_bytes(step: Callable[[], object]) -> int:
    """The bytes of tensors that ``step`` makes and that are alive when it is done, as long as its result is."""
    alive = _Alive()
    with _CountTensors(alive):
        result = step()
    now = alive.now
    del result
    return now


class ProcessMeter:
    """How far this process has grown at most since the meter was made (Linux).

    Honest only in a process that did little before: what was freed earlier is used again unseen.
    """

    def __init__(self) -> None:
        self._before: int | None = None
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")

    def grown(self) -> int | None:
        """In bytes; None where the system does not tell."""
        return None if self._before is None else max(0, _status("VmHWM") - self._before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
