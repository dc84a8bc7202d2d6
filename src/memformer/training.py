"""Training on documents, resumable exactly: the loop yields metrics, whoever calls it prints them."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import checkpoints
from .config import TrainingConfig
from .data import START, VOCABULARY, Document, Lanes, fingerprint, held_out_split, read_documents, standard_library
from .model import Memformer
from .objectives import rollout
from .replay import full_bptt
from .segments import Segment

__all__ = ["HeldOut", "Run", "StepMetrics", "evaluate", "saved_settings"]

_FREE_ON_RESUME = {"steps", "out", "resume", "device", "log_every", "save_every", "sample_bytes"}
"""Settings that may differ from the saved run's: they change no number of a run that ends at the same step."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics: means since the last one; the gradient's norm is the last step's, before clipping."""

    step: int
    loss_nats: float
    bits_per_byte: float
    tokens_per_second: float
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class HeldOut:
    """The model's loss on documents that it was not trained on, each read whole with the memory carried on."""

    loss_nats: float
    bits_per_byte: float
    tokens: int
    documents: int
    seconds: float


class Run:
    """One training run in a folder.

    Raises:
        ValueError: the settings do not fit together, or not the checkpoint that is to be resumed.
        FileExistsError: the folder holds a run already, and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set, and there is no checkpoint.
    """

    def __init__(self, settings: TrainingConfig):
        self.settings = settings
        self.device = choose_device(settings.device)
        model_settings = settings.model(VOCABULARY)
        checkpoint = checkpoints.newest(settings.out)
        if checkpoint is not None and not settings.resume:
            raise FileExistsError(
                f"{settings.out} holds a run already ({checkpoint.name}): add --resume to go on with it, or choose "
                "another --out"
            )
        documents = read_documents(settings.data) if settings.data else standard_library()
        self.training, self.held_out = held_out_split(documents)
        self.stream = Lanes(
            _tokens(self.training),
            lanes=settings.lanes,
            length=settings.segment_length,
            start=START,
            seed=settings.seed,
        )
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.model = Memformer(**model_settings.to_dict()).to(self.device)
        self.optimizer = self._optimizer()
        self.memory: Tensor | None = None
        self.step = 0
        self.stopping = False
        if settings.resume:
            if checkpoint is None:
                raise FileNotFoundError(f"{settings.out}: no checkpoint to resume")
            self._load(checkpoint)
        settings.out.mkdir(parents=True, exist_ok=True)

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        decay, rate = self.settings.weight_decay, self.settings.learning_rate
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero; ``step`` counts from 0."""
        warmup, steps = min(self.settings.warmup, self.settings.steps - 1), self.settings.steps
        if step < warmup:
            return self.settings.learning_rate * (step + 1) / warmup
        return self.settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    def stop(self) -> None:
        """Let :meth:`train` end after the step under way."""
        self.stopping = True

    def train(self) -> Iterator[StepMetrics]:
        """Train until ``settings.steps``, or :meth:`stop`; checkpoints and ``metrics.jsonl`` are written on the way.

        Raises:
            FloatingPointError: the loss is not finite; the newest checkpoint is from before.
        """
        self.model.train()
        nats, tokens, began = torch.zeros((), device=self.device), 0, time.perf_counter()
        while self.step < self.settings.steps and not self.stopping:
            rate = self.learning_rate(self.step)
            loss, counted, norm = self._take_step(rate)
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"step {self.step}: the gradient is not finite (loss {float(loss):.3g}). Lower --learning-rate; "
                    f"the newest checkpoint in {self.settings.out} is from before"
                )
            nats, tokens = nats + loss * counted, tokens + counted
            if self.step % self.settings.log_every == 0 or self._ending():
                mean, seconds = float(nats) / tokens, time.perf_counter() - began
                metrics = StepMetrics(self.step, mean, mean / math.log(2), tokens / seconds, rate, norm)
                self.log("step", metrics)
                yield metrics
                nats, tokens, began = torch.zeros_like(nats), 0, time.perf_counter()
            if self.step % self.settings.save_every == 0 or self._ending():
                self.save()

    def _ending(self) -> bool:
        return self.stopping or self.step == self.settings.steps

    def _take_step(self, rate: float) -> tuple[Tensor, int, float]:
        """One rollout and one update: mean loss in nats, tokens counted, norm of the gradient."""
        segments = self.stream.rollout(self.settings.horizon)
        counted = sum(_counted(segment) for segment in segments)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Dropout is drawn from a seed of its own in each step, so that a resumed run needs no generator's state.
        with torch.random.fork_rng(enabled=self.settings.dropout > 0):
            if self.settings.dropout > 0:
                torch.manual_seed(hash((self.settings.seed, self.step)))
            outcome = rollout(self.model, [_to(s, self.device) for s in segments], self.memory, divisor=counted)
            outcome.loss.backward()
        limit = self.settings.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.memory = outcome.memory.detach()
        self.step += 1
        return outcome.loss.detach(), counted, norm

    def log(self, event: str, metrics: Any) -> None:
        """Append a line to ``metrics.jsonl``."""
        line = json.dumps({"event": event, **dataclasses.asdict(metrics)})
        with (self.settings.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save(self) -> Path:
        """Write a checkpoint and return its folder."""
        settings = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(self.settings)}
        settings |= {"data": [str(path) for path in self.settings.data], "out": str(self.settings.out)}
        numbers = {
            "step": self.step,
            "settings": settings,
            "documents": fingerprint(self.training),
            "stream": self.stream.state_dict(),
        }
        tensors = checkpoints.optimizer_state(self.optimizer, self.model)
        if self.memory is not None:
            tensors["memory"] = self.memory
        return checkpoints.save(self.settings.out, self.step, self.model, numbers, tensors)

    def _load(self, checkpoint: Path) -> None:
        numbers, tensors = checkpoints.load_state(checkpoint)
        saved = settings_from(numbers["settings"])
        fixed = [f.name for f in dataclasses.fields(saved) if f.name not in _FREE_ON_RESUME]
        for name in fixed:
            before, now = getattr(saved, name), getattr(self.settings, name)
            if before != now:
                raise ValueError(f"{name}: the run in {self.settings.out} has {before}, got {now}; it cannot change")
        if numbers["documents"] != fingerprint(self.training):
            raise ValueError(f"the training documents are not those of {self.settings.out}: was the data changed?")
        if numbers["step"] >= self.settings.steps:
            raise ValueError(
                f"the run in {self.settings.out} is at step {numbers['step']} already: raise --steps to go on"
            )
        loaded = Memformer.from_pretrained(checkpoint)
        self.model.load_state_dict(loaded.state_dict())
        checkpoints.load_optimizer_state(self.optimizer, self.model, tensors)
        self.memory = tensors["memory"].to(self.device)
        self.stream.load_state_dict(numbers["stream"])
        self.step = numbers["step"]
        self._forget_metrics_after(self.step)

    def _forget_metrics_after(self, step: int) -> None:
        file = self.settings.out / "metrics.jsonl"
        if file.is_file():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line).get("step", math.inf) <= step]
            file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def saved_settings(out: Path) -> TrainingConfig:
    """The settings of the newest checkpoint of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    return settings_from(checkpoints.load_state(checkpoints.find(out))[0]["settings"])


def settings_from(saved: dict[str, Any]) -> TrainingConfig:
    """Settings as :meth:`Run.save` wrote them."""
    return TrainingConfig(**{**saved, "data": tuple(map(Path, saved["data"])), "out": Path(saved["out"])})


def evaluate(model: Memformer, documents: Sequence[Document], *, lanes: int = 16, horizon: int = 16) -> HeldOut:
    """Read documents whole, at most ``lanes`` side by side, the memory carried on, and count every byte once.

    Raises:
        ValueError: the model was not trained on bytes.
    """
    if model.config.dec_num_tokens != VOCABULARY or model.config.enc_num_tokens != VOCABULARY:
        raise ValueError(
            f"expected a model of {VOCABULARY} tokens (bytes and start), got {model.config.dec_num_tokens}"
        )
    began, device = time.perf_counter(), next(model.parameters()).device
    length = min(model.config.enc_max_seq_len, (model.config.dec_max_seq_len or 0) - 1)
    # The longest first, and no more lanes than are busy until it ends: a lane without a document still costs its share.
    ordered = sorted(documents, key=lambda document: -len(document.text))
    busy = sum(len(document.text) for document in documents) // len(ordered[0].text)
    stream = Lanes(_tokens(ordered), lanes=min(lanes, busy), length=length, start=START, epochs=1)
    was_training, memory, nats, tokens = model.training, None, 0.0, 0
    model.eval()
    with torch.no_grad():
        while segments := stream.rollout(horizon):
            # Without gradients there is nothing to replay.
            outcome = rollout(model, [_to(s, device) for s in segments], memory, divisor=1.0, method=full_bptt)
            memory, nats = outcome.memory, nats + float(outcome.loss)
            tokens += sum(_counted(segment) for segment in segments)
    model.train(was_training)
    bits = nats / tokens / math.log(2)
    return HeldOut(nats / tokens, bits, tokens, len(documents), time.perf_counter() - began)


def choose_device(name: str) -> torch.device:
    """Raises ValueError for a device that torch does not know or that is not there."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return device


def _tokens(documents: Sequence[Document]) -> list[np.ndarray]:
    return [np.frombuffer(document.text, np.uint8) for document in documents]


def _counted(segment: Segment) -> int:
    """How many targets of a segment count in the loss."""
    assert segment.tgt_mask is not None
    return int(segment.tgt_mask[:, 1:].sum())


def _to(segment: Segment, device: torch.device) -> Segment:
    return tree_map(lambda part: part.to(device, non_blocking=True), segment)
