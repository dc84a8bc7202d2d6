"""CausalMemformer: one causal stack in which every layer predicts and every layer remembers (paper v1, decoder-only).

Shapes: tokens (batch, tokens), slots (batch, layers, slots, dim). Nothing here knows the replay engine.
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
from .checks import IGNORED, as_mask, as_tokens, check_labels, check_mask, check_tokens, describe, is_tensor
from .config import CausalConfig, MemoryLayout, Positions, Writer
from .data.segments import Segment, Targets, cut, each_as_tokens, padded
from .interface import Divisor, SegmentModel, Step, TokenLosses, as_pairs, as_tensor
from .nn.attention import KeysValues
from .nn.blocks import Block, embedding_table
from .nn.causal import NOTHING, CausalLayer, CausalMemory, MemoryInEachLayer, OneMemory, last_tokens, visible_to
from .nn.losses import Head, each_loss, vocabulary_loss
from .nn.memory import WRITERS, SlotWriter
from .nn.positions import positions as positions_of
from .state import MemoryState

__all__ = ["CausalMemformer", "CausalMemory", "CausalResults", "causal_losses"]


class Opened(NamedTuple):
    """What is computed once of each lane's last whole segment, for the tokens after it. First dimension: batch.

    Attributes:
        contexts: the slots' keys and values for each layer.
        last: (batch, overlap), the last tokens of that segment.
        memory: (batch, layers, slots, dim), after that segment.
        cache: the layers', of all tokens since then, except each lane's last one, which the next step adds.
    """

    contexts: list[KeysValues]
    last: Tensor
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


class CausalMemformer(SegmentModel):
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
        overlap: how many of the last segment's tokens are read again, so that a segment's first token is predicted as
            well as any other. Before a document's first token a learned vector takes their place. 0: a segment's first
            token is not predicted.
        memory: "layers": each layer has slots of its own, which it reads and writes; "one": all layers read one memory,
            which is written from the last.
        num_mem_updates: how often a memory is written per segment.
        mem_update_attn_heads: heads of the writing attention.
        memory_writer, write_temperature, positions: as in :class:`~memformer.Memformer`.
        feed_forward_factor: the width of the feed-forward layers, as a multiple of ``dim``; not only whole ones.
        dropout: probability, on the embeddings and on every sublayer's output.
        tie_embeddings: one matrix for the embeddings and the output projection.

    Raises:
        ValueError: a setting is missing or out of range.
    """

    config: CausalConfig
    config_class = CausalConfig
    kind = "CausalMemformer"
    reads_its_targets = True

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
        num_mem_updates: int = 1,
        mem_update_attn_heads: int = 8,
        memory_writer: Writer = "normalised",
        write_temperature: float = 0.25,
        positions: Positions = "rotary",
        feed_forward_factor: float = 4,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
    ):
        given = locals()  # the keywords, which are the configuration's fields
        super().__init__()
        self.config = config = CausalConfig(**{f.name: given[f.name] for f in dataclasses.fields(CausalConfig)})
        self.embedding = embedding_table(num_tokens + 1, dim)  # the last row stands before a document
        self.dropout = nn.Dropout(dropout)
        self.stack = _stack(config)
        self.norm = nn.LayerNorm(dim)
        self.to_logits = None if tie_embeddings else nn.Linear(dim, num_tokens)
        self.bias = nn.Parameter(torch.zeros(num_tokens)) if tie_embeddings else None

    def get_initial_mem(self, batch_size: int) -> CausalMemory:
        """The learned memory before a document."""
        slots = self.stack.initial(batch_size).transpose(0, 1)  # (batch, layers, slots, dim)
        return CausalMemory(slots, self._nothing(batch_size, slots.device))

    def _nothing(self, batch_size: int, device: torch.device) -> Tensor:
        return torch.full((batch_size, self.config.overlap), NOTHING, device=device)

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
            mask: like ``tokens``, boolean or integer, True or 1 for tokens that exist. Masked ones change nothing
                anywhere; a lane whose whole segment is masked keeps its memory.
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
            losses, counted = causal_losses(logits, tokens.shape[1], labels, mask)
            loss = losses.sum() / counted.sum().clamp(min=1)
        return CausalResults(logits[:, -tokens.shape[1] :], mem, loss)

    def step(
        self,
        tokens: Tensor,
        mems: CausalMemory | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, CausalMemory]:
        """Read one segment and write the memory: the critical path of a rollout. The arguments are :meth:`forward`'s.

        Args:
            before: (batch, overlap), the last tokens before the segment in lanes that are reset inside a document, -1
                for none; None where all of them begin one.

        Returns:
            ``(hidden, mem)``: hidden (batch, tokens + 1, dim) is the last layer's output at the last token before the
            segment and at each of its tokens (without an overlap, only those), for :meth:`head`.
        """
        slots, last = (None, self._nothing(tokens.shape[0], tokens.device)) if mems is None else mems
        if reset is not None:
            last = torch.where(reset[:, None], NOTHING if before is None else before, last)
        x, visible = self.embed(tokens, last, mask)
        by_layer = None if slots is None else slots.transpose(0, 1)
        x, written = self.stack(x, by_layer, visible, mask, self.config.overlap, reset)
        return self.predicting(x), CausalMemory(written.transpose(0, 1), last_tokens(last, tokens, mask))

    def embed(self, tokens: Tensor, last: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the first layer gets: (batch, overlap + tokens, dim), and where its self-attention may look.

        The second is (batch, 1, overlap + tokens, overlap + tokens), or None: each token sees all before it.
        """
        read = torch.cat([last.to(tokens.dtype), tokens], 1)  # (batch, overlap + tokens)
        x = self._embedded(read)
        if mask is None:
            return x, None
        kept = F.pad(mask, (self.config.overlap, 0), value=True)
        return x * kept[..., None], visible_to(kept)

    def _embedded(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.embedding(torch.where(tokens < 0, self.config.num_tokens, tokens)))

    @property
    def has_overlap(self) -> bool:
        """Whether a segment's first token is predicted, from the last one before it."""
        return self.config.overlap > 0

    def predicting(self, x: Tensor) -> Tensor:
        """The outputs of :meth:`step` among those of the last layer, (..., overlap + tokens, dim)."""
        return x[..., max(self.config.overlap - 1, 0) :, :]

    def head(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> logits (..., num_tokens)."""
        return self._projection()(self.norm(hidden))

    def _projection(self) -> nn.Linear | Head:
        """From the normalised outputs to logits."""
        return Head(self.embedding.weight[:-1], self.bias) if self.to_logits is None else self.to_logits

    read = generation.read
    stream = generation.stream
    generate = generation.generate

    def resize_mems(self, mems: CausalMemory | Tensor) -> CausalMemory | Tensor:
        """A memory carried from before :meth:`resize_memory`, or its slots alone, for the model as it is now.

        The first slots keep what they hold; new ones begin as at the start of a document.

        Raises:
            ValueError: not a memory of this model but for the number of its slots.
        """
        slots = mems if isinstance(mems, Tensor) else mems[0] if isinstance(mems, tuple) and mems else None
        known = isinstance(slots, Tensor) and slots.dim() == 4
        batch, count = (slots.shape[0], slots.shape[2]) if known else (1, self.config.num_memory_slots)
        initial = self.get_initial_mem(batch)
        carried = CausalMemory(mems, initial.last) if isinstance(mems, Tensor) else mems
        self._check_memory(carried, batch, count)
        kept = carried.slots[:, :, : self.config.num_memory_slots]
        resized = torch.cat([kept, initial.slots[:, :, count:]], 2)
        return resized if isinstance(mems, Tensor) else CausalMemory(resized, carried.last)

    # --- What a rollout asks for ----------------------------------------------------------------------------------

    def forget(self, memory: CausalMemory) -> CausalMemory:
        """The initial slots, and the last tokens that were read."""
        return memory._replace(slots=self.get_initial_mem(len(memory.last)).slots)

    def cell(self, segment: Segment, memory: CausalMemory | None) -> tuple[Tensor, CausalMemory]:
        """The stack with its memories; see :meth:`step`."""
        return self.step(segment.src, memory, segment.src_mask, segment.reset, segment.before)

    def target(self, segment: Segment) -> Tensor:
        """The labels; where there are none, the tokens themselves."""
        return segment.src if segment.tgt is None else segment.tgt

    def counted(self, segment: Segment) -> Tensor:
        """Which labels count, (batch, tokens)."""
        return counted_labels(self.target(segment), segment.src_mask, self.has_overlap)

    def token_losses(
        self, outputs: Sequence[Tensor], segments: Sequence[Segment], divisor: Divisor | None = None
    ) -> TokenLosses:
        """The losses of several segments' labels, from one call of the head."""
        lengths = [segment.src.shape[1] for segment in segments]
        longest = max(lengths)
        read = [F.pad(x, (0, 0, 0, longest - length)) for x, length in zip(outputs, lengths, strict=True)]
        labels = torch.cat([padded(self.target(segment), longest, IGNORED) for segment in segments])
        mask = None
        if any(segment.src_mask is not None for segment in segments):
            masks = [torch.ones_like(s.src, dtype=torch.bool) if s.src_mask is None else s.src_mask for s in segments]
            mask = torch.cat([padded(m, longest, False) for m in masks])
        counted = counted_labels(labels, mask, self.has_overlap)
        hidden = _before(self.norm(torch.cat(read)), longest)
        labels_that_count = labels.where(counted, IGNORED)
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
        if tgt_mask is not None:
            raise ValueError("tgt_mask: labels have the mask of their tokens, src_mask; one of -100 does not count")
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

    def silent(self, segment: Segment) -> Segment:
        """The segment with labels that do not count."""
        return segment._replace(tgt=torch.full_like(segment.src, IGNORED))

    def of_stream(self, segment: Segment) -> Segment:
        """The tokens that a decoder would write of the segment: each of a document comes once.

        Also where a lane begins inside a document, what stands before them is read again.
        """
        assert segment.tgt is not None
        mask = None if segment.tgt_mask is None else segment.tgt_mask[:, 1:]
        before = segment.before
        if before is not None:
            before = before[:, before.shape[1] - self.config.overlap :]
        return Segment(segment.tgt[:, 1:], mask, segment.reset, before=before)

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

    def check_writes(self, purpose: str) -> None:
        """Raise ValueError, which names the purpose, where a segment's first token cannot be predicted."""
        if not self.has_overlap:
            raise ValueError(
                f"{purpose}: this model has overlap=0, so it does not predict a segment's first token; build it with "
                "an overlap of at least 1"
            )

    def new_state(self, batch_size: int, start: int) -> MemoryState:
        """Lanes that have read nothing. The start token fills up what a state has no tokens for, and is not read."""
        like, config = self.get_initial_mem(1).slots[0], self.config
        return MemoryState.new(batch_size, config.max_seq_len, start, like, config.overlap)

    def resumed(self, state: MemoryState) -> tuple[list[Segment], CausalMemory]:
        """Each lane's last whole segment, which begins a document where nothing stands before it."""
        fresh, (last, segment) = state.fresh, state.segment.tensor_split([self.config.overlap], 1)
        if fresh.all():
            return [], self.get_initial_mem(state.batch_size)
        mask = ~fresh[:, None].expand_as(segment) if fresh.any() else None
        # Of a lane's first whole segment nothing stands before.
        last = torch.where((state.position < 2 * state.length)[:, None], NOTHING, last)
        return [Segment(segment, mask, fresh)], CausalMemory(state.memory, last)

    def open(self, state: MemoryState) -> Opened:
        """All that the stack needs to go on from a state, computed once for the rest of the pending segments."""
        overlap = self.config.overlap
        segments, memory = self.resumed(state)
        for segment in segments:
            _, memory = self.cell(segment, memory)
        contexts = [(k.contiguous(), v.contiguous()) for k, v in self.stack.contexts(memory.slots.transpose(0, 1))]
        cache = self._new_cache(state.batch_size)
        begun = overlap - 1 + int(state.filled.max())
        if begun:
            # What shorter lanes put into the cache beyond their end is written over before it is looked at.
            tokens = torch.cat([memory.last, state.pending], 1)[:, :begun]
            position = torch.arange(begun, device=tokens.device).expand_as(tokens)
            self.extend(tokens, position, contexts, cache)
        return Opened(contexts, memory.last, memory.slots, cache)

    def next_logits(self, state: MemoryState, opened: Opened) -> Tensor:
        """Logits of each lane's next token, (batch, vocabulary). The cache takes in each lane's last token."""
        position = state.filled + self.config.overlap - 1
        token = torch.cat([opened.last, state.pending], 1).gather(1, position[:, None])
        return self.head(self.extend(token, position[:, None], opened.contexts, opened.cache)[:, 0])

    # --- What an export asks for ----------------------------------------------------------------------------------

    @torch.no_grad()
    def steps(self) -> dict[str, Step]:
        """:class:`EncodeStep` and, if a segment's first token is predicted, :class:`DecodeStep`."""
        # Two lanes and two tokens: the tracer takes a size of one for a constant.
        batch, config, memory = 2, self.config, self.get_initial_mem(2)
        tokens = torch.zeros(batch, min(2, config.max_seq_len), dtype=torch.int64, device=memory.last.device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        encode = EncodeStep(self)
        inputs = {
            "tokens": (tokens, {0: "batch", 1: "length"}),
            "mask": (mask, {0: "batch", 1: "length"}),
            "memory": (memory.slots.clone(), {0: "batch"}),
            "reset": (mask.all(1), {0: "batch"}),
        }
        if not self.has_overlap:
            outputs = {"logits": {0: "batch", 1: "length"}, "memory_after": {0: "batch"}}
            return {"encode": Step(encode, inputs, outputs)}
        inputs["last"] = (memory.last, {0: "batch"})
        outputs = {"logits": {0: "batch", 1: "length + 1"}, "memory_after": {0: "batch"}, "last_after": {0: "batch"}}
        *_, context = encode(*(tensor for tensor, _ in inputs.values()))
        next_inputs = {
            "token": (tokens[:, 0].clone(), {0: "batch"}),
            "position": (tokens[:, 0].clone(), {0: "batch"}),
            "cache": (as_tensor(self._new_cache(batch)), {2: "batch"}),
            "context": (context, {2: "batch"}),
        }
        decode = Step(DecodeStep(self), next_inputs, {"logits": {0: "batch"}, "cache_after": {2: "batch"}})
        return {"encode": Step(encode, inputs, outputs | {"context": {2: "batch"}}), "decode": decode}

    def _new_cache(self, batch_size: int) -> list[KeysValues]:
        """Room for the overlap and a segment, for :meth:`extend`."""
        config, like = self.config, self.norm.weight  # other weights may be quantised
        shape = (batch_size, config.heads, config.overlap + config.max_seq_len, config.dim // config.heads)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.depth)]

    def extend(
        self, tokens: Tensor, position: Tensor, contexts: Sequence[KeysValues], cache: Sequence[KeysValues]
    ) -> Tensor:
        """The last layer's output (batch, new, dim) at new tokens of segments, which the cache takes in.

        Args:
            tokens: (batch, new) token ids, those of the overlap among them; -1 where there are none before a document.
            position: (batch, new), where each stands, from the overlap's first on.
            contexts: the slots' keys and values for each layer.
            cache: written in place, at ``position``; what lies ahead of a position is not looked at.
        """
        x = self._embedded(tokens)
        for block, context, kept in zip(self.stack.each_block(), contexts, cache, strict=True):
            x = block.extend(x, kept, position, context)
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
        if reset is not None and not is_tensor(reset, (batch,), torch.bool):
            raise ValueError(
                f"reset: expected torch.bool of shape ({batch},), one per lane of {name}, got {describe(reset)}"
            )
        if labels is not None:
            check_labels("labels", labels, tokens, config.num_tokens)

    def _check_memory(self, mems: CausalMemory, batch: int, slots: int | None = None) -> None:
        """``slots``: how many there are to be (default: those of the model)."""
        config, dtype = self.config, self.norm.weight.dtype
        if not isinstance(mems, tuple) or len(mems) != 2:
            raise ValueError(f"mems: expected a CausalMemory, as this model returns it, got {describe(mems)}")
        shape = (batch, len(self.writers()), slots or config.num_memory_slots, config.dim)
        if not is_tensor(mems[0], shape, dtype):
            raise ValueError(
                f"mems: expected slots of {dtype}, that of the model, of shape {shape} (batch of tokens, layers, "
                f"num_memory_slots, dim), got {describe(mems[0])}"
            )
        if not isinstance(mems[1], Tensor) or mems[1].shape != (batch, config.overlap) or mems[1].is_floating_point():
            expected = f"token ids of shape {(batch, config.overlap)}, the overlap"
            raise ValueError(f"mems: expected as last tokens {expected}, got {describe(mems[1])}")


class EncodeStep(nn.Module):
    """Read one segment and write the memory, and what the tokens after it will look at.

    Where there is no overlap, neither last tokens nor a context come out: no text is written then.
    """

    def __init__(self, model: CausalMemformer):
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, mask: Tensor, memory: Tensor, reset: Tensor, last: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """``(logits, memory)``, and ``last`` and ``context`` if there is an overlap.

        The logits (batch, length + 1, num_tokens) are those of each token and of one more; without an overlap (batch,
        length, num_tokens), of what follows each.
        """
        before = CausalMemory(memory, tokens[:, :0] if last is None else last)
        hidden, after = self.model.step(tokens, before, mask, reset)
        logits = self.model.head(hidden)
        if last is None:
            return logits, after.slots
        return logits, *after, as_tensor(self.model.stack.contexts(after.slots.transpose(0, 1)))


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


def causal_losses(logits: Tensor, length: int, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of each label in nats, zero where it does not count, and whether it counts; both (batch, length).

    A label counts if its place exists, it is not -100, and something stands before it: of a segment's tokens, or of the
    overlap.

    Args:
        logits: of :meth:`CausalMemformer.step`'s hidden states; (batch, length + 1, num_tokens), or one place fewer
            where there is no overlap.
        labels, mask: (batch, length).
    """
    before = _before(logits, length)
    counted = counted_labels(labels, mask, has_overlap=logits.shape[1] > length)
    return each_loss(before, labels.long().where(counted, IGNORED)), counted


def _before(places: Tensor, length: int) -> Tensor:
    """What predicts each of ``length`` labels: the place before it; zeros before the first where there is none."""
    before = places[:, :-1]
    return before if before.shape[1] == length else F.pad(before, (0, 0, 1, 0))


def counted_labels(labels: Tensor, mask: Tensor | None, has_overlap: bool) -> Tensor:
    """Which labels (batch, length) count: see :func:`causal_losses`."""
    counted = labels != IGNORED
    if mask is not None:
        counted = counted & mask
    if has_overlap:
        return counted
    kept = torch.ones_like(counted) if mask is None else mask  # nothing stands before the first token
    return counted & (kept.cumsum(1) - kept.long() > 0)


def _stack(config: CausalConfig) -> MemoryInEachLayer | OneMemory:
    length, head_dim = config.overlap + config.max_seq_len, config.dim // config.heads

    def block() -> Block:
        positions = positions_of(config.positions, config.heads, head_dim, length, causal=True)
        made = Block(config.dim, config.heads, positions, True, config.dropout, config.feed_forward_factor)
        made.self_attention.begin_with_neighbours()
        return made

    def writer() -> SlotWriter:
        make = WRITERS[config.memory_writer]
        return make(config.dim, config.num_memory_slots, config.mem_update_attn_heads, config.write_temperature)

    updates = config.num_mem_updates
    if config.memory == "one":
        blocks = [block() for _ in range(config.depth)]
        return OneMemory(config.dim, config.heads, blocks, writer(), updates)
    return MemoryInEachLayer(
        [CausalLayer(config.dim, config.heads, block(), writer(), updates) for _ in range(config.depth)]
    )
