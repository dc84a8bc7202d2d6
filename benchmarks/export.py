"""The exported steps in onnxruntime against PyTorch, at batch 1, in one run: an encoder step, a decode step, and text.

Weights are random: only speed is measured, after both were shown to give the same numbers over 20 carried segments and
to write the same text. PyTorch runs the same steps eagerly. Both take turns and have the same number of threads.
"""

from __future__ import annotations

import json
import runpy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memformer import Memformer
from memformer.bench.meters import check_no_dropout, machine, spread, taking_turns
from memformer.config import check_count
from memformer.export import DecodeStep, EncodeStep, export
from memformer.settings import ModelSettings

__all__ = ["Export", "run"]

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_generate.py"
START, VOCABULARY = 256, 257
_Session = Any  # onnxruntime has no types
MODEL = ModelSettings(dim=256, slots=32, enc_depth=2, dec_depth=4, heads=4, dec_overlap=0, tie_embeddings=False)


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
    model = Memformer(**settings.model.memformer_config(VOCABULARY, settings.segment_tokens).to_dict()).eval()
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


def _measure(
    model: Memformer,
    about: object,
    encode: _Session,
    decode: _Session,
    runs: int,
) -> Iterator[str]:
    assert model.decoder is not None, "it was made with one"
    config = model.config
    length = config.segment_length
    torch_encode, torch_decode = EncodeStep(model), DecodeStep(model.decoder)
    size = (config.dec_depth, 2, 1, config.dec_heads, length + 1, config.dim // config.dec_heads)

    difference = 0.0
    memory, torch_memory = np.zeros((1, config.num_memory_slots, config.dim), np.float32), model.get_initial_mem(1)
    mask = torch.ones(1, length, dtype=torch.bool)
    for i in range(20):
        tokens, reset = torch.randint(VOCABULARY - 1, (1, length)), torch.tensor([i == 0])
        inputs = {"tokens": tokens.numpy(), "mask": mask.numpy(), "memory": memory, "reset": reset.numpy()}
        _, memory, context = encode.run(None, inputs)
        torch_inputs = tokens, mask, torch_memory, reset
        _, torch_memory, torch_context = torch_encode(*torch_inputs)
        cache, torch_cache = np.zeros(size, np.float32), torch.zeros(size)
        for position in range(length):
            at = torch.tensor([position])
            step = {"token": tokens[:, position].numpy(), "position": at.numpy(), "cache": cache,
                    "context": context, "mask": mask.numpy()}  # fmt: skip
            logits, cache = decode.run(None, step)
            torch_step = tokens[:, position], at, torch_cache, torch_context, mask
            torch_logits, torch_cache = torch_decode(*torch_step)
            difference = max(difference, float((torch_logits - torch.from_numpy(logits)).abs().max()))
        difference = max(difference, float((torch_memory - torch.from_numpy(memory)).abs().max()))
    yield f"largest difference of memory and logits over 20 carried segments: {difference:.1e}"
    if not difference < 1e-4:
        raise RuntimeError(f"the exported steps differ from the model's by {difference:.1e}")
    example, count = runpy.run_path(str(EXAMPLE)), 2 * length
    exported = example["Exported"](about, encode, decode)

    def written_by_onnx() -> list[int]:
        return list(example["generate"](exported, [], count))

    def written_by_torch() -> list[int]:
        empty = torch.zeros(1, 0, dtype=torch.int64)
        written: list[int] = model.generate(empty, count, start=START, temperature=0).tokens[0].tolist()
        return written

    if written_by_onnx() != written_by_torch():
        raise RuntimeError("the exported steps write another text than the model")
    yield f"the likeliest {count} tokens are the same"
    yield ""
    yield (
        f"{'milliseconds':24}{'PyTorch: min':>14}{'median':>9}{'max':>9}{'ONNX: min':>14}{'median':>9}{'max':>9}"
        f"{'ratio':>9}"
    )
    yield _compare("encoder step", runs, lambda: torch_encode(*torch_inputs), lambda: encode.run(None, inputs))
    yield _compare("decode step", runs, lambda: torch_decode(*torch_step), lambda: decode.run(None, step))
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
