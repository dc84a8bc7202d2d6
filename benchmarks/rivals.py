"""Other packages' models as contestants: the earlier library of this name, RMT, Transformer-XL, Compressive.

They come from the package index and are looked for only when they are asked for, in a folder made by
:data:`INSTALL_RIVALS` or :data:`INSTALL_EARLIER`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from memformer import MemformerConfig
from memformer.bench.contestants import OWN, Build, Contestant, EncoderDecoder, of_equal_size, parameters
from memformer.tasks import START, Episode

__all__ = [
    "INSTALL_EARLIER",
    "INSTALL_RIVALS",
    "Folders",
    "earlier_settings",
    "importing",
]

INSTALL_RIVALS = (
    "pip install --no-deps --target FOLDER x-transformers==2.31.10 recurrent-memory-transformer-pytorch==0.7.0 "
    "compressive-transformer-pytorch==0.4.0 mogrifier==0.0.5 einops==0.8.2 einx==0.4.3 frozendict==2.5.1 loguru==0.7.3 "
    "hyper-connections==0.4.11 torch-einops-utils==0.2.0"
)
INSTALL_EARLIER = "pip install --no-deps --target FOLDER memformer==0.3.1 einops==0.8.2"


class Earlier(EncoderDecoder):
    """The library that had this name before, version 0.3.1.

    Its feed-forwards have one width, and its writer is larger: its width is what gives it as many parameters.
    """

    def __init__(self, config: MemformerConfig, folder: Path | None):
        wanted = parameters(config)  # by this library, which is put away while the other is imported
        with importing(folder, "memformer") as package:

            def make(dim: int) -> nn.Module:
                network: nn.Module = package.Memformer(**earlier_settings(config) | {"dim": dim})
                return network

            super().__init__(of_equal_size(make, _dims(config), wanted))

    def encode(self, tokens: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        encoded, memory, _ = self.network(tokens, mems=memory)
        return encoded, memory

    def decode(self, tokens: Tensor, encoded: Tensor, _sources: Tensor) -> Tensor:
        logits: Tensor = self.network.decoder.net(tokens, context=encoded)  # type: ignore[union-attr, operator]
        return logits


class DecoderOnly(Contestant):
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
        mean = predicted.new_zeros(()) + sum(extra_losses) / len(extra_losses)
        found = torch.stack(logits, 1) if logits else tokens[:, :0].float()
        return found, (memory, tokens[:, -1, -1:]), mean


class RMT(DecoderOnly):
    """recurrent-memory-transformer-pytorch, without the memories of Transformer-XL that it can have besides."""

    def __init__(self, config: MemformerConfig, folder: Path | None):
        depth = _depth(config)

        def make(feed: int) -> nn.Module:
            network: nn.Module = package.RecurrentMemoryTransformer(
                num_tokens=config.enc_num_tokens,
                num_memory_tokens=config.num_memory_slots,
                dim=config.dim,
                depth=depth,
                causal=True,
                dim_head=config.dim // config.enc_heads,
                heads=config.enc_heads,
                seq_len=config.segment_length,
                use_flash_attn=True,
                use_xl_memories=False,
                ff_mult=1.5 * (feed + 0.5) / config.dim,
            )
            return network

        with importing(folder, "recurrent_memory_transformer_pytorch") as package:
            super().__init__(of_equal_size(make, _feeds(config), parameters(config)))

    def step(self, tokens: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor | float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it asks for kernels in a way that torch no longer likes
            logits, memory, _ = self.network(tokens, memory)
        return logits, memory, 0.0


class TransformerXL(DecoderOnly):
    """x-transformers with ``max_mem_len``; the package lets no gradient through its memories."""

    def __init__(self, config: MemformerConfig, folder: Path | None, times: float = 1):
        depth = _depth(config)

        def make(feed: int) -> nn.Module:
            layers = package.Decoder(
                dim=config.dim,
                depth=depth,
                heads=config.enc_heads,
                attn_dim_head=config.dim // config.enc_heads,
                rel_pos_bias=True,
                ff_mult=feed / config.dim,
            )
            network: nn.Module = package.TransformerWrapper(
                num_tokens=config.enc_num_tokens,
                max_seq_len=config.segment_length,
                attn_layers=layers,
                max_mem_len=max(1, round(times * config.num_memory_slots / depth)),
            )
            return network

        with importing(folder, "x_transformers") as package:
            super().__init__(of_equal_size(make, _feeds(config), parameters(config)))

    def step(self, tokens: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor | float]:
        logits, memory = self.network(tokens, mems=memory, return_mems=True)
        return logits, memory, 0.0


class Compressive(DecoderOnly):
    """compressive-transformer-pytorch: four tokens' states are pressed into one; gradients stop at its memories.

    Memory in the upper half of the layers, four times as many states as compressed ones, gates on the residual path and
    gated feed-forwards, as its documentation has them; the dropout, which is for text seen many times, is left out. The
    gates are larger than its feed-forwards: its width is what gives it as many parameters.
    """

    RATIO = 4

    def __init__(self, config: MemformerConfig, folder: Path | None):
        depth = _depth(config)
        layers = range(depth // 2 + 1, depth + 1)

        def make(dim: int) -> nn.Module:
            compressed = max(1, round(config.num_memory_slots * config.dim / (len(layers) * dim * (self.RATIO + 1))))
            memory = max(self.RATIO * compressed, config.segment_length)
            network: nn.Module = package.CompressiveTransformer(
                num_tokens=config.enc_num_tokens,
                dim=dim,
                depth=depth,
                seq_len=config.segment_length,
                heads=config.enc_heads,
                mem_len=memory,
                cmem_len=max(compressed, memory // self.RATIO),
                cmem_ratio=self.RATIO,
                memory_layers=layers,
                reconstruction_loss_weight=1,
                gru_gated_residual=True,
                ff_glu=True,
            )
            return network

        with importing(folder, "compressive_transformer_pytorch") as package:
            super().__init__(of_equal_size(make, _dims(config), parameters(config)))

    def step(self, tokens: Tensor, memory: Any) -> tuple[Tensor, Any, Tensor | float]:
        logits, memory, extra_loss = self.network(tokens, memories=memory)
        # It detaches the weight of its keys and values in place, which would then never be trained again.
        self.network.requires_grad_()
        return logits, tuple(memory), extra_loss.squeeze()


def _depth(config: MemformerConfig) -> int:
    """A decoder-only model has as many layers as both stacks together."""
    return config.enc_depth + config.dec_depth


def _dims(config: MemformerConfig) -> range:
    return range(2 * config.enc_heads, 2 * config.dim + 1, config.enc_heads)


def _feeds(config: MemformerConfig) -> range:
    return range(1, 32 * config.dim)


def earlier_settings(config: MemformerConfig) -> dict[str, Any]:
    """The keywords that the earlier library's model has too."""
    of_stack = ("num_tokens", "max_seq_len", "depth", "heads")
    names = [f"{stack}_{name}" for stack in ("enc", "dec") for name in of_stack]
    names += ["dim", "num_memory_slots", "num_mem_updates", "mem_update_attn_heads"]
    return {name: getattr(config, name) for name in names}


@contextlib.contextmanager
def importing(folder: Path | None, package: str) -> Iterator[ModuleType]:
    """A package out of a folder. Where it has this library's name, this library's modules are put aside meanwhile.

    Raises:
        ValueError: it is not there.
    """
    own = package == "memformer"
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


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where the other packages are."""

    rivals: Path | None = None
    """Folder of RMT, Transformer-XL and Compressive; the error without it says what to install there."""
    earlier: Path | None = None
    """Folder of the earlier library, memformer 0.3.1."""

    def entrants(self, named: Sequence[str] = (), states: Sequence[float] = ()) -> dict[str, Build]:
        """This model with its memory and without, and each rival whose folder is given or that is named.

        Args:
            named: contestants that were asked for.
            states: Transformer-XL takes part once with each of these multiples of this model's state, as
                "Transformer-XL x 8"; without any it carries what this model does.
        """
        rivals: dict[str, Build] = {"earlier": functools.partial(Earlier, folder=self.earlier)}
        rivals["RMT"] = functools.partial(RMT, folder=self.rivals)
        for times in states:
            rivals[f"Transformer-XL x {times:g}"] = functools.partial(TransformerXL, folder=self.rivals, times=times)
        if not states:
            rivals["Transformer-XL"] = functools.partial(TransformerXL, folder=self.rivals)
        rivals["Compressive"] = functools.partial(Compressive, folder=self.rivals)
        there = {name: (self.earlier if name == "earlier" else self.rivals) is not None for name in rivals}
        return OWN | {name: build for name, build in rivals.items() if there[name] or name in named}

    @property
    def missing(self) -> Iterator[str]:
        """For a report: what could take part too."""
        if self.rivals is None:
            yield f"rivals: --rivals FOLDER, made by `{INSTALL_RIVALS}`"
        if self.earlier is None:
            yield f"the earlier library: --earlier FOLDER, made by `{INSTALL_EARLIER}`"
