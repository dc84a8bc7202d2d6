"""Settings to parts: everything that a training run works with, new or from the checkpoint that it goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import replay
from .._installation import __version__
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
from ..device import check_compiler, choose_device, choose_precision
from ..model import Memformer
from ..parallel import Ranks, shard
from ..settings import DocumentSettings, OptimizerSettings, TrainingConfig, to_flat
from . import resume, shards
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
    ranks.agree(_at_the_start(settings))
    settings.model.config(1, settings.rollout.segment_length)  # before anything that takes time
    if settings.compute.compile:
        check_compiler(device)
    checkpoint, refused = resume.find_checkpoint(settings, ranks)
    training, held_out = documents_of(settings)
    documents = fingerprint(training)
    tokenizer = load_tokenizer(checkpoint) if checkpoint else _tokenizer(settings.documents, training)
    if ranks.size > 1:
        ranks.agree(
            {
                "training text": documents,
                "held-out text": fingerprint(held_out),
                "tokenizer": _tokenizer_fingerprint(tokenizer),
                "checkpoint": str(checkpoint and checkpoint.name),
            }
        )
    divided = ranks.size > 1 and settings.compute.parallel == "fsdp"
    # None of the processes makes the whole model only to put in what each then reads a part of.
    model = _model(settings, tokenizer, "meta" if divided and checkpoint and shards.found_in(checkpoint) else "cpu")
    saved = None if checkpoint is None else resume.load(checkpoint, settings, documents, model)
    rollouts = _parallel(model, settings, ranks, device)  # from here on FSDP has divided the parameters
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


def _at_the_start(settings: TrainingConfig) -> dict[str, str]:
    """What the processes of a run must have in common, and what can be told before anything is read."""
    own = {"data", "device"}  # they may lie elsewhere
    return {
        "version of memformer": __version__,
        "version of torch": torch.__version__,
        **{f"setting {name}": str(value) for name, value in to_flat(settings).items() if name not in own},
    }


def _tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


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


def _model(settings: TrainingConfig, tokenizer: Tokenizer, device: str) -> Memformer:
    """With the seed's initial weights; on "meta" without any."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(settings.seed)
        config = settings.model.config(tokenizer.vocabulary, settings.rollout.segment_length)
        return Memformer(**config.to_dict())


def _parallel(model: Memformer, settings: TrainingConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    """The module whose call is a rollout: on its device, compiled and shared among processes as the settings say."""
    if settings.compute.compile:
        assert model.decoder is not None
        model.encoder.compile()
        model.decoder.compile()
    if ranks.size > 1 and settings.compute.parallel == "fsdp":
        shard(model, device)
    else:
        model.to(device)
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
