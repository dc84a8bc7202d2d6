"""Memory replay equals plain back-propagation through time, in every mode in which a model is trained."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memformer import replay
from replay_cells import CELLS, DIM, assert_equal, by, final_memory_loss, outcome, problem, same_as_bptt

problems = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(sorted(CELLS)),
        "wanted": st.lists(st.booleans(), min_size=1, max_size=6).filter(any),
        "batch": st.integers(1, 3),
        "length": st.integers(1, 4),
        "dropout": st.sampled_from([0.0, 0.4]),
        "seed": st.integers(0, 1000),
        "inputs_need_grad": st.booleans(),
    }
)


tails = st.integers(0, 7)
schedules = st.one_of(
    st.builds(replay.EveryMemory, tails),
    st.builds(replay.EveryKth, st.integers(1, 4), tails),
    st.builds(replay.Binomial, st.integers(1, 4), tails),
    st.builds(replay.Budget, st.integers(20_000, 100_000)),
)


@settings(max_examples=100, deadline=None)
@given(problem_=problems, at_once=st.none() | st.integers(1, 4), schedule=schedules)
def test_equals_bptt(problem_, at_once, schedule):
    same_as_bptt(*problem(**problem_), at_once, schedule=schedule)


@settings(max_examples=40, deadline=None)
@given(problem_=problems, keep=st.integers(0, 5), schedule=schedules)
def test_scan_outputs_are_differentiable(problem_, keep, schedule):
    """A loss over all outputs, and over one of them alone."""
    model, segments, memory = problem(**problem_)
    keep = min(keep, len(segments) - 1)

    def plain():
        values, state = [], memory
        for segment in segments:
            value, state = model.encode(segment, state)
            values.append(value)
        return values, state

    def loss(values, after):
        outs = [v["out"] if isinstance(v, dict) else v for v in values]
        together = torch.cat(outs, 1).logsumexp(1).sum()
        return together + outs[keep].square().sum() + final_memory_loss(after), (values, after)

    actual = outcome(
        model,
        segments,
        memory,
        lambda: loss(*replay.scan(model.encode, segments, memory, schedule=schedule, params=[model])),
    )
    assert_equal(actual, outcome(model, segments, memory, lambda: loss(*plain())))


@pytest.mark.parametrize("rnn_type", [nn.LSTM, nn.GRU])
def test_equals_torchs_own_recurrence_over_the_whole_sequence(rnn_type):
    """Not against our own loop: torch runs the sequence in one call."""
    torch.manual_seed(0)
    rnn = rnn_type(3, 5, num_layers=2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 23, 3, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    state = (state, state.detach() * 2) if rnn_type is nn.LSTM else state
    target = torch.randn(2, 23, 5, dtype=torch.float64)

    whole, after = rnn(x, state)
    F.mse_loss(whole, target).backward()
    expected = [x.grad, *(p.grad for p in rnn.parameters())]
    x.grad = None
    rnn.zero_grad()

    values, memory = replay.scan(rnn, x.split(4, 1), state)
    F.mse_loss(torch.cat(values, 1), target).backward()
    assert_equal({"grads": [x.grad, *(p.grad for p in rnn.parameters())]}, {"grads": expected})
    assert_equal({"memory": memory}, {"memory": after})


def test_two_models_in_series():
    torch.manual_seed(0)
    lower, upper = (nn.GRU(DIM, DIM, batch_first=True, dtype=torch.float64) for _ in range(2))
    both = nn.ModuleList([lower, upper])
    segments = [torch.randn(2, 3, DIM, dtype=torch.float64) for _ in range(5)]
    zeros = torch.zeros(1, 2, DIM, dtype=torch.float64)

    def plain():
        whole, _ = upper(lower(torch.cat(segments, 1), zeros)[0], zeros)
        return whole.square().sum(), whole

    def replayed():
        middle, _ = replay.scan(lower, segments, zeros)
        values, _ = replay.scan(upper, middle, zeros)
        whole = torch.cat(values, 1)
        return whole.square().sum(), whole

    assert_equal(outcome(both, segments, zeros, replayed), outcome(both, segments, zeros, plain))


def test_carries_on_from_a_rollout_without_a_cut():
    """The final memory stays differentiable: two rollouts in a row are one."""
    model, segments, memory = problem("dict", [True] * 6)

    def run(method):
        def both():
            first = method(model, segments[:3], memory)
            second = method(model, segments[3:], first.memory)
            return first.loss + second.loss, second.memory

        return outcome(model, segments, memory, both)

    assert_equal(run(replay.memory_replay), by(replay.full_bptt, model, segments, memory, None) | run(replay.full_bptt))


def test_detached_memory_truncates():
    model, segments, memory = problem("lstm", [True] * 4)
    first = replay.memory_replay(model, segments[:2], memory)
    cut = replay.detach(first.memory)
    assert not any(x.requires_grad for x in cut)
    replay.memory_replay(model, segments[2:], cut).loss.backward()
    assert memory[0].grad is None
    assert segments[2][1].grad is not None


@pytest.mark.parametrize("at_once", [None, 2])
def test_gradient_accumulation(at_once):
    model, segments, memory = problem("gru", [True] * 4)

    def twice(method):
        single = by(method, model, segments, memory, at_once)["parameters"]
        single = {name: g.clone() for name, g in single.items()}
        rollout = method(model, segments, memory)
        rollout.loss.backward()
        return single, {name: p.grad for name, p in model.named_parameters()}

    assert_equal(dict(enumerate(twice(replay.memory_replay))), dict(enumerate(twice(replay.full_bptt))))


def test_frozen_parameters_stay_without_gradient():
    model, segments, memory = problem("lstm", [True] * 3)
    model.cell.rnn.weight_hh_l0.requires_grad_(False)
    same_as_bptt(model, segments, memory)
    assert model.cell.rnn.weight_hh_l0.grad is None


def test_everything_frozen_gives_a_loss_without_graph():
    model, segments, memory = problem("gru", [True] * 3, inputs_need_grad=False)
    model.requires_grad_(False)
    assert not replay.memory_replay(model, segments, memory).loss.requires_grad


@pytest.mark.parametrize("at_once", [None, 2])
def test_no_grad_mode(at_once):
    model, segments, memory = problem("dict", [True, False, True], dropout=0.4)
    results = []
    for method in (replay.memory_replay, replay.full_bptt):
        torch.manual_seed(3)
        with torch.no_grad():
            if at_once is None:
                results.append(method(model, segments, memory))
            else:
                results.append(method(model.encode, segments, memory, model.read_out, readout_segments=at_once))
    assert not results[0].loss.requires_grad
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("at_once", [None, 1, 3])
def test_autocast_bfloat16(at_once):
    """Weights are cast and cached without a graph while recording; the segment with a graph must cast them anew."""
    model, segments, memory = problem("dict", [True] * 4)
    model, segments = model.float(), [(i, {**s, "x": s["x"].detach().float()}) for i, s in segments]
    memory = {k: v.detach().float() if k in ("state", "constant") else v for k, v in memory.items()}

    def run(method):
        for p in model.parameters():
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            if at_once is None:
                rollout = method(model, segments, memory)
            else:
                rollout = method(
                    model.encode, segments, memory, model.read_out, readout_segments=at_once, params=[model]
                )
            rollout.loss.backward()  # inside the region, where cached casts live on
        return {"loss": rollout.loss, "grads": [p.grad for p in model.parameters()]}

    actual, expected = run(replay.memory_replay), run(replay.full_bptt)
    assert expected["grads"][1].abs().sum() > 0
    assert_equal(actual, expected, rtol=2e-2, atol=2e-3)


class Casts(TorchDispatchMode):
    """Counts how often a weight of 3 x 3 is converted to bfloat16."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        of_weight = func.overloadpacket is torch.ops.aten._to_copy and args[0].shape == (3, 3)
        self.count += of_weight and out.dtype == torch.bfloat16
        return out


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("schedule", [replay.EveryMemory(0), replay.EveryMemory(2), replay.Binomial(3)], ids=str)
def test_weights_are_cast_once_and_not_in_each_segment(inside, schedule):
    """While recording, for the segments that are recorded with a graph, and for the replay; with the same gradients."""
    linear = nn.Linear(3, 3)

    def cell(x, memory):
        memory = linear(x + memory).float().tanh()
        return memory.square().sum(), memory

    def run(segments, cached):
        linear.zero_grad()
        given = list(segments), torch.zeros(2, 3)
        with Casts() as casts:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
                loss = replay.memory_replay(cell, *given, params=linear, schedule=schedule).loss
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        return casts.count, [p.grad for p in linear.parameters()]

    segments = torch.randn(24, 2, 3)
    few, many = run(segments[:12], True)[0], run(segments, True)
    if isinstance(schedule, replay.EveryMemory):
        assert few == many[0] == (3 if schedule.graphs else 2)
    else:
        assert many[0] < 24, "where segments are run without a graph in between, it is cast anew"
    expected = run(segments, False)
    assert expected[0] >= 48 - schedule.graphs
    assert_equal({"grads": many[1]}, {"grads": expected[1]}, rtol=0, atol=0)


def test_float16_readout_keeps_small_gradients():
    """Scaled before it is back-propagated, as a gradient scaler asks: computed unscaled, the gradient is zero."""
    cell = nn.Linear(2, 2, dtype=torch.float16)

    def step(segment, memory):
        return cell(segment) + memory, memory

    def read_out(values, segments):
        return torch.stack(values).sum() * 2.0**-20 * 2.0**-8

    segments = [torch.ones(1, 2, dtype=torch.float16) * 2.0**-4 for _ in range(3)]
    memory = torch.zeros(1, 2, dtype=torch.float16)

    def run(method):
        cell.zero_grad()
        rollout = method(step, segments, memory, read_out, params=cell)
        (rollout.loss.float() * 2.0**24).backward()
        return {"grad": cell.weight.grad}

    expected = run(replay.full_bptt)
    assert (expected["grad"] > 0).all()
    assert_equal(run(replay.memory_replay), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_rollout_holds_in_a_backward_outside_of_it(dtype):
    """In float16 the readout is run again there, on the scaled loss, though its inputs are of float32."""
    linear, seen, readouts = nn.Linear(2, 2), [], []

    def cell(x, memory):
        out = linear(x + memory)
        seen.append(out.dtype)
        return out.float(), out.float()

    def read_out(values, parts):
        out = linear(torch.cat(values))
        seen.append(out.dtype)
        readouts.append(torch.rand(()).item())
        return out.float().sum()

    with torch.autocast("cpu", dtype):
        rollout = replay.memory_replay(cell, list(torch.ones(3, 1, 2)), torch.zeros(1, 2), read_out, params=linear)
    before = len(seen)
    rollout.loss.backward()
    assert len(seen) > before
    assert set(seen) == {dtype}
    assert readouts[3:] == (readouts[:3] if dtype == torch.float16 else []), "with the same random numbers"


def test_gradients_that_share_their_storage_are_summed_apart():
    """Of a sum, autograd hands the same tensor to both parameters."""
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))

    def cell(x, memory):
        memory = memory * (a + b) + x
        return memory.sum(), memory

    def run(method):
        a.grad = b.grad = None
        method(cell, list(torch.ones(4, 2).double()), torch.ones(2).double(), params=[a, b]).loss.backward()
        return {"grads": [a.grad, b.grad]}

    assert_equal(run(replay.memory_replay), run(replay.full_bptt))


def test_gradient_scaler():
    model, segments, memory = problem("gru", [True] * 3)

    def run(method):
        model.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler.scale(method(model, segments, memory).loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return {"grads": [p.grad for p in model.parameters()]}

    assert_equal(run(replay.memory_replay), run(replay.full_bptt))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_activation_checkpointing_inside_a_cell(dropout):
    model, segments, memory = problem("dict", [True] * 4, dropout=dropout)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, segment, memory):
            return checkpoint(self.inner, segment, memory, use_reentrant=False)

    cell = Checkpointed()
    results = [
        outcome(cell, segments, memory, lambda m=m: (lambda r: (r.loss, r.memory))(m(cell, segments, memory)))
        for m in (replay.memory_replay, replay.full_bptt)
    ]
    assert_equal(*results)


INDUCTOR = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")]  # torch's own


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_compiled_cell(backend):
    """Twice: what replay does around a graph must not make the cell compile anew."""
    model, segments, memory = problem("dict", [True] * 3)
    inner = [segment for _, segment in segments]
    torch._dynamo.reset()
    compiled = torch.compile(model.cell, backend=backend)

    def run(cell):
        values, after = replay.scan(cell, inner, memory)
        return sum(v["out"].square().sum() for v in values), after

    expected = outcome(model, segments, memory, lambda: run(model.cell))
    assert_equal(outcome(model, segments, memory, lambda: run(compiled)), expected, atol=1e-12)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_equal(outcome(model, segments, memory, lambda: run(compiled)), expected, atol=1e-12)


def test_partials_and_bound_methods_bring_their_parameters():
    model, segments, memory = problem("lstm", [True] * 3)

    def step(scale, model, segment, memory):
        loss, memory = model(segment, memory)
        return loss * scale, memory

    cell = functools.partial(functools.partial(step, 2.0), model)
    run = lambda method: outcome(  # noqa: E731
        model, segments, memory, lambda: (lambda r: (r.loss, r.memory))(method(cell, segments, memory))
    )
    assert_equal(run(replay.memory_replay), run(replay.full_bptt))
    replay.memory_replay(model.forward, segments, memory).loss.backward()
    assert model.cell.rnn.weight_ih_l0.grad is not None


def test_a_tensor_named_in_params_gets_its_gradient():
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    derived = scale.square()  # not a leaf: the gradient goes on to `scale`
    segments = [torch.tensor(float(i + 1), dtype=torch.float64) for i in range(4)]

    def cell(x, memory):
        memory = memory * derived + x
        return memory.square(), memory

    def run(method):
        scale.grad = None
        method(cell, segments, torch.zeros((), dtype=torch.float64), params=[derived]).loss.backward(retain_graph=True)
        return {"grad": scale.grad}

    assert_equal(run(replay.memory_replay), run(replay.full_bptt))


@pytest.mark.parametrize("at_once", [1, 2])
def test_sparse_gradients_are_added_up(at_once):
    """Of an embedding in the cell and of one in the readout."""
    torch.manual_seed(0)
    tables = nn.ModuleList(nn.Embedding(9, 2, sparse=True, dtype=torch.float64) for _ in range(2))
    segments = [torch.tensor([t, t + 1]) for t in range(5)]

    def cell(ids, memory):
        memory = torch.tanh(memory + tables[0](ids))
        return memory, memory

    def read_out(values, parts):
        return sum((v * tables[1](ids)).sum() for v, ids in zip(values, parts, strict=True))

    def run(method):
        tables.zero_grad()
        memory = torch.ones(2, 2, dtype=torch.float64)
        method(cell, segments, memory, read_out, readout_segments=at_once, params=tables).loss.backward()
        assert all(t.weight.grad.is_sparse for t in tables)
        return {"grads": [t.weight.grad.to_dense() for t in tables]}

    assert_equal(run(replay.memory_replay), run(replay.full_bptt))


def test_parameters_of_two_rollouts_in_one_loss():
    """While one rollout is back-propagated, the gradients of the other, and of a plain graph, go their own way."""
    model, segments, memory = problem("gru", [True] * 3)

    def run(method):
        def both():
            first, second = method(model, segments, memory), method(model, segments[::-1], memory)
            plain = sum(p.square().sum() for p in model.parameters())
            return first.loss + second.loss.square() + plain, second.memory

        return outcome(model, segments, memory, both)

    assert_equal(run(replay.memory_replay), run(replay.full_bptt))


def test_memory_may_start_as_none():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.initial = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x, memory):
            memory = (self.initial if memory is None else memory) * x
            return memory.sum(), memory

    cell = Own()
    replay.memory_replay(cell, [torch.tensor(3.0), torch.tensor(5.0)], None).loss.backward()
    assert cell.initial.grad.tolist() == [18.0, 18.0]


def test_an_unused_memory_and_a_loss_without_parameters():
    """Segments that nothing depends on, and a loss that needs no gradient at all, are no special cases."""
    weight = nn.Linear(1, 1)

    def cell(x, memory):
        return (weight(x).sum() if x.item() == 1 else x.sum()), memory

    segments = [torch.ones(1) * i for i in range(3)]
    rollout = replay.memory_replay(cell, segments, torch.zeros(1), params=weight)
    rollout.loss.backward()
    assert weight.weight.grad.item() == 1.0
