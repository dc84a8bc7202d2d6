"""Memformer: the network with what its users call, checked: one segment, streams of text, a memory of another size.

Shapes: tokens (batch, tokens), memory (batch, slots, dim). What is computed is in ``network.py``, how text is written
in ``generation.py``, and files are in ``pretrained.py``.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import generation
from .checks import (
    as_mask,
    as_tokens,
    check_mask,
    check_reset,
    check_tokens,
    describe,
    has_values,
    ignored_as_masked,
    is_tensor,
)
from .config import MemformerConfig, Positions, Writer
from .data.segments import Segment, Targets, cut, each_as_tokens
from .network import Decoder, Encoder, EncOnlyResults, Network, counted_targets, target_losses, token_losses

__all__ = ["Decoder", "EncOnlyResults", "Encoder", "Memformer", "Results", "token_losses"]


class Results(NamedTuple):
    """What an encoder-decoder returns.

    Attributes:
        enc_out: (batch, tokens, dim), zero where the source is masked.
        mem: (batch, slots, dim), the memory after the segment.
        dec_out: the mean loss in nats over the kept targets, a scalar; None without a target.
    """

    enc_out: Tensor
    mem: Tensor
    dec_out: Tensor | None


class Memformer(Network):
    """A Transformer with an external memory of fixed size, for sequences of any length, segment by segment.

    >>> model = Memformer(
    ...     dim=32, num_memory_slots=4, enc_num_tokens=256, enc_max_seq_len=16, enc_depth=1,
    ...     dec_num_tokens=256, dec_max_seq_len=16, dec_depth=1,
    ... )
    >>> first, second, target = torch.randint(256, (3, 2, 16))
    >>> enc_out, mems, _ = model(first)                         # without a target the memory still advances
    >>> enc_out, mems, loss = model(second, target, mems=mems)
    >>> enc_out.shape, mems.shape, loss.shape
    (torch.Size([2, 16, 32]), torch.Size([2, 4, 32]), torch.Size([]))

    Args:
        dim: width of the model.
        num_memory_slots: number K of memory slots.
        enc_num_tokens, enc_max_seq_len: the encoder's vocabulary, and the length of a segment.
        enc_depth, enc_heads: the encoder's layers, and attention heads in each.
        dec_num_tokens, dec_max_seq_len, dec_depth, dec_heads: the same for the decoder.
        dec_overlap: how many of the source's last tokens the decoder also sees, before what it predicts: for targets
            that continue the source, in the same vocabulary. A target's mask must then keep its first token.
        encoder_only: without a decoder; the call then returns ``(enc_out, mem)``.
        slot_parts: in how many parts a slot is read, each by a key and a value of its own. With as many as
            ``mem_update_attn_heads``, what a writing head found is read by itself.
        num_mem_updates: how often the memory is written per segment.
        mem_update_attn_heads: heads of the writing attention.
        memory_writer: "normalised" (paper v2), "gated" (the earlier library's), or "placed", where each writing head of
            each slot begins with a place of its own in a segment; see ``nn/memory.py``.
        write_temperature: temperature of the writing attention; below 1 sharpens it (paper v2).
        forgetting: length at construction of the bias vectors that pull slots back to where they began with each write
            (paper v2's forgetting), of the normalised writer; with 0 only what is written over is forgotten.
        positions: "rotary" (the fastest), "relative" (paper v1) or "bucketed" (the earlier library's).
        dropout: probability, on the embeddings and on every sublayer's output.
        tie_embeddings: one matrix for both embeddings and the output projection.

    Raises:
        ValueError: a setting is missing or out of range.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_memory_slots: int,
        enc_num_tokens: int,
        enc_max_seq_len: int,
        enc_depth: int = 6,
        enc_heads: int = 8,
        dec_num_tokens: int | None = None,
        dec_max_seq_len: int | None = None,
        dec_depth: int = 6,
        dec_heads: int = 8,
        dec_overlap: int = 0,
        encoder_only: bool = False,
        slot_parts: int = 1,
        num_mem_updates: int = 1,
        mem_update_attn_heads: int = 8,
        memory_writer: Writer = "normalised",
        write_temperature: float = 0.25,
        forgetting: float = 0.001,
        positions: Positions = "rotary",
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ):
        given = locals()  # the keywords, which are the configuration's fields
        names = [field.name for field in dataclasses.fields(MemformerConfig)]
        super().__init__(MemformerConfig(**{name: given[name] for name in names}))

    def resize_mems(self, mems: Tensor) -> Tensor:
        """A memory carried from before ``resize_memory``, (batch, any number, dim), for the model as it is now.

        The first slots keep what they hold; new ones begin as at the start of a document. (batch, slots, dim).

        Raises:
            ValueError: not a memory of this model's width and dtype.
        """
        dim, dtype = self.config.dim, next(self.writer.parameters()).dtype
        if not isinstance(mems, Tensor) or mems.dim() != 3 or not is_tensor(mems, (*mems.shape[:2], dim), dtype):
            raise ValueError(f"mems: expected {dtype} of shape (batch, slots, {dim}), got {describe(mems)}")
        initial = self.get_initial_mem(len(mems))
        return torch.cat([mems[:, : initial.shape[1]], initial[:, mems.shape[1] :]], 1)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor | None = None,
        mems: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> Results | EncOnlyResults:
        """Read one segment, and predict a target if there is one.

        Args:
            src: (batch, tokens <= enc_max_seq_len) token ids: a tensor or an array of integers, or lists of them.
            tgt: (batch, tokens <= dec_max_seq_len) token ids: the first starts the decoder, the rest are predicted.
                -100 is a masked target.
            mems: (batch, slots, dim), the memory before the segment; None for the learned initial memory.
            src_mask, tgt_mask: like ``src`` and ``tgt``, boolean or integer, True or 1 for tokens that exist. Masked
                ones change nothing anywhere; a lane whose whole segment is masked keeps its memory.
            reset: (batch,) boolean or integer: lanes that start again from the learned initial memory (a new document).

        Returns:
            ``(enc_out, mem, loss)`` as :class:`Results`, or ``(enc_out, mem)`` from an encoder-only model.

        Raises:
            ValueError: a shape, dtype, length or token id does not fit; the message says what was expected. In compiled
                code token ids are not checked, and -100 needs a ``tgt_mask`` beside it.
        """
        device = self.encoder.embedding.weight.device
        src, tgt = as_tokens(src, device), as_tokens(tgt, device)
        src_mask, tgt_mask = as_mask("src_mask", src_mask, device), as_mask("tgt_mask", tgt_mask, device)
        reset = as_mask("reset", reset, device)
        self.check_source(src, mems, src_mask, reset)
        if tgt is not None:
            tgt, tgt_mask = ignored_as_masked(tgt, tgt_mask)
            self.check_target(tgt, tgt_mask, src.shape[0])
        elif tgt_mask is not None:
            raise ValueError("tgt_mask: given without tgt")
        enc_out, mem = self.step(src, mems, src_mask, reset)
        if self.decoder is None:
            return EncOnlyResults(enc_out, mem)
        if tgt is None:
            return Results(enc_out, mem, None)
        counted = counted_targets(tgt, tgt_mask)
        count = counted.sum().clamp(min=1)
        found = target_losses(self.decoder, tgt, enc_out, src_mask, tgt_mask, src, counted, count)
        return Results(enc_out, mem, found.total)

    def encode(
        self, src: Tensor, mems: Tensor | None = None, src_mask: Tensor | None = None, reset: Tensor | None = None
    ) -> EncOnlyResults:
        """Read one segment and write the memory: what :meth:`forward` does before the decoder, with its errors."""
        device = self.encoder.embedding.weight.device
        src, src_mask = as_tokens(src, device), as_mask("src_mask", src_mask, device)
        reset = as_mask("reset", reset, device)
        self.check_source(src, mems, src_mask, reset)
        return self.step(src, mems, src_mask, reset)

    def decode(
        self,
        tgt: Tensor,
        enc_out: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        src: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, tokens, dec_num_tokens) of the token after each position, given the encoder's output.

        ``enc_out`` is (batch, source, dim). ``src`` (batch, source), from which it was made, is needed by a model with
        ``dec_overlap``.

        Raises:
            ValueError: as :meth:`forward`, for an encoder-only model, and for a source that is missing.
        """
        decoder = self.need_decoder("decode")
        device = self.encoder.embedding.weight.device
        src, tgt = as_tokens(src, device), as_tokens(tgt, device)
        src_mask, tgt_mask = as_mask("src_mask", src_mask, device), as_mask("tgt_mask", tgt_mask, device)
        tgt, tgt_mask = ignored_as_masked(tgt, tgt_mask)
        self._check_target_tokens(decoder, tgt, tgt_mask)
        if (
            not isinstance(enc_out, Tensor)
            or enc_out.dim() != 3
            or enc_out.shape[0] != tgt.shape[0]
            or enc_out.shape[2] != self.config.dim
        ):
            expected = f"({tgt.shape[0]}, tokens, {self.config.dim})"
            raise ValueError(f"enc_out: expected shape {expected}, got {describe(enc_out)}")
        check_mask("src_mask", src_mask, enc_out[..., 0])
        if src is not None:
            self.check_source(src, None, None, None)
        if (self.config.dec_overlap or src is not None) and (src is None or src.shape != enc_out.shape[:2]):
            expected = f"the source of enc_out, shape {tuple(enc_out.shape[:2])}, which dec_overlap reads"
            raise ValueError(f"src: expected {expected}, got {describe(src)}")
        return decoder(tgt, enc_out, src_mask, tgt_mask, src)

    read = generation.read
    stream = generation.stream
    generate = generation.generate

    def segments(
        self,
        src: Any,
        tgt: Targets,
        src_mask: Any,
        tgt_mask: Targets,
        reset: Targets,
        mems: Tensor | None,
    ) -> list[Segment]:
        """What :func:`~memformer.memory_replay_backprop` is given, checked, and cut into segments of the encoder's.

        Raises:
            ValueError: as :meth:`forward`.
        """
        device = self.encoder.embedding.weight.device
        src, src_mask = as_tokens(src, device), as_mask("src_mask", src_mask, device)
        tgt, tgt_mask, reset = (
            each_as_tokens(name, x, device) for name, x in (("tgt", tgt), ("tgt_mask", tgt_mask), ("reset", reset))
        )
        self.check_source(src, mems, src_mask, None, max_len=sys.maxsize)
        found = cut(self.config.enc_max_seq_len, src, tgt, src_mask, tgt_mask, reset)
        return [self._checked(index, segment) for index, segment in enumerate(found)]

    def _checked(self, index: int, segment: Segment) -> Segment:
        """A segment of a source that was checked, with boolean masks."""
        segment = segment._replace(reset=as_mask("reset", segment.reset))
        if segment.reset is not None:
            self.check_source(segment.src, None, None, segment.reset)
        tgt, tgt_mask = segment.tgt, as_mask("tgt_mask", segment.tgt_mask)
        if tgt is not None:
            tgt, tgt_mask = ignored_as_masked(tgt, tgt_mask)
            self.check_target(tgt, tgt_mask, segment.src.shape[0])
        elif tgt_mask is not None:
            raise ValueError(f"tgt_mask: segment {index} has one, but no tgt")
        return segment._replace(tgt=tgt, tgt_mask=tgt_mask)

    def check_source(
        self,
        src: Tensor,
        mems: Tensor | None,
        src_mask: Tensor | None,
        reset: Tensor | None,
        max_len: int | None = None,
    ) -> None:
        """Raise ValueError where a source does not fit; ``max_len`` is the longest allowed (default: one segment)."""
        config = self.config
        check_tokens("src", src, config.enc_num_tokens, max_len or config.enc_max_seq_len, "enc_")
        check_mask("src_mask", src_mask, src)
        batch = src.shape[0]
        if mems is not None:
            shape, dtype = (batch, config.num_memory_slots, config.dim), next(self.writer.parameters()).dtype
            if not is_tensor(mems, shape, dtype):
                raise ValueError(
                    f"mems: expected {dtype}, that of the model, of shape {shape} (batch of src, num_memory_slots, "
                    f"dim), got {describe(mems)}"
                )
        check_reset(reset, "src", batch)

    def check_target(self, tgt: Tensor, tgt_mask: Tensor | None, batch_size: int) -> None:
        """Raise ValueError where a target does not fit a source of that batch size."""
        self._check_target_tokens(self.need_decoder("a target"), tgt, tgt_mask)
        if tgt.shape[0] != batch_size:
            raise ValueError(f"tgt: expected the batch size of src, {batch_size}, got {tgt.shape[0]}")
        if tgt.shape[1] < 2:
            raise ValueError("tgt: expected at least 2 tokens, one that starts the decoder and one to predict, got 1")

    def _check_target_tokens(self, decoder: Decoder, tgt: Tensor, tgt_mask: Tensor | None) -> None:
        check_tokens("tgt", tgt, decoder.embedding.num_embeddings, self.config.dec_max_seq_len or 0, "dec_")
        check_mask("tgt_mask", tgt_mask, tgt)
        if not decoder.overlap or tgt_mask is None or not has_values(tgt_mask):
            return
        if (tgt_mask.any(1) & ~tgt_mask[:, 0]).any():
            raise ValueError(
                "tgt_mask: expected the first token of every target to exist, because dec_overlap puts the source's "
                "last ones behind it. Pad targets on the right"
            )
