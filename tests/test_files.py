"""Files that are replaced whole or not at all, and the curve of learning rates."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memformer.files import flush_to_disk, replace_file
from memformer.learning_rate import warmup_cosine


@pytest.mark.parametrize("content", ["één\n", b"\x00\xff"])
def test_a_file_is_replaced(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    replace_file(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [*tmp_path.iterdir()] == [file]


def test_a_file_that_cannot_be_written_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        replace_file(file, "after")
    assert file.read_text() == "before"
    assert [*tmp_path.iterdir()] == [file]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "target").write_text("before")
    replace_file(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "after"


def test_a_platform_that_opens_no_folder_flushes_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    flush_to_disk(tmp_path)
    opened = os.open

    def refuse(path: Path, flags: int) -> int:
        if path.is_dir() or path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return opened(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    flush_to_disk(tmp_path)
    flush_to_disk(tmp_path / "a.txt")
    with pytest.raises(PermissionError):
        flush_to_disk(tmp_path / "b.txt")


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine() -> None:
    rates = [warmup_cosine(step, 1000, 300) for step in range(1001)]
    assert rates[:300] == pytest.approx([(step + 1) / 300 for step in range(300)])
    assert rates[299:] == sorted(rates[299:], reverse=True)
    assert rates[650] == pytest.approx(0.5)
    assert rates[1000] == pytest.approx(0, abs=1e-12)
    assert warmup_cosine(650, 1000, 300, least=0.1) == pytest.approx(0.55)
    assert warmup_cosine(999, 1000, 300, least=0.1) == pytest.approx(0.1, abs=1e-4)
    assert warmup_cosine(0, 1, 50) == 1, "a single step has the peak rate"
