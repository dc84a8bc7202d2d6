"""The loop of training, resumable exactly. It yields metrics; whoever calls it prints them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .. import replay
from ..data.segments import Segment
from ..device import summing_device
from ..evaluation import HeldOut, evaluate
from ..files import replace_file
from ..inspection import memory_health
from ..learning_rate import warmup_cosine
from ..model import Memformer
from ..parallel import full, gradient_sync
from ..rollouts import verify_rollout
from ..settings import TrainingConfig, to_yaml
from . import checkpoints, resume
from .assemble import assemble
from .metrics import MetricsLog, StepMetrics
from .parts import Best, Parts

__all__ = ["Run"]

VERIFIED_SEGMENTS = 3
"""Enough for a first, an inner and a last segment."""


class _Step(NamedTuple):
    """What one update was like."""

    nats: Tensor
    """Scalar: this process's part of the summed loss."""
    tokens: int
    """Targets that count, of all processes."""
    gradient_norm: float
    segment: Segment
    """The last rollout's first one, and the memory before it."""
    memory: Tensor | None


class Run:
    """One training run in a folder; under torch.distributed, this process's part in it.

    Args:
        settings: what to train, and how.
        parts: what the run works with; by default :func:`~memformer.training.assemble` makes them of the settings. With
            ``dataclasses.replace(assemble(settings), ...)`` a run has others.

    Attributes:
        parts: as given. ``training`` and ``held_out`` documents, ``tokenizer`` and ``model`` are theirs; ``model`` has
            the newest weights, not their average.
        stopping: whether :meth:`train` ends after the step under way, in all processes.

    Raises:
        ValueError, FileExistsError, FileNotFoundError: see :func:`~memformer.training.assemble`.
    """

    def __init__(self, settings: TrainingConfig, parts: Parts | None = None):
        self.settings = settings
        self.parts = parts = assemble(settings) if parts is None else parts
        self.training, self.held_out = parts.training, parts.held_out
        self.tokenizer, self.model = parts.tokenizer, parts.model
        self.stopping = False
        self._asked_to_stop = False
        self._log: MetricsLog | None = None
        if not parts.ranks.rank:
            settings.out.mkdir(parents=True, exist_ok=True)
            self._log = MetricsLog(settings.out, self.step, settings.output.tensorboard)
            replace_file(settings.out / "run.yaml", to_yaml(settings))

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
        settings = self.settings.optimizer
        return settings.learning_rate * warmup_cosine(step, self.settings.steps, settings.warmup)

    def stop(self) -> None:
        """Let :meth:`train` save and end after the next step, in all processes; safe in a signal handler."""
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
        segments = [segment.to(self.parts.device) for segment in stream.rollout(VERIFIED_SEGMENTS)]
        stream.load_state_dict(place)
        self.model.train()
        with self._autocast():
            return verify_rollout(self.model, segments, progress.memory)

    def train(self) -> Iterator[StepMetrics | HeldOut]:
        """Train until ``settings.steps``, :meth:`stop`, or early stopping; yield what is written to ``metrics.jsonl``.

        A run that ends by itself ends with an evaluation.

        Raises:
            FloatingPointError: the gradient is not finite.
            BlockingIOError: another process trains in the same folder.
        """
        with contextlib.nullcontext() if self._log is None else checkpoints.lock(self.settings.out):
            yield from self._train()
        if self._log is not None:
            self._log.flush()

    def _train(self) -> Iterator[StepMetrics | HeldOut]:
        settings, device = self.settings, self.parts.device
        log_every, eval_every = settings.output.log_every, settings.evaluation.eval_every
        self.model.train()
        nats, tokens, seconds = torch.zeros((), device=device), 0, 0.0
        while self.step < settings.steps and not self.stopping and not self.stopped_early:
            watched = self.step % log_every == log_every - 1 or self.step + 1 == settings.steps
            watch = replay.MemoryGradients() if watched else None
            rate, horizon = self.learning_rate(self.step), settings.rollout.horizon_at(self.step)
            began = time.perf_counter()
            taken = self._take_step(rate, horizon, watch)
            nats, tokens, seconds = nats + taken.nats, tokens + taken.tokens, seconds + time.perf_counter() - began
            if watched or self.stopping:
                mean = float(self.parts.ranks.sum(nats)) / tokens
                self_attention, slot_diversity = self._health(taken.segment, taken.memory)
                metrics = StepMetrics(
                    step=self.step,
                    loss_nats=mean,
                    bits_per_token=mean / math.log(2),
                    tokens_per_second=tokens / seconds,
                    learning_rate=rate,
                    gradient_norm=taken.gradient_norm,
                    horizon=horizon,
                    memory_gradient=self._reach(watch),
                    self_attention=self_attention,
                    slot_diversity=slot_diversity,
                )
                self._write("step", metrics)
                yield metrics
                nats, tokens, seconds = torch.zeros_like(nats), 0, 0.0
            evaluating = self.step == settings.steps or (eval_every and self.step % eval_every == 0)
            if evaluating:
                yield self._evaluate_and_compare()
            if evaluating or self.stopping or self.step % settings.output.save_every == 0:
                resume.save(self.parts, settings)

    def _take_step(self, rate: float, horizon: int, watch: replay.MemoryGradients | None) -> _Step:
        """One update, of as many rollouts as the settings accumulate."""
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
                segments = [segment.to(device) for segment in segments]
                first, before = segments[0], progress.memory
                loss += self._back_propagate(segments, counted / ranks.size, last, watch if last else None)
        norm = self._update(rate, loss)
        progress.step += 1
        self._update_average()
        return _Step(loss / ranks.size * int(counted), int(counted), norm, first, before)

    def _back_propagate(
        self, segments: list[Segment], divisor: float, last: bool, watch: replay.MemoryGradients | None
    ) -> Tensor:
        """One rollout's gradients; processes exchange them after the last one of the step."""
        module, progress = self.parts.rollouts, self.parts.progress
        waits = module.no_sync() if isinstance(module, DistributedDataParallel) and not last else None
        with waits or contextlib.nullcontext():
            with self._autocast():
                loss, memory = module(segments, progress.memory, divisor, last, watch)
            if loss.requires_grad:
                self.parts.scaler.scale(loss).backward()
        progress.memory = memory.detach()
        return loss.detach()

    def _update(self, rate: float, loss: Tensor) -> float:
        """The optimizer's step with the gradients that are there, which are then cleared; returns their norm."""
        optimizer, scaler = self.parts.optimizer, self.parts.scaler
        scaler.unscale_(optimizer)
        limit = self.settings.optimizer.clip or math.inf
        norm = float(full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)))
        if not math.isfinite(norm) and (not scaler.is_enabled() or scaler.get_scale() < 1):
            newest = checkpoints.newest(self.settings.out)
            raise FloatingPointError(
                f"step {self.step + 1}: the gradient is not finite (loss {float(loss):.3g}). Lower --learning-rate; "
                + (f"the newest checkpoint, from before, is {newest}" if newest else "there is no checkpoint yet")
            )
        # A parameter that no gradient reaches (the writer's, at horizon 1) has a zero one under DDP, and so here.
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = rate
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _autocast(self) -> torch.autocast:
        precision = self.parts.precision
        return torch.autocast(self.parts.device.type, precision, enabled=precision is not torch.float32)

    def _update_average(self) -> None:
        decay, average = self.settings.optimizer.ema, self.parts.average
        for name, parameter in self.model.named_parameters() if average else ():
            # Young averages forget faster, so that they do not remember the initial weights for long.
            weight = 1 - min(decay, self.step / (self.step + 9))
            average[name].lerp_(parameter.detach(), weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Memformer]:
        """The model with the weights' moving average in place of the newest, where the run keeps one."""
        parameters = dict(self.model.named_parameters()) if self.parts.average else {}
        newest = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.parts.average[name])
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(newest[name])

    def _reach(self, watch: replay.MemoryGradients | None) -> float | None:
        """How far credit reaches, see :class:`StepMetrics`; over all processes."""
        norms = [] if watch is None else watch.norms[1:-1]  # the boundaries inside the rollout
        if len(norms) < 2:
            return None
        ends = torch.tensor([norms[0], norms[-1]], dtype=torch.float64, device=summing_device(self.parts.device))
        first, last = self.parts.ranks.sum(ends.square()).sqrt().tolist()
        return first / last if last else None

    def _health(self, segment: Segment, memory: Tensor | None) -> tuple[float, float]:
        """``(self_attention, slot_diversity)``, the mean over processes."""
        health, ranks = memory_health(self.model, segment, memory), self.parts.ranks
        own = [health.self_attention, health.slot_diversity]
        shares = torch.tensor(own, dtype=torch.float64, device=summing_device(self.parts.device))
        self_attention, diversity = (ranks.sum(shares) / ranks.size).tolist()
        return self_attention, diversity

    def evaluate(self) -> HeldOut:
        """The model on the held-out documents, with the weights that a checkpoint has; see :func:`evaluate`."""
        with self.averaged() as model, self._autocast():
            return evaluate(model, self.held_out, self.tokenizer, step=self.step, device=self.parts.device)

    def _evaluate_and_compare(self) -> HeldOut:
        result, progress = self.evaluate(), self.parts.progress
        if progress.best is None or result.loss_nats < progress.best["loss_nats"]:
            progress.best, progress.evaluations_since_best = {"step": self.step, "loss_nats": result.loss_nats}, 0
        else:
            progress.evaluations_since_best += 1
        self._write("held_out", result)
        return result

    def _write(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        if self._log is not None:
            self._log.write(event, metrics)


def _counted(segment: Segment) -> int:
    """How many targets of a segment count in the loss."""
    assert segment.tgt_mask is not None
    return int(segment.tgt_mask[:, 1:].sum())
