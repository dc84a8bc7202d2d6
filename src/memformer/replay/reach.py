"""Where a graph ends: the tensors that get a gradient from it, and those that would lose theirs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from .inputs import has_hook, innermost, name_of, names_seen_by

Node = Any
"""A node of a graph. torch has the type torch.autograd.graph.Node, in which the leaves' ``variable`` is missing."""


class Reach:
    """The tensors that callables train, and which of them a graph reaches.

    The gradients of these alone are asked for. A graph that ends in anything else is refused: a gradient would be lost.
    Each graph is walked, for a cell may use other parameters in another segment.
    """

    def __init__(self, functions: Sequence[object], parameters: Sequence[Tensor]):
        self.functions = functions
        self.leaves = {id(p): i for i, p in enumerate(parameters) if p.grad_fn is None}
        # A tensor that was derived from others, and is named in ``params``: a graph counts as ending there.
        self.derived = {(p.grad_fn, p.output_nr): i for i, p in enumerate(parameters) if p.grad_fn is not None}
        self.derived_nodes = {node for node, _ in self.derived}
        self.behind: set[Node] = set()
        if self.derived:
            starts = [following for node in self.derived_nodes for following, _ in node.next_functions]
            self.behind, _ = walk([x for x in starts if x is not None])

    def __call__(self, outputs: Sequence[object], sources: Sequence[Tensor], first: Sequence[Tensor] = ()) -> list[int]:
        """Which of the parameters, by position, the outputs' graph ends in.

        Raises:
            ValueError: it ends in a leaf that is neither among them nor among ``sources``, or in a derived tensor and
                behind it; or among the sources of the ``first`` segment's recording, whose graph is not this one.
        """
        found: dict[int, None] = {}
        wanted = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
        if self.derived:
            seen, ends = self._walk_to_derived(wanted, found)
        else:
            seen, ends = walk([x.grad_fn for x in wanted if x.grad_fn is not None])
        own = {id(x) for x in sources}
        stray = []
        for leaf in [x for x in wanted if x.grad_fn is None] + [node.variable for node in ends]:
            i = self.leaves.get(id(leaf))
            if i is not None:
                found[i] = None
            elif id(leaf) not in own:
                stray.append(leaf)
        leaf = None  # which would be a reference to the last one
        if any(x is y for x in stray for y in first):
            raise ValueError(
                f"{self._names()} keeps a tensor that it computed from the first segment or the memory before it, and "
                "uses it later, where no gradient could flow back through it. Return it as part of the memory."
            )
        if stray and (lost := self._lost(stray, seen)):
            raise ValueError(
                f"{self._names()} uses {', '.join(lost)}, which requires a gradient and would get none. "
                "Name it in params=[...], or pass an nn.Module (or a method bound to one) that owns it."
            )
        if self.derived:
            self._refuse_counting_twice(seen, found)
        return list(found)

    def _walk_to_derived(self, outputs: Sequence[Tensor], found: dict[int, None]) -> tuple[set[Node], list[Node]]:
        """The walk that stops at the derived tensors, which it notes in ``found``."""
        seen, todo, ends = set(), [], []

        def visit(edge: Any) -> None:
            if edge in self.derived:
                found[self.derived[edge]] = None
            elif edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                todo.append(edge[0])

        for x in outputs:
            visit((x.grad_fn, x.output_nr))
        for node in todo:
            if not node.next_functions and hasattr(node, "variable"):
                ends.append(node)
            for edge in node.next_functions:
                visit(edge)
        return seen, ends

    def _refuse_counting_twice(self, seen: set[Node], found: dict[int, None]) -> None:
        reached = seen | {node for (node, _), i in self.derived.items() if i in found}
        if both := reached & self.behind:
            leaves = [node.variable for node in both if hasattr(node, "variable")]
            names = ", ".join(self._describe(leaf) for leaf in leaves)
            raise ValueError(
                f"{self._names()} uses a tensor of params= that was computed from {names or 'another of them'}"
                ", and that one, too. Compute it in the cell instead, and name what it is computed from."
            )

    def _names(self) -> str:
        return " or ".join(map(name_of, self.functions))

    def _lost(self, leaves: list[Tensor], graph: Container[object]) -> list[str]:
        """What to call those of some leaves whose gradient somebody could miss: more than the graph holds them, or a
        tensor that was derived from them. A leaf that a cell makes for itself loses none."""
        held = held_by_somebody(leaves)
        found = []
        for leaf, elsewhere in zip(leaves, held, strict=True):
            names = [name for f in self.functions if (name := _name_in(f, leaf, graph)) is not None]
            if elsewhere or names:
                found.append(f"{names[0] if names else 'a tensor'} of shape {tuple(leaf.shape)}")
        return found

    def _describe(self, leaf: Tensor) -> str:
        """The name under which one of them sees a leaf, for error messages."""
        found = (_name_in(function, leaf, ()) for function in self.functions)
        return next((name for name in found if name), "a tensor") + f" of shape {tuple(leaf.shape)}"


def held_by_somebody(leaves: list[Tensor]) -> list[bool]:
    """Which are alive besides for the graph and this list.

    Their references are counted, beside those of a leaf that only a graph holds.
    """

    def made_and_forgotten() -> Any:
        with torch.enable_grad():
            leaf = torch.empty(0, device="cpu", requires_grad=True)
            return leaf.view_as(leaf)

    graph = made_and_forgotten()
    alone = [graph.grad_fn.next_functions[0][0].variable]
    references = [sys.getrefcount(x) for x in (*alone, *leaves)]
    return [count > references[0] for count in references[1:]]


def runs_functions(outputs: Sequence[Tensor]) -> bool:
    """Whether a backward from the outputs runs a user's autograd function, which may do anything."""
    seen, _ = walk([x.grad_fn for x in outputs if x.grad_fn is not None])
    return any(isinstance(node, BackwardCFunction) for node in seen)


def check_hooks(outputs: Sequence[object]) -> None:
    """ValueError if a backward from the outputs would run hooks of a user: they expect the whole gradient, once."""
    wanted = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    _, ends = walk([x.grad_fn for x in wanted if x.grad_fn is not None])
    for leaf in [x for x in wanted if x.grad_fn is None] + [node.variable for node in ends]:
        _refuse_hooks(f"a tensor of shape {tuple(leaf.shape)}", leaf)


def refuse_hooks_of(owners: Sequence[object]) -> None:
    """The same for the parameters of modules. Those that FSDP shards have their hooks run by FSDP, once."""
    for owner in owners:
        for name, p in owner.named_parameters() if isinstance(owner, nn.Module) else ():
            if not hasattr(p, "placements"):
                _refuse_hooks(f"parameter '{name}'", p)


def _refuse_hooks(name: str, tensor: Tensor) -> None:
    if has_hook(tensor) or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"accumulate: {name} has a hook on its gradient (an optimizer in the backward?), which would run once per "
            "segment, with a part of the gradient. Do its work after accumulate, or use replay.memory_replay with "
            "register_post_accumulate_grad_hook, which runs once there."
        )


def walk(starts: Sequence[Node]) -> tuple[set[Node], list[Node]]:
    """All nodes of the graph behind ``starts``, and those that end in a leaf. It runs per segment, so it is plain."""
    todo = list(dict.fromkeys(starts))
    seen: set[Node] = {None, *todo}
    ends = []
    for node in todo:
        edges = node.next_functions
        if not edges and hasattr(node, "variable"):
            ends.append(node)
        for edge in edges:
            following = edge[0]
            if following not in seen:
                seen.add(following)
                todo.append(following)
    return seen, ends


def _name_in(function: object, leaf: Tensor, graph: Container[object]) -> str | None:
    """The name under which a callable sees a leaf, or a tensor derived from it."""
    function = innermost(function)
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        function = getattr(type(function), "forward", None) or type(function).__call__
    scope: dict[str, object] = {}
    if inspect.isfunction(function):
        defaults = {k: v.default for k, v in inspect.signature(function).parameters.items()}
        scope = {**names_seen_by(function), **defaults}
    for name, value in scope.items():
        inner = value.named_parameters() if isinstance(value, nn.Module) else ()
        for full_name, x in [(name, value), *((f"{name}.{part}", x) for part, x in inner)]:
            if x is leaf or (isinstance(x, Tensor) and x.grad_fn is not None and x.grad_fn in graph):
                return f"'{full_name}'"
    return None
