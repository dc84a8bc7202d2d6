"""The processes of a training run, as torchrun starts them: each has some of the lanes, and all the same parameters."""

from __future__ import annotations

import datetime
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .interface import SegmentModel
from .pretrained import divided

__all__ = ["Ranks", "as_rows", "gradient_sync", "joined", "like", "shard"]

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

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the first process, which alone does it, in all of them; however long it takes.

        Raises:
            whatever it raises there; in the others an error of its kind with the same sentence.
        """
        if self.size == 1:
            return work()
        group = dist.new_group(backend="gloo" if dist.is_gloo_available() else None, timeout=_PATIENCE)
        result: list[T | None] = [None]
        try:
            with _together(self, group):
                if not self.rank:
                    result[0] = work()
            dist.broadcast_object_list(result, src=0, group=group)
        finally:
            dist.destroy_process_group(group)
        return cast(T, result[0])

    def agree(self, facts: Mapping[str, str]) -> None:
        """Check that all processes have found the same.

        Raises:
            ValueError: one has not; in all of them, with its number and machine, and what differs.
        """
        if self.size == 1:
            return
        found: list[tuple[str, dict[str, str]]] = [("", {})] * self.size
        dist.all_gather_object(found, (socket.gethostname(), dict(facts)))
        (first_host, expected), others = found[0], list(enumerate(found))[1:]
        wrong = [
            f"process {rank} (on {host}) has another {name} than process 0 (on {first_host})"
            + (f": {theirs[name]} instead of {expected[name]}" if len(theirs[name] + expected[name]) < 100 else "")
            for rank, (host, theirs) in others
            for name in expected
            if theirs[name] != expected[name]
        ]
        if wrong:
            more = f"; and {len(wrong) - 3} more" * (len(wrong) > 3)
            raise ValueError(f"{'; '.join(wrong[:3])}{more}. All processes of a run need the same of everything")

    def together(self) -> AbstractContextManager[None]:
        """What a process fails at within this block ends all of them at its end, each with the first one's sentence.

        Nobody may wait for another inside it: one that has failed comes to the end at once.
        """
        return _together(self)


@contextmanager
def _together(ranks: Ranks, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    if ranks.size == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    failures: list[tuple[str, str] | None] = [None] * ranks.size
    dist.all_gather_object(failures, own and (_kind(own), str(own) or type(own).__name__), group=group)
    if own is not None:
        raise own
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise _KINDS[failure[0]](f"process {rank}: {failure[1]}")


_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        FileNotFoundError, FileExistsError, BlockingIOError, OSError, FloatingPointError, ImportError, MemoryError,
        ValueError, RuntimeError,
    )
}  # fmt: skip
"""What another process's error is raised as: the first that it is one of."""


def _kind(error: Exception) -> str:
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError")


class _Place(NamedTuple):
    """Where a launcher put this process."""

    rank: int
    size: int
    local_rank: int | None
    """Its number on its machine, where the launcher tells it."""


_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK")
_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""What launchers (torchrun; mpirun of Open MPI, MPICH and Intel; srun) tell a process, the first known one counts.
srun is asked for a place only where WORLD_SIZE is set too: its variables are also there for what it did not start."""


@contextmanager
def joined(device: str = "auto", minutes: float = 30.0) -> Iterator[None]:
    """Meet the other processes if a launcher started this one, and part from them at the end.

    An error inside ends all processes: the one that had it raises it, and the others, which lose their connection to
    it, exit without a word. Where nobody could say anything (a machine is gone), the first to notice raises an error.

    Args:
        device: where the run computes; this process gets the accelerator of its number on the machine.
        minutes: how long a process waits for another before it gives up.

    Raises:
        ValueError: what the launcher says is incomplete or does not fit the machine.
        ConnectionError: the others cannot be reached, or not any more.
    """
    place = _place(os.environ)
    if place is None:
        yield
        return
    from torch.distributed.rendezvous import rendezvous

    _take_accelerator(device, place)
    timeout = datetime.timedelta(minutes=minutes)
    who = f"process {place.rank} of {place.size}"
    try:
        store, _, _ = next(rendezvous("env://", rank=place.rank, world_size=place.size, timeout=timeout))
        dist.init_process_group(store=store, rank=place.rank, world_size=place.size, timeout=timeout)
        _check_accelerators(device, place)
    except (RuntimeError, OSError) as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(f"{who} cannot meet the others at {at} ({_first_line(error)})") from error
    failed = True
    try:
        yield
        failed = False
    except Exception as error:
        if not _first_to_say(store):
            raise SystemExit(2) from error
        if not _is_lost(error):
            raise
        raise ConnectionError(
            f"{who}: another process of the run ended without a word, or cannot be reached ({_first_line(error)}). "
            "Start all of them again, with --resume, to go on from the newest checkpoint"
        ) from error
    finally:
        # What computes on accelerators might wait for those who are gone. gloo's threads, which do not, must have ended
        # before the interpreter does, or they abort it.
        if not failed or device.startswith("cpu") or not torch.accelerator.is_available():
            dist.destroy_process_group()


def _place(environment: Mapping[str, str]) -> _Place | None:
    size = _whole(environment, _SIZE)
    if size is None or size == 1:
        return None
    rank = _whole(environment, _RANK)
    if rank is None:
        raise ValueError(f"RANK: expected this process's number, because WORLD_SIZE is {size}; it is not set")
    if not 0 <= rank < size:
        raise ValueError(f"RANK: expected a number from 0 to {size - 1}, because WORLD_SIZE is {size}, got {rank}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ValueError(
                f"{name}: not set, but WORLD_SIZE is {size}: processes meet at the address MASTER_ADDR (of the machine "
                "with process 0) and the port MASTER_PORT. torchrun sets both; else set them before the launcher"
            )
    local = _whole(environment, _LOCAL_RANK)
    if local is None and environment.get("SLURM_PROCID") == str(rank):
        local = _whole(environment, ("SLURM_LOCALID",))
    return _Place(rank, size, local)


def _whole(environment: Mapping[str, str], names: Sequence[str]) -> int | None:
    """The number in the first variable that is set."""
    name = next((name for name in names if environment.get(name)), None)
    if name is None:
        return None
    if not environment[name].isdecimal() or (name in _SIZE and not int(environment[name])):
        raise ValueError(
            f"{name}: expected a whole number, as launchers of processes set it, got {environment[name]!r}"
        )
    return int(environment[name])


def _take_accelerator(device: str, place: _Place) -> None:
    """Make this process's accelerator the one that is meant by the name of its kind."""
    if device.startswith("cpu") or not torch.accelerator.is_available():
        return
    if ":" in device:
        raise ValueError(
            f"device: {device} is one accelerator, but there are {place.size} processes: use --device "
            f"{device.split(':')[0]}, of which each process takes its own"
        )
    count = torch.accelerator.device_count()
    local = place.rank % count if place.local_rank is None else place.local_rank
    if local >= count > 1 or (local >= count and "LOCAL_RANK" in os.environ):
        raise ValueError(
            f"process {place.rank} is number {local + 1} on its machine, which has {count} accelerator"
            f"{'s' * (count > 1)}: start at most as many (torchrun --nproc-per-node {count}), or use --device cpu"
        )
    torch.accelerator.set_device_index(local if local < count else 0)  # srun may show each process only its own


def _check_accelerators(device: str, place: _Place) -> None:
    """Two processes that share one would wait for each other for ever."""
    if device.startswith("cpu") or not torch.cuda.is_available():
        return
    mine = socket.gethostname(), str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    all_of_them: list[tuple[str, str]] = [mine] * place.size
    dist.all_gather_object(all_of_them, mine)
    if (other := all_of_them.index(mine)) < place.rank:
        raise ValueError(
            f"processes {other} and {place.rank} have the same accelerator of {mine[0]}: start no more processes on a "
            "machine than it has accelerators, or use --device cpu"
        )


def _first_to_say(store: Any) -> bool:
    """Whether no other process of the run has said what ended it."""
    try:
        store.set_timeout(datetime.timedelta(seconds=10))
        return store.add("memformer/said", 1) == 1
    except Exception:  # the process that keeps it is gone
        return True


def _is_lost(error: Exception) -> bool:
    """Whether an error says no more than that another process cannot be reached."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _first_line(error: Exception) -> str:
    return re.sub(r"^\[\S*/(\S+)\] ", "", str(error).strip().split("\n")[0].split(". This may indicate")[0])


def shard(model: SegmentModel, device: torch.device) -> None:
    """Divide a model's parameters among the processes by FSDP2, in place, and move them to a device, layer by layer.

    Parameters on the device "meta" have no values afterwards; a checkpoint is to be read into them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Nothing here changes what a module returned in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # What a rollout calls are a model's parts (an encoder, a writer, a stack, a norm): each is a root of its own.
    roots = [part for part in model.children() if any(True for _ in part.parameters())]
    stacks = [stack for root in roots for stack in root.modules() if isinstance(stack, nn.ModuleList)]
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in [*(layer for stack in stacks for layer in stack), *roots]:
        # A root would keep what it gathered, and use it when it is stale.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        if hasattr(part, "initial"):
            register_fsdp_forward_method(part, "initial")
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)  # the tables of positions make themselves anew
    model.to(device)


def gradient_sync(model: SegmentModel) -> Callable[[bool], None] | None:
    """What switches the exchange of gradients between processes, where :func:`shard` divided the model; else None."""
    if not divided(model):
        return None
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in model.children() if isinstance(part, FSDPModule)]

    def switch(exchange: bool) -> None:
        for part in parts:
            part.set_requires_gradient_sync(exchange)

    return switch


def like(whole: Tensor, other: Tensor) -> Tensor:
    """A whole tensor moved to the device of another, and divided among the processes as that one is."""
    whole = whole.to(other.device)
    if not hasattr(other, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(whole, other.device_mesh, other.placements)


def as_rows(rows: Tensor, other: Tensor) -> Tensor:
    """Each process's (rows, ...) as parts of one tensor, divided among the processes of another one."""
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(other, DTensor)
    return DTensor.from_local(rows, other.device_mesh, [Shard(0)])
