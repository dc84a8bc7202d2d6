"""What a memory does: how its slots attend when they are written, how they differ, and how far gradients reach.

The analysis of paper v2's writer. Everything here watches the model's own step, in evaluation mode and without touching
parameters, gradients or generators. Shapes: memory (batch, slots, dim).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import replay
from .checks import describe, plural
from .config import a_path, is_count
from .data import Document, Lanes, Tokens
from .data.segments import Segment
from .interface import Memory, SegmentModel, in_evaluation, segment_model
from .nn.memory import SlotWriter
from .pictures import new_figure
from .rollouts import rollout

__all__ = ["KINDS", "Inspection", "MemoryHealth", "inspect", "kinds", "memory_health", "plot", "slot_diversity"]

KINDS = ("mostly themselves", "mixed", "only the tokens")
"""The kinds of slots by what they attend when they are written (paper v2's analysis)."""
MOSTLY_ITSELF, ONLY_TOKENS = 0.5, 0.1
"""Shares of attention on the slot itself: from the first on it is of the first kind, below the second of the last. The
paper shows examples of the kinds and names no thresholds."""


@dataclass(frozen=True)
class MemoryHealth:
    """A memory in a few numbers, for the metrics of training.

    Attributes:
        self_attention: the share of the writing attention that is on the slots themselves, between 0 and 1, the mean
            over slots and lanes; the rest is on the tokens. Near 0 the past is overwritten, near 1 nothing is written.
        self_attention_min, self_attention_max: of the slot with the least and the most, each the mean over lanes.
        slot_diversity: see :func:`slot_diversity`; the mean over lanes. Near 0 all slots hold the same.
    """

    self_attention: float
    self_attention_min: float
    self_attention_max: float
    slot_diversity: float


def memory_health(model: SegmentModel, segment: Segment, memory: Memory | None) -> MemoryHealth:
    """Read one segment and watch how the memory is written; lanes without a token in it are left out.

    Args:
        segment: its source, masks and reset flags; a target is not used.
        memory: before the segment, as the model returns it; None for the learned initial memory.
    """
    with in_evaluation(model), torch.no_grad():
        shares, memory = _watched_step(model, segment, memory)
        written = model.slots_of(memory)
    if segment.src_mask is not None and (busy := segment.src_mask.any(1)).any():
        shares, written = shares[busy], written[busy]
    by_slot = shares.float().mean(0)
    numbers = torch.stack([by_slot.mean(), by_slot.min(), by_slot.max(), _diversity(written).mean()])
    return MemoryHealth(*numbers.tolist())


@dataclass(frozen=True, eq=False)
class Inspection:
    """What :func:`inspect` found. Tensors on the CPU, in float32.

    Attributes:
        memories: how many there are: one, or a causal model's layers. Slots are counted through, layer by layer.
        self_attention: (lanes, segments, slots), the share of each slot's writing attention that is on the slot itself,
            the mean over heads and over the writes of a segment. The rest is on the tokens.
        diversity: (lanes, segments), see :func:`slot_diversity`, of the memory after each segment; the mean over
            memories.
        slot_parameter: what each slot has of its own: "bias vector", which says how fast it forgets (normalised
            writer), or "initial content" (gated writer).
        slot_norms: (slots,), the norm of that.
        gradient_reach: (segments,), how far the gradient of the last segment's loss (mean nats per token) reaches back.
            Entry n is its norm at the memory n segments before the one that the last segment reads, as the root mean
            square over lanes. The last entry is that of the initial memory.
    """

    self_attention: Tensor
    diversity: Tensor
    slot_parameter: str
    slot_norms: Tensor
    gradient_reach: Tensor
    memories: int = 1

    @property
    def by_slot(self) -> Tensor:
        """(slots,): ``self_attention`` in the second half of the segments, when memories have filled."""
        return self.self_attention[:, self.self_attention.shape[1] // 2 :].mean((0, 1))

    @property
    def shares_of_kinds(self) -> Tensor:
        """(segments, 3): the share of slots that are of each of the :data:`KINDS`."""
        kind = kinds(self.self_attention)[..., None] == torch.arange(len(KINDS), device=self.self_attention.device)
        return kind.float().mean((0, 2))


@torch.inference_mode(False)  # in which nothing reaches back
def inspect(model: SegmentModel, documents: Sequence[Tokens], *, start: int, segments: int = 32) -> Inspection:
    """Read the beginnings of documents side by side, as in training, and watch what the memory does.

    It takes about three times the time of reading, and the memory of one segment's graph.

    Args:
        model: one that predicts. Its parameters' gradients and its mode are left as they are.
        documents: one or more, each a one-dimensional array of token ids; one lane for each.
        start: the id that starts a document and the decoder.
        segments: how many to read of each; fewer if a document is shorter. All lanes are read equally far.

    Raises:
        ValueError: no document, one of fewer than two whole segments, or with ids that the model does not have.
    """
    model = segment_model(model)
    if not is_count(segments, 2):
        raise ValueError(f"segments: expected at least 2, for a gradient to reach back, got {segments!r}")
    if not isinstance(documents, Sequence) or isinstance(documents, str | bytes):
        raise ValueError(f"documents: expected a list of arrays of token ids, got {describe(documents)}")
    if not documents:
        raise ValueError("documents: expected at least one, got none")
    if not is_count(start, 0) or start >= model.config.vocabulary:
        raise ValueError(f"start: expected a token id from 0 to {model.config.vocabulary - 1}, got {start!r}")
    try:
        model.check_writes("inspect")
    except ValueError as error:
        raise ValueError(f"{error}. Without a loss, see memory_health") from error
    length = model.config.segment_length
    shortest = min(_tokens_in(document, i) for i, document in enumerate(documents))
    if (count := min(segments, shortest // length)) < 2:
        raise ValueError(f"documents: expected at least 2 segments of {length} tokens of each, got {shortest} tokens")
    tokens = [np.asarray(document[: count * length]) for document in documents]
    device = next(model.parameters()).device
    stream = Lanes(tokens, lanes=len(tokens), length=length, start=start, epochs=1).rollout(count)
    read = [model.of_stream(segment).to(device) for segment in stream]
    for segment in read:
        model.segments(segment.src, segment.tgt, segment.src_mask, segment.tgt_mask, segment.reset, None)
    with in_evaluation(model):
        attention, diversity, memory = [], [], None
        with torch.no_grad():
            for segment in read:
                shares, memory = _watched_step(model, segment, memory)
                attention.append(shares.float().cpu())
                diversity.append(_diversity(model.slots_of(memory)).mean(1).cpu())
        reach = _gradient_reach(model, read, length)
    writers = model.writers()
    norms = [w.scale * w.get_parameter(w.per_slot).detach().float().norm(dim=-1).cpu() for w in writers]
    role, count = writers[0].role, len(writers)
    return Inspection(torch.stack(attention, 1), torch.stack(diversity, 1), role, torch.cat(norms), reach, count)


def _tokens_in(document: object, index: int) -> int:
    """How many tokens a document has. Whether they are whole numbers is looked at when they are read."""
    if isinstance(document, str | bytes | Document) or not hasattr(document, "__getitem__"):
        raise ValueError(
            f"documents: expected one-dimensional arrays of token ids, got {describe(document)} at index {index}; "
            "encode_documents(documents, tokenizer) makes arrays of texts"
        )
    return len(cast(Tokens, document))


def _gradient_reach(model: SegmentModel, segments: list[Segment], length: int) -> Tensor:
    silent = [model.silent(segment)._replace(reset=None) for segment in segments[:-1]]
    lanes = len(segments[0].src)
    norms = replay.MemoryGradients()
    with torch.enable_grad():
        initial = tree_map(_as_leaf, model.get_initial_mem(lanes))
        outcome = rollout(
            model,
            [*silent, segments[-1]._replace(reset=None)],
            initial,
            divisor=float(length),
            memory_gradients=norms,
        )
        torch.autograd.grad(outcome.loss, [part for part in tree_leaves(initial) if part.requires_grad])
    return torch.tensor(norms.norms[-2::-1], device="cpu") / math.sqrt(lanes)


def _as_leaf(part: Tensor) -> Tensor:
    return part.detach().requires_grad_() if part.is_floating_point() else part


def _diversity(slots: Tensor) -> Tensor:
    """Of each memory, (batch, memories, slots, dim) -> (batch, memories)."""
    return slot_diversity(slots.float().flatten(0, 1)).view(slots.shape[:2])


def kinds(self_attention: Tensor) -> Tensor:
    """Which of the :data:`KINDS` a slot is, 0, 1 or 2, by the share of its attention on itself; same shape."""
    return 2 - (self_attention >= ONLY_TOKENS).long() - (self_attention >= MOSTLY_ITSELF).long()


def plot(inspection: Inspection, path: str | Path) -> None:
    """Draw an inspection into a file, PNG by its name; no window is opened.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the name's suffix is not of a picture that matplotlib can write.
    """
    figure = new_figure(11, 7.5)
    import matplotlib as mpl

    colours = mpl.colormaps["YlGnBu"]
    of_kind = [colours(0.95), colours(0.55), colours(0.12)]
    order = inspection.by_slot.argsort(descending=True, stable=True)
    attention, norms = inspection.self_attention.mean(0).T[order].numpy(), inspection.slot_norms[order].numpy()
    slots, segments = attention.shape
    positions, times = np.arange(slots), np.arange(1, segments + 1)

    (heat, bars), (areas, reach) = figure.subplots(2, 2, width_ratios=[3, 1.6], height_ratios=[1.7, 1])

    picture = heat.imshow(
        attention,
        cmap=colours,
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, segments + 0.5, slots - 0.5, -0.5),
    )
    figure.colorbar(picture, ax=heat, label="attention on itself", pad=0.01)
    heat.set(title="Writing: each slot's attention on itself, the rest is on the tokens", ylabel="slot")
    heat.set_xlabel("segment")

    kind = kinds(inspection.by_slot)[order].tolist()
    bars.barh(positions, norms, color=[of_kind[k] for k in kind], edgecolor="0.4", linewidth=0.5)
    decays = "" if inspection.slot_parameter == "initial content" else ",\nshrunk by weight decay if it was decayed"
    bars.set(title=f"Norm of each slot's {inspection.slot_parameter}{decays}", ylim=(slots - 0.5, -0.5), xlabel="norm")
    bars.title.set_fontsize(10)
    bars.xaxis.get_major_locator().set_params(nbins=4)
    shown = positions if slots <= 32 else range(0, slots, math.ceil(slots / 32))
    for axes in (heat, bars):
        axes.set_yticks(shown, [str(int(order[i])) for i in shown], fontsize=8)

    below = np.zeros(segments)
    for share, colour, name in zip(inspection.shares_of_kinds.T.numpy(), of_kind, KINDS, strict=True):
        areas.bar(times, share, bottom=below, width=1, color=colour, label=name)
        below = below + share
    areas.plot(times, inspection.diversity.mean(0).numpy(), color="tab:red", marker=".", label="slot diversity")
    highest = max(1.0, float(inspection.diversity.mean(0).max()))
    areas.set(
        xlabel="segment", ylabel="share of slots; diversity", xlim=(0.5, segments + 0.5), ylim=(0, 1.05 * highest)
    )
    areas.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize=9)

    reached = inspection.gradient_reach.where(inspection.gradient_reach > 0, torch.nan).numpy()
    reach.plot(times - 1, reached, color=of_kind[0], marker=".")
    reach.set(title="How far gradients reach", xlabel="segments back", ylabel="|d loss / d memory|, nats", yscale="log")
    reach.xaxis.get_major_locator().set_params(integer=True)
    reach.grid(alpha=0.3)
    count = [kind.count(i) for i in range(len(KINDS))]
    kinds_of_slots = ", ".join(f"{n} {name}" for n, name in zip(count, KINDS, strict=True) if n)
    figure.suptitle(f"When they are written, {plural(slots, 'slot')} attend: {kinds_of_slots}")
    figure.savefig(a_path("path", path))


def slot_diversity(memory: Tensor) -> Tensor:
    """How much the slots of a memory differ: 1 - the mean cosine of all pairs, (batch, slots, dim) -> (batch,).

    0 where all point the same way, 1 where they are orthogonal on average, more where they point apart: of two slots at
    most 2. A single slot has no pair: 0.
    """
    if memory.shape[1] == 1:
        return memory.new_zeros(len(memory))
    # For unit vectors it is their variance: 1 - the cosine of two is half the square of their distance.
    return F.normalize(memory, dim=-1).var(1).sum(-1)


def _watched_step(model: SegmentModel, segment: Segment, memory: Memory | None) -> tuple[Tensor, Memory]:
    """The model's step: each slot's attention on itself, (batch, all slots), the mean over its writes, and the memory.

    Inside a hook, for only there are the parameters of a writer that FSDP divides together.
    """
    writers = model.writers()
    shares: list[list[Tensor]] = [[] for _ in writers]

    def watch(own: list[Tensor], writer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(writer, SlotWriter)
        own.append(writer.attention_on_itself(*inputs))

    hooks = [
        writer.register_forward_pre_hook(functools.partial(watch, own))
        for writer, own in zip(writers, shares, strict=True)
    ]
    try:
        _, written = model.cell(segment, memory)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([torch.stack(own).mean(0) for own in shares], 1), written
