"""The optimizer of a run: which parameters it gives decay, and how it steps."""

from __future__ import annotations

import torch
from torch import nn

from ..settings import OptimizerSettings

__all__ = ["make_optimizer"]


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Decay is for matrices alone: vectors are biases, scales and the like."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, object]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
