"""Which files of a folder are data: patterns, a run's own files, links, names that are not UTF-8."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memformer.data import fingerprint, held_out_split, read_documents


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def names(*paths: Path, **how: Any) -> list[str]:
    return [document.name for document in read_documents(paths, **how)]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.txt"], [], ["a.txt", "books/b.txt", "books/drafts/c.txt"]),
        (["**/*.txt"], [], ["a.txt", "books/b.txt", "books/drafts/c.txt"]),
        (["books/*"], [], ["books/b.md", "books/b.txt", "books/drafts/c.txt"]),
        (["books/*"], ["drafts"], ["books/b.md", "books/b.txt"]),
        ([], ["books/"], ["a.txt"]),
        ([], ["*.md", "drafts/"], ["a.txt", "books/b.txt"]),
        (["b.*"], [], ["books/b.md", "books/b.txt"]),
    ],
)
def test_patterns(tmp_path: Path, include: list[str], exclude: list[str], expected: list[str]) -> None:
    write(tmp_path, "a.txt", "books/b.txt", "books/b.md", "books/drafts/c.txt")
    assert names(tmp_path, include=include, exclude=exclude) == expected


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    for how in ({"include": ["*.text"]}, {"exclude": ["*.text"]}, {"include": ["*.txt"], "exclude": ["*.text"]}):
        with pytest.raises(ValueError, match=r"the pattern '\*\.text' matches no file in "):
            names(tmp_path, **how)
    with pytest.raises(ValueError, match=r"the pattern '\*\.txt' matches no file because no folder was given"):
        names(tmp_path / "a.txt", include=["*.txt"])


def test_patterns_that_leave_nothing_are_named(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    with pytest.raises(ValueError, match=r"no text found in .*; include and exclude together leave no file"):
        names(tmp_path, include=["*.txt"], exclude=["a.*"])


def test_what_the_datasets_library_made_of_rows_is_not_read_beside_them(tmp_path: Path) -> None:
    """A map of rows that were saved to disk lies in their folder, so each text was there twice."""
    pyarrow = pytest.importorskip("pyarrow")
    for name in ("data-00000-of-00001", "cache-25f4fb2c0e7313b1", "cache-25f4fb2c0e7313b1_00001_of_00004"):
        table = pyarrow.table({"text": ["one", "two"]})
        with pyarrow.ipc.new_stream(tmp_path / f"{name}.arrow", table.schema) as stream:
            stream.write_table(table)
    expected = (
        r"^files left out: 2 files of rows that the datasets library made from others \(such as .*/cache-\w+\.arrow\)$"
    )
    with pytest.warns(UserWarning, match=expected):
        assert names(tmp_path) == ["data-00000-of-00001.arrow:1", "data-00000-of-00001.arrow:2"]
    assert len(names(tmp_path, include=["cache-*"])) == 4
    assert len(names(tmp_path / "cache-25f4fb2c0e7313b1.arrow")) == 2


def test_markup_is_text_where_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "a.html", "b.txt")
    assert names(tmp_path, include=["*.html"]) == ["a.html"]


def test_what_a_run_wrote_is_no_data(tmp_path: Path) -> None:
    write(
        tmp_path, "a.txt", "runs/default/run.yaml", "runs/default/metrics.jsonl", "runs/default/step-000004/config.json"
    )
    write(tmp_path, "kept/training.json", "kept/training.safetensors", "kept/config.json", "kept/tokenizer.json")
    write(tmp_path, "new/metrics.jsonl", "run.yaml/not-a-run.txt")
    with pytest.warns(UserWarning, match=r"3 folders of a run, whose own files are no data"):
        assert names(tmp_path, out=tmp_path / "new") == ["a.txt", "run.yaml/not-a-run.txt"]


def test_token_files_in_a_folder_are_to_be_given_themselves(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "old/tokens.json", "old/tokens.bin", "old/documents.jsonl", "old/tokenizer.json")
    with pytest.warns(UserWarning, match=r"1 folder of token files, to be given themselves \(.*old\)"):
        assert names(tmp_path) == ["a.txt"]


def test_a_run_beside_its_data(tmp_path: Path) -> None:
    """As with ``--data . --out .``: the same documents before and after."""
    write(tmp_path, "a.txt", "b/best/c.txt")
    before = fingerprint(read_documents(tmp_path, exclude=["none*", "a.md"], all_match=False))
    write(tmp_path, "run.yaml", "metrics.jsonl", "step-000004/config.json", "best/config.json", "tensorboard/events")
    with pytest.warns(UserWarning, match="1 folder of a run"):
        assert fingerprint(read_documents(tmp_path)) == before


def test_a_link_to_a_file_of_the_folder_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    try:
        (tmp_path / "latest.txt").symlink_to("a.txt")
    except OSError:
        pytest.skip("no links here")
    with pytest.warns(UserWarning, match=r"1 link to files that are read already \(.*latest\.txt\)"):
        assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere", r"1 that cannot be opened \(.*link: No such file or directory\)"),
        ("link", r"1 that cannot be opened \(.*link: Too many levels of symbolic links\)"),
        (".", r"1 link to folders, where nothing is looked for \(.*link\)"),
    ],
)
def test_a_link_that_gives_nothing_is_counted(tmp_path: Path, target: str, said: str) -> None:
    """What a tool such as DVC or git-annex has not fetched is missing text."""
    write(tmp_path, "a.txt")
    try:
        (tmp_path / "link").symlink_to(target)
    except OSError:
        pytest.skip("no links here")
    with pytest.warns(UserWarning, match=said):
        assert names(tmp_path) == ["a.txt"]
    with pytest.raises(ValueError, match=f"strict: files left out: {said}"):
        names(tmp_path, strict=True)
    assert names(tmp_path, strict=True, exclude=["link"]) == ["a.txt"]


def test_a_folder_that_may_be_listed_and_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not stop the reading of the others."""
    write(tmp_path, "a.txt", "closed/b.txt")
    status = Path.stat

    def refuse(self: Path, **options: Any) -> os.stat_result:
        if self.parent.name == "closed":
            raise PermissionError(13, "Permission denied", str(self))
        return status(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.warns(UserWarning, match=r"1 that cannot be opened \(.*b\.txt: Permission denied\)"):
        assert names(tmp_path) == ["a.txt"]


def test_a_compressed_copy_is_left_out(tmp_path: Path) -> None:
    """One of the two might be held out, and the other trained on."""
    write(tmp_path, "a.txt", "a.txt.gz")
    with pytest.warns(UserWarning, match=r"1 compressed twin of files beside them \(.*a\.txt\.gz\)"):
        assert names(tmp_path) == ["a.txt"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("one")
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")).write_text('{"text": "two"}\n{"text": "three"}')
    except (OSError, UnicodeError):
        pytest.skip("this file system takes none")
    documents = read_documents(tmp_path)
    assert [d.name for d in documents] == ["caf\\udce9.txt", "\\udcff.jsonl:1", "\\udcff.jsonl:2"]
    fingerprint(documents)
    training, held_out = held_out_split(documents)
    assert len(training) + len(held_out) >= 3
    (tmp_path / documents[0].name).write_text("")
    with pytest.raises(ValueError, match=r"caf\\udce9\.txt: empty"):
        read_documents(tmp_path / documents[0].name)


def test_token_ids_beside_text(tmp_path: Path) -> None:
    """A foreign array does not spoil a corpus of texts, nor a README one of arrays."""
    write(tmp_path, "README.md")
    np.arange(40, dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.warns(UserWarning, match=r"^files left out: 1 token ids beside text \(.*a\.bin\)$"):
        assert names(tmp_path, content="text") == ["README.md"]
    with pytest.warns(UserWarning, match=r"1 text beside token ids \(.*README\.md\)"):
        assert names(tmp_path, content="ids") == ["a.bin"]
    assert names(tmp_path) == ["README.md", "a.bin"]
    assert names(tmp_path / "README.md", tmp_path / "a.bin", content="text") == ["README.md", "a.bin"], "both are named"
    (tmp_path / "README.md").unlink()
    assert names(tmp_path, content="text") == ["a.bin"], "to be refused by the tokenizer, with what to do"


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "closed/b.txt")
    (tmp_path / "closed").chmod(0)
    try:
        if os.access(tmp_path / "closed", os.R_OK):
            pytest.skip("this user may read anything")
        with pytest.warns(UserWarning, match=r"1 folder that cannot be read \(.*closed\)"):
            assert names(tmp_path) == ["a.txt"]
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_strict_refuses_what_would_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.zip")
    with pytest.raises(ValueError, match=r"b\.zip: an archive"):
        names(tmp_path, strict=True)
    (tmp_path / "b.zip").unlink()
    write(tmp_path, "c/run.yaml")
    with pytest.raises(ValueError, match="strict: files left out: 1 folder of a run"):
        names(tmp_path, strict=True)


def test_one_path_alone_and_what_is_no_path(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    expected = ["a.txt"]
    for one in (tmp_path, str(tmp_path), str(tmp_path / "a.txt"), [str(tmp_path)], (tmp_path,), {tmp_path}):
        assert [d.name for d in read_documents(one)] == expected
    for wrong, got in (
        (5, "int"),
        ([1, "a"], r"\['int', 'str'\]"),
        (b"a", "bytes"),
        ({"a": 1}, "dict"),
        (None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"data: expected a path, or a list of paths, got {got}"):
            read_documents(wrong)  # type: ignore[arg-type]
    for empty in ("", ["a", ""]):
        with pytest.raises(ValueError, match="data: expected a path, got an empty one: is a variable"):
            read_documents(empty)
    with pytest.raises(ValueError, match="no text found in no path at all"):
        read_documents([])
