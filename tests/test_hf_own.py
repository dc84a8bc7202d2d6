"""This library's own models in transformers: their folders, their text, and what they predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import VOCABULARY, lively, lively_causal, training_settings
from memformer import generation, load_model, memory_replay_backprop
from memformer.data import ByteTokenizer, TokenIds
from memformer.hf import (
    CausalMemformerForCausalLM,
    HFCausalConfig,
    HFMemformerConfig,
    MemformerForCausalLM,
    StreamCache,
    as_transformers,
)
from memformer.hf.bases import CACHE
from memformer.training import Run
from test_hf import base_of

TOKENIZER = TokenIds(VOCABULARY - 4)  # and four special ones
MAKERS = {"causal": lively_causal, "memformer": lively}
CLASSES = {"causal": CausalMemformerForCausalLM, "memformer": MemformerForCausalLM}
both = pytest.mark.parametrize("kind", MAKERS)


def adapter(kind: str, seed: int = 3, **changes: Any) -> Any:
    return as_transformers(MAKERS[kind](seed, **changes), TOKENIZER)


def some(batch: int, length: int, seed: int = 2) -> Tensor:
    return torch.randint(TOKENIZER.ordinary, (batch, length), generator=torch.Generator().manual_seed(seed))


@both
def test_greedy_text_is_the_library_s_own(kind: str) -> None:
    """Token for token across segments, alone and in a batch with padding on the left, with and without a cache."""
    model, tokens = adapter(kind), some(3, 12)
    lanes = [tokens[0], tokens[1, 8:], tokens[2, 2:]]
    mask = torch.arange(12) >= torch.tensor([0, 8, 2])[:, None]
    options = dict(start=TOKENIZER.start, temperature=0, never=TOKENIZER.special)
    expected, _ = generation.generate(model.memformer, lanes, 14, **options)
    expected = torch.stack(expected)
    assert len(set(expected[0].tolist())) > 1
    for use_cache in (True, False):
        text = model.generate(
            tokens.where(mask, 3), attention_mask=mask.long(), do_sample=False, max_new_tokens=14, use_cache=use_cache
        )
        assert torch.equal(text[:, 12:], expected)
    # The start token is no text, so it needs no mask.
    text = model.generate(tokens.where(mask, TOKENIZER.start), do_sample=False, max_new_tokens=14)
    assert torch.equal(text[:, 12:], expected)
    nothing, _ = generation.generate(model.memformer, [tokens[0, :0]], 14, **options)
    assert torch.equal(model.generate(do_sample=False, max_new_tokens=14)[0, 1:], nothing[0])


@both
def test_a_document_s_end_ends_a_text(kind: str) -> None:
    model = as_transformers(MAKERS[kind](), TOKENIZER.with_end())
    assert model.generation_config.eos_token_id == TOKENIZER.start
    tokens = some(1, 7)
    never = [token for token in TOKENIZER.special if token != TOKENIZER.start]
    for seed in range(3):
        model = as_transformers(MAKERS[kind](seed), TOKENIZER.with_end())
        (expected,), _ = generation.generate(
            model.memformer, tokens, 40, start=TOKENIZER.start, temperature=0, stop=[TOKENIZER.start], never=never
        )
        assert torch.equal(model.generate(tokens, do_sample=False, max_new_tokens=40)[0, 7:], expected)


@both
def test_beams_samples_and_states(kind: str) -> None:
    model, tokens = adapter(kind), some(2, 8)
    options = dict(num_beams=3, do_sample=False, max_new_tokens=9)
    cached = model.generate(tokens, **options)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **options))
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        samples.append(
            model.generate(tokens, do_sample=True, num_return_sequences=2, max_new_tokens=9, use_cache=use_cache)
        )
    assert torch.equal(*samples)
    whole = model.generate(tokens, do_sample=False, max_new_tokens=20)
    first = model.generate(tokens, do_sample=False, max_new_tokens=7, return_dict_in_generate=True)
    state = first[CACHE]
    assert isinstance(state, StreamCache)
    before = state.state
    for _ in range(2):  # the state stays as it is
        rest = model.generate(first.sequences[:, -1:], do_sample=False, max_new_tokens=13, **{CACHE: state})
        assert torch.equal(torch.cat([first.sequences, rest[:, 1:]], 1), whole)
    assert torch.equal(state.state.pending, before.pending)
    assert state.state.position.tolist() == [14, 14]
    found, _ = generation.generate(
        model.memformer, first.sequences[:, -1:], 13, state=before, temperature=0, never=TOKENIZER.special
    )
    assert torch.equal(torch.stack(found), whole[:, 15:])


@both
def test_logits_and_loss(kind: str) -> None:
    """All at once, with padding anywhere, as token by token; the loss and its gradients are the library's own."""
    model, tokens = adapter(kind), some(2, 13)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, [0, 1, 6]] = False
    whole = model(tokens, attention_mask=mask).logits
    assert whole.shape == (2, 13, VOCABULARY)
    pieces, cache = [], None
    for piece, kept in zip(tokens.split(4, 1), mask.split(4, 1), strict=True):
        output = model(piece, attention_mask=kept, use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[mask], whole[mask], rtol=0, atol=1e-10)
    last = model(tokens, attention_mask=mask, use_cache=True, logits_to_keep=1)
    torch.testing.assert_close(last.logits[:, 0], whole[:, -1], rtol=0, atol=1e-10)
    torch.testing.assert_close(
        model(tokens, attention_mask=mask, logits_to_keep=2).logits, whole[:, -2:], rtol=0, atol=1e-12
    )
    # A document's first token is predicted, too.
    first = model(torch.full((2, 1), TOKENIZER.start)).logits
    before = torch.cat([first, whole[:, :-1]], 1)
    before[1, [0, 1, 2]], before[1, 7] = first[1, 0], whole[1, 5]
    labels = tokens.where(torch.arange(13) != 4, -100)
    counted = mask & (labels >= 0)
    expected = torch.nn.functional.cross_entropy(before[counted], labels[counted])
    output = model(tokens, attention_mask=mask, labels=labels)
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-10)
    output.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "writer" in name)


def test_a_causal_loss_is_that_of_a_rollout() -> None:
    model, tokens = adapter("causal"), some(2, 13)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    found = {name.removeprefix("memformer."): p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, _ = memory_replay_backprop(model.memformer, tokens, reduction="mean")
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-12)
    for name, parameter in model.memformer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-10, msg=name)


@both
def test_a_folder_of_either_is_read_by_both(kind: str, tmp_path: Path) -> None:
    own, tokens = MAKERS[kind](tie_embeddings=True), some(2, 13)
    own.save_pretrained(tmp_path / "own")
    TOKENIZER.save(tmp_path / "own")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert type(model) is CLASSES[kind]
    assert (model.dtype, model.training, model.config.start_token_id) == (torch.float64, False, TOKENIZER.start)
    expected = as_transformers(own, TOKENIZER)(tokens).logits
    # The weights are the same to the bit; products of weights at other addresses need not be.
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path / "theirs")
    for again in (
        load_model(tmp_path / "theirs"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").memformer,
        type(own).from_pretrained(tmp_path / "theirs"),
    ):
        assert again.config == own.config
        for name, tensor in own.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path / "parts", max_shard_size="5KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=1e-12)
    for name, tensor in load_model(tmp_path / "parts").state_dict().items():
        assert torch.equal(tensor, own.state_dict()[name]), name
    if kind == "memformer":  # what is one stays one
        assert again.memformer.decoder.to_logits.weight is again.memformer.encoder.embedding.weight
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    config = AutoConfig.from_pretrained(tmp_path / "own")
    assert isinstance(config, HFCausalConfig if kind == "causal" else HFMemformerConfig)
    assert (config.hidden_size, config.vocab_size, config.settings) == (8, VOCABULARY, own.config)


def test_several_files_that_do_not_fit(tmp_path: Path) -> None:
    as_transformers(MAKERS["causal"](), TOKENIZER).save_pretrained(tmp_path, max_shard_size="5KB")
    index, first = tmp_path / "model.safetensors.index.json", min(tmp_path.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"index\.json: damaged, or not the weights of .*config\.json"):
        load_model(tmp_path)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-.*: not found; .* the files that .*index\.json names"):
        load_model(tmp_path)
    first.write_bytes(content)
    told = json.loads(index.read_text())
    others = {name: file for name, file in told["weight_map"].items() if file != first.name}
    index.write_text(json.dumps({"weight_map": others}))
    with pytest.raises(ValueError, match="Missing key"):
        load_model(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="damaged; expected a weight_map from tensors to files"):
        load_model(tmp_path)


@both
def test_a_run_s_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("Some text to be learned by heart, which is soon forgotten. " * 8)
    causal: dict[str, Any] = dict(architecture="causal", depth=2) if kind == "causal" else {}
    run = Run(
        training_settings(
            data=(Path("text.txt"),),
            out=Path("runs/mine"),
            steps=2,
            dim=8,
            slots=2,
            heads=2,
            lanes=2,
            horizon=2,
            segment_length=8,
            device="cpu",
            **causal,
        )
    )
    list(run.train())
    model = AutoModelForCausalLM.from_pretrained("runs/mine")
    assert type(model) is CLASSES[kind]
    assert type(AutoConfig.from_pretrained("runs/mine")) is model.config_class
    never = ByteTokenizer().special
    assert model.config.special_token_ids == list(never)
    prompt = torch.tensor([list(b"Some text to be ")])
    (expected,), _ = generation.generate(load_model("runs/mine"), prompt, 12, start=256, temperature=0, never=never)
    assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=12)[0, 16:], expected)
    checkpoint = next(Path("runs/mine").glob("step-*"))
    for folder in (checkpoint, str(checkpoint)):
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is CLASSES[kind]
    assert type(CLASSES[kind].from_pretrained("runs/mine")) is CLASSES[kind]
    # Where each process wrote its part of the weights.
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "shards").mkdir()
    save_file({f"model/{name}": tensor for name, tensor in tensors.items()}, checkpoint / "shards" / "0.safetensors")
    (checkpoint / "model.safetensors").unlink()
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(again(prompt).logits, model(prompt).logits)


def test_who_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected a CausalMemformer or a Memformer, got Linear"):
        as_transformers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="MemformerForCausalLM: this model is encoder_only and has no decoder"):
        as_transformers(lively(encoder_only=True), TOKENIZER)
    lively().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="start_token_id: expected the token that started documents in training"):
        AutoModelForCausalLM.from_pretrained(tmp_path).generate(some(1, 3), max_new_tokens=2)
    model, tokens = adapter("causal"), some(2, 3)
    cache = model(tokens, use_cache=True)[CACHE]
    for given, message in [
        ({"input_ids": tokens + VOCABULARY}, "input_ids: token id .* is outside the table"),
        ({"attention_mask": torch.ones(2, 2).bool()}, r"attention_mask: expected torch.bool of its tokens' shape"),
        ({"labels": tokens[:, 1:]}, "labels: expected the shape of the tokens"),
        ({"labels": tokens, CACHE: cache}, "labels: expected none beside a cache"),
        ({CACHE: cache, "input_ids": tokens[:1]}, "cache: expected a StreamCache of 1 lanes, .* got one of 2"),
        ({CACHE: [cache]}, "cache: expected a StreamCache of 2 lanes, .* got list"),
        (
            {CACHE: adapter("causal", num_memory_slots=4)(tokens, use_cache=True)[CACHE]},
            r"cache: expected a memory of \(16, 8\), .* got \(19, 8\), .* of another model",
        ),
        ({"cache": cache, "past_key_values": cache}, "past_key_values is its older name"),
        ({"logits_to_keep": -1}, "logits_to_keep: expected a whole number"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**({"input_ids": tokens} | given))
    with pytest.raises(ValueError, match="the vocabulary of a model of this library is fixed"):
        model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(tokens[:1], assistant_model=adapter("causal"), max_new_tokens=3)


def test_a_folder_of_an_own_model_has_a_card(tmp_path: Path) -> None:
    adapter("causal").save_pretrained(tmp_path)
    assert "A CausalMemformer of " in (tmp_path / "README.md").read_text()


@both
def test_what_is_changed_in_the_model_is_saved(kind: str, tmp_path: Path) -> None:
    own = MAKERS[kind]()
    model = as_transformers(own, TOKENIZER)
    own.set_writer(write_temperature=0.05, forgetting=0.0)
    own.resize_memory(5)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == own.config
    assert (loaded.config.write_temperature, loaded.config.forgetting) == (0.05, 0.0)
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path)(some(1, 13)).logits, model(some(1, 13)).logits
    )
    own.set_writer(write_temperature=0.25, forgetting=0.001)  # as they were at first
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config == own.config


def test_a_configuration_is_found_by_the_name_of_the_argument(tmp_path: Path) -> None:
    lively_causal().save_pretrained(tmp_path / "own")
    base_of().save_pretrained(tmp_path / "other")
    assert type(AutoConfig.from_pretrained(pretrained_model_name_or_path=tmp_path / "own")) is HFCausalConfig
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path=str(tmp_path / "other"))
    assert config.model_type == "llama"
