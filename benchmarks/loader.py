"""How much faster the lanes deliver tokens than the default model trains on them, on this machine.

A corpus is read as text files, as one JSONL file and as a token array. Before anything is timed, each goes through one
epoch, in which every token must come by once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from memformer.bench.meters import machine, spread
from memformer.config import check_count
from memformer.data import (
    ByteTokenizer,
    Document,
    Lanes,
    Mixture,
    TokenIds,
    encode_documents,
    read_documents,
    standard_library,
)
from memformer.data.segments import Segment
from memformer.settings import TrainingConfig
from memformer.training import Run, StepMetrics

__all__ = ["Loader", "run"]


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Tokens per second that the lanes deliver from each kind of file, and that the default model trains on."""

    data: tuple[Path, ...] = ()
    """Files and folders of text; by default the Python standard library's sources."""
    runs: int = 5
    """How often each is timed; they take turns."""
    steps: int = 1000
    """Segments of all lanes in a run."""
    training_steps: int = 20
    """Training steps of the model in a run."""

    def __post_init__(self) -> None:
        for name in ("runs", "steps", "training_steps"):
            check_count(name, getattr(self, name))


def _streams(
    folder: Path, documents: Sequence[Document], training: TrainingConfig
) -> Mapping[str, Callable[[int | None], Lanes]]:
    """For each source, what makes a stream of a number of epochs; files are written into the folder.

    Raises:
        RuntimeError: in one epoch, a stream does not deliver each token once.
    """
    tokenizer = ByteTokenizer()
    memory = [Document(document.name, bytes(document)) for document in documents]
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": bytes(document).decode()}) + "\n" for document in memory)
    ids = np.concatenate(
        [np.append(np.asarray(document.content), tokenizer.start).astype(np.uint16) for document in memory]
    )
    ids.tofile(folder / "corpus.bin")
    array = read_documents([folder / "corpus.bin"], separator=tokenizer.start)
    plain: dict[str, tuple[Sequence[Document], ByteTokenizer | TokenIds]] = {
        "arrays in memory": (memory, tokenizer),
        "text files": (documents, tokenizer),
        "JSONL": (read_documents([folder / "corpus.jsonl"]), tokenizer),
        "token array": (array, TokenIds(256)),
    }

    def make(source: str, objectives: Mixture | None, epochs: int | None) -> Lanes:
        found, own = plain[source]
        return Lanes(
            encode_documents(found, own),
            lanes=training.rollout.lanes,
            length=training.rollout.segment_length,
            start=own.start,
            seed=0,
            epochs=epochs,
            objectives=objectives,
        )

    for name in plain:
        delivered, expected = _tokens(make(name, None, 1)), ids.size - len(memory)
        if delivered != expected:
            raise RuntimeError(f"{name}: {delivered} of {expected} tokens came by in an epoch")
    mixture = Mixture(tokenizer, continuation=0.6, infilling=0.3, recall=0.1)
    return {name: functools.partial(make, name, None) for name in plain} | {
        f"{name}, paper's objectives": functools.partial(make, name, mixture)
        for name in ("arrays in memory", "text files")
    }


def _tokens(segments: Iterable[Segment]) -> int:
    """All targets of a stream but the tokens that start the decoder."""
    total = 0
    for segment in segments:
        assert segment.tgt_mask is not None
        total += int(segment.tgt_mask[:, 1:].sum())
    return total


def _tokens_per_second(stream: Lanes, steps: int) -> float:
    began = time.perf_counter()
    tokens = _tokens(stream.rollout(steps))
    return tokens / (time.perf_counter() - began)


def run(settings: Loader) -> Iterator[str]:
    """Yield the lines of a report.

    Raises:
        ValueError: the data are no text.
        RuntimeError: in one epoch, a stream does not deliver each token once.
    """
    every = settings.training_steps
    plain = TrainingConfig(device="cpu", data=settings.data, steps=every * (settings.runs + 1))
    documents = read_documents(settings.data) if settings.data else standard_library()
    with tempfile.TemporaryDirectory() as folder:
        output = dataclasses.replace(plain.output, log_every=every, save_every=10**6)
        training = Run(dataclasses.replace(plain, out=Path(folder) / "run", output=output)).train()
        assert isinstance(training, Generator), "it can be closed"
        next(training)  # a warm-up
        streams = _streams(Path(folder), documents, plain)
        rates: dict[str, list[float]] = {name: [] for name in ("the default model trains on", *streams)}
        for _ in range(settings.runs):
            for name, stream in streams.items():
                rates[name].append(_tokens_per_second(stream(None), settings.steps))
            metrics = next(training)
            assert isinstance(metrics, StepMetrics), "a run ends with its evaluation"
            rates["the default model trains on"].append(metrics.tokens_per_second)
        training.close()
    yield machine(torch.device("cpu"))
    yield (
        f"{plain.rollout.lanes} lanes x {plain.rollout.segment_length} tokens; each epoch has every token once; "
        f"{settings.runs} runs each, taking turns"
    )
    yield f"{'tokens per second':32}{'min':>12}{'median':>12}{'max':>12}{'ratio':>8}"
    model = spread(rates["the default model trains on"]).median
    for name, found in rates.items():
        least, median, most = spread(found)
        yield f"{name:32}{least:12,.0f}{median:12,.0f}{most:12,.0f}{median / model:8.1f}"
