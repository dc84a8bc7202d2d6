"""The kinds of models that this library has: made of a configuration, or loaded from a folder that says which it is."""

from __future__ import annotations

from pathlib import Path

from .causal import CausalMemformer
from .config import ModelConfig, a_path
from .folders import model_in
from .interface import SegmentModel
from .model import Memformer
from .pretrained import read_config

__all__ = ["config_in", "load_model", "make_model"]

KINDS: dict[str, type[SegmentModel]] = {kind.kind: kind for kind in (Memformer, CausalMemformer)}
"""By what ``config.json`` calls them."""


def make_model(config: ModelConfig) -> SegmentModel:
    """A new model of that configuration, of the kind that the configuration is of."""
    (kind,) = (kind for kind in KINDS.values() if isinstance(config, kind.config_class))
    return kind(**config.to_dict())


def load_model(folder: str | Path) -> SegmentModel:
    """The model in a folder, of whichever kind: ``from_pretrained`` of the class that wrote it.

    >>> model.save_pretrained(folder)
    >>> type(load_model(folder)).__name__
    'Memformer'

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, does not fit the other, or is of a kind that this version does not know.
    """
    folder = a_path("folder", folder)
    return _kind_in(model_in(folder)).from_pretrained(folder)


def config_in(folder: Path) -> ModelConfig:
    """The settings in a folder's ``config.json``. Raises as :func:`load_model`."""
    return _kind_in(folder).saved_config(folder)


def _kind_in(folder: Path) -> type[SegmentModel]:
    kind, _ = read_config(folder)
    if kind not in KINDS:
        raise ValueError(f"{folder / 'config.json'}: expected the model to be one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind]
