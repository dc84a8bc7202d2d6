"""Text without an end at constant time and memory: ``python benchmarks/generation.py [--tokens 100000] [--help]``."""

import tyro

from memformer.bench.generation import GenerationBenchmark, run

if __name__ == "__main__":
    for line in run(tyro.cli(GenerationBenchmark)):
        print(line, flush=True)
