"""memformer generate."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import Tokenizer
from ..generation import generate
from ..model import Memformer
from . import models

__all__ = ["GenerateCommand", "run", "write"]


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue a prompt, for any length at constant memory; the text is printed as it comes."""

    checkpoint: Path
    """A run's folder, or one checkpoint in it."""
    prompt: str = ""
    """The text to continue; empty begins a document."""
    max_new_tokens: int = 300
    """How many bytes to write."""
    temperature: float = 0.9
    """0 always takes the most likely byte; higher is wilder."""
    top_k: int | None = None
    """Choose among so many most likely bytes."""
    top_p: float | None = 0.95
    """Choose among the most likely bytes that together have this probability."""
    seed: int = 0
    """Of the choices."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""


def run(command: GenerateCommand) -> int:
    write(*models.load(command.checkpoint, command.device), command)
    return 0


def write(model: Memformer, tokenizer: Tokenizer, command: GenerateCommand) -> None:
    """Print the prompt and its continuation byte by byte, each character when it is whole."""
    device = next(model.parameters()).device
    prompt = torch.tensor([tokenizer.encode(command.prompt).tolist()], dtype=torch.int64, device=device)
    tokens = generate(
        model.eval(),
        prompt,
        command.max_new_tokens,
        start=tokenizer.start,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        generator=torch.Generator(device).manual_seed(command.seed),
    )
    decoder = tokenizer.decoder()
    sys.stdout.write(command.prompt)
    for token in tokens:
        sys.stdout.write(decoder.decode([int(token)]))
        sys.stdout.flush()
    print(decoder.flush())
