"""This model and others with a memory, behind one interface, so that one loop trains and judges them all alike.

The others come from the package index and are looked for only when they are asked for, in a folder made by
:data:`INSTALL_RIVALS` or :data:`INSTALL_EARLIER`. Knows neither data nor optimiser.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..config import Positions
from ..model import Memformer
from ..tasks import START, Episode

__all__ = ["CONTESTANTS", "INSTALL_EARLIER", "INSTALL_RIVALS", "Contestant", "Outcome", "Sizes", "build"]

INSTALL_RIVALS = (
    "pip install --no-deps --target FOLDER x-transformers==2.31.10 recurrent-memory-transformer-pytorch==0.7.0 "
    "compressive-transformer-pytorch==0.4.0 mogrifier==0.0.5 einops==0.8.2 einx==0.4.3 frozendict==2.5.1 loguru==0.7.3 "
    "hyper-connections==0.4.11 torch-einops-utils==0.2.0"
)
INSTALL_EARLIER = "pip install --no-deps --target FOLDER memformer==0.3.1 einops==0.8.2"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the contestants are: this model's own sizes. The others get as many parameters and as much state.

    Attributes:
        vocabulary: number of token ids.
        length: tokens per segment.
        dim, heads, encoder_depth, decoder_depth, slots: of :class:`~memformer.Memformer`. A decoder-only model has as
            many layers as both stacks together.
        positions, overlap: of this model alone; ``overlap`` is its ``dec_overlap``.
        carried: how many numbers a model whose memory grows with tokens may carry from segment to segment, roughly;
            None for as many as this model does, slots x dim.
    """

    vocabulary: int
    length: int
    dim: int = 64
    heads: int = 4
    encoder_depth: int = 1
    decoder_depth: int = 1
    slots: int = 16
    positions: Positions = "rotary"
    overlap: int = 0
    carried: int | None = None

    @property
    def depth(self) -> int:
        return self.encoder_depth + self.decoder_depth

    @property
    def numbers(self) -> int:
        """``carried``, or what takes its place."""
        return self.slots * self.dim if self.carried is None else self.carried

    @property
    def model(self) -> dict[str, Any]:
        """The keywords of this model and of the earlier library's."""
        return {
            "dim": self.dim,
            "num_memory_slots": self.slots,
            "mem_update_attn_heads": self.heads,
            "enc_num_tokens": self.vocabulary,
            "enc_max_seq_len": self.length,
            "enc_depth": self.encoder_depth,
            "enc_heads": self.heads,
            "dec_num_tokens": self.vocabulary,
            "dec_max_seq_len": self.length + 1,
            "dec_depth": self.decoder_depth,
            "dec_heads": self.heads,
        }


class Outcome(NamedTuple):
    """What a contestant makes of an episode.

    Attributes:
        logits: (answers, vocabulary), in the order of ``episode.tokens[episode.answers]``; each made from what stands
            before the answer alone.
        state: to go on with later segments of the same lanes; without a graph.
        extra_loss: what the contestant wants added to the loss; a scalar.
    """

    logits: Tensor
    state: Any
    extra_loss: Tensor

    def loss(self, episode: Episode) -> Tensor:
        """What is trained: the mean loss in nats over the episode's answers, and the extra loss."""
        return F.cross_entropy(self.logits, episode.tokens[episode.answers]) + self.extra_loss


class Contestant(nn.Module):
    """A model that reads an episode segment by segment and predicts its answers."""

    name: ClassVar[str]

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, episode: Episode, state: Any = None) -> Outcome:
        """Predict the answers of an episode, which goes on from ``state`` where there is one.

        Raises:
            ValueError: there is an answer in the first segment of all.
        """
        if state is None and episode.answers[:, 0].any():
            raise ValueError("answers: expected none in the first segment, for nothing stands before it")
        logits, state, extra_loss = self.read(episode, state)
        wanted = episode.answers[:, episode.answers.any(2).any(0)]
        detached = tree_map_only(Tensor, Tensor.detach, state)
        return Outcome(logits[wanted], detached, extra_loss)

    def read(self, episode: Episode, state: Any) -> tuple[Tensor, Any, Tensor]:
        """Logits (batch, segments with an answer, length, vocabulary), the state, and an extra loss."""
        raise NotImplementedError

    @torch.no_grad()
    def numbers_carried(self, length: int) -> int:
        """How many numbers a lane carries from segment to segment of ``length`` tokens when its memory is full.

        Tensors are counted. Token ids are not: each contestant keeps the last, or those of the last segment.
        """
        tokens = torch.zeros(1, 2, length, dtype=torch.int64)
        episode, state = Episode(tokens, torch.zeros_like(tokens, dtype=torch.bool)), None
        episode.answers[:, -1] = True
        counts = [-2, -1]
        while counts[-1] > counts[-2]:
            _, state, _ = self(episode, state)
            counts.append(sum(x.numel() for x in tree_leaves(state) if isinstance(x, Tensor) and x.is_floating_point()))
        return counts[-1]


class _EncoderDecoder(Contestant):
    """Reads a segment and predicts the next; its decoder runs once, on all segments in which there is an answer.

    The state is the memory and the last segment, which has not been read.
    """

    def encode(self, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def decode(self, tokens: Tensor, encoded: Tensor, sources: Tensor) -> Tensor:
        """Logits after each of ``tokens``; ``encoded`` is what became of ``sources``. All first (batch, length)."""
        raise NotImplementedError

    def read(self, episode: Episode, state: Any) -> tuple[Tensor, Any, Tensor]:
        memory, last = (None, None) if state is None else state
        encoded, sources, targets = [], [], []
        for segment, wanted in zip(episode.tokens.unbind(1), episode.answers.any(2).any(0).tolist(), strict=True):
            if last is not None:
                seen, memory = self.encode(last, memory)
                if wanted:
                    encoded.append(seen)
                    sources.append(last)
                    targets.append(segment)
            last = segment
        started = F.pad(torch.stack(targets, 1)[..., :-1], (1, 0), value=START)
        logits = self.decode(*(x.flatten(0, 1) for x in (started, torch.stack(encoded, 1), torch.stack(sources, 1))))
        return logits.unflatten(0, started.shape[:2]), (memory, last), logits.new_zeros(())


class _This(_EncoderDecoder):
    name = "memformer"
    network: Memformer

    @classmethod
    def build(cls, sizes: Sizes, _folder: Path | None) -> _This:
        return cls(_memformer(sizes))

    def encode(self, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.network.step(tokens, memory)

    def decode(self, tokens: Tensor, encoded: Tensor, sources: Tensor) -> Tensor:
        assert self.network.decoder is not None, "it is built with one"
        return self.network.decoder(tokens, encoded, src=sources)


class _MemoryOff(_This):
    """Each segment starts from the initial memory, so a prediction sees one segment back and no further."""

    name = "memory off"

    def encode(self, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return super().encode(tokens, None)[0], None


class _Earlier(_EncoderDecoder):
    """The library that had this name before, version 0.3.1.

    Its feed-forwards have one width, and its writer is larger: its width is what gives it as many parameters.
    """

    name = "earlier"

    @classmethod
    def build(cls, sizes: Sizes, folder: Path | None) -> _Earlier:
        with _importing(folder, "memformer", own=True) as module:
            return cls(_of_equal_size(lambda dim: module.Memformer(**sizes.model | {"dim": dim}), _dims(sizes), sizes))

    def encode(self, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        encoded, memory, _ = self.network(tokens, mems=memory)
        return encoded, memory

    def decode(self, tokens: Tensor, encoded: Tensor, _sources: Tensor) -> Tensor:
        logits: Tensor = self.network.decoder.net(tokens, context=encoded)  # type: ignore[union-attr, operator]
        return logits


class _DecoderOnly(Contestant):
    """Reads the tokens in a row, in pieces that are shifted by one, so that each call predicts its own segment.

    The state is what the model keeps, and the last token.
    """

    def step(self, tokens: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor | float]:
        """Logits (batch, length, vocabulary) after a piece, what is kept, and an extra loss."""
        raise NotImplementedError

    def read(self, episode: Episode, state: Any) -> tuple[Tensor, Any, Tensor]:
        tokens = episode.tokens
        memory, last = (None, tokens.new_full((len(tokens), 1), START)) if state is None else state
        shifted = torch.cat([last, tokens.flatten(1)[:, :-1]], 1).view_as(tokens)
        logits, extra_losses = [], []
        for piece, wanted in zip(shifted.unbind(1), episode.answers.any(2).any(0).tolist(), strict=True):
            predicted, memory, extra_loss = self.step(piece, memory)
            extra_losses.append(extra_loss)
            if wanted:
                logits.append(predicted)
        mean = logits[0].new_zeros(()) + sum(extra_losses) / len(extra_losses)
        return torch.stack(logits, 1), (memory, tokens[:, -1, -1:]), mean


class _RMT(_DecoderOnly):
    """recurrent-memory-transformer-pytorch, without the memories of Transformer-XL that it can have besides."""

    name = "RMT"

    @classmethod
    def build(cls, sizes: Sizes, folder: Path | None) -> _RMT:
        def make(feed: int) -> nn.Module:
            network: nn.Module = package.RecurrentMemoryTransformer(
                num_tokens=sizes.vocabulary, num_memory_tokens=sizes.slots, dim=sizes.dim, depth=sizes.depth,
                causal=True, dim_head=sizes.dim // sizes.heads, heads=sizes.heads, seq_len=sizes.length,
                use_flash_attn=True, use_xl_memories=False, ff_mult=1.5 * (feed + 0.5) / sizes.dim,
            )  # fmt: skip
            return network

        with _importing(folder, "recurrent_memory_transformer_pytorch") as package:
            return cls(_of_equal_size(make, _feeds(sizes), sizes))

    def step(self, tokens: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor | float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it asks for kernels in a way that torch no longer likes
            logits, memory, _ = self.network(tokens, memory)
        return logits, memory, 0.0


class _TransformerXL(_DecoderOnly):
    """x-transformers with ``max_mem_len``; the package lets no gradient through its memories."""

    name = "Transformer-XL"

    @classmethod
    def build(cls, sizes: Sizes, folder: Path | None) -> _TransformerXL:
        def make(feed: int) -> nn.Module:
            layers = package.Decoder(
                dim=sizes.dim, depth=sizes.depth, heads=sizes.heads, attn_dim_head=sizes.dim // sizes.heads,
                rel_pos_bias=True, ff_mult=feed / sizes.dim,
            )  # fmt: skip
            network: nn.Module = package.TransformerWrapper(
                num_tokens=sizes.vocabulary, max_seq_len=sizes.length, attn_layers=layers,
                max_mem_len=max(1, round(sizes.numbers / (sizes.depth * sizes.dim))),
            )  # fmt: skip
            return network

        with _importing(folder, "x_transformers") as package:
            return cls(_of_equal_size(make, _feeds(sizes), sizes))

    def step(self, tokens: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor | float]:
        logits, memory = self.network(tokens, mems=memory, return_mems=True)
        return logits, memory, 0.0


class _Compressive(_DecoderOnly):
    """compressive-transformer-pytorch: four tokens' states are pressed into one; gradients stop at its memories.

    Memory in the upper half of the layers, four times as many states as compressed ones, gates on the residual path and
    gated feed-forwards, as its documentation has them; the dropout, which is for text seen many times, is left out. The
    gates are larger than its feed-forwards: its width is what gives it as many parameters.
    """

    name = "Compressive"
    RATIO = 4

    @classmethod
    def build(cls, sizes: Sizes, folder: Path | None) -> _Compressive:
        layers = range(sizes.depth // 2 + 1, sizes.depth + 1)

        def make(dim: int) -> nn.Module:
            compressed = max(1, round(sizes.numbers / (len(layers) * dim * (cls.RATIO + 1))))
            memory = max(cls.RATIO * compressed, sizes.length)
            network: nn.Module = package.CompressiveTransformer(
                num_tokens=sizes.vocabulary, dim=dim, depth=sizes.depth, seq_len=sizes.length, heads=sizes.heads,
                mem_len=memory, cmem_len=max(compressed, memory // cls.RATIO), cmem_ratio=cls.RATIO,
                memory_layers=layers, reconstruction_loss_weight=1, gru_gated_residual=True, ff_glu=True,
            )  # fmt: skip
            return network

        with _importing(folder, "compressive_transformer_pytorch") as package:
            return cls(_of_equal_size(make, _dims(sizes), sizes))

    def step(self, tokens: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor | float]:
        logits, memory, extra_loss = self.network(tokens, memories=memory)
        # It detaches the weight of its keys and values in place, which would then never be trained again.
        self.network.requires_grad_()
        return logits, tuple(memory), extra_loss.squeeze()


def _memformer(sizes: Sizes) -> Memformer:
    return Memformer(**sizes.model, positions=sizes.positions, dec_overlap=sizes.overlap)


def _dims(sizes: Sizes) -> range:
    return range(2 * sizes.heads, 2 * sizes.dim + 1, sizes.heads)


def _feeds(sizes: Sizes) -> range:
    return range(1, 32 * sizes.dim)


def _of_equal_size(make: Callable[[int], nn.Module], choices: Sequence[int], sizes: Sizes) -> nn.Module:
    """The network whose number of parameters is nearest to this model's; ``make`` takes a size to choose."""

    def count(make: Callable[[], nn.Module]) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in make().parameters())

    target = count(lambda: _memformer(sizes))
    first = bisect.bisect_left(choices, target, key=lambda choice: count(lambda: make(choice)))
    near = choices[max(0, first - 1) : first + 1]
    counts = [abs(count(lambda choice=choice: make(choice)) - target) for choice in near]  # type: ignore[misc]
    return make(near[counts.index(min(counts))])


@contextlib.contextmanager
def _importing(folder: Path | None, package: str, own: bool = False) -> Iterator[ModuleType]:
    """A package out of a folder. ``own``: it has this library's name, whose modules are put aside meanwhile.

    Raises:
        ValueError: it is not there.
    """
    option, command = ("earlier", INSTALL_EARLIER) if own else ("rivals", INSTALL_RIVALS)
    if folder is None or not (folder / package).is_dir():
        raise ValueError(f"{option}: expected a folder made by `{command}`, got {folder}")
    mine = {name: sys.modules.pop(name) for name in list(sys.modules) if own and name.split(".")[0] == package}
    place = 0 if own else len(sys.path)
    sys.path.insert(place, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield importlib.import_module(package)
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if own and name.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(mine)


_ALL: dict[str, Any] = {kind.name: kind for kind in (_This, _MemoryOff, _Earlier, _RMT, _TransformerXL, _Compressive)}

CONTESTANTS = tuple(_ALL)
"""Their names."""


def build(name: str, sizes: Sizes, *, rivals: Path | None = None, earlier: Path | None = None) -> Contestant:
    """A contestant with new weights, drawn from torch's global generator.

    Args:
        name: one of :data:`CONTESTANTS`.
        sizes: this model's; see there.
        rivals: a folder made by :data:`INSTALL_RIVALS`, for those that need it.
        earlier: a folder made by :data:`INSTALL_EARLIER`, for "earlier".

    Raises:
        ValueError: an unknown name, or a folder without the package.
    """
    if name not in _ALL:
        raise ValueError(f"contestants: expected some of {', '.join(CONTESTANTS)}, got {name!r}")
    contestant: Contestant = _ALL[name].build(sizes, earlier if name == _Earlier.name else rivals)
    return contestant
