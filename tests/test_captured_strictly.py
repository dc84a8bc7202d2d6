"""Captured steps on a card that repeats operations and no Python: what changes between calls is followed, or said."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from helpers import lively
from memformer import replay
from memformer.replay import capture
from pretend_card import NOTHING_FROZEN
from strict_card import StrictCard, strict_card
from test_captured import BATCHES, METHODS, Cell, run, step_of
from test_captured_generation import START

__all__ = ["strict_card"]

X = [torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i in range(5)]
Step = Callable[..., Any]


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1))


def plain_step(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    return loss


def found(model: nn.Module, losses: list[Tensor]) -> tuple[Any, ...]:
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return [x.detach() for x in losses], gradients, dict(model.named_buffers()), torch.rand(1)


def assert_same(use: Callable[[Step, nn.Module], list[Tensor]], step: Step = plain_step, make: Any = layers) -> Any:
    """Eagerly and captured: losses, gradients, buffers, and the next random number. Returns the captured step."""
    results = []
    for captured in (False, True):
        model = make()
        call: Any = functools.partial(step, model)
        if captured:
            call = replay.captured(call, mode="on")
        torch.manual_seed(1)
        results.append(found(model, use(call, model)))
    assert_close(results[1], results[0])
    return call


@pytest.mark.parametrize("clear", ["none", "zero", "never"])
@pytest.mark.parametrize("method", METHODS)
def test_a_rollout(strict_card: type[StrictCard], method: Any, clear: str) -> None:
    cell = Cell().double()
    step = replay.captured(step_of(cell, method), mode="on")
    expected = run(step_of(cell, method), cell, BATCHES, clear)
    assert_close(run(step, cell, BATCHES, clear), expected, rtol=0, atol=0)
    assert (step.launches, strict_card.records) == (len(BATCHES), 1)


def clear_by_none(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def clear_in_place(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def halve(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None if p.grad is None else p.grad / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("before", "after"),
    [(clear_by_none, None), (clear_in_place, None), (None, clip), (None, halve)],
    ids=["none", "in place", "clipped", "halved"],
)
def test_what_changes_gradients_is_refused(
    strict_card: type[StrictCard], before: Any, after: Any, dtype: torch.dtype
) -> None:
    """A launch has its own part of them alone: where some were there before, it would clear or change too little."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).to(dtype)

    def step(x: Tensor) -> Tensor:
        if before is not None:
            before(model)
        loss = plain_step(model, x)
        if after is not None:
            after(model)
        return loss

    with pytest.raises(ValueError, match=r"captured: .*step clears or changes \.grad, .*: do it outside"):
        replay.captured(step, mode="on")(X[0].to(dtype))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("size", [1.0, math.inf, math.nan, 1e30])
def test_gradients_of_any_size_are_added_to(strict_card: type[StrictCard], dtype: torch.dtype, size: float) -> None:
    weight = torch.ones(3, dtype=dtype, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        loss = (weight * x).real.sum()
        loss.backward()
        return loss

    launched = replay.captured(step, mode="on")
    for _ in range(2):
        launched(torch.tensor([1.0, size, -size], dtype=dtype))
    assert launched.launches == 2
    assert_close(weight.grad, 2 * torch.tensor([1.0, size, -size], dtype=dtype), equal_nan=True)


def change_mode(model: nn.Module) -> None:
    model[2].eval()


def freeze(model: nn.Module) -> None:
    model[0].requires_grad_(False)


def unfreeze(model: nn.Module) -> None:
    model[3].requires_grad_(not model[3].weight.requires_grad)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: x.clone() * 2 for name, x in model.state_dict().items()}, assign=True)


def replace_weight(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 3)


def replace_module(model: nn.Module) -> None:
    model[0] = copy.deepcopy(model[0])
    with torch.no_grad():
        model[0].weight.mul_(3)


def append(model: nn.Module) -> None:
    model.append(nn.Tanh())


def move_a_frozen_weight(model: nn.Module) -> None:
    model[0].requires_grad_(False)
    model[0].weight.data = model[0].weight.data * 3


def replace_a_buffer(model: nn.Module) -> None:
    model[1].running_mean = model[1].running_mean + 1
    model[1].eval()


CHANGES = [
    *(change_mode, freeze, unfreeze, load, replace_weight, replace_module, append, move_a_frozen_weight),
    replace_a_buffer,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("cleared", [True, False])
def test_what_changes_between_calls_is_followed(strict_card: Any, change: Any, cleared: bool) -> None:
    def use(step: Step, model: nn.Module) -> list[Tensor]:
        losses = [step(X[0]), step(X[1])]
        if cleared:
            model.zero_grad()
        change(model)
        return [*losses, step(X[2]), step(X[3])]

    step = assert_same(use)
    assert step.launches == 4


def test_freezing_there_and_back_has_a_graph_each(strict_card: type[StrictCard]) -> None:
    def use(step: Step, model: nn.Module) -> list[Tensor]:
        losses = []
        for x in X[:4]:
            losses.append(step(x))
            unfreeze(model)
        return losses

    assert_same(use)
    assert strict_card.records == 2


def test_a_leaf_given_twice_and_once_more_by_its_module(strict_card: Any) -> None:
    def step(model: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        loss = (model(x) @ weight).square().sum() + (x * x.exp()).sum()
        loss.backward()
        return loss

    def use(step: Step, model: nn.Module) -> list[Tensor]:
        return [step(x, model.weight) for x in X[:3]]

    assert_same(use, step, lambda: (torch.manual_seed(0), nn.Linear(2, 2))[1])
    a = torch.zeros(2, requires_grad=True)

    def both(x: Tensor, y: Tensor) -> Tensor:
        loss = (x * y.exp()).sum()
        loss.backward()
        return loss

    for expected in (1.0, 2.0):
        replay.captured(both, mode="on")(a, a)
        assert_close(a.grad, torch.full((2,), expected))


@pytest.mark.parametrize("alias", [lambda x: x.data, lambda x: x.view_as(x), lambda x: x.detach()])
def test_gradients_that_share_memory_with_those_of_a_launch(strict_card: Any, alias: Any) -> None:
    def use(step: Step, model: nn.Module) -> list[Tensor]:
        losses = [step(X[0])]
        for p in model.parameters():
            p.grad = alias(p.grad)
        return [*losses, step(X[1])]

    assert_same(use)


def test_gradients_of_another_shape_s_graph_are_no_memory_of_this_one(strict_card: Any, monkeypatch: Any) -> None:
    """They share a pool: one that was captured later may keep its gradients where an earlier one has temporaries."""
    static: list[list[Any]] = []
    record = StrictCard.record

    def pooled(card: StrictCard, function: Any, draws: bool) -> Any:
        own, launch = record(card, function, draws)
        number = len(static)
        static.append(own)

        def start() -> None:
            for later in static[number + 1 :]:
                for x in later:
                    if x is not None:
                        x.data.fill_(float("nan"))
            launch()

        return own, start

    monkeypatch.setattr(StrictCard, "record", pooled)

    def use(step: Step, model: nn.Module) -> list[Tensor]:
        losses = [step(X[0])]
        model.zero_grad()
        return [*losses, step(torch.cat(X[:2])), step(X[1])]

    assert_same(use)


def test_an_input_that_is_changed_in_place(strict_card: Any) -> None:
    def step(model: nn.Module, x: Tensor, memory: Tensor) -> Tensor:
        memory.add_(model[0](x).detach().mean(0))
        return plain_step(model, x * memory)

    def use(step: Step, model: nn.Module) -> list[Tensor]:
        memory = torch.zeros(2)
        return [*(step(x, memory) for x in X[:3]), memory]

    assert_same(use, step)


class State(nn.Module):
    """Keeps a mean, in one of several ways."""

    def __init__(self, how: str):
        super().__init__()
        self.linear, self.how = nn.Linear(2, 1), how
        if "buffer" in how:
            self.register_buffer("mean", torch.zeros(2))
        else:
            self.mean = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        if "replaced" in self.how:
            self.mean = 0.5 * self.mean + x.detach().mean(0)
        else:
            self.mean.mul_(0.5).add_(x.detach().mean(0))
        return self.linear(x - self.mean)


def state(how: str) -> State:
    torch.manual_seed(0)
    return State(how)


def test_a_buffer_that_is_changed_in_place(strict_card: Any) -> None:
    assert_same(lambda step, _: [step(x) for x in X], make=functools.partial(state, "buffer in place"))


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("how", ["buffer replaced", "attribute replaced", "attribute in place"])
def test_state_that_no_launch_would_change_runs_eagerly_from_where_it_was(
    strict_card: Any, how: str, times: int
) -> None:
    def plain_step(model: nn.Module, x: Tensor) -> Tensor:
        loss = torch.stack([model(x * number).square().mean() for number in range(times)]).sum()
        loss.backward()
        return loss

    eager, model = state(how), state(how)
    what = "the buffer 'mean'" if "buffer" in how else "attribute 'mean' of State"
    with pytest.raises(ValueError, match=f"captured: .*plain_step changes {what} in each run, and no launch would"):
        replay.captured(functools.partial(plain_step, model), mode="on")(X[0])
    assert_close(model.mean, torch.zeros(2))
    step = replay.captured(functools.partial(plain_step, model))
    with pytest.warns(UserWarning, match="It runs eagerly"):
        losses = [step(x).detach() for x in X]
    assert_close(losses, [plain_step(eager, x).detach() for x in X])
    assert step.launches == 0


def test_a_table_that_the_first_run_makes_is_no_state(strict_card: Any) -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(2, 1), None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(2.0)
            return self.linear(x + self.table)

    torch.manual_seed(0)
    assert_same(lambda step, _: [step(x) for x in X], make=lambda: (torch.manual_seed(0), Lazy())[1])


def test_weights_that_are_made_anew_in_each_run_are_no_state(strict_card: Any) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))

    assert_same(lambda step, _: [step(x) for x in X], make=make)


def test_an_optimizer_is_refused_before_it_takes_a_step(strict_card: Any) -> None:
    model = layers()
    optimizer = torch.optim.Adam(model.parameters())

    def step(x: Tensor) -> Tensor:
        loss = plain_step(model, x)
        optimizer.step()
        return loss

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"step calls an optimizer, .*: do it after the call"):
        replay.captured(step, mode="on")(X[0])
    assert_close(model.state_dict(), before, rtol=0, atol=0)

    def by_hand(x: Tensor) -> Tensor:
        loss = plain_step(model, x)
        with torch.no_grad():
            model[0].weight.sub_(model[0].weight.grad)
        return loss

    with pytest.raises(ValueError, match=r"by_hand changes the weight 'weight' in each run, and no launch would"):
        replay.captured(by_hand, mode="on")(X[0])


def test_a_scaler_is_refused_before_it_does_anything(strict_card: Any) -> None:
    results = []
    for mode in ("off", "auto"):
        model = layers()
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")

        def step(x: Tensor, model: Any = model, optimizer: Any = optimizer, scaler: Any = scaler) -> Tensor:
            loss = model(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss

        call = replay.captured(step, mode=mode)
        torch.manual_seed(1)
        losses = []
        for x in X:
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                losses.append(call(x).detach())
        results.append(losses)
    assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_what_a_refused_step_has_rebound_is_put_back(strict_card: Any, mode: Any) -> None:
    """Whatever it is refused for; what it left alone is not touched."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.count, self.mask = nn.Linear(2, 1), 0, torch.ones(2)
            self.register_buffer("seen", torch.zeros(()))
            self.expanded = torch.ones(1).expand(2)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.seen = self.seen + random.random()
            return self.linear(x * self.mask) * self.count

    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x: Tensor) -> Tensor:
        loss = plain_step(model, x)
        optimizer.step()
        return loss

    pending = (model.mask * nn.Parameter(torch.ones(2))).sum()
    random.seed(3)
    state = random.getstate()
    seen = model.seen
    for function in (step, functools.partial(plain_step, model)):
        call = replay.captured(function, mode=mode)
        with contextlib.ExitStack() as stack:
            if mode == "on":
                stack.enter_context(pytest.raises(ValueError, match="captured: "))
                call(X[0])
            else:
                stack.enter_context(pytest.warns(UserWarning, match="It runs eagerly"))
                call.prepare(X[0])
        assert (model.count, random.getstate()) == (0, state)
        assert model.seen is seen
        assert float(seen) == 0
    pending.backward()


def test_what_the_first_run_alone_does_is_no_state(strict_card: Any) -> None:
    class Normed(nn.Module):
        """Its scale is that of the first batch."""

        def __init__(self) -> None:
            super().__init__()
            self.scale, self.begun = nn.Parameter(torch.ones(2)), False

        def forward(self, x: Tensor) -> Tensor:
            if not self.begun:
                self.begun = True
                with torch.no_grad():
                    self.scale.copy_(x.std(0))
            return x * self.scale

    for make in (Normed, lambda: nn.Sequential(nn.LazyLinear(2), nn.ReLU())):
        step = replay.captured(functools.partial(plain_step, make()), mode="on")
        for x in X:
            step(x)
        assert step.launches == len(X)


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("frozen", [True, False])
def test_norms_of_torch_as_they_were(strict_card: Any, norm: Any, frozen: bool) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(norm(nn.Linear(2, 2)).requires_grad_(not frozen), nn.Linear(2, 1))

    assert_same(lambda step, _: [step(x) for x in X], make=make)


def test_graphs_of_what_is_gone_make_room(strict_card: type[StrictCard]) -> None:
    model = layers()
    step = replay.captured(functools.partial(plain_step, model), mode="on", most=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(6):
            for x in (X[0], torch.cat(X[:2])):
                step(x)
            model.append(nn.Identity())
    assert (step.launches, step.graphs) == (12, 2)
    assert [str(w.message)[:38] for w in said] == ["captured: what plain_step reads or trai"[:38]]


def test_gradients_that_are_cleared_inside_are_refused(strict_card: Any) -> None:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        model.zero_grad()
        return plain_step(model, x)

    with pytest.raises(ValueError, match=r"step clears gradients, which each .*: do it before the call"):
        assert_same(lambda step, _: [step(x) for x in X], step)


def test_random_numbers_of_python_are_refused(strict_card: Any) -> None:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        return plain_step(model, x * random.random())

    random.seed(3)
    expected = random.random()
    random.seed(3)
    with pytest.raises(ValueError, match="changes the state of Python's random numbers in each run"):
        replay.captured(functools.partial(step, layers()), mode="on")(X[0])
    assert random.random() == expected


BESIDE = layers()


def beside(x: Tensor) -> Tensor:
    return BESIDE(x).square().mean()


class Called:
    def __call__(self, x: Tensor) -> Tensor:
        loss = beside(x)
        loss.backward()
        return loss


@pytest.mark.parametrize("within", [beside, lambda x: sum(BESIDE(y).square().mean() for y in (x, x))])
def test_modules_seen_through_functions_and_generators(
    strict_card: Any, monkeypatch: pytest.MonkeyPatch, within: Any
) -> None:
    monkeypatch.setattr(capture, "_nothing_frozen", NOTHING_FROZEN)  # among what was imported is what is trained
    start = copy.deepcopy(BESIDE.state_dict())

    def make() -> nn.Module:
        BESIDE.load_state_dict(start)
        BESIDE.zero_grad()
        return BESIDE.train()

    def step(x: Tensor) -> Tensor:
        loss = within(x)
        loss.backward()
        return loss

    results = []
    for call in (step, step, torch.enable_grad()(step), Called()):
        model = make()
        torch.manual_seed(1)
        call = replay.captured(call, mode="on") if results else call
        losses = [call(X[0])]
        model.eval()
        results.append(found(model, [*losses, call(X[1])]))
    for result in results[1:] if within is beside else results[1:3]:
        assert_close(result, results[0])


def test_a_copy_captures_for_itself(strict_card: Any) -> None:
    model = nn.Linear(2, 1)
    model.fast = replay.captured(model.forward, mode="on")
    with torch.no_grad():
        model.fast(X[0])
        other = copy.deepcopy(model)
        other.weight.mul_(2)
        assert_close(other.fast(X[1]), other(X[1]))
        assert_close(model.fast(X[1]), model(X[1]))


@pytest.mark.parametrize("taken", [3, 6, 9])
def test_a_copy_of_a_stream_and_the_stream_go_on_alike(strict_card: Any, taken: int) -> None:
    model = lively()

    def stream(mode: Any) -> Any:
        prompts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
        return model.stream(prompts, 24, start=START, temperature=0, stop=[5], capture=mode)

    expected = [x.tolist() for x in stream("off")]
    original = stream("on")
    for _ in range(taken):
        next(original)
    assert original.launches
    other = copy.deepcopy(original)
    assert [x.tolist() for x in other] == expected[taken:]
    assert [x.tolist() for x in original] == expected[taken:]


def test_what_fails_for_one_shape_holds_no_memory(strict_card: Any) -> None:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        loss = plain_step(model, x)
        if len(x) == 6:
            loss.item()
        return loss

    step = replay.captured(functools.partial(step, layers()))
    step(X[0])
    assert step.graphs == 1
    with pytest.warns(UserWarning, match="It runs eagerly"):
        step(torch.cat(X[:2]))
    assert step.graphs == 0


def test_inputs_that_hold_tensors_out_of_sight_and_numbers_that_are_none(strict_card: Any) -> None:
    class Batch:
        def __init__(self, x: Tensor):
            self.x = x

    model = nn.Linear(2, 1)
    with pytest.raises(
        ValueError, match=r"inputs\[0\] is a Batch, whose tensors no launch would read anew: give these"
    ):
        replay.captured(lambda batch, x: model(batch.x) + x, mode="on")(Batch(X[0]), X[0])
    step = replay.captured(lambda x, number: model(x), mode="on")
    for _ in range(3):
        step(X[0], float("nan"))
    assert step.graphs == 1


def test_first_called_under_inference_mode(strict_card: type[StrictCard], monkeypatch: pytest.MonkeyPatch) -> None:
    record = strict_card.record

    def outside(card: StrictCard, function: Any, draws: bool) -> Any:
        """A launch writes memory that is marked as that of inference: no operation does."""
        with torch.inference_mode(False), torch.no_grad():
            static, launch = record(card, function, draws)

        def start() -> None:
            with torch.inference_mode(False):
                launch()

        return static, start

    monkeypatch.setattr(strict_card, "record", outside)
    model = nn.Linear(2, 1)
    step = replay.captured(model.forward, mode="on")
    with torch.inference_mode():
        step(X[0])
    with torch.no_grad():
        assert_close(step(X[1]), model(X[1]))
    assert step.launches == 2
