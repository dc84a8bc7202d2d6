"""Sampling a continuation of any length: the memory advances whenever a segment is full, so that the state stays fixed.

Filters are pure functions of logits (batch, tokens), named by what they keep.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .model import Memformer

__all__ = ["generate", "keep_top_k", "keep_top_p"]


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The ``k`` most likely tokens; the others get minus infinity."""
    if k < 1:
        raise ValueError(f"top_k: expected at least 1, got {k}")
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of most likely tokens whose probabilities reach ``p`` (nucleus sampling)."""
    if not 0 < p <= 1:
        raise ValueError(f"top_p: expected a share in (0, 1], got {p}")
    ordered, order = logits.sort(descending=True)
    probability = ordered.softmax(-1)
    beyond = probability.cumsum(-1) - probability >= p
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))


@torch.no_grad()
def generate(
    model: Memformer,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    start: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens after a prompt, one (batch,) tensor at a time, from a model trained on text continuation.

    Args:
        model: used as it is: call ``eval()`` first.
        prompt: (batch, length) token ids; of any length, also 0.
        start: the token that started documents and decoder in training.
        temperature: 0 takes the most likely token.
        top_k, top_p: keep only the likeliest tokens; None keeps all.
        generator: the source of randomness, on the model's device.

    Raises:
        ValueError: an argument is out of range, or the model has no decoder.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected at least 0, got {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    if prompt.dim() != 2 or prompt.is_floating_point():
        raise ValueError(
            f"prompt: expected token ids (batch, length), got {prompt.dtype} of shape {tuple(prompt.shape)}"
        )
    if model.decoder is None:
        raise ValueError("generate: this model is encoder_only and has no decoder")
    config, batch = model.config, prompt.shape[0]
    # The decoder writes one segment after its start token; the encoder must be able to read it.
    length = min(config.enc_max_seq_len, (config.dec_max_seq_len or 0) - 1)
    first = prompt.new_full((batch, 1), start)
    *whole, rest = prompt.split(length, 1) if prompt.shape[1] else [prompt]
    if rest.shape[1] == length:
        whole, rest = [*whole, rest], rest[:, :0]
    memory = None
    for segment in [first, *whole]:
        source, memory = model.encode(segment, memory)
    written = torch.cat([first, rest], 1)
    for _ in range(max_new_tokens):
        token = _choose(model.decode(written, source)[:, -1], start, temperature, top_k, top_p, generator)
        yield token
        written = torch.cat([written, token[:, None]], 1)
        if written.shape[1] == length + 1:
            source, memory = model.encode(written[:, 1:], memory)
            written = first


def _choose(
    logits: Tensor,
    start: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    logits = logits.float()
    logits[:, start] = float("-inf")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
