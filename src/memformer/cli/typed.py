"""Flags that would be ignored beside the others: a mistake where they are typed.

In a file of settings, or in what a run saved, they are none: those say every setting, whether it has a meaning or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from ..data.folders import Tally, find_files
from ..data.kinds import KINDS, ROWS, kind_of
from ..data.tokenfiles import is_token_folder
from ..settings import TrainingConfig, to_flat

__all__ = ["check_fields", "check_reading", "check_typed"]


def check_typed(command: TrainingConfig, default: TrainingConfig) -> None:
    """Whether each flag that makes a command another one than its default has a meaning.

    Raises:
        ValueError: one has none; the message names it.
    """
    given, before, usual = to_flat(command), to_flat(default), to_flat(TrainingConfig())
    for name, without in _WITHOUT.items():
        value = given[name]
        if value not in (before[name], usual[name]) and (why := without(command)):
            said = "" if value is True else f"{value} "
            raise ValueError(f"{name.split('.')[-1]}: {said}has no meaning {why}; leave it out")


def check_fields(
    given: dict[str, str], paths: Sequence[Path], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> None:
    """Whether flags about fields have a meaning with data of those paths.

    Args:
        given: ``text_field`` and ``bin_dtype``, or one of them.

    Raises:
        ValueError: one says another thing than its default, and nothing that is read has such a field.
    """
    usual = to_flat(TrainingConfig())
    for name, value in given.items():
        if value != usual[f"documents.{name}"] and (why := _in_vain(name, _kinds(paths, include, exclude))):
            raise ValueError(f"{name}: {value} has no meaning {why}; leave it out")


def check_reading(given: dict[str, object], paths: Sequence[Path]) -> None:
    """Whether flags about how files are read have a meaning with data of those paths.

    Args:
        given: ``include``, ``exclude``, ``separator`` and ``strict``, or some of them.

    Raises:
        ValueError: one says something, and nothing is read that way.
    """
    for name, value in given.items():
        if value and (why := _read_whole(paths)):
            raise ValueError(f"{name}: has no meaning {why}; leave it out")


def _read_whole(paths: Sequence[Path]) -> str:
    """Why a flag about how files are read has no meaning, as the end of a sentence; empty if it has one."""
    whole = paths and all(map(is_token_folder, paths))
    return "with folders of memformer encode alone, which are read as they are" if whole else ""


def _files(settings: TrainingConfig) -> str:
    how = settings.documents
    return _read_whole([*settings.data, *how.held_out_data, *how.test_data])


def _vocabulary(settings: TrainingConfig) -> str:
    tokenizer = settings.documents.tokenizer
    return "" if tokenizer in ("bpe", "ids") else f"with the tokenizer {tokenizer}"


def _horizon_steps(settings: TrainingConfig) -> str:
    return "without --horizon-start" if settings.rollout.horizon_start is None else ""


def _held_out_by(settings: TrainingConfig) -> str:
    return "with --held-out-data" if settings.documents.held_out_data else ""


def _new_data(settings: TrainingConfig) -> str:
    return "" if settings.resume or settings.auto_resume else "without --resume or --auto-resume"


def _field(name: str, settings: TrainingConfig) -> str:
    how = settings.documents
    paths = [*settings.data, *how.held_out_data, *how.test_data]
    return _in_vain(name, _kinds(paths, how.include, how.exclude, [settings.out]))


def _in_vain(name: str, kinds: set[str]) -> str:
    """Why a flag about fields has no meaning with such files, as the end of a sentence; empty if it has one."""
    of, what = _FIELDS[name]
    return "" if of & kinds else f"with data that has no {what}"


_FIELDS = {"text_field": (ROWS, "rows"), "bin_dtype": ({".bin"}, ".bin file")}


def _kinds(paths: Sequence[Path], include: Sequence[str], exclude: Sequence[str], out: Sequence[Path] = ()) -> set[str]:
    """The kinds of all files that are data; any where a path does not exist, which is told when it is read."""
    read = [path for path in paths if not is_token_folder(path)]
    if not all(path.exists() for path in read):
        return set(KINDS)
    found = find_files(list(dict.fromkeys(read)), Tally(), include=include, exclude=exclude, out=out, all_match=False)
    return {kind_of(file.path) for file in found}


_WITHOUT: dict[str, Callable[[TrainingConfig], str]] = {
    "documents.vocabulary": _vocabulary,
    "rollout.horizon_steps": _horizon_steps,
    "documents.held_out_by": _held_out_by,
    "new_data": _new_data,
    "documents.text_field": functools.partial(_field, "text_field"),
    "documents.bin_dtype": functools.partial(_field, "bin_dtype"),
    **dict.fromkeys(("documents.include", "documents.exclude", "documents.separator", "documents.strict"), _files),
}
"""Of each of them why it has no meaning, as the end of a sentence; empty where it has one."""
