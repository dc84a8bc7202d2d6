"""What several test files share: tiny models, random inputs, comparisons of gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from memformer import CausalMemformer, Memformer
from memformer.config import Positions, Writer
from memformer.settings import TrainingConfig

VOCABULARY = 11
WRITERS = get_args(Writer)
POSITIONS = get_args(Positions)


def tiny(**changes: Any) -> Memformer:
    """A small model in float64, without its decoder for ``encoder_only=True``; ``changes`` are Memformer's keywords."""
    settings = {
        "dim": 8, "num_memory_slots": 3, "mem_update_attn_heads": 2,
        "enc_num_tokens": VOCABULARY, "enc_depth": 2, "enc_heads": 2, "enc_max_seq_len": 6,
    }  # fmt: skip
    if not changes.get("encoder_only"):
        settings |= {"dec_num_tokens": VOCABULARY, "dec_depth": 2, "dec_heads": 2, "dec_max_seq_len": 6}
    model = Memformer(**(settings | changes)).double()
    # At their first values the position tables and the biases are so small that an error in them would not show.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "positions" in name or name.endswith("bias"):
                parameter.normal_()
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape)


def memory(model: Memformer, batch_size: int) -> Tensor:
    """A memory as some earlier segment could have left it."""
    x = torch.randn(batch_size, model.config.num_memory_slots, model.config.dim, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def mask(*rows: str) -> Tensor:
    """``mask("110", "111")``: one row per lane, 1 for tokens that exist."""
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


def take_grads(*modules: nn.Module) -> dict[str, Tensor | None]:
    """The gradients by name, which are then cleared."""
    grads = {f"{i}.{name}": p.grad for i, module in enumerate(modules) for name, p in module.named_parameters()}
    for module in modules:
        module.zero_grad(set_to_none=True)
    return grads


def assert_same_grads(
    actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], rtol: float = 1e-10
) -> None:
    """Each gradient within ``rtol`` of its own largest entry; missing ones are missing in both."""
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None or actual[name] is None:
            assert (grad is None) == (actual[name] is None), f"{name}: only one of the two has a gradient"
            continue
        # 1e-14: gradients that are zero in exact arithmetic (a key's bias, say) are rounding errors in both.
        atol = max(rtol * float(grad.abs().max()), 1e-14)
        torch.testing.assert_close(actual[name], grad, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def training_settings(**flat: Any) -> TrainingConfig:
    """A :class:`TrainingConfig` from settings named without their sections."""
    given: dict[str, Any] = {}
    for f in dataclasses.fields(TrainingConfig):
        if f.default_factory is not MISSING:
            names = {inner.name for inner in dataclasses.fields(f.default_factory)}
            given[f.name] = f.default_factory(**{name: flat.pop(name) for name in names & set(flat)})
    return TrainingConfig(**given, **flat)


def tiny_run(folder: Path, **usual: Any) -> Callable[..., TrainingConfig]:
    """Makes the settings of a tiny run on four texts, which are written into a folder; None leaves a setting out."""
    (folder / "corpus").mkdir()
    for i in range(4):
        (folder / "corpus" / f"{i}.txt").write_text("what was seen is not forgotten. " * (2 * i + 3))

    def make(**changes: Any) -> TrainingConfig:
        given = dict(
            data=(folder / "corpus",), out=folder / "run", dim=16, slots=3, enc_depth=1, dec_depth=1, heads=2, lanes=2,
            segment_length=8, horizon=3, warmup=1, device="cpu",
        )  # fmt: skip
        return training_settings(**{k: v for k, v in {**given, **usual, **changes}.items() if v is not None})

    return make


def lively(seed: int = 0, **changes: Any) -> Memformer:
    """A :func:`tiny` model with segments of 5 tokens, and an overlap, whose greedy text is not one token for ever."""
    overlap = {} if changes.get("encoder_only") else {"dec_overlap": 2}
    with torch.random.fork_rng():
        return enlivened(tiny(**{"enc_max_seq_len": 5, **overlap, **changes}), seed)


def lively_causal(seed: int = 1, **changes: Any) -> CausalMemformer:
    """The same of the other kind; ``changes`` are CausalMemformer's keywords."""
    settings = {
        "dim": 8, "num_memory_slots": 3, "mem_update_attn_heads": 2, "num_tokens": VOCABULARY, "depth": 3, "heads": 2,
        "max_seq_len": 5, "overlap": 2, "tie_embeddings": False,
    }  # fmt: skip
    with torch.random.fork_rng():
        return enlivened(CausalMemformer(**{**settings, **changes}).double(), seed)


def enlivened(model: Any, seed: int) -> Any:
    """The model in evaluation mode, with larger weights than any begins with."""
    model.eval()
    torch.manual_seed(10 + seed)  # after the model's own draws, whose number is its own affair
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.6 if parameter.dim() > 1 else 0.3)
            if name.endswith("norm.weight"):
                parameter.add_(1)
            if name.endswith("embedding.weight"):
                parameter.mul_(3)
    return model
