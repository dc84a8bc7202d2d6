"""Settings to parts: everything that a training run works with, new or from the checkpoint that it goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import replay
from .._installation import __version__
from ..data import Document, Lanes, Mixture, Tokenizer, encode_documents
from ..device import check_compiler, choose_device, choose_precision, seeded
from ..interface import SegmentModel
from ..models import make_model, of_transformers
from ..parallel import Ranks, shard
from ..settings import TrainingConfig, to_flat
from . import checkpoints, resume, shards
from .callbacks import Report, nothing
from .corpus import corpus_of
from .initial import base_tokenizer, load_initial
from .optimizers import make_optimizer
from .parts import Parts, Progress, RolloutLoss, trained

__all__ = ["assemble"]


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
    ranks, device = Ranks(), choose_device(settings.device)
    precision = choose_precision(settings.compute.precision, device)
    checkpoint, refused = _begun(settings, ranks, device)
    initial = None if checkpoint else load_initial(settings)
    known = None
    if checkpoint is None:
        known = initial[1] if initial else base_tokenizer(settings)
    corpus = corpus_of(settings, ranks, checkpoint, known, report, documents)
    tokenizer = corpus.tokenizer
    divided = ranks.size > 1 and settings.compute.parallel == "fsdp"
    # None of the processes makes the whole model only to put in what each then reads a part of.
    model = _model(settings, tokenizer, "meta" if divided and checkpoint and shards.found_in(checkpoint) else "cpu")
    if initial is not None:
        _start_from(model, initial[0])
    saved = None
    if checkpoint is not None:
        saved = resume.load(checkpoint, settings, corpus.fingerprint, corpus.held_out_fingerprint, model)
    rollouts = _parallel(model, settings, ranks, device, divided)  # from here on FSDP has divided the parameters
    averaged = trained(model) if settings.optimizer.ema else ()
    parts = Parts(
        ranks=ranks,
        device=device,
        precision=precision,
        training=corpus.training,
        held_out=corpus.held_out,
        all_held_out=corpus.all_held_out,
        test=corpus.test,
        fingerprint=corpus.fingerprint,
        held_out_fingerprint=corpus.held_out_fingerprint,
        test_fingerprint=corpus.test_fingerprint,
        tokenizer=tokenizer,
        stream=_stream(settings, corpus.training, tokenizer, ranks),
        model=model,
        average={name: p.detach().clone() for name, p in averaged},
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


def _begun(settings: TrainingConfig, ranks: Ranks, device: torch.device) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what is refused; all is checked that can be before anything takes time."""
    if settings.rollout.lanes % ranks.size:
        raise ValueError(f"lanes: {settings.rollout.lanes} cannot be divided evenly among {ranks.size} processes")
    ranks.agree(_at_the_start(settings))
    if settings.compute.compile:
        check_compiler(device)
    checkpoint, refused = resume.find_checkpoint(settings)
    with ranks.together():
        if not ranks.rank:
            checkpoints.check_folder(settings.out)
    ranks.agree({"checkpoint": str(checkpoint and checkpoint.name)})
    return checkpoint, refused


def _at_the_start(settings: TrainingConfig) -> dict[str, str]:
    """What the processes of a run must have in common, and what can be told before anything is read."""
    own = {"data", "device"}  # they may lie elsewhere
    return {
        "version of memformer": __version__,
        "version of torch": torch.__version__,
        **{f"setting {name}": str(value) for name, value in to_flat(settings).items() if name not in own},
    }


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
        stretch=settings.rollout.stretch,
    )


def _model(settings: TrainingConfig, tokenizer: Tokenizer, device: str) -> SegmentModel:
    """With the seed's initial weights; on "meta" without any."""
    with seeded(settings.seed, torch.device(device)), torch.device(device):
        if settings.around.base is not None:
            around: SegmentModel = of_transformers().new(
                settings.around, settings.model, settings.rollout.segment_length
            )
            return around
        config = settings.model.config(tokenizer.vocabulary, settings.rollout.segment_length)
        return make_model(config)


def _start_from(model: SegmentModel, other: SegmentModel) -> None:
    """Raises ValueError where the weights are of another vocabulary."""
    rows, here = other.config.vocabulary, model.config.vocabulary
    if rows != here:
        raise ValueError(f"init_from: its model has {rows} tokens, and the tokenizer has {here}")
    model.load_state_dict(other.state_dict())


def _parallel(
    model: SegmentModel, settings: TrainingConfig, ranks: Ranks, device: torch.device, divided: bool
) -> nn.Module:
    """The module whose call is a rollout: on its device, compiled and shared among processes as the settings say."""
    if settings.compute.compile:
        model.compile_parts()
    if divided:
        shard(model, device)
    else:
        model.to(device)
    how = settings.rollout
    # Under FSDP a graph's size is not what it is made of: weights are gathered for it.
    unsaid = (how.schedule, how.graphs, how.offload) == ("every", None, None)
    keeping = how.replay_schedule if unsaid and not divided else None
    rollouts = RolloutLoss(model, replay.Options(schedule=how.replay_schedule()), keeping, how.readout_tokens)
    if ranks.size > 1 and not divided:
        return DistributedDataParallel(rollouts)
    return rollouts
