"""One long text: cut into stretches by the lanes, cut into files by hand, and read whole by every lane."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from memformer.bench.meters import machine
from memformer.config import check_count
from memformer.data import Document, Lanes, encode_documents, standard_library
from memformer.settings import OutputSettings, RolloutSettings, TrainingConfig
from memformer.training import Run, assemble

__all__ = ["LanesBenchmark", "run"]


@dataclass(frozen=True, kw_only=True)
class LanesBenchmark:
    """Train on one text of the standard library's sources three times, and compare held-out bits per byte.

    Everything else is as memformer train has it. What is held out are sources that are not in the text.
    """

    size: int = 750_000
    """Bytes of the text."""
    held_out: int = 200_000
    """Bytes held out."""
    steps: int = 300
    """Steps of each training."""
    lanes: int = 12
    """Lanes of the batch, and files that the text is cut into by hand."""
    seeds: int = 1
    """How often, with seeds from 0 on."""

    def __post_init__(self) -> None:
        for name in ("size", "held_out", "steps", "lanes", "seeds"):
            check_count(name, getattr(self, name))
        if self.size < self.lanes:
            raise ValueError(f"size: expected at least one byte for each of {self.lanes} lanes, got {self.size}")


def run(settings: LanesBenchmark) -> Iterator[str]:
    """Yield the lines of a report."""
    # One file alone would be most of the text.
    sources = b"".join(bytes(document) for document in standard_library() if len(document) <= 100_000)
    if len(sources) < settings.size + settings.held_out:
        raise ValueError(f"size: expected at most the {len(sources):,} bytes of the sources with what is held out")
    text, held_out = (
        Document("text", sources[: settings.size]),
        Document("held out", sources[settings.size :][: settings.held_out]),
    )
    borders = [len(text) * i // settings.lanes for i in range(settings.lanes + 1)]
    files = [Document(f"{i}", bytes(text)[borders[i] : borders[i + 1]]) for i in range(settings.lanes)]
    yield f"{machine(torch.device('cpu'))}; {settings.steps} steps, seeds 0 to {settings.seeds - 1}"
    yield f"{'':28}{'stretches':>10}{'bits per byte on what is held out':>36}"
    by_hand = math.nan
    for name, documents, spread in (
        (f"cut into {settings.lanes} files by hand", files, False),
        ("one file, in stretches", [text], True),
        ("one file, in every lane", [text], False),
    ):
        found = [_train(settings, documents, held_out, spread, seed) for seed in range(settings.seeds)]
        mean = sum(bits for _, bits in found) / len(found)
        by_hand = mean if math.isnan(by_hand) else by_hand
        each = " ".join(f"{bits:.4f}" for _, bits in found)
        yield f"{name:28}{found[0][0]:10}{each:>24}{mean / by_hand - 1:+12.1%}"


def _train(
    settings: LanesBenchmark, documents: list[Document], held_out: Document, spread: bool, seed: int
) -> tuple[int, float]:
    """How many stretches there are, and bits per byte of the trained model."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        file.write_bytes(bytes(documents[0]))
        training = TrainingConfig(
            data=(file,),
            out=Path(folder) / "run",
            steps=settings.steps,
            seed=seed,
            device="cpu",
            rollout=RolloutSettings(lanes=settings.lanes, spread=spread),
            output=OutputSettings(save_every=settings.steps),
        )
        parts = assemble(training)
        stream = Lanes(
            encode_documents(documents, parts.tokenizer),
            lanes=settings.lanes,
            length=training.rollout.segment_length,
            start=parts.tokenizer.start,
            seed=seed,
            spread=spread,
        )
        its = Run(training, dataclasses.replace(parts, training=documents, held_out=[held_out], stream=stream))
        *_, result = its.train()
        assert stream.stretches is not None
        return stream.stretches, result.bits_per_byte  # type: ignore[union-attr,return-value]
