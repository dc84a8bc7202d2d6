"""Where to compute, and in which precision. Imports torch alone."""

from __future__ import annotations

import torch

__all__ = ["choose_device", "choose_precision"]


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
        raise ValueError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type for autocast: float32, bf16 or fp16; ``auto`` is bfloat16 where the device computes it natively."""
    if name == "auto":
        good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if good else torch.float32
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
