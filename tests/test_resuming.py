"""What a run survives: a failing evaluation, an interrupted step, another setting on purpose, other documents."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from helpers import training_settings
from memformer import Memformer
from memformer.data import load_tokenizer
from memformer.data.segments import Segment
from memformer.evaluation import HeldOut
from memformer.settings import TrainingConfig, to_flat
from memformer.training import Run, StepMetrics, checkpoints, resume, saved_settings, settings_of, sized_as
from memformer.training.optimizers import make_optimizer
from memformer.training.parts import begun_anew, only_finite
from memformer.training.update import Update

WORDS = "the memory of a segment is read by every layer and written once, so that what was seen is not forgotten. "
LEARNED = "the held-out documents are others than before: some may have been trained on before step 2, so"
Settings = Callable[..., TrainingConfig]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(6):
        (corpus / f"{i}.txt").write_text(WORDS[i:] * (i + 1))

    def make(**changes: Any) -> TrainingConfig:
        given: dict[str, Any] = dict(
            data=(corpus,), out=tmp_path / "run", steps=4, dim=8, slots=2, enc_depth=1, dec_depth=1, heads=2,
            lanes=2, segment_length=8, horizon=2, warmup=1, log_every=1, save_every=2, learning_rate=1e-2, device="cpu",
        )  # fmt: skip
        return training_settings(**{**given, **changes})

    return make


def train(settings: TrainingConfig) -> Run:
    run = Run(settings)
    list(run.train())
    return run


def state(run: Run) -> dict[str, Any]:
    """Everything that decides how a run goes on."""
    progress = run.parts.progress
    moments = {
        f"{name}/{key}": value.clone()
        for name, p in run.model.named_parameters()
        for key, value in run.parts.optimizer.state[p].items()
    }
    return {
        "weights": {name: p.detach().clone() for name, p in run.model.named_parameters()},
        "moments": moments,
        "memory": progress.memory,
        "stream": run.parts.stream.state_dict(),
        "scaler": run.parts.scaler.state_dict(),
        "progress": (progress.step, progress.best, progress.evaluations_since_best, progress.due, progress.tokens),
    }


def assert_same(a: Run, b: Run) -> None:
    assert_close(state(a), state(b), rtol=0, atol=0)


def events(out: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]


# --- Saved before it is evaluated


@pytest.mark.parametrize("error", [ValueError("id 70 is not in the vocabulary"), OSError("gone"), RuntimeError("bug")])
def test_an_error_in_the_evaluation_loses_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = train(settings(out=tmp_path / "whole", eval_every=2, save_every=100))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", lambda run: (_ for _ in ()).throw(error))
        with pytest.raises(type(error), match=str(error)) as told:
            train(settings(eval_every=2, save_every=100))
    if not isinstance(error, RuntimeError):
        assert "step-000002 is saved, and --resume goes on" in str(told.value)
    resumed = Run(settings(eval_every=2, save_every=100, resume=True))
    assert (resumed.step, resumed.parts.progress.due, resumed.best) == (2, True, None)
    assert [type(line) for line in resumed.train()] == [HeldOut, StepMetrics, StepMetrics, HeldOut]
    assert_same(resumed, whole)
    assert [line["step"] for line in events(tmp_path / "run", "held_out")] == [2, 4]
    assert checkpoints.load_numbers(tmp_path / "run" / "step-000004")["best"] == whole.best


@pytest.mark.parametrize("moment", ["evaluate", "write", "record", "replace"])
def test_killed_around_the_evaluation(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """At each moment the checkpoint is sound, and the evaluation is there once."""

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    whole = train(settings(out=tmp_path / "whole", eval_every=2))
    with monkeypatch.context() as patch:
        if moment == "evaluate":
            patch.setattr(Run, "evaluate", kill)
        elif moment == "write":
            patch.setattr(Run, "_write", lambda run, event, metrics: kill() if event == "held_out" else None)
        elif moment == "record":
            patch.setattr(resume, "record_evaluation", kill)
        else:
            replace = checkpoints.replace_file

            def half(file: Path, content: str) -> None:
                kill() if file.name == "training.json" else replace(file, content)

            patch.setattr(checkpoints, "replace_file", half)
        with pytest.raises(Killed):
            train(settings(eval_every=2))
    resumed = train(settings(eval_every=2, resume=True))
    assert_same(resumed, whole)
    assert [line["step"] for line in events(tmp_path / "run", "held_out")] == [2, 4]


def test_a_finished_run_whose_last_evaluation_failed_is_evaluated(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", lambda run: (_ for _ in ()).throw(ValueError("no")))
        with pytest.raises(ValueError, match="no"):
            train(settings())
    run = Run(settings(resume=True))
    assert [type(line) for line in run.train()] == [HeldOut]
    with pytest.raises(ValueError, match="at step 4 already: raise --steps"):
        Run(settings(resume=True))


def test_out_of_memory_in_the_evaluation_is_a_sentence(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", lambda run: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        with pytest.raises(MemoryError, match=r"after step 2 ran out of memory .*step-000002 is saved.*--eval-every 0"):
            train(settings(eval_every=2))
    run = Run(settings(eval_every=0, resume=True))
    assert not run.parts.progress.due
    assert sum(isinstance(line, HeldOut) for line in run.train()) == 1


def test_an_evaluation_that_is_no_number_is_never_the_best(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Run.evaluate
    losses = iter([math.nan, 3.0])
    monkeypatch.setattr(Run, "evaluate", lambda run: dataclasses.replace(evaluate(run), loss_nats=next(losses)))
    assert train(settings(eval_every=2)).best == {"step": 4, "loss_nats": 3.0}


def test_stopping_does_not_wait_for_an_evaluation(settings: Settings, tmp_path: Path) -> None:
    whole = train(settings(out=tmp_path / "whole", eval_every=2))
    run = Run(settings(eval_every=2))
    for line in run.train():
        assert isinstance(line, StepMetrics)
        if line.step == 1:
            run.stop()
    assert (run.step, run.best) == (2, None)
    assert_same(train(settings(eval_every=2, resume=True)), whole)


# --- Interrupted in the middle of a step, and called again


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def at_rollout(run: Run, patch: pytest.MonkeyPatch) -> None:
    rollout = run.parts.stream.rollout
    patch.setattr(run.parts.stream, "rollout", lambda horizon: rollout(horizon) and interrupt())


def at_forward(run: Run, patch: pytest.MonkeyPatch) -> None:
    step = run.model.step
    patch.setattr(run.model, "step", lambda *inputs: step(*inputs) and interrupt())


def at_second_rollout(run: Run, patch: pytest.MonkeyPatch) -> None:
    back_propagate = run._stepper._back_propagate

    def one(segments: Any, divisor: float, last: bool, watch: Any) -> Any:
        return interrupt() if last else back_propagate(segments, divisor, last, watch)

    patch.setattr(run._stepper, "_back_propagate", one)


def at_clipping(run: Run, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)


def at_metrics(run: Run, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run, "_health", interrupt)


def at_saving(run: Run, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(resume, "save", interrupt)


def at_evaluation(run: Run, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run, "evaluate", interrupt)


PLACES = [at_rollout, at_forward, at_second_rollout, at_clipping, at_metrics, at_saving, at_evaluation]


@pytest.mark.parametrize("precision", ["float32", "fp16"])
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_is_interrupted_is_whole_or_not_at_all(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[..., None], precision: str
) -> None:
    options = dict(accumulate=2, precision=precision, eval_every=2, ema=0.5, dropout=0.1)
    whole = train(settings(out=tmp_path / "whole", **options))
    run = Run(settings(**options))
    steps = run.train()
    next(steps)
    with monkeypatch.context() as patch:
        place(run, patch)
        with pytest.raises(KeyboardInterrupt):
            list(steps)
    list(run.train())
    assert_same(run, whole)
    assert_close(run.parts.average, whole.parts.average, rtol=0, atol=0)
    assert [line["step"] for line in events(tmp_path / "run", "held_out")] == [2, 4]


@pytest.fixture
def listening() -> Iterator[None]:
    """To Ctrl-C, also where the suite runs in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_ctrl_c_waits_for_the_end_of_an_update(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(settings(out=tmp_path / "whole"))
    run, average = Run(settings()), Update.average
    with monkeypatch.context() as patch:
        patch.setattr(Update, "average", lambda self: os.kill(os.getpid(), signal.SIGINT) or average(self))
        with pytest.raises(KeyboardInterrupt):
            list(run.train())
    assert run.step == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    list(run.train())
    assert_same(run, whole)


@pytest.mark.parametrize("moment", [1, 5])
def test_an_evaluation_that_is_interrupted_leaves_the_newest_weights(settings: Settings, moment: int) -> None:
    """Also where that is while the average takes their place."""
    run = Run(settings(ema=0.5))
    next(iter(run.train()))
    before = state(run)["weights"]

    class Interrupting(dict[str, Tensor]):
        asked = 0

        def __getitem__(self, name: str) -> Tensor:
            self.asked += 1
            return super().__getitem__(name) if self.asked < moment else interrupt()  # type: ignore[func-returns-value]

    update = Update(dataclasses.replace(run.parts, average=Interrupting(run.parts.average)), run.settings)
    with pytest.raises(KeyboardInterrupt), update.averaged():
        raise AssertionError("not interrupted")
    assert_close(state(run)["weights"], before, rtol=0, atol=0)


def test_a_run_that_another_one_has_overtaken_is_refused(settings: Settings) -> None:
    """Also where it had trained before: one in a notebook, say, and then one on the command line."""
    run = Run(settings())
    for line in run.train():
        if line.step == 1:
            run.stop()
    train(settings(resume=True))
    with pytest.raises(BlockingIOError, match=r"another training has come to step-000004 there since this one was"):
        next(iter(run.train()))


def test_what_is_half_updated_is_not_trained_on(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(settings())
    steps = run.train()
    next(steps), next(steps)
    with monkeypatch.context() as patch:
        patch.setattr(Update, "average", interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(steps)
    with pytest.raises(RuntimeError, match=r"in the middle of an update, .* make a new Run with resume=True"):
        next(run.train())
    assert Run(settings(resume=True)).step == 2


def test_a_run_that_was_stopped_goes_on_when_it_is_called_again(settings: Settings, tmp_path: Path) -> None:
    whole, run = train(settings(out=tmp_path / "whole")), Run(settings())
    for line in run.train():
        if line.step == 1:
            run.stop()
    assert run.step == 2
    list(run.train())
    assert_same(run, whole)


# --- Changes on purpose


def test_every_setting_has_its_place_in_the_table() -> None:
    assert {resume.on_resuming(name) for name in to_flat(TrainingConfig())} == {
        "exact", "stretch", "stream", "best", "documents", "fixed",
    }  # fmt: skip
    names = {name.split(".")[0] for name in to_flat(TrainingConfig())}
    assert names <= {name for name in resume.ON_RESUMING if "." not in name}


@pytest.mark.parametrize(
    "change",
    [
        dict(learning_rate=1e-3), dict(warmup=3), dict(weight_decay=0.5), dict(clip=0.1), dict(ema=0.9),
        dict(precision="bf16"), dict(precision="fp16"), dict(dropout=0.3), dict(horizon=3), dict(accumulate=2),
        dict(recall=0.5), dict(horizon_start=1),
    ],
    ids=str,
)  # fmt: skip
def test_what_begins_a_new_stretch(settings: Settings, tmp_path: Path, change: dict[str, Any]) -> None:
    before = train(settings(steps=2))
    run = Run(settings(resume=True, **change))
    ((name, value),) = change.items()
    first, *_ = [c for c in run.parts.changes if c.name.endswith(f".{name}")]
    assert first.now == value
    assert_close(state(run)["weights"], state(before)["weights"], rtol=0, atol=0)
    assert_close(run.parts.progress.memory, before.parts.progress.memory, rtol=0, atol=0)
    list(run.train())
    assert run.step == 4
    (line,) = events(tmp_path / "run", "changed")
    assert line["step"] == 2
    assert line["settings"][first.name] == [first.before, value]
    assert to_flat(saved_settings(tmp_path / "run"))[first.name] == value
    if name == "learning_rate":
        rates = [line["learning_rate"] for line in events(tmp_path / "run", "step")]
        assert rates[2] == pytest.approx(run.learning_rate(2))
        assert max(rates[2:]) < 1e-3 < max(rates)


@pytest.mark.parametrize("change", [dict(lanes=4), dict(lanes=1), dict(seed=3)], ids=str)
def test_what_begins_the_documents_anew(settings: Settings, change: dict[str, Any]) -> None:
    before = train(settings(steps=2))
    run = Run(settings(resume=True, **change))
    stream = run.parts.stream.state_dict()
    assert run.parts.progress.memory is None
    assert (stream["epoch"], stream["drawn"]) == (before.parts.stream.state_dict()["epoch"] + 1, 0)
    assert "a new epoch of the documents begins, with new memories" in str(run.parts.changes[-1])
    list(run.train())
    assert run.step == 4


def test_the_advice_after_a_divergence_can_be_followed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(steps=2))
    run = Run(settings(resume=True, steps=9))
    with torch.no_grad():
        run.model.decoder.to_logits.bias.fill_(math.nan)  # type: ignore[union-attr]
    command = r"step-000002\. Go on with: memformer train --resume --out .*run --learning-rate 0\.003"
    with pytest.raises(FloatingPointError, match=command):
        list(run.train())
    assert train(settings(resume=True, steps=9, learning_rate=0.003)).step == 9


def test_the_newest_checkpoint_that_is_finite_is_named(settings: Settings, tmp_path: Path) -> None:
    train(settings())
    file = tmp_path / "run" / "step-000004" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = math.inf
    save_file(tensors, file)
    assert checkpoints.newest_finite(tmp_path / "run") == tmp_path / "run" / "step-000002"
    shards = tmp_path / "run" / "step-000002" / "shards"  # as under FSDP, where no process has all of it
    shards.mkdir()
    for name in ("model", "training"):
        (shards.parent / f"{name}.safetensors").rename(shards / f"{name}-0.safetensors")
    assert checkpoints.newest_finite(tmp_path / "run") == shards.parent
    assert "/a b' --learning-rate" in checkpoints.after_divergence((tmp_path / "run").rename(tmp_path / "a b"), 0.3)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is open")
def test_a_resumed_run_holds_no_file_of_its_checkpoint(settings: Settings, tmp_path: Path) -> None:
    """On a network folder what is held cannot be deleted, and each resume would leave a checkpoint behind."""
    train(settings(steps=2))
    run = Run(settings(steps=4, resume=True))
    assert str(tmp_path / "run" / "step-") not in Path("/proc/self/maps").read_text()
    list(run.train())


def test_weights_that_are_not_finite_are_not_saved(settings: Settings, tmp_path: Path) -> None:
    run = Run(settings())
    steps = run.train()
    next(steps), next(steps)
    with torch.no_grad():
        run.model.encoder.embedding.weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="not finite, so nothing is saved"):
        list(steps)
    assert checkpoints.newest(tmp_path / "run") is None


def test_other_documents_are_taken_on_purpose(settings: Settings, tmp_path: Path) -> None:
    before = train(settings(steps=2))
    for name in ("more", "others"):
        (tmp_path / "corpus" / f"{name}.txt").write_text(f"{name}: {WORDS}" * 3)
    with pytest.raises(ValueError, match=r"the training documents are not those of .*add --new-data"):
        Run(settings(resume=True))
    with pytest.warns(UserWarning, match=LEARNED):
        run = Run(settings(resume=True, new_data=True))
    assert run.parts.progress.memory is None
    assert_close(state(run)["moments"], state(before)["moments"], rtol=0, atol=0)
    assert "training documents" in [change.name for change in run.parts.changes]
    list(run.train())
    assert not saved_settings(tmp_path / "run").new_data
    assert Run(settings(resume=True, steps=5)).step == 4


def test_another_held_out_part_begins_the_search_for_the_best_anew(settings: Settings, tmp_path: Path) -> None:
    before = train(settings(steps=2, eval_every=1, held_out_by="name"))
    (held_out,) = {document.name for document in before.held_out}
    (tmp_path / "corpus" / held_out).write_text("mended. " * 9)
    with pytest.raises(ValueError, match=r"the held-out documents are not those of .*add --new-data"):
        Run(settings(resume=True, eval_every=1, held_out_by="name"))
    with pytest.warns(UserWarning, match=LEARNED):
        run = Run(settings(resume=True, eval_every=1, held_out_by="name", new_data=True))
    assert run.best is None
    assert run.parts.stream.state_dict() == before.parts.stream.state_dict()
    assert_close(run.parts.progress.memory, before.parts.progress.memory, rtol=0, atol=0)
    with pytest.warns(UserWarning, match=LEARNED):
        limited = Run(settings(eval_every=1, eval_limit=20, held_out_by="name", resume=True, new_data=True))
    assert limited.best is None


def test_paths_of_data_do_not_depend_on_the_working_directory(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(settings(steps=2, data=(Path("corpus"),)))
    assert saved_settings(tmp_path / "run").data == (tmp_path / "corpus",)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Run(dataclasses.replace(saved_settings(tmp_path / "run"), resume=True, steps=3)).step == 2


# --- Starting from other weights, starting or resuming


def test_a_run_starts_with_the_weights_of_another(settings: Settings, tmp_path: Path) -> None:
    first = train(settings(steps=4, eval_every=2, tokenizer="bpe", vocabulary=280))
    assert first.best is not None
    best = Memformer.from_pretrained(tmp_path / "run" / f"step-{first.best['step']:06d}")
    fresh = settings(out=tmp_path / "second", dim=32, data=(tmp_path / "corpus" / "5.txt",), seed=5)
    with pytest.raises(ValueError, match=r"documents\.tokenizer: the model in .* has a tokenizer of bpe, got bytes"):
        Run(dataclasses.replace(fresh, init_from=tmp_path / "run"))
    sized = sized_as(fresh, tmp_path / "run")
    second = Run(sized)
    assert second.step == 0
    assert_close(dict(second.model.state_dict()), dict(best.state_dict()), rtol=0, atol=0)
    assert second.tokenizer.encode(WORDS).tolist() == load_tokenizer(tmp_path / "run").encode(WORDS).tolist()
    list(second.train())
    assert saved_settings(tmp_path / "second").init_from == tmp_path / "run"
    wrong = dataclasses.replace(sized, model=dataclasses.replace(sized.model, dim=16), out=tmp_path / "third")
    with pytest.raises(ValueError, match=r"dim: the model in .* has 8, got 16; sizes come with the weights"):
        Run(wrong)


def test_auto_resume_starts_and_goes_on(settings: Settings, tmp_path: Path) -> None:
    whole = train(settings(out=tmp_path / "whole"))
    run = Run(settings(auto_resume=True))
    for line in run.train():
        if line.step == 1:
            run.stop()
    again = Run(settings(auto_resume=True))
    assert (again.step, again.parts.changes) == (2, [])
    list(again.train())
    assert_same(again, whole)
    done = Run(settings(auto_resume=True))
    assert (done.step, list(done.train())) == (4, [])


# --- Memories that are not finite


def test_a_memory_that_is_not_finite_begins_anew() -> None:
    memory = torch.ones(3, 2, 4)
    memory[1, 0, 3], memory[2, 1, 1] = math.nan, math.inf
    kept, lost = only_finite(memory)
    assert int(lost) == 2
    assert kept[0].equal(memory[0])
    assert kept.isfinite().all()
    model = Memformer(
        dim=4, num_memory_slots=2, mem_update_attn_heads=2, enc_num_tokens=9, enc_depth=1, enc_heads=2,
        enc_max_seq_len=5, encoder_only=True,
    )  # fmt: skip
    segment = begun_anew(Segment(torch.randint(9, (3, 5)), reset=torch.zeros(3, dtype=torch.bool)), kept)
    assert segment.reset is not None
    assert segment.reset.tolist() == [False, True, True]
    found = model.step(segment.src, kept, None, segment.reset)[1]
    expected = model.step(segment.src, model.get_initial_mem(3), None, None)[1]
    assert_close(found[1:], expected[1:])


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_run_carries_and_saves_no_memory_that_is_not_finite(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The second step's last memory overflows in one lane, after all that its loss depends on."""
    run = Run(settings(precision=precision))
    forward, seen = run.parts.rollouts.forward, []

    def overflows(*inputs: Any) -> tuple[Tensor, Tensor]:
        loss, memory = forward(*inputs)
        seen.append(inputs[0][0].reset)
        if run.step == 1:
            memory = memory.clone()
            memory[1, 0, 0] = math.inf
        return loss, memory

    monkeypatch.setattr(run.parts.rollouts, "forward", overflows)
    with pytest.warns(UserWarning, match="until step 2: 1 times a lane's memory was not finite"):
        list(run.train())
    assert seen[2][1]
    for folder in (tmp_path / "run").glob("step-*"):
        assert checkpoints.load_state(folder)[1]["memory"].isfinite().all()
    monkeypatch.undo()
    (tmp_path / "run" / "step-000004").rename(tmp_path / "step-000004")
    resumed = Run(settings(precision=precision, resume=True))
    list(resumed.train())
    assert_same(resumed, run)


# --- The optimizer's state is where the optimizer keeps it


@pytest.mark.parametrize("fused", [True, False])
def test_a_restored_optimizer_is_as_one_that_took_a_step(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    assembling = sys.modules["memformer.training.assemble"]  # not the function of this name
    make = assembling.make_optimizer

    def other(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = make(*arguments)
        for group in optimizer.param_groups:
            group["fused"] = fused
        return optimizer

    monkeypatch.setattr(assembling, "make_optimizer", other)
    before = train(settings(steps=2))
    resumed = Run(settings(resume=True))
    for (name, a), b in zip(before.model.named_parameters(), resumed.model.parameters(), strict=True):
        there, here = before.parts.optimizer.state[a], resumed.parts.optimizer.state[b]
        assert there.keys() == here.keys()
        for key, value in there.items():
            assert (here[key].device, here[key].dtype) == (value.device, value.dtype), (name, key)
            assert here[key].equal(value)


def test_a_fused_optimizer_has_its_steps_on_the_card(settings: Settings) -> None:
    """As on a GPU: a parameter on another device than the tensors that were saved."""
    train(settings(steps=2))
    run = Run(settings(resume=True))
    saved = checkpoints.load_state(checkpoints.find(settings().out))[1]
    model = run.model.to("meta")
    parts = dataclasses.replace(run.parts, model=model, optimizer=make_optimizer(model, settings().optimizer))
    resume._restore_optimizer(parts, saved)
    kept = [value for state in parts.optimizer.state.values() for value in state.values()]
    assert kept
    assert {value.device.type for value in kept} == {"meta"}


# --- Where a model is expected, a run's folder is one


def test_a_runs_folder_is_its_best_model(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Run.evaluate
    monkeypatch.setattr(Run, "evaluate", lambda run: dataclasses.replace(evaluate(run), loss_nats=float(run.step)))
    out = tmp_path / "run"
    train(settings(eval_every=2))
    assert checkpoints.find(out) == out / "step-000002"
    best = Memformer.from_pretrained(out / "step-000002").state_dict()
    assert_close(Memformer.from_pretrained(out).state_dict(), best, rtol=0, atol=0)
    assert_close(Memformer.from_pretrained(str(out / "best")).state_dict(), best, rtol=0, atol=0)
    assert load_tokenizer(out).vocabulary == 260
    assert settings_of(out) == saved_settings(str(out))
    train(settings(out=tmp_path / "end"))
    assert checkpoints.find(tmp_path / "end") == tmp_path / "end" / "step-000004"
