"""What a cell sees besides its arguments may change by its own hand, or between forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from engine_cases import SCHEDULES, Case, hold_against_a_loop
from memformer import replay
from memformer.replay.inputs import captured_modules

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def xs(*shape, count=5):
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(count)]


class Normalised(nn.Module):
    """A cell with a layer between; the layer may keep statistics."""

    def __init__(self, layer, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.layer = layer
        self.dropout = nn.Dropout(dropout)
        self.double()

    def forward(self, x, memory):
        memory = torch.tanh(self.layer(self.linear(memory) + self.dropout(x)))
        return memory.square().mean(), memory


class Counter(nn.Module):
    """A buffer that is replaced in each call, and one that is changed in place: both change what the layer does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.calls = self.calls + 1
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x * (1 + 0.1 * self.calls) - self.mean


class Instance(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)

    def forward(self, x):
        return self.norm(x[None])[0]


LAYERS = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "batch norm, cumulative": lambda: nn.BatchNorm1d(3, momentum=None),
    "batch norm in eval": lambda: nn.BatchNorm1d(3).eval(),
    "instance norm": Instance,
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 3)),
    "counter": Counter,
}


@every_schedule
@pytest.mark.parametrize("layer", LAYERS)
def test_buffers_that_the_cell_changes(layer, schedule):
    """They are carried along: each segment sees those of its recording, and they advance once."""

    def make():
        cell = Normalised(LAYERS[layer](), dropout=0.3)
        return Case(cell, xs(4, 3), torch.randn(4, 3).double(), modules=[cell])

    hold_against_a_loop(make, schedule)


def test_buffers_are_as_they_were_found_after_a_backward():
    cell = Normalised(nn.BatchNorm1d(3))
    loss = replay.memory_replay(cell, xs(4, 3), torch.randn(4, 3).double()).loss
    cell(*xs(4, 3, count=2))  # a step in between
    before = [b.clone() for b in cell.buffers()]
    loss.backward()
    torch.testing.assert_close(list(cell.buffers()), before, rtol=0, atol=0)
    assert cell.layer.num_batches_tracked == 6


def test_measuring_for_a_budget_leaves_the_statistics_alone():
    cell = Normalised(nn.BatchNorm1d(3))
    replay.memory_replay(cell, xs(4, 3), torch.randn(4, 3).double(), schedule=replay.Budget(10**6))
    assert cell.layer.num_batches_tracked == 5


# --- Between forward and backward


def evaluate(cell):
    cell.eval()


def freeze(cell):
    cell.linear.weight.requires_grad_(False)


def unfreeze(cell):
    cell.layer.weight.requires_grad_(True)


@every_schedule
@pytest.mark.parametrize("between", [evaluate, freeze, unfreeze])
def test_modes_and_frozen_parameters_change_between_forward_and_backward(between, schedule):
    def make():
        cell = Normalised(nn.BatchNorm1d(3), dropout=0.3)
        if between is unfreeze:
            cell.layer.weight.requires_grad_(False)
        segments, memory = xs(4, 3), torch.randn(4, 3).double()
        return Case(cell, segments, memory, modules=[cell], between=lambda: between(cell))

    hold_against_a_loop(make, schedule, accumulate=False)


def test_modes_are_as_they_were_found_after_a_backward():
    cell = Normalised(nn.BatchNorm1d(3), dropout=0.3)
    loss = replay.memory_replay(cell, xs(4, 3), torch.randn(4, 3).double()).loss
    cell.eval()
    freeze(cell)
    loss.backward()
    assert not any(module.training for module in cell.modules())
    assert not cell.linear.weight.requires_grad


class Teacher(nn.Module):
    """The target comes from a frozen copy and a buffer, which somebody updates after each rollout."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.teacher = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(3))
        self.double()

    def forward(self, x, memory):
        memory = torch.tanh(self.linear(memory) + x)
        return F.mse_loss(memory, self.teacher(x) - self.centre.clone()), memory


@every_schedule
def test_a_buffer_changes_between_forward_and_backward(schedule):
    def make():
        cell = Teacher()
        return Case(cell, xs(4, 3), torch.randn(4, 3).double(), modules=[cell], between=lambda: cell.centre.add_(2.0))

    hold_against_a_loop(make, schedule, accumulate=False)


def test_a_frozen_parameter_that_is_changed_is_named():
    cell = Teacher()
    loss = replay.memory_replay(cell, xs(4, 3), torch.randn(4, 3).double()).loss
    cell.teacher.weight.lerp_(cell.linear.weight.detach(), 0.1)
    with pytest.raises(RuntimeError, match=r"was changed in place between the rollout and its .*: 'teacher\.weight'"):
        loss.backward()


# --- Weights that are cached


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + weight.mT


class Orthogonal(nn.Module):
    def __init__(self, parametrization):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        parametrize.register_parametrization(self.linear, "weight", parametrization)
        self.double()

    def forward(self, x, memory):
        memory = torch.tanh(self.linear(memory) + self.linear(x))
        return memory.square().mean(), memory


@every_schedule
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("with_readout", [True, False])
def test_cached_weights(schedule, backward_inside, with_readout):
    """``parametrize.cached()`` around a rollout is PyTorch's own idiom for recurrent cells."""

    def run(method):
        torch.manual_seed(0)
        cell = Orthogonal(Symmetric())
        segments, memory = xs(2, 3), torch.randn(2, 3).double()
        with parametrize.cached():
            rollout = method(cell, segments, memory)
            if backward_inside:
                rollout.loss.backward()
        if not backward_inside:
            rollout.loss.backward()
        assert not parametrize._cache
        return [rollout.loss, rollout.memory, *(p.grad for p in cell.parameters())]

    def read_out(cell):
        return lambda values, segments: cell.linear(torch.cat(values)).square().mean()

    def loop(cell, segments, memory):
        losses = []
        for x in segments:
            loss, memory = cell(x, memory)
            losses.append(read_out(cell)([memory], [x]) if with_readout else loss)
        return replay.Rollout(sum(losses), memory)

    def replayed(cell, segments, memory):
        if not with_readout:
            return replay.memory_replay(cell, segments, memory, schedule=SCHEDULES[schedule])
        encode = lambda x, m: (lambda r: (r[1], r[1]))(cell(x, m))  # noqa: E731
        return replay.memory_replay(encode, segments, memory, read_out(cell), params=cell, schedule=SCHEDULES[schedule])

    torch.testing.assert_close(run(replayed), run(loop), rtol=1e-12, atol=1e-13)


def test_cached_weights_that_are_random_are_refused():
    class Dropped(nn.Module):
        def forward(self, weight):
            return F.dropout(weight, 0.5)

    cell = Orthogonal(Dropped())
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"parametrised weight 'weight' is random.*inside the"):
        replay.memory_replay(cell, xs(2, 3), torch.randn(2, 3).double()).loss.backward()


@every_schedule
def test_weights_that_are_cached_inside_of_the_cell(schedule):
    def make():
        inner = Orthogonal(Symmetric())

        def cell(x, memory):
            with parametrize.cached():
                return inner(x, memory)

        return Case(cell, xs(2, 3), torch.randn(2, 3).double(), params=inner, modules=[inner])

    hold_against_a_loop(make, schedule)


# --- What cannot be put back is noticed


@every_schedule
def test_a_buffer_that_keeps_a_graph(schedule):
    """The hidden state of a stateful cell: plain autograd goes through it."""

    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3).double()
            self.register_buffer("hidden", torch.zeros(2, 3).double())

        def forward(self, x, memory):
            self.hidden = torch.tanh(self.linear(self.hidden) + x)
            return self.hidden.square().sum(), memory

    memory = torch.zeros(1).double()
    with pytest.raises(ValueError, match=r"keeps a tensor with a graph in the buffer 'hidden' of a Stateful.*Return"):
        replay.memory_replay(Stateful(), xs(2, 3), memory, schedule=SCHEDULES[schedule]).loss.backward()


class Kept(nn.Module):
    """Keeps something for itself."""

    def __init__(self, kind):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.hidden = torch.zeros(2, 3).double()
        self.calls = 0
        self.generator = torch.Generator().manual_seed(0)
        self.kind = kind

    def forward(self, x, memory):
        memory = torch.tanh(self.linear(memory) + x)
        if self.kind == "hidden":
            memory = memory + 0.1 * self.hidden
            self.hidden = memory.detach()
        elif self.kind == "counter":
            self.calls += 1
            memory = memory / self.calls
        elif self.kind == "generator":
            memory = memory + torch.rand((), generator=self.generator, dtype=torch.float64)
        return memory.square().sum(), memory


@pytest.mark.parametrize("schedule", ["default", "no graphs", "binomial"])
@pytest.mark.parametrize("kind", ["hidden", "counter", "generator"])
def test_a_state_that_the_cell_keeps_for_itself(kind, schedule):
    rollout = replay.memory_replay(Kept(kind), xs(2, 3), torch.zeros(2, 3).double(), schedule=SCHEDULES[schedule])
    with pytest.raises(RuntimeError, match=r"segment \d differs in replay .* by .* of its norm.*check=True looks"):
        rollout.loss.backward()


@pytest.mark.parametrize("schedule", ["default", "no graphs", "binomial"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_of_a_fused_optimizer_in_between(optimizer, schedule):
    """It changes the parameters without a new version."""
    cell = Kept("nothing").float()
    optimizer = optimizer(cell.parameters(), lr=1e-3, fused=True)
    segments, memory = [x.float() for x in xs(2, 3)], torch.zeros(2, 3)
    replay.memory_replay(cell, segments, memory).loss.backward()
    rollout = replay.memory_replay(cell, segments, memory, schedule=SCHEDULES[schedule])
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"segment \d differs in replay|was changed in place"):
        rollout.loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_glance_allows_for_the_precision(dtype):
    """The recording and the replay of a compiled or fused cell may differ in the last bits."""
    cell = Kept("nothing").to(dtype)
    eps = torch.finfo(dtype).eps

    def noisy(x, memory):
        loss, memory = cell(x, memory)
        return loss, memory * (1 + (4 * eps if torch.is_grad_enabled() else 0))

    segments = [x.to(dtype) for x in xs(2, 3)]
    replay.memory_replay(noisy, segments, torch.zeros(2, 3, dtype=dtype), params=cell).loss.backward()


# --- Dropout that cuDNN draws


@pytest.fixture
def as_if_on_a_card(monkeypatch):
    """cuDNN is said to compute RNNs, as it does on a card while it is switched on."""
    monkeypatch.setattr("memformer.replay.world.drawn_by_cudnn", lambda rnn: torch.backends.cudnn.enabled)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.rnn = kind(3, 3, **options)

    def forward(self, x, memory):
        out, memory = self.rnn(x, memory)
        return out.square().mean(), memory

    def start(self):
        state = torch.zeros(self.rnn.num_layers, 2, 3)
        return (state, state) if isinstance(self.rnn, nn.LSTM) else state


def recurrent(cell, **options):
    segments = [torch.randn(4, 2, 3) for _ in range(3)]
    return replay.memory_replay(cell, segments, cell.start(), params=cell, **options)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_that_cudnn_draws_is_refused(kind, as_if_on_a_card):
    cell = Recurrent(kind, num_layers=2, dropout=0.3)
    says = (
        rf"the {kind.__name__} 'rnn' has dropout=0.3 between its 2 layers, and cuDNN draws that .*cudnn.enabled = False"
    )
    with pytest.raises(ValueError, match=says):
        recurrent(cell)
    with pytest.raises(ValueError, match=says.replace(" 'rnn'", "")):  # of a module that a function merely sees
        replay.accumulate(lambda x, m: cell(x, m), [torch.randn(4, 2, 3)] * 3, cell.start())


@pytest.mark.parametrize("way", ["eval", "one layer", "no dropout", "all graphs", "no gradient", "switched off"])
def test_what_no_replay_draws_again_is_not_refused(way, as_if_on_a_card):
    sizes = dict(num_layers=1 if way == "one layer" else 2, dropout=0.0 if way in ("no dropout", "one layer") else 0.3)
    cell = Recurrent(**sizes).train(way != "eval")
    cell.requires_grad_(way != "no gradient")
    torch.backends.cudnn.enabled = way != "switched off"
    try:
        rollout = recurrent(cell, schedule=SCHEDULES["all graphs" if way == "all graphs" else "default"])
    finally:
        torch.backends.cudnn.enabled = True
    if way != "no gradient":
        rollout.loss.backward()


def test_cudnn_is_switched_in_the_replay_as_it_was(as_if_on_a_card):
    seen = []

    def cell(x, memory):
        seen.append(torch.backends.cudnn.enabled)
        memory = torch.tanh(weight * memory + x)
        return memory.sum(), memory

    weight = torch.randn(3, requires_grad=True)
    others = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    for enabled in (False, True):
        torch.backends.cudnn.enabled = enabled
        try:
            rollout = replay.memory_replay(cell, list(torch.randn(3, 2, 3)), torch.zeros(2, 3), params=[weight])
            torch.backends.cudnn.enabled = not enabled
            rollout.loss.backward()
            assert torch.backends.cudnn.enabled is not enabled, "put back after each segment"
        finally:
            torch.backends.cudnn.enabled = True
        assert set(seen) == {enabled}
        seen.clear()
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == others


# --- What nobody can see: modules that are hidden, buffers that change without a version, hooks that come late


class Hidden(nn.Module):
    """Keeps a frozen backbone in a list, so that it is none of its modules."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.backbone = [nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(3)).double().requires_grad_(False)]
        self.double()

    def forward(self, x, memory):
        memory = torch.tanh(self.linear(memory) + self.backbone[0](x))
        return memory.square().mean(), memory


class Calling:
    def __init__(self, models):
        self.models = models

    def __call__(self, x, memory):
        return self.models["of the trainer"](x, memory)

    def step(self, x, memory):
        return self(x, memory)


HIDING = {
    "in a list of its module": lambda cell: cell,
    "behind an object that is called": lambda cell: Calling({"of the trainer": cell}),
    "behind a bound method": lambda cell: Calling({"of the trainer": cell}).step,
    "behind what a lambda sees": lambda cell: (lambda of: lambda x, memory: of.step(x, memory))(
        Calling({"of the trainer": cell})
    ),
    "behind a function that a function sees": lambda cell: (lambda inner: lambda x, memory: inner(x, memory))(
        lambda x, memory: cell(x, memory)
    ),
}


@every_schedule
@pytest.mark.parametrize("how", HIDING)
def test_modules_that_are_hidden(how, schedule):
    """Their modes and buffers are as in the recording, and the buffers advance once."""

    def make():
        cell = Hidden()
        return Case(
            HIDING[how](cell), xs(4, 3), torch.randn(4, 3).double(), params=list(cell.parameters()),
            between=cell.backbone[0].eval, modules=[cell, *cell.backbone],
        )  # fmt: skip

    hold_against_a_loop(make, schedule)


def test_data_is_not_searched_for_modules():
    """A thousand texts in a list are data; neither they nor a lazy attribute are asked anything."""

    class Data:
        texts = property(lambda self: pytest.fail("asked"))

    hidden = nn.Linear(1, 1)
    data, many, few = Data(), [hidden] * 1000, [[hidden]]
    assert captured_modules(lambda x, m: (data, many)) == []
    assert captured_modules(lambda x, m: (data, few)) == [hidden]


def test_what_is_near_is_found_also_where_it_is_far_too():
    """First at the end of a long chain, whose last link is not looked into, then at hand."""
    hidden = nn.Linear(1, 1)
    holder = [[hidden]]
    chain = holder
    for _ in range(4):
        chain = [chain]
    assert captured_modules(lambda x, m: (chain, holder)) == [hidden]
    assert captured_modules(lambda x, m: (holder, chain)) == [hidden]


class Through(nn.Module):
    """A buffer that it changes through ``.data``, from some segment on."""

    def __init__(self, dtype, begin):
        super().__init__()
        self.linear, self.begin = nn.Linear(3, 3).double(), begin
        self.register_buffer("count", torch.ones((), dtype=dtype))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, memory):
        self.calls += 1
        if self.calls > self.begin:
            self.count.data.add_(1)
        memory = torch.tanh(self.linear(memory) + x) / self.count.clone()
        return memory.square().mean(), memory


@every_schedule
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_buffers_that_change_through_data(dtype, training, schedule):
    def make():
        cell = Through(dtype, begin=0).train(training)
        return Case(cell, xs(4, 3), torch.zeros(4, 3).double(), modules=[cell])

    hold_against_a_loop(make, schedule)


@pytest.mark.parametrize("schedule", ["default", "no graphs", "binomial"])
def test_buffers_that_change_through_data_from_some_segment_on_are_refused(schedule):
    cell = Through(torch.float64, begin=2)
    with pytest.raises(
        ValueError, match=r"the buffer 'count' of a Through where nobody can see it.*under torch.no_grad"
    ):
        replay.memory_replay(cell, xs(4, 3), torch.zeros(4, 3).double(), schedule=SCHEDULES[schedule])


def test_buffers_of_numbers_that_are_none_change_no_more_than_others():
    cell = Through(torch.float64, begin=99)
    cell.register_buffer("unused", torch.tensor([torch.nan, torch.inf, -0.0]))
    replay.memory_replay(cell, xs(4, 3), torch.zeros(4, 3).double()).loss.backward()


class Looked(nn.Module):
    """Has an embedding that renormalises its own weights: a parameter that the cell changes in place."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3, max_norm=0.5)
        self.linear = nn.Linear(3, 3)
        self.double()

    def forward(self, x, memory):
        memory = torch.tanh(self.linear(memory) + self.table(x))
        return memory.square().mean(), memory


def test_a_parameter_that_the_cell_changes_itself():
    """It is refused where segments run again, by its own name; with all graphs kept it is as plain autograd has it."""
    segments = [torch.tensor([0, t]) for t in range(5)]
    for schedule in ("default", "no graphs", "binomial"):
        with pytest.raises(
            ValueError, match=r"the cell itself changes a parameter in place: 'table.weight'.*full_bptt"
        ):
            replay.memory_replay(Looked(), segments, torch.zeros(2, 3).double(), schedule=SCHEDULES[schedule])

    def make():
        cell = Looked()
        return Case(cell, segments, torch.zeros(2, 3).double(), modules=[cell])

    hold_against_a_loop(make, "all graphs", accumulate=False)


class WithATable(nn.Module):
    """A constant leaf of the memory, which cannot have a gradient, and a buffer that counts segments."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, memory):
        self.calls += 1
        state = torch.tanh(self.linear(memory["state"]) + x) * float(memory["table"].numpy().mean())
        return state.square().mean() * self.calls.clone(), {"state": state, "table": memory["table"]}


@every_schedule
def test_a_constant_leaf_and_a_buffer_that_changes(schedule):
    """Segments that the recording runs again, to learn what is constant, count no further."""

    def make():
        cell = WithATable()
        memory = {"state": torch.zeros(4, 3).double(), "table": torch.ones(3).double()}
        return Case(cell, xs(4, 3), memory, modules=[cell])

    hold_against_a_loop(make, schedule)


def test_a_constant_leaf_can_be_measured():
    cell, memory = WithATable(), {"state": torch.zeros(4, 3).double(), "table": torch.ones(3).double()}
    sizes = replay.measure(cell, xs(4, 3)[0], memory)
    assert sizes.graph_bytes > 0
    replay.memory_replay(cell, xs(4, 3), memory, schedule=replay.Budget(10**6)).loss.backward()


@pytest.mark.parametrize("schedule", ["default", "no graphs", "binomial"])
def test_a_hook_that_comes_between(schedule):
    cell = Kept("nothing")
    rollout = replay.memory_replay(cell, xs(2, 3), torch.zeros(2, 3).double(), schedule=SCHEDULES[schedule])
    cell.linear.weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(
        RuntimeError, match=r"a tensor hook was put on 'linear.weight' between the rollout and its backw"
    ):
        rollout.loss.backward()


@pytest.mark.parametrize("what", ["has a tensor hook", "retains its gradient"])
def test_a_derived_tensor_with_a_hook(what):
    derived = torch.sigmoid(torch.randn(3, dtype=torch.float64, requires_grad=True))
    if what == "retains its gradient":
        derived.retain_grad()
    else:
        derived.register_hook(lambda grad: 2 * grad)

    def cell(x, memory):
        memory = derived * memory + x
        return memory.square().mean(), memory

    with pytest.raises(ValueError, match=f"parameter 'tensor' {what}.*once per segment and once more"):
        replay.memory_replay(cell, xs(2, 3), torch.zeros(2, 3).double(), params=[derived])


@pytest.mark.parametrize("change", ["a fused optimizer", "a state"])
@pytest.mark.parametrize("graphs", [0, 1, 2])
def test_the_glance_where_the_last_segments_have_no_loss(change, graphs):
    """The first segment that the plan replays gets no gradient here: it is compared nevertheless."""
    cell = Kept("hidden" if change == "a state" else "nothing")
    losses = [True, True, True, False, False]

    def of(segment, memory):
        loss, memory = cell(segment["x"], memory)
        return (loss if segment["counts"] else None), memory

    segments = [{"x": x, "counts": counts} for x, counts in zip(xs(2, 3), losses, strict=True)]
    schedule = replay.EveryMemory(graphs=graphs)
    loss = replay.memory_replay(of, segments, torch.zeros(2, 3).double(), params=cell, schedule=schedule).loss
    if change == "a fused optimizer":
        optimizer = torch.optim.Adam(cell.parameters(), lr=0.1, fused=True)
        for p in cell.parameters():
            p.grad = torch.ones_like(p)
        versions = [p._version for p in cell.parameters()]
        optimizer.step()
        if versions != [p._version for p in cell.parameters()]:
            pytest.skip("this torch says that a fused optimizer changes them")
    with pytest.raises(RuntimeError, match=r"segment \d differs in replay"):
        loss.backward()
