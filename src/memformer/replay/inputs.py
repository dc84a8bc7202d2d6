"""What a user hands in: pytrees, cells, readouts, and the tensors that they train.

Not known here: schedules, and how anything is replayed.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Tree = Any
"""A pytree: a tensor, or tuples, lists and dicts of them; ``None`` and plain numbers are allowed as leaves."""

Cell = Callable[[Tree, Tree], tuple[Tree, Tree]]
Readout = Callable[[list[Tree], list[Tree]], "Tensor | None"]
Params = Iterable["Tensor | nn.Module"]
"""Tensors and modules that are to be trained; a single one may be given as it is."""

Grads = list["Tensor | None"]
Weights = Sequence[float] | Tensor


ONE_LEAF: TreeSpec = tree_flatten(None)[1]
"""A tree that is a leaf: most memories are one tensor, and taking them apart takes time in each segment."""


class Leaves:
    """A flattened pytree, and the versions of its tensors when it was made.

    A node of the tree may compute when it is taken apart or put together (a cache that stacks its layers): where the
    result is to have a graph, that happens in grad mode.
    """

    def __init__(self, tree: Tree):
        if type(tree) is Tensor:
            self._take([tree], ONE_LEAF)
        else:
            self._take(*tree_flatten(tree))

    def _take(self, leaves: list[object], spec: TreeSpec) -> None:
        self.leaves, self.spec = leaves, spec
        self.versions = [version(leaf) for leaf in leaves]

    def tree(self) -> Tree:
        return _tree(self.leaves, self.spec)

    def detached(self) -> Leaves:
        """The same, cut from its graph."""
        return self.replaced([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves])

    def replaced(self, leaves: list[object]) -> Leaves:
        """A tree of the same structure with other leaves."""
        result = Leaves.__new__(Leaves)
        result._take(leaves, self.spec)
        return result

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def changed(self) -> bool:
        return self.versions != [version(leaf) for leaf in self.leaves]

    def cut(self, wants_grad: Callable[[Tensor], bool] | Sequence[bool]) -> tuple[Tree, dict[int, Tensor]]:
        """The tree with its tensors cut from their graph; by position, those of them that now collect a gradient."""
        leaves, sources = list(self.leaves), {}
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor):
                leaves[i] = cut = leaf.detach()
                if wants_grad(leaf) if callable(wants_grad) else wants_grad[i]:
                    sources[i] = cut.requires_grad_()
        return _tree(leaves, self.spec), sources


def _tree(leaves: list[object], spec: TreeSpec) -> Tree:
    return leaves[0] if spec is ONE_LEAF else tree_unflatten(leaves, spec)


PLAIN = (
    Tensor,
    type(None), bool, int, float, complex, str, bytes, enum.Enum,
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
)  # fmt: skip
"""What a leaf may be."""


def check_leaves(leaves: Leaves, what: str, *, is_value: bool = False) -> None:
    """ValueError if a leaf is an object through which no gradient could flow; one without tensors may be in a value."""
    for leaf in leaves.leaves:
        if type(leaf) is Tensor or isinstance(leaf, PLAIN) or (is_value and not holds_a_tensor(leaf)):
            continue
        raise ValueError(
            f"{what} holds a {type(leaf).__name__}, through which no gradient could flow: expected a pytree of "
            "tensors (tuples, lists, dicts, None). Register it with torch.utils._pytree, or return its fields."
        )


def holds_a_tensor(thing: object, depth: int = 6) -> bool:
    """Whether an object, what it contains, its attributes or the variables that a function closes over are tensors."""
    if isinstance(thing, Tensor) or depth == 0:
        return True
    if isinstance(thing, (type, *PLAIN)):
        return False
    parts = list(thing.values()) if isinstance(thing, Mapping) and not isinstance(thing, dict) else []
    return any(holds_a_tensor(part, depth - 1) for part in [*parts, *_parts(thing)])


def requires_grad(leaf: object) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def carries_grad(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def version(leaf: object) -> int:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


# --- Cells, readouts and losses


def weight_list(weights: Weights | None, count: int) -> list[float] | None:
    """The weights as numbers; ValueError unless there is one for each of ``count`` segments."""
    if weights is None:
        return None
    if any(requires_grad(weight) for weight in (weights if isinstance(weights, Sequence) else [weights])):
        raise ValueError(
            "segment_weights: are numbers here, so a tensor that requires a gradient would get none. Detach it, or "
            "weigh the losses that you make of replay.scan's values"
        )
    if not isinstance(weights, Iterable) or (isinstance(weights, Tensor) and weights.dim() != 1):
        got = f"a tensor of shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"segment_weights: expected one for each of the {count} segments, got {got}")
    try:
        result = [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise ValueError(f"segment_weights: expected numbers, got {weights!r}") from error
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
    if weights is None:
        return loss
    # Filled on the device: a list would be copied there, which waits for it.
    return (loss * torch.stack([loss.new_full((), weight) for weight in weights])).sum()


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


# --- What a callable trains


def param_list(params: Params) -> list[Tensor | nn.Module]:
    """What is named in ``params``."""
    if not isinstance(params, nn.Module | Tensor | Iterable):
        raise ValueError(f"params: expected tensors or modules, got {type(params).__name__}")
    result: list[Tensor | nn.Module] = [params] if isinstance(params, nn.Module | Tensor) else list(params)
    for owner in result:
        if not isinstance(owner, nn.Module | Tensor):
            raise ValueError(f"params: expected tensors or modules, got {type(owner).__name__}")
    return result


def owners(function: object, params: Params) -> list[Tensor | nn.Module]:
    """The modules and tensors that a callable is, is bound to, or carries as arguments of a ``functools.partial``; and
    those that are named in ``params``."""
    return [*_owners(function), *param_list(params)]


def _owners(function: object) -> list[Tensor | nn.Module]:
    if isinstance(function, nn.Module | Tensor):
        return [function]
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.values()]
        return [owner for part in parts for owner in _owners(part)]
    bound = getattr(function, "__self__", None)
    wrapped = getattr(function, "__wrapped__", None)
    return [owner for part in (bound, wrapped) if part is not None for owner in _owners(part)]


def refuse_wrapped(owned: Sequence[object]) -> None:
    """Raise ValueError if DistributedDataParallel is around something that runs once per segment."""
    if any(isinstance(owner, DistributedDataParallel) for owner in owned):
        raise ValueError(
            "the cell is wrapped in DistributedDataParallel, which would synchronise once per segment. Wrap "
            "instead the module whose forward calls the replay, and give the replay the bare cell."
        )


def refuse_inside_wrapped(name: str) -> None:
    """Raise ValueError in the forward of a DistributedDataParallel that is to synchronise.

    It gets ready for the next backward when its forward has ended; one that has run by then is exchanged by nobody.
    """
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is not None and wrapper.require_backward_grad_sync:
        raise ValueError(
            f"{name}: back-propagates by itself, and in the forward of a DistributedDataParallel these gradients would "
            "not be exchanged between the processes. Return the loss of memory_replay or scan from there, and call "
            "backward on it outside"
        )


def trained_tensors(function: object, params: Params) -> list[Tensor]:
    """The tensors that require a gradient, each once, of a callable's owners and of ``params``."""
    found: dict[int, Tensor] = {}
    owned = owners(function, params)
    refuse_wrapped(owned)
    for owner in owned:
        if isinstance(owner, nn.Module) and _is_sharded(owner):
            raise ValueError(
                "the cell or readout is sharded by FSDP, which delivers gradients by hooks of its own: use "
                "replay.accumulate(..., sync=model.set_requires_gradient_sync)."
            )
        named = owner.named_parameters() if isinstance(owner, nn.Module) else [("tensor", owner)]
        for name, tensor in named:
            if is_lazy(tensor):
                raise ValueError(
                    f"parameter '{name}' is lazy: its shape is known after the first call. Call the cell once on a "
                    "segment before its first rollout."
                )
            if tensor.requires_grad:
                found[id(tensor)] = tensor
                if has_hook(tensor):
                    raise ValueError(
                        f"parameter '{name}' has a tensor hook, which replay would run once per segment and once more. "
                        "Use register_post_accumulate_grad_hook, which runs once."
                    )
                if not tensor.is_leaf and tensor.retains_grad:
                    raise ValueError(
                        f"parameter '{name}' retains its gradient (retain_grad()), which replay would add to once "
                        "per segment and once more. Name what it is computed from, or leave retain_grad out."
                    )
    return list(found.values())


def has_hook(tensor: Tensor) -> bool:
    """Whether a user's hook is on a tensor. Those of a replay in progress act in its own graphs alone."""
    return any(not getattr(hook, "of_replay", False) for hook in (tensor._backward_hooks or {}).values())


def innermost(function: object) -> Any:
    """What a ``functools.partial`` calls."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def names_seen_by(function: Any) -> dict[str, object]:
    """What a callable finds by name: what it closes over, its globals, the defaults of its arguments, the attributes of
    what it is bound to."""
    function = innermost(function)
    owner = getattr(function, "__self__", function)
    plain = inspect.isroutine(owner) or isinstance(owner, nn.Module)
    seen = {} if plain else dict(getattr(owner, "__dict__", {}))
    function = innermost(inspect.unwrap(getattr(function, "__func__", function)))
    if not inspect.isfunction(function):
        return seen
    given = inspect.signature(function).parameters.values()
    # Another name than that of an attribute or variable, which they would hide.
    seen |= {f"{argument.name}=": argument.default for argument in given if argument.default is not argument.empty}
    scope = function.__globals__
    inside = {name: scope[name] for name in _names_inside(function.__code__) & scope.keys()}
    try:
        found = inspect.getclosurevars(function)
    except ValueError:  # it closes over something that is not there yet
        return {**inside, **seen}
    return {**inside, **found.globals, **found.nonlocals, **seen}


def _names_inside(code: types.CodeType) -> set[str]:
    """Names that functions, generators and comprehensions within a function use."""
    within = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return {name for x in within for name in (*x.co_names, *_names_inside(x))}


OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has, of torch's own."""


def captured_modules(function: object) -> list[nn.Module]:
    """Modules that a callable sees, besides its owners: also in lists, dicts, closures and attributes, of its owners,
    too, a few levels deep (a trainer's models, a frozen backbone in a list that hides it from its module), and by way
    of functions that stand beside it."""
    plain = _plain_function(function)
    beside = getattr(plain, "__globals__", None)
    owned = _owners(function)
    found: dict[int, nn.Module] = {}
    known: set[int] = set()
    level: list[object] = [*owned, *names_seen_by(function).values()]
    if not inspect.isroutine(innermost(function)):  # of what is a function itself these are its names already
        level += names_seen_by(plain).values()
    for _ in range(_DEPTH):
        parts: list[object] = []
        for thing in level:
            if id(thing) in known or isinstance(thing, (type, types.ModuleType, *PLAIN)):
                continue
            known.add(id(thing))
            if isinstance(thing, nn.Module):
                found[id(thing)] = thing
                own = (vars(module).items() for module in thing.modules())
                parts += [x for items in own for name, x in items if name not in OF_EVERY_MODULE]
            elif len(inside := _parts(thing)) < _MANY:
                parts += inside
                if beside is not None and getattr(thing, "__globals__", None) is beside:
                    parts += names_seen_by(thing).values()
        level = parts
    return [module for module in found.values() if all(module is not owner for owner in owned)]


def _plain_function(function: object) -> object:
    """What runs when it is called: the function behind decorators, methods, modules and callable objects."""
    called = innermost(function)
    if not inspect.isroutine(called):
        called = getattr(type(called), "forward" if isinstance(called, nn.Module) else "__call__", called)
    called = inspect.unwrap(getattr(called, "__func__", called))  # type: ignore[arg-type]
    return innermost(called)


_DEPTH, _MANY = 6, 1000
"""How deep modules are looked for, and in how many things at once; more are data."""


def _parts(thing: object) -> list[object]:
    """What an object consists of, without asking it to do anything."""
    parts: list[object] = []
    if isinstance(thing, dict):
        parts += thing.values()
    elif isinstance(thing, list | tuple | set | frozenset | collections.deque):
        parts += thing
    parts += getattr(thing, "__dict__", {}).values()
    parts += [getattr(thing, name, None) for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    for cell in getattr(thing, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # it closes over something that is not there yet
            parts.append(cell.cell_contents)
    return parts


def _is_sharded(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if nobody imported it, nothing is sharded by it
    return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in module.modules())


def name_of(function: object) -> str:
    """What to call a callable in an error message."""
    function = innermost(function)
    return getattr(function, "__qualname__", None) or type(function).__name__
