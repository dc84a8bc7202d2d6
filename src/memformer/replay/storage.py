"""Where stored memories are kept: on the device, on the CPU, or in files."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import operator
import shutil
import tempfile
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_unflatten

from .environment import may_wait
from .inputs import Leaves
from .schedules import Plan

Begin = Callable[[], Callable[[], Leaves]]
"""Begins to fetch a memory; what it returns waits for it."""


def storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """The storages that the tensors use, maybe more than once."""
    return (part.untyped_storage() for x in tensors for part in _strided_parts(x))


def addresses(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each storage that the tensors use, by its address."""
    return {storage.data_ptr(): storage.nbytes() for storage in storages(tensors)}


def _strided_parts(x: Tensor) -> Iterator[Tensor]:
    """A tensor as tensors that have a storage: itself, or what a sparse one or a wrapper holds."""
    if is_traceable_wrapper_subclass(x):
        inner, _ = x.__tensor_flatten__()
        for name in inner:
            yield from _strided_parts(getattr(x, name))
    elif x.layout is torch.sparse_coo:
        yield from (x._indices(), x._values())
    elif x.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (x.crow_indices(), x.col_indices(), x.values())
    elif x.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (x.ccol_indices(), x.row_indices(), x.values())
    else:
        yield x


class Compact:
    """Takes what a cell returned out of larger storages, so that keeping it keeps no more than it is.

    A hidden state's last positions as memory would keep the whole hidden state of each segment.

    Args:
        held: tensors that somebody else keeps alive, so that views of them cost nothing.
    """

    def __init__(self, held: Sequence[Tensor]):
        self._tensors = held

    @functools.cached_property
    def held(self) -> Container[int]:
        """The addresses of the storages that cost nothing."""
        return addresses(self._tensors)

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves, with copies in place of views.

        Left as they are: leaves that together see all of their storage, and views of what is held. Leaves that are the
        same view share one copy.
        """
        result = list(leaves)
        plain = [i for i, x in enumerate(leaves) if type(x) is Tensor and x.layout is torch.strided]
        if all(leaves[i].nbytes >= leaves[i].untyped_storage().nbytes() for i in plain):
            return result
        views: dict[int, dict[Any, list[int]]] = {}
        for i in plain:
            x = leaves[i]
            view = (x.storage_offset(), x.shape, x.stride(), x.dtype, x.is_conj(), x.is_neg())
            views.setdefault(x.untyped_storage().data_ptr(), {}).setdefault(view, []).append(i)
        for address, of_storage in views.items():
            firsts = [leaves[same[0]] for same in of_storage.values()]
            whole = firsts[0].untyped_storage().nbytes()
            if sum(_dense(x).nbytes for x in firsts) < whole and address not in self.held:
                for x, same in zip(firsts, of_storage.values(), strict=True):
                    copied = _dense(x).clone().expand(x.shape)
                    for i in same:
                        result[i] = copied.detach()
        return result

    def copy(self, leaves: Leaves) -> Leaves:
        """The same of a tree's leaves; the tree itself if nothing is copied."""
        copies = self(leaves.leaves)
        return leaves if all(map(operator.is_, copies, leaves.leaves)) else leaves.replaced(copies)


def _dense(x: Tensor) -> Tensor:
    """A tensor without the repetitions of ``expand``."""
    return x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]


class Shelf:
    """Stored memories with the state of the generators there, on the device, on the CPU, or in files.

    The plan says which is loaded next: that one is on its way while the segment before is computed.
    """

    def __init__(self, plan: Plan):
        self.place = plan.store_on
        if self.place != "device" and not may_wait():
            raise RuntimeError("memories that are kept off the card (Offload, Budget) cannot be captured")
        self.loads = itertools.islice(
            (t for kind, t in plan.replay if kind == "load"), 1, None
        )  # after the one at hand
        self.begin: dict[int, Begin] = {}
        self.begun: dict[int, Callable[[], Leaves]] = {}
        self.random_states: dict[int, list[Tensor]] = {}
        self.latest: list[Tensor] = []
        self.folder: Path | None = None

    def put(self, t: int, memory: Leaves, random_state: list[Tensor]) -> None:
        if self.latest:  # equal states are shared: without dropout they all are
            pairs = zip(self.latest, random_state, strict=True)
            random_state = [old if torch.equal(old, new) else new for old, new in pairs]
        self.latest = self.random_states[t] = random_state
        if t == 0 or self.place == "device":  # the first memory is the caller's, who holds it anyway
            self.begin[t] = lambda: lambda: memory
        elif self.place == "cpu":
            self.begin[t] = _moved_to_cpu(memory)
        else:
            self.begin[t] = self._moved_to_disk(t, memory)

    def get(self, t: int) -> Leaves:
        memory = (self.begun.pop(t, None) or self.begin[t]())()
        if self.place != "device":
            following = next(self.loads, None)
            if following in self.begin:  # or it is stored later
                self.begun[following] = self.begin[following]()
        return memory

    def drop(self, t: int) -> None:
        del self.begin[t], self.random_states[t]
        if self.folder is not None:
            (self.folder / f"{t}.pt").unlink(missing_ok=True)

    def _moved_to_disk(self, t: int, memory: Leaves) -> Begin:
        if any(x.is_nested for x in memory.tensors()):
            raise ValueError(
                "Offload: the memory holds a nested tensor, which is another one when it is read from a file. Keep it "
                "on the device, or carry its values and offsets"
            )
        if self.folder is None:
            place = Path(self.place).expanduser()
            place.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="memories-", dir=place))
            self.reader = concurrent.futures.ThreadPoolExecutor(max_workers=1)  # its thread ends with the shelf
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        file, reader = self.folder / f"{t}.pt", self.reader
        spec, leaves = memory.spec, [x.device if isinstance(x, Tensor) else x for x in memory.leaves]
        torch.save([x.clone() for x in memory.tensors()], file)  # a view would be saved with all that it is a view of

        def begin() -> Callable[[], Leaves]:
            # Nobody else writes into that folder, and a memory may be of any kind of tensor.
            stored = reader.submit(torch.load, file, weights_only=False)

            def finish() -> Leaves:
                try:
                    tensors = iter(stored.result())
                except Exception as error:
                    raise RuntimeError(f"the memory before segment {t} cannot be read from {file}: {error}") from error
                back = [next(tensors).to(x) if isinstance(x, torch.device) else x for x in leaves]
                return Leaves(tree_unflatten(back, spec))

            return finish

        return begin


def _moved_to_cpu(memory: Leaves) -> Begin:
    """Copies in pinned memory; the host waits for neither way. Those back run on a stream of their own."""
    on_gpu = {i: x.device for i, x in enumerate(memory.leaves) if isinstance(x, Tensor) and x.is_cuda}
    if not on_gpu:
        return lambda: lambda: memory
    leaves: list[Any] = list(memory.leaves)
    spec = memory.spec
    for i in on_gpu:
        leaves[i] = torch.empty_like(leaves[i], device="cpu", pin_memory=True).copy_(leaves[i], non_blocking=True)

    def begin() -> Callable[[], Leaves]:
        streams = {device: torch.cuda.Stream(device) for device in on_gpu.values()}
        back = list(leaves)
        for i, device in on_gpu.items():
            streams[device].wait_stream(torch.cuda.current_stream(device))  # which may still copy it away
            with torch.cuda.stream(streams[device]):
                back[i] = leaves[i].to(device, non_blocking=True)

        def finish() -> Leaves:
            for i, device in on_gpu.items():
                current = torch.cuda.current_stream(device)
                current.wait_stream(streams[device])
                back[i].record_stream(current)
            return Leaves(tree_unflatten(back, spec))

        return finish

    return begin
