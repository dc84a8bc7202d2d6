"""The examples of the replay run as they are, and say what they promise."""

import importlib
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def printed(name: str, capsys) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.thorough
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


# PEFT still calls what transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_pretrained_memory(capsys, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from pretrained_bases import TEXT, save_base

    save_base(tmp_path / "base", initializer_range=0.3)
    (tmp_path / "texts").mkdir()
    for number in range(7):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} {TEXT}" * 20)
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("pretrained_memory")
    settings = example.Settings(
        base=tmp_path / "base", data=tmp_path / "texts", window=8, whole=32, excerpts=3, slots=2, lora=2, steps=8,
        learning_rate=0.05,
    )  # fmt: skip
    rows = example.main(settings)
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed and f"{loss:.4f} nats per token" in printed for name, loss in rows.items())
    assert "of that gap" in printed
    before, after = rows["base, windows alone"], [loss for name, loss in rows.items() if not name.startswith("base")]
    assert len(after) == 4
    assert all(loss < before - 0.1 for loss in after)
    base, tokenizer = example.pretrained(settings)
    _, held_out = example.texts(settings, tokenizer)
    # The same tokens by both ways: where a window is as long as an excerpt, they are one.
    whole = example.by_windows(example.with_memory(base, replace(settings, window=32)), held_out, carried=True)
    assert whole == pytest.approx(rows["base, the whole context"], abs=1e-5)
    logits = torch.cat([base(w).logits for w in held_out.split(8, 1)], 1)[:, :-1]  # each window by itself
    alone = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
    assert rows["base, windows alone"] == pytest.approx(float(alone.detach()), abs=1e-5)


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
