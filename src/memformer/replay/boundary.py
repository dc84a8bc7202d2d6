"""What stands between two rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_structure

from .inputs import Cell, Tree, call_cell
from .schedules import at_least


def detach(memory: Tree) -> Tree:
    """The same memory, cut from the graph: the boundary between two rollouts in truncated BPTT."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, memory)


def reset(memory: Tree, initial: Tree, lanes: Tensor, dim: int = 0) -> Tree:
    """The memory, with ``initial`` in those lanes of the batch where ``lanes`` is True: new documents begin there.

    Gradients go on to whichever of the two a lane takes: an initial memory that is learned is trained.

    Args:
        memory, initial: pytrees of one structure, the tensors of ``initial`` of the memory's shapes, or of such as
            broadcast to them. The result has the memory's dtypes, which may be of half precision (autocast) where a
            learned initial memory is of single.
        lanes: (batch,) boolean.
        dim: the dimension of the batch, in every tensor of the memory. That of ``nn.LSTM`` and ``nn.GRU`` is
            (layers, batch, dim): there it is 1. Where there are as many layers as lanes nothing can tell the two apart.

    Raises:
        ValueError: ``lanes`` is not one boolean for each lane of every tensor; a tensor has no such dimension;
            ``initial`` has another structure or shapes that do not fit, or integers where the memory has not; ``dim``
            is negative.
    """

    at_least("dim", dim, 0)
    if not isinstance(lanes, Tensor):
        raise ValueError(f"lanes: expected a boolean tensor of shape (batch,), got {type(lanes).__name__}")

    if (expected_tree := tree_structure(memory)) != (got := tree_structure(initial)):
        raise ValueError(f"initial: expected the structure of the memory, {expected_tree}, got {got}")

    def choose(old: object, new: object) -> Any:
        if not isinstance(old, Tensor):
            return old
        if not isinstance(new, Tensor):
            raise ValueError(f"initial: expected a tensor of shape {tuple(old.shape)}, got {type(new).__name__}")
        if old.dim() <= dim:
            raise ValueError(
                f"the memory has a tensor of shape {tuple(old.shape)}, which has no lanes in dimension {dim}. Reset "
                "tensors with other lanes by a call of their own"
            )
        expected = old.shape[dim : dim + 1]
        if lanes.dtype != torch.bool or lanes.shape != expected:
            raise ValueError(
                f"lanes: expected a boolean tensor of shape {tuple(expected)}, one entry per lane of the memory "
                f"({tuple(old.shape)}, lanes in dimension {dim}), got {lanes.dtype} of shape {tuple(lanes.shape)}. The "
                "lanes of nn.LSTM's and nn.GRU's memory are dimension 1: say dim=1"
            )
        if new.dtype != old.dtype and not (new.is_floating_point() and old.is_floating_point()):
            raise ValueError(f"initial: expected {old.dtype}, as the memory is of, got {new.dtype}")
        chosen = torch.where(lanes.view([-1 if i == dim else 1 for i in range(old.dim())]), new.to(old.dtype), old)
        if chosen.shape != old.shape:
            raise ValueError(f"initial: expected the shapes of the memory, {tuple(old.shape)}, got {tuple(new.shape)}")
        return chosen

    return tree_map(choose, memory, initial)


def burn_in(cell: Cell, segments: Sequence[Tree], memory: Tree) -> Tree:
    """The memory after ``segments``, without gradients or losses: overlap with the rollout before.

    A carried memory was written by older parameters. To refresh it, keep the memory from some segments before the end
    of a rollout, and run these again: ``memory = burn_in(cell, last_segments, older_memory)``.
    """
    with torch.no_grad():
        for segment in segments:
            _, memory = call_cell(cell, segment, memory)
    return detach(memory)


def check_equal_across_ranks(number: int, what: str) -> None:
    """Raise ValueError on every rank unless all ranks of the default process group give the same number.

    Ranks whose rollouts differ in length are right under DistributedDataParallel. Where a segment is itself a
    collective operation (FSDP, synchronised normalisation) they would wait for each other for ever: check before.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    numbers: list[object] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(numbers, number)
    if len(set(numbers)) > 1:
        raise ValueError(f"{what} differs between ranks, which would wait for each other for ever: {numbers}")
