"""What the README and the site show is so: their code runs, their commands parse, their names and links exist.

A page's Python blocks run in order, in one process of their own. ``memformer`` commands are parsed by the real parser,
and not run. A comment above a block says what else is to be done with it:

    <!-- not run: WHY -->    the block is not run; the memformer commands in it are parsed all the same
    <!-- prints -->          the text block is exactly what the Python block before it prints
    <!-- setup CODE -->      Python that a reader need not see, on lines of its own
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro
from benchmarks import __main__ as benchmarks

from memformer import replay, settings
from memformer.cli import parsing

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
MARKS = {"gru": [pytest.mark.thorough], "remember": [pytest.mark.thorough], "texts": [pytest.mark.slow]}
"""Of notebooks that take more than ten seconds on one core."""
INTERNAL = {"__init__", "__main__", "bench", "cli"}
INTERNAL |= {"checks", "device", "files", "folders", "learning_rate", "parallel", "pictures"}
"""Modules and folders of the package that nobody needs to import: they have no page of reference."""
CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
LANGUAGES = {"python", "bash", "yaml", "text", ""}
SEPARATOR = "\x1e"


class Block(NamedTuple):
    """A fenced block of a page; ``line`` is that of its first line, from 0."""

    language: str
    code: list[str]
    line: int
    note: str


def blocks_of(text: str) -> list[Block]:
    lines, found = text.splitlines(), []
    opened: int | None = None
    for i, line in enumerate(lines):
        if line.startswith("<!-- setup"):
            end = next(j for j in range(i, len(lines)) if lines[j].endswith("-->"))
            found.append(Block("python", lines[i + 1 : end], i + 1, "setup"))
        elif re.match(r"\s*```", line):
            if opened is not None:
                note = re.fullmatch(r"<!-- (prints|not run: .+) -->", lines[opened - 1].strip() if opened else "")
                language = lines[opened].strip().strip("`")
                found.append(Block(language, lines[opened + 1 : i], opened + 1, note[1] if note else ""))
            opened = None if opened is not None else i
    assert opened is None, f"line {opened}: a block without an end"
    return found


def script_of(blocks: list[Block]) -> tuple[str, dict[int, str]]:
    """A page's Python at the lines where it stands on the page, and what its blocks print, by their numbers.

    The script prints a separator after each block.
    """
    lines = [""] * (max(block.line + len(block.code) for block in blocks) + 1)
    printed, count = {}, 0
    for block in blocks:
        if block.language == "python" and not block.note.startswith("not run"):
            end = block.line + len(block.code)
            lines[block.line : end + 1] = [*block.code, f"print({SEPARATOR!r}, end='')"]
            count += 1
        elif block.note == "prints":
            printed[count - 1] = "\n".join(block.code)
    return "\n".join(lines), printed


def commands_of(code: list[str]) -> list[list[str]]:
    """The commands of a shell block, one list of words each; comments are left out."""
    joined = "\n".join(code).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [part for line in words if line for part in _split(line)]


def _split(words: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "|", ";"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def arguments_of(command: list[str]) -> list[str] | None:
    """What a command gives to memformer or to the benchmarks, whose name then comes first; None for other commands."""
    words = [word for word in command if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    if words[:1] in (["memformer"], [".venv/bin/memformer"]):
        return words[1:]
    if words[:3] == ["python", "-m", "benchmarks"]:
        return words[2:]
    if words[:1] == ["torchrun"] and "memformer" in words:
        return words[words.index("memformer") + 1 :]
    return None


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(b.language == language for b in blocks_of(page.read_text(encoding="utf-8")))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_blocks_are_found_where_they_stand():
    page = "a\n<!-- setup\nx = 1\n-->\n```python\nprint(x)\n```\n<!-- prints -->\n```text\n1\n```\n```bash\nls\n```\n"
    blocks = blocks_of(page)
    assert [(b.language, b.line, b.note) for b in blocks] == [
        ("python", 2, "setup"), ("python", 5, ""), ("text", 9, "prints"), ("bash", 12, ""),
    ]  # fmt: skip
    code, printed = script_of(blocks)
    assert (code.splitlines()[2], printed) == ("x = 1", {1: "1"})
    assert commands_of(["a \\", "  b | c && d 'e f'  # no", "# no"]) == [["a", "b"], ["c"], ["d", "e f"]]
    assert arguments_of(["X=1", "torchrun", "-m", "memformer", "train"]) == ["train"]
    assert arguments_of(["python", "-m", "benchmarks", "text"]) == ["benchmarks", "text"]
    assert arguments_of(["ls", "memformer"]) is None


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_the_python_of_a_page_runs(page, tmp_path):
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    script = tmp_path / page.name
    code, printed = script_of(blocks)
    script.write_text(code, encoding="utf-8")
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=tmp_path / "work", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outputs = done.stdout.split(SEPARATOR)
    assert {number: outputs[number].strip() for number in printed} == {n: text.strip() for n, text in printed.items()}


@pytest.mark.parametrize("page", pages_with("bash"), ids=name)
def test_the_commands_of_a_page_parse(page):
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language == "bash":
            for command in commands_of(block.code):
                arguments = arguments_of(command)
                where = f"{name(page)}:{block.line + 1}: {shlex.join(command)}"
                if arguments is not None:
                    assert parses(arguments), where
                else:
                    assert block.note.startswith("not run") or command[0] in ("git", "cd"), f"{where}: say why not"
                    files = [word for word in command if re.fullmatch(r"(examples|benchmarks|tests)/\S+\.py", word)]
                    assert all((ROOT / file).is_file() for file in files), where


def parses(arguments: list[str]) -> bool:
    try:
        if arguments[:1] == ["benchmarks"]:
            tyro.cli(benchmarks._COMMAND, args=arguments[1:], config=CONFIG)
        else:
            # What a run left behind cannot be looked up here: the flags are parsed against the defaults.
            looked_up = {"--resume": "--auto-resume", "--init-from": "--offload"}
            parsing.parse([looked_up.get(word, word) for word in arguments])
    except (SystemExit, ValueError):
        return False
    return True


def test_a_wrong_command_does_not_parse():
    assert parses(["train", "--data", "x", "--steps", "3"])
    assert not parses(["train", "--stepps", "3"])
    assert not parses(["bench", "lern"])
    assert parses(["benchmarks", "loader", "--runs", "3"])
    assert not parses(["benchmarks", "loader", "--rns", "3"])


def test_the_settings_shown_are_settings(tmp_path):
    for page in pages_with("yaml"):
        for block in blocks_of(page.read_text(encoding="utf-8")):
            if block.language == "yaml":
                (tmp_path / "run.yaml").write_text("\n".join(block.code))
                settings.read_yaml(tmp_path / "run.yaml", settings.TrainingConfig())


def test_there_is_no_other_kind_of_block():
    for page in PAGES:
        for block in blocks_of(page.read_text(encoding="utf-8")):
            assert block.language in LANGUAGES, f"{name(page)}:{block.line}: {block.language}"


def code_of(cell: dict) -> str:
    """A notebook's cell as plain Python; what begins with %%bash is run by bash."""
    source = "".join(cell["source"])
    if source.startswith("%%bash\n"):
        shell = source.removeprefix("%%bash\n")
        return f"import subprocess; subprocess.run(['bash', '-euo', 'pipefail', '-c', {shell!r}], check=True)"
    return source


@pytest.mark.parametrize("notebook", [pytest.param(n, marks=MARKS.get(n.stem, []), id=n.stem) for n in NOTEBOOKS])
def test_a_notebook_runs_as_it_stands(notebook, tmp_path, monkeypatch):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [code_of(cell) for cell in cells if cell["cell_type"] == "code"]
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    warnings = ["-W", "error", "-W", "ignore:FigureCanvasAgg is non-interactive"]
    done = subprocess.run(
        [sys.executable, *warnings, "-c", "\n\n".join(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_notebooks_are_committed_with_their_output():
    assert {n.stem for n in NOTEBOOKS} == {"gru", "remember", "texts", "state"}
    for notebook in NOTEBOOKS:
        cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in cells), f"{notebook.name}: make notebooks"
        assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
        for cell in cells:
            if cell["source"][0] == "%%bash\n":
                commands = [arguments_of(c) for c in commands_of("".join(cell["source"][1:]).splitlines())]
                assert all(parses(arguments) for arguments in commands if arguments), notebook.name


def test_each_public_module_has_a_page():
    package = Path(importlib.import_module("memformer").__file__).parent
    shown = {
        match
        for page in (DOCS / "reference").glob("*.md")
        for match in re.findall(r"^::: (memformer[\w.]*)$", page.read_text(), re.MULTILINE)
    }
    parts = {part.stem for part in package.iterdir() if part.suffix == ".py" or (part / "__init__.py").is_file()}
    missing = {f"memformer.{part}" for part in parts - INTERNAL if not part.startswith("_")} - shown
    missing = {m for m in missing if not any(other.startswith(f"{m}.") for other in shown)}
    assert not missing, f"no page in docs/reference: {sorted(missing)}"
    for module in shown:
        importlib.import_module(module)


def test_the_page_of_the_engine_shows_all_of_it():
    page = (DOCS / "reference" / "replay.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^        - (\w+)$", page, re.MULTILINE)) == set(replay.__all__)


def test_the_names_in_the_paper_table_exist():
    table = (DOCS / "paper-to-code.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(memformer(?:\.\w+)+)`", table))
    assert len(names) > 12
    for each in names:
        assert resolves(each), each
    assert not resolves("memformer.nn.memory.forget")


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_the_links_in_the_documents_lead_somewhere():
    made = {"contributing.md", "changelog.md"}  # by docs/hooks.py
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)(?:\{[^}]*\})?", page.read_text(encoding="utf-8")):
            if "://" not in target and target not in made:
                assert (page.parent / target).exists(), f"{name(page)}: {target}"
