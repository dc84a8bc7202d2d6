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
    check_documents,
    encode_documents,
    fingerprint,
    load_tokenizer,
)
from ..device import choose_device, choose_precision
from ..model import Memformer
from ..parallel import Ranks, shard
from ..settings import DocumentSettings, TrainingConfig
from . import checkpoints, resume
from .callbacks import Report, nothing
from .documents import documents_for_test, documents_of, evaluated
from .optimizers import make_optimizer
from .parts import Parts, Progress, RolloutLoss

__all__ = ["assemble", "documents_of"]


def assemble(
    settings: TrainingConfig,
    report: Report = nothing,
    documents: tuple[Sequence[Document], Sequence[Document]] | None = None,
) -> Parts:
    """The parts of the run that settings describe; under torch.distributed, those of this process.

    Args:
        report: is told what takes time: reading, training a BPE, encoding.
        documents: ``(training, held_out)``, made in Python, in place of ``settings.data``.

    Raises:
        ValueError: the settings do not fit together, or not the checkpoint that is to be resumed.
        FileExistsError: the folder holds a run already, and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set, and there is no checkpoint; or there is no such data.
        BlockingIOError: another process trains in the folder.
        OSError: the folder cannot be written.
    """
    # Before anything that takes time.
    ranks, device = Ranks(), choose_device(settings.device)
    precision = choose_precision(settings.compute.precision, device)
    if settings.rollout.lanes % ranks.size:
        raise ValueError(f"lanes: {settings.rollout.lanes} cannot be divided evenly among {ranks.size} processes")
    settings.model.config(1, settings.rollout.segment_length)
    checkpoint, refused = resume.find_checkpoint(settings, ranks)
    if not ranks.rank:
        checkpoints.check_folder(settings.out)
    initial = None if checkpoint else resume.load_initial(settings)
    report("reading")
    training, held_out = documents_of(settings) if documents is None else _given(settings, documents)
    test = documents_for_test(settings)
    known, known_held_out = fingerprint(training), fingerprint(held_out)
    read = evaluated(held_out, settings.evaluation.eval_limit)
    tokenizer = load_tokenizer(checkpoint) if checkpoint else initial and initial[1]
    if tokenizer is None:
        if settings.documents.tokenizer == "bpe":
            report("training a BPE")
        tokenizer = _tokenizer(settings.documents, training)
    # Before anything that takes long; training texts are encoded below.
    check_documents([*(d for d in training if not d.text or not len(d)), *read, *test], tokenizer)
    model = _model(settings, tokenizer)
    if initial is not None:
        _start_from(model, initial[0])
    model = model.to(device)
    saved = None if checkpoint is None else resume.load(checkpoint, settings, known, known_held_out, model)
    rollouts = _parallel(model, settings, ranks)  # from here on FSDP has divided the parameters
    average: dict[str, Tensor] = {}
    if not isinstance(tokenizer, ByteTokenizer | TokenIds):  # theirs are read while they stream
        report("encoding")
    if settings.optimizer.ema:
        average = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = Parts(
        ranks=ranks,
        device=device,
        precision=precision,
        training=training,
        held_out=read,
        test=test,
        fingerprint=known,
        held_out_fingerprint=known_held_out,
        test_fingerprint=fingerprint(test),
        tokenizer=tokenizer,
        stream=_stream(settings, training, tokenizer, ranks),
        model=model,
        average=average,
        rollouts=rollouts,
        optimizer=make_optimizer(model, settings.optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=precision is torch.float16),
        progress=Progress(),
        refused=refused,
        changes=[] if saved is None else saved.changes,
    )
    if saved is not None:
        resume.restore(parts, saved, settings)
    return parts


def _given(
    settings: TrainingConfig, documents: tuple[Sequence[Document], Sequence[Document]]
) -> tuple[Sequence[Document], Sequence[Document]]:
    training, held_out = documents
    if settings.data or settings.documents.held_out_data:
        raise ValueError("documents: given beside the settings' data or held_out_data; leave one of them out")
    if not training or not held_out:
        raise ValueError(
            f"documents: expected some to train on and some held out, got {len(training)} and {len(held_out)}; "
            "held_out_split divides them"
        )
    return training, held_out


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


def _start_from(model: Memformer, weights: dict[str, Tensor]) -> None:
    """Raises ValueError where the weights are of another vocabulary."""
    rows, here = (w["encoder.embedding.weight"].shape[0] for w in (weights, model.state_dict()))
    if rows != here:
        raise ValueError(f"init_from: its model has {rows} tokens, and the tokenizer has {here}")
    model.load_state_dict(weights)


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
