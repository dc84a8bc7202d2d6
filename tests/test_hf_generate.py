"""What transformers' generate() can be asked for, of both kinds of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TextStreamer

from memformer.hf import with_memory
from test_hf import LENGTH, TOKENS, base_of, model_of, some_tokens
from test_hf_own import adapter, some

KINDS = {"pretrained": (model_of, some_tokens), "own": (lambda: adapter("causal"), some)}


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    make, tokens = KINDS[request.param]
    model = make()
    model.generation_config.eos_token_id = None
    return model, tokens


def words(count: int) -> PreTrainedTokenizerFast:
    known = {f"w{i}.": i for i in range(count)} | {"abcdef": count}  # stop strings are sought behind the last one
    inner = Tokenizer(models.WordLevel(known, unk_token="w0."))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_a_text_is_streamed(case: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokens = case
    tokenizer = words(TOKENS)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    text = model.generate(tokens(1, 5), streamer=streamer, do_sample=False, max_new_tokens=2 * LENGTH)
    assert capsys.readouterr().out.strip() == tokenizer.decode(text[0, 5:])


def test_a_string_ends_a_text(case: tuple[Any, Any]) -> None:
    model, tokens = case
    prompt = tokens(1, 5)
    whole = model.generate(prompt, do_sample=False, max_new_tokens=2 * LENGTH)
    last = f"w{int(whole[0, -1])}."
    stopped = model.generate(
        prompt, do_sample=False, max_new_tokens=2 * LENGTH, stop_strings=[last], tokenizer=words(TOKENS)
    )
    end = 5 + whole[0, 5:].tolist().index(int(whole[0, -1])) + 1
    assert torch.equal(stopped, whole[:, :end])


def test_guidance_is_with_and_without_a_cache_the_same(case: tuple[Any, Any]) -> None:
    model, tokens = case
    options = dict(guidance_scale=1.5, do_sample=False, max_new_tokens=LENGTH)
    text = model.generate(tokens(1, 5), **options)
    assert torch.equal(text, model.generate(tokens(1, 5), use_cache=False, **options))


def test_what_a_memory_cannot_do_is_refused(case: tuple[Any, Any]) -> None:
    model, tokens = case
    for options, message in [
        (dict(prompt_lookup_num_tokens=2), "not supported with stateful models"),
        (dict(assistant_early_exit=1), "not supported with stateful models"),
        (
            dict(cache_implementation="static"),
            "cache_implementation: expected none, .* makes its own cache, .*'static'",
        ),
        (dict(cache_implementation="quantized"), "cache_implementation: expected none"),
        (dict(penalty_alpha=0.6, top_k=4), "requires `trust_remote_code=True`"),
        (
            dict(inputs_embeds=torch.zeros(1, 5, 16)),
            "inputs_embeds: expected none, .* give input_ids, got torch.float32",
        ),
        (
            dict(position_ids=torch.arange(3, 8)[None]),
            "position_ids: expected none, .* leave them out, got torch.int64",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(tokens(1, 5), max_new_tokens=3, **options)


def test_a_base_that_asks_for_a_cache_of_its_own_kind() -> None:
    """As those of Gemma 2 did: the base's own generation stays as it was."""
    base = base_of()
    base.generation_config.cache_implementation = "hybrid"
    model = with_memory(base, 3, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    assert model.generate(some_tokens(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)
    assert base.generation_config.cache_implementation == "hybrid"


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_on_named_devices(place: Any, tmp_path: Path) -> None:
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    tokens = some_tokens(2, 12)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=place)(tokens)
    torch.testing.assert_close((found.logits, found.memory), (expected.logits, expected.memory), rtol=0, atol=0)
