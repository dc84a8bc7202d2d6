"""The writers against loops over slots and heads, and what they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import naive
from helpers import WRITERS, mask
from memformer.nn.attention import merge_heads, split_heads
from memformer.nn.memory import (
    SPEED,
    NormalisedWriter,
    PlacedWriter,
    SlotWriter,
    new_writer,
    normalise,
    slot_attention,
    slot_attention_weights,
    slow_linear,
)

DIM, SLOTS, HEADS, BATCH, LENGTH = 8, 3, 2, 2, 5
MASKS = [None, mask("11100", "01011"), mask("00000", "11111")]


def make(kind: str, temperature: float = 0.5) -> SlotWriter:
    writer = new_writer(kind, DIM, SLOTS, HEADS, temperature, 0.001, LENGTH + 2).double()
    for parameter in writer.parameters():
        nn.init.normal_(parameter, std=0.7)
    return writer


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(actual: Tensor, expected: Tensor, sources: list[Tensor]) -> None:
    """The values, and the gradients of ``sources``."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(actual)
    pairs = (torch.autograd.grad(x, sources, upstream, retain_graph=True) for x in (actual, expected))
    torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kept", MASKS)
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_slot_attention_equals_loops(kept: Tensor | None, temperature: float) -> None:
    slots, segment = [randn(BATCH, SLOTS, DIM) for _ in range(3)], [randn(BATCH, LENGTH, DIM) for _ in range(2)]
    parts = [split_heads(x, HEADS) for x in (*slots, *segment)]
    actual = merge_heads(slot_attention(*parts, mask=kept, temperature=temperature))
    lanes = [
        naive.slot_attention(*(x[b] for x in (*slots, *segment)), HEADS, None if kept is None else kept[b], temperature)
        for b in range(BATCH)
    ]
    assert_same(actual, torch.stack(lanes), slots + segment)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("kept", MASKS)
def test_writer_equals_loops(kind: str, kept: Tensor | None) -> None:
    writer, memory, x = make(kind), randn(BATCH, SLOTS, DIM), randn(BATCH, LENGTH, DIM)
    lanes = [naive.write(writer, memory[b], x[b], None if kept is None else kept[b]) for b in range(BATCH)]
    # The initial memory's parameter of the gated writer is not part of a write.
    sources = [p for name, p in writer.named_parameters() if name != "slots"]
    assert_same(writer(memory, x, kept), torch.stack(lanes), [memory, x, *sources])


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("kept", MASKS)
def test_attention_on_itself_equals_loops(kind: str, kept: Tensor | None) -> None:
    """With 1 for the slot's own value and 0 for the tokens', what a head finds is the share on the slot itself."""
    writer, memory, x = make(kind), randn(BATCH, SLOTS, DIM), randn(BATCH, LENGTH, DIM)
    q, own_k, _, k, _ = (merge_heads(part) for part in writer.projected(memory, x))
    ones, zeros = torch.ones_like(q[0]), torch.zeros_like(x[0])
    places = getattr(writer, "places", None)
    found = [
        naive.slot_attention(
            q[b], own_k[b], ones, k[b], zeros, HEADS, None if kept is None else kept[b], 0.5, places
        ).mean(-1)
        for b in range(BATCH)
    ]
    torch.testing.assert_close(writer.attention_on_itself(memory, x, kept), torch.stack(found), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", WRITERS)
def test_slots_do_not_see_each_other(kind: str) -> None:
    writer, memory, x = make(kind), randn(1, SLOTS, DIM), randn(1, LENGTH, DIM)
    before = writer(memory, x)
    changed = memory.detach().clone()
    changed[:, 1] = torch.randn(DIM)
    after = writer(changed, x)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.allclose(after[:, 1], before[:, 1])
    (grad,) = torch.autograd.grad(before[:, 0].sum(), memory)
    assert grad[:, 0].abs().sum() > 0
    assert not grad[:, 1:].any()


@pytest.mark.parametrize("kind", WRITERS)
def test_masked_tokens_do_not_reach_the_memory(kind: str) -> None:
    writer, memory, x = make(kind), randn(1, SLOTS, DIM), randn(1, LENGTH, DIM)
    kept = mask("01101")
    written = writer(memory, x, kept)
    torch.testing.assert_close(written, writer(memory, x[:, kept[0]]), rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(written.square().sum() + written.sum(), x)
    assert not grad[~kept].any()
    assert (grad[kept] != 0).all()


def test_a_slot_that_attends_itself_alone_keeps_its_content() -> None:
    """Exactly: there is no projection of the slot's own value, and none after the heads."""
    writer, memory, x = make("normalised"), randn(BATCH, SLOTS, DIM), randn(BATCH, LENGTH, DIM)
    nothing = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    assert torch.equal(writer.attend(memory, x, nothing), memory)
    with torch.no_grad():  # and so where the slot's own key outshines every token's
        writer.slots_to_qk.weight.copy_(1e3 * torch.eye(DIM).repeat(2, 1))
        writer.segment_to_kv.weight[:DIM] = 0
        writer.norm.bias.zero_()
        writer.norm.weight.fill_(1)
    assert torch.equal(writer.attend(memory, x), memory)


def test_with_nothing_written_a_slot_drifts_to_where_it_began() -> None:
    writer = make("normalised")
    initial = writer.initial(1)
    memory = torch.nn.functional.normalize(initial + 0.5 * torch.randn(1, SLOTS, DIM), dim=-1)
    nothing = torch.zeros(1, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(writer(initial, randn(1, LENGTH, DIM), nothing), initial)
    writer.write_with(temperature=0.5, forgetting=0.01)
    for _ in range(1_600):  # at 0.01 each, the distance shrinks by exp(-16)
        memory = writer(memory, randn(1, LENGTH, DIM), nothing)
    torch.testing.assert_close(memory, initial, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_normalised_memory_has_norm_1(dtype: torch.dtype) -> None:
    writer = make("normalised").to(dtype)
    memory = writer.initial(BATCH)
    for _ in range(4):
        torch.testing.assert_close(memory.norm(dim=-1), torch.ones(BATCH, SLOTS, dtype=dtype), rtol=0, atol=1e-6)
        memory = writer(memory, 3 * torch.randn(BATCH, LENGTH, DIM, dtype=dtype))


def test_normalise_is_the_papers() -> None:
    memory, bias = randn(BATCH, SLOTS, DIM), randn(SLOTS, DIM)
    moved = memory[1, 2] + bias[2]
    torch.testing.assert_close(normalise(memory, bias)[1, 2], moved / moved.square().sum().sqrt())


@pytest.mark.parametrize("kind", WRITERS)
def test_the_initial_memory_is_learned_and_the_same_for_all_lanes(kind: str) -> None:
    writer = make(kind)
    initial = writer.initial(3)
    assert initial.shape == (3, SLOTS, DIM)
    assert torch.equal(initial[0], initial[2])
    parameter = writer.get_parameter(writer.per_slot)
    (grad,) = torch.autograd.grad((initial * torch.randn_like(initial)).sum(), parameter)
    assert (grad != 0).all()


def test_a_low_temperature_sharpens() -> None:
    """Near zero a slot takes the value of the one thing that it matches best."""
    q, own_k, own_v = (torch.randn(1, 1, 1, 4) for _ in range(3))
    k, v = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    best = torch.cat([own_k, k], 2).mul(q).sum(-1).argmax()
    expected = torch.cat([own_v, v], 2)[0, 0, best]
    torch.testing.assert_close(slot_attention(q, own_k, own_v, k, v, temperature=1e-4)[0, 0, 0], expected)


@pytest.mark.parametrize(("dim", "heads"), [(32, 4), (64, 4), (256, 8)])
def test_a_slot_of_a_new_model_gives_itself_most_of_its_attention_at_any_width(dim: int, heads: int) -> None:
    writer = NormalisedWriter(dim, 32, heads, 0.25).double()
    x = torch.nn.functional.layer_norm(randn(8, 16, dim), (dim,))
    content = torch.nn.functional.normalize(randn(8, 32, dim), dim=-1)
    assert 0.6 < writer.attention_on_itself(content, x).mean().item() < 0.85
    assert 0.85 < writer.attention_on_itself(writer.initial(8), x).mean().item() < 0.99, "its content is its name"


def test_slots_that_hold_the_same_do_not_stay_the_same() -> None:
    writer = NormalisedWriter(64, 8, 4, 0.25)
    memory = torch.nn.functional.normalize(torch.randn(1, 1, 64), dim=-1).expand(1, 8, 64)
    for _ in range(10):
        memory = writer(memory, torch.nn.functional.layer_norm(torch.randn(1, 16, 64), (64,)))
    cosines = memory[0] @ memory[0].T
    assert (cosines.sum() - 8) / 56 < 0.5


def test_an_unknown_writer_is_refused() -> None:
    with pytest.raises(ValueError, match="kind: expected normalised, placed or gated, got 'fast'"):
        new_writer("fast", DIM, 2, 1, 0.25, 0.0, 4)


def test_a_new_bias_vector_forgets_slowly() -> None:
    """Content that is kept is still the larger part after 100 segments."""
    writer = make("normalised")
    content = torch.nn.functional.normalize(randn(1, SLOTS, DIM), dim=-1)
    memory, nothing = content, torch.zeros(1, LENGTH, dtype=torch.bool)
    for _ in range(100):
        memory = writer(memory, randn(1, LENGTH, DIM), nothing)
    assert ((memory * content).sum(-1) > 0.7).all()


def test_a_slow_map_is_a_linear_map_that_adam_changes_more_slowly() -> None:
    torch.manual_seed(0)
    slow, usual = slow_linear(DIM, 3).double(), torch.nn.Linear(DIM, 3, bias=False).double()
    with torch.no_grad():
        usual.weight.copy_(0.3 * slow.weight)
    before, x = usual.weight.detach().clone(), randn(BATCH, DIM)
    torch.testing.assert_close(SPEED * slow(x), usual(x))
    for part, speed in ((slow, SPEED), (usual, 1)):
        optimizer = torch.optim.Adam(part.parameters(), lr=1e-3, eps=0)
        (speed * part(x)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(0.3 * slow.weight - before, 0.3 * (usual.weight - before), rtol=1e-3, atol=1e-6)
    std = 0.3 * slow_linear(64, 1000).weight.std().item()
    assert std == pytest.approx((3 * 64) ** -0.5, rel=0.02), "it begins as any other"


def test_a_segment_is_divided_among_the_heads_of_slots() -> None:
    """In order, whatever its length; masked tokens do not count."""
    writer = PlacedWriter(DIM, 3, 2, 0.25, 12)
    near = writer.places.view(6, 13)[:, 1:] > 0
    assert near.any(1).all()
    assert near.any(0).all()
    centres = (near * torch.arange(12)).sum(1) / near.sum(1)
    assert (centres.diff() > 0).all()
    whole = writer.preference(torch.zeros(1, 12, DIM), None)
    assert torch.equal(whole[0], writer.places.transpose(0, 1))
    half = writer.preference(torch.zeros(1, 6, DIM), None)
    assert torch.equal(half, whole[..., [0, *range(1, 13, 2)]])
    kept = mask("0110111100")
    of_kept = writer.preference(torch.zeros(1, 10, DIM), kept)
    assert torch.equal(of_kept[..., 1:][..., kept[0]], half[..., 1:])
    assert torch.equal(of_kept[..., 0], half[..., 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_places_are_the_same_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    expected = PlacedWriter(64, 32, 8, 1.0, 512).places
    torch.set_default_dtype(dtype)
    try:
        places = PlacedWriter(64, 32, 8, 1.0, 512).places
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(places.float(), expected)


def test_a_new_placed_slot_takes_most_from_its_place() -> None:
    writer = PlacedWriter(64, 4, 2, 0.25, 32)
    memory, x = writer.initial(8), torch.nn.functional.layer_norm(torch.randn(8, 32, 64), (64,))
    q, own_k, _, k, _ = writer.projected(memory, x)
    preference = writer.preference(x, None)
    on_itself, on_segment = slot_attention_weights(q, own_k, k, temperature=0.25, preference=preference)
    assert on_itself.mean() < 0.1
    near = (preference[..., 1:] > 0).expand_as(on_segment)
    assert on_segment[near].sum() / on_segment.sum() > 0.6
    assert near.float().mean() < 0.2
