"""Where stored memories are kept: on the device, on the CPU, or in files."""

from __future__ import annotations

import collections
import concurrent.futures
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from .inputs import Leaves
from .schedules import Plan

Begin = Callable[[], Callable[[], Leaves]]
"""Begins to fetch a memory; what it returns waits for it."""


class Shelf:
    """Stored memories with the state of the generators there, on the device, on the CPU, or in files.

    The plan says which is loaded next: that one is on its way while the segment before is computed.
    """

    def __init__(self, plan: Plan):
        self.place = plan.store_on
        self.loads = collections.deque(action.segment for action in plan.replay if action.kind == "load")
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
        self.loads.popleft()
        if self.loads and self.loads[0] in self.begin:  # or it is stored later
            self.begun[self.loads[0]] = self.begin[self.loads[0]]()
        return memory

    def drop(self, t: int) -> None:
        del self.begin[t], self.random_states[t]
        if self.folder is not None:
            (self.folder / f"{t}.pt").unlink(missing_ok=True)

    def _moved_to_disk(self, t: int, memory: Leaves) -> Begin:
        if self.folder is None:
            Path(self.place).mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="memories-", dir=self.place))
            self.reader = concurrent.futures.ThreadPoolExecutor(max_workers=1)  # its thread ends with the shelf
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        file, reader = self.folder / f"{t}.pt", self.reader
        spec, leaves = memory.spec, [x.device if isinstance(x, Tensor) else x for x in memory.leaves]
        torch.save([x.clone() for x in memory.tensors()], file)  # a view would be saved with all that it is a view of

        def begin() -> Callable[[], Leaves]:
            stored = reader.submit(torch.load, file, weights_only=True)

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
    leaves, spec = list(memory.leaves), memory.spec
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
