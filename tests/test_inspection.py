"""What is reported of a memory, against loops, and that looking changes nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from helpers import WRITERS, mask, memory, take_grads, tiny, tokens
from memformer.inspection import MemoryHealth, memory_health, slot_diversity
from memformer.segments import Segment


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("updates", [1, 2])
def test_memory_health_is_that_of_the_models_own_step(writer: str, updates: int) -> None:
    model = tiny(memory_writer=writer, num_mem_updates=updates)
    mems, reset = memory(model, 3), torch.tensor([False, True, False])
    segment = Segment(tokens(3, 6), mask("111111", "100000", "011100"), reset)
    before = torch.where(reset[:, None, None], model.get_initial_mem(3), mems)
    enc_out, after = model.step(segment.src, before, segment.src_mask)
    shares, written = [], before
    for _ in range(updates):
        shares.append(model.writer.attention_on_itself(written, enc_out, segment.src_mask))
        written = model.writer(written, enc_out, segment.src_mask)
    by_slot = torch.stack(shares).mean((0, 1))
    health = memory_health(model, segment, mems)
    expected = [by_slot.mean(), by_slot.min(), by_slot.max(), slot_diversity(after).mean()]
    torch.testing.assert_close(
        [health.self_attention, health.self_attention_min, health.self_attention_max, health.slot_diversity],
        torch.stack(expected).tolist(),
        rtol=1e-5,
        atol=1e-6,
    )
    assert 0 < health.self_attention_min < health.self_attention < health.self_attention_max < 1


def test_memory_health_leaves_out_lanes_without_a_token() -> None:
    model = tiny()
    src, mems = tokens(3, 6), memory(model, 3)
    padded = memory_health(model, Segment(src, mask("111111", "000000", "110000")), mems)
    kept = memory_health(model, Segment(src[[0, 2]], mask("111111", "110000")), mems[[0, 2]])
    assert vars(padded) == pytest.approx(vars(kept), rel=1e-6)
    # Where nothing at all is written, every slot attends itself alone.
    assert memory_health(model, Segment(src, torch.zeros(3, 6, dtype=torch.bool)), None).self_attention == 1


def test_memory_health_changes_nothing() -> None:
    """Not the generators, nor any part's mode, nor gradients, nor hooks; and dropout does not show."""
    model = tiny(dropout=0.5)
    model.decoder.eval()
    modes = [part.training for part in model.modules()]
    assert any(modes)
    assert not all(modes)
    segment, mems = Segment(tokens(2, 6)), memory(model, 2)
    generator = torch.get_rng_state()
    health = memory_health(model, segment, mems)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [part.training for part in model.modules()] == modes
    assert not any(grad is not None for grad in take_grads(model).values())
    assert not model.writer._forward_pre_hooks
    assert health == memory_health(model, segment, mems) == memory_health(model.eval(), segment, mems)


def test_memory_health_of_an_encoder_only_model_and_of_bfloat16() -> None:
    health = memory_health(tiny(encoder_only=True).bfloat16(), Segment(tokens(2, 6)), None)
    assert all(isinstance(number, float) for number in vars(health).values())
    assert isinstance(health, MemoryHealth)


def test_slot_diversity_equals_loops() -> None:
    slots = torch.randn(2, 4, 5, dtype=torch.float64)
    cosines = [[float(F.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(lane, 2)] for lane in slots]
    torch.testing.assert_close(slot_diversity(slots), 1 - torch.tensor(cosines, dtype=torch.float64).mean(1))
    torch.testing.assert_close(slot_diversity(torch.randn(2, 1, 5).expand(2, 4, 5)), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(slot_diversity(3 * torch.eye(4)[None]), torch.ones(1))
    assert slot_diversity(torch.randn(2, 1, 5)).tolist() == [0, 0]
