"""Captured steps. No card is needed: a function that is run again stands for a graph, and the CPU for a card.

What only a card can show is at the end, for ``--device cuda``, and in ``python -m benchmarks card``.
"""

import contextlib
import gc
import re
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from memformer import Memformer, checks, memory_replay_backprop, replay
from memformer.replay import capture, environment, inputs, storage
from pretend_card import CPU, NOTHING_FROZEN, PretendCard, pretend_a_card


@pytest.fixture
def pretend(monkeypatch, device):
    if device.type != "cpu":
        pytest.skip("the CPU stands for a card here")
    return pretend_a_card(monkeypatch)


class Cell(nn.Module):
    def __init__(self, dropout=0.3, dim=4):
        super().__init__()
        self.rnn = nn.GRUCell(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.initial = nn.Parameter(torch.randn(dim))

    def forward(self, segment, memory):
        memory = self.rnn(self.dropout(segment), self.dropout(memory) + self.initial)
        return memory.square().mean(), memory


METHODS = [replay.memory_replay, replay.full_bptt]


def step_of(cell, method=replay.memory_replay, **options):
    def step(segments, memory):
        rollout = method(cell, list(segments.unbind(0)), memory, **options)
        rollout.loss.backward()
        return {"loss": rollout.loss, "memory": rollout.memory}

    return step


def example(batch=2, segments=5, seed=0, device=CPU):
    generator = torch.Generator().manual_seed(seed)
    make = (segments, batch, 4), (batch, 4)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(device) for shape in make]


def grads(cell):
    return {name: None if p.grad is None else p.grad.clone() for name, p in cell.named_parameters()}


def run(step, cell, batches, clear="none"):
    """Outputs and gradients after each call, with the gradients cleared in between in one way."""
    torch.manual_seed(7)
    cell.zero_grad(set_to_none=True)
    found = []
    for i, batch in enumerate(batches):
        outputs = step(*batch)
        found.append(({name: x.detach().clone() for name, x in outputs.items()}, grads(cell)))
        if clear == "none" or (clear == "sometimes" and i % 2):
            cell.zero_grad(set_to_none=True)
        elif clear == "zero":
            cell.zero_grad(set_to_none=False)
    return found


BATCHES = [example(seed=i) for i in range(5)]


@pytest.mark.parametrize("clear", ["none", "zero", "sometimes", "never"])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_function(pretend, method, clear):
    """Outputs, gradients added to those that were there, and random numbers that differ from call to call."""
    cell = Cell().double()
    step = replay.captured(step_of(cell, method))
    expected = run(step_of(cell, method), cell, BATCHES, clear)
    after = torch.rand(3)
    found = run(step, cell, BATCHES, clear)
    assert_close(found, expected, rtol=0, atol=0)
    assert_close(torch.rand(3), after, rtol=0, atol=0)
    assert step.launches == len(BATCHES)
    assert step.graphs == 1
    assert pretend.rehearsals == 3
    same = run(step, cell, [BATCHES[0]] * 2)
    assert same[0][0]["loss"] != same[1][0]["loss"]  # dropout


@pytest.fixture
def frozen(monkeypatch):
    """Everything alive is hidden from the garbage collector, as long trainings do to spare its time."""
    monkeypatch.setattr(capture, "_nothing_frozen", NOTHING_FROZEN)

    def freeze():
        gc.collect()
        gc.freeze()

    yield freeze
    gc.unfreeze()


def test_what_is_hidden_from_the_garbage_collector_is_trained_too(pretend, frozen):
    cell = Cell().double()
    frozen()
    step = replay.captured(step_of(cell))
    hidden = gc.get_freeze_count()
    expected = run(step_of(cell), cell, BATCHES, "never")
    assert_close(run(step, cell, BATCHES, "never"), expected, rtol=0, atol=0)
    assert step.launches == len(BATCHES)
    assert gc.get_freeze_count() > hidden / 2, "it is hidden again"


@pytest.mark.parametrize("schedule", [replay.EveryMemory(graphs=0), replay.Binomial(2), replay.EveryMemory(graphs=9)])
def test_schedules(pretend, schedule):
    cell = Cell().double()
    step = replay.captured(step_of(cell, schedule=schedule), *BATCHES[0])
    assert_close(run(step, cell, BATCHES), run(step_of(cell, replay.full_bptt), cell, BATCHES))


def test_scan_and_the_whole_model(pretend):
    torch.manual_seed(0)
    sizes = dict(dim=8, num_memory_slots=3, enc_num_tokens=9, enc_depth=1, enc_heads=2, enc_max_seq_len=4)
    model = Memformer(**sizes, dec_num_tokens=9, dec_depth=1, dec_heads=2, dec_max_seq_len=4, dropout=0.3).double()
    src, tgt = torch.randint(0, 9, (2, 12)), torch.randint(0, 9, (2, 4))

    def step(src, tgt):
        loss, memory = memory_replay_backprop(model, src=src, tgt=tgt)
        return {"loss": loss, "memory": memory}

    batches = [(src, tgt)] * 3
    assert_close(run(replay.captured(step), model, batches), run(step, model, batches), rtol=0, atol=0)
    cell = Cell().double()

    def scanned(segments, memory):
        values, memory = replay.scan(cell, list(segments.unbind(0)), memory)
        loss = torch.stack(values).prod()
        loss.backward()
        return {"loss": loss, "memory": memory}

    assert_close(run(replay.captured(scanned), cell, BATCHES), run(scanned, cell, BATCHES), rtol=0, atol=0)


def test_what_was_there_before_is_there_afterwards(pretend):
    """Capturing alone changes nothing: gradients of this model and of another, random numbers, running statistics."""
    cell, other = Cell().double(), nn.Linear(2, 2)
    cell.norm = nn.BatchNorm1d(4).double()
    forward = cell.forward
    cell.forward = lambda segment, memory: forward(cell.norm(segment), memory)
    cell.initial.grad = torch.ones(4, dtype=torch.float64)
    other(torch.randn(3, 2)).sum().backward()
    before = grads(cell), grads(other), {k: v.clone() for k, v in cell.state_dict().items()}, torch.get_rng_state()
    step = replay.captured(step_of(cell), *BATCHES[0])
    assert step.graphs == 1
    assert_close((grads(cell), grads(other), dict(cell.state_dict()), torch.get_rng_state()), before, rtol=0, atol=0)
    step(*BATCHES[0])
    assert_close(grads(other), before[1], rtol=0, atol=0)


def test_results_are_the_callers(pretend):
    """Neither an output nor an input's gradient is overwritten by the next launch; a carried memory may be fed back."""
    cell = Cell(dropout=0).double()
    step = replay.captured(step_of(cell))
    segments, memory = example()
    memory.requires_grad_()
    first = step(segments, memory)
    kept, grad = {k: v.clone() for k, v in first.items()}, memory.grad.clone()
    plain = memory.detach().requires_grad_()
    step_of(cell)(segments, plain)
    assert_close(grad, plain.grad)
    held = memory.grad
    other = (memory.detach() + 1).requires_grad_()
    step(segments, other)
    assert_close((first, held), (kept, grad), rtol=0, atol=0)
    assert not first["memory"].requires_grad
    memory.grad = None
    step(segments, memory)
    step(segments, memory)
    assert_close(memory.grad, 2 * grad)


def test_shapes_have_graphs_of_their_own_up_to_a_bound(pretend):
    cell = Cell().double()
    step = replay.captured(step_of(cell), most=2)
    batches = [example(batch=b, segments=s) for b, s in [(2, 3), (2, 4), (3, 3), (2, 3), (3, 3), (2, 4)]]
    assert_close(run(step, cell, batches, "never"), run(step_of(cell), cell, batches, "never"), rtol=0, atol=0)
    assert (step.graphs, step.launches) == (2, 4)
    card = step._cards[CPU]
    step.forget()
    assert step.graphs == 0
    step(*batches[2])
    assert (step.graphs, step.launches) == (1, 5)
    assert step._cards[CPU] is not card, "torch refuses a pool that no graph uses any more"


def test_surroundings_are_part_of_what_is_captured(pretend):
    """Another mode, autocast or number is captured anew; so is a weight in another place."""
    cell = Cell()
    step = replay.captured(lambda x, scale: {"loss": cell(x, x)[1].sum() * scale})
    x = torch.randn(2, 4)
    step(x, 2)
    step(x, 3)
    assert step.graphs == 2
    with torch.autocast("cpu", torch.bfloat16):
        step(x, 2)
    assert step.graphs == 3
    cell = Cell().eval()
    step = replay.captured(step_of(cell))
    step(*[x.float() for x in BATCHES[0]])
    cell.rnn.weight_hh.data = torch.zeros_like(cell.rnn.weight_hh)
    batch = [x.float() for x in BATCHES[1]]
    cell.zero_grad()
    before = pretend.rehearsals
    assert_close(run(step, cell, [batch]), run(step_of(cell), cell, [batch]), rtol=0, atol=0)
    assert step.graphs == 1
    assert pretend.rehearsals == before + 3


def test_the_number_of_a_closed_over_module_in_another_mode(pretend):
    cell = Cell(dropout=0.5).double()
    step = replay.captured(step_of(cell))
    step(*BATCHES[0])
    cell.eval()
    assert_close(run(step, cell, BATCHES), run(step_of(cell), cell, BATCHES), rtol=0, atol=0)
    assert step.graphs == 2


# --- What cannot be captured


@pytest.mark.cpu("it is about the CPU")
def test_on_a_cpu(recwarn):
    """ "auto" is silently eager, "on" is refused."""
    cell = Cell().double()
    step = replay.captured(step_of(cell), *BATCHES[0])
    assert_close(run(step, cell, BATCHES), run(step_of(cell), cell, BATCHES), rtol=0, atol=0)
    assert (step.graphs, step.launches) == (0, 0)
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"captured: inputs\[0\] is on cpu; expected a CUDA device"):
        replay.captured(step_of(cell), *BATCHES[0], mode="on")
    with pytest.raises(ValueError, match="captured: expected a tensor among the inputs"):
        replay.captured(lambda: None, mode="on")()


def waits(x):
    return looks_at(x.sum())


def looks_at(x):
    if PretendCard.forbidding:
        raise RuntimeError("called a synchronizing CUDA operation")
    return {"loss": x.detach()}


def test_a_line_that_waits_is_named(pretend):
    line = r"test_captured.py:\d+ \(`raise RuntimeError\(\"called a synchronizing CUDA operation\"\)`\)"
    with pytest.raises(ValueError, match=rf"captured: .*{line} waits for the card, .* in waits"):
        replay.captured(waits, torch.ones(2), mode="on")
    step = replay.captured(waits)
    with pytest.warns(UserWarning, match=rf"{line} waits for the card.* It runs eagerly") as caught:
        assert step(torch.ones(2))["loss"] == 2
    assert [Path(warning.filename).name for warning in caught] == ["test_captured.py"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(torch.ones(3))["loss"] == 3  # said once
    assert (step.graphs, step.launches) == (0, 0)


def test_an_error_of_the_function_is_its_own(pretend):
    """It is not about capturing, and leaves nothing behind."""
    cell = Cell()

    def fails(x):
        cell(x, x)[0].backward()
        raise RuntimeError("a mistake of the user's")

    cell.initial.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="a mistake of the user's"):
        replay.captured(fails, torch.randn(2, 4))
    assert cell.rnn.weight_hh.grad is None
    assert_close(cell.initial.grad, torch.ones(4))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Cannot copy between CPU and CUDA tensors during CUDA graph capture", "waits for the card, or copies from"),
        ("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture", "random numbers in a way that this"),
        ("something else", "failed when function was captured"),
    ],
)
def test_what_a_capture_raises_is_explained(text, sentence):
    """Also behind the error that the end of a capture raises then."""
    end = compile("def end():\n    raise RuntimeError('capture_end')", str(capture._GRAPHS), "exec")
    scope = {}
    exec(end, scope)
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012
        try:
            raise RuntimeError(text)
        finally:
            scope["end"]()
    explained = str(capture._explained(caught.value, "function"))
    assert re.search(rf"test_captured.py:\d+ .*{sentence}.*{text}", explained)


def test_tensors_on_two_devices_and_graphs(pretend):
    cell = Cell()
    with pytest.raises(ValueError, match=r"inputs\[1\]\['x'\] is on meta; expected it on cpu like the others"):
        replay.captured(lambda x, y: None, mode="on")(torch.ones(2), {"x": torch.ones(2, device="meta")})
    with pytest.raises(ValueError, match=r"captured: an input has a graph, .*: detach it"):
        replay.captured(step_of(cell))(torch.ones(2, requires_grad=True) * 2)
    with pytest.raises(ValueError, match="captured: an input holds a set, which cannot be compared"):
        replay.captured(lambda x, y: None)(torch.ones(2), {1})
    with pytest.raises(ValueError, match=r"output 0 of .*<lambda> is on meta, which no launch would change"):
        replay.captured(lambda x: torch.ones(2, device="meta"), mode="on")(torch.ones(2))
    with pytest.raises(ValueError, match="mode: expected one of auto, on, off, got 'yes'"):
        replay.captured(step_of(cell), mode="yes")
    with pytest.raises(ValueError, match="most: expected an integer of at least 1, got 0"):
        replay.captured(step_of(cell), most=0)


@pytest.mark.parametrize("hidden", [False, True])
def test_distributed_data_parallel_is_refused(pretend, monkeypatch, frozen, hidden):
    class Parallel(nn.Module):
        pass

    monkeypatch.setattr(capture, "DistributedDataParallel", Parallel)
    cell, wrapped = Cell().double(), Parallel()
    replay.captured(step_of(cell), *BATCHES[0], mode="on")
    wrapped.module = cell
    if hidden:
        frozen()
    with pytest.raises(ValueError, match="what it trains is wrapped in DistributedDataParallel"):
        replay.captured(step_of(cell), *BATCHES[0], mode="on")


def test_random_numbers_of_the_cpu_are_refused(pretend, monkeypatch):
    """On a card those of the CPU would be the same in each launch."""
    monkeypatch.setattr(PretendCard, "generator", torch.Generator())
    cell = Cell(dropout=0.5).double()
    with pytest.raises(ValueError, match="step draws random numbers on the CPU, which would be the same"):
        replay.captured(step_of(cell), *BATCHES[0], mode="on")


# --- Where the engine waits, or reads the generators


def test_a_generator_that_nobody_draws_from_is_left_alone(monkeypatch):
    read = []

    class Module:
        @staticmethod
        def get_rng_state(device):
            read.append("get")
            return torch.zeros(1)

        @staticmethod
        def set_rng_state(state, device):
            read.append("set")

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    seen = environment.Environment([])
    card = torch.device("cuda", 0)
    seen.devices = [card]
    with environment.left_alone(card):
        seen.set_random_state(seen.random_state())
    assert read == []
    with contextlib.suppress(ZeroDivisionError), seen.random_numbers_kept():
        1 / 0  # noqa: B018
    assert read == ["get", "set"]


@pytest.mark.parametrize(("capturing", "debug"), [(False, 0), (True, 0), (False, 2)])
def test_nobody_looks_at_values_where_that_would_wait(monkeypatch, capturing, debug):
    """Neither the model's checks of token ids nor the engine's glance, in a capture or its rehearsal."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: debug)
    on_card = types.SimpleNamespace(is_meta=False, is_cuda=True)
    assert checks.has_values(on_card) == environment.may_wait() == (not capturing and debug == 0)
    assert checks.has_values(torch.ones(1, device="cpu"))


def test_memories_off_the_card_cannot_be_captured(monkeypatch):
    monkeypatch.setattr(storage, "may_wait", lambda: False)
    cell = Cell().double()
    with pytest.raises(
        RuntimeError, match=r"memories that are kept off the card \(Offload, Budget\) cannot be captured"
    ):
        step_of(cell, schedule=replay.Offload(replay.EveryMemory()))(*BATCHES[0])
    step_of(cell)(*BATCHES[0])


def test_weights_of_segments_are_the_same_numbers():
    """They are filled on the device, in place of a list that is copied there."""
    losses = torch.randn(4, dtype=torch.float32)
    weights = [0.1, 1 / 3, 2.0, 1e-9]
    found = inputs.call_readout(lambda values, segments: losses, [0] * 4, [0] * 4, weights)
    assert_close(found, (losses * torch.tensor(weights)).sum(), rtol=0, atol=0)


# --- On a card


@pytest.fixture
def card(device):
    if device.type != "cuda":
        pytest.skip("captures nothing: run with --device cuda")
    return device


@pytest.mark.parametrize("method", METHODS)
def test_on_a_card_it_is_the_function(card, method):
    cell = Cell().double()
    batches = [example(seed=i, device=card) for i in range(4)]
    step = replay.captured(step_of(cell, method), *batches[0], mode="on")
    expected = run(step_of(cell, method), cell, batches, "sometimes")
    after = torch.rand(3)
    assert_close(run(step, cell, batches, "sometimes"), expected, rtol=1e-12, atol=1e-12)
    assert_close(torch.rand(3), after, rtol=0, atol=0)
    assert step.launches == len(batches)


def test_on_a_card_launches_do_not_grow_memory(card):
    cell = Cell().double()
    batch = example(device=card)
    step = replay.captured(step_of(cell), *batch, mode="on")
    step(*batch)
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        cell.zero_grad()
        step(*batch)
    assert torch.cuda.memory_allocated() <= before


def test_on_a_card_the_line_that_waits_is_named(card):
    def waits(x):
        return float(x.sum()) * x

    with pytest.raises(
        ValueError, match=r"captured: .*test_captured.py:\d+ \(`return float\(x.sum\(\)\) \* x`\) waits"
    ):
        replay.captured(waits, torch.ones(2), mode="on")
    x = torch.rand(2)  # the generator is as good as before
    with pytest.warns(UserWarning, match="It runs eagerly"):
        assert_close(replay.captured(waits)(x), float(x.sum()) * x)


def test_on_a_card_two_shapes_share_a_pool(card):
    cell = Cell().double()
    step = replay.captured(step_of(cell), mode="on")
    batches = [example(batch=b, segments=s, device=card) for b, s in [(2, 3), (3, 4), (2, 3), (3, 4)]]
    assert_close(run(step, cell, batches, "never"), run(step_of(cell), cell, batches, "never"), rtol=1e-12, atol=1e-12)
    assert step.graphs == 2
