"""Settings to parts: everything that a training run works with, new or from the checkpoint that it goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import replay
from ..data import (
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
from ..data.corpora import limited
from ..device import choose_device, choose_precision
from ..model import Memformer
from ..parallel import Ranks, shard
from ..settings import DocumentSettings, OptimizerSettings, TrainingConfig
from . import resume
from .parts import Parts, Progress, RolloutLoss

__all__ = ["assemble", "documents_of"]


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
    training, held_out = documents_of(settings)
    documents = fingerprint(training)
    tokenizer = load_tokenizer(checkpoint) if checkpoint else _tokenizer(settings.documents, training)
    model = _model(settings, tokenizer).to(device)
    saved = None if checkpoint is None else resume.load(checkpoint, settings, documents, model)
    rollouts = _parallel(model, settings, ranks)  # from here on FSDP has divided the parameters
    average: dict[str, Tensor] = {}
    if settings.optimizer.ema:
        average = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = Parts(
        ranks=ranks,
        device=device,
        precision=precision,
        training=training,
        held_out=limited(held_out, settings.evaluation.eval_limit),
        fingerprint=documents,
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
    tokenizer: ByteTokenizer | TokenIds | BPETokenizer
    if settings.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif settings.tokenizer == "ids":
        tokenizer = TokenIds(settings.vocabulary)
    elif settings.tokenizer == "bpe":
        try:
            tokenizer = BPETokenizer.train((bytes(d) for d in training), settings.vocabulary)
        except ValueError as error:
            raise ValueError(f"vocabulary: {error}") from error
    else:
        tokenizer = BPETokenizer.from_file(Path(settings.tokenizer))
    return tokenizer.with_end() if settings.end else tokenizer


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
        spread=settings.rollout.spread,
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
