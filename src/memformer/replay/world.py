"""The modules that a cell owns, as they were when it was recorded: modes, parameters, buffers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .environment import may_wait
from .inputs import has_hook, version

BufferState = list[tuple[Tensor | None, Tensor | None]]
"""The buffers before some segment: the tensor that each was, and what stood in it."""


_UNNOTICED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Buffers that rollouts have seen change without a new version. One that may not wait for a card cannot look itself."""


class World:
    """What a cell's modules look like, so that its replay meets the same.

    Modes, ``requires_grad``, buffers, and parameters that are others by then (``torch.func.functional_call``), are put
    back for the replay, and as they were found after it. Buffers that the cell itself changes (running statistics) are
    carried along like random numbers. Parameters that were changed in place cannot be put back: that is refused.

    Args:
        owners: what the cell is or belongs to, and what is trained; of these only modules count.
        captured: modules that it merely sees. Their parameters are not watched, for it may not use them.
    """

    def __init__(
        self,
        owners: Sequence[object],
        parameters: Sequence[Tensor],
        *,
        captured: Sequence[nn.Module] = (),
        watch_parameters: bool = True,
    ):
        self.owners = [owner for owner in owners if isinstance(owner, nn.Module)]
        owned = dict.fromkeys(module for owner in self.owners for module in owner.modules())
        self.modules = list(owned | dict.fromkeys(module for seen in captured for module in seen.modules()))
        self.modes = [module.training for module in self.modules]
        watched = owned if watch_parameters else ()
        self.parameter_places: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None]] = [
            (module._parameters, name, p) for module in watched for name, p in module._parameters.items()
        ]
        found = {id(p): p for p in (*parameters, *(p for _, _, p in self.parameter_places)) if p is not None}
        self.parameters = list(found.values())
        self.versions = [version(p) for p in self.parameters]
        self.requires_grad = [p.requires_grad for p in self.parameters]
        self.places = [(module, name) for module in self.modules for name in module._buffers.keys()]  # noqa: SIM118
        self.buffers: list[_Buffer] = []

    # Before and during the recording

    def watch_buffers(self) -> None:
        """From here on :meth:`buffer_state` tells what stands in the buffers."""
        if not self.buffers:
            self.buffers = [_Buffer(*place) for place in self.places]

    def buffer_state(self) -> BufferState:
        return [buffer.state() for buffer in self.buffers]

    def look_closely(self) -> None:
        """After a first run of the cell: finds buffers that it changes without a new version."""
        for buffer in self._changed_unnoticed():
            buffer.unnoticed = True
            _UNNOTICED.setdefault(buffer.module, set()).add(buffer.name)

    def check_recorded(self, runs_again: bool) -> None:
        """After the recording.

        Raises:
            ValueError: the cell changed what its replay needs, and cannot have back: a buffer without a new version,
                and not from the first segment on, or a parameter.
        """
        for buffer in self._changed_unnoticed() if runs_again else ():
            raise ValueError(
                f"the cell changes the buffer '{buffer.name}' of a {type(buffer.module).__name__} where nobody can see "
                "it (through .data or numpy?), and not from the first segment on, so that its replay would meet other "
                "numbers. Change it in place under torch.no_grad()."
            )
        if not runs_again:
            self.versions = [version(p) for p in self.parameters]
        elif (name := self._changed()) is not None:
            raise ValueError(
                f"the cell itself changes a parameter in place: {name} (nn.Embedding(max_norm=...), a counter?). "
                "Replay runs the cell again and needs the parameters as they were: make it a buffer, or keep all "
                "graphs (schedule=EveryMemory(graphs=len(segments)), or replay.full_bptt)."
            )

    def _changed_unnoticed(self) -> list[_Buffer]:
        """Buffers with other numbers than when they were last looked at, but no new version."""
        looked = [(buffer, differs) for buffer in self.buffers if (differs := buffer.differs()) is not None]
        found: dict[int, bool] = {}
        for device in {differs.device for _, differs in looked}:  # each is waited for once
            here = [(buffer, differs) for buffer, differs in looked if differs.device == device]
            answers = torch.stack([differs for _, differs in here]).tolist()
            found |= {id(buffer): differ for (buffer, _), differ in zip(here, answers, strict=True)}
        return [buffer for buffer, _ in looked if found[id(buffer)]]

    def has_a_fast_path(self) -> bool:
        """Whether a module of torch's own computes something else where no gradient is needed (where it is masked)."""
        kinds = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
        return any(isinstance(module, kinds) and not module.training for module in self.modules)

    def refuse_masks_of_cudnn(self) -> None:
        """ValueError if dropout is drawn by cuDNN, whose random numbers nobody can put back for a replay."""
        for rnn in self.modules:
            if not isinstance(rnn, nn.RNNBase) or not (rnn.training and rnn.dropout and rnn.num_layers > 1):
                continue
            if drawn_by_cudnn(rnn):
                named = (name for owner in self.owners for name, m in owner.named_modules() if m is rnn and name)
                name = "".join(f" '{name}'" for name in itertools.islice(named, 1))
                raise ValueError(
                    f"the {type(rnn).__name__}{name} has dropout={rnn.dropout} between its {rnn.num_layers} layers, "
                    "and cuDNN draws that from a state of its own: a replay would get other masks. Set "
                    "torch.backends.cudnn.enabled = False for the rollout, or use RNNs of one layer with nn.Dropout "
                    "between them."
                )

    def refuse_graphs_in_buffers(self) -> None:
        """ValueError if the cell left a tensor with a graph in a buffer: the gradient through it would be lost."""
        for module, name in self.places:
            x = module._buffers[name]
            if x is not None and x.grad_fn is not None:
                raise ValueError(
                    f"the cell keeps a tensor with a graph in the buffer '{name}' of a {type(module).__name__}, and no "
                    "gradient could flow through it to the segment before. Return it as part of the memory, or detach "
                    "it."
                )

    # Before and during the replay

    def check_unchanged(self) -> None:
        if (name := self._changed()) is not None:
            raise RuntimeError(
                "a parameter was changed in place between the rollout and its backward (an optimizer step?): "
                f"{name}. Replay runs the cell again and needs the same parameters: call backward first."
            )
        for p in self.parameters:
            if has_hook(p):
                raise RuntimeError(
                    f"a tensor hook was put on {self._name(p)} between the rollout and its backward, which replay "
                    "would run once per segment and once more. Use register_post_accumulate_grad_hook, which runs once."
                )

    def _changed(self) -> str | None:
        """The name of a parameter that was changed in place."""
        both = zip(self.parameters, self.versions, strict=True)
        return next((self._name(p) for p, before in both if version(p) != before), None)

    def _name(self, p: Tensor) -> str:
        names = (f"'{name}'" for owner in self.owners for name, x in owner.named_parameters() if x is p)
        return next(names, "one of params=")

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Modes and parameters as they were; whatever happens to the buffers inside is undone."""
        self.check_unchanged()
        places = [place for place in self.parameter_places if place[1] in place[0]]
        others = [(of, name, p, of[name]) for of, name, p in places if of[name] is not p]
        modes = [module.training for module in self.modules]
        leaves = [(p, before) for p, before in zip(self.parameters, self.requires_grad, strict=True) if p.is_leaf]
        flags = [(p, p.requires_grad) for p, _ in leaves]
        found = self.buffer_state()
        try:
            _set_modes(self.modules, self.modes)
            _set_flags(leaves)
            for of, name, own, _ in others:
                of[name] = own
            yield
        finally:
            for of, name, _, other in others:
                of[name] = other
            _set_modes(self.modules, modes)
            _set_flags(flags)
            self.put_buffers(found)

    def put_buffers(self, state: BufferState) -> None:
        for buffer, then in zip(self.buffers, state, strict=True):
            buffer.put(*then)


def _set_modes(modules: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    for module, training in zip(modules, modes, strict=True):
        if module.training != training:
            module.training = training


def _set_flags(flags: Sequence[tuple[Tensor, bool]]) -> None:
    for leaf, wanted in flags:
        if leaf.requires_grad != wanted:
            leaf.requires_grad_(wanted)


def drawn_by_cudnn(rnn: nn.RNNBase) -> bool:
    """Whether cuDNN (or MIOpen) computes an RNN, as far as its weights and torch's switches tell."""
    return bool(rnn.all_weights[0][0].is_cuda and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available())


class _Buffer:
    """A buffer of a module, and a copy of what stood in it when it was last looked at."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        # Running statistics change without a new version: those of torch's modules, and others after a look.
        of_torch = isinstance(module, _NormBase) and module.track_running_stats and module.training
        self.unnoticed = of_torch or name in _UNNOTICED.get(module, ())
        self.changes = False
        self._look()

    def _look(self) -> None:
        self.tensor = self.module._buffers[self.name]
        self.version = version(self.tensor)
        self.content = None if self.tensor is None else self.tensor.detach().clone()

    def differs(self) -> Tensor | None:
        """Whether its numbers are others than in the copy, a scalar; None where a new version or another tensor says
        so anyway, and where they cannot be compared."""
        tensor, content = self.module._buffers[self.name], self.content
        if self.unnoticed or type(tensor) is not Tensor or tensor is not self.tensor or version(tensor) != self.version:
            return None
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            return None
        if tensor.is_cuda and not may_wait():
            return None
        if content is None or content.shape != tensor.shape or content.dtype != tensor.dtype:
            return torch.ones((), dtype=torch.bool, device=tensor.device)
        return (_bits(tensor) != _bits(content)).any()

    def state(self) -> tuple[Tensor | None, Tensor | None]:
        now = self.module._buffers[self.name]
        if self.unnoticed or now is not self.tensor or version(now) != self.version:
            self.changes = True
            self._look()
        return self.tensor, self.content

    def put(self, tensor: Tensor | None, content: Tensor | None) -> None:
        self.state()
        if not self.changes or (content is self.content and tensor is self.tensor):
            return
        self.module._buffers[self.name] = self.tensor = tensor
        self.content = content
        if tensor is not None and content is not None:
            # The same numbers return before anybody else looks: a graph that saved the buffer need not know.
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):  # type: ignore[attr-defined]
                _put(tensor, content)
        self.version = version(tensor)


def _put(tensor: Tensor, content: Tensor) -> None:
    """Give a tensor the numbers of another, and its shape: it may have grown since."""
    if tensor.shape != content.shape:
        tensor.data = content.clone()
    elif not any(stride == 0 and size > 1 for stride, size in zip(_strides(tensor), tensor.shape, strict=True)):
        tensor.copy_(content)  # one that was expanded is as it was, for nobody can write into it


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride() if x.layout is torch.strided else (1,) * x.dim()


def _bits(x: Tensor) -> Tensor:
    """Its numbers as integers, for NaN is unlike itself."""
    x = x.detach().resolve_conj().resolve_neg()
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
