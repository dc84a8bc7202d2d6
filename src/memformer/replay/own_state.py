"""State that a cell keeps for itself, which replay cannot know: whether a run of it leaves some of it otherwise."""

from __future__ import annotations

import itertools
import operator
import random
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import OF_EVERY_MODULE, innermost, name_of, names_seen_by


class OwnState:
    """State that a cell keeps for itself: attributes of its modules, what it closes over, other generators."""

    def __init__(self, functions: list[object], modules: list[nn.Module]):
        self.functions, self.modules = functions, modules
        found = self._found()
        self.before = {name: _fingerprint(x) for name, x in found.items()}
        self.generators = [(x, _random_state(x)) for x in found.values() if _random_state(x) is not None]

    def changed(self) -> list[str]:
        return [name for name, x in self._found().items() if self.before.get(name) != _fingerprint(x)]

    def carried(self) -> list[str]:
        """What of it changed, but for tensors with a graph, which each run makes anew."""
        found = self._found()
        return [name for name in self.changed() if not getattr(found.get(name), "requires_grad", False)]

    def graphs_left(self) -> list[str]:
        """Where a run left a tensor with its graph."""
        return [name for name in self.changed() if getattr(self._found()[name], "grad_fn", None) is not None]

    def restore(self) -> None:
        for generator, state in self.generators:
            _set_random_state(generator, state)

    def _found(self) -> dict[str, object]:
        found: dict[str, object] = {"the state of Python's random numbers": random}
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            found["the state of numpy's random numbers"] = numpy.random
        for module in self.modules:
            for path, part in module.named_modules():
                of = f"'{path}', a {type(part).__name__}" if path else f"{type(part).__name__}"
                # What torch's old norms compute before each call of the weight's parts is no state.
                norms = {name.rsplit("_", 1)[0] for name in part._parameters if name.endswith(("_g", "_orig"))}
                own = {name: x for name, x in vars(part).items() if name not in norms | OF_EVERY_MODULE}
                found |= {f"attribute '{name}' of {of}": x for name, x in own.items()}
        for function in self.functions:
            function = innermost(function)
            owner = getattr(function, "__self__", None)
            if owner is not None and not isinstance(owner, nn.Module) and hasattr(owner, "__dict__"):
                found |= {f"attribute '{name}' of a {type(owner).__name__}": x for name, x in vars(owner).items()}
            seen = names_seen_by(getattr(function, "__func__", function))
            found |= {f"'{name}' that {name_of(function)} uses": x for name, x in seen.items()}
        return found


def _fingerprint(x: object) -> object:
    """Something that is equal as long as a value is the same, as far as one can see from here."""
    state = _random_state(x)
    if state is not None:
        return repr(state.tolist()) if isinstance(state, Tensor) else repr(state)
    if isinstance(x, (bool, int, float, complex, str, itertools.count)):
        return repr(x)
    if isinstance(x, Tensor):
        return id(x), 0 if x.is_inference() else x._version
    return id(x), operator.length_hint(x, -1)


def _random_state(x: object) -> Any:
    """The state of a generator of torch, Python or numpy; None of anything else."""
    if isinstance(x, torch.Generator):
        return x.get_state()
    if x is random or isinstance(x, random.Random):
        return x.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None and (x is numpy.random or isinstance(x, numpy.random.RandomState)):
        return x.get_state()
    if numpy is not None and isinstance(x, numpy.random.Generator):
        return x.bit_generator.state
    return None


def _set_random_state(x: Any, state: Any) -> None:
    if isinstance(x, torch.Generator) or hasattr(x, "set_state"):
        x.set_state(state)
    elif hasattr(x, "setstate"):
        x.setstate(state)
    else:
        x.bit_generator.state = state
