"""The package as others meet it: its metadata, its exported names, and the earlier library that has the same name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import memformer
from memformer import cli

ROOT = Path(__file__).parent.parent
PACKAGE = Path(memformer.__file__).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
REFERENCE = ROOT / "docs" / "reference"

DEVELOPMENT = {"dev", "docs", "notebooks"}
"""The extras of those who work on this package."""
INSIDE = {"bench", "checks", "cli", "device", "files", "folders", "learning_rate", "parallel", "pictures"}
"""Nothing here is for users to call; commands are described by their ``--help``."""

# --- Metadata


def test_the_version_is_written_once() -> None:
    file = ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]
    written = re.findall(r'^__version__ = "(.+)"$', file.read_text(encoding="utf-8"), re.MULTILINE)
    assert written == [memformer.__version__]
    assert "version" in PROJECT["dynamic"]
    assert [f for f in (ROOT / "src").rglob("*.py") if f'"{memformer.__version__}"' in f.read_text()] == [file]


def test_the_command_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"memformer {memformer.__version__}\n"


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if line)}


def test_the_lower_bounds_are_those_that_are_tested() -> None:
    with_users = [PROJECT["dependencies"], *(lines for extra, lines in EXTRAS.items() if extra not in DEVELOPMENT)]
    wanted = [Requirement(line) for lines in with_users for line in lines]
    bounds = {canonicalize_name(r.name): str(r.specifier).removeprefix(">=") for r in wanted}
    tested = pins("constraints-oldest.txt")
    assert tested.keys() == bounds.keys()
    for name, version in tested.items():
        assert re.fullmatch(re.escape(bounds[name]) + r"(\.0)*", version), f"{name}: {bounds[name]}, tested: {version}"


def test_what_development_installs_is_pinned() -> None:
    wanted = {Requirement(line) for lines in [PROJECT["dependencies"], *EXTRAS.values()] for line in lines}
    names = {canonicalize_name(r.name) for r in wanted} - {PROJECT["name"]}
    pinned = pins("constraints.txt")
    assert names <= pinned.keys()
    for requirement in wanted:
        if requirement.name != PROJECT["name"]:
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_what_messages_say_to_install_is_there() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    said = [re.findall(r"pip install '([\w-]+)\[(\w+)\]'", file.read_text(encoding="utf-8")) for file in files]
    assert sum(map(len, said)) > 4
    for name, extra in {pair for pairs in said for pair in pairs}:
        assert (name, extra in EXTRAS) == (PROJECT["name"], True), f"{name}[{extra}]"


# --- Exported names


MODULES = ["memformer", *(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "memformer."))]
PUBLIC = [name for name in MODULES if "._" not in name]


def exported() -> list[tuple[str, str]]:
    return [(module, name) for module in PUBLIC for name in getattr(importlib.import_module(module), "__all__", ())]


def definition(module: str, name: str) -> tuple[str, str | None]:
    """The module where a name is made, and the text that stands with it there, if any.

    That is a docstring, or a string below an assignment. What a class inherits or a dataclass makes up does not count.
    """
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    top = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    body = [inner for node in top for inner in (node.body if isinstance(node, ast.If) else [node])]  # TYPE_CHECKING
    for node, below in zip(body, [*body[1:], None], strict=True):
        match node:
            case ast.FunctionDef() | ast.ClassDef() if node.name == name:
                return module, ast.get_docstring(node)
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if name in {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}:
                    match below:
                        case ast.Expr(value=ast.Constant(value=str(text))):
                            return module, text
                    return module, None
            case ast.ImportFrom():
                package = module if spec.submodule_search_locations else module.rpartition(".")[0]
                source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                for original in (alias.name for alias in node.names if (alias.asname or alias.name) == name):
                    if f"{source}.{original}" in MODULES:
                        return f"{source}.{original}", importlib.import_module(f"{source}.{original}").__doc__
                    return definition(source, original)
    raise AssertionError(f"{module}: {name} is exported, and not made or imported at its top level")


def test_the_exported_names_are_there() -> None:
    assert {"memformer.replay", "memformer.model", "memformer.cli"} <= set(PUBLIC)
    assert len(exported()) > 150
    for module in PUBLIC:
        found = importlib.import_module(module)
        names = list(getattr(found, "__all__", ()))
        assert len(names) == len(set(names)), module
        assert [name for name in names if not hasattr(found, name)] == [], module


def test_every_exported_name_has_a_docstring() -> None:
    assert [f"{module}.{name}" for module, name in exported() if not definition(module, name)[1]] == []


def test_every_exported_name_has_a_page() -> None:
    """The reference has a block ``::: module`` for the module that exports a name, or for the one that makes it."""
    pages = [page.read_text(encoding="utf-8") for page in REFERENCE.rglob("*.md")]
    blocks = {block for page in pages for block in re.findall(r"^::: +(\S+)$", page, re.MULTILINE)}
    missing = []
    for module, name in exported():
        source = definition(module, name)[0]
        if for_users(module) and not {module, source, f"{module}.{name}", f"{source}.{name}"} & blocks:
            missing.append(f"{module}.{name}")
    assert missing == []


def for_users(module: str) -> bool:
    """Whether the names of a module are to be imported from it: not from inside a package that exports its own."""
    package, _, room = module.rpartition(".")
    return (package == "memformer" and room not in INSIDE) or package == "memformer.nn"


# --- The earlier library


def pretend(folder: Path, name: str, version: str, *files: str) -> None:
    """What pip leaves behind of a distribution with these files."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()


def look(monkeypatch: pytest.MonkeyPatch, first: Path, file: Path = PACKAGE / "_installation.py") -> None:
    """What is looked at on importing the package, with a folder first on the path."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(first))
        runpy.run_path(str(file))


def test_the_earlier_library_in_the_same_folder_is_an_error(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "memformer", ignore=shutil.ignore_patterns("__pycache__"))
    pretend(tmp_path, "memformer", "0.3.1", "memformer/memformer.py", "memformer/mrbp.py")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import memformer"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: memformer: the earlier library of this name (distribution memformer 0.3.1) is installed in the "
        f"same folder, {tmp_path}, and the two have overwritten files of each other. Uninstall both (pip uninstall "
        "memformer memformer-replay), then install the one that you want"
    )


def test_the_earlier_library_in_another_folder_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(tmp_path, "memformer", "0.3.1", "memformer/memformer.py")
    expected = (
        rf"\(distribution memformer 0\.3\.1\) is installed too, in {re.escape(str(tmp_path))}; what is imported is "
        rf"memformer-replay, from {re.escape(str(PACKAGE.parent))}"
    )
    with pytest.warns(UserWarning, match=expected):
        look(monkeypatch, tmp_path)


def test_without_the_earlier_library_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where it is not installed, nor where this library was installed under its name, before it had its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(monkeypatch, tmp_path)
        pretend(tmp_path, "memformer", "1.0.0.dev0", "memformer/replay.py")
        look(monkeypatch, tmp_path)
