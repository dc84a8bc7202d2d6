"""Training with captured rollouts, on the CPU as a card: the same run as without."""

import dataclasses
import json
import math

import pytest
import torch
from torch.testing import assert_close

from helpers import tiny_run
from memformer import cli
from memformer.training import Run, read_metrics
from pretend_card import pretend_a_card


@pytest.fixture
def settings(tmp_path):
    return tiny_run(tmp_path, steps=5, log_every=2, eval_every=4)


def outcome(run):
    """What a run leaves: weights, moments, carried memory, metrics without times."""
    lines = [dataclasses.asdict(line) for line in run.train()]
    numbers = [{k: v for k, v in line.items() if "second" not in k} for line in lines]
    return (
        {k: v.clone() for k, v in run.model.state_dict().items()},
        [dict(state) for state in run.parts.optimizer.state.values()],
        run.parts.progress.memory,
        numbers,
    )


VARIANTS = {
    "plain": {},
    "everything": dict(
        accumulate=2, dropout=0.3, ema=0.9, continuation=0.5, infilling=0.3, recall=0.2, horizon_start=2,
        horizon_steps=4, schedule="binomial:2",
    ),
    "causal": dict(architecture="causal", enc_depth=None, dec_depth=None, depth=2, overlap=2, dropout=0.1),
    "muon": dict(optimizer="muon"),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_same_run(settings, tmp_path, monkeypatch, variant):
    """To rounding: the divisor of a captured loss is a tensor, a number else."""
    expected = outcome(Run(settings(out=tmp_path / "eager", **VARIANTS[variant])))
    pretend_a_card(monkeypatch)
    run = Run(settings(out=tmp_path / "captured", **VARIANTS[variant]))
    found = outcome(run)
    assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    rollouts = 5 * VARIANTS[variant].get("accumulate", 1)
    assert run._stepper.launches == rollouts - 1  # the first begins with no memory
    assert run._stepper.waits == (variant == "muon")
    run = Run(settings(out=tmp_path / "off", capture="off", **VARIANTS[variant]))
    assert_close(outcome(run), expected, rtol=0, atol=0, equal_nan=True)
    assert run._stepper.launches == 0


def test_resumed_it_ends_with_the_same_bits(settings, tmp_path, monkeypatch):
    pretend_a_card(monkeypatch)
    changes = {**VARIANTS["everything"], "log_every": 1}
    weights, moments, memory, _ = outcome(Run(settings(out=tmp_path / "whole", **changes)))
    run = Run(settings(out=tmp_path / "parts", **changes))
    for line in run.train():
        if line.step == 3:
            run.stop()
    run = Run(settings(out=tmp_path / "parts", resume=True, **changes))
    assert run.step == 4
    assert_close(outcome(run)[:3], (weights, moments, memory), rtol=0, atol=0)


def spoil(run, steps):
    """The gradient of some steps is not finite."""
    update, clip = run._update, run._update._clip

    def spoiled():
        if run.step in steps:
            next(run.model.parameters()).grad.fill_(math.inf)
        return clip()

    update._clip = spoiled


def test_a_step_that_is_left_out_is_named_when_it_is_seen(settings, tmp_path, monkeypatch):
    pretend_a_card(monkeypatch)
    run = Run(settings(steps=9, log_every=4, eval_every=0))
    spoil(run, {5})
    with pytest.raises(FloatingPointError, match=r"^step 6: the gradient is not finite \(loss [\d.]+\); --skip-non"):
        list(run.train())
    assert run.step == 8  # seen with the next metrics
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_steps_that_are_left_out_change_nothing_and_are_counted(settings, tmp_path, monkeypatch):
    def left_out(out, **changes):
        run = Run(settings(out=tmp_path / out, steps=9, log_every=4, eval_every=0, skip_non_finite=2, **changes))
        spoil(run, {2, 5, 6})
        return outcome(run), run.parts.progress.skipped

    expected = left_out("eager")
    pretend_a_card(monkeypatch)
    found = left_out("captured")
    assert found[1] == expected[1] == 3
    # An infinite norm times nothing is no number, here as there: of these steps the learning rate is all that moves.
    assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    run = Run(settings(out=tmp_path / "many", steps=9, log_every=9, skip_non_finite=2))
    spoil(run, {1, 2, 3})
    with pytest.raises(FloatingPointError, match=r"^step 4: .*after 2 such steps in a row"):
        list(run.train())


def test_what_cannot_be_captured(settings, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="capture: expected a CUDA device, got cpu; leave --capture on out"):
        Run(settings(capture="on"))
    with pytest.raises(ValueError, match="capture: expected one of"):
        settings(capture="yes")
    pretend_a_card(monkeypatch)
    monkeypatch.setattr(torch.amp.GradScaler, "is_enabled", lambda self: True)
    with pytest.warns(UserWarning, match=r"capture: the gradient scaler of fp16 looks at .*. Steps run eagerly"):
        assert Run(settings(out=tmp_path / "fp16"))._stepper.launches == 0


def test_ids_are_checked_before_a_launch(settings, tmp_path, monkeypatch):
    pretend_a_card(monkeypatch)
    run = Run(settings())
    rollout = run.parts.stream.rollout

    def beyond(horizon):
        segments = rollout(horizon)
        segments[-1].src[0, 0] = 4000
        return segments

    monkeypatch.setattr(run.parts.stream, "rollout", beyond)
    with pytest.raises(ValueError, match="src: token id 4000 is outside the table of num_tokens ="):
        list(run.train())


def test_the_command(settings, tmp_path, capsys):
    """The setting is kept with the run, and may change when it goes on."""
    data = str(tmp_path / "corpus")
    sizes = ["--dim", "16", "--slots", "3", "--heads", "2", "--enc-depth", "1", "--dec-depth", "1", "--lanes", "2"]
    assert (
        cli.main(["train", "--data", data, "--out", str(tmp_path / "new"), "--steps", "1", *sizes, "--capture", "off"])
        == 0
    )
    assert "capture: 'off'" in (tmp_path / "new" / "run.yaml").read_text()
    assert cli.main(["train", "--out", str(tmp_path / "new"), "--resume", "--steps", "2", "--capture", "on"]) == 2
    assert "capture: expected a CUDA device, got cpu" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "new") if line["event"] == "step"] == [1]
    assert json.loads((tmp_path / "new" / "metrics.jsonl").read_text().splitlines()[0])["skipped"] == 0
