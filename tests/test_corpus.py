"""What a run reads: encoded once, by one process; the tokenizer that fits, and is the same for all."""

import dataclasses
import errno
import re
import shutil
import warnings

import numpy as np
import pytest
import torch.distributed as dist

from helpers import training_settings
from memformer.cli import main
from memformer.data import BPETokenizer, load_tokenizer, open_tokens, read_documents, write_tokens
from memformer.parallel import Ranks
from memformer.training import Run, checkpoints
from memformer.training.corpus import corpus_of
from processes import two_processes

TEXT = "To read a long text, remember it. naïve 🙂\n"
SMALL = "--steps 2 --dim 16 --slots 2 --enc-depth 1 --dec-depth 1 --heads 2 --segment-length 8 --lanes 2 --horizon 2"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with some texts in it."""
    (tmp_path / "texts").mkdir()
    for i in range(6):
        (tmp_path / "texts" / f"{i}.txt").write_text(TEXT[i:] * (10 + i), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_for(folder, **changes):
    given = dict(
        data=(folder / "texts",), out=folder / "run", steps=2, dim=16, slots=2, enc_depth=1, dec_depth=1, heads=2,
        lanes=2, segment_length=8, horizon=2, eval_every=1, device="cpu", tokenizer="bpe", vocabulary=300, held_out=3,
    )  # fmt: skip
    return training_settings(**{**given, **changes})


@pytest.fixture
def encodings(monkeypatch):
    """How often something was encoded."""
    made, encode = [], BPETokenizer._encode
    monkeypatch.setattr(BPETokenizer, "_encode", lambda self, text: made.append(text) or encode(self, text))
    return made


def test_a_run_encodes_each_document_once(folder, encodings):
    """Not again at its evaluations, nor when it is resumed."""
    run = Run(settings_for(folder))
    list(run.train())
    texts = [*run.training, *run.held_out]
    assert len(encodings) == len(texts) == 6
    assert {bytes(d).decode() for d in texts} == set(encodings)
    again = Run(settings_for(folder, steps=4, resume=True))
    result = list(again.train())[-1]
    assert len(encodings) == 6
    assert result.bits_per_byte == pytest.approx(
        result.bits_per_token * result.tokens / sum(len(d) for d in again.held_out)
    )
    assert sorted(re.sub("-[0-9a-f]{16}$", "", f.name) for f in (folder / "run" / "tokens").iterdir()) == [
        "bpe", "held-out", "training",
    ]  # fmt: skip


def test_other_documents_are_refused_before_they_are_encoded(folder, encodings):
    list(Run(settings_for(folder)).train())
    before, kept = len(encodings), sorted((folder / "run" / "tokens").iterdir())
    for file in (folder / "texts").iterdir():
        file.write_text(file.read_text(encoding="utf-8") + "And more.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"documents are not those of .* add --new-data"):
        Run(settings_for(folder, steps=4, resume=True))
    assert len(encodings) == before
    assert sorted((folder / "run" / "tokens").iterdir()) == kept


def test_what_is_read_is_what_encoding_gives(folder):
    """The same losses as where a tokenizer.json encodes in memory."""
    run = Run(settings_for(folder))
    tokenizer = run.tokenizer
    for documents in (run.training, run.held_out):
        for document in documents:
            assert document.content.tokens[:].tolist() == tokenizer.encode(bytes(document)).tolist()


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "other"])
def test_damaged_or_foreign_files_are_made_anew_with_a_word(folder, encodings, damage):
    list(Run(settings_for(folder)).train())
    (training,) = (folder / "run" / "tokens").glob("training-*")
    ids = training / "tokens.bin"
    raw, count = ids.read_bytes(), len(open_tokens(training).documents)
    if damage == "cut":
        ids.write_bytes(raw[:-2])
    elif damage == "flipped":
        ids.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    elif damage == "header":
        (training / "tokens.json").unlink()
    else:
        write_tokens(read_documents([folder / "texts"]), load_tokenizer(training), training)
    del encodings[:]
    with pytest.warns(UserWarning, match=r"training-.*; the documents are encoded anew"):
        Run(settings_for(folder, steps=4, resume=True))
    assert len(encodings) == count
    assert ids.read_bytes() == raw


def test_other_data_or_another_tokenizer_never_gets_the_old_ids(folder, encodings):
    Run(settings_for(folder))
    (folder / "texts" / "0.txt").write_text("Another text. " * 20)
    run = Run(settings_for(folder))
    for document in run.training:
        assert document.content.tokens[:].tolist() == run.tokenizer.encode(bytes(document)).tolist()
    smaller = Run(settings_for(folder, vocabulary=280))
    assert smaller.tokenizer.ordinary == 280
    for document in smaller.training:
        assert document.content.tokens[:].tolist() == smaller.tokenizer.encode(bytes(document)).tolist()


def test_a_document_without_a_token_is_left_out_of_a_run(folder):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "words.json"))
    shutil.rmtree(folder / "texts")
    (folder / "texts").mkdir()
    for i in range(6):
        (folder / "texts" / f"{i}.txt").write_text("   \n" if i == 3 else "one two " * 30)
    how = dict(tokenizer=str(folder / "words.json"), held_out=6)
    with pytest.warns(UserWarning, match=r"1 documents, such as 3\.txt, are left out: this tokenizer makes no token"):
        run = Run(settings_for(folder, **how))
    assert "3.txt" not in [d.name for d in run.training]
    assert len(run.training) + len(run.held_out) == 5
    for i in range(6):
        (folder / "texts" / f"{i}.txt").write_text("   \n")
    with pytest.raises(ValueError, match=r"it makes no token of any of the . (training|held-out) documents"):
        Run(settings_for(folder, **how))


def test_a_bpe_is_not_trained_on_ids(folder):
    np.save(folder / "texts" / "ids.npy", np.arange(100, dtype=np.uint16))
    for places in (["ids.npy"], ["ids.npy", "0.txt", "1.txt"]):  # in a folder they are left out with a warning
        settings = settings_for(folder, data=tuple(folder / "texts" / name for name in places), held_out=10)
        with pytest.raises(ValueError, match=r"bpe is trained on text, and ids\.npy holds token ids: give the tok"):
            Run(settings)


# --- Encoded ahead


def encoded(folder, *more):
    assert main(["encode", "--data", "texts", "--out", "encoded", "--vocabulary", "300", *more]) == 0


def test_encode_then_train_evaluate_inspect(folder, capsys, encodings):
    encoded(folder)
    printed = capsys.readouterr().out
    size = sum(f.stat().st_size for f in (folder / "texts").iterdir())
    files = open_tokens(folder / "encoded", check=True)
    assert f"data        6 documents ({size:,} bytes)" in printed
    assert f"tokens      {files.num_tokens:,}, {size / files.num_tokens:.3f} bytes per token" in printed
    assert "memformer train --data encoded" in printed
    del encodings[:]
    assert main(["train", "--data", "encoded", "--out", "run", "--held-out", "3", *SMALL.split()]) == 0
    printed = capsys.readouterr().out
    assert "293 tokens" in printed
    assert "bits per byte" in printed
    assert main(["train", "--resume", "--out", "run", "--steps", "4"]) == 0
    capsys.readouterr()
    for command in (["evaluate"], ["evaluate", "--data", "encoded"]):
        assert main([*command, "--checkpoint", "run"]) == 0
        assert capsys.readouterr().out.count(" bits per byte") == 2
    assert main(["inspect", "--checkpoint", "run", "--data", "encoded"]) == 0
    assert encodings == []
    # The same numbers as from the texts themselves.
    numbers = []
    for data in ("encoded", "texts"):
        assert main(["evaluate", "--checkpoint", "run", "--data", data, "--memory", "on"]) == 0
        numbers.append(re.findall(r"([\d.]+) bits per byte, ([\d.]+) nats", capsys.readouterr().out)[0])
    assert numbers[0] == numbers[1]


def test_encode_with_a_tokenizer_of_ones_own(folder, capsys):
    encoded(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = ["--tokenizer", "encoded/tokenizer.json", "--out", "again"]
        assert main(["encode", "--data", "texts", *own]) == 0
    assert (folder / "again" / "tokens.bin").read_bytes() == (folder / "encoded" / "tokens.bin").read_bytes()
    # The tokenizer may be named, if it is the one.
    named = ["--tokenizer", "encoded/tokenizer.json", *SMALL.split()]
    assert main(["train", "--data", "again", "--out", "run", *named]) == 0


def test_encode_and_its_folders_refuse_by_a_sentence(folder, capsys):
    encoded(folder)
    np.save(folder / "ids.npy", np.arange(9, dtype=np.uint16))
    other = ["--vocabulary", "270", "--out", "other"]
    assert main(["encode", "--data", "texts", *other]) == 0
    assert main(["train", "--data", "texts", "--out", "bytes", *SMALL.split()]) == 0
    run = ["train", "--data", "encoded", "--out", "refused", *SMALL.split()]
    for arguments, message in [
        (["encode", "--data", "texts", "--out", "encoded"], "encoded: exists already; remove it, or choose another"),
        (["encode", "--data", "texts", "--out", "new", "--tokenizer", "bytes"], "bytes need no encoding"),
        (["encode", "--data", "texts", "--out", "new", "--tokenizer", "none.json"], "none.json: no such file"),
        (
            ["encode", "--data", "texts", "--out", "new", "--vocabulary", "10"],
            "error: vocabulary: expected a whole number of at least 256",
        ),
        (["encode", "--data", "ids.npy", "--out", "new"], "ids.npy: holds token ids, which are encoded already"),
        ([*run, "--tokenizer", "bpe"], "was encoded by the tokenizer that lies in it, got bpe: leave it out"),
        ([*run, "--tokenizer", "ids"], "was encoded by the tokenizer that lies in it, got ids: leave it out"),
        ([*run, "--tokenizer", "other/tokenizer.json"], "was encoded by the tokenizer that lies in it, got other"),
        (["train", "--data", "encoded", "other", *run[3:]], "other was encoded by another tokenizer than encoded"),
        (["evaluate", "--checkpoint", "bytes", "--data", "encoded"], "was encoded by another tokenizer than this one"),
        (["inspect", "--checkpoint", "bytes", "--data", "encoded"], "was encoded by another tokenizer than this one"),
    ]:
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err
    ids = folder / "encoded" / "tokens.bin"
    ids.write_bytes(ids.read_bytes()[::-1])
    assert main(run) == 2
    assert "encoded: damaged (tokens.bin: another checksum)" in capsys.readouterr().err
    assert not (folder / "new").exists()


def test_ids_beside_text_are_left_out_as_in_training(folder, capsys):
    np.save(folder / "texts" / "ids.npy", np.arange(9, dtype=np.uint16))
    encoded(folder)
    assert "1 token ids beside text" in capsys.readouterr().err
    assert main(["train", "--data", "texts", "--out", "run", *SMALL.split()]) == 0
    assert main(["evaluate", "--checkpoint", "run", "--data", "texts"]) == 0
    assert "1 token ids beside text" in capsys.readouterr().err


def test_a_tokenizer_that_another_run_has_made_meanwhile_is_taken(folder, monkeypatch):
    def beaten(source, target):
        shutil.copytree(source, target)
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(target))

    monkeypatch.setattr("memformer.training.corpus.os.replace", beaten)
    run = Run(settings_for(folder))
    assert run.tokenizer.ordinary
    assert [found.name for found in (run.settings.out / "tokens").glob(".*unfinished*")] == []


def test_text_beside_token_files_is_encoded_by_their_tokenizer(folder):
    encoded(folder)
    (folder / "more.txt").write_text(TEXT * 10, encoding="utf-8")
    run = Run(settings_for(folder, data=(folder / "encoded", folder / "more.txt"), tokenizer="bytes", held_out=7))
    assert run.tokenizer.ordinary == 289
    list(run.train())
    assert checkpoints.newest(folder / "run") is not None


def test_bytes_of_texts_and_ids_are_counted_apart(folder, capsys):
    encoded(folder)
    (folder / "more.txt").write_text(TEXT * 10, encoding="utf-8")
    size, ids = (folder / "more.txt").stat().st_size, open_tokens(folder / "encoded").num_tokens
    held_out = ["--held-out-data", "texts/0.txt", "--sample-tokens", "0"]
    assert main(["train", "--data", "encoded", "more.txt", "--out", "run", *held_out, *SMALL.split()]) == 0
    assert f"data        7 documents ({size:,} bytes and {ids:,} ids)" in capsys.readouterr().out


# --- Two processes


def shares(rank, settings):
    """What each process gets, and how often it encoded."""
    made, encode = [], BPETokenizer._encode
    BPETokenizer._encode = lambda self, text: made.append(text) or encode(self, text)
    trained, train = [], BPETokenizer.train
    BPETokenizer.train = classmethod(lambda cls, texts, size: trained.append(size) or train(texts, size))
    found = corpus_of(settings, Ranks(), None)
    ids = [d.content.tokens[:].tolist() for d in [*found.training, *found.held_out]]
    mistakes = []
    for change in (
        dict(data=(settings.data[0] / f"{rank}.txt",)),
        dict(documents=dataclasses.replace(settings.documents, vocabulary=10)),
    ):
        try:
            corpus_of(dataclasses.replace(settings, **change), Ranks(), None)
        except ValueError as error:
            mistakes.append(str(error))
    return len(made), len(trained), ids, mistakes


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_one_process_trains_and_encodes_and_all_read(folder):
    (first, second) = two_processes(shares, folder, settings_for(folder))
    assert (first[0], second[0]) == (6, 0)
    assert (first[1], second[1]) == (2, 0)  # the second time the size is refused
    assert first[2] == second[2]
    different, refused = first[3]
    assert second[3] == [different, f"process 0: {refused}"]
    assert re.match(r"process 1 \(on .*\) has another training text than process 0", different)
    assert refused.startswith("vocabulary: expected a whole number of at least 256")
