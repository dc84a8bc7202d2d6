"""Real training processes, killed with SIGKILL at random moments and resumed, end as one that was left alone."""

import random
import subprocess
import sys
import time

import pytest
from torch.testing import assert_close

from memformer import Memformer
from memformer.training import checkpoints

SETTINGS = """
steps: {steps}
data: [corpus]
model: {dim: 16, slots: 2, enc_depth: 1, dec_depth: 1, heads: 2, dropout: 0.1}
documents: {tokenizer: bpe, vocabulary: 280}
objective: {continuation: 0.6, infilling: 0.3, recall: 0.1}
rollout: {lanes: 2, segment_length: 8, horizon: 2}
optimizer: {ema: 0.9, learning_rate: 0.003}
evaluation: {eval_every: 20}
output: {log_every: 7, save_every: 1, sample_tokens: 0}
device: cpu
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(5):
        (tmp_path / "corpus" / f"{i}.txt").write_text("what was seen is not forgotten. " * (3 * i + 2))
    return tmp_path


def start(folder, out, *flags):
    command = [sys.executable, "-m", "memformer", "train", "--out", out, *flags]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.0005)


def kill_and_resume(folder, kills, draw):
    """Train to the end through ``kills`` kills, half of them while a checkpoint is written; how many of those hit."""
    run, writing = folder / "run", 0
    process = start(folder, "run", "--config", "run.yaml")
    for i in range(kills):
        before = checkpoints.newest(run)
        wait_until(lambda: checkpoints.newest(run) not in (None, before), process)  # noqa: B023
        if i % 2 == 0:
            wait_until(lambda: any(run.glob(".unfinished-*")), process)
            time.sleep(draw.uniform(0, 0.003))
        else:
            time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.communicate()
        writing += any(run.glob(".unfinished-*"))
        process = start(folder, "run", "--resume")
    finish(process)
    return writing


def check(folder, kills):
    steps = 60 + 40 * kills  # no machine may come to the end before the last kill
    (folder / "run.yaml").write_text(SETTINGS.replace("{steps}", str(steps)))
    finish(start(folder, "whole", "--config", "run.yaml"))
    writing = kill_and_resume(folder, kills, random.Random(0))
    assert writing > 0, "no kill hit the writing of a checkpoint"
    (a, b) = (checkpoints.newest(folder / name) for name in ("run", "whole"))
    assert a.name == b.name == f"step-{steps:06d}"
    assert_close(Memformer.from_pretrained(a).state_dict(), Memformer.from_pretrained(b).state_dict(), rtol=0, atol=0)
    (numbers_a, tensors_a), (numbers_b, tensors_b) = (checkpoints.load_state(f) for f in (a, b))
    assert_close(tensors_a, tensors_b, rtol=0, atol=0)
    assert {**numbers_a, "settings": None, "seconds": None} == {**numbers_b, "settings": None, "seconds": None}


def test_killed_at_random_moments(folder):
    check(folder, kills=1)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(folder):
    check(folder, kills=20)
