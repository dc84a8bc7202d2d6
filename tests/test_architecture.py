"""What may import what."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import memformer

PACKAGE = Path(memformer.__file__).parent

LAYERS = [
    {"replay", "config", "segments", "positions", "pictures"},
    {"attention", "tasks"},
    {"blocks"},
    {"memory", "state"},
    {"generation"},
    {"model"},
    {"objectives", "data", "checkpoints", "parallel", "settings"},
    {"evaluation", "export"},
    {"inspection"},
    {"training", "bench"},
    {"cli", "hf"},
    {"__init__", "__main__"},
]
"""From the ground up. A part imports from lower layers only, and never from its own."""


def part_of(file: Path) -> str:
    """A module of the package, or a folder with all in it."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parts() -> set[str]:
    return {part_of(file) for file in PACKAGE.rglob("*.py")}


def imports(file: Path) -> Iterator[str]:
    """The absolute names of everything that a file imports, anywhere in it."""
    package = ("memformer", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*start, *([node.module] if node.module else [])])
            # "from . import replay" names modules, "from .config import Writer" does not.
            yield from (f"{name}.{alias.name}" for alias in node.names) if name == "memformer" else (name,)


def own_imports(part: str) -> set[str]:
    """The parts of the package that a part imports, itself left out; ``import memformer`` is its ``__init__``."""
    files = [file for file in PACKAGE.rglob("*.py") if part_of(file) == part]
    names = [name.split(".") for file in files for name in imports(file)]
    found = {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "memformer"}
    return {name if name in parts() else "__init__" for name in found} - {part}


def test_each_part_has_its_layer() -> None:
    assert parts() <= set.union(*LAYERS), "a new part needs a place in LAYERS"


def test_imports_point_down() -> None:
    below: set[str] = set()
    for layer in LAYERS:
        for part in sorted(layer & parts()):
            assert own_imports(part) <= below, f"{part} imports {sorted(own_imports(part) - below)}, not below it"
        below |= layer


def test_the_chain_of_the_model() -> None:
    """The reader of imports sees what is there."""
    assert own_imports("attention") == {"positions"}
    assert own_imports("blocks") == {"attention", "positions"}
    assert own_imports("memory") == {"attention", "blocks"}
    assert own_imports("model") >= {"attention", "blocks", "config", "memory", "positions"}
    assert "replay" not in own_imports("model"), "the model does not know the engine"
    assert "replay" in own_imports("__init__")


def test_the_replay_engine_imports_torch_alone() -> None:
    roots = {name.split(".")[0] for name in imports(PACKAGE / "replay.py")}
    assert roots - set(sys.stdlib_module_names) == {"torch"}
    # So the file can be carried elsewhere and used by itself.
    assert runpy.run_path(str(PACKAGE / "replay.py"))["memory_replay"].__name__ == "memory_replay"


def test_the_package_is_light() -> None:
    heavy = ["transformers", "matplotlib", "tyro"]
    code = f"import sys, memformer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
