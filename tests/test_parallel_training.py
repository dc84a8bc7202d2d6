"""Two processes with half the lanes each give the parameters of one process with all of them (DDP and FSDP2, gloo).

In float64: a bias of keys has no gradient but rounding errors, which differ and which AdamW makes as large as any.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.testing import assert_close

from helpers import training_settings
from memformer import Memformer, load_model
from memformer.pretrained import SHARDS, read_shards
from memformer.training import Run, checkpoints, resume
from processes import several_processes, two_processes

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
    numbers, tensors = checkpoints.load_state(folder)
    if (folder / SHARDS).is_dir():
        tensors = {n: x for n, x in read_shards(folder / SHARDS).items() if not n.startswith("model/")}
    return dict(load_model(folder).state_dict()), tensors, numbers


def assert_same(a, b, tolerance):
    (weights_a, tensors_a, numbers_a), (weights_b, tensors_b, numbers_b) = state(a), state(b)
    assert_close(weights_a, weights_b, rtol=tolerance, atol=tolerance)
    assert_close(tensors_a, tensors_b, rtol=tolerance, atol=tolerance)
    for name in ("step", "stream", "documents"):
        assert numbers_a[name] == numbers_b[name]
    assert numbers_a["best"]["loss_nats"] == pytest.approx(numbers_b["best"]["loss_nats"], rel=1e-5)


CAUSAL = dict(architecture="causal", depth=3, dec_depth=2, infilling=0.0, recall=0.0)
ONE = {**CAUSAL, "memory_layout": "one"}
"""The other kinds of models, as changes of the settings."""


@pytest.mark.parametrize(
    ("kind", "parallel", "schedule"),
    [
        pytest.param({}, "ddp", "budget:9MB", id="memformer-ddp"),
        pytest.param({}, "fsdp", "binomial:1", id="memformer-fsdp", marks=pytest.mark.thorough),
        pytest.param(CAUSAL, "fsdp", "binomial:1", id="causal-fsdp"),
    ],
)
def test_two_processes_equal_one(settings, tmp_path, kind, parallel, schedule):
    """From a horizon of one on, where nothing reaches the writer; whichever memories and graphs are kept.

    A causal model's layers, which one process runs all at once, are run one after the other where FSDP divides them.
    """
    options = dict(horizon_start=1, horizon_steps=2, tie_embeddings=parallel == "ddp", **kind)
    alone = Run(settings(out=tmp_path / "alone", **options))
    expected = [dataclasses.asdict(m) for m in alone.train()]
    first, second = two_processes(work, tmp_path, settings(parallel=parallel, schedule=schedule, **options))
    assert_same(tmp_path / "run", tmp_path / "alone", 1e-9)
    for metrics in (first, second):
        for line, other in zip(metrics, expected, strict=True):
            unlike = {"tokens_per_second", "seconds", "wall_seconds", "seconds_left"}
            for name in set(line) - unlike - ({"memory_gradient"} if kind else set()):
                assert line[name] == pytest.approx(other[name], rel=1e-6), name


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        pytest.param({}, "ddp", id="memformer-ddp"),
        pytest.param({}, "fsdp", id="memformer-fsdp", marks=pytest.mark.thorough),
        pytest.param(CAUSAL, "ddp", id="causal-ddp", marks=pytest.mark.thorough),
        pytest.param(ONE, "fsdp", id="one-fsdp"),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(settings, tmp_path, kind, parallel):
    tied = parallel == "ddp"
    options = dict(steps=4, eval_every=2, tie_embeddings=tied, **kind)
    list(Run(settings(out=tmp_path / "alone", **options)).train())
    together = settings(parallel=parallel, **options)
    two_processes(work, tmp_path, together, 1)
    assert checkpoints.newest(tmp_path / "run").name == "step-000002"
    alone = Run(settings(resume=True, **options))
    for metrics in alone.train():
        if metrics.step == 3:
            alone.stop()
    assert_same(tmp_path / "run", tmp_path / "alone", 1e-9)
    again = dict(out=tmp_path / "run2", tie_embeddings=tied, **kind)
    list(Run(settings(steps=3, **again)).train())
    two_processes(work, tmp_path, settings(steps=4, resume=True, parallel=parallel, eval_every=2, **again))


def without_gathering(rank, settings, stop_after=None):
    """:func:`work`, whose checkpoints are written and read with no process ever asking for a whole tensor."""
    from torch.distributed.tensor import DTensor

    def refuse(self, *args, **kwargs):
        raise AssertionError("a whole tensor was gathered for a checkpoint")

    def guarded(original, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DTensor, "full_tensor", refuse)
            return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("save", "restore", "load"):
            patch.setattr(resume, name, functools.partial(guarded, getattr(resume, name)))
        return work(rank, settings, stop_after)


def stopped_and_whole(rank, settings, again, whole):
    """A run that is stopped, and one that goes on with it in the same processes; and one that is left alone."""
    without_gathering(rank, settings, 1)
    if not rank:
        shutil.copytree(checkpoints.find(settings.out), settings.out / "stopped")
    without_gathering(rank, again)
    work(rank, whole)


@pytest.mark.parametrize(
    "kind", [pytest.param({}, id="memformer", marks=pytest.mark.thorough), pytest.param(CAUSAL, id="causal")]
)
def test_the_parts_of_a_divided_model_are_written_and_read_by_those_who_have_them(settings, tmp_path, kind):
    """Bit for bit, and what a user loads has all of it."""
    options = dict(parallel="fsdp", tie_embeddings=False, steps=4, eval_every=2, **kind)
    again, whole = settings(resume=True, **options), settings(out=tmp_path / "whole", **options)
    two_processes(stopped_and_whole, tmp_path, settings(**options), again, whole)
    assert_same(tmp_path / "run", tmp_path / "whole", 0)
    folder = tmp_path / "run" / "stopped"
    shards = sorted(folder.glob("shards/*"))
    assert [file.suffix for file in shards] == [".safetensors"] * 2  # and no pickle
    assert not (folder / "model.safetensors").exists()
    assert {f"shards/{file.name}" for file in shards} < set(json.loads((folder / "checksums.json").read_text()))
    average, weights = read_shards(folder / "shards", "model/"), read_shards(folder / "shards", "weights/")
    assert any(not torch.equal(average[name], weights[name]) for name in average)
    assert_close(dict(load_model(folder).named_parameters()), average, rtol=0, atol=0)


def both(rank, first, second):
    work(rank, first)
    work(rank, second)


def test_an_average_begins_and_ends_with_a_checkpoint_in_parts(settings, tmp_path):
    """What a user loads is the average; a run that keeps none any more goes on with the weights."""
    options = dict(parallel="fsdp", tie_embeddings=False, steps=2, eval_every=0)
    with_one, without = (settings(out=tmp_path / str(ema), ema=ema, **options) for ema in (0.9, 0.0))
    two_processes(both, tmp_path, with_one, without)
    options = dict(options, steps=3, resume=True)
    ended = Run(settings(**{**options, "out": tmp_path / "0.9", "ema": 0.0}))
    weights, average = (
        read_shards(checkpoints.newest(tmp_path / "0.9") / SHARDS, part) for part in ("weights/", "model/")
    )
    assert not weights["encoder.embedding.weight"].equal(average["encoder.embedding.weight"])
    assert_close(dict(ended.model.named_parameters()), weights, rtol=0, atol=0)
    begun = Run(settings(**{**options, "out": tmp_path / "0.0", "ema": 0.9}))
    assert_close(begun.parts.average, dict(begun.model.named_parameters()), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("then", [4, 1])
def test_parts_are_read_by_more_and_by_fewer_processes(settings, tmp_path, then):
    """Of 4 processes some have no row of a narrow tensor."""
    options = dict(tie_embeddings=False, steps=6, eval_every=2)
    list(Run(settings(out=tmp_path / "alone", **options)).train())
    two_processes(without_gathering, tmp_path, settings(parallel="fsdp", **options), 1)
    again = settings(resume=True, parallel="fsdp", **options)
    several_processes(4, without_gathering, tmp_path, again, 3) if then == 4 else list(Run(again).train())
    if then == 4:
        assert checkpoints.newest(tmp_path / "run").name == "step-000004"
        two_processes(work, tmp_path, settings(resume=True, parallel="ddp", **options))
    assert_same(tmp_path / "run", tmp_path / "alone", 1e-9)


def test_a_part_that_is_damaged_or_missing_is_found(tmp_path):
    model = Memformer(
        dim=8, num_memory_slots=2, enc_num_tokens=5, enc_max_seq_len=4, enc_depth=1, dec_num_tokens=5,
        dec_max_seq_len=4, dec_depth=1, enc_heads=2, dec_heads=2, mem_update_attn_heads=2,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "model.safetensors").unlink()
    halves = [{}, {}]
    for name, tensor in model.state_dict().items():
        for half, part in zip(halves, tensor.chunk(2), strict=False):
            half[f"model/{name}"] = part.contiguous()
    for i, half in enumerate(halves):
        begins = {
            name: {"saved_offsets": [len(halves[0][name]) * i] + [0] * (part.dim() - 1)} for name, part in half.items()
        }
        save_file(half, tmp_path / "shards" / f"{i}.safetensors", {"DCP_SHARDING_INFO": json.dumps(begins)})
    assert_close(dict(Memformer.from_pretrained(tmp_path).state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    first = tmp_path / "shards" / "0.safetensors"
    saved = first.read_bytes()
    first.unlink()
    with pytest.raises(ValueError, match=r"shards.*expected .* numbers, found"):
        Memformer.from_pretrained(tmp_path)
    first.write_bytes(saved[:100])
    with pytest.raises(ValueError, match="shards: damaged, or not the weights"):
        Memformer.from_pretrained(tmp_path)


def unwritable(rank, whole, in_parts):
    """What each process says when the first cannot write the checkpoint, and when the second cannot write its part."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter if rank else checkpoints, "write_data" if rank else "save", fail)
        for settings in (whole, in_parts):
            try:
                work(rank, settings)
            except OSError as error:
                said.append(str(error))
    return said


def test_a_process_that_cannot_write_ends_all_with_its_sentence(settings, tmp_path):
    options = dict(tie_embeddings=False, steps=1, eval_every=0)
    run = tmp_path / "in parts"
    first, second = two_processes(
        unwritable, tmp_path, settings(**options), settings(out=run, parallel="fsdp", **options)
    )
    failure = "[Errno 28] No space left on device"
    assert (first[0], second[0]) == (failure, f"process 0: {failure}")
    assert first[1] == second[1]
    assert first[1].endswith(f"process 1: OSError: {failure}")
    assert not list(run.glob("*step-*"))


def test_lanes_that_cannot_be_divided_are_refused(settings, tmp_path):
    errors = two_processes(refused, tmp_path, settings(lanes=3))
    assert errors == ["lanes: 3 cannot be divided evenly among 2 processes"] * 2


def refused(rank, settings):
    try:
        Run(settings)
    except ValueError as error:
        return str(error)
