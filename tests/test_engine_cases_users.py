"""Cells as users write them, in which replay once was wrong without a word, or refused what plain autograd does."""

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from engine_cases import SCHEDULES, Case, hold_against_a_loop
from memformer import replay
from memformer.replay import engine

pytestmark = pytest.mark.usefixtures("float64")

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def segments(count: int = 5, batch: int = 3) -> list[Tensor]:
    return list(torch.randn(count, batch, 3))


class Recurrent(nn.Module):
    """A cell of any module of width 3: the new memory is the module's output for segment plus memory."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = torch.tanh(self.inner(segment + memory))
        return memory.square().sum(), memory


# --- Parameters that are others when backward comes


@pytest.mark.parametrize("rnn", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
@every_schedule
def test_parameters_that_were_swapped_for_the_forward_pass(frozen, rnn, schedule):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 3) if rnn else nn.Linear(3, 3)

        def step(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            out = self.rnn((segment + memory)[None])
            memory = torch.tanh(out[0][0])
            return memory.square().sum(), memory

    def make() -> Case:
        model = Model()
        model.requires_grad_(not frozen)
        others = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        swapped = contextlib.ExitStack()
        swapped.enter_context(_reparametrize_module(model, others))  # what torch.func.functional_call does
        own = dict(zip(others, others.values(), strict=True))
        return Case(
            model.step,
            segments(),
            torch.zeros(3, 3),
            wanted=list(own.values()),
            between=swapped.close,
        )

    hold_against_a_loop(make, schedule, accumulate=False)


def test_swapped_parameters_are_as_they_were_found_after_a_backward():
    cell = Recurrent(nn.Linear(3, 3))
    own = list(cell.parameters())
    others = {name: p.detach().clone().requires_grad_() for name, p in cell.named_parameters()}
    with _reparametrize_module(cell, others):
        rollout = replay.memory_replay(cell, segments(), torch.zeros(3, 3))
    rollout.loss.backward()
    assert all(p is q and p.grad is None for p, q in zip(cell.parameters(), own, strict=True))
    assert all(x.grad is not None for x in others.values())


# --- Modules that compute something else where no gradient is needed


@every_schedule
def test_the_fast_path_of_torchs_encoder_layers(schedule):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1)

        def forward(self, segment: tuple[Tensor, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
            x, padded = segment
            mask = F.pad(padded, (2, 0))
            hidden = self.encoder(torch.cat([memory, x], 1), src_key_padding_mask=mask)
            return hidden.square()[~mask].sum(), hidden[:, -2:] + hidden[:, :2]  # padded positions among them

    def make() -> Case:
        cell = Cell().eval()
        masks = [torch.zeros(2, 4, dtype=torch.bool) for _ in range(5)]
        masks[1][0, 2:] = True  # the segments that are compared with their recording have none
        parts = [(torch.randn(2, 4, 8), mask) for mask in masks]
        return Case(cell, parts, torch.zeros(2, 2, 8), modules=[cell])

    hold_against_a_loop(make, schedule)


# --- Statistics


class OwnNorm(nn.Module):
    """Running statistics in buffers of one's own: torch's function changes them without a new version."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=True) * (1 + self.mean.clone())


@every_schedule
def test_statistics_that_change_without_a_version(schedule):
    def make() -> Case:
        cell = Recurrent(nn.Sequential(nn.Linear(3, 3), OwnNorm()))
        return Case(cell, segments(), torch.zeros(3, 3), modules=[cell])

    hold_against_a_loop(make, schedule)


class Trainer:
    def __init__(self, model: nn.Module):
        self.model = model

    def step(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(segment, memory)


@pytest.mark.parametrize("how", ["closure", "attribute"])
@every_schedule
def test_the_state_of_modules_whose_parameters_are_named_one_by_one(how, schedule):
    def make() -> Case:
        model = Recurrent(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.3)))

        def cell(segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            return model(segment, memory)

        function = cell if how == "closure" else Trainer(model).step
        return Case(function, segments(), torch.zeros(3, 3), params=list(model.parameters()), modules=[model])

    hold_against_a_loop(make, schedule)


def test_a_captured_module_that_is_not_used_may_change():
    model, other = Recurrent(nn.Linear(3, 3)), nn.Linear(3, 3)

    def cell(segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return model(segment, memory) if memory is not None else other(segment)

    rollout = replay.memory_replay(cell, segments(), torch.zeros(3, 3), params=[model])
    with torch.no_grad():
        other.weight.add_(1)
    rollout.loss.backward()


# --- The glance at the first replayed segment


class Counting(nn.Module):
    """It keeps a counter, which replay cannot know."""

    def __init__(self, dtype: torch.dtype, value: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=dtype) / 2)
        self.value, self.calls = value, 0

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Any, Tensor]:
        self.calls += 1
        memory = (memory * self.weight + segment) * (self.weight + self.calls)
        return self.value(memory), memory


def masked(memory: Tensor) -> Tensor:
    return memory.masked_fill(torch.tensor([True, False, False]), -torch.inf)


@pytest.mark.parametrize("schedule", ["default", "no graphs", "binomial"])
@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.complex128, lambda memory: None), (torch.float64, masked)], ids=["complex", "masked"]
)
def test_what_the_glance_sees(dtype, value, schedule):
    cell = Counting(dtype, value)
    values, memory = replay.scan(cell, segments(), torch.zeros(3, 3, dtype=dtype), schedule=SCHEDULES[schedule])
    loss = memory.abs().sum() if dtype.is_complex else sum(v[:, 1:].sum() for v in values)
    with pytest.raises(RuntimeError, match="differs in replay from its recording"):
        loss.backward()


@every_schedule
def test_masked_values_are_no_difference(schedule):
    class Cell(Recurrent):
        def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            _, memory = super().forward(segment, memory)
            return masked(memory), memory

    def make() -> Case:
        cell = Cell(nn.Linear(3, 3))
        return Case(
            cell,
            segments(),
            torch.zeros(3, 3),
            modules=[cell],
            readout=lambda values, _: values[0].softmax(-1).square().sum(),
        )

    hold_against_a_loop(make, schedule)


# --- Leaves and gradients of other kinds


@every_schedule
def test_constant_leaves_of_a_memory_that_the_cell_makes(schedule):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, segment: Tensor, memory: Any) -> tuple[Tensor, Any]:
            hidden, weights = memory or (torch.zeros(3, 3), torch.tensor([1.0, 2.0, 0.5]))
            hidden = torch.tanh(self.inner(segment + hidden))
            return F.cross_entropy(hidden, torch.tensor([0, 1, 2]), weights), (hidden, weights)

    def make() -> Case:
        cell = Cell()
        return Case(cell, segments(), None, modules=[cell])

    hold_against_a_loop(make, schedule)


@pytest.mark.parametrize("dense", [(0,), (3, 4), (0, 4)])
@every_schedule
def test_a_tied_embedding_whose_gradients_are_sparse_in_some_segments(dense, schedule):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = nn.Embedding(7, 3, sparse=True), nn.Linear(3, 3)

        def forward(self, segment: tuple[Tensor, int], memory: Tensor) -> tuple[Tensor | None, Tensor]:
            ids, t = segment
            memory = torch.tanh(self.inner(self.embedding(ids) + memory))
            return (F.cross_entropy(memory @ self.embedding.weight.T, ids) if t in dense else None), memory

    def make() -> Case:
        cell = Cell()
        parts = [(torch.randint(7, (3,)), t) for t in range(5)]
        return Case(cell, parts, torch.zeros(3, 3), modules=[cell])

    hold_against_a_loop(make, schedule)


# --- What is left, and what is said


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_a_rollout_is_gone_when_nobody_holds_it(check, backward, monkeypatch):
    runs = []
    begin = engine.Run.record
    monkeypatch.setattr(engine.Run, "record", lambda run: runs.append(weakref.ref(run)) or begin(run))
    rollout = replay.memory_replay(Recurrent(nn.Linear(3, 3)), segments(), torch.zeros(3, 3), check=check)
    if backward:
        rollout.loss.backward()
    del rollout
    gc.collect()
    assert [run() for run in runs] == [None]


@pytest.mark.parametrize("method", [replay.memory_replay, replay.accumulate])
@pytest.mark.parametrize(
    ("readout", "remedy"),
    [
        (lambda values, _: values[0][0].mul_(2).sum(), "out-of-place"),
        (lambda values, _: F.cross_entropy(*values[0]), "detach constant ones"),
        (lambda values, _: values[0][0].sum() * values[0][2].numpy()[0], "detach constant ones"),
    ],
)
def test_what_a_readout_may_not_do_with_a_value_has_a_remedy(method, readout, remedy):
    cell = Recurrent(nn.Linear(3, 3))

    def step(segment: Tensor, memory: Tensor) -> tuple[Any, Tensor]:
        _, memory = cell(segment, memory)
        return (memory * 1, torch.tensor([0, 1, 2]), torch.ones(3)), memory

    with pytest.raises(RuntimeError, match=remedy):
        method(step, segments(), torch.zeros(3, 3), readout, params=[cell])


@pytest.mark.parametrize(
    ("memory", "initial", "lanes", "dim", "message"),
    [
        ((torch.zeros(2, 4, 3), torch.zeros(4)), (torch.ones(2, 4, 3), torch.ones(4)), [True] * 4, 1, "no lanes in"),
        (torch.zeros(()), torch.zeros(()), [True], 0, "no lanes in dimension 0"),
        (torch.zeros(1, 3), torch.zeros(4, 3), [True], 0, "initial: expected the shapes of the memory"),
        (torch.zeros(4, 3), None, [True] * 4, 0, "initial: expected a tensor"),
    ],
)
def test_resets_that_do_not_fit(memory, initial, lanes, dim, message):
    with pytest.raises(ValueError, match=message):
        replay.reset(memory, initial, torch.tensor(lanes), dim)


def test_lanes_that_are_no_tensor():
    with pytest.raises(ValueError, match="lanes: expected a boolean tensor"):
        replay.reset(torch.zeros(4, 3), torch.zeros(4, 3), [True] * 4)


def test_a_backward_that_was_interrupted_is_not_called_finished():
    class Cell(Recurrent):
        calls = 0

        def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
            self.calls += 1
            if self.calls == 7:
                raise KeyboardInterrupt
            return super().forward(segment, memory)

    rollout = replay.memory_replay(Cell(nn.Linear(3, 3)), segments(), torch.zeros(3, 3))
    with pytest.raises(KeyboardInterrupt):
        rollout.loss.backward()
    with pytest.raises(RuntimeError, match="begun, and failed"):
        rollout.loss.backward()


def test_verify_leaves_the_statistics_of_a_captured_module_alone():
    model = Recurrent(nn.BatchNorm1d(3))
    decorated = torch.enable_grad()(lambda segment, memory: model(segment, memory))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert replay.verify(decorated, segments(3), torch.zeros(3, 3), params=list(model.parameters())).ok
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())


# --- What is done to the inputs in between, what stays alive, and cells of other kinds


@every_schedule
def test_inputs_that_ask_for_a_gradient_later(schedule):
    """They get none, as from plain autograd, and the others get theirs."""
    torch.manual_seed(0)
    rnn = nn.GRUCell(3, 4)
    inputs, memory = segments(4, 2), torch.zeros(2, 4)
    for x in inputs[1:]:
        x.requires_grad_()

    def cell(segment, memory):
        memory = rnn(segment["x"], memory)
        return (memory.square().mean() if segment["counts"] else None), memory

    pairs = [{"x": x, "counts": t < 3} for t, x in enumerate(inputs)]
    total, state = 0, memory
    for pair in pairs[:3]:
        loss, state = cell(pair, state)
        total = total + loss
    expected = torch.autograd.grad(total, inputs[1:3])
    rollout = replay.memory_replay(cell, pairs, memory, params=rnn, schedule=SCHEDULES[schedule])
    inputs[0].requires_grad_()
    memory.requires_grad_()
    rollout.loss.backward()
    torch.testing.assert_close([x.grad for x in inputs[1:3]], list(expected), rtol=1e-12, atol=1e-14)
    assert inputs[0].grad is None
    assert memory.grad is None
    assert inputs[3].grad is None or not inputs[3].grad.any()


@pytest.mark.parametrize("readout", [False, True])
@every_schedule
def test_who_keeps_the_loss_does_not_keep_the_segments(schedule, readout):
    rnn = nn.GRUCell(3, 4)

    def cell(x, memory):
        memory = rnn(x, memory)
        return memory.square().mean(), memory

    inputs = segments(5, 2)
    read = (lambda values, _: sum(values)) if readout else None
    rollout = replay.memory_replay(cell, inputs, torch.zeros(2, 4), read, params=rnn, schedule=SCHEDULES[schedule])
    rollout.loss.backward()
    kept = [weakref.ref(x) for x in inputs]
    del inputs
    gc.collect()
    assert [ref() for ref in kept] == [None] * 5
    assert rollout.memory.shape == (2, 4)
    with pytest.raises(RuntimeError, match="already back-propagated"):
        rollout.loss.backward()


@pytest.mark.parametrize("kind", ["a module", "a list of parameters"])
def test_a_float16_readout_that_is_a_function(kind):
    """It runs again in backward, and meets the modules that it sees as they were: modes, and statistics once."""
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 4).half()
    decoder = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1)).half()
    params = [decoder, cell] if kind == "a module" else [*decoder.parameters(), *cell.parameters()]
    inputs, zeros = [x.half() for x in segments(4, 2)], torch.zeros(2, 4).half()

    def run(x, memory):
        memory = cell(x, memory)
        return memory, memory

    def readout(values, _):
        return decoder(values[0]).float().square().mean()

    torch.manual_seed(1)
    loss = replay.memory_replay(run, inputs, zeros, readout, params=params).loss
    decoder.eval()
    loss.backward()
    assert decoder[1].num_batches_tracked == 4
    replayed = decoder[2].weight.grad.clone()
    decoder.train().zero_grad()
    torch.manual_seed(1)
    replay.full_bptt(run, inputs, zeros, readout).loss.backward()
    torch.testing.assert_close(replayed, decoder[2].weight.grad, rtol=2e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*jit:FutureWarning")
@every_schedule
def test_scripted_cells(schedule):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor, memory: torch.Tensor):
            memory = torch.tanh(self.norm(self.linear(memory) + x))
            return memory.square().mean(), memory

    def make():
        cell = torch.jit.script(Cell())
        return Case(cell, segments(), torch.randn(3, 3), modules=[cell])

    hold_against_a_loop(make, schedule)


@every_schedule
@pytest.mark.parametrize("what", ["a hook that clips", "a retained gradient"])
def test_a_cell_that_puts_hooks_on_its_memory(what, schedule):
    """They need a graph, which is there in the recording, too, once it was seen that the cell wants one."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, memory):
            memory = torch.tanh(self.linear(memory) + x)
            if what == "a hook that clips":
                memory.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
            else:
                memory.retain_grad()
            return memory.square().mean(), memory

    def make():
        cell = Cell()
        return Case(cell, segments(), torch.randn(3, 3), modules=[cell])

    hold_against_a_loop(make, schedule)


def test_leaves_that_are_no_numbers_are_compared():
    rnn, named = nn.GRUCell(3, 4), ["one", "one", "one"]

    def cell(x, memory):
        state = rnn(x, memory[0])
        return state.square().mean(), (state, named.pop() if named else "other", x.dtype)

    memory = torch.zeros(2, 4), "none", torch.float32
    loss = replay.memory_replay(cell, [torch.randn(2, 3)] * 3, memory, params=rnn, check=True).loss
    with pytest.raises(RuntimeError, match=r"differs in replay.*gave 'other', and 'one' when it was recorded"):
        loss.backward()
    named += ["other"] * 99
    replay.memory_replay(cell, [torch.randn(2, 3)] * 3, memory, params=rnn, check=True).loss.backward()


def test_a_data_set_with_numbers_that_are_none_and_with_conjugate_views():
    class Data:
        def __len__(self):
            return 3

        def __getitem__(self, t):
            return {"x": torch.full((2, 4), 1 + 1j).conj(), "weight": float("nan")}

    weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128))

    def cell(segment, memory):
        memory = 0.1 * memory @ weight + segment["x"]
        return memory.abs().mean(), memory

    replay.memory_replay(cell, Data(), torch.zeros(2, 4, dtype=torch.complex128), params=[weight]).loss.backward()


@pytest.mark.parametrize(("weights", "got"), [(0.5, "got float"), (torch.tensor(0.5), r"got a tensor of shape \(\)")])
def test_one_weight_for_all_segments(weights, got):
    cell = nn.GRUCell(3, 4)
    with pytest.raises(ValueError, match=f"segment_weights: expected one for each of the 2 segments, {got}"):
        replay.memory_replay(cell, [torch.randn(2, 3)] * 2, torch.zeros(2, 4), segment_weights=weights)


def test_weights_that_are_no_numbers():
    with pytest.raises(ValueError, match="segment_weights: expected numbers, got 'ab'"):
        replay.memory_replay(nn.GRUCell(3, 4), [torch.randn(2, 3)] * 2, torch.zeros(2, 4), segment_weights="ab")


def test_a_burnt_in_memory_has_no_graph():
    weight = torch.randn(2, 4, requires_grad=True)
    memory = replay.burn_in(lambda x, m: (None, m), [1, 2], 2 * weight)
    assert not memory.requires_grad
    assert not replay.burn_in(lambda x, m: (None, m), [], 2 * weight).requires_grad


def test_a_folder_in_ones_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rnn = nn.GRUCell(3, 4)

    def cell(x, memory):
        memory = rnn(x, memory)
        return memory.square().mean(), memory

    schedule = replay.Offload(replay.EveryMemory(), to="~/memories")
    replay.memory_replay(
        cell, [torch.randn(2, 3)] * 3, torch.zeros(2, 4), params=rnn, schedule=schedule
    ).loss.backward()
    assert [path.name for path in tmp_path.iterdir()] == ["memories"]
