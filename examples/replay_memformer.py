"""Train a small Memformer on a sequence 32 times as long as its segments, memory carried between rollouts.

Run: python examples/replay_memformer.py
"""

import torch

from memformer import Memformer, memory_replay_backprop


def main() -> None:
    torch.manual_seed(0)
    model = Memformer(
        dim=64,
        num_memory_slots=8,
        enc_num_tokens=64,
        enc_max_seq_len=16,
        enc_depth=1,
        enc_heads=2,
        dec_num_tokens=64,
        dec_max_seq_len=17,
        dec_depth=1,
        dec_heads=2,
        mem_update_attn_heads=2,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    period = torch.randint(0, 64, (4, 40))  # the text repeats itself after 40 tokens: more than two segments ago
    text = period.repeat(1, 80)
    length, horizon = 16, 32
    mems = None
    for step in range(6):
        rest = text[:, step * length * horizon :]  # the memory is that of what was read before
        source = rest[:, : length * horizon]
        targets = [rest[:, (t + 1) * length - 1 : (t + 2) * length] for t in range(horizon)]
        optimizer.zero_grad()
        loss, mems = memory_replay_backprop(model, src=source, tgt=targets, mems=mems)
        optimizer.step()
        print(f"step {step}: loss {loss.item() / horizon:.3f} nats per token, memory {tuple(mems.shape)}")


if __name__ == "__main__":
    main()
