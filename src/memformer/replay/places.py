"""Where a captured step finds what it reads: a launch goes on with what was there when it was captured."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .inputs import OF_EVERY_MODULE, innermost, name_of, names_seen_by, version
from .own_state import OwnState

_SMALL = 1 << 26
"""Bytes of a tensor that is no buffer up to which its value is kept while a function is rehearsed."""


class Places:
    """The parts, parameters and buffers that some modules have now.

    Attributes:
        parts: the modules and all in them, each once.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
        self._kinds = [own for part in self.parts for own in (part._modules, part._parameters, part._buffers)]
        self._counts = list(map(len, self._kinds))
        self._at = [(own, name) for own in self._kinds for name in own]
        self._held: list[object] = [own[name] for own, name in self._at]
        # What other libraries make of tensors may have no address.
        self._tensors = [x for x in self._held if isinstance(x, Tensor) and type(x) in (Tensor, nn.Parameter)]
        self._addresses = [x.data_ptr() for x in self._tensors]

    def same(self) -> bool:
        """Whether they are all there still, and the tensors where they were. Of a launch this is a hundredth or so."""
        try:
            now = [own[name] for own, name in self._at]
        except KeyError:
            return False
        if list(map(len, self._kinds)) != self._counts or not all(map(operator.is_, now, self._held)):
            return False
        return [x.data_ptr() for x in self._tensors] == self._addresses

    def modes(self) -> tuple[bool, ...]:
        """Which parts train."""
        return tuple([part.training for part in self.parts])

    def trained(self) -> tuple[bool, ...]:
        """Which parameters want a gradient."""
        return tuple([p.requires_grad for part in self.parts for p in part._parameters.values() if p is not None])


class Read(TorchDispatchMode):  # type: ignore[misc]
    """What a run reads that outlives it, be it an attribute, a table in a cache, or what a function closes over.

    Kernels read memory where it lay when they were captured, so after :meth:`keep` it stays there. What lies elsewhere
    than on the card, such as a number that they were given, is as it was then: :meth:`changed` tells.
    """

    supports_higher_order_operators = True

    def __init__(self, device: torch.device):
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._storages: dict[int, StorageWeakRef] = {}
        self._others: dict[int, weakref.ref[Tensor]] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # what is compiled stays so: what it makes and reads by itself is not seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._note(x)
        return function(*args, **(kwargs or {}))

    def _note(self, x: Tensor) -> None:
        if x.device == self._device and x.layout is torch.strided:
            storage = StorageWeakRef(x.untyped_storage())
            self._storages[storage.cdata] = storage
        else:
            self._others[id(x)] = weakref.ref(x)

    def keep(self) -> None:
        """After the run, of which nothing is held any more: what is still there."""
        gc.collect()
        found = [torch.UntypedStorage._new_with_weak_ptr(storage.cdata) for storage in self._storages.values()]
        self._held = [storage for storage in found if storage is not None]
        self._versions = [(x, version(x)) for reference in self._others.values() if (x := reference()) is not None]
        self._storages, self._others = {}, {}

    def changed(self) -> bool:
        """Whether something that lies elsewhere was changed in place since then."""
        return any(version(x) != before for x, before in self._versions)


class Rehearsed:
    """The runs of a function before a capture. If the block ends with an error, what they have rebound is put back:
    buffers and attributes of its modules and of the object that it is a method of, with the values of these tensors,
    and the states of generators. A list that grew, a weight or a variable that was changed stays so.

    Args:
        error: what is raised for state that no launch would change.
    """

    def __init__(self, function: Callable[..., object], modules: Sequence[nn.Module], error: type[Exception]):
        self._function, self._modules, self._error = function, list(modules), error
        self._parts = Places(modules).parts
        self._begun = self._once = self._state()
        owner = getattr(innermost(function), "__self__", None)
        others = [vars(owner)] if hasattr(owner, "__dict__") and not isinstance(owner, nn.Module) else []
        own = [(vars(part), OF_EVERY_MODULE) for part in self._parts] + [(x, frozenset[str]()) for x in others]
        self._bound: list[tuple[dict[str, Any], str, object]] = [
            (names, name, x) for names, but in own for name, x in names.items() if name not in but
        ]
        self._held: list[object] = []
        self._bound += [(part._buffers, name, x) for part in self._parts for name, x in part._buffers.items()]
        self._values = [
            (x, version(x), x.clone())
            for _, _, x in self._bound
            if isinstance(x, Tensor) and not x.requires_grad and not x.is_inference() and x.nbytes <= _SMALL
        ]

    def _state(self) -> tuple[OwnState, dict[tuple[str, int, str], tuple[int, int]]]:
        """Of its own, and of weights and buffers: which one it is, and of weights how often it was changed."""
        weights = {
            ("weight", i, name): (id(p), version(p))
            for i, part in enumerate(self._parts)
            for name, p in part._parameters.items()
            if p is not None and not nn.parameter.is_lazy(p)
        }
        buffers = {("buffer", i, name): (id(x), 0) for i, p in enumerate(self._parts) for name, x in p._buffers.items()}
        return OwnState([self._function], self._modules), weights | buffers

    def __enter__(self) -> Rehearsed:
        return self

    def once(self) -> None:
        """After the first run. What it alone makes or changes, such as a table, may stay."""
        self._once = self._state()
        # As long as these are held, nothing that comes in their place has the number of one of them.
        self._held = [x for part in self._parts for x in (*vars(part).values(), *part._buffers.values())]
        self._held += names_seen_by(self._function).values()

    def twice(self) -> None:
        """After the second run: what it changed again is state. Raises the error that says so."""
        own, tensors = self._once
        now = self._state()[1]
        changed = [f"the {what} '{name}'" for (what, i, name), x in now.items() if tensors.get((what, i, name)) != x]
        changed += own.carried()
        if changed:
            raise self._error(
                f"{name_of(self._function)} changes {changed[0]} in each run, and no launch would: make it an input "
                "and an output, or a buffer that is changed in place"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is None:
            return
        self._begun[0].restore()
        for names, name, x in self._bound:
            if names.get(name) is not x:
                names[name] = x
        with torch.no_grad():
            for tensor, before, value in self._values:
                if version(tensor) != before:
                    tensor.copy_(value)
