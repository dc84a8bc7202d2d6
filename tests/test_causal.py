"""A causal stack whose layers remember: no token sees a later one, pieces equal the whole, replay equals BPTT."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from helpers import WRITERS
from memformer import memory_replay_backprop, replay
from memformer.causal import CausalMemformer, CausalMemory
from memformer.data.segments import Segment
from memformer.rollouts import rollout

SIZES = {
    "dim": 16, "num_memory_slots": 3, "num_tokens": 11, "max_seq_len": 6, "depth": 3, "heads": 2, "overlap": 2,
    "mem_update_attn_heads": 2,
}  # fmt: skip
LAYOUTS = pytest.mark.parametrize("memory", ["layers", "one"])


def make(**changes: object) -> CausalMemformer:
    torch.manual_seed(0)
    return CausalMemformer(**{**SIZES, **changes}).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape)


@LAYOUTS
@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_no_position_depends_on_a_later_token(memory: str, overlap: int) -> None:
    model = make(memory=memory, overlap=overlap)
    first, second = tokens(2, 6), tokens(2, 6)
    _, mems, _ = model(first)
    before = model(second, mems).logits
    for place in range(6):
        changed = second.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        after = model(changed, mems).logits
        assert_close(after[:, :place], before[:, :place], rtol=0, atol=0)
        assert not torch.allclose(after[:, place:], before[:, place:])


@LAYOUTS
def test_every_token_counts_and_the_first_is_predicted_across_the_border(memory: str) -> None:
    model, text = make(memory=memory), tokens(2, 12)
    logits, mems, loss = model(text[:, :6], labels=text[:, :6])
    begin = model.head(model.step(text[:, :6])[0])[:, 0]  # from nothing but the learned beginning
    expected = torch.cat([begin[:, None], logits[:, :-1]], 1)
    assert_close(loss, torch.nn.functional.cross_entropy(expected.flatten(0, 1), text[:, :6].flatten()))
    assert_close(begin[0], begin[1])
    _, _, second = model(text[:, 6:], mems, labels=text[:, 6:])
    other = text.clone()
    other[:, 5] = (other[:, 5] + 1) % 11
    _, mems, _ = model(other[:, :6])
    assert not torch.allclose(model(text[:, 6:], mems, labels=text[:, 6:]).loss, second)


@LAYOUTS
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_masked_tokens_change_nothing(memory: str, padding: str) -> None:
    model, text = make(memory=memory, dropout=0.0), tokens(1, 4)
    places = {"left": [2, 3, 4, 5], "right": [0, 1, 2, 3], "holes": [0, 2, 3, 5]}[padding]
    padded, mask = tokens(1, 6), torch.zeros(1, 6, dtype=torch.bool)
    padded[:, places], mask[:, places] = text, True
    again = torch.where(mask, padded, (padded + 1) % 11)
    first, second = (model(x, mask=mask, labels=x) for x in (padded, again))
    assert_close(first.loss, second.loss, rtol=0, atol=0)
    assert_close(first.mem, second.mem, rtol=0, atol=0)
    assert_close(first.logits[:, places], second.logits[:, places], rtol=0, atol=0)
    # As without padding, in what comes after it, too.
    whole = model(text, labels=text)
    assert_close((whole.loss, whole.mem, whole.logits), (first.loss, first.mem, first.logits[:, places]))
    more = tokens(1, 4)
    padded[:, places] = more
    whole, first = model(more, whole.mem, labels=more), model(padded, first.mem, mask, labels=padded)
    assert_close((whole.loss, whole.mem, whole.logits), (first.loss, first.mem, first.logits[:, places]))
    # What predicts a token is the output at the last one that exists before it.
    hidden, _ = model.step(padded, mask=mask)  # from the learned beginning
    for place in range(6):
        earlier = [p for p in places if p < place]
        expected = hidden[:, earlier[-1] + 1] if earlier else model.get_initial_mem(1).output
        assert_close(hidden[:, place], expected, rtol=0, atol=0)


@LAYOUTS
def test_a_masked_lane_keeps_its_memory_and_a_reset_one_begins_again(memory: str) -> None:
    model = make(memory=memory)
    _, mems, _ = model(tokens(3, 6))
    mask = torch.tensor([[True] * 6, [False] * 6, [True] * 6])
    reset = torch.tensor([False, False, True])
    text = tokens(3, 6)
    _, after, _ = model(text, mems, mask, reset)
    assert_close(after.slots[1], mems.slots[1], rtol=0, atol=0)
    assert_close([part[1] for part in after], [part[1] for part in mems], rtol=0, atol=0)
    _, fresh, _ = model(text[2:])
    assert_close([part[2:] for part in after], list(fresh))


@given(
    memory=st.sampled_from(["layers", "one"]),
    writer=st.sampled_from(WRITERS),
    positions=st.sampled_from(["rotary", "relative", "bucketed"]),
    overlap=st.integers(0, 3),
    depth=st.integers(1, 4),
    dropout=st.sampled_from([0.0, 0.3]),
    wavefront=st.booleans(),
    masked=st.booleans(),
    graphs=st.integers(1, 3),
    parts=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(2, 6), min_size=1, max_size=5),
)
@settings(max_examples=25, deadline=None)
def test_replay_equals_bptt(
    memory, writer, positions, overlap, depth, dropout, wavefront, masked, graphs, parts, seed, lengths
) -> None:
    model = make(
        memory=memory, memory_writer=writer, positions=positions, overlap=overlap, depth=depth, dropout=dropout,
        slot_parts=parts,
    )  # fmt: skip
    wavefront = wavefront and memory == "layers"
    torch.manual_seed(seed)
    segments = [
        Segment(
            tokens(2, length),
            torch.rand(2, length) > 0.3 if masked else None,
            torch.rand(2) > 0.7 if masked else None,
        )
        for length in lengths
    ]
    mems = CausalMemory(*model.get_initial_mem(2))
    mems = CausalMemory(*(part.detach().clone().requires_grad_() for part in mems))
    found = []
    for method in (replay.memory_replay, replay.full_bptt):
        torch.manual_seed(seed)
        schedule = replay.EveryMemory(graphs=graphs)
        outcome = rollout(model, segments, mems, wavefront=wavefront, method=method, schedule=schedule)
        if not outcome.loss.requires_grad:
            return
        loss = outcome.loss + sum(part.cos().sum() for part in outcome.memory)
        wanted = [*mems, *model.parameters()]
        found.append((loss, torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)))
    assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


@given(
    writer=st.sampled_from(WRITERS),
    positions=st.sampled_from(["rotary", "relative", "bucketed"]),
    depth=st.integers(1, 5),
    updates=st.integers(1, 2),
    count=st.integers(1, 6),
    masked=st.booleans(),
    resets=st.booleans(),
    parts=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_all_layers_at_once_are_the_layers_one_after_the_other(
    writer, positions, depth, updates, count, masked, resets, parts, seed
) -> None:
    model = make(memory_writer=writer, positions=positions, depth=depth, num_mem_updates=updates, slot_parts=parts)
    torch.manual_seed(seed)
    segments = [
        Segment(
            tokens(2, 6 if t < count - 1 else 4),
            torch.rand(2, 6 if t < count - 1 else 4) > 0.3 if masked and t % 2 else None,
            torch.rand(2) > 0.6 if resets and t % 2 else None,
        )
        for t in range(count)
    ]
    found = []
    for wavefront in (False, True):
        outcome = rollout(model, segments, wavefront=wavefront, method=replay.full_bptt)
        loss = outcome.loss + sum(part.cos().sum() for part in outcome.memory)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        found.append((loss, outcome.memory, gradients))
    assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@LAYOUTS
def test_memory_replay_backprop_cuts_and_sums_the_segments_means(memory: str) -> None:
    model, text = make(memory=memory), tokens(2, 20)
    loss, mems = memory_replay_backprop(model, text)
    filled = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected, state = torch.zeros((), dtype=torch.float64), None
    for piece in text.split(6, 1):
        _, state, one = model(piece, state, labels=piece)
        expected = expected + one
    expected.backward()
    assert_close(loss, expected.detach())
    assert_close(mems.slots, state.slots.detach())
    assert_close(filled, [p.grad for p in model.parameters()], rtol=1e-10, atol=1e-12)


@LAYOUTS
def test_saved_and_loaded(memory: str, tmp_path) -> None:
    model, text = make(memory=memory), tokens(1, 6)
    model.save_pretrained(tmp_path)
    again = CausalMemformer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_close(again(text, labels=text), model(text, labels=text), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap": 7}, "overlap: expected at most a segment's 6 tokens, got 7"),
        ({"memory": "all"}, "memory: expected one of layers, one, got 'all'"),
        ({"heads": 3}, "heads: must divide dim, got 3 heads for dim 16"),
        ({"depth": 0}, "depth: expected a whole number of at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_input_that_does_not_fit() -> None:
    model = make()
    text = tokens(2, 6)
    with pytest.raises(ValueError, match=r"tokens: expected at most max_seq_len = 6 tokens, got 7"):
        model(tokens(2, 7))
    with pytest.raises(ValueError, match=r"labels: expected the shape of the tokens, \(2, 6\), got torch"):
        model(text, labels=text[:, 1:])
    with pytest.raises(ValueError, match=r"labels: expected token ids, .* got torch.bool of shape \(2, 6\)"):
        model(text, labels=text > 3)
    with pytest.raises(ValueError, match=r"mems: expected slots of torch.float64, .* \(2, 3, 3, 16\)"):
        model(text, model.get_initial_mem(3))
    with pytest.raises(ValueError, match=r"mems: expected a CausalMemory, as this model returns it, got"):
        model(text, model.get_initial_mem(2).slots)
    with pytest.raises(ValueError, match=r"mems: expected a CausalMemory, as this model returns it, got"):
        model(text, tuple(model.get_initial_mem(2)))
    with pytest.raises(ValueError, match=r"wavefront: layers that share a memory wait for each other"):
        rollout(make(memory="one"), [Segment(text)], wavefront=True)
