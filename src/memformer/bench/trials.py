"""Many trials side by side, each in a process of one thread; those that a file holds already are not made again.

A trial is one training, described by an object for JSON, and so is its result.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from .._installation import __version__
from ..files import replace_file
from .meters import machine

__all__ = ["Record", "Report", "Result", "Trial", "Tuned", "carry_out", "check_different", "seeds_in_words", "tune"]

Trial = dict[str, Any]
"""What one training is made of."""
Result = dict[str, Any]
"""What came of it."""


REPORT_EVERY = 60.0
"""Seconds from one line on how far a trial is to the next."""


def check_different(name: str, values: Sequence[object]) -> None:
    """Raise ValueError, which begins with ``name``, unless there is a value, and none twice."""
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name}: expected one or more, all different, got {', '.join(map(str, values))}")


class Record:
    """The results of trials, in memory and (where there is a path) in a file after each.

    Raises:
        ValueError: the file's folder does not exist, or the file holds something else, or trials of other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, object]):
        self.path, self.trials = path, list[dict[str, Any]]()
        self._settings = json.loads(json.dumps(settings, default=str))
        if path is None:
            return
        if not path.absolute().parent.is_dir():
            raise ValueError(f"out: expected a file in a folder that exists, got {path}")
        self._read()

    def _read(self) -> None:
        """Take what the file holds, and what is here beside that."""
        if self.path is None or not self.path.exists():
            return
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            there, trials = dict(held["settings"].items()), list(held["runs"])
            known = [trial["run"] for trial in trials]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path}: not the results of a benchmark ({error!r})") from error
        different = [name for name in self._settings | there if self._settings.get(name) != there.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"{self.path}: holds runs with {name} of {there.get(name)}, not {self._settings.get(name)}: choose "
                "another file, or the same settings to go on with it"
            )
        self.trials = trials + [trial for trial in self.trials if trial["run"] not in known]

    def find(self, trial: Trial) -> Result | None:
        """The result of a trial, if it is here."""
        return next((held["result"] for held in self.trials if held["run"] == trial), None)

    def add(self, trial: Trial, result: Result) -> Result:
        """Keep a result, and return what is kept: another process may have put one there meanwhile.

        The file is replaced whole or not at all, with the trials of other processes.
        """
        about = {
            "memformer": __version__,
            "machine": machine(torch.device("cpu")),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": _command(),
        }
        self.trials.append({"run": trial, "result": result, "made": about})
        if self.path is not None:
            with contextlib.ExitStack() as held:
                with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks
                    held.enter_context(FileLock(self.path.with_name(f".{self.path.name}.lock")))
                self._read()
                text = json.dumps({"settings": self._settings, "runs": self.trials}, indent=1)
                replace_file(self.path, text + "\n")
        return next(kept["result"] for kept in self.trials if kept["run"] == trial)


def _command() -> str:
    """What started this process, as one would type it."""
    program = Path(sys.argv[0])
    started = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*started, *sys.argv[1:]])


class Report:
    """Says on stderr, once a minute, how far a trial is: some take an hour."""

    def __init__(self, trial: Trial, steps: int):
        self._about, self._steps = ", ".join(f"{name} {value}" for name, value in trial.items()), steps
        self._last = time.monotonic()

    def __call__(self, step: int, score: str) -> None:
        """After a look at the held-out data, which gave ``score``."""
        if time.monotonic() - self._last > REPORT_EVERY:
            self._last = time.monotonic()
            print(f"{self._about}: step {step:,} of {self._steps:,}, {score}", file=sys.stderr, flush=True)


def carry_out(
    work: Callable[[Trial], Result], wanted: Sequence[Trial], record: Record, jobs: int = 0
) -> Iterator[tuple[Trial, Result]]:
    """Yield each wanted trial with its result, as they come: first those of the record, then new ones, which it gets.

    Args:
        work: what makes a trial's result; it must be found by its name, for a new process calls it.
        wanted: all different.
        jobs: processes, of one thread each; 0 for one per core. A single one is this process.
    """
    missing = []
    for trial in wanted:
        found = record.find(trial)
        if found is None:
            missing.append(trial)
        else:
            yield trial, found
    jobs = min(jobs or os.cpu_count() or 1, len(missing))
    if jobs <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for trial in missing:
                yield trial, record.add(trial, work(trial))
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    # Nobody writes into this pipe. It ends when this process does, however it ends, or here.
    end, alive = context.Pipe(duplex=False)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(end,)) as pool:
        made = {pool.submit(work, trial): trial for trial in missing}
        try:
            for future in as_completed(made):
                yield made[future], record.add(made[future], future.result())
        except BaseException as error:  # Ctrl-C, and whoever wants no more: trials at work would take minutes to end
            alive.close()
            for future, trial in made.items():
                if future.done() and not future.cancelled() and not future.exception() and record.find(trial) is None:
                    record.add(trial, future.result())
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    "a trial's process was killed, perhaps for want of memory: fewer --jobs take less. What was done "
                    "is kept, where there is an --out, and the same command goes on"
                ) from error
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            alive.close()


def _begin(end: Connection) -> None:
    """A worker of one thread, which ends with the process that started it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that process gets Ctrl-C, too

    def follow() -> None:
        wait([end])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class Tuned(NamedTuple):
    """What :func:`tune` found.

    Attributes:
        learning_rate: the best one.
        results: with it, in the order of the seeds.
        others: results of the other learning rates, of the first seed.
    """

    learning_rate: float
    results: list[Result]
    others: list[Result]


def tune(
    work: Callable[[Trial], Result],
    wanted: Sequence[Trial],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    badness: Callable[[Trial, Result], Any],
    line: Callable[[Trial, Result], str],
    record: Record,
    jobs: int = 0,
) -> Generator[str, None, list[Tuned]]:
    """Carry out what is wanted with each learning rate and the first seed, then with its best one and the other seeds.

    Where there is one learning rate, nothing is chosen, and no seed waits for the first one.

    Args:
        work, record, jobs: as for :func:`carry_out`.
        wanted: trials without "learning_rate" and "seed", all different.
        badness: of a trial and its result; the best learning rate has the least.
        line: what is yielded when a trial is done.

    Returns:
        what was found for each of ``wanted``.
    """

    def result(one: Trial, rate: float, seed: int) -> Result:
        found = record.find(trial(one, rate, seed))
        assert found is not None, "it was carried out"
        return found

    def trial(one: Trial, rate: float, seed: int) -> Trial:
        return one | {"learning_rate": rate, "seed": seed}

    first = seeds[0]
    begun = seeds if len(learning_rates) == 1 else seeds[:1]
    grid = [trial(one, rate, seed) for seed in begun for one in wanted for rate in learning_rates]
    yield from itertools.starmap(line, carry_out(work, grid, record, jobs))
    best = [min(learning_rates, key=lambda rate: badness(one, result(one, rate, first))) for one in wanted]
    pairs = list(zip(wanted, best, strict=True))
    rest = [trial(one, rate, seed) for seed in seeds[len(begun) :] for one, rate in pairs]
    yield from itertools.starmap(line, carry_out(work, rest, record, jobs))
    return [
        Tuned(
            rate,
            [result(one, rate, seed) for seed in seeds],
            [result(one, other, first) for other in learning_rates if other != rate],
        )
        for one, rate in pairs
    ]


def seeds_in_words(seeds: Sequence[int]) -> str:
    """For a picture: which runs it shows."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
