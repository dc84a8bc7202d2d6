"""What is alive and when: one segment's graph, whatever the number of segments; and who is visited in which order."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from memformer import replay
from memformer.bench.meters import peak_bytes


class Counted(nn.Module):
    """Notes which segment it visits, and with or without a graph."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.visits: list[tuple[int, bool]] = []

    def forward(self, segment, memory):
        self.visits.append((int(segment[0, 0]), torch.is_grad_enabled()))
        memory = torch.tanh(self.linear(memory + segment))
        return memory.square().sum(), memory


def segments(count):
    return [torch.full((2, 8), float(t)) for t in range(count)]


def test_visits_forward_without_graph_then_back_with_one():
    """The first segment has one, which nobody keeps unless the cell does."""
    cell = Counted()
    replay.memory_replay(cell, segments(4), torch.zeros(2, 8)).loss.backward()
    assert cell.visits == [(0, True), (1, False), (2, False), (3, True), (2, True), (1, True), (0, True)]


def test_readout_runs_once_with_gradients_after_all_cells():
    cell, calls = Counted(), []
    head = nn.Linear(8, 1)

    def encode(segment, memory):
        _, memory = cell(segment, memory)
        return memory, memory

    def read_out(values, parts):
        calls.append((len(cell.visits), [int(p[0, 0]) for p in parts], torch.is_grad_enabled()))
        return head(torch.cat(values)).sum()

    rollout = replay.memory_replay(
        encode, segments(5), torch.zeros(2, 8), read_out, readout_segments=2, params=[cell, head]
    )
    rollout.loss.backward()
    assert calls == [(5, [0, 1], True), (5, [2, 3], True), (5, [4], True)]


def live_tensors(run):
    """The most tensors that autograd holds at once, while ``run`` runs."""
    alive: set[int] = set()
    most = 0

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        nonlocal most
        held = Held(tensor.detach())
        alive.add(id(held))
        most = max(most, len(alive))
        weakref.finalize(held, alive.discard, id(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        run()
    return most


@pytest.mark.parametrize("readout", [None, lambda values, parts: sum(v.square().sum() for v in values)])
def test_live_graph_does_not_grow_with_the_horizon(readout):
    def run(method, count):
        cell = Counted()

        def encode(segment, memory):
            loss, memory = cell(segment, memory)
            return (loss if readout is None else memory), memory

        return live_tensors(
            lambda: method(encode, segments(count), torch.zeros(2, 8), readout, params=cell).loss.backward()
        )

    few, many = run(replay.memory_replay, 4), run(replay.memory_replay, 64)
    assert few == many > 0
    assert run(replay.full_bptt, 64) > 10 * many  # the count can grow


def test_a_graph_is_freed_before_the_next_is_built():
    """Two graphs alive at once would double the peak."""
    one = live_tensors(lambda: Counted()(segments(1)[0], torch.zeros(2, 8))[0].backward())
    cell = Counted()
    rollout = lambda: replay.memory_replay(cell, segments(9), torch.zeros(2, 8)).loss.backward()  # noqa: E731
    assert live_tensors(rollout) <= one + 1  # and the sum of two losses


@pytest.mark.parametrize("where", ["cell", "readout"])
def test_one_set_of_parameter_gradients_and_no_second(where, monkeypatch):
    """A large gradient is added to its sum as soon as it is there: many large parameters, tiny graphs."""
    monkeypatch.setattr("memformer.replay.gradients.ADDED_AFTERWARDS", 16 * 1024)
    layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(8))

    def all_layers(x):
        for layer in layers:
            x = layer(x)
        return x.square().sum()

    def cell(x, memory):
        return (all_layers(memory + x) if where == "cell" else memory + x), memory

    def read_out(values, parts):
        return all_layers(values[0])

    xs = list(torch.ones(6, 1, 64))

    def step():
        readout = None if where == "cell" else read_out
        replay.memory_replay(cell, xs, torch.zeros(1, 64), readout, params=layers).loss.backward()

    one_set = 8 * 64 * 64 * 4
    peak = peak_bytes(step, torch.device("cpu"))
    assert one_set < peak < 1.5 * one_set


def test_backward_frees_the_recorded_memories():
    cell = Counted()
    seen = []

    def encode(segment, memory):
        loss, after = cell(segment, memory)
        seen.append(weakref.ref(after))
        return loss, after

    rollout = replay.memory_replay(encode, segments(4), torch.zeros(2, 8), params=cell)
    rollout.loss.backward()
    final = rollout.memory
    loss = rollout.loss
    del rollout
    held = [ref() for ref in seen]
    assert sum(x is not None for x in held) <= 1, "a memory outlived its backward"
    assert final.shape == (2, 8)
    assert loss.dim() == 0


def test_the_values_are_freed_once_the_readout_has_run():
    cell, seen = Counted(), []

    def encode(segment, memory):
        _, memory = cell(segment, memory)
        if torch.is_grad_enabled():
            return 2 * memory, memory
        array = np.empty((2, 8), np.float32)  # lives as long as the tensor's storage
        seen.append(weakref.ref(array))
        return torch.from_numpy(array).copy_(2 * memory), memory

    def read_out(values, parts):
        return sum(value.square().sum() for value in values)

    schedule = replay.EveryMemory(graphs=0)
    rollout = replay.memory_replay(
        encode, segments(4), torch.zeros(2, 8), read_out, params=cell, schedule=schedule, readout_segments=2
    )
    assert all(ref() is None for ref in seen)
    rollout.loss.backward()
