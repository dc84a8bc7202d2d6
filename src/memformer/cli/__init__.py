"""The command line: the only place that prints. One file per command, with its settings and ``run``."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import tyro

from .._installation import __version__
from . import bench, encode, evaluate, export, generate, inspect, train

__all__ = ["main"]

_RUN: dict[type, Callable[[Any], int]] = {
    train.TrainCommand: train.run,
    encode.EncodeCommand: encode.run,
    evaluate.EvaluateCommand: evaluate.run,
    generate.GenerateCommand: generate.run,
    inspect.InspectCommand: inspect.run,
    export.ExportCommand: export.run,
    bench.BenchCommand: bench.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done; 2: a user's mistake; 130: Ctrl-C; 141: whoever read the output has left, as ``head`` does.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        print(f"memformer {__version__}")
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, *_, **__: print(f"memformer: warning: {message}", file=sys.stderr)
        try:
            if "" in arguments[1:] and arguments[0] != "generate":
                raise ValueError("an argument is empty: is a variable of the shell not set?")
            command = _parse(arguments)
            status = _RUN[type(command)](command)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            with open(os.devnull, "w") as nowhere:  # or the interpreter complains when it flushes at its end
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            return 141
        except (ValueError, OSError, FloatingPointError, ImportError, MemoryError) as error:
            return _refuse(error)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):  # on the CPU
                return _refuse(error)
            raise
        except KeyboardInterrupt:
            return 130


def _refuse(error: Exception) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"memformer: error: {text}", file=sys.stderr)
    return 2


def _parse(arguments: list[str]) -> Any:
    defaults = train.defaults(arguments[1:]) if arguments[:1] == ["train"] else train.TrainCommand()
    commands = (
        Annotated[train.TrainCommand, tyro.conf.subcommand("train", default=defaults)]
        | Annotated[encode.EncodeCommand, tyro.conf.subcommand("encode")]
        | Annotated[evaluate.EvaluateCommand, tyro.conf.subcommand("evaluate")]
        | Annotated[generate.GenerateCommand, tyro.conf.subcommand("generate")]
        | Annotated[inspect.InspectCommand, tyro.conf.subcommand("inspect")]
        | Annotated[export.ExportCommand, tyro.conf.subcommand("export")]
        | Annotated[bench.BenchCommand, tyro.conf.subcommand("bench")]
    )
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                commands,
                prog="memformer",
                description="Train and use models that read sequences of any length with a memory of fixed size. "
                "memformer --version prints the version.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        if (refusal := _refused_by_settings(stop)) is not None:
            raise refusal from None
        sys.stderr.write(printed.getvalue())
        raise


def _refused_by_settings(stop: SystemExit) -> ValueError | None:
    """The error of a settings class of ours that made tyro stop: it says all, without the name that tyro gives it."""
    error: BaseException | None = stop
    while error is not None:
        raised_in = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, ValueError) and raised_in[-1:] and raised_in[-1].startswith("memformer."):
            return error
        error = error.__cause__ or error.__context__
    return None
