"""What cannot be right is refused, with an error that names the cause."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers import lively, tokens
from memformer import memory_replay_backprop, replay


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, segment, memory):
        memory = torch.tanh(self.linear(memory + segment))
        return memory.sum(), memory


SEGMENTS = [torch.full((1, 2), float(t)) for t in range(3)]
ZEROS = torch.zeros(1, 2)
captured_scale = torch.ones((), requires_grad=True)


def run(cell, segments=SEGMENTS, memory=ZEROS, *args, **options):
    return replay.memory_replay(cell, segments, memory, *args, **options)


def test_captured_tensor_is_named():
    cell = Cell()
    captured = torch.ones((), requires_grad=True)

    def step(segment, memory):
        loss, memory = cell(segment, memory)
        return loss * captured * captured_scale, memory

    with pytest.raises(ValueError, match=r"'captured' of shape \(\)") as error:
        run(step, params=cell)
    assert "'captured_scale'" in str(error.value)
    assert "params=" in str(error.value)


def test_captured_module_is_named():
    cell = Cell()
    with pytest.raises(ValueError, match=r"'cell\.linear\.weight' of shape \(2, 2\)"):
        run(lambda segment, memory: cell(segment, memory))


def test_captured_tensor_that_is_derived_from_another():
    derived = torch.ones((), requires_grad=True) * 2
    with pytest.raises(ValueError, match=r"'derived' of shape \(\)"):
        run(lambda segment, memory: ((memory * derived).sum(), memory))


def test_readout_that_captures_is_named():
    cell, head = Cell(), nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"'head\.weight'"):
        run(cell, SEGMENTS, ZEROS, lambda values, segments: head(torch.stack(values)[:, None]).sum())


def test_memory_changed_in_place_by_the_cell():
    cell = Cell()

    def step(segment, memory):
        memory.add_(segment)
        return cell(segment, memory)

    with pytest.raises(ValueError, match="changed its memory in place in segment 0"):
        run(step, params=cell)


def test_inputs_changed_in_place_after_recording():
    cell = Cell()
    segments = [s.clone() for s in SEGMENTS]
    rollout = run(cell, segments)
    segments[1].add_(1)
    with pytest.raises(RuntimeError, match="segment 1 or the memory before it was changed in place"):
        rollout.loss.backward()
    memory = ZEROS.clone()
    rollout = run(cell, SEGMENTS, memory)
    memory.add_(1)
    with pytest.raises(RuntimeError, match="segment 0 or the memory before it was changed in place"):
        rollout.loss.backward()


def test_second_backward():
    rollout = run(Cell())
    rollout.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already back-propagated"):
        rollout.loss.backward()


def test_second_backward_of_a_readout():
    rollout = run(Cell(), SEGMENTS, ZEROS, lambda values, segments: torch.stack(values).sum())
    rollout.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already back-propagated"):
        rollout.loss.backward()


def test_a_memory_that_was_not_cut_names_the_remedy():
    cell = Cell()
    first = run(cell)
    first.loss.backward()
    second = run(cell, SEGMENTS, first.memory)
    with pytest.raises(RuntimeError, match=r"replay\.detach\(rollout\.memory\)"):
        second.loss.backward()


def test_double_backward():
    """Not even when only the first gradient is used again: its own graph would silently be missing."""
    cell = Cell()
    for readout in (None, lambda values, segments: torch.stack(values).sum()):
        with pytest.raises(RuntimeError, match=r"create_graph=True.*full_bptt"):
            torch.autograd.grad(run(cell, SEGMENTS, ZEROS, readout).loss, list(cell.parameters()), create_graph=True)


def test_optimizer_step_between_forward_and_backward():
    cell = Cell()
    rollout = run(cell)
    with torch.no_grad():
        cell.linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="parameter was changed in place"):
        rollout.loss.backward()


def test_tensor_hook_on_a_parameter():
    cell = Cell()
    cell.linear.weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(ValueError, match=r"'linear\.weight' has a tensor hook.*register_post_accumulate_grad_hook"):
        run(cell)


@pytest.fixture
def ddp(tmp_path):
    """DistributedDataParallel, of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield DistributedDataParallel
    torch.distributed.destroy_process_group()


def test_cell_wrapped_in_ddp(ddp):
    wrapped = ddp(Cell())
    for method in (replay.memory_replay, replay.accumulate):
        with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
            method(wrapped, SEGMENTS, ZEROS)


class BackPropagates(nn.Module):
    """By itself, in its forward."""

    def __init__(self, part, call):
        super().__init__()
        self.part, self.call = part, call

    def forward(self):
        return self.call(self.part)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: run(c, options={"schedule": replay.Binomial(2)}), r"options: expected replay\.Options, got {'sched"),
        (lambda c: run(c, options=replay.Binomial(2)), r"options: expected replay\.Options, got Binomial"),
        (
            lambda c: run(c, SEGMENTS, ZEROS, replay.Binomial(2)),
            r"readout: expected a function .*, got Binomial.*schedule=",
        ),
        (lambda c: replay.full_bptt(c, SEGMENTS, ZEROS, 3), "readout: expected a function .*, got 3"),
        (lambda c: replay.accumulate(c, SEGMENTS, ZEROS, 3), "readout: expected a function .*, got 3"),
        (lambda c: run(c, params=None), "params: expected tensors or modules, got NoneType"),
        (lambda c: run(c, params=3), "params: expected tensors or modules, got int"),
        (lambda c: run(c, torch.tensor(1.0)), "segments: expected a sequence with one pytree per segment, got Tensor"),
        (
            lambda c: replay.verify(c, SEGMENTS, ZEROS, schedules=replay.Binomial(2)),
            "schedules: expected a list of sched",
        ),
        (lambda c: replay.verify(c, SEGMENTS, ZEROS, schedules=[3]), "schedule: expected a schedule, .* got 3"),
        (lambda c: replay.Offload("cpu"), "schedule: expected a schedule, such as .* got 'cpu'"),
        (lambda c: replay.Offload(replay.Binomial), "schedule: expected a schedule, such as .* got <class"),
        (lambda c: replay.Offload(replay.Binomial(2), to=3), "offload: expected cpu or a folder, got 3"),
        (lambda c: replay.MemoryGradients("1"), "max_norm: expected a positive number or None, got '1'"),
        (
            lambda c: replay.reset((ZEROS, ZEROS), ZEROS, torch.tensor([True])),
            "initial: expected the structure of the memory",
        ),
    ],
)
def test_arguments_of_another_kind_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(Cell())


@pytest.mark.parametrize("name", ["accumulate", "memory_replay_backprop"])
def test_a_backward_in_the_forward_of_ddp(ddp, name):
    """DDP exchanges what is back-propagated after its forward; these gradients would stay each process's own."""
    if name == "accumulate":
        wrapped = ddp(BackPropagates(Cell(), lambda cell: replay.accumulate(cell, SEGMENTS, ZEROS).loss))
    else:
        wrapped = ddp(
            BackPropagates(lively(), lambda model: memory_replay_backprop(model, tokens(2, 9), tokens(2, 4))[0])
        )
    with pytest.raises(ValueError, match=rf"{name}: back-propagates by itself.*Return the loss of memory_replay"):
        wrapped()
    with wrapped.no_sync():  # who exchanges gradients by himself may
        wrapped()
    assert all(p.grad is not None for p in wrapped.module.part.parameters())


@pytest.mark.parametrize("memory", [object(), torch.Generator()])
def test_opaque_memory(memory):
    with pytest.raises(ValueError, match=f"initial memory holds a {type(memory).__name__}, through which no gradient"):
        run(Cell(), SEGMENTS, memory)
    with pytest.raises(ValueError, match=f"memory after segment 0 holds a {type(memory).__name__}"):
        run(lambda segment, before: (None, memory))


@pytest.mark.parametrize(
    ("result", "got"), [((1, 2, 3), "3 values"), (torch.zeros(2), "Tensor"), (None, "NoneType"), ((1,), "1 values")]
)
def test_wrong_arity(result, got):
    with pytest.raises(ValueError, match=rf"a cell returns \(value, memory\).*returned {got}"):
        run(lambda segment, memory: result)


@pytest.mark.parametrize("method", [replay.memory_replay, replay.full_bptt])
def test_losses_that_are_not_scalars(method):
    cell = Cell()
    with pytest.raises(ValueError, match=r"segment 0: .* scalar loss or None, got a tensor of shape \(1, 2\).*scan"):
        method(lambda s, m: (m, m), SEGMENTS, ZEROS)
    with pytest.raises(ValueError, match=r"scalar loss or None; .* returned a tensor of shape \(3,\)"):
        method(cell, SEGMENTS, ZEROS, lambda values, segments: torch.stack(values), readout_segments=3)


@pytest.mark.parametrize("method", [replay.memory_replay, replay.full_bptt])
@pytest.mark.parametrize("readout", [None, lambda values, segments: None])
def test_no_loss_at_all(method, readout):
    with pytest.raises(ValueError, match="no segment of the rollout has a loss"):
        method(lambda s, m: (None, m), SEGMENTS, ZEROS, readout)


@pytest.mark.parametrize("method", [replay.memory_replay, replay.full_bptt, replay.scan])
def test_segments(method):
    with pytest.raises(ValueError, match="at least one segment, got none"):
        method(Cell(), [], ZEROS)
    with pytest.raises(ValueError, match="one pytree per segment, got dict"):
        method(Cell(), {"a": SEGMENTS[0]}, ZEROS)
    with pytest.raises(ValueError, match="one pytree per segment, got int"):
        method(Cell(), 3, ZEROS)


def test_readout_segments():
    with pytest.raises(ValueError, match="readout_segments: expected an integer of at least 1, got 0"):
        run(Cell(), SEGMENTS, ZEROS, lambda values, segments: torch.stack(values).sum(), readout_segments=0)


def test_params_of_another_type():
    with pytest.raises(ValueError, match="params: expected tensors or modules, got str"):
        run(Cell(), params=["linear"])


def test_a_cell_that_returns_another_number_of_leaves_in_replay():
    cell, calls = Cell(), []

    def step(segment, memory):
        calls.append(1)
        loss, memory = cell(segment, memory[0])
        return loss, ((memory,) if len(calls) < 4 else (memory, memory))

    with pytest.raises(RuntimeError, match="segment 1 returned other leaves in replay than when it was recorded"):
        run(step, SEGMENTS, (ZEROS,), params=cell).loss.backward()
