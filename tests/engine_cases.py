"""One way to hold a replay against a plain loop that shares no code with it, under schedules that differ in kind."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memformer import replay

SCHEDULES: dict[str, replay.Schedule] = {
    "default": replay.EveryMemory(),
    "no graphs": replay.EveryMemory(graphs=0),
    "binomial": replay.Binomial(2),
    "all graphs": replay.EveryMemory(graphs=99),
}


@dataclasses.dataclass
class Case:
    """A rollout to run, and the tensors whose gradients are compared."""

    cell: Callable
    segments: list
    memory: Any
    params: Any = ()
    wanted: Sequence[Tensor] = ()
    readout: Callable | None = None
    between: Callable[[], None] = lambda: None  # what happens between forward and backward
    modules: Sequence[nn.Module] = ()  # their buffers are compared, too

    def trained(self) -> list[Tensor]:
        """What is compared: ``wanted``, and the parameters of the modules."""
        owned = [p for module in self.modules for p in module.parameters()]
        return [*self.wanted, *owned]


def by_loop(case: Case) -> replay.Rollout:
    """Plain autograd, written anew: nothing of the engine is used."""
    memory, values = case.memory, []
    for segment in case.segments:
        value, memory = case.cell(segment, memory)
        values.append(value)
    if case.readout is None:
        losses = values
    else:
        losses = [case.readout([v], [s]) for v, s in zip(values, case.segments, strict=True)]
    return replay.Rollout(sum(loss for loss in losses if loss is not None), memory)


def outcome(case: Case, method: Callable[[Case], replay.Rollout], on_memory: bool) -> list[Tensor | None]:
    """Loss, final memory, random numbers, gradients and buffers: everything that must agree."""
    torch.manual_seed(7)
    rollout = method(case)
    loss = rollout.loss
    floats = [x for x in tree_leaves(rollout.memory) if isinstance(x, Tensor) and x.is_floating_point()]
    if on_memory:
        loss = loss + 0.1 * sum(x.square().sum() for x in floats)
    random = torch.rand(())
    case.between()
    if loss.requires_grad:
        loss.backward()
    grads = [g.to_dense() if g is not None and g.is_sparse else g for g in (x.grad for x in case.trained())]
    buffers = [b.clone() for module in case.modules for b in module.buffers()]
    return [rollout.loss.detach(), *(x.detach() for x in floats), random, *buffers, *grads]


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None], rtol: float, atol: float) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:  # a gradient of zeros is as good as none
            assert all(x is None or not x.count_nonzero() for x in (a, e))
        else:
            torch.testing.assert_close(a, e, rtol=rtol, atol=atol, equal_nan=True)


def hold_against_a_loop(
    make: Callable[[], Case],
    schedule: str | replay.Schedule,
    *,
    accumulate: bool = True,
    on_memory: bool = True,
    rtol: float = 1e-12,
) -> None:
    """``make`` builds the same case anew each time, so that buffers and modes start alike."""
    chosen = SCHEDULES[schedule] if isinstance(schedule, str) else schedule

    def replayed(case: Case) -> replay.Rollout:
        options = {"schedule": chosen, "params": case.params}
        return replay.memory_replay(case.cell, case.segments, case.memory, case.readout, **options)

    def accumulated(case: Case) -> replay.Rollout:
        options = {"schedule": chosen, "params": case.params}
        return replay.accumulate(case.cell, case.segments, case.memory, case.readout, **options)

    expected = outcome(fresh(make), by_loop, on_memory)
    assert any(g is not None and g.count_nonzero() for g in expected[-len(fresh(make).trained()) :])
    assert_same(outcome(fresh(make), replayed, on_memory), expected, rtol, 1e-13)
    if accumulate:
        expected = outcome(fresh(make), by_loop, False)
        assert_same(outcome(fresh(make), accumulated, False), expected, rtol, 1e-13)


def fresh(make: Callable[[], Case]) -> Case:
    torch.manual_seed(11)
    return make()
