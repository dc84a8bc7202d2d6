"""Generation after long contexts, here and in other libraries: tokens per second and bytes of state, in one run.

    pip install --no-deps --target /tmp/peers x-transformers==2.31.10 recurrent-memory-transformer-pytorch==0.7.0 \
        einops==0.8.2 einx==0.4.3 frozendict==2.5.1 loguru==0.7.3 hyper-connections==0.4.11 torch-einops-utils==0.2.0
    python benchmarks/generation_peers.py --peers /tmp/peers

Weights are random, for only speed and size are measured; batch 1, the likeliest token each time. All have the same
vocabulary, width, heads and segment, and depths and feed-forwards that give them the same number of parameters. Each
generates as its documentation says, with every cache that it has. Transformer-XL keeps two segments. RMT has as many
memory tokens as there are slots here; as is its default ("RMT + XL") it keeps a segment beside them.

Two do full attention: x-transformers, and a plain Transformer whose cache is allocated beforehand, the best that full
attention can do. They read 1,024 tokens; the rest of their cache is filled with copies, which have the same size and
take the same time, for reading costs the square of a context's length.

Tensors are counted, not formulas. *Carried* is what must be kept to go on another day, *working* also what is kept from
token to token; both at their largest. *Keys* is at how many positions keys are computed for each token that comes out.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memformer import Memformer
from memformer.nn.attention import merge_heads, split_heads
from memformer.nn.positions import Rotary

BYTES, START = 256, 256
DIM, HEADS, DEPTH, SEGMENT, SLOTS = 256, 4, 8, 64, 32
FEED = 1108
"""Width of the peers' feed-forwards: their layers have no attention over a context, so these are wider than 4 x 256."""
CONTEXTS = (1024, 8192, 65536)
READ = 1024
LONGEST = CONTEXTS[-1] + 1024
WINDOWS = 5


class Entry:
    """A way to generate. ``write(context, count)`` calls ``came`` once for each token, and maybe before while it reads.

    Args:
        network: its parameters are counted.
        keys: modules that compute keys, the first of each stack.
        window: the rate is measured over so many tokens: a whole segment, where there are segments.
    """

    reads = True
    """Whether it reads its whole context."""

    def __init__(self, network: nn.Module, keys: list[nn.Module], window: int = SEGMENT):
        self.parameters = sum(parameter.numel() for parameter in network.eval().parameters())
        self.window, self.positions = window, 0
        for module in keys:
            module.register_forward_pre_hook(self._count)

    def _count(self, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.positions += given[0].shape[1]

    def write(self, context: Tensor, count: int) -> None:
        raise NotImplementedError

    def came(self, carried: object, caches: object = ()) -> None:
        """A token came, and this is what will be used again. The time that counting takes is taken off."""
        now = time.perf_counter()
        self.times.append(now - self.lost)
        self.marks.append(self.positions)
        self.carried = max(self.carried, nbytes(carried))
        self.working = max(self.working, nbytes((carried, caches)))
        self.lost += time.perf_counter() - now

    def measure(self, context: Tensor) -> dict[str, Any]:
        self.times: list[float] = []
        self.marks: list[int] = []
        self.lost, self.positions, self.carried, self.working = 0.0, 0, 0, 0
        count = 1 + self.window * (1 + WINDOWS)  # the first token ends the reading, the first window warms up
        began = time.perf_counter()
        self.write(context, count)
        times, marks = self.times[-count :: self.window], self.marks[-count :: self.window]
        return {
            "reading": times[0] - began,
            "rates": [self.window / (b - a) for a, b in pairwise(times[1:])],
            "keys": (marks[-1] - marks[1]) / (WINDOWS * self.window),
            "carried": self.carried,
            "working": self.working,
        }


def nbytes(state: object) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


class This(Entry):
    def __init__(self) -> None:
        self.model = Memformer(
            dim=DIM, num_memory_slots=SLOTS, mem_update_attn_heads=HEADS,
            enc_num_tokens=BYTES + 1, enc_max_seq_len=SEGMENT, enc_depth=2, enc_heads=HEADS,
            dec_num_tokens=BYTES + 1, dec_max_seq_len=SEGMENT + 1, dec_depth=4, dec_heads=HEADS,
        )  # fmt: skip
        assert self.model.decoder is not None
        stacks = self.model.encoder, self.model.decoder
        super().__init__(self.model, [stack.layers[0].self_attention.to_qkv for stack in stacks])

    def write(self, context: Tensor, count: int) -> None:
        stream = self.model.stream(context, count, start=START, temperature=0)
        writing = stream._writing  # what it keeps from token to token has no public name
        for _ in stream:
            state = writing.state
            self.came((state.memory, state.segment, state.pending, state.position), (writing.cache, writing.computed))


class TransformerXL(Entry):
    def __init__(self) -> None:
        from x_transformers import Decoder, TransformerWrapper, XLAutoregressiveWrapper

        layers = Decoder(dim=DIM, depth=DEPTH, heads=HEADS, rotary_pos_emb=True, attn_flash=True, ff_mult=FEED / DIM)
        network = TransformerWrapper(num_tokens=BYTES, max_seq_len=SEGMENT, max_mem_len=2 * SEGMENT, attn_layers=layers)
        self.generator = XLAutoregressiveWrapper(network)
        super().__init__(network, [first(network, "to_k")])
        network.register_forward_hook(self._came, with_kwargs=True)

    def _came(self, _module: nn.Module, given: tuple[Tensor], named: dict[str, Any], out: tuple[Tensor, Any]) -> None:
        # At a segment's end it computes the segment once more, for the memories; so it needs the segment's tokens.
        self.came((given[0], named["mems"]), [layer.cached_kv for layer in out[1].attn_intermediates])

    def write(self, context: Tensor, count: int) -> None:
        self.generator.generate(context, count, temperature=0.0)


class FullAttention(Entry):
    reads = False

    def __init__(self) -> None:
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

        layers = Decoder(dim=DIM, depth=DEPTH, heads=HEADS, rotary_pos_emb=True, attn_flash=True, ff_mult=FEED / DIM)
        network = TransformerWrapper(
            num_tokens=BYTES, max_seq_len=LONGEST, use_abs_pos_emb=False, attn_layers=layers
        )  # fmt: skip
        self.generator, self.forward = AutoregressiveWrapper(network), network.forward
        super().__init__(network, [first(network, "to_k")], window=8)
        network.forward = self._forward

    def _forward(self, tokens: Tensor, cache: Any = None, **named: Any) -> tuple[Tensor, Any]:
        logits, cache = self.forward(tokens[:, :READ] if cache is None else tokens, cache=cache, **named)
        layers = [layer for layer in cache.attn_intermediates if layer.layer_type == "a"]
        if cache.cache_length < tokens.shape[1]:
            for layer in layers:
                layer.cached_kv = tuple(x.repeat(1, 1, tokens.shape[1] // READ, 1) for x in layer.cached_kv)
            cache.cache_length = tokens.shape[1]
        self.came([layer.cached_kv for layer in layers])
        return logits, cache

    def write(self, context: Tensor, count: int) -> None:
        self.generator.generate(context, count, temperature=0.0)


class RMT(Entry):
    def __init__(self, keeps_segment: bool) -> None:
        from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

        network = RecurrentMemoryTransformer(
            num_tokens=BYTES, num_memory_tokens=SLOTS, dim=DIM, depth=DEPTH, causal=True, dim_head=DIM // HEADS,
            heads=HEADS, seq_len=SEGMENT, use_flash_attn=True, ff_mult=4.28,
            use_xl_memories=keeps_segment,
        )  # fmt: skip
        self.generator = RecurrentMemoryTransformerWrapper(network)
        super().__init__(network, [first(network, "to_kv")])
        network.register_forward_hook(self._came, with_kwargs=True)

    def _came(self, _module: nn.Module, given: tuple[Tensor, Tensor], named: dict[str, Any], _out: object) -> None:
        self.came((given, named["xl_memories"]))

    def write(self, context: Tensor, count: int) -> None:
        self.generator.generate(context, length=context.shape[1] + count, temperature=1e-10)


class PlainTransformer(nn.Module):
    """Rotary positions, pre-norm, and a cache (layers, 2, batch, heads, length, head_dim) that is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.to_logits = nn.Embedding(BYTES, DIM), nn.Linear(DIM, BYTES)
        self.rotary, self.norm = Rotary(DIM // HEADS, LONGEST), nn.LayerNorm(DIM)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "self_norm": nn.LayerNorm(DIM), "to_qkv": nn.Linear(DIM, 3 * DIM), "to_out": nn.Linear(DIM, DIM),
                    "feed_norm": nn.LayerNorm(DIM), "feed_in": nn.Linear(DIM, FEED), "feed_out": nn.Linear(FEED, DIM),
                }
            )
            for _ in range(DEPTH)
        )  # fmt: skip

    def forward(self, tokens: Tensor, cache: Tensor, start: int) -> Tensor:
        """Tokens (batch, length) from ``start`` on, one or from 0, -> logits (batch, tokens) after the last."""
        x, end = self.embedding(tokens), start + tokens.shape[1]
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            q, k, v = (split_heads(part, HEADS) for part in layer["to_qkv"](layer["self_norm"](x)).chunk(3, -1))
            keys[:, :, start:end], values[:, :, start:end] = self.rotary.rotate(k, start), v
            past = keys[:, :, :end], values[:, :, :end]
            seen = F.scaled_dot_product_attention(self.rotary.rotate(q, start), *past, is_causal=tokens.shape[1] > 1)
            x = x + layer["to_out"](merge_heads(seen))
            x = x + layer["feed_out"](F.gelu(layer["feed_in"](layer["feed_norm"](x))))
        return self.to_logits(self.norm(x[:, -1]))


class Plain(Entry):
    reads = False

    def __init__(self) -> None:
        self.network = PlainTransformer()
        super().__init__(self.network, [self.network.layers[0]["to_qkv"]], window=8)

    def write(self, context: Tensor, count: int) -> None:
        length = context.shape[1]
        cache = torch.zeros(DEPTH, 2, 1, HEADS, length + count, DIM // HEADS)
        logits = self.network(context[:, :READ], cache, 0)
        for begin in range(READ, length, READ):
            cache[..., begin : begin + READ, :] = cache[..., :READ, :]
        for position in range(length, length + count):
            # What is behind the cache's end is room to write in, not state.
            self.came(cache[..., :position, :])
            logits = self.network(logits.argmax(-1, keepdim=True), cache, position)


def first(network: nn.Module, name: str) -> nn.Module:
    """The first module whose name ends like that."""
    return next(module for path, module in network.named_modules() if path.split(".")[-1] == name)


def check() -> None:
    """The caches here, and the plain Transformer's, give what is computed without them."""
    model, plain = This().model, Plain().network
    context = torch.randint(BYTES, (1, 3 * SEGMENT + 5))
    text = torch.cat([context[0], *model.stream(context, 2 * SEGMENT, start=START, temperature=0)])
    source, memory = model.encode(torch.tensor([[START]]))
    for begin in range(0, len(text), SEGMENT):
        segment = text[None, begin : begin + SEGMENT]
        logits = model.decode(F.pad(segment[:, :-1], (1, 0), value=START), source)[0, :, :START]
        chosen = (begin + torch.arange(segment.shape[1])) >= context.shape[1]
        assert torch.equal(logits.argmax(-1)[chosen], segment[0][chosen]), "the cache gives another text"
        source, memory = model.encode(segment, memory)
    caches = torch.zeros(2, DEPTH, 2, 1, HEADS, 40, DIM // HEADS)
    for position in range(40):
        stepwise = plain(context[:, position : position + 1], caches[0], position)
    torch.testing.assert_close(stepwise, plain(context[:, :40], caches[1], 0), rtol=1e-4, atol=1e-4)
    print(f"cached generation equals uncached: {2 * SEGMENT} tokens over two segments, and the plain Transformer")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with the other libraries (pip install --target)")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help=f"multiples of {READ}")
    settings = parser.parse_args()
    if settings.peers is None or not (settings.peers / "x_transformers").is_dir():
        parser.error("--peers: expected a folder made by the pip command above")
    sys.path.append(str(settings.peers))
    warnings.simplefilter("ignore", FutureWarning)  # RMT asks for kernels in a way that torch no longer likes
    torch.manual_seed(0)
    print(f"{platform.platform()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    check()
    entries = {
        "this": This(), "Transformer-XL": TransformerXL(), "RMT": RMT(False), "RMT + XL": RMT(True),
        "x-transformers": FullAttention(), "plain": Plain(),
    }  # fmt: skip
    print("parameters: " + ", ".join(f"{name} {entry.parameters:,}" for name, entry in entries.items()))
    for length in settings.contexts:
        context = torch.randint(BYTES, (1, length))
        print(f"\nafter {length:,} tokens of context\n{'':16}{'tokens/s: min':>14}{'median':>9}{'max':>9}"
              f"{'keys':>8}{'carried KB':>13}{'working KB':>13}{'reading s':>11}   this is:")  # fmt: skip
        for name, entry in entries.items():
            result = entry.measure(context)
            rates, reading = result["rates"], f"{result['reading']:.2f}" if entry.reads or length == READ else "-"
            if name == "this":
                ours = result
            carried, working = (result[state] / ours[state] for state in ("carried", "working"))
            compared = (
                f"{statistics.median(ours['rates']) / statistics.median(rates):7.2f} x as fast, "
                f"{carried:,.{1 if carried > 1 else 2}f} x and {working:,.{1 if working > 1 else 2}f} x smaller"
            )
            print(f"{name:16}{min(rates):14.1f}{statistics.median(rates):9.1f}{max(rates):9.1f}{result['keys']:8.1f}"
                  f"{result['carried'] / 1024:13,.0f}{result['working'] / 1024:13,.0f}{reading:>11}"
                  f"{'' if name == 'this' else compared}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
