"""Settings to parts: everything that a training run works with, new or from the checkpoint that it goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import replay
from ..data import Document, Lanes, Mixture, Tokenizer, encode_documents
from ..device import choose_device, choose_precision
from ..model import Memformer
from ..parallel import Ranks, shard
from ..settings import OptimizerSettings, TrainingConfig
from . import resume
from .corpus import corpus_of
from .parts import Parts, Progress, RolloutLoss

__all__ = ["assemble"]


def assemble(settings: TrainingConfig) -> Parts:
    """The parts of the run that settings describe; under torch.distributed, those of this process.

    Raises:
        ValueError: the settings do not fit together, or not the checkpoint that is to be resumed.
        FileExistsError: the folder holds a run already, and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set, and there is no checkpoint; or there is no such data.
    """
    ranks, device = Ranks(), choose_device(settings.device)
    precision = choose_precision(settings.compute.precision, device)
    if settings.rollout.lanes % ranks.size:
        raise ValueError(f"lanes: {settings.rollout.lanes} cannot be divided evenly among {ranks.size} processes")
    settings.model.config(1, settings.rollout.segment_length)  # before anything that takes time
    checkpoint, refused = resume.find_checkpoint(settings, ranks)
    training, held_out, known, tokenizer = corpus_of(settings, ranks, checkpoint)
    model = _model(settings, tokenizer).to(device)
    saved = None if checkpoint is None else resume.load(checkpoint, settings, known, model)
    rollouts = _parallel(model, settings, ranks)  # from here on FSDP has divided the parameters
    average: dict[str, Tensor] = {}
    if settings.optimizer.ema:
        average = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = Parts(
        ranks=ranks,
        device=device,
        precision=precision,
        training=training,
        held_out=held_out,
        fingerprint=known,
        tokenizer=tokenizer,
        stream=_stream(settings, training, tokenizer, ranks),
        model=model,
        average=average,
        rollouts=rollouts,
        optimizer=_optimizer(model, settings.optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
        progress=Progress(),
        refused=refused,
    )
    if saved is not None:
        resume.restore(parts, saved, settings)
    return parts


def _stream(settings: TrainingConfig, training: Sequence[Document], tokenizer: Tokenizer, ranks: Ranks) -> Lanes:
    return Lanes(
        encode_documents(training, tokenizer),
        lanes=settings.rollout.lanes,
        length=settings.rollout.segment_length,
        start=tokenizer.start,
        seed=settings.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        objectives=Mixture(tokenizer, **dataclasses.asdict(settings.objective), seed=settings.seed),
    )


def _model(settings: TrainingConfig, tokenizer: Tokenizer) -> Memformer:
    """With the seed's initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        config = settings.model.config(tokenizer.vocabulary, settings.rollout.segment_length)
        return Memformer(**config.to_dict())


def _parallel(model: Memformer, settings: TrainingConfig, ranks: Ranks) -> nn.Module:
    """The module whose call is a rollout, compiled and shared among the processes as the settings say."""
    if settings.compute.compile:
        assert model.decoder is not None
        model.encoder.compile()
        model.decoder.compile()
    if ranks.size > 1 and settings.compute.parallel == "fsdp":
        shard(model)
    rollouts = RolloutLoss(model, replay.Options(schedule=settings.rollout.replay_schedule()))
    if ranks.size > 1 and settings.compute.parallel == "ddp":
        return DistributedDataParallel(rollouts)
    return rollouts


def _optimizer(model: Memformer, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Decay is for matrices alone: vectors are biases, scales and the like."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, object]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
