"""What users of the engine met: values near zero, buffers that are expanded or grow, hooks on segments, data sets that
draw random numbers, detached outputs, a backward inside a cell."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from engine_cases import SCHEDULES, Case, fresh, hold_against_a_loop
from memformer import replay

MEASURED = {**SCHEDULES, "budget": replay.Budget(1 << 20)}
every_schedule = pytest.mark.parametrize("schedule", MEASURED)


def xs(*shape, count=5):
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.recur = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def next(self, x, memory):
        return torch.tanh(self.read(x) + self.recur(memory))

    def forward(self, x, memory):
        memory = self.next(x, memory)
        return memory.square().sum(), memory


def case_of(cell, segments=None):
    return Case(cell, segments or xs(2, 3), torch.randn(2, 3).double(), modules=[cell])


def held(make, schedule, **how):
    hold_against_a_loop(make, schedule=MEASURED[schedule], **how)


# --- The glance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_value_that_is_rounding_alone_is_no_other_value(seed):
    """The mean of normalised numbers; nn.LSTM rounds otherwise where no gradient is needed."""
    torch.manual_seed(seed)
    rnn = nn.LSTM(32, 32, batch_first=True)

    def cell(x, memory):
        outputs, memory = rnn(x, memory)
        return {"loss": outputs.square().mean(), "mean": F.layer_norm(outputs, (32,)).mean()}, memory

    values, _ = replay.scan(cell, [torch.randn(4, 16, 32) for _ in range(6)], None, params=[rnn])
    sum(value["loss"] for value in values).backward()
    assert rnn.weight_ih_l0.grad.any()


def test_a_small_value_that_differs_is_another_one():
    class Counts(Recurrent):
        calls = 0

        def forward(self, x, memory):
            self.calls += 1
            loss, memory = super().forward(x, memory)
            return 1e-3 * self.calls * loss, memory

    case = case_of(Counts())
    loss = replay.memory_replay(case.cell, case.segments, case.memory).loss
    with pytest.raises(RuntimeError, match="differs in replay from its recording"):
        loss.backward()


# --- Buffers ------------------------------------------------------------------------------------------------------


class Masks(Recurrent):
    """A mask that is made when it is first needed, or each time; expanded."""

    def __init__(self, always):
        super().__init__()
        self.always = always
        self.register_buffer("mask", None, persistent=False)

    def forward(self, x, memory):
        if self.mask is None or self.always:
            self.mask = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64).expand(2, 3)
        return super().forward(x * self.mask, memory)


@every_schedule
@pytest.mark.parametrize("always", [False, True])
def test_a_buffer_that_is_expanded(always, schedule):
    held(lambda: case_of(Masks(always)), schedule)


class Grows(Recurrent):
    """Per-channel ranges, as observers of torch.ao have them: a buffer that gets its size from what is seen first."""

    def __init__(self, size, how):
        super().__init__()
        self.how = how
        self.register_buffer("most", torch.ones(size, dtype=torch.float64))

    def forward(self, x, memory):
        memory = self.next(x, memory)
        with torch.no_grad():
            most = memory.abs().amax(0)
            if self.most.shape != most.shape:
                self.how(self.most, most)
            else:
                self.most.mul_(0.9).add_(0.1 * most)
        return (memory / self.most.clone()).square().sum(), memory


def resized(buffer, new):
    buffer.resize_(new.shape).copy_(new)


def through_data(buffer, new):
    buffer.data = new.clone()


@every_schedule
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("how", [resized, through_data])
def test_a_buffer_that_grows_in_place(size, how, schedule):
    held(lambda: case_of(Grows(size, how)), schedule)


class OwnStatistics(Recurrent):
    """Torch's own kernel changes them without a new version."""

    def __init__(self, in_output):
        super().__init__()
        self.in_output = in_output
        for name, value in (("mean", torch.zeros), ("var", torch.ones)):
            self.register_buffer(name, value(3, dtype=torch.float64))

    def forward(self, x, memory):
        memory = torch.tanh(F.batch_norm(self.read(x) + memory, self.mean, self.var, training=True))
        return memory.square().sum() * (1 + self.mean.sum().square() if self.in_output else 1), memory


@every_schedule
@pytest.mark.parametrize("in_output", [False, True])
def test_statistics_of_its_own(in_output, schedule):
    held(lambda: case_of(OwnStatistics(in_output)), schedule)


def test_measuring_leaves_such_statistics_as_they_were():
    cell = OwnStatistics(False)
    replay.measure(cell, torch.randn(2, 3).double(), torch.randn(2, 3).double())
    assert not cell.mean.any()
    assert (cell.var == 1).all()


# --- Segments -----------------------------------------------------------------------------------------------------


class Halves(Recurrent):
    """A hook on its segment, as an embedding's saliency is scaled."""

    def forward(self, x, memory):
        if x.requires_grad:
            x.register_hook(lambda grad: 0.5 * grad)
        return super().forward(x, memory)


@every_schedule
@pytest.mark.parametrize("is_leaf", [True, False])
def test_a_hook_on_a_segment_acts_once(is_leaf, schedule):
    def make():
        leaves = [x.requires_grad_() for x in xs(2, 3)]
        case = case_of(Halves(), leaves if is_leaf else [x * 1.0 for x in leaves])
        case.wanted = leaves
        return case

    held(make, schedule, accumulate=False)


class Drawing:
    """Segments of a loader of their own, which draws a seed each time; they are the same each time."""

    def __init__(self, segments):
        self.sets = [TensorDataset(x) for x in segments]

    def __len__(self):
        return len(self.sets)

    def __getitem__(self, t):
        return next(iter(DataLoader(self.sets[t], batch_size=2)))[0]


class Drops(Recurrent):
    def forward(self, x, memory):
        return super().forward(F.dropout(x, 0.5), memory)


@every_schedule
def test_a_data_set_that_draws_random_numbers(schedule):
    held(lambda: case_of(Drops(), Drawing(xs(2, 3))), schedule)


# --- Gradients ----------------------------------------------------------------------------------------------------


def _back_propagated(rollout):
    if rollout.loss.requires_grad:  # accumulate has done it
        rollout.loss.backward()


def detached(cell, x, memory):
    loss, memory = cell(x, memory)
    return loss.detach(), memory.detach()


@torch.no_grad()
def under_no_grad(cell, x, memory):
    return cell(x, memory)


@every_schedule
@pytest.mark.parametrize("call", [detached, under_no_grad])
def test_a_cell_that_detaches_all_is_pointed_out(call, schedule):
    class Cell(Recurrent):
        def forward(self, x, memory):
            return call(super().forward, x, memory)

    for run in (replay.memory_replay, replay.accumulate):
        case = case_of(Cell())
        with pytest.warns(UserWarning, match="no gradient reaches the cell: everything that it returned is detached"):
            _back_propagated(run(case.cell, case.segments, case.memory, schedule=MEASURED[schedule]))
        assert case.cell.read.weight.grad is None


def test_a_frozen_cell_behind_a_readout_is_not():
    case, head = case_of(Recurrent().requires_grad_(False)), nn.Linear(3, 1).double()
    loss = replay.memory_replay(
        lambda x, memory: (case.cell.next(x, memory), case.cell.next(x, memory)),
        case.segments, case.memory, lambda values, segments: head(values[0]).sum(), params=[head],
    ).loss  # fmt: skip
    loss.backward()
    assert head.weight.grad.any()


def test_a_detached_loss_of_a_readout_has_no_gradient_as_by_plain_autograd():
    case, head = case_of(Recurrent()), nn.Linear(3, 1).double()
    loss = replay.memory_replay(
        lambda x, memory: (memory, case.cell.next(x, memory)),
        case.segments, case.memory, lambda values, segments: head(values[0]).sum().detach(), params=[case.cell, head],
    ).loss  # fmt: skip
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


class LearnsAside(Recurrent):
    """A loss of its own, whose backward it calls itself."""

    def __init__(self):
        super().__init__()
        self.aside = nn.Linear(3, 1).double()

    def forward(self, x, memory):
        memory = self.next(x, memory)
        with torch.enable_grad():
            self.aside(memory.detach()).square().sum().backward()
        return memory.square().sum(), memory


@every_schedule
def test_a_backward_inside_a_cell_that_runs_again_is_refused(schedule):
    if schedule == "all graphs":
        held(lambda: case_of(LearnsAside()), schedule)
        return
    case = case_of(LearnsAside())
    with pytest.raises(ValueError, match=r"the cell itself calls backward: .* keep all graphs"):
        replay.memory_replay(case.cell, case.segments, case.memory, schedule=MEASURED[schedule])


def test_hooks_of_a_readout_that_is_a_function_are_refused_where_gradients_come_in_parts():
    case, head = case_of(Recurrent()), nn.Linear(3, 1).double()
    head.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="has a hook on its gradient"):
        replay.accumulate(
            lambda x, memory: (case.cell.next(x, memory), case.cell.next(x, memory)),
            case.segments, case.memory, lambda values, segments: head(values[0]).sum(), params=[case.cell],
        )  # fmt: skip


def test_verify_passes_leaves_over_that_a_cell_makes_for_itself():
    class Inner(Recurrent):
        def forward(self, x, memory):
            with torch.enable_grad():
                start = memory.detach().requires_grad_()
                loss = torch.tanh(self.read(x) + self.recur(start)).square().sum()
                (step,) = torch.autograd.grad(loss, start, create_graph=True)
            return super().forward(x, memory - step)

    case = fresh(lambda: case_of(Inner()))
    assert replay.verify(case.cell, case.segments, case.memory).ok


def test_a_memory_of_float8():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.read = nn.Linear(3, 3)

        def forward(self, x, memory):
            kept, cache = memory
            kept = torch.tanh(self.read(x) + kept + cache.float())
            return kept.square().sum(), (kept, kept.detach().to(torch.float8_e4m3fn))

    torch.manual_seed(0)
    cell, segments = Rounded(), [torch.randn(2, 3) for _ in range(5)]
    grads = []
    for method in (replay.memory_replay, replay.full_bptt):
        cell.zero_grad()
        start = torch.zeros(2, 3), torch.zeros(2, 3).to(torch.float8_e4m3fn)
        method(cell, segments, start).loss.backward()
        grads.append(cell.read.weight.grad.clone())
    torch.testing.assert_close(*grads)
