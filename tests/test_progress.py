"""What a training shows: on terminals of all widths, in pipes, in files, and where nobody listens."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memformer.checks import plural
from memformer.cli import main
from memformer.cli.progress import Lines, Status, duration, shown
from memformer.training import StepMetrics, checkpoints

SMALL = [
    "--steps", "4", "--dim", "16", "--slots", "2", "--enc-depth", "1", "--dec-depth", "1", "--heads", "2",
    "--lanes", "2", "--segment-length", "8", "--horizon", "2", "--log-every", "2", "--sample-tokens", "20",
]  # fmt: skip
TRAIN = ["train", "--out", "my run", *SMALL, "--data", "déjà vu.txt"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "déjà vu.txt").write_text("Wer lernt, möchte sehen, wie es geht. " * 30, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line_of(step: int, **changes: Any) -> StepMetrics:
    numbers = dict(
        step=step, loss_nats=2.3456, bits_per_token=3.384, tokens_per_second=12345.6, learning_rate=3e-3,
        gradient_norm=0.5, horizon=6, memory_gradient=None, self_attention=0.5, slot_diversity=0.5, seconds_left=83.0,
    )  # fmt: skip
    return StepMetrics(**{**numbers, **changes})


# --- A terminal


class Clock:
    """The time as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("memformer.cli.progress.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class FakeRun:
    step, settings, parts, stopped = 0, None, None, False

    def stop(self) -> None:
        self.stopped = True


def status_at(step: int, clock: Clock, **changes: Any) -> Status:
    status = Status(1200)
    status.start(FakeRun())  # type: ignore[arg-type]
    status.phase("training", step, 1200)
    status.metrics("step", line_of(step, **changes))
    return status


def test_the_line_at_all_widths(clock: Clock) -> None:
    status = status_at(120, clock)
    full = "120/1200  10%  [##..................]  2.346 nats  12,346 tokens/s  1:23 left"
    assert status.line(len(full)) == full
    assert status.line(50) == "120/1200  10%  2.346 nats  1:23 left"
    assert status.line(39) == "120/1200  10%  2.346 nats  1:23 left"
    assert status.line(32) == "120/1200  2.346 nats  1:23 left"
    assert status.line(20) == "120/1200  1:23 left"
    assert status.line(10) == "120/1200"
    assert all(len(status_at(step, clock).line(width)) <= width for step in (0, 1, 1200) for width in range(130))


def test_the_line_of_large_numbers_keeps_the_step_and_the_time_left(clock: Clock) -> None:
    status = Status(400_000)
    status.start(FakeRun())  # type: ignore[arg-type]
    status.phase("training", 123_456, 400_000)
    status.metrics("step", line_of(123_456, tokens_per_second=1_234_567.0, seconds_left=300_000.0))
    assert status.line(40) == "123456/400000  2.346 nats  3 d 11 h left"
    assert status.line(39) == "123456/400000  31%  3 d 11 h left"


def test_the_line_moves_each_second(clock: Clock) -> None:
    status = Status(1200)
    seen = []
    for name in ("reading", "training a BPE", "encoding", "training"):
        status.phase(name)
        for _ in range(3):
            seen.append(status.line(79))
            clock.now += 1
    status.start(FakeRun())  # type: ignore[arg-type]
    status.metrics("step", line_of(1))
    for _ in range(3):
        seen.append(status.line(79))
        clock.now += 1
    status.phase("evaluating", 3, 12)
    seen.append(status.line(79))
    assert len(set(seen)) == len(seen)
    assert seen[:5] == [
        "reading, 0:00",
        "reading, 0:01",
        "reading, 0:02",
        "training a BPE, 0:00",
        "training a BPE, 0:01",
    ]
    assert "2.346 nats" in seen[-2]
    assert "1:21 left" in seen[-2]
    assert "evaluating 3/12, 0:00" in seen[-1]


def test_the_first_step_is_not_what_the_rest_is_judged_by(clock: Clock) -> None:
    """Its line stays until the next one, which may be a minute; the loss says so, and the time left is measured."""
    status = status_at(1, clock, seconds_left=60.0)
    assert status.line(79).endswith("2.346 nats at step 1  12,346 tokens/s  1:00 left")
    status.phase("training", 11, 1200)
    clock.now += 20
    assert status.line(79).endswith("39:38 left")  # 1,189 steps of 2 s
    status.metrics("step", line_of(50))
    assert "step 1" not in status.line(79)
    assert status.line(79).endswith("1:23 left")


def test_lasting_longer_than_thought(clock: Clock) -> None:
    status = status_at(10, clock, seconds_left=2.0)
    clock.now += 60
    assert "0:00 left" in status.line(79)


def test_durations() -> None:
    assert [duration(s) for s in (0, 7.4, 59.6, 3599, 3600, 86399, 86400, 1e6)] == [
        "0:00", "0:07", "1:00", "59:59", "1:00:00", "23:59:59", "1 d 0 h", "11 d 13 h",
    ]  # fmt: skip


@pytest.fixture
def pty_size() -> Iterator[tuple[int, int]]:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize(("terminal", "moves"), [("xterm", True), ("dumb", False)])
def test_a_terminal_has_a_line_that_moves_and_a_dumb_one_plain_lines(
    monkeypatch: pytest.MonkeyPatch, pty_size: tuple[int, int], terminal: str, moves: bool
) -> None:
    monkeypatch.setenv("TERM", terminal)
    with os.fdopen(os.dup(pty_size[1]), "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        with shown(10) as display:
            assert isinstance(display, Status) == moves


def test_no_terminal_has_plain_lines_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with shown(10) as display:
        assert type(display) is Lines


# --- Lines


def test_lines_have_the_time_left(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    lines = Lines(1200)
    lines.metrics("step", line_of(50))
    lines.metrics("step", line_of(60, seconds_left=None))
    lines.sample("A line\nand a second one, which is longer than what is shown of it here.", 60)
    assert capsys.readouterr().out.splitlines() == [
        "    50/1200  2.346 nats  3.384 bits/token  12,346 tokens/s  gradient 0.50  rate 3.0e-03  1:23 left",
        "    60/1200  2.346 nats  3.384 bits/token  12,346 tokens/s  gradient 0.50  rate 3.0e-03",
        "    60/1200  sample: 'A line\\nand a second one, which is longer than what is sho...'",
    ]


def test_long_work_says_from_time_to_time_how_far_it_is(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    lines = Lines(1200)
    lines.phase("reading")
    lines.phase("encoding", 0, 30_000)
    for done in range(1, 26):
        clock.now += 1
        lines.phase("encoding", done * 1000, 30_000)
    lines.start(FakeRun())  # type: ignore[arg-type]
    lines.phase("training", 1, 1200)
    lines.phase("saving")
    assert capsys.readouterr().out.splitlines() == ["encoding 0% ...", "encoding 37% ...", "encoding 73% ..."]


def test_a_listener_who_leaves_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*_: object, **__: object) -> None:
        raise BrokenPipeError

    lines, run = Lines(10), FakeRun()
    lines.start(run)  # type: ignore[arg-type]
    monkeypatch.setattr("builtins.print", leave)
    lines.metrics("step", line_of(1))
    assert (lines.unheard, run.stopped) == (True, True)


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    lines, run = Lines(10), FakeRun()
    lines.start(run)  # type: ignore[arg-type]
    monkeypatch.setattr("builtins.print", full)
    lines.metrics("step", line_of(1))
    assert (lines.unheard, run.stopped) == (False, False)


def test_numbers_and_their_nouns() -> None:
    assert [plural(n, "document") for n in (0, 1, 2, 1332)] == [
        "0 documents", "1 document", "2 documents", "1,332 documents",
    ]  # fmt: skip


# --- The command


def test_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRAIN, "--sample-every", "2", "--loggers", "tensorboard"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reading     déjà vu.txt"
    assert re.match(
        r"data        1 document \(.* bytes\) in 2 stretches to train on, 1 document \(.* bytes\) held out", lines[1]
    )
    assert [line.split("/")[0].strip() for line in lines if re.match(r" +\d/4  .* left$", line)] == ["1", "2", "4"]
    assert sum("sample: " in line for line in lines) == 2
    assert any(re.fullmatch(r"held out    \d+ tokens of 1 document, read by the model of step 4", x) for x in lines)
    assert any(re.fullmatch(r"took        0:\d\d for \d+ tokens, \d\.\d\d times the .* documents", x) for x in lines)
    assert lines[-2].startswith(f"checkpoint  {Path('my run', 'step-000004')}")
    assert lines[-1] == "  memformer generate --checkpoint 'my run'"
    assert len((folder / "my run" / "samples.jsonl").read_text().splitlines()) == 2


def test_a_finished_training_does_not_fail_by_its_sample(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("memformer.cli.train.write", lambda *_: 1 / 0)
    assert main(TRAIN) == 0
    out, err = capsys.readouterr()
    assert err == "memformer: no sample (ZeroDivisionError: division by zero)\n"
    assert out.splitlines()[-1] == "  memformer generate --checkpoint 'my run'"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "memformer", *arguments]


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
def test_an_encoding_that_lacks_characters(folder: Path, environment: dict[str, str]) -> None:
    (folder / "text.txt").write_text("déjà vu. " * 99, encoding="utf-8")
    arguments = [*TRAIN[:-1], "text.txt" if "LC_ALL" in environment else "déjà vu.txt"]
    done = subprocess.run(command(*arguments), capture_output=True, env={**os.environ, **environment}, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"memformer generate --checkpoint 'my run'" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_no_output_at_all(folder: Path) -> None:
    done = subprocess.run(["bash", "-c", 'exec "$@" >&- 2>&-', "-", *command(*TRAIN)], check=False)
    assert done.returncode == 0
    assert checkpoints.newest(folder / "my run") == Path(folder / "my run" / "step-000004")
    lines = (folder / "my run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 4, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("where", [">/dev/full", "2>/dev/full"])
def test_a_log_on_a_full_disk(folder: Path, where: str) -> None:
    """The run is trained and saved all the same; so is one that is resumed, and one that is stopped."""
    (folder / "more").mkdir()
    for name in ("a.txt", "b.pdf"):  # so that there is a warning
        (folder / "more" / name).write_text("Once upon a time. " * 99)
    start = command(*TRAIN, "more")

    def status(*more: str) -> int:
        script = f'"$@" {where}'
        return subprocess.run(["bash", "-c", script, "-", *start, *more], capture_output=True, check=False).returncode

    assert status() == 0
    assert checkpoints.newest(folder / "my run") == Path(folder / "my run" / "step-000004")
    assert status("--resume", "--steps", "6") == 0
    script = f'"$@" {where} & sleep 6; kill -TERM $!; wait $!'
    long = [*start, "--resume", "--steps", "100000"]
    assert subprocess.run(["bash", "-c", script, "-", *long], capture_output=True, check=False).returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(("steps", "status"), [("100000", 141), ("4", 0)])
def test_a_pipe_that_closes(folder: Path, steps: str, status: int) -> None:
    """In the middle: the run saves and stops. At its end: it is done."""
    read = "5" if status else "8"
    script = f'"$@" --steps {steps} | head -{read} >/dev/null; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script, "-", *command(*TRAIN)], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    newest = checkpoints.newest(folder / "my run")
    assert newest is not None
    saved = f"stopped and saved at step {int(newest.name.removeprefix('step-'))}. Go on with:"
    said = [f"memformer: whoever read the output has left: {saved}", "  memformer train --resume --out 'my run'"]
    assert done.stderr.splitlines() == (said if status else [])
