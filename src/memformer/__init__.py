"""Memformer: models that read sequences of any length with a memory of fixed size, trained with exact gradients."""

import importlib
from types import ModuleType

from . import replay
from ._installation import __version__
from .causal import CausalMemformer
from .config import CausalConfig, MemformerConfig
from .model import Memformer
from .models import load_model
from .rollouts import memory_replay_backprop
from .state import MemoryState

__all__ = [
    "CausalConfig",
    "CausalMemformer",
    "Memformer",
    "MemformerConfig",
    "MemoryState",
    "__version__",
    "load_model",
    "memory_replay_backprop",
    "replay",
]


def __getattr__(name: str) -> ModuleType:
    """``memformer.hf`` is imported when it is asked for: transformers takes seconds."""
    if name == "hf":
        return importlib.import_module(".hf", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
