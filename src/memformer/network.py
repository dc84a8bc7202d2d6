"""The network of a Memformer: an encoder that reads a memory of fixed size, its writer, and a decoder.

The one place that turns a configuration into modules, and all that a step is, of a segment or of one token; nothing
here checks what it is given. Shapes: tokens (batch, tokens), memory (batch, slots, dim). The network does not know the
replay engine; ``rollouts.py`` joins them by what every :class:`~memformer.interface.SegmentModel` has.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import IGNORED
from .config import MemformerConfig
from .data.segments import Segment
from .interface import Divisor, SegmentModel, Step, TokenLosses, as_pairs, as_tensor
from .nn.attention import ContextProjection, KeysValues, blocked, visible_to
from .nn.blocks import Block, embedding_table
from .nn.losses import VocabularyLoss, vocabulary_loss
from .nn.memory import SlotWriter, begun, new_writer, writes
from .nn.positions import positions
from .state import MemoryState

__all__ = ["Decoder", "EncOnlyResults", "Encoder", "Network", "Opened", "token_losses"]


class EncOnlyResults(NamedTuple):
    """What reading a segment gives, and all that an encoder-only model returns.

    Attributes:
        enc_out: (batch, tokens, dim), zero where the source is masked.
        mem: (batch, slots, dim), the memory after the segment.
    """

    enc_out: Tensor
    mem: Tensor


class Opened(NamedTuple):
    """What is computed once of each lane's last whole segment, for the tokens after it. First dimension: batch.

    Attributes:
        contexts: the encoding's keys and values for each layer of the decoder.
        context_mask: (batch, tokens), True where the encoding exists.
        memory: (batch, slots, dim), after that segment.
        cache: the decoder's, of all tokens since then, except each lane's last one, which the next step adds.
    """

    contexts: list[KeysValues]
    context_mask: Tensor
    memory: Tensor
    cache: list[KeysValues]


class Encoder(nn.Module):
    """Reads a segment and the memory, each slot in so many ``parts``, in every layer (paper, section 3.2)."""

    def __init__(self, embedding: nn.Embedding, layers: list[Block], heads: int, dropout: float, parts: int):
        super().__init__()
        dim = embedding.embedding_dim
        self.embedding = embedding
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            layer.self_attention.begin_with_copies()
        self.memory_norm = nn.LayerNorm(dim)
        self.memory_projection = ContextProjection(dim, heads, len(layers), parts)
        self.norm = nn.LayerNorm(dim)

    def forward(self, src: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, tokens) and (batch, slots, dim) -> (batch, tokens, dim), zero where ``mask`` is False."""
        x = self.dropout(self.embedding(src))  # (batch, tokens, dim)
        contexts = self.memory_projection(self.memory_norm(memory))  # per layer two of (batch, heads, slots, head_dim)
        visible = None if mask is None else _visible(mask)[:, None, None, :]  # (batch, 1, 1, tokens)
        for layer, context in zip(self.layers, contexts, strict=True):
            x = layer(x, context, visible)
        x = self.norm(x)
        return x if mask is None else x * mask[..., None]


class Decoder(nn.Module):
    """Predicts each token of a target from those before it and from the encoder's output.

    After the target's first token, which starts it, it reads the last ``overlap`` tokens of the source: a target that
    continues the source is then predicted at the border of two segments as inside one.
    """

    def __init__(
        self, embedding: nn.Embedding, layers: list[Block], heads: int, dropout: float, tied: bool, overlap: int
    ):
        super().__init__()
        dim, vocabulary = embedding.embedding_dim, embedding.num_embeddings
        self.overlap, self.tied = overlap, tied
        self.embedding = embedding
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            layer.self_attention.begin_with_neighbours()
        self.context_projection = ContextProjection(dim, heads, len(layers))
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, vocabulary)
        self._tie()
        self.register_load_state_dict_post_hook(Decoder._tie)  # type: ignore[no-untyped-call]

    def _tie(self, _: object = None) -> None:
        """One matrix for embedding and logits, also after ``load_state_dict(assign=True)``, which makes two of it."""
        if self.tied:
            self.to_logits.weight = self.embedding.weight

    def forward(
        self,
        tgt: Tensor,
        enc_out: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        src: Tensor | None = None,
        readout: Callable[[Tensor, nn.Module], Any] | None = None,
    ) -> Any:
        """(batch, tokens) and (batch, source, dim) -> logits (batch, tokens, vocabulary), of what follows each token.

        A masked target is seen by no other position, and its own position does not know which token it was. ``src``
        (batch, source) is needed where there is an overlap. With a ``readout`` what that makes of the last layer's
        output (batch, tokens, dim) and of the projection to logits comes in place of these.
        """
        if self.overlap:
            assert src is not None, "an overlap needs the source"
            tgt, tgt_mask = self._with_overlap(tgt, tgt_mask, src, src_mask)  # (batch, tokens + overlap)
        x = self.dropout(self.embedding(tgt))  # (batch, tokens + overlap, dim)
        mask = None
        if tgt_mask is not None:
            x = x * tgt_mask[..., None]
            mask = visible_to(tgt_mask)  # (batch, 1, queries, keys)
        context_mask = None if src_mask is None else _visible(src_mask)[:, None, None, :]  # (batch, 1, 1, source)
        for layer, context in zip(self.layers, self.context_projection(enc_out), strict=True):
            x = layer(x, context, mask, context_mask)
        x = self.norm(x[:, self.overlap :])  # (batch, tokens, dim)
        return self.to_logits(x) if readout is None else readout(x, self.to_logits)

    def _with_overlap(
        self, tgt: Tensor, tgt_mask: Tensor | None, src: Tensor, src_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """A target whose first token is followed by the source's last ones, and its mask.

        Where the source has fewer, the first token is repeated, so that places in the target do not depend on it.
        """
        start, rest = tgt.tensor_split([1], 1)
        last = torch.cat([start.expand(-1, self.overlap), src], 1)  # (batch, overlap + source)
        if src_mask is None:
            last = last[:, -self.overlap :]  # (batch, overlap)
        else:
            # A stable sort puts the tokens that exist last, in their order; the repeated first ones always exist.
            order = F.pad(src_mask, (self.overlap, 0), value=True).byte().argsort(dim=1, stable=True)
            last = last.gather(1, order[:, -self.overlap :])
        if tgt_mask is not None:
            tgt_mask = torch.cat([tgt_mask[:, :1].expand(-1, 1 + self.overlap), tgt_mask[:, 1:]], 1)
        return torch.cat([start, last, rest], 1), tgt_mask

    def new_cache(self, batch_size: int, tokens: int) -> list[KeysValues]:
        """Room for the keys and values of ``tokens`` targets (the start token counted), for :meth:`extend`.

        Per layer two of (batch, heads, tokens + overlap, head_dim): the overlap stands between the first target and the
        second.
        """
        like = self.embedding.weight  # the output projection may be quantised
        heads = self.context_projection.heads
        shape = (batch_size, heads, tokens + self.overlap, self.embedding.embedding_dim // heads)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers]

    def extend(
        self,
        tgt: Tensor,
        position: Tensor,
        cache: Sequence[KeysValues],
        contexts: Sequence[KeysValues],
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """:meth:`forward` for some targets of a segment, with what was computed for those before them.

        Args:
            tgt: (batch, new) token ids; the overlap's are among them, at the positions after the first.
            position: (batch, new), where each stands in its segment; lanes may stand at different places.
            cache: from :meth:`new_cache`; written in place, at ``position``. Its shapes are fixed, so compiled code
                serves every position; what lies ahead of a position is not looked at.
            contexts: ``context_projection(enc_out)``, once per segment.
            context_mask: (batch, source), True where ``enc_out`` exists; at least once in each lane.

        Returns:
            The last layer's output (batch, new, dim).
        """
        x = self.dropout(self.embedding(tgt))  # (batch, new, dim)
        visible = None if context_mask is None else blocked(context_mask, contexts[0][0])[:, None, None, :]
        layers = cast("list[Block]", self.layers)
        at = layers[0].places(position, cache[0])
        for layer, kept, context in zip(layers, cache, contexts, strict=True):
            x = layer.extend(x, kept, at, context, visible)
        return x

    def step(
        self,
        token: Tensor,
        position: Tensor,
        cache: Sequence[KeysValues],
        contexts: Sequence[KeysValues],
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """One target per lane, token and position (batch,) -> logits (batch, vocabulary) of the next.

        The other arguments are those of :meth:`extend`.
        """
        x = self.extend(token[:, None], position[:, None], cache, contexts, context_mask)  # (batch, 1, dim)
        return self.to_logits(self.norm(x[:, 0]))

    def compile_step(self, **options: Any) -> None:
        """Compile :meth:`step`, which generation calls for each token, by ``torch.compile(..., **options)``.

        Copies of the model (``copy.deepcopy``) are then compiled too, each with its own weights.
        """
        # As a method and not as a function of this decoder alone: deepcopy binds a method to the copy.
        self.step = MethodType(torch.compile(type(self).step, **options), self)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        # A plain function in place of ``step``, such as torch.compile(decoder.step), has this decoder's weights: a copy
        # has to have its own.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        if not isinstance(state.get("step"), MethodType):
            state.pop("step", None)
        return state


class Network(SegmentModel):
    """Encoder, writer and decoder (None in an encoder-only model), as a configuration says.

    Attributes:
        encoder: reads a segment and the memory.
        writer: writes the memory; holds the initial one.
        decoder: predicts a target.
    """

    config: MemformerConfig
    reads_its_targets = False
    steps_alike = True

    def __init__(self, config: MemformerConfig):
        super().__init__()
        self.config = config
        embedding = embedding_table(config.enc_num_tokens, config.dim)
        layers = _layers(config, config.enc_depth, config.enc_heads, config.enc_max_seq_len, causal=False)
        self.encoder = Encoder(embedding, layers, config.enc_heads, config.dropout, config.slot_parts)
        slots, heads = config.num_memory_slots, config.mem_update_attn_heads
        how = config.write_temperature, config.forgetting
        self.writer = new_writer(config.memory_writer, config.dim, slots, heads, *how, config.enc_max_seq_len)
        self.decoder: Decoder | None = None
        if config.encoder_only:
            if config.dec_num_tokens is not None or config.dec_max_seq_len is not None or config.dec_overlap:
                warnings.warn("encoder_only=True: the decoder's settings (dec_...) have no effect", stacklevel=3)
            return
        assert config.dec_num_tokens is not None, "the configuration checks it"
        assert config.dec_max_seq_len is not None, "the configuration checks it"
        if not config.tie_embeddings:
            embedding = embedding_table(config.dec_num_tokens, config.dim)
        length = config.dec_max_seq_len + config.dec_overlap
        layers = _layers(config, config.dec_depth, config.dec_heads, length, causal=True)
        self.decoder = Decoder(
            embedding, layers, config.dec_heads, config.dropout, config.tie_embeddings, config.dec_overlap
        )

    @property
    def depth(self) -> int:
        """The encoder's layers and the decoder's."""
        return self.config.enc_depth + (0 if self.decoder is None else self.config.dec_depth)

    def get_initial_mem(self, batch_size: int) -> Tensor:
        """The learned memory before the first segment, (batch, slots, dim)."""
        return self.writer.initial(batch_size)

    def need_decoder(self, purpose: str) -> Decoder:
        """The decoder. Raises ValueError, which names the purpose, where there is none."""
        if self.decoder is None:
            raise ValueError(f"{purpose}: this model is encoder_only and has no decoder")
        return self.decoder

    def step(
        self, src: Tensor, mems: Tensor | None = None, src_mask: Tensor | None = None, reset: Tensor | None = None
    ) -> EncOnlyResults:
        """Read one segment and write the memory: the critical path of a rollout.

        Args:
            src: (batch, tokens) token ids.
            mems: (batch, slots, dim), the memory before the segment; None for the learned initial memory.
            src_mask: (batch, tokens) boolean, True for tokens that exist.
            reset: (batch,) boolean: lanes that start again from the learned initial memory.
        """
        mem = begun(mems, self.get_initial_mem(src.shape[0]), reset)  # (batch, slots, dim)
        enc_out = self.encoder(src, mem, src_mask)  # (batch, tokens, dim)
        return EncOnlyResults(enc_out, writes(self.writer, self.config.num_mem_updates, mem, enc_out, src_mask))

    # --- What a rollout asks for ------------------------------------------------------------------------------------

    def forget(self, memory: Tensor) -> Tensor:
        """The initial memory."""
        return self.get_initial_mem(len(memory))

    def cell(self, segment: Segment, memory: Tensor | None) -> EncOnlyResults:
        """The encoder with its memory: what the decoder looks at, and the memory after the segment."""
        return self.step(segment.src, memory, segment.src_mask, segment.reset)

    def target(self, segment: Segment) -> Tensor | None:
        """What the decoder is to write: its start token, then what is predicted."""
        return segment.tgt

    def counted(self, segment: Segment) -> Tensor:
        """Which predictions of a target count, (batch, target length - 1)."""
        assert segment.tgt is not None
        return counted_targets(segment.tgt, segment.tgt_mask)

    def token_losses(
        self, outputs: Sequence[Tensor], segments: Sequence[Segment], divisor: Divisor | None = None
    ) -> TokenLosses:
        """The decoder's losses on several segments with targets, in one call."""
        decoder = self.need_decoder("a target")
        src_masks = [segment.src_mask for segment in segments]
        enc_out, src_mask = _concatenate(outputs, src_masks)
        src, _ = _concatenate([segment.src for segment in segments], src_masks)
        tgt, tgt_mask = _concatenate([s.tgt for s in segments if s.tgt is not None], [s.tgt_mask for s in segments])
        counted = counted_targets(tgt, tgt_mask)
        found = target_losses(decoder, tgt, enc_out, src_mask, tgt_mask, src, counted, divisor and divisor(counted))
        return TokenLosses(tgt, found.losses, counted, found.total)

    def silent(self, segment: Segment) -> Segment:
        """The segment without its target."""
        return segment._replace(tgt=None, tgt_mask=None)

    def of_stream(self, segment: Segment) -> Segment:
        """The segment as it is: its source is what was before, and the next one is its target."""
        return segment

    def compile_parts(self) -> None:
        """The encoder and the decoder."""
        self.encoder.compile()
        if self.decoder is not None:
            self.decoder.compile()

    def writers(self) -> list[SlotWriter]:
        """The one there is."""
        return [self.writer]

    def slots_of(self, memory: Tensor) -> Tensor:
        """(batch, slots, dim) -> (batch, 1, slots, dim)."""
        return memory[:, None]

    # --- What generation asks for ---------------------------------------------------------------------------------

    def check_writes(self, purpose: str) -> None:
        """Raise ValueError, which names the purpose, where there is no decoder."""
        self.need_decoder(purpose)

    def new_state(self, batch_size: int, start: int) -> MemoryState:
        """Lanes that have read nothing."""
        return MemoryState.new(batch_size, self.config.segment_length, start, self.get_initial_mem(1)[0])

    def packed(self, memory: Tensor) -> Tensor:
        """The memory itself."""
        return memory

    def resumed(self, state: MemoryState) -> tuple[list[Segment], Tensor | None]:
        """Each lane's last whole segment, or the start token where there is none yet."""
        fresh = state.fresh
        if fresh.all():
            return [Segment(state.segment[:, :1])], None
        return [Segment(state.segment, _source_mask(state) if fresh.any() else None, fresh)], state.memory

    def open(self, state: MemoryState) -> Opened:
        """All that the decoder needs to go on from a state, computed once for the rest of the pending segments.

        Its shapes are those of a whole segment also at the start of a document, so that compiled code serves both.
        """
        decoder = self.need_decoder("open")
        (segment,), memory = self.resumed(state)
        enc_out, memory = self.cell(segment, memory)
        enc_out = F.pad(enc_out, (0, 0, 0, state.length - enc_out.shape[1]))  # (batch, length, dim)
        contexts = [(k.contiguous(), v.contiguous()) for k, v in decoder.context_projection(enc_out)]
        context_mask, cache = _source_mask(state), decoder.new_cache(state.batch_size, state.length)
        begun = decoder.overlap + int(state.filled.max())
        if begun:
            # What shorter lanes put into the cache beyond their end is written over before it is looked at.
            tokens = _targets(state, decoder.overlap)[:, :begun]
            position = torch.arange(begun, device=tokens.device).expand_as(tokens)
            decoder.extend(tokens, position, cache, contexts, context_mask)
        return Opened(contexts, context_mask, memory, cache)

    def next_logits(self, state: MemoryState, opened: Opened) -> Tensor:
        """Logits of each lane's next token, (batch, vocabulary). The cache takes in each lane's last token."""
        decoder = self.need_decoder("next_logits")
        position = state.filled + decoder.overlap
        token = _targets(state, decoder.overlap).gather(1, position[:, None])[:, 0]
        return decoder.step(token, position, opened.cache, opened.contexts, opened.context_mask)

    # --- What an export asks for ------------------------------------------------------------------------------------

    @torch.no_grad()
    def steps(self) -> dict[str, Step]:
        """:class:`EncodeStep` and, if there is a decoder, :class:`DecodeStep`."""
        # Two lanes and two tokens: the tracer takes a size of one for a constant.
        batch = 2
        tokens = torch.zeros(batch, min(2, self.config.enc_max_seq_len), dtype=torch.int64)
        tokens = tokens.to(self.encoder.embedding.weight.device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        encode = EncodeStep(self)
        inputs = {
            "tokens": (tokens, {0: "batch", 1: "length"}),
            "mask": (mask, {0: "batch", 1: "length"}),
            "memory": (self.get_initial_mem(batch).clone(), {0: "batch"}),
            "reset": (mask.all(1), {0: "batch"}),
        }
        outputs = {"encoded": {0: "batch", 1: "length"}, "memory_after": {0: "batch"}}
        if self.decoder is None:
            return {"encode": Step(encode, inputs, outputs)}
        context_axes = {2: "batch", 4: "length"}
        *_, context = encode(*(tensor for tensor, _ in inputs.values()))
        cache = as_tensor(self.decoder.new_cache(batch, self.config.dec_max_seq_len or 0))
        next_inputs = {
            "token": (tokens[:, 0].clone(), {0: "batch"}),
            "position": (tokens[:, 0].clone(), {0: "batch"}),
            "cache": (cache, {2: "batch"}),
            "context": (context, context_axes),
            "mask": inputs["mask"],
        }
        decode = Step(DecodeStep(self.decoder), next_inputs, {"logits": {0: "batch"}, "cache_after": {2: "batch"}})
        return {"encode": Step(encode, inputs, outputs | {"context": context_axes}), "decode": decode}


class EncodeStep(nn.Module):
    """Read one segment and write the memory: :meth:`Network.step`, and what the decoder will look at."""

    def __init__(self, model: Network):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, memory: Tensor, reset: Tensor) -> tuple[Tensor, ...]:
        """``(encoded, memory)``, and ``context`` if there is a decoder; ``reset`` (batch,): lanes that begin anew."""
        encoded, written = self.model.step(tokens, memory, mask, reset)
        if self.model.decoder is None:
            return encoded, written
        return encoded, written, as_tensor(self.model.decoder.context_projection(encoded))


class DecodeStep(nn.Module):
    """One target per lane: :meth:`Decoder.step`, with the cache as a value that goes in and comes out."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(
        self, token: Tensor, position: Tensor, cache: Tensor, context: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Token and position (batch,) -> logits (batch, tokens) of the next; ``mask``: that of the encoded segment."""
        # Each by itself: ONNX loses the free batch where what is written is a view.
        kept = [(keys.clone(), values.clone()) for keys, values in as_pairs(cache)]
        # A lane with nothing to look at looks at zeros, as in the encoder.
        logits = self.decoder.step(token, position, kept, as_pairs(context), mask | ~mask.any(1, keepdim=True))
        return logits, as_tensor(kept)


def _source_mask(state: MemoryState) -> Tensor:
    """(batch, length): the source of a lane that has not read a whole segment is the start token alone."""
    return ~state.fresh[:, None] | (torch.arange(state.length, device=state.position.device) == 0)


def _targets(state: MemoryState, overlap: int) -> Tensor:
    """What the decoder reads, (batch, 1 + overlap + length): the start token, the overlap, what is pending."""
    last = state.segment[:, state.length - overlap :]
    return torch.cat([F.pad(last, (1, 0), value=state.start), state.pending], 1)


def token_losses(
    decoder: Decoder,
    tgt: Tensor,
    enc_out: Tensor,
    src_mask: Tensor | None = None,
    tgt_mask: Tensor | None = None,
    src: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each predicted token in nats, zero where it does not count, and whether it counts.

    Both (batch, tokens - 1) for ``tgt`` (batch, tokens); the other arguments are those of :meth:`Decoder.forward`. A
    kept token counts if another kept one stands before it; the first one starts the decoder.
    """
    counted = counted_targets(tgt, tgt_mask)
    return target_losses(decoder, tgt, enc_out, src_mask, tgt_mask, src, counted, None).losses, counted


def target_losses(
    decoder: Decoder,
    tgt: Tensor,
    enc_out: Tensor,
    src_mask: Tensor | None,
    tgt_mask: Tensor | None,
    src: Tensor | None,
    counted: Tensor,
    divisor: Tensor | float | None,
) -> VocabularyLoss:
    """:func:`token_losses`, given those that count, and their total where there is something to divide them by."""
    expected = tgt[:, 1:] if tgt_mask is None else tgt[:, 1:].where(counted, IGNORED)
    readout = functools.partial(vocabulary_loss, expected=expected, divisor=divisor)
    kept = None if tgt_mask is None else tgt_mask[:, :-1]
    found: VocabularyLoss = decoder(tgt[:, :-1], enc_out, src_mask, kept, src, readout)
    return found


def counted_targets(tgt: Tensor, tgt_mask: Tensor | None = None) -> Tensor:
    """Which predictions count, (batch, tokens - 1): those of kept tokens that another kept one stands before."""
    if tgt_mask is None:
        return torch.ones_like(tgt[:, 1:], dtype=torch.bool)
    return tgt_mask[:, 1:] & (tgt_mask.cumsum(1)[:, :-1] > 0)


def _concatenate(tensors: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Along the batch, padded to the longest; the mask is None where nothing is masked or padded."""
    longest = max(x.shape[1] for x in tensors)
    if all(mask is None for mask in masks) and all(x.shape[1] == longest for x in tensors):
        return torch.cat([*tensors]), None
    padded, padded_masks = [], []
    for x, mask in zip(tensors, masks, strict=True):
        missing = longest - x.shape[1]
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        padded.append(F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)))
        padded_masks.append(F.pad(mask, (0, missing)))
    return torch.cat(padded), torch.cat(padded_masks)


def _layers(config: MemformerConfig, depth: int, heads: int, max_len: int, causal: bool) -> list[Block]:
    kind, head_dim = config.positions, config.dim // heads
    return [
        Block(config.dim, heads, positions(kind, heads, head_dim, max_len, causal), causal, config.dropout)
        for _ in range(depth)
    ]


def _visible(mask: Tensor) -> Tensor:
    """The mask, but all True in lanes where it is all False: attention over nothing has no value, and these lanes'
    outputs are zeroed anyway."""
    return mask | ~mask.any(1, keepdim=True)
