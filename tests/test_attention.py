"""Attention and blocks against loops over heads, queries and keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import naive
from helpers import POSITIONS, mask
from memformer.nn.attention import ContextProjection, CrossAttention, SelfAttention, merge_heads, split_heads
from memformer.nn.blocks import Block
from memformer.nn.positions import BucketedBias, RelativeEncoding, Rotary

DIM, HEADS = 8, 2


def make_positions(kind: str, causal: bool) -> nn.Module:
    positions = {"rotary": Rotary, "relative": RelativeEncoding}.get(kind)
    return BucketedBias(HEADS, causal) if positions is None else positions(DIM // HEADS, 6)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_heads_split_and_merge() -> None:
    x = randn(2, 5, DIM)
    assert torch.equal(split_heads(x, HEADS)[1, 1, 3], x[1, 3, 4:])
    assert torch.equal(merge_heads(split_heads(x, HEADS)), x)


@pytest.mark.parametrize("kept", [None, mask("11010", "00111")])
def test_self_attention(kept: torch.Tensor | None) -> None:
    part, x = SelfAttention(DIM, HEADS, Rotary(DIM // HEADS, 6)).double(), randn(2, 5, DIM)
    actual = part(x, None if kept is None else kept[:, None, None, :])
    for b in range(2):
        q, k, v = part.to_qkv(x[b]).chunk(3, -1)
        allowed = None if kept is None else kept[b].expand(5, -1)
        expected = part.to_out(naive.attention(q, k, v, HEADS, allowed, part.positions))
        torch.testing.assert_close(actual[b], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kept", [None, mask("110", "011")])
def test_cross_attention(kept: torch.Tensor | None) -> None:
    part, x, k, v = CrossAttention(DIM, HEADS).double(), randn(2, 5, DIM), randn(2, 3, DIM), randn(2, 3, DIM)
    context = split_heads(k, HEADS), split_heads(v, HEADS)
    actual = part(x, context, None if kept is None else kept[:, None, None, :])
    for b in range(2):
        allowed = None if kept is None else kept[b].expand(5, -1)
        expected = part.to_out(naive.attention(part.to_q(x[b]), k[b], v[b], HEADS, allowed))
        torch.testing.assert_close(actual[b], expected, rtol=1e-11, atol=1e-11)


def test_context_projection_gives_each_layer_its_own() -> None:
    projection, context = ContextProjection(DIM, HEADS, layers=3).double(), randn(2, 4, DIM)
    pairs = projection(context)
    assert len(pairs) == 3
    for layer, pair in enumerate(pairs):
        for actual, expected in zip(pair, naive.layer_context(projection.to_kv, context, layer, DIM), strict=True):
            torch.testing.assert_close(merge_heads(actual), expected)


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_block_with_its_gradients(kind: str, causal: bool) -> None:
    layer = Block(DIM, HEADS, make_positions(kind, causal), causal, dropout=0.0).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, k, v = randn(1, 5, DIM), randn(1, 3, DIM), randn(1, 3, DIM)
    actual = layer(x, (split_heads(k, HEADS), split_heads(v, HEADS)))
    allowed = torch.ones(5, 5, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    expected = naive.block(layer, x[0], k[0], v[0], allowed, None)[None]
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)

    sources, upstream = [x, k, v, *layer.parameters()], torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, sources, upstream),
        torch.autograd.grad(expected, sources, upstream),
        rtol=1e-10,
        atol=1e-10,
    )


def test_each_sublayer_has_dropout() -> None:
    layer, x, k = (
        Block(DIM, HEADS, Rotary(DIM // HEADS, 6), causal=False, dropout=0.5).double(),
        randn(1, 5, DIM),
        randn(1, 3, DIM),
    )
    context = split_heads(k, HEADS), split_heads(k, HEADS)
    for part in (layer.self_attention.to_out, layer.context_attention.to_out, layer.feed_forward[-1]):
        # This one alone adds something: what it adds is dropped or doubled.
        for other in (layer.self_attention.to_out, layer.context_attention.to_out, layer.feed_forward[-1]):
            nn.init.constant_(other.weight, 0)
            nn.init.constant_(other.bias, 1 if other is part else 0)
        assert (layer(x, context) - x).round(decimals=9).unique().tolist() == [0, 2]
    assert torch.equal(layer.eval()(x, context), x + 1)


def test_rows_of_a_context_in_parts_are_more_rows() -> None:
    context = randn(2, 3, DIM)
    parts = context.view(2, 6, DIM // 2)
    whole, halves = (ContextProjection(DIM, HEADS, 2, count).double() for count in (1, 2))
    assert halves.to_kv.weight.shape == (4 * DIM, DIM // 2)
    for layer, pair in enumerate(halves(context)):
        for actual, expected in zip(pair, naive.layer_context(halves.to_kv, parts, layer, DIM), strict=True):
            torch.testing.assert_close(merge_heads(actual), expected)
    assert whole(context)[0][0].shape == (2, HEADS, 3, DIM // HEADS)
