"""What a captured step reads besides its inputs: it stays where it was, or its change is followed."""

from __future__ import annotations

import contextlib
import gc
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

from helpers import lively
from memformer import checks, memory_replay_backprop, replay
from memformer.replay import capture
from memformer.replay.inputs import captured_modules
from memformer.replay.places import Read
from memformer.training.capturing import _pinned
from pretend_card import CPU, NOTHING_FROZEN, PretendCard, pretend_a_card
from strict_card import StrictCard, strict_card

__all__ = ["strict_card"]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> type[PretendCard]:
    if device.type != "cpu":
        pytest.skip("the CPU stands for a card here")
    return pretend_a_card(monkeypatch)


def test_a_table_that_another_shape_replaces_stays_as_long_as_its_graph(pretend: type[PretendCard]) -> None:
    """Kernels read the table of then, which nobody else holds."""
    tables: list[Tensor] = []
    weight = torch.ones((), requires_grad=True)

    def step(x: Tensor) -> Tensor:
        if not tables or len(tables[0]) < len(x):
            tables[:] = [torch.arange(len(x), dtype=torch.float32)]
        loss = (weight * x * tables[0][: len(x)]).sum()
        loss.backward()
        return loss

    launched = replay.captured(step, torch.ones(3), mode="on")
    first = StorageWeakRef(tables[0].untyped_storage())
    launched.prepare(torch.ones(5))
    with NOTHING_FROZEN():  # what stands for a graph refers to itself
        gc.collect()
        assert not first.expired()
        launched.forget()
        gc.collect()
        assert first.expired()


def test_nothing_that_a_run_makes_is_held(pretend: type[PretendCard], monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []
    keep = Read.keep
    monkeypatch.setattr(Read, "keep", lambda self: (keep(self), held.extend(self._held))[0])
    weight, constant = torch.ones(100, requires_grad=True), torch.ones(7)

    def step(x: Tensor) -> Tensor:
        cycle: list[Any] = [weight * x]
        cycle.append(cycle)
        loss = cycle[0].square().sum() * constant.sum()
        loss.backward()
        return loss

    replay.captured(step, torch.ones(1), mode="on")
    # Among them the input of the graph, and torch's own seed of backward at most.
    assert sorted(x.nbytes() for x in held if x.nbytes() > 4) == [7 * 4, 100 * 4]


def test_what_lies_elsewhere_and_was_changed_is_captured_anew(strict_card: type[StrictCard]) -> None:
    """A kernel is given a number of the CPU as it is. Here the CPU is the card, and a meta tensor lies elsewhere."""
    elsewhere = torch.zeros((), device="meta")
    weight = torch.ones(2, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        elsewhere * 2
        loss = (weight * x).sum()
        loss.backward()
        return loss

    launched = replay.captured(step, mode="on")
    for times in (1, 2):
        for _ in range(2):
            launched(torch.ones(2))
        assert strict_card.records == times
        elsewhere.mul_(2)
    assert_close(weight.grad, torch.full((2,), 4.0))


class ChangesUnseen(nn.Module):
    """Its buffer changes without a new version."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mean", torch.ones(2))

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.tanh(self.linear(segment + memory) * self.mean)
        self.mean.data.mul_(0.5).add_(segment.mean(0))
        return memory.square().sum(), memory


@pytest.mark.parametrize("method", [replay.memory_replay, replay.full_bptt])
def test_a_buffer_that_changes_unseen(strict_card: type[StrictCard], method: Any) -> None:
    """Nobody can look for it in the capture, so what the first run found is known there."""
    options = {} if method is replay.full_bptt else {"schedule": replay.EveryMemory(graphs=0)}
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        cell = ChangesUnseen()

        def step(segments: Tensor, memory: Tensor, cell: nn.Module = cell) -> Tensor:
            rollout = method(cell, list(segments), memory, **options)
            rollout.loss.backward()
            return rollout.loss

        call: Any = replay.captured(step, mode="on") if captured else step
        losses = [call(torch.randn(4, 3, 2), torch.zeros(3, 2)).detach() for _ in range(3)]
        results.append((losses, [p.grad for p in cell.parameters()], cell.mean))
    assert_close(results[1], results[0])


def test_defaults_of_arguments_are_seen_beside_attributes_of_the_same_name() -> None:
    layer, last, own = (nn.Linear(1, 1) for _ in range(3))

    class Step:
        def __init__(self, model: nn.Module):
            self.model = model

        def step(self, x: Tensor, model: nn.Module = layer, *, other: nn.Module = last) -> Tensor:
            return x

    seen = captured_modules(Step(own).step)
    assert all(any(x is module for x in seen) for module in (own, layer, last))


def test_ignored_targets_are_masked_where_nobody_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a capture; the first batches may have none of them."""
    found = []
    for values in (True, False):
        if not values:
            monkeypatch.setattr(checks, "has_values", lambda x: False)
        torch.manual_seed(0)
        model = lively()
        src, tgt = torch.randint(1, 9, (2, 12)), torch.randint(1, 9, (2, 6))
        tgt[0, 4:] = -100
        loss, _ = memory_replay_backprop(model, src, tgt)
        found.append((loss, [p.grad for p in model.parameters()]))
    assert_close(found[1], found[0])


def test_inputs_begin_each_run_before_a_capture_as_they_were_given(pretend: type[PretendCard]) -> None:
    """One that counts would leave a table in the second run."""
    table = torch.ones(2, requires_grad=True)

    def step(position: Tensor) -> Tensor:
        loss = table[position].sum()
        loss.backward()
        position.add_(1)
        return loss

    position = torch.zeros(1, dtype=torch.int64)
    launched = replay.captured(step, mode="on")
    assert [float(launched(position)) for _ in range(2)] == [1.0, 1.0]
    assert (launched.launches, int(position)) == (2, 2)
    assert_close(table.grad, torch.ones(2))


def test_a_graph_that_is_dropped_lets_go_of_gradients(pretend: type[PretendCard]) -> None:
    """They lie in memory that the graphs which stay may use."""
    one, other = (torch.ones(n, requires_grad=True) for n in (2, 3))

    def step(x: Tensor) -> Tensor:
        loss = ((one if len(x) == 2 else other) * x).sum()
        loss.backward()
        return loss

    launched = replay.captured(step, mode="on")
    launched(torch.ones(3))
    launched(torch.ones(2))
    own = one.grad
    one.data = one.data.clone()
    launched(torch.ones(2))
    assert one.grad is not own
    assert_close(one.grad, torch.full((2,), 2.0))


# --- What Python does on a card, with nothing of a card ---------------------------------------------------------------


def test_calls_that_wait_are_refused_in_the_last_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch lets them through there; in a capture they would spoil more than the capture."""
    monkeypatch.setattr(capture, "_waiting", lambda mode: contextlib.nullcontext())
    waits = [(owner, owner.synchronize) for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream)]
    with capture._waiting_refused():
        for owner, _ in waits:
            with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
                owner.synchronize()
    assert all(owner.synchronize is own for owner, own in waits)


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_fails_is_waited_for_as_well(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Else what it has begun could come after what is put back."""
    calls: list[str] = []

    def stream(name: str) -> Any:
        return types.SimpleNamespace(wait_stream=lambda of: calls.append(f"{name} waits for {of.name}"), name=name)

    @contextlib.contextmanager
    def entered(*_: Any) -> Iterator[None]:
        yield

    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, entered)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream("here"))
    monkeypatch.setattr(capture, "_stream", lambda index: stream("there"))
    monkeypatch.setattr(capture, "_waiting", entered)

    def function() -> int:
        calls.append("runs")
        return 1 // (not fails)

    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        assert capture.Card(CPU).rehearse(function) == 1
    assert calls == ["there waits for here", "runs", "here waits for there"]


def test_parts_of_a_batch_are_contiguous_before_they_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    pinned = _pinned(torch.zeros(3, 5)[:, 1:], torch.device("cuda"))
    assert pinned is not None
    assert pinned.is_contiguous()


def test_what_is_alive_is_found_by_its_class_alone() -> None:
    class Posing:
        """Says that it is a tensor, and would be found by ``isinstance``."""

        __class__ = Tensor  # type: ignore[assignment]

    class Kind(nn.Parameter):
        pass

    posing, kind = Posing(), Kind(torch.ones(1))
    found = {id(x) for x in capture._alive(Tensor)}
    assert id(kind) in found
    assert id(posing) not in found
