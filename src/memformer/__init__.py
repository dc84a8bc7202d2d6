"""Memformer: models that read sequences of any length with a memory of fixed size, trained with exact gradients."""

from . import replay
from ._installation import __version__
from .config import MemformerConfig
from .model import Memformer
from .rollouts import memory_replay_backprop
from .state import MemoryState

__all__ = ["Memformer", "MemformerConfig", "MemoryState", "__version__", "memory_replay_backprop", "replay"]
