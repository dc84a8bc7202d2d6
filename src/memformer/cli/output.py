"""Output that no terminal, pipe or encoding can break."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

__all__ = ["complain", "if_heard", "let_go", "make_safe"]


def make_safe() -> None:
    """Print what a terminal's encoding lacks as \\u2026 is printed here; without a terminal at all, print nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (open to the end)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def complain(text: str) -> None:
    """A line on stderr, if that takes one: what goes wrong there must not hide what it says."""
    with contextlib.suppress(OSError):
        print(f"memformer: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def if_heard() -> Iterator[None]:
    """What is printed inside may stay unheard, for a disk is full or a terminal gone: no reason to end a training.

    Raises:
        BrokenPipeError: whoever read the output has left.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        pass


def let_go() -> None:
    """Print no more to an output that takes nothing, or the interpreter complains when it flushes at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
