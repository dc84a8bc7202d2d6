"""The model that a command works with."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoints
from ..data import VOCABULARY
from ..model import Memformer
from ..training import choose_device

__all__ = ["load"]


def load(checkpoint: Path, device: str) -> Memformer:
    """A trained model of bytes, ready to use. Raises ValueError or FileNotFoundError where there is none."""
    model = Memformer.from_pretrained(checkpoints.find(checkpoint)).to(choose_device(device)).eval()
    if model.config.dec_num_tokens != VOCABULARY:
        raise ValueError(f"{checkpoint}: expected a model of bytes with a decoder, as memformer train makes it")
    return model
