"""A training that everything happens to, for hours: ``python -m tests.soak --minutes 180``.

The same run is trained twice at the same time, one thread each: left alone, and with kills, a full disk, a network
folder that goes away, damaged checkpoints, and data that change under it. Each time it is started again by one command.
At the end both must have the same weights to the bit. What the process said at each end is printed, for a person.

The full disk and the lost folder need Linux, root and ``bindfs``; without them they are left out, and the report says
so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.testing import assert_close

from memformer import Memformer
from memformer.training import checkpoints

SETTINGS = """
data: [corpus]
steps: 1000000
model: {dim: 32, slots: 4, enc_depth: 1, dec_depth: 1, heads: 2, dropout: 0.1}
documents: {tokenizer: bpe, vocabulary: 512}
objective: {continuation: 0.6, infilling: 0.3, recall: 0.1}
rollout: {lanes: 4, segment_length: 16, horizon: 4}
optimizer: {ema: 0.9, learning_rate_schedule: constant}
evaluation: {eval_every: 100, eval_limit: 20000}
output: {log_every: 10, save_every: 20, sample_tokens: 0}
device: cpu
"""
DISK_MB = 48


@dataclasses.dataclass
class Outcome:
    """What became of one process."""

    event: str
    status: int
    step: int
    """Of the newest checkpoint afterwards."""
    last_words: str
    """The last line of its standard error."""


class Disk:
    """A small disk behind a network folder: a tmpfs of its own, seen through bindfs."""

    def __init__(self, disk: Path, seen: Path):
        self.disk, self.seen = disk, seen

    @staticmethod
    def possible() -> bool:
        return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("bindfs") is not None

    @contextmanager
    def mounted(self) -> Iterator[Disk]:
        for folder in (self.disk, self.seen):
            folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", self.disk], check=True)
        self.join()
        try:
            yield self
        finally:
            self.lose()
            subprocess.run(["umount", "-l", self.seen], check=False)
            subprocess.run(["umount", "-l", self.disk], check=True)

    def join(self) -> None:
        subprocess.run(["bindfs", self.disk, self.seen], check=True)

    def lose(self) -> None:
        """The server is gone: every access ends with "not connected"."""
        subprocess.run(["pkill", "-9", "-f", f"^bindfs {self.disk} "], check=False)

    def join_again(self) -> None:
        subprocess.run(["umount", "-l", self.seen], check=True)
        self.join()

    def fill(self) -> None:
        with (self.disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))

    def empty(self) -> None:
        (self.disk / "ballast").unlink()


def corpus(folder: Path) -> None:
    """A book, made of many modules, and some chapters."""
    folder.mkdir()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    texts = [module.read_text(encoding="utf-8") for module in modules]
    (folder / "book.txt").write_text("".join(texts[:40]), encoding="utf-8")
    for module, text in zip(modules[40:], texts[40:], strict=True):
        (folder / f"{module.stem}.txt").write_text(text, encoding="utf-8")


def start(folder: Path, out: str, log: Path, *flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    train = [sys.executable, "-m", "memformer", "train", "--config", "settings.yaml", "--out", out, "--auto-resume"]
    with log.open("a", encoding="utf-8") as output:
        return subprocess.Popen(
            [*train, *flags], cwd=folder, env=environment, stdout=output, stderr=subprocess.PIPE, text=True
        )


def step_of(run: Path) -> int:
    try:
        newest = checkpoints.newest(run)
    except OSError:
        return -1
    return -1 if newest is None else int(newest.name.removeprefix("step-"))


def damage(run: Path, draw: random.Random) -> None:
    """One bit of one file of the newest checkpoint."""
    newest = checkpoints.newest(run)
    assert newest is not None
    file = draw.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


class Soak:
    """The run that everything happens to."""

    def __init__(self, folder: Path, disk: Disk | None, seed: int):
        self.folder, self.disk, self.draw = folder, disk, random.Random(seed)
        self.run = folder / "mounted" / "run" if disk else folder / "run"
        self.outcomes: list[Outcome] = []
        self.events = ["kill", "kill", "term", "interrupt", "damage", "data changed"]
        self.events += ["full disk", "lost folder"] if disk else []

    def wait(self, process: subprocess.Popen[str], event: str) -> bool:
        """Until it is time for an event: mostly some seconds after the next checkpoint; a kill may come at any time.

        Returns whether the process ended by itself.
        """
        before = step_of(self.run)
        anywhere = event == "kill" and before > 0 and self.draw.random() < 0.5
        until = time.monotonic() + self.draw.uniform(0, 30)
        while process.poll() is None:
            if anywhere and time.monotonic() > until:
                return False
            if step_of(self.run) > before:
                time.sleep(self.draw.uniform(0, 10))
                return process.poll() is not None
            time.sleep(0.05)
        return True

    def once(self) -> None:
        """Start, let something happen, and write down what was said."""
        # A run with one checkpoint has nothing to fall back on.
        event = self.draw.choice(self.events if len(list(self.run.glob("step-*"))) > 1 else ["kill"])
        changed = self.folder / "corpus" / "book.txt"
        if event == "data changed":
            before = changed.read_bytes()
            changed.write_bytes(before.replace(b"def ", b"fed ", 1))
        elif event == "damage":
            damage(self.run, self.draw)
        process = start(self.folder, str(self.run.relative_to(self.folder)), self.folder / "soaked.log")
        ended = self.wait(process, event)
        if not ended and event in ("kill", "damage", "data changed"):
            process.kill()
        elif not ended and event in ("term", "interrupt"):
            process.send_signal(signal.SIGTERM if event == "term" else signal.SIGINT)
        elif not ended and self.disk is not None:
            self.disk.fill() if event == "full disk" else self.disk.lose()
        _, errors = process.communicate(timeout=600)
        if event == "data changed":
            changed.write_bytes(before)
        if not ended and self.disk is not None and event == "full disk":
            self.disk.empty()
        elif not ended and self.disk is not None and event == "lost folder":
            self.disk.join_again()
        lines = [line for line in errors.splitlines() if line.strip()]
        self.outcomes.append(Outcome(event, process.returncode, step_of(self.run), lines[-1] if lines else ""))
        print(
            f"{self.outcomes[-1].step:>8}  {event:<14} {process.returncode:>4}  {self.outcomes[-1].last_words}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=180)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    corpus(folder / "corpus")
    (folder / "settings.yaml").write_text(SETTINGS)
    print(f"in {folder}; the newest checkpoint after each event, its exit status and last words:")
    ends = time.monotonic() + 60 * given.minutes
    alone = start(folder, "alone", folder / "alone.log")
    disk = Disk(folder / "disk", folder / "mounted") if Disk.possible() else None
    if disk is None:
        print("left out: the full disk and the lost folder (they need Linux, root and bindfs)")
    with disk.mounted() if disk else open(os.devnull):
        soak = Soak(folder, disk, given.seed)
        while time.monotonic() < ends:
            soak.once()
        alone.send_signal(signal.SIGTERM)
        _, errors = alone.communicate()
        assert alone.returncode == 130, errors
        # The learning rate is constant, so whoever is behind can catch up.
        runs = soak.run, folder / "alone"
        steps = max(map(step_of, runs))
        for run in runs:
            last = start(folder, str(run.relative_to(folder)), folder / "last.log", "--steps", str(steps))
            _, errors = last.communicate()
            assert last.returncode == 0, errors
        (a, b) = map(checkpoints.newest, runs)
        assert a is not None
        assert b is not None
        assert a.name == b.name == f"step-{steps:06d}", (a, b)
        ours, theirs = (Memformer.from_pretrained(f).state_dict() for f in (a, b))
        assert_close(ours, theirs, rtol=0, atol=0)
        (_, tensors), (_, other) = (checkpoints.load_state(f) for f in (a, b))
        assert_close(tensors, other, rtol=0, atol=0)
    counts = ", ".join(f"{count} x {event}" for event, count in Counter(o.event for o in soak.outcomes).items())
    print(f"equal to the bit at step {steps:,}, after {len(soak.outcomes)} starts: {counts}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
