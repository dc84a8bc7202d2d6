"""memformer train --base: a memory around a pretrained model, from the command line to the run's folder and back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from memformer import cli, load_model
from memformer.around import BaseSettings
from memformer.config import LATER
from memformer.data import Document, encode_documents, load_tokenizer
from memformer.evaluation import evaluate
from memformer.hf import model, reference
from memformer.hf.runs import AroundBase, load_base
from memformer.settings import ModelSettings, TrainingConfig
from memformer.training import assemble
from pretrained_bases import TEXT, save_base, save_gguf

# PEFT still calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

HOW = dict(
    lanes=2, horizon=2, segment_length=8, slots=2, read_dim=8, read_heads=2, write_heads=2, log_every=2,
    sample_tokens=3, warmup=1, device="cpu",
)  # fmt: skip
SMALL = [part for name, value in HOW.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a text, and a run of four steps with a LoRA, saved after two."""
    folder = tmp_path_factory.mktemp("made")
    save_base(folder / "base")
    (folder / "text.txt").write_text(TEXT * 100)
    assert train(folder, "--out", str(folder / "run"), "--lora", "2", "--steps", "4", "--save-every", "2") == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "run"):
        shutil.copytree(made / name, tmp_path / name, symlinks=True)  # "best" is a link
    shutil.copy(made / "text.txt", tmp_path)
    return tmp_path


def train(folder: Path, *flags: str) -> int:
    data = [] if "--data" in flags else ["--data", str(folder / "text.txt")]
    return cli.main(["train", "--base", str(folder / "base"), *data, *SMALL, *flags])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_frozen_base_stays_as_it_is_and_no_checkpoint_holds_it(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in (folder / "base").iterdir()}
    assert train(folder, "--out", "frozen", "--steps", "2", "--ema", "0.5") == 0
    assert {file.name: file.read_bytes() for file in (folder / "base").iterdir()} == before
    saved = weights(folder / "frozen" / "step-000002")
    assert {name.split(".")[0] for name in saved} == {"readers", "write_norm", "writer"}
    model = load_model(folder / "frozen")
    for name, parameter in LlamaForCausalLM.from_pretrained(folder / "base").named_parameters():
        assert torch.equal(model.base.get_parameter(name), parameter), name
    assert all(reader.to_out.weight.any() for reader in model.readers.each)  # which begin as zero
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(saved)


def test_a_checkpoint_from_before_there_were_all_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = AroundBase.described
    with monkeypatch.context() as before:
        before.setattr(
            AroundBase, "described", lambda self: {k: v for k, v in described(self).items() if k not in LATER}
        )
        assert train(folder, "--out", "older", "--steps", "2") == 0
    assert json.loads((folder / "older" / "step-000002" / "config.json").read_text()).keys().isdisjoint(LATER)
    config = load_model(folder / "older").config
    assert (config.slot_parts, config.forgetting) == (1, 0.001)
    assert cli.main(["train", "--resume", "--out", str(folder / "older"), "--steps", "3"]) == 0


def test_parts_of_slots_reach_a_memory_around_a_base(folder: Path) -> None:
    assert train(folder, "--out", "parts", "--steps", "2", "--slot-parts", "2", "--forgetting", "0.5") == 0
    model = load_model(folder / "parts")
    assert (model.config.slot_parts, model.config.forgetting, model.writer.scale) == (2, 0.5, 0.5)
    assert model.readers.each[0].to_kv.in_features == model.dim // 2
    assert model.config.write_heads == 2, "as the command says"
    assert train(folder, "--out", "more", "--steps", "2", "--slot-parts", "4", "--write-heads", "0") == 0
    assert load_model(folder / "more").config.write_heads == 4, "as many as parts, where no number is given"


def test_the_parts_of_a_run_train_nothing_else(folder: Path) -> None:
    """An optimizer that is given frozen weights lets them decay."""
    for settings, prefixes in [
        (dict(), {"readers", "write_norm", "writer"}),
        (dict(lora=2), {"readers", "write_norm", "writer", "base"}),
    ]:
        parts = assemble(
            TrainingConfig(
                data=(folder / "text.txt",), out=folder / "new", steps=2,
                around=BaseSettings(base=folder / "base", read_dim=8, **settings),  # type: ignore[arg-type]
                model=ModelSettings(slots=2),
            )
        )  # fmt: skip
        named = {parameter: name for name, parameter in parts.model.named_parameters()}
        stepped = [named[p] for group in parts.optimizer.param_groups for p in group["params"]]
        assert {name.split(".")[0] for name in stepped} == prefixes
        assert all("lora_" in name for name in stepped if name.startswith("base."))


def test_a_lora_is_trained_and_the_weights_under_it_are_not(folder: Path) -> None:
    saved = weights(folder / "run" / "step-000004")
    loras = {name: p for name, p in saved.items() if name.startswith("base.")}
    assert loras
    assert all("lora_" in name and p.any() for name, p in loras.items())  # lora_B begins as zero
    model, plain = load_model(folder / "run"), LlamaForCausalLM.from_pretrained(folder / "base")
    layer = model.base.model.layers[1].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, plain.model.layers[1].self_attn.q_proj.weight)


@pytest.mark.parametrize("flags", [["--lora", "2"], ["--lora", "2", "--ema", "0.9"], ["--train-base"]])
def test_resumed_equals_uninterrupted_bit_for_bit(folder: Path, flags: list[str]) -> None:
    whole = folder / "run"
    if flags != ["--lora", "2"]:
        whole = folder / "whole"
        assert train(folder, "--out", "whole", *flags, "--steps", "4", "--save-every", "2") == 0
    (folder / "again").mkdir()
    shutil.copytree(whole / "step-000002", folder / "again" / "step-000002")
    assert cli.main(["train", "--resume", "--out", "again"]) == 0
    for name in ("model.safetensors", "training.safetensors", "config.json", "tokenizer.json"):
        files = [run / "step-000004" / name for run in (whole, folder / "again")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert weights(whole / "step-000002").keys() == weights(whole / "step-000004").keys()
    moved = [not torch.equal(p, weights(whole / "step-000002")[n]) for n, p in weights(whole / "step-000004").items()]
    assert sum(moved) > len(moved) / 2


def test_a_base_that_is_trained_is_saved_whole_and_needs_its_folder_no_more(folder: Path) -> None:
    assert train(folder, "--out", "all", "--train-base", "--steps", "2") == 0
    with pytest.raises(ValueError, match=r"base: .* holds one, which was trained with its memory; leave it out"):
        load_model(folder / "all", folder / "base")
    plain = LlamaForCausalLM.from_pretrained(folder / "base")
    shutil.rmtree(folder / "base")
    model = load_model(folder / "all")
    assert not torch.equal(model.base.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    assert cli.main(["generate", "--checkpoint", "all", "--prompt", "To ", "--max-new-tokens", "2"]) == 0


def test_evaluate_equals_a_plain_loop(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [Document("a", TEXT.encode() * 2), Document("b", b"a long text")]
    model, tokenizer = load_model(folder / "run"), load_tokenizer(folder / "run")
    found = evaluate(model, texts, tokenizer)
    total = count = 0.0
    for ids in encode_documents(texts, tokenizer):
        tokens = torch.tensor([[*map(int, ids[0 : len(ids)])]])
        assert tokens[0, -1] == tokenizer.end == 0
        memory = None
        for segment in tokens.split(8, 1):
            after = model(segment, memory, labels=segment)
            counted = segment.numel() - (memory is None)
            total, count, memory = total + float(after.loss.detach()) * counted, count + counted, after.memory
    assert found.tokens == count
    assert found.loss_nats == pytest.approx(total / count, abs=1e-5)
    (folder / "other.txt").write_text(TEXT * 2)
    capsys.readouterr()
    assert cli.main(["evaluate", "--checkpoint", "run", "--data", "other.txt", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["memory_on"]
    assert said["loss_nats"] == pytest.approx(evaluate(model, texts[:1], tokenizer).loss_nats)
    assert said["bits_per_byte"] is not None


def test_it_writes_text_also_from_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt in ("To read", ""):
        said = []
        for _ in range(2):
            assert cli.main(["generate", "--checkpoint", "run", "--prompt", prompt, "--max-new-tokens", "20"]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]
        assert said[0].startswith(prompt)
        assert len(said[0]) > len(prompt) + 1
    state = ["generate", "--checkpoint", "run", "--state", "state", "--max-new-tokens", "9", "--prompt"]
    assert cli.main([*state, "To read"]) == 0
    assert cli.main([*state, ""]) == 0


def test_the_first_token_follows_the_end_of_a_text(folder: Path) -> None:
    """In a batch, lanes that have read something are as they are without those that have not."""
    model, tokenizer = load_model(folder / "run"), load_tokenizer(folder / "run")
    base_first = model(torch.tensor([[tokenizer.start]])).logits[0, -1]
    lanes = [torch.tensor([], dtype=torch.long), torch.tensor([5, 6, 7])]
    state = model.new_state(2, tokenizer.start)
    state.extend(lanes)
    logits = model.next_logits(state, model.open(state))
    torch.testing.assert_close(logits[0], base_first)
    torch.testing.assert_close(logits[1], model(lanes[1][None]).logits[0, -1])


def test_the_other_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--checkpoint", "run"]) == 0
    assert "2 slots, read over" in capsys.readouterr().out
    assert cli.main(["average", "--checkpoint", "run", "--out", "mean"]) == 0
    assert cli.main(["evaluate", "--checkpoint", "mean"]) == 0
    steps = [weights(folder / "run" / step)["write_norm.weight"] for step in ("step-000002", "step-000004")]
    torch.testing.assert_close(load_model(folder / "mean").write_norm.weight.detach(), sum(steps) / 2)
    capsys.readouterr()
    assert cli.main(["export", "--checkpoint", "run", "--out", "exported"]) == 2
    assert "not exported yet" in error(capsys)
    assert train(folder, "--out", "new", "--init-from", "run") == 2
    assert "init_from: the model in" in error(capsys)


def test_what_a_run_has_trained_goes_to_transformers_whole(folder: Path) -> None:
    model = load_model(folder / "run")
    model.save_pretrained(folder / "whole")
    shutil.rmtree(folder / "base")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "whole")
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    torch.testing.assert_close(load_model(folder / "whole")(tokens).logits, model(tokens).logits)


def test_a_base_is_looked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fingerprint reads all weights: of a large base that takes a while."""
    looked: list[object] = []
    of_base = reference.looks_of
    for where in (reference, model):
        monkeypatch.setattr(where, "looks_of", lambda base: looked.append(base) or of_base(base))
    AroundBase.from_pretrained(folder / "run")
    assert len(looked) == 1


def test_another_base_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_base(folder / "other", seed=1)
    again = ["train", "--resume", "--out", "run", "--steps", "6", "--base"]
    assert cli.main([*again, "other"]) == 2
    assert "the memory was trained around" in error(capsys)
    assert "with other weights than those of 'other'; give that base" in error_of(again, "other", capsys)
    shutil.move(folder / "base", folder / "moved")
    assert cli.main([*again, "moved"]) == 0
    assert json.loads((folder / "run" / "step-000006" / "config.json").read_text())["reference"]["name"].endswith(
        "moved"
    )
    shutil.move(folder / "moved", folder / "again")
    model = AroundBase.from_pretrained(folder / "run", base_model=folder / "again")
    assert model.config.reference["name"] == str(folder / "again")
    of_run = ["--checkpoint", "run"]
    assert cli.main(["evaluate", *of_run]) == 2
    assert "moved is no folder" in (said := error(capsys))
    assert said.endswith("Where the base of a model has moved since, say so with --base, or base_model= in Python")
    for command in (["evaluate"], ["generate", "--max-new-tokens", "2"], ["inspect"]):
        assert cli.main([command[0], *of_run, *command[1:], "--base", "again"]) == 0, command
        assert cli.main([command[0], *of_run, *command[1:], "--base", "other"]) == 2
        assert "with other weights than those of" in error(capsys)


def test_a_base_with_other_settings_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights are the same, and its numbers are not."""
    file = folder / "base" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"use_cache": False, "transformers_version": "5.99"}))
    evaluate, resume = ["evaluate", "--checkpoint", "run"], ["train", "--resume", "--out", "run", "--steps", "6"]
    assert cli.main([*evaluate, "--base", "base"]) == 0
    name, value = next((n, x) for n, x in settings.items() if n.endswith("eps") or n.endswith("epsilon"))
    file.write_text(json.dumps(settings | {name: 0.5}))
    for command in (evaluate, resume):
        assert cli.main([*command, "--base", "base"]) == 2
        assert f"around a base with {name} {value}, and " in (said := error(capsys))
        assert "has 0.5, with the same weights; put its config.json back" in said


def error_of(command: list[str], last: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main([*command, last]) == 2
    return error(capsys)


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--base", "nowhere"], "base: nowhere is no folder; expected one with"),
        (["--base", "empty"], "base: no config.json in empty; save_pretrained of transformers writes one"),
        (["--base", "of-gguf"], "base: no config.json in of-gguf; for the GGUF there add --gguf a.gguf"),
        (["--base", "of-gguf", "--gguf", "b.gguf"], "gguf: no b.gguf in of-gguf; the GGUF files there: a.gguf"),
        (["--base", "no-config"], "no-config holds no such thing as the settings of a causal language model"),
        (["--base", "no-model"], "no-model holds no such thing as a causal language model that transformers knows"),
        (["--base", "no-tokenizer"], "no-tokenizer: no tokenizer.json, so no tokenizer was saved with this base"),
        (["--base", "no-end"], "no-end: neither the tokenizer nor the base names the token that ends a text"),
        (["--base", "small"], "tokenizer: expected ids below the 100 of the model, got one with 270 ids"),
        (["--segment-length", "65"], "segment_length: expected at most the base's 64 positions, got 65"),
        (["--dim", "32"], "dim: 32 has no meaning with a base"),
        (["--architecture", "causal"], "architecture: causal has no meaning with a base"),
        (["--dropout", "0.1"], "dropout: 0.1 has no meaning with a base"),
        (["--recall", "0.5"], "recall: 0.5 has no meaning with a base"),
        (["--vocabulary", "500"], "vocabulary: 500 has no meaning with a base"),
        (["--tokenizer", "bpe"], "tokenizer: bpe makes other tokens than the base's"),
        (["--tokenizer", "nothing.json"], "nothing.json: no such file; expected a tokenizer.json"),
        (["--parallel", "fsdp"], "parallel: a memory around a pretrained model is not divided by FSDP yet"),
        (["--compile"], "compile: a memory around a pretrained model is not compiled yet"),
        (["--lora", "2", "--train-base"], "lora: 2 has no meaning where train_base trains all weights"),
        (["--write-heads", "3"], "write_heads: must divide the base's width, got 3 heads for 16"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    for name in ("empty", "of-gguf", "no-config"):
        (folder / name).mkdir()
    (folder / "of-gguf" / "a.gguf").write_bytes(b"GGUF")
    (folder / "no-config" / "config.json").write_text('{"model_type": "unheard-of"}')
    for name in ("no-model", "no-tokenizer"):
        shutil.copytree("base", name)
    (folder / "no-model" / "model.safetensors").unlink()
    for file in (folder / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    if flags[1:] in (["no-end"], ["small"]):
        save_base(folder / flags[1], **({"eos_token_id": None} if flags[1] == "no-end" else {"vocab_size": 100}))
    capsys.readouterr()
    assert train(folder, "--out", "new", *flags) == 2
    printed = capsys.readouterr()
    assert said in printed.err, printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert "Traceback" not in printed.err
    assert not (folder / "new" / "run.yaml").exists()


def test_the_tokenizer_of_a_base_that_has_none_can_be_named(folder: Path) -> None:
    (folder / "base" / "tokenizer.json").rename(folder / "mine.json")
    (folder / "base" / "tokenizer_config.json").unlink()
    assert train(folder, "--out", "new", "--tokenizer", "mine.json", "--steps", "1") == 0
    assert load_tokenizer(folder / "new").encode(TEXT).tolist() == load_tokenizer(folder / "run").encode(TEXT).tolist()
    assert load_tokenizer(folder / "new").vocabulary == 273


@pytest.mark.parametrize("name", ["gguf", "lora", "read_dim", "train_base"])
def test_what_is_of_a_base_is_refused_without_one(name: str) -> None:
    value = {"gguf": "a.gguf", "train_base": True}.get(name, 4)
    with pytest.raises(ValueError, match=f"^{name}: {value} is for a pretrained model; name its folder as base$"):
        BaseSettings(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init_from: a run begins with the weights of a base or with those of"):
        TrainingConfig(around=BaseSettings(base=Path("a")), init_from=Path("b"))


@pytest.mark.parametrize(
    ("missing", "flags", "said"),
    [
        ("transformers", [], "memformer.hf needs transformers: pip install 'memformer-replay[hf]'"),
        ("peft", ["--lora", "2"], "lora: needs peft: pip install 'memformer-replay[hf]'"),
        ("gguf", ["--gguf", "a.gguf"], "needs the gguf library: pip install 'memformer-replay[gguf]'"),
    ],
)
def test_what_is_not_installed_is_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    flags: list[str],
    said: str,
) -> None:
    (folder / "base" / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "transformers":
        for name in [name for name in sys.modules if name.startswith("memformer.hf")]:
            monkeypatch.delitem(sys.modules, name)
    assert train(folder, "--out", "new", *flags) == 2
    assert said in error(capsys)


def test_a_gguf_is_the_base_that_it_was_made_of(folder: Path) -> None:
    save_gguf(folder / "base", "a.gguf")
    tokens = torch.arange(20)[None]
    bases = [load_base(folder / "base", file) for file in ("a.gguf", None)]
    torch.testing.assert_close(*(base(tokens).logits for base in bases), rtol=0, atol=1e-5)
    (folder / "base" / "model.safetensors").unlink()
    tokenizer = str(folder / "base" / "tokenizer.json")
    assert train(folder, "--out", "new", "--gguf", "a.gguf", "--tokenizer", tokenizer, "--steps", "1") == 0
    model = load_model(folder / "new")
    assert model.config.reference["gguf_file"] == "a.gguf"
    torch.testing.assert_close(model.base(tokens).logits, bases[0](tokens).logits, rtol=0, atol=0)


def test_a_gguf_of_an_unknown_architecture_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "base" / "a.gguf", "unheard-of")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert train(folder, "--out", "new", "--gguf", "a.gguf") == 2
    assert "a.gguf holds no such thing as the settings of a causal language model" in error(capsys)
    assert "unheard-of" in error_of(
        ["train", "--base", "base", "--gguf", "a.gguf", "--out", "new", "--data"], "text.txt", capsys
    )


def test_without_a_base_transformers_is_not_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("memformer.hf")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("transformers", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    assemble(TrainingConfig(data=(folder / "text.txt",), out=folder / "own", device="cpu"))


def test_ids_that_the_bases_tokenizer_made_are_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode = ["encode", "--data", "text.txt", "--out"]
    assert cli.main([*encode, "ids", "--tokenizer", "base/tokenizer.json"]) == 0
    assert train(folder, "--data", "ids", "--out", "new", "--steps", "1") == 0
    capsys.readouterr()
    assert cli.main([*encode, "bpe", "--vocabulary", "256"]) == 0
    assert train(folder, "--data", "bpe", "--out", "other", "--steps", "1") == 2
    assert "tokenizer" in error(capsys)
