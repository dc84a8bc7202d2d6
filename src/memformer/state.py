"""What a Memformer remembers of a stream: a memory of fixed size and at most two segments of tokens per lane.

A stream of tokens is cut into segments. The decoder writes the pending one while it looks at the encoding of the last
whole one, which reads the memory of all before. When the pending segment is full it becomes the last whole one, and
the memory is written. However much was read, a lane's state is slots x dim numbers and two segments of tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .checks import as_tokens, describe
from .config import a_path, check_count, is_count
from .files import replace_file
from .pretrained import DEFAULT_KIND, Pretrained, plain_state, unwrapped

__all__ = ["MemoryState", "fingerprint"]

_FORMAT = "1"


@dataclass(frozen=True, eq=False)
class MemoryState:
    """The state of a batch of lanes, which may stand at different places. Every operation gives a new one.

    Attributes:
        memory: (batch, slots, dim), before ``segment`` is written; a causal model has more rows, see
            :meth:`~memformer.CausalMemformer.packed`. Zero in a lane that has not read a whole segment: it stands
            before the model's initial memory.
        segment: (batch, length), the last whole segment; before there is one, the start token.
        pending: (batch, length), the segment that is being read or written, filled up with the start token.
        position: (batch,), how many tokens were read or written, the start token not counted.
        start: the token that starts a document and the decoder.
    """

    memory: Tensor
    segment: Tensor
    pending: Tensor
    position: Tensor
    start: int

    @classmethod
    def new(cls, batch_size: int, length: int, start: int, like: Tensor) -> MemoryState:
        """Lanes that have read nothing. The memory takes the size, dtype and device of ``like``, of one lane."""
        tokens = torch.full((batch_size, length), start, device=like.device)
        memory = like.new_zeros(batch_size, *like.shape)
        return cls(memory, tokens, tokens.clone(), tokens.new_zeros(batch_size), start)

    def advance(self, lanes: Tensor, memory: Tensor) -> None:
        """The pending segments of those lanes are full; ``memory`` is theirs after the segment before. In place."""
        self.memory[lanes], self.segment[lanes] = memory, self.pending[lanes]
        self.pending[lanes] = self.start

    def extend(self, lanes: Sequence[Tensor]) -> None:
        """So many tokens of each lane come behind those that are pending. In place, but for the memory.

        That is to become the one before what is the last whole segment then.
        """
        for i, (filled, tokens) in enumerate(zip(self.filled.tolist(), lanes, strict=True)):
            read = torch.cat([self.segment[i], self.pending[i, :filled], tokens])
            end = len(read) - (filled + len(tokens)) % self.length
            self.segment[i], self.pending[i] = read[end - self.length : end], self.start
            self.pending[i, : len(read) - end] = read[end:]
            self.position[i] += len(tokens)

    @property
    def batch_size(self) -> int:
        """How many lanes there are."""
        return self.position.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a segment."""
        return self.pending.shape[1]

    @property
    def fresh(self) -> Tensor:
        """(batch,), True in lanes that have not read a whole segment: they still stand before the initial memory."""
        return self.position < self.length

    @property
    def filled(self) -> Tensor:
        """(batch,), how many tokens are pending; at most length - 1, because a full segment is pending no more."""
        return self.position % self.length

    @property
    def nbytes(self) -> int:
        """Bytes of all lanes; constant, whatever was read."""
        return sum(x.nbytes for x in self._tensors().values())

    def detach(self) -> MemoryState:
        """Without the graph of the memory."""
        return dataclasses.replace(self, memory=self.memory.detach())

    def clone(self) -> MemoryState:
        """With tensors of its own."""
        return self._map(torch.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryState:
        """On another device; ``dtype`` is the memory's alone."""
        moved = self._map(lambda x: x.to(device or x.device))
        return dataclasses.replace(moved, memory=moved.memory.to(dtype))

    def reset(self, lanes: Tensor | Sequence[int]) -> MemoryState:
        """Those lanes begin a new document. ``lanes``: indices, or a boolean (batch,)."""
        lanes, state = self._indices(lanes), self.clone()
        for name, x in state._tensors().items():
            x[lanes] = self.start if name in ("segment", "pending") else 0
        return state

    def select(self, lanes: Tensor | Sequence[int]) -> MemoryState:
        """Those lanes, in that order; a lane may come more than once. ``lanes``: indices, or a boolean (batch,)."""
        lanes = self._indices(lanes)
        return self._map(lambda x: x[lanes])

    def reorder(self, parents: Tensor | Sequence[int]) -> MemoryState:
        """Beams that live on: lane i continues lane ``parents[i]``.

        Raises:
            ValueError: not one parent for each lane.
        """
        parents = self._indices(parents)
        if len(parents) != self.batch_size:
            raise ValueError(f"reorder: expected {self.batch_size} lanes, as many as there are, got {len(parents)}")
        return self.select(parents)

    @staticmethod
    def cat(states: Sequence[MemoryState]) -> MemoryState:
        """All lanes of several states of one model, in order.

        Raises:
            ValueError: there is no state, or they are of different models.
        """
        if not isinstance(states, Sequence) or not states or not all(isinstance(s, MemoryState) for s in states):
            raise ValueError(f"cat: expected at least one state in a list, got {states!r}")
        kinds = {(s.start, s.length, s.memory.shape[1:], s.memory.dtype, s.memory.device) for s in states}
        if len(kinds) > 1:
            raise ValueError(
                "cat: the states differ in start token, segment length, memory's shape, dtype or device: "
                + "; ".join(str(kind) for kind in sorted(kinds, key=str))
            )
        parts = [state._tensors() for state in states]
        return MemoryState(**{k: torch.cat([part[k] for part in parts]) for k in parts[0]}, start=states[0].start)

    def split(self, sizes: int | Sequence[int] = 1) -> list[MemoryState]:
        """The lanes in groups of those sizes, or of one size; the inverse of :meth:`cat`."""
        if not is_count(sizes, 1):
            whole = isinstance(sizes, Sequence) and all(is_count(n, 0) for n in sizes)
            if not whole or sum(sizes) != self.batch_size:  # type: ignore[arg-type]
                raise ValueError(
                    f"split: expected a whole number of at least 1, or a list of them whose sum is {self.batch_size}, "
                    f"got {sizes!r}"
                )
        lanes = torch.arange(self.batch_size, device=self.position.device)
        return [self.select(group) for group in lanes.split(list(sizes) if isinstance(sizes, Sequence) else int(sizes))]

    def pad_to(self, batch_size: int) -> MemoryState:
        """With lanes that have read nothing added behind, ``batch_size`` in all.

        Raises:
            ValueError: there are more already.
        """
        check_count("pad_to", batch_size)
        if batch_size < self.batch_size:
            raise ValueError(f"pad_to: expected at least the {self.batch_size} lanes there are, got {batch_size}")
        added = MemoryState.new(
            batch_size - self.batch_size,
            self.length,
            self.start,
            self.memory.new_zeros(self.memory.shape[1:]),
        )
        return MemoryState.cat([self, added])

    def save(self, path: str | Path, model: nn.Module) -> None:
        """Write a safetensors file that only ``model`` can go on from. The file is replaced whole or not at all.

        Equal states of equal models give equal files, byte by byte. A compiled or wrapped model is the model inside.

        >>> state = model.read(torch.tensor([[72, 105]]), start=256)
        >>> state.save(folder / "talk.state", model)

        Raises:
            OSError: it cannot be written; what was there before is untouched.
            ValueError: the memory is not finite.
        """
        model, path = unwrapped(model), a_path("path", path)
        if not self.memory.isfinite().all():
            raise ValueError("memory: holds numbers that are not finite, and is not saved; the model has diverged")
        tensors = {name: x.contiguous().cpu() for name, x in self._tensors().items()}
        header = {
            "memformer_state": _FORMAT,
            "start": str(self.start),
            "fingerprint": fingerprint(model),
            "config": json.dumps(model.described()),
            "checksum": _sha256(tensors, str(self.start)),
        }
        try:
            replace_file(path, _in_order(save(tensors, header)))
        except OSError as error:
            raise OSError(
                f"{path}: cannot be written ({error.strerror or error}); what was there before is untouched"
            ) from error

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> MemoryState:
        """What :meth:`save` wrote, bit by bit, on the model's device.

        >>> model.read(torch.tensor([[33]]), start=256).save(folder / "talk.state", model)
        >>> MemoryState.load(folder / "talk.state", model).position
        tensor([1])

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: the file is damaged, not a state, or was written with another model.
        """
        model, path = unwrapped(model), a_path("path", path)
        with path.open("rb"):
            pass  # its own errors are the clearest
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated, or not a state file ({error})") from error
        if header.get("memformer_state") != _FORMAT or sorted(tensors) != ["memory", "pending", "position", "segment"]:
            raise ValueError(f"{path}: not a state file, as MemoryState.save writes it")
        if header.get("checksum") != _sha256(tensors, header.get("start", "")):
            raise ValueError(f"{path}: damaged: its contents are not those that were written")
        if header.get("fingerprint") != fingerprint(model):
            equal = _settings(header, model)
            if equal is None or header.get("fingerprint") != fingerprint(model, equal):
                raise ValueError(f"{path}: written with another model: {_difference(header, model)}")
        return cls(**tensors, start=int(header["start"])).to(next(model.parameters()).device)

    def _tensors(self) -> dict[str, Tensor]:
        return {"memory": self.memory, "segment": self.segment, "pending": self.pending, "position": self.position}

    def _map(self, function: Callable[[Tensor], Tensor]) -> MemoryState:
        return MemoryState(**{name: function(x) for name, x in self._tensors().items()}, start=self.start)

    def _indices(self, lanes: Tensor | Sequence[int]) -> Tensor:
        given: Any = lanes
        found: Any = as_tokens(given, self.position.device)
        if isinstance(found, Tensor) and found.dtype == torch.bool and found.shape == (self.batch_size,):
            return found.nonzero()[:, 0]
        integers = isinstance(found, Tensor) and found.dim() == 1 and found.dtype in (torch.int64, torch.int32)
        if integers and not ((found < 0) | (found >= self.batch_size)).any():
            indices: Tensor = found
            return indices
        got = f"{describe(found)}: {found.tolist()}" if isinstance(found, Tensor) else repr(given)
        raise ValueError(
            f"lanes: expected indices from 0 to {self.batch_size - 1}, or torch.bool of shape "
            f"({self.batch_size},), got {got}"
        )


def fingerprint(model: nn.Module, settings: Mapping[str, object] | None = None) -> str:
    """A model's settings and weights, to the bit, as 64 hexadecimal digits; wrappers change nothing.

    Args:
        model: whose.
        settings: in place of the model's; equal ones may be written otherwise, as 0 and 0.0.
    """
    model = unwrapped(model)
    settings = model.config.to_dict() if settings is None else settings
    return _sha256(plain_state(model), json.dumps(settings, sort_keys=True))


def _in_order(file: bytes) -> bytes:
    """A safetensors file with the names in its header sorted: as written, those of one's own are in a hash's order."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[end:]


def _sha256(tensors: Mapping[str, object], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        for part in _plain(x):
            if isinstance(part, Tensor):
                digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
                digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            else:
                digest.update(f"{name} {part}".encode())
    return digest.hexdigest()


def _plain(x: object) -> Iterator[object]:
    """The plain tensors of which a weight consists: one, or what quantised numbers are made of."""
    if isinstance(x, tuple):
        for part in x:
            yield from _plain(part)
    elif isinstance(x, Tensor) and x.is_quantized:
        yield x.int_repr()
        per_channel = x.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        scales = (
            (x.q_per_channel_scales(), x.q_per_channel_zero_points())
            if per_channel
            else (x.q_scale(), x.q_zero_point())
        )
        yield from scales
    else:
        yield x


def _settings(header: dict[str, str], model: Pretrained) -> dict[str, object] | None:
    """The settings in a state's file as they are written there, if they equal the model's."""
    theirs, ours = json.loads(header["config"]), model.config.to_dict()
    found = {name: value for name, value in theirs.items() if name in ours}
    return found if found == ours else None


def _difference(header: dict[str, str], model: Pretrained) -> str:
    theirs, ours = json.loads(header["config"]), model.config.to_dict()
    if (kind := theirs.pop("model", DEFAULT_KIND)) != model.kind:
        return f"a {kind} there, a {model.kind} here"
    names = [*ours, *(name for name in theirs if name not in ours)]
    settings = [f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in names if theirs.get(k) != ours.get(k)]
    prints = f"fingerprint {header['fingerprint'][:12]} there, {fingerprint(model)[:12]} here"
    return "; ".join(settings or ["the same settings, other weights"]) + f" ({prints})"
