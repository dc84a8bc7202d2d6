"""The loss of a vocabulary, without all of its logits at once.

The logits of a large vocabulary are a language model's largest tensor, and nobody wants them: a loss needs one number
per token, and a gradient two products. So they are made a few rows at a time. Where the weight of each token in the
final loss is known beforehand, a row's gradient is computed while its logits are there (as in Liger Kernel, Hsu et al.,
2024); elsewhere backward makes them again. ``torch.nn.functional.linear_cross_entropy``, which torch has since 2.13,
does the first for means and sums alone, and is slower on a CPU (docs/log.md).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..checks import IGNORED

__all__ = ["Head", "VocabularyLoss", "each_loss", "vocabulary_loss"]

LOGITS_AT_ONCE = 2**20
"""On a CPU, 4 MiB in float32: fewer are made in one piece by torch's own functions, whose calls take less time."""
LOGITS_ON_A_CARD = 2**26
"""On any other device, which needs larger products to be busy; chosen, and not yet measured."""
FEWEST_ROWS = 256
"""In each part, however large the vocabulary: the fewer, the more often all of the matrix's gradient is added to."""


class Head(NamedTuple):
    """An output projection that is no module of its own: logits = hidden @ weight.T + bias.

    Attributes:
        weight: (vocabulary, dim).
        bias: (vocabulary,).
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> (..., vocabulary)."""
        return F.linear(hidden, self.weight, self.bias)


class VocabularyLoss(NamedTuple):
    """What :func:`vocabulary_loss` returns.

    Attributes:
        losses: of each token in nats, of the shape of its targets, zero where a target is ignored; float32 at least.
            Differentiable, too, but for that the logits are made a second time.
        total: the sum of the losses, each divided by its divisor, a scalar; None without divisors.
    """

    losses: Tensor
    total: Tensor | None


def vocabulary_loss(
    hidden: Tensor, head: nn.Module | Head, expected: Tensor, divisor: Tensor | float | None = None
) -> VocabularyLoss:
    """The cross-entropy of targets and the logits that a head makes of hidden states.

    Logits are made in parts if there are more than :data:`LOGITS_AT_ONCE`, which is the smaller way, and for a total
    the faster one. The gradient by the matrix is then kept until backward, so this needs at least ``dim`` tokens: of
    fewer the logits would be smaller. All that only of an ``nn.Linear`` as torch made it, or of a :class:`Head`: what
    else may be a head (a quantised projection, an adapter, one with hooks) is called, and so is any in ``torch.func``
    and in compiled code.

    Args:
        hidden: (..., dim).
        head: what makes logits (..., vocabulary) of them.
        expected: (...) token ids; -100 is ignored.
        divisor: a number, or a tensor that broadcasts to (...): what each loss is divided by in ``total``. It gets no
            gradient.
    """
    shape, hidden, targets = expected.shape, hidden.flatten(0, -2), expected.flatten().long()
    weights = None if divisor is None else _reciprocal(divisor, expected, hidden.dtype)
    matrix = _matrix(head)
    if matrix is not None:
        at_once = LOGITS_AT_ONCE if hidden.device.type == "cpu" else LOGITS_ON_A_CARD
        rows = max(FEWEST_ROWS, at_once // len(matrix.weight))
        if len(hidden) > rows:
            learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, *matrix))
            known = weights if learns and len(hidden) >= hidden.shape[1] else None
            losses, total = _InParts.apply(hidden, *matrix, targets, known, rows)  # type: ignore[no-untyped-call]
            if weights is not None and known is None:
                total = (losses * weights).sum()
            return VocabularyLoss(losses.view(shape), total)
    losses = each_loss(head(hidden), targets)
    return VocabularyLoss(losses.view(shape), None if weights is None else (losses * weights).sum())


def each_loss(logits: Tensor, expected: Tensor) -> Tensor:
    """The cross-entropy of each target in nats, zero where it is -100; float32 at least.

    Args:
        logits: (..., vocabulary).
        expected: (...) token ids.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # In one dimension: of (batch, tokens) CUDA has no deterministic loss, and the CPU is half as fast.
    flat = F.cross_entropy(logits.flatten(0, -2), expected.flatten().long(), ignore_index=IGNORED, reduction="none")
    return flat.view(expected.shape)


def _reciprocal(divisor: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """One for each of ``like``'s elements, in one dimension; in single precision at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    if isinstance(divisor, Tensor):
        return divisor.detach().to(dtype).reciprocal().expand(like.shape).flatten()
    return torch.full((like.numel(),), 1 / divisor, dtype=dtype, device=like.device)


def _matrix(head: nn.Module | Head) -> Head | None:
    """The matrix that a head is, if it is nothing else, and its gradient may be computed here."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active() or getattr(forward_ad, "_current_level", -1) >= 0:
        return None
    if isinstance(head, Head):
        return head
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    if any((head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)):
        return None
    return Head(head.weight, head.bias)


class _InParts(torch.autograd.Function):
    """``(losses, total)``; without weights ``total`` is None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        rows: int,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        kind = hidden.device.type
        ctx.product = hidden.dtype  # of the matrix products: as autocast has it
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
            ctx.product = torch.get_autocast_dtype(kind)
        ctx.rows = rows
        losses, grads = _in_parts(ctx, hidden, weight, bias, targets, weights)
        ctx.save_for_backward(hidden, weight, bias, targets, weights, *grads)
        return losses, None if weights is None else (losses * weights).sum()

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor | None, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, weights, *grads = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a gradient of the gradient is asked for
            return *_plain_gradients(hidden, weight, bias, targets, weights, by_loss, scale), None, None, None
        found: list[Tensor | None] = [None] * 3
        if scale is not None:
            found = [None if grad is None else grad * scale.to(grad.dtype) for grad in grads]
        if by_loss is not None:
            _, others = _in_parts(ctx, hidden, weight, bias, targets, by_loss)
            found = [a if b is None else b if a is None else a + b for a, b in zip(found, others, strict=True)]
        return *found, None, None, None


def _in_parts(
    ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, by_loss: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """All losses, and the gradients by hidden, weight and bias, given those by the losses (None: no gradients)."""
    wide = torch.promote_types(ctx.product, torch.float32)
    losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    counted = targets != IGNORED
    places = targets.where(counted, 0)[:, None]
    by_hidden = by_weight = by_bias = None
    if by_loss is not None:
        by_loss = (by_loss * counted).to(wide)[:, None]
        needs = ctx.needs_input_grad
        by_hidden = torch.empty_like(hidden) if needs[0] else None
        by_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        by_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs[2] else None
        # In half precision the largest factor is 1/64, however small a share of the loss a token has and however many
        # of them are added up: nothing underflows or overflows.
        lift = 64 * by_loss.abs().amax().clamp(min=torch.finfo(wide).tiny) if ctx.product == torch.float16 else None
        factors = by_loss if lift is None else by_loss / lift
    kind = hidden.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        narrow, matrix = hidden.to(ctx.product), weight.to(ctx.product)
        added = None if bias is None else bias.to(ctx.product)
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            chances = F.linear(narrow[part], matrix, added).log_softmax(1, dtype=wide)
            expected = chances.gather(1, places[part])
            losses[part] = -expected[:, 0]
            if by_loss is None:
                continue
            # The gradient by the logits, but for each row's factor, which the narrower matrices are multiplied by.
            error = chances.exp_().scatter_(1, places[part], expected.expm1())
            if by_bias is not None:
                by_bias.addmv_(error.T, by_loss[part, 0])
            error = error.to(ctx.product)
            if by_hidden is not None:
                by_hidden[part] = (error @ matrix) * by_loss[part]
            if by_weight is not None:
                scaled = (narrow[part] * factors[part]).to(ctx.product)
                if ctx.product == wide:
                    by_weight.addmm_(error.T, scaled)
                else:
                    product = error.T @ scaled
                    by_weight += product if lift is None else product.to(wide) * lift
    grads = (by_hidden, by_weight, by_bias)
    likes = (hidden, weight, bias)
    return losses * counted, [g if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, likes, strict=True)]


def _plain_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    by_loss: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients with a graph of their own, from all logits at once."""
    losses = F.cross_entropy(F.linear(hidden, weight, bias), targets, ignore_index=IGNORED, reduction="none")
    outputs = [(losses, by_loss)]
    if scale is not None and weights is not None:
        outputs.append(((losses * weights).sum(), scale))
    pairs = [(x, g) for x, g in outputs if g is not None]
    inputs = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad([x for x, _ in pairs], inputs, [g for _, g in pairs], create_graph=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in (hidden, weight, bias))
