"""The whole model: against loops, and what holds of it whatever its weights."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import naive
from helpers import POSITIONS, VOCABULARY, WRITERS, assert_same_grads, mask, memory, take_grads, tiny, tokens
from memformer import Memformer, MemformerConfig
from memformer.nn.attention import SelfAttention, split_heads
from memformer.nn.positions import Rotary

SRC_MASK = mask("111000", "010110")
TGT_MASK = mask("11110", "01011")
STARTED = mask("11110", "10101")
"""An overlap needs a target's first token."""
OVERLAPS = [0, 2, 4]
"""Two tokens of the source, and more than some masked sources have."""


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_equals_loops(positions: str, masked: bool, overlap: int) -> None:
    """Encoder, writer and decoder, lane by lane; each token predicted by a decoder that sees only those before."""
    model = tiny(positions=positions, num_mem_updates=2, dec_overlap=overlap, slot_parts=2 if overlap else 1)
    src, tgt, mems = tokens(2, 6), tokens(2, 5), memory(model, 2)
    src_mask, tgt_mask = (SRC_MASK, STARTED if overlap else TGT_MASK) if masked else (None, None)
    out = model(src, tgt, mems, src_mask, tgt_mask)
    losses = []
    for b in range(2):
        src_kept, tgt_kept = (None if x is None else x[b] for x in (src_mask, tgt_mask))
        enc_out = naive.encode(model, src[b], mems[b], src_kept)
        torch.testing.assert_close(out.enc_out[b], enc_out, rtol=1e-10, atol=1e-10)
        written = mems[b]
        for _ in range(2):
            written = naive.write(model.writer, written, enc_out, src_kept)
        torch.testing.assert_close(out.mem[b], written, rtol=1e-10, atol=1e-10)
        losses.append(naive.loss(model, src[b], tgt[b], enc_out, src_kept, tgt_kept))
    # Masked, lane 0 predicts 3 tokens and lane 1 two: the mean is over tokens.
    expected = (3 * losses[0] + 2 * losses[1]) / 5 if masked else (losses[0] + losses[1]) / 2
    torch.testing.assert_close(out.dec_out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("tgt_mask", [None, mask("11011")])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_no_decoder_position_sees_a_later_token(positions: str, tgt_mask: Tensor | None, overlap: int) -> None:
    model, tgt, src = tiny(positions=positions, dec_overlap=overlap), tokens(1, 5), tokens(1, 6)
    enc_out = torch.randn(1, 6, 8, dtype=torch.float64)
    before = model.decode(tgt, enc_out, None, tgt_mask, src)
    for n in range(1, 5):
        changed = tgt.clone()
        changed[:, n:] = (changed[:, n:] + 1) % VOCABULARY
        after = model.decode(changed, enc_out, None, tgt_mask, src)
        assert torch.equal(after[:, :n], before[:, :n])
        assert not torch.allclose(after[:, n:], before[:, n:])


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_lanes_do_not_touch_each_other(writer: str, positions: str) -> None:
    model = tiny(memory_writer=writer, positions=positions)
    src, tgt, mems = tokens(3, 6), tokens(3, 5), memory(model, 3).requires_grad_()
    before = model(src, tgt, mems)
    (grad,) = torch.autograd.grad(before.mem[1].sum() + before.enc_out[1].sum(), mems)
    assert grad[1].any()
    assert not grad[[0, 2]].any()

    src[1], tgt[1] = tokens(6), tokens(5)
    changed = mems.detach().clone()
    changed[1] = torch.randn(3, 8)
    after = model(src, tgt, changed)
    for old, new in ((before.enc_out, after.enc_out), (before.mem, after.mem)):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
        assert not torch.allclose(old[1], new[1])


@pytest.mark.parametrize("writer", WRITERS)
def test_a_batch_is_its_lanes(writer: str) -> None:
    """Loss and gradients of a batch are the means of its lanes' own."""
    model = tiny(memory_writer=writer)
    src, tgt, mems = tokens(3, 6), tokens(3, 5), memory(model, 3)
    first = model(src, tgt, mems)
    second = model(src, tgt, first.mem)
    second.dec_out.backward()
    expected = take_grads(model)
    for b in range(3):
        lane = src[b : b + 1], tgt[b : b + 1]
        (model(*lane, model(*lane, mems[b : b + 1]).mem).dec_out / 3).backward()
    assert_same_grads(take_grads(model), expected)


# --- Masks ------------------------------------------------------------------------------------------------------------


def pad(x: Tensor, side: str, fill: Callable[..., Tensor], count: int = 2) -> tuple[Tensor, Tensor]:
    """``x`` (batch, length) with ``count`` more tokens at one side, and the mask that hides them."""
    extra, kept = fill(len(x), count), torch.ones_like(x, dtype=torch.bool)
    hidden = torch.zeros(len(x), count, dtype=torch.bool)
    order = slice(None, None, -1 if side == "left" else 1)
    return torch.cat([x, extra][order], 1), torch.cat([kept, hidden][order], 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("overlap", [0, 3, 5])
def test_padding_changes_nothing(side: str, positions: str, writer: str, overlap: int) -> None:
    model = tiny(positions=positions, memory_writer=writer, num_mem_updates=2, dec_overlap=overlap)
    src, tgt, mems = tokens(2, 4), tokens(2, 4), memory(model, 2).requires_grad_()

    def run(src: Tensor, tgt: Tensor, src_mask: Tensor | None, tgt_mask: Tensor | None) -> tuple[Any, Any, Any]:
        # Two segments, so that the memory's gradient counts as well.
        first = model(src, tgt, mems, src_mask, tgt_mask)
        second = model(src, tgt, first.mem, src_mask, tgt_mask)
        loss = first.dec_out + second.dec_out
        (mems_grad,) = torch.autograd.grad(loss, mems, retain_graph=True)
        loss.backward()
        return (first.enc_out, second.mem, loss), mems_grad, take_grads(model)

    (enc_out, mem, loss), mems_grad, grads = run(src, tgt, None, None)
    padded_src, src_mask = pad(src, side, tokens)
    padded_tgt, tgt_mask = pad(tgt, "right" if overlap else side, tokens)
    (padded_out, padded_mem, padded_loss), padded_mems_grad, padded_grads = run(
        padded_src, padded_tgt, src_mask, tgt_mask
    )
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(padded_out[src_mask].view_as(enc_out), enc_out, **close)
    assert not padded_out[~src_mask].any()
    torch.testing.assert_close(padded_mem, mem, **close)
    torch.testing.assert_close(padded_loss, loss, **close)
    torch.testing.assert_close(padded_mems_grad, mems_grad, **close)
    assert_same_grads(padded_grads, grads)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_what_masked_tokens_say_changes_nothing(positions: str, writer: str, overlap: int) -> None:
    """Wherever they stand: at the ends or in between."""
    model = tiny(positions=positions, memory_writer=writer, dec_overlap=overlap)
    src, tgt, mems, tgt_mask = tokens(2, 6), tokens(2, 5), memory(model, 2), STARTED if overlap else TGT_MASK

    def run(src: Tensor, tgt: Tensor) -> tuple[Any, Any]:
        out = model(src, tgt, mems, SRC_MASK, tgt_mask)
        (out.dec_out + out.mem[..., 0].sum()).backward()
        return out, take_grads(model)

    before, grads = run(src, tgt)
    other_src = torch.where(SRC_MASK, src, (src + 1) % VOCABULARY)
    other_tgt = torch.where(tgt_mask, tgt, (tgt + 1) % VOCABULARY)
    after, other_grads = run(other_src, other_tgt)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)
    assert_same_grads(other_grads, grads, rtol=0)


def test_masked_targets_do_not_count() -> None:
    model, src, tgt = tiny(), tokens(1, 6), tokens(1, 5)
    whole = model(src, tgt[:, :3]).dec_out
    torch.testing.assert_close(model(src, tgt, tgt_mask=mask("11100")).dec_out, whole)
    # A token that nothing kept stands before is not predicted: it starts the decoder.
    torch.testing.assert_close(model(src, tgt, tgt_mask=mask("00111")).dec_out, model(src, tgt[:, 2:]).dec_out)
    assert model(src, tgt, tgt_mask=mask("00001")).dec_out == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_masks_of_one_and_zero(dtype: torch.dtype, overlap: int) -> None:
    """As tokenizers give them."""
    model, src, tgt, mems = tiny(dec_overlap=overlap), tokens(2, 6), tokens(2, 5), memory(tiny(), 2)
    expected = model(src, tgt, mems, SRC_MASK, STARTED)
    for actual, wanted in zip(model(src, tgt, mems, SRC_MASK.to(dtype), STARTED.to(dtype)), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(model.encode(src, mems, SRC_MASK.to(dtype)).mem, expected.mem)
    reset = torch.tensor([True, False])
    assert torch.equal(model.encode(src, mems, reset=reset.to(dtype)).mem, model.encode(src, mems, reset=reset).mem)
    assert torch.equal(model(src, mems=mems, reset=reset.to(dtype)).mem, model(src, mems=mems, reset=reset).mem)
    decoded = model.decode(tgt, expected.enc_out, SRC_MASK.to(dtype), STARTED.to(dtype), src)
    assert torch.equal(decoded, model.decode(tgt, expected.enc_out, SRC_MASK, STARTED, src))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_targets_of_minus_100_are_masked(dtype: torch.dtype, overlap: int) -> None:
    """With a mask beside them or without; what they hide is not known, so nothing sees it."""
    model, src, tgt = tiny(dec_overlap=overlap), tokens(2, 6), tokens(2, 5).to(dtype)
    expected = model(src, tgt, tgt_mask=STARTED).dec_out
    expected.backward()
    grads, ignored = take_grads(model), tgt.masked_fill(~STARTED, -100)
    for tgt_mask in (None, STARTED, torch.ones_like(STARTED), torch.ones_like(tgt)):
        loss = model(src, ignored, tgt_mask=tgt_mask).dec_out
        loss.backward()
        assert torch.equal(loss, expected)
        assert_same_grads(take_grads(model), grads, rtol=0)
    enc_out = model.encode(src).enc_out
    decoded = model.decode(ignored, enc_out, src=src)
    assert torch.equal(decoded, model.decode(tgt, enc_out, tgt_mask=STARTED, src=src))
    assert (ignored == -100).any(), "the caller's targets stay as they are"
    hidden = torch.tensor([[1, 0, 1, 1, 1]] * 2)
    both = model(src, ignored, tgt_mask=hidden).dec_out
    assert torch.equal(both, model(src, tgt, tgt_mask=STARTED & hidden.bool()).dec_out)


@pytest.mark.cpu("a default device is a mode of torch, which its compiler does not trace through this")
def test_compiled_as_one_graph() -> None:
    """With masks of integers and targets of -100, too."""
    model, src, tgt = tiny(dec_overlap=2, enc_depth=1, dec_depth=1), tokens(2, 6), tokens(2, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(src, tgt.masked_fill(~STARTED, -100), None, SRC_MASK.int(), torch.ones_like(tgt))
    assert all(map(torch.equal, out, model(src, tgt, None, SRC_MASK, STARTED)))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_lane_of_padding_keeps_its_memory(positions: str, writer: str) -> None:
    model = tiny(positions=positions, memory_writer=writer, num_mem_updates=2)
    src, tgt, mems = tokens(2, 6), tokens(2, 5), memory(model, 2).requires_grad_()
    src_mask, tgt_mask = mask("000000", "111111"), mask("00000", "11111")
    out = model(src, tgt, mems, src_mask, tgt_mask)
    assert torch.equal(out.mem[0], mems[0])
    assert not out.enc_out[0].any()
    alone = model(src[1:], tgt[1:], mems[1:])
    for x, y in ((out.enc_out[1:], alone.enc_out), (out.mem[1:], alone.mem), (out.dec_out, alone.dec_out)):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)

    def grads(out: Any) -> dict[str, Tensor | None]:
        (out.dec_out + out.mem[-1].square().sum() + out.mem[-1].sum()).backward()
        return take_grads(model)

    actual, expected = grads(out), grads(alone)
    assert_same_grads(actual, expected)
    out = model(src, tgt, mems, src_mask, tgt_mask)
    (grad,) = torch.autograd.grad(out.mem[0].sum(), mems)
    assert torch.equal(grad[0], torch.ones_like(grad[0])), "the kept memory's gradient passes as it is"


def test_an_all_masked_batch_has_finite_gradients() -> None:
    model, nothing = tiny(), torch.zeros(2, 6, dtype=torch.bool)
    out = model(tokens(2, 6), tokens(2, 6), None, nothing, nothing)
    assert out.dec_out == 0
    assert torch.equal(out.mem, model.get_initial_mem(2))
    (out.dec_out + out.enc_out.sum() + out.mem.sum()).backward()
    assert all(grad is None or grad.isfinite().all() for grad in take_grads(model).values())


def test_a_target_whose_source_is_all_masked() -> None:
    """The decoder is then a plain language model; the number of masked tokens does not matter."""
    model, tgt = tiny(), tokens(1, 5)
    losses = [model(tokens(1, n), tgt, src_mask=torch.zeros(1, n, dtype=torch.bool)).dec_out for n in (2, 6)]
    torch.testing.assert_close(*losses)
    assert losses[0].isfinite()


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("masked", [False, True])
def test_reset_puts_the_initial_memory_back(writer: str, masked: bool) -> None:
    model = tiny(memory_writer=writer)
    src, mems = tokens(2, 6), memory(model, 2).requires_grad_()
    src_mask = SRC_MASK if masked else None
    out = model(src, mems=mems, src_mask=src_mask, reset=torch.tensor([True, False]))
    fresh = model(src, src_mask=src_mask)
    kept = model(src, mems=mems, src_mask=src_mask)
    for name in ("enc_out", "mem"):
        assert torch.equal(getattr(out, name)[0], getattr(fresh, name)[0])
        assert torch.equal(getattr(out, name)[1], getattr(kept, name)[1])

    upstream = torch.randn_like(out.mem[0])
    parameters = list(model.parameters())
    of_reset = torch.autograd.grad(out.mem[0], [*parameters, mems], upstream, retain_graph=True, allow_unused=True)
    of_fresh = torch.autograd.grad(fresh.mem[0], parameters, upstream, allow_unused=True)
    assert of_reset[-1] is None or not of_reset[-1].any(), "no gradient passes to the memory that was dropped"
    initial = model.writer.get_parameter(model.writer.per_slot)
    (index,) = (i for i, p in enumerate(parameters) if p is initial)
    assert of_fresh[index].any()
    torch.testing.assert_close(of_reset[index], of_fresh[index])
    (grad,) = torch.autograd.grad(out.mem[1].sum(), mems)
    assert grad[1].any()


def test_reset_in_an_empty_lane_leaves_the_initial_memory() -> None:
    model = tiny()
    nothing = torch.zeros(1, 6, dtype=torch.bool)
    out = model(tokens(1, 6), mems=memory(model, 1), src_mask=nothing, reset=torch.tensor([True]))
    assert torch.equal(out.mem, model.get_initial_mem(1))


def test_without_a_target_the_memory_advances() -> None:
    model, src = tiny(), tokens(2, 6)
    out = model(src)
    enc_out, mems, loss = out
    assert out._fields == ("enc_out", "mem", "dec_out")
    assert loss is None
    assert enc_out.shape == (2, 6, 8)
    assert mems.shape == (2, 3, 8)
    assert torch.equal(mems, model(src, tokens(2, 5)).mem)
    assert not torch.allclose(mems, model.get_initial_mem(2))
    assert not torch.allclose(model(src, mems=mems).enc_out, enc_out), "the memory is read"


def test_encoder_only_returns_two() -> None:
    model = tiny(encoder_only=True)
    out = model(tokens(2, 6), mems=memory(model, 2))
    enc_out, mems = out
    assert out._fields == ("enc_out", "mem")
    assert (enc_out.shape, mems.shape) == ((2, 6, 8), (2, 3, 8))
    assert not any("decoder" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("writer", WRITERS)
def test_num_mem_updates_repeats_the_write(writer: str) -> None:
    once = tiny(memory_writer=writer, encoder_only=True)
    thrice = tiny(memory_writer=writer, encoder_only=True, num_mem_updates=3)
    thrice.load_state_dict(once.state_dict())
    src, mems = tokens(2, 6), memory(once, 2)
    enc_out, written = once(src, mems=mems)
    for _ in range(2):
        written = once.writer(written, enc_out)
    assert torch.equal(thrice(src, mems=mems).mem, written)


@pytest.mark.parametrize("writer", WRITERS)
def test_every_parameter_is_used(writer: str) -> None:
    model = tiny(memory_writer=writer, positions="relative", encoder_only=False)
    mems = model(tokens(2, 6)).mem
    model(tokens(2, 6), tokens(2, 6), mems).dec_out.backward()
    assert [name for name, grad in take_grads(model).items() if grad is None or not grad.any()] == []


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_dropout_is_for_training() -> None:
    model, src, tgt = tiny(dropout=0.5), tokens(2, 6), tokens(2, 5)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    first, second = model(src, tgt), model(src, tgt)
    assert not torch.allclose(first.enc_out, second.enc_out)
    assert not torch.allclose(first.dec_out, second.dec_out)
    for actual, expected in zip(model.eval()(src, tgt), plain(src, tgt), strict=True):
        assert torch.equal(actual, expected)


def test_dropout_is_in_the_decoder_too() -> None:
    model, tgt, enc_out = tiny(dropout=0.5), tokens(2, 5), torch.randn(2, 6, 8, dtype=torch.float64)
    assert not torch.allclose(model.decode(tgt, enc_out), model.decode(tgt, enc_out))


def test_config_and_model_have_the_same_keywords() -> None:
    keywords = {p.name: p for p in inspect.signature(Memformer).parameters.values()}
    fields = {f.name: f for f in dataclasses.fields(MemformerConfig)}
    assert list(keywords) == list(fields)
    for name, keyword in keywords.items():
        missing = fields[name].default is dataclasses.MISSING
        assert keyword.default == (inspect.Parameter.empty if missing else fields[name].default), name
        assert keyword.kind is inspect.Parameter.KEYWORD_ONLY
        assert keyword.annotation == fields[name].type, name
        assert name in inspect.getdoc(Memformer).split("Raises:")[0], f"{name} is not described"
    model = tiny(positions="relative", memory_writer="gated", write_temperature=0.7, dropout=0.1, tie_embeddings=True)
    assert model.config == MemformerConfig(**model.config.to_dict())
    assert model.config.write_temperature == model.writer.temperature == 0.7


def test_tied_embeddings_are_one_matrix() -> None:
    model = tiny(tie_embeddings=True)
    matrices = [model.encoder.embedding.weight, model.decoder.embedding.weight, model.decoder.to_logits.weight]
    assert all(matrix is matrices[0] for matrix in matrices)
    assert len(list(tiny().parameters())) == len(list(model.parameters())) + 2


def test_int32_tokens() -> None:
    model, src, tgt = tiny(), tokens(2, 6), tokens(2, 5)
    for actual, expected in zip(model(src.int(), tgt.int()), model(src, tgt), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("writer", WRITERS)
def test_bfloat16_autocast(positions: str, writer: str) -> None:
    """The memory keeps the model's dtype, so that it may be handed on."""
    model = tiny(positions=positions, memory_writer=writer, num_mem_updates=2).float()
    src, tgt = tokens(2, 6), tokens(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        first = model(src, tgt, src_mask=SRC_MASK, tgt_mask=TGT_MASK)
        second = model(src, tgt, first.mem, reset=torch.tensor([True, False]))
    assert first.mem.dtype == second.mem.dtype == torch.float32
    assert second.dec_out.dtype == torch.float32
    if writer != "gated":
        torch.testing.assert_close(first.mem.norm(dim=-1), torch.ones(2, 3), rtol=0, atol=1e-6)
    (first.dec_out + second.dec_out).backward()
    assert all(grad.isfinite().all() for grad in take_grads(model).values())
    torch.testing.assert_close(first.dec_out, model(src, tgt, None, SRC_MASK, TGT_MASK).dec_out, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_bfloat16_model(writer: str) -> None:
    model = tiny(memory_writer=writer).bfloat16()
    mems = model(tokens(2, 6), src_mask=SRC_MASK).mem
    out = model(tokens(2, 6), tokens(2, 5), mems)
    assert out.mem.dtype == torch.bfloat16
    assert out.dec_out.dtype == torch.float32
    out.dec_out.backward()


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"positions": "relative"},
        {"tie_embeddings": True, "positions": "bucketed"},
        {"encoder_only": True, "memory_writer": "gated"},
    ],
)
def test_a_saved_model_comes_back_bit_by_bit(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(**settings).to(dtype)
    model.save_pretrained(tmp_path / "a" / "folder")
    assert {file.name for file in (tmp_path / "a" / "folder").iterdir()} == {"config.json", "model.safetensors"}
    loaded = Memformer.from_pretrained(str(tmp_path / "a" / "folder"))
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == dtype, name
    batch = {"src": tokens(2, 6)} | ({} if model.decoder is None else {"tgt": tokens(2, 5)})
    for actual, expected in zip(loaded(**batch), model(**batch), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}, {"encoder_only": True}])
def test_equal_weights_give_equal_files(settings: dict[str, Any], tmp_path: Path) -> None:
    """Every time: an order that a hash decides would be another one in some of them."""
    model, written = tiny(**settings), set()
    for _ in range(10):
        model.save_pretrained(tmp_path)
        written.add(tuple((tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")))
        model = Memformer.from_pretrained(tmp_path)
    assert len(written) == 1
    names = set(load_file(tmp_path / "model.safetensors"))
    tied = {"decoder.embedding.weight", "encoder.embedding.weight", "decoder.to_logits.weight"}
    assert names >= model.state_dict().keys() - tied
    if "tie_embeddings" in settings:
        assert names & tied == {"decoder.embedding.weight"}


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}, {"encoder_only": True}])
def test_files_that_name_tied_tensors_otherwise_load(settings: dict[str, Any], tmp_path: Path) -> None:
    """safetensors' own ``save_model`` wrote them once."""
    model = tiny(**settings)
    model.save_pretrained(tmp_path)
    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = Memformer.from_pretrained(tmp_path)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
    if "tie_embeddings" in settings:
        assert loaded.decoder.to_logits.weight is loaded.encoder.embedding.weight


def _drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in values.items() if value != "missing"}))

    return edit


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_drop("config.json"), FileNotFoundError, r"config\.json: not found; a model's folder holds"),
        (_drop("model.safetensors"), FileNotFoundError, r"model\.safetensors: not found"),
        (_write("config.json", "{"), ValueError, r"config\.json: not a JSON file"),
        (_write("config.json", "[]"), ValueError, r"config\.json: expected a JSON object with the model's settings"),
        (_edit(dims=3), ValueError, r"unknown settings \['dims'\], missing settings \[\]"),
        (_edit(dim="missing"), ValueError, r"unknown settings \[\], missing settings \['dim'\]"),
        (_edit(dim="8"), ValueError, r"dim: expected a whole number of at least 1, got '8'"),
        (_edit(dropout=None), ValueError, r"dropout: expected a probability in \[0, 1\), got None"),
        (_edit(write_temperature="hot"), ValueError, r"write_temperature: expected a finite number above 0, got 'hot'"),
        (_edit(dim=16), ValueError, r"damaged, or not the weights of .*config\.json"),
        (_edit(enc_depth=1), ValueError, r"damaged, or not the weights of .*config\.json"),
        (_edit(enc_depth=3), ValueError, r"damaged, or not the weights of .*config\.json"),
        (_truncate, ValueError, r"model\.safetensors: damaged, or not the weights"),
        (_write("model.safetensors", ""), ValueError, r"model\.safetensors: damaged, or not the weights"),
    ],
)
def test_damaged_files_are_refused(
    damage: Callable[[Path], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        Memformer.from_pretrained(tmp_path)


# --- The caller's mistakes --------------------------------------------------------------------------------------------


def ids(*shape: int, **last: int) -> Tensor:
    x = tokens(*shape)
    x[-1, -1] = last.get("last", 0)
    return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"src": ids(2, 7)}, r"src: expected at most enc_max_seq_len = 6 tokens, got 7\. Cut it into segments"),
        ({"tgt": ids(2, 7)}, r"tgt: expected at most dec_max_seq_len = 6 tokens, got 7"),
        ({"src": torch.rand(2, 6)}, r"src: expected token ids, .* got torch\.float32 of shape \(2, 6\)"),
        ({"src": torch.ones(2, 6, dtype=torch.bool)}, r"src: expected token ids, .* got torch\.bool"),
        (
            {"src": ids(2, 6)[0]},
            r"src: expected token ids, .* of shape \(batch, tokens\), got torch\.int64 of shape \(6,\)",
        ),
        ({"src": [[1.5, 2]]}, r"src: expected token ids, .* got float64"),
        ({"src": ids(2, 6)[:, :0]}, r"src: expected at least one lane and one token, got shape \(2, 0\)"),
        ({"src": ids(2, 6)[:0]}, r"src: expected at least one lane and one token, got shape \(0, 6\)"),
        ({"tgt": torch.rand(2, 5)}, r"tgt: expected token ids, .* got torch\.float32"),
        ({"tgt": [ids(2, 5)]}, r"tgt: expected token ids, .* got list"),
        ({"src": ids(2, 6, last=11)}, r"src: token id 11 is outside the table of enc_num_tokens = 11 \(ids 0 to 10\)"),
        ({"src": ids(2, 6, last=-1)}, r"src: token id -1 is outside the table of enc_num_tokens = 11"),
        ({"tgt": ids(2, 5, last=12)}, r"tgt: token id 12 is outside the table of dec_num_tokens = 11"),
        ({"tgt": ids(2, 5, last=-101)}, r"tgt: token id -101 is outside the table of dec_num_tokens = 11"),
        ({"src": ids(2, 6, last=-100)}, r"src: token id -100 is outside the table of enc_num_tokens = 11"),
        ({"tgt": ids(3, 5)}, r"tgt: expected the batch size of src, 2, got 3"),
        ({"tgt": ids(2, 1)}, r"tgt: expected at least 2 tokens, .* got 1"),
        ({"mems": torch.zeros(3, 3, 8)}, r"mems: expected .* \(2, 3, 8\) \(batch of src, .* got .* \(3, 3, 8\)"),
        ({"mems": torch.zeros(2, 4, 8)}, r"mems: expected .* \(2, 3, 8\) .* got torch\.float32 of shape \(2, 4, 8\)"),
        ({"mems": torch.zeros(2, 3, 8)}, r"mems: expected torch\.float64, that of the model, .* got torch\.float32"),
        ({"mems": "none"}, r"mems: expected .* got str"),
        ({"src_mask": torch.ones(2, 6)}, r"src_mask: expected torch\.bool, or integers of 0 and 1, .* torch\.float32"),
        ({"src_mask": mask("11", "11")}, r"src_mask: expected .* shape \(2, 6\), True for .* got .* shape \(2, 2\)"),
        ({"src_mask": "1"}, r"src_mask: expected .* got str"),
        (
            {"src_mask": torch.ones(2, 6)},
            r"If it is 1 for .* pass mask\.bool\(\); if .* added to scores, pass mask == 0",
        ),
        ({"tgt_mask": torch.full((2, 5), 2)}, r"tgt_mask: expected .* 0 and 1, .* got other integers, from 2 to 2"),
        ({"src_mask": torch.ones(2, 5).long()}, r"src_mask: expected torch\.bool .* got torch\.bool of shape \(2, 5\)"),
        (
            {"tgt_mask": mask("1111", "1111"), "tgt": ids(2, 5, last=-100)},
            r"tgt_mask: expected .* got .* shape \(2, 4\)",
        ),
        ({"tgt_mask": mask("1111", "1111")}, r"tgt_mask: expected .* shape \(2, 5\), .* got .* shape \(2, 4\)"),
        ({"tgt": None, "tgt_mask": mask("11", "11")}, r"tgt_mask: given without tgt"),
        ({"reset": torch.tensor([1, 2])}, r"reset: expected torch\.bool, .* got other integers, from 1 to 2"),
        ({"reset": torch.ones(2)}, r"reset: expected torch\.bool, .* got torch\.float32 of shape \(2,\)"),
        ({"reset": torch.tensor([True])}, r"reset: expected torch\.bool of shape \(2,\), .* got .* shape \(1,\)"),
        ({"reset": True}, r"reset: expected .* got bool"),
    ],
)
def test_a_call_that_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(**{"src": ids(2, 6), "tgt": ids(2, 5), **arguments})


def test_a_target_for_an_encoder_only_model() -> None:
    with pytest.raises(ValueError, match=r"a target: this model is encoder_only and has no decoder"):
        tiny(encoder_only=True)(tokens(2, 6), tokens(2, 5))
    with pytest.raises(ValueError, match=r"decode: this model is encoder_only and has no decoder"):
        tiny(encoder_only=True).decode(tokens(2, 6), torch.zeros(2, 6, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enc_out": torch.zeros(3, 6, 8)}, r"enc_out: expected shape \(2, tokens, 8\), got .* \(3, 6, 8\)"),
        ({"enc_out": torch.zeros(2, 6, 7)}, r"enc_out: expected shape \(2, tokens, 8\), got .* \(2, 6, 7\)"),
        ({"tgt": ids(2, 7)}, r"tgt: expected at most dec_max_seq_len = 6 tokens, got 7"),
        ({"src_mask": mask("11", "11")}, r"src_mask: expected .* shape \(2, 6\)"),
        ({"tgt_mask": mask("11", "11")}, r"tgt_mask: expected .* shape \(2, 5\)"),
        ({"src": None}, r"src: expected the source of enc_out, shape \(2, 6\), which dec_overlap reads, got NoneType"),
        ({"src": ids(2, 5)}, r"src: expected the source of enc_out, shape \(2, 6\), .* got .* of shape \(2, 5\)"),
        ({"src": ids(2, 6) + 90}, r"src: token id \d+ is outside the table of enc_num_tokens"),
        ({"tgt_mask": mask("11100", "01100")}, r"tgt_mask: expected the first token .* Pad targets on the right"),
    ],
)
def test_a_decode_that_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    given = {"tgt": ids(2, 5), "src": ids(2, 6), "enc_out": torch.zeros(2, 6, 8, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        tiny(dec_overlap=2).decode(**(given | arguments))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 9}, r"enc_heads: must divide dim, got 2 heads for dim 9"),
        ({"dec_heads": 3}, r"dec_heads: must divide dim, got 3 heads for dim 8"),
        ({"mem_update_attn_heads": 5}, r"mem_update_attn_heads: must divide dim, got 5 heads for dim 8"),
        ({"enc_heads": 8}, r"rotary needs an even width per head, got dim 8 / enc_heads 8 = 1"),
        ({"dec_num_tokens": None}, r"dec_num_tokens: a decoder needs it, got None\. Set it, or encoder_only=True"),
        ({"dec_max_seq_len": 0}, r"dec_max_seq_len: expected a whole number of at least 1, got 0"),
        ({"dec_max_seq_len": 1}, r"dec_max_seq_len: expected a whole number of at least 2, got 1"),
        ({"enc_max_seq_len": None}, r"enc_max_seq_len: expected a whole number of at least 1, got None"),
        ({"dec_max_seq_len": None}, r"dec_max_seq_len: a decoder needs it, got None"),
        ({"dec_overlap": -1}, r"dec_overlap: expected a whole number of at least 0, got -1"),
        ({"dec_overlap": 6}, r"dec_overlap: expected at most a segment's 5 tokens, got 6"),
        ({"dec_overlap": 1, "dec_num_tokens": 7}, r"dec_overlap: .* got enc_num_tokens 11 and dec_num_tokens 7"),
        ({"num_memory_slots": 0}, r"num_memory_slots: expected a whole number of at least 1, got 0"),
        ({"enc_depth": 1.5}, r"enc_depth: expected a whole number of at least 1, got 1\.5"),
        ({"num_mem_updates": True}, r"num_mem_updates: expected a whole number of at least 1, got True"),
        ({"slot_parts": 3}, "slot_parts: must divide dim, got 3 parts for dim 8"),
        ({"slot_parts": 0}, "slot_parts: expected a whole number of at least 1, got 0"),
        ({"memory_writer": "gru"}, r"memory_writer: expected one of normalised, gated.*, got 'gru'"),
        ({"positions": "sine"}, r"positions: expected one of rotary, relative, bucketed, got 'sine'"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1\.0"),
        ({"write_temperature": 0.0}, r"write_temperature: expected a finite number above 0, got 0\.0"),
        ({"tie_embeddings": True, "dec_num_tokens": 12}, r"tie_embeddings: .* same vocabulary, got .* 11 and .* 12"),
        ({"tie_embeddings": True, "encoder_only": True}, r"tie_embeddings: there is nothing to tie"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_mistyped_keywords() -> None:
    with pytest.raises(TypeError, match="enc_dept"):
        tiny(enc_dept=2)
    with pytest.raises(TypeError, match="source_mask"):
        tiny()(tokens(2, 6), source_mask=SRC_MASK)


def test_decoder_settings_without_a_decoder_are_pointed_out() -> None:
    with pytest.warns(UserWarning, match="the decoder's settings .* have no effect"):
        tiny(encoder_only=True, dec_num_tokens=11)
    with pytest.warns(UserWarning, match="the decoder's settings .* have no effect"):
        tiny(encoder_only=True, dec_overlap=2)


@pytest.mark.filterwarnings("ignore:encoder_only=True")
def test_decoder_settings_without_a_decoder_have_no_effect() -> None:
    plain, given = tiny(encoder_only=True), tiny(encoder_only=True, dec_num_tokens=7, dec_max_seq_len=0)
    for name in ("segment_length", "vocabulary"):
        assert getattr(given.config, name) == getattr(plain.config, name)
    given.load_state_dict(plain.state_dict())
    text = tokens(2, 20)
    assert torch.equal(given.read(text, start=0).memory, plain.read(text, start=0).memory)


def test_gradients_of_each_sample_by_vmap() -> None:
    model, src, tgt = tiny().double(), tokens(3, 6), tokens(3, 5)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], src: torch.Tensor, tgt: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (src[None], tgt[None])).dec_out

    with sdpa_kernel(SDPBackend.MATH):
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, src, tgt)
        for lane in range(3):
            model.zero_grad()
            loss(parameters, src[lane], tgt[lane]).backward()
            for name, parameter in parameters.items():
                expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(found[name][lane], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_new_encoder_copies_neighbours_as_they_are(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = tiny()
    finally:
        torch.set_default_dtype(before)
    for layer in model.encoder.layers:
        attention = layer.self_attention
        both = attention.to_out.weight.float() @ attention.to_qkv.weight.chunk(3)[2].float()
        tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(both, torch.eye(len(both)), rtol=0, atol=tolerance)


def test_a_new_decoders_heads_look_at_the_tokens_before() -> None:
    length, heads = 12, 4
    model = Memformer(
        dim=96, num_memory_slots=3, enc_num_tokens=5, enc_max_seq_len=length, enc_depth=1, enc_heads=heads,
        dec_num_tokens=5, dec_max_seq_len=length, dec_depth=2, dec_heads=heads,
    )  # fmt: skip

    @torch.no_grad()
    def looked_at(attention: SelfAttention) -> list[int]:
        """How far back each head looks most, on average over random tokens."""
        q, k, _ = (split_heads(part, heads) for part in attention.to_qkv(torch.randn(64, length, 96)).chunk(3, -1))
        assert isinstance(attention.positions, Rotary)
        logits = attention.positions.rotate(q) @ attention.positions.rotate(k).mT / q.shape[-1] ** 0.5
        last = logits[..., -1, :].softmax(-1).mean(0)
        return (length - 1 - last.argmax(-1)).tolist()

    assert model.decoder is not None
    for layer in model.decoder.layers:
        assert looked_at(layer.self_attention) == [1, 2, 3, 4]
    assert looked_at(model.encoder.layers[0].self_attention) != [1, 2, 3, 4]


@pytest.mark.parametrize("positions", [kind for kind in POSITIONS if kind != "rotary"])
def test_positions_without_a_preference_leave_a_new_decoder_as_it_is(positions: Any) -> None:
    model = Memformer(
        dim=16, num_memory_slots=3, enc_num_tokens=5, enc_max_seq_len=6, dec_num_tokens=5, dec_max_seq_len=6,
        positions=positions,
    )  # fmt: skip
    assert model.decoder is not None
    for layer in model.decoder.layers:
        assert layer.self_attention.to_qkv.bias.abs().amax() <= 16**-0.5, "as torch draws it"
