"""The model where its weights are somewhere else: on the meta device, fake, assigned from a file, in a copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import POSITIONS, VOCABULARY, WRITERS, lively, mask, tiny, tokens
from memformer import Memformer
from memformer.state import MemoryState

START = VOCABULARY - 1
KINDS = [{"positions": positions} for positions in POSITIONS] + [{"tie_embeddings": True, "memory_writer": "gated"}]


def on_meta(model: Memformer) -> Memformer:
    """One with the same settings, built without weights."""
    with torch.device("meta"):
        return Memformer(**model.config.to_dict())


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- Weights that are assigned ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lazily", [False, True])
def test_a_model_from_the_meta_device_takes_assigned_weights(
    kind: dict[str, Any], dtype: torch.dtype, lazily: bool, tmp_path: Path
) -> None:
    """All that forward needs follows the weights, also the tables that are in no state dict, and in their dtype."""
    model, src, tgt = tiny(**kind).to(dtype), tokens(2, 6), tokens(2, 5)
    weights = model.state_dict()
    if lazily:
        torch.save(weights, tmp_path / "weights.pt")
        weights = torch.load(tmp_path / "weights.pt", mmap=True)
    assigned = on_meta(model)
    assigned.load_state_dict(weights, assign=True)
    assert {x.device.type for x in (*assigned.parameters(), *assigned.buffers())} == {"cpu"}
    assert {x.dtype for x in (*assigned.parameters(), *assigned.buffers())} == {dtype}
    assert same(assigned(src, tgt), model(src, tgt))
    assert len(list(assigned.parameters())) == len(list(model.parameters())), "what was tied is tied"


def test_a_part_takes_assigned_weights() -> None:
    model = tiny()
    assigned = on_meta(model)
    assigned.encoder.load_state_dict(model.encoder.state_dict(), assign=True)
    src, memory = tokens(2, 6), model.get_initial_mem(2)
    assert torch.equal(assigned.encoder(src, memory), model.encoder(src, memory))


def test_weights_may_be_assigned_while_the_meta_device_is_the_default() -> None:
    model = tiny()
    with torch.device("meta"):
        assigned = Memformer(**model.config.to_dict())
        assigned.load_state_dict(model.state_dict(), assign=True)
    src = tokens(2, 6)
    assert same(assigned.encode(src), model.encode(src))


def test_weights_assigned_in_place_of_others_of_another_dtype() -> None:
    model, single = tiny(), tiny().float()
    single.load_state_dict(model.state_dict(), assign=True)
    src, tgt = tokens(2, 6), tokens(2, 5)
    assert same(single(src, tgt), model(src, tgt))


# --- No values --------------------------------------------------------------------------------------------------------


def inputs(overlap: int) -> Iterator[dict[str, Tensor]]:
    yield {"src": tokens(2, 6), "tgt": tokens(2, 5)}
    yield {
        "src": tokens(2, 6), "tgt": tokens(2, 5), "src_mask": mask("111000", "010110"),
        "tgt_mask": mask("11110", "10101").long(), "reset": torch.tensor([True, False]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, {"dec_overlap": 2}])
@pytest.mark.parametrize("writer", WRITERS)
def test_forward_and_backward_on_the_meta_device(kind: dict[str, Any], writer: str) -> None:
    model = tiny(**{"memory_writer": writer, **kind}).to("meta")
    for given in inputs(2):
        out = model(**{name: x.to("meta") for name, x in given.items()})
        assert [x.shape for x in out] == [(2, 6, 8), (2, 3, 8), ()]
        assert {x.device.type for x in out} == {"meta"}
        out.dec_out.backward()
    assert model.encode(tokens(2, 6).to("meta"), out.mem).mem.is_meta
    assert model.get_parameter("encoder.embedding.weight").grad.is_meta


@pytest.mark.parametrize("kind", [*KINDS, {"dec_overlap": 2}])
def test_forward_with_fake_tensors(kind: dict[str, Any]) -> None:
    with FakeTensorMode() as mode:
        model = Memformer(**tiny_config(kind))
        for given in [{name: mode.from_tensor(x) for name, x in each.items()} for each in real_inputs()]:
            out = model(**given)
            assert [x.shape for x in out] == [(2, 6, 8), (2, 3, 8), ()]
            out.dec_out.backward()


def tiny_config(kind: dict[str, Any]) -> dict[str, Any]:
    with torch.random.fork_rng(), no_fakes():
        return tiny(**kind).config.to_dict()


def real_inputs() -> list[dict[str, Tensor]]:
    with no_fakes():
        return list(inputs(2))


def no_fakes() -> AbstractContextManager[Any]:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return (
        unset_fake_temporarily() if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) else nullcontext()
    )


# --- Copies -----------------------------------------------------------------------------------------------------------


def other_text(model: Memformer) -> list[Tensor]:
    return model.generate(torch.zeros(2, 0, dtype=torch.int64), 12, start=START, temperature=0).tokens


def compiled_and_copied(compile_it: Any) -> tuple[Memformer, Memformer]:
    """A compiled model, and a copy of it with the weights of another."""
    model, other = lively(0), lively(1)
    compile_it(model.decoder)
    copied = copy.deepcopy(model)
    copied.load_state_dict(other.state_dict())
    assert not same(other_text(model), other_text(other)), "the two would write different texts"
    assert same(other_text(copied), other_text(other))
    assert same(other_text(model), other_text(lively(0)))
    return model, copied


def test_a_copy_of_a_compiled_model_is_compiled_and_writes_with_its_own_weights() -> None:
    counter = CompileCounter()
    compiled_and_copied(lambda decoder: decoder.compile_step(backend=counter, fullgraph=True))
    assert counter.frame_count == 1, "one compilation serves both"


def test_a_copy_does_not_step_with_the_originals_weights() -> None:
    """Also where a function was put in place of the method, which knows the original alone."""

    def replace(decoder: Any) -> None:
        decoder.step = torch.compile(decoder.step, backend="eager", fullgraph=True)

    _, copied = compiled_and_copied(replace)
    assert "step" not in vars(copied.decoder)


def test_a_compiled_model_is_pickled_without_its_code() -> None:
    model = lively()
    model.decoder.compile_step(backend="eager")
    assert same(other_text(pickle.loads(pickle.dumps(model))), other_text(lively()))


def test_copies_of_a_stream_and_a_state_go_their_own_ways() -> None:
    model = lively()
    stream = model.stream(torch.zeros(1, 3, dtype=torch.int64), 12, start=START, temperature=0)
    next(stream)
    copied, state = copy.deepcopy(stream), copy.deepcopy(stream.state)
    rest = list(stream)
    assert isinstance(state, MemoryState)
    assert state.position.tolist() == [4]
    assert same(rest, list(copied))
    assert same(
        rest, [token for (token,) in zip(model.generate(None, 11, state=state, temperature=0).tokens[0].split(1))]
    )
