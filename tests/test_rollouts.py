"""Memory replay of a Memformer against back-propagation through time written out by hand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import (
    POSITIONS,
    VOCABULARY,
    WRITERS,
    assert_same_grads,
    lively,
    lively_causal,
    mask,
    memory,
    take_grads,
    tiny,
    tokens,
)
from memformer import Memformer, memory_replay_backprop, replay, rollouts
from memformer.data.segments import Segment, cut
from memformer.model import token_losses

LENGTH = 3
TARGET_LENGTHS = (2, 6)
SHARED = settings(deadline=None, derandomize=True, max_examples=40)

shapes = st.fixed_dictionaries(
    {
        "count": st.integers(1, 12),
        "batch": st.integers(1, 4),
        "last": st.integers(1, LENGTH),
        "ragged": st.booleans(),
        "losses": st.sampled_from(["every", "some", "last"]),
        "start": st.sampled_from(["learned", "given", "trained"]),
        "seed": st.integers(0, 10**6),
    }
)
models = st.fixed_dictionaries(
    {
        "memory_writer": st.sampled_from(WRITERS),
        "slot_parts": st.sampled_from([1, 2]),
        "positions": st.sampled_from(POSITIONS),
        "num_mem_updates": st.integers(1, 3),
    }
)
overlaps = st.integers(0, LENGTH)


def small(**changes: Any) -> Memformer:
    decoder = {} if changes.get("encoder_only") else {"dec_depth": 1}
    return tiny(**{"enc_max_seq_len": LENGTH, "enc_depth": 1, **decoder, **changes})


def ragged(batch: int, length: int) -> Tensor:
    """Each lane ends somewhere, the first of all possible places being before its first token."""
    return torch.arange(length) < torch.randint(length + 1, (batch, 1))


def with_loss(losses: str, count: int) -> list[bool]:
    if losses == "every":
        return [True] * count
    some = (torch.rand(count) < 0.5).tolist() if losses == "some" else [False] * count
    return [*some[:-1], True]


def start_memory(model: Memformer, start: str, batch: int) -> Tensor | None:
    return None if start == "learned" else memory(model, batch).requires_grad_(start == "trained")


class Task:
    """A random sequence with masks and targets of random lengths."""

    def __init__(self, count: int, batch: int, last: int, is_ragged: bool, losses: str):
        length = (count - 1) * LENGTH + last
        self.src, self.src_mask = tokens(batch, length), ragged(batch, length) if is_ragged else None
        self.wanted = with_loss(losses, count)
        lengths = torch.randint(TARGET_LENGTHS[0], TARGET_LENGTHS[1] + 1, (count,)).tolist()
        self.tgt = [tokens(batch, n) if wanted else None for n, wanted in zip(lengths, self.wanted, strict=True)]
        masked = [is_ragged and bool(torch.rand(()) < 0.7) for _ in self.tgt]
        self.tgt_mask = [
            ragged(*tgt.shape) if tgt is not None and m else None for tgt, m in zip(self.tgt, masked, strict=True)
        ]

    def segments(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
        for t, (tgt, tgt_mask) in enumerate(zip(self.tgt, self.tgt_mask, strict=True)):
            part = slice(t * LENGTH, (t + 1) * LENGTH)
            yield self.src[:, part], None if self.src_mask is None else self.src_mask[:, part], tgt, tgt_mask


def by_hand(model: Memformer, task: Task, mems: Tensor | None) -> tuple[Tensor, Tensor]:
    loss = torch.zeros((), dtype=torch.float64)
    for src, src_mask, tgt, tgt_mask in task.segments():
        out = model(src, tgt, mems, src_mask, tgt_mask)
        mems = out.mem
        loss = loss if out.dec_out is None else loss + out.dec_out
    loss.backward()
    return loss.detach(), mems.detach()


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert not actual[0].requires_grad
    assert not actual[1].requires_grad
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-14)


def take_memory_grad(mems: Tensor | None) -> dict[str, Tensor | None]:
    if mems is None or not mems.requires_grad:
        return {}
    grad, mems.grad = mems.grad, None
    return {"mems": grad}


# --- Gradients are those of back-propagation through time -------------------------------------------------------------


@SHARED
@given(shape=shapes, model=models, overlap=overlaps)
def test_encoder_decoder_equals_bptt(shape: dict[str, Any], model: dict[str, Any], overlap: int) -> None:
    torch.manual_seed(shape["seed"])
    model = small(**model, dec_overlap=overlap)
    task = Task(shape["count"], shape["batch"], shape["last"], shape["ragged"], shape["losses"])
    mems = start_memory(model, shape["start"], shape["batch"])
    expected = by_hand(model, task, mems)
    grads = take_grads(model) | take_memory_grad(mems)
    actual = memory_replay_backprop(model, task.src, task.tgt, task.src_mask, task.tgt_mask, mems=mems)
    assert_same(actual, expected)
    assert_same_grads(take_grads(model) | take_memory_grad(mems), grads)


@SHARED
@given(shape=shapes, model=models)
def test_encoder_only_equals_bptt(shape: dict[str, Any], model: dict[str, Any]) -> None:
    """With a loss of the caller's own, on a head of the caller's own."""
    torch.manual_seed(shape["seed"])
    model, head = small(**model, encoder_only=True), nn.Linear(8, 1).double()
    task = Task(shape["count"], shape["batch"], shape["last"], shape["ragged"], shape["losses"])
    mems = start_memory(model, shape["start"], shape["batch"])

    def loss_fn(index: int, enc_out: Tensor) -> Tensor | None:
        return (index + 1) * head(enc_out).square().mean() if task.wanted[index] else None

    loss, current = torch.zeros((), dtype=torch.float64), mems
    for t, (src, src_mask, _, _) in enumerate(task.segments()):
        enc_out, current = model(src, mems=current, src_mask=src_mask)
        loss = loss + (loss_fn(t, enc_out) if task.wanted[t] else 0)
    loss.backward()
    grads = take_grads(model, head) | take_memory_grad(mems)
    actual = memory_replay_backprop(model, src=task.src, src_mask=task.src_mask, mems=mems, loss_fn=loss_fn)
    assert_same(actual, (loss.detach(), current.detach()))
    assert_same_grads(take_grads(model, head) | take_memory_grad(mems), grads)


@SHARED
@given(shape=shapes, model=models, dropout=st.sampled_from([0.0, 0.3]), divisor=st.sampled_from([None, 7.0]))
def test_rollout_with_resets_and_dropout(
    shape: dict[str, Any], model: dict[str, Any], dropout: float, divisor: float | None
) -> None:
    """With the same seed the two methods see the same dropout, though replay runs all segments but the last twice."""
    torch.manual_seed(shape["seed"])
    model, count, batch = small(**model, dropout=dropout), shape["count"], shape["batch"]
    task = Task(count, batch, shape["last"], shape["ragged"], shape["losses"])
    segments = [Segment(s, m, torch.rand(batch) < 0.3, t, tm) for s, m, t, tm in task.segments()]
    mems = start_memory(model, shape["start"], batch)

    def run(method: Any) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor | None], float]:
        torch.manual_seed(1)
        outcome = rollouts.rollout(model, segments, mems, method=method, divisor=divisor)
        outcome.loss.backward()
        following = float(torch.rand(()))
        return (outcome.loss.detach(), outcome.memory.detach()), take_grads(model) | take_memory_grad(mems), following

    expected, grads, following = run(replay.full_bptt)
    actual, replayed, following_replay = run(replay.memory_replay)
    assert_same(actual, expected)
    assert_same_grads(replayed, grads)
    assert following_replay == following, "replay leaves the random numbers where plain back-propagation does"


def test_resets_equal_bptt_by_hand() -> None:
    model, src, tgt = small(), tokens(2, 4 * LENGTH), tokens(2, 4)
    resets = [torch.tensor(row) for row in ([True, False], [False, False], [False, True], [False, False])]
    mems = memory(model, 2).requires_grad_()
    loss, current = 0, mems
    for t in range(4):
        out = model(src[:, t * LENGTH : (t + 1) * LENGTH], tgt, current, reset=resets[t])
        loss, current = loss + out.dec_out, out.mem
    loss.backward()
    grads = take_grads(model) | take_memory_grad(mems)
    segments = [s._replace(reset=r) for s, r in zip(cut(LENGTH, src, [tgt] * 4), resets, strict=True)]
    outcome = rollouts.rollout(model, segments, mems)
    outcome.loss.backward()
    assert not mems.grad[0].any()
    assert mems.grad[1].any()
    assert_same((outcome.loss.detach(), outcome.memory.detach()), (loss.detach(), current.detach()))
    assert_same_grads(take_grads(model) | take_memory_grad(mems), grads)


@pytest.mark.parametrize("readout_tokens", [1, 20, 10_000])
def test_the_size_of_the_readout_changes_nothing(readout_tokens: int) -> None:
    """Targets and sources of unequal length share a call of the decoder, padded."""
    model = small(positions="relative", dec_overlap=2)
    task = Task(count=5, batch=2, last=1, is_ragged=True, losses="every")
    task.tgt_mask[-1] = None
    expected = by_hand(model, task, None)
    grads = take_grads(model)
    given = (task.src, task.tgt, task.src_mask, task.tgt_mask)
    actual = memory_replay_backprop(model, *given, readout_tokens=readout_tokens)
    assert_same(actual, expected)
    assert_same_grads(take_grads(model), grads)


def test_one_mask_for_several_targets_is_refused() -> None:
    model, mask = small(), torch.ones(2, LENGTH, dtype=torch.bool)
    src, targets = tokens(2, 3 * LENGTH), [tokens(2, LENGTH) for _ in range(3)]
    with pytest.raises(ValueError, match=r"tgt_mask: expected one \(or None\) for each .* 3 targets, got one alone"):
        memory_replay_backprop(model, src, targets, tgt_mask=mask)
    last = memory_replay_backprop(model, src, [None, None, targets[2]], tgt_mask=mask)
    assert_same(last, memory_replay_backprop(model, src, targets[2], tgt_mask=mask))


def test_divisor_weighs_tokens_alike() -> None:
    """With one divisor for all segments, a token counts the same in a short target and in a long one."""
    model, src, targets = small(), tokens(2, 2 * LENGTH), [tokens(2, 2), tokens(2, 5)]
    first = model(src[:, :LENGTH], targets[0])
    second = model(src[:, LENGTH:], targets[1], first.mem)
    outcome = rollouts.rollout(model, cut(LENGTH, src, targets), divisor=torch.tensor(10.0))
    torch.testing.assert_close(outcome.loss, (2 * first.dec_out + 8 * second.dec_out) / 10)


@pytest.mark.parametrize("integers", [torch.int64, torch.uint8])
def test_masks_and_targets_as_other_libraries_write_them(integers: torch.dtype) -> None:
    """Masks of 0 and 1, and targets of -100, count as masked: as with booleans, and the tensors given stay."""
    model, task = small(), Task(count=4, batch=3, last=2, is_ragged=True, losses="every")
    task.tgt_mask = [ragged(*tgt.shape) for tgt in task.tgt]
    expected = by_hand(model, task, None)
    grads = take_grads(model)
    ones = [mask.to(integers) for mask in task.tgt_mask]
    actual = memory_replay_backprop(model, task.src, task.tgt, task.src_mask.to(integers), ones)
    assert_same(actual, expected)
    assert_same_grads(take_grads(model), grads)
    labels = [tgt.where(mask, -100) for tgt, mask in zip(task.tgt, task.tgt_mask, strict=True)]
    given = [x.clone() for x in labels]
    actual = memory_replay_backprop(model, task.src, labels, task.src_mask)
    assert_same(actual, expected)
    assert_same_grads(take_grads(model), grads)
    assert all(map(torch.equal, labels, given))
    half = [None, None, *task.tgt_mask[2:]]
    labels = [*labels[:2], *task.tgt[2:]]
    assert_same(memory_replay_backprop(model, task.src, labels, task.src_mask, half), expected)


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("how", ["first", "each", "integers"])
def test_resets(how: str, own_loss: bool) -> None:
    """Of the first segment, or of each: where they are, a lane goes on from the learned initial memory."""
    model, task = small(encoder_only=own_loss), Task(count=4, batch=3, last=2, is_ragged=False, losses="every")
    first, later = torch.tensor([True, False, True]), torch.tensor([False, True, True])
    resets = [first, None, later, None] if how != "first" else [first, None, None, None]
    mems = memory(model, 3).requires_grad_()
    loss, current = torch.zeros((), dtype=torch.float64), mems
    for (src, _, tgt, _), reset in zip(task.segments(), resets, strict=True):
        if own_loss:
            out, current = model(src, mems=current, reset=reset)
            loss = loss + out.square().sum()
        else:
            out = model(src, tgt, current, reset=reset)
            loss, current = loss + out.dec_out, out.mem
    loss.backward()
    grads = take_grads(model) | take_memory_grad(mems)
    assert not grads["mems"][0].any()
    assert grads["mems"][1].any()
    given = {"first": first, "each": resets, "integers": [first.long(), None, later.long(), None]}[how]
    what = {"loss_fn": lambda i, x: x.square().sum()} if own_loss else {"tgt": task.tgt}
    actual = memory_replay_backprop(model, task.src, mems=mems, reset=given, **what)
    assert_same(actual, (loss.detach(), current.detach()))
    assert_same_grads(take_grads(model) | take_memory_grad(mems), grads)


def test_how_many_segments_a_call_of_the_decoder_gets() -> None:
    model, task, calls = small(), Task(count=5, batch=2, last=3, is_ragged=False, losses="every"), []
    model.decoder.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    expected = by_hand(model, task, None)
    grads = take_grads(model)
    calls.clear()
    actual = memory_replay_backprop(model, task.src, task.tgt, readout_segments=2)
    assert calls == [4, 4, 2]
    assert_same(actual, expected)
    assert_same_grads(take_grads(model), grads)


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [None, replay.EveryMemory(graphs=3), replay.EveryMemory(graphs=0), replay.Binomial(2), replay.EveryKth(2)],
)
def test_schedules_weights_and_norms_are_keywords(schedule: Any, own_loss: bool) -> None:
    """Any schedule gives the same gradients; a segment without a target has a weight too."""
    model, task = small(encoder_only=own_loss), Task(count=6, batch=2, last=2, is_ragged=False, losses="every")
    task.tgt[2], weights = None, [1.0, 0.5, 7.0, 0.0, 2.0, 3.0]
    watch = replay.MemoryGradients()
    total, mems = torch.zeros((), dtype=torch.float64), memory(model, 2).requires_grad_()
    current = mems
    for weight, (src, _, tgt, _) in zip(weights, task.segments(), strict=True):
        if own_loss:
            out, current = model(src, mems=current)
            loss = out.square().sum()
        else:
            loss, current = (out := model(src, tgt, current)).dec_out, out.mem
        total = total if loss is None else total + weight * loss
    total.backward()
    grads = take_grads(model) | take_memory_grad(mems)
    what = {"loss_fn": lambda i, x: x.square().sum()} if own_loss else {"tgt": task.tgt}
    actual = memory_replay_backprop(
        model,
        task.src,
        mems=mems,
        schedule=schedule,
        segment_weights=weights,
        memory_gradients=watch,
        check=True,
        **what,
    )
    assert_same(actual, (total.detach(), current.detach()))
    assert watch.norms[0] == pytest.approx(mems.grad.norm().item(), rel=1e-6)
    assert len(watch.norms) == 7
    assert_same_grads(take_grads(model) | take_memory_grad(mems), grads)


def test_check_finds_a_model_that_is_not_a_function_of_its_inputs() -> None:
    model, draws = small(), iter(range(100))
    model.encoder.register_forward_hook(lambda module, args, output: output * (1 + next(draws)))
    with pytest.raises(RuntimeError, match=r"segment 1 differs in replay from its recording"):
        memory_replay_backprop(model, src=tokens(2, 7), tgt=tokens(2, 4), check=True)


# --- What it does to .grad and returns --------------------------------------------------------------------------------


def test_grad_accumulates() -> None:
    model, src, tgt = small(), tokens(2, 7), tokens(2, 4)
    memory_replay_backprop(model, src=src, tgt=tgt)
    once = {name: None if grad is None else 2 * grad for name, grad in take_grads(model).items()}
    memory_replay_backprop(model, src=src, tgt=tgt)
    memory_replay_backprop(model, src=src, tgt=tgt)
    assert_same_grads(take_grads(model), once)


def test_memory_carries_from_call_to_call() -> None:
    model, src, tgt = small(), tokens(2, 4 * LENGTH), tokens(2, 4)
    _, mems = memory_replay_backprop(model, src=src[:, : 2 * LENGTH], tgt=tgt)
    _, chunked = memory_replay_backprop(model, src=src[:, 2 * LENGTH :], tgt=tgt, mems=mems)
    _, whole = memory_replay_backprop(model, src=src, tgt=tgt)
    assert torch.equal(chunked, whole)


def test_a_source_of_one_segment_is_a_plain_call() -> None:
    model, src, tgt, src_mask, tgt_mask = small(), tokens(2, 2), tokens(2, 4), mask("10", "11"), mask("1110", "1111")
    out = model(src, tgt, None, src_mask, tgt_mask)
    out.dec_out.backward()
    grads = take_grads(model)
    actual = memory_replay_backprop(model, src=src, tgt=tgt, src_mask=src_mask, tgt_mask=tgt_mask)
    assert_same(actual, (out.dec_out.detach(), out.mem.detach()))
    assert_same_grads(take_grads(model), grads)


def test_a_frozen_encoder() -> None:
    model, task = small(), Task(count=4, batch=2, last=2, is_ragged=False, losses="every")
    model.encoder.requires_grad_(False)
    model.writer.requires_grad_(False)
    expected = by_hand(model, task, None)
    grads = take_grads(model)
    assert_same(memory_replay_backprop(model, task.src, task.tgt), expected)
    assert_same_grads(take_grads(model), grads)


def test_a_frozen_model_below_a_trained_head() -> None:
    model, head, src = small(encoder_only=True).requires_grad_(False), nn.Linear(8, 1).double(), tokens(2, 7)
    memory_replay_backprop(model, src=src, loss_fn=lambda index, enc_out: head(enc_out).mean())
    assert head.weight.grad.any()
    assert all(grad is None for grad in take_grads(model).values())


def test_a_loss_without_a_gradient_is_added() -> None:
    """As in a sum of losses by hand."""
    model, src = small(encoder_only=True), tokens(2, 2 * LENGTH)
    loss, _ = memory_replay_backprop(
        model, src=src, loss_fn=lambda index, enc_out: enc_out.sum() if index else torch.tensor(5.0).double()
    )
    expected, _ = memory_replay_backprop(
        model, src=src, loss_fn=lambda index, enc_out: enc_out.sum() if index else None
    )
    torch.testing.assert_close(loss, expected + 5)


# --- Cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
def test_how_often_encoder_and_decoder_run(count: int) -> None:
    """Recording and replay each run the encoder once, but the last segment is not computed twice; the decoder, off the
    critical path, runs once per chunk of targets and never without its gradient."""
    model, src = small(), tokens(2, count * LENGTH)
    targets = [tokens(2, 4) if t % 2 == 0 else None for t in range(count - 1)] + [tokens(2, 4)]
    calls: dict[str, list[bool]] = {"encoder": [], "decoder": []}
    for name, found in calls.items():
        getattr(model, name).register_forward_hook(lambda *_, found=found: found.append(torch.is_grad_enabled()))
    memory_replay_backprop(model, src=src, tgt=targets, readout_tokens=8)  # one segment's
    assert calls["encoder"] == [True, *[False] * (count - 2)][: count - 1] + [True] * count
    assert calls["decoder"] == [True] * sum(tgt is not None for tgt in targets)

    calls["decoder"].clear()
    memory_replay_backprop(model, src=src, tgt=targets, readout_tokens=4 * 8 + 7)
    assert calls["decoder"] == [True] * -(-count // 4)

    calls["decoder"].clear()
    memory_replay_backprop(model, src=src, tgt=targets)
    assert calls["decoder"] == [True], "on a CPU, in which few tokens do not fill a product"

    for found in calls.values():
        found.clear()
    memory_replay_backprop(model, src=src, loss_fn=lambda index, enc_out: enc_out.sum())
    assert calls["encoder"] == [True, *[False] * (count - 2)][: count - 1] + [True] * count
    assert calls["decoder"] == []


@pytest.mark.parametrize(
    ("device", "batch", "length", "horizon", "expected"),
    [
        ("cpu", 12, 33, 6, 3),  # at least 1,024 targets
        ("cpu", 2, 64, 64, 8),
        ("cpu", 64, 64, 16, 1),
        ("cuda", 64, 64, 16, 4),  # at least 16,384
        ("cuda", 16, 64, 16, 8),  # and half of the rollout at most
        ("cuda", 64, 64, 4, 2),
        ("cuda", 512, 64, 1, 1),
    ],
)
def test_how_many_segments_suit_a_device(device, batch, length, horizon, expected) -> None:
    class Elsewhere:
        """What is asked of a tensor of a device that need not be there."""

        def __init__(self) -> None:
            self.device = torch.device(device)

        def numel(self) -> int:
            return batch * length

    segments = [Segment(Elsewhere(), tgt=Elsewhere()) for _ in range(horizon)]  # type: ignore[arg-type]
    assert rollouts._readout_segments(small(), segments, None) == expected
    assert rollouts._readout_segments(small(), segments, 2 * batch * length) == 2
    assert rollouts._readout_segments(small(), segments, 1) == 1


class LiveTensors:
    """Counts the tensors that autograd keeps for a backward pass, while they are kept."""

    def __init__(self) -> None:
        self.now, self.most = 0, 0

    def __enter__(self) -> LiveTensors:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda packed: packed[0])
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    class Packed(list):
        """A list that may have weak references."""

    def pack(self, x: Tensor) -> Packed:
        # Not x itself: an output that is saved would hold its node, and the node holds what is packed.
        packed = self.Packed([x.detach()])
        weakref.finalize(packed, self.forget)
        self.now += 1
        self.most = max(self.most, self.now)
        return packed

    def forget(self) -> None:
        self.now -= 1


@pytest.mark.parametrize("kind", ["targets", "last target", "own loss", "rollout with resets"])
def test_the_live_graph_does_not_grow_with_the_rollout(kind: str) -> None:
    def most(count: int) -> int:
        torch.manual_seed(0)
        model, src, tgt = small(encoder_only=kind == "own loss"), tokens(1, count * LENGTH), tokens(1, 4)
        gc.collect()
        with LiveTensors() as live:
            if kind == "own loss":
                memory_replay_backprop(model, src=src, loss_fn=lambda index, enc_out: enc_out.square().sum())
            elif kind == "rollout with resets":
                segments = [s._replace(reset=torch.tensor([True])) for s in cut(LENGTH, src, [tgt] * count)]
                rollouts.rollout(model, segments).loss.backward()
            else:
                memory_replay_backprop(model, src=src, tgt=[tgt] * count if kind == "targets" else tgt)
        assert live.now == 0, "the graph is gone when the call returns"
        return live.most

    few, many = most(4), most(64)
    assert few == many
    assert few > 10, "the count counts"


@pytest.mark.parametrize("with_backward", [True, False])
def test_nothing_is_left_behind(with_backward: bool) -> None:
    """A rollout is freed when it goes out of use, back-propagated or not, without the garbage collector."""
    model, segments = small(), cut(LENGTH, tokens(1, 4 * LENGTH), [tokens(1, 4)] * 4)

    def tensors() -> int:
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    def run() -> None:
        loss = rollouts.rollout(model, segments).loss
        if with_backward:
            loss.backward()

    for _ in range(2):  # the gradients' tensors are made here, and looked at
        run()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        run()
        assert tensors() == before
    finally:
        gc.enable()


def test_the_live_graph_of_plain_bptt_does_grow() -> None:
    """The count of the test above can tell."""
    model, most = small(), []
    for count in (4, 16):
        with LiveTensors() as live:
            segments = cut(LENGTH, tokens(1, count * LENGTH), [tokens(1, 4)] * count)
            rollouts.rollout(model, segments, method=replay.full_bptt).loss.backward()
        most.append(live.most)
    assert most[1] > 3 * most[0]


# --- The caller's mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"expected either tgt or loss_fn$"),
        ({"tgt": tokens(2, 4), "loss_fn": lambda i, x: x.sum()}, r"expected either tgt or loss_fn, got both"),
        ({"tgt": [None] * 4}, r"tgt: expected one entry \(or None\) for each of the 3 segments, got 4"),
        ({"tgt": [None, None, None]}, r"no segment of the rollout has a loss"),
        ({"tgt": tokens(2, 4), "tgt_mask": [None]}, r"tgt_mask: expected one entry .* 3 segments, got 1"),
        ({"tgt": [tokens(2, 4), None, None], "tgt_mask": mask("1111", "1111")}, r"tgt_mask: segment 2 has one, but no"),
        ({"tgt_mask": mask("11", "11"), "loss_fn": lambda i, x: x.sum()}, r"tgt_mask: given without tgt"),
        ({"tgt": tokens(2, 7)}, r"tgt: expected at most dec_max_seq_len = 6 tokens, got 7"),
        ({"tgt": tokens(3, 4)}, r"tgt: expected the batch size of src, 2, got 3"),
        ({"tgt": tokens(2, 4) + VOCABULARY}, r"tgt: token id \d+ is outside the table of dec_num_tokens = 11"),
        ({"tgt": tokens(2, 4), "tgt_mask": torch.ones(2, 4)}, r"tgt_mask: expected torch\.bool, .* got torch\.float32"),
        (
            {"tgt": tokens(2, 4), "tgt_mask": 2 * torch.ones(2, 4).long()},
            r"tgt_mask: .* 0 and 1, .* got other integers",
        ),
        (
            {"tgt": tokens(2, 4), "src_mask": torch.zeros(2, 7) - 1e9},
            r"src_mask: .* is added to scores, pass mask == 0",
        ),
        ({"tgt": tokens(2, 4) * 0 - 100, "tgt_mask": mask("11", "11")}, r"tgt_mask: expected .* shape \(2, 4\)"),
        ({"tgt": tokens(2, 4) * 0 - 99}, r"tgt: token id -99 is outside"),
        ({"tgt": tokens(2, 4), "reset": torch.ones(3)}, r"reset: expected torch\.bool, or integers of 0 and 1"),
        ({"tgt": tokens(2, 4), "reset": torch.ones(3).bool()}, r"reset: expected torch\.bool of shape \(2,\), one per"),
        ({"tgt": tokens(2, 4), "reset": [None]}, r"reset: expected one entry \(or None\) for each of the 3 segments"),
        (
            {"loss_fn": lambda i, x: x.sum(), "readout_segments": 2},
            r"readout_segments: .* loss_fn gets segments one by one",
        ),
        (
            {"loss_fn": lambda i, x: x.sum(), "readout_tokens": 2},
            r"readout_tokens: .* loss_fn gets segments one by one",
        ),
        (
            {"tgt": tokens(2, 4), "readout_tokens": 9, "readout_segments": 2},
            "readout_tokens: expected either readout_segments or this, got both",
        ),
        ({"tgt": tokens(2, 4), "readout_tokens": 0}, "readout_tokens: expected .* at least 1, got 0"),
        ({"tgt": tokens(2, 4), "src_mask": mask("11", "11")}, r"src_mask: expected .* shape \(2, 7\)"),
        ({"tgt": tokens(2, 4), "mems": torch.zeros(1, 3, 8).double()}, r"mems: expected .* shape \(2, 3, 8\)"),
        ({"tgt": tokens(2, 4), "schedule": "binomial"}, r"schedule: expected a schedule, .* got 'binomial'"),
        ({"tgt": tokens(2, 4), "segment_weights": [1.0]}, r"segment_weights: expected one for each of the 3 segments"),
        (
            {"loss_fn": lambda i, x: x.sum(), "segment_weights": [1.0]},
            r"segment_weights: expected one for each of the 3",
        ),
        ({"src": tokens(2, 7).float(), "tgt": tokens(2, 4)}, r"src: expected token ids"),
        ({"src": tokens(2, 7)[0], "tgt": tokens(2, 4)}, r"src: expected token ids"),
        ({"src": [[1.5, 2]], "tgt": tokens(2, 4)}, r"src: expected token ids, .* got float64"),
        ({"src": tokens(2, 7) + VOCABULARY, "tgt": tokens(2, 4)}, r"src: token id \d+ is outside the table"),
        ({"loss_fn": lambda i, x: None}, r"loss_fn: returned no loss that requires a gradient"),
        ({"loss_fn": lambda i, x: x.detach().sum()}, r"loss_fn: returned no loss that requires a gradient"),
        ({"loss_fn": lambda i, x: x}, r"loss_fn: expected a scalar loss or None for segment 0, got shape \(2, 3, 8\)"),
        ({"loss_fn": lambda i, x: 1.0}, r"loss_fn: expected a scalar loss or None for segment 0, got float"),
    ],
)
def test_a_call_that_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_replay_backprop(small(), **{"src": tokens(2, 7), **arguments})


@pytest.mark.parametrize("run", [rollouts.rollout, rollouts.verify_rollout])
@pytest.mark.parametrize("kind", [lively, lively_causal])
def test_segments_may_be_any_iterable_but_one_is_needed(run: Any, kind: Any) -> None:
    with pytest.raises(ValueError, match=r"segments: expected at least one segment, got none"):
        run(kind(), [])
    run(kind(), (Segment(src, tgt=src) for src in [tokens(2, 3)] * 2))


def test_a_data_set_reaches_the_engine_as_one() -> None:
    """So its segments are fetched one at a time."""

    class Data:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, t: int) -> Segment:
            if t >= 2:
                raise IndexError
            return Segment(torch.full((2, 3), t), tgt=torch.full((2, 3), t))

    data, seen = Data(), []

    def method(cell: Any, segments: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(segments)
        return replay.memory_replay(cell, segments, *arguments, **options)

    held = rollouts.rollout(lively(), list(data)).loss
    torch.testing.assert_close(rollouts.rollout(lively(), data, method=method).loss, held)
    assert seen == [data]


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match=r"nothing to train: all parameters are frozen, or gradients are off"):
        memory_replay_backprop(small().requires_grad_(False), src=tokens(2, 7), tgt=tokens(2, 4))
    with torch.no_grad(), pytest.raises(ValueError, match=r"nothing to train"):
        memory_replay_backprop(small(), src=tokens(2, 7), tgt=tokens(2, 4))


@pytest.mark.parametrize("purpose", [{"tgt": tokens(2, 4)}, {"loss_fn": lambda i, x: x.mean()}])
@pytest.mark.parametrize(
    ("scale", "got"),
    [
        (lambda loss: loss.item(), "float"),
        (lambda loss: None, "NoneType"),
        (lambda loss: loss.detach(), "one without a graph"),
        (lambda loss: loss[None], r"float\d+ of shape \(1,\)"),
    ],
)
def test_a_scale_that_gives_no_loss(purpose: dict[str, Any], scale: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"scale: expected a multiple of the loss, .*got .*{got}"):
        memory_replay_backprop(small(), src=tokens(2, 7), scale=scale, **purpose)


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"a target: this model is encoder_only and has no decoder"):
        memory_replay_backprop(small(encoder_only=True), src=tokens(2, 7), tgt=tokens(2, 4))
    with pytest.raises(ValueError, match=r"model: expected a Memformer or a CausalMemformer, got Linear"):
        memory_replay_backprop(nn.Linear(2, 2), src=tokens(2, 7), tgt=tokens(2, 4))
    with pytest.raises(TypeError, match="target"):
        memory_replay_backprop(small(), src=tokens(2, 7), target=tokens(2, 4))


def test_cut() -> None:
    src, kept, tgt = tokens(2, 7), torch.rand(2, 7) < 0.5, tokens(2, 4)
    parts = cut(LENGTH, src, tgt, kept, tgt > 3)
    assert [part.src.shape[1] for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.src for part in parts], 1), src)
    assert torch.equal(torch.cat([part.src_mask for part in parts], 1), kept)
    assert [part.tgt is tgt for part in parts] == [False, False, True]
    assert [part.tgt_mask is None for part in parts] == [True, True, False]
    assert all(part.reset is None for part in parts)


# --- How the losses become one


def pieces() -> tuple[Memformer, dict[str, Any]]:
    """A model, a sequence of three segments, and targets of unequal length, one of them masked in part."""
    tgt = [tokens(2, 2), None, tokens(2, 6)]
    return small(), dict(src=tokens(2, 9), tgt=tgt, tgt_mask=[None, None, mask("111100", "110111")])


def target_losses(
    model: Memformer, src: Tensor, tgt: list[Tensor | None], tgt_mask: list[Tensor | None]
) -> list[Tensor]:
    """The losses of all targets that count, segment by segment."""
    memory, found = None, []
    for segment in cut(LENGTH, src, tgt, None, tgt_mask, None):
        enc_out, after = model.step(segment.src, memory)
        if segment.tgt is not None:
            mine, counted = token_losses(
                model.need_decoder("test"), segment.tgt, enc_out, None, segment.tgt_mask, segment.src
            )
            found.append(mine[counted])
        memory = after
    return found


@pytest.mark.parametrize("reduction", ["segment_means", "mean", "sum"])
def test_reductions(reduction: str) -> None:
    torch.manual_seed(0)
    model, given = pieces()
    losses = target_losses(model, given["src"], given["tgt"], given["tgt_mask"])
    assert [len(of_segment) for of_segment in losses] == [2, 7]
    every = torch.cat(losses)
    means = torch.stack([of_segment.mean() for of_segment in losses])
    expected = {"segment_means": means.sum(), "mean": every.mean(), "sum": every.sum()}[reduction]
    expected.backward()
    wanted = take_grads(model)
    loss, _ = memory_replay_backprop(model, **given, reduction=reduction)
    torch.testing.assert_close(loss, expected.detach())
    assert_same_grads(take_grads(model), wanted)


def test_the_mean_does_not_depend_on_how_targets_are_cut() -> None:
    """Accumulated over two documents as the mean over both."""
    torch.manual_seed(1)
    model, first = pieces()
    _, second = pieces()
    counts = [len(torch.cat(target_losses(model, g["src"], g["tgt"], g["tgt_mask"]))) for g in (first, second)]
    every = torch.cat([x for g in (first, second) for x in target_losses(model, g["src"], g["tgt"], g["tgt_mask"])])
    every.mean().backward()
    wanted = take_grads(model)
    for each in (first, second):
        memory_replay_backprop(model, **each, reduction="sum", scale=lambda loss: loss / sum(counts))
    assert_same_grads(take_grads(model), wanted)


@pytest.mark.parametrize("own_loss", [False, True])
def test_a_gradient_scaler_scales_what_is_back_propagated(own_loss: bool) -> None:
    """The gradients are unscaled again by the scaler, and the loss that is returned is not scaled."""
    torch.manual_seed(2)
    model, given = pieces()
    if own_loss:
        given = dict(src=given["src"], loss_fn=lambda i, x: x.square().sum() if i != 1 else None)
    loss, _ = memory_replay_backprop(model, **given)
    wanted = take_grads(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    again, _ = memory_replay_backprop(model, **given, scale=scaler.scale)
    torch.testing.assert_close(again, loss)
    assert_same_grads({name: None if g is None else g / 1024 for name, g in grads_of(model).items()}, wanted)
    scaler.unscale_(optimizer)
    assert_same_grads(take_grads(model), wanted)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024


def grads_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {f"0.{name}": p.grad for name, p in model.named_parameters()}


def test_what_reduction_and_scale_do_not_take() -> None:
    model, given = pieces()
    with pytest.raises(ValueError, match="reduction: expected one of segment_means, mean, sum, got 'avg'"):
        memory_replay_backprop(model, **given, reduction="avg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction: 'mean' is of targets; what loss_fn returns is added up as it is"):
        memory_replay_backprop(model, given["src"], loss_fn=lambda i, x: x.sum(), reduction="mean")
    with pytest.raises(
        ValueError, match=r"scale: expected a function of the loss, such as scaler\.scale, got float; for"
    ):
        memory_replay_backprop(model, **given, scale=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no segment of the rollout has a loss"):
        memory_replay_backprop(model, given["src"], [None, None, None], reduction="mean")


# --- What CUDA computes deterministically


class Names(TorchDispatchMode):
    """Takes down the names of the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_loss_has_no_operation_that_cuda_cannot_do_deterministically() -> None:
    """Of two dimensions, nll_loss raises an error there under torch.use_deterministic_algorithms(True)."""
    model, given = pieces()
    with Names() as names:
        model(given["src"][:, :3], tokens(2, 4))[2].backward()
        memory_replay_backprop(model, **given)
    assert {name for name in names.seen if name.startswith("nll_loss")} == {"nll_loss_forward", "nll_loss_backward"}
    assert not names.seen & {"nll_loss2d_forward", "nll_loss2d_backward", "bincount", "median", "put_", "histc"}
