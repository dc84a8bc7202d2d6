"""What a model writes while it is trained: a look at it, which changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..data import Tokenizer, decoder_behind
from ..generation import Sampling, stream
from ..interface import SegmentModel, in_evaluation

__all__ = ["add_sample", "sample"]


def sample(model: SegmentModel, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    """A prompt (empty: a document's beginning) and its continuation, always with the same random numbers.

    The generators and the model's mode are left as they are.
    """
    device = next(model.parameters()).device
    ids, stop = tokenizer.encode(prompt).tolist() if prompt else [], [] if tokenizer.end is None else [tokenizer.end]
    with in_evaluation(model):
        written = stream(
            model,
            torch.tensor([ids], dtype=torch.int64, device=device),
            tokens,
            start=tokenizer.start,
            sampling=Sampling(temperature=0.9, top_p=0.95, never=tokenizer.special, stop=stop),
            generator=torch.Generator(device).manual_seed(0),
        )
        decoder = decoder_behind(tokenizer, ids)
        return prompt + "".join(decoder.decode([int(token)]) for token in written) + decoder.flush()


def add_sample(out: Path, step: int, text: str) -> None:
    """One more line in OUT/samples.jsonl."""
    with (out / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "text": text}) + "\n")
