"""Trials in processes of their own end with the process that wants them, however it ends. Files of them last."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from memformer.bench import learn, reach, text
from memformer.bench.trials import Record, Report, Result, Trial, Tuned, carry_out, tune


def sleep(trial: Trial) -> Result:
    """Says who is at work, then works for longer than any test."""
    Path(trial["folder"], str(os.getpid())).touch()
    if trial["number"]:
        time.sleep(600)
    return {"done": True}


def alive(pid: int) -> bool:
    """Whether a process is there that has not ended; one that nobody waited for counts as ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def wait_for(folder: Path, count: int) -> list[int]:
    for _ in range(600):
        if len(found := [int(file.name) for file in folder.iterdir()]) >= count:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{count} workers in {folder}")


def gone(workers: list[int]) -> bool:
    for _ in range(100):
        if not any(map(alive, workers)):
            return True
        time.sleep(0.1)
    return False


def trials(folder: Path) -> list[Trial]:
    return [{"folder": str(folder), "number": number} for number in (1, 2)]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who is alive")
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.thorough) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_workers_end_with_the_process_that_started_them(tmp_path: Path, number: int) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom test_trials import *\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    list(carry_out(sleep, trials(Path({str(tmp_path)!r})), Record(None, {{}}), 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers = wait_for(tmp_path, 2)
    parent.send_signal(number)
    assert parent.wait(60) != 0
    assert gone(workers)


def test_whoever_wants_no_more_is_not_kept_waiting(tmp_path: Path) -> None:
    wanted = [{"folder": str(tmp_path), "number": number} for number in (0, 1)]
    results = carry_out(sleep, wanted, Record(None, {}), 2)
    assert next(results) == (wanted[0], {"done": True})
    results.close()


def ends(trial: Trial) -> Result:
    """Two trials are done, and then one is killed."""
    done = Path(trial["folder"])
    if trial["number"] == 2:
        wait_for(done, 2)
        time.sleep(2)  # until their results are where they are looked for
        os.kill(os.getpid(), signal.SIGKILL)
    (done / str(trial["number"])).touch()
    return {"done": True}


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """Among many of those that learn, one may need more memory than there is."""
    wanted = [{"folder": str(tmp_path), "number": number} for number in (0, 1, 2)]
    record = Record(tmp_path.parent / "killed.json", {})
    with pytest.raises(ChildProcessError, match=r"was killed, perhaps for want of memory.*the same command goes on"):
        list(carry_out(ends, wanted, record, 2))
    assert [record.find(trial) for trial in wanted] == [{"done": True}] * 2 + [None]


@pytest.mark.parametrize("content", ['{"settings": [], "runs": []}', '{"settings": "x", "runs": []}', "[]", "junk"])
def test_a_file_of_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match=r"file\.json: not the results of a benchmark"):
        Record(tmp_path / "file.json", {"steps": 1})


def test_two_processes_with_one_file(tmp_path: Path) -> None:
    """One begins while another is at work: each keeps what the other has found."""
    one, other = (Record(tmp_path / "file.json", {"steps": 1}) for _ in range(2))
    for record, seed in ((one, 0), (other, 1), (one, 2)):
        record.add({"seed": seed}, {"right": seed})
    assert [trial["run"]["seed"] for trial in Record(tmp_path / "file.json", {"steps": 1}).trials] == [0, 1, 2]
    (tmp_path / "file.json").write_text('{"settings": {"steps": 2}, "runs": []}')
    with pytest.raises(ValueError, match="holds runs with steps of 2, not 1"):
        one.add({"seed": 3}, {})


def to_the_end(tuning: Generator[str, None, list[Tuned]]) -> tuple[list[str], list[Tuned]]:
    """Its lines, and what it found."""
    lines = []
    while True:
        try:
            lines.append(next(tuning))
        except StopIteration as end:
            return lines, end.value


def meet(trial: Trial) -> Result:
    """Ends when as many seeds are at work as there are."""
    Path(trial["folder"], str(trial["seed"])).touch()
    return {"seeds": sorted(wait_for(Path(trial["folder"]), 2))}


def test_seeds_do_not_wait_for_each_other_where_no_rate_is_chosen(tmp_path: Path) -> None:
    tuning = tune(
        meet,
        [{"folder": str(tmp_path)}],
        learning_rates=[1e-3],
        seeds=[3, 4],
        badness=lambda trial, result: 0,
        line=lambda trial, result: f"seed {trial['seed']}",
        record=Record(None, {}),
        jobs=2,
    )
    lines, (found,) = to_the_end(tuning)
    assert sorted(lines) == ["seed 3", "seed 4"], "each once"
    assert found == (1e-3, [{"seeds": [3, 4]}] * 2, [])


@pytest.mark.parametrize("rates", [(1.0,), (1.0, 2.0, 3.0)])
def test_the_best_rate_of_the_first_seed_is_taken_with_the_others(rates: tuple[float, ...]) -> None:
    made = []

    def work(trial: Trial) -> Result:
        made.append((trial["learning_rate"], trial["seed"]))
        return {"bad": abs(trial["learning_rate"] - 2), "seed": trial["seed"]}

    tuning = tune(
        work, [{}], rates, [5, 6, 7], lambda _, result: result["bad"], lambda trial, _: str(trial), Record(None, {}), 1
    )
    _, (found,) = to_the_end(tuning)
    best = min(rates, key=lambda rate: abs(rate - 2))
    assert made == [*((rate, 5) for rate in rates), (best, 6), (best, 7)]
    assert found.learning_rate == best
    assert [result["seed"] for result in found.results] == [5, 6, 7]
    assert len(found.others) == len(rates) - 1


def test_once_a_minute_it_is_said_how_far_a_trial_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("memformer.bench.trials.time.monotonic", lambda: now)
    report = Report({"task": "copy", "seed": 3}, 2000)
    for step in range(100, 1400, 100):
        now += 25
        report(step, "12.5 % right")
    told = capsys.readouterr()
    assert told.out == "", "stdout has the results"
    assert told.err.splitlines() == [
        f"task copy, seed 3: step {n} of 2,000, 12.5 % right" for n in ("300", "600", "900", "1,200")
    ]


COMMITTED = sorted((Path(__file__).parents[1] / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_committed_results_can_be_gone_on_with(path):
    """Whatever settings are new since then."""
    results = json.loads(path.read_text())
    held = results["settings"]
    benchmark = held.get("benchmark", "text")
    model = dataclasses.replace({"learn": learn, "reach": reach, "text": text}[benchmark].MODEL, **held["model"])
    if benchmark == "learn":
        asked = {"tasks": ("pairs-16",), "questions": held["questions"]} if "questions" in held else {}
        fixed = learn._fixed(
            learn.LearningBenchmark(steps=held["steps"], batch_size=held["batch_size"], model=model, **asked)
        )
    elif benchmark == "reach":
        own = {
            name: held[name] for name in held.keys() - {"benchmark", "model", "every", "easing", "easing_of", "lessons"}
        }
        named = tuple(dict.fromkeys(run["run"]["task"] for run in results["runs"]))
        fixed = reach._fixed(reach.ReachBenchmark(**own, model=model, tasks=named))
    else:
        own = {name: held[name] for name in held.keys() - {"documents", "model"}}
        fixed = text._fixed(text.TextBenchmark(**own, model=model)) | {"documents": held["documents"]}
    assert Record(path, fixed).trials
