"""The exported steps in onnxruntime against PyTorch, at batch 1, in one run: an encoder step, a decode step, and text.

    pip install 'memformer[onnx]'
    python benchmarks/export.py

Weights are random: only speed is measured, after both were shown to give the same numbers over 20 carried segments and
to write the same text. PyTorch runs the same steps eagerly. Both take turns and have the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import platform
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from memformer import Memformer
from memformer.export import DecodeStep, EncodeStep, export

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_generate.py"
START, VOCABULARY = 256, 257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--segment-length", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs=2, default=[2, 4], metavar=("ENCODER", "DECODER"))
    parser.add_argument("--runs", type=int, default=30, help="counted runs of each step (default: 30)")
    settings = parser.parse_args()
    torch.manual_seed(0)
    length = settings.segment_length
    model = Memformer(
        dim=settings.dim, num_memory_slots=settings.slots,
        enc_num_tokens=VOCABULARY, enc_max_seq_len=length, enc_depth=settings.depths[0], enc_heads=4,
        dec_num_tokens=VOCABULARY, dec_max_seq_len=length + 1, dec_depth=settings.depths[1], dec_heads=4,
    ).eval()  # fmt: skip
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{platform.platform()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"onnxruntime {onnxruntime.__version__}")  # fmt: skip
    print(f"{parameters:,} parameters, segments of {length}, batch 1, {settings.runs} runs each, taking turns")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        export(model, folder, special_tokens={"start": START})
        measure(model, Path(folder), settings.runs)


def measure(model: Memformer, folder: Path, runs: int) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    encode, decode = (onnxruntime.InferenceSession(folder / f"{name}.onnx", options) for name in ("encode", "decode"))
    length, config = model.config.enc_max_seq_len, model.config
    torch_encode, torch_decode = EncodeStep(model), DecodeStep(model.decoder)

    difference = 0.0
    memory, torch_memory = np.zeros((1, config.num_memory_slots, config.dim), np.float32), model.get_initial_mem(1)
    mask = torch.ones(1, length, dtype=torch.bool)
    for i in range(20):
        tokens, reset = torch.randint(VOCABULARY - 1, (1, length)), torch.tensor([i == 0])
        inputs = {"tokens": tokens.numpy(), "mask": mask.numpy(), "memory": memory, "reset": reset.numpy()}
        _, memory, context = encode.run(None, inputs)
        torch_inputs = tokens, mask, torch_memory, reset
        _, torch_memory, torch_context = torch_encode(*torch_inputs)
        cache, torch_cache = (np.zeros((config.dec_depth, 2, 1, 4, length + 1, config.dim // 4), np.float32),) * 2
        torch_cache = torch.from_numpy(torch_cache)
        for position in range(length):
            at = torch.tensor([position])
            step = {"token": tokens[:, position].numpy(), "position": at.numpy(), "cache": cache,
                    "context": context, "mask": mask.numpy()}  # fmt: skip
            logits, cache = decode.run(None, step)
            torch_step = tokens[:, position], at, torch_cache, torch_context, mask
            torch_logits, torch_cache = torch_decode(*torch_step)
            difference = max(difference, float((torch_logits - torch.from_numpy(logits)).abs().max()))
        difference = max(difference, float((torch_memory - torch.from_numpy(memory)).abs().max()))
    print(f"largest difference of memory and logits over 20 carried segments: {difference:.1e}")
    assert difference < 1e-4, "the exported steps are not the model's"
    example, count = runpy.run_path(str(EXAMPLE)), 2 * length
    about = json.loads((folder / "export.json").read_text())
    exported = example["Exported"](about, encode, decode)

    def written_by_onnx() -> list[int]:
        return list(example["generate"](exported, [], count))

    def written_by_torch() -> list[int]:
        empty = torch.zeros(1, 0, dtype=torch.int64)
        return model.generate(empty, count, start=START, temperature=0).tokens[0].tolist()

    assert written_by_onnx() == written_by_torch(), "the two write different texts"
    print(f"the likeliest {count} tokens are the same\n")
    print(f"{'milliseconds':24}{'PyTorch: min':>14}{'median':>9}{'max':>9}{'ONNX: min':>14}{'median':>9}{'max':>9}"
          f"{'ratio':>9}")  # fmt: skip
    compare("encoder step", runs, lambda: torch_encode(*torch_inputs), lambda: encode.run(None, inputs))
    compare("decode step", runs, lambda: torch_decode(*torch_step), lambda: decode.run(None, step))
    compare(f"{count} tokens of text", max(3, runs // 10), written_by_torch, written_by_onnx)


def compare(name: str, runs: int, by_torch: Callable[[], object], by_onnx: Callable[[], object]) -> None:
    """The ratio is the median of the pairs'; above 1, onnxruntime is faster."""
    milliseconds: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 2):
        for kept, step in zip(milliseconds, (by_torch, by_onnx), strict=True):
            began = time.perf_counter()
            step()
            if run > 1:  # the first two warm up
                kept.append(1e3 * (time.perf_counter() - began))
    columns = "".join(f"{min(x):14.2f}{statistics.median(x):9.2f}{max(x):9.2f}" for x in milliseconds)
    ratio = statistics.median(a / b for a, b in zip(*milliseconds, strict=True))
    print(f"{name:24}{columns}{ratio:8.2f}x")


if __name__ == "__main__":
    main()
