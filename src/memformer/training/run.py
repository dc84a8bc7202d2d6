"""The loop of training, resumable exactly. It yields metrics; whoever calls it prints them."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import folders, replay
from ..data.segments import Segment
from ..device import is_out_of_memory, seeded, summing_device
from ..evaluation import HeldOut, evaluate
from ..files import replace_file
from ..inspection import memory_health
from ..interface import Memory, SegmentModel
from ..models import make_model
from ..parallel import Ranks, gradient_sync
from ..pretrained import full
from ..rollouts import verify_rollout
from ..settings import TrainingConfig, to_yaml
from . import checkpoints, resume
from .assemble import assemble
from .callbacks import Callback, Callbacks
from .loggers import loggers
from .metrics import Changed, MetricsLog, Pace, StepMetrics
from .parts import Best, Parts, begun_anew
from .samples import add_sample, sample
from .step import Step, Stepper
from .update import Update, not_interrupted

__all__ = ["Run"]

VERIFIED_SEGMENTS = 3
"""Enough for a first, an inner and a last segment."""


@dataclass
class _Sums:
    """What is added up from one line of metrics to the next."""

    nats: Tensor | float = 0.0
    tokens: int = 0
    judged: Tensor | int = 0
    seconds: float = 0.0

    def add(self, step: Step, seconds: float) -> None:
        """One more step, which took so long."""
        self.nats, self.seconds = self.nats + step.nats, self.seconds + seconds
        self.tokens, self.judged = self.tokens + step.tokens, self.judged + step.judged


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
        self._stepper = Stepper(parts, settings, self._update)
        self.stopping = self._asked_to_stop = False
        self._log: MetricsLog | None = None
        self._entered = 0.0
        self._saved = self.step

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
        segments = [
            self.model.of_stream(segment).to(self.parts.device) for segment in stream.rollout(VERIFIED_SEGMENTS)
        ]
        segments[0] = begun_anew(segments[0], progress.memory)
        stream.load_state_dict(place)
        longest = self.settings.rollout.horizon_at(self.settings.steps)
        wavefront = None if longest >= VERIFIED_SEGMENTS else False  # as in training, which has no rollout so long
        self.model.train()
        with self.parts.autocast():
            return verify_rollout(self.model, segments, progress.memory, wavefront=wavefront)

    def train(self) -> Iterator[StepMetrics | HeldOut]:
        """Train until ``settings.steps``, :meth:`stop`, or early stopping; yield what is written to ``metrics.jsonl``.

        A run that ends by itself ends with an evaluation. Whatever ends it, an exception in the middle of a step
        included, it can be called again and goes on after the last whole step.

        Raises:
            FloatingPointError: the gradient is not finite, more often than may be passed over.
            BlockingIOError: another process trains in the same folder, or has trained there since this run was made.
            OSError: something cannot be written; the checkpoints are untouched.
            ValueError, MemoryError: the evaluation failed, after its checkpoint was written.
            RuntimeError: an exception came in the middle of an update of the weights; or gradients are switched off.
        """
        if self._stepper.half_updated:
            raise RuntimeError(
                "this run was interrupted in the middle of an update, so its weights are neither the former nor the "
                "new ones: make a new Run with resume=True, which goes on from the newest checkpoint"
            )
        ranks, out = self.parts.ranks, self.settings.out
        with contextlib.ExitStack() as held:
            with ranks.together():
                if not ranks.rank:
                    out.mkdir(parents=True, exist_ok=True)
                    held.enter_context(checkpoints.lock(out))
                    self._open()
                self._callbacks.start(self)
            try:
                yield from self._train()
            finally:
                self._callbacks.end(self)
                self.stopping = self._asked_to_stop = False

    def _open(self) -> None:
        """Make the folder ready for this run, once it is locked."""
        settings, changes = self.settings, self.parts.changes
        newer = [folder for folder in folders.all_checkpoints(settings.out) if folders.step_of(folder) > self.step]
        damaged = [folder for folder in newer if folders.damage(folder) is not None]
        if len(damaged) < len(newer):
            raise BlockingIOError(
                f"{settings.out}: another training has come to {newer[-1].name} there since this one was begun; go on "
                "from there with --resume, or choose another --out"
            )
        if self._log is not None:
            return
        checkpoints.set_aside(settings.out, damaged)
        replace_file(settings.out / "run.yaml", to_yaml(resume.as_kept(settings)))
        again = ["changed", *(["held_out"] if self.parts.progress.due else [])]
        self._log = MetricsLog(settings.out, self.step, again)
        if changes:
            changed = {change.name: (change.before, change.now) for change in changes}
            self._log.write("changed", Changed(self.step, changed))

    def _train(self) -> Iterator[StepMetrics | HeldOut]:
        steps, output, progress = self.settings.steps, self.settings.output, self.parts.progress
        self.model.train()
        self._entered = time.perf_counter() - progress.seconds
        sums, pace = _Sums(), Pace(self.step, progress.seconds)
        yield from self._evaluate_if_due()
        self._callbacks.phase("training", self.step, steps)
        while self.step < steps and not self.stopping and not self.stopped_early:
            if not torch.is_grad_enabled():
                raise RuntimeError("train: gradients are off here (torch.no_grad?): nothing would be learned")
            # The first step, so that there is something to see at once.
            watched = self.step in (0, steps - 1) or self.step % output.log_every == output.log_every - 1
            watch = replay.MemoryGradients() if watched else None
            began = time.perf_counter()
            taken = self._stepper.take(watch, self._asked_to_stop)
            self.stopping = taken.stopping
            saving = progress.due or self.stopping or self.step % output.save_every == 0
            if watched or saving:
                self._stepper.settle()
            sums.add(taken, time.perf_counter() - began)
            if watched or self.stopping:
                metrics, sums = self._metrics(taken, sums, watch, pace), _Sums()
                self._write("step", metrics)
                yield metrics
            if saving:
                self._save()
            yield from self._evaluate_if_due()
            if output.sample_every and self.step % output.sample_every == 0:
                self._sample()
            self._callbacks.phase("training", self.step, steps)

    def _metrics(self, taken: Step, sums: _Sums, watch: replay.MemoryGradients | None, pace: Pace) -> StepMetrics:
        """The line after a step, which all processes make together."""
        progress, device = self.parts.progress, self.parts.device
        nats = float(self.parts.ranks.sum(torch.as_tensor(sums.nats, device=device)))
        judged = int(sums.judged)
        mean = nats / judged if judged else math.nan
        self_attention, slot_diversity = self._health(taken.segment, taken.memory)
        progress.seconds = time.perf_counter() - self._entered
        self._warn_of_lost_memories()
        found = self._stepper.by_objective
        return StepMetrics(
            step=self.step,
            loss_nats=mean,
            bits_per_token=mean / math.log(2),
            tokens_per_second=sums.tokens / sums.seconds,
            learning_rate=taken.learning_rate,
            gradient_norm=float(taken.gradient_norm),
            skipped=progress.skipped,
            horizon=taken.horizon,
            memory_gradient=self._reach(watch),
            self_attention=self_attention,
            slot_diversity=slot_diversity,
            tokens_seen=progress.tokens,
            epoch=self.parts.stream.epochs_read,
            wall_seconds=progress.seconds,
            seconds_left=pace.left(self.step, progress.seconds, self.settings.steps),
            peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            **({} if found is None else found.take(self.parts.ranks.sum(found.sums))),
        )

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
        health, ranks = memory_health(self.model, begun_anew(segment, memory), memory), self.parts.ranks
        own = [health.self_attention, health.slot_diversity]
        shares = torch.tensor(own, dtype=torch.float64, device=summing_device(self.parts.device))
        self_attention, diversity = (ranks.sum(shares) / ranks.size).tolist()
        return self_attention, diversity

    def _warn_of_lost_memories(self) -> None:
        lost = int(self.parts.ranks.sum(self._stepper.lost_memories))
        self._stepper.lost_memories.zero_()
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

    def averaged(self) -> contextlib.AbstractContextManager[SegmentModel]:
        """The model with the weights' moving average in place of the newest, where the run keeps one."""
        return self._update.averaged()

    def evaluate(self) -> HeldOut:
        """The model on the held-out documents, with the weights that a checkpoint has; see :func:`evaluate`."""
        with self.averaged() as model, self.parts.autocast():
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
        with not_interrupted():
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
            if is_out_of_memory(error):
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


def _whole(model: SegmentModel) -> SegmentModel:
    """A copy, in each process, of a model whose parameters FSDP divides."""
    with seeded(0, torch.device("cpu")):
        copy = make_model(model.config)
    weights = {name: full(p.detach()) for name, p in model.named_parameters()}
    copy.load_state_dict(weights, strict=False)
    return copy.to(next(iter(weights.values())).device)
