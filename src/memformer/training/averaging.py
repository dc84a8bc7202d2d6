"""The mean of several checkpoints as one model: often a better one than any of them, at no cost but the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.tokenizers import CONFIG, VOCABULARY_FILE
from ..folders import find
from ..interface import SegmentModel
from ..models import load_model

__all__ = ["average"]


def average(folders: Sequence[str | Path]) -> SegmentModel:
    """A model whose weights are the means of others', such as the last checkpoints of a run.

    Weights that did not come from one training, or from one beginning, have no useful mean.

    Args:
        folders: at least two, each of a model: a checkpoint, or what ``save_pretrained`` wrote.

    Returns:
        The model, in the type of the weights; they are added up in float64 and rounded once.

    Raises:
        FileNotFoundError: a folder holds no model.
        ValueError: fewer than two folders; one is damaged, its model has other settings or another tokenizer, or its
            weights are not finite.
    """
    if isinstance(folders, (str, Path)) or len(folders) < 2:
        raise ValueError(f"folders: expected a list of at least two models to average, got {folders!r}")
    first, *others = found = [find(folder) for folder in folders]
    model = load_model(first)
    sums = {name: p.detach().double() for name, p in model.named_parameters()}
    for folder in others:
        other = load_model(folder)
        if other.config != model.config:
            raise ValueError(f"{folder}: its model is {other.config}, expected that of {first}, {model.config}")
        if _tokenizer(folder) != _tokenizer(first):
            raise ValueError(f"{folder}: its tokenizer is not that of {first}, so its weights are of other tokens")
        for name, parameter in other.named_parameters():
            sums[name] += parameter.detach()
    for name, parameter in model.named_parameters():
        if not sums[name].isfinite().all():
            raise ValueError(f"{name}: not finite in one of {', '.join(map(str, found))}; leave that one out")
        with torch.no_grad():
            parameter.copy_(sums[name] / len(found))
    return model


def _tokenizer(folder: Path) -> list[bytes | None]:
    files = [folder / name for name in (CONFIG, VOCABULARY_FILE)]
    return [file.read_bytes() if file.is_file() else None for file in files]
