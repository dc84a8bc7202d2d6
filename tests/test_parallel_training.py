"""Two processes with half the lanes each give the parameters of one process with all of them (DDP and FSDP2, gloo).

In float64: a bias of keys has no gradient but rounding errors, which differ and which AdamW makes as large as any.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from helpers import training_settings
from memformer import Memformer
from memformer.training import Run, checkpoints
from processes import two_processes

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORDS = "the memory of a segment is read by every layer and written once, so that what was seen is not forgotten. "


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def settings(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(9):
        (corpus / f"{i}.txt").write_text(WORDS[i:] * (1 + i % 4))

    def make(**changes):
        given = dict(
            data=(corpus,), out=tmp_path / "run", steps=3, dim=16, slots=3, enc_depth=1, dec_depth=1, heads=2,
            lanes=4, segment_length=8, horizon=3, warmup=1, log_every=1, eval_every=3, device="cpu", accumulate=2,
            continuation=0.5, infilling=0.3, recall=0.2, ema=0.9, learning_rate=1e-3,
        )  # fmt: skip
        return training_settings(**{**given, **changes})

    return make


def work(rank, settings, stop_after=None):
    """Train; the metrics of this process."""
    torch.set_default_dtype(torch.float64)
    run, lines = Run(settings), []
    for metrics in run.train():
        lines.append({k: v for k, v in dataclasses.asdict(metrics).items() if isinstance(v, (int, float))})
        if metrics.step == stop_after and rank == 1:  # one process alone is asked to stop: all do
            run.stop()
    return lines


def state(out):
    """Everything in a run's newest checkpoint."""
    folder = checkpoints.newest(Path(out))
    return dict(Memformer.from_pretrained(folder).state_dict()), *reversed(checkpoints.load_state(folder))


def assert_same(a, b, tolerance):
    (weights_a, tensors_a, numbers_a), (weights_b, tensors_b, numbers_b) = state(a), state(b)
    assert_close(weights_a, weights_b, rtol=tolerance, atol=tolerance)
    assert_close(tensors_a, tensors_b, rtol=tolerance, atol=tolerance)
    for name in ("step", "stream", "documents"):
        assert numbers_a[name] == numbers_b[name]
    assert numbers_a["best"]["loss_nats"] == pytest.approx(numbers_b["best"]["loss_nats"], rel=1e-5)


@pytest.mark.parametrize(("parallel", "schedule"), [("ddp", "budget:9MB"), ("fsdp", "binomial:1")])
def test_two_processes_equal_one(settings, tmp_path, parallel, schedule):
    """From a horizon of one on, where nothing reaches the writer; whichever memories and graphs are kept."""
    options = dict(horizon_start=1, horizon_steps=2, tie_embeddings=parallel == "ddp")
    alone = Run(settings(out=tmp_path / "alone", **options))
    expected = [dataclasses.asdict(m) for m in alone.train()]
    first, second = two_processes(work, tmp_path, settings(parallel=parallel, schedule=schedule, **options))
    assert_same(tmp_path / "run", tmp_path / "alone", 1e-9)
    for metrics in (first, second):
        for line, other in zip(metrics, expected, strict=True):
            for name in set(line) - {"tokens_per_second", "seconds"}:
                assert line[name] == pytest.approx(other[name], rel=1e-6), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(settings, tmp_path, parallel):
    tied = parallel == "ddp"
    options = dict(steps=4, eval_every=2, tie_embeddings=tied)
    list(Run(settings(out=tmp_path / "alone", **options)).train())
    together = settings(parallel=parallel, **options)
    two_processes(work, tmp_path, together, 1)
    assert checkpoints.newest(tmp_path / "run").name == "step-000002"
    alone = Run(settings(resume=True, **options))
    for metrics in alone.train():
        if metrics.step == 3:
            alone.stop()
    assert_same(tmp_path / "run", tmp_path / "alone", 1e-9)
    again = dict(out=tmp_path / "run2", tie_embeddings=tied)
    list(Run(settings(steps=3, **again)).train())
    two_processes(work, tmp_path, settings(steps=4, resume=True, parallel=parallel, eval_every=2, **again))


def test_lanes_that_cannot_be_divided_are_refused(settings, tmp_path):
    errors = two_processes(refused, tmp_path, settings(lanes=3))
    assert errors == ["lanes: 3 cannot be divided evenly among 2 processes"] * 2


def refused(rank, settings):
    try:
        Run(settings)
    except ValueError as error:
        return str(error)
