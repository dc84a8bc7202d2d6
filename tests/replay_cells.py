"""Recurrent cells over different pytrees, and one way to run and compare them: shared by the tests of the replay."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from memformer import replay

DIM = 4


class LSTMOverChunks(nn.Module):
    """Segment (batch, length, DIM), memory a tuple of two tensors."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.rnn = nn.LSTM(DIM, DIM, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, segment: Tensor, memory: tuple[Tensor, Tensor]):
        out, memory = self.rnn(self.dropout(segment), memory)
        return self.dropout(out), memory

    def memory(self, batch: int) -> Any:
        return torch.randn(1, batch, DIM), torch.randn(1, batch, DIM)

    def segment(self, batch: int, length: int) -> Any:
        return torch.randn(batch, length, DIM)


class GRUOverChunks(LSTMOverChunks):
    """Segment (batch, length, DIM), memory one tensor."""

    def __init__(self, dropout: float = 0.0):
        super().__init__(dropout)
        self.rnn = nn.GRU(DIM, DIM, batch_first=True)

    def memory(self, batch: int) -> Any:
        return torch.randn(1, batch, DIM)


class DictCell(nn.Module):
    """A hand-written cell: dicts with ``None`` and integer leaves everywhere, two outputs, one of them of integers."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(7, DIM)
        self.mix = nn.Linear(2 * DIM, DIM)
        self.frozen = nn.Linear(DIM, DIM).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, segment: dict, memory: dict):
        x = self.embedding(segment["ids"]).mean(1) + segment["x"].mean(1)
        state = torch.tanh(self.mix(torch.cat([self.dropout(x), memory["state"]], -1)))
        out = self.frozen(state)[:, None] * segment["x"]
        after = {"state": state, "steps": memory["steps"] + 1, "nothing": None, "constant": memory["constant"]}
        return {"out": out, "counts": segment["ids"].sum(1)}, after

    def memory(self, batch: int) -> Any:
        return {
            "state": torch.randn(batch, DIM),
            "steps": torch.zeros(batch, dtype=torch.long),
            "nothing": None,
            "constant": torch.randn(1, DIM),
        }

    def segment(self, batch: int, length: int) -> Any:
        return {"ids": torch.randint(0, 7, (batch, length)), "x": torch.randn(batch, length, DIM), "note": None}


CELLS: dict[str, Callable[[float], nn.Module]] = {"lstm": LSTMOverChunks, "gru": GRUOverChunks, "dict": DictCell}


class WithLosses(nn.Module):
    """Turns a cell's output into a loss at some segments, ``None`` at the others."""

    def __init__(self, cell: nn.Module, wanted: Sequence[bool]):
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(DIM, 3)
        self.wanted = wanted

    def forward(self, segment: tuple, memory: Any):
        index, inner = segment
        value, memory = self.cell(inner, memory)
        return (self.loss(value, index) if self.wanted[index] else None), memory

    def loss(self, value: Any, index: int) -> Tensor:
        out = value["out"] if isinstance(value, dict) else value
        return F.mse_loss(
            self.head(self.cell.dropout(out)), torch.full((), float(index)).to(out).expand(*out.shape[:2], 3)
        )

    def read_out(self, values: list, segments: list) -> Tensor | None:
        losses = [self.loss(v, i) for v, (i, _) in zip(values, segments, strict=True) if self.wanted[i]]
        return torch.stack(losses).sum() if losses else None

    def encode(self, segment: tuple, memory: Any):
        return self.cell(segment[1], memory)


def problem(kind: str, wanted: Sequence[bool], *, batch=2, length=3, dropout=0.0, seed=0, inputs_need_grad=True):
    """``(model, segments, memory)`` in float64; memory and segments are leaves that require a gradient, if wanted."""
    torch.manual_seed(seed)
    model = WithLosses(CELLS[kind](dropout), wanted).double()

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.double().requires_grad_(inputs_need_grad)

    segments = [(i, tree_map(leaf, model.cell.segment(batch, length))) for i in range(len(wanted))]
    return model, segments, tree_map(leaf, model.cell.memory(batch))


def outcome(model: nn.Module, segments: list, memory: Any, run: Callable[[], tuple[Tensor, Any]]) -> dict[str, Any]:
    """Run from a fixed seed and back-propagate: everything that two methods must agree on."""
    for x in [*model.parameters(), *tree_leaves((segments, memory))]:
        if isinstance(x, Tensor):
            x.grad = None
    torch.manual_seed(5)
    loss, after = run()
    random_after_forward = torch.get_rng_state()
    loss.backward()
    assert torch.equal(random_after_forward, torch.get_rng_state()), "backward moved the generator"
    trained = {name: p.grad for name, p in model.named_parameters()}
    given = [x.grad for x in tree_leaves((segments, memory)) if isinstance(x, Tensor)]
    return {"loss": loss, "memory": after, "parameters": trained, "inputs": given, "random": random_after_forward}


def assert_equal(actual: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-12, atol: float = 1e-13) -> None:
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, e, rtol=rtol, atol=atol)


def final_memory_loss(memory: Any) -> Tensor:
    """A loss on the memory after a rollout: it stays differentiable."""
    leaves = [x for x in tree_leaves(memory) if isinstance(x, Tensor) and x.is_floating_point()]
    return sum((x.square().sum() for x in leaves), torch.zeros((), dtype=torch.float64))


def by(method: Callable, model: WithLosses, segments: list, memory: Any, at_once: int | None, **options: Any):
    """A rollout with the loss in the cell (``at_once`` is None) or in a readout, plus a loss on the final memory."""

    def run() -> tuple[Tensor, Any]:
        if at_once is None:
            rollout = method(model, segments, memory, **options)
        else:
            rollout = method(
                model.encode, segments, memory, model.read_out, readout_segments=at_once, params=[model], **options
            )
        return rollout.loss + final_memory_loss(rollout.memory), rollout.memory

    return outcome(model, segments, memory, run)


def same_as_bptt(model: WithLosses, segments: list, memory: Any, at_once: int | None = None, **options: Any) -> None:
    expected = by(replay.full_bptt, model, segments, memory, at_once)
    assert_equal(by(replay.memory_replay, model, segments, memory, at_once, **options), expected)
