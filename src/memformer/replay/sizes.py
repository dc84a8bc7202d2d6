"""Bytes of a memory and of a segment's graph, by which plans are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple, TypeVar

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
from .reach import walk
from .storage import Compact, addresses
from .world import World

T = TypeVar("T")


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

    def count(x: Tensor) -> None:
        kept.update(addresses([x]))

    def run(wants_grad: Callable[[Tensor], bool]) -> tuple[Tree, Tree]:
        kept.clear()
        with world.restored(), environment.random_numbers_kept(), torch.enable_grad():
            # Containers that it may change, and tensors that it may put hooks on.
            before, own = Leaves(memory).cut(wants_grad)[0], Leaves(segment).cut(requires_grad)[0]
            outcome = noting_saved(lambda: call_cell(cell, own, before), count)
            world.look_closely()
            return outcome

    try:
        value, after = run(carries_grad)
    except (RuntimeError, AssertionError, BufferError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        value, after = run(requires_grad)  # some leaf of the memory cannot have a gradient: a table of weights
    # The graph's outputs are kept until its backward, and with them what they are views of.
    graph = kept | addresses(_tensors((value, after)))
    stored = addresses(_tensors(compact(tree_leaves(detach(after)))))
    return Sizes(*(sum(size for at, size in of.items() if at not in compact.held) for of in (stored, graph)))


def noting_saved(run: Callable[[], T], note: Callable[[Tensor], object]) -> T:
    """What ``run()`` returns; each tensor that its graph saves is noted.

    Torch refuses hooks on saved tensors beside a ``torch.func.grad`` in a cell. Then it is run again without, and the
    graph of the result is asked, which knows nothing of graphs that replay keeps.
    """

    def pack(x: Tensor) -> Tensor:
        note(x)
        return x.detach()

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return run()
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
    result = run()
    nodes, _ = walk([x.grad_fn for x in _tensors(result) if x.grad_fn is not None])
    for node in nodes - {None}:
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                with contextlib.suppress(RuntimeError):  # the cell's own backward has freed it
                    for x in _tensors(getattr(node, name)):
                        note(x)
    return result


def _tensors(tree: Tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
