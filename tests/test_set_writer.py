"""A model that writes otherwise than in training: what changes, exactly, and what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import naive
from helpers import WRITERS, assert_same_grads, memory, take_grads, tiny, tokens
from memformer import CausalMemformer, Memformer, memory_replay_backprop
from memformer.nn.memory import NormalisedWriter
from memformer.state import fingerprint


def causal(**changes: Any) -> CausalMemformer:
    return CausalMemformer(
        dim=8, num_memory_slots=3, num_tokens=11, max_seq_len=6, depth=2, heads=2, mem_update_attn_heads=2, **changes
    ).double()


SHARP = {"write_temperature": 0.075, "forgetting": 0.0}


@pytest.mark.parametrize("make", [tiny, causal])
@pytest.mark.parametrize("given", [SHARP, {"write_temperature": 0.1}, {"forgetting": 0.02}])
def test_it_is_the_model_that_is_built_so(make: Any, given: dict[str, float]) -> None:
    """With the same parameters every output and every gradient is the same."""
    model, built = make(), make(**given)
    built.load_state_dict(model.state_dict())
    texts = {"src": tokens(2, 15)} | ({"tgt": tokens(2, 6)} if make is tiny else {})
    before = memory_replay_backprop(model, **texts)[0]
    model.zero_grad()
    model.set_writer(**given)
    assert model.config == built.config
    assert fingerprint(model) == fingerprint(built)
    outcomes = [(memory_replay_backprop(each, **texts)[0], take_grads(each)) for each in (model, built)]
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert not torch.equal(outcomes[0][0], before)
    assert_same_grads(outcomes[0][1], outcomes[1][1], rtol=0)


def test_the_bias_vector_is_as_long_as_is_said() -> None:
    for forgetting in (0.0, 0.3):
        model, x = tiny(forgetting=forgetting), torch.randn(2, 6, 8, dtype=torch.float64)
        mems = memory(model, 2)
        assert isinstance(model.writer, NormalisedWriter)
        moved = model.writer.attend(mems, x) + forgetting * model.writer.bias
        assert_close(model.writer(mems, x), moved / moved.norm(dim=-1, keepdim=True), rtol=1e-12, atol=1e-12)
        for b in range(2):
            assert_close(model.writer(mems, x)[b], naive.write(model.writer, mems[b], x[b]), rtol=1e-10, atol=1e-10)


def test_sharp_slots_that_do_not_forget_keep_what_they_hold() -> None:
    """Through a thousand segments of noise, by slots that give themselves 0.988 of their attention."""
    torch.manual_seed(0)
    model = Memformer(
        dim=64, num_memory_slots=8, enc_num_tokens=11, enc_max_seq_len=16, enc_depth=1, enc_heads=4, encoder_only=True,
        mem_update_attn_heads=4,
    )  # fmt: skip
    assert isinstance(model.writer, NormalisedWriter)
    with torch.no_grad():
        model.writer.slots_to_qk.weight[64:] *= 2  # of the slots' own keys
    content = torch.nn.functional.normalize(torch.randn(1, 8, 64), dim=-1)
    noise = torch.nn.functional.layer_norm(torch.randn(1000, 1, 16, 64), (64,))
    kept = []
    for given in ({}, {"write_temperature": 0.075}, SHARP):
        model.set_writer(**given)
        slots = content
        with torch.no_grad():
            for x in noise:
                slots = model.writer(slots, x)
        kept.append((slots * content).sum(-1).abs().mean().item())
    as_trained, sharper, sharp = kept
    assert as_trained < 0.6 < sharper < 0.7 < 0.99 < sharp


def test_without_forgetting_a_slot_to_which_nothing_is_written_stays_the_same() -> None:
    model = tiny(forgetting=0.0)
    mems, nothing = memory(model, 2), torch.zeros(2, 6, dtype=torch.bool)
    assert_close(model.writer(mems, torch.randn(2, 6, 8).double(), nothing), mems, rtol=1e-12, atol=1e-12)


def test_a_model_from_before_is_its_own() -> None:
    """Neither its description nor its states change by a setting that came later."""
    assert "forgetting" not in tiny().config.to_dict()
    model = tiny(forgetting=0.5)
    assert type(model.config).from_dict(model.config.to_dict()).forgetting == 0.5
    assert fingerprint(model) != fingerprint(tiny())


@pytest.mark.parametrize("make", [tiny, causal])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"write_temperature": 0.0}, r"write_temperature: expected a finite number above 0, got 0\.0"),
        ({"forgetting": -0.1}, r"forgetting: expected a finite number of at least 0, got -0\.1"),
        ({"forgetting": float("inf")}, "forgetting: expected a finite number of at least 0, got inf"),
        ({"forgetting": float("nan")}, "forgetting: expected a finite number of at least 0, got nan"),
        ({"forgetting": "much"}, "forgetting: expected a number, got 'much'"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(make: Any, given: dict[str, Any], message: str) -> None:
    model = make()
    before = model.config
    with pytest.raises(ValueError, match=message):
        model.set_writer(**given)
    assert model.config == before
    assert all((w.temperature, w.scale) == (0.25, 0.001) for w in model.writers())
    with pytest.raises(ValueError, match=message):
        make(**given)


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "normalised"])
def test_only_the_normalised_writer_forgets_by_itself(writer: str) -> None:
    model = tiny(memory_writer=writer)
    with pytest.raises(ValueError, match=rf"forgetting: 0\.0 has no meaning with the writer {writer}; the normalised"):
        model.set_writer(forgetting=0.0)
    model.set_writer(write_temperature=0.1)
    assert (model.writer.temperature, model.writer.scale, model.config.write_temperature) == (0.1, 1.0, 0.1)
