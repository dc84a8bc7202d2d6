"""The model that a command works with, and its documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import checkpoints
from ..data import Document, Tokenizer, load_tokenizer, read_documents
from ..model import Memformer
from ..training import choose_device, documents_of, settings_of

__all__ = ["DocumentOptions", "load"]


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """What a command on documents is told."""

    checkpoint: Path
    """A run's folder, or one checkpoint in it (RUN/best is that of the best evaluation)."""
    data: tuple[Path, ...] = ()
    """Files and folders of UTF-8 text, .jsonl, .npy or .bin; by default what the run held out of its own."""
    text_field: str = "text"
    """The field of a .jsonl file's lines that holds the text."""
    separator: int | None = None
    """The id that ends a document inside a .npy or .bin array."""
    bin_dtype: str = "uint16"
    """What a .bin file is made of."""

    def documents(self) -> list[Document]:
        """Raises ValueError or FileNotFoundError as :func:`~memformer.data.read_documents`."""
        if self.data:
            return read_documents(
                self.data, text_field=self.text_field, separator=self.separator, bin_dtype=self.bin_dtype
            )
        folder = checkpoints.find(self.checkpoint)
        if not (folder / "training.json").is_file():
            raise ValueError(f"{folder}: not of a run, which would have held documents out; give --data")
        return documents_of(settings_of(folder))[1]


def load(checkpoint: Path, device: str) -> tuple[Memformer, Tokenizer]:
    """A trained model, ready to use, and its tokenizer.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, of another kind, or the device is not there.
    """
    folder = checkpoints.find(checkpoint)
    model, tokenizer = Memformer.from_pretrained(folder).to(choose_device(device)).eval(), load_tokenizer(folder)
    if model.config.dec_num_tokens != tokenizer.vocabulary:
        raise ValueError(
            f"{folder}: expected a model with a decoder of {tokenizer.vocabulary} tokens, as memformer train makes it, "
            f"got dec_num_tokens {model.config.dec_num_tokens}"
        )
    return model, tokenizer
