"""The state of a stream: its lanes' operations, and files that are whole or refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from helpers import VOCABULARY, lively, lively_causal
from memformer import Memformer
from memformer.state import MemoryState, fingerprint

START = VOCABULARY - 1


@pytest.fixture(params=[lively, lively_causal])
def model(request: pytest.FixtureRequest) -> Memformer:
    return request.param()


@pytest.fixture
def state(model: Memformer) -> MemoryState:
    """Lanes with nothing, less than a segment, more than one, and several with nothing pending."""
    return model.read([torch.randint(START, (n,)) for n in (0, 3, 7, 15)], start=START)


def same(a: MemoryState, b: MemoryState) -> bool:
    names = ("memory", "segment", "pending", "position")
    return a.start == b.start and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in ((getattr(a, n), getattr(b, n)) for n in names)
    )


# --- Lanes ------------------------------------------------------------------------------------------------------------


def test_what_a_state_says_of_its_lanes(state: MemoryState) -> None:
    assert (state.batch_size, state.length) == (4, 5)
    assert state.position.tolist() == [0, 3, 7, 15]
    assert state.filled.tolist() == [0, 3, 2, 0]
    assert state.fresh.tolist() == [True, True, False, False]


def test_select_takes_lanes_in_any_order_by_index_or_mask(state: MemoryState) -> None:
    picked = state.select([2, 0, 2])
    assert picked.position.tolist() == [7, 0, 7]
    assert torch.equal(picked.memory[0], state.memory[2])
    assert torch.equal(picked.pending[2], state.pending[2])
    assert same(state.select(torch.tensor([True, False, False, True])), state.select(torch.tensor([0, 3])))
    assert state.select([]).batch_size == 0


def test_reorder_moves_beams(state: MemoryState) -> None:
    assert same(state.reorder([1, 1, 3, 0]), state.select([1, 1, 3, 0]))
    with pytest.raises(ValueError, match="reorder: expected 4 lanes, as many as there are, got 2"):
        state.reorder([1, 0])


def test_split_and_cat_are_inverse(state: MemoryState) -> None:
    assert same(MemoryState.cat(state.split()), state)
    parts = state.split([1, 3])
    assert [part.batch_size for part in parts] == [1, 3]
    assert same(MemoryState.cat(parts), state)


def test_reset_lanes_begin_a_document(model: Memformer, state: MemoryState) -> None:
    text = torch.randint(START, (4, 8))
    for lanes in ([1, 2], torch.tensor([False, True, True, False])):
        again = state.reset(lanes)
        assert again.position.tolist() == [0, 0, 0, 15]
        assert same(again.select([1, 2]), model.read([text[0, :0]] * 2, start=START))
        read = model.read(text, again)
        assert_close(read.memory[1:3], model.read(text[1:3], start=START).memory)
        assert_close(read.memory[3], model.read(text[3:], state.select([3])).memory[0])


def test_pad_to_adds_lanes_that_have_read_nothing(model: Memformer, state: MemoryState) -> None:
    padded = state.pad_to(6)
    assert same(padded.select(range(4)), state)
    assert same(padded.select([4, 5]), model.read([torch.randint(START, (0,))] * 2, start=START))
    assert same(state.pad_to(4), state)
    with pytest.raises(ValueError, match="pad_to: expected at least the 4 lanes there are, got 3"):
        state.pad_to(3)


def test_to_and_detach(state: MemoryState) -> None:
    single = state.to(dtype=torch.float32)
    assert single.memory.dtype == torch.float32
    assert single.pending.dtype == torch.int64
    assert state.to("meta").position.device.type == "meta"
    assert same(state.to(), state)
    state.memory.requires_grad_()
    assert not state.detach().memory.requires_grad


def test_operations_leave_the_state_as_it_is(state: MemoryState) -> None:
    before = state.clone()
    state.reset([0, 2]).memory.zero_()
    state.select([3, 3]).pending.zero_()
    state.clone().position.zero_()
    assert same(state, before)


def test_a_state_follows_a_memory_that_is_resized(model: Memformer, state: MemoryState) -> None:
    before = state.memory
    model.resize_memory(5)
    with pytest.raises(ValueError, match="state: expected memory"):
        model.read([torch.randint(START, (9,))] * 4, state)
    state = dataclasses.replace(state, memory=model.resize_mems(state.memory))
    added = 2 * len(model.writers())
    assert state.memory.shape == (4, before.shape[1] + added, 8)
    assert torch.equal(state.memory[:, :3], before[:, :3])  # the first memory's slots, and what follows all slots
    carried = before.shape[1] - 3 * len(model.writers())
    assert torch.equal(state.memory[:, state.memory.shape[1] - carried :], before[:, before.shape[1] - carried :])
    assert model.generate([torch.randint(START, (9,))] * 4, 9, state=state).state.memory.shape == state.memory.shape


@pytest.mark.parametrize("lanes", [[4], [-1], torch.tensor([True]), torch.tensor([0.0]), torch.tensor([[0]])])
def test_lanes_that_there_are_not(state: MemoryState, lanes: Any) -> None:
    for operation in (state.select, state.reset):
        with pytest.raises(ValueError, match="lanes: expected indices from 0 to 3, or"):
            operation(lanes)


def test_states_of_different_kinds_are_not_joined(state: MemoryState) -> None:
    with pytest.raises(ValueError, match="cat: the states differ in start token"):
        MemoryState.cat([state, state.to(dtype=torch.float32)])
    with pytest.raises(ValueError, match="cat: expected at least one"):
        MemoryState.cat([])


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_days_later_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """A model and a state from disk write what those in memory would have written, and leave the same state."""
    model = lively().to(dtype)
    begun = model.generate([torch.randint(START, (n,)) for n in (2, 9)], 9, start=START, temperature=0).state
    begun.save(tmp_path / "talk.state", model)
    model.save_pretrained(tmp_path / "model")
    later = Memformer.from_pretrained(tmp_path / "model").eval()
    loaded = MemoryState.load(tmp_path / "talk.state", later)
    assert same(loaded, begun)
    more = [torch.randint(START, (n,)) for n in (4, 0)]
    how = dict(temperature=0.8, repetition_penalty=1.2)
    expected, actual = (
        m.generate(more, 13, state=s, generator=torch.Generator().manual_seed(3), **how)
        for m, s in ((model, begun), (later, loaded))
    )
    assert all(map(torch.equal, actual.tokens, expected.tokens))
    assert same(actual.state, expected.state)


def test_a_file_is_as_large_as_the_state(model: Memformer, tmp_path: Path) -> None:
    sizes = []
    for n in (1, 2_000):
        model.read(torch.randint(START, (1, n)), start=START).save(tmp_path / "state", model)
        sizes.append((tmp_path / "state").stat().st_size)
    assert sizes[0] == sizes[1]


def test_equal_states_give_equal_files(model: Memformer, state: MemoryState, tmp_path: Path) -> None:
    for name in "abcdef":  # the writer's own order changes from call to call
        state.clone().save(tmp_path / name, model)
    assert len({(tmp_path / name).read_bytes() for name in "abcdef"}) == 1
    assert (int.from_bytes((tmp_path / "a").read_bytes()[:8], "little") + 8) % 8 == 0


def refused(path: Path, model: Memformer, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MemoryState.load(path, model)
    assert str(path) in str(error.value)


def test_every_truncation_is_refused(model: Memformer, state: MemoryState, tmp_path: Path) -> None:
    file = tmp_path / "state"
    state.save(file, model)
    whole = file.read_bytes()
    for size in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}:
        file.write_bytes(whole[:size])
        refused(file, model, "truncated, or not a state file")


def test_every_damaged_byte_is_refused(model: Memformer, state: MemoryState, tmp_path: Path) -> None:
    file = tmp_path / "state"
    state.save(file, model)
    whole = file.read_bytes()
    contents = 8 + int.from_bytes(whole[:8], "little")
    for at in torch.randint(contents, len(whole), (20,)).tolist():
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(file, model, "damaged")


def test_what_is_not_a_state_file(model: Memformer, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Dear diary, " * 100)
    refused(tmp_path / "text", model, "truncated, or not a state file")
    save_file({"memory": torch.zeros(2)}, tmp_path / "tensors")
    refused(tmp_path / "tensors", model, "not a state file")
    model.save_pretrained(tmp_path)
    refused(tmp_path / "model.safetensors", model, "not a state file")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MemoryState.load(tmp_path / "nowhere", model)
    with pytest.raises(IsADirectoryError):
        MemoryState.load(tmp_path, model)


def test_another_model_refuses_and_says_which(model: Memformer, state: MemoryState, tmp_path: Path) -> None:
    file = tmp_path / "state"
    state.save(file, model)
    make, stranger = (lively, lively_causal) if isinstance(model, Memformer) else (lively_causal, lively)
    refused(file, make(num_memory_slots=4), r"another model: num_memory_slots 3 there, 4 here \(fingerprint")
    refused(file, stranger(), rf"another model: a {type(model).__name__} there, a {type(stranger()).__name__} here")
    other = make()
    with torch.no_grad():
        bias = other.writers()[0].bias
        bias[0, 0] = bias[0, 0].nextafter(torch.tensor(9.0).double())
    first, second = fingerprint(model)[:12], fingerprint(other)[:12]
    refused(file, other, rf"the same settings, other weights \(fingerprint {first} there, {second} here\)")


def test_a_model_of_more_settings_refuses_and_says_which(tmp_path: Path) -> None:
    there = lively(slot_parts=2)
    file = tmp_path / "state"
    there.read(torch.randint(START, (1, 9)), start=START).save(file, there)
    refused(file, lively(), r"another model: slot_parts 2 there, None here \(fingerprint")


def test_equal_settings_that_are_written_otherwise_are_the_same_model(tmp_path: Path) -> None:
    """0 is 0.0: a user gives either, and a file has what was given."""
    file, prompt = tmp_path / "state", torch.tensor([[1, 2]])
    for there, here in ((0, 0.0), (0.0, 0)):
        model = lively()
        model.set_writer(forgetting=there)
        model.read(prompt, start=0).save(file, model)
        same = lively()
        same.set_writer(forgetting=here)
        assert fingerprint(model) != fingerprint(same), "as files from before have it"
        assert_close(MemoryState.load(file, same).memory, model.read(prompt, start=0).memory, atol=0, rtol=0)
        refused(file, lively(1), r"forgetting .* there, None here")
        same.load_state_dict(lively(1).state_dict())
        refused(file, same, "the same settings, other weights")


def test_a_fingerprint_is_of_settings_and_weights(model: Memformer) -> None:
    make = lively if isinstance(model, Memformer) else lively_causal
    assert fingerprint(model) == fingerprint(make())
    tied = not model.config.tie_embeddings
    others = [make(5), make().float(), make(write_temperature=0.5), make(tie_embeddings=tied)]
    assert len({fingerprint(m) for m in (model, *others)}) == 5


def test_a_file_is_replaced_whole_or_not_at_all(
    model: Memformer, state: MemoryState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at any call that touches the disk, the old file is there, and nothing beside it."""
    file = tmp_path / "state"
    state.save(file, model)
    before, later = file.read_bytes(), model.read(torch.randint(START, (4, 9)), state)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    for target, name in ((os, "fsync"), (Path, "replace"), (Path, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, stop)
            with pytest.raises(KeyboardInterrupt):
                later.save(file, model)
        assert file.read_bytes() == before
        assert [f.name for f in tmp_path.iterdir()] == ["state"]
    later.save(file, model)
    assert same(MemoryState.load(file, model), later)


def test_a_full_disk_is_told_with_the_name_that_was_given(
    model: Memformer, state: MemoryState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"state: cannot be written \(No space left on device\); what was there before is"
    ):
        state.save(tmp_path / "state", model)


def test_the_file_is_on_the_disk_before_it_takes_the_old_ones_place(
    model: Memformer, state: MemoryState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), fsync(number)))
    monkeypatch.setattr(Path, "replace", lambda old, new: (calls.append("replace"), replace(old, new)))
    state.save(tmp_path / "state", model)
    assert calls == ["fsync", "replace"]


def test_a_state_file_is_plain_safetensors(model: Memformer, state: MemoryState, tmp_path: Path) -> None:
    state.save(tmp_path / "state", model)
    assert torch.equal(load_file(tmp_path / "state")["memory"], state.memory)
    with safe_open(tmp_path / "state", framework="pt") as file:
        header = file.metadata()
    assert header["fingerprint"] == fingerprint(model)
    assert json.loads(header["config"]) == model.described()


def test_a_link_to_a_state_stays_a_link(model: Memformer, state: MemoryState, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    state.save(tmp_path / "link", model)
    assert (tmp_path / "link").is_symlink()
    assert same(MemoryState.load(tmp_path / "real", model), state)
