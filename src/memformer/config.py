"""The model's configuration, which checks itself. Imports nothing of the project."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

__all__ = [
    "LATER",
    "CausalConfig",
    "MemformerConfig",
    "MemoryLayout",
    "ModelConfig",
    "Positions",
    "Typed",
    "Writer",
    "a_path",
    "as_before",
    "check_count",
    "check_forgetting",
    "check_number",
    "convert",
    "is_count",
]

Positions = Literal["rotary", "relative", "bucketed"]
"""How attention knows positions: rotated queries and keys, learned encodings of distances, or learned biases."""
Writer = Literal["normalised", "gated", "placed"]
"""How slots are written: added and normalised (paper v2), so from places of its own, or gated (earlier library)."""
MemoryLayout = Literal["layers", "one"]
"""Where a causal stack has its slots: some in each layer, or one memory that all layers read."""

LATER = {"slot_parts": 1, "forgetting": 0.001}
"""Settings of a model that were not there from the start, each with what it was before there was one."""


class Typed:
    """Settings whose values have the types of their fields: what Python gives is converted, or refused by name."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, convert(name, kind, getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Typed):
    """What the configurations of all models can do."""

    if TYPE_CHECKING:  # not here at run time: the order of fields is each class's own
        dim: int
        num_memory_slots: int
        slot_parts: int
        mem_update_attn_heads: int
        write_temperature: float
        forgetting: float
        dropout: float

    @property
    def segment_length(self) -> int:
        """Tokens per segment."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> int:
        """How many tokens can be both read and written: ids from 0."""
        raise NotImplementedError

    @property
    def vocabularies(self) -> dict[str, int | None]:
        """The settings that say how many tokens are known; of a model of text all are the tokenizer's number."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The fields by name: plain numbers and words, which JSON can hold.

        Settings that came later are left out where they change nothing, see :func:`as_before`.
        """
        return as_before(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration that :meth:`to_dict` gave. Raises ValueError for unknown and for missing names."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values)
        if unknown or missing:
            raise ValueError(f"model configuration: unknown settings {unknown}, missing settings {missing}")
        return cls(**values)

    def _check_heads(self, name: str) -> None:
        """Raise ValueError unless the heads of that name divide the width."""
        dim, heads = (getattr(self, field) for field in ("dim", name))
        if dim % heads:
            raise ValueError(f"{name}: must divide dim, got {heads} heads for dim {dim}")

    def _check_slot_parts(self) -> None:
        """Raise ValueError unless they divide the width. Before heads are checked, which settings take from them."""
        check_count("slot_parts", self.slot_parts)
        if self.dim % self.slot_parts:
            raise ValueError(f"slot_parts: must divide dim, got {self.slot_parts} parts for dim {self.dim}")

    def _check_parts(self, stack_heads: list[str]) -> None:
        """Raise ValueError where a choice of parts is not one; ``stack_heads`` names the heads that know positions."""
        dim, writer, positions, dropout = (
            getattr(self, field) for field in ("dim", "memory_writer", "positions", "dropout")
        )
        check_writing(writer, self.write_temperature, self.forgetting)
        if positions not in get_args(Positions):
            raise ValueError(f"positions: expected one of {', '.join(get_args(Positions))}, got {positions!r}")
        for name in stack_heads if positions == "rotary" else ():
            heads = getattr(self, name)
            if dim // heads % 2:
                raise ValueError(
                    f"positions: rotary needs an even width per head, got dim {dim} / {name} {heads} = {dim // heads}. "
                    "Change dim or the heads, or use positions='relative'"
                )
        if not (isinstance(dropout, numbers.Real) and 0 <= float(dropout) < 1):
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")


@dataclass(frozen=True, kw_only=True)
class MemformerConfig(ModelConfig):
    """Every setting of a :class:`~memformer.Memformer`; its keywords are these fields, and are described there.

    Raises:
        ValueError: a field is out of range or missing; the message names it.
    """

    dim: int
    num_memory_slots: int
    enc_num_tokens: int
    enc_max_seq_len: int
    enc_depth: int = 6
    enc_heads: int = 8
    dec_num_tokens: int | None = None
    dec_max_seq_len: int | None = None
    dec_depth: int = 6
    dec_heads: int = 8
    dec_overlap: int = 0
    encoder_only: bool = False
    slot_parts: int = 1
    num_mem_updates: int = 1
    mem_update_attn_heads: int = 8
    memory_writer: Writer = "normalised"
    write_temperature: float = 0.25
    forgetting: float = 0.001
    positions: Positions = "rotary"
    dropout: float = 0.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        counts = ["dim", "num_memory_slots", "enc_num_tokens", "enc_max_seq_len", "enc_depth", "enc_heads",
                  "num_mem_updates", "mem_update_attn_heads"]  # fmt: skip
        stack_heads = ["enc_heads"]
        if not self.encoder_only:
            for name in ["dec_num_tokens", "dec_max_seq_len"]:
                if getattr(self, name) is None:
                    raise ValueError(f"{name}: a decoder needs it, got None. Set it, or encoder_only=True")
            counts += ["dec_num_tokens", "dec_max_seq_len", "dec_depth", "dec_heads"]
            stack_heads += ["dec_heads"]
        for name in counts:
            check_count(name, getattr(self, name))
        if not self.encoder_only:
            check_count("dec_max_seq_len", self.dec_max_seq_len, least=2)  # a start token, and one to predict
            self._check_overlap()
        self._check_slot_parts()
        for name in [*stack_heads, "mem_update_attn_heads"]:
            self._check_heads(name)
        self._check_parts(stack_heads)
        if self.tie_embeddings and not self.encoder_only and self.enc_num_tokens != self.dec_num_tokens:
            raise ValueError(
                "tie_embeddings: encoder and decoder need the same vocabulary, got enc_num_tokens "
                f"{self.enc_num_tokens} and dec_num_tokens {self.dec_num_tokens}"
            )
        if self.tie_embeddings and self.encoder_only:
            raise ValueError("tie_embeddings: there is nothing to tie in an encoder-only model")
        super().__post_init__()  # last, for the messages above say more

    def _check_overlap(self) -> None:
        overlap = self.dec_overlap
        check_count("dec_overlap", overlap, least=0)
        if overlap > self.segment_length:
            raise ValueError(
                f"dec_overlap: expected at most a segment's {self.segment_length} tokens, got {overlap}. Set it lower"
            )
        if overlap and self.enc_num_tokens > (self.dec_num_tokens or 0):
            raise ValueError(
                f"dec_overlap: the decoder reads {overlap} of the encoder's tokens, so it needs to know them all; got "
                f"enc_num_tokens {self.enc_num_tokens} and dec_num_tokens {self.dec_num_tokens}"
            )

    @property
    def segment_length(self) -> int:
        """Tokens per segment: what the encoder can read, and what a decoder can write after its start token."""
        if self.encoder_only or self.dec_max_seq_len is None:
            return self.enc_max_seq_len
        return min(self.enc_max_seq_len, self.dec_max_seq_len - 1)

    @property
    def vocabulary(self) -> int:
        """How many tokens can be both read and written: ids from 0."""
        if self.encoder_only or self.dec_num_tokens is None:
            return self.enc_num_tokens
        return min(self.enc_num_tokens, self.dec_num_tokens)

    @property
    def vocabularies(self) -> dict[str, int | None]:
        """The settings that say how many tokens are known; of a model of text all are the tokenizer's number."""
        return {"enc_num_tokens": self.enc_num_tokens, "dec_num_tokens": self.dec_num_tokens}


@dataclass(frozen=True, kw_only=True)
class CausalConfig(ModelConfig):
    """Every setting of a :class:`~memformer.CausalMemformer`; its keywords are these fields, and are described there.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    dim: int
    num_memory_slots: int
    num_tokens: int
    max_seq_len: int
    depth: int = 6
    heads: int = 8
    overlap: int = 4
    memory: MemoryLayout = "layers"
    slot_parts: int = 1
    num_mem_updates: int = 1
    mem_update_attn_heads: int = 8
    memory_writer: Writer = "normalised"
    write_temperature: float = 0.25
    forgetting: float = 0.001
    positions: Positions = "rotary"
    feed_forward_factor: float = 4
    dropout: float = 0.0
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "num_memory_slots", "num_tokens", "max_seq_len", "depth", "heads", "num_mem_updates",
                     "mem_update_attn_heads"):  # fmt: skip
            check_count(name, getattr(self, name))
        check_number("feed_forward_factor", self.feed_forward_factor)
        if not 0.5 < self.feed_forward_factor * self.dim < math.inf:
            raise ValueError(
                f"feed_forward_factor: expected a width of at least 1, got {self.feed_forward_factor} x {self.dim}"
            )
        check_count("overlap", self.overlap, least=0)
        if self.overlap > self.max_seq_len:
            raise ValueError(
                f"overlap: expected at most a segment's {self.max_seq_len} tokens, got {self.overlap}. Set it lower"
            )
        self._check_slot_parts()
        for name in ("heads", "mem_update_attn_heads"):
            self._check_heads(name)
        if self.memory not in get_args(MemoryLayout):
            raise ValueError(f"memory: expected one of {', '.join(get_args(MemoryLayout))}, got {self.memory!r}")
        self._check_parts(["heads"])
        super().__post_init__()  # last, for the messages above say more

    @property
    def segment_length(self) -> int:
        """Tokens per segment."""
        return self.max_seq_len

    @property
    def vocabulary(self) -> int:
        """How many tokens can be read and written: ids from 0."""
        return self.num_tokens

    @property
    def vocabularies(self) -> dict[str, int | None]:
        """The settings that say how many tokens are known."""
        return {"num_tokens": self.num_tokens}


def as_before(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those of :data:`LATER` that are as there: so a model is the same as before there were any."""
    return {name: value for name, value in settings.items() if (name, value) not in LATER.items()}


def check_writing(writer: object, temperature: object, forgetting: object) -> None:
    """Raise ValueError, which begins with a setting's name, unless a memory can be written so."""
    if writer not in get_args(Writer):
        raise ValueError(f"memory_writer: expected one of {', '.join(get_args(Writer))}, got {writer!r}")
    check_positive("write_temperature", temperature)
    check_forgetting(forgetting, writer)


def check_forgetting(value: object, writer: object) -> None:
    """Raise ValueError, which begins with the setting's name, unless it is one that such a writer can have."""
    check_number("forgetting", value)
    if not 0 <= float(value) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"forgetting: expected a finite number of at least 0, got {value!r}")
    if writer != "normalised" and value != LATER["forgetting"]:
        raise ValueError(
            f"forgetting: {value} has no meaning with the writer {writer}; the normalised one alone has a bias vector "
            "that pulls slots back; leave it out"
        )


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``least``; the message begins with ``name``."""
    if not is_count(value, least):
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise ValueError, which begins with ``name``, unless ``value`` is a number (True and False are none)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}: expected a number, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError, which begins with ``name``, unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) and 0 < float(value) < math.inf):
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


def a_path(name: str, value: object) -> Path:
    """A path as one. Raises ValueError, which begins with ``name``, for anything else and for an empty one."""
    path = convert(name, Path, value)
    assert isinstance(path, Path)
    return path


def is_count(value: object, least: int) -> bool:
    """Whether a value is a whole number (True and False are not) of at least ``least``."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def convert(name: str, kind: Any, value: object, text: bool = False) -> object:
    """A value as the type of its field; from a file that is ``text`` a number may be a string (3e-4 is one in YAML)."""
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")
        return str(value)
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, (str, os.PathLike)) else value
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"{name}: expected a list, got {value!r}")
        return tuple(convert(name, get_args(kind)[0], item, text) for item in items)
    if get_origin(kind) in (Union, types.UnionType):
        (inner,) = (k for k in get_args(kind) if k is not type(None))
        return None if value is None else convert(name, inner, value, text)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        raise ValueError(f"{name}: expected {kind.__name__}(...), got {value!r}")
    if kind in (int, float):
        number = None if isinstance(value, bool) else _number(value, text)
        if number is not None and (kind is float or number == int(number)):
            return number if kind is float else int(number)
    elif kind is Path and isinstance(value, (str, os.PathLike)) and str(value):
        return Path(value)
    elif isinstance(value, kind):
        return value
    finite = "a finite number" if isinstance(value, float) else "a number"
    expected = {int: "a whole number", float: finite, bool: "true or false", str: "text", Path: "a path"}
    raise ValueError(f"{name}: expected {expected[kind]}, got {value!r}")


def _number(value: object, text: bool) -> int | float | None:
    """A number of Python's, of numpy's or in text; None if it is none, or not finite."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if not isinstance(value, numbers.Real) and not (text and isinstance(value, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
