"""The loop of training, resumable exactly. It yields metrics; whoever calls it prints them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from .. import folders, replay
from ..data.lanes import LanesState
from ..data.segments import Segment
from ..device import summing_device
from ..evaluation import HeldOut, evaluate
from ..files import replace_file
from ..inspection import memory_health
from ..interface import Memory, SegmentModel
from ..models import make_model
from ..parallel import Ranks, full, gradient_sync
from ..rollouts import verify_rollout
from ..settings import TrainingConfig, to_yaml
from . import checkpoints, resume
from .assemble import assemble
from .callbacks import Callback, Callbacks
from .loggers import loggers
from .metrics import ByObjective, Changed, MetricsLog, Pace, StepMetrics
from .parts import Best, Parts, Progress, begun_anew, only_finite
from .samples import add_sample, sample
from .update import Update

__all__ = ["Run"]

VERIFIED_SEGMENTS = 3
"""Enough for a first, an inner and a last segment."""


class _Step(NamedTuple):
    """What one update was like."""

    nats: Tensor
    """Scalar: this process's part of the summed loss."""
    tokens: int
    """Targets that count, of all processes."""
    judged: int
    """How many of them the summed loss is of: none, in a step that was left out because its loss is not finite."""
    gradient_norm: float
    segment: Segment
    """The last rollout's first one, and the memory before it."""
    memory: Memory | None


class Run:
    """One training run in a folder; under torch.distributed, this process's part in it.

    Args:
        settings: what to train, and how.
        parts: what the run works with; by default :func:`~memformer.training.assemble` makes them of the settings. With
            ``dataclasses.replace(assemble(settings), ...)`` a run has others.
        callbacks: look on, beside the loggers that the settings name; of several processes in the first one.

    Attributes:
        parts: as given. ``training`` and ``held_out`` documents, ``tokenizer`` and ``model`` are theirs; ``model`` has
            the newest weights, not their average.
        stopping: whether :meth:`train` ends after the step under way, in all processes.

    Raises:
        ValueError, FileExistsError, FileNotFoundError: see :func:`~memformer.training.assemble`.
    """

    def __init__(self, settings: TrainingConfig, parts: Parts | None = None, callbacks: Sequence[Callback] = ()):
        if not isinstance(settings, TrainingConfig):
            raise ValueError(f"settings: expected a TrainingConfig, got {settings!r}")
        self.settings = settings
        # Before anything that takes time: what they need may not be installed.
        self._callbacks = Callbacks([] if Ranks().rank else [*loggers(settings), *callbacks])
        self.parts = parts = assemble(settings, self._callbacks.phase) if parts is None else parts
        self.training, self.held_out = parts.training, parts.held_out
        self.tokenizer, self.model = parts.tokenizer, parts.model
        self._update = Update(parts, settings)
        self.stopping = False
        self._asked_to_stop = False
        self._log: MetricsLog | None = None
        self._by_objective: ByObjective | None = None
        self._entered = 0.0
        self._saved = self.step
        self._lost_memories = torch.zeros((), dtype=torch.int64, device=parts.device)
        self._updating = self._half_updated = False
        parts.optimizer.register_step_pre_hook(self._begins_to_update)

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.parts.progress.step

    @property
    def best(self) -> Best | None:
        """``{"step", "loss_nats"}`` of the best evaluation so far."""
        return self.parts.progress.best

    @property
    def stopped_early(self) -> bool:
        """Whether the last ``patience`` evaluations were no better than the best one."""
        return resume.stopped_early(self.parts, self.settings)

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        return self.settings.optimizer.learning_rate_at(step, self.settings.steps)

    def stop(self) -> None:
        """Let :meth:`train` save and end after the next step, in all processes; safe in a signal handler.

        An evaluation that is due then is made when the run goes on.
        """
        self._asked_to_stop = True

    def verify(self) -> replay.Verdict:
        """Compare replay with plain autograd on the next segments of the documents. The run is afterwards as before.

        Raises:
            ValueError: FSDP divides the model, whose gradients plain autograd cannot give.
        """
        if gradient_sync(self.model) is not None:
            raise ValueError(
                "verify: plain autograd cannot differentiate a model that FSDP divides; use --parallel ddp"
            )
        stream, progress = self.parts.stream, self.parts.progress
        place = stream.state_dict()
        segments = [self._read(segment) for segment in stream.rollout(VERIFIED_SEGMENTS)]
        segments[0] = begun_anew(segments[0], progress.memory)
        stream.load_state_dict(place)
        self.model.train()
        with self._autocast():
            return verify_rollout(self.model, segments, progress.memory)

    def train(self) -> Iterator[StepMetrics | HeldOut]:
        """Train until ``settings.steps``, :meth:`stop`, or early stopping; yield what is written to ``metrics.jsonl``.

        A run that ends by itself ends with an evaluation. Whatever ends it, an exception in the middle of a step
        included, it can be called again and goes on after the last whole step.

        Raises:
            FloatingPointError: the gradient is not finite, more often than may be passed over.
            BlockingIOError: another process trains in the same folder, or has trained there since this run was made.
            OSError: something cannot be written; the checkpoints are untouched.
            ValueError, MemoryError: the evaluation failed, after its checkpoint was written.
            RuntimeError: an exception came in the middle of an update of the weights.
        """
        if self._half_updated:
            raise RuntimeError(
                "this run was interrupted in the middle of an update, so its weights are neither the former nor the "
                "new ones: make a new Run with resume=True, which goes on from the newest checkpoint"
            )
        if not self.parts.ranks.rank:
            self.settings.out.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext() if self.parts.ranks.rank else checkpoints.lock(self.settings.out):
            if self._log is None and not self.parts.ranks.rank:
                self._log = self._opened()
            self._callbacks.start(self)
            try:
                yield from self._train()
            finally:
                self._callbacks.end(self)
                self.stopping = self._asked_to_stop = False

    def _opened(self) -> MetricsLog:
        """The folder made ready for this run, once it is locked."""
        settings, changes = self.settings, self.parts.changes
        newer = [folder for folder in folders.all_checkpoints(settings.out) if folders.step_of(folder) > self.step]
        damaged = [folder for folder in newer if folders.damage(folder) is not None]
        if len(damaged) < len(newer):
            raise BlockingIOError(
                f"{settings.out}: another training has come to {newer[-1].name} there since this one was begun; go on "
                "from there with --resume, or choose another --out"
            )
        checkpoints.set_aside(settings.out, damaged)
        replace_file(settings.out / "run.yaml", to_yaml(resume.as_kept(settings)))
        again = ["changed", *(["held_out"] if self.parts.progress.due else [])]
        log = MetricsLog(settings.out, self.step, again)
        if changes:
            log.write("changed", Changed(self.step, {name: (before, now) for name, before, now, _ in changes}))
        return log

    def _train(self) -> Iterator[StepMetrics | HeldOut]:
        settings, device = self.settings, self.parts.device
        log_every, sample_every = settings.output.log_every, settings.output.sample_every
        progress = self.parts.progress
        self.model.train()
        nats, tokens, judged, seconds = torch.zeros((), device=device), 0, 0, 0.0
        mixed = self.parts.stream.objectives is not None
        self._by_objective = ByObjective(self.tokenizer, device) if mixed else None
        self._entered = time.perf_counter() - progress.seconds
        pace = Pace(self.step, progress.seconds)
        yield from self._evaluate_if_due()
        self._callbacks.phase("training", self.step, settings.steps)
        while self.step < settings.steps and not self.stopping and not self.stopped_early:
            # The first step, so that there is something to see at once.
            watched = self.step in (0, settings.steps - 1) or self.step % log_every == log_every - 1
            watch = replay.MemoryGradients() if watched else None
            rate, horizon = self.learning_rate(self.step), settings.rollout.horizon_at(self.step)
            began = time.perf_counter()
            taken = self._take_step(rate, horizon, watch)
            nats, tokens, seconds = nats + taken.nats, tokens + taken.tokens, seconds + time.perf_counter() - began
            judged += taken.judged
            if watched or self.stopping:
                mean = float(self.parts.ranks.sum(nats)) / judged if judged else math.nan
                self_attention, slot_diversity = self._health(taken.segment, taken.memory)
                progress.seconds = time.perf_counter() - self._entered
                self._warn_of_lost_memories()
                metrics = StepMetrics(
                    step=self.step,
                    loss_nats=mean,
                    bits_per_token=mean / math.log(2),
                    tokens_per_second=tokens / seconds,
                    learning_rate=rate,
                    gradient_norm=taken.gradient_norm,
                    skipped=self.parts.progress.skipped,
                    horizon=horizon,
                    memory_gradient=self._reach(watch),
                    self_attention=self_attention,
                    slot_diversity=slot_diversity,
                    tokens_seen=progress.tokens,
                    epoch=self.parts.stream.epochs_read,
                    wall_seconds=progress.seconds,
                    seconds_left=pace.left(self.step, progress.seconds, settings.steps),
                    peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
                    **self._losses_by_objective(),
                )
                self._write("step", metrics)
                yield metrics
                nats, tokens, judged, seconds = torch.zeros_like(nats), 0, 0, 0.0
            if progress.due or self.stopping or self.step % settings.output.save_every == 0:
                self._save()
            yield from self._evaluate_if_due()
            if sample_every and self.step % sample_every == 0:
                self._sample()
            self._callbacks.phase("training", self.step, settings.steps)

    def _take_step(self, rate: float, horizon: int, watch: replay.MemoryGradients | None) -> _Step:
        """One update, of as many rollouts as the settings accumulate: whole, or not at all."""
        place, before = self.parts.stream.state_dict(), dataclasses.replace(self.parts.progress)
        self._updating = whole = False
        try:
            loss, counted, first, memory = self._differentiate(horizon, watch)
            with _not_interrupted():
                norm = self._update.step(rate, loss)
                self._count(counted)
                self._update.average()
                whole = True
        except BaseException:
            if not whole:
                self._take_back(place, before)
            raise
        ranks = self.parts.ranks
        nats, judged = loss / ranks.size * counted, counted
        if not math.isfinite(norm) and not ranks.sum(nats.clone()).isfinite():
            nats, judged = torch.zeros_like(nats), 0
        return _Step(nats, counted, judged, norm, first, memory)

    def _count(self, tokens: int) -> None:
        settings, progress = self.settings, self.parts.progress
        progress.step += 1
        progress.tokens += tokens
        eval_every = settings.evaluation.eval_every
        progress.due = self.step == settings.steps or bool(eval_every and self.step % eval_every == 0)

    def _begins_to_update(self, *_: object) -> None:
        self._updating = True

    def _take_back(self, place: LanesState, before: Progress) -> None:
        """After an exception in a step: as before it. What was begun of an update of the weights cannot be."""
        parts = self.parts
        self._half_updated = self._updating
        try:
            parts.stream.load_state_dict(place)
        except Exception:  # documents that can be gone through once
            self._half_updated = True
        vars(parts.progress).update(vars(before))
        self.model.zero_grad(set_to_none=True)
        if parts.scaler.is_enabled():  # a new one knows of no gradients that it has unscaled
            scaler = torch.amp.GradScaler(parts.device.type)
            scaler.load_state_dict(parts.scaler.state_dict())
            vars(parts.scaler).update(vars(scaler))

    def _differentiate(
        self, horizon: int, watch: replay.MemoryGradients | None
    ) -> tuple[Tensor, int, Segment, Memory | None]:
        """The gradients of a step. Returns the loss, how many targets count, and what began the last rollout."""
        settings, ranks, device = self.settings, self.parts.ranks, self.parts.device
        progress = self.parts.progress
        rollouts = [self.parts.stream.rollout(horizon) for _ in range(settings.rollout.accumulate)]
        own = sum(_counted(segment) for segments in rollouts for segment in segments)
        counted, stopping = ranks.sum(torch.tensor([own, self._asked_to_stop], device=device)).tolist()
        self.stopping = bool(stopping)
        loss = torch.zeros((), device=device)
        # Dropout is drawn from a seed of its own in each step, so that a resumed run needs no generator's state.
        with torch.random.fork_rng(enabled=settings.model.dropout > 0):
            if settings.model.dropout > 0:
                # Python hashes a tuple of integers alike in every process and version, and saved runs rely on it.
                torch.manual_seed(hash((settings.seed, progress.step, ranks.rank)))
            for i, segments in enumerate(rollouts):
                last = i == len(rollouts) - 1
                segments = [self._read(segment) for segment in segments]
                segments[0] = begun_anew(segments[0], progress.memory)
                first, before = segments[0], progress.memory
                loss += self._back_propagate(segments, counted / ranks.size, last, watch if last else None)
        return loss, int(counted), first, before

    def _read(self, segment: Segment) -> Segment:
        """A segment of the stream, on the device, as the model reads it."""
        return self.model.of_stream(segment).to(self.parts.device)

    def _back_propagate(
        self, segments: list[Segment], divisor: float, last: bool, watch: replay.MemoryGradients | None
    ) -> Tensor:
        """One rollout's gradients; processes exchange them after the last one of the step."""
        module, progress = self.parts.rollouts, self.parts.progress
        tally = None if self._by_objective is None else self._by_objective.add
        waits = module.no_sync() if isinstance(module, DistributedDataParallel) and not last else None
        with waits or contextlib.nullcontext():
            with self._autocast():
                loss, memory = module(segments, progress.memory, divisor, last, watch, tally)
            if loss.requires_grad:
                self.parts.scaler.scale(loss).backward()
        progress.memory, lost = only_finite(tree_map(Tensor.detach, memory))
        self._lost_memories += lost
        return loss.detach()

    def _warn_of_lost_memories(self) -> None:
        lost = int(self.parts.ranks.sum(self._lost_memories))
        self._lost_memories = torch.zeros_like(self._lost_memories)
        if lost and not self.parts.ranks.rank:
            warnings.warn(
                f"until step {self.step}: {lost} times a lane's memory was not finite, and it went on with the initial "
                "one; if this comes again and again, lower --learning-rate or use another --precision",
                stacklevel=2,
            )

    def _save(self) -> None:
        self.parts.progress.seconds = time.perf_counter() - self._entered
        self._callbacks.phase("saving")
        resume.save(self.parts, self.settings)
        self._saved = self.step
        self._callbacks.checkpoint(folders.checkpoint(self.settings.out, self.step))

    def _autocast(self) -> torch.autocast:
        precision = self.parts.precision
        return torch.autocast(self.parts.device.type, precision, enabled=precision is not torch.float32)

    def averaged(self) -> contextlib.AbstractContextManager[SegmentModel]:
        """The model with the weights' moving average in place of the newest, where the run keeps one."""
        return self._update.averaged()

    def _reach(self, watch: replay.MemoryGradients | None) -> float | None:
        """How far credit reaches, see :class:`StepMetrics`; over all processes."""
        norms = [] if watch is None else watch.norms[1:-1]  # the boundaries inside the rollout
        if len(norms) < 2:
            return None
        ends = torch.tensor([norms[0], norms[-1]], dtype=torch.float64, device=summing_device(self.parts.device))
        first, last = self.parts.ranks.sum(ends.square()).sqrt().tolist()
        return first / last if last else None

    def _health(self, segment: Segment, memory: Memory | None) -> tuple[float, float]:
        """``(self_attention, slot_diversity)``, the mean over processes."""
        health, ranks = memory_health(self.model, segment, memory), self.parts.ranks
        own = [health.self_attention, health.slot_diversity]
        shares = torch.tensor(own, dtype=torch.float64, device=summing_device(self.parts.device))
        self_attention, diversity = (ranks.sum(shares) / ranks.size).tolist()
        return self_attention, diversity

    def _losses_by_objective(self) -> dict[str, float | None]:
        """Their fields of :class:`StepMetrics`, since the previous line; over all processes."""
        found = self._by_objective
        return {} if found is None else found.take(self.parts.ranks.sum(found.sums))

    def _sample(self) -> None:
        """What the model writes now, with the weights that a checkpoint has. Training does not fail by it."""
        self._callbacks.phase("sampling")
        settings = self.settings
        with self.averaged() as model, torch.no_grad():
            if gradient_sync(model) is not None:
                model = _whole(model)
            if self._log is None:
                return
            try:
                prompt = "" if settings.data else "def "
                text = sample(model, self.tokenizer, prompt, settings.output.sample_tokens)
                add_sample(settings.out, self.step, text)
            except Exception as error:
                warnings.warn(f"no sample at step {self.step} ({type(error).__name__}: {error})", stacklevel=2)
                return
        self._callbacks.sample(text, self.step)

    def evaluate(self) -> HeldOut:
        """The model on the held-out documents, with the weights that a checkpoint has; see :func:`evaluate`."""
        with self.averaged() as model, self._autocast():
            device = self.parts.device
            return evaluate(
                model, self.held_out, self.tokenizer, step=self.step, device=device, progress=self._evaluating
            )

    def _evaluating(self, done: int, total: int) -> None:
        self._callbacks.phase("evaluating", done, total)

    def _evaluate_if_due(self) -> Iterator[HeldOut]:
        """The evaluation of this step, of which there is a checkpoint then; not of a run that is asked to stop."""
        progress = self.parts.progress
        if not progress.due or (self.stopping and self.step < self.settings.steps):
            return
        if self._saved != self.step:
            self._save()
        result = self._evaluate_or_explain()
        best, since = progress.best, progress.evaluations_since_best + 1
        if math.isfinite(result.loss_nats) and (best is None or result.loss_nats < best["loss_nats"]):
            best, since = {"step": self.step, "loss_nats": result.loss_nats}, 0
        with _not_interrupted():
            self._write("held_out", result)
            progress.best, progress.evaluations_since_best, progress.due = best, since, False
            resume.record_evaluation(self.parts, self.settings)
        yield result

    def _evaluate_or_explain(self) -> HeldOut:
        where = f"the evaluation after step {self.step}"
        saved = f"Nothing is lost: {folders.checkpoint(self.settings.out, self.step)} is saved, and --resume goes on"
        try:
            return self.evaluate()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise MemoryError(
                    f"{where} ran out of memory ({str(error).splitlines()[0]}). {saved}: with --eval-every 0 at the "
                    "end only, with a smaller --eval-limit over less"
                ) from error
            raise
        except OSError as error:
            raise OSError(f"{where}: {error}. {saved}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}. {saved} once the held-out documents are mended") from error

    def _write(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        if self._log is not None:
            self._log.write(event, metrics)
        self._callbacks.metrics(event, metrics)


@contextlib.contextmanager
def _not_interrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of what is inside, where it would raise KeyboardInterrupt in the middle of it."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt


def _counted(segment: Segment) -> int:
    """How many targets of a segment count in the loss."""
    assert segment.tgt_mask is not None
    return int(segment.tgt_mask[:, 1:].sum())


def _whole(model: SegmentModel) -> SegmentModel:
    """A copy, in each process, of a model whose parameters FSDP divides."""
    with torch.random.fork_rng():
        copy = make_model(model.config)
    weights = {name: full(p.detach()) for name, p in model.named_parameters()}
    copy.load_state_dict(weights, strict=False)
    return copy.to(next(iter(weights.values())).device)
