"""Cells that use autograd themselves: a backward in the backward, gradients in the cell, tensors that are derived."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine_cases import SCHEDULES, Case, hold_against_a_loop
from memformer import replay

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
LENGTH = 5


def xs(*shape, requires_grad=False):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad) for _ in range(LENGTH)]


def large(monkeypatch, bytes_=0):
    """Every gradient counts as a large one, which a hook adds at once; without this, tests have small ones alone."""
    monkeypatch.setattr("memformer.replay.gradients.ADDED_AFTERWARDS", bytes_)


by_hooks = pytest.mark.parametrize("hooks", [True, False])


# --- A backward inside of the cell's backward


class Adjoint(torch.autograd.Function):
    """Like an adjoint solver of differential equations: a graph is built in the backward, and differentiated."""

    @staticmethod
    def forward(ctx, net, h, *parameters):
        ctx.net, ctx.parameters = net, parameters
        ctx.save_for_backward(h)
        with torch.no_grad():
            return h + 0.1 * net(h)

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            by_h, *others = torch.autograd.grad(ctx.net(h), [h, *ctx.parameters], grad)
        return None, grad + 0.1 * by_h, *(0.1 * g for g in others)


class Reversible(torch.autograd.Function):
    """Like a reversible layer: its backward calls ``.backward()``, so the parameters are no inputs."""

    @staticmethod
    def forward(ctx, net, h):
        ctx.net = net
        ctx.save_for_backward(h)
        with torch.no_grad():
            return h + net(h)

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            (h + ctx.net(h)).backward(grad)
        return None, h.grad


class Nested(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.gate = nn.Linear(3, 3).double()
        self.kind = kind

    def forward(self, x, memory):
        h = torch.tanh(self.gate(memory) + x)
        if self.kind == "adjoint":
            h = Adjoint.apply(self.net, h, *self.net.parameters())
        elif self.kind == "reversible":
            h = Reversible.apply(self.net, h)
        elif self.kind == "checkpoint":
            h = h + checkpoint(self.net, h, use_reentrant=False)
        else:  # the parameters of the Function are used outside of it, too
            h = Adjoint.apply(self.net, h, *self.net.parameters()) + 0.1 * self.net(h)
        return h.square().mean(), h


@every_schedule
@by_hooks
@pytest.mark.parametrize("kind", ["adjoint", "reversible", "checkpoint", "adjoint and outside"])
def test_a_backward_in_the_cells_backward(kind, schedule, hooks, monkeypatch):
    large(monkeypatch, 0 if hooks else 10**9)

    def make():
        cell = Nested(kind)
        return Case(cell, xs(2, 3), torch.randn(2, 3, dtype=torch.float64), modules=[cell])

    hold_against_a_loop(make, schedule)


class Withheld(torch.autograd.Function):
    """A linear map whose backward gives None for some of its inputs, as graphed callables do for what they skip."""

    @staticmethod
    def forward(ctx, withheld, h, weight, bias):
        ctx.withheld = withheld
        ctx.save_for_backward(h, weight)
        return torch.tanh(h) @ weight.T + bias

    @staticmethod
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        tanh = torch.tanh(h)
        found = {"h": grad @ weight * (1 - tanh.square()), "weight": grad.T @ tanh, "bias": grad.sum(0)}
        return None, *(None if name in ctx.withheld else x for name, x in found.items())


WITHHELD = {
    "a parameter": lambda t: {"bias"},
    "a large one": lambda t: {"weight"},
    "all parameters": lambda t: {"weight", "bias"} if t else {"bias"},
    "the memory": lambda t: {"h"},
    "everything": lambda t: {"h", "weight", "bias"} if t else {"h", "bias"},
    "in some segments": lambda t: {"weight"} if t % 2 else {"bias"},
    "once": lambda t: {"weight", "bias", "h"} if t == 2 else set(),
}


@every_schedule
@by_hooks
@pytest.mark.parametrize("outside", [True, False], ids=["used elsewhere", "used there alone"])
@pytest.mark.parametrize("what", WITHHELD)
def test_an_autograd_function_that_gives_none(what, outside, hooks, schedule, monkeypatch):
    """In the cell and in the readout; None is no gradient, and not an error."""
    large(monkeypatch, 0 if hooks else 10**9)

    def make():
        cell, head = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()

        def encode(segment, memory):
            t, x = segment
            h = Withheld.apply(WITHHELD[what](int(t)), memory + x, cell.weight, cell.bias)
            return h, h + 0.1 * cell(x) if outside else h + 0.5 * memory

        def read_out(values, segments):
            pairs = zip(values, segments, strict=True)
            parts = [Withheld.apply(WITHHELD[what](int(t)), v, head.weight, head.bias) for v, (t, _) in pairs]
            return sum(x.square().sum() for x in parts) + (head.weight.sum() if outside else 0.0)

        segments = [(torch.tensor(t), x) for t, x in enumerate(xs(2, 3))]
        memory = torch.randn(2, 3, dtype=torch.float64)
        return Case(encode, segments, memory, params=[cell, head], readout=read_out, modules=[cell, head])

    # accumulate refuses a first segment that no gradient reaches
    hold_against_a_loop(make, schedule, accumulate=what not in ("the memory", "everything"))


@every_schedule
@pytest.mark.parametrize("kind", ["adjoint", "reversible", "adjoint and outside"])
def test_a_backward_in_the_readouts_backward(kind, schedule, monkeypatch):
    large(monkeypatch)

    def make():
        cell, head = Nested("checkpoint"), Nested(kind)

        def encode(x, memory):
            _, memory = cell(x, memory)
            return memory, memory

        def read_out(values, segments):
            return sum(head(v, s)[0] for v, s in zip(values, segments, strict=True))

        memory = torch.randn(2, 3, dtype=torch.float64)
        return Case(encode, xs(2, 3), memory, params=[cell, head], readout=read_out, modules=[cell, head])

    hold_against_a_loop(make, schedule)


def test_a_reversible_readout_adds_nothing_before_its_backward():
    head = Nested("reversible")
    head.net[0].weight.grad = torch.ones_like(head.net[0].weight)
    rollout = replay.memory_replay(
        lambda x, m: (m + x, m + x), xs(2, 3), torch.zeros(2, 3).double(), lambda v, s: head(v[0], s[0])[0], params=head
    )
    assert head.net[0].weight.grad.eq(1).all()
    assert head.net[2].weight.grad is None
    (0.0 * rollout.loss).backward()
    assert head.net[0].weight.grad.eq(1).all()


@every_schedule
@by_hooks
def test_a_function_that_has_no_gradient_for_a_parameter(schedule, hooks, monkeypatch):
    """autograd hands ``None`` to the parameter."""
    large(monkeypatch, 0 if hooks else 10**9)

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, b):
            ctx.save_for_backward(x, a)
            return x * a * b

        @staticmethod
        def backward(ctx, grad):
            x, a = ctx.saved_tensors
            return grad * a, (grad * x).sum(0), None

    def make():
        a, b = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))

        def cell(x, memory):
            h = torch.tanh(Half.apply(memory + x, a, b))
            return h.square().sum(), h

        return Case(cell, xs(2, 3), torch.zeros(2, 3).double(), params=[a, b], wanted=[a, b])

    hold_against_a_loop(make, schedule)


@every_schedule
@pytest.mark.parametrize("kind", ["adjoint", "reversible"])
def test_where_torch_does_not_tell_the_task(kind, schedule, monkeypatch):
    """Without torch's private functions no hook is used: a second set of gradients, and the same numbers."""
    large(monkeypatch)
    monkeypatch.setattr("memformer.replay.gradients._current_task", None)
    monkeypatch.setattr("memformer.replay.gradients._run_backward", None)

    def make():
        cell = Nested(kind)
        return Case(cell, xs(2, 3), torch.randn(2, 3, dtype=torch.float64), modules=[cell])

    hold_against_a_loop(make, schedule)


# --- A replay inside of something


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_schedule
def test_a_replay_inside_a_checkpoint(use_reentrant, schedule, monkeypatch):
    large(monkeypatch)
    torch.manual_seed(0)
    cell, segments = Nested("checkpoint"), xs(2, 3)
    memory = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def rollout(memory):
        return replay.memory_replay(cell, segments, memory, schedule=SCHEDULES[schedule]).loss

    rollout(memory).backward()
    expected = [memory.grad, *(p.grad for p in cell.parameters())]
    memory.grad = None
    cell.zero_grad()
    checkpoint(rollout, memory, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close([memory.grad, *(p.grad for p in cell.parameters())], expected, rtol=1e-12, atol=1e-14)


@every_schedule
def test_a_replay_inside_a_cell(schedule, monkeypatch):
    """Both share their parameters: each hook acts in its own graph."""
    large(monkeypatch)

    def make():
        inner = Nested("adjoint")

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, x, memory):
                rollout = replay.memory_replay(self.inner, list(x.unbind(0)), memory)
                return rollout.loss, torch.tanh(rollout.memory + self.inner.gate(memory))

        outer = Outer()
        return Case(outer, xs(3, 2, 3), torch.randn(2, 3, dtype=torch.float64), modules=[outer])

    hold_against_a_loop(make, schedule)


# --- Gradients in the cell


class Energy(nn.Module):
    """The memory goes down an energy, by ``torch.autograd.grad`` inside of the cell."""

    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.how = how

    def energy(self, h, x):
        return (torch.tanh(self.linear(h)) * x).sum() + 0.5 * h.square().sum()

    def forward(self, x, memory):
        if self.how == "func":
            step = torch.func.grad(self.energy)(memory, x)
        elif self.how == "vmap":
            step = torch.func.vmap(torch.func.grad(self.energy))(memory, x)
        else:
            h = memory if memory.requires_grad else memory.detach().requires_grad_()
            (step,) = torch.autograd.grad(self.energy(h, x), h, create_graph=True)
        memory = memory - 0.3 * F.dropout(step, 0.2)
        return memory.square().mean(), memory


@every_schedule
@pytest.mark.parametrize("how", ["autograd", "func", "vmap"])
def test_gradients_inside_of_the_cell(how, schedule):
    def make():
        cell = Energy(how)
        return Case(cell, xs(2, 3), torch.randn(2, 3, dtype=torch.float64), modules=[cell])

    hold_against_a_loop(make, schedule)


@every_schedule
@pytest.mark.parametrize("first", [1, 3])
def test_a_cell_that_differentiates_in_a_later_segment_alone(first, schedule):
    """The segments before it are run again, with graphs, and random numbers are drawn as before."""

    def make():
        energy = Energy("autograd")

        def cell(segment, memory):
            t, x = segment
            return energy(x, memory) if t >= first else (None, F.dropout(energy.linear(memory) + x, 0.2))

        return Case(cell, list(enumerate(xs(2, 3))), torch.zeros(2, 3).double(), params=energy, modules=[energy])

    hold_against_a_loop(make, schedule)


@every_schedule
def test_a_parameter_that_is_used_twice_and_one_in_some_segments_alone(schedule):
    def make():
        experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)).double()

        def cell(segment, memory):
            t, x = segment
            expert = experts[(0, 1, 0, 2, 1)[t]]
            memory = torch.tanh(expert(expert(memory) + x))
            return memory.square().sum(), memory

        segments = list(enumerate(xs(2, 3)))
        return Case(cell, segments, torch.zeros(2, 3).double(), params=experts, modules=[experts])

    hold_against_a_loop(make, schedule)


# --- Tensors that are derived from parameters


class StateSpace(nn.Module):
    """``A = -exp(log_a)`` is computed once for a rollout."""

    def __init__(self):
        super().__init__()
        self.log_a = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.linear = nn.Linear(3, 3).double()
        self.prepare()

    def prepare(self):
        self.a = -torch.exp(self.log_a)

    def forward(self, x, memory):
        memory = memory * torch.exp(0.1 * self.a) + self.linear(x)
        return memory.square().mean(), memory


@every_schedule
@by_hooks
def test_a_derived_tensor_that_is_named(schedule, hooks, monkeypatch):
    """Also where the module owns what it is derived from: nothing is counted twice."""
    large(monkeypatch, 0 if hooks else 10**9)

    def make():
        cell = StateSpace()
        return Case(cell, xs(2, 3), torch.zeros(2, 3).double(), params=[cell.a], modules=[cell])

    hold_against_a_loop(make, schedule, accumulate=False)


@pytest.mark.parametrize("schedule", ["default", "no graphs", "binomial"])
def test_a_derived_tensor_that_is_not_named_has_a_remedy(schedule):
    cell = StateSpace()
    rollout = replay.memory_replay(cell, xs(2, 3), torch.zeros(2, 3).double(), schedule=SCHEDULES[schedule])
    with pytest.raises(RuntimeError, match=r"(?s)computed once, outside of it.*in each of them, .*name it in params"):
        rollout.loss.backward()
    cell.prepare()
    with pytest.raises(RuntimeError, match="computed once, outside of it"):
        replay.accumulate(cell, xs(2, 3), torch.zeros(2, 3).double(), schedule=SCHEDULES[schedule])


def test_a_derived_tensor_and_what_it_is_derived_from():
    cell = StateSpace()

    def both(x, memory):
        loss, memory = cell(x, memory)
        return loss + cell.log_a.sum(), memory

    with pytest.raises(ValueError, match=r"tensor of params= that was computed from .*\(3,\), and that one, too"):
        replay.memory_replay(both, xs(2, 3), torch.zeros(2, 3).double(), params=[cell, cell.a])


def test_one_of_two_derived_tensors_that_come_from_one_operation():
    """The other one is reached through the same node, and would lose its gradient."""
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    a, b = weight.unbind(0)

    def cell(x, memory):
        memory = memory * a + x * b
        return memory.sum(), memory

    with pytest.raises(ValueError, match=r"uses .*, which requires a gradient and would get none"):
        replay.memory_replay(cell, xs(2, 3), torch.zeros(2, 3).double(), params=[a])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_has_a_remedy_and_accumulate_takes_it():
    cell = Nested("adjoint")

    def encode(x, memory):
        memory = checkpoint(cell.gate, memory, use_reentrant=True) + x
        return memory.square().sum(), memory

    memory = torch.zeros(2, 3).double()
    rollout = replay.memory_replay(encode, xs(2, 3), memory, params=cell.gate)
    with pytest.raises(RuntimeError, match=r"In a replay: use checkpoint\(\.\.\., use_reentrant=False\).*accumulate"):
        rollout.loss.backward()
