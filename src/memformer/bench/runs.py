"""Many trainings side by side, each in a process of one thread; those that a file holds already are not made again."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .meters import machine

__all__ = ["Record", "carry_out"]


class Record:
    """The results of runs, each a JSON object, in memory and (where there is a path) in a file after each run.

    Raises:
        ValueError: the file's folder does not exist, or the file holds something else, or runs of other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]):
        self.path, self.runs = path, list[dict[str, Any]]()
        self._settings = json.loads(json.dumps(settings, default=str))
        if path is None:
            return
        if not path.absolute().parent.is_dir():
            raise ValueError(f"out: expected a file in a folder that exists, got {path}")
        if path.exists():
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
                there, self.runs = held["settings"], held["runs"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not the results of a benchmark ({error!r})") from error
            different = [name for name in self._settings | there if self._settings.get(name) != there.get(name)]
            if different:
                name = different[0]
                raise ValueError(
                    f"{path}: holds runs with {name} of {there.get(name)}, not {self._settings.get(name)}: choose "
                    "another file, or the same settings to go on with it"
                )

    def find(self, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a run, if it is here."""
        return next((held["result"] for held in self.runs if held["run"] == run), None)

    def add(self, run: Mapping[str, Any], result: dict[str, Any]) -> None:
        """Keep a result; the file is replaced whole or not at all."""
        about = {
            "memformer": version("memformer"),
            "machine": machine(torch.device("cpu")),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": shlex.join(["memformer", *sys.argv[1:]]),
        }
        self.runs.append({"run": dict(run), "result": result, "made": about})
        if self.path is not None:
            unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}.unfinished")
            text = json.dumps({"settings": self._settings, "runs": self.runs}, indent=1)
            unfinished.write_text(text + "\n", encoding="utf-8")
            unfinished.replace(self.path)


def carry_out(
    work: Callable[[dict[str, Any]], dict[str, Any]], wanted: Sequence[dict[str, Any]], record: Record, jobs: int = 0
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each wanted run with its result, as they come: first those of the record, then new ones, which it gets.

    Args:
        work: what makes a run's result, an object for JSON; it must be found by its name, for a new process calls it.
        wanted: objects for JSON, all different.
        jobs: processes, of one thread each; 0 for one per core. A single one is this process.
    """
    missing = []
    for run in wanted:
        found = record.find(run)
        if found is None:
            missing.append(run)
        else:
            yield run, found
    jobs = min(jobs or os.cpu_count() or 1, len(missing))
    if jobs <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for run in missing:
                record.add(run, work(run))
                yield run, record.runs[-1]["result"]
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        made = {pool.submit(work, run): run for run in missing}
        try:
            for future in as_completed(made):
                record.add(made[future], future.result())
                yield made[future], record.runs[-1]["result"]
        finally:
            pool.shutdown(cancel_futures=True)
