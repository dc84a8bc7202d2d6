"""The command line as a user has it: real runs, real files, one line for a mistake."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import memformer
from memformer import Memformer, replay
from memformer.cli import main
from memformer.cli.parsing import COMMANDS, parse
from memformer.settings import RECIPES, TrainingConfig, read_yaml
from memformer.training import checkpoints

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
    "--sample-tokens",
    "20",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a text in it."""
    (tmp_path / "text.txt").write_text("To read a long text, remember it. " * 40)
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "wrong.yaml").write_text("dimm: 3")
    (tmp_path / "schedule.yaml").write_text("rollout: {schedule: sometimes}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_held_out_is_not_what_a_limit_leaves_of_it(folder, capsys):
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL, "--eval-limit", "20"]) == 0
    printed = capsys.readouterr().out
    assert ", 1 document (28 bytes) held out (the end of text.txt), of which the first 20 are evaluated\n" in printed


def test_train_evaluate_generate(folder, capsys):
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "1 document (1,332 bytes) in 2 stretches to train on, 1 document (28 bytes) held out" in printed
    assert "     4/4  " in printed
    assert "order-2 byte model" in printed
    assert "sample" in printed
    assert "segment " in printed
    assert main(["evaluate", "--checkpoint", "run", "--data", "text.txt"]) == 0
    printed = capsys.readouterr().out
    assert "memory on   " in printed
    assert "memory off  " in printed
    assert printed.count("bits per token") == 2
    assert "xz          " in printed
    how = ["--prompt", "To", "--max-new-tokens", "25", "--seed", "1"]
    assert main(["generate", "--checkpoint", "run", *how]) == 0
    first = capsys.readouterr().out
    assert first.startswith("To")
    assert main(["generate", "--checkpoint", "run/step-000004", *how]) == 0
    assert capsys.readouterr().out == first


def test_evaluate_reads_a_limit_and_speaks_json(folder, capsys, monkeypatch):
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL]) == 0
    capsys.readouterr()
    command = ["evaluate", "--checkpoint", "run", "--data", "text.txt"]
    assert main([*command, "--json", "--limit", "100"]) == 0
    printed, errors = capsys.readouterr()
    found = json.loads(printed)
    assert errors == "model       run/step-000004\n"
    assert " ".join(found) == "checkpoint precision write_temperature forgetting memory_on memory_off xz"
    assert found["checkpoint"] == "run/step-000004"  # which of the run's models the numbers are of
    assert (found["precision"], found["memory_on"]["tokens"], found["xz"]["bytes"]) == ("float32", 100, 100)
    depths = found["memory_off"]["by_depth"]
    assert depths[0] == {"first": 1, "last": 1, "tokens": 8, "bits_per_token": depths[0]["bits_per_token"]}
    assert main([*command, "--memory", "on", "--limit", "100"]) == 0
    printed = capsys.readouterr().out
    assert f"memory on   {found['memory_on']['bits_per_byte']:.4f} bits per byte" in printed
    assert main([*command, "--memory", "on", "--json", "--precision", "bf16", "--limit", "100"]) == 0
    rounded = json.loads(capsys.readouterr().out)
    assert rounded["precision"] == "bfloat16"
    assert rounded["memory_on"]["loss_nats"] != found["memory_on"]["loss_nats"]
    assert rounded["memory_on"]["loss_nats"] == pytest.approx(found["memory_on"]["loss_nats"], rel=0.02)
    sharper = ["--write-temperature", "0.075", "--forgetting", "0"]
    assert main([*command, *sharper, "--memory", "on", "--json", "--limit", "100"]) == 0
    otherwise = json.loads(capsys.readouterr().out)
    assert (otherwise["write_temperature"], otherwise["forgetting"]) == (0.075, 0.0)
    assert (found["write_temperature"], found["forgetting"]) == (0.25, 0.001)
    assert otherwise["memory_on"]["loss_nats"] != found["memory_on"]["loss_nats"]
    assert main([*command, "--write-temperature", "0"]) == 2
    assert "write_temperature: expected a finite number above 0, got 0.0" in capsys.readouterr().err
    monkeypatch.setattr("memformer.cli.evaluate.xz_bits_per_byte", lambda *_: float("nan"))
    assert main([*command, "--memory", "on", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["xz"]["bits_per_byte"] is None
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("memformer.cli.evaluate.XZ_BYTES", 50)
    assert main([*command, "--memory", "on"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("bits per byte (the first 50 bytes)")
    assert main([*command, "--limit", "-1"]) == 2
    assert "limit: expected a number of bytes of at least 0 (0: all), got -1" in capsys.readouterr().err


def test_evaluate_says_on_a_terminal_how_far_it_is(folder, capsys, monkeypatch):
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["evaluate", "--checkpoint", "run", "--data", "text.txt", "--json"]) == 0
    printed, errors = capsys.readouterr()
    json.loads(printed)
    assert "of 1,361 tokens" in errors
    assert errors.endswith("\r\x1b[K")


def test_a_run_is_resumed_with_the_settings_it_had(folder, capsys):
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL]) == 0
    assert main(["train", "--resume", "--out", "run", "--steps", "6"]) == 0
    assert "from step 4" in capsys.readouterr().out
    assert main(["train", "--resume", "--out", "run", "--steps", "8", "--slots", "3"]) == 2
    assert "model.slots: the run in run has 2, got 3; it cannot change" in capsys.readouterr().err


def test_settings_from_a_file_and_flags_before_them(folder, capsys):
    (folder / "my.yaml").write_text(
        "steps: 2\nmodel: {dim: 16, heads: 2}\noutput: {sample_tokens: 0}\ndata: text.txt\n"
    )
    flags = ["--out", "run", "--segment-length", "8", "--slots", "3", "--enc-depth", "1"]
    assert main(["train", "--config", "my.yaml", *flags]) == 0
    assert "2/2" in capsys.readouterr().out
    saved = read_yaml(folder / "run" / "run.yaml", TrainingConfig())
    assert (saved.steps, saved.model.dim, saved.model.slots, saved.rollout.segment_length) == (2, 16, 3, 8)
    assert main(["train", "--config=run/run.yaml", "--out", "again"]) == 0
    first, second = (Memformer.from_pretrained(f"{out}/step-000002") for out in ("run", "again"))
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_schedule_is_chosen_and_changed_on_resuming(folder, capsys):
    how = ["--schedule", "binomial:1", "--offload", "stored", "--graphs", "2"]
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL, "--horizon", "4", *how]) == 0
    saved = read_yaml(folder / "run" / "run.yaml", TrainingConfig()).rollout
    assert saved.replay_schedule() == replay.Offload(replay.Binomial(1, 2), "stored")
    again = ["train", "--resume", "--out", "run", "--steps", "6", "--graphs", "1"]
    assert main([*again, "--schedule", "budget:1GB"]) == 0
    assert "from step 4" in capsys.readouterr().out


def test_verify_prints_a_verdict_and_changes_nothing(folder, capsys):
    options = ["--data", "text.txt", *SMALL, "--dropout", "0.1"]
    assert main(["train", *options, "--out", "plain"]) == 0
    assert "replay is" not in capsys.readouterr().out
    assert main(["train", *options, "--out", "verified", "--verify"]) == 0
    assert "replay is right for Memformer: 3 segments" in capsys.readouterr().out
    assert main(["train", "--resume", "--out", "verified", "--steps", "6", "--verify"]) == 0
    plain, verified = (Memformer.from_pretrained(f"{out}/step-000004") for out in ("plain", "verified"))
    assert all(a.equal(b) for a, b in zip(plain.parameters(), verified.parameters(), strict=True))


def test_a_wrong_verdict_ends_the_command(folder, capsys, monkeypatch):
    step, own = Memformer.step, torch.Generator()

    def noisy(self, *inputs):
        enc_out, memory = step(self, *inputs)
        return enc_out, memory + torch.rand(memory.shape, generator=own)

    monkeypatch.setattr(Memformer, "step", noisy)
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL, "--verify"]) == 2
    printed, errors = capsys.readouterr()
    assert "replay is WRONG for" in printed
    assert errors == (
        "memformer: error: verify: replay is wrong for this model, as printed above, so nothing was trained\n"
    )
    assert checkpoints.newest(folder / "run") is None


def test_recipes_start_from_named_settings():
    settings = parse(["train", "--recipe", "paper-v1", "--slots", "5"])[1].settings()
    expected = RECIPES["paper-v1"]
    assert settings == dataclasses.replace(expected, model=dataclasses.replace(expected.model, slots=5))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, capsys):
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL, "--save-every", "3"]) == 0
    (folder / "run" / "step-000004" / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", "run"]) == 2
    assert "step-000004: damaged (model.safetensors" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert "refused     run/step-000004: damaged (model.safetensors" in printed
    assert "from step 3" in printed


@pytest.mark.parametrize("kind", ["lines", "ids"])
def test_other_kinds_of_data(folder, capsys, kind):
    if kind == "lines":
        lines = [json.dumps({"body": f"document {i} of the file" * 3}) for i in range(9)]
        (folder / "data.jsonl").write_text("\n".join(lines))
        data = ["--data", "data.jsonl", "--text-field", "body"]
        options, unit = ["--tokenizer", "bpe", "--vocabulary", "270"], "bits per byte"
    else:
        np.save(folder / "data.npy", np.tile([1, 2, 3, 4, 0], 60).astype(np.uint16))
        data = ["--data", "data.npy", "--separator", "0"]
        options, unit = ["--tokenizer", "ids", "--vocabulary", "5"], "bits per token"
    assert main(["train", *data, "--out", "run", *SMALL, *options]) == 0
    assert f" {unit}" in capsys.readouterr().out
    assert main(["evaluate", "--checkpoint", "run", *data, "--memory", "on"]) == 0
    assert "memory on" in capsys.readouterr().out
    assert main(["evaluate", "--checkpoint", "run", "--memory", "on"]) == 0
    held_out = "tokens of 1 document," if kind == "lines" else "tokens of 2 documents"
    assert held_out in capsys.readouterr().out
    if kind == "ids":  # a prompt is written as ids are shown
        assert main(["generate", "--checkpoint", "run", "--prompt", "1 2", "--max-new-tokens", "3"]) == 0
        printed = capsys.readouterr().out.splitlines()[-1].split()
        assert printed[:2] == ["1", "2"]
        assert set(printed) <= set("01234")


def test_a_flag_is_repeated_on_resuming(folder, capsys):
    options = ["--data", "text.txt", "--out", "run", *SMALL, "--tensorboard"]
    assert main(["train", *options]) == 0
    assert main(["train", *options, "--steps", "6", "--resume"]) == 0
    assert "from step 4" in capsys.readouterr().out


def test_encoded_folders_are_read_as_they_are(folder, capsys):
    """Flags that say how files are read would change nothing, and a folder that is given twice counts twice."""
    assert main(["encode", "--data", "text.txt", "--out", "ids"]) == 0
    assert main(["train", "--data", "ids", "--out", "run", *SMALL]) == 0
    for flags in (["--include", "*.md"], ["--exclude", "*"], ["--separator", "5"], ["--strict"]):
        for command in (["train", "--out", "other", *SMALL], ["evaluate", "--checkpoint", "run"]):
            capsys.readouterr()
            assert main([*command, "--data", "ids", *flags]) == 2
            assert "has no meaning with folders of memformer encode alone" in capsys.readouterr().err
    assert main(["train", "--data", "ids", "./ids", "--out", "other", *SMALL]) == 2
    assert "ids: given twice, so one copy might be held out" in capsys.readouterr().err


def test_files_that_are_left_out_are_mentioned(folder, capsys):
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.txt").write_text("To read a long text, remember it. " * 40)
    (folder / "mixed" / "b.txt").write_bytes("déjà vu".encode("latin-1"))
    assert main(["train", "--data", "mixed", "--out", "run", *SMALL]) == 0
    assert "memformer: warning: files left out: 1 not UTF-8 text (mixed/b.txt)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["train", "--data", "text.txt", "--dim", "15"], "error: heads: must divide dim"),
        (["train", "--schedule", "wsd"], "got 'wsd', which is a learning_rate_schedule"),
        (["bench", "replay", "--device", "abacus"], "device: 'abacus' cannot be used here"),
        (["bench", "learn", "--jobs", "-1"], "jobs: expected a whole number of at least 0, got -1"),
        (["inspect", "--checkpoint", "nowhere", "--life"], "error: nowhere: no metrics.jsonl there"),
        (["inspect", "--checkpoint", "nowhere", "--life", "--test"], "life: reads the run's metrics, so --test has no"),
        (["inspect", "--checkpoint", "nowhere", "--life", "--bin-dtype", "uint8"], "so --bin-dtype has no meaning"),
        (
            ["encode", "--data", "text.txt", "--out", "x", "--text-field", "body"],
            "text_field: body has no meaning with",
        ),
        (
            ["encode", "--data", "text.txt", "--out", "x", "--tokenizer", "t.json", "--vocabulary", "300"],
            "vocabulary: 300 has no meaning with a tokenizer that is there; leave it out",
        ),
        (["train", "--resume", "--out", "nowhere"], "nowhere: no checkpoint to resume"),
        (["train", "--steps", "0"], "error: steps: expected a whole number of at least 1, got 0"),
        (["train", "--held-out", "1"], "error: held_out: expected a whole number of at least 2, got 1"),
        (["train", "--schedule", "binomial:x"], "error: schedule: expected every, binomial:N"),
        (["train", "--device", "abacus"], "device: 'abacus' cannot be used here"),
        (["train", "--device", "meta"], "device: 'meta' cannot be used here"),
        (["train", "--data", ""], "an argument is empty"),
        (["train", "--data", "text.txt", "text.txt"], "text.txt: given twice"),
        (["train", "--config", "schedule.yaml"], "schedule.yaml: schedule: expected every, binomial:N"),
        (["train", "--data", "text.txt", *SMALL, "--schedule", "budget:1KB"], "Budget: 1000 bytes hold less than one"),
        (["train", "--data", "text.txt", "--separator", "3"], "separator: 3 cuts .npy and .bin arrays"),
        (["train", "--data", "text.txt", "--tokenizer", "bpe", "--vocabulary", "10"], "error: vocabulary: expected a"),
        (["train", "--data", "text.txt", "--dim", "400000000"], "memory"),
        (["train", "--config", "nowhere.yaml"], "error: nowhere.yaml: No such file or directory"),
        (["train", "--config", "wrong.yaml"], "wrong.yaml: dimm: unknown setting. Perhaps you meant model.dim"),
        (["train", "--data", "latin.txt"], "at byte 1); if it is Latin-1, convert it, as iconv -f LATIN1"),
        (
            ["train", "--data", "one.txt"],
            "one.txt: 1 byte in all, too few to hold out one in 48; add some, or say",
        ),
        (["train", "--data", "empty"], "no text found in empty"),
        (["train", "--data", "text.txt", "--tokenizer", "nowhere.json"], "nowhere.json"),
        (["train", "--data", "text.txt", "--tokenizer", "ids"], "text.txt"),
        (["train", "--out", "file", "--data", "text.txt", *SMALL], "file"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --stepz 3", "Unrecognized options: --stepz, 3. Perhaps you meant --steps"),
        ("train --steps x", "--steps: expected a whole number, got 'x'"),
        ("train --learning-rate fast", "--learning-rate: expected a number, got 'fast'"),
        ("train --precision float16", "'float16' for argument '--precision'"),
        ("train --precision", "Missing value for argument '--precision'. Expected a value"),
        ("train --separator x", "error: --separator: expected a whole number, got 'x'\n"),
        ("train --data", "--data: an argument is empty"),
        ("train --data --out x", "--data: an argument is empty"),
        ("train --out=", "--out: an argument is empty"),
        ("train --data a --data b", "--data: given twice, and only the last would count; give all values after one --"),
        ("train --held-out-data=a --held_out_data b", "--held-out-data: given twice"),
        ("evaluate --checkpoint a --exclude a --data c --exclude b", "--exclude: given twice"),
        ("generate --checkpoint a --prompt -h3llo", "One that begins with a dash follows an equals sign: --prompt=-h3"),
        ("trian", "trian: no such command. Perhaps you meant train; memformer --help says more"),
        ("nonsense", "nonsense: no such command. There are train, encode, evaluate, "),
        ("generate", "Missing from memformer generate: --checkpoint PATH"),
        ("bench", "Expected one of {"),
        ("bench learnt", "learnt"),
        ("bench learn --seeds x", "--seeds: "),
    ],
)
@pytest.mark.parametrize("columns", ["20", "80"])
def test_flags_are_checked(folder, capsys, monkeypatch, arguments, message, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(arguments.split()) == 2
    printed, errors = capsys.readouterr()
    assert errors.startswith("memformer: error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert "dummy" not in errors
    assert printed == ""
    assert os.environ["COLUMNS"] == columns


@pytest.mark.parametrize("variable", ["", "--state=", "--checkpoint="])
def test_an_empty_argument_is_no_prompt(folder, capsys, variable):
    assert (
        main(
            ["generate", "--checkpoint", "nowhere", "--prompt", "", *(["--state", ""] if not variable else [variable])]
        )
        == 2
    )
    assert "an argument is empty: is a variable of the shell not set?" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", "nowhere", "--prompt", ""]) == 2
    assert "nowhere: no checkpoint there" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_program_alone_shows_its_commands(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in COMMANDS)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"memformer {memformer.__version__}\n"


@pytest.mark.parametrize(
    "command",
    ["", *COMMANDS, "bench replay", "bench million", "bench generate", "bench learn", "bench text"],
)
def test_every_command_has_help(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--help" in printed
    assert not re.search(r"\b(or|A|and|the) +\u2502\n", printed), "a sentence is broken, however wide the terminal is"


def test_generate_starts_without_the_trainer():
    loaded = "import sys, memformer.cli.generate; print([m for m in sys.modules if m.startswith('memformer.training')])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_out_that_cannot_be_written_is_one_line(folder, capsys):
    assert main(["train", "--data", "text.txt", "--out", "file/run", *SMALL]) == 2
    assert capsys.readouterr().err.startswith("memformer: error: ")


def test_a_full_disk_is_one_line_and_loses_nothing(folder):
    """No file may grow beyond 32 KiB: the model does not fit, as on a full disk."""
    assert main(["train", "--data", "text.txt", "--out", "run", *SMALL, "--dim", "64"]) == 0
    again = ["train", "--resume", "--out", "run", "--steps", "6"]
    limit = ["bash", "-c", 'ulimit -f 32; exec "$@"', "-", sys.executable, "-m", "memformer"]
    limited = subprocess.run([*limit, *again], capture_output=True, text=True)
    assert limited.returncode == 2
    assert limited.stderr.startswith("memformer: error: run/step-000006: cannot be written (")
    assert limited.stderr.count("\n") == 1
    assert sorted(f.name for f in (folder / "run").glob("*step*")) == ["step-000004"]
    assert main(again) == 0


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.thorough)])
def test_torchrun_trains_with_two_processes(folder, parallel):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = [*command, "-m", "memformer", "train", "--data", "text.txt", "--out", "run", *SMALL, "--parallel", parallel]
    run += ["--no-tie-embeddings"] if parallel == "fsdp" else []
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"2 processes ({parallel})" in done.stdout
    assert done.stdout.count("held out    29 tokens of 1 document,") == 1
    assert done.stdout.count("sample") == (parallel == "ddp")  # what FSDP divides may be too large for one process
    assert checkpoints.find(folder / "run").name == "step-000004"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_process_of_several_ends_with_all_that_is_done_at_an_end(processes):
    """And without the interpreter's own, which gloo's threads would abort."""
    program = "import atexit, memformer.__main__ as m; atexit.register(print, 'last', end=''); "
    program += "m.main = lambda: print('done') or 3; m.run()"
    environment = {**os.environ, "WORLD_SIZE": processes}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "done\nlast", "")


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
