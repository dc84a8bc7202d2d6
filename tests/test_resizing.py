"""A memory of another size: what stays the same, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import WRITERS, assert_same_grads, memory, take_grads, tiny, tokens
from memformer import Memformer, memory_replay_backprop

SIZES = [1, 2, 5]
"""tiny() has 3 slots."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("slots", SIZES)
def test_kept_slots_begin_and_are_written_as_before(writer: str, slots: int) -> None:
    model, kept = tiny(memory_writer=writer), min(slots, 3)
    mems, x, initial = memory(model, 2), torch.randn(2, 6, 8, dtype=torch.float64), model.get_initial_mem(2)
    written, attention = model.writer(mems, x), model.writer.attention_on_itself(mems, x)
    of_slots = {f"writer.{model.writer.per_slot}", "writer.queries", "writer.places"}
    others = {name: p for name, p in model.named_parameters() if name not in of_slots}
    model.resize_memory(slots, generator=seeded())
    assert model.config.num_memory_slots == slots
    assert model.get_initial_mem(2).shape == (2, slots, 8)
    assert torch.equal(model.get_initial_mem(2)[:, :kept], initial[:, :kept])
    resized = model.resize_mems(mems)
    torch.testing.assert_close(model.writer(resized, x)[:, :kept], written[:, :kept], rtol=1e-12, atol=1e-12)
    after = model.writer.attention_on_itself(resized, x)[:, :kept]
    torch.testing.assert_close(after, attention[:, :kept], rtol=1e-12, atol=1e-12)
    # And all that is not a slot's own is the same parameter still.
    assert all(model.get_parameter(name) is parameter for name, parameter in others.items())
    assert len(others) == len(list(model.parameters())) - (3 if writer == "placed" else 1)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("slots", SIZES)
def test_the_resized_model_is_the_one_built_with_that_many_slots(writer: str, slots: int) -> None:
    """With the same parameters every output and every gradient is the same: nothing of the old size is left."""
    model = tiny(memory_writer=writer)
    model.resize_memory(slots, generator=seeded())
    built = tiny(memory_writer=writer, num_memory_slots=slots)
    assert built.config == model.config
    built.load_state_dict(model.state_dict())
    src, tgt = tokens(2, 15), tokens(2, 6)
    outcomes = [(memory_replay_backprop(each, src=src, tgt=tgt), take_grads(each)) for each in (model, built)]
    for actual, expected in zip(outcomes[0][0], outcomes[1][0], strict=True):
        assert torch.equal(actual, expected)
    assert_same_grads(outcomes[0][1], outcomes[1][1], rtol=0)


@pytest.mark.parametrize("writer", WRITERS)
def test_to_grow_and_then_to_shrink_gives_back_the_same_model(writer: str) -> None:
    model = tiny(memory_writer=writer)
    config, weights, mems = model.config, {k: v.clone() for k, v in model.state_dict().items()}, memory(model, 2)
    src, tgt = tokens(2, 6), tokens(2, 5)
    before = model(src, tgt, mems)
    model.resize_memory(7, generator=seeded())
    grown = model.resize_mems(mems)
    # The encoder reads the new slots too.
    assert not torch.allclose(model(src, tgt, grown).enc_out, before.enc_out)
    model.resize_memory(3)
    assert model.config == config
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    for actual, expected in zip(model(src, tgt, model.resize_mems(grown)), before, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("writer", WRITERS)
def test_new_slots_are_those_of_a_new_model(writer: str) -> None:
    config = tiny(dim=64, num_memory_slots=256, memory_writer=writer, encoder_only=True).config
    model, built = (Memformer(**config.to_dict()) for _ in range(2))
    model.resize_memory(1)
    model.resize_memory(257, generator=seeded())
    new, first = (getattr(each.writer, each.writer.per_slot).detach() for each in (model, built))
    norm = 64**0.5 if writer == "gated" else 1.0
    for slots in (new[1:], first):
        assert float(slots.norm(dim=-1).mean()) == pytest.approx(norm, rel=0.02)
        assert float(slots.std()) == pytest.approx(norm / 8, rel=0.02)


def test_the_generator_decides_and_no_other_is_touched() -> None:
    models = [tiny() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        model.resize_memory(5, generator=seeded(seed))
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (model.writer.bias for model in models)
    assert torch.equal(first, same)
    assert not torch.allclose(first[3:], other[3:])


def test_a_carried_memory_keeps_its_slots_and_its_gradient() -> None:
    model = tiny()
    mems = memory(model, 2).requires_grad_()
    model.resize_memory(5)
    grown = model.resize_mems(mems)
    assert torch.equal(grown, torch.cat([mems, model.get_initial_mem(2)[:, 3:]], 1))
    model(tokens(2, 6), tokens(2, 5), grown).dec_out.backward()
    assert mems.grad.abs().sum() > 0
    assert torch.equal(model.resize_mems(grown), grown)
    model.resize_memory(2)
    assert torch.equal(model.resize_mems(grown), mems[:, :2])


def test_dtype_frozen_parameters_and_an_unchanged_size() -> None:
    model = tiny().bfloat16()
    parameter = model.writer.bias
    model.resize_memory(3)
    assert model.writer.bias is parameter
    model.requires_grad_(False).resize_memory(4)
    assert model.writer.bias.dtype == torch.bfloat16
    assert not model.writer.bias.requires_grad
    # Nothing of the old one is held on to.
    model.resize_memory(1)
    assert model.writer.bias.untyped_storage().nbytes() == 2 * 8


@pytest.mark.parametrize("slots", [1, 5])
def test_a_resized_model_is_saved_and_loaded(slots: int, tmp_path: Path) -> None:
    model = tiny()
    model.resize_memory(slots)
    model.save_pretrained(tmp_path)
    loaded = Memformer.from_pretrained(tmp_path)
    assert loaded.config == model.config
    src = tokens(2, 6)
    assert torch.equal(loaded(src).mem, model(src).mem)


@pytest.mark.parametrize("slots", [0, -1, 2.0, True, "4", None])
def test_sizes_that_do_not_fit(slots: Any) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=f"num_memory_slots: expected a whole number of at least 1, got {slots!r}"):
        model.resize_memory(slots)
    assert model.config.num_memory_slots == len(model.writer.bias) == 3


@pytest.mark.parametrize(
    ("mems", "message"),
    [
        (
            torch.zeros(2, 3, 7, dtype=torch.float64),
            r"expected torch\.float64 of shape \(batch, slots, 8\), got .* \(2, 3, 7\)",
        ),
        (torch.zeros(2, 3, 8), r"expected torch\.float64 .* got torch\.float32 of shape \(2, 3, 8\)"),
        (torch.zeros(3, 8, dtype=torch.float64), r"got torch\.float64 of shape \(3, 8\)"),
        (None, r"got NoneType"),
    ],
)
def test_carried_memories_that_do_not_fit(mems: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny().resize_mems(mems)
    # A memory of the old size is refused by the model itself, and not silently used.
    model = tiny()
    model.resize_memory(4)
    with pytest.raises(ValueError, match=r"mems: expected .* \(2, 4, 8\)"):
        model(tokens(2, 6), mems=torch.zeros(2, 3, 8, dtype=torch.float64))
