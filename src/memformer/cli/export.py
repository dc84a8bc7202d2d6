"""memformer export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data import load_tokenizer
from ..data.tokenizers import SPECIAL
from ..export import Format, export
from ..folders import NUMBERS, find, newest
from ..models import load_model

__all__ = ["ExportCommand", "run"]


@dataclass(frozen=True, kw_only=True)
class ExportCommand:
    """Write a step that reads a segment and one that writes a token as files that run without this package."""

    checkpoint: Path
    """A run's folder, or one checkpoint in it; a folder of save_pretrained will do."""
    out: Path
    """Folder for encode and decode (.onnx or .pt2), export.json and the tokenizer."""
    format: Format = "onnx"
    """onnx for onnxruntime, torch for torch.export.load."""


def run(command: ExportCommand) -> int:
    """Write a model for other runtimes; returns the exit status."""
    folder = find(command.checkpoint)
    if newest(command.out) is not None or any((command.out / name).exists() for name in ("run.yaml", NUMBERS)):
        raise ValueError(f"out: {command.out} is of a training run; choose another folder")
    model = load_model(folder).eval()
    try:
        tokenizer = load_tokenizer(folder)
    except FileNotFoundError:
        tokenizer = None  # a model that was not trained here: its ids are its user's own
    special = {} if tokenizer is None else dict(zip(SPECIAL, tokenizer.special, strict=True))
    contents = export(model, command.out, format=command.format, special_tokens=special)
    if tokenizer is not None:
        tokenizer.save(command.out)
    for name in [step["file"] for step in contents["steps"].values()] + ["export.json"]:
        print(f"{command.out / name}  {(command.out / name).stat().st_size:,} bytes")
    return 0
