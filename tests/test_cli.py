"""The command line as a user has it: real runs, real files, one line for a mistake."""

import os
import signal
import subprocess
import sys
import time

import pytest

from memformer.cli import main

SMALL = [
    "--steps",
    "4",
    "--dim",
    "16",
    "--slots",
    "2",
    "--enc-depth",
    "1",
    "--dec-depth",
    "1",
    "--heads",
    "2",
    "--segment-length",
    "8",
    "--lanes",
    "2",
    "--horizon",
    "2",
    "--log-every",
    "2",
    "--sample-bytes",
    "20",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a text in it."""
    (tmp_path / "text.txt").write_text("To read a long text, remember it. " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_evaluate_generate(folder, capsys):
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "1 documents (1,332 bytes) to train on, 1 documents (28 bytes) held out" in printed
    assert "     4/4  " in printed
    assert "order-2 byte model" in printed
    assert "sample" in printed
    assert main(["evaluate", "--checkpoint", "run", "--data", "text.txt"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    how = ["--prompt", "To", "--max-new-tokens", "25", "--seed", "1"]
    assert main(["generate", "--checkpoint", "run", *how]) == 0
    first = capsys.readouterr().out
    assert first.startswith("To")
    assert main(["generate", "--checkpoint", "run/step-000004", *how]) == 0
    assert capsys.readouterr().out == first


def test_a_run_is_resumed_with_the_settings_it_had(folder, capsys):
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL]) == 0
    assert main(["train", "--resume", "--out", "run", "--steps", "6"]) == 0
    assert "from step 4" in capsys.readouterr().out
    assert main(["train", "--resume", "--out", "run", "--steps", "8", "--slots", "3"]) == 2
    assert "slots: the run in run has 2, got 3; it cannot change" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["train", "--data", "text.txt", "--dim", "15"], "enc_heads: must divide dim"),
        (["train", "--resume", "--out", "nowhere"], "nowhere: no checkpoint there"),
        (["train", "--device", "abacus"], "device: 'abacus' cannot be used here"),
        (["evaluate", "--checkpoint", "nowhere"], "nowhere: no checkpoint there"),
        (["evaluate", "--checkpoint", "x", "--lanes", "0"], "lanes: expected at least 1, got 0"),
        (["generate", "--checkpoint", "nowhere"], "nowhere: no checkpoint there"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, arguments, message):
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("memformer: error: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("arguments", ["train --stepz 3", "train --steps 0", "train --steps x", ""])
def test_flags_are_checked(folder, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "command", [[], ["train"], ["evaluate"], ["generate"], ["bench"], ["bench", "replay"], ["bench", "million"]]
)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_out_that_cannot_be_written_is_one_line(folder, capsys):
    (folder / "file").touch()
    assert main(["train", "--data", "text.txt", "--out", "file/run", *SMALL]) == 2
    assert capsys.readouterr().err.startswith("memformer: error: ")


def test_ctrl_c_saves_and_says_how_to_go_on(folder):
    steps = ["--steps", "100000", "--log-every", "1", "--save-every", "100000"]
    command = [sys.executable, "-m", "memformer", "train", "--data", "text.txt", "--out", "run", *SMALL, *steps]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    for line in process.stdout:
        if "/100000" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "memformer train --resume --out run" in printed
    assert list((folder / "run").glob("step-*/model.safetensors"))
