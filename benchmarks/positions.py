"""What each position encoding costs: the earlier library's replay example with all three, taking turns.

    python benchmarks/positions.py

What they learn is compared by `memformer train --positions NAME --out runs/NAME`, with the same seed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import get_args

import torch
from earlier_library import EXAMPLE, example_input

from memformer import Memformer, memory_replay_backprop
from memformer.config import Positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each (default: 5)")
    runs = parser.parse_args().runs
    src, tgt = example_input()
    models = {name: Memformer(**EXAMPLE, positions=name) for name in get_args(Positions)}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for run in range(runs + 1):
        for name, model in models.items():
            model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            memory_replay_backprop(model, src=src, tgt=tgt)
            if run:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    print(f"{platform.platform()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {runs} runs each")
    print(f"{'':10}{'parameters':>12}{'seconds: min':>14}{'median':>9}{'max':>9}{'relative':>10}")
    fastest = min(statistics.median(times) for times in seconds.values())
    for name, times in seconds.items():
        parameters = sum(p.numel() for p in models[name].parameters())
        median = statistics.median(times)
        print(f"{name:10}{parameters:12,}{min(times):14.2f}{median:9.2f}{max(times):9.2f}{median / fastest:9.2f}x")


if __name__ == "__main__":
    main()
