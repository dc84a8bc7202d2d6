"""Frozen trees of settings as nested dicts of plain values, and back. Knows no setting."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_type_hints

import yaml

from .config import convert

__all__ = ["build", "from_yaml", "to_flat", "to_plain"]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in found:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
                found.add(key.value)
        return super().construct_mapping(node, deep)


def from_yaml(text: str) -> Any:
    """Plain values of YAML. Raises yaml.YAMLError, also for a key that stands twice."""
    return yaml.load(text, _Loader)


def to_plain(settings: DataclassInstance) -> dict[str, object]:
    """Settings as nested dicts of numbers, strings and lists."""
    plain: dict[str, object] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = to_plain(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = [str(part) for part in value]
        plain[f.name] = value
    return plain


def to_flat(settings: DataclassInstance) -> dict[str, object]:
    """Settings by dotted names, as "model.dim"."""
    return _flat(to_plain(settings), "")


def _flat(plain: Mapping[str, object], where: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return flat


def build(
    cls: type[T], values: object, *, base: T | None = None, where: str = "", root: type[DataclassInstance] | None = None
) -> T:
    """Settings from nested dicts; what they leave out comes from ``base``, or is the default.

    Args:
        where: of which part of the tree these are, by its dotted name.
        root: the whole tree, whose names are suggested for an unknown one; None if it is ``cls``.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'settings'}: expected names with values, got {values!r}")
    hints, tree = get_type_hints(cls), root or cast("type[DataclassInstance]", cls)
    given: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in hints:
            raise ValueError(f"{path}: unknown setting{_suggestion(str(name), tree)}")
        if dataclasses.is_dataclass(hints[name]):
            part = None if base is None else getattr(base, name)
            given[name] = build(hints[name], value, base=part, where=path, root=tree)
        else:
            given[name] = convert(path, hints[name], value, text=True)
    return cls(**given) if base is None else dataclasses.replace(base, **given)  # type: ignore[type-var]


def _suggestion(name: str, tree: type[DataclassInstance]) -> str:
    known = dict(reversed(_paths(tree, "")))  # a section before the setting of the same name
    if name in ("recipe", "config"):
        return f": --{name} is a flag"
    close = difflib.get_close_matches(name, known, n=1)
    return f". Perhaps you meant {known[close[0]]}" if close else f"; there are {', '.join(sorted(known))}"


def _paths(cls: type[DataclassInstance], where: str) -> list[tuple[str, str]]:
    found = []
    for name, hint in get_type_hints(cls).items():
        found.append((name, where + name))
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found += _paths(hint, f"{name}.")
    return found
