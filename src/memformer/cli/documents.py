"""The documents that a command reads with a trained model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from ..data import Document, read_documents
from ..data.tokenfiles import read_any
from ..training import checkpoints, documents_of, settings_of

__all__ = ["DocumentOptions"]


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """Which model reads which documents."""

    checkpoint: Path
    """A run's folder, or one checkpoint in it (RUN/best is that of the best evaluation)."""
    data: tuple[Path, ...] = ()
    """Files and folders of UTF-8 text, .jsonl, .npy or .bin, or of memformer encode; by default those held out."""
    text_field: str = "text"
    """The field of a .jsonl file's lines that holds the text."""
    separator: int | None = None
    """The id that ends a document inside a .npy or .bin array."""
    bin_dtype: str = "uint16"
    """The integer type of a .bin file's tokens."""

    def documents(self) -> list[Document]:
        """Raises ValueError or FileNotFoundError as :func:`~memformer.data.read_documents`."""
        if self.data:
            read = functools.partial(
                read_documents, text_field=self.text_field, separator=self.separator, bin_dtype=self.bin_dtype
            )
            return read_any(self.data, read, check=True)
        folder = checkpoints.find(self.checkpoint)
        if not (folder / "training.json").is_file():
            raise ValueError(f"{folder}: not of a run, which would have held documents out; give --data")
        return documents_of(settings_of(folder))[1]
