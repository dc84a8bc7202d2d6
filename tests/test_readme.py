"""The README keeps its promises that no other page makes; its code and its links are tested with the documents."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_shows_memory_replay_as_the_earlier_library_does():
    call = "loss, mems = memory_replay_backprop(model, src = seq, tgt = tgt, src_mask = seq_mask, tgt_mask = tgt_mask)"
    assert call in README


def test_the_two_commands_are_where_ci_looks_for_them():
    for marker, ends in {
        "install and train": "memformer train --recipe causal-tiny",
        "install and test": "make check",
    }.items():
        after = README.split(f"<!-- {marker} -->")[1]
        command = re.search(r"```bash\n(.*?)\n```", after, re.DOTALL)[1]
        assert command.startswith("python3 -m venv .venv && ")
        assert command.endswith(ends)


def test_each_file_of_the_tree_exists():
    folders: list[str] = []
    named = []
    for line in re.search(r"```text\n(src/.*?)```", README, re.DOTALL)[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name]
        named.append("".join(folders))
    assert len(named) > 15
    for path in named:
        assert (ROOT / path).exists(), path
    package = {f"src/memformer/{p.name}{'/' * p.is_dir()}" for p in (ROOT / "src" / "memformer").glob("[a-z]*")}
    assert package - {"src/memformer/py.typed"} <= set(named), "a file without its line"
