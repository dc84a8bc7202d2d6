"""The exported steps give what PyTorch gives, with memory and cache carried from file to file."""

import json
import runpy
import subprocess
import sys
from itertools import product
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch.testing import assert_close

import naive
from helpers import POSITIONS, WRITERS
from memformer import CausalMemformer, Memformer
from memformer.cli import main
from memformer.data import ByteTokenizer
from memformer.export import export

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_generate.py"
BYTES = ByteTokenizer()
LENGTH = 5


def small(**changes):
    settings = {
        "dim": 16, "num_memory_slots": 3, "mem_update_attn_heads": 2,
        "enc_num_tokens": BYTES.vocabulary, "enc_depth": 1, "enc_heads": 2, "enc_max_seq_len": LENGTH,
    }  # fmt: skip
    if not changes.get("encoder_only"):
        settings |= {"dec_num_tokens": BYTES.vocabulary, "dec_depth": 1, "dec_heads": 2, "dec_max_seq_len": LENGTH + 1}
        settings["dec_overlap"] = min(2, changes.get("enc_max_seq_len", LENGTH))
    return perturbed(Memformer(**(settings | changes)))


def small_causal(**changes):
    settings = {
        "dim": 16, "num_memory_slots": 3, "mem_update_attn_heads": 2, "num_tokens": BYTES.vocabulary, "depth": 2,
        "heads": 2, "max_seq_len": LENGTH, "overlap": 2, "tie_embeddings": False,
    }  # fmt: skip
    return perturbed(CausalMemformer(**(settings | changes)))


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():  # else position tables and biases are too small to be missed
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def load(folder):
    """The exported steps as functions of the tensors that export.json names, to a dict of tensors."""
    about = json.loads((folder / "export.json").read_text())

    def step(file, inputs, outputs):
        if about["format"] == "torch":
            module = torch.export.load(folder / file).module()
            return lambda **given: dict(zip(outputs, module(*(given[name] for name in inputs)), strict=True))
        session = onnxruntime.InferenceSession(folder / file)
        return lambda **given: {
            name: torch.from_numpy(x)
            for name, x in zip(outputs, session.run(None, {k: x.numpy() for k, x in given.items()}), strict=True)
        }

    return {name: step(**of_step) for name, of_step in about["steps"].items()}


def random_segments(config, batch_size, generator):
    """Tokens, masks and resets of twenty segments of random lengths; the first begin a document."""
    for i in range(20):
        length = int(torch.randint(1, config.segment_length + 1, (), generator=generator))
        tokens = torch.randint(config.vocabulary, (batch_size, length), generator=generator)
        mask = torch.rand(batch_size, length, generator=generator) < 0.8
        reset = torch.rand(batch_size, generator=generator) < 0.1 if i else torch.ones(batch_size, dtype=torch.bool)
        if i % 7 == 3:
            mask[0] = False
        yield tokens, mask, reset


@torch.no_grad()
def assert_same_over_segments(model, steps, batch_size):
    """Random lengths, masks and resets; each side carries its own memory and cache."""
    generator = torch.Generator().manual_seed(1)
    memory, expected_memory = torch.zeros(batch_size, 3, 16), model.get_initial_mem(batch_size)
    lanes = torch.arange(batch_size)
    for tokens, mask, reset in random_segments(model.config, batch_size, generator):
        out = steps["encode"](tokens=tokens, mask=mask, memory=memory, reset=reset)
        memory = out["memory_after"]
        encoded, expected_memory = model.encode(tokens, expected_memory, mask, reset)
        assert_close(memory, expected_memory, rtol=0, atol=1e-4)
        assert_close(out["encoded"], encoded, rtol=0, atol=1e-4)
        if model.decoder is None:
            continue
        written = torch.randint(model.config.dec_num_tokens, (batch_size, LENGTH), generator=generator)
        expected = model.decode(written, encoded, mask, None, tokens)  # at once, without a cache
        overlap = model.config.dec_overlap
        cache = torch.full((1, 2, batch_size, 2, LENGTH + 1 + overlap, 8), 9.0)  # what lies ahead does not matter
        rows = zip(written, tokens, mask, strict=True)
        written = torch.stack([torch.cat([naive.overlapped(model, x[m], w[:1]), w[1:]]) for w, x, m in rows])
        for turn in range(LENGTH + overlap):
            position = (turn - lanes).clamp(min=0)  # each lane is one token behind the one before
            given = {"token": written[lanes, position], "position": position, "cache": cache}
            out |= steps["decode"](**given, context=out["context"], mask=mask)
            cache = out["cache_after"]
            told = position >= overlap
            assert_close(out["logits"][told], expected[lanes, position - overlap][told], rtol=0, atol=1e-4)


@torch.no_grad()
def assert_same_causal(model, steps, batch_size):
    """The same for a causal model: its memory, then the next tokens with and without a cache."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    expected, lanes = model.get_initial_mem(batch_size), torch.arange(batch_size)
    memory = torch.zeros_like(model.packed(expected))
    for tokens, mask, reset in random_segments(config, batch_size, generator):
        out = steps["encode"](tokens=tokens, mask=mask, reset=reset, memory=memory)
        memory = out["memory_after"]
        hidden, expected = model.step(tokens, expected, mask, reset)
        assert_close(out["logits"], model.head(hidden), rtol=0, atol=1e-4)
        assert_close(memory, model.packed(expected), rtol=0, atol=1e-4)
        pending = torch.randint(config.num_tokens, (batch_size, config.max_seq_len), generator=generator)
        found = model.head(model.step(pending, expected)[0])
        cache = out["cache"].clone()
        cache[..., config.overlap :, :] = 9.0  # what lies ahead does not matter
        for turn in range(config.max_seq_len):
            position = (turn - lanes).clamp(min=0)  # each lane is one token behind the one before
            given = {"token": pending[lanes, position], "position": position, "cache": cache}
            out |= steps["decode"](**given, context=out["context"])
            cache = out["cache_after"]
            assert_close(out["logits"], found[lanes, position + 1], rtol=0, atol=1e-4)


KINDS = {"memformer": (small, assert_same_over_segments), "causal": (small_causal, assert_same_causal)}


@pytest.fixture(scope="module", params=["memformer", pytest.param("causal", marks=pytest.mark.thorough)])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def exported(kind, tmp_path_factory):
    """A model of bytes, and the folder to which the command exported it for onnxruntime."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model = KINDS[kind][0]()
    model.save_pretrained(folder / "model")
    BYTES.save(folder / "model")
    assert main(["export", "--checkpoint", str(folder / "model"), "--out", str(folder / "onnx")]) == 0
    return model, folder / "onnx"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_onnx_over_twenty_segments(kind, exported, batch_size):
    model, folder = exported
    KINDS[kind][1](model, load(folder), batch_size)


def test_export_json_says_what_the_files_take(exported):
    model, folder = exported
    about = json.loads((folder / "export.json").read_text())
    assert about["segment_length"] == LENGTH
    assert about["special_tokens"] == {"start": 256, "infill": 257, "recall": 258, "mask": 259}
    assert about["kind"] == type(model).__name__
    assert type(model)(**about["model"]).config == model.config
    assert json.loads((folder / "tokenizer_config.json").read_text())["kind"] == "bytes"
    for step in about["steps"].values():
        session = onnxruntime.InferenceSession(folder / step["file"])
        for kind, ends in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            names = {"int64": "tensor(int64)", "float32": "tensor(float)", "bool": "tensor(bool)"}
            described = {name: (x["shape"], names[x["dtype"]]) for name, x in step[kind].items()}
            assert described == {end.name: (end.shape, end.type) for end in ends}
            assert list(described) == [end.name for end in ends]


@pytest.mark.parametrize("length", [0, 1, LENGTH - 1, LENGTH, 2 * LENGTH + 3])
def test_the_example_writes_what_the_model_writes(exported, length):
    model, folder = exported
    prompt = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(length))
    expected = model.generate(prompt, 4 * LENGTH, start=BYTES.start, temperature=0, never=BYTES.special).tokens[0]
    assert len(expected.unique()) > 1
    example = runpy.run_path(str(EXAMPLE))
    written = example["generate"](example["load"](folder), prompt[0].tolist(), 4 * LENGTH)
    assert list(written) == expected.tolist()


def test_the_example_runs_without_torch(exported):
    code = (
        f"import sys; sys.modules['torch'] = None; import runpy; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(exported[1]), "--prompt", "So: ", "--max-new-tokens", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("So: ")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, when it loads
def test_torch_export(tmp_path):
    model = small(memory_writer="gated", positions="relative")
    contents = export(model, tmp_path, format="torch")
    assert contents == json.loads((tmp_path / "export.json").read_text())
    assert_same_over_segments(model, load(tmp_path), batch_size=3)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, when it loads
def test_torch_export_of_one_memory_for_all_layers(tmp_path):
    model = small_causal(memory="one", memory_writer="gated", positions="relative")
    export(model, tmp_path, format="torch")
    assert_same_causal(model, load(tmp_path), batch_size=3)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, when it loads
def test_a_causal_model_without_an_overlap(tmp_path):
    model = small_causal(overlap=0, memory_writer="placed")
    export(model, tmp_path, format="torch")
    assert_same_causal(model, load(tmp_path), batch_size=3)


def test_encoder_only(tmp_path, capsys):
    model = small(encoder_only=True, dropout=0.5)
    model.save_pretrained(tmp_path / "model")
    arguments = ["export", "--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path), "--format", "torch"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "encode.pt2" in printed.out
    assert printed.err == ""
    steps = load(tmp_path)
    assert list(steps) == ["encode"]
    assert_same_over_segments(model, steps, batch_size=2)


@pytest.mark.parametrize("there", ["run.yaml", "training.json", "step-000004/config.json"])
def test_a_training_run_is_no_place_for_an_export(tmp_path, capsys, there):
    small().save_pretrained(tmp_path / "model")
    (tmp_path / "run" / there).parent.mkdir(parents=True)
    (tmp_path / "run" / there).touch()
    assert main(["export", "--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "run")]) == 2
    assert f"out: {tmp_path / 'run'} is of a training run; choose another folder" in capsys.readouterr().err


def test_refusals(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"format: expected one of onnx, torch, got 'tflite'"):
        export(small(), tmp_path, format="tflite")
    with pytest.raises(ValueError, match=r"expected it in eval\(\) mode, got training mode"):
        export(small().train(), tmp_path)
    with pytest.raises(ValueError, match=r"expected torch.float32 for ONNX, got torch.bfloat16. Call float\(\)"):
        export(small().bfloat16(), tmp_path)
    with pytest.raises(
        ValueError, match=r"overlap: onnxruntime loads no causal model without one .*; export for torch"
    ):
        export(small_causal(overlap=0), tmp_path)
    assert list(tmp_path.iterdir()) == []
    small().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", "--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'memformer-replay[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize(("writer", "positions"), list(product(WRITERS, POSITIONS)))
def test_every_kind_of_model(tmp_path, format, writer, positions):
    model = small(memory_writer=writer, positions=positions, num_mem_updates=2, enc_depth=2, tie_embeddings=True)
    export(model, tmp_path, format=format)
    for batch_size in (1, 2, 5):
        assert_same_over_segments(model, load(tmp_path), batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize("memory", ["layers", "one"])
@pytest.mark.parametrize(("writer", "positions"), list(product(WRITERS, POSITIONS)))
def test_every_kind_of_causal_model(tmp_path, format, memory, writer, positions):
    model = small_causal(
        memory=memory, memory_writer=writer, positions=positions, num_mem_updates=2, tie_embeddings=True, overlap=5
    )
    export(model, tmp_path, format=format)
    for batch_size in (1, 2, 5):
        assert_same_causal(model, load(tmp_path), batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_causal_segments(tmp_path, format, length, overlap):
    if overlap > length or (format == "onnx" and not overlap):
        pytest.skip("no such model, or none that onnxruntime loads")
    model = small_causal(max_seq_len=length, overlap=overlap)
    export(model, tmp_path, format=format)
    assert_same_causal(model, load(tmp_path), batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_segments(tmp_path, format, length):
    model = small(enc_max_seq_len=length)
    export(model, tmp_path, format=format)
    assert_same_over_segments(model, load(tmp_path), batch_size=2)


@pytest.mark.slow
def test_encoder_only_in_onnx(tmp_path):
    model = small(encoder_only=True, memory_writer="gated")
    export(model, tmp_path)
    assert_same_over_segments(model, load(tmp_path), batch_size=2)
