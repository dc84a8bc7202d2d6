"""Memory replay here and in the earlier library (PyPI memformer 0.3.1), on its own README's example, in one run.

    pip install --no-deps --target /tmp/earlier memformer==0.3.1 einops==0.8.2
    python benchmarks/earlier_library.py --earlier /tmp/earlier

Each library lives in a process of its own; their runs take turns. Peak memory is the process's high-water mark during a
run, above what it held before (model and input loaded, no gradients). Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLE = {
    "dim": 512, "num_memory_slots": 128, "num_mem_updates": 1,
    "enc_num_tokens": 256, "enc_depth": 2, "enc_heads": 8, "enc_max_seq_len": 1024,
    "dec_num_tokens": 256, "dec_depth": 2, "dec_heads": 8, "dec_max_seq_len": 1024,
}  # fmt: skip
SEGMENTS, TARGET = 8, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--earlier", type=Path, help="folder with the earlier library (pip install --target)")
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each (default: 7)")
    parser.add_argument("--worker", choices=["this", "earlier"], help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.worker:
        return worker(settings.worker, settings.earlier)
    if settings.earlier is None or not (settings.earlier / "memformer").is_dir():
        parser.error("--earlier: expected a folder made by the pip command above")
    return compare(settings.earlier, settings.runs)


def compare(earlier: Path, runs: int) -> None:
    import torch

    print(f"{platform.platform()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"replay equals full BPTT in float64: largest relative difference {equality():.1e}")
    print(f"example: {SEGMENTS} segments of {EXAMPLE['enc_max_seq_len']}, {runs} runs each, taking turns\n")
    workers = {name: Worker(name, earlier) for name in ("this", "earlier")}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    megabytes: dict[str, list[float]] = {name: [] for name in workers}
    rates = []
    for run in range(runs + 1):
        for name, process in workers.items():
            taken, peak = process.ask()
            if run:  # the first is a warm-up
                seconds[name].append(taken)
                megabytes[name].append(peak)
        rates.append(matrix_rate())
    print(f"{'':10}{'seconds: min':>14}{'median':>9}{'max':>9}{'peak MB: min':>16}{'median':>9}{'max':>9}")
    for name in workers:
        s, m = seconds[name], megabytes[name]
        print(f"{name:10}{min(s):14.2f}{statistics.median(s):9.2f}{max(s):9.2f}"
              f"{min(m):16.0f}{statistics.median(m):9.0f}{max(m):9.0f}")  # fmt: skip
    faster = statistics.median(b / a for a, b in zip(seconds["this"], seconds["earlier"], strict=True))
    smaller = statistics.median(a / b for a, b in zip(megabytes["this"], megabytes["earlier"], strict=True))
    print(f"\nspeed, this / earlier, median of pairs        {faster:.2f} x")
    print(f"extra peak memory, this / earlier             {smaller:.2f}")
    work, rate = operations(), statistics.median(rates)
    reached = work / statistics.median(seconds["this"])
    print(f"arithmetic of one run                         {work / 1e9:,.0f} GFLOP")
    print(f"this machine's matrix-product rate            {rate / 1e9:,.0f} GFLOP/s, measured between the runs")
    print(f"fraction of it that a run here reaches        {reached / rate:.0%}")


class Worker:
    """A process that does one run whenever it is asked."""

    def __init__(self, name: str, earlier: Path):
        command = [sys.executable, __file__, "--worker", name, "--earlier", str(earlier)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self) -> tuple[float, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if len(answer) != 2:
            raise SystemExit("a worker ended early; see its error above")
        return float(answer[0]), float(answer[1])


def worker(name: str, earlier: Path) -> None:
    if name == "earlier":
        sys.path.insert(0, str(earlier))
    import torch

    from memformer import Memformer, memory_replay_backprop

    model, (src, tgt) = Memformer(**EXAMPLE), example_input()
    masks = torch.ones_like(src).bool(), torch.ones_like(tgt).bool()
    for _ in sys.stdin:
        model.zero_grad(set_to_none=True)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before, began = status("VmRSS"), time.perf_counter()
        memory_replay_backprop(model, src=src, tgt=tgt, src_mask=masks[0], tgt_mask=masks[1])
        print(time.perf_counter() - began, status("VmHWM") - before, flush=True)


def example_input():
    import torch

    generator = torch.Generator().manual_seed(0)
    length = SEGMENTS * EXAMPLE["enc_max_seq_len"]
    return tuple(torch.randint(0, 256, (1, n), generator=generator) for n in (length, TARGET))


def status(field: str) -> float:
    """A memory figure of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def equality() -> float:
    """Gradients of replay and of full BPTT on a small model."""
    import torch

    from memformer import Memformer, replay
    from memformer.data.segments import cut
    from memformer.rollouts import rollout

    torch.manual_seed(0)
    model = Memformer(**{**EXAMPLE, "dim": 32, "enc_max_seq_len": 16, "dec_max_seq_len": 16}).double()
    segments = cut(16, torch.randint(0, 256, (2, 128)), torch.randint(0, 256, (2, 16)))
    gradients = []
    for method in (replay.full_bptt, replay.memory_replay):
        loss = rollout(model, segments, method=method).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))
    return max(float((a - b).norm() / a.norm().clamp(min=1e-30)) for a, b in zip(*gradients, strict=True))


def operations() -> float:
    """Multiplications and additions in the matrix products and attentions of one run here, counted by torch.

    Replay does what plain BPTT does, and the forward pass of all encoder segments but the last once more.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    from memformer import Memformer, replay
    from memformer.data.segments import cut
    from memformer.rollouts import rollout

    model, (src, tgt) = Memformer(**EXAMPLE), example_input()
    segments = cut(EXAMPLE["enc_max_seq_len"], src, tgt)
    # torch has no formula of its own for attention on the CPU; its shapes are those of every other attention.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as plain:
        rollout(model, segments, method=replay.full_bptt).loss.backward()
    with FlopCounterMode(display=False, custom_mapping=formulas) as again, torch.no_grad():
        model.encode(segments[0].src)
    return float(plain.get_total_flops() + (SEGMENTS - 1) * again.get_total_flops())


def matrix_rate() -> float:
    """Operations per second of a product of this model's size: a segment through the feed-forward."""
    import torch

    a, b = torch.randn(EXAMPLE["enc_max_seq_len"], EXAMPLE["dim"]), torch.randn(EXAMPLE["dim"], 4 * EXAMPLE["dim"])
    a @ b
    began = time.perf_counter()
    for _ in range(100):
        a @ b
    return 100 * 2 * a.numel() * b.shape[1] / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
