"""What a user hands in: pytrees, cells, readouts, and the tensors that they train.

Not known here: schedules, and how anything is replayed.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

Tree = Any
"""A pytree: a tensor, or tuples, lists and dicts of them; ``None`` and plain numbers are allowed as leaves."""

Cell = Callable[[Tree, Tree], tuple[Tree, Tree]]
Readout = Callable[[list[Tree], list[Tree]], "Tensor | None"]
Params = Iterable["Tensor | nn.Module"]
"""Tensors and modules that are to be trained; a single one may be given as it is."""

Grads = list["Tensor | None"]
Weights = Sequence[float] | Tensor


class Leaves:
    """A flattened pytree, and the versions of its tensors when it was made."""

    def __init__(self, tree: Tree):
        self.leaves, self.spec = tree_flatten(tree)
        self.versions = [version(leaf) for leaf in self.leaves]

    def tree(self) -> Tree:
        return tree_unflatten(self.leaves, self.spec)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def changed(self) -> bool:
        return self.versions != [version(leaf) for leaf in self.leaves]

    def cut(self, wants_grad: Callable[[Tensor], bool]) -> tuple[Tree, dict[int, Tensor]]:
        """The tree with its tensors cut from their graph; by position, those of them that now collect a gradient."""
        leaves, sources = list(self.leaves), {}
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                leaves[i] = leaf.detach()
                if wants_grad(leaf):
                    sources[i] = leaves[i].requires_grad_()
        return tree_unflatten(leaves, self.spec), sources


def memory_leaves(memory: Tree, what: str) -> Leaves:
    leaves = Leaves(memory)
    for leaf in leaves.leaves:
        if leaf is not None and not isinstance(leaf, (Tensor, bool, int, float, str)):
            raise ValueError(
                f"{what} holds a {type(leaf).__name__}, through which no gradient could flow: expected a pytree of "
                "tensors (tuples, lists, dicts, None). Register it with torch.utils._pytree, or return its fields."
            )
    return leaves


def requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def carries_grad(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


# --- Cells, readouts and losses


def segment_list(segments: Sequence[Tree]) -> list[Tree]:
    if isinstance(segments, (dict, str)) or not isinstance(segments, Iterable):
        raise ValueError(f"segments: expected a sequence with one pytree per segment, got {type(segments).__name__}")
    result = list(segments)
    if not result:
        raise ValueError("segments: expected at least one segment, got none")
    return result


def weight_list(weights: Weights | None, count: int) -> list[float] | None:
    """The weights as numbers; ValueError unless there is one for each of ``count`` segments."""
    if weights is None:
        return None
    result = [float(w) for w in weights]
    if len(result) != count:
        raise ValueError(f"segment_weights: expected one for each of the {count} segments, got {len(result)}")
    return result


def call_cell(cell: Cell, segment: Tree, memory: Tree) -> tuple[Tree, Tree]:
    result = cell(segment, memory)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        got = f"{len(result)} values" if isinstance(result, (tuple, list)) else type(result).__name__
        raise ValueError(f"a cell returns (value, memory); {name_of(cell)} returned {got}")
    return result[0], result[1]


def call_readout(
    readout: Readout, values: list[Tree], segments: list[Tree], weights: list[float] | None
) -> Tensor | None:
    loss = readout(values, segments)
    if loss is None:
        return None
    shapes = [()] if weights is None else [(len(segments),)] if len(segments) > 1 else [(1,), ()]
    if not isinstance(loss, Tensor) or loss.shape not in shapes:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        expected = (
            "a scalar loss" if weights is None else f"with segment_weights one loss per segment, shape {shapes[0]},"
        )
        raise ValueError(f"a readout returns {expected} or None; {name_of(readout)} returned {got}")
    return loss if weights is None else (loss * loss.new_tensor(weights)).sum()


def sum_of_losses(losses: Sequence[Tensor | None], weights: list[float] | None = None) -> Tensor:
    total: Tensor | None = None
    for t, loss in enumerate(losses):
        if loss is None:
            continue
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"segment {t}: without a readout a cell's value is the segment's scalar loss or None, got {got}. "
                "Use replay.scan to get the values themselves."
            )
        term = loss if weights is None else loss * weights[t]
        total = term if total is None else total + term
    if total is None:
        raise ValueError("no segment of the rollout has a loss: every value was None")
    return total


def chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


# --- What a callable trains, and whether a gradient would be lost on the way ------------------------------------------


def _owners(function: Any) -> list[Any]:
    """The modules and tensors that a callable is, is bound to, or carries as arguments of a ``functools.partial``."""
    if isinstance(function, (nn.Module, Tensor)):
        return [function]
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.values()]
        return [owner for part in parts for owner in _owners(part)]
    bound = getattr(function, "__self__", None)
    wrapped = getattr(function, "__wrapped__", None)
    return [owner for part in (bound, wrapped) if part is not None for owner in _owners(part)]


def trained_tensors(function: Any, params: Params) -> list[Tensor]:
    """The tensors that require a gradient, each once, of a callable's owners and of ``params``."""
    extra = [params] if isinstance(params, (nn.Module, Tensor)) else list(params)
    found: dict[int, Tensor] = {}
    for owner in [*_owners(function), *extra]:
        if isinstance(owner, DistributedDataParallel):
            raise ValueError(
                "the cell is wrapped in DistributedDataParallel, which would synchronise once per segment. Wrap "
                "instead the module whose forward calls the replay, and give the replay the bare cell."
            )
        if isinstance(owner, nn.Module) and _is_sharded(owner):
            raise ValueError(
                "the cell or readout is sharded by FSDP, which delivers gradients by hooks of its own: use "
                "replay.accumulate(..., sync=model.set_requires_gradient_sync)."
            )
        if not isinstance(owner, (nn.Module, Tensor)):
            raise ValueError(f"params: expected tensors or modules, got {type(owner).__name__}")
        named = owner.named_parameters() if isinstance(owner, nn.Module) else [("tensor", owner)]
        for name, tensor in named:
            if tensor.requires_grad:
                found[id(tensor)] = tensor
                if tensor.is_leaf and tensor._backward_hooks:
                    raise ValueError(
                        f"parameter '{name}' has a tensor hook, which replay would run once per segment and once more. "
                        "Use register_post_accumulate_grad_hook, which runs once."
                    )
    return list(found.values())


def _is_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if nobody imported it, nothing is sharded by it
    return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in module.modules())


def check_reach(function: Any, outputs: Sequence[Tensor], known: Sequence[Tensor]) -> None:
    """Raise if the outputs' graph ends in a leaf that is not among ``known``: its gradient would be lost."""
    leaves = {id(x) for x in known}
    seen = {x.grad_fn for x in known if x.grad_fn is not None}
    stack = [x.grad_fn for x in outputs if x.grad_fn is not None]
    stray = [x for x in outputs if x.is_leaf and x.requires_grad and id(x) not in leaves]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in leaves:
            stray.append(variable)
        stack.extend(following for following, _ in node.next_functions if following is not None)
    if stray:
        names = ", ".join(_describe(function, x, seen) for x in stray)
        raise ValueError(
            f"{name_of(function)} uses {names}, which requires a gradient and would get none. "
            "Name it in params=[...], or pass an nn.Module (or a method bound to one) that owns it."
        )


def _describe(function: Any, leaf: Tensor, graph: Container[Any]) -> str:
    """The name under which a callable sees a leaf, or a tensor derived from it, for error messages."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        function = getattr(type(function), "forward", None) or type(function).__call__
    scope: dict[str, Any] = {}
    if inspect.isfunction(function):
        seen = inspect.getclosurevars(function)
        defaults = {k: v.default for k, v in inspect.signature(function).parameters.items()}
        scope = {**seen.globals, **seen.nonlocals, **defaults}
    for name, value in scope.items():
        inner = value.named_parameters() if isinstance(value, nn.Module) else ()
        for full_name, x in [(name, value), *((f"{name}.{part}", x) for part, x in inner)]:
            if x is leaf or (isinstance(x, Tensor) and x.grad_fn in graph):
                return f"'{full_name}' of shape {tuple(x.shape)}"
    return f"a tensor of shape {tuple(leaf.shape)}"


def name_of(function: Any) -> str:
    """What to call a callable in an error message."""
    return getattr(function, "__qualname__", None) or type(function).__name__
