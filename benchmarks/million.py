"""An exact gradient through a million tokens: ``python benchmarks/million.py [--stored-memories 16] [--help]``."""

import tyro

from memformer.bench.million import MillionTokens, run

if __name__ == "__main__":
    for line in run(tyro.cli(MillionTokens)):
        print(line, flush=True)
