"""Settings of a training run around a pretrained language model, and which of the others have no meaning there.

Knows nothing of transformers: a run without a base must not need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import Typed, check_count

__all__ = ["BASE_WRITE_HEADS", "BaseSettings", "check_others"]

Trained = Literal["memory", "lora", "all"]


@dataclass(frozen=True, kw_only=True)
class BaseSettings(Typed):
    """A pretrained language model that gets a memory, in place of a new model."""

    base: Path | None = None
    """Folder of a causal language model of transformers, which gets a memory; its tokenizer reads the documents."""
    gguf: str | None = None
    """The file in --base that holds the model and its tokenizer, where it is a GGUF."""
    lora: int = 0
    """Rank of a LoRA in the base's linear maps; 0: none."""
    train_base: bool = False
    """Train the base's own weights, too. Otherwise they stay where they are, and no checkpoint holds them."""
    read_dim: int = 256
    """Width of the attention over the slots beside each of the base's layers."""
    read_heads: int = 4
    """Heads of that attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("lora", self.lora, least=0)
        for name in ("read_dim", "read_heads"):
            check_count(name, getattr(self, name))
        if self.base is None:
            for name in ("gguf", "lora", "train_base", "read_dim", "read_heads"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name}: {getattr(self, name)} is for a pretrained model; name its folder as base"
                    )
        if self.lora and self.train_base:
            raise ValueError(
                f"lora: {self.lora} has no meaning where train_base trains all weights; leave one of them out"
            )

    @property
    def trained(self) -> Trained:
        """The part of the model that is trained, as ``MemoryForCausalLM.trainable`` names it."""
        return "all" if self.train_base else "lora" if self.lora else "memory"


BASE_WRITE_HEADS = 8
"""Heads that write slots of one part around a base, if no number is given."""
MEANT = ("slots", "memory_writer", "write_temperature", "forgetting", "slot_parts", "write_heads")
"""The sizes that are a memory's, whatever it is around."""


def check_others(settings: Any) -> None:
    """Whether what else a ``TrainingConfig`` says has a meaning with a base.

    Raises:
        ValueError: one has none; the message names it.
    """
    for group, names in (
        (settings.model, [name for name in vars(settings.model) if name not in MEANT]),
        (settings.documents, ["vocabulary"]),
        (settings.objective, ["infilling", "recall"]),
    ):
        for name in names:
            if getattr(group, name) != getattr(type(group), name):
                raise ValueError(
                    f"{name}: {getattr(group, name)} has no meaning with a base, which has its own layers, tokens and "
                    f"objective; leave it out (of the model's sizes, {', '.join(MEANT)} are the memory's)"
                )
    if settings.documents.tokenizer in ("bpe", "ids"):
        raise ValueError(
            f"tokenizer: {settings.documents.tokenizer} makes other tokens than the base's; leave it out, or give the "
            "path of the base's tokenizer.json"
        )
    if settings.init_from is not None:
        raise ValueError("init_from: a run begins with the weights of a base or with those of init_from; leave one out")
    if settings.compute.compile:
        raise ValueError("compile: a memory around a pretrained model is not compiled yet; leave it out")
    if settings.compute.parallel == "fsdp":
        raise ValueError("parallel: a memory around a pretrained model is not divided by FSDP yet; use ddp")
