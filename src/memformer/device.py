"""Where to compute, and in which precision. Imports torch alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = [
    "check_compiler",
    "choose_device",
    "choose_precision",
    "compile_error",
    "is_out_of_memory",
    "seeded",
    "summing_device",
]


def choose_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: torch does not know the device, or it is not there.
    """
    if not isinstance(name, str):
        raise ValueError(f"device: expected a name such as cpu, cuda or auto, got {name!r}")
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the device "meta" cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({_first_sentence(error)})") from error
    return device


def _first_sentence(error: BaseException) -> str:
    """What a backend that is not there says is a page long, and the rest of it is not for users."""
    return str(error).splitlines()[0].split(". ")[0].rstrip(".")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type for autocast: float32, bf16 or fp16; ``auto`` is bfloat16 where the device computes it natively."""
    if name == "auto":
        good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if good else torch.float32
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of their own, on the CPU and on this device; the generators are afterwards as before.

    Other accelerators of the machine are left alone: torch would begin to use each of them, and warn of it.
    """
    accelerators = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
        torch.default_generator.manual_seed(seed)
        if accelerators:
            state = torch.Generator(device).manual_seed(seed).get_state()
            torch.get_device_module(device).set_rng_state(state, device)
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the CPU, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def summing_device(device: torch.device) -> torch.device:
    """Where float64 sums are kept: on the device, or on the CPU where it has no such numbers (Apple's GPUs)."""
    return torch.device("cpu") if device.type == "mps" else device


def check_compiler(device: torch.device) -> None:
    """Compile and run one addition: what torch.compile needs differs with the device and the system.

    Raises:
        ValueError: it does not work here; the message says why.
    """

    def add(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    try:
        torch.compile(add)(torch.zeros(8, device=device))
    except Exception as error:
        raise ValueError(
            f"compile: torch.compile does not work here: {compile_error(error)}. It needs a C++ compiler (g++ or "
            "clang++; cl on Windows) and, on a GPU, triton; install what is missing, or leave --compile out"
        ) from error


def compile_error(error: BaseException) -> str:
    """The first line of what is at the bottom of an error of torch.compile."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
