"""The documents of a run: held-out and test data, checked at the start; known again when it is resumed or evaluated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import training_settings
from memformer import cli
from memformer.data import fingerprint, from_rows, held_out_split
from memformer.settings import FORMER, DocumentSettings, TrainingConfig, read_saved, read_yaml, to_yaml
from memformer.training import Run, assemble, documents_for_test, documents_of

WORDS = "the memory of a segment is read by every layer and written once, so that what was seen is not forgotten. "

Make = Callable[..., TrainingConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Settings of a tiny run on a few documents; ``make(steps=3)`` changes some."""
    for name, count in (("corpus", 6), ("valid", 2), ("final", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} " + WORDS[i:] * (i + 1))

    def made(**changes: Any) -> TrainingConfig:
        given = dict(
            data=tmp_path / "corpus", out=tmp_path / "run", steps=1, dim=8, slots=2, enc_depth=1, dec_depth=1, heads=1,
            lanes=2, segment_length=8, horizon=2, device="cpu", sample_tokens=0,
        )  # fmt: skip
        return training_settings(**{**given, **changes})

    return made


def flags(settings: TrainingConfig, file: Path) -> list[str]:
    file.write_text(to_yaml(settings))
    return ["train", "--config", str(file)]


def names(documents: Any) -> list[str]:
    return [document.name for document in documents]


def test_held_out_and_test_data_are_given(make: Make, tmp_path: Path) -> None:
    settings = make(held_out_data=tmp_path / "valid", test_data=[str(tmp_path / "final")])
    training, held_out = documents_of(settings)
    assert names(training) == [f"{i}.txt" for i in range(6)]
    assert [bytes(d)[:6] for d in held_out] == [b"valid "] * 2
    assert [bytes(d)[:6] for d in documents_for_test(settings)] == [b"final "]
    parts = assemble(settings)
    assert names(parts.held_out) == ["0.txt", "1.txt"]
    assert (parts.held_out_fingerprint, parts.test_fingerprint) == (fingerprint(held_out), fingerprint(parts.test))
    assert documents_for_test(make()) == []
    with pytest.raises(ValueError, match="held_out: 24 has no meaning beside held_out_data"):
        make(held_out_data=tmp_path / "valid", held_out=24)


def test_a_file_in_two_sets_is_refused(make: Make, tmp_path: Path) -> None:
    for changes, sets in [
        (dict(held_out_data=tmp_path / "corpus" / "3.txt"), "data and in held_out_data"),
        (dict(test_data=tmp_path), "data and in test_data"),
        (dict(held_out_data=tmp_path / "valid", test_data=tmp_path / "valid"), "held_out_data and in test_data"),
    ]:
        with pytest.raises(ValueError, match=rf"\.txt: is in {sets}, so what is measured would be what was learned"):
            assemble(make(**changes))
    training, held_out = documents_of(make(exclude=["3.*"], held_out_data=tmp_path / "valid" / "0.txt"))
    assert len(training) == 5
    assert len(held_out) == 1
    (tmp_path / "corpus" / "sub").mkdir()
    (tmp_path / "corpus" / "sub" / "x.txt").write_text(WORDS)
    training, held_out = documents_of(make(exclude=["sub/"], held_out_data=tmp_path / "corpus" / "sub"))
    assert (len(training), names(held_out)) == (6, ["x.txt"])


def test_the_test_is_read_at_the_end_and_by_evaluate(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make(held_out_data=tmp_path / "valid", test_data=tmp_path / "final")
    assert cli.main(flags(settings, tmp_path / "settings.yaml")) == 0
    said = capsys.readouterr().out
    tokens = (tmp_path / "final" / "0.txt").stat().st_size
    assert f"2 documents ({2 * len('valid ') + 3 * len(WORDS) - 2:,} bytes) held out ({tmp_path / 'valid'})" in said
    assert f"\ntest        {tokens + 1:,} tokens of 1 document: " in said
    run = str(tmp_path / "run")
    assert cli.main(["evaluate", "--checkpoint", run, "--test", "--memory", "on", "--device", "cpu"]) == 0
    assert f"on {tokens + 1:,} tokens of 1 document" in capsys.readouterr().out
    (tmp_path / "corpus" / "new.txt").write_text(WORDS)
    assert cli.main(["evaluate", "--checkpoint", run, "--device", "cpu"]) == 2
    assert "(was the data changed?), so what it held out cannot be told" in capsys.readouterr().err
    assert cli.main(["evaluate", "--checkpoint", run, "--test", "--data", "x"]) == 2
    assert "test: reads the run's --test-data; leave --data out" in capsys.readouterr().err
    assert cli.main(["evaluate", "--checkpoint", run, "--text-field", "body"]) == 2
    assert "text_field: says how --data is read, and none was given" in capsys.readouterr().err


def test_held_out_and_test_documents_are_checked_at_the_start(make: Make, tmp_path: Path) -> None:
    ids = np.arange(3000, dtype=np.uint16) % 50
    for i in range(5):
        ids.tofile(tmp_path / f"{i}.bin")
    wrong = ids.copy()
    wrong[2990] = 60  # only just in the end of the last file, which is held out or for the test
    wrong.tofile(tmp_path / "wrong.bin")
    how = dict(data=tmp_path / "0.bin", tokenizer="ids", vocabulary=50)
    for changes in (dict(data=tmp_path / "wrong.bin"), dict(test_data=tmp_path / "wrong.bin"),
                    dict(held_out_data=tmp_path / "wrong.bin")):  # fmt: skip
        with pytest.raises(ValueError, match=r"wrong\.bin: token 60 at position .* is not in the vocabulary of 50"):
            assemble(make(**how | changes))
    assert not (tmp_path / "run").exists()
    assemble(make(**how))


def test_an_unknown_character_of_the_held_out_part_is_found_at_the_start(make: Make, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("a " * 480 + "b")
    with pytest.raises(ValueError, match=r"a\.txt: this tokenizer has no token for 'b'"):
        assemble(make(data=tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer.json")))


def test_a_limit_inside_the_first_character(make: Make, tmp_path: Path) -> None:
    (tmp_path / "valid" / "0.txt").write_text("éé")
    settings = make(held_out_data=tmp_path / "valid", eval_limit=1)
    with pytest.raises(ValueError, match=r"eval_limit: 1 holds not even the first character of 0\.txt"):
        assemble(settings)
    run = Run(make(held_out_data=tmp_path / "valid", eval_limit=5))
    assert [bytes(d) for d in run.held_out] == ["éé".encode(), b"v"]
    list(run.train())


def test_documents_made_in_python(make: Make) -> None:
    rows = from_rows([{"text": f"{i} {WORDS}"} for i in range(100)])
    training, held_out = held_out_split(rows)
    settings = make(data=())
    run = Run(settings, assemble(settings, documents=(training, held_out)))
    list(run.train())
    again = dataclasses.replace(settings, resume=True, steps=2)
    with pytest.raises(ValueError, match="the training documents are not those"):
        assemble(again, documents=(held_out, training))
    assert Run(again, assemble(again, documents=(training, held_out))).step == 1
    with pytest.raises(ValueError, match="documents: given beside the settings' data"):
        assemble(make(out=settings.out / "new"), documents=(training, held_out))
    with pytest.raises(ValueError, match="documents: expected some to train on and some held out, got 100 and 0"):
        assemble(again, documents=(rows, []))


def test_a_runs_own_files_are_no_data(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with ``--data .`` and the default ``--out``: the run can be resumed and evaluated."""
    settings = make(data=tmp_path / "corpus", out=tmp_path / "corpus" / "runs" / "default")
    assert cli.main(flags(settings, tmp_path / "settings.yaml")) == 0
    out = str(settings.out)
    assert cli.main(["train", "--resume", "--out", out, "--steps", "2"]) == 0
    assert cli.main(["evaluate", "--checkpoint", out, "--device", "cpu"]) == 0
    assert "1 folders of a run, whose own files are no data" in capsys.readouterr().err


def test_a_foreign_array_beside_texts(make: Make, tmp_path: Path) -> None:
    np.save(tmp_path / "corpus" / "scores.npy", np.arange(9))
    with pytest.warns(UserWarning, match="1 token ids beside text"):
        assert len(documents_of(make())[0]) == 6


def test_how_much_is_held_out_is_as_it_was_for_saved_runs() -> None:
    assert FORMER["documents"]["held_out_by"] == "name"
    assert read_saved({}).documents.held_out_by == "name"
    assert TrainingConfig().documents.held_out_by == "size"


@pytest.mark.parametrize("flag", ["--data", "--held-out-data", "--test-data", "--include", "--exclude"])
@pytest.mark.parametrize("after", [[], ["--seed", "1"]])
def test_an_unset_variable_is_not_the_default_data(
    flag: str, after: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in ``--data $UNSET``."""
    for given in (flag, f"{flag}="):
        assert cli.main(["train", "--out", str(tmp_path / "run"), "--steps", "1", given, *after]) == 2
        assert f"{flag}: an argument is empty: is a variable" in capsys.readouterr().err


def test_paths_of_settings(tmp_path: Path) -> None:
    for given in ("a", Path("a"), ["a"], (Path("a"),)):
        settings = TrainingConfig(data=given, documents=DocumentSettings(test_data=given))  # type: ignore[arg-type]
        assert settings.data == settings.documents.test_data == (Path("a"),)
        (tmp_path / "a.yaml").write_text(to_yaml(settings))
        assert read_yaml(tmp_path / "a.yaml", TrainingConfig()) == settings
    with pytest.raises(ValueError, match="data: expected a list, got 3"):
        TrainingConfig(data=3)  # type: ignore[arg-type]
    assert DocumentSettings(include="*.md").include == ("*.md",)  # type: ignore[arg-type]


def test_names_that_are_not_utf8_can_be_saved(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        (tmp_path / "corpus").rename(tmp_path / "caf\udce9")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes none")
    settings = make(data=tmp_path / "caf\udce9")
    assert cli.main(flags(settings, tmp_path / "settings.yaml")) == 0
    capsys.readouterr().out.encode()
    saved = json.loads((settings.out / "step-000001" / "training.json").read_text())
    assert saved["settings"]["data"] == [str(tmp_path / "caf\udce9")]
    assert cli.main(["evaluate", "--checkpoint", str(settings.out), "--device", "cpu"]) == 0
