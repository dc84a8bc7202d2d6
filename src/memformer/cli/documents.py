"""The documents that a command reads with a trained model."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Document, read_documents
from ..data.tokenfiles import read_any
from ..folders import NUMBERS
from ..training import checkpoints, documents_for_test, documents_of, settings_of
from ..training.documents import CONTENT
from ..training.resume import check_documents_of
from .typed import check_fields, check_reading

__all__ = ["DocumentOptions"]


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """Which model reads which documents."""

    checkpoint: Path
    """A run's folder (its best model if it evaluates on its way, else its newest), or one checkpoint in it."""
    data: tuple[Path, ...] = ()
    """Files and folders, as for memformer train; by default the documents that the run held out."""
    test: bool = False
    """Read the run's --test-data."""
    include: tuple[str, ...] = ()
    """Of folders, read only what matches one of these patterns, such as '*.txt' or 'books/*'."""
    exclude: tuple[str, ...] = ()
    """Of folders, leave out what matches one of these patterns."""
    strict: bool = False
    """Refuse what is otherwise left out with a warning: unreadable files in folders, rows without a text."""
    text_field: str = "text"
    """The field that holds the text, in rows of .jsonl, .json, .csv, .parquet and the like."""
    separator: int | None = None
    """The id that ends a document inside a .npy or .bin array."""
    bin_dtype: str = "uint16"
    """The integer type of a .bin file's tokens."""

    def documents(self) -> list[Document]:
        """The documents of ``data``, or of the run that made the checkpoint.

        Raises:
            ValueError, FileNotFoundError: see :func:`~memformer.data.read_documents`; a flag has no meaning; or the
                run's documents are no longer what they were, so that what it was trained on might be among them.
        """
        reading = {f.name: f for f in dataclasses.fields(DocumentOptions)}
        for name in ("checkpoint", "data", "test"):
            del reading[name]
        if self.data:
            if self.test:
                raise ValueError("test: reads the run's --test-data; leave --data out")
            fields = {"text_field": self.text_field, "bin_dtype": self.bin_dtype}
            check_fields(fields, self.data, self.include, self.exclude)
            check_reading(
                {name: getattr(self, name) for name in ("include", "exclude", "separator", "strict")}, self.data
            )
            how: dict[str, Any] = {name: getattr(self, name) for name in reading}
            folder = checkpoints.find(self.checkpoint)
            if (folder / NUMBERS).is_file():
                how["content"] = CONTENT.get(settings_of(folder).documents.tokenizer)
            return read_any(self.data, functools.partial(read_documents, **how), check=True)
        for name, f in reading.items():
            if getattr(self, name) != f.default:
                raise ValueError(f"{name}: says how --data is read, and none was given")
        return self._of_the_run()

    def _of_the_run(self) -> list[Document]:
        folder = checkpoints.find(self.checkpoint)
        if not (folder / NUMBERS).is_file():
            raise ValueError(f"{folder}: not of a run, which would have held documents out; give --data")
        settings = settings_of(folder)
        if self.test:
            documents = documents_for_test(settings)
            if not documents:
                raise ValueError(f"test: the run in {folder.parent} had no --test-data; give --data")
            check_documents_of(folder, test=documents)
            return documents
        training, held_out = documents_of(settings)
        check_documents_of(folder, documents=training, held_out=held_out)
        return held_out
