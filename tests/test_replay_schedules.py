"""Schedules are integers: legal, within their bounds, and optimal by an independent dynamic programme."""

import dataclasses
import functools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer.replay import Binomial, Budget, EveryKth, EveryMemory, Offload


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
        "at most 4 stored memories on the CPU and 1 live graphs, 10.0 MB"
    )
    assert "MB" not in str(EveryMemory().plan(3))


def test_published_count():
    """Binomial(44) for 1024 segments: 2.96 evaluations per segment, the number that JAX users know."""
    assert round(Binomial(44).plan(1024).evaluations / 1024, 2) == 2.96
    assert math.comb(44 + 2, 2) > 1024
