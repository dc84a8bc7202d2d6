"""Flags of memformer train that would be ignored beside the others: a mistake where they are typed.

In a file of settings, or in what a run saved, they are none: those say every setting, whether it has a meaning or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ..data.folders import Tally, find_files
from ..data.kinds import KINDS, ROWS, kind_of
from ..data.tokenfiles import is_token_folder
from ..settings import TrainingConfig, to_flat

__all__ = ["check_typed"]


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


def _vocabulary(settings: TrainingConfig) -> str:
    tokenizer = settings.documents.tokenizer
    return "" if tokenizer in ("bpe", "ids") else f"with the tokenizer {tokenizer}"


def _horizon_steps(settings: TrainingConfig) -> str:
    return "without --horizon-start" if settings.rollout.horizon_start is None else ""


def _held_out_by(settings: TrainingConfig) -> str:
    return "with --held-out-data" if settings.documents.held_out_data else ""


def _new_data(settings: TrainingConfig) -> str:
    return "" if settings.resume or settings.auto_resume else "without --resume or --auto-resume"


def _text_field(settings: TrainingConfig) -> str:
    return "" if ROWS & _kinds(settings) else "with data that has no rows"


def _bin_dtype(settings: TrainingConfig) -> str:
    return "" if ".bin" in _kinds(settings) else "with data that has no .bin file"


def _kinds(settings: TrainingConfig) -> set[str]:
    """The kinds of all files that are data; any where a path does not exist, which is told when it is read."""
    how = settings.documents
    paths: Iterable[Path] = (*settings.data, *how.held_out_data, *how.test_data)
    read = [path for path in paths if not is_token_folder(path)]
    if not all(path.exists() for path in read):
        return set(KINDS)
    found = find_files(
        list(dict.fromkeys(read)),
        Tally(),
        include=how.include,
        exclude=how.exclude,
        out=[settings.out],
        all_match=False,
    )
    return {kind_of(file.path) for file in found}


_WITHOUT: dict[str, Callable[[TrainingConfig], str]] = {
    "documents.vocabulary": _vocabulary,
    "rollout.horizon_steps": _horizon_steps,
    "documents.held_out_by": _held_out_by,
    "new_data": _new_data,
    "documents.text_field": _text_field,
    "documents.bin_dtype": _bin_dtype,
}
"""Beside what each of them has no meaning; nothing where it has one."""
