"""The command line: the only place that prints. One file per command, with its settings and ``run``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from ..config import TrainingConfig
from ..training import saved_settings
from . import bench, evaluate, generate, train

__all__ = ["main"]

_RUN: dict[type, Callable[[Any], int]] = {
    TrainingConfig: train.run,
    evaluate.EvaluateCommand: evaluate.run,
    generate.GenerateCommand: generate.run,
    bench.BenchCommand: bench.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 for a user's mistake, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = _parse(arguments)
        return _RUN[type(command)](command)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"memformer: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(arguments: list[str]) -> Any:
    parse = _parser(TrainingConfig())
    if arguments[:1] != ["train"] or "--resume" not in arguments or {"-h", "--help"} & set(arguments):
        return parse(arguments)
    # A resumed run has the settings that were saved with it, and flags only say what is to differ.
    out = parse(arguments).out
    return _parser(dataclasses.replace(saved_settings(out), out=out, resume=False))(arguments)


def _parser(training: TrainingConfig) -> Callable[[list[str]], Any]:
    commands = (
        Annotated[TrainingConfig, tyro.conf.subcommand("train", default=training)]
        | Annotated[evaluate.EvaluateCommand, tyro.conf.subcommand("evaluate")]
        | Annotated[generate.GenerateCommand, tyro.conf.subcommand("generate")]
        | Annotated[bench.BenchCommand, tyro.conf.subcommand("bench")]
    )
    options: dict[str, Any] = {
        "prog": "memformer",
        "description": "Train and use models that read sequences of any length with a memory of fixed size.",
        "config": (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    }
    return lambda arguments: tyro.cli(commands, args=arguments, **options)
