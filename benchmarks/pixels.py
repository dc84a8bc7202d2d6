"""Where the solved threshold of the pixel task comes from: a small model with its memory and without.

Prints the best bits per held-out pixel so far, for :mod:`memformer.tasks` to choose the threshold by. One thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from memformer import tasks
from memformer.bench.contestants import OWN, Contestant, build
from memformer.bench.meters import machine
from memformer.settings import ModelSettings

__all__ = ["PixelsBenchmark", "run"]

MODEL = ModelSettings(dim=64, slots=16, enc_depth=1, dec_depth=1, heads=4, dec_overlap=0, tie_embeddings=False)
BATCH, LEARNING_RATE = 32, 2e-3


@dataclass(frozen=True, kw_only=True)
class PixelsBenchmark:
    """Bits per pixel of held-out 8 x 8 digits, while a small model with its memory or without learns them."""

    minutes: float = 5
    """How long to train."""
    memory: Literal["on", "off"] = "on"
    """Whether the memory is carried from segment to segment."""
    every: int = 50
    """Training steps from one look at the held-out images to the next."""
    model: ModelSettings = MODEL

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.every < 1:
            raise ValueError("expected minutes above 0, and every of at least 1")


def run(settings: PixelsBenchmark) -> Iterator[str]:
    """Yield the lines of a report.

    Raises:
        ImportError: scikit-learn, which has the images, is missing.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, held_out = tasks.digits()
    yield machine(torch.device("cpu"))
    yield f"chance {held_out.chance:.3f}, solved from {held_out.solved:.3f} bits per pixel"
    name = "memformer" if settings.memory == "on" else "memory off"
    model = build(name, OWN, settings.model.memformer_config(train.vocabulary, train.length))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0)
    generator, best, step, end = torch.Generator().manual_seed(0), math.inf, 0, time.monotonic() + 60 * settings.minutes
    while time.monotonic() < end:
        loss = _bits(model, train, BATCH, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % settings.every == 0:
            with torch.no_grad():
                bits = _bits(model, held_out, len(held_out.images), torch.Generator().manual_seed(1)).item()
            best = min(best, bits)
            yield f"memory {settings.memory}, step {step}: best {best:.3f} bits per held-out pixel"


def _bits(model: Contestant, task: tasks.Pixels, batch_size: int, generator: torch.Generator) -> Tensor:
    """Bits per pixel of a batch."""
    episode = task.draw(batch_size, generator)
    return F.cross_entropy(model(episode).logits, episode.tokens[episode.answers]) / math.log(2)
