"""Schedules are integers: legal, within their bounds, and optimal by an independent dynamic programme."""

import dataclasses
import functools
import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memformer import replay
from memformer.replay import Action, Binomial, Budget, EveryKth, EveryMemory, Offload, Plan


@functools.cache
def fewest_advances(segments: int, memories: int) -> int:
    """Reverse ``segments`` from a stored memory with ``memories`` slots, that one included: all ways are tried."""
    if segments == 1:
        return 0
    if memories == 1:
        return segments - 1 + fewest_advances(segments - 1, 1)
    return min(
        stretch + fewest_advances(segments - stretch, memories - 1) + fewest_advances(stretch, memories)
        for stretch in range(1, segments)
    )


def simulate(plan):
    """Carry a plan out on numbers, and return how many memories were stored and graphs alive at most."""
    at, stored, graphs, done = 0, set(), [], []
    most_stored = most_graphs = 0
    for number, (kind, t) in enumerate(plan.recording + plan.replay):
        if number == len(plan.recording):
            assert at == plan.num_segments, "the recording reaches the final memory"
        if kind == "load":
            assert t in stored
            at = t
        elif kind == "store":
            assert at == t
            assert t not in stored
            stored.add(t)
        elif kind == "drop":
            stored.remove(t)
        elif kind == "backward":
            assert t == plan.num_segments - 1 - len(done), "from the last to the first"
            assert graphs.pop() == t
            done.append(t)
        else:
            assert at == t
            at += 1
            if kind == "graph":
                graphs.append(t)
        most_stored, most_graphs = max(most_stored, len(stored)), max(most_graphs, len(graphs))
    assert len(done) == plan.num_segments
    assert not stored
    assert not graphs
    recorded = [a.segment for a in plan.recording if a.kind in ("advance", "graph")]
    assert recorded == list(range(plan.num_segments)), "the forward pass runs every segment once"
    assert (most_stored, most_graphs) == (plan.stored_memories, plan.live_graphs)
    return most_stored, most_graphs


schedules = st.one_of(
    st.builds(EveryMemory, st.integers(0, 12)),
    st.builds(EveryKth, st.integers(1, 12), st.integers(0, 12)),
    st.builds(Binomial, st.integers(1, 9), st.integers(0, 12)),
)


@settings(max_examples=300, deadline=None)
@given(schedules, st.integers(1, 60))
def test_every_plan_is_legal_and_says_what_it_costs(schedule, num_segments):
    plan = schedule.plan(num_segments, memory_bytes=10, graph_bytes=1000)
    memories, graphs = simulate(plan)
    assert graphs == max(1, min(schedule.graphs, num_segments))
    assert 1000 * graphs <= plan.bytes <= 1000 * graphs + 10 * memories


@settings(max_examples=500, deadline=None)
@given(schedules, st.integers(1, 150))
def test_what_is_known_of_a_plan_is_what_its_actions_come_to(schedule, num_segments):
    """Costs are known in closed form: no action is made for them."""
    for there in (schedule, Offload(schedule)):
        plan = there.plan(num_segments, memory_bytes=7, graph_bytes=10)
        assert plan.counts is not None
        counted = dataclasses.replace(plan, counts=None)
        assert plan == counted
        for name in ("evaluations", "stored_memories", "live_graphs", "bytes"):
            assert getattr(plan, name) == getattr(counted, name), name


def test_a_fetched_memory_is_on_the_device():
    """One, in backward; and none is stored there."""
    assert Offload(EveryMemory()).plan(9, 10, 1000).bytes == 1010
    assert Offload(EveryMemory(graphs=0)).plan(9, 10, 1000).bytes == 1010
    assert Offload(EveryMemory(graphs=4)).plan(9, 10, 1000).bytes == 4000
    assert Offload(EveryMemory(graphs=9)).plan(9, 10, 1000).bytes == 9000


@pytest.mark.parametrize(
    "schedule",
    [
        EveryMemory(),
        EveryMemory(graphs=0),
        EveryKth(316),
        Binomial(1),
        Binomial(16),
        Binomial(50_000, graphs=1000),
        *(Budget(bytes) for bytes in (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)),
        Offload(Binomial(100)),
    ],
)
@pytest.mark.parametrize("sizes", [(100, 9900), (1000, 1000), (5000, 1), (1, 5000), (4000, 5000)])
def test_a_plan_of_many_segments_costs_nothing_until_it_is_carried_out(schedule, sizes):
    """Each of these has hundreds of thousands of actions, one has five billion."""
    start = time.perf_counter()
    plan = schedule.plan(100_000, *sizes)
    assert str(plan)
    assert repr(plan)
    first = [next(iter(plan.recording)), next(iter(plan.replay))]
    assert time.perf_counter() - start < 1, "milliseconds, on a machine at rest"
    assert first[1] == ("backward", 99_999) or schedule == EveryMemory(graphs=0)


def test_actions_are_like_a_tuple():
    plan = EveryMemory().plan(3)
    recording = tuple(plan.recording)
    assert recording == (("store", 0), ("advance", 0), ("store", 1), ("advance", 1), ("graph", 2))
    assert (plan.recording[-1], plan.recording[1:3], len(plan.recording)) == (recording[-1], recording[1:3], 5)
    assert plan.recording == recording
    assert plan.recording != plan.replay
    assert plan.recording + plan.replay == recording + tuple(plan.replay)
    assert hash(plan) == hash(Binomial(2).plan(3))


def test_a_plan_of_ones_own_is_counted():
    actions = (Action("store", 0), Action("advance", 0), Action("graph", 1))
    back = (Action("backward", 1), Action("load", 0), Action("graph", 0), Action("backward", 0), Action("drop", 0))
    plan = Plan(num_segments=2, recording=actions, replay=back, memory_bytes=10, graph_bytes=100)
    assert simulate(plan) == (1, 1)
    assert (plan.evaluations, plan.bytes) == (3, 110)


@pytest.mark.parametrize("memories", range(1, 9))
def test_binomial_is_optimal(memories):
    for num_segments in range(1, 65):
        plan = Binomial(memories).plan(num_segments)
        assert plan.evaluations == num_segments + fewest_advances(num_segments, memories)
        assert simulate(plan)[0] <= memories


@pytest.mark.parametrize("graphs", [2, 5])
def test_binomial_with_a_tail_of_graphs_is_optimal(graphs):
    """The tail counts as one segment, the last."""
    for memories in (1, 2, 3, 5):
        for num_segments in range(graphs, 40):
            plan = Binomial(memories, graphs).plan(num_segments)
            assert plan.evaluations == num_segments + fewest_advances(num_segments - graphs + 1, memories)
            assert simulate(plan)[0] <= memories


def test_every_memory():
    plan = EveryMemory().plan(16)
    assert (plan.evaluations, plan.stored_memories, plan.live_graphs) == (31, 15, 1)
    assert EveryMemory().plan(16) == dataclasses.replace(Binomial(15).plan(16))
    assert EveryMemory(graphs=4).plan(16).evaluations == 28
    assert EveryMemory(graphs=0).plan(16).evaluations == 32
    assert all(action.kind != "graph" for action in EveryMemory(graphs=0).plan(16).recording)
    all_graphs = EveryMemory(graphs=1000).plan(16)
    assert (all_graphs.evaluations, all_graphs.stored_memories, all_graphs.live_graphs) == (16, 0, 16)


def test_every_kth():
    plan = EveryKth(8).plan(64)
    assert plan.stored_memories <= 64 / 8 + 8
    assert plan.evaluations <= 3 * 64
    assert EveryKth(1).plan(20).evaluations == EveryMemory().plan(20).evaluations
    assert [a.segment for a in EveryKth(3).plan(10).recording if a.kind == "store"] == [0, 3, 6]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 24), st.integers(1, 50), st.integers(0, 300), st.integers(0, 1500))
def test_budget_fits_and_no_binomial_schedule_that_fits_is_faster(num_segments, memory_bytes, graph_bytes, spare):
    budget = graph_bytes + memory_bytes + spare
    plan = Budget(budget).plan(num_segments, memory_bytes, graph_bytes)
    simulate(plan)
    assert plan.bytes <= budget
    for graphs in range(1, num_segments + 1):
        for memories in range(1, num_segments + 1):
            if graphs * graph_bytes + memories * memory_bytes <= budget:
                assert plan.evaluations <= Binomial(memories, graphs).plan(num_segments).evaluations


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 400), st.integers(0, 50), st.integers(1, 300), st.integers(0, 20_000))
def test_budget_finds_the_best_number_of_graphs(num_segments, memory_bytes, graph_bytes, spare):
    """Also where there are many to choose from, as by trying them all."""
    budget = graph_bytes + memory_bytes + spare
    fewest = min(
        Binomial(max(1, memories), graphs).plan(num_segments).evaluations
        for graphs in range(1, min(num_segments, budget // graph_bytes) + 1)
        for memories in [(budget - graphs * graph_bytes) // memory_bytes if memory_bytes else num_segments]
        if memories or graphs == num_segments
    )
    plan = Budget(budget).plan(num_segments, memory_bytes, graph_bytes)
    assert plan.evaluations == fewest
    assert plan.bytes <= budget


def test_budget_refusals():
    with pytest.raises(ValueError, match=r"50 bytes hold less than one segment's graph and one memory, which need 110"):
        Budget(50).plan(4, 10, 100)
    with pytest.raises(ValueError, match="expected the sizes memory_bytes and graph_bytes, got 0"):
        Budget(50).plan(4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EveryMemory(-1),
        lambda: Binomial(1, graphs=-1),
        lambda: EveryKth(0),
        lambda: Binomial(-1),
        lambda: Budget(0),
        lambda: EveryKth(1.5),
    ],
)
def test_settings_are_checked(make):
    with pytest.raises(ValueError, match=r"expected an integer of at least [01], got"):
        make()


def test_plans_are_printable():
    plan = Offload(Binomial(4), to="cpu").plan(64, 1_000_000, 10_000_000)
    assert str(plan) == (
        f"64 segments: {plan.evaluations} evaluations ({plan.evaluations / 64:.2f} per segment), "
        "at most 4 stored memories on the CPU and 1 live graphs, 11.0 MB"
    )
    assert "MB" not in str(EveryMemory().plan(3))


def test_published_count():
    """Binomial(44) for 1024 segments: 2.96 evaluations per segment, the number that JAX users know."""
    assert round(Binomial(44).plan(1024).evaluations / 1024, 2) == 2.96
    assert math.comb(44 + 2, 2) > 1024


@pytest.mark.parametrize("to", ["cuda", "cuda:1", "mps"])
def test_an_offload_to_another_device_is_refused(to):
    with pytest.raises(ValueError, match=f"expected cpu or a folder, got '{to}'.* is ./{to}"):
        Offload(EveryMemory(), to)
    assert Offload(EveryMemory(), f"./{to}").plan(3).store_on == f"./{to}"


class InBlocks:
    """A schedule of somebody's own: it replays two segments with their graphs, then goes back through both."""

    needs_sizes = False

    def plan(self, num_segments, memory_bytes=0, graph_bytes=0):
        recording = [
            action
            for t in range(num_segments)
            for action in [*([Action("store", t)] if t % 2 == 0 else []), Action("advance", t)]
        ]
        kinds = [("load", 0), ("graph", 0), ("graph", 1), ("backward", 1), ("backward", 0), ("drop", 0)]
        blocks = reversed(range(0, num_segments, 2))
        return Plan(
            num_segments=num_segments,
            recording=recording,
            replay=[Action(kind, t + more) for t in blocks for kind, more in kinds],
        )


@pytest.mark.parametrize("losses", [counts for counts in itertools.product([True, False], repeat=4) if any(counts)])
def test_a_schedule_that_makes_several_graphs_at_once(losses):
    """Whether a segment's graph is needed is not known while those after it are still to be gone through."""
    torch.manual_seed(0)
    rnn = nn.GRUCell(2, 3).double()

    def cell(segment, memory):
        memory = rnn(segment["x"], memory)
        return (memory.square().mean() if segment["counts"] else None), memory

    segments = [{"x": torch.randn(2, 2, dtype=torch.float64), "counts": counts} for counts in losses]
    memory, total = torch.zeros(2, 3).double(), 0
    for segment in segments:
        loss, memory = cell(segment, memory)
        total = total if loss is None else total + loss
    expected = torch.autograd.grad(total, rnn.parameters())
    rollout = replay.memory_replay(cell, segments, torch.zeros(2, 3).double(), params=rnn, schedule=InBlocks())
    rollout.loss.backward()
    torch.testing.assert_close([p.grad for p in rnn.parameters()], list(expected), rtol=1e-12, atol=1e-14)
