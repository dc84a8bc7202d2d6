"""The loss of a vocabulary in parts, against torch's functions on all logits at once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from memformer import CausalMemformer, Memformer, memory_replay_backprop
from memformer.nn import losses
from memformer.nn.losses import Head, vocabulary_loss

DIM, VOCABULARY = 5, 11


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch):
    """Every loss of more than three tokens is made in parts of three rows."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(losses, "LOGITS_ON_A_CARD", 1)
    monkeypatch.setattr(losses, "FEWEST_ROWS", 3)


class Widest(TorchDispatchMode):
    """The most elements of a tensor that an operation inside returned, and the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.names = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        self.names.add(function.overloadpacket.__name__)
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def example(rows: int = 10, bias: bool = True, ignored: str = "some", dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(2, rows // 2, DIM, dtype=dtype)
    head = nn.Linear(DIM, VOCABULARY, bias=bias, dtype=dtype)
    expected = torch.randint(VOCABULARY, (2, rows // 2))
    if ignored != "none":
        expected[:, 1:3] = -100
    if ignored == "all":
        expected[:] = -100
    return hidden.requires_grad_(), head, expected, torch.rand(2, rows // 2, dtype=dtype) + 0.5


def plainly(hidden: Tensor, head: nn.Module, expected: Tensor, divisor) -> tuple[Tensor, Tensor]:
    logits = head(hidden).flatten(0, 1)
    each = F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, expected.flatten(),
                           ignore_index=-100, reduction="none").view_as(expected)  # fmt: skip
    return each, (each / divisor).sum()


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    loss.backward()
    found = [hidden.grad, *(p.grad for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    return found


def chosen(total: Tensor, each: Tensor, which: str) -> Tensor:
    factors = torch.linspace(-1, 2, each.numel(), dtype=each.dtype).view_as(each)
    return {"total": 3 * total, "each": (each * factors).sum(), "both": total + (each * factors).sum()}[which]


@pytest.mark.parametrize("which", ["total", "each", "both"])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("number", [True, False])
def test_equals_the_plain_loss(in_parts, which: str, ignored: str, bias: bool, number: bool) -> None:
    hidden, head, expected, divisor = example(bias=bias, ignored=ignored)
    divisor = 7.3 if number else divisor
    each, total = plainly(hidden, head, expected, divisor)
    wanted = gradients(chosen(total, each, which), hidden, head)
    with Widest() as widest:
        found = vocabulary_loss(hidden, head, expected, divisor)
    assert widest.elements < 10 * VOCABULARY, "all logits at once"
    assert_close((found.losses, found.total), (each, total), rtol=1e-13, atol=1e-13)
    assert_close(gradients(chosen(found.total, found.losses, which), hidden, head), wanted, rtol=1e-12, atol=1e-12)


def test_no_operation_that_cuda_cannot_do_deterministically(in_parts) -> None:
    hidden, head, expected, divisor = example()
    with Widest() as widest:
        vocabulary_loss(hidden, head, expected, divisor).total.backward()
    assert "scatter_" in widest.names
    assert not widest.names & {"scatter_add_", "index_add_", "index_put_", "cumsum", "nll_loss2d_forward"}


def test_a_second_backward_and_a_gradient_of_a_gradient(in_parts) -> None:
    hidden, head, expected, divisor = example()
    given = (hidden, *head.parameters())

    def twice(total: Tensor, each: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(total + each.square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), given)

    each, total = plainly(hidden, head, expected, divisor)
    wanted = twice(total, each)
    found = vocabulary_loss(hidden, head, expected, divisor)
    assert_close(twice(found.total, found.losses), wanted, rtol=1e-11, atol=1e-11)
    found = vocabulary_loss(hidden, head, expected, divisor).total
    first = torch.autograd.grad(found, given, retain_graph=True)
    assert_close(torch.autograd.grad(found, given), first, rtol=0, atol=0)


def test_what_needs_no_gradient_gets_none(in_parts) -> None:
    hidden, head, expected, divisor = example()
    each, total = plainly(hidden, head, expected, divisor)
    wanted = gradients(total, hidden, head)
    head.weight.requires_grad_(False)
    vocabulary_loss(hidden, head, expected, divisor).total.backward()
    assert head.weight.grad is None
    assert_close([hidden.grad, head.bias.grad], [wanted[0], wanted[2]])
    head.requires_grad_(False)
    constant = vocabulary_loss(hidden.detach(), head, expected, divisor)
    assert not constant.total.requires_grad
    assert_close((constant.losses, constant.total), (each.detach(), total.detach()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [True, False], ids=["half", "autocast"])
def test_half_precision_is_right_within_rounding(in_parts, dtype: torch.dtype, whole: bool) -> None:
    """No worse than the plain loss in the same precision, both against float64."""
    hidden, head, expected, divisor = example(rows=40)
    each, total = plainly(hidden, head, expected, divisor)
    exact = gradients(total, hidden, head)
    low = dtype if whole else torch.float32
    hidden, head = hidden.detach().to(low).requires_grad_(), copy.deepcopy(head).to(low)
    errors = {}
    for name in ("plain", "in parts"):
        with torch.autocast("cpu", dtype, enabled=not whole):
            if name == "plain":
                logits = head(hidden).float().flatten(0, 1)
                values = F.cross_entropy(logits, expected.flatten(), reduction="none").view_as(expected)
                loss = (values / divisor.float()).sum()
            else:
                values, loss = vocabulary_loss(hidden, head, expected, divisor)
        assert values.dtype == torch.float32
        found = gradients(loss, hidden, head)
        assert all(g.dtype == low for g in found)
        pairs = zip([values, *found], [each, *exact], strict=True)
        errors[name] = [float((x.detach().double() - y.detach()).norm() / y.detach().norm()) for x, y in pairs]
    for plain, mine in zip(errors["plain"], errors["in parts"], strict=True):
        assert mine < 1.5 * plain + 1e-6, errors


def test_in_float16_nothing_underflows_or_overflows(in_parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's share of the loss may be far below the smallest number, and a thousand rows may add up in one."""
    monkeypatch.setattr(losses, "FEWEST_ROWS", 4000)
    torch.manual_seed(0)
    hidden, head = torch.randn(8000, DIM) * 5 + 20, nn.Linear(DIM, VOCABULARY)
    head.weight.data *= 0.01
    expected = torch.zeros(8000, dtype=torch.long)
    (plainly(hidden[None], head, expected[None], 1.0)[1] / 2**30).backward()
    wanted = head.weight.grad.clone()
    head.zero_grad()
    with torch.autocast("cpu", torch.float16):
        vocabulary_loss(hidden, head, expected, 2.0**30).total.backward()
    assert_close(head.weight.grad, wanted, rtol=5e-3, atol=1e-9)


def test_on_a_device_without_autocast_and_without_values(in_parts) -> None:
    hidden, head, expected, divisor = example()
    moved = [x.detach().to("meta") for x in (hidden, expected, divisor)]
    moved[0].requires_grad_()
    found = vocabulary_loss(moved[0], head.to("meta"), *moved[1:])
    found.total.backward()
    assert found.losses.shape == expected.shape
    assert moved[0].grad.shape == hidden.shape


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("kind", ["subclass", "hook", "replaced", "parametrised", "head"])
def test_a_head_that_is_more_than_a_matrix_is_called(in_parts, kind: str) -> None:
    hidden, head, expected, divisor = example()
    if kind == "subclass":
        head = Scaled(DIM, VOCABULARY).double()
    elif kind == "hook":
        head.register_forward_hook(lambda module, given, out: out * 2)
    elif kind == "replaced":
        head.forward = lambda x, forward=head.forward: forward(x) * 2
    elif kind == "parametrised":
        nn.utils.parametrizations.weight_norm(head)
    else:
        module, head = head, Head(head.weight, head.bias)
    each, total = plainly(hidden, head, expected, divisor)
    owner = module if kind == "head" else head
    wanted = gradients(total, hidden, owner)
    found = vocabulary_loss(hidden, head, expected, divisor)
    assert_close((found.losses, found.total), (each, total))
    assert_close(gradients(found.total, hidden, owner), wanted)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_torch_func_and_forward_mode_make_all_logits(in_parts) -> None:
    hidden, head, expected, divisor = example()

    def loss(weight: Tensor) -> Tensor:
        return vocabulary_loss(hidden, Head(weight, head.bias), expected, divisor).total

    (wanted,) = torch.autograd.grad(loss(head.weight), head.weight)
    assert_close(torch.func.grad(loss)(head.weight.detach()), wanted)
    direction = torch.randn_like(head.weight)
    _, tangent = torch.func.jvp(loss, (head.weight.detach(),), (direction,))
    assert_close(tangent, (wanted * direction).sum())


class NoLogits(TorchFunctionMode):
    """Fails where a linear map gives the logits of more than ``rows`` rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.made = rows, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is F.linear and out.shape[-1] == VOCABULARY:
            self.made += 1
            assert out[..., 0].numel() <= self.rows
        return out


@pytest.mark.parametrize("kind", ["encoder and decoder", "causal"])
@pytest.mark.parametrize("tied", [True, False])
def test_models_never_make_all_logits(in_parts, kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, its loss alone and the loss of each segment, tied embeddings too; equal to that of all logits."""
    torch.manual_seed(0)
    sizes = dict(dim=8, num_memory_slots=2, mem_update_attn_heads=2, tie_embeddings=tied)
    if kind == "causal":
        model = CausalMemformer(**sizes, num_tokens=VOCABULARY, depth=3, heads=2, max_seq_len=4).double()
        given = dict(src=torch.randint(VOCABULARY, (2, 16)))
    else:
        words = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in
                 dict(num_tokens=VOCABULARY, depth=1, heads=2, max_seq_len=6).items()}  # fmt: skip
        model = Memformer(**sizes, **words).double()
        targets = [torch.randint(VOCABULARY, (2, 6)) for _ in range(4)]
        targets[1][0, 3:] = -100
        given = dict(src=torch.randint(VOCABULARY, (2, 24)), tgt=targets)

    def run(**options) -> list[Tensor]:
        loss, _ = memory_replay_backprop(model, **given, **options)
        found = [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
        return found

    for options in (dict(), dict(reduction="mean"), dict(segment_weights=[1.0, 0.5, 2.0, 1.0])):
        with NoLogits(3) as mode:
            found = run(**options)
        assert mode.made > 3
        with monkeypatch.context() as patch:
            patch.setattr(losses, "FEWEST_ROWS", 10_000)
            assert_close(found, run(**options), rtol=1e-12, atol=1e-12)
