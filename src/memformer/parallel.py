"""The processes of a training run, as torchrun starts them: each has some of the lanes, and all the same parameters."""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .model import Memformer

__all__ = ["Ranks", "full", "gradient_sync", "joined", "like", "shard"]

T = TypeVar("T")

_PATIENCE = datetime.timedelta(days=7)
"""The processes wait so long for what the first one does alone; elsewhere torch gives up after minutes."""


class Ranks:
    """This process among those of the run. A run of one process does not need torch.distributed."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """(rows, ...) of each process -> (rows of all processes, ...), in the order of ranks, in every process."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of what :meth:`gather` gave."""
        return rows.chunk(self.size)[self.rank]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the first process, which alone does it, in all of them; however long it takes.

        Raises:
            whatever it raises there; in the others a ValueError with the same sentence.
        """
        if self.size == 1:
            return work()
        group = dist.new_group(backend="gloo" if dist.is_gloo_available() else None, timeout=_PATIENCE)
        outcome: list[tuple[T | None, str]] = [(None, "")]
        failed: Exception | None = None
        if not self.rank:
            try:
                outcome = [(work(), "")]
            except Exception as error:
                failed, outcome = error, [(None, str(error) or type(error).__name__)]
        dist.broadcast_object_list(outcome, src=0, group=group)
        dist.destroy_process_group(group)
        result, message = outcome[0]
        if failed is not None:
            raise failed
        if message:
            raise ValueError(message)
        return cast(T, result)

    def check_same(self, what: str, known: str) -> None:
        """Raise ValueError in all processes unless all of them know the same."""
        everyone = [known] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, known)
        if other := [rank for rank, known in enumerate(everyone) if known != everyone[0]]:
            raise ValueError(
                f"{what}: process {other[0]} has another than process 0; all must read the same files, of which each "
                "machine may have its own copy"
            )


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes if torchrun started this one, and part from them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(model: Memformer) -> None:
    """Divide a model's parameters among the processes by FSDP2, layer by layer, in place."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Nothing here changes what a module returned in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # What a rollout calls are the encoder, the writer and the decoder: each is a root of its own.
    roots: list[nn.Module] = [model.encoder, model.writer]
    stacks: list[nn.Module] = [*model.encoder.layers]
    if model.decoder is not None:
        roots.append(model.decoder)
        stacks += [*model.decoder.layers]
    for part in [*stacks, *roots]:
        fully_shard(part, reshard_after_forward=True)  # a root would keep what it gathered, and use it when it is stale
    register_fsdp_forward_method(model.writer, "initial")


def gradient_sync(model: Memformer) -> Callable[[bool], None] | None:
    """What switches the exchange of gradients between processes, where :func:`shard` divided the model; else None."""
    if not hasattr(model.encoder, "set_requires_gradient_sync"):
        return None
    from torch.distributed.fsdp import FSDPModule

    parts = [cast(FSDPModule, part) for part in (model.encoder, model.writer, model.decoder) if part is not None]

    def switch(exchange: bool) -> None:
        for part in parts:
            part.set_requires_gradient_sync(exchange)

    return switch


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(whole: Tensor, other: Tensor) -> Tensor:
    """A whole tensor moved to the device of another, and divided among the processes as that one is."""
    whole = whole.to(other.device)
    if not hasattr(other, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(whole, other.device_mesh, other.placements)
