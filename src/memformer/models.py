"""The kinds of models that this library has: made of a configuration, or loaded from a folder that says which it is."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from .causal import CausalMemformer
from .config import ModelConfig, a_path
from .folders import model_in
from .interface import SegmentModel
from .model import Memformer
from .pretrained import read_config

__all__ = ["load_model", "make_model", "of_transformers"]

KINDS: dict[str, type[SegmentModel]] = {kind.kind: kind for kind in (Memformer, CausalMemformer)}
"""By what ``config.json`` calls them."""
AROUND_BASE = "AroundBase"
"""What it calls a memory around a pretrained model, in a run's checkpoint; see :func:`of_transformers`."""
MEMORY_OF_TRANSFORMERS = "memformer_memory"
"""The ``model_type`` of such a model where ``save_pretrained`` of transformers wrote it."""


def make_model(config: ModelConfig) -> SegmentModel:
    """A new model of that configuration, of the kind that the configuration is of."""
    (kind,) = (kind for kind in KINDS.values() if isinstance(config, kind.config_class))
    return kind(**config.to_dict())


def load_model(folder: str | Path, base_model: str | Path | None = None) -> SegmentModel:
    """The model in a folder, of whichever kind: ``from_pretrained`` of the class that wrote it.

    Args:
        folder: of ``save_pretrained``, or of a training run's checkpoint.
        base_model: of a memory around a pretrained model, the folder of that one where it has moved.

    >>> model.save_pretrained(folder)
    >>> type(load_model(folder)).__name__
    'Memformer'

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, does not fit the other, or is of a kind that this version does not know; a
            ``base_model`` for a model that has none.
    """
    folder = a_path("folder", folder)
    kind: Any = _kind_in(model_in(folder))
    if base_model is None:
        loaded: SegmentModel = kind.from_pretrained(folder)
    elif kind in KINDS.values():
        raise ValueError(f"base: the {kind.__name__} in {folder} is around no pretrained model; leave it out")
    else:
        loaded = kind.from_pretrained(folder, base_model=base_model)
    return loaded


def of_transformers() -> Any:
    """The class of the models around a pretrained one, :class:`memformer.hf.runs.AroundBase`.

    It stands above this module and needs an extra, so it is imported when such a model is asked for.

    Raises:
        ImportError: transformers is not installed, or too old.
    """
    return importlib.import_module(".hf.runs", __package__).AroundBase


def _kind_in(folder: Path) -> type[SegmentModel]:
    kind, settings = read_config(folder)
    if kind == AROUND_BASE or settings.get("model_type") == MEMORY_OF_TRANSFORMERS:
        found: type[SegmentModel] = of_transformers()
        return found
    if kind not in KINDS:
        known = ", ".join([*KINDS, AROUND_BASE])
        raise ValueError(f"{folder / 'config.json'}: expected the model to be one of {known}, got {kind!r}")
    return KINDS[kind]
