"""A memory around any causal language model of transformers, and this library's own models there. Extra ``hf``.

Importing this registers the models with ``AutoConfig`` and ``AutoModelForCausalLM``.
"""

import importlib
from typing import TYPE_CHECKING, Any

try:
    import transformers
except ImportError as error:
    raise ImportError("memformer.hf needs transformers: pip install 'memformer-replay[hf]'") from error
if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"memformer.hf needs transformers 5.0 or newer, found {transformers.__version__}: pip install -U transformers"
    )

from .cache import MemoryCache
from .configuration import MemoryConfig
from .model import MemoryForCausalLM, MemoryOutput, PretrainedMemory
from .own import (
    CausalMemformerForCausalLM,
    HFCausalConfig,
    HFMemformerConfig,
    MemformerForCausalLM,
    StreamCache,
    as_transformers,
    named_causal,
    register,
)
from .wrap import with_memory

if TYPE_CHECKING:
    from .arguments import MemoryTrainingArguments
    from .trainer import MemoryTrainer

__all__ = [
    "CausalMemformerForCausalLM",
    "HFCausalConfig",
    "HFMemformerConfig",
    "MemformerForCausalLM",
    "MemoryCache",
    "MemoryConfig",
    "MemoryForCausalLM",
    "MemoryOutput",
    "MemoryTrainer",
    "MemoryTrainingArguments",
    "PretrainedMemory",
    "StreamCache",
    "as_transformers",
    "with_memory",
]

transformers.AutoConfig.register(MemoryConfig.model_type, MemoryConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(MemoryConfig, MemoryForCausalLM, exist_ok=True)
named_causal(MemoryForCausalLM)
register()


def __getattr__(name: str) -> Any:
    """The trainer is imported when it is asked for: it needs accelerate, and Trainer takes seconds."""
    rooms = {"MemoryTrainer": "trainer", "MemoryTrainingArguments": "arguments"}
    if name in rooms:
        return getattr(importlib.import_module(f".{rooms[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
