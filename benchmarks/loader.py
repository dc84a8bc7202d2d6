"""How much faster the lanes deliver tokens than the default model trains on them, on this machine.

    python benchmarks/loader.py

The corpus is the Python standard library, as text files, as one JSONL file and as a token array. Before anything is
timed, each goes through one epoch, in which every token must come by once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from memformer.bench.meters import machine
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
from memformer.settings import TrainingConfig
from memformer.training import Run, StepMetrics

PAPER = {"continuation": 0.6, "infilling": 0.3, "recall": 0.1}


def streams(folder: Path, settings: TrainingConfig) -> dict[str, Callable[[int | None], Lanes]]:
    """For each source, what makes a stream of so many epochs."""
    library, tokenizer = standard_library(), ByteTokenizer()
    memory = [Document(document.name, bytes(document)) for document in library]
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": bytes(document).decode()}) + "\n" for document in memory)
    ids = np.concatenate([np.append(document.content, tokenizer.start).astype(np.uint16) for document in memory])
    ids.tofile(folder / "corpus.bin")
    sources = {
        "arrays in memory": (memory, tokenizer, None),
        "text files": (library, tokenizer, None),
        "JSONL": (read_documents([folder / "corpus.jsonl"]), tokenizer, None),
        "token array": (read_documents([folder / "corpus.bin"], separator=tokenizer.start), TokenIds(256), None),
        "in memory, paper's objectives": (memory, tokenizer, PAPER),
        "text files, paper's objectives": (library, tokenizer, PAPER),
    }

    def make(name: str, epochs: int | None) -> Lanes:
        documents, own, odds = sources[name]
        return Lanes(
            encode_documents(documents, own),
            lanes=settings.rollout.lanes,
            length=settings.rollout.segment_length,
            start=own.start,
            seed=0,
            epochs=epochs,
            objectives=Mixture(own, **odds) if odds else None,
        )

    for name in sources:
        if sources[name][2] is None:
            delivered = sum(int(segment.tgt_mask[:, 1:].sum()) for segment in make(name, 1))
            assert delivered == ids.size - len(memory), f"{name}: {delivered} of {ids.size - len(memory)} tokens"
    return {name: lambda epochs, name=name: make(name, epochs) for name in sources}


def tokens_per_second(stream: Lanes, steps: int) -> float:
    began, tokens = time.perf_counter(), 0
    for segment in stream.rollout(steps):
        tokens += int(segment.tgt_mask[:, 1:].sum())
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each, taking turns (default: 5)")
    parser.add_argument("--steps", type=int, default=1000, help="segments of all lanes per run (default: 1000)")
    given = parser.parse_args()
    settings = TrainingConfig(device="cpu", steps=20 * (given.runs + 1))
    with tempfile.TemporaryDirectory() as folder:
        output = dataclasses.replace(settings.output, log_every=20, save_every=10**6)
        run = Run(dataclasses.replace(settings, out=Path(folder) / "run", output=output))
        training = run.train()
        next(training)  # a warm-up
        made = streams(Path(folder), settings)
        rates: dict[str, list[float]] = {"the default model trains on": []} | {name: [] for name in made}
        for _ in range(given.runs):
            for name, stream in made.items():
                rates[name].append(tokens_per_second(stream(None), given.steps))
            metrics = next(training)
            assert isinstance(metrics, StepMetrics)
            rates["the default model trains on"].append(metrics.tokens_per_second)
        training.close()
    print(f"{machine(torch.device('cpu'))}")
    print(f"{settings.rollout.lanes} lanes x {settings.rollout.segment_length} tokens; {given.runs} runs each")
    print(f"{'tokens per second':32}{'min':>12}{'median':>12}{'max':>12}{'ratio':>8}")
    model = statistics.median(rates["the default model trains on"])
    for name, found in rates.items():
        median = statistics.median(found)
        print(f"{name:32}{min(found):12,.0f}{median:12,.0f}{max(found):12,.0f}{median / model:8.1f}")


if __name__ == "__main__":
    main()
