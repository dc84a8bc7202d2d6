"""The most bytes of one exact gradient, by how many segments it goes through: it grows by what stays of a segment."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from memformer import CausalMemformer, Memformer, memory_replay_backprop, replay
from memformer.bench.meters import gradient_difference, machine, peak_bytes, take_gradients
from memformer.config import check_count
from memformer.data.segments import Segment
from memformer.interface import SegmentModel
from memformer.rollouts import rollout

__all__ = ["PeakBenchmark", "run"]

Kind = Literal["llama", "memformer", "causal"]


@dataclass(frozen=True, kw_only=True)
class PeakBenchmark:
    """Peak memory of one exact gradient: as rollouts do it by themselves, and with all outputs kept."""

    models: tuple[Kind, ...] = get_args(Kind)
    """A memory around a Llama (random weights; needs transformers), and the library's own models."""
    segments: tuple[int, ...] = (2, 16, 128)
    """How many segments one gradient goes through."""
    dim: int = 256
    """Width of the models."""
    depth: int = 6
    """Layers; a Memformer has half of them in its encoder."""
    slots: int = 16
    """Memory slots, of a causal model in each layer a part."""
    segment_tokens: int = 256
    """Tokens per segment."""
    vocabulary: int = 1000
    """Token ids."""
    keep: bool = True
    """Also measure what it takes where the segments' outputs are kept."""
    device: str = "cpu"
    """Where to run."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "slots", "segment_tokens", "vocabulary"):
            check_count(name, getattr(self, name))
        if not self.segments:
            raise ValueError("segments: expected at least one number, got none")
        for count in self.segments:
            check_count("segments", count)


def run(settings: PeakBenchmark) -> Iterator[str]:
    """Yield the lines of a report.

    Raises:
        RuntimeError: a gradient without kept outputs is not that of plain back-propagation through time.
    """
    device = torch.device(settings.device)
    yield machine(device)
    yield (
        f"the most MB of tensors beside weights and input, in one gradient through so many segments of "
        f"{settings.segment_tokens} tokens; width {settings.dim}, {settings.depth} layers, batch 1"
    )
    yield ""
    yield f"{'model':<12}{'outputs':<12}" + "".join(f"{n:>9}" for n in settings.segments) + f"{'last / first':>15}"
    for kind in settings.models:
        model = _moved(_made(settings, kind)).to(device)
        difference = _difference(model, settings)
        for kept in (None, True) if settings.keep else (None,):
            found = [_peak(model, settings, count, kept) for count in settings.segments]
            name = "kept" if kept else "by default"
            yield (
                f"{kind:<12}{name:<12}"
                + "".join(f"{size / 1e6:9.1f}" for size in found)
                + f"{found[-1] / found[0]:15.2f}"
            )
        yield f"{'':<12}gradients differ from plain BPTT by {difference:.1e} of their norm"


def _made(settings: PeakBenchmark, kind: Kind) -> SegmentModel:
    torch.manual_seed(0)
    heads = max(1, settings.dim // 64)
    if kind == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        from memformer import hf

        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=settings.vocabulary,
                hidden_size=settings.dim,
                intermediate_size=8 * settings.dim // 3,
                num_hidden_layers=settings.depth,
                num_attention_heads=heads,
                max_position_embeddings=settings.segment_tokens,
            )
        )
        return hf.with_memory(base, settings.slots, settings.segment_tokens).trainable("memory")
    if kind == "causal":
        return CausalMemformer(
            dim=settings.dim,
            num_memory_slots=max(1, settings.slots // settings.depth),
            num_tokens=settings.vocabulary,
            max_seq_len=settings.segment_tokens,
            depth=settings.depth,
            heads=heads,
            mem_update_attn_heads=heads,
            overlap=min(4, settings.segment_tokens),
        )
    return Memformer(
        dim=settings.dim,
        num_memory_slots=settings.slots,
        enc_num_tokens=settings.vocabulary,
        enc_max_seq_len=settings.segment_tokens,
        enc_depth=max(1, settings.depth // 2),
        enc_heads=heads,
        dec_num_tokens=settings.vocabulary,
        dec_max_seq_len=settings.segment_tokens,
        dec_depth=max(1, settings.depth // 2),
        dec_heads=heads,
        mem_update_attn_heads=heads,
    )


@torch.no_grad()
def _moved(model: SegmentModel) -> SegmentModel:
    """A model whose parts all matter: what begins as zero would have no gradient behind it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def _text(model: SegmentModel, settings: PeakBenchmark, count: int) -> tuple[Tensor, list[Tensor] | None]:
    """Tokens of so many segments, and a target for each where the model does not read its own."""
    device = next(model.parameters()).device
    tokens = torch.randint(settings.vocabulary, (1, count * settings.segment_tokens), device=device)
    return tokens, None if model.reads_its_targets else list(tokens.split(settings.segment_tokens, 1))


def _segments(model: SegmentModel, settings: PeakBenchmark, count: int) -> list[Segment]:
    return model.segments(*_text(model, settings, count), None, None, None, None)


def _peak(model: SegmentModel, settings: PeakBenchmark, count: int, kept: bool | None) -> int:
    tokens, targets = _text(model, settings, count)
    step = functools.partial(memory_replay_backprop, model, tokens, targets, reduction="mean", keep_values=kept)
    return peak_bytes(step, tokens.device, model)


def _difference(model: SegmentModel, settings: PeakBenchmark) -> float:
    segments = _segments(model, settings, 2)
    ways: list[tuple[Callable[..., Any], bool]] = [(replay.full_bptt, True), (replay.memory_replay, False)]
    found = []
    for method, kept in ways:
        rollout(model, segments, method=method, wavefront=False, keep_values=kept).loss.backward()
        found.append(take_gradients(model))
    return gradient_difference("outputs not kept", found[1], found[0])
