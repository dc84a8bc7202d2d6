"""Images, pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..config import check_count
from .base import SYMBOLS, Episode, Metric, Task

__all__ = ["Pixels", "digits"]

HELD_OUT_SHARE = 5
"""Of each class, one image in this many is held out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels(Task):
    """An image, pixel by pixel: every segment but the first is predicted from all before it.

    The paper's image generation as a sequence (v2). One object per split: see :func:`digits`. An
    episode of n ``segments`` is the first n + 1 segments of an image: the last one is only predicted, never read. The
    images of a batch differ.

    Attributes:
        images: (count, pixels) integer grey levels, in the order in which they are predicted.
        levels: number of grey levels.
        per_segment: pixels per segment.
        counted: images like ``images`` whose grey levels ``chance`` counts: those for training. Default ``images``.
        solved_share: ``solved`` as a share of ``chance``. No share by itself proves a memory, for neighbours in one
            segment tell much as well; the difference to the same model without its memory does.
    """

    images: Tensor = field(repr=False)
    levels: int
    per_segment: int
    counted: Tensor | None = field(default=None, repr=False)
    solved_share: float = 0.8
    segments: int = field(init=False)
    metric: ClassVar[Metric] = "bits"

    def __post_init__(self) -> None:
        check_count("levels", self.levels)
        check_count("per_segment", self.per_segment)
        _check_images("images", self.images, self.levels)
        pixels = self.images.shape[1]
        if pixels % self.per_segment or pixels == self.per_segment:
            raise ValueError(
                f"per_segment: must cut the {pixels} pixels of an image into two equal segments or more, got "
                f"{self.per_segment}"
            )
        if self.counted is not None:
            _check_images("counted", self.counted, self.levels)
            if self.counted.shape[1] != pixels:
                raise ValueError(f"counted: expected images of {pixels} pixels, got {self.counted.shape[1]}")
        if not 0 < self.solved_share <= 1:
            raise ValueError(f"solved_share: expected a number above 0 and at most 1, got {self.solved_share!r}")
        object.__setattr__(self, "segments", pixels // self.per_segment - 1)

    @property
    def vocabulary(self) -> int:
        return SYMBOLS + self.levels

    @property
    def length(self) -> int:
        return self.per_segment

    @cached_property
    def chance(self) -> float:
        """Bits per pixel if each is coded by how often its place has its level in ``counted``, each level once more."""
        counted = self.images if self.counted is None else self.counted
        place = self.levels * torch.arange(counted.shape[1], device=counted.device)
        counts = 1.0 + torch.bincount((place + counted).flatten(), minlength=self.levels * len(place))
        share = counts / (len(counted) + self.levels)
        return -share.log2()[place + self.images][:, self.per_segment :].mean().item()

    @property
    def solved(self) -> float:
        return self.solved_share * self.chance

    def _draw(self, batch_size: int, segments: int, generator: torch.Generator) -> Episode:
        count = len(self.images)
        if batch_size > count:
            raise ValueError(f"batch_size: expected at most the number of images ({count}), got {batch_size}")
        if segments > self.segments:
            raise ValueError(
                f"segments: an image has {self.segments} that tell of later ones, got {segments}. Ask for no more"
            )
        chosen = self.images[torch.randperm(count, generator=generator)[:batch_size]]
        tokens = SYMBOLS + chosen.long().unflatten(1, (-1, self.per_segment))[:, : segments + 1]
        answers = torch.ones_like(tokens, dtype=torch.bool)
        answers[:, 0] = False
        return Episode(tokens, answers)


def digits(per_segment: int = 8) -> tuple[Pixels, Pixels]:
    """Handwritten digits of 8 x 8 pixels in 17 grey levels, from scikit-learn: tasks for training and held-out images.

    Every fifth image of each class is held out: the split is not random, and never changes.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("digits need scikit-learn: pip install 'memformer-replay[digits]'", name="sklearn") from error
    images, classes = (torch.from_numpy(array).long() for array in load_digits(return_X_y=True))
    of_class = [images[classes == digit] for digit in range(10)]
    held = [torch.arange(len(some), device=some.device) % HELD_OUT_SHARE == HELD_OUT_SHARE - 1 for some in of_class]
    train = torch.cat([some[~out] for some, out in zip(of_class, held, strict=True)])
    held_out = torch.cat([some[out] for some, out in zip(of_class, held, strict=True)])
    return (
        Pixels(images=train, levels=17, per_segment=per_segment),
        Pixels(images=held_out, levels=17, per_segment=per_segment, counted=train),
    )


def _check_images(name: str, images: Tensor, levels: int) -> None:
    if not isinstance(images, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(images).__name__}: torch.from_numpy makes one")
    if images.dim() != 2 or images.numel() == 0 or images.is_floating_point() or images.dtype == torch.bool:
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"{name}: expected whole numbers of shape (count, pixels), got {got}")
    # Not compared as they are: one byte would wrap at 256 levels.
    least, most = images.min().item(), images.max().item()
    if least < 0 or most >= levels:
        raise ValueError(f"{name}: expected grey levels from 0 to {levels - 1}, got {least} to {most}")
