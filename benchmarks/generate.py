"""Generation after long contexts, here and in other libraries: tokens per second and bytes of state, in one run.

Weights are random, for only speed and size are measured; batch 1, the likeliest token each time. All have the same
vocabulary, width, heads and segment, and feed-forwards that give them the same number of parameters. Each generates as
its documentation says, with every cache that it has. Transformer-XL keeps two segments. RMT has as many memory tokens
as there are slots here; as is its default ("RMT + XL") it keeps a segment beside them.

Two do full attention: x-transformers, and a plain Transformer whose cache is allocated beforehand, the best that full
attention can do. They read the beginning of the context; the rest of their cache is filled with copies, which have the
same size and take the same time, for reading costs the square of a context's length.

Tensors are counted, not formulas. *Carried* is what must be kept to go on another day, *working* also what is kept from
token to token; both at their largest. *Keys* is at how many positions keys are computed for each token that comes out.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memformer import Memformer
from memformer.bench.contestants import number_of_parameters, of_equal_size
from memformer.bench.meters import check_no_dropout, machine, spread
from memformer.config import check_count
from memformer.nn.attention import merge_heads, split_heads
from memformer.nn.positions import Rotary
from memformer.settings import ModelSettings

from .rivals import importing

__all__ = ["Generate", "run"]

BYTES, START = 256, 256
FULL_WINDOW = 8
"""Tokens over which the rate of full attention is measured; the others' is over a segment, its end included."""
MODEL = ModelSettings(dim=256, slots=32, enc_depth=2, dec_depth=4, heads=4, dec_overlap=0, tie_embeddings=False)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Tokens per second and bytes of state after long contexts, here and in other libraries."""

    rivals: Path | None = None
    """Folder of the other libraries; without it only a plain Transformer takes part beside this model."""
    contexts: tuple[int, ...] = (1024, 8192, 65536)
    """Tokens before those that are timed, multiples of ``read``; a table for each."""
    read: int = 1024
    """Tokens of the context that full attention reads itself."""
    segment_tokens: int = 64
    """Tokens in a segment."""
    windows: int = 5
    """How often a rate is measured, each time over a segment (8 tokens for full attention), after a warm-up."""
    model: ModelSettings = MODEL
    rival_depth: int = 8
    """Layers of the others, whose feed-forwards are then as wide as gives all the same number of parameters."""

    def __post_init__(self) -> None:
        for name in ("read", "segment_tokens", "windows", "rival_depth"):
            check_count(name, getattr(self, name))
        check_no_dropout(self.model)
        if not self.contexts or any(length < 1 or length % self.read for length in self.contexts):
            raise ValueError(f"contexts: expected multiples of read, {self.read}, got {self.contexts}")

    @property
    def longest(self) -> int:
        """Tokens of the longest text, and room to spare."""
        return max(self.contexts) + 2 * (self.windows + 2) * max(self.segment_tokens, FULL_WINDOW)


class Measured(NamedTuple):
    """What came of one context: seconds of reading, tokens per second, keys per token, bytes."""

    reading: float
    rates: list[float]
    keys: float
    carried: int
    working: int


class Entry:
    """A way to generate. ``write(context, count)`` calls ``came`` once for each token, and maybe before while it reads.

    Args:
        network: its parameters are counted.
        keys: modules that compute keys, the first of each stack.
        window: the rate is measured over this many tokens: a whole segment, where there are segments.
    """

    reads = True
    """Whether it reads its whole context."""

    def __init__(self, network: nn.Module, keys: Sequence[nn.Module], window: int):
        self.parameters = number_of_parameters(network.eval())
        self.window, self.positions, self.carried, self.working, self.lost = window, 0, 0, 0, 0.0
        self.times: list[float] = []
        self.marks: list[int] = []
        for module in keys:
            module.register_forward_pre_hook(self._count)

    def _count(self, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.positions += given[0].shape[1]

    def write(self, context: Tensor, count: int) -> None:
        raise NotImplementedError

    def came(self, carried: Callable[[], int], working: Callable[[], int]) -> None:
        """A token came, and these count the bytes that are used again. The time that counting takes is taken off."""
        now = time.perf_counter()
        self.times.append(now - self.lost)
        self.marks.append(self.positions)
        self.carried, self.working = max(self.carried, carried()), max(self.working, working())
        self.lost += time.perf_counter() - now

    def measure(self, context: Tensor, windows: int) -> Measured:
        self.times, self.marks = [], []
        self.lost, self.positions, self.carried, self.working = 0.0, 0, 0, 0
        count = 1 + self.window * (1 + windows)  # the first token ends the reading, the first window warms up
        began = time.perf_counter()
        self.write(context, count)
        times, marks = self.times[-count :: self.window], self.marks[-count :: self.window]
        return Measured(
            reading=times[0] - began,
            rates=[self.window / (b - a) for a, b in pairwise(times[1:])],
            keys=(marks[-1] - marks[1]) / (windows * self.window),
            carried=self.carried,
            working=self.working,
        )


def _nbytes(state: object) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


class This(Entry):
    def __init__(self, settings: Generate):
        config = settings.model.memformer_config(BYTES + 1, settings.segment_tokens)
        self.model = Memformer(**config.to_dict())
        assert self.model.decoder is not None, "it was made with one"
        stacks = self.model.encoder, self.model.decoder
        super().__init__(self.model, [first(stack, "to_qkv") for stack in stacks], settings.segment_tokens)

    def write(self, context: Tensor, count: int) -> None:
        stream = self.model.stream(context, count, start=START, temperature=0)
        for _ in stream:
            self.came(lambda: stream.state.nbytes, lambda: stream.nbytes)


class TransformerXL(Entry):
    def __init__(self, settings: Generate, package: ModuleType, parameters: int):
        size, length = settings.model, settings.segment_tokens

        def make(feed: int) -> nn.Module:
            network: nn.Module = package.TransformerWrapper(
                num_tokens=BYTES,
                max_seq_len=length,
                max_mem_len=2 * length,
                attn_layers=_layers(settings, package, feed),
            )
            return network

        network = of_equal_size(make, range(1, 32 * size.dim), parameters)
        self.generator = package.XLAutoregressiveWrapper(network)
        super().__init__(network, [first(network, "to_k")], length)
        network.register_forward_hook(self._came, with_kwargs=True)

    def _came(self, _module: nn.Module, given: tuple[Tensor], named: dict[str, Any], out: tuple[Tensor, Any]) -> None:
        # At a segment's end it computes the segment once more, for the memories; so it needs the segment's tokens.
        carried = given[0], named["mems"]
        caches = [layer.cached_kv for layer in out[1].attn_intermediates]
        self.came(lambda: _nbytes(carried), lambda: _nbytes((carried, caches)))

    def write(self, context: Tensor, count: int) -> None:
        self.generator.generate(context, count, temperature=0.0)


class FullAttention(Entry):
    reads = False

    def __init__(self, settings: Generate, package: ModuleType, parameters: int):
        def make(feed: int) -> nn.Module:
            network: nn.Module = package.TransformerWrapper(
                num_tokens=BYTES,
                max_seq_len=settings.longest,
                use_abs_pos_emb=False,
                attn_layers=_layers(settings, package, feed),
            )
            return network

        network = of_equal_size(make, range(1, 32 * settings.model.dim), parameters)
        self.generator, self.forward, self.read = package.AutoregressiveWrapper(network), network.forward, settings.read
        super().__init__(network, [first(network, "to_k")], FULL_WINDOW)
        network.forward = self._forward

    def _forward(self, tokens: Tensor, cache: Any = None, **named: Any) -> tuple[Tensor, Any]:
        logits, cache = self.forward(tokens[:, : self.read] if cache is None else tokens, cache=cache, **named)
        layers = [layer for layer in cache.attn_intermediates if layer.layer_type == "a"]
        if cache.cache_length < tokens.shape[1]:
            for layer in layers:
                layer.cached_kv = tuple(x.repeat(1, 1, tokens.shape[1] // self.read, 1) for x in layer.cached_kv)
            cache.cache_length = tokens.shape[1]
        size = _nbytes([layer.cached_kv for layer in layers])
        self.came(lambda: size, lambda: size)
        return logits, cache

    def write(self, context: Tensor, count: int) -> None:
        self.generator.generate(context, count, temperature=0.0)


class RMT(Entry):
    def __init__(self, settings: Generate, package: ModuleType, parameters: int, keeps_segment: bool):
        size = settings.model

        def make(feed: int) -> nn.Module:
            network: nn.Module = package.RecurrentMemoryTransformer(
                num_tokens=BYTES,
                num_memory_tokens=size.slots,
                dim=size.dim,
                depth=settings.rival_depth,
                causal=True,
                dim_head=size.dim // size.heads,
                heads=size.heads,
                seq_len=settings.segment_tokens,
                use_flash_attn=True,
                ff_mult=1.5 * (feed + 0.5) / size.dim,
                use_xl_memories=keeps_segment,
            )
            return network

        network = of_equal_size(make, range(1, 32 * size.dim), parameters)
        self.generator = package.RecurrentMemoryTransformerWrapper(network)
        super().__init__(network, [first(network, "to_kv")], settings.segment_tokens)
        network.register_forward_hook(self._came, with_kwargs=True)

    def _came(self, _module: nn.Module, given: tuple[Tensor, Tensor], named: dict[str, Any], _out: object) -> None:
        size = _nbytes((given, named["xl_memories"]))
        self.came(lambda: size, lambda: size)

    def write(self, context: Tensor, count: int) -> None:
        self.generator.generate(context, length=context.shape[1] + count, temperature=1e-10)


class Layer(nn.Module):
    """Pre-norm self-attention and feed-forward, with keys and values in a cache that is written in place."""

    def __init__(self, dim: int, heads: int, feed: int):
        super().__init__()
        self.heads = heads
        self.self_norm, self.to_qkv, self.to_out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed_norm, self.feed_in, self.feed_out = nn.LayerNorm(dim), nn.Linear(dim, feed), nn.Linear(feed, dim)

    def forward(self, x: Tensor, cache: Tensor, start: int, rotary: Rotary) -> Tensor:
        end = start + x.shape[1]
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(self.self_norm(x)).chunk(3, -1))
        keys, values = cache
        keys[:, :, start:end], values[:, :, start:end] = rotary.rotate(k, start), v
        past = keys[:, :, :end], values[:, :, :end]
        seen = F.scaled_dot_product_attention(rotary.rotate(q, start), *past, is_causal=x.shape[1] > 1)
        x = x + self.to_out(merge_heads(seen))
        return x + self.feed_out(F.gelu(self.feed_in(self.feed_norm(x))))


class PlainTransformer(nn.Module):
    """Rotary positions, and a cache (layers, 2, batch, heads, length, head_dim)."""

    def __init__(self, settings: Generate, feed: int):
        super().__init__()
        size = settings.model
        self.embedding, self.to_logits = nn.Embedding(BYTES, size.dim), nn.Linear(size.dim, BYTES)
        self.rotary, self.norm = Rotary(size.dim // size.heads, settings.longest), nn.LayerNorm(size.dim)
        self.layers = nn.ModuleList(Layer(size.dim, size.heads, feed) for _ in range(settings.rival_depth))

    def forward(self, tokens: Tensor, cache: Tensor, start: int) -> Tensor:
        """Tokens (batch, length) from ``start`` on, one or from 0, -> logits (batch, tokens) after the last."""
        x: Tensor = self.embedding(tokens)
        for layer, part in zip(self.layers, cache, strict=True):
            x = layer(x, part, start, self.rotary)
        logits: Tensor = self.to_logits(self.norm(x[:, -1]))
        return logits


class Plain(Entry):
    reads = False

    def __init__(self, settings: Generate, parameters: int):
        sizes = range(1, 32 * settings.model.dim)
        network = of_equal_size(lambda feed: PlainTransformer(settings, feed), sizes, parameters)
        assert isinstance(network, PlainTransformer)
        self.network, self.settings = network, settings
        super().__init__(network, [first(network, "to_qkv")], FULL_WINDOW)

    def cache(self, length: int) -> Tensor:
        size = self.settings.model
        return torch.zeros(self.settings.rival_depth, 2, 1, size.heads, length, size.dim // size.heads)

    def write(self, context: Tensor, count: int) -> None:
        length, read = context.shape[1], self.settings.read
        cache = self.cache(length + count)
        logits = self.network(context[:, :read], cache, 0)
        for begin in range(read, length, read):
            cache[..., begin : begin + read, :] = cache[..., :read, :]
        for position in range(length, length + count):
            # What is behind the cache's end is room to write in, not state.
            size = cache[..., :position, :].nbytes
            self.came(lambda size=size: size, lambda size=size: size)  # type: ignore[misc]
            logits = self.network(logits.argmax(-1, keepdim=True), cache, position)


def _layers(settings: Generate, package: ModuleType, feed: int) -> nn.Module:
    size = settings.model
    layers: nn.Module = package.Decoder(
        dim=size.dim,
        depth=settings.rival_depth,
        heads=size.heads,
        attn_dim_head=size.dim // size.heads,
        rotary_pos_emb=True,
        attn_flash=True,
        ff_mult=feed / size.dim,
    )
    return layers


def first(network: nn.Module, name: str) -> nn.Module:
    """The first module whose name ends like that."""
    return next(module for path, module in network.named_modules() if path.split(".")[-1] == name)


def _entries(settings: Generate) -> dict[str, Entry]:
    """By the names of the table; this model is the first.

    Raises:
        ValueError: the other libraries are not in their folder.
    """
    this = This(settings)
    entries: dict[str, Entry] = {"this": this}
    if settings.rivals is not None:
        with importing(settings.rivals, "x_transformers") as package:
            entries["Transformer-XL"] = TransformerXL(settings, package, this.parameters)
            entries["x-transformers"] = FullAttention(settings, package, this.parameters)
        with importing(settings.rivals, "recurrent_memory_transformer_pytorch") as package:
            entries["RMT"] = RMT(settings, package, this.parameters, keeps_segment=False)
            entries["RMT + XL"] = RMT(settings, package, this.parameters, keeps_segment=True)
    return entries | {"plain": Plain(settings, this.parameters)}


def _check(settings: Generate, this: This, plain: Plain) -> int:
    """The caches here, and the plain Transformer's, give what is computed without them; how many tokens were compared.

    Raises:
        RuntimeError: they do not.
    """
    model, length = this.model, settings.segment_tokens
    context, count = torch.randint(BYTES, (1, 3 * length + min(5, length - 1))), 2 * length
    text = torch.cat([context[0], *model.stream(context, count, start=START, temperature=0)])
    source, memory = model.encode(torch.tensor([[START]]))
    for begin in range(0, len(text), length):
        segment = text[None, begin : begin + length]
        logits = model.decode(F.pad(segment[:, :-1], (1, 0), value=START), source)[0, :, :START]
        chosen = (begin + torch.arange(segment.shape[1])) >= context.shape[1]
        if not torch.equal(logits.argmax(-1)[chosen], segment[0][chosen]):
            raise RuntimeError("this model's cache gives another text than its decoder without one")
        source, memory = model.encode(segment, memory)
    few = min(40, context.shape[1])
    stepwise, whole = plain.cache(few), plain.cache(few)
    for position in range(few):
        logits = plain.network(context[:, position : position + 1], stepwise, position)
    if not torch.allclose(logits, plain.network(context[:, :few], whole, 0), rtol=1e-4, atol=1e-4):
        raise RuntimeError("the plain Transformer's cache gives other logits than the whole context")
    return count


def run(settings: Generate) -> Iterator[str]:
    """Yield the lines of a table per context.

    Raises:
        ValueError: the other libraries are not in their folder.
        RuntimeError: a cache gives another text than is written without one.
    """
    yield f"{machine(torch.device('cpu'))}, float32"
    torch.manual_seed(0)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # RMT asks for kernels in a way that torch no longer likes
        entries = _entries(settings)
        this, plain = entries["this"], entries["plain"]
        assert isinstance(this, This)
        assert isinstance(plain, Plain)
        compared = _check(settings, this, plain)
        yield f"cached generation equals uncached: {compared} tokens over two segments, and the plain Transformer"
        yield "parameters: " + ", ".join(f"{name} {entry.parameters:,}" for name, entry in entries.items())
        for length in settings.contexts:
            context = torch.randint(BYTES, (1, length))
            yield ""
            yield f"after {length:,} tokens of context, {settings.windows} windows each"
            yield (
                f"{'':16}{'tokens/s: min':>14}{'median':>9}{'max':>9}{'keys':>8}{'carried KB':>13}{'working KB':>13}"
                f"{'reading s':>11}   this is:"
            )
            ours = this.measure(context, settings.windows)
            for name, entry in entries.items():
                measured = ours if entry is this else entry.measure(context, settings.windows)
                whole = entry.reads or length == settings.read
                yield _row(name, measured, whole) + ("" if entry is this else _compared(ours, measured))


def _row(name: str, measured: Measured, whole: bool) -> str:
    least, median, most = spread(measured.rates)
    return (
        f"{name:16}{least:14.1f}{median:9.1f}{most:9.1f}{measured.keys:8.1f}{measured.carried / 1024:13,.0f}"
        f"{measured.working / 1024:13,.0f}{f'{measured.reading:.2f}' if whole else '-':>11}"
    )


def _compared(ours: Measured, theirs: Measured) -> str:
    faster = spread(ours.rates).median / spread(theirs.rates).median
    carried, working = theirs.carried / ours.carried, theirs.working / ours.working
    return (
        f"{faster:7.2f} x as fast, {carried:,.{1 if carried > 1 else 2}f} x and "
        f"{working:,.{1 if working > 1 else 2}f} x smaller"
    )
