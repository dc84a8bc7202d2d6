"""What the README and the documents show is so: their examples run as they stand, their names exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_has_its_examples():
    assert len(EXAMPLES) == 5
    assert "memory_replay_backprop(model" in EXAMPLES[2]


@pytest.mark.parametrize("number", range(5))
def test_a_readme_example_runs_as_it_stands(number, tmp_path):
    # In a process of its own, with all cores and none of this suite's settings.
    done = subprocess.run([sys.executable, "-W", "error", "-c", EXAMPLES[number]], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_names_in_the_paper_table_exist():
    table = (ROOT / "docs" / "paper-to-code.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(memformer(?:\.\w+)+)`", table))
    assert len(names) > 12
    for name in names:
        assert resolves(name), name
    assert not resolves("memformer.nn.memory.forget")


def resolves(name: str) -> bool:
    parts = name.split(".")
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
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
