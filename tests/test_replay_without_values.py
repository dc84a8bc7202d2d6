"""keep_values=False: the readout runs with the cell, so that of a segment only memory and loss are kept."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from helpers import tiny, tokens
from memformer import memory_replay_backprop, replay, rollouts
from memformer.bench.meters import peak_bytes
from memformer.data.segments import Segment
from replay_cells import CELLS, assert_equal, by, problem

SCHEDULES = [
    replay.EveryMemory(),
    replay.EveryMemory(graphs=0),
    replay.EveryMemory(graphs=3),
    replay.EveryKth(3),
    replay.Binomial(2),
    replay.Binomial(3, graphs=0),
    replay.Budget(6_000),
    replay.Offload(replay.EveryMemory()),
]
WANTED = [True, False, True, True, False, True, True]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_equals_bptt(kind: str, schedule: replay.Schedule, dropout: float) -> None:
    """Loss, memory, all gradients and the random numbers, with dropout in the cell and in the readout."""
    options = {"keep_values": False, "check": dropout > 0 and kind == "gru"}
    made = problem(kind, WANTED, dropout=dropout)
    expected = by(replay.full_bptt, *made, 1, **options)
    assert_equal(by(replay.memory_replay, *made, 1, schedule=schedule, **options), expected)
    if not dropout:  # then it does not matter when the readout runs
        assert_equal(by(replay.full_bptt, *made, 3), expected)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, -1.0, 0.0, 1.0, 3.0, 0.25]])
def test_weights_norms_and_accumulate(weights: list[float] | None) -> None:
    model, segments, memory = problem("gru", [True] * 7, inputs_need_grad=False)
    found = []
    for method, kept in ((replay.full_bptt, True), (replay.memory_replay, False), (replay.accumulate, False)):
        watch = replay.MemoryGradients()
        options = replay.Options(keep_values=kept, segment_weights=weights, memory_gradients=watch)
        rollout = method(model.encode, segments, memory, model.read_out, options=options, params=[model])
        if rollout.loss.requires_grad:
            rollout.loss.backward()
        found.append([rollout.loss.detach(), *(p.grad for p in model.parameters()), torch.tensor(watch.norms[1:])])
        model.zero_grad()
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])
