"""The command line: the only place that prints. One file per command, with its settings and ``run``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from .._installation import __version__
from ..device import is_out_of_memory
from .output import complain, let_go, make_safe
from .parsing import parse

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done; 2: a user's mistake; 130: Ctrl-C; 141: whoever read the output has left, as ``head`` does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    make_safe()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
        try:
            if arguments[:1] == ["--version"]:
                print(f"memformer {__version__}")
                return 0
            run, command = parse(arguments)
            status = run(command)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            return 141
        except (ValueError, OSError, FloatingPointError, ImportError, MemoryError) as error:
            return _refuse(error)
        except RuntimeError as error:
            if is_out_of_memory(error):
                return _refuse(error)
            raise
        except KeyboardInterrupt:
            return 130
        finally:
            let_go()


def _refuse(error: Exception) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    complain(f"error: {text}")
    return 2
