"""Training runs: interrupted and resumed equals uninterrupted, bit for bit; nothing is lost when saving fails."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from memformer import Memformer, checkpoints
from memformer.config import TrainingConfig
from memformer.data import START, Document
from memformer.training import Run, evaluate, saved_settings

WORDS = "the memory of a segment is read by every layer and written once, so that what was seen is not forgotten. "


@pytest.fixture
def settings(tmp_path):
    """Settings of a tiny run on a few documents of unequal length; ``settings(steps=3)`` changes some."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(6):
        (corpus / f"{i}.txt").write_text(WORDS[i:] * (i + 1))

    def make(**changes):
        given = dict(
            data=(corpus,), out=tmp_path / "run", steps=6, dim=16, slots=3, enc_depth=1, dec_depth=1, heads=2,
            lanes=2, segment_length=8, horizon=3, warmup=2, log_every=1, save_every=2, dropout=0.2,
            learning_rate=1e-2, device="cpu",
        )  # fmt: skip
        return TrainingConfig(**{**given, **changes})

    return make


def weights(run_or_folder):
    model = run_or_folder.model if isinstance(run_or_folder, Run) else Memformer.from_pretrained(run_or_folder)
    return dict(model.state_dict())


def lines(out):
    """The metrics of a run, without those of the clock."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in event.items() if k not in ("tokens_per_second", "seconds")} for event in events]


@pytest.mark.parametrize("interrupted_after", [1, 2, 5])
def test_interrupted_and_resumed_equals_uninterrupted(settings, tmp_path, interrupted_after):
    whole = Run(settings(out=tmp_path / "whole"))
    list(whole.train())
    first = Run(settings())
    for metrics in first.train():
        if metrics.step == interrupted_after:
            first.stop()
    assert first.step <= interrupted_after + 1 < 7
    second = Run(settings(resume=True))
    assert second.step == first.step
    list(second.train())
    assert_close(weights(second), weights(whole), rtol=0, atol=0)
    assert_close(second.memory, whole.memory, rtol=0, atol=0)
    kept = lines(tmp_path / "run")
    assert [line["step"] for line in kept] == [1, 2, 3, 4, 5, 6]
    assert kept == lines(tmp_path / "whole")


def test_a_run_that_lost_its_last_steps_repeats_them(settings, tmp_path):
    """As after SIGKILL: the newest checkpoint is older than the last metrics."""
    whole = Run(settings(steps=5, save_every=3))
    steps = whole.train()
    for _ in range(4):
        next(steps)
    steps.close()
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    resumed = Run(settings(steps=5, save_every=3, resume=True))
    assert resumed.step == 3
    list(resumed.train())
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    again = Run(settings(steps=5, out=tmp_path / "again"))
    list(again.train())
    assert_close(weights(resumed), weights(again), rtol=0, atol=0)


def test_training_leaves_the_global_generator_alone(settings):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(Run(settings(steps=2)).train())
    assert_close(torch.rand(1), expected, rtol=0, atol=0)


def test_the_seed_decides_the_run(settings, tmp_path):
    runs = [Run(settings(out=tmp_path / str(i), seed=seed, steps=1)) for i, seed in enumerate((0, 0, 1))]
    for run in runs:
        list(run.train())
    a, b, c = (weights(run)["encoder.embedding.weight"] for run in runs)
    assert a.equal(b)
    assert not a.equal(c)


def test_the_loss_falls(settings):
    metrics = list(Run(settings(steps=60, dropout=0.0, save_every=100)).train())
    assert metrics[0].loss_nats > 4.5
    assert metrics[-1].loss_nats < 3.2
    assert metrics[-1].bits_per_byte == pytest.approx(metrics[-1].loss_nats / math.log(2))


def test_the_learning_rate_rises_then_falls_to_zero(settings):
    run = Run(settings(steps=10, warmup=4, learning_rate=1.0))
    rates = [run.learning_rate(step) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[10] == pytest.approx(0)


def test_only_matrices_decay(settings):
    decaying, plain = Run(settings()).optimizer.param_groups
    assert decaying["weight_decay"] > 0
    assert plain["weight_decay"] == 0
    assert {p.dim() for p in plain["params"]} == {1}


def test_the_last_two_checkpoints_are_kept(settings, tmp_path):
    list(Run(settings(steps=5)).train())
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "step-000004", "step-000005"]
    assert checkpoints.find(tmp_path / "run").name == "step-000005"
    assert checkpoints.find(tmp_path / "run" / "step-000004").name == "step-000004"


@pytest.mark.parametrize("failing", ["save_file", "rename"])
def test_a_failed_save_leaves_the_one_before(settings, tmp_path, monkeypatch, failing):
    run = Run(settings(steps=4))

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    steps = run.train()
    for _ in range(3):
        next(steps)
    with monkeypatch.context() as patch:
        patch.setattr("memformer.checkpoints.save_file" if failing == "save_file" else "pathlib.Path.rename", fail)
        with pytest.raises(OSError, match="No space left"):
            list(steps)
    assert checkpoints.newest(tmp_path / "run").name == "step-000002"
    resumed = Run(settings(steps=4, resume=True))
    list(resumed.train())
    again = Run(settings(steps=4, out=tmp_path / "again"))
    list(again.train())
    assert_close(weights(resumed), weights(again), rtol=0, atol=0)
    assert not list((tmp_path / "run").glob(".unfinished*"))


def test_a_run_is_never_overwritten(settings):
    list(Run(settings(steps=2)).train())
    with pytest.raises(FileExistsError, match=r"holds a run already \(step-000002\): add --resume"):
        Run(settings())


def test_resuming_refuses_what_does_not_fit(settings, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume"):
        Run(settings(resume=True))
    list(Run(settings(steps=2)).train())
    with pytest.raises(ValueError, match="at step 2 already: raise --steps"):
        Run(settings(steps=2, resume=True))
    with pytest.raises(ValueError, match=r"dim: the run in .* has 16, got 32; it cannot change"):
        Run(settings(dim=32, resume=True))
    (tmp_path / "corpus" / "5.txt").write_text("other")
    (tmp_path / "corpus" / "4.txt").write_text("other")
    with pytest.raises(ValueError, match="was the data changed"):
        Run(settings(resume=True))


@pytest.mark.parametrize("file", ["training.json", "training.safetensors", "model.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_refused_by_name(settings, tmp_path, file):
    list(Run(settings(steps=2)).train())
    damaged = tmp_path / "run" / "step-000002" / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(ValueError, match="step-000002"):
        Run(settings(resume=True))


def test_settings_are_saved_with_the_run(settings, tmp_path):
    list(Run(settings(steps=2)).train())
    assert saved_settings(tmp_path / "run") == settings(steps=2)


def test_a_loss_that_is_not_finite_stops_the_run(settings):
    run = Run(settings())
    with torch.no_grad():
        run.model.decoder.to_logits.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 1: the gradient is not finite"):
        list(run.train())


def test_evaluation_reads_documents_whole(settings):
    """Against each document alone, segment by segment, through the model's own call."""
    run = Run(settings())
    documents = [Document(str(n), WORDS.encode()[:n]) for n in (1, 8, 21, 60)]
    result = evaluate(run.model, documents, lanes=3, horizon=2)
    nats, model = 0.0, run.model.eval()
    for document in documents:
        tokens, memory, source = torch.tensor([list(document.text)]), None, torch.tensor([[START]])
        for target in tokens.split(8, 1):
            with torch.no_grad():
                _, memory, loss = model(source, torch.cat([torch.tensor([[START]]), target], 1), memory)
            nats, source = nats + float(loss) * target.shape[1], target
    assert result.tokens == 90
    assert result.loss_nats == pytest.approx(nats / 90, rel=1e-5)


def test_evaluation_keeps_the_models_mode(settings):
    model = Run(settings()).model.train()
    evaluate(model, [Document("a", b"abc")])
    assert model.training


def test_settings_check_themselves(settings):
    for name, value, message in [
        ("steps", 0, "steps: expected a whole number of at least 1, got 0"),
        ("warmup", -1, "warmup: expected a whole number of at least 0, got -1"),
        ("learning_rate", 0.0, "learning_rate: expected a number above 0"),
        ("clip", -1.0, "clip: expected a number of at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            settings(**{name: value})
    with pytest.raises(ValueError, match="device: 'abacus' cannot be used here"):
        Run(settings(device="abacus"))
