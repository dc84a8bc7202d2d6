"""What steps which parameter and how: groups, Muon, curves of rates, and steps that are left out."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from helpers import training_settings
from memformer import Memformer
from memformer.learning_rate import warmup_constant, warmup_stable_decay
from memformer.settings import ComputeSettings, ModelSettings, OptimizerSettings, TrainingConfig, read_saved, to_plain
from memformer.training import Run, StepMetrics, assemble, checkpoints
from memformer.training.optimizers import make_optimizer

TEXT = "what was read is kept, and what is kept is read. "


@pytest.fixture
def settings(tmp_path):
    """Settings of a tiny run on three documents; ``settings(steps=3)`` changes some."""
    (tmp_path / "corpus").mkdir()
    for i in range(3):
        (tmp_path / "corpus" / f"{i}.txt").write_text(TEXT[i:] * 3, encoding="utf-8")

    def make(**changes):
        given = dict(
            data=(tmp_path / "corpus",), out=tmp_path / "run", steps=6, dim=8, slots=2, enc_depth=1, dec_depth=1,
            heads=2, lanes=2, segment_length=8, horizon=3, warmup=2, log_every=1, save_every=2, learning_rate=1e-2,
            device="cpu",
        )  # fmt: skip
        return training_settings(**{**given, **changes})

    return make


def trained(settings, until=None):
    """The run after step ``until`` or its end, and its metrics without the evaluations."""
    run, metrics = Run(settings), []
    for line in run.train():
        if isinstance(line, StepMetrics):
            metrics.append(line)
            if until is not None and line.step + 1 == until:
                run.stop()
    return run, metrics


def weights(run):
    return dict(run.model.state_dict())


def grouped(model, **options):
    """The names of the parameters in each group, with the group's decay."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerSettings(**options))
    return [(group["weight_decay"], [names[id(p)] for p in group["params"]]) for group in optimizer.param_groups]


# --- Which parameter is in which group

BLOCK = ["self_attention.to_qkv", "self_attention.to_out", "context_attention.to_q", "context_attention.to_out",
         "feed_forward.0", "feed_forward.2"]  # fmt: skip
MAPS = [
    *[f"encoder.layers.0.{name}.weight" for name in BLOCK], "encoder.memory_projection.to_kv.weight",
    "writer.slots_to_qk.weight", "writer.segment_to_kv.weight",
    *[f"decoder.layers.{layer}.{name}.weight" for layer in (0, 1) for name in BLOCK],
    "decoder.context_projection.to_kv.weight",
]  # fmt: skip
NORMS = ["self_norm", "context_norm", "feed_norm"]
VECTORS = [
    *[f"encoder.layers.0.{name}.{kind}" for name in NORMS for kind in ("weight", "bias")],
    *[f"encoder.layers.0.{name}.bias" for name in BLOCK],
    *[f"encoder.{name}" for name in ("memory_norm.weight", "memory_norm.bias", "memory_projection.to_kv.bias")],
    "encoder.norm.weight", "encoder.norm.bias", "writer.norm.weight", "writer.norm.bias",
    *[f"decoder.layers.{i}.{name}.{kind}" for i in (0, 1) for name in NORMS for kind in ("weight", "bias")],
    *[f"decoder.layers.{i}.{name}.bias" for i in (0, 1) for name in BLOCK],
    "decoder.context_projection.to_kv.bias", "decoder.norm.weight", "decoder.norm.bias", "decoder.to_logits.bias",
]  # fmt: skip
TABLES = ["encoder.embedding.weight", "writer.bias"]


def default_model(**changes):
    config = ModelSettings(**changes).config(260, 32)
    return Memformer(**config.to_dict())


def test_every_parameter_of_a_default_model_has_its_group():
    model = default_model()
    assert sorted(MAPS + VECTORS + TABLES) == sorted(name for name, _ in model.named_parameters())
    for optimizer in ("adamw", "muon"):
        (decay, maps), (none, rest) = grouped(model, decay_of="linear", optimizer=optimizer)
        assert (decay, none) == (0.1, 0.0)
        assert (sorted(maps), sorted(rest)) == (sorted(MAPS), sorted(VECTORS + TABLES))
    (_, decaying), (none, rest) = grouped(model, decay_of="matrices")
    assert none == 0
    assert (sorted(decaying), sorted(rest)) == (sorted(MAPS + TABLES), sorted(VECTORS))


@pytest.mark.parametrize(
    ("changes", "tables"),
    [
        (dict(tie_embeddings=False), {"decoder.embedding.weight", "decoder.to_logits.weight", "writer.bias"}),
        (dict(memory_writer="gated"), {"writer.slots"}),
        (dict(memory_writer="placed"), {"writer.slots", "writer.queries", "writer.places"}),
        (dict(positions="bucketed"), {"encoder.layers.0.self_attention.positions.bias.weight", "writer.bias"}),
        (dict(positions="relative"), {"decoder.layers.1.self_attention.positions.table", "writer.bias"}),
    ],
    ids=lambda value: "-".join(map(str, sorted(value))),
)
def test_what_is_no_linear_map_does_not_decay(changes, tables):
    """By what it is and not by its number of dimensions: embeddings, the output, slots, tables of distances."""
    model = default_model(**changes)
    (_, decaying), (_, rest) = grouped(model, decay_of="linear")
    assert tables | {"encoder.embedding.weight"} <= set(rest)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"decoder.to_logits"}
    assert set(decaying) == {f"{name}.weight" for name in linear}


def test_an_encoder_by_itself_has_an_optimizer():
    model = Memformer(
        dim=8, num_memory_slots=2, enc_num_tokens=9, enc_max_seq_len=4, enc_heads=2, enc_depth=1, encoder_only=True,
        mem_update_attn_heads=2,
    )  # fmt: skip
    for optimizer in ("adamw", "muon"):
        groups = grouped(model, optimizer=optimizer)
        assert sorted(name for _, names in groups for name in names) == sorted(dict(model.named_parameters()))


def test_a_run_of_before_decays_what_it_decayed():
    plain = to_plain(TrainingConfig())
    for name in [f.name for f in dataclasses.fields(OptimizerSettings)]:
        if name not in ("learning_rate", "warmup", "weight_decay", "clip", "ema"):
            del plain["optimizer"][name]
    before = read_saved(plain).optimizer
    assert before == OptimizerSettings(decay_of="matrices")
    assert (before.beta1, before.beta2, before.eps, before.learning_rate_schedule) == (0.9, 0.98, 1e-8, "cosine")


def test_betas_and_eps_reach_adamw(settings):
    for optimizer in ("adamw", "muon"):
        run = Run(settings(beta1=0.8, beta2=0.7, eps=1e-3, optimizer=optimizer))
        group = run.parts.optimizer.param_groups[-1]
        assert (group["betas"], group["eps"]) == ((0.8, 0.7), 1e-3)


# --- Muon


def test_muon_is_torchs_for_the_maps_and_adamw_for_the_rest(settings):
    run, _ = trained(settings(optimizer="muon", steps=1))
    ours = assemble(settings(optimizer="muon", resume=False, out=settings().out / "other"))
    maps, *_ = grouped(ours.model, optimizer="muon")
    parameters = dict(ours.model.named_parameters())
    theirs = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    options = settings().optimizer
    rest = [p for name, p in theirs.items() if name not in maps[1]]
    pair = (
        torch.optim.Muon([theirs[name] for name in maps[1]], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, betas=(options.beta1, options.beta2), weight_decay=0.0),
    )
    ours = make_optimizer(ours.model, OptimizerSettings(optimizer="muon", learning_rate=0.01, decay_of="linear"))
    for step in range(3):
        for i, (name, p) in enumerate(parameters.items()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            theirs[name].grad = p.grad.clone()
        for optimizer in (ours, *pair):
            optimizer.step()
    assert_close(parameters, theirs)
    assert {len(state) for state in run.parts.optimizer.state.values()} == {1, 3}


def test_muon_is_one_optimizer_with_one_state():
    """Its state dict goes to another one and back, and its steps are then the same."""
    models = [default_model(dim=8, heads=2), default_model(dim=8, heads=2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (make_optimizer(model, OptimizerSettings(optimizer="muon")) for model in models)

    def step(model, optimizer, seed):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i))
        return optimizer.step(lambda: 5.0)

    assert step(models[0], first, 0) == 5.0
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in zip(models, (first, second), strict=True):
        step(model, optimizer, 1000)
    assert_close(dict(models[1].named_parameters()), dict(models[0].named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, dict(precision="fp16"), dict(ema=0.5, accumulate=2)], ids=str)
def test_muon_is_resumed_bit_for_bit(settings, tmp_path, options):
    options = dict(optimizer="muon", dropout=0.2, **options)
    whole, metrics = trained(settings(out=tmp_path / "whole", **options))
    assert all(math.isfinite(line.loss_nats) for line in metrics)
    trained(settings(**options), until=3)
    resumed, _ = trained(settings(resume=True, **options))
    assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_muon_and_fsdp_refuse_each_other():
    untied, fsdp = ModelSettings(tie_embeddings=False), ComputeSettings(parallel="fsdp")
    with pytest.raises(ValueError, match="optimizer: muon needs whole matrices, which FSDP divides; use adamw, or"):
        TrainingConfig(optimizer=OptimizerSettings(optimizer="muon"), model=untied, compute=fsdp)


# --- Rates


def test_the_rate_stays_and_falls_along_a_line():
    rates = [warmup_stable_decay(step, 100, 10, 20, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert set(rates[9:81]) == {1.0}
    assert rates[81:] == pytest.approx([1 - 0.9 * step / 20 for step in range(1, 21)])
    assert max(warmup_stable_decay(step, 10, 8, 8) for step in range(10)) < 1, "rise and fall meet under the peak"
    assert warmup_stable_decay(0, 1, 0, 0.2) == warmup_constant(0, 0) == 1, "a single step has the peak rate"
    assert [warmup_constant(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_a_schedule_is_the_runs_rate(settings):
    def rates(steps=10, **options):
        run = Run(settings(steps=steps, warmup=2, learning_rate=2.0, **options))
        return [run.learning_rate(step) for step in range(steps)]

    assert rates(learning_rate_schedule="constant") == [1.0] + [2.0] * 9
    assert rates(learning_rate_schedule="wsd") == [1.0] + [2.0] * 8 + [1.0]
    assert rates(learning_rate_schedule="wsd", decay_share=0.4, least=0.5)[5:] == [2.0, 2.0, 1.75, 1.5, 1.25]
    assert rates(least=0.5)[-1] == pytest.approx(1.0, abs=0.05)
    assert rates()[-1] == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("options", [dict(learning_rate_schedule="wsd"), dict(learning_rate_schedule="constant")])
def test_a_run_made_longer_in_time_is_one_that_was_longer_from_the_start(settings, tmp_path, options):
    """A stable rate does not know where the end is; the cosine does, and is another curve from there on."""
    longer, expected = trained(settings(steps=8, out=tmp_path / "longer", **options))
    trained(settings(steps=5, **options), until=4)
    resumed, rest = trained(settings(steps=8, resume=True, **options))
    assert_close(weights(resumed), weights(longer), rtol=0, atol=0)
    assert [line.learning_rate for line in rest] == [line.learning_rate for line in expected[4:]]


def test_a_constant_rate_ends_with_a_fall(settings):
    """A run without an end is given one, on purpose."""
    trained(settings(steps=99, learning_rate_schedule="constant"), until=4)
    ending = settings(steps=8, learning_rate_schedule="wsd", decay_share=0.5, resume=True)
    run, rest = trained(ending)
    assert run.step == 8
    assert [line.learning_rate for line in rest] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


# --- Clipping


def test_no_clipping_is_0_or_inf(settings, tmp_path):
    """Both are saved as 0, for JSON has no inf."""
    assert OptimizerSettings(clip=math.inf) == OptimizerSettings(clip=0.0)
    none, metrics = trained(settings(clip=math.inf, steps=2))
    clipped, _ = trained(settings(clip=1e-3, eps=1e-2, steps=2, out=tmp_path / "clipped"))
    assert metrics[0].gradient_norm > 1e-3
    assert not weights(clipped)["decoder.norm.bias"].equal(weights(none)["decoder.norm.bias"])
    none, huge = (trained(settings(clip=c, steps=2, out=tmp_path / f"{c}"))[0] for c in (0.0, 1e30))
    assert_close(weights(none), weights(huge), rtol=0, atol=0)


# --- Steps that are left out


@pytest.fixture
def broken(monkeypatch):
    """``broken(run, steps, value)``: the gradient of those steps, counted from 0, is not finite; so is their loss."""

    def spoil(run, steps, value=math.nan):
        back = run._stepper._back_propagate

        def back_spoiled(*args):
            loss = back(*args)
            if run.step in steps:
                run.model.decoder.norm.bias.grad.fill_(value)
            return loss * value if run.step in steps else loss

        monkeypatch.setattr(run._stepper, "_back_propagate", back_spoiled)
        return run

    return spoil


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(settings, broken, precision, value):
    run = broken(Run(settings(skip_non_finite=1, precision=precision, log_every=2, steps=4)), {1}, value)
    seen, lines = {}, []
    for step in range(4):
        taken = run._stepper.take()
        seen[step] = {name: p.clone() for name, p in weights(run).items()}
        lines.append((taken.judged, math.isfinite(float(taken.nats))))
    assert_close(seen[1], seen[0], rtol=0, atol=0)
    assert not seen[2]["decoder.norm.bias"].equal(seen[1]["decoder.norm.bias"])
    assert (run.parts.progress.skipped, run.parts.progress.skipped_in_a_row) == (1, 0)
    assert {float(state["step"]) for state in run.parts.optimizer.state.values()} == {3.0}
    assert [judged > 0 for judged, _ in lines] == [True, False, True, True]
    assert all(finite for _, finite in lines)


def test_skipped_steps_are_counted_and_leave_the_mean_loss_alone(settings, broken):
    run = broken(Run(settings(skip_non_finite=2, log_every=2, steps=6)), {2, 4, 5})
    lines = [line for line in run.train() if isinstance(line, StepMetrics)]
    assert [line.skipped for line in lines] == [0, 0, 1, 3]
    assert [math.isfinite(line.loss_nats) for line in lines] == [True, True, True, False], "nothing was left"
    written = [json.loads(line) for line in (run.settings.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in written if line["event"] == "step"] == [0, 0, 1, 3]


def test_the_loss_of_an_objective_is_without_the_steps_that_were_left_out(settings, monkeypatch):
    """Steps 2 and 3 of three have losses that are no numbers; one line is of all three."""
    mixture = dict(continuation=0.5, infilling=0.5, recall=0.0, log_every=4, steps=4, lanes=4)
    found = {}
    for bad in ((), (2, 3)):
        run = Run(settings(out=settings().out / str(len(bad)), skip_non_finite=2, **mixture))
        forward = run.model.decoder.to_logits.forward

        def spoiled(x, run=run, bad=bad, forward=forward):
            return forward(x) * (math.nan if run.step in bad else 1)

        monkeypatch.setattr(run.model.decoder.to_logits, "forward", spoiled)
        found[bad] = [line for line in run.train() if isinstance(line, StepMetrics)]
    assert [line.skipped for line in found[2, 3]] == [0, 2]
    whole, partly = found[()][-1], found[2, 3][-1]
    for name in ("continuation_nats", "infilling_nats"):
        assert math.isfinite(getattr(partly, name)), name
        assert getattr(partly, name) != getattr(whole, name)
    assert partly.recall_nats is None


def test_too_many_in_a_row_stop_the_run(settings, broken):
    run = broken(Run(settings(skip_non_finite=2)), {0, 2, 3, 4})
    with pytest.raises(FloatingPointError, match=r"step 5: the gradient is not finite .*, after 2 such steps in a row"):
        list(run.train())
    run = broken(Run(settings(out=run.settings.out / "none")), {1})
    with pytest.raises(
        FloatingPointError,
        match=r"step 2: .* \(loss nan\); --skip-non-finite passes over a rare one\. Lower --learning-rate",
    ):
        list(run.train())


def test_a_resumed_run_remembers_how_many_were_left_out(settings, broken, tmp_path):
    options = dict(skip_non_finite=2, save_every=1)
    whole = broken(Run(settings(out=tmp_path / "whole", **options)), {2, 3})
    expected = [line for line in whole.train() if isinstance(line, StepMetrics)]
    first = broken(Run(settings(**options)), {2, 3})
    for line in first.train():
        if line.step == 2:
            first.stop()
    assert checkpoints.load_state(checkpoints.find(tmp_path / "run"))[0]["skipped"] == [1, 1]
    resumed = broken(Run(settings(resume=True, **options)), {2, 3})
    assert resumed.parts.progress.skipped_in_a_row == 1
    rest = [line for line in resumed.train() if isinstance(line, StepMetrics)]
    assert [line.skipped for line in rest] == [line.skipped for line in expected[3:]] == [2, 2, 2]
    assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    strict = Run(settings(resume=True, steps=9, **{**options, "skip_non_finite": 0}))
    assert strict.step == 6, "what is to be passed over may change"


def test_fp16_overflows_are_counted_and_are_no_fault(settings, tmp_path):
    """The scale is halved until it fits; below 1 it is not the scale that is too large."""
    run = Run(settings(precision="fp16", steps=3))
    run.parts.scaler.load_state_dict({**run.parts.scaler.state_dict(), "scale": 2.0**60})
    lines = [line for line in run.train() if isinstance(line, StepMetrics)]
    assert [line.skipped for line in lines] == [1, 2, 3]
    assert run.parts.progress.skipped_in_a_row == 0
    assert run.parts.scaler.get_scale() == 2.0**57
    assert Path(tmp_path / "run").is_dir()
