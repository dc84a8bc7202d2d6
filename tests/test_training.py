"""Training runs: interrupted and resumed equals uninterrupted, bit for bit; nothing is lost when saving fails."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from helpers import training_settings
from memformer import CausalMemformer, Memformer, replay
from memformer.data import ByteTokenizer, load_tokenizer
from memformer.evaluation import HeldOut
from memformer.inspection import memory_health
from memformer.network import Network
from memformer.settings import read_yaml
from memformer.training import Run, StepMetrics, assemble, checkpoints, saved_settings
from memformer.training import parts as parts_of_a_run
from memformer.training.parts import Change

WORDS = "the memory of a segment is read by every layer and written once, so that what was seen is not forgotten. "
CLOCK = ("tokens_per_second", "seconds", "wall_seconds", "seconds_left")


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
        return training_settings(**{**given, **changes})

    return make


def trained(settings):
    """The run, and its metrics without the evaluations."""
    run = Run(settings)
    return run, [metrics for metrics in run.train() if isinstance(metrics, StepMetrics)]


def weights(run_or_folder):
    model = run_or_folder.model if isinstance(run_or_folder, Run) else Memformer.from_pretrained(run_or_folder)
    return dict(model.state_dict())


def lines(out):
    """The metrics of a run, without those of the clock."""
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in event.items() if k not in CLOCK} for event in events]


HALF = dict(precision="fp16", accumulate=2, tensorboard=True)
EVERYTHING = dict(
    tokenizer="bpe", vocabulary=300, continuation=0.6, infilling=0.3, recall=0.1, horizon_start=2, horizon_steps=4,
    accumulate=2, graphs=2, ema=0.9, eval_every=2, patience=4, tie_embeddings=True, mem_updates=2,
)  # fmt: skip


# --- Resuming


@pytest.mark.parametrize("options", [{}, EVERYTHING, HALF], ids=["plain", "everything", "fp16"])
@pytest.mark.parametrize("interrupted_after", [1, 2, 4])
def test_interrupted_and_resumed_equals_uninterrupted(settings, tmp_path, interrupted_after, options):
    whole, _ = trained(settings(out=tmp_path / "whole", **options))
    first = Run(settings(**options))
    for metrics in first.train():
        if metrics.step == interrupted_after:
            first.stop()
    assert first.step == interrupted_after + 1
    second = Run(settings(resume=True, **options))
    assert second.step == first.step
    list(second.train())
    assert_close(weights(second), weights(whole), rtol=0, atol=0)
    assert_close(second.parts.average, whole.parts.average, rtol=0, atol=0)
    assert_close(second.parts.progress.memory, whole.parts.progress.memory, rtol=0, atol=0)
    assert (second.best, second.stopped_early) == (whole.best, whole.stopped_early)
    assert second.parts.scaler.state_dict() == whole.parts.scaler.state_dict()
    kept = lines(tmp_path / "run")
    assert [line["step"] for line in kept if line["event"] == "step"] == [1, 2, 3, 4, 5, 6]
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
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 5]
    again, _ = trained(settings(steps=5, out=tmp_path / "again"))
    assert_close(weights(resumed), weights(again), rtol=0, atol=0)


def test_the_saved_settings_repeat_the_run(settings, tmp_path):
    first, _ = trained(settings(steps=2, **EVERYTHING))
    assert saved_settings(tmp_path / "run") == first.settings
    again = dataclasses.replace(read_yaml(tmp_path / "run" / "run.yaml", settings()), out=tmp_path / "again")
    second, _ = trained(again)
    assert_close(weights(second), weights(first), rtol=0, atol=0)


def test_a_setting_that_the_saved_run_did_not_know_has_its_default(settings, tmp_path, monkeypatch):
    trained(settings(steps=2))
    load = checkpoints.load_numbers

    def from_before(folder):
        numbers = load(folder)
        del numbers["settings"]["rollout"]["schedule"], numbers["settings"]["model"]["write_temperature"]
        return numbers

    monkeypatch.setattr(checkpoints, "load_numbers", from_before)
    assert saved_settings(tmp_path / "run") == settings(steps=2)
    assert Run(settings(steps=3, resume=True)).step == 2
    with pytest.raises(
        ValueError, match=r"model\.write_temperature: the run in .* has 0\.25, got 1\.0; it cannot change"
    ):
        Run(settings(steps=3, write_temperature=1.0, resume=True))
    monkeypatch.setattr(checkpoints, "load_numbers", lambda folder: {"settings": {"dim": 16}})
    with pytest.raises(ValueError, match="dim: unknown setting"):
        saved_settings(tmp_path / "run")


@pytest.mark.parametrize(
    "schedule",
    [dict(graphs=0), dict(graphs=9), dict(schedule="binomial:2"), dict(schedule="budget:9MB"), dict(offload="disk")],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_schedule_changes_no_number_and_may_change_on_resuming(settings, tmp_path, monkeypatch, schedule):
    monkeypatch.chdir(tmp_path)
    usual, _ = trained(settings(steps=4, horizon=5, graphs=1, out=tmp_path / "usual"))
    first = Run(settings(steps=4, horizon=5))
    for metrics in first.train():
        if metrics.step == 1:
            first.stop()
    run, _ = trained(settings(steps=4, horizon=5, resume=True, **schedule))
    assert run.parts.rollouts.options.schedule == run.settings.rollout.replay_schedule() != replay.EveryMemory()
    assert_close(weights(run), weights(usual), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", [{}, dict(architecture="causal", dec_depth=2)])
def test_so_many_tokens_are_read_out_at_once(settings, tmp_path, monkeypatch, architecture):
    """A run that knew no such setting goes on with it; the weights are those of the same run, to rounding."""
    called = []
    token_losses = [kind.token_losses for kind in (Network, CausalMemformer)]
    for kind, losses in zip((Network, CausalMemformer), token_losses, strict=True):
        monkeypatch.setattr(
            kind, "token_losses", lambda *given, losses=losses: called.append(len(given[1])) or losses(*given)
        )
    changes = {"horizon": 5, "dropout": 0.0, **architecture}
    usual, _ = trained(settings(steps=2, out=tmp_path / "usual", **changes))
    trained(settings(steps=1, **changes))
    file = tmp_path / "run" / "step-000001" / "training.json"
    numbers = checkpoints.load_numbers(file.parent)
    del numbers["settings"]["rollout"]["readout_tokens"]
    checkpoints.record(file.parent, numbers)
    called.clear()
    run, _ = trained(settings(steps=2, readout_tokens=47, resume=True, **changes))
    assert [str(change) for change in run.parts.changes] == ["steps 1 -> 2", "rollout.readout_tokens None -> 47"]
    assert called[:3] == [2, 2, 1]  # of 2 x 8 tokens, and a Memformer's two start tokens
    assert_close(weights(run), weights(usual), rtol=1e-4, atol=1e-5)


def test_as_many_graphs_are_kept_as_fit(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    roomy, _ = trained(settings(steps=4, horizon=5, out=tmp_path / "roomy"))
    assert roomy.parts.rollouts.options.schedule.graphs >= 5
    monkeypatch.setattr(parts_of_a_run, "GRAPHS_BYTES", 1)
    narrow, _ = trained(settings(steps=4, horizon=5, out=tmp_path / "narrow"))
    assert narrow.parts.rollouts.options.schedule == replay.EveryMemory(1)
    assert_close(weights(narrow), weights(roomy), rtol=0, atol=0)


def test_a_run_may_be_given_other_parts(settings, tmp_path):
    parts = assemble(settings(steps=1))
    run = Run(settings(steps=1), dataclasses.replace(parts, held_out=parts.training[:1]))
    *_, result = run.train()
    assert (run.held_out, result.documents) == (parts.training[:1], 1)


def test_data_may_move_and_output_may_change(settings, tmp_path):
    trained(settings(steps=2))
    (tmp_path / "corpus").rename(tmp_path / "moved")
    run = Run(settings(resume=True, data=(tmp_path / "moved",), log_every=3, keep=5, eval_every=2))
    assert run.step == 2
    assert run.parts.changes == [Change("steps", 2, 6)]


def test_a_folder_has_one_training_at_a_time(settings):
    first, second = Run(settings()), Run(settings())
    steps = first.train()
    next(steps)
    with pytest.raises(BlockingIOError, match="another process trains there at this moment"):
        next(second.train())
    steps.close()
    next(second.train())


def test_a_run_that_starts_anew_leaves_no_line_of_the_one_before(settings, tmp_path):
    steps = Run(settings(save_every=100)).train()
    for _ in range(3):
        next(steps)
    steps.close()
    assert len(lines(tmp_path / "run")) == 3
    steps = Run(settings(save_every=100)).train()
    next(steps)
    steps.close()
    assert len(lines(tmp_path / "run")) == 1


def test_metrics_are_replaced_whole_or_not_at_all(settings, tmp_path, monkeypatch):
    trained(settings(steps=2))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()

    def fail(handle):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            next(Run(settings(resume=True)).train())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert read_yaml(tmp_path / "run" / "run.yaml", settings()) == settings(steps=2)


def test_resuming_refuses_what_does_not_fit(settings, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume"):
        Run(settings(resume=True))
    trained(settings(steps=2))
    with pytest.raises(ValueError, match="at step 2 already: raise --steps"):
        Run(settings(steps=2, resume=True))
    with pytest.raises(ValueError, match=r"model\.dim: the run in .* has 16, got 32; it cannot change"):
        Run(settings(dim=32, resume=True))
    with pytest.raises(ValueError, match=r"rollout\.segment_length: the run in .* has 8, got 4; it cannot change"):
        Run(settings(segment_length=4, resume=True))
    (tmp_path / "corpus" / "5.txt").write_text("other")
    (tmp_path / "corpus" / "4.txt").write_text("other")
    with pytest.raises(ValueError, match=r"was the data changed\? .* add --new-data"):
        Run(settings(resume=True))


def test_a_run_is_never_overwritten(settings):
    trained(settings(steps=2))
    with pytest.raises(FileExistsError, match=r"holds a run already \(step-000002\): add --resume"):
        Run(settings())


def test_a_run_is_not_begun_in_the_folder_of_a_model(settings):
    settings().out.mkdir(parents=True)
    (settings().out / "config.json").write_text("{}")
    with pytest.raises(
        FileExistsError, match=r"holds a config\.json, so it is the folder of a model, .* another --out"
    ):
        Run(settings())


def test_a_run_without_gradients_is_refused(settings, tmp_path):
    """Weight decay alone would change the weights, and every metric would be written."""
    run = Run(settings())
    before = weights(run)
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(RuntimeError, match=r"train: gradients are off here"):
            list(run.train())
    assert_close(weights(run), before, rtol=0, atol=0)
    assert len(list(run.train())) > 0


def test_what_fsdp_divides_is_not_verified(settings, monkeypatch):
    monkeypatch.setattr("memformer.training.run.gradient_sync", lambda model: print)
    with pytest.raises(ValueError, match=r"verify: plain autograd cannot .*; use --parallel ddp"):
        Run(settings()).verify()


# --- Checkpoints


def test_the_last_two_checkpoints_are_kept(settings, tmp_path):
    trained(settings(steps=5))
    names = [".lock", "best", "metrics.jsonl", "run.yaml", "step-000004", "step-000005"]
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == names
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
        patch.setattr(
            "memformer.training.checkpoints.save_file" if failing == "save_file" else "pathlib.Path.replace", fail
        )
        with pytest.raises(OSError, match=r"step-000004: cannot be written \(No space left.*are untouched"):
            list(steps)
    assert checkpoints.newest(tmp_path / "run").name == "step-000002"
    assert not list((tmp_path / "run").glob(".unfinished*"))
    resumed, _ = trained(settings(steps=4, resume=True))
    again, _ = trained(settings(steps=4, out=tmp_path / "again"))
    assert_close(weights(resumed), weights(again), rtol=0, atol=0)


FILES = ["checksums.json", "config.json", "model.safetensors", "training.json", "training.safetensors"]


@pytest.mark.parametrize("file", [*FILES, "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(settings, tmp_path, file, damage):
    trained(settings(steps=3, save_every=2))
    damaged = tmp_path / "run" / "step-000003" / file
    content = bytearray(damaged.read_bytes())
    if damage == "truncated":
        damaged.write_bytes(content[:-20])
    elif damage == "changed":
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    else:
        damaged.unlink()
    with pytest.raises(ValueError, match=r"step-000003: damaged .*use .*step-000002"):
        checkpoints.find(tmp_path / "run")
    resumed = Run(settings(resume=True, steps=4))
    assert resumed.step == 2
    (reason,) = resumed.parts.refused
    assert "step-000003: damaged" in reason
    list(resumed.train())
    again, _ = trained(settings(steps=4, out=tmp_path / "again"))
    assert_close(weights(resumed), weights(again), rtol=0, atol=0)
    assert (tmp_path / "run" / "damaged-step-000003").is_dir()


def test_if_all_are_damaged_nothing_is_touched(settings, tmp_path):
    trained(settings(steps=3))
    for folder in (tmp_path / "run").glob("step-*"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"no sound checkpoint: .*step-000003: damaged.*step-000002: damaged.*another --out"
    ):
        Run(settings(resume=True))
    assert len(list((tmp_path / "run").glob("step-*"))) == 2


def test_a_checkpoint_is_a_model_with_its_tokenizer(settings, tmp_path):
    run, _ = trained(settings(steps=2, tokenizer="bpe", vocabulary=300))
    tokenizer = load_tokenizer(checkpoints.find(tmp_path / "run"))
    assert tokenizer.vocabulary == run.tokenizer.vocabulary == run.model.config.dec_num_tokens
    assert tokenizer.encode(WORDS).tolist() == run.tokenizer.encode(WORDS).tolist()
    assert_close(weights(checkpoints.find(tmp_path / "run")), weights(run), rtol=0, atol=0)


# --- The loop


def test_training_leaves_the_global_generator_alone(settings):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trained(settings(steps=2, eval_every=1))
    assert_close(torch.rand(1), expected, rtol=0, atol=0)


def test_the_seed_decides_the_run(settings, tmp_path):
    runs = [trained(settings(out=tmp_path / str(i), seed=seed, steps=1))[0] for i, seed in enumerate((0, 0, 1))]
    a, b, c = (weights(run)["encoder.embedding.weight"] for run in runs)
    assert a.equal(b)
    assert not a.equal(c)


def test_the_loss_falls(settings):
    _, metrics = trained(settings(steps=60, dropout=0.0, save_every=100))
    assert metrics[0].loss_nats > 4.5
    assert metrics[-1].loss_nats < 3.2
    assert metrics[-1].bits_per_token == pytest.approx(metrics[-1].loss_nats / math.log(2))


def test_metrics_show_the_memorys_health(settings):
    run = Run(settings(steps=4, horizon=4, log_every=2, dropout=0.0))
    seen, metrics = [], []
    rollout = run.parts.stream.rollout
    run.parts.stream.rollout = lambda horizon: seen.append((run.parts.progress.memory, rollout(horizon))) or seen[-1][1]
    for line in run.train():
        memory, segments = seen[-1]
        if isinstance(line, StepMetrics):
            health = memory_health(run.model, segments[0], memory)
            assert (line.self_attention, line.slot_diversity) == (health.self_attention, health.slot_diversity)
            metrics.append(line)
    for line in metrics:
        assert isinstance(line, StepMetrics)
        assert 0 < line.self_attention < 1
        assert 0 < line.slot_diversity < 2
        assert line.memory_gradient > 0
    _, short = trained(settings(steps=1, horizon=2, out=settings().out.with_name("short")))
    assert short[0].memory_gradient is None


def test_accumulation_is_a_longer_rollout_truncated(settings, tmp_path):
    """Two rollouts of one step: the mean over the targets of both, the gradient of neither goes through the other."""
    run = Run(settings(steps=1, accumulate=2, dropout=0.0, clip=0.0, learning_rate=1e-3, warmup=0))
    start = weights(run)
    model, stream = Memformer(**run.model.config.to_dict()), Run(settings(out=tmp_path / "other")).parts.stream
    model.load_state_dict(start)
    segments, memory, nats, counted = stream.rollout(6), None, 0.0, 0
    for i, s in enumerate(segments):
        memory = memory if i != 3 else memory.detach()
        _, memory, loss = model(s.src, s.tgt, memory, s.src_mask, s.tgt_mask, s.reset)
        kept = int(s.tgt_mask[:, 1:].sum())
        nats, counted = nats + loss * kept, counted + kept
    (nats / counted).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    metrics, _ = run.train()
    assert metrics.loss_nats == pytest.approx(float(nats.detach()) / counted, rel=1e-5)
    assert metrics.gradient_norm == pytest.approx(float(norm), rel=1e-4)


def test_the_horizon_grows(settings):
    _, metrics = trained(settings(horizon=4, horizon_start=1, horizon_steps=3, steps=5))
    assert [m.horizon for m in metrics] == [1, 2, 3, 4, 4]


def test_the_average_is_what_is_saved_and_evaluated(settings, tmp_path):
    run, _ = trained(settings(steps=4, ema=0.5, eval_every=4))
    assert_close(
        dict(Memformer.from_pretrained(checkpoints.find(tmp_path / "run")).named_parameters()), run.parts.average
    )
    newest = {name: p.clone() for name, p in run.model.named_parameters()}
    assert any(not p.equal(run.parts.average[name]) for name, p in newest.items())
    with run.averaged() as model:
        assert_close(dict(model.named_parameters()), run.parts.average, rtol=0, atol=0)
    assert_close(dict(run.model.named_parameters()), newest, rtol=0, atol=0)


def test_the_average_is_the_mean_of_the_steps_weights(settings):
    run, seen = Run(settings(steps=4, ema=0.25)), []
    expected = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for metrics in run.train():
        if isinstance(metrics, HeldOut):
            break
        decay = min(0.25, metrics.step / (metrics.step + 9))
        for name, p in run.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
        seen.append(decay)
    assert seen[0] < seen[-1] == 0.25
    assert_close(run.parts.average, expected)


def test_the_learning_rate_rises_then_falls_to_zero(settings):
    run = Run(settings(steps=10, warmup=4, learning_rate=1.0))
    rates = [run.learning_rate(step) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[10] == pytest.approx(0)


def test_mixed_precision(settings):
    run, metrics = trained(settings(steps=2, precision="bf16"))
    assert all(math.isfinite(m.loss_nats) for m in metrics)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    _, expected = trained(settings(steps=2, out=run.settings.out.with_name("exact")))
    assert metrics[0].loss_nats == pytest.approx(expected[0].loss_nats, rel=1e-2)
    assert metrics[0].loss_nats != expected[0].loss_nats


def test_a_loss_that_is_not_finite_stops_the_run(settings):
    run = Run(settings())
    with torch.no_grad():
        run.model.decoder.to_logits.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 1: the gradient is not finite"):
        list(run.train())


# --- Evaluation on the way


def test_the_best_checkpoint_is_kept_and_a_run_stops_early(settings, tmp_path, monkeypatch):
    """The fourth step is the best one, three evaluations more are waited for."""
    evaluate = Run.evaluate
    monkeypatch.setattr(Run, "evaluate", lambda run: dataclasses.replace(evaluate(run), loss_nats=abs(run.step - 4.0)))
    options = dict(steps=40, eval_every=2, patience=3, save_every=100, keep=1)
    run = Run(settings(**options))
    metrics = list(run.train())
    assert [m.step for m in metrics if isinstance(m, HeldOut)] == [2, 4, 6, 8, 10]
    assert run.best == {"step": 4, "loss_nats": 0.0}
    assert run.stopped_early
    assert run.step == 10
    names = {f.name for f in (tmp_path / "run").iterdir()}
    assert names == {".lock", "best", "metrics.jsonl", "run.yaml", "step-000004", "step-000010"}
    assert (tmp_path / "run" / "best").resolve().name == "step-000004"
    assert checkpoints.find(tmp_path / "run" / "best").name == "best"
    with pytest.raises(ValueError, match="stopped early, at step 10: raise --patience"):
        Run(settings(**options, resume=True))


def test_the_best_checkpoint_is_found_where_no_link_can_be_made(settings, tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    run, _ = trained(settings(steps=2, eval_every=1, save_every=1, keep=1))
    assert (tmp_path / "run" / "best").is_file()
    assert checkpoints.find(tmp_path / "run" / "best").name == f"step-{run.best['step']:06d}"


# --- Token arrays, and other mistakes


def test_training_on_token_arrays(settings, tmp_path):
    np.save(tmp_path / "ids.npy", np.tile(np.arange(40, dtype=np.uint16), 30))
    ids = dict(data=(tmp_path / "ids.npy",), tokenizer="ids", vocabulary=40)
    run, _ = trained(settings(steps=2, **ids))
    assert run.model.config.dec_num_tokens == run.tokenizer.vocabulary == 44
    assert run.evaluate().bits_per_byte is None
    np.save(tmp_path / "ids.npy", np.tile(np.arange(41, dtype=np.uint16), 30))
    with pytest.raises(ValueError, match=r"ids\.npy.*40"):
        trained(settings(out=tmp_path / "b", steps=9, **ids))
    with pytest.raises(ValueError, match="token ids"):
        Run(settings(out=tmp_path / "c", data=(tmp_path / "ids.npy",)))


@pytest.mark.parametrize("length", [1, 2])
def test_documents_of_a_token_or_two(settings, tmp_path, length):
    corpus = tmp_path / "short"
    corpus.mkdir()
    for i in range(4):
        (corpus / f"{i}.txt").write_text("ab"[:length])
    run, metrics = trained(settings(data=(corpus,), steps=2))
    assert math.isfinite(metrics[-1].loss_nats)
    assert run.evaluate().tokens == sum(len(d) + 1 for d in run.held_out)


def test_mistakes_are_found_before_the_data_is_read(settings):
    with pytest.raises(ValueError, match="device: 'abacus' cannot be used here"):
        Run(settings(device="abacus", data=("nowhere",)))
    with pytest.raises(ValueError, match=r"device: 'xla' cannot be used here \([^.]*('aten::[a-z_.]*')?[^.]*\)$"):
        Run(settings(device="xla", data=("nowhere",)))
    with pytest.raises(ValueError, match=r"^heads: must divide dim"):
        settings(dim=15, data=("nowhere",))


def test_a_tokenizer_file_that_is_none(settings, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Run(settings(tokenizer=str(tmp_path / "tokenizer.json")))
    assert isinstance(Run(settings()).tokenizer, ByteTokenizer)


def test_tensorboard(settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, metrics = trained(settings(steps=2, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("step/loss_nats")] == [1, 2]
    assert events.Scalars("step/loss_nats")[0].value == pytest.approx(metrics[0].loss_nats)
    assert "held_out/bits_per_byte" in events.Tags()["scalars"]


@pytest.mark.slow
def test_a_corpus_larger_than_memory_trains_at_flat_resident_memory(settings, tmp_path):
    """2 GB of token ids, mapped; the resident memory, file pages included, after 50 and after 400 steps."""
    ids = np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.uint16, shape=(2**30,))
    ids[:: 2**20] = 1  # the rest of the file takes no room on disk
    ids.flush()
    del ids
    options = dict(
        tokenizer="ids", vocabulary=2, separator=1, lanes=8, segment_length=64, save_every=1000, eval_limit=20_000
    )
    run = Run(settings(data=(tmp_path / "big.npy",), steps=400, **options))
    resident = {metrics.step: resident_bytes() for metrics in run.train()}
    assert len(run.training) > 900
    assert abs(resident[400] - resident[50]) < 20e6


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
