"""Replay for a GRU: 20,000 steps of a signal, exact gradients, and what each schedule costs.

Run: python examples/replay_gru.py
"""

import torch
from torch import Tensor, nn

from memformer import replay


class Forecaster(nn.Module):
    """A cell: reads a segment of the signal, predicts each next value, carries the GRU's state."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.rnn = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, segment: tuple[Tensor, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        now, following = segment
        hidden, state = self.rnn(now, state)
        return (self.head(hidden) - following).square().mean(), state


def main() -> None:
    torch.manual_seed(0)
    time = torch.linspace(0, 400, 20_001)
    signal = (time.sin() + (time / 7).sin()).view(1, -1, 1)
    segments = list(zip(signal[:, :-1].split(200, 1), signal[:, 1:].split(200, 1), strict=True))
    model = Forecaster()
    state = torch.zeros(1, 1, 32)

    sizes = replay.measure(model, segments[0], state)
    for schedule in (
        replay.EveryMemory(),
        replay.EveryKth(10),
        replay.Binomial(6),
        replay.EveryMemory(graphs=50),
        replay.Budget(20 * sizes.graph_bytes),
    ):
        print(type(schedule).__name__.ljust(12), schedule.plan(len(segments), *sizes))

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(5):
        watch = replay.MemoryGradients()
        rollout = replay.memory_replay(model, segments, state, schedule=replay.Binomial(6), memory_gradients=watch)
        optimizer.zero_grad()
        rollout.loss.backward()
        optimizer.step()
        reach = sum(norm > 1e-3 * max(watch.norms) for norm in watch.norms)
        print(f"step {step}: loss {rollout.loss.item() / len(segments):.3f}, gradient alive at {reach} boundaries")


if __name__ == "__main__":
    main()
