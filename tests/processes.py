"""A few processes that meet by gloo, for tests of what is distributed."""

from __future__ import annotations

import functools
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def two_processes(work: Callable[..., Any], tmp_path: Path, *args: Any) -> list[Any]:
    """:func:`several_processes`, two."""
    return several_processes(WORLD, work, tmp_path, *args)


def several_processes(count: int, work: Callable[..., Any], tmp_path: Path, *args: Any) -> list[Any]:
    """Run ``work(rank, *args)`` in so many processes; returns what they returned, which goes through files."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    context = _context()
    processes = [context.Process(target=_process, args=(work, rank, count, folder, args)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = [torch.load(folder / f"{rank}.pt") for rank in range(count)]
    errors = [error for error, _ in results if error]
    assert not errors, "\n".join(errors)
    return [result for _, result in results]


@functools.cache
def _context() -> BaseContext:
    """Processes that begin with everything imported, where there is such a start: a pair takes seconds else."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["memformer.training", "torch.distributed.fsdp", "pytest"])
    return context


def _process(work: Callable[..., Any], rank: int, count: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    error = result = None
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=count)
        result = work(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        error = traceback.format_exc()
    torch.save((error, result), folder / f"{rank}.pt")
