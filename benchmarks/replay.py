"""Run the replay benchmark: ``python benchmarks/replay.py [--horizons 4 16 64] [--help]``."""

import tyro

from memformer.bench.replay import ReplayBenchmark, run

if __name__ == "__main__":
    for line in run(tyro.cli(ReplayBenchmark)):
        print(line, flush=True)
