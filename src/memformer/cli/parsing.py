"""Arguments to the settings of a command; each mistake is one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import itertools
import os
import re
import shlex
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro

__all__ = ["COMMANDS", "parse"]

COMMANDS = {
    "train": "TrainCommand",
    "encode": "EncodeCommand",
    "evaluate": "EvaluateCommand",
    "generate": "GenerateCommand",
    "inspect": "InspectCommand",
    "export": "ExportCommand",
    "average": "AverageCommand",
    "bench": "BenchCommand",
}
"""The class of each command's settings, in the module of its name, which is imported when the command is used."""

_DESCRIPTION = (
    "Train and use models that read sequences of any length with a memory of fixed size. "
    "memformer --version prints the version."
)
_WHAT_IS_READ = {"--data", "--held-out-data", "--test-data", "--prose", "--include", "--exclude"}
"""Who gives one of these twice means both, and nobody would see that the first was lost."""
_PLAIN = {
    r"invalid literal for int\(\) with base 10:": "expected a whole number, got",
    r"could not convert string to float:": "expected a number, got",
    r"^Error parsing ": "",
    r"Expected 1 values": "Expected a value",
    r"no type matching .*<class '\w+'>: ": "",  # of {None}|INT the second
}
"""What Python and tyro say, and how it is said here."""


def parse(arguments: Sequence[str]) -> tuple[Callable[[Any], int], Any]:
    """The function that carries out a command, and its settings.

    Raises:
        ValueError: an argument is not what was expected.
        SystemExit: the help that was asked for was printed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        tyro.cli(_any_command(), prog="memformer", description=_DESCRIPTION, args=["--help"], config=_CONFIG)
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        remedy = f"Perhaps you meant {close[0]}" if close else f"There are {', '.join(COMMANDS)}"
        raise ValueError(f"{name}: no such command. {remedy}; memformer --help says more")
    module, cls = _import(name)
    _refuse_empty(name, rest, cls)
    default = module.defaults(rest) if name == "train" else None
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), _wide(rest):
            command = tyro.cli(cls, prog=f"memformer {name}", default=default, args=rest, config=_CONFIG)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _refused_by_settings(stop) or ValueError(_with_dashes(_sentence(shown.getvalue()), rest)) from None
    if default is not None:
        module.check_typed(command, default)
    return module.run, command


_CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)


def _import(name: str) -> tuple[Any, type]:
    module = importlib.import_module(f".{name}", __package__)
    return module, getattr(module, COMMANDS[name])


def _any_command() -> Any:
    """All commands at once, for the help of all."""
    return Union[tuple(Annotated[_import(name)[1], tyro.conf.subcommand(name)] for name in COMMANDS)]  # noqa: UP007


def _refuse_empty(command: str, arguments: Sequence[str], cls: type) -> None:
    """A variable of the shell that is not set must not be taken for "nothing given"."""
    lists = set(_lists(cls))
    names = [argument.partition("=")[0].replace("_", "-") for argument in arguments]
    for name in sorted(lists & _WHAT_IS_READ):
        if names.count(name) > 1:
            raise ValueError(f"{name}: given twice, and only the last would count; give all values after one {name}")
    for before, argument, after in zip(["", *arguments], arguments, [*arguments[1:], "--"], strict=False):
        name, equals, value = argument.partition("=")
        empty = not argument and before != "--prompt"
        empty |= name.startswith("--") and name != "--prompt" and bool(equals) and not value
        if empty or (name.replace("_", "-") in lists and not equals and after.startswith("--")):
            what = before if not argument else name
            raise ValueError(f"{what or command}: an argument is empty: is a variable of the shell not set?")


def _lists(kind: Any) -> Iterator[str]:
    """The flags of a command that take any number of values at once, and are not repeated."""
    if dataclasses.is_dataclass(kind):
        marked = get_type_hints(kind, include_extras=True)
        for name, hint in get_type_hints(kind).items():
            if get_origin(hint) is tuple and get_args(hint)[-1:] == (...,) and marked[name] == hint:
                yield f"--{name.replace('_', '-')}"
            yield from _lists(hint)
    else:
        for part in get_args(kind):
            yield from _lists(part)


@contextlib.contextmanager
def _wide(arguments: Sequence[str]) -> Iterator[None]:
    """Mistakes on lines that do not wrap; help is printed as wide as the terminal."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(arguments):
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        os.environ.update({} if before is None else {"COLUMNS": before})


def _sentence(box: str) -> str:
    """What tyro says in a box of several paragraphs."""
    lines = [line.strip("\u2502| ") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()]
    rules = [i for i, line in enumerate(lines) if re.match("[\u256d\u2570]|[+]-|[\u2500-]{9}", line)]
    paragraphs = [lines[a + 1 : b] for a, b in itertools.pairwise(rules)] or [lines]
    said = paragraphs[0]
    if said[0].startswith("Missing"):  # then flags, each with its help
        said = [said[0], ", ".join(line for line in said[1:] if line.startswith("--")) or " ".join(said[1:])]
    text = " ".join(said).replace("__tyro-dummy-inner__.", "").rstrip(".")
    for theirs, ours in _PLAIN.items():
        text = re.sub(theirs, ours, text)
    meant = [line.split()[0].rstrip(",") for p in paragraphs[1:] if p[0].startswith("Perhaps") for line in p[1:]
             if line.startswith("--")]  # fmt: skip
    return text + (f". Perhaps you meant {' or '.join(dict.fromkeys(meant))}" if meant else "")


def _with_dashes(sentence: str, arguments: Sequence[str]) -> str:
    """The same, with how to give a value that begins with a dash, where one was given."""
    missing = re.match(r"Missing value for argument '(--[\w-]+)'", sentence)
    for name, value in itertools.pairwise(arguments):
        if missing and name.replace("_", "-") == missing[1] and value.startswith("-"):
            example = f"{name}={shlex.quote(value)}"
            return f"{sentence.rstrip(' .')}. One that begins with a dash follows an equals sign: {example}"
    return sentence


def _refused_by_settings(stop: SystemExit) -> ValueError | None:
    """The error of a settings class of ours that made tyro stop: it says all, without the name that tyro gives it."""
    error: BaseException | None = stop
    while error is not None:
        raised_in = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, ValueError) and raised_in[-1:] and raised_in[-1].startswith("memformer."):
            return error
        error = error.__cause__ or error.__context__
    return None
