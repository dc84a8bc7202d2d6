"""Bytes of a memory and of a segment's graph, by which plans are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .boundary import detach
from .environment import Environment
from .inputs import (
    Cell,
    Leaves,
    Params,
    Tree,
    call_cell,
    captured_modules,
    carries_grad,
    owners,
    requires_grad,
    trained_tensors,
)
from .storage import Compact, addresses
from .world import World


class Sizes(NamedTuple):
    """Bytes of one memory and of one segment's graph: ``schedule.plan(num_segments, *sizes)``."""

    memory_bytes: int
    graph_bytes: int


def measure(cell: Cell, segment: Tree, memory: Tree, *, params: Params = ()) -> Sizes:
    """Run one segment and count: the memory that it returns, and what its graph keeps besides.

    Storages are counted, each once; those of parameters, of the segment and of the memory given are the caller's.
    Random numbers and buffers are afterwards as they were.
    """
    trained = trained_tensors(cell, params)
    world = World(owners(cell, params), trained, captured=captured_modules(cell))
    world.watch_buffers()
    environment = Environment([x for x in tree_leaves((segment, memory)) if isinstance(x, Tensor)])
    given = _tensors((segment, memory, trained))
    compact = Compact(given)
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        kept.update(addresses([x]))
        return x.detach()

    def run(wants_grad: Callable[[Tensor], bool]) -> tuple[Tree, Tree]:
        kept.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda x: x)
        with world.restored(), environment.random_numbers_kept(), torch.enable_grad(), hooks:
            return call_cell(cell, segment, Leaves(memory).cut(wants_grad)[0])

    try:
        value, after = run(carries_grad)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        value, after = run(requires_grad)  # some leaf of the memory cannot have a gradient: a table of weights
    # The graph's outputs are kept until its backward, and with them what they are views of.
    graph = kept | addresses(_tensors((value, after)))
    stored = addresses(_tensors(compact(tree_leaves(detach(after)))))
    return Sizes(*(sum(size for at, size in of.items() if at not in compact.held) for of in (stored, graph)))


def _tensors(tree: Tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
