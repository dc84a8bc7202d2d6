"""A Hugging Face language model with a memory: memory tokens in front of each segment, read back after it.

The model is built from a configuration; nothing is downloaded. Needs ``pip install transformers``.
Run: python examples/replay_hf.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memformer import replay

try:
    from transformers import GPT2Config, GPT2Model  # type: ignore[import-not-found]
except ImportError:
    raise SystemExit("this example needs transformers: pip install transformers") from None


class RecurrentGPT2(nn.Module):
    """A cell (Bulatov et al. 2022): ``[memory, segment, memory] -> (hidden states of the segment, new memory)``."""

    def __init__(self, tokens: int, slots: int, width: int):
        super().__init__()
        config = GPT2Config(
            vocab_size=tokens, n_positions=128, n_embd=width, n_layer=2, n_head=4,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, use_cache=False,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.gpt = GPT2Model(config)
        self.initial = nn.Parameter(torch.randn(slots, width) * 0.02)
        self.head = nn.Linear(width, tokens)

    def forward(self, segment: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        if memory is None:
            memory = self.initial.expand(segment.shape[0], -1, -1)
        slots = memory.shape[1]
        embedded = torch.cat([memory, self.gpt.wte(segment), memory], 1)
        hidden = self.gpt(inputs_embeds=embedded).last_hidden_state
        return hidden[:, slots:-slots], hidden[:, -slots:]

    def read_out(self, hidden: list[Tensor], segments: list[Tensor]) -> Tensor:
        """Off the critical path: the vocabulary's logits exist for a few segments at a time."""
        logits = self.head(torch.cat(hidden)[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), torch.cat(segments)[:, 1:].flatten()) * len(segments)


def main() -> None:
    torch.manual_seed(0)
    model = RecurrentGPT2(tokens=200, slots=4, width=64)
    segments = list(torch.randint(0, 200, (2, 12 * 32)).split(32, 1))
    for method in (replay.full_bptt, replay.memory_replay):
        torch.manual_seed(1)  # the same dropout
        model.zero_grad()
        method(model, segments, None, model.read_out, readout_segments=4).loss.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        print(f"{method.__name__}: gradient norm {torch.stack(norms).norm().item():.6f} over {len(segments)} segments")


if __name__ == "__main__":
    main()
