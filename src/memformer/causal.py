"""CausalMemformer: one causal stack in which every layer predicts and every layer remembers (paper v1, decoder-only).

Shapes: tokens (batch, tokens), slots (batch, layers, slots, dim), what layers got of the last tokens (batch, depth,
overlap, dim). Nothing here knows the replay engine.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import generation
from .checks import (
    IGNORED,
    as_mask,
    as_tokens,
    check_labels,
    check_mask,
    check_reset,
    check_tokens,
    describe,
    is_tensor,
)
from .config import CausalConfig, MemoryLayout, Positions, Writer
from .data.segments import Segment, Targets, cut, each_as_tokens
from .interface import Divisor, LanguageModel, Step, TokenLosses, as_pairs, as_tensor
from .nn.attention import KeysValues, visible_to
from .nn.blocks import Block, embedding_table
from .nn.causal import (
    CausalLayer,
    CausalMemory,
    MemoryInEachLayer,
    OneMemory,
    as_they_stood,
    tokens_first,
)
from .nn.losses import Head, each_loss, vocabulary_loss
from .nn.memory import SlotWriter, new_writer
from .nn.positions import positions as positions_of
from .state import MemoryState

__all__ = ["CausalMemformer", "CausalMemory", "CausalResults", "causal_losses"]


class Opened(NamedTuple):
    """What is computed once of each lane's last whole segment, for the tokens after it. First dimension: batch.

    Attributes:
        contexts: the slots' keys and values for each layer.
        output: (batch, dim), the last layer's at that segment's last token.
        memory: after that segment, as a state has it; see :meth:`CausalMemformer.packed`.
        cache: the layers', of the overlap and all tokens since then, except each lane's last one, which the next step
            adds.
    """

    contexts: list[KeysValues]
    output: Tensor
    memory: Tensor
    cache: list[KeysValues]


class CausalResults(NamedTuple):
    """What a causal model returns.

    Attributes:
        logits: (batch, tokens, num_tokens), of what follows each token; anything where the mask is False.
        mem: the memory after the segment.
        loss: the mean loss in nats over the labels that count, a scalar; None without labels.
    """

    logits: Tensor
    mem: CausalMemory
    loss: Tensor | None


class CausalMemformer(LanguageModel):
    """A causal Transformer with memories of fixed size, for sequences of any length, segment by segment.

    >>> model = CausalMemformer(dim=32, num_memory_slots=4, num_tokens=256, depth=2, max_seq_len=16)
    >>> first, second = torch.randint(256, (2, 2, 16))
    >>> logits, mem, _ = model(first)
    >>> logits, mem, loss = model(second, mem, labels=second)
    >>> logits.shape, mem.slots.shape, loss.shape
    (torch.Size([2, 16, 256]), torch.Size([2, 2, 4, 32]), torch.Size([]))

    Args:
        dim: width of the model.
        num_memory_slots: memory slots of each memory.
        num_tokens: the vocabulary.
        max_seq_len: the length of a segment.
        depth, heads: layers, and attention heads in each.
        overlap: how many of the tokens before a segment each layer's self-attention still sees: what it got of them is
            carried along, and gradients reach back through it. Before a document learned vectors take their place.
        memory: "layers": each layer has slots of its own, which it reads and writes; "one": all layers read one memory,
            which is written from the last.
        num_mem_updates: how often a memory is written per segment.
        mem_update_attn_heads: heads of the writing attention.
        slot_parts, memory_writer, write_temperature, forgetting, positions: as in :class:`~memformer.Memformer`.
        feed_forward_factor: the width of the feed-forward layers, as a multiple of ``dim``; not only whole ones.
        dropout: probability, on the embeddings and on every sublayer's output.
        tie_embeddings: one matrix for the embeddings and the output projection.

    Raises:
        ValueError: a setting is missing or out of range.
    """

    config: CausalConfig
    config_class = CausalConfig
    kind = "CausalMemformer"
    steps_alike = True

    def __init__(
        self,
        *,
        dim: int,
        num_memory_slots: int,
        num_tokens: int,
        max_seq_len: int,
        depth: int = 6,
        heads: int = 8,
        overlap: int = 4,
        memory: MemoryLayout = "layers",
        slot_parts: int = 1,
        num_mem_updates: int = 1,
        mem_update_attn_heads: int = 8,
        memory_writer: Writer = "normalised",
        write_temperature: float = 0.25,
        forgetting: float = 0.001,
        positions: Positions = "rotary",
        feed_forward_factor: float = 4,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
    ):
        given = locals()  # the keywords, which are the configuration's fields
        super().__init__()
        self.config = config = CausalConfig(**{f.name: given[f.name] for f in dataclasses.fields(CausalConfig)})
        self.embedding = embedding_table(num_tokens, dim)
        self.dropout = nn.Dropout(dropout)
        self.stack = _stack(config)
        self.norm = nn.LayerNorm(dim)
        self.to_logits = None if tie_embeddings else nn.Linear(dim, num_tokens)
        self.bias = nn.Parameter(torch.zeros(num_tokens)) if tie_embeddings else None

    @property
    def depth(self) -> int:
        """The stack's layers."""
        return self.config.depth

    def get_initial_mem(self, batch_size: int) -> CausalMemory:
        """The learned memory before a document."""
        return _batch_first(*self.stack.initial(batch_size))

    def forward(
        self,
        tokens: Tensor,
        mems: CausalMemory | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CausalResults:
        """Read one segment, and predict each of its tokens from those before it.

        Args:
            tokens: (batch, tokens <= max_seq_len) token ids: a tensor or an array of integers, or lists of them.
            mems: the memory before the segment; None for the learned initial one.
            mask: like ``tokens``, boolean or integer, True or 1 for tokens that exist. What stands at masked places
                changes nothing, and takes no place: positions count the tokens that exist. A lane whose whole segment
                is masked keeps its memory.
            reset: (batch,) boolean or integer: lanes that start again from the learned initial memory (a new document).
            labels: like ``tokens``, and mostly the same: what is to be predicted at each place, from the tokens before
                it; -100 does not count, nor does a masked place.

        Raises:
            ValueError: a shape, dtype, length or token id does not fit; the message says what was expected.
        """
        device = self.embedding.weight.device
        tokens, labels = as_tokens(tokens, device), as_tokens(labels, device)
        mask, reset = as_mask("mask", mask, device), as_mask("reset", reset, device)
        self.check(tokens, mems, mask, reset, labels)
        hidden, mem = self.step(tokens, mems, mask, reset)
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            losses, counted = causal_losses(logits, labels, mask)
            loss = losses.sum() / counted.sum().clamp(min=1)
        return CausalResults(logits[:, 1:], mem, loss)

    def step(
        self,
        tokens: Tensor,
        mems: CausalMemory | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, CausalMemory]:
        """Read one segment and write the memory: the critical path of a rollout. The arguments are :meth:`forward`'s.

        Returns:
            ``(hidden, mem)``: hidden (batch, tokens + 1, dim) is the last layer's output at the last token before the
            segment and at each of its tokens, for :meth:`head`.
        """
        tokens, kept = (tokens, None) if mask is None else tokens_first(tokens, mask)
        x, visible = self.embed(tokens, kept), None if kept is None else self.visible(kept)
        carried = None if mems is None else (mems.slots.transpose(0, 1), mems.last.transpose(0, 1), mems.output)
        hidden, carried = self.stack(x, carried, visible, kept, reset)
        return hidden if mask is None else as_they_stood(hidden, mask), _batch_first(*carried)

    def embed(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the first layer gets, (batch, tokens, dim); zero where there is no token."""
        x: Tensor = self.dropout(self.embedding(tokens))
        return x if mask is None else x * mask[..., None]

    def visible(self, mask: Tensor) -> Tensor:
        """Where self-attention may look: (..., tokens) -> (..., 1, tokens, overlap + tokens)."""
        overlap = self.config.overlap
        return visible_to(F.pad(mask, (overlap, 0), value=True))[..., overlap:, :]

    def head(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> logits (..., num_tokens)."""
        return self._projection()(self.norm(hidden))

    def _projection(self) -> nn.Linear | Head:
        """From the normalised outputs to logits."""
        return Head(self.embedding.weight, self.bias) if self.to_logits is None else self.to_logits

    read = generation.read
    stream = generation.stream
    generate = generation.generate

    def resize_mems(self, mems: CausalMemory | Tensor) -> CausalMemory | Tensor:
        """A memory carried from before :meth:`resize_memory`, or that of a state, for the model as it is now.

        The first slots keep what they hold; new ones begin as at the start of a document.

        Raises:
            ValueError: not a memory of this model but for the number of its slots.
        """
        if isinstance(mems, Tensor):
            config, layers = self.config, len(self.writers())
            count = mems.shape[1] - config.depth * config.overlap - 1 if mems.dim() == 3 else 0  # rows of slots
            if count < layers or count % layers or mems.shape[2] != config.dim:
                raise ValueError(
                    f"mems: expected the packed memory of a state of this model, (batch, rows, {config.dim}), got "
                    f"{describe(mems)}"
                )
            return self.packed(self._resized(self.unpacked(mems)))
        return self._resized(mems)

    def _resized(self, mems: CausalMemory) -> CausalMemory:
        slots = mems[0] if isinstance(mems, tuple) and mems else None
        known = isinstance(slots, Tensor) and slots.dim() == 4
        batch, count = (slots.shape[0], slots.shape[2]) if known else (1, self.config.num_memory_slots)
        self._check_memory(mems, batch, count)
        new = self.get_initial_mem(batch).slots[:, :, count:]
        return mems._replace(slots=torch.cat([mems.slots[:, :, : self.config.num_memory_slots], new], 2))

    # --- What a rollout asks for ----------------------------------------------------------------------------------

    def forget(self, memory: CausalMemory) -> CausalMemory:
        """The initial slots, and what layers got of the last tokens as it is."""
        return memory._replace(slots=self.get_initial_mem(len(memory.last)).slots)

    def cell(self, segment: Segment, memory: CausalMemory | None) -> tuple[Tensor, CausalMemory]:
        """The stack with its memories; see :meth:`step`."""
        return self.step(segment.src, memory, segment.src_mask, segment.reset)

    def counted(self, segment: Segment) -> Tensor:
        """Which labels count, (batch, tokens)."""
        return counted_labels(self.target(segment), segment.src_mask)

    def token_losses(
        self, outputs: Sequence[Tensor], segments: Sequence[Segment], divisor: Divisor | None = None
    ) -> TokenLosses:
        """The losses of several segments' labels, from one call of the head."""
        longest = max(segment.src.shape[1] for segment in segments)
        hidden = torch.cat([F.pad(x[:, :-1], (0, 0, 0, longest + 1 - x.shape[1])) for x in outputs])
        labels, counted = self.joined_labels(segments, longest)
        labels_that_count = labels.where(counted, IGNORED)
        if type(self).head is not CausalMemformer.head:  # a subclass's own, of whose logits nothing is known
            losses = each_loss(self.head(hidden), labels_that_count)
            return TokenLosses(labels, losses, counted, None if divisor is None else (losses / divisor(counted)).sum())
        hidden = self.norm(hidden)
        found = vocabulary_loss(hidden, self._projection(), labels_that_count, divisor and divisor(counted))
        return TokenLosses(labels, found.losses, counted, found.total)

    def segments(
        self,
        src: Any,
        tgt: Targets,
        src_mask: Any,
        tgt_mask: Targets,
        reset: Targets,
        mems: CausalMemory | None,
    ) -> list[Segment]:
        """What :func:`~memformer.memory_replay_backprop` is given, checked, and cut into segments of ``max_seq_len``.

        Raises:
            ValueError: as :meth:`forward`.
        """
        self.refuse_mask_of_labels(tgt_mask)
        device, length = self.embedding.weight.device, self.config.max_seq_len
        src, src_mask = as_tokens(src, device), as_mask("src_mask", src_mask, device)
        labels, reset = tgt, each_as_tokens("reset", reset, device)
        self.check(src, mems, src_mask, max_len=sys.maxsize, name="src")
        if labels is not None:
            labels = as_tokens(labels, device) if not isinstance(labels, (list, tuple)) else labels
            if isinstance(labels, Tensor):
                check_labels("tgt", labels, src, self.config.num_tokens)
                labels = labels.split(length, 1)
            else:
                labels = each_as_tokens("tgt", labels, device)
        found = cut(length, src, labels, src_mask, None, reset)
        found = [segment._replace(reset=as_mask("reset", segment.reset)) for segment in found]
        for s in found:
            self.check(s.src, None, s.src_mask, s.reset, name="src")
            if s.tgt is not None:
                check_labels("tgt", s.tgt, s.src, self.config.num_tokens)
        return found

    def compile_parts(self) -> None:
        """The stack of all layers, which then run one after the other."""
        self.stack.compile()

    def writers(self) -> list[SlotWriter]:
        """One for each layer, or the one there is."""
        return self.stack.writers()

    def slots_of(self, memory: CausalMemory) -> Tensor:
        """(batch, layers, slots, dim)."""
        return memory.slots

    # --- What generation asks for ---------------------------------------------------------------------------------

    def packed(self, memory: CausalMemory) -> Tensor:
        """(batch, rows, dim): all slots, then what each layer got of the last tokens, then the output."""
        return torch.cat([memory.slots.flatten(1, 2), memory.last.flatten(1, 2), memory.output[:, None]], 1)

    def unpacked(self, packed: Tensor) -> CausalMemory:
        """What :meth:`packed` was given, with however many slots there are."""
        config, layers = self.config, len(self.writers())
        carried = config.depth * config.overlap
        slots, last, output = packed.tensor_split([packed.shape[1] - carried - 1, packed.shape[1] - 1], 1)
        return CausalMemory(
            slots.unflatten(1, (layers, -1)), last.unflatten(1, (config.depth, config.overlap)), output[:, 0]
        )

    def new_state(self, batch_size: int, start: int) -> MemoryState:
        """Lanes that have read nothing. The start token fills up what a state has no tokens for, and is not read."""
        return MemoryState.new(batch_size, self.config.max_seq_len, start, self.packed(self.get_initial_mem(1))[0])

    def resumed(self, state: MemoryState) -> tuple[list[Segment], CausalMemory]:
        """Each lane's last whole segment, which begins a document where nothing stands before it."""
        fresh = state.fresh
        if fresh.all():
            return [], self.get_initial_mem(state.batch_size)
        mask = ~fresh[:, None].expand_as(state.segment) if fresh.any() else None
        tokens = state.segment if mask is None else state.segment.where(mask, 0)
        return [Segment(tokens, mask, fresh)], self.unpacked(state.memory)

    def open(self, state: MemoryState) -> Opened:
        """All that the stack needs to go on from a state, computed once for the rest of the pending segments."""
        segments, memory = self.resumed(state)
        for segment in segments:
            _, memory = self.cell(segment, memory)
        contexts = [(k.contiguous(), v.contiguous()) for k, v in self.stack.contexts(memory.slots.transpose(0, 1))]
        cache = self.new_cache(memory.last)
        pending = state.pending[:, : max(0, int(state.filled.max()) - 1)]
        if pending.shape[1]:
            # What shorter lanes put into the cache beyond their end is written over before it is looked at.
            place = torch.arange(pending.shape[1], device=pending.device).expand_as(pending)
            tokens = pending.where(place < state.filled[:, None], 0)  # a start token may be none that is read
            self.extend(tokens, place, contexts, cache)
        return Opened(contexts, memory.output, self.packed(memory), cache)

    def next_logits(self, state: MemoryState, opened: Opened) -> Tensor:
        """Logits of each lane's next token, (batch, vocabulary). The cache takes in each lane's last token."""
        filled = state.filled
        # Where nothing is pending, something is put where the first token will be, and not looked at.
        place = (filled - 1).clamp(min=0)[:, None]
        token = state.pending.gather(1, place).where(filled[:, None] > 0, 0)
        x = self.extend(token, place, opened.contexts, opened.cache)[:, 0]
        return self.head(torch.where(filled[:, None] > 0, x, opened.output.to(x.dtype)))

    # --- What an export asks for ----------------------------------------------------------------------------------

    @torch.no_grad()
    def steps(self) -> dict[str, Step]:
        """:class:`EncodeStep` and :class:`DecodeStep`."""
        # Two lanes and two tokens: the tracer takes a size of one for a constant.
        batch, config, memory = 2, self.config, self.packed(self.get_initial_mem(2))
        tokens = torch.zeros(batch, min(2, config.max_seq_len), dtype=torch.int64, device=memory.device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        inputs = {
            "tokens": (tokens, {0: "batch", 1: "length"}),
            "mask": (mask, {0: "batch", 1: "length"}),
            "memory": (memory, {0: "batch"}),
            "reset": (mask.all(1), {0: "batch"}),
        }
        outputs = {
            "logits": {0: "batch", 1: "length + 1"}, "memory_after": {0: "batch"}, "context": {2: "batch"},
            "cache": {2: "batch"},
        }  # fmt: skip
        encode = Step(EncodeStep(self), inputs, outputs)
        *_, context, cache = encode.module(*(tensor for tensor, _ in inputs.values()))
        next_inputs = {
            "token": (tokens[:, 0].clone(), {0: "batch"}),
            "position": (tokens[:, 0].clone(), {0: "batch"}),
            "cache": (cache, {2: "batch"}),
            "context": (context, {2: "batch"}),
        }
        decode = Step(DecodeStep(self), next_inputs, {"logits": {0: "batch"}, "cache_after": {2: "batch"}})
        return {"encode": encode, "decode": decode}

    def new_cache(self, last: Tensor) -> list[KeysValues]:
        """The keys and values of what layers got of the last tokens, with room for a segment, for :meth:`extend`."""
        config, like = self.config, self.norm.weight  # other weights may be quantised
        shape = (last.shape[0], config.heads, config.overlap + config.max_seq_len, config.dim // config.heads)
        cache = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.depth)]
        blocks = self.stack.each_block()
        at = blocks[0].places(torch.arange(last.shape[2], device=last.device).expand(last.shape[0], -1), cache[0])
        for block, own, kept in zip(blocks, last.unbind(1), cache, strict=True):
            block.remember(own, kept, at)
        return cache

    def extend(
        self, tokens: Tensor, position: Tensor, contexts: Sequence[KeysValues], cache: Sequence[KeysValues]
    ) -> Tensor:
        """The last layer's output (batch, new, dim) at new tokens of segments, which the cache takes in.

        Args:
            tokens: (batch, new) token ids.
            position: (batch, new), where each stands in its segment.
            contexts: the slots' keys and values for each layer.
            cache: written in place, at ``position``; what lies ahead of a position is not looked at.
        """
        x = self.embed(tokens)
        blocks = self.stack.each_block()
        at = blocks[0].places(position + self.config.overlap, cache[0])
        for block, context, kept in zip(blocks, contexts, cache, strict=True):
            x = block.extend(x, kept, at, context)
        return x

    def check(
        self,
        tokens: Tensor,
        mems: CausalMemory | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        labels: Tensor | None = None,
        max_len: int | None = None,
        name: str = "tokens",
    ) -> None:
        """Raise ValueError where a segment does not fit; ``max_len`` is the longest allowed (default: one segment)."""
        config = self.config
        check_tokens(name, tokens, config.num_tokens, max_len or config.max_seq_len, "")
        check_mask("mask" if name == "tokens" else f"{name}_mask", mask, tokens)
        batch = tokens.shape[0]
        if mems is not None:
            self._check_memory(mems, batch)
        check_reset(reset, name, batch)
        if labels is not None:
            check_labels("labels", labels, tokens, config.num_tokens)

    def _check_memory(self, mems: CausalMemory, batch: int, slots: int | None = None) -> None:
        """``slots``: how many there are to be (default: those of the model)."""
        config, dtype = self.config, self.norm.weight.dtype
        if not isinstance(mems, CausalMemory):
            raise ValueError(f"mems: expected a CausalMemory, as this model returns it, got {describe(mems)}")
        count = slots or config.num_memory_slots
        expected: list[tuple[str, str, tuple[int, ...]]] = [
            ("slots", "layers, num_memory_slots, dim", (batch, len(self.writers()), count, config.dim)),
            ("last", "depth, overlap, dim", (batch, config.depth, config.overlap, config.dim)),
            ("output", "dim", (batch, config.dim)),
        ]
        for part, (name, names, shape) in zip(mems, expected, strict=True):
            if not is_tensor(part, shape, dtype):
                raise ValueError(
                    f"mems: expected {name} of {dtype}, that of the model, of shape {shape} (batch of tokens, "
                    f"{names}), got {describe(part)}"
                )


class EncodeStep(nn.Module):
    """Read one segment and write the memory, and what the tokens after it will look at.

    The memory is one tensor, see :meth:`CausalMemformer.packed`.
    """

    def __init__(self, model: CausalMemformer):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, memory: Tensor, reset: Tensor) -> tuple[Tensor, ...]:
        """``(logits, memory, context, cache)``: logits (batch, length + 1, num_tokens) of each token and one more."""
        model = self.model
        hidden, after = model.step(tokens, model.unpacked(memory), mask, reset)
        context = as_tensor(model.stack.contexts(after.slots.transpose(0, 1)))
        return model.head(hidden), model.packed(after), context, as_tensor(model.new_cache(after.last))


class DecodeStep(nn.Module):
    """One token per lane: :meth:`CausalMemformer.extend`, with the cache as a value that goes in and comes out."""

    def __init__(self, model: CausalMemformer):
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, position: Tensor, cache: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Token and position (batch,) -> logits (batch, num_tokens) of the next, and the cache."""
        # Each by itself: ONNX loses the free batch where what is written is a view.
        kept = [(keys.clone(), values.clone()) for keys, values in as_pairs(cache)]
        x = self.model.extend(token[:, None], position[:, None], as_pairs(context), kept)
        return self.model.head(x[:, 0]), as_tensor(kept)


def _batch_first(slots: Tensor, last: Tensor, output: Tensor) -> CausalMemory:
    return CausalMemory(slots.transpose(0, 1), last.transpose(0, 1), output)


def causal_losses(logits: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of each label in nats, zero where it does not count, and whether it counts; both (batch, length).

    A label counts if its place exists and it is not -100.

    Args:
        logits: of :meth:`CausalMemformer.step`'s hidden states; (batch, length + 1, num_tokens).
        labels, mask: (batch, length).
    """
    counted = counted_labels(labels, mask)
    return each_loss(logits[:, :-1], labels.long().where(counted, IGNORED)), counted


def counted_labels(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Which labels (batch, length) count: see :func:`causal_losses`."""
    counted = labels != IGNORED
    return counted if mask is None else counted & mask


def _stack(config: CausalConfig) -> MemoryInEachLayer | OneMemory:
    length, head_dim = config.overlap + config.max_seq_len, config.dim // config.heads

    def block() -> Block:
        positions = positions_of(config.positions, config.heads, head_dim, length, causal=True)
        made = Block(config.dim, config.heads, positions, True, config.dropout, config.feed_forward_factor)
        made.self_attention.begin_with_neighbours()
        return made

    def writer() -> SlotWriter:
        slots, heads = config.num_memory_slots, config.mem_update_attn_heads
        how = config.write_temperature, config.forgetting
        return new_writer(config.memory_writer, config.dim, slots, heads, *how, config.max_seq_len)

    updates, overlap = config.num_mem_updates, config.overlap
    if config.memory == "one":
        blocks = [block() for _ in range(config.depth)]
        return OneMemory(config.dim, config.heads, blocks, writer(), updates, overlap, config.slot_parts)
    return MemoryInEachLayer(
        [
            CausalLayer(config.dim, config.heads, block(), writer(), updates, overlap, config.slot_parts)
            for _ in range(config.depth)
        ]
    )
