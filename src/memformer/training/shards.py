"""Checkpoints of a model that FSDP divides: each process writes and reads its own part, and none holds the whole.

It is torch.distributed.checkpoint with safetensors files, which hold no pickle, in a checkpoint's folder ``shards``.
A run goes on from them with any number of processes, and ``Memformer.from_pretrained`` reads them.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..parallel import as_rows
from ..pretrained import SHARDS
from .parts import Parts, by_name

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

__all__ = ["SHARDS", "found_in", "load", "write"]


def found_in(checkpoint: Path) -> bool:
    """Whether a checkpoint was written in parts."""
    return (checkpoint / SHARDS).is_dir()


def write(parts: Parts, folder: Path) -> None:
    """Write this process's part of the run's tensors to a new folder, which all processes must see.

    Raises:
        OSError: a process cannot write; all raise it.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    ranks = parts.ranks
    with ranks.together():
        if not ranks.rank:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    with ranks.together():
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder.parent}: what process 0 writes there cannot be seen by process {ranks.rank}: processes on "
                "several machines need an --out that all of them share"
            )
    assert parts.progress.memory is not None
    divided = next(parts.model.parameters())
    memory = {name: as_rows(part, divided) for name, part in by_name(parts.progress.memory).items()}
    with _explained(folder):
        save(
            _tensors(parts, memory, bool(parts.average)),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        )


def load(parts: Parts, checkpoint: Path) -> dict[str, Tensor]:
    """Put the tensors of a checkpoint in parts into a run with any number of processes, in place.

    Returns:
        those of the memory of all lanes, by name, which are not put anywhere.

    Raises:
        OSError, ValueError: a file cannot be read, or does not fit.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(checkpoint / SHARDS))
    with _explained(checkpoint / SHARDS):
        saved = cast("Mapping[str, TensorStorageMetadata]", reader.read_metadata().state_dict_metadata)
        for name, parameter in parts.model.named_parameters():
            prefix = f"optimizer/{name}/"
            for key in (key for key in saved if key.startswith(prefix)):
                # A count of steps, or something that is divided as the parameter is.
                as_the_parameter = saved[key].size == parameter.shape
                like = parameter.detach() if as_the_parameter else torch.empty(saved[key].size, device=parameter.device)
                value = torch.empty_like(like, dtype=saved[key].properties.dtype)
                parts.optimizer.state[parameter][key.removeprefix(prefix)] = value
        memory = {
            name: torch.empty(part.size, dtype=part.properties.dtype, device="cpu")
            for name, part in saved.items()
            if name.split("/")[0] == "memory"
        }
        apart = any(key.startswith("weights/") for key in saved)
        # Each process reads for itself: nothing has to be agreed upon, and one process needs no process group.
        load(_tensors(parts, memory, apart), storage_reader=reader, no_dist=True)
        for name, parameter in parts.model.named_parameters() if parts.average and not apart else ():
            parts.average[name].copy_(parameter.detach())
    return memory


def _tensors(parts: Parts, memory: dict[str, Tensor], apart: bool) -> dict[str, Tensor]:
    """Everything that a run's checkpoint holds, by name: what is there is written or, in place, read.

    What a user loads is ``model/``: the weights, or their average, which the checkpoint of a run that keeps one has
    apart from them.
    """
    weights = "weights" if apart else "model"
    named = {f"{weights}/{name}": parameter.detach() for name, parameter in parts.model.named_parameters()}
    if apart:
        named |= {f"model/{name}": tensor for name, tensor in parts.average.items()}
    for name, parameter in parts.model.named_parameters():
        named |= {f"optimizer/{name}/{key}": value for key, value in parts.optimizer.state[parameter].items()}
    return named | memory


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """torch.distributed.checkpoint's error, a traceback of each process and not even an Exception, as a sentence."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        kind = OSError if isinstance(reason, OSError) else ValueError
        raise kind(f"{folder}: process {rank}: {type(reason).__name__}: {reason}") from error
