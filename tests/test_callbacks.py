"""What is told of a run while it trains: metrics, loggers, samples; and that telling changes nothing."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from helpers import training_settings
from memformer.cli import main
from memformer.data import ByteTokenizer, Lanes, encode_documents, read_documents
from memformer.data.objectives import Objective
from memformer.evaluation import HeldOut
from memformer.model import token_losses
from memformer.settings import TrainingConfig, to_flat
from memformer.training import Callback, Run, StepMetrics, read_metrics
from memformer.training.metrics import MetricsLog, Pace

Settings = Callable[..., TrainingConfig]

TEXT = "Whoever trains wants to see how it goes: the loss, the speed, the time that is left. "


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a tiny run; ``settings(steps=3)`` changes some."""
    for i in range(4):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{i}.txt").write_text(TEXT[i:] * 3)

    def make(**changes: Any) -> TrainingConfig:
        given = dict(
            data=(tmp_path / "corpus",), out=tmp_path / "run", steps=4, dim=16, slots=2, enc_depth=1, dec_depth=1,
            heads=2, lanes=2, segment_length=8, horizon=3, warmup=2, log_every=2, device="cpu",
        )  # fmt: skip
        return training_settings(**{**given, **changes})

    return make


class Recorder(Callback):
    """Takes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        if ("phase", name) not in self.heard[-1:]:
            self.heard.append(("phase", name))

    def start(self, run: Any) -> None:
        self.heard.append(("start", run.step))

    def metrics(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        self.heard.append((event, metrics.step))

    def sample(self, text: str, step: int) -> None:
        self.heard.append(("sample", step))

    def checkpoint(self, folder: Path) -> None:
        self.heard.append(("checkpoint", folder.name))

    def end(self, run: Any) -> None:
        self.heard.append(("end", run.step))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in run.model.named_parameters()}


# --- Metrics


def test_a_line_at_step_1_and_what_it_says(settings: Settings, tmp_path: Path) -> None:
    run = Run(settings(steps=5, save_every=1))
    lines = [m for m in run.train() if isinstance(m, StepMetrics)]
    assert [m.step for m in lines] == [1, 2, 4, 5]
    assert [m.wall_seconds for m in lines] == sorted(m.wall_seconds for m in lines)
    assert all(m.seconds_left is not None and m.seconds_left > 0 for m in lines[:-1])
    assert lines[-1].seconds_left == 0
    tokens = encode_documents(run.training, run.tokenizer)
    stream = Lanes(tokens, lanes=2, length=8, start=256, seed=0, spread=True)
    counted = sum(int(segment.tgt_mask[:, 1:].sum()) for segment in stream.rollout(15))
    assert lines[-1].tokens_seen == counted
    assert lines[-1].epoch == pytest.approx(counted / sum(map(len, run.training)), abs=0.2)
    assert lines[-1].epoch == stream.epochs_read
    assert lines[-1].continuation_nats is None
    saved = json.loads((tmp_path / "run" / "step-000005" / "training.json").read_text())
    assert saved["tokens"] == counted
    assert saved["seconds"] >= lines[-1].wall_seconds


def test_time_and_tokens_go_on_over_a_resume(settings: Settings, tmp_path: Path) -> None:
    whole = [m for m in Run(settings(out=tmp_path / "whole")).train() if isinstance(m, StepMetrics)]
    first = Run(settings())
    steps = first.train()
    metrics = next(steps)
    first.stop()
    list(steps)
    assert isinstance(metrics, StepMetrics)
    (*_, last) = [m for m in Run(settings(resume=True)).train() if isinstance(m, StepMetrics)]
    assert (last.tokens_seen, last.epoch) == (whole[-1].tokens_seen, whole[-1].epoch)
    assert last.wall_seconds > metrics.wall_seconds


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_of_each_objective(settings: Settings, accumulate: int) -> None:
    """Against the model's own losses, lane by lane; a segment has one objective."""
    mixture = dict(continuation=0.4, infilling=0.3, recall=0.3, lanes=4, horizon=8, accumulate=accumulate)
    run = Run(settings(steps=1, **mixture))
    place = run.parts.stream.state_dict()
    segments = run.parts.stream.rollout(8 * accumulate)
    run.parts.stream.load_state_dict(place)
    nats, counts, memory = [0.0] * 3, [0] * 3, None
    names = {256: Objective.CONTINUATION, 257: Objective.INFILLING, 258: Objective.RECALL}
    assert (ByteTokenizer().start, ByteTokenizer().infill, ByteTokenizer().recall) == (256, 257, 258)
    with torch.no_grad():
        for segment in segments:
            out, memory = run.model.step(segment.src, memory, segment.src_mask, segment.reset)
            found = token_losses(run.model.decoder, segment.tgt, out, segment.src_mask, segment.tgt_mask, segment.src)
            for first, loss, counted in zip(segment.tgt[:, 0].tolist(), *found, strict=True):
                nats[names[first]] += float(loss.sum())
                counts[names[first]] += int(counted.sum())
    metrics = next(iter(run.train()))
    assert isinstance(metrics, StepMetrics)
    expected = [loss / count for loss, count in zip(nats, counts, strict=True)]
    assert [metrics.continuation_nats, metrics.infilling_nats, metrics.recall_nats] == pytest.approx(expected, rel=1e-4)
    assert sum(nats) / sum(counts) == pytest.approx(metrics.loss_nats, rel=1e-4)


def test_the_time_left_goes_by_the_last_lines_and_not_by_the_first_step() -> None:
    pace = Pace(0, 0.0)
    assert pace.left(1, 10.0, 101) == pytest.approx(1000)
    assert pace.left(2, 10.5, 101) == pytest.approx(49.5)
    for step in range(3, 40):
        left = pace.left(step, 10.5 + 2 * (step - 2), 101)
    assert left == pytest.approx(2 * (101 - 39))
    assert Pace(7, 3.0).left(7, 4.0, 10) is None


@pytest.mark.parametrize("lanes", [1, 2])
def test_how_often_documents_were_gone_through(lanes: int) -> None:
    """Each counts alike, by the share of it that was read."""
    stream = Lanes([list(range(10)), list(range(5))], lanes=lanes, length=5, start=0, epochs=2)
    assert stream.epochs_read == 0
    read = [stream.epochs_read for _ in stream]
    assert read == ([0.25, 0.5, 1.0, 1.25, 1.5, 2.0] if lanes == 1 else [0.75, 1.25, 2.0])
    assert stream.epochs_read == 2
    with pytest.raises(ValueError, match="the number of documents that cannot be indexed is not known"):
        Lanes((list(range(5)) for _ in range(2)), lanes=1, length=5, start=0, epochs=1).epochs_read  # noqa: B018


STEP = StepMetrics(1, math.inf, -math.inf, 1.0, 0.1, math.nan, 2, None, 0.5, 0.5)


def test_metrics_are_json_also_where_numbers_are_not_finite(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 0).write("step", STEP)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    values = json.loads(line, parse_constant=refuse)
    assert (values["loss_nats"], values["bits_per_token"], values["gradient_norm"]) == (None, None, None)
    assert (values["event"], values["step"], values["learning_rate"]) == ("step", 1, 0.1)


def test_bad_lines_do_not_block_resuming(settings: Settings, tmp_path: Path) -> None:
    """Not JSON, not of metrics, not UTF-8; and what an earlier version wrote for an overflow is mended."""
    list(Run(settings(steps=2)).train())
    file = tmp_path / "run" / "metrics.jsonl"
    good = file.read_bytes()
    older = b'{"event": "step", "step": 1, "gradient_norm": Infinity}\n'
    file.write_bytes(b"{broken}\n[1]\n" + older + b'{"event": "note"}\n\xff}\n\n' + good + b'{"event": "step", "st')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: 4 lines, the first is line 1, left out: not metrics"):
        list(Run(settings(steps=4, resume=True)).train())
    lines = [json.loads(line, parse_constant=lambda _: 1 / 0) for line in file.read_text().splitlines()]
    assert lines[0] == {"event": "step", "step": 1, "gradient_norm": None}
    assert file.read_bytes().split(b"\n", 1)[1].startswith(good)
    assert [line["step"] for line in lines] == [1, 1, 2, 2, 2, 4, 4]  # one says that the steps were changed
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 1, 2, 2, 2, 4, 4]


def test_metrics_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl there, which every run writes"):
        read_metrics(tmp_path)


# --- Callbacks


def test_what_a_callback_hears(settings: Settings) -> None:
    recorder = Recorder()
    run = Run(settings(steps=3, save_every=2, sample_every=2, sample_tokens=5), callbacks=[recorder])
    list(run.train())
    assert recorder.heard == [
        ("phase", "reading"), ("start", 0), ("phase", "training"), ("step", 1), ("phase", "training"), ("step", 2),
        ("phase", "saving"), ("checkpoint", "step-000002"), ("phase", "sampling"), ("sample", 2),
        ("phase", "training"), ("step", 3), ("phase", "saving"), ("checkpoint", "step-000003"),
        ("phase", "evaluating"), ("held_out", 3), ("phase", "training"), ("end", 3),
    ]  # fmt: skip


def test_a_tokenizer_of_its_own_takes_phases_of_its_own(settings: Settings) -> None:
    recorder = Recorder()
    Run(settings(tokenizer="bpe", vocabulary=300), callbacks=[recorder])
    assert recorder.heard == [("phase", "reading"), ("phase", "training a BPE"), ("phase", "encoding")]


@pytest.mark.parametrize("method", ["phase", "metrics", "sample", "checkpoint", "end"])
def test_a_callback_that_fails_is_switched_off_and_training_goes_on(settings: Settings, method: str) -> None:
    calls, other = [], Recorder()

    def fail(*arguments: object) -> None:
        calls.append(arguments)
        raise OSError("no network")

    broken = type("Flaky", (Callback,), {method: fail})()

    def train() -> None:
        list(Run(settings(sample_every=2, sample_tokens=5), callbacks=[broken, other]).train())

    with pytest.warns(UserWarning, match="Flaky is switched off, for its .* failed .OSError: no network.") as warned:
        train()
    assert (len(calls), len(warned)) == (1, 1)
    assert other.heard[-1] == ("end", 4)


def test_a_callback_that_cannot_start_ends_the_run(settings: Settings) -> None:
    class NotLoggedIn(Callback):
        def start(self, run: Any) -> None:
            raise ValueError("log in first")

    first, last = Recorder(), Recorder()
    run = Run(settings(), callbacks=[first, NotLoggedIn(), last])
    with pytest.raises(ValueError, match="log in first"):
        next(iter(run.train()))
    assert run.step == 0
    assert first.heard == [("phase", "reading"), ("start", 0), ("end", 0)]
    assert last.heard == [("phase", "reading")]


def test_a_callback_hears_the_end_of_a_run_that_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    run = Run(settings(), callbacks=[recorder])
    monkeypatch.setattr(run, "evaluate", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(run.train())
    assert recorder.heard[-1] == ("end", 4)


def test_a_callback_is_an_object_of_its_class(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"callbacks: expected objects of a class derived from .*Callback, got"):
        Run(settings(), callbacks=[Recorder])  # type: ignore[list-item]


def test_an_evaluation_says_how_far_it_is(settings: Settings) -> None:
    said: list[tuple[int, int | None]] = []

    class Listener(Callback):
        def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
            said.extend([(done, total)] if name == "evaluating" else [])

    run = Run(settings(steps=1), callbacks=[Listener()])
    list(run.train())
    total = sum(len(document) + 1 for document in run.held_out)  # their ends are targets, too
    assert said == sorted(said)
    assert said[-1] == (total, total)


# --- Samples


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_samples_change_nothing(settings: Settings, tmp_path: Path, ema: float) -> None:
    options = dict(dropout=0.2, sample_tokens=12, ema=ema, continuation=0.5, infilling=0.5)
    plain = Run(settings(out=tmp_path / "plain", **options))
    list(plain.train())
    generator = torch.get_rng_state()
    run = Run(settings(sample_every=1, **options))
    list(run.train())
    assert torch.equal(torch.get_rng_state(), generator)
    assert_close(weights(run), weights(plain), rtol=0, atol=0)
    assert_close(run.parts.progress.memory, plain.parts.progress.memory, rtol=0, atol=0)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 2, 3, 4]
    assert all(sample["text"] for sample in samples)
    assert not (tmp_path / "plain" / "samples.jsonl").exists()


def test_samples_of_steps_that_were_lost_go(settings: Settings, tmp_path: Path) -> None:
    options = dict(sample_tokens=12, sample_every=1, save_every=2)
    list(Run(settings(**options)).train())
    shutil.rmtree(tmp_path / "run" / "step-000004")  # as if it had been killed before
    file = tmp_path / "run" / "samples.jsonl"
    with file.open("a") as samples:
        samples.write('{"step": 5, "te')
    list(Run(settings(resume=True, **options)).train())
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]


def test_training_does_not_fail_by_a_sample(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memformer.training.run.sample", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="no sample at step 2 .ZeroDivisionError: division by zero."):
        list(Run(settings(steps=3, sample_every=2)).train())
    assert (tmp_path / "run" / "step-000003").is_dir()


def test_samples_of_no_tokens_are_refused(settings: Settings) -> None:
    with pytest.raises(ValueError, match="sample_every: 5 asks for samples, but sample_tokens is 0: set it"):
        settings(sample_every=5, sample_tokens=0)


# --- Loggers


class FakeWandb(types.ModuleType):
    """Weights & Biases and trackio, as far as they are used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **how: Any) -> FakeWandb:
        self.runs.append(how)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert (name, step_metric) in [("step", None), ("*", "step")]

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append(values if step is None else {"step": step, **values})

    def finish(self) -> None:
        self.finished += 1

    def Html(self, text: str) -> str:  # noqa: N802
        return text

    Markdown = Html


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_weights_and_biases_and_trackio(settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fake = FakeWandb(name)
    monkeypatch.setitem(sys.modules, name, fake)
    how = dict(loggers=(name,), sample_every=2, sample_tokens=5)
    first = [m for m in Run(settings(steps=2, **how)).train() if isinstance(m, StepMetrics)]
    list(Run(settings(steps=4, resume=True, **how)).train())
    before, after = fake.runs
    assert (before["project"], before["resume"], before["config"]["model.dim"]) == ("memformer", "allow", 16)
    identity = "id" if name == "wandb" else "name"
    assert before[identity] == after[identity]
    assert before["name"].startswith("run")
    assert fake.finished == 2
    assert [line["step"] for line in fake.logged] == [1, 2, 2, 2, 4, 4, 4]
    assert fake.logged[0]["step/loss_nats"] == first[0].loss_nats
    assert "held_out/bits_per_byte" in fake.logged[2]
    assert "<pre>" in fake.logged[3]["sample"]
    assert not any("memory_gradient" in key and value is None for line in fake.logged for key, value in line.items())


def test_nothing_that_a_run_writes_is_data(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run beside its data would learn its own samples, and be refused when it is resumed."""
    pytest.importorskip("tensorboard")
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, FakeWandb(name))
    loggers = ("tensorboard", "wandb", "trackio")
    how = dict(loggers=loggers, sample_every=1, sample_tokens=3, eval_every=1, save_every=1, tokenizer="bpe")
    list(Run(settings(steps=2, vocabulary=257, **how)).train())
    (tmp_path / "run" / "step-000002" / "training.safetensors").unlink()
    run = Run(settings(steps=3, vocabulary=257, resume=True, **how))
    list(run.train())
    written = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"samples.jsonl", "wandb-run.txt", "trackio-run.txt", "damaged-step-000002", "tokens", "best"} <= written
    with pytest.raises(
        ValueError, match=r"no text found .*; left out: 1 folder of a run, whose own files are no data \([^,]*\)$"
    ):
        read_documents(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (dict(loggers=("wandb",)), "wandb"),
        (dict(loggers=("tensorboard", "trackio")), "trackio"),
        (dict(loggers=("tensorboard",)), "tensorboard"),
        (dict(tensorboard=True), "tensorboard"),
    ],
)
def test_a_logger_that_is_not_installed_is_found_before_any_work(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any], missing: str
) -> None:
    for module in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "tensorboard":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("memformer.training.run.assemble", lambda *_: 1 / 0)
    expected = rf"{missing}: not installed; pip install 'memformer-replay\[{missing}\]'"
    with pytest.raises(ValueError, match=expected):
        Run(settings(**options))
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_hyper_parameters_and_samples(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    list(Run(settings(loggers=("tensorboard",), sample_every=2, sample_tokens=5)).train())
    (tmp_path / "run" / "tensorboard").iterdir()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("step/loss_nats")] == [1, 2, 4]
    assert [e.step for e in events.Tensors("sample/text_summary")] == [2, 4]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["model.dim"].number_value == 16
    assert found["documents.separator"].string_value == "None"
    assert found.keys() == to_flat(settings()).keys()


def test_the_flag_of_a_logger_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--loggers", "mlflow"]) == 2
    assert "tensorboard" in capsys.readouterr().err
