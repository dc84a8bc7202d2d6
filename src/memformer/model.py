"""The Memformer: an encoder that reads and writes a memory of fixed size, and a decoder that reads the encoder.

The one place that turns a configuration into modules. Shapes: tokens (batch, length), memory (batch, slots, dim).
The model does not know the replay engine; ``rollouts.py`` joins them.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

from .config import MemformerConfig, Positions, Writer
from .generation import Generation
from .nn.attention import ContextProjection, KeysValues, Positional, causal_mask
from .nn.blocks import Block
from .nn.memory import GatedWriter, NormalisedWriter
from .nn.positions import BucketedBias, RelativeEncoding, Rotary

__all__ = ["Decoder", "EncOnlyResults", "Encoder", "Memformer", "Results", "token_losses"]


class Results(NamedTuple):
    """What an encoder-decoder returns.

    Attributes:
        enc_out: (batch, length, dim), zero where the source is masked.
        mem: (batch, slots, dim), the memory after the segment.
        dec_out: the mean loss in nats over the kept targets, a scalar; None without a target.
    """

    enc_out: Tensor
    mem: Tensor
    dec_out: Tensor | None


class EncOnlyResults(NamedTuple):
    """What an encoder-only model returns: :class:`Results` without a loss."""

    enc_out: Tensor
    mem: Tensor


class Encoder(nn.Module):
    """Reads a segment and the memory in every layer (paper, section 3.2)."""

    def __init__(self, embedding: nn.Embedding, layers: list[Block], heads: int, dropout: float):
        super().__init__()
        dim = embedding.embedding_dim
        self.embedding = embedding
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            layer.self_attention.begin_with_copies()
        self.memory_norm = nn.LayerNorm(dim)
        self.memory_projection = ContextProjection(dim, heads, len(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, src: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, length) and (batch, slots, dim) -> (batch, length, dim), zero where ``mask`` is False."""
        x = self.dropout(self.embedding(src))
        contexts = self.memory_projection(self.memory_norm(memory))
        visible = None if mask is None else _visible(mask)[:, None, None, :]
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
        dim, tokens = embedding.embedding_dim, embedding.num_embeddings
        self.overlap = overlap
        self.embedding = embedding
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            layer.self_attention.begin_with_neighbours()
        self.context_projection = ContextProjection(dim, heads, len(layers))
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, tokens)
        if tied:
            self.to_logits.weight = embedding.weight

    def forward(
        self,
        tgt: Tensor,
        enc_out: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        src: Tensor | None = None,
    ) -> Tensor:
        """(batch, length) and (batch, source, dim) -> logits (batch, length, tokens), of the token after each position.

        A masked target is seen by no other position, and its own position does not know which token it was. ``src``
        (batch, source) is needed where there is an overlap.
        """
        if self.overlap:
            assert src is not None, "an overlap needs the source"
            tgt, tgt_mask = self._with_overlap(tgt, tgt_mask, src, src_mask)
        x = self.dropout(self.embedding(tgt))
        mask = None
        if tgt_mask is not None:
            x = x * tgt_mask[..., None]
            length = tgt.shape[1]
            itself = torch.eye(length, dtype=torch.bool, device=tgt.device)
            mask = (tgt_mask[:, None, None, :] & causal_mask(length, length, tgt.device)) | itself
        context_mask = None if src_mask is None else _visible(src_mask)[:, None, None, :]
        for layer, context in zip(self.layers, self.context_projection(enc_out), strict=True):
            x = layer(x, context, mask, context_mask)
        return self.to_logits(self.norm(x[:, self.overlap :]))

    def _with_overlap(
        self, tgt: Tensor, tgt_mask: Tensor | None, src: Tensor, src_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """A target whose first token is followed by the source's last ones, and its mask.

        Where the source has fewer, the first token is repeated, so that places in the target do not depend on it.
        """
        start, rest = tgt.tensor_split([1], 1)
        last = torch.cat([start.expand(-1, self.overlap), src], 1)
        if src_mask is None:
            last = last[:, -self.overlap :]
        else:
            # Sorted by whether they exist, those that do stand behind, in their order; the repeated ones always do.
            order = F.pad(src_mask, (self.overlap, 0), value=True).byte().argsort(dim=1, stable=True)
            last = last.gather(1, order[:, -self.overlap :])
        if tgt_mask is not None:
            tgt_mask = torch.cat([tgt_mask[:, :1].expand(-1, 1 + self.overlap), tgt_mask[:, 1:]], 1)
        return torch.cat([start, last, rest], 1), tgt_mask

    def new_cache(self, batch_size: int, length: int) -> list[KeysValues]:
        """Room for the keys and values of ``length`` targets (the start token counted), for :meth:`extend`.

        The overlap, which stands between the first and the second, has its room besides.
        """
        like = self.to_logits.weight
        heads = self.context_projection.heads
        shape = (batch_size, heads, length + self.overlap, self.embedding.embedding_dim // heads)
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
        x = self.dropout(self.embedding(tgt))
        visible = None if context_mask is None else context_mask[:, None, None, :]
        for layer, kept, context in zip(cast("list[Block]", self.layers), cache, contexts, strict=True):
            x = layer.extend(x, kept, position, context, visible)
        return x

    def step(
        self,
        token: Tensor,
        position: Tensor,
        cache: Sequence[KeysValues],
        contexts: Sequence[KeysValues],
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """One target per lane, token and position (batch,) -> logits (batch, tokens) of the next. See `extend`."""
        x = self.extend(token[:, None], position[:, None], cache, contexts, context_mask)
        return self.to_logits(self.norm(x[:, 0]))


class Memformer(Generation, nn.Module):
    """A Transformer with an external memory of fixed size, for sequences of any length, segment by segment.

    Args:
        dim: width of the model.
        num_memory_slots: number K of memory slots.
        enc_num_tokens, enc_max_seq_len: the encoder's vocabulary, and the length of a segment.
        enc_depth, enc_heads: the encoder's layers, and attention heads in each.
        dec_num_tokens, dec_max_seq_len, dec_depth, dec_heads: the same for the decoder.
        dec_overlap: so many of the source's last tokens are read by the decoder too, before what it predicts: for
            targets that continue the source, in the same vocabulary. A target's mask must then keep its first token.
        encoder_only: without a decoder; the call then returns ``(enc_out, mem)``.
        num_mem_updates: how often the memory is written per segment.
        mem_update_attn_heads: heads of the writing attention.
        memory_writer: "normalised" (paper v2) or "gated" (the earlier library's); see ``nn/memory.py``.
        write_temperature: temperature of the writing attention; below 1 sharpens it (paper v2).
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
        num_mem_updates: int = 1,
        mem_update_attn_heads: int = 8,
        memory_writer: Writer = "normalised",
        write_temperature: float = 0.25,
        positions: Positions = "rotary",
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ):
        super().__init__()
        self.config = config = MemformerConfig(
            dim=dim,
            num_memory_slots=num_memory_slots,
            enc_num_tokens=enc_num_tokens,
            enc_max_seq_len=enc_max_seq_len,
            enc_depth=enc_depth,
            enc_heads=enc_heads,
            dec_num_tokens=dec_num_tokens,
            dec_max_seq_len=dec_max_seq_len,
            dec_depth=dec_depth,
            dec_heads=dec_heads,
            dec_overlap=dec_overlap,
            encoder_only=encoder_only,
            num_mem_updates=num_mem_updates,
            mem_update_attn_heads=mem_update_attn_heads,
            memory_writer=memory_writer,
            write_temperature=write_temperature,
            positions=positions,
            dropout=dropout,
            tie_embeddings=tie_embeddings,
        )
        embedding = nn.Embedding(enc_num_tokens, dim)
        nn.init.normal_(embedding.weight, std=dim**-0.5)
        layers = _layers(config, enc_depth, enc_heads, enc_max_seq_len, causal=False)
        self.encoder = Encoder(embedding, layers, enc_heads, dropout)
        writers: dict[str, type[NormalisedWriter] | type[GatedWriter]]
        writers = {"normalised": NormalisedWriter, "gated": GatedWriter}
        self.writer = writers[memory_writer](dim, num_memory_slots, mem_update_attn_heads, write_temperature)
        self.decoder: Decoder | None = None
        if encoder_only:
            if dec_num_tokens is not None or dec_max_seq_len is not None or dec_overlap:
                warnings.warn("encoder_only=True: the decoder's settings (dec_...) have no effect", stacklevel=2)
            return
        assert dec_num_tokens is not None, "the configuration checks it"
        assert dec_max_seq_len is not None, "the configuration checks it"
        if not tie_embeddings:
            embedding = nn.Embedding(dec_num_tokens, dim)
            nn.init.normal_(embedding.weight, std=dim**-0.5)
        layers = _layers(config, dec_depth, dec_heads, dec_max_seq_len + dec_overlap, causal=True)
        self.decoder = Decoder(embedding, layers, dec_heads, dropout, tie_embeddings, dec_overlap)

    def get_initial_mem(self, batch_size: int) -> Tensor:
        """The learned memory before the first segment, (batch, slots, dim)."""
        return self.writer.initial(batch_size)

    def resize_memory(self, num_memory_slots: int, *, generator: torch.Generator | None = None) -> None:
        """Give the memory another number of slots, in place.

        The first slots are kept, with what they have learned; if there are to be more, new ones are added as at
        construction, drawn from ``generator``; if there are to be fewer, the last ones are dropped. Slots never see
        each other when they are written, so a kept slot begins as before and, from the same encoder output, is written
        as before. The encoder reads all slots at once, so its output does change, as it must: by what the new slots
        hold, or for want of the dropped ones. To grow and then to shrink again gives back the same model, bit by bit.

        A memory that was carried so far needs :meth:`resize_mems`. Build optimisers, and wrap the model for
        distributed training, after this call: the parameter of the slots is a new one.

        Raises:
            ValueError: ``num_memory_slots`` is not a whole number of at least 1.
        """
        config = dataclasses.replace(self.config, num_memory_slots=num_memory_slots)
        if config != self.config:
            self.writer.resize(num_memory_slots, generator)
            self.config = config

    def resize_mems(self, mems: Tensor) -> Tensor:
        """A memory carried from before :meth:`resize_memory`, (batch, any number, dim), for the model as it is now.

        The first slots keep what they hold; new ones begin as at the start of a document. (batch, slots, dim).

        Raises:
            ValueError: not a memory of this model's width and dtype.
        """
        dim, dtype = self.config.dim, next(self.writer.parameters()).dtype
        if not isinstance(mems, Tensor) or mems.dim() != 3 or not _is_tensor(mems, (*mems.shape[:2], dim), dtype):
            raise ValueError(f"mems: expected {dtype} of shape (batch, slots, {dim}), got {_describe(mems)}")
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
            src: (batch, length <= enc_max_seq_len) token ids.
            tgt: (batch, length <= dec_max_seq_len) token ids: the first starts the decoder, the rest are predicted.
            mems: (batch, slots, dim), the memory before the segment; None for the learned initial memory.
            src_mask, tgt_mask: boolean like ``src`` and ``tgt``, True for tokens that exist. Masked ones change nothing
                anywhere; a lane whose whole segment is masked keeps its memory.
            reset: (batch,) boolean: lanes that start again from the learned initial memory (a new document).

        Returns:
            ``(enc_out, mem, loss)`` as :class:`Results`, or ``(enc_out, mem)`` from an encoder-only model.

        Raises:
            ValueError: a shape, dtype, length or token id does not fit; the message says what was expected.
        """
        self.check_source(src, mems, src_mask, reset)
        if tgt is not None:
            self.check_target(tgt, tgt_mask, src.shape[0])
        elif tgt_mask is not None:
            raise ValueError("tgt_mask: given without tgt")
        enc_out, mem = self.step(src, mems, src_mask, reset)
        if self.decoder is None:
            return EncOnlyResults(enc_out, mem)
        if tgt is None:
            return Results(enc_out, mem, None)
        losses, counted = token_losses(self.decoder, tgt, enc_out, src_mask, tgt_mask, src)
        return Results(enc_out, mem, losses.sum() / counted.sum().clamp(min=1))

    def encode(
        self, src: Tensor, mems: Tensor | None = None, src_mask: Tensor | None = None, reset: Tensor | None = None
    ) -> EncOnlyResults:
        """Read one segment and write the memory: what :meth:`forward` does before the decoder."""
        self.check_source(src, mems, src_mask, reset)
        return self.step(src, mems, src_mask, reset)

    def step(
        self, src: Tensor, mems: Tensor | None = None, src_mask: Tensor | None = None, reset: Tensor | None = None
    ) -> EncOnlyResults:
        """:meth:`encode` for inputs that were checked already: the critical path of a rollout."""
        initial = self.get_initial_mem(src.shape[0])
        mem = initial if mems is None else mems
        if reset is not None:
            mem = torch.where(reset[:, None, None], initial, mem)
        enc_out = self.encoder(src, mem, src_mask)
        written = mem
        for _ in range(self.config.num_mem_updates):
            written = self.writer(written, enc_out, src_mask)
        written = written.to(mem.dtype)
        if src_mask is not None:
            written = torch.where(src_mask.any(1)[:, None, None], written, mem)
        return EncOnlyResults(enc_out, written)

    def decode(
        self,
        tgt: Tensor,
        enc_out: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        src: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, length, dec_num_tokens) of the token after each position, given the encoder's output.

        ``src``, of which ``enc_out`` was made, is needed by a model with ``dec_overlap``.

        Raises:
            ValueError: as :meth:`forward`, for an encoder-only model, and for a source that is missing.
        """
        decoder = self._decoder("decode")
        self._check_target_tokens(decoder, tgt, tgt_mask)
        if enc_out.dim() != 3 or enc_out.shape[0] != tgt.shape[0] or enc_out.shape[2] != self.config.dim:
            expected = f"({tgt.shape[0]}, length, {self.config.dim})"
            raise ValueError(f"enc_out: expected shape {expected}, got {_describe(enc_out)}")
        if src_mask is not None:
            _check_mask("src_mask", src_mask, enc_out[..., 0])
        if src is not None:
            self.check_source(src, None, None, None)
        if (self.config.dec_overlap or src is not None) and (src is None or src.shape != enc_out.shape[:2]):
            expected = f"the source of enc_out, shape {tuple(enc_out.shape[:2])}, which dec_overlap reads"
            raise ValueError(f"src: expected {expected}, got {_describe(src)}")
        return decoder(tgt, enc_out, src_mask, tgt_mask, src)

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
        _check_tokens("src", src, config.enc_num_tokens, max_len or config.enc_max_seq_len, "enc")
        _check_mask("src_mask", src_mask, src)
        batch = src.shape[0]
        if mems is not None:
            shape, dtype = (batch, config.num_memory_slots, config.dim), next(self.writer.parameters()).dtype
            if not _is_tensor(mems, shape, dtype):
                raise ValueError(
                    f"mems: expected {dtype}, that of the model, of shape {shape} (batch of src, num_memory_slots, "
                    f"dim), got {_describe(mems)}"
                )
        if reset is not None and not _is_tensor(reset, (batch,), torch.bool):
            raise ValueError(
                f"reset: expected torch.bool of shape ({batch},), one per lane of src, got {_describe(reset)}"
            )

    def check_target(self, tgt: Tensor, tgt_mask: Tensor | None, batch_size: int) -> None:
        """Raise ValueError where a target does not fit a source of that batch size."""
        self._check_target_tokens(self._decoder("a target"), tgt, tgt_mask)
        if tgt.shape[0] != batch_size:
            raise ValueError(f"tgt: expected the batch size of src, {batch_size}, got {tgt.shape[0]}")
        if tgt.shape[1] < 2:
            raise ValueError("tgt: expected at least 2 tokens, one that starts the decoder and one to predict, got 1")

    def _check_target_tokens(self, decoder: Decoder, tgt: Tensor, tgt_mask: Tensor | None) -> None:
        _check_tokens("tgt", tgt, decoder.embedding.num_embeddings, self.config.dec_max_seq_len or 0, "dec")
        _check_mask("tgt_mask", tgt_mask, tgt)
        if not decoder.overlap or tgt_mask is None or torch.compiler.is_compiling():
            return
        if (tgt_mask.any(1) & ~tgt_mask[:, 0]).any():
            raise ValueError(
                "tgt_mask: expected the first token of every target to exist, for dec_overlap puts the source's last "
                "ones behind it. Pad targets on the right"
            )

    def _decoder(self, purpose: str) -> Decoder:
        if self.decoder is None:
            raise ValueError(f"{purpose}: this model is encoder_only and has no decoder")
        return self.decoder

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; the folder is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Memformer:
        """The model that :meth:`save_pretrained` wrote, on the CPU, in its dtype.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or does not fit the other.
        """
        config_file, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        for file in (config_file, weights):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: not found; a model's folder holds config.json and model.safetensors")
        try:
            values = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config_file}: not a JSON file ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{config_file}: expected a JSON object with the model's settings")
        model = cls(**MemformerConfig.from_dict(values).to_dict())
        try:
            dtypes = {tensor.dtype for tensor in load_file(weights).values()}
            model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
            load_model(model, weights)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{weights}: damaged, or not the weights of {config_file}: {error}") from error
        return model


def token_losses(
    decoder: Decoder,
    tgt: Tensor,
    enc_out: Tensor,
    src_mask: Tensor | None = None,
    tgt_mask: Tensor | None = None,
    src: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each predicted token in nats, zero where it does not count, and whether it counts.

    Both (batch, length - 1) for ``tgt`` (batch, length). A kept token counts if another kept one stands before it; the
    first one starts the decoder.
    """
    kept = None if tgt_mask is None else tgt_mask[:, :-1]
    logits = decoder(tgt[:, :-1], enc_out, src_mask, kept, src)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    losses = F.cross_entropy(logits.transpose(1, 2), tgt[:, 1:].long(), reduction="none")
    if tgt_mask is None:
        return losses, torch.ones_like(tgt[:, 1:], dtype=torch.bool)
    counted = tgt_mask[:, 1:] & (tgt_mask.cumsum(1)[:, :-1] > 0)
    return losses * counted, counted


def _layers(config: MemformerConfig, depth: int, heads: int, max_len: int, causal: bool) -> list[Block]:
    def positions() -> Positional:
        head_dim = config.dim // heads
        if config.positions == "bucketed":
            return BucketedBias(heads, causal)
        return {"rotary": Rotary, "relative": RelativeEncoding}[config.positions](head_dim, max_len)

    return [Block(config.dim, heads, positions(), causal, config.dropout) for _ in range(depth)]


def _visible(mask: Tensor) -> Tensor:
    """The mask, but all True in lanes where it is all False: attention over nothing has no value, and these lanes'
    outputs are zeroed anyway."""
    return mask | ~mask.any(1, keepdim=True)


def _check_tokens(name: str, tokens: Tensor, vocabulary: int, max_len: int, prefix: str) -> None:
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: expected token ids, torch.int64 or int32 of shape (batch, length), got {_describe(tokens)}"
        )
    batch, length = tokens.shape
    if not batch or not length:
        raise ValueError(f"{name}: expected at least one lane and one token, got shape {tuple(tokens.shape)}")
    if length > max_len:
        raise ValueError(
            f"{name}: expected at most {prefix}_max_seq_len = {max_len} tokens, got {length}. Cut it into segments and "
            "carry the memory (memory_replay_backprop does), or build the model with a longer one"
        )
    if torch.compiler.is_compiling():
        return
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name}: token id {low if low < 0 else high} is outside the table of {prefix}_num_tokens = {vocabulary} "
            f"(ids 0 to {vocabulary - 1})"
        )


def _check_mask(name: str, mask: Tensor | None, like: Tensor) -> None:
    if mask is not None and not _is_tensor(mask, tuple(like.shape), torch.bool):
        raise ValueError(
            f"{name}: expected torch.bool of its tokens' shape {tuple(like.shape)}, True for tokens that exist, "
            f"got {_describe(mask)}"
        )


def _is_tensor(x: object, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return isinstance(x, Tensor) and tuple(x.shape) == shape and x.dtype == dtype


def _describe(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
