"""Tensors that a cell computes once, in its first segment, and keeps: their gradient is right, or that is refused."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine_cases import SCHEDULES, Case, hold_against_a_loop
from memformer import replay

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def xs(*shape):
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(5)]


class Kept(nn.Module):
    """Its recurrent weight is computed once, by ``make``, and kept by ``keep``."""

    def __init__(self, make, keep):
        super().__init__()
        self.read, self.raw = nn.Linear(3, 3).double(), nn.Linear(3, 3, bias=False).double()
        self.make, self.keep, self.cache = make, keep, {}

    def forward(self, segment, memory):
        t, x = segment
        weight = self.keep(self, t, functools.partial(self.make, self.raw.weight, x, memory))
        memory = torch.tanh(self.read(x) + memory @ weight.T)
        return memory.square().sum(), memory


def in_the_first_segment(cell, t, make):
    if t == 0:
        cell.kept = make()
    return cell.kept


def lazily(cell, t, make):
    if not hasattr(cell, "kept"):
        cell.kept = make()
    return cell.kept


def in_a_dict(cell, t, make):
    if "weight" not in cell.cache:
        cell.cache["weight"] = make()
    return cell.cache["weight"]


def case_of(make, keep, segments=5):
    return Case(Kept(make, keep), list(enumerate(xs(2, 3)))[:segments], torch.randn(2, 3).double())


KEPT = [in_the_first_segment, lazily, in_a_dict]
MADE = {
    "dropped": lambda raw, x, memory: F.dropout(raw, 0.5),
    "exp": lambda raw, x, memory: -raw.exp(),
    "of the segment": lambda raw, x, memory: raw * x.mean(0),
    "of the memory": lambda raw, x, memory: raw.sin() * memory.mean(0),
}


@every_schedule
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_its_graph_is_used_up_in_the_last_segment_and_that_is_said(make, keep, schedule):
    for run in (replay.memory_replay, replay.accumulate):
        case = case_of(make, keep)
        with pytest.raises(RuntimeError, match=r"(?s)computed once, .* or in its first segment.*part of the memory"):
            run(case.cell, case.segments, case.memory, schedule=SCHEDULES[schedule]).loss.backward()


@every_schedule
@pytest.mark.parametrize("keep", KEPT)
def test_one_whose_graph_keeps_nothing_is_right(keep, schedule):
    hold_against_a_loop(lambda: case_of(lambda raw, x, memory: -raw, keep), schedule, on_memory=False)


@every_schedule
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("wants", ["memory", "segment"])
def test_one_computed_from_what_is_differentiated_is_refused(wants, keep, schedule):
    def made(raw, x, memory):
        return -(memory if wants == "memory" else x).mean(0).expand(3, 3)

    case = case_of(made, keep)
    start = case.memory.requires_grad_(wants == "memory")
    segments = [(t, x.requires_grad_(wants == "segment")) for t, x in case.segments]
    with pytest.raises(ValueError, match=r"Kept keeps a tensor that it computed from the first segment"):
        replay.memory_replay(case.cell, segments, start, schedule=SCHEDULES[schedule]).loss.backward()


@every_schedule
def test_what_is_only_looked_at_later_may_be_kept(schedule):
    def make():
        cell = Kept(MADE["exp"], lambda cell, t, make: make())

        def logging(segment, memory):
            cell.cache.setdefault("first", cell.raw.weight.exp())
            cell.cache["last"] = memory
            return cell(segment, memory)

        return Case(logging, list(enumerate(xs(2, 3))), torch.randn(2, 3).double(), params=cell, modules=[cell])

    hold_against_a_loop(make, schedule)


# --- What a cell does to its containers, to what it is given, and to itself


def into_the_dict(linear, segment, memory):
    memory["h"] = torch.tanh(linear(segment["x"]) + memory["h"])
    return memory["h"].square().sum(), memory


def out_of_the_dict(linear, segment, memory):
    y = segment.pop("y")
    h = torch.tanh(linear(segment["x"]) + memory["h"])
    return (h - y).square().sum(), {"h": h}


@every_schedule
@pytest.mark.parametrize("cell", [into_the_dict, out_of_the_dict])
def test_a_cell_may_change_its_containers_where_it_is_verified_too(cell, schedule):
    linear = nn.Linear(3, 3).double()
    cell = functools.partial(cell, linear)
    segments = [{"x": x, "y": x.sin()} for x in xs(2, 3)]
    memory = {"h": torch.zeros(2, 3).double()}
    verdict = replay.verify(cell, segments, memory, schedules=[SCHEDULES[schedule], replay.Budget(10**9)])
    assert verdict.ok, verdict
    assert all(part.keys() == {"x", "y"} for part in segments)
    assert not memory["h"].requires_grad


class Averaging(nn.Module):
    """Keeps a running mean in an attribute, where no replay can put it back."""

    def __init__(self):
        super().__init__()
        self.linear, self.mean = nn.Linear(3, 3).double(), torch.zeros(3).double()

    def forward(self, x, memory):
        self.mean = (0.9 * self.mean + 0.1 * x.mean(0)).detach()
        memory = torch.tanh(self.linear(x - self.mean) + memory)
        return memory.square().sum(), memory


@pytest.mark.parametrize("measure_at", [0, 2])
def test_the_run_that_measures_for_a_budget_does_not_change_the_rollout(measure_at):
    """It is one run more, which a state of the cell's own would remember."""
    start = torch.zeros(2, 3).double()
    with pytest.raises(RuntimeError, match=rf"segment {measure_at} differs .* a tensor that it keeps"):
        replay.memory_replay(Averaging(), xs(2, 3), start, schedule=replay.Budget(10**9), measure_at=measure_at)


@pytest.mark.parametrize("schedule", [replay.EveryMemory(), replay.EveryMemory(graphs=9), replay.Budget(10**9)])
@pytest.mark.parametrize("count", [2, 3])
def test_memory_that_is_changed_in_place_from_the_second_segment_on(count, schedule):
    linear = nn.Linear(3, 3).double()

    def cell(x, memory):
        if memory is None:
            return None, linear(x)
        memory.add_(linear(x))
        return memory.sum(), memory

    with pytest.raises(ValueError, match=r"(?s)changed its memory.* in place in segment \d"):
        replay.memory_replay(cell, xs(2, 3)[:count], None, params=linear, schedule=schedule).loss.backward()


def test_a_segment_that_the_cell_changes_in_place():
    linear = nn.Linear(3, 3).double()

    def cell(x, memory):
        memory = torch.tanh(linear(x.sub_(x.mean())) + memory)
        return memory.sum(), memory

    rollout = replay.memory_replay(cell, xs(2, 3), torch.zeros(2, 3).double(), params=linear)
    with pytest.raises(RuntimeError, match="changed in place, by the cell itself or after it was recorded"):
        rollout.loss.backward()


class Freezing(nn.Module):
    """Puts a part of itself to rest, as long as it runs and after that."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.part = nn.Linear(3, 3).double(), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()
        self.how = how

    def forward(self, x, memory):
        self.part.eval() if self.how == "eval" else self.part.requires_grad_(False)
        memory = torch.tanh(self.linear(self.part(x)) + memory)
        return memory.square().sum(), memory


@every_schedule
@pytest.mark.parametrize("how", ["eval", "freeze"])
def test_modes_that_the_cell_sets_stay(how, schedule):
    cell = Freezing(how)
    replay.memory_replay(cell, xs(2, 3), torch.zeros(2, 3).double(), schedule=SCHEDULES[schedule]).loss.backward()
    assert cell.training
    assert cell.part.training == (how != "eval")
    assert all(p.requires_grad == (how == "eval") for p in cell.part.parameters())


@every_schedule
@pytest.mark.parametrize(
    "operation",
    [lambda h, table: h * torch.from_dlpack(table), lambda h, table: h * float(table.numpy().sum())],
    ids=["dlpack", "numpy"],
)
def test_a_constant_of_the_memory_whose_gradient_nobody_can_have(operation, schedule):
    def make():
        linear = nn.Linear(3, 3).double()

        def cell(x, memory):
            h = torch.tanh(linear(x) + operation(memory["h"], memory["table"]))
            return h.sum(), {"h": h, "table": memory["table"]}

        memory = {"h": torch.zeros(2, 3).double(), "table": torch.rand(3).double()}
        return Case(cell, xs(2, 3), memory, params=linear, modules=[linear])

    hold_against_a_loop(make, schedule, on_memory=False)
