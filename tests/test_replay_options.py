"""What a rollout may be asked for besides its gradients: checks, norms, weights, resets, other places to store."""

import gc
import random
import threading

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from memformer import replay
from replay_cells import CELLS, assert_equal, by, outcome, problem, same_as_bptt


def small(count=4):
    """A cell ``tanh(linear(memory + x))`` with a loss at every segment, its segments and its memory, in float64."""
    torch.manual_seed(0)
    linear = nn.Linear(3, 3, dtype=torch.float64)

    def cell(x, memory):
        memory = torch.tanh(linear(memory + x))
        return memory.square().sum(), memory

    segments = list(torch.randn(count, 2, 3, dtype=torch.float64))
    return cell, linear, segments, torch.randn(2, 3, dtype=torch.float64, requires_grad=True)


# --- check=True


def test_check_is_silent_where_replay_is_right():
    model, segments, memory = problem("dict", [True, False, True, True], dropout=0.4)
    same_as_bptt(model, segments, memory, None, check=True)
    same_as_bptt(model, segments, memory, 2, check=True, schedule=replay.Binomial(1))


@pytest.mark.parametrize("where", ["value", "memory"])
def test_check_names_the_segment_whose_replay_differs(where):
    cell, linear, segments, memory = small()
    draw = random.Random(0)

    def noisy(x, memory):
        noise = draw.random() if x is segments[1] or torch.equal(x, segments[1]) else 0.0
        loss, memory = cell(x, memory)
        return (loss + noise, memory) if where == "value" else (loss, memory + noise)

    rollout = replay.memory_replay(noisy, segments, memory, params=linear, check=True)
    with pytest.raises(
        RuntimeError, match=r"(?s)segment 1 differs in replay from its recording.*Python's random numbers"
    ):
        rollout.loss.backward()
    replay.memory_replay(noisy, segments, memory, params=linear).loss.backward()  # not asked, not checked


# --- The memory's gradient


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("kind", sorted(CELLS))
def test_memory_gradients_equal_those_of_plain_autograd(kind, max_norm):
    model, segments, memory = problem(kind, [True, False, True, True])
    watch, reference = (replay.MemoryGradients(max_norm) for _ in range(2))
    expected = by(replay.full_bptt, model, segments, memory, None, memory_gradients=reference)
    assert_equal(by(replay.memory_replay, model, segments, memory, None, memory_gradients=watch), expected)
    torch.testing.assert_close(watch.norms, reference.norms, rtol=1e-5, atol=1e-7)
    assert len(watch.norms) == 5
    assert all(norm > 0 for norm in watch.norms)


def test_norm_of_the_initial_memorys_gradient_and_of_one_that_is_clipped():
    cell, linear, segments, memory = small()
    watch = replay.MemoryGradients()
    replay.memory_replay(cell, segments, memory, params=linear, memory_gradients=watch).loss.backward()
    assert watch.norms[0] == pytest.approx(memory.grad.norm().item(), rel=1e-6)
    assert watch.norms[-1] == 0.0  # no loss on the final memory

    memory.grad = None
    clipped = replay.MemoryGradients(max_norm=1e-3)
    replay.memory_replay(cell, segments, memory, params=linear, memory_gradients=clipped).loss.backward()
    assert memory.grad.norm().item() == pytest.approx(1e-3)
    assert clipped.norms[-2] == pytest.approx(watch.norms[-2], rel=1e-6)  # nothing was clipped before it

    expected, memory.grad = watch.norms, None
    generous = replay.MemoryGradients(max_norm=1e3)
    for part in (segments, segments[:2], segments):  # what is smaller is left alone; a second rollout starts afresh
        memory.grad = None
        replay.memory_replay(cell, part, memory, params=linear, memory_gradients=generous).loss.backward()
        assert len(generous.norms) == len(part) + 1
    assert generous.norms == pytest.approx(expected, rel=1e-6)
    assert memory.grad.norm().item() == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize("made_by_the_cell", [False, True])
@pytest.mark.parametrize("method", [replay.full_bptt, replay.memory_replay, replay.accumulate])
def test_norms_of_a_memory_with_constant_leaves(method, made_by_the_cell):
    """The root of zero has an infinite slope: a gradient by that constant would be NaN, and all with it.

    Expected are the norms of an independent loop, in which nothing but the hidden states needs a gradient.
    """
    torch.manual_seed(0)
    linear = nn.Linear(3, 3, dtype=torch.float64)
    scale, segments = torch.tensor([0.0, 1.0, 4.0]).double(), list(torch.randn(4, 2, 3, dtype=torch.float64))
    slow = torch.zeros(2, 3, dtype=torch.float64)  # is a constant at first

    def cell(given, memory):
        t, x = given
        h, scale_, late = memory if memory is not None else (torch.zeros_like(x), scale, slow)
        h = torch.tanh(linear(h * scale_.sqrt() + x))
        late = late + h if t == 1 else late
        return h.square().sum() + late.square().sum(), (h, scale_, late)

    hidden, total = [(torch.zeros_like(slow), slow)], 0
    for given in enumerate(segments):
        loss, (h, _, late) = cell(given, (hidden[-1][0], scale, hidden[-1][1]))
        hidden.append((h.clone(), late.clone()))  # what goes on, and not what the losses use of it
        total += loss
        for leaf in hidden[-1]:
            if leaf.requires_grad:
                leaf.retain_grad()
    total.backward()
    expected = [sum(x.grad.square().sum() for x in pair if x.grad is not None) ** 0.5 for pair in hidden[:-1]]
    of_weight, linear.weight.grad = linear.weight.grad, None

    memory = None if made_by_the_cell else (torch.zeros_like(slow), scale, slow)
    for max_norm in (None, 1e9):
        watch, linear.weight.grad = replay.MemoryGradients(max_norm), None
        outcome = method(cell, list(enumerate(segments)), memory, params=linear, memory_gradients=watch)
        if method is not replay.accumulate:
            outcome.loss.backward()
        assert watch.norms == pytest.approx([*map(float, expected), 0.0], rel=1e-6)
        torch.testing.assert_close(linear.weight.grad, of_weight, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_max_norm(max_norm):
    with pytest.raises(ValueError, match="max_norm: expected a positive number or None"):
        replay.MemoryGradients(max_norm)


# --- Weights


@pytest.mark.parametrize("method", [replay.full_bptt, replay.memory_replay])
def test_segment_weights(method):
    cell, linear, segments, memory = small()
    weights = [0.0, 1.0, 2.0, 4.0]
    values, _ = replay.scan(cell, segments, memory, params=linear)
    expected = sum(w * v for w, v in zip(weights, values, strict=True))
    grad = torch.autograd.grad(expected, linear.weight)[0]

    def encode(x, memory):
        _, memory = cell(x, memory)
        return memory, memory

    def read_out(values, parts):
        return torch.stack([v.square().sum() for v in values])

    def one(values, parts):
        return read_out(values, parts)[0]

    for rollout in (
        method(cell, segments, memory, segment_weights=weights, params=linear),
        method(cell, segments, memory, segment_weights=torch.tensor(weights), params=linear),
        method(encode, segments, memory, one, segment_weights=weights, params=linear),
        method(encode, segments, memory, read_out, segment_weights=weights, params=linear),
        method(encode, segments, memory, read_out, readout_segments=2, segment_weights=weights, params=linear),
        method(encode, segments, memory, read_out, readout_segments=3, segment_weights=weights, params=linear),
    ):
        torch.testing.assert_close(rollout.loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(rollout.loss, linear.weight)[0], grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [replay.full_bptt, replay.memory_replay])
def test_segment_weights_refusals(method):
    cell, linear, segments, memory = small()
    with pytest.raises(ValueError, match="one for each of the 4 segments, got 2"):
        method(cell, segments, memory, segment_weights=[1, 2], params=linear)
    with pytest.raises(
        ValueError, match=r"one loss per segment, shape \(2,\), or None; .* returned a tensor of shape \(\)"
    ):
        method(
            cell,
            segments,
            memory,
            lambda values, parts: torch.stack(values).sum(),
            readout_segments=2,
            segment_weights=[1.0] * 4,
            params=linear,
        )


# --- Between rollouts


def test_reset_puts_the_initial_memory_back_with_its_gradient():
    initial = {"state": torch.zeros(3, 2, requires_grad=True), "none": None}
    memory = {"state": torch.ones(3, 2, requires_grad=True), "none": None}
    after = replay.reset(memory, initial, torch.tensor([True, False, False]))
    assert after["state"].tolist() == [[0, 0], [1, 1], [1, 1]]
    after["state"].sum().backward()
    assert initial["state"].grad.sum(1).tolist() == [2, 0, 0]
    assert memory["state"].grad.sum(1).tolist() == [0, 2, 2]
    with pytest.raises(ValueError, match=r"boolean tensor of shape \(3,\), one entry per lane.*got torch.int64"):
        replay.reset(memory, initial, torch.tensor([1, 0, 0]))


def test_reset_keeps_the_memorys_dtype():
    """Autocast makes it of half precision; what is learned is of single."""
    memory, initial = torch.ones(3, 2, dtype=torch.bfloat16), torch.zeros(3, 2, requires_grad=True)
    lanes = torch.tensor([True, False, False])
    after = replay.reset(memory, initial, lanes)
    assert after.dtype == torch.bfloat16
    after.sum().backward()
    assert initial.grad.tolist() == [[1, 1], [0, 0], [0, 0]]
    with pytest.raises(ValueError, match=r"initial: expected torch.int64, as the memory is of, got torch.float32"):
        replay.reset(memory.long(), initial, lanes)


def test_reset_of_a_memory_whose_lanes_are_another_dimension():
    """That of nn.LSTM is (layers, batch, dim)."""
    lanes = torch.tensor([False, True, False])
    memory = (torch.ones(2, 3, 4), torch.ones(2, 3, 4), None, 5)
    initial = (torch.zeros(2, 3, 4), torch.full((2, 3, 4), 2.0), None, 5)
    first, second, *others = replay.reset(memory, initial, lanes, dim=1)
    assert first[:, :, 0].tolist() == [[1, 0, 1]] * 2
    assert second[:, :, 0].tolist() == [[1, 2, 1]] * 2
    assert others == [None, 5]
    with pytest.raises(
        ValueError, match=r"shape \(2,\), one entry per lane .*\(2, 3, 4\), lanes in dimension 0.*dim=1"
    ):
        replay.reset(memory, initial, lanes)
    with pytest.raises(ValueError, match="no lanes in dimension 3"):
        replay.reset(memory, initial, lanes, dim=3)
    with pytest.raises(ValueError, match=r"dim: expected an integer of at least 0, got -2"):
        replay.reset(memory, initial, lanes, dim=-2)


def test_burn_in_gives_the_memory_without_a_graph():
    cell, linear, segments, memory = small()
    rollout = replay.memory_replay(cell, segments, memory, params=linear)
    older = replay.memory_replay(cell, segments[:2], memory, params=linear).memory
    refreshed = replay.burn_in(cell, segments[2:], older)
    assert not refreshed.requires_grad
    torch.testing.assert_close(refreshed, rollout.memory.detach(), rtol=0, atol=0)


# --- Where memories are stored


@pytest.mark.parametrize("schedule", [replay.EveryMemory(), replay.Binomial(2), replay.EveryKth(2)])
@pytest.mark.parametrize("kind", sorted(CELLS))
def test_offload_to_disk_and_cpu(kind, schedule, tmp_path):
    model, segments, memory = problem(kind, [True] * 5, dropout=0.4)
    same_as_bptt(model, segments, memory, None, schedule=replay.Offload(schedule, to=tmp_path / "new"))
    same_as_bptt(model, segments, memory, 2, schedule=replay.Offload(schedule, to="cpu"))


def test_offload_to_disk_writes_memories_and_leaves_nothing(tmp_path):
    cell, linear, segments, memory = small()
    rollout = replay.memory_replay(
        cell, segments, memory, schedule=replay.Offload(replay.EveryMemory(), to=tmp_path), params=linear
    )
    assert sorted(file.name for file in tmp_path.glob("*/*")) == ["1.pt", "2.pt"]  # the caller holds the first
    rollout.loss.backward()
    assert not list(tmp_path.glob("*/*"))
    del rollout
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_offload_writes_a_view_without_what_it_is_a_view_of(tmp_path):
    weight = torch.ones((), requires_grad=True)

    def cell(x, memory):
        return memory.sum() * weight, torch.cat([memory, x.expand(100_000, 2)])[:1]

    segments = [torch.ones(1, 2)] * 3
    schedule = replay.Offload(replay.EveryMemory(), to=tmp_path)
    rollout = replay.memory_replay(cell, segments, torch.zeros(1, 2), schedule=schedule, params=weight)
    assert all(file.stat().st_size < 10_000 for file in tmp_path.glob("*/*.pt"))
    rollout.loss.backward()


def test_the_next_memory_is_read_from_disk_while_a_segment_is_computed(tmp_path, monkeypatch):
    cell, linear, segments, memory = small(6)
    read = {t: threading.Event() for t in range(1, 5)}
    load, readers = torch.load, set()

    def noted(file, **options):
        result = load(file, **options)
        read[int(file.stem)].set()
        readers.add(threading.get_ident())
        return result

    monkeypatch.setattr(torch, "load", noted)
    ahead = []

    def watched(x, memory):
        t = next(i for i, s in enumerate(segments) if torch.equal(s, x))
        if torch.is_grad_enabled() and t in (2, 3, 4):  # the next one to be loaded is the memory before t - 1
            ahead.append((t, read[t - 1].wait(10)))
        return cell(x, memory)

    schedule = replay.Offload(replay.EveryMemory(), to=tmp_path)
    replay.memory_replay(watched, segments, memory, schedule=schedule, params=linear).loss.backward()
    assert ahead == [(4, True), (3, True), (2, True)]
    assert len(readers) == 1
    assert threading.get_ident() not in readers


def test_a_memory_that_cannot_be_read_is_named(tmp_path):
    cell, linear, segments, memory = small(6)
    schedule = replay.Offload(replay.EveryMemory(), to=tmp_path)
    rollout = replay.memory_replay(cell, segments, memory, schedule=schedule, params=linear)
    next(tmp_path.glob("*/3.pt")).write_bytes(b"not a memory")
    with pytest.raises(RuntimeError, match=r"the memory before segment 3 cannot be read from .*3\.pt"):
        rollout.loss.backward()


class Named(torch.Tensor):
    """A kind of tensor that a file of weights alone may not hold."""


def test_offload_of_other_kinds_of_tensors(tmp_path):
    cell, linear, segments, _ = small()

    def named(x, memory):
        loss, after = cell(x, memory.as_subclass(torch.Tensor))
        return loss, after.as_subclass(Named)

    def jagged(x, memory):
        loss, after = cell(x, memory.values())
        return loss, torch.nested.nested_tensor_from_jagged(after, memory.offsets())

    zeros = torch.zeros(2, 3, dtype=torch.float64)
    schedule = replay.Offload(replay.EveryMemory(), to=tmp_path)
    expected = torch.autograd.grad(replay.full_bptt(cell, segments, zeros).loss, linear.weight)[0]
    memory = zeros.as_subclass(Named)
    replay.memory_replay(named, segments, memory, schedule=schedule, params=linear).loss.backward()
    torch.testing.assert_close(linear.weight.grad, expected, rtol=1e-12, atol=1e-14)
    lanes = torch.nested.nested_tensor([zeros[:1], zeros[1:]], layout=torch.jagged)
    replay.memory_replay(jagged, segments, lanes, params=linear).loss.backward()
    with pytest.raises(ValueError, match=r"Offload: the memory holds a nested tensor.*Keep it on the device"):
        replay.memory_replay(jagged, segments, lanes, schedule=schedule, params=linear)


# --- Sizes and budgets


def test_measure_leaves_buffers_alone():
    norm = nn.BatchNorm1d(3)
    hidden = [norm]  # not among the cell's own
    replay.measure(lambda x, memory: (None, hidden[0](x + memory)), torch.randn(4, 3), torch.zeros(4, 3), params=[])
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    replay.measure(lambda x, memory: (None, norm(x + memory)), torch.randn(4, 3), torch.zeros(4, 3), params=norm)
    assert not norm.running_mean.any()


def test_measure_counts_the_graph_without_parameters_and_leaves_the_generator_alone():
    linear = nn.Linear(8, 8, bias=False)

    def cell(x, memory):
        return None, torch.tanh(linear(nn.functional.dropout(memory, 0.5)))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    sizes = replay.measure(cell, torch.zeros(4, 8), torch.zeros(4, 8), params=linear)
    assert torch.equal(torch.get_rng_state(), before)
    row = 4 * 8 * 4
    assert sizes.memory_bytes == row
    assert sizes.graph_bytes in (
        2 * row + row // 4,
        3 * row,
    )  # tanh's result, linear's input, dropout's mask; no weight


def test_budget_keeps_graphs_where_there_is_room():
    cell, linear, segments, memory = small(8)
    sizes = replay.measure(cell, segments[0], memory, params=linear)
    visits = []

    def counted(x, memory):
        visits.append(x)
        return cell(x, memory)

    def evaluations(budget):
        visits.clear()
        replay.memory_replay(counted, segments, memory, schedule=replay.Budget(budget), params=linear).loss.backward()
        return len(visits) - 1  # one to measure

    smallest = sum(sizes)
    assert evaluations(8 * sizes.graph_bytes) == 8
    assert evaluations(smallest) == 8 + 28
    assert 8 < evaluations(4 * smallest) < 36


def test_budget_needs_no_measure_without_gradients():
    cell, linear, segments, memory = small()
    with torch.no_grad():
        replay.memory_replay(cell, segments, memory, schedule=replay.Budget(1), params=linear)


# --- accumulate: the form for FSDP


@pytest.mark.parametrize("kind", sorted(CELLS))
@pytest.mark.parametrize("at_once", [None, 2])
@pytest.mark.parametrize("schedule", [replay.EveryMemory(), replay.Binomial(1, graphs=2)])
def test_accumulate_adds_the_same_gradients(kind, at_once, schedule):
    model, segments, memory = problem(kind, [True, False, True, True], dropout=0.4, inputs_need_grad=False)
    calls = []

    def run(method, **options):
        cell = model if at_once is None else model.encode
        readout = () if at_once is None else (model.read_out,)
        rollout = method(cell, segments, memory, *readout, readout_segments=at_once, **options)
        return rollout.loss, rollout.memory

    def accumulated():
        loss, after = run(replay.accumulate, schedule=schedule, sync=calls.append)
        assert not any(x.requires_grad for x in tree_leaves(after) if isinstance(x, torch.Tensor))
        return loss.requires_grad_(), after

    expected = outcome(model, segments, memory, lambda: run(replay.full_bptt))
    assert_equal(outcome(model, segments, memory, accumulated), expected)
    assert calls == ([False, True] if at_once else []) + [False] * 3 + [True]


def test_accumulate_refusals():
    cell, _, segments, memory = small()
    with pytest.raises(ValueError, match="inputs here and get no gradient: detach them"):
        replay.accumulate(cell, segments, memory)

    def forgetful(x, memory):
        loss, memory = cell(x, memory.detach())
        return (None if torch.equal(x, segments[0]) else loss), memory.detach()

    with pytest.raises(ValueError, match="no gradient reaches the first segment"):
        replay.accumulate(forgetful, segments, memory.detach(), sync=lambda last: None)
    replay.accumulate(forgetful, segments, memory.detach())  # where nobody waits to be synchronised, nothing is amiss

    def early(values, parts):
        return values[0] if parts[0] is segments[0] else None

    with pytest.raises(ValueError, match=r"last call of the readout gave no loss .* not synchronised"):
        replay.accumulate(cell, segments, memory.detach(), early, sync=lambda last: None)
    assert replay.accumulate(cell, segments, memory.detach(), early).loss.isfinite()
    with torch.no_grad():
        assert not replay.accumulate(cell, segments, memory.detach(), early).loss.requires_grad


def test_accumulate_with_a_frozen_cell():
    """A probe: the readout alone is trained."""
    torch.manual_seed(0)
    rnn, probe = nn.GRUCell(3, 4).requires_grad_(False), nn.Linear(4, 1)

    def cell(x, memory):
        memory = rnn(x, memory)
        return memory, memory

    def readout(values, _):
        return sum(probe(value).square().mean() for value in values)

    segments = [torch.randn(2, 3) for _ in range(4)]
    replay.full_bptt(cell, segments, torch.zeros(2, 4), readout).loss.backward()
    expected = probe.weight.grad.clone()
    probe.zero_grad()
    replay.accumulate(cell, segments, torch.zeros(2, 4), readout)
    torch.testing.assert_close(probe.weight.grad, expected)


@pytest.mark.parametrize("method", [replay.memory_replay, replay.full_bptt, replay.accumulate])
@pytest.mark.parametrize("options", [{"readout_segments": 2}, {"keep_values": False}])
def test_how_a_readout_runs_where_there_is_none(method, options):
    cell, _, segments, memory = small()
    with pytest.raises(ValueError, match="say how a readout runs, and there is none"):
        method(cell, segments, memory.detach(), **options)


@pytest.mark.parametrize("schedule", [replay.EveryMemory(), replay.Budget(10**9)])
def test_a_segment_to_measure_at_that_is_not_there(schedule):
    cell, _, segments, memory = small()
    with pytest.raises(ValueError, match=r"measure_at: expected one of the \d segments, counted from 0, got 99"):
        replay.memory_replay(cell, segments, memory, schedule=schedule, measure_at=99)


def test_accumulate_takes_down_norms_clips_and_checks():
    cell, linear, segments, memory = small()
    memory = memory.detach()
    for max_norm in (None, 0.5):
        watch, reference = replay.MemoryGradients(max_norm), replay.MemoryGradients(max_norm)
        replay.full_bptt(cell, segments, memory, memory_gradients=reference).loss.backward()
        expected, linear.weight.grad = linear.weight.grad, None
        replay.accumulate(cell, segments, memory, memory_gradients=watch, check=True)
        torch.testing.assert_close(linear.weight.grad, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(watch.norms[1:], reference.norms[1:], rtol=1e-5, atol=1e-7)
        linear.weight.grad = None
    draw = random.Random(0)
    noisy = lambda x, memory: cell(x + draw.random(), memory)  # noqa: E731
    with pytest.raises(RuntimeError, match="segment 2 differs in replay from its recording"):
        replay.accumulate(noisy, segments, memory, check=True)


def test_accumulate_weights_and_half_precision_scale():
    cell, linear, segments, memory = small()
    weights = [0.0, 1.0, 2.0, 4.0]
    replay.full_bptt(cell, segments, memory.detach(), segment_weights=weights).loss.backward()
    expected, linear.weight.grad = linear.weight.grad, None
    rollout = replay.accumulate(cell, segments, memory.detach(), segment_weights=[1024 * w for w in weights])
    torch.testing.assert_close(linear.weight.grad, 1024 * expected, rtol=1e-12, atol=1e-13)
    assert not rollout.loss.requires_grad


@pytest.mark.parametrize("schedule", ["binomial", replay.Binomial, 3])
def test_what_is_no_schedule(schedule):
    cell, linear, segments, memory = small()
    with pytest.raises(ValueError, match=r"schedule: expected a schedule, such as replay\.Binomial\(8\), got"):
        replay.memory_replay(cell, segments, memory, params=linear, schedule=schedule)
