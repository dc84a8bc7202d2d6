"""Filters, and generation across segments: the memory advances exactly when a segment is full."""

import pytest
import torch
from torch.testing import assert_close

from memformer import Memformer
from memformer.generation import generate, keep_top_k, keep_top_p

START = 16


def tiny(**changes):
    settings = dict(
        dim=16, num_memory_slots=3, enc_num_tokens=17, enc_max_seq_len=5, enc_depth=1, enc_heads=2,
        dec_num_tokens=17, dec_max_seq_len=6, dec_depth=1, dec_heads=2, mem_update_attn_heads=2,
    )  # fmt: skip
    return Memformer(**{**settings, **changes}).eval()


def run(model, prompt, count, **how):
    return torch.stack(list(generate(model, prompt, count, start=START, **how)), 1)


def test_filters_keep_what_their_names_say():
    logits = torch.tensor([[0.5, 0.2, 0.25, 0.05]]).log()
    assert keep_top_k(logits, 2).isfinite().tolist() == [[True, False, True, False]]
    assert keep_top_k(logits, 9).isfinite().all()
    assert keep_top_p(logits, 0.7).isfinite().tolist() == [[True, False, True, False]]
    assert keep_top_p(logits, 0.76).isfinite().tolist() == [[True, True, True, False]]
    assert keep_top_p(logits, 1e-9).isfinite().tolist() == [[True, False, False, False]]
    assert keep_top_p(logits, 1.0).isfinite().all()


@pytest.mark.parametrize("length", [0, 1, 4, 5, 6, 11])
def test_each_token_is_the_best_after_all_before_it(length):
    model, prompt = tiny(), torch.randint(0, 16, (2, length))
    text = torch.cat([prompt, run(model, prompt, 13, temperature=0)], 1)
    for i in range(length, text.shape[1]):
        # By hand: every whole segment before position i is encoded, and the decoder sees the rest of its own.
        begin = i // 5 * 5
        source, memory = model.encode(torch.full((2, 1), START))
        for segment in text[:, :begin].split(5, 1) if begin else []:
            source, memory = model.encode(segment, memory)
        written = torch.cat([torch.full((2, 1), START), text[:, begin:i]], 1)
        logits = model.decode(written, source)[:, -1, :START]
        assert_close(text[:, i], logits.argmax(-1))


def test_sampling_follows_its_generator_and_never_gives_the_start_token():
    model, prompt = tiny(), torch.randint(0, 16, (3, 2))
    model.decoder.to_logits.bias.data[START] = 100.0
    first, again, other = (run(model, prompt, 12, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert_close(first, again)
    assert not first.equal(other)
    assert (first != START).all()


def test_lanes_do_not_touch_each_other():
    model, prompt = tiny(), torch.randint(0, 16, (3, 7))
    together = run(model, prompt, 9, temperature=0)
    alone = [run(model, prompt[i : i + 1], 9, temperature=0) for i in range(3)]
    assert_close(together, torch.cat(alone))


def test_generation_leaves_no_graph():
    tokens = next(generate(tiny(), torch.zeros(1, 1, dtype=torch.int64), 1, start=START))
    assert not tokens.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens: expected at least 0, got -1"),
        (dict(temperature=-0.5), "temperature: expected at least 0, got -0.5"),
        (dict(temperature=float("nan")), "temperature: expected at least 0, got nan"),
        (dict(top_k=0), "top_k: expected at least 1, got 0"),
        (dict(top_p=0.0), r"top_p: expected a share in \(0, 1\], got 0.0"),
        (dict(top_p=1.1), r"top_p: expected a share in \(0, 1\], got 1.1"),
        (dict(prompt=torch.zeros(3)), "prompt: expected token ids"),
        (dict(prompt=torch.full((1, 2), 17)), "token id 17 is outside the table of dec_num_tokens = 17"),
        (dict(prompt=torch.full((1, 7), -1)), "token id -1 is outside"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    given = {"prompt": torch.zeros(1, 2, dtype=torch.int64), "max_new_tokens": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        list(generate(tiny(), start=START, **given))


def test_an_encoder_only_model_cannot_generate():
    model = tiny(encoder_only=True, dec_num_tokens=None, dec_max_seq_len=None)
    with pytest.raises(ValueError, match="no decoder"):
        list(generate(model, torch.zeros(1, 1, dtype=torch.int64), 1, start=START))
