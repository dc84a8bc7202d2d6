"""Which tensors a callable trains, and whether a gradient would be lost on the way to one. Imports torch alone."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Params", "check_reach", "name_of", "owners", "trained_tensors"]

Params = Iterable["Tensor | nn.Module"]
"""Tensors and modules that are to be trained; a single one may be given as it is."""


def owners(function: Any) -> list[Any]:
    """The modules and tensors that a callable is, is bound to, or carries as arguments of a ``functools.partial``."""
    if isinstance(function, (nn.Module, Tensor)):
        return [function]
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.values()]
        return [owner for part in parts for owner in owners(part)]
    bound = getattr(function, "__self__", None)
    wrapped = getattr(function, "__wrapped__", None)
    return [owner for part in (bound, wrapped) if part is not None for owner in owners(part)]


def trained_tensors(function: Any, params: Params) -> list[Tensor]:
    """The tensors that require a gradient, each once, of a callable's owners and of ``params``."""
    extra = [params] if isinstance(params, (nn.Module, Tensor)) else list(params)
    found: dict[int, Tensor] = {}
    for owner in [*owners(function), *extra]:
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
            f"{name_of(function)} uses {names}, which requires a gradient and would get none. Name it in params=[...], "
            "or pass an nn.Module (or a method bound to one) that owns it."
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


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def name_of(function: Any) -> str:
    """What to call a callable in an error message."""
    return getattr(function, "__qualname__", None) or type(function).__name__
