"""The documents that settings describe: to train on, held out, and for the test that training never looks at."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..data import Document, held_out_split, read_documents, standard_library
from ..data.documents import limited
from ..data.folders import Tally, find_files, shown
from ..data.tokenfiles import read_any
from ..settings import TrainingConfig

__all__ = ["documents_for_test", "documents_of", "evaluated"]

CONTENT: dict[str, Literal["text", "ids"]] = {"bytes": "text", "bpe": "text", "ids": "ids"}
"""What a tokenizer is for; one that comes from a file takes both."""


def documents_of(settings: TrainingConfig) -> tuple[list[Document], list[Document]]:
    """``(training, held_out)``, the documents of a run.

    Raises:
        ValueError, FileNotFoundError: see :func:`~memformer.data.read_documents`; or a file is in two of ``data``,
            ``held_out_data`` and ``test_data``.
    """
    how = settings.documents
    _check_apart(settings)
    documents = _read(settings, settings.data) if settings.data else standard_library()
    if how.held_out_data:
        return documents, _read(settings, how.held_out_data, all_match=False)
    # All results on the standard library are of this choice.
    return held_out_split(documents, how.held_out, by=how.held_out_by if settings.data else "name")


def documents_for_test(settings: TrainingConfig) -> list[Document]:
    """The documents of ``test_data``; none without any. Raises as :func:`documents_of` does."""
    _check_apart(settings)
    return _read(settings, settings.documents.test_data, all_match=False) if settings.documents.test_data else []


def evaluated(held_out: Sequence[Document], limit: int) -> list[Document]:
    """Those of the held-out documents that are evaluated while training.

    Raises:
        ValueError: the limit leaves nothing.
    """
    kept = limited(held_out, limit)
    if not kept:
        raise ValueError(
            f"eval_limit: {limit} holds not even the first character of {held_out[0].name if held_out else 'any'}, "
            "so nothing would be evaluated; raise it"
        )
    return kept


def _read(settings: TrainingConfig, paths: Sequence[Path], all_match: bool = True) -> list[Document]:
    how = settings.documents
    read = functools.partial(
        read_documents,
        text_field=how.text_field,
        separator=how.separator,
        bin_dtype=how.bin_dtype,
        include=how.include,
        exclude=how.exclude,
        strict=how.strict,
        content=CONTENT.get(how.tokenizer),
        out=settings.out,
        all_match=all_match,
    )
    return read_any(paths, read)


def _check_apart(settings: TrainingConfig) -> None:
    """No file may be in two of the sets, or what is measured was learned."""
    how = settings.documents
    if not how.held_out_data and not how.test_data:
        return
    sets = {"data": settings.data, "held_out_data": how.held_out_data, "test_data": how.test_data}
    files = {
        name: {
            found.path.resolve(): found
            for found in find_files(
                paths, Tally(), include=how.include, exclude=how.exclude, out=[settings.out], all_match=False
            )
        }
        for name, paths in sets.items()
    }
    for one, other in itertools.combinations(files, 2):
        for path in files[one].keys() & files[other].keys():
            raise ValueError(
                f"{shown(path)}: is in {one} and in {other}, so what is measured would be what was learned; leave it "
                f"out of {one}, as exclude does"
            )
