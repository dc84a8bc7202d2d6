"""A model's steps as files that run without this package: ``torch.export`` and ONNX.

What the steps are, a model says, see :meth:`~memformer.interface.SegmentModel.steps`: ``encode`` reads a segment and
writes the memory, ``decode`` takes one token. The batch is free, and the length up to the model's segment. Not known
here: how to sample, and when a segment is full; see ``examples/onnx_generate.py``.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config import a_path
from .interface import Axes, Step, segment_model
from .pretrained import Pretrained

__all__ = ["DescribedStep", "DescribedTensor", "Exported", "Format", "export"]

Format = Literal["onnx", "torch"]
"""ONNX files, or torch's own ``.pt2``."""


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
    """What ``export.json`` holds: ids of special tokens by name, the steps by name, the model's class and settings."""

    format: Format
    segment_length: int
    special_tokens: dict[str, int]
    steps: dict[str, DescribedStep]
    kind: str
    model: dict[str, object]


def export(
    model: Pretrained, folder: str | Path, *, format: Format = "onnx", special_tokens: Mapping[str, int] | None = None
) -> Exported:
    """Write ``encode`` and, if the model writes text, ``decode``, as ``.onnx`` or ``.pt2``, and ``export.json``.

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
        ValueError: the format is unknown, or the model is in training mode of a dtype that ONNX runs badly, or a
            causal one without an overlap, which onnxruntime does not load.
        ImportError: the packages that write ONNX are missing.
    """
    model, folder = segment_model(model), a_path("folder", folder)
    if format not in get_args(Format):
        raise ValueError(f"format: expected one of {', '.join(get_args(Format))}, got {format!r}")
    if model.training:
        raise ValueError("model: expected it in eval() mode, got training mode, whose dropout would be exported")
    if format == "onnx":
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if dtypes != {torch.float32}:
            names = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"model: expected torch.float32 for ONNX, got {names}. Call float(), or export for torch")
        if getattr(model.config, "overlap", None) == 0:
            raise ValueError(
                "overlap: onnxruntime loads no causal model without one (a reshape of nothing); export for torch"
            )
        if importlib.util.find_spec("onnxscript") is None:
            raise ImportError("ONNX needs packages that are not installed: pip install 'memformer-replay[onnx]'")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "export.json").unlink(missing_ok=True)
    config = model.config
    described: dict[str, DescribedStep] = {}
    for name, step in model.steps().items():
        file = folder / (name + {"onnx": ".onnx", "torch": ".pt2"}[format])
        if format == "torch":
            torch.export.save(_trace(step, config.segment_length), file)
        else:
            # ONNX takes attention apart, and the fused kernels lay their result out in a way that its parts do not.
            with sdpa_kernel(SDPBackend.MATH):
                _write_onnx(_trace(step, config.segment_length), step, file)
        described[name] = _described(step, file)
    contents: Exported = {
        "format": format,
        "segment_length": config.segment_length,
        "special_tokens": dict(special_tokens or {}),
        "steps": described,
        "kind": model.kind,
        "model": config.to_dict(),
    }
    (folder / "export.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return contents


@torch.no_grad()
def _trace(step: Step, longest: int) -> ExportedProgram:
    free = {"batch": Dim("batch", min=1), "length": Dim("length", min=1, max=longest) if longest > 1 else None}
    examples = tuple(example for example, _ in step.inputs.values())
    shapes = tuple({axis: free[size] for axis, size in axes.items()} for _, axes in step.inputs.values())
    with _quiet():
        return torch.export.export(step.module, examples, dynamic_shapes=shapes, strict=False)


def _write_onnx(program: ExportedProgram, step: Step, file: Path) -> None:
    with _quiet():
        written = torch.onnx.export(
            program,
            input_names=list(step.inputs),
            output_names=list(step.outputs),
            dynamic_shapes=[axes for _, axes in step.inputs.values()],  # names the free axes in the file
            dynamo=True,
            verbose=False,
        )
    assert written is not None, "dynamo=True returns a program"
    written.save(file)


@torch.no_grad()
def _described(step: Step, file: Path) -> DescribedStep:
    def of(tensor: Tensor, axes: Axes) -> DescribedTensor:
        shape = [axes.get(axis, size) for axis, size in enumerate(tensor.shape)]
        return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}

    results = step.module(*(example for example, _ in step.inputs.values()))
    return {
        "file": file.name,
        "inputs": {name: of(example, axes) for name, (example, axes) in step.inputs.items()},
        "outputs": {name: of(x, axes) for (name, axes), x in zip(step.outputs.items(), results, strict=True)},
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
