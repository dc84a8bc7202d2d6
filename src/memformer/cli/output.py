"""Output that no terminal, pipe or encoding can break."""

from __future__ import annotations

import io
import os
import sys

__all__ = ["let_go", "make_safe"]


def make_safe() -> None:
    """Print what a terminal's encoding lacks as \\u2026 is printed here; without a terminal at all, print nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (open to the end)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def let_go() -> None:
    """Print no more to an output that takes nothing, or the interpreter complains when it flushes at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
