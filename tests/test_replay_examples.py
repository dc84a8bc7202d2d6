"""The examples of the replay run as they are, and say what they promise."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def printed(name: str, capsys) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_gru(capsys):
    out = printed("replay_gru.py", capsys)
    assert "Binomial     100 segments: " in out
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < losses[0]


def test_memformer(capsys):
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", printed("replay_memformer.py", capsys))]
    assert losses[-1] < losses[0]


def test_series(capsys):
    difference = float(re.search(r"autograd (\S+)", printed("replay_series.py", capsys))[1])
    assert difference < 1e-4


# gloo now and then aborts a process while it exits; test_distributed_replay.py holds the same in the default suite.
@pytest.mark.slow
def test_ddp():
    out = subprocess.run(
        [sys.executable, EXAMPLES / "replay_ddp.py"], capture_output=True, text=True, check=True
    ).stdout
    sums = re.findall(r"sum to (\S+)", out)
    assert len(sums) == 2
    assert sums[0] == sums[1]


def test_hf(capsys):
    pytest.importorskip("transformers")
    norms = re.findall(r"norm ([\d.]+)", printed("replay_hf.py", capsys))
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-4)


def test_other_recurrences(capsys):
    """Also where mambapy is not installed, which is then said."""
    differences = re.findall(r"^(.+): largest difference (\S+)", printed("replay_other_recurrences.py", capsys), re.M)
    assert {"nn.LSTM", "linear attention"} <= {name for name, _ in differences}
    assert all(float(x) < (1e-8 if name == "mambapy" else 1e-12) for name, x in differences)


def test_third_party_recurrent_memory_transformer(capsys):
    pytest.importorskip("recurrent_memory_transformer_pytorch")
    differences = re.findall(r"largest difference (\S+)", printed("replay_third_party.py", capsys))
    assert differences
    assert all(float(x) < 1e-10 for x in differences)
