"""Does the memory learn? Contestants on tasks that only a memory solves, on the same data in one run."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import pictures
from ..config import check_count, check_positive
from ..learning_rate import warmup_cosine
from ..settings import ModelSettings
from ..tasks import TASKS, Episode, KeyValue, Pixels, Task, digits
from .contestants import OWN, Build, Contestant, EncoderDecoder, build, sizes
from .meters import flops, machine
from .trials import Record, Report, Result, Trial, Tuned, check_different, seeds_in_words, tune

__all__ = ["LearningBenchmark", "descend", "optimizing", "run", "train"]

MODEL = ModelSettings(
    dim=64, slots=16, enc_depth=1, dec_depth=1, dec_overlap=0, heads=4, positions="relative", tie_embeddings=False
)
"""This model; the others get about as many parameters and carry about as many numbers."""
LONGER = {"retrieval": (16,), "rewrite": (16,), "one-fact": (128, 512)}
"""Segments beyond those of training, on which a task is judged too."""
WARM_UP, EVERY, EPISODES = 300, 100, 512
"""Steps in which the learning rate rises, before it falls to zero along a cosine; steps from one look at the held-out
episodes to the next; the number of these episodes."""
_METRICS = {"accuracy": "accuracy", "exact": "exact match", "bits": "bits"}
_VALIDATION, _TEST = 1_000_000, 1_000_001
"""Seeds of the episodes that choose the learning rate, and of those that judge a run."""


@dataclass(frozen=True, kw_only=True)
class LearningBenchmark:
    """Train this model with its memory and without on tasks that only a memory solves: same data and steps, in one run.

    With the first seed, each trains at every learning rate for the full number of steps. The best rate is then run with
    the other seeds. Best is: solves the task (twice in a row) in the fewest steps; if none does, the best final score
    on held-out episodes, then the best loss. The final table is measured on other episodes. Other packages' models
    take part in the repository: python -m benchmarks learn.
    """

    tasks: tuple[str, ...] = ("retrieval",)
    """Of copy, reverse, retrieval, rewrite, retrieval-16 (keys, values), one-fact, pairs-4, pairs-8, pairs-16, pairs-32
    (in one segment), pixels (8 x 8 digits of scikit-learn)."""
    contestants: tuple[str, ...] = ()
    """Models to compare, such as: memformer "memory off". Default: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """For parameters and data; the data are the same for all contestants."""
    learning_rates: tuple[float, ...] = (3e-4, 7e-4, 2e-3)
    """Tried for each contestant and task."""
    steps: int = 3000
    """Training steps of a trial."""
    batch_size: int = 64
    """Episodes in a step, of 1 segment (or pair) up to the task's own number."""
    questions: int = 1
    """In training, of a task of pairs: how many are asked at once, at most. It is judged with one."""
    model: ModelSettings = MODEL
    """Sizes of this model. A causal one has both depths' layers, which share out the slots; others are as large."""
    jobs: int = 0
    """How many trials run at a time, each in one thread; 0: one per core."""
    out: Path | None = None
    """Keep all trials in this JSON file. Trials that it already has are not run again."""
    plot: Path | None = None
    """Draw held-out scores against steps into this PNG file."""

    def __post_init__(self) -> None:
        for name in ("tasks", "seeds", "learning_rates"):
            check_different(name, getattr(self, name))
        if len(set(self.contestants)) < len(self.contestants):
            raise ValueError(f"contestants: expected each once, got {', '.join(self.contestants)}")
        for name in ("steps", "batch_size"):
            check_count(name, getattr(self, name))
        check_count("jobs", self.jobs, least=0)
        check_count("questions", self.questions)
        if self.questions > 1 and not any(isinstance(TASKS.get(name), KeyValue) for name in self.tasks):
            raise ValueError(f"questions: only tasks of pairs ask several, and tasks are {', '.join(self.tasks)}")
        self.model.memformer_config(1, 1 + self.model.dec_overlap)  # which the others are compared with
        for rate in self.learning_rates:
            check_positive("learning_rates", rate)
        if min(self.seeds) < 0 or max(self.seeds) >= _VALIDATION:
            raise ValueError(f"seeds: expected whole numbers from 0 to {_VALIDATION - 1:,}")


def run(settings: LearningBenchmark, entrants: Mapping[str, Build] = OWN) -> Iterator[str]:
    """Yield a line for each trial when it is done, then a table per task.

    Args:
        settings: what to do.
        entrants: the contestants that there are, by name.

    Raises:
        ValueError: an unknown task or contestant, or ``out`` holds trials of other settings.
        ImportError: a package for a task or a picture is missing.
    """
    pictures.check(settings.plot)
    tasks = {name: _tasks(settings, name) for name in settings.tasks}
    names = settings.contestants or tuple(entrants)
    for name in names:  # whatever is missing, or does not fit, is noticed before the first trial
        for task, _ in tasks.values():
            _contestant(settings, name, entrants, task)
    record = Record(settings.out, _fixed(settings))
    yield machine(torch.device("cpu"))
    yield (
        f"batches of {settings.batch_size}, {settings.steps:,} steps; AdamW, {WARM_UP} steps of warm-up, then a cosine "
        "to zero, gradients clipped at 1; this model: "
        + ", ".join(f"{name} {value}" for name, value in sizes(settings.model).items())
    )
    pairs = [(task, contestant) for task in settings.tasks for contestant in names]
    found = yield from tune(
        functools.partial(train, settings, entrants),
        [{"task": task, "contestant": contestant} for task, contestant in pairs],
        settings.learning_rates,
        settings.seeds,
        lambda trial, result: _badness(tasks[trial["task"]][0], result),
        lambda trial, result: _line(tasks[trial["task"]][0], trial, result),
        record,
        settings.jobs,
    )
    chosen = dict(zip(pairs, found, strict=True))
    for name in settings.tasks:
        yield ""
        yield from _table(name, tasks[name], {who: chosen[name, who] for who in names})
    if settings.plot is not None:
        _plot(tasks, names, chosen, settings.seeds, settings.plot)
        yield f"plot in {settings.plot}"


def _fixed(settings: LearningBenchmark) -> dict[str, object]:
    """What all trials of a file have in common."""
    fixed: dict[str, object] = {
        "benchmark": "learn",
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "model": sizes(settings.model),
        "every": EVERY,
        "episodes": EPISODES,
    }
    if settings.questions > 1:  # files from before have none
        fixed["questions"] = settings.questions
    return fixed


def _tasks(settings: LearningBenchmark, name: str) -> tuple[Task, Task]:
    """The task to train on, and the held-out one: the same, but for images."""
    if name == "pixels":
        return digits()
    if name not in TASKS:
        raise ValueError(f"tasks: expected some of {', '.join([*TASKS, 'pixels'])}, got {name!r}")
    task = TASKS[name]
    if isinstance(task, KeyValue):
        return dataclasses.replace(task, questions=min(task.pairs, settings.questions)), task
    return task, task


def _contestant(settings: LearningBenchmark, name: str, entrants: Mapping[str, Build], task: Task) -> Contestant:
    return build(name, entrants, settings.model.memformer_config(task.vocabulary, task.length))


def _judged_on(name: str, task: Task) -> dict[str, tuple[Task, int]]:
    """By what a table calls them: the tasks that a run is judged on in the end, and their segments of information."""
    if isinstance(task, KeyValue):
        return {str(task.pairs): (task, task.segments)}
    return {str(n): (task, n) for n in (task.segments, *LONGER.get(name, ()))}


def train(settings: LearningBenchmark, entrants: Mapping[str, Build], trial: Trial) -> Result:
    """One trial: a contestant, a task, a learning rate, a seed."""
    task, held_out = _tasks(settings, trial["task"])
    torch.manual_seed(trial["seed"])
    model = _contestant(settings, trial["contestant"], entrants, task)
    if isinstance(task, KeyValue) and isinstance(model, EncoderDecoder):  # which sees the segment before an answer
        task, held_out = (dataclasses.replace(one, segments=2) for one in (task, held_out))
    parameters = list(model.parameters())
    curve_of_rates = functools.partial(warmup_cosine, steps=settings.steps, warmup=WARM_UP)
    optimizer, schedule = optimizing(parameters, trial["learning_rate"], curve_of_rates)
    generator = torch.Generator().manual_seed(trial["seed"])
    validation = _episodes(held_out, _VALIDATION, task.segments)
    costs: dict[tuple[torch.Size, int], int] = {}  # of an episode, by its shape and what it asks

    curve: list[tuple[int, float, float]] = []
    report = Report(trial, settings.steps)
    seconds, spent, solved_at, diverged_at = 0.0, 0, None, None
    for step in range(1, settings.steps + 1):
        episode = task.eased((step - 1) / settings.steps).exercise(settings.batch_size, generator)
        kind = episode.tokens.shape[1:], int(episode.answers[0].sum())
        if kind not in costs:
            costs[kind] = _flops(model, episode)
        begun = time.perf_counter()
        loss = model(episode).loss(episode)
        if not loss.isfinite():
            diverged_at = step
            break
        descend(loss, parameters, optimizer, schedule)
        seconds += time.perf_counter() - begun
        spent += settings.batch_size * costs[kind]
        if step % EVERY and step < settings.steps:
            continue
        curve.append((step, *_judge(model, task, validation)))
        report(step, f"{loss.item() / math.log(2):.2f} bits in training, {100 * curve[-1][1]:.1f} % right")
        # What counts as solved in bits is a mark on the way; there runs are compared by where they end.
        if task.metric != "bits" and len(curve) > 1 and all(task.solves(score) for _, score, _ in curve[-2:]):
            solved_at = solved_at or step
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "numbers_carried": model.numbers_carried(task.length),
        "curve": curve,
        "solved_at": solved_at,
        "diverged_at": diverged_at,
        "scores": {
            size: _judge(model, task, _episodes(easier, _TEST, segments))
            for size, (easier, segments) in _judged_on(trial["task"], held_out).items()
        },
        "seconds": seconds,
        "flops": spent,
        "flops_per_step": spent / step,
    }


def optimizing(
    parameters: Sequence[nn.Parameter], learning_rate: float, curve_of_rates: Callable[[int], float]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and its rates: shares of ``learning_rate`` by step."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, curve_of_rates)


def descend(
    loss: Tensor,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """A step of training, with gradients clipped at 1."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def _flops(model: Contestant, episode: Episode) -> int:
    """What training on one episode costs, all counted; a batch costs as many times that."""
    one = Episode(*(part[:1] for part in episode))
    with torch.random.fork_rng(devices=[]):  # a dropout draws nothing from what the run will draw
        cost = flops(lambda: model(one).loss(one).backward())
    model.zero_grad()
    return cost


def _episodes(task: Task, seed: int, segments: int) -> list[Episode]:
    """Held-out episodes in batches that any length fits in memory: of images, each second one for each purpose."""
    generator, count = torch.Generator().manual_seed(seed), EPISODES
    if isinstance(task, Pixels):
        task = dataclasses.replace(task, images=task.images[seed % 2 :: 2])
        count = min(count, len(task.images))
    tokens, answers = task.draw(count, generator, segments)
    return [Episode(*part) for part in zip(tokens.split(128), answers.split(128), strict=True)]


@torch.no_grad()
def _judge(model: Contestant, task: Task, episodes: Sequence[Episode]) -> tuple[float, float]:
    """Accuracy, of whole episodes where the task wants that, and bits per answer (infinite where not a number)."""
    right, nats, count, wanted_right = 0, 0.0, 0, 0
    model.eval()
    for episode in episodes:
        wanted, logits = episode.tokens[episode.answers], model(episode).logits
        hits = torch.ones_like(episode.answers).masked_scatter(episode.answers, logits.argmax(-1) == wanted)
        counted = hits.flatten(1).all(1) if task.metric == "exact" else hits[episode.answers]
        right, wanted_right = right + int(counted.sum()), wanted_right + len(counted)
        nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
        count += len(wanted)
    model.train()
    return right / wanted_right, math.inf if math.isnan(nats) else nats / count / math.log(2)


def _score(task: Task, judged: Sequence[float]) -> float:
    """In the task's metric, of accuracy and bits."""
    return judged[1] if task.metric == "bits" else judged[0]


def _badness(task: Task, result: Result) -> tuple[float, float, float]:
    """When it was solved, and how well and with what loss it ended, by which learning rates are compared."""
    accuracy, bits = result["curve"][-1][1:] if result["curve"] else (0.0, math.inf)
    return result["solved_at"] or math.inf, bits if task.metric == "bits" else -accuracy, bits


def _shown(task: Task, score: float) -> str:
    return f"{score:.3f}" if task.metric == "bits" else f"{100 * score:.{1 if score > 0.001 else 2}f}"


def _line(task: Task, trial: Trial, result: Result) -> str:
    unit = "bits" if task.metric == "bits" else "% right"
    scores = ", ".join(f"{_shown(task, _score(task, s))} {unit} at {n}" for n, s in result["scores"].items())
    steps = result["curve"][-1][0] if result["curve"] else 0
    end = "solved, " if result["solved_at"] else "diverged, " if result["diverged_at"] else ""
    return (
        f"{trial['task']:<10} {trial['contestant']:<18} rate {trial['learning_rate']:<7g} "
        f"seed {trial['seed']:<3} {steps:>6,} steps {result['seconds']:>6.0f} s  {end}{scores}"
    )


def _table(name: str, tasks: tuple[Task, Task], chosen: dict[str, Tuned]) -> Iterator[str]:
    task, held_out = tasks
    unit = "bits" if task.metric == "bits" else "%"
    by = "pairs in one segment" if isinstance(task, KeyValue) else "segments of information"
    some = next(iter(chosen.values())).results
    lengths = list(some[0]["scores"])
    yield (
        f"{name}: {len(some)} seeds, mean (min-max) of {_METRICS[task.metric]} in {unit} by {by}; "
        f"chance {_shown(task, held_out.chance)}, solved from {_shown(task, held_out.solved)}"
    )
    yield (
        f"{'contestant':<18} {'parameters':>10} {'carried':>8} {'rate':>7}"
        + "".join(f"{f'at {n}':>22}" for n in lengths)
        + f"{'solved: seeds, steps':>22} {'MFLOP/step':>11} {'TFLOP spent':>12} {'s per run':>10}"
    )
    for contestant, (rate, results, others) in chosen.items():
        cells = ""
        for n in lengths:
            scores = [_score(task, result["scores"][n]) for result in results]
            mean, low, high = (_shown(task, x) for x in (statistics.mean(scores), min(scores), max(scores)))
            cells += f"{f'{mean} ({low}-{high})':>22}"
        steps = [result["solved_at"] for result in results if result["solved_at"]]
        solved = f"{len(steps)}/{len(results)}" + (f", {statistics.median(steps):,.0f}" if steps else "")
        yield (
            f"{contestant:<18} {results[0]['parameters']:>10,} {results[0]['numbers_carried']:>8,} "
            f"{rate:>7g}{cells}{solved:>22} {results[0]['flops_per_step'] / 1e6:>11,.0f} "
            f"{sum(result['flops'] for result in results + others) / 1e12:>12,.2f} "
            f"{statistics.median(result['seconds'] for result in results):>10,.0f}"
        )


def _over_steps(task: Task, curves: list[list[tuple[int, float, float]]]) -> tuple[list[int], np.ndarray]:
    """The steps at which any run was judged, and all runs' scores there; a run that diverged keeps its last one."""
    steps = sorted({point[0] for curve in curves for point in curve})
    held = [[max((p for p in curve if p[0] <= step), default=curve[0]) for step in steps] for curve in curves]
    return steps, np.array([[_score(task, point[1:]) for point in points] for points in held])


def _at_the_end(task: Task, tuned: Tuned) -> float:
    """The mean over the seeds of what the table has in its first column of scores."""
    return statistics.mean(_score(task, next(iter(result["scores"].values()))) for result in tuned.results)


def _plot(
    tasks: dict[str, tuple[Task, Task]],
    names: Sequence[str],
    chosen: dict[tuple[str, str], Tuned],
    seeds: Sequence[int],
    path: Path,
) -> None:
    """Scores against steps. Each panel's title says which two contestants come out best."""
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = pictures.new_figure(5 * columns, 3.6 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (name, (task, held_out)), panel in zip(tasks.items(), panels, strict=False):
        percent = 1 if task.metric == "bits" else 100
        for contestant in names:
            curves = [result["curve"] for result in chosen[name, contestant].results if result["curve"]]
            if not curves:
                continue
            steps, scores = _over_steps(task, curves)
            scores = percent * scores
            (line,) = panel.plot(steps, scores.mean(0), label=contestant, linewidth=1.8, marker=".")
            panel.fill_between(steps, scores.min(0), scores.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        panel.axhline(percent * held_out.chance, color="0.5", linestyle=":", linewidth=1)
        ends = {who: _at_the_end(task, chosen[name, who]) for who in names}
        ranked = sorted(ends, key=ends.__getitem__, reverse=task.metric != "bits")[:2]
        title = f"{name}: " + ", then ".join(f"{who} {_shown(task, ends[who])}" for who in ranked)
        panel.set_title(f"{title}\n({seeds_in_words(seeds)})", fontsize=10)
        panel.set(xlabel="training steps", ylabel=f"{_METRICS[task.metric]}{', %' * (percent == 100)}")
        if percent == 100:
            panel.set_ylim(-3, 103)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    for panel in panels:
        panel.remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * columns), frameon=False)
    figure.savefig(path)
