"""Which files are data: those that are named, and those below folders, without what is hidden or a run's own."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .unpacked import COMPRESSED

__all__ = ["Found", "Tally", "find_files", "shown"]

_OF_A_RUN = re.compile(r"run\.yaml|metrics\.jsonl|best|tensorboard|tokens|step-\d+")
"""What a run writes into its folder."""


def shown(name: str | Path) -> str:
    """A name as text that any output can take: what is not UTF-8 in it is escaped."""
    return str(name).encode("utf-8", "backslashreplace").decode()


class Tally:
    """How many there are of each kind, and the first of each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def __len__(self) -> int:
        return sum(count for count, _ in self._found.values())

    def add(self, kind: str, where: str) -> None:
        """One more."""
        count, first = self._found.get(kind, (0, where))
        self._found[kind] = count + 1, first

    def update(self, other: Tally) -> None:
        """Those of another one, too."""
        for kind, (more, where) in other._found.items():
            count, first = self._found.get(kind, (0, where))
            self._found[kind] = count + more, first

    def __str__(self) -> str:
        return ", ".join(
            f"{count:,} {kind} ({'such as ' * (count > 1)}{first})" for kind, (count, first) in self._found.items()
        )


@dataclass(frozen=True)
class Found:
    """A file that is data."""

    path: Path
    name: str
    """Its path in the folder that was given, or the file's own name; text that can be shown."""
    named: bool
    """Whether it was given itself, not a folder above it."""


def find_files(
    paths: Sequence[Path],
    left_out: Tally,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    out: Sequence[Path] = (),
    all_match: bool = True,
) -> list[Found]:
    """The files that are named, and those below the folders, in the order of their names.

    Args:
        left_out: gets what is left out for another reason than the patterns.
        include, exclude: patterns of a path in its folder, of a folder above it, or of the name of either.
        out: the folders of runs that may not be known as such yet.
        all_match: whether a pattern that matches nothing is an error.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is given twice, or a pattern matches nothing.
    """
    unmatched = {*include, *exclude}
    own = {path.resolve() for path in out}
    seen: set[Path] = set()
    found: list[Found] = []
    for path in paths:
        if path.is_dir():
            inside = sorted((file.relative_to(path).as_posix(), file) for file in _walk(path, own, left_out))
        elif path.is_file():
            inside = [(path.name, path)]
        else:
            raise FileNotFoundError(f"{shown(path)}: no such file or folder{_missing_hint(path)}")
        for name, file in inside:
            named = file == path
            if not named and (include or exclude):
                fits = {pattern for pattern in (*include, *exclude) if _fits(name, pattern)}
                unmatched -= fits
                if fits & set(exclude) or (include and not fits & set(include)):
                    continue
            if file.resolve() in seen:
                if named or not file.is_symlink():
                    raise ValueError(
                        f"{shown(file)}: given twice, so one copy might be held out and the other trained on"
                    )
                left_out.add("links to files that are read already", shown(file))
                continue
            if not named and file.suffix.lower() in COMPRESSED and file.with_suffix("").is_file():
                left_out.add("compressed copies of files beside them", shown(file))
                continue
            seen.add(file.resolve())
            found.append(Found(file, shown(name), named))
    if unmatched and all_match:
        known = [path for path in paths if path.is_dir()]
        where = f"in {', '.join(map(shown, known))}" if known else "because no folder was given"
        raise ValueError(
            f"include, exclude: the pattern {min(unmatched)!r} matches no file {where}; patterns are of paths in a "
            "folder, such as '*.txt' or 'drafts/*'"
        )
    return found


def _missing_hint(path: Path) -> str:
    return "" if path.is_absolute() else f" in {shown(Path.cwd())}"


def _walk(root: Path, own: set[Path], left_out: Tally) -> Iterator[Path]:
    """The files below a folder that are not hidden."""

    def cannot(error: OSError) -> None:
        left_out.add("folders that cannot be read", shown(error.filename))

    for folder, folders, files in os.walk(root, onerror=cannot):
        here = Path(folder)
        runs = here.resolve() in own or "run.yaml" in files
        if runs or {"training.json", "training.safetensors"} <= set(files):
            left_out.add("folders of a run, whose own files are no data", shown(here))
            if here != root or not runs:
                folders.clear()
                continue
            folders[:] = [name for name in folders if not _OF_A_RUN.fullmatch(name)]
            files = [name for name in files if not _OF_A_RUN.fullmatch(name)]
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (here / name for name in files if not name.startswith(".") and (here / name).is_file())


def _fits(name: str, pattern: str) -> bool:
    """Whether a path, a folder above it, or the name of either matches; ``*`` stands for any characters, ``/`` too."""
    path = PurePosixPath(name)
    names = {name, *path.parts, *map(str, path.parents)} - {"."}
    patterns = {pattern.rstrip("/"), pattern.rstrip("/").replace("**/", "")}
    return any(fnmatch.fnmatchcase(n, p) for n in names for p in patterns)
