"""What may import what."""

from __future__ import annotations

import ast
import functools
import shutil
import subprocess
import sys
from pathlib import Path

import memformer

PACKAGE = Path(memformer.__file__).parent

LAYERS = [
    {
        "_installation",
        "replay.inputs",
        "replay.environment",
        "replay.schedules",
        "config",
        "checks",
        "nn.attention",
        "pictures",
        "files",
        "folders",
        "learning_rate",
        "device",
        "data.pieces",
    },
    {
        "sampling",
        "replay.storage",
        "replay.gradients",
        "replay.boundary",
        "replay.segments",
        "replay.reach",
        "replay.world",
        "replay.fingerprint",
        "replay.own_state",
        "nn.positions",
        "nn.blocks",
        "nn.losses",
        "tasks.base",
        "around",
        "trees",
        "pretrained",
        "data.segments",
    },
    {"tasks.images", "tasks.symbols", "tasks.worlds"},
    {"replay.options", "replay.places", "replay.readout", "replay.sizes", "nn.memory", "state"},
    {"replay.capture", "replay.engine", "interface", "nn.causal", "nn.stacked"},
    {"replay.functions", "network", "wavefront"},
    {"writing"},
    {"generation"},
    {"replay.verdict", "model", "causal", "export"},
    {"models"},
    {
        "replay",
        "nn",
        "data.documents",
        "data.tokenizers",
        "data.yardsticks",
        "parallel",
        "training.checkpoints",
    },
    {"data.unpacked"},
    {"data.folders"},
    {"data.kinds", "data.held_out"},
    {"data.corpora", "data.objectives", "settings"},
    {"data.lanes", "data.tokenfiles", "tasks.prose"},
    {"data", "rollouts", "tasks"},
    {"evaluation"},
    {"inspection"},
    {"training.parts", "training.metrics", "training.optimizers"},
    {
        "training.callbacks",
        "training.capturing",
        "training.documents",
        "training.history",
        "training.initial",
        "training.shards",
    },
    {"training.averaging", "training.resume", "training.update"},
    {"training.corpus", "training.loggers", "training.samples", "training.step"},
    {"training.assemble"},
    {"training.run"},
    {"training", "bench"},
    {"cli", "hf"},
    {"__init__", "__main__"},
]
"""From the ground up. A room imports from lower layers only, and never from its own. Rooms are modules; the command
line and the benchmarks are one room each."""

WHOLE = {"cli", "bench", "hf"}
"""Folders that are one room."""


def room_of(file: Path) -> str:
    """A module of the package, named from there; a package's ``__init__`` has its folder's name."""
    parts = [*file.relative_to(PACKAGE).with_suffix("").parts]
    if parts[0] in WHOLE:
        return parts[0]
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


@functools.cache
def rooms() -> frozenset[str]:
    return frozenset(room_of(file) for file in PACKAGE.rglob("*.py"))


@functools.cache
def imports(file: Path) -> frozenset[str]:
    """The absolute names of everything that a file imports, anywhere in it."""
    found = set[str]()
    package = ("memformer", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*start, *([node.module] if node.module else [])])
            found.update(f"{name}.{alias.name}" for alias in node.names)
    return frozenset(found)


def own_imports(room: str) -> set[str]:
    """The rooms of the package that a room imports, itself left out: of each name the longest part that is a room."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        if room_of(file) == room:
            for name in imports(file):
                root, *parts = name.split(".")
                if root == "memformer":
                    known = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
                    found.add(next((part for part in known if part in rooms()), "__init__"))
    return found - {room}


def test_each_room_has_its_layer() -> None:
    assert rooms() <= set.union(*LAYERS), "a new room needs a place in LAYERS"


def test_imports_point_down() -> None:
    below: set[str] = set()
    for layer in LAYERS:
        for room in sorted(layer & rooms()):
            assert own_imports(room) <= below, f"{room} imports {sorted(own_imports(room) - below)}, not below it"
        below |= layer


def test_the_chain_of_the_model() -> None:
    """The reader of imports sees what is there."""
    assert own_imports("nn.attention") == set()
    assert own_imports("nn.positions") == own_imports("nn.blocks") == {"nn.attention"}
    assert own_imports("nn.memory") == {"nn.attention", "nn.blocks"}
    assert own_imports("network") >= {"nn.attention", "nn.blocks", "config", "nn.memory", "nn.positions"}
    assert own_imports("model") >= {"network", "generation"}
    for room in ("interface", "network", "causal", "generation", "model"):
        assert not any(known.startswith("replay") for known in own_imports(room)), "the model does not know the engine"
    assert own_imports("rollouts") >= {"interface", "wavefront", "replay"}


def test_no_room_is_too_large() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 700, file.name


def test_the_replay_engine_imports_torch_alone(tmp_path: Path) -> None:
    files = sorted((PACKAGE / "replay").glob("*.py"))
    roots = {name.split(".")[0] for file in files for name in imports(file)}
    assert roots - set(sys.stdlib_module_names) == {"torch", "memformer"}
    assert all(own <= rooms_of_replay() for own in map(own_imports, rooms_of_replay()))
    # So the folder can be carried elsewhere and used by itself, under another name.
    shutil.copytree(PACKAGE / "replay", tmp_path / "carried")
    code = "import sys, carried; print(carried.memory_replay.__name__, 'memformer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("memory_replay False\n", "")


def rooms_of_replay() -> set[str]:
    return {room for room in rooms() if room.split(".")[0] == "replay"}


def test_the_package_is_light() -> None:
    heavy = ["transformers", "matplotlib", "tyro"]
    code = f"import sys, memformer; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
