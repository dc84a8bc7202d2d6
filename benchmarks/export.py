"""The exported steps in onnxruntime against PyTorch, at batch 1, in one run: an encoder step, a decode step, and text.
Of a Memformer, or with ``--architecture causal`` of a causal model.

Weights are random: only speed is measured, after both were shown to give the same numbers over 20 carried segments and
to write the same text. PyTorch runs the same steps eagerly. Both take turns and have the same number of threads.
"""

from __future__ import annotations

import functools
import json
import runpy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memformer.bench.meters import check_no_dropout, machine, spread, taking_turns
from memformer.config import check_count
from memformer.export import Exported, export
from memformer.generation import generate
from memformer.interface import SegmentModel
from memformer.models import make_model
from memformer.settings import ModelSettings

__all__ = ["Export", "run"]

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_generate.py"
START, VOCABULARY = 256, 257
_Session = Any  # onnxruntime has no types
_Tensors = dict[str, Tensor]
MODEL = ModelSettings(dim=256, slots=32, tie_embeddings=False)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Milliseconds of the exported steps in onnxruntime, beside the same steps in PyTorch."""

    segment_tokens: int = 64
    """Tokens in a segment."""
    runs: int = 30
    """How often each step is timed; both take turns."""
    model: ModelSettings = MODEL

    def __post_init__(self) -> None:
        for name in ("segment_tokens", "runs"):
            check_count(name, getattr(self, name))
        check_no_dropout(self.model)


def run(settings: Export) -> Iterator[str]:
    """Yield the lines of a report.

    Raises:
        ImportError: onnxruntime or what writes ONNX files is missing.
        RuntimeError: the exported steps give other numbers, or write another text.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("exported steps run in onnxruntime, which is not installed", name="onnxruntime") from error
    torch.manual_seed(0)
    model = make_model(settings.model.config(VOCABULARY, settings.segment_tokens)).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield f"{machine(torch.device('cpu'))}, onnxruntime {onnxruntime.__version__}"
    yield (
        f"{parameters:,} parameters, segments of {settings.segment_tokens}, batch 1, {settings.runs} runs each, taking "
        "turns"
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as written, torch.inference_mode():
        folder = Path(written)
        export(model, folder, special_tokens={"start": START})
        encode, decode = (onnxruntime.InferenceSession(folder / f"{x}.onnx", options) for x in ("encode", "decode"))
        yield from _measure(model, json.loads((folder / "export.json").read_text()), encode, decode, settings.runs)


def _measure(model: SegmentModel, about: Exported, encode: _Session, decode: _Session, runs: int) -> Iterator[str]:
    length, steps, sessions = about["segment_length"], model.steps(), {"encode": encode, "decode": decode}

    def by_torch(name: str, given: _Tensors) -> _Tensors:
        return dict(zip(steps[name].outputs, steps[name].module(*given.values()), strict=True))

    def by_onnx(name: str, given: _Tensors) -> _Tensors:
        found = sessions[name].run(None, {x: tensor.numpy() for x, tensor in given.items()})
        return {x: torch.from_numpy(array) for x, array in zip(steps[name].outputs, found, strict=True)}

    begin = {x: torch.zeros_like(example[:1]) for x, (example, _) in steps["encode"].inputs.items()}
    begin["cache"] = steps["decode"].inputs["cache"][0][:, :, :1]
    sides, difference = [(by_torch, begin), (by_onnx, dict(begin))], 0.0  # each with what it carries
    last: dict[str, _Tensors] = {}  # what each step was given

    def both(name: str, **given: Tensor) -> float:
        """Run a step on both sides; how far the outputs are apart."""
        found = []
        for run, carried in sides:
            carried |= given
            last[name] = {x: carried[x] for x in steps[name].inputs}
            found.append(run(name, last[name]))
            carried |= {x.removesuffix("_after"): tensor for x, tensor in found[-1].items()}
        return max(float((x - y).abs().max()) for x, y in zip(*(side.values() for side in found), strict=True))

    for i in range(20):
        tokens, mask = torch.randint(VOCABULARY - 1, (1, length)), torch.ones(1, length, dtype=torch.bool)
        difference = max(difference, both("encode", tokens=tokens, mask=mask, reset=torch.tensor([i == 0])))
        for position in range(length):
            step = {"token": tokens[:, position], "position": torch.tensor([position])}
            difference = max(difference, both("decode", **step))
    yield f"largest difference of memory and logits over 20 carried segments: {difference:.1e}"
    if not difference < 1e-4:
        raise RuntimeError(f"the exported steps differ from the model's by {difference:.1e}")
    example, count = runpy.run_path(str(EXAMPLE)), 2 * length
    exported = example["Exported"](about, encode, decode)

    def written_by_onnx() -> list[int]:
        return list(example["generate"](exported, [], count))

    def written_by_torch() -> list[int]:
        empty = torch.zeros(1, 0, dtype=torch.int64)
        written: list[int] = generate(model, empty, count, start=START, temperature=0).tokens[0].tolist()
        return written

    if written_by_onnx() != written_by_torch():
        raise RuntimeError("the exported steps write another text than the model")
    yield f"the likeliest {count} tokens are the same"
    yield ""
    yield (
        f"{'milliseconds':24}{'PyTorch: min':>14}{'median':>9}{'max':>9}{'ONNX: min':>14}{'median':>9}{'max':>9}"
        f"{'ratio':>9}"
    )
    for name, title in (("encode", "encoder step"), ("decode", "decode step")):
        arrays = {x: tensor.numpy() for x, tensor in last[name].items()}
        yield _compare(
            title,
            runs,
            functools.partial(steps[name].module, *last[name].values()),
            functools.partial(sessions[name].run, None, arrays),
        )
    yield _compare(f"{count} tokens of text", max(3, runs // 10), written_by_torch, written_by_onnx)


def _compare(name: str, runs: int, by_torch: Callable[[], object], by_onnx: Callable[[], object]) -> str:
    """A row; its ratio is the median of the pairs', and above 1, onnxruntime is faster."""
    times = taking_turns({"torch": by_torch, "onnx": by_onnx}, runs, torch.device("cpu"), warm_up=2)
    columns = ""
    for seconds in times.values():
        least, median, most = spread([1e3 * x for x in seconds])
        columns += f"{least:14.2f}{median:9.2f}{most:9.2f}"
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    return f"{name:24}{columns}{ratio:8.2f}x"
