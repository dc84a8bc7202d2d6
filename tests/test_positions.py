"""Positions against loops over pairs, and what they promise: only distances count, cached prefixes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import naive
from helpers import POSITIONS
from memformer.nn.attention import attend, causal_mask
from memformer.nn.positions import BucketedBias, RelativeEncoding, Rotary

HEADS, HEAD_DIM, MAX_LEN = 2, 4, 9


def make(kind: str, causal: bool = False) -> nn.Module:
    if kind == "bucketed":
        positions = BucketedBias(HEADS, causal)
    else:
        positions = {"rotary": Rotary, "relative": RelativeEncoding}[kind](HEAD_DIM, MAX_LEN)
    for parameter in positions.parameters():
        nn.init.normal_(parameter)
    return positions.double()


def inputs(length: int, keys: int, batch: int = 2) -> list[Tensor]:
    sizes = (length, keys, keys)
    return [torch.randn(batch, HEADS, n, HEAD_DIM, dtype=torch.float64, requires_grad=True) for n in sizes]


def reference(
    positions: nn.Module | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    lanes = []
    for b in range(len(q)):
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool) if mask is None else mask[b, 0]
        allowed = allowed.expand(q.shape[2], -1)
        if causal:
            start = k.shape[2] - q.shape[2]
            allowed = allowed & torch.tensor([[j <= start + i for j in range(k.shape[2])] for i in range(q.shape[2])])
        flat = (x[b].transpose(0, 1).flatten(1) for x in (q, k, v))
        lanes.append(naive.attention(*flat, HEADS, allowed, positions).unflatten(-1, (HEADS, -1)).transpose(0, 1))
    return torch.stack(lanes)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(5, 5), (1, 1), (2, 6), (1, 4), (MAX_LEN, MAX_LEN)])
@pytest.mark.parametrize("kind", [*POSITIONS, "none"])
def test_equals_loops_over_pairs(kind: str, length: int, keys: int, masked: bool, causal: bool) -> None:
    positions = None if kind == "none" else make(kind, causal)
    q, k, v = inputs(length, keys)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, keys) < 0.6
        mask[..., 0] = True  # with causal, the first query sees the first key alone
    actual = (positions or attend)(q, k, v, mask, causal)
    expected = reference(positions, q, k, v, mask, causal)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)

    sources = [q, k, v, *([] if positions is None else positions.parameters())]
    upstream = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, sources, upstream),
        torch.autograd.grad(expected, sources, upstream),
        rtol=1e-10,
        atol=1e-11,
    )


def test_relative_encoding_is_the_papers_equation() -> None:
    """v1, section 2.1, written out once more, without the reference that the other tests share."""
    positions, (q, k, v) = make("relative"), inputs(3, 3, batch=1)
    for h in range(HEADS):
        for i in range(3):
            rows = [positions.table[i - j + MAX_LEN - 1] for j in range(3)]
            logits = torch.stack([q[0, h, i] @ k[0, h, j] + q[0, h, i] @ rows[j] for j in range(3)])
            weights = (logits / HEAD_DIM**0.5).softmax(0)
            expected = sum(weights[j] * (v[0, h, j] + rows[j]) for j in range(3))
            torch.testing.assert_close(positions(q, k, v)[0, h, i], expected)


@pytest.mark.parametrize("kind", POSITIONS)
def test_queries_are_the_last_of_the_keys(kind: str) -> None:
    """A step with a cached prefix is the last row of the whole."""
    positions, (q, k, v) = make(kind, causal=True), inputs(6, 6)
    whole = positions(q, k, v, None, True)
    for n in (1, 2, 5):
        torch.testing.assert_close(positions(q[:, :, -n:], k, v, None, True), whole[:, :, -n:], rtol=1e-11, atol=1e-11)
    first_four = positions(q[:, :, 3:4], k[:, :, :4], v[:, :, :4], None, True)
    torch.testing.assert_close(first_four, whole[:, :, 3:4], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", POSITIONS)
def test_padding_in_front_changes_nothing(kind: str) -> None:
    """Only distances count."""
    positions, (q, k, v) = make(kind), inputs(4, 4)
    padded = [torch.cat([torch.randn(2, HEADS, 3, HEAD_DIM, dtype=torch.float64), x], 2) for x in (q, k, v)]
    mask = (torch.arange(7) >= 3).expand(2, 1, 1, 7)
    torch.testing.assert_close(positions(*padded, mask)[:, :, 3:], positions(q, k, v), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", POSITIONS)
def test_order_matters(kind: str) -> None:
    positions, (q, k, v) = make(kind), inputs(4, 4)
    moved = [x[:, :, [1, 0, 2, 3]] for x in (k, v)]
    assert not torch.allclose(positions(q, *moved), positions(q, k, v))


def test_rotary_logits_depend_on_the_distance() -> None:
    rotary = make("rotary")
    q, k = torch.randn(2, 1, HEAD_DIM, dtype=torch.float64)
    logits = {(i, j): float((rotary.rotate(q, i) * rotary.rotate(k, j)).sum()) for i in range(9) for j in range(9)}
    for (i, j), logit in logits.items():
        assert logit == pytest.approx(logits[max(i - j, 0), max(j - i, 0)], abs=1e-12)
    assert len({round(logit, 9) for logit in logits.values()}) == 17, "each distance has a logit of its own"


def test_rotary_is_exact_in_every_dtype() -> None:
    """Its tables are cast from full precision, not from those of the dtype before."""
    there_and_back = Rotary(HEAD_DIM, MAX_LEN).to(torch.bfloat16).double()
    torch.testing.assert_close(
        there_and_back.cos[1, 0], torch.tensor(1.0, dtype=torch.float64).cos(), rtol=0, atol=1e-15
    )
    assert torch.equal(there_and_back.float().sin, Rotary(HEAD_DIM, MAX_LEN).sin)


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_t5(causal: bool) -> None:
    distances = torch.arange(-300, 301)
    actual = BucketedBias(HEADS, causal).bucket(distances).tolist()
    assert actual == [naive.bucket(d, causal) for d in distances.tolist()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_buckets_are_the_same_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    bucket, distances = BucketedBias(HEADS, causal=True).bucket, torch.arange(2000)
    expected = bucket(distances)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(bucket(distances), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_buckets_tell_past_from_future() -> None:
    bucket = BucketedBias(HEADS, causal=False).bucket
    past, future = bucket(torch.arange(1, 400)), bucket(-torch.arange(1, 400))
    assert not set(past.tolist()) & set(future.tolist())
    for side in (past, future):
        assert (side.diff() >= 0).all(), "a longer distance is never in an earlier bucket"
        assert len(side.unique()) == 15, "the future is as finely cut as the past"
        assert len(side[:8].unique()) == 8, "short distances have buckets of their own"
    assert max(future) == 31
    assert bucket(torch.tensor(0)) == 0


def test_causal_buckets_use_all_for_the_past() -> None:
    past = BucketedBias(HEADS, causal=True).bucket(torch.arange(400))
    assert past.unique().tolist() == list(range(32))
    assert (past.diff() >= 0).all()


def test_causal_mask_is_aligned_at_the_end() -> None:
    expected = torch.tensor([[True, True, False], [True, True, True]])
    assert torch.equal(causal_mask(2, 3, torch.device("cpu")), expected)


@pytest.mark.parametrize("head_dim", [2, 16, 24, 128])
@pytest.mark.parametrize("distance", [0, 1, 4])
def test_rotary_can_prefer_a_distance(head_dim: int, distance: int) -> None:
    keys = 60
    rotary = Rotary(head_dim, keys).double()
    q, k = (rotary.rotate(x.expand(keys, -1)) for x in rotary.preferring(distance))
    logits = q @ k.T / head_dim**0.5
    for i in range(distance, keys):
        assert logits[i, : i + 1].argmax() == i - distance
        assert logits[i, i - distance].item() == pytest.approx(8)
