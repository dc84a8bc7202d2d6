"""Going on with a run from the command line: what may change, what is said of it, and who may."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

from memformer import cli, folders
from memformer.settings import TrainingConfig, read_yaml
from memformer.training import Run, checkpoints, saved_settings

MODEL = dict(dim=8, slots=2, enc_depth=1, dec_depth=1, heads=2, segment_length=8)
HOW = dict(lanes=2, horizon=2, log_every=2, sample_tokens=3, warmup=1, device="cpu")
SMALL = [part for name, value in {**MODEL, **HOW}.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text("To read a long text, remember it. " * 30)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*flags: str) -> int:
    return cli.main(["train", "--out", "run", *flags])


def start(*flags: str) -> None:
    assert train("--data", "text.txt", "--steps", "2", *SMALL, *flags) == 0


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, lock files excepted."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def test_a_flag_that_is_given_on_resuming_is_meant(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start()
    capsys.readouterr()
    assert train("--resume", "--steps", "4", "--learning-rate", "0.001", "--log-every", "1") == 0
    printed = capsys.readouterr().out
    assert "changed     optimizer.learning_rate 0.003 -> 0.001 from step 2 on\n" in printed
    assert "changed     steps 2 -> 4 from step 2 on\n" in printed
    assert "log_every" not in printed
    assert "from step 2 at a learning rate of " in printed
    kept = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    (changed,) = [line for line in kept if line["event"] == "changed"]
    assert changed["settings"] == {"steps": [2, 4], "optimizer.learning_rate": [0.003, 0.001]}
    assert saved_settings("run").optimizer.learning_rate == 0.001
    assert train("--resume", "--steps", "6") == 0
    assert "learning_rate 0" not in capsys.readouterr().out


def test_a_change_holds_after_a_kill_before_the_next_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", lambda run: (_ for _ in ()).throw(OSError("killed")))
        assert train("--resume", "--steps", "4", "--clip", "0.5") == 2
    assert train("--resume") == 0
    assert "changed     optimizer.clip 1.0 -> 0.5 from step 2 on" in capsys.readouterr().out
    kept = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "changed" for line in kept) == 1


def test_what_belongs_to_the_weights_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start()
    before = tree(folder)
    assert train("--resume", "--steps", "4", "--slots", "3") == 2
    assert "model.slots: the run in run has 2, got 3; it cannot change" in capsys.readouterr().err
    assert tree(folder) == before


def test_other_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start()
    (folder / "text.txt").write_text("Another text altogether, and a longer one. " * 40)
    assert train("--resume", "--steps", "4") == 2
    assert "the training documents are not those of run: was the data changed?" in capsys.readouterr().err
    assert train("--resume", "--steps", "4", "--new-data") == 0
    printed, errors = capsys.readouterr()
    learned = "warning: the held-out documents are others than before: some may have been trained on before step 2"
    assert errors.count(learned) == 1
    assert (
        "changed     training documents (a new epoch of the documents begins, with new memories) from step 2" in printed
    )
    assert "changed     held-out documents (the best evaluation is looked for anew) from step 2" in printed


def test_one_command_starts_and_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my.yaml").write_text("data: text.txt\nout: run\noptimizer: {learning_rate: 0.002}\n")
    command = ["train", "--config", "my.yaml", "--auto-resume", *SMALL]
    assert cli.main([*command, "--steps", "2"]) == 0
    assert "from step" not in capsys.readouterr().out
    assert cli.main([*command, "--steps", "2"]) == 0
    assert "finished    at step 2 already; more --steps go on" in capsys.readouterr().out
    assert cli.main([*command, "--steps", "4"]) == 0
    printed = capsys.readouterr().out
    assert "from step 2" in printed
    assert printed.count("changed") == 1
    (folder / "my.yaml").write_text("data: text.txt\nout: run\noptimizer: {learning_rate: 0.001}\n")
    assert cli.main([*command, "--steps", "6", "--lanes", "3"]) == 0
    printed = capsys.readouterr().out
    assert "optimizer.learning_rate 0.002 -> 0.001 from step 4 on" in printed
    assert "rollout.lanes 2 -> 3 (a new epoch of the documents begins, with new memories) from step 4 on" in printed


def test_what_is_said_of_one_start_is_no_setting_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("resume", "auto_resume", "new_data"):
        (folder / "my.yaml").write_text(f"data: text.txt\n{name}: true\n")
        flag = "--" + name.replace("_", "-")
        assert train("--config", "my.yaml", "--steps", "1", *SMALL) == 2
        assert (
            f"my.yaml: {name}: is said of one start alone; give {flag} on the command line" in capsys.readouterr().err
        )
    start()
    assert train("--config", "run/run.yaml", "--auto-resume", "--steps", "3") == 0


def test_a_run_that_stopped_early_says_so_when_it_is_begun_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Run.evaluate
    monkeypatch.setattr(Run, "evaluate", lambda run: dataclasses.replace(evaluate(run), loss_nats=run.step))
    flags = ["--data", "text.txt", "--auto-resume", "--eval-every", "1", "--patience", "2", "--steps", "9", *SMALL]
    assert train(*flags) == 0
    capsys.readouterr()
    assert train(*flags) == 0
    printed = capsys.readouterr().out
    assert "stopped early at step 3 of 9; a higher --patience goes on\n" in printed
    assert "finished" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--vocabulary 300", "vocabulary: 300 has no meaning with the tokenizer bytes"),
        ("--horizon-steps 5", "horizon_steps: 5 has no meaning without --horizon-start"),
        ("--held-out-data other.txt --held-out-by name", "held_out_by: name has no meaning with --held-out-data"),
        ("--new-data", "new_data: has no meaning without --resume or --auto-resume"),
        ("--text-field body", "text_field: body has no meaning with data that has no rows"),
        ("--bin-dtype uint32", "bin_dtype: uint32 has no meaning with data that has no .bin file"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    (folder / "other.txt").write_text("Another text.")
    assert train("--data", "text.txt", "--steps", "1", *SMALL, *flags.split()) == 2
    assert f"memformer: error: {message}; leave it out" in capsys.readouterr().err
    assert not (folder / "run").exists()


@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_so_is_one_that_reads_no_document_of_a_trained_model(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    start()
    (folder / "rows.jsonl").write_bytes(b'{"body": "A text of a row, which is read."}\n')
    capsys.readouterr()
    for flags, what in (("--text-field body", "rows"), ("--bin-dtype uint8", ".bin file")):
        assert cli.main([command, "--checkpoint", "run", "--data", "text.txt", *flags.split()]) == 2
        name, value = flags.removeprefix("--").replace("-", "_").split()
        refused = f"memformer: error: {name}: {value} has no meaning with data that has no {what}; leave it out"
        assert refused in capsys.readouterr().err
    both = ["--data", "text.txt", "rows.jsonl", "--text-field", "body"]
    assert cli.main([command, "--checkpoint", "run", *both]) == 0


def test_a_vocabulary_beside_a_model_that_has_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bpe = ["--tokenizer", "bpe", "--vocabulary", "300"]
    start(*bpe)
    again = ["train", "--out", "second", "--init-from", "run", "--data", "text.txt", "--steps", "2"]
    for vocabulary in ("280", "2048"):
        capsys.readouterr()
        assert cli.main([*again, "--vocabulary", vocabulary]) == 2
        assert re.search(
            rf"documents\.vocabulary: the tokenizer in .* has \d+ tokens, got {vocabulary}; leave it out",
            capsys.readouterr().err,
        )
    assert cli.main(again) == 0


def test_what_a_run_or_a_file_says_in_vain_is_no_mistake_of_a_flag(folder: Path) -> None:
    """Runs of before were begun with such flags, and the same command is to go on with them."""
    (folder / "my.yaml").write_text(
        "data: text.txt\ndocuments: {vocabulary: 300, text_field: body}\nrollout: {horizon_steps: 5}\n"
    )
    start("--config", "my.yaml")
    flags = ["--vocabulary", "300", "--text-field", "body", "--horizon-steps", "5"]
    assert train("--data", "text.txt", "--auto-resume", *SMALL, *flags, "--steps", "3") == 0
    assert train("--resume", "--steps", "4") == 0


def test_a_flag_has_a_meaning_with_any_of_the_data(folder: Path) -> None:
    (folder / "rows").mkdir()
    (folder / "rows" / "some.jsonl.gz").write_bytes(gzip.compress(b'{"body": "A text of a row."}\n'))
    start("--held-out-data", "rows", "--text-field", "body")


def test_a_recipe_is_a_change_only_where_it_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--recipe", "paper-v2", "--tokenizer", "bytes", "--vocabulary", "2048", "--auto-resume"]
    flags = [*recipe, "--data", "text.txt", *SMALL]
    assert train(*flags, "--steps", "2") == 0
    capsys.readouterr()
    assert train(*flags, "--steps", "3") == 0
    printed = capsys.readouterr().out
    assert "changed     steps 2 -> 3" in printed
    assert printed.count("changed") == 1


def test_a_second_command_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start("--save-every", "1")
    (folder / "run" / "step-000002" / "model.safetensors").write_bytes(b"")
    before = tree(folder)
    with checkpoints.lock(folder / "run"):
        assert train("--resume", "--steps", "4", "--learning-rate", "1") == 2
        assert "run: another process trains there at this moment" in capsys.readouterr().err
        assert train("--data", "text.txt", "--auto-resume", *SMALL) == 2
    assert tree(folder) == before


def test_a_run_that_another_went_on_with_is_left_alone(folder: Path) -> None:
    """Two were begun, one after the other trains."""
    settings = read_yaml_of_run(folder)
    late = Run(settings)
    start()
    before = tree(folder)
    with pytest.raises(BlockingIOError, match="another training has come to step-000002 there"):
        next(late.train())
    assert tree(folder) == before


def read_yaml_of_run(folder: Path) -> TrainingConfig:
    (folder / "small.yaml").write_text("data: text.txt\nout: run\nmodel: {dim: 8, heads: 2}\ndevice: cpu\n")
    return read_yaml(folder / "small.yaml", TrainingConfig())


def test_a_run_begins_with_another_runs_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start("--tokenizer", "bpe", "--vocabulary", "270")
    second = ["train", "--out", "second", "--init-from", "run", "--data", "text.txt", "--steps", "2", "--lanes", "2"]
    how = ["--sample-tokens", "0", "--device", "cpu", "--learning-rate", "1e-4"]
    assert cli.main([*second, *how]) == 0
    assert "2 memory slots of 8" in capsys.readouterr().out
    assert saved_settings("second").init_from == folder / "run"
    assert saved_settings("second").documents.tokenizer == "bpe"
    assert cli.main(["train", "--out", "third", *second[3:], *how, "--slots", "5"]) == 2
    assert "error: slots: the model in run/step-000002 has 2, got 5" in capsys.readouterr().err
    assert cli.main(["train", "--out", "third", *second[3:], *how, "--segment-length", "4"]) == 2
    assert "error: segment_length: the model in run/step-000002 has 8, got 4" in capsys.readouterr().err
    assert not (folder / "third").exists()
    assert cli.main(["train", "--resume", "--out", "second", "--steps", "3"]) == 0


def test_evaluate_and_inspect_compare_the_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start()
    assert cli.main(["evaluate", "--checkpoint", "run"]) == 0
    (folder / "elsewhere").mkdir()
    shutil.copy(folder / "text.txt", folder / "elsewhere")
    text = (folder / "text.txt").read_text()
    for changed in ("A new beginning. " + text, text + " And an end."):
        (folder / "text.txt").write_text(changed)
        for command in ("evaluate", "inspect"):
            assert cli.main([command, "--checkpoint", "run"]) == 2
            errors = capsys.readouterr().err
            assert "the documents are not those that this run" in errors
            assert "name documents with --data" in errors
    assert cli.main(["evaluate", "--checkpoint", "run", "--data", "elsewhere", "--memory", "on"]) == 0


def test_after_early_stopping_the_best_model_is_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Run.evaluate
    monkeypatch.setattr(
        Run, "evaluate", lambda run: dataclasses.replace(evaluate(run), bits_per_byte=run.step, loss_nats=run.step)
    )
    flags = ["--data", "text.txt", "--eval-every", "1", "--patience", "2", "--steps", "9", *SMALL]
    assert train(*flags) == 0
    printed = capsys.readouterr().out
    assert "stopped early at step 3" in printed
    assert "read by the model of step 1, the best evaluation" in printed
    assert "  this model          1.000 bits per byte" in printed
    assert "checkpoint  run/step-000001, the best evaluation of run (the newest is step-000003)" in printed
    assert cli.main(["generate", "--checkpoint", "run", "--prompt", "To", "--max-new-tokens", "3"]) == 0
    assert "run/step-000001, the best evaluation of run (the newest is step-000003)" in capsys.readouterr().err
    assert folders.find(folder / "run") == folder / "run" / "step-000001"


def test_an_out_that_cannot_be_written_is_found_before_the_data_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--data", "nowhere") == 2
    assert not (folder / "run").exists()
    (folder / "file").touch()
    assert cli.main(["train", "--data", "nowhere", "--out", "file/run"]) == 2
    assert "file/run: cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", ["bpe", "nowhere.json"])
def test_what_a_tokenizer_lacks_is_found_before_the_data_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tokenizers" else find_spec(name))
    assert train("--data", "nowhere", "--tokenizer", tokenizer) == 2
    expected = "pip install 'memformer-replay[bpe]'" if tokenizer == "bpe" else "nowhere.json"
    assert expected in capsys.readouterr().err


def test_weights_to_start_from_are_named_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given again with --auto-resume they need not be there any more; others are refused."""
    start()
    (folder / "run").rename(folder / "first")
    flags = ["--data", "text.txt", "--auto-resume", "--lanes", "2", "--sample-tokens", "0", "--device", "cpu"]
    assert train(*flags, "--steps", "2", "--init-from", "first") == 0
    (folder / "first").rename(folder / "moved")
    assert train(*flags, "--steps", "3", "--init-from", "first") == 0
    capsys.readouterr()
    assert train(*flags, "--steps", "4", "--init-from", "moved") == 2
    assert "init_from: the run in run has " in capsys.readouterr().err
