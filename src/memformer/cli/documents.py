"""The documents that a command reads with a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data import Document, read_documents
from ..training import checkpoints, documents_of, settings_of
from ..training.resume import check_held_out

__all__ = ["DocumentOptions"]


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """Which model reads which documents."""

    checkpoint: Path
    """A run's folder (its best model if it evaluates on its way, else its newest), or one checkpoint in it."""
    data: tuple[Path, ...] = ()
    """Files and folders of UTF-8 text, .jsonl, .npy or .bin; by default the documents that the run held out."""
    text_field: str = "text"
    """The field of a .jsonl file's lines that holds the text."""
    separator: int | None = None
    """The id that ends a document inside a .npy or .bin array."""
    bin_dtype: str = "uint16"
    """The integer type of a .bin file's tokens."""

    def documents(self) -> list[Document]:
        """Raises ValueError or FileNotFoundError as :func:`~memformer.data.read_documents`."""
        if self.data:
            return read_documents(
                self.data, text_field=self.text_field, separator=self.separator, bin_dtype=self.bin_dtype
            )
        folder = checkpoints.find(self.checkpoint)
        if not (folder / "training.json").is_file():
            raise ValueError(f"{folder}: not of a run, which would have held documents out; give --data")
        training, held_out = documents_of(settings_of(folder))
        check_held_out(folder, training, held_out)
        return held_out
