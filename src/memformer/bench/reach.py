"""How far does the memory reach in text? Facts in real prose, trained on short texts, asked after long ones.

A model learns on texts of a few thousand tokens by exact gradients through all of each, at the memory of a part of it.
Then it is judged by the text's length, up to a million tokens and more, and by where the first needed fact stands.
Texts are made while they are read, and read in parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from .. import pictures, replay
from ..checks import check_patterns
from ..config import check_count, check_positive
from ..device import choose_device
from ..files import move
from ..interface import SegmentModel
from ..learning_rate import warmup_stable_decay
from ..settings import ModelSettings
from ..tasks import WORLDS, Episode, InProse, World, in_prose, read_prose
from .contestants import OWN, Build, Contestant, build, sizes
from .learn import WARM_UP, descend, optimizing
from .meters import machine
from .trials import Record, Report, Result, Trial, Tuned, check_different, seeds_in_words, tune

__all__ = ["ReachBenchmark", "run", "train"]

MODEL = ModelSettings(
    dim=64, slots=32, enc_depth=1, dec_depth=1, dec_overlap=0, heads=4, positions="relative", tie_embeddings=False
)
"""This model; a causal one has both depths' layers, which share out the slots."""
EVERY = 100
"""Steps of training from one look at held-out texts, of the longest that are trained on, to the next."""
_LOOK, _JUDGE = 2_000_000, 2_000_001
"""Seeds of the texts that choose the learning rate, and of those that judge a run."""


@dataclass(frozen=True, kw_only=True)
class ReachBenchmark:
    """Train on facts in prose, then ask after much longer texts: accuracy by their length and by depth.

    Training begins with each fact alone in a short segment, and ends with the texts themselves, for 0.3 of its steps.
    qa2, qa3 and needle do not train on texts in which facts share a segment; in long texts that is rare. All are judged
    with a sharper writing attention than that of training. Depth is where in a text the first fact stands that the
    answer needs. The default trains on texts of up to 2k tokens, which takes 40 minutes of one core for each seed;
    --train-tokens 16384 is for an accelerator. qa2 asks for --enc-depth 2 --steps 5000, the needle for --steps 6000,
    both for --sharpen-from 0.85 --judge-temperature 0.1.
    """

    tasks: tuple[str, ...] = ("qa1",)
    """Of qa1 (who is where), qa2 (where is a thing), qa3 (where was it before), needle (one key, four values)."""
    contestants: tuple[str, ...] = ("memformer",)
    """Models to compare: memformer, "memory off", causal, "causal memory off", "causal one memory", "causal in parts".
    """
    prose: tuple[Path, ...] = ()
    """Files or folders of texts to scatter the facts in; none: Python's language reference, which comes with it."""
    include: tuple[str, ...] = ()
    """Of folders of prose, read only what matches one of these patterns, such as '*.txt' or 'books/*'."""
    exclude: tuple[str, ...] = ()
    """Of folders of prose, leave out what matches one of these patterns."""
    words: int = 2000
    """Different words that are tokens; all others are one token."""
    segment_tokens: int = 128
    """Tokens in a segment."""
    train_tokens: int = 2048
    """Texts of training; half of the batches have texts of half the length."""
    questions: int = 4
    """In training: how many are asked of a text, at most. It is judged with one."""
    lengths: tuple[int, ...] = (1024, 16384, 131072)
    """Tokens of the texts that are judged."""
    episodes: int = 200
    """Texts of each length that are judged."""
    judge_temperature: float = 0.075
    """Temperature of the writing attention while texts are judged; in training it is --write-temperature."""
    judge_forgetting: float = 0.0
    """Forgetting of the normalised writer while texts are judged; in training it is --forgetting."""
    sharpen_from: float = 1.0
    """Train with the writer of judging (--judge-temperature) from this share of the training on; 1: not at all."""
    judge_segment_tokens: int | None = None
    """Tokens in a segment while texts are judged, at most --segment-tokens; None: as many."""
    depths: int = 10
    """Parts of a text, of one size, by which the place of the first needed fact is told."""
    steps: int = 3000
    """Training steps of a trial."""
    batch_size: int = 16
    """Texts in a training step, and texts that are judged at a time."""
    part: int = 8
    """Segments that are read at once."""
    graphs: int = 3
    """In training: of how many such parts the graph is there at a time. More than a text has parts is no faster."""
    learning_rates: tuple[float, ...] = (1e-3,)
    """Each is tried with the first seed; the best one then with the other seeds."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """For parameters and texts; the texts are the same for all contestants."""
    model: ModelSettings = MODEL
    device: str = "cpu"
    """Where to compute, such as cuda; other devices than the CPU have one trial at a time."""
    jobs: int = 0
    """How many trials run at a time, each in one thread; 0: one per core."""
    weights: Path | None = None
    """Keep what was learned in this folder; what it has already is judged and not trained again."""
    out: Path | None = None
    """Keep all trials in this JSON file. Trials that it already has are not run again."""
    plot: Path | None = None
    """Draw accuracy by length and depth into this PNG file."""

    def __post_init__(self) -> None:
        for name in ("tasks", "contestants", "lengths", "seeds", "learning_rates"):
            check_different(name, getattr(self, name))
        for name in ("include", "exclude"):
            check_patterns(name, getattr(self, name))
        for name in ("segment_tokens", "questions", "episodes", "depths", "steps", "batch_size", "part", "graphs"):
            check_count(name, getattr(self, name))
        check_count("jobs", self.jobs, least=0)
        for name, tokens in (("train_tokens", self.train_tokens), *(("lengths", n) for n in self.lengths)):
            if tokens < 1 or tokens % self.segment_tokens:
                raise ValueError(
                    f"{name}: expected a multiple of segment_tokens ({self.segment_tokens}), for a text is whole "
                    f"segments, got {tokens}"
                )
        for name in self.tasks:
            if name not in WORLDS:
                raise ValueError(f"tasks: expected some of {', '.join(WORLDS)}, got {name!r}")
        for rate in self.learning_rates:
            check_positive("learning_rates", rate)
        if min(self.seeds) < 0 or max(self.seeds) >= _LOOK:
            raise ValueError(f"seeds: expected whole numbers from 0 to {_LOOK - 1:,}")
        if (short := self.judge_segment_tokens) is not None:
            check_count("judge_segment_tokens", short)
            if short > self.segment_tokens or any(n % short for n in self.lengths):
                raise ValueError(
                    f"judge_segment_tokens: expected at most segment_tokens ({self.segment_tokens}), and lengths that "
                    f"it divides, got {short}"
                )
        self.model.memformer_config(1, self.segment_tokens)
        check_positive("judge_temperature", self.judge_temperature)
        if not 0 <= self.sharpen_from <= 1:
            raise ValueError(f"sharpen_from: expected 0 to 1, got {self.sharpen_from}")
        if not 0 <= self.judge_forgetting < math.inf:
            raise ValueError(f"judge_forgetting: expected a number of at least 0, got {self.judge_forgetting}")
        if self.judge_forgetting and self.model.memory_writer != "normalised":
            raise ValueError(
                f"judge_forgetting: expected 0 with the writer {self.model.memory_writer}, which has no bias vector, "
                f"got {self.judge_forgetting}"
            )


def run(settings: ReachBenchmark, entrants: Mapping[str, Build] = OWN) -> Iterator[str]:
    """Yield a line for each trial when it is done, then a table of accuracy by length per task.

    Args:
        settings: what to do.
        entrants: the contestants that there are, by name.

    Raises:
        FileNotFoundError: a path of prose does not exist.
        ValueError: an unknown contestant, prose that is none, a pattern that matches nothing, or ``out`` or ``weights``
            hold what other settings made.
        OSError: nothing can be written into ``weights``.
        ImportError: a package for a picture is missing.
    """
    pictures.check(settings.plot)
    device = choose_device(settings.device)
    if settings.weights is not None:
        if not settings.weights.is_dir():
            raise ValueError(f"weights: expected a folder that exists, got {settings.weights}")
        with tempfile.TemporaryFile(dir=settings.weights):
            pass  # to learn now that nothing can be written there, and not after a training
    tasks = {name: _tasks(settings, name) for name in settings.tasks}
    for name, (task, held_out) in tasks.items():
        judged = _judged(settings, held_out)
        if min(settings.lengths) < judged.least_segments * judged.length:
            raise ValueError(
                f"lengths: the facts of {name} alone may have {judged.least_segments * judged.length} tokens, got "
                f"{min(settings.lengths)}"
            )
        for who in settings.contestants:
            build(who, entrants, _config(settings, task))
    record = Record(settings.out, _fixed(settings))
    yield machine(device)
    prose = next(iter(tasks.values()))[0].prose
    yield (
        f"training texts of up to {settings.train_tokens:,} tokens, of {len(prose.words):,} words; their prose begins "
        f"anew after {len(prose.tokens):,}; batches of {settings.batch_size}, {settings.steps:,} steps; this model: "
        + ", ".join(f"{name} {value}" for name, value in sizes(settings.model).items())
        + f"; judged with write_temperature {settings.judge_temperature:g}, forgetting {settings.judge_forgetting:g}"
        + ("" if settings.judge_segment_tokens is None else f", segments of {settings.judge_segment_tokens}")
    )
    pairs = [(task, contestant) for task in settings.tasks for contestant in settings.contestants]
    found = yield from tune(
        functools.partial(train, settings, entrants),
        [{"task": task, "contestant": contestant} for task, contestant in pairs],
        settings.learning_rates,
        settings.seeds,
        lambda _, result: (-result["curve"][-1][1], result["curve"][-1][2]) if result["curve"] else (1.0, math.inf),
        _line,
        record,
        settings.jobs if device.type == "cpu" else 1,
    )
    chosen = dict(zip(pairs, found, strict=True))
    for name in settings.tasks:
        yield ""
        yield from _table(settings, name, tasks[name][1], {who: chosen[name, who] for who in settings.contestants})
    if settings.plot is not None:
        _plot(settings, chosen, settings.plot)
        yield f"plot in {settings.plot}"


@contextlib.contextmanager
def _errors_about(**options: str) -> Iterator[None]:
    """A task's errors name what was given by the option that gave it."""
    try:
        yield
    except ValueError as error:
        name, colon, message = str(error).partition(": ")
        raise ValueError(options.get(name, name) + colon + message) from error


def _tasks(settings: ReachBenchmark, name: str) -> tuple[InProse, InProse]:
    with _errors_about(per_segment="segment_tokens", segments="train_tokens", texts="prose"):
        return in_prose(
            name,
            settings.prose,
            include=settings.include,
            exclude=settings.exclude,
            words=settings.words,
            segments=settings.train_tokens // settings.segment_tokens,
            per_segment=settings.segment_tokens,
            questions=settings.questions,
        )


def _judged(settings: ReachBenchmark, held_out: InProse) -> InProse:
    """The held-out task as it is judged: one question is asked, which may stand in a shorter segment.

    Raises:
        ValueError: the question is longer than that.
    """
    short = settings.judge_segment_tokens
    if short is None:
        return held_out
    segments = held_out.segments * held_out.per_segment // short
    with _errors_about(per_segment="judge_segment_tokens"):
        return dataclasses.replace(held_out, per_segment=short, segments=segments, questions=1)


def _config(settings: ReachBenchmark, task: InProse) -> Any:
    return settings.model.memformer_config(task.vocabulary, task.length)


def _own_easing(tasks: Sequence[str]) -> dict[str, list[float]]:
    """Of tasks whose training is eased otherwise than most."""
    return {name: list(WORLDS[name].easing) for name in tasks if WORLDS[name].easing != World.easing}


def _lessons(tasks: Sequence[str]) -> dict[str, str]:
    """Of tasks that have more than one: which, in short."""
    found = {name: WORLDS[name].lessons for name in tasks}
    return {name: hashlib.sha256(repr(x).encode()).hexdigest()[:16] for name, x in found.items() if len(x) > 1}


def _trained_with(settings: ReachBenchmark, tasks: Sequence[str]) -> dict[str, Any]:
    """What weights of these tasks depend on, but for the trial."""
    names = ("words", "segment_tokens", "train_tokens", "questions", "steps", "batch_size")
    sharp = ("sharpen_from", "judge_temperature", "judge_forgetting") if settings.sharpen_from < 1 else ()
    return {
        "prose": [path.name for path in settings.prose],
        # Only where they are given: files of results from before know nothing of them.
        **{name: list(given) for name in ("include", "exclude") if (given := getattr(settings, name))},
        **({"texts": _hash_of_texts(settings)} if settings.prose else {}),
        **{name: getattr(settings, name) for name in (*names, *sharp)},
        "easing": list(World.easing),
        **({"easing_of": own} if (own := _own_easing(tasks)) else {}),
        **({"lessons": several} if (several := _lessons(tasks)) else {}),
        "model": sizes(settings.model),
    }


def _hash_of_texts(settings: ReachBenchmark) -> str:
    """Of the prose that was given: another folder may have the same name."""
    texts = read_prose(settings.prose, include=settings.include, exclude=settings.exclude)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _fixed(settings: ReachBenchmark) -> dict[str, Any]:
    """What all trials of a file have in common."""
    names = ("episodes", "depths", "judge_temperature", "judge_forgetting")
    judged_with = {"lengths": list(settings.lengths), **{name: getattr(settings, name) for name in names}}
    if settings.judge_segment_tokens is not None:  # of which files of before know nothing
        judged_with["judge_segment_tokens"] = settings.judge_segment_tokens
    return {"benchmark": "reach"} | _trained_with(settings, settings.tasks) | judged_with | {"every": EVERY}


def train(settings: ReachBenchmark, entrants: Mapping[str, Build], trial: Trial) -> Result:
    """One trial: a contestant, a task, a learning rate, a seed; trained, or loaded, and judged."""
    device = choose_device(settings.device)
    task, held_out = _tasks(settings, trial["task"])
    judged = _judged(settings, held_out)
    torch.manual_seed(trial["seed"])
    model = build(trial["contestant"], entrants, _config(settings, task)).to(device)
    file, about = None, {"settings": json.dumps(_trained_with(settings, (trial["task"],)) | trial, sort_keys=True)}
    if settings.weights is not None:
        file = settings.weights / ("-".join(str(x).replace(" ", "_") for x in trial.values()) + ".safetensors")
    if file is not None and file.exists():
        learned = _loaded(model, file, about)
    else:
        learned = _learn(settings, trial, model, task, held_out)
        if file is not None:
            _keep(model, file, about | {"learned": json.dumps(learned)})
    _sharpen(settings, model)
    return learned | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "numbers_carried": _numbers_carried(model, task.length, device),
        "lengths": {str(tokens): _judge(settings, model, judged, tokens) for tokens in settings.lengths},
    }


def _sharpen(settings: ReachBenchmark, model: Contestant) -> None:
    """Write as while texts are judged; contestants of other kinds have no such settings."""
    if isinstance(model.network, SegmentModel):
        forgetting = settings.judge_forgetting if settings.model.memory_writer == "normalised" else None
        model.network.set_writer(write_temperature=settings.judge_temperature, forgetting=forgetting)


def _numbers_carried(model: Contestant, length: int, device: torch.device) -> int:
    with torch.device(device):
        return model.numbers_carried(length)


def _keep(model: Contestant, file: Path, about: Mapping[str, str]) -> None:
    unfinished = file.with_suffix(".unfinished")
    try:
        save_model(model, str(unfinished), dict(about))
        move(unfinished, file)
    except SafetensorError as error:
        raise OSError(f"weights: {file} cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):  # the error before says what is wrong
            unfinished.unlink(missing_ok=True)


def _loaded(model: Contestant, file: Path, about: Mapping[str, str]) -> Result:
    try:
        with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
            held = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"weights: {file} is damaged ({error}); without it its trial is trained again") from error
    if held.get("settings") != about["settings"]:
        raise ValueError(
            f"weights: {file} was trained with other settings, {held.get('settings')}, not {about['settings']}: choose "
            "another folder"
        )
    load_model(model, str(file))
    learned: Result = json.loads(held["learned"])
    return learned


class _Cell(nn.Module):
    """A contestant as the replay engine's cell, of a part of a batch of texts."""

    def __init__(self, model: Contestant):
        super().__init__()
        self.model = model

    def forward(self, part: Episode, state: Any) -> tuple[Tensor | None, Any]:
        logits, state, extra_loss = self.model.read(part, state)
        if not logits.shape[1]:
            return None, state
        wanted = part.answers[:, part.answers.any(2).any(0)]
        return F.cross_entropy(logits[wanted], part.tokens[part.answers]) + extra_loss, state


def _learn(
    settings: ReachBenchmark, trial: Trial, model: Contestant, task: InProse, held_out: InProse
) -> dict[str, Any]:
    """Train it; what is said of that."""
    parameters, cell, device = list(model.parameters()), _Cell(model), choose_device(settings.device)
    decay = settings.steps * _falling(*task.world.easing)
    curve_of_rates = functools.partial(warmup_stable_decay, steps=settings.steps, warmup=WARM_UP, decay=decay)
    optimizer, rates = optimizing(parameters, trial["learning_rate"], curve_of_rates)
    schedule = replay.EveryMemory(graphs=settings.graphs)
    generator = torch.Generator().manual_seed(trial["seed"])
    curve: list[tuple[int, float, float]] = []
    begun, diverged_at, tokens = time.perf_counter(), None, 0
    report = Report(trial, settings.steps)
    for step in range(1, settings.steps + 1):
        if step - 1 >= settings.sharpen_from * settings.steps:
            _sharpen(settings, model)
        told = task.eased((step - 1) / settings.steps).practice(settings.batch_size, generator)
        parts = [_to(part, device) for part in told.parts(settings.part)]
        loss = replay.memory_replay(cell, parts, None, schedule=schedule).loss
        if not loss.isfinite():
            diverged_at = step
            break
        descend(loss, parameters, optimizer, rates)
        tokens += settings.batch_size * told.tokens
        if step % EVERY == 0 or step == settings.steps:
            look = _read(settings, model, held_out, held_out.segments, settings.batch_size * 2, _LOOK)
            curve.append((step, float(look[0].float().mean()), _bits(look[1])))
            now = f"{100 * curve[-1][1]:.1f} % right"
            easier = held_out.eased((step - 1) / settings.steps)
            if easier is not held_out:  # how much of a lesson is learned when it is left
                look = _read(settings, model, easier, easier.segments, settings.batch_size * 2, _LOOK)
                now += f", {100 * float(look[0].float().mean()):.1f} % of the easier texts of this step"
            report(step, now)
    return {"curve": curve, "diverged_at": diverged_at, "tokens": tokens, "seconds": time.perf_counter() - begun}


def _falling(lessons: float, others: float) -> float:
    """The share of a training in which the rate falls: while the task itself is trained on; where it never is, while
    texts become longer."""
    return 1 - lessons - others if lessons + others < 1 else others


def _to(part: Episode, device: torch.device) -> Episode:
    return Episode(*(x.to(device) for x in part))


@torch.no_grad()
def _read(
    settings: ReachBenchmark, model: Contestant, task: InProse, segments: int, episodes: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each text: whether its answer is right, the loss in nats, and the first needed fact's depth; (episodes,)."""
    generator, device = torch.Generator().manual_seed(seed), choose_device(settings.device)
    right, nats, depths = [], [], []
    model.eval()
    for begun in range(0, episodes, settings.batch_size):
        told, state = task.tell(min(settings.batch_size, episodes - begun), generator, segments), None
        for part in (_to(part, device) for part in told.parts(settings.part)):
            outcome = model(part, state)
            state = outcome.state
        wanted, shape = part.tokens[part.answers], (len(part.tokens), -1)
        right.append((outcome.logits.argmax(-1) == wanted).view(shape).all(1).cpu())
        nats.append(F.cross_entropy(outcome.logits, wanted, reduction="none").view(shape).mean(1).cpu())
        depths.append(told.places[:, 0] / told.tokens)
    model.train()
    return torch.cat(right), torch.cat(nats), torch.cat(depths)


def _bits(nats: Tensor) -> float:
    """Per word of an answer; infinite where not a number."""
    mean = float(nats.mean()) / math.log(2)
    return math.inf if math.isnan(mean) else mean


def _judge(settings: ReachBenchmark, model: Contestant, task: InProse, tokens: int) -> dict[str, Any]:
    """How many answers are right after texts of so many tokens, in all and by depth."""
    begun = time.perf_counter()
    right, nats, depths = _read(settings, model, task, tokens // task.length, settings.episodes, _JUDGE)
    where = (depths * settings.depths).long().clamp(max=settings.depths - 1)
    return {
        "right": int(right.sum()),
        "episodes": len(right),
        "bits": _bits(nats),
        "by_depth": [[int(right[where == n].sum()), int((where == n).sum())] for n in range(settings.depths)],
        "seconds": time.perf_counter() - begun,
    }


def _share(result: Result, tokens: int) -> float:
    judged = result["lengths"][str(tokens)]
    return 100 * float(judged["right"] / judged["episodes"])


def _line(trial: Trial, result: Result) -> str:
    scores = ", ".join(f"{_share(result, int(n)):.1f} % right at {int(n):,}" for n in result["lengths"])
    end = "diverged, " if result["diverged_at"] else ""
    return (
        f"{trial['task']:<7} {trial['contestant']:<18} rate {trial['learning_rate']:<7g} seed {trial['seed']:<3} "
        f"{result['tokens'] / 1e6:>6.1f} M tokens {result['seconds']:>6.0f} s  {end}{scores}"
    )


def _table(settings: ReachBenchmark, name: str, task: InProse, chosen: Mapping[str, Tuned]) -> Iterator[str]:
    yield (
        f"{name}: {len(settings.seeds)} seeds, mean (min-max) of whole answers right in % by tokens of the text, "
        f"{settings.episodes} texts each; chance {100 * task.chance:.3g}"
    )
    yield (
        f"{'contestant':<18} {'parameters':>10} {'carried':>8} {'rate':>7}"
        + "".join(f"{f'at {n:,}':>22}" for n in settings.lengths)
        + f"{'s per run':>11}"
    )
    for contestant, (rate, results, _) in chosen.items():
        cells = ""
        for n in settings.lengths:
            scores = [_share(result, n) for result in results]
            cells += f"{f'{statistics.mean(scores):.1f} ({min(scores):.1f}-{max(scores):.1f})':>22}"
        yield (
            f"{contestant:<18} {results[0]['parameters']:>10,} {results[0]['numbers_carried']:>8,} {rate:>7g}{cells}"
            f"{statistics.median(result['seconds'] for result in results):>11,.0f}"
        )


def _plot(settings: ReachBenchmark, chosen: Mapping[tuple[str, str], Tuned], path: Path) -> None:
    """A map of accuracy for each task and contestant, over all seeds: lengths to the right, depth downwards."""
    rows, columns = len(settings.tasks), len(settings.contestants)
    figure = pictures.new_figure(1.5 + 3.5 * columns, 3 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for (name, who), panel in zip(chosen, axes.flat, strict=True):
        counts = torch.tensor(
            [[r["lengths"][str(n)]["by_depth"] for n in settings.lengths] for r in chosen[name, who].results]
        )
        right, texts = counts.sum(0).double().unbind(-1)  # (lengths, depths)
        image = panel.imshow(
            (100 * right / texts).T.numpy(), vmin=0, vmax=100, aspect="auto", cmap="viridis", extent=(0, 1, 100, 0)
        )
        ticks = [(n + 0.5) / len(settings.lengths) for n in range(len(settings.lengths))]
        lengths = [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in settings.lengths]
        panel.set_xticks(ticks, lengths)
        of_each = (100 * right.sum(1) / texts.sum(1)).tolist()
        said = ", ".join(f"{of_each[n]:.1f} % at {lengths[n]}" for n in sorted({0, len(lengths) - 1}))
        panel.set_title(f"{name}, {who}: {said}\n({seeds_in_words(settings.seeds)})", fontsize=10)
        panel.set(xlabel="tokens of the text", ylabel="depth of the first needed fact, %")
    figure.colorbar(image, ax=axes, label="answers right, %")
    figure.savefig(path)
