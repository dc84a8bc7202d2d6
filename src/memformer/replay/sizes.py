"""Bytes of a memory and of a segment's graph, by which plans are made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .environment import Environment
from .inputs import Cell, Leaves, Params, Tree, call_cell, carries_grad, trained_tensors


class Sizes(NamedTuple):
    """Bytes of one memory and of one segment's graph: ``schedule.plan(num_segments, *sizes)``."""

    memory_bytes: int
    graph_bytes: int


def measure(cell: Cell, segment: Tree, memory: Tree, *, params: Params = ()) -> Sizes:
    """Run one segment and count: the memory that it returns, and what autograd keeps of it besides parameters."""
    storages: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()

    environment = Environment([x for x in tree_leaves((segment, memory)) if isinstance(x, Tensor)])
    trained = trained_tensors(cell, params)
    memory, _ = Leaves(memory).cut(carries_grad)
    with environment.random_numbers_kept(), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            value, after = call_cell(cell, segment, memory)
        for x in [*trained, *tree_leaves(segment)]:
            if isinstance(x, Tensor):
                storages.pop(x.untyped_storage().data_ptr(), None)
        memory_bytes = sum(x.numel() * x.element_size() for x in tree_leaves(after) if isinstance(x, Tensor))
        del value, after
    return Sizes(memory_bytes, sum(storages.values()))
