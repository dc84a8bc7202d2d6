"""The earlier library's own README example, which several benchmarks run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from memformer import MemformerConfig
from memformer.config import check_count
from memformer.settings import ModelSettings

__all__ = ["SMALL", "Example"]

MODEL = ModelSettings(dim=512, slots=128, enc_depth=2, dec_depth=2, heads=8, dec_overlap=0, tie_embeddings=False)


@dataclass(frozen=True, kw_only=True)
class Example:
    """What is run; as it stands, the example of the earlier library's README."""

    segments: int = 8
    """Segments of the source."""
    segment_tokens: int = 1024
    """Tokens in a segment."""
    target_tokens: int = 512
    """Tokens of the target, which belongs to the last segment."""
    model: ModelSettings = MODEL

    def __post_init__(self) -> None:
        for name in ("segments", "segment_tokens", "target_tokens"):
            check_count(name, getattr(self, name))

    @property
    def config(self) -> MemformerConfig:
        """The example gives encoder and decoder the same length."""
        return dataclasses.replace(
            self.model.memformer_config(256, self.segment_tokens), dec_max_seq_len=self.segment_tokens
        )

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Source and target, (1, tokens) each; always the same."""
        generator = torch.Generator().manual_seed(0)
        lengths = self.segments * self.segment_tokens, self.target_tokens
        source, target = (torch.randint(0, 256, (1, length), generator=generator) for length in lengths)
        return source, target


SMALL = Example(
    segment_tokens=16,
    target_tokens=16,
    model=ModelSettings(dim=32, slots=16, enc_depth=2, dec_depth=2, heads=8, dec_overlap=0, tie_embeddings=False),
)
"""The same in a few numbers, to see that everything runs."""
