"""Which files are data: those that are named, and those below folders, without what is hidden or a run's own."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..folders import NUMBERS
from .unpacked import COMPRESSED

__all__ = ["HEADER", "Found", "Tally", "find_files", "shown"]

HEADER = "tokens.json"
"""The file that makes a folder one of token files."""
_OF_A_RUN = re.compile(
    r"run\.yaml|(metrics|samples)\.jsonl|(wandb|trackio)-run\.txt|best|tensorboard|tokens|(damaged-)?step-\d+"
)
"""What a run writes into its folder."""
_OF_DATASETS = re.compile(r"cache-[0-9a-f]{16}(_\d{5}_of_\d{5})?\.arrow")
"""What ``datasets`` keeps of a map or a shuffle beside the rows it was made of."""


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
        """One more; ``(s)`` in its kind is for several."""
        count, first = self._found.get(kind, (0, where))
        self._found[kind] = count + 1, first

    def update(self, other: Tally) -> None:
        """Those of another one, too."""
        for kind, (more, where) in other._found.items():
            count, first = self._found.get(kind, (0, where))
            self._found[kind] = count + more, first

    def __str__(self) -> str:
        return ", ".join(
            f"{count:,} {kind.replace('(s)', 's' * (count > 1))} ({'such as ' * (count > 1)}{first})"
            for kind, (count, first) in self._found.items()
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
            here = "" if path.is_absolute() else f" in {shown(Path.cwd())}"
            raise FileNotFoundError(f"{shown(path)}: no such file or folder{here}")
        for name, file in inside:
            named = file == path
            if not named and (include or exclude):
                fits = {pattern for pattern in (*include, *exclude) if _fits(name, pattern)}
                unmatched -= fits
                if fits & set(exclude) or not (fits & set(include) or not include or file.is_dir()):
                    continue
            if not named and (why := _why_not(file)):
                left_out.add(*why)
                continue
            if not named and not include and _OF_DATASETS.fullmatch(file.name):
                left_out.add("file(s) of rows that the datasets library made from others", shown(file))
                continue
            real = file.resolve()
            if real not in seen:
                seen.add(real)
                found.append(Found(file, shown(name), named))
            elif named or not file.is_symlink():
                raise ValueError(f"{shown(file)}: given twice, so one copy might be held out and the other trained on")
            else:
                left_out.add("link(s) to files that are read already", shown(file))
    if unmatched and all_match:
        known = [path for path in paths if path.is_dir()]
        where = f"in {', '.join(map(shown, known))}" if known else "because no folder was given"
        raise ValueError(
            f"include, exclude: the pattern {min(unmatched)!r} matches no file {where}; patterns are of paths in a "
            "folder, such as '*.txt' or 'drafts/*'"
        )
    return found


def _why_not(file: Path) -> tuple[str, str] | None:
    """Why something in a folder is no data, and where it is; None for what may be."""
    try:
        mode = file.stat().st_mode
    except OSError as error:  # a link that leads nowhere, or in a circle; a folder that may not be entered
        return "that cannot be opened", f"{shown(file)}: {error.strerror}"
    if stat.S_ISDIR(mode):
        return "link(s) to folders, where nothing is looked for", shown(file)
    if not stat.S_ISREG(mode):
        return "that are no files, such as pipes", shown(file)
    if file.suffix.lower() in COMPRESSED and file.with_suffix("").is_file():
        return "compressed twin(s) of files beside them", shown(file)
    return None


def _walk(root: Path, own: set[Path], left_out: Tally) -> Iterator[Path]:
    """What is below a folder and not hidden: files, and links."""

    def cannot(error: OSError) -> None:
        left_out.add("folder(s) that cannot be read", shown(error.filename))

    for folder, folders, files in os.walk(root, onerror=cannot):
        here = Path(folder)
        runs = here.resolve() in own or "run.yaml" in files
        if runs or {NUMBERS, "training.safetensors"} <= set(files):
            left_out.add("folder(s) of a run, whose own files are no data", shown(here))
            if here != root or not runs:
                folders.clear()
                continue
            folders[:] = [name for name in folders if not _OF_A_RUN.fullmatch(name)]
            files = [name for name in files if not _OF_A_RUN.fullmatch(name)]
        if HEADER in files and here != root:
            left_out.add("folder(s) of token files, to be given themselves", shown(here))
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (here / name).is_symlink()]
        yield from (here / name for name in (*files, *links) if not name.startswith("."))


def _fits(name: str, pattern: str) -> bool:
    """Whether a path, a folder above it, or the name of either matches; ``*`` stands for any characters, ``/`` too."""
    path = PurePosixPath(name)
    names = {name, *path.parts, *map(str, path.parents)} - {"."}
    patterns = {pattern.rstrip("/"), pattern.rstrip("/").replace("**/", "")}
    return any(fnmatch.fnmatchcase(n, p) for n in names for p in patterns)
