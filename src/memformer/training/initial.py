"""A run that starts with another one's weights: its sizes and its tokenizer come with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .. import folders
from ..data import Tokenizer, load_tokenizer
from ..interface import SegmentModel
from ..models import AROUND_BASE, load_model, of_transformers
from ..pretrained import read_config
from ..settings import ModelSettings, TrainingConfig, called_here

__all__ = ["base_tokenizer", "load_initial", "sized_as"]


def sized_as(settings: TrainingConfig, path: str | Path) -> TrainingConfig:
    """Settings of a new run that starts with the weights of a model: with its sizes and its tokenizer.

    Args:
        path: the folder of a model or of a run, which becomes ``init_from``.

    Raises:
        FileNotFoundError, ValueError: there is no model, or it is damaged.
    """
    folder = _folder(path)
    model, tokenizer = load_model(folder).config, _tokenizer_in(folder)
    documents = settings.documents
    if tokenizer is not None:
        documents = dataclasses.replace(documents, tokenizer=_kind(tokenizer), vocabulary=tokenizer.ordinary)
    return dataclasses.replace(
        settings,
        init_from=Path(path),
        documents=documents,
        model=ModelSettings.of(model, settings.model.dropout),
        rollout=dataclasses.replace(settings.rollout, segment_length=model.segment_length),
    )


def _folder(path: str | Path) -> Path:
    folder = folders.find(path)
    if read_config(folder)[0] == AROUND_BASE:
        raise ValueError(
            f"init_from: the model in {folder} is around a pretrained one; begin a run with that one's base"
        )
    return folder


def load_initial(settings: TrainingConfig) -> tuple[SegmentModel, Tokenizer | None] | None:
    """The model and, where it has one, the tokenizer of ``init_from``; None where there is no such setting.

    Raises:
        FileNotFoundError, ValueError: there is no model, it is damaged, or not of the settings' sizes.
    """
    if settings.init_from is None:
        return None
    folder = _folder(settings.init_from)
    model, tokenizer = load_model(folder), _tokenizer_in(folder)
    there, found = dataclasses.asdict(model.config), settings.documents.tokenizer
    if tokenizer is not None and found != _kind(tokenizer):
        raise ValueError(
            f"documents.tokenizer: the model in {folder} has a tokenizer of {_kind(tokenizer)}, got {found}; leave it "
            "out, or take the settings from training.sized_as"
        )
    here = settings.documents.vocabulary
    if tokenizer is not None and found in ("bpe", "ids") and here != tokenizer.ordinary:
        raise ValueError(
            f"documents.vocabulary: the tokenizer in {folder} has {tokenizer.ordinary} tokens, got {here}; leave it "
            "out, or take the settings from training.sized_as"
        )
    if ModelSettings.of(model.config, 0).architecture != settings.model.architecture:
        raise ValueError(
            f"architecture: the model in {folder} is a {model.kind}, got {settings.model.architecture}; sizes come "
            "with the weights, so take the settings from training.sized_as"
        )
    given = settings.model.config(model.config.vocabulary, settings.rollout.segment_length)
    for name, value in dataclasses.asdict(given).items():
        if name != "dropout" and there[name] != value:
            raise ValueError(
                f"{called_here(name)}: the model in {folder} has {there[name]}, got {value}; sizes come with the "
                "weights, so leave them out, or take the settings from training.sized_as"
            )
    return model, tokenizer


def base_tokenizer(settings: TrainingConfig) -> Tokenizer | None:
    """That of a new run's base; None where there is no base.

    Raises:
        FileNotFoundError, ValueError: there is no such base, it has no tokenizer, or cannot read the run's segments.
        ImportError: a library that is needed is not installed.
    """
    if settings.around.base is None:
        return None
    tokenizer: Tokenizer = of_transformers().tokenizer_of(
        settings.around, settings.documents.tokenizer, settings.rollout.segment_length
    )
    return tokenizer


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        return None  # of a model that was not trained here


def _kind(tokenizer: Tokenizer) -> str:
    return str(getattr(tokenizer, "kind", type(tokenizer).__name__))
