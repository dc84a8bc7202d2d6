"""A model that nobody here wrote, trained through the engine: gradients equal to its unrolled ones.

The recurrent memory Transformer of ``pip install recurrent-memory-transformer-pytorch``, with and without its
Transformer-XL memories:
its memory is a tuple of a tensor and a list of tensors, which starts as ``None``.
Run: python examples/replay_third_party.py
"""

import torch
from torch import Tensor

from memformer import replay

try:
    from recurrent_memory_transformer_pytorch import (  # type: ignore[import-not-found]
        RecurrentMemoryTransformer,
        RecurrentMemoryTransformerWrapper,
    )
except ImportError:
    raise SystemExit("this example needs: pip install recurrent-memory-transformer-pytorch") from None


def main() -> None:
    for use_xl_memories in (False, True):
        torch.manual_seed(0)
        model = RecurrentMemoryTransformer(
            dim=32,
            num_tokens=64,
            depth=2,
            num_memory_tokens=4,
            seq_len=16,
            dim_head=16,
            heads=2,
            use_xl_memories=use_xl_memories,
            emb_gradient_frac=1.0,
        ).double()
        text = torch.randint(0, 64, (2, 8 * 16 + 1))
        segments = list(zip(text[:, :-1].split(16, 1), text[:, 1:].split(16, 1), strict=True))

        def cell(
            segment: tuple[Tensor, Tensor], memory: tuple, model: RecurrentMemoryTransformer = model
        ) -> tuple[Tensor, tuple]:
            (tokens, labels), (slots, xl_memories) = segment, memory
            loss, slots, xl_memories = model(tokens, slots, labels=labels, xl_memories=xl_memories)
            return loss / 8, (slots, xl_memories)

        replay.memory_replay(cell, segments, (None, None), schedule=replay.Binomial(3), params=model).loss.backward()
        got = [p.grad for p in model.parameters()]
        model.zero_grad()
        if use_xl_memories:  # the package's own loop does not pass these on, so they are unrolled here
            replay.full_bptt(cell, segments, (None, None)).loss.backward()
        else:
            loss, _ = RecurrentMemoryTransformerWrapper(model)(text, return_loss=True)
            loss.backward()
        pairs = [(a, p.grad) for a, p in zip(got, model.parameters(), strict=True)]
        assert all((a is None) == (b is None) for a, b in pairs)
        difference = max(float((a - b).abs().max()) for a, b in pairs if a is not None)
        print(f"XL memories {use_xl_memories}: largest difference {difference:.1e} to the unrolled gradients")


if __name__ == "__main__":
    main()
