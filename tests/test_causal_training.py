"""Runs of a causal model: lanes, evaluation, checkpoints, resuming, files that say what they hold."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from helpers import WRITERS, lively, lively_causal, take_grads, tokens, training_settings
from memformer import CausalMemformer, Memformer, load_model, memory_replay_backprop, replay, rollouts
from memformer.causal import CausalMemory
from memformer.cli.inspect import describe
from memformer.data import ByteTokenizer, Lanes, encode_documents
from memformer.data.documents import Document
from memformer.data.segments import Segment
from memformer.evaluation import evaluate
from memformer.folders import all_checkpoints
from memformer.inspection import inspect, slot_diversity
from memformer.rollouts import rollout, verify_rollout
from memformer.settings import TrainingConfig
from memformer.training import Run, StepMetrics, average, checkpoints, sized_as
from memformer.training.parts import begun_anew, by_name, from_names, only_finite
from memformer.wavefront import pays, read_segments

WORDS = "the memory of a segment is read by every layer and written once, so that what was seen is not forgotten. "
Settings = Callable[..., TrainingConfig]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(6):
        (corpus / f"{i}.txt").write_text(WORDS[i:] * (i + 1))

    def make(**changes: Any) -> TrainingConfig:
        given: dict[str, Any] = dict(
            data=(corpus,), out=tmp_path / "run", steps=4, architecture="causal", dim=8, slots=2, depth=3, heads=2,
            lanes=2, segment_length=8, horizon=4, warmup=1, log_every=1, save_every=2, learning_rate=1e-2, device="cpu",
        )  # fmt: skip
        return training_settings(**{**given, **changes})

    return make


def train(settings: TrainingConfig) -> Run:
    run = Run(settings)
    list(run.train())
    return run


def state(run: Run) -> tuple[Any, ...]:
    moments = [run.parts.optimizer.state[p] for p in run.model.parameters()]
    return list(run.model.parameters()), moments, run.parts.progress.memory, run.parts.stream.state_dict(), run.best


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2}, {"memory_layout": "one", "memory_writer": "gated"}])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(
    settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = train(settings(out=tmp_path / "whole", log_every=2, **changes))
    run = Run(settings(log_every=2, **changes))
    for line in run.train():
        if line.step == 2:
            run.stop()
    resumed = train(settings(log_every=2, resume=True, **changes))
    assert resumed.step == whole.step == 4
    assert_close(state(resumed), state(whole), rtol=0, atol=0)


def test_a_step_has_the_gradients_of_plain_autograd(settings: Settings) -> None:
    run = Run(settings())
    assert run.verify().ok
    assert isinstance(run.model, CausalMemformer)


@pytest.mark.parametrize(("horizon", "at_once"), [(2, False), (3, True)])
def test_what_is_verified_runs_as_in_training(settings: Settings, horizon: int, at_once: bool) -> None:
    """All layers at once pays from three segments and three layers on."""
    verdict = Run(settings(horizon=horizon, depth=3)).verify()
    assert verdict.ok
    assert ("all layers at once" in verdict.summary) is at_once


@pytest.mark.parametrize("memory", [True, False])
def test_each_token_is_evaluated_once_and_documents_do_not_know_each_other(memory: bool) -> None:
    model = lively_causal(num_tokens=260, max_seq_len=8).float()
    texts = [WORDS[:n].encode() for n in (3, 8, 30, 41)]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    tokenizer = ByteTokenizer()
    found = evaluate(model, documents, tokenizer, lanes=3, memory=memory)
    alone = [evaluate(model, [document], tokenizer, memory=memory) for document in documents]
    assert found.tokens == sum(map(len, encode_documents(documents, tokenizer)))
    assert found.loss_nats * found.tokens == pytest.approx(sum(d.loss_nats * d.tokens for d in alone), rel=1e-5)
    if memory:
        ids = torch.from_numpy(encode_documents(documents[3:], tokenizer)[0].astype("int64"))[None]
        mems, nats = None, 0.0
        for piece in ids.split(8, 1):
            _, mems, loss = model(piece, mems, labels=piece)
            nats += float(loss.detach()) * piece.shape[1]
        assert alone[3].loss_nats * alone[3].tokens == pytest.approx(nats, rel=1e-5)


def test_without_memory_the_overlap_is_still_read() -> None:
    model = lively_causal()
    _, mems, _ = model(tokens(2, 5))
    forgotten = model.forget(mems)
    assert torch.equal(forgotten.last, mems.last)
    assert_close(forgotten.slots, model.get_initial_mem(2).slots)


@pytest.mark.parametrize("lengths", [[5] * 6, [5, 5, 3], [5]])
def test_segments_read_at_once_are_those_read_one_by_one(lengths: list[int]) -> None:
    model = lively_causal()
    segments = [Segment(tokens(2, n), torch.rand(2, n) > 0.2, torch.rand(2) > 0.7) for n in lengths]
    outputs: list[Tensor] = []
    mems = read_segments(model, segments, None, outputs.append)
    memory = None
    for segment, output in zip(segments, outputs, strict=True):
        expected, memory = model.cell(segment, memory)
        assert_close(output[:, 1:] * segment.src_mask[..., None], expected[:, 1:] * segment.src_mask[..., None])
    assert_close(mems, memory)


def test_replay_is_right_for_segments_of_a_stream() -> None:
    model = lively_causal(dropout=0.1).train()
    lanes = Lanes([tokens(n).numpy() for n in (3, 17, 9, 30)], lanes=2, length=5, start=10, spread=True, seed=0)
    segments = [model.of_stream(segment) for segment in lanes.rollout(3)]
    at_once, one_by_one = (verify_rollout(model, segments, wavefront=wavefront) for wavefront in (None, False))
    assert at_once.ok
    assert one_by_one.ok
    assert at_once.summary.startswith("CausalMemformer: all layers at once, 3 segments in 5 steps, float64")
    assert one_by_one.summary.startswith("CausalMemformer: 3 segments, float64")
    with pytest.raises(ValueError, match="wavefront: its steps are no segments"):
        rollout(model, [Segment(tokens(1, 5))] * 2, wavefront=True, segment_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="wavefront: expected a CausalMemformer, got Memformer"):
        rollout(lively(), [Segment(tokens(1, 5), tgt=tokens(1, 5))], wavefront=True)


@pytest.mark.parametrize("reduction", ["segment_means", "mean", "sum"])
def test_reductions_and_labels(reduction: str) -> None:
    model, text = lively_causal(), tokens(2, 13)
    labels = text.clone()
    labels[0, :7] = -100
    loss, _ = memory_replay_backprop(model, text.tolist(), labels, reduction=reduction)
    mems, sums, counts = None, [], []
    for piece, wanted in zip(text.split(5, 1), labels.split(5, 1), strict=True):
        _, mems, mean = model(piece, mems, labels=wanted)
        counts.append(int((wanted != -100).sum()))
        sums.append(float(mean.detach()) * counts[-1])
    per_segment = sum(s / n for s, n in zip(sums, counts, strict=True))
    expected = {"segment_means": per_segment, "mean": sum(sums) / sum(counts), "sum": sum(sums)}
    assert float(loss) == pytest.approx(expected[reduction])
    with pytest.raises(ValueError, match="tgt_mask: labels have the mask of their tokens"):
        memory_replay_backprop(model, text, labels, tgt_mask=text > 0)
    with pytest.raises(ValueError, match="tgt: expected the shape of the tokens"):
        memory_replay_backprop(model, text, labels[:, 1:])
    with pytest.raises(ValueError, match="expected either tgt or loss_fn, got both"):
        memory_replay_backprop(model, text, labels, loss_fn=lambda i, hidden: hidden.sum())


def test_a_loss_of_ones_own() -> None:
    model, text = lively_causal(), tokens(2, 12)
    loss, _ = memory_replay_backprop(model, text, loss_fn=lambda i, hidden: hidden.square().mean() if i else None)
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    mems, expected = None, torch.zeros((), dtype=torch.float64)
    for i, piece in enumerate(text.split(5, 1)):
        hidden, mems = model.step(piece, mems)
        expected = expected + (hidden.square().mean() if i else 0)
    expected.backward()
    assert_close(loss, expected.detach())
    for grad, parameter in zip(found, model.parameters(), strict=True):
        if grad is not None:
            assert_close(grad, parameter.grad)


@pytest.mark.parametrize("writer", WRITERS)
def test_all_layers_at_once_in_low_precision(writer: str) -> None:
    model = lively_causal(memory_writer=writer).float()
    segments = [Segment(tokens(2, 5)) for _ in range(4)]
    found = []
    for wavefront in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            outcome = rollout(model, segments, wavefront=wavefront, method=replay.full_bptt)
        outcome.loss.backward()
        found.append(float(outcome.loss.detach()))
    assert found[0] == pytest.approx(found[1], rel=2e-2)


def test_a_memory_that_is_not_finite_begins_anew() -> None:
    model = lively_causal()
    _, mems, _ = model(tokens(3, 5))
    mems = mems._replace(slots=mems.slots.index_fill(0, torch.tensor([1]), torch.nan))
    kept, lost = only_finite(mems)
    assert int(lost) == 1
    assert not torch.stack([kept.last[1].any(), kept.output[1].any()]).any()  # all of a lane that is lost
    assert_close([part[::2] for part in kept], [part[::2] for part in mems], rtol=0, atol=0)
    assert begun_anew(Segment(tokens(3, 5)), kept).reset.tolist() == [False, True, False]
    names = ["memory/slots", "memory/last", "memory/output"]
    assert_close(from_names(dict(zip(names, kept, strict=True)), kept), kept)
    assert list(by_name(kept)) == names
    assert list(by_name(kept.slots)) == ["memory"]


def test_an_inspection_counts_the_slots_of_all_layers() -> None:
    model = lively_causal()
    found = inspect(model, [tokens(33).numpy(), tokens(40).numpy()], start=10, segments=6)
    assert found.self_attention.shape == (2, 6, 9)
    assert (found.memories, found.slot_norms.shape, found.gradient_reach.shape) == (3, (9,), (6,))
    assert (found.gradient_reach > 0).all()
    initial = model.get_initial_mem(2)
    _, memory = model.cell(Segment(tokens(2, 5)), initial)
    assert slot_diversity(memory.slots[:, 0]).shape == (2,)


def test_the_command_says_where_the_slots_are() -> None:
    found = inspect(lively_causal(), [tokens(20).numpy()], start=10)
    assert describe(found).startswith("9 slots (3 in each of 3 layers, in their order), read over 4 segments of 1 doc")


@pytest.mark.parametrize("horizon", [12, 13])
def test_how_far_credit_reaches_is_told_unless_all_layers_run_at_once(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, horizon: int
) -> None:
    """A rollout of 13 segments keeps no outputs here, and so runs its three layers one after the other."""
    monkeypatch.setattr(rollouts, "FEW_BYTES", 0)
    fronts, made = [], rollouts.Wavefront
    monkeypatch.setattr(rollouts, "Wavefront", lambda *given: fronts.append(given) or made(*given))
    lines = list(Run(settings(steps=1, horizon=horizon, graphs=1)).train())
    [line] = [line for line in lines if isinstance(line, StepMetrics)]
    at_once = horizon == 12
    assert bool(fronts) == at_once
    assert (line.memory_gradient is None) == at_once
    assert line.memory_gradient is None or line.memory_gradient > 0


class Doubled(torch.nn.Module):
    """A user's own part around one of the model's."""

    def __init__(self, inside: torch.nn.Module):
        super().__init__()
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inside(x)


def _attentions(model: CausalMemformer) -> list[torch.nn.Module]:
    return [layer.block.self_attention for layer in model.stack.layers]


def _halves_one(model: CausalMemformer) -> None:
    _attentions(model)[1].register_forward_hook(lambda module, given, out: 0.5 * out)


def _halves_a_leaf(model: CausalMemformer) -> None:
    for attention in _attentions(model):
        attention.to_out.register_forward_hook(lambda module, given, out: 0.5 * out)


def _writes_otherwise(model: CausalMemformer) -> None:
    model.writers()[2].write_with(0.05, 0.5)


def _drops_in_one(model: CausalMemformer) -> None:
    for part in model.stack.layers[1].modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 1.0


def _trains_one(model: CausalMemformer) -> None:
    _drops_in_one(model.eval())
    model.stack.layers[1].train()


def _doubles(which: slice) -> Callable[[CausalMemformer], None]:
    def change(model: CausalMemformer) -> None:
        for attention in _attentions(model)[which]:
            attention.to_out = Doubled(attention.to_out)

    return change


def _carries_more(model: CausalMemformer) -> None:
    model.stack.layers[2].block.note = "of this layer alone"


def _normalises(model: CausalMemformer) -> None:
    for attention in _attentions(model):
        torch.nn.utils.parametrizations.weight_norm(attention.to_out)


def _normalises_without_a_bias(model: CausalMemformer) -> None:
    for layer in model.stack.layers:
        layer.norm = torch.nn.LayerNorm(layer.norm.normalized_shape, bias=False, dtype=layer.norm.weight.dtype)


def _normalises_without_weights(model: CausalMemformer) -> None:
    for layer in model.stack.layers:
        layer.norm = torch.nn.LayerNorm(layer.norm.normalized_shape, elementwise_affine=False)


def _normalises_by_place(model: CausalMemformer) -> None:
    for layer in model.stack.layers:
        layer.block.feed_forward[1] = torch.nn.Softmax(dim=1)


def _changes_what_the_stack_gives(model: CausalMemformer) -> None:
    model.stack.register_forward_hook(lambda module, args, output: (output[0] * 0.5, *output[1:]))


def _steps_otherwise(model: CausalMemformer) -> None:
    class Louder(CausalMemformer):
        def step(self, *args: Any) -> tuple[torch.Tensor, CausalMemory]:
            hidden, after = super().step(*args)
            return hidden * 1.5, after

    model.__class__ = Louder


CHANGES = {
    "norms without a bias": (_normalises_without_a_bias, "'norm' is a LayerNorm without a weight or a bias"),
    "norms without weights": (_normalises_without_weights, "'norm' is a LayerNorm without a weight or a bias"),
    "a dimension by its place": (_normalises_by_place, "'block.feed_forward.1' is a Softmax, which is not known"),
    "a hook on the stack": (_changes_what_the_stack_gives, "'stack' has a hook"),
    "a step of its own": (_steps_otherwise, "the model has a step of its own"),
    "a hook on one": (_halves_one, "'block.self_attention' has a hook"),
    "a hook on a leaf": (_halves_a_leaf, "'block.self_attention.to_out' has a hook"),
    "another writer": (_writes_otherwise, "'writer' is not the same in all of them"),
    "dropout in one": (_drops_in_one, "is not the same in all of them"),
    "one in training": (_trains_one, "is not the same in all of them"),
    "a part of one": (_doubles(slice(1, 2)), "'block.self_attention.to_out' is not the same in all of them"),
    "a part of all": (_doubles(slice(None)), "'block.self_attention.to_out' is a Doubled, which is not known here"),
    "an attribute": (_carries_more, "'block' is not the same in all of them"),
    "a parametrization": (_normalises, "'block.self_attention.to_out' is a ParametrizedLinear, which is not known"),
}


def segment_by_segment(
    model: CausalMemformer, text: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], list[torch.Tensor]]:
    """The sum of the segments' losses, the memory and the gradients, by plain autograd."""
    loss, mems = torch.zeros((), dtype=torch.float64), None
    for piece in text.split(5, 1):
        _, mems, one = model(piece, mems, labels=piece)
        loss = loss + one
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return loss.detach(), tuple(x.detach() for x in mems), grads


@pytest.mark.parametrize("kind", CHANGES)
def test_layers_of_which_one_cannot_stand_for_all_run_one_by_one(kind: str) -> None:
    change, message = CHANGES[kind]
    model = lively_causal(depth=3, dropout=0.0)
    change(model)
    text = tokens(2, 20)
    loss, mems, expected = segment_by_segment(model, text)
    found, after = memory_replay_backprop(model, text)
    assert_close((found, tuple(after)), (loss, mems))
    assert_close([p.grad for p in model.parameters()], expected)
    with pytest.raises(ValueError, match=f"wavefront: one layer stands for all of them, and .*{re.escape(message)}"):
        rollout(model, [Segment(piece) for piece in text.split(5, 1)], wavefront=True)


class Capped(CausalMemformer):
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.tanh(super().head(hidden) / 0.5)


def test_a_head_of_ones_own_counts_in_a_rollout() -> None:
    model = lively_causal(depth=3, dropout=0.0)
    model.__class__ = Capped
    text = tokens(2, 20)
    loss, _, expected = segment_by_segment(model, text)
    assert_close(memory_replay_backprop(model, text)[0], loss)
    assert_close([p.grad for p in model.parameters()], expected)
    segments = [Segment(piece) for piece in text.split(5, 1)]
    assert_close(rollout(model, segments, divisor=torch.tensor(7.0)).loss.detach(), loss * (2 * 5) / 7)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which dynamo looks at
@pytest.mark.parametrize("layout", ["layers", "one"])
def test_a_compiled_model_has_the_same_gradients_and_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    model, segments = lively_causal(memory=layout, depth=4), [Segment(tokens(2, 5)) for _ in range(3)]

    def step() -> list[torch.Tensor | None]:
        rollout(model, segments).loss.backward()
        return list(take_grads(model).values())

    expected, counter, compile_it = step(), CompileCounter(), torch.nn.Module.compile
    assert pays(model, 3) == (layout == "layers")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_it(self, backend=counter))
    model.compile_parts()
    assert not pays(model, 3)
    assert_close(step(), expected)
    compiled = counter.frame_count
    assert 2 <= compiled <= 4  # without and with gradients; the initial memory has other strides
    assert_close(step(), expected)
    assert counter.frame_count == compiled


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 8), (2, 28, 7), (2, 29, 8)])
def test_a_memory_of_another_model_is_not_resized(shape: tuple[int, ...]) -> None:
    """Of a depth of 3 with an overlap of 4: 13 rows are no slots, and what is left is the same for each layer."""
    model = lively_causal(depth=3, overlap=4)
    with pytest.raises(
        ValueError, match=r"mems: expected the packed memory of a state of this model, \(batch, rows, 8\)"
    ):
        model.resize_mems(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("layout", ["layers", "one"])
def test_slots_that_are_added_and_dropped(layout: str) -> None:
    model, text = lively_causal(memory=layout), tokens(2, 5)
    _, mems, _ = model(text)
    before = model(text, mems)
    model.resize_memory(5)
    grown = model.resize_mems(mems)
    assert grown.slots.shape[2] == 5
    assert_close(grown.slots[:, :, :3], mems.slots)
    assert_close(grown.slots[:, :, 3:], model.get_initial_mem(2).slots[:, :, 3:])
    assert model(text, grown).logits.shape == (2, 5, 11)
    model.resize_memory(3)
    assert_close(model(text, model.resize_mems(grown)), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="mems: expected a CausalMemory"):
        model.resize_mems([3])


def test_a_folder_says_which_model_it_holds(tmp_path: Path) -> None:
    causal, memformer = lively_causal(), lively()
    causal.save_pretrained(tmp_path / "causal")
    memformer.save_pretrained(tmp_path / "memformer")
    assert "model" not in json.loads((tmp_path / "memformer" / "config.json").read_text()), "as it always was"
    assert type(load_model(tmp_path / "causal")) is CausalMemformer
    assert type(load_model(tmp_path / "memformer")) is Memformer
    with pytest.raises(ValueError, match=r"of a CausalMemformer, expected that of a Memformer; use CausalMemformer"):
        Memformer.from_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match=r"of a Memformer, expected that of a CausalMemformer"):
        CausalMemformer.from_pretrained(tmp_path / "memformer")
    with pytest.raises(ValueError, match=r"base: the Memformer in .* is around no pretrained model; leave it out"):
        load_model(tmp_path / "memformer", tmp_path)
    values = json.loads((tmp_path / "causal" / "config.json").read_text())
    (tmp_path / "causal" / "config.json").write_text(json.dumps({**values, "model": "Perceiver"}))
    with pytest.raises(
        ValueError, match="expected the model to be one of Memformer, CausalMemformer, AroundBase, got 'Perceiver'"
    ):
        load_model(tmp_path / "causal")


def test_another_runs_weights_and_their_mean(settings: Settings, tmp_path: Path) -> None:
    first = train(settings(keep=2))
    again = sized_as(settings(out=tmp_path / "again"), tmp_path / "run")
    assert again.model == settings().model
    run = Run(again)
    assert_close(dict(run.model.state_dict()), dict(first.model.state_dict()), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"architecture: the model in .* is a CausalMemformer, got memformer"):
        Run(training_settings(out=tmp_path / "other", init_from=tmp_path / "run", data=again.data))
    parts = dataclasses.replace(again.model, slot_parts=2 * again.model.heads)
    with pytest.raises(ValueError, match=rf"slot_parts: the model in .* has 1, got {2 * again.model.heads}"):
        Run(dataclasses.replace(again, model=parts))
    mean = average(all_checkpoints(tmp_path / "run"))
    assert isinstance(mean, CausalMemformer)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_parameter_is_trained(settings: Settings, optimizer: str) -> None:
    run = Run(settings(steps=2, optimizer=optimizer))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    list(run.train())
    still = [name for name, p in run.model.named_parameters() if torch.equal(before[name], p)]
    assert still == []


def test_settings_of_both_architectures_go_to_files_and_back(settings: Settings) -> None:
    run = train(settings(steps=2))
    saved = checkpoints.load_numbers(checkpoints.newest(run.settings.out))["settings"]
    assert saved["model"]["architecture"] == "causal"
    assert dataclasses.asdict(run.model.config)["depth"] == 3
