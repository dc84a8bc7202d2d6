"""The mean of several checkpoints as one model, from Python and from the command line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from helpers import tiny, training_settings
from memformer import Memformer, cli
from memformer.data import load_tokenizer
from memformer.training import Run, average


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with three checkpoints."""
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("one line of a text, and then another one. " * 4, encoding="utf-8")
    settings = training_settings(
        data=tuple(tmp_path.glob("*.txt")), out=tmp_path / "run", steps=3, dim=8, slots=2, enc_depth=1, dec_depth=1,
        heads=2, lanes=2, segment_length=8, horizon=2, save_every=1, keep=5, device="cpu",
    )  # fmt: skip
    list(Run(settings).train())
    return tmp_path / "run"


def test_the_mean_is_rounded_once(tmp_path: Path) -> None:
    """In float32 the sum of these three would lose what the second one adds."""
    values = [1e8, 1.0, -1e8]
    for i, value in enumerate(values):
        model = tiny(tie_embeddings=True).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        model.save_pretrained(tmp_path / str(i))
    mean = average([tmp_path / "0", str(tmp_path / "1"), tmp_path / "2"])
    third = torch.tensor(1 / 3, dtype=torch.float64).float()
    for name, parameter in mean.named_parameters():
        assert parameter.dtype == torch.float32
        assert (parameter == third).all(), name
    assert mean.decoder is not None
    assert mean.decoder.to_logits.weight is mean.encoder.embedding.weight


def test_the_last_checkpoints_of_a_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_folder.parent / "mean"
    assert cli.main(["average", "--checkpoint", str(run_folder), "--last", "2", "--out", str(out)]) == 0
    assert "the mean of step-000002, step-000003" in capsys.readouterr().out
    second, third, mean = (
        load_file(folder / "model.safetensors")
        for folder in (run_folder / "step-000002", run_folder / "step-000003", out)
    )
    assert mean.keys() == second.keys()
    for name, tensor in mean.items():
        assert_close(tensor, ((second[name].double() + third[name].double()) / 2).float(), rtol=0, atol=0)
    assert Memformer.from_pretrained(out).config == Memformer.from_pretrained(run_folder / "step-000003").config
    assert load_tokenizer(out).vocabulary == 260
    # It is a model like others, and knows what the run held out.
    assert cli.main(["generate", "--checkpoint", str(out), "--prompt", "one", "--max-new-tokens", "3"]) == 0
    assert cli.main(["evaluate", "--checkpoint", str(out), "--memory", "on"]) == 0
    assert "of 1 document" in capsys.readouterr().out


def test_all_checkpoints_are_the_default(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["average", "--checkpoint", str(run_folder), "--out", str(run_folder.parent / "mean")]) == 0
    assert "the mean of step-000001, step-000002, step-000003" in capsys.readouterr().out


def test_what_cannot_be_averaged(run_folder: Path) -> None:
    tmp_path = run_folder.parent
    tiny().save_pretrained(tmp_path / "a")
    tiny(enc_depth=1).save_pretrained(tmp_path / "b")
    broken = tiny()
    with torch.no_grad():
        broken.encoder.norm.bias.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "c")
    tiny().save_pretrained(tmp_path / "d")
    load_tokenizer(run_folder / "step-000003").save(tmp_path / "d")
    for folders, message in [
        (["a", "b"], r"b: its model is MemformerConfig\(.*, expected that of .*a, "),
        (["a", "c"], r"encoder\.norm\.bias: not finite in one of .*c; leave that one out"),
        (["a", "d"], "d: its tokenizer is not that of .*a, so its weights are of other tokens"),
        (["a"], "folders: expected a list of at least two models to average, got "),
    ]:
        with pytest.raises(ValueError, match=message):
            average([tmp_path / name for name in folders])
    with pytest.raises(ValueError, match="folders: expected a list of at least two models to average, got '/runs/x'"):
        average("/runs/x")
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        average([tmp_path / "a", tmp_path / "nowhere"])
    damaged = run_folder / "step-000002" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match="step-000002: damaged"):
        average([run_folder / "step-000002", run_folder / "step-000003"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--last", "1", "--out", "mean"], "last: expected at least 2 checkpoints to average, got 1"),
        (["--last", "4", "--out", "mean"], "expected a run with at least 4 checkpoints, got 3; memformer train keeps"),
        (["--out", "run"], "out: run holds something already; choose another folder"),
        (["--out", "0.txt"], "out: 0.txt holds something already"),
    ],
)
def test_what_the_command_refuses(
    run_folder: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(run_folder.parent)
    assert cli.main(["average", "--checkpoint", "run", *arguments]) == 2
    assert message in capsys.readouterr().err
