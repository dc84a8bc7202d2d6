"""The decoder token by token with a cache of fixed size, against the decoder at once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import POSITIONS, tiny, tokens
from memformer import Memformer

LENGTH = 6
TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-10), torch.float32: dict(rtol=1e-5, atol=1e-5)}


def stained_cache(model: Memformer, batch: int) -> list[tuple[Tensor, Tensor]]:
    """A used one: what an earlier segment left must not be seen."""
    cache = model.decoder.new_cache(batch, LENGTH)
    for keys, values in cache:
        keys.normal_()
        values.normal_()
    return cache


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("overlap", [0, 3])
@torch.no_grad()
def test_step_by_step_equals_at_once(kind: str, dtype: torch.dtype, overlap: int) -> None:
    model, batch = tiny(positions=kind, dec_overlap=overlap).to(dtype), 3
    src, tgt = tokens(batch, 4), tokens(batch, LENGTH)
    enc_out = model.encode(src).enc_out
    contexts, cache = model.decoder.context_projection(enc_out), stained_cache(model, batch)
    whole = model.decode(tgt, enc_out, src=src)
    written = torch.cat([tgt[:, :1], src[:, 4 - overlap :], tgt[:, 1:]], 1)
    for i in range(LENGTH + overlap):
        logits = model.decoder.step(written[:, i], torch.full((batch,), i), cache, contexts)
        if i >= overlap:
            assert_close(logits, whole[:, i - overlap], **TOLERANCE[dtype])


@pytest.mark.parametrize("kind", POSITIONS)
@torch.no_grad()
def test_lanes_at_different_places_after_a_prefix(kind: str) -> None:
    """Lanes begin with 1, 3 and 5 tokens at once, then go on one by one; a source may be padded."""
    model, begun = tiny(positions=kind), torch.tensor([1, 3, 5])
    tgt, source = tokens(3, LENGTH), tokens(3, 4)
    source_mask = torch.tensor([[True, True, True, True], [True, False, False, False], [False, True, True, False]])
    enc_out = model.encode(source, src_mask=source_mask).enc_out
    contexts, cache = model.decoder.context_projection(enc_out), stained_cache(model, 3)
    model.decoder.extend(tgt[:, :5], torch.arange(5).expand(3, -1), cache, contexts, source_mask)
    for i in range(3):
        position = (begun + i).clamp(max=LENGTH - 1)
        token = tgt.gather(1, position[:, None])[:, 0]
        logits = model.decoder.step(token, position, cache, contexts, source_mask)
        for lane, p in enumerate(position.tolist()):
            alone = slice(lane, lane + 1)
            expected = model.decode(tgt[alone, : p + 1], enc_out[alone, source_mask[lane]])
            assert_close(logits[alone], expected[:, -1], **TOLERANCE[torch.float64])


@pytest.mark.parametrize("kind", POSITIONS)
@torch.no_grad()
def test_one_compilation_serves_every_position(kind: str) -> None:
    model, counter = tiny(positions=kind), CompileCounter()
    tgt, enc_out = tokens(2, LENGTH), model.encode(tokens(2, 4)).enc_out
    contexts, cache = model.decoder.context_projection(enc_out), model.decoder.new_cache(2, LENGTH)
    whole, step = model.decode(tgt, enc_out), torch.compile(model.decoder.step, backend=counter, fullgraph=True)
    for i in range(LENGTH):
        assert_close(step(tgt[:, i], torch.full((2,), i), cache, contexts), whole[:, i])
    assert counter.frame_count == 1


class Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_where_a_token_stands_is_worked_out_once_for_all_layers(masked: bool) -> None:
    found = []
    for depth in (1, 3):
        model = tiny(positions="rotary", dec_depth=depth)
        enc_out, mask = model.encode(tokens(2, 4)).enc_out, torch.ones(2, 4, dtype=torch.bool) if masked else None
        contexts, cache = model.decoder.context_projection(enc_out), model.decoder.new_cache(2, LENGTH)
        with Counted() as counted:
            model.decoder.step(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 3]), cache, contexts, mask)
        found.append({name: counted.calls[f"aten::{name}"] for name in ("arange", "index", "masked_fill", "where")})
    assert found[0] == found[1] == {"arange": 2, "index": 2, "masked_fill": 1 + masked, "where": 0}
