"""Training on documents, resumable exactly: the loop yields metrics, whoever calls it prints them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoints, replay
from .data import (
    BPETokenizer,
    ByteTokenizer,
    Document,
    Lanes,
    Mixture,
    TokenIds,
    Tokenizer,
    encode_documents,
    fingerprint,
    held_out_split,
    load_tokenizer,
    read_documents,
    standard_library,
)
from .data.segments import Segment
from .evaluation import HeldOut, evaluate, limited, to_device
from .files import replace_file
from .inspection import memory_health
from .learning_rate import warmup_cosine
from .model import Memformer
from .parallel import Ranks, full, like, shard
from .rollouts import rollout
from .settings import DocumentSettings, TrainingConfig, build, to_plain, to_yaml

__all__ = ["Run", "StepMetrics", "choose_device", "documents_of", "saved_settings", "settings_of"]

_FREE_ON_RESUME = {
    "steps", "out", "data", "resume", "device", "output", "compute.parallel", "evaluation.eval_every",
    "evaluation.patience",
}  # fmt: skip
"""Settings that may differ from the saved run's: they change no number of a run that ends at the same step. The data
may have moved, but must be the same documents."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics: means since the last one, except for what is said to be of the last step."""

    step: int
    loss_nats: float
    bits_per_token: float
    tokens_per_second: float
    learning_rate: float
    gradient_norm: float
    """Of the last step, before clipping."""
    horizon: int
    memory_gradient: float | None
    """How far credit reaches: the gradient's norm at the memory before the last rollout's second segment, in parts of
    the norm before its last one. None where a rollout has fewer than three segments."""
    self_attention: float
    """The share of the writing attention that slots give themselves, in the last segment: 1 keeps all, 0 nothing."""
    slot_diversity: float
    """1 - the mean cosine of two slots: 0 where all hold the same."""


class Run:
    """One training run in a folder; under torch.distributed, this process's part in it.

    Attributes:
        training, held_out: the documents; of those held out, as many as are evaluated.
        tokenizer, model: what is trained; ``model`` has the newest weights, not their average.
        refused: what is wrong with checkpoints that were damaged and set aside on resuming.
        best: ``{"step", "loss_nats"}`` of the best evaluation so far, or None.

    Raises:
        ValueError: the settings do not fit together, or not the checkpoint that is to be resumed.
        FileExistsError: the folder holds a run already, and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set, and there is no checkpoint; or there is no such data.
    """

    def __init__(self, settings: TrainingConfig):
        self.settings, self.ranks = settings, Ranks()
        self.device = choose_device(settings.device)
        self.precision = _precision(settings.compute.precision, self.device)
        if settings.rollout.lanes % self.ranks.size:
            raise ValueError(
                f"lanes: {settings.rollout.lanes} cannot be divided evenly among {self.ranks.size} processes"
            )
        settings.model.config(1, settings.rollout.segment_length)  # before anything that takes time
        checkpoint, self.refused = self._checkpoint()
        self.training, held_out = documents_of(settings)
        self.held_out = limited(held_out, settings.evaluation.eval_limit)
        self._fingerprint = fingerprint(self.training)
        self.tokenizer = load_tokenizer(checkpoint) if checkpoint else _tokenizer(settings.documents, self.training)
        self.stream = self._stream()
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            config = settings.model.config(self.tokenizer.vocabulary, settings.rollout.segment_length)
            self.model = Memformer(**config.to_dict()).to(self.device)
        self.step = 0
        self.stopping = False
        self._asked_to_stop = False
        self.memory: Tensor | None = None
        self.best: dict[str, Any] | None = None
        self._evaluations_since_best = 0
        state = None if checkpoint is None else self._load_weights(checkpoint)
        self._rollout = self._parallel()
        self.average = (
            {n: p.detach().clone() for n, p in self.model.named_parameters()} if settings.optimizer.ema else {}
        )
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        if state is not None:
            self._load_state(*state)
        self._writer = self._tensorboard() if settings.output.tensorboard and not self.ranks.rank else None
        if not self.ranks.rank:
            settings.out.mkdir(parents=True, exist_ok=True)
            replace_file(settings.out / "run.yaml", to_yaml(settings))
            self._forget_metrics_after(self.step)

    def _checkpoint(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from; damaged ones that are newer are set aside."""
        settings = self.settings
        if not settings.resume:
            if checkpoint := checkpoints.newest(settings.out):
                raise FileExistsError(
                    f"{settings.out} holds a run already ({checkpoint.name}): add --resume to go on with it, or choose "
                    "another --out"
                )
            return None, []
        checkpoint, refused = checkpoints.newest_sound(settings.out)
        if checkpoint is None:
            raise FileNotFoundError(f"{settings.out}: no checkpoint to resume")
        self.ranks.wait()  # all have looked before one changes what there is
        if not self.ranks.rank:
            checkpoints.set_aside_newer(settings.out, checkpoint)
        return checkpoint, refused

    def _stream(self) -> Lanes:
        settings, tokenizer = self.settings, self.tokenizer
        odds = dataclasses.asdict(settings.objective)
        return Lanes(
            encode_documents(self.training, tokenizer),
            lanes=settings.rollout.lanes,
            length=settings.rollout.segment_length,
            start=tokenizer.start,
            seed=settings.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            objectives=Mixture(tokenizer, **odds, seed=settings.seed),
        )

    def _parallel(self) -> nn.Module:
        """The module whose call is a rollout; what DistributedDataParallel wraps."""
        settings = self.settings
        if settings.compute.compile:
            assert self.model.decoder is not None
            self.model.encoder.compile()
            self.model.decoder.compile()
        if self.ranks.size > 1 and settings.compute.parallel == "fsdp":
            shard(self.model)
        trained = _Rollout(self.model, replay.EveryMemory(graphs=settings.rollout.graphs))
        if self.ranks.size > 1 and settings.compute.parallel == "ddp":
            return DistributedDataParallel(trained)
        return trained

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        settings = self.settings.optimizer
        rate, decay = settings.learning_rate, settings.weight_decay
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)

    def _tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("tensorboard: not installed; pip install 'memformer[tensorboard]'") from error
        return SummaryWriter(str(self.settings.out / "tensorboard"), purge_step=self.step + 1)

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        settings = self.settings.optimizer
        return settings.learning_rate * warmup_cosine(step, self.settings.steps, settings.warmup)

    def stop(self) -> None:
        """Let :meth:`train` save and end after the next step, in all processes; safe in a signal handler."""
        self._asked_to_stop = True

    @property
    def stopped_early(self) -> bool:
        """Whether the last ``patience`` evaluations were no better than the best one."""
        return 0 < self.settings.evaluation.patience <= self._evaluations_since_best

    def train(self) -> Iterator[StepMetrics | HeldOut]:
        """Train until ``settings.steps``, :meth:`stop`, or early stopping; yield what is written to ``metrics.jsonl``.

        A run that ends by itself ends with an evaluation.

        Raises:
            FloatingPointError: the gradient is not finite.
            BlockingIOError: another process trains in the same folder.
        """
        lock = None if self.ranks.rank else checkpoints.lock(self.settings.out)
        with lock or contextlib.nullcontext():
            yield from self._train()
        if self._writer is not None:
            self._writer.flush()

    def _train(self) -> Iterator[StepMetrics | HeldOut]:
        output, every = self.settings.output, self.settings.evaluation.eval_every
        self.model.train()
        nats, tokens, seconds = torch.zeros((), device=self.device), 0, 0.0
        while self.step < self.settings.steps and not self.stopping and not self.stopped_early:
            watched = self.step % output.log_every == output.log_every - 1 or self.step + 1 == self.settings.steps
            watch = replay.MemoryGradients() if watched else None
            rate, horizon = self.learning_rate(self.step), self.settings.rollout.horizon_at(self.step)
            began = time.perf_counter()
            loss, counted, norm, before = self._take_step(rate, horizon, watch)
            nats, tokens, seconds = nats + loss * counted, tokens + counted, seconds + time.perf_counter() - began
            if watched or self.stopping:
                mean = float(self.ranks.sum(nats)) / tokens
                metrics = StepMetrics(
                    step=self.step,
                    loss_nats=mean,
                    bits_per_token=mean / math.log(2),
                    tokens_per_second=tokens / seconds,
                    learning_rate=rate,
                    gradient_norm=norm,
                    horizon=horizon,
                    memory_gradient=self._reach(watch),
                    **self._health(*before),
                )
                self.log("step", metrics)
                yield metrics
                nats, tokens, seconds = torch.zeros_like(nats), 0, 0.0
            evaluating = self.step == self.settings.steps or (every and self.step % every == 0)
            if evaluating:
                yield self._evaluate_and_compare()
            if evaluating or self.stopping or self.step % output.save_every == 0:
                self.save()

    def _take_step(
        self, rate: float, horizon: int, watch: replay.MemoryGradients | None
    ) -> tuple[Tensor, int, float, tuple[Segment, Tensor | None]]:
        """One update: this process's part of the mean loss in nats, tokens counted by all, the gradient's norm, and the
        last rollout's first segment with the memory before it."""
        settings, ranks = self.settings, self.ranks
        rollouts = [self.stream.rollout(horizon) for _ in range(settings.rollout.accumulate)]
        own = sum(_counted(segment) for segments in rollouts for segment in segments)
        counted, stopping = ranks.sum(torch.tensor([own, self._asked_to_stop], device=self.device)).tolist()
        self.stopping = bool(stopping)
        loss = torch.zeros((), device=self.device)
        # Dropout is drawn from a seed of its own in each step, so that a resumed run needs no generator's state.
        with torch.random.fork_rng(enabled=settings.model.dropout > 0):
            if settings.model.dropout > 0:
                torch.manual_seed(hash((settings.seed, self.step, ranks.rank)))
            for i, segments in enumerate(rollouts):
                last = i == len(rollouts) - 1
                segments = [to_device(segment, self.device) for segment in segments]
                before = segments[0], self.memory
                loss += self._back_propagate(segments, counted / ranks.size, last, watch if last else None)
        self.scaler.unscale_(self.optimizer)
        limit = settings.optimizer.clip or math.inf
        norm = float(full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)))
        if not math.isfinite(norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 1):
            newest = checkpoints.newest(settings.out)
            raise FloatingPointError(
                f"step {self.step + 1}: the gradient is not finite (loss {float(loss):.3g}). Lower --learning-rate; "
                + (f"the newest checkpoint, from before, is {newest}" if newest else "there is no checkpoint yet")
            )
        # A parameter that no gradient reaches (the writer's, at horizon 1) has a zero one under DDP, and so here.
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._update_average()
        return loss / ranks.size, int(counted), norm, before

    def _back_propagate(
        self, segments: list[Segment], divisor: float, last: bool, watch: replay.MemoryGradients | None
    ) -> Tensor:
        """One rollout's gradients; processes exchange them after the last one of the step."""
        module = self._rollout
        waits: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(module, DistributedDataParallel) and not last:
            waits = module.no_sync()
        with waits:
            with self._autocast():
                loss, self.memory = module(segments, self.memory, divisor, last, watch)
            if loss.requires_grad:
                self.scaler.scale(loss).backward()
        self.memory = self.memory.detach()
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def _update_average(self) -> None:
        decay = self.settings.optimizer.ema
        for name, parameter in self.model.named_parameters() if self.average else ():
            # Young averages forget faster, so that they do not remember the initial weights for long.
            weight = 1 - min(decay, self.step / (self.step + 9))
            self.average[name].lerp_(parameter.detach(), weight)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Memformer]:
        """The model with the weights' moving average in place of the newest, where the run keeps one."""
        parameters = dict(self.model.named_parameters()) if self.average else {}
        newest = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.average[name])
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(newest[name])

    def _reach(self, watch: replay.MemoryGradients | None) -> float | None:
        norms = [] if watch is None else watch.norms[1:-1]  # the boundaries inside the rollout
        if len(norms) < 2:
            return None
        ends = torch.tensor([norms[0], norms[-1]], dtype=torch.float64, device=self.device)
        first, last = self.ranks.sum(ends.square()).sqrt().tolist()
        return first / last if last else None

    def _health(self, segment: Segment, memory: Tensor | None) -> dict[str, float]:
        health = memory_health(self.model, segment, memory)
        shares = torch.tensor([health.self_attention, health.slot_diversity], dtype=torch.float64, device=self.device)
        self_attention, diversity = (self.ranks.sum(shares) / self.ranks.size).tolist()
        return {"self_attention": self_attention, "slot_diversity": diversity}

    def evaluate(self) -> HeldOut:
        """The model on the held-out documents, with the weights that a checkpoint has; see :func:`evaluate`."""
        with self.averaged() as model, self._autocast():
            return evaluate(model, self.held_out, self.tokenizer, step=self.step, device=self.device)

    def _evaluate_and_compare(self) -> HeldOut:
        result = self.evaluate()
        if self.best is None or result.loss_nats < self.best["loss_nats"]:
            self.best, self._evaluations_since_best = {"step": self.step, "loss_nats": result.loss_nats}, 0
        else:
            self._evaluations_since_best += 1
        self.log("held_out", result)
        return result

    def log(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        """Append a line to ``metrics.jsonl``, and to TensorBoard's file where that is wanted."""
        if self.ranks.rank:
            return
        plain = dataclasses.asdict(metrics)
        with (self.settings.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **plain}) + "\n")
        if self._writer is not None:
            for name, value in plain.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(f"{event}/{name}", value, metrics.step)

    def save(self) -> None:
        """Write a checkpoint: whole tensors, gathered from all processes and written by the first."""
        weights = {name: full(p.detach()).cpu() for name, p in self.model.named_parameters()}
        average = {name: full(p).cpu() for name, p in self.average.items()}
        tensors = {f"weights/{name}": p for name, p in weights.items()} if average else {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = full(value).cpu()
        assert self.memory is not None
        tensors["memory"] = self.ranks.gather(self.memory).cpu()
        numbers = {
            "step": self.step,
            "settings": to_plain(self.settings),
            "documents": self._fingerprint,
            "stream": self.stream.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "evaluations_since_best": self._evaluations_since_best,
            "torch": torch.__version__,
        }
        if not self.ranks.rank:
            with torch.random.fork_rng():
                plain = Memformer(**self.model.config.to_dict())
            plain.load_state_dict(average or weights, strict=False)

            def write_model(folder: Path) -> None:
                plain.save_pretrained(folder)
                self.tokenizer.save(folder)

            best = None if self.best is None else self.best["step"]
            keep = self.settings.output.keep
            checkpoints.save(self.settings.out, self.step, write_model, numbers, tensors, keep=keep, best=best)
        self.ranks.wait()

    def _load_weights(self, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Check that the checkpoint is of this run, and take its weights; returns the rest of its state."""
        numbers, tensors = checkpoints.load_state(checkpoint)
        self._check_settings(numbers["settings"])
        if numbers["documents"] != self._fingerprint:
            raise ValueError(f"the training documents are not those of {self.settings.out}: was the data changed?")
        loaded = Memformer.from_pretrained(checkpoint)
        if loaded.config != self.model.config:
            raise ValueError(f"{checkpoint}: its model is {loaded.config}, expected {self.model.config}")
        self.model.load_state_dict(loaded.state_dict())
        averages = {f"average/{name}": parameter.detach() for name, parameter in loaded.named_parameters()}
        weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        if weights:
            self.model.load_state_dict(weights, strict=False)
        return numbers, tensors | averages

    def _check_settings(self, saved: dict[str, Any]) -> None:
        before, now = (_flat(to_plain(s)) for s in (_as_saved(saved), self.settings))
        for name in before:
            if name not in _FREE_ON_RESUME and name.split(".")[0] not in _FREE_ON_RESUME and before[name] != now[name]:
                raise ValueError(
                    f"{name}: the run in {self.settings.out} has {before[name]}, got {now[name]}; it cannot change"
                )

    def _load_state(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            prefix = f"optimizer/{name}/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            # AdamW keeps its step count on the CPU.
            self.optimizer.state[parameter] = {k: like(v, parameter) if v.dim() else v for k, v in state.items()}
            if self.average:
                self.average[name] = like(tensors[f"average/{name}"], parameter)
        self.memory = self.ranks.own(tensors["memory"]).to(self.device)
        self.stream.load_state_dict(numbers["stream"])
        self.scaler.load_state_dict(numbers["scaler"])
        self.step, self.best = numbers["step"], numbers["best"]
        self._evaluations_since_best = numbers["evaluations_since_best"]
        if self.step >= self.settings.steps:
            raise ValueError(f"the run in {self.settings.out} is at step {self.step} already: raise --steps to go on")
        if self.stopped_early:
            raise ValueError(
                f"the run in {self.settings.out} stopped early, at step {self.step}: raise --patience to go on"
            )

    def _forget_metrics_after(self, step: int) -> None:
        file = self.settings.out / "metrics.jsonl"
        if file.is_file():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            replace_file(file, "".join(line + "\n" for line in kept))


class _Rollout(nn.Module):
    """A rollout as a module's call, for DistributedDataParallel to wrap."""

    def __init__(self, model: Memformer, schedule: replay.Schedule):
        super().__init__()
        self.model, self.schedule = model, schedule

    def forward(
        self,
        segments: Sequence[Segment],
        mems: Tensor | None,
        divisor: float,
        last: bool,
        watch: replay.MemoryGradients | None,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the memory. Where FSDP divides the model the loss is back-propagated already, and detached."""
        parts = (self.model.encoder, self.model.writer, self.model.decoder)
        if hasattr(self.model.encoder, "set_requires_gradient_sync"):

            def sync(last_backward: bool) -> None:
                for part in parts:
                    part.set_requires_gradient_sync(last and last_backward)  # type: ignore[operator, union-attr]

            method: replay.Method = functools.partial(replay.accumulate, sync=sync)
        else:
            method = replay.memory_replay
        options = replay.Options(schedule=self.schedule, memory_gradients=watch)
        outcome = rollout(self.model, segments, mems, divisor=divisor, method=method, options=options)
        return outcome.loss, outcome.memory


def saved_settings(out: Path) -> TrainingConfig:
    """The settings of the newest sound checkpoint of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: all of them are damaged.
    """
    checkpoint, _ = checkpoints.newest_sound(out)
    if checkpoint is None:
        raise FileNotFoundError(f"{out}: no checkpoint to resume")
    return settings_of(checkpoint)


def settings_of(checkpoint: Path) -> TrainingConfig:
    """The settings of the run that wrote a checkpoint. Raises ValueError if they are missing or damaged."""
    return _as_saved(checkpoints.load_state(checkpoint)[0]["settings"])


def _as_saved(settings: dict[str, Any]) -> TrainingConfig:
    """A checkpoint's settings; in one that does not know the overlap there was none."""
    model = {"dec_overlap": 0, **settings.get("model", {})}
    return build(TrainingConfig, {**settings, "model": model})


def choose_device(name: str) -> torch.device:
    """Raises ValueError for a device that torch does not know or that is not there."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the device "meta" cannot
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if good else torch.float32
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def documents_of(settings: TrainingConfig) -> tuple[list[Document], list[Document]]:
    """``(training, held_out)``, the documents of a run.

    Raises:
        ValueError, FileNotFoundError: see :func:`~memformer.data.read_documents`.
    """
    how = settings.documents
    if not settings.data:
        return held_out_split(standard_library(), how.held_out)
    documents = read_documents(
        settings.data, text_field=how.text_field, separator=how.separator, bin_dtype=how.bin_dtype
    )
    return held_out_split(documents, how.held_out)


def _tokenizer(settings: DocumentSettings, training: Sequence[Document]) -> Tokenizer:
    if settings.tokenizer == "bytes":
        return ByteTokenizer()
    if settings.tokenizer == "ids":
        return TokenIds(settings.vocabulary)
    if settings.tokenizer == "bpe":
        try:
            return BPETokenizer.train((bytes(d) for d in training), settings.vocabulary)
        except ValueError as error:
            raise ValueError(f"vocabulary: {error}") from error
    return BPETokenizer.from_file(Path(settings.tokenizer))


def _counted(segment: Segment) -> int:
    """How many targets of a segment count in the loss."""
    assert segment.tgt_mask is not None
    return int(segment.tgt_mask[:, 1:].sum())


def _flat(plain: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return flat
