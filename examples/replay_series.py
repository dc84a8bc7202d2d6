"""Two recurrent models in series and a loss on the whole output (CTC): exact gradients, few graphs alive.

Run: python examples/replay_series.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from memformer import replay


def main() -> None:
    torch.manual_seed(0)
    lower, upper = nn.LSTM(16, 32, batch_first=True), nn.GRU(32, 32, batch_first=True)
    head = nn.Linear(32, 11)
    sound = torch.randn(2, 800, 16)
    labels = torch.randint(1, 11, (2, 30))
    h, c = torch.zeros(1, 2, 32), torch.zeros(1, 2, 32)

    def ctc(hidden: torch.Tensor) -> torch.Tensor:
        log_probabilities = head(hidden).log_softmax(-1).transpose(0, 1)
        lengths = torch.tensor([800, 800])
        return F.ctc_loss(log_probabilities, labels, lengths, torch.tensor([30, 30]))

    def replayed() -> torch.Tensor:
        middle, _ = replay.scan(lower, sound.split(50, 1), (h, c))
        values, _ = replay.scan(upper, middle, h)
        return ctc(torch.cat(values, 1))

    def plain() -> torch.Tensor:
        return ctc(upper(lower(sound, (h, c))[0], h)[0])

    parameters = [*lower.parameters(), *upper.parameters(), *head.parameters()]
    got, expected = (torch.autograd.grad(loss(), parameters) for loss in (replayed, plain))
    difference = max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))
    print(f"CTC over 16 segments through two models: largest difference to plain autograd {difference:.1e}")


if __name__ == "__main__":
    main()
