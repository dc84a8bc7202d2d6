"""One step of the encoder and one of the decoder as files that run without this package: ``torch.export`` and ONNX.

Shapes: tokens (batch, length), memory (batch, slots, dim); the batch is free, and the length up to the model's segment.
What the decoder looks at is computed once per segment, and travels as two tensors: ``context``, the keys and values of
the encoder's output, (layers, 2, batch, heads, length, head_dim), and ``cache``, those of the targets so far, (layers,
2, batch, heads, dec_max_seq_len + dec_overlap, head_dim). Not known here: how to sample, when a segment is full, and
which tokens of the last one overlap; see ``examples/onnx_generate.py``.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config import a_path
from .network import Decoder, Network
from .pretrained import Pretrained, unwrapped

__all__ = ["DecodeStep", "DescribedStep", "DescribedTensor", "EncodeStep", "Exported", "Format", "export"]

Format = Literal["onnx", "torch"]
"""ONNX files, or torch's own ``.pt2``."""

_AXES: dict[str, dict[int, str]] = {
    "tokens": {0: "batch", 1: "length"},
    "mask": {0: "batch", 1: "length"},
    "memory": {0: "batch"},
    "reset": {0: "batch"},
    "encoded": {0: "batch", 1: "length"},
    "memory_after": {0: "batch"},
    "context": {2: "batch", 4: "length"},
    "token": {0: "batch"},
    "position": {0: "batch"},
    "cache": {2: "batch"},
    "logits": {0: "batch"},
    "cache_after": {2: "batch"},
}
"""The free axes of everything that goes in or comes out."""


class EncodeStep(nn.Module):
    """Read one segment and write the memory: :meth:`Network.step`, and what the decoder will look at."""

    def __init__(self, model: Network):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, memory: Tensor, reset: Tensor) -> tuple[Tensor, ...]:
        """``(encoded, memory)``, and ``context`` if there is a decoder; ``reset`` (batch,): lanes that begin anew."""
        encoded, written = self.model.step(tokens, memory, mask, reset)
        if self.model.decoder is None:
            return encoded, written
        contexts = self.model.decoder.context_projection(encoded)
        return encoded, written, torch.stack([torch.stack(pair) for pair in contexts])


class DecodeStep(nn.Module):
    """One target per lane: :meth:`Decoder.step`, with the cache as a value that goes in and comes out."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(
        self, token: Tensor, position: Tensor, cache: Tensor, context: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Token and position (batch,) -> logits (batch, tokens) of the next; ``mask``: that of the encoded segment."""
        kept = [(pair[0].clone(), pair[1].clone()) for pair in cache]
        contexts = [(pair[0], pair[1]) for pair in context]
        # A lane with nothing to look at looks at zeros, as in the encoder.
        logits = self.decoder.step(token, position, kept, contexts, mask | ~mask.any(1, keepdim=True))
        return logits, torch.stack([torch.stack(pair) for pair in kept])


class DescribedTensor(TypedDict):
    """The dtype by torch's name, and the shape; a free axis has its name in place of a size."""

    dtype: str
    shape: list[str | int]


class DescribedStep(TypedDict):
    """The file of a step, and all that goes in and comes out by name, in order."""

    file: str
    inputs: dict[str, DescribedTensor]
    outputs: dict[str, DescribedTensor]


class Exported(TypedDict):
    """What ``export.json`` holds: ids of special tokens by name, the steps by name, the model's settings."""

    format: Format
    segment_length: int
    special_tokens: dict[str, int]
    steps: dict[str, DescribedStep]
    model: dict[str, object]


@dataclass(frozen=True)
class _Step:
    """A module to export, an example of its inputs, in order, and of its outputs, by the names in ``_AXES``."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def export(
    model: Pretrained, folder: str | Path, *, format: Format = "onnx", special_tokens: Mapping[str, int] | None = None
) -> Exported:
    """Write ``encode`` and, if the model has a decoder, ``decode``, as ``.onnx`` or ``.pt2``, and ``export.json``.

    ``export.json`` names all inputs, in their order, and outputs, with shapes and dtypes, and holds the model's
    settings. It is written last: where it is, the rest is whole. To begin a document, pass zeros as the memory and True
    as ``reset``: the learned initial memory is inside.

    Args:
        model: in ``eval()`` mode.
        folder: made if need be.
        format: "onnx" (float32 alone; needs the extra ``onnx``) or "torch" (``torch.export``).
        special_tokens: ids by name, to be noted in ``export.json``; generating text needs ``start``.

    Returns:
        What ``export.json`` holds.

    Raises:
        ValueError: the format is unknown, or the model is in training mode or of a dtype that ONNX runs badly.
        ImportError: the packages that write ONNX are missing.
    """
    inner = unwrapped(model)
    if not isinstance(inner, Network):
        raise ValueError(f"model: expected a Memformer, got {type(inner).__name__}, which cannot be exported yet")
    model, folder = inner, a_path("folder", folder)
    if format not in get_args(Format):
        raise ValueError(f"format: expected one of {', '.join(get_args(Format))}, got {format!r}")
    if model.training:
        raise ValueError("model: expected it in eval() mode, got training mode, whose dropout would be exported")
    if format == "onnx":
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if dtypes != {torch.float32}:
            names = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"model: expected torch.float32 for ONNX, got {names}. Call float(), or export for torch")
        if importlib.util.find_spec("onnxscript") is None:
            raise ImportError("ONNX needs packages that are not installed: pip install 'memformer-replay[onnx]'")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "export.json").unlink(missing_ok=True)
    config = model.config
    described: dict[str, DescribedStep] = {}
    for name, step in _steps(model).items():
        file = folder / (name + {"onnx": ".onnx", "torch": ".pt2"}[format])
        if format == "torch":
            torch.export.save(_trace(step, config.enc_max_seq_len), file)
        else:
            # ONNX takes attention apart, and the fused kernels lay their result out in a way that its parts do not.
            with sdpa_kernel(SDPBackend.MATH):
                _write_onnx(_trace(step, config.enc_max_seq_len), step, file)
        described[name] = {
            "file": file.name,
            "inputs": _described(step.inputs),
            "outputs": _described(step.outputs),
        }
    contents: Exported = {
        "format": format,
        "segment_length": config.segment_length,
        "special_tokens": dict(special_tokens or {}),
        "steps": described,
        "model": config.to_dict(),
    }
    (folder / "export.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return contents


@torch.no_grad()
def _steps(model: Network) -> dict[str, _Step]:
    # Two lanes and two tokens: the tracer takes a size of one for a constant.
    config, batch = model.config, 2
    like = torch.zeros(batch, min(2, config.enc_max_seq_len), dtype=torch.int64, device=next(model.parameters()).device)
    mask = torch.ones_like(like, dtype=torch.bool)
    inputs = {
        "tokens": like,
        "mask": mask,
        "memory": model.get_initial_mem(batch).clone(),
        "reset": mask.all(1),
    }
    encode = EncodeStep(model)
    outputs = dict(zip(("encoded", "memory_after", "context"), encode(**inputs), strict=False))
    steps = {"encode": _Step(encode, inputs, outputs)}
    if model.decoder is not None:
        cache = model.decoder.new_cache(batch, config.dec_max_seq_len or 0)
        inputs = {
            "token": like[:, 0].clone(),
            "position": like[:, 0].clone(),
            "cache": torch.stack([torch.stack(pair) for pair in cache]),
            "context": outputs["context"],
            "mask": mask,
        }
        decode = DecodeStep(model.decoder)
        outputs = dict(zip(("logits", "cache_after"), decode(**inputs), strict=True))
        steps["decode"] = _Step(decode, inputs, outputs)
    return steps


@torch.no_grad()
def _trace(step: _Step, max_length: int) -> ExportedProgram:
    free = {"batch": Dim("batch", min=1), "length": Dim("length", min=1, max=max_length) if max_length > 1 else None}
    shapes = {name: {axis: free[size] for axis, size in _AXES[name].items()} for name in step.inputs}
    with _quiet():
        return torch.export.export(step.module, tuple(step.inputs.values()), dynamic_shapes=shapes, strict=False)


def _write_onnx(program: ExportedProgram, step: _Step, file: Path) -> None:
    with _quiet():
        written = torch.onnx.export(
            program,
            input_names=list(step.inputs),
            output_names=list(step.outputs),
            dynamic_shapes={name: _AXES[name] for name in step.inputs},  # names the free axes in the file
            dynamo=True,
            verbose=False,
        )
    assert written is not None, "dynamo=True returns a program"
    written.save(file)


def _described(tensors: dict[str, Tensor]) -> dict[str, DescribedTensor]:
    def shape(name: str, tensor: Tensor) -> list[str | int]:
        return [_AXES[name].get(axis, size) for axis, size in enumerate(tensor.shape)]

    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape(name, tensor)}
        for name, tensor in tensors.items()
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences known, harmless warnings of the exporter: about its own use of pytrees, about axes that share a name on
    purpose, and about torchvision, which is not installed."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used, since it shares", UserWarning)
            yield
    finally:
        registration.setLevel(level)
