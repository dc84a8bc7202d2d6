"""Where a captured step finds what it reads: a launch goes on with what was there when it was captured."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .inputs import name_of, version
from .own_state import OwnState


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


class Rehearsed:
    """What the runs of a function before a capture must not do, for no launch would: it is asked after each run.

    Raises:
        error: it was done; the message says what, and what to do. Buffers and tensors among attributes are the ones
            that were there, and so are the states of generators.
    """

    def __init__(self, function: Callable[..., object], modules: Sequence[nn.Module], error: type[Exception]):
        self._function, self._modules, self._error = function, list(modules), error
        self._own = self._before = OwnState([function], self._modules)
        self._parts = Places(modules).parts
        self._weights = [
            (name, p, version(p)) for part in self._parts for name, p in part._parameters.items() if p is not None
        ]
        self._buffers = self._begun = self._buffers_now()
        self._attributes = [
            (vars(part), name, x, x.clone())
            for part in self._parts
            for name, x in vars(part).items()
            if isinstance(x, Tensor) and not x.requires_grad
        ]

    def _buffers_now(self) -> dict[tuple[int, str], Tensor | None]:
        return {(i, name): x for i, part in enumerate(self._parts) for name, x in part._buffers.items()}

    def once(self) -> None:
        """After the first run. What it alone makes, such as a table, may stay."""
        for name, weight, before in self._weights:
            if version(weight) != before:
                raise self._error(
                    f"{name_of(self._function)} changed the weight '{name}', as each run before a capture would: do "
                    "that after it"
                )
        self._own, self._buffers = OwnState([self._function], self._modules), self._buffers_now()

    def twice(self) -> None:
        """After the second run: what it changed again is state."""
        now = self._buffers_now()
        replaced = [f"the buffer '{key[1]}'" for key, x in now.items() if x is not self._buffers.get(key)]
        changed = [*replaced, *self._own.carried()]
        if not changed:
            return
        for (i, name), x in self._begun.items():
            self._parts[i]._buffers[name] = x
        for own, name, attribute, value in self._attributes:
            own[name] = attribute
            with torch.no_grad():
                attribute.copy_(value)
        self._before.restore()
        raise self._error(
            f"{name_of(self._function)} changes {changed[0]} in each run, and no launch would: make it an input and an "
            "output, or a buffer that is changed in place"
        )
