"""Recurrent layers that others wrote, as cells: exact gradients through 32 segments, at the memory of one.

A layer that takes a state and returns one needs a line: ``lstm``, ``mamba`` and ``linear_attention`` below.

- ``torch.nn.LSTM``;
- Mamba of ``pip install mambapy``, whose ``step`` reads a token and computes its decay in float32; left out where it is
  not installed;
- gated linear attention with the arguments of flash-linear-attention's functions (``fla.ops.gla.chunk_gla``): put such
  a function in place of ``recurrent_gla``. They need a GPU, and so do its layers: they are Triton kernels, and Triton
  (3.9) has no driver for a CPU, neither with ``TRITON_INTERPRET=1`` (tried with flash-linear-attention 0.6.0).

Run: python examples/replay_other_recurrences.py
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memformer import replay

try:
    from mambapy.mamba import Mamba, MambaConfig  # type: ignore[import-not-found]
except ImportError:
    Mamba = None

VOCABULARY, WIDTH, LANES, LENGTH, SEGMENTS = 64, 16, 2, 12, 32


class LanguageModel(nn.Module):
    """A cell: embedding, a recurrent layer, and the loss of each next token."""

    def __init__(self, layer: nn.Module, read: Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]]):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(VOCABULARY, WIDTH), layer, nn.Linear(WIDTH, VOCABULARY)
        self.read = read

    def forward(self, segment: tuple[Tensor, Tensor], state: Any) -> tuple[Tensor, Any]:
        tokens, following = segment
        y, state = self.read(self.layer, self.embedding(tokens), state)
        return F.cross_entropy(self.head(y).flatten(0, 1), following.flatten()), state


def recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, output_final_state: bool = True
) -> tuple[Tensor, Tensor]:
    """q, k, g (batch, tokens, heads, keys), v (..., values), the state (batch, heads, keys, values)."""
    state, outputs = initial_state, []
    for q_t, k_t, v_t, g_t in zip(*(x.unbind(1) for x in (q, k, v, g)), strict=True):
        state = state * g_t.exp()[..., None] + k_t[..., None] * v_t[..., None, :]
        outputs.append((q_t[..., None] * state).sum(-2) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state


class LinearAttention(nn.Module):
    """Projections around :func:`recurrent_gla`."""

    def __init__(self, heads: int = 2):
        super().__init__()
        self.heads, self.project, self.out = heads, nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, g = self.project(x).unflatten(-1, (4, self.heads, -1)).unbind(2)
        y, state = recurrent_gla(q, k, v, F.logsigmoid(g), initial_state=initial_state, output_final_state=True)
        return self.out(y.flatten(2)), state


def lstm(layer: nn.Module, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return layer(x, state)


def linear_attention(layer: nn.Module, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return layer(x, initial_state=state)


def mamba(layer: Any, x: Tensor, caches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    outputs, caches = [], list(caches)  # step replaces the entries of the list that it is given
    for token in x.unbind(1):
        y, caches = layer.step(token, caches)
        outputs.append(y)
    return torch.stack(outputs, 1), caches


def models() -> dict[str, tuple[LanguageModel, Any]]:
    """Each with its first state."""
    nothing = torch.zeros(2, LANES, WIDTH)
    found: dict[str, tuple[LanguageModel, Any]] = {
        "nn.LSTM": (LanguageModel(nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True), lstm), (nothing, nothing)),
        "linear attention": (LanguageModel(LinearAttention(), linear_attention), torch.zeros(LANES, 2, 8, 8)),
    }
    if Mamba is not None:
        config = MambaConfig(d_model=WIDTH, n_layers=2, d_state=4)
        cache = (torch.zeros(LANES, config.d_inner, 4), torch.zeros(LANES, config.d_inner, config.d_conv - 1))
        found["mambapy"] = LanguageModel(Mamba(config), mamba), [cache] * 2
    return found


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    text = torch.randint(VOCABULARY, (LANES, SEGMENTS * LENGTH + 1))
    segments = list(zip(text[:, :-1].split(LENGTH, 1), text[:, 1:].split(LENGTH, 1), strict=True))
    for name, (model, state) in models().items():
        gradients = []
        for method in (replay.full_bptt, replay.memory_replay):
            model.zero_grad()
            method(model, segments, state).loss.backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        difference = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
        print(f"{name}: largest difference {difference:.1e} to the unrolled gradients over {SEGMENTS} segments")
    if Mamba is None:
        print("mambapy: not installed, left out (pip install mambapy)")
    torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    main()
