"""What goes into a cell and comes out: trees that compute, objects, constants, captured tensors, half precision."""

import dataclasses
import enum
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close
from torch.utils import _pytree
from torch.utils._pytree import tree_leaves

from engine_cases import SCHEDULES, Case, assert_same, by_loop, fresh, hold_against_a_loop
from memformer import replay

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def xs(*shape, count=5):
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


# --- Trees that compute when they are taken apart or put together


class Cache:
    """Layers of keys, as a cache of keys and values has them: stacked in the tree, apart in use."""

    def __init__(self, layers):
        self.layers = layers


def flatten_cache(cache):
    return [torch.stack(cache.layers) * 2.0], None


def unflatten_cache(leaves, _):
    (stacked,) = leaves
    # A tree of something else than tensors is put together, too, for its shape alone.
    return Cache([x / 2.0 for x in stacked.unbind(0)] if isinstance(stacked, torch.Tensor) else leaves)


_pytree.register_pytree_node(Cache, flatten_cache, unflatten_cache)


class CacheCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)).double()
        self.head = nn.Linear(3, 1).double()

    def forward(self, x, cache):
        new = []
        for layer, h in zip(self.layers, cache.layers, strict=True):
            x = torch.tanh(layer(h) + x)
            new.append(x)
        return self.head(x).square().mean(), Cache(new)


@every_schedule
@pytest.mark.parametrize("learned", [True, False])
def test_a_memory_that_computes_when_it_is_flattened(schedule, learned):
    def make():
        cell = CacheCell()
        start = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=learned)
        return Case(cell, xs(2, 3), Cache(list(start.unbind(0))), modules=[cell], wanted=[start] if learned else [])

    hold_against_a_loop(make, schedule, accumulate=not learned)


@every_schedule
def test_a_value_and_segments_that_compute_when_they_are_flattened(schedule):
    def make():
        cell = CacheCell()

        def encode(segment, cache):
            _, cache = cell(sum(segment.layers), cache)
            return cache, cache

        def read_out(values, segments):
            return sum(cell.head(v.layers[0] * v.layers[1]).square().mean() for v in values)

        wanted = [torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(5)]
        segments = [Cache(list(x.unbind(0))) for x in wanted]
        memory = Cache([zeros(2, 3), zeros(2, 3)])
        return Case(encode, segments, memory, params=cell, readout=read_out, modules=[cell], wanted=wanted)

    hold_against_a_loop(make, schedule, accumulate=False)


# --- Captured tensors


@every_schedule
@pytest.mark.parametrize("with_readout", [True, False])
def test_a_captured_tensor_beside_a_frozen_backbone(schedule, with_readout):
    """No known input needs a gradient, so no backward would ever come to the cell."""
    backbone, head = nn.Linear(3, 3).double().requires_grad_(False), nn.Linear(3, 1).double()
    start = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def cell(x, memory):
        memory = torch.tanh(backbone(start if memory is None else memory) + x)
        return (memory if with_readout else memory.square().sum()), memory

    readout = (lambda values, segments: head(values[0]).square().sum()) if with_readout else None
    with pytest.raises(ValueError, match=r"uses 'start' of shape \(2, 3\), which requires a gradient and would get"):
        replay.memory_replay(cell, xs(2, 3), None, readout, params=backbone, schedule=SCHEDULES[schedule])


@every_schedule
@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_a_captured_tensor_in_one_segment(schedule, where):
    linear = nn.Linear(3, 3).double()
    captured = torch.ones(3, dtype=torch.float64, requires_grad=True)
    position = {"first": 0, "middle": 2, "last": 4}[where]

    def cell(segment, memory):
        t, x = segment
        memory = torch.tanh(linear(memory) + (x * captured if t == position else x))
        return memory.square().sum(), memory

    with pytest.raises(ValueError, match=r"uses 'captured' of shape \(3,\)"):
        replay.memory_replay(
            cell, list(enumerate(xs(2, 3))), zeros(2, 3), params=linear, schedule=SCHEDULES[schedule]
        ).loss.backward()


@every_schedule
def test_a_cell_may_make_leaves_for_itself(schedule):
    """Nobody holds them, so no gradient is lost."""

    def make():
        linear = nn.Linear(3, 3).double()

        def cell(x, memory):
            slope = torch.ones(3, dtype=torch.float64, requires_grad=True)
            memory = torch.tanh(linear(memory) * slope + x)
            return memory.square().sum(), memory

        return Case(cell, xs(2, 3), zeros(2, 3), params=linear, modules=[linear])

    hold_against_a_loop(make, schedule)


def test_nothing_is_stored_where_nothing_is_trained():
    weight, seen = torch.ones(3, dtype=torch.float64), []

    def cell(x, memory):
        seen.append(memory)
        return (memory * weight).sum(), torch.tanh(memory + x)

    assert not replay.memory_replay(cell, xs(2, 3), zeros(2, 3)).loss.requires_grad
    assert len(seen) == 5


# --- Objects


@dataclasses.dataclass
class Output:
    loss: Any
    hidden: Any


class Plain:
    def __init__(self, hidden):
        self.hidden = hidden


class Slotted:
    __slots__ = ("hidden",)

    def __init__(self, hidden):
        self.hidden = hidden


class ModelOutput(OrderedDict):
    """As transformers has it: a dict whose class is not registered."""


OBJECTS = {
    "dataclass": lambda h: Output(None, [h]),
    "object": lambda h: Plain({"h": h}),
    "slots": Slotted,
    "mapping": lambda h: ModelOutput(h=h),
    "closure": lambda h: lambda: h,
    "set": lambda h: {h},
}


@every_schedule
@pytest.mark.parametrize("kind", OBJECTS)
def test_values_that_are_objects(schedule, kind):
    linear = nn.Linear(3, 3).double()

    def cell(x, memory):
        memory = torch.tanh(linear(memory) + x)
        return OBJECTS[kind](memory), memory

    with pytest.raises(ValueError, match=r"value of segment 0 holds a \w+, through which .* Register it .* its fields"):
        replay.memory_replay(
            cell, xs(2, 3), zeros(2, 3), lambda v, s: zeros(1).sum(), params=linear, schedule=SCHEDULES[schedule]
        )


class Mode(enum.Enum):
    ON = 1


@every_schedule
def test_values_that_are_plain(schedule):
    plain = {
        "name": "x",
        "mode": Mode.ON,
        "size": torch.Size([2]),
        "type": torch.float32,
        "none": None,
        "n": 3,
        "z": 1j,
    }
    plain |= {"object": Plain(3), "set": {1, 2}, "class": Plain}

    def make():
        linear = nn.Linear(3, 3).double()

        def cell(x, memory):
            memory = torch.tanh(linear(memory) + x)
            return {**plain, "h": memory}, memory

        def read_out(values, segments):
            assert all(value[key] == plain[key] for value in values for key in plain)
            return sum(value["h"].square().sum() for value in values)

        return Case(cell, xs(2, 3), zeros(2, 3), params=linear, readout=read_out, modules=[linear])

    hold_against_a_loop(make, schedule)


# --- Leaves of the memory that are constants


class Weighted(nn.Module):
    """Class weights and statistics travel with the memory; torch has no gradient by them."""

    def __init__(self, slow=0):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.slow = slow

    def forward(self, segment, memory):
        t, x = segment
        h = torch.tanh(self.linear(memory["h"]) + F.dropout(x, 0.2))
        mean = 0.9 * memory["mean"] + 0.1 * x.detach().mean(0)
        out = F.batch_norm(h, mean, memory["var"], training=False)
        targets = x.argmax(1)
        loss = F.cross_entropy(out, targets, weight=memory["weights"])
        slow = memory["slow"] + h if t % 4 == self.slow else memory["slow"]
        return loss + slow.square().mean(), {**memory, "h": h, "mean": mean, "slow": slow}


def of_weights(cell):
    weights = torch.rand(3, dtype=torch.float64)
    memory = {"h": zeros(4, 3), "weights": weights, "mean": zeros(3), "var": zeros(3) + 1, "slow": zeros(4, 3)}
    return Case(cell, list(enumerate(xs(4, 3))), memory, modules=[cell])


@every_schedule
@pytest.mark.parametrize("slow", [0, 3])
def test_constant_leaves_of_a_memory(schedule, slow):
    """And one that is a constant at first, and is none later on."""

    hold_against_a_loop(lambda: of_weights(Weighted(slow)), schedule, on_memory=False)


class WeightedInGradMode(Weighted):
    """The same, which only grad mode can record: it differentiates something, or has a module with a fast path."""

    def __init__(self, differentiates):
        super().__init__(0)
        self.attention = None if differentiates else nn.MultiheadAttention(3, 1, batch_first=True).double().eval()

    def forward(self, segment, memory):
        _, x = segment
        if self.attention is not None:
            h = memory["h"] + self.attention(x[None], x[None], x[None])[0][0]
        else:
            h = memory["h"] if memory["h"].requires_grad else memory["h"].detach().requires_grad_()
            (step,) = torch.autograd.grad(self.linear(h).square().sum(), h, create_graph=True)
            h = h - 0.1 * step
        return super().forward(segment, {**memory, "h": h})


@every_schedule
@pytest.mark.parametrize("differentiates", [True, False])
def test_constant_leaves_of_a_memory_that_is_recorded_with_graphs(schedule, differentiates):
    hold_against_a_loop(lambda: of_weights(WeightedInGradMode(differentiates)), schedule, on_memory=False)


@pytest.mark.parametrize("kind", [Weighted, WeightedInGradMode])
def test_constant_leaves_of_a_frozen_model(kind):
    def make():
        case = of_weights(kind(True))
        case.cell.requires_grad_(False)
        return case

    expected = by_loop(fresh(make))
    found = fresh(make)
    rollout = replay.memory_replay(found.cell, found.segments, found.memory)
    assert_same(tree_leaves(rollout.memory), tree_leaves(expected.memory), 1e-12, 1e-13)
    assert_same([rollout.loss], [expected.loss], 1e-12, 1e-13)


# --- Gradients that would be dropped


def test_weights_that_need_a_gradient():
    linear = nn.Linear(3, 3).double()
    cell = lambda x, m: (linear(m + x).sum(), m)  # noqa: E731
    weights = torch.ones(5, requires_grad=True)
    for given in (weights, list(weights)):
        for method in (replay.memory_replay, replay.full_bptt, replay.accumulate):
            with pytest.raises(ValueError, match=r"segment_weights: are numbers here.*Detach it, or"):
                method(cell, xs(2, 3), zeros(2, 3), params=linear, segment_weights=given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, where it loads its rules
def test_a_forward_mode_tangent():
    linear = nn.Linear(3, 3).double()
    cell = lambda x, m: (linear(m + x).sum(), m)  # noqa: E731
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(zeros(2, 3), zeros(2, 3) + 1)
        with pytest.raises(ValueError, match=r"forward-mode tangent, which replay would drop.*full_bptt"):
            replay.memory_replay(cell, xs(2, 3), dual, params=linear)
        with pytest.raises(ValueError, match="forward-mode tangent"):
            replay.memory_replay(cell, [dual], zeros(2, 3))
        assert replay.memory_replay(cell, xs(2, 3), zeros(2, 3), params=linear).loss.requires_grad


def test_torch_func_around_a_rollout():
    segments = xs(2, 3)

    def loss_of(method):
        def loss(weight):
            def cell(x, m):
                m = torch.tanh(m @ weight + x)
                return m.square().sum(), m

            return method(cell, segments, zeros(2, 3), params=[weight])

        return loss

    weight = xs(3, 3)[0].new_ones(3, 3) / 3
    for transform in (torch.func.grad, torch.func.vmap):
        for method in (replay.memory_replay, replay.accumulate, replay.scan, replay.measure):
            with pytest.raises(ValueError, match=r"torch.func .* is around this rollout.*Use replay.full_bptt"):
                transform(loss_of(method))(weight)
    found = torch.func.grad(lambda w: loss_of(replay.full_bptt)(w).loss)(weight)
    plain = weight.clone().requires_grad_()
    loss_of(replay.memory_replay)(plain).loss.backward()
    assert_close(found, plain.grad)


def test_a_cell_that_differentiates_with_torch_func():
    """Beside it torch refuses the hooks by which a graph is measured."""
    weight = xs(3, 3)[0].new_ones(3, 3).div(3).requires_grad_()

    def cell(x, m, grad=torch.func.grad):
        m = torch.tanh(m - grad(lambda m: ((m @ weight - x) ** 2).sum())(m))
        return m.square().sum(), m

    by_autograd = lambda x, m: cell(  # noqa: E731
        x, m, lambda f: lambda m: torch.autograd.grad(f(m := m.detach().requires_grad_()), m, create_graph=True)[0]
    )
    args = [xs(3, 2, 3), zeros(2, 3)]
    verdict = replay.verify(cell, *args, params=[weight])
    assert verdict.ok, str(verdict)
    assert len(verdict.outcomes) == 8
    segment, memory = args[0][0], args[1]
    found, plain = (replay.measure(c, segment, memory, params=[weight]) for c in (cell, by_autograd))
    assert found.memory_bytes == plain.memory_bytes
    assert plain.graph_bytes / 2 < found.graph_bytes < plain.graph_bytes * 2
    replay.memory_replay(cell, *args, params=[weight], schedule=replay.Budget(1000)).loss.backward()
    grad, weight.grad = weight.grad, None
    replay.full_bptt(cell, *args, params=[weight]).loss.backward()
    assert_close(grad, weight.grad)


def test_lazy_parameters():
    cell = nn.LazyLinear(3)
    step = lambda x, m: (cell(m + x).sum(), m)  # noqa: E731
    with pytest.raises(ValueError, match=r"parameter 'weight' is lazy.*Call the cell once"):
        replay.memory_replay(step, xs(2, 3), zeros(2, 3), params=cell)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("known", [True, False])
def test_accumulate_refuses_hooks(hook, known):
    """An optimizer in the backward would step once per segment, in the middle of the replay."""
    linear = nn.Linear(3, 3).double()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    getattr(linear.weight, hook)(lambda p: optimizer.step() if hook != "register_hook" else None)
    cell = lambda x, m: (linear(m + x).square().sum(), torch.tanh(linear(m + x)))  # noqa: E731
    name = "parameter 'weight'" if known else r"a tensor of shape \(3, 3\)"
    with pytest.raises(
        ValueError, match=rf"accumulate: {name} has a hook on its gradient.*Do its work after accumulate"
    ):
        replay.accumulate(cell, xs(2, 3), zeros(2, 3), params=linear if known else ())
    assert linear.weight.grad is None


def test_an_optimizer_in_the_backward_steps_once_in_a_memory_replay():
    linear, steps = nn.Linear(3, 3).double(), []
    linear.weight.register_post_accumulate_grad_hook(lambda p: steps.append(p.grad.clone()))
    cell = lambda x, m: (linear(m + x).square().sum(), torch.tanh(linear(m + x)))  # noqa: E731
    replay.memory_replay(cell, xs(2, 3), zeros(2, 3), params=linear).loss.backward()
    assert len(steps) == 1
    torch.testing.assert_close(steps[0], linear.weight.grad)


# --- Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["cell, by a hook", "cell, afterwards", "readout"])
def test_sums_of_half_precision_are_rounded_once(dtype, where, monkeypatch):
    """2,048 equal gradients: in the parameter's own type the sum stands still early on."""
    monkeypatch.setattr("memformer.replay.gradients.ADDED_AFTERWARDS", 0 if "hook" in where else 10**6)
    weight = nn.Parameter(torch.ones(4, dtype=dtype))
    count, each = 2048, 1.0 / 64
    segments = [torch.full((4,), each, dtype=dtype)] * count

    def cell(x, memory):
        return (weight * x).sum() if where != "readout" else x, memory

    def run(method, readout=None):
        weight.grad = None
        method(cell, segments, torch.zeros(1), readout, params=[weight]).loss.backward()
        assert weight.grad.dtype == dtype
        return (weight.grad.float() / (count * each) - 1).abs().max().item()

    readout = None if where != "readout" else lambda values, _: (weight * values[0]).sum()
    assert run(replay.full_bptt, readout) > 0.1 or dtype == torch.float16
    assert run(replay.memory_replay, readout) < 0.01


# --- What held before


def packed_case():
    gru = nn.GRU(3, 3).double()

    def cell(packed, memory):
        out, memory = gru(packed, memory)
        return out, memory

    def segment():
        return pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (4, 2)])

    def read_out(values, segments):
        return sum(v.data.square().sum() for v in values)

    return Case(cell, [segment() for _ in range(4)], zeros(1, 2, 3), params=gru, readout=read_out, modules=[gru])


def complex_case():
    linear = nn.Linear(3, 3, dtype=torch.complex128)

    def cell(x, memory):
        memory = torch.tanh(linear(memory)) + x
        return memory.abs().square().sum(), memory

    memory = torch.zeros(2, 3, dtype=torch.complex128)
    return Case(cell, xs(2, 3), memory, params=linear, modules=[linear])


def fast_weight_case():
    linear = nn.Linear(3, 3).double()

    def cell(x, memory):
        memory = memory + 0.1 * torch.einsum("bi,bj->ij", linear(x), x)
        return F.linear(x, memory).square().mean(), memory

    return Case(cell, xs(2, 3), zeros(3, 3), params=linear, modules=[linear])


def growing_case():
    linear = nn.Linear(3, 3).double()

    def cell(x, memory):
        memory = (*memory, linear(x))
        return torch.stack(memory).mean(0).square().sum(), memory

    return Case(cell, xs(2, 3), (), params=linear, modules=[linear])


def aliasing_case():
    linear = nn.Linear(3, 3).double()

    def cell(x, memory):
        a, b, _ = memory
        h = torch.tanh(linear(a) + b * x)
        return h.square().sum(), (h, h, h[:1])

    return Case(cell, xs(2, 3), (zeros(2, 3), zeros(2, 3), zeros(1, 3)), params=linear, modules=[linear])


def functional_case():
    linear = nn.Linear(3, 3).double()

    def cell(x, memory):
        doubled = {name: 2 * p for name, p in linear.named_parameters()}
        memory = torch.tanh(torch.func.functional_call(linear, doubled, (memory + x,)))
        return memory.square().sum(), memory

    return Case(cell, xs(2, 3), zeros(2, 3), params=linear, modules=[linear])


def tied_case():
    embedding = nn.Embedding(5, 3, sparse=True).double()

    def cell(ids, memory):
        memory = torch.tanh(memory + embedding(ids))
        return memory.square().sum(), memory

    return Case(cell, [torch.tensor([t, 1]) for t in range(4)], zeros(2, 3), params=embedding, modules=[embedding])


HELD = [packed_case, complex_case, fast_weight_case, growing_case, aliasing_case, functional_case, tied_case]


@every_schedule
@pytest.mark.parametrize("make", HELD)
def test_what_held(make, schedule):
    hold_against_a_loop(make, schedule, on_memory=make is not complex_case)
