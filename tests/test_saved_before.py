"""What commit b7a2976 saved still loads bit for bit, and goes on as it went on there; ``saved_before/make.py`` made it.

What is computed from it is compared within rounding, for it was computed on another machine.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from memformer import Memformer, MemoryState, cli
from memformer.training import assemble, resume, saved_settings

SAVED = Path(__file__).parent / "saved_before"
CORPUS = SAVED / "corpus"
BEFORE, AFTER = "step-000003", "step-000006"


@pytest.fixture(params=["plain", "everything"])
def run_of_before(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a run's checkpoint in its middle, and the checkpoint that it ended with, at that commit."""
    if request.param == "everything":
        pytest.importorskip("tokenizers")
    shutil.copytree(SAVED / request.param / BEFORE, tmp_path / "run" / BEFORE)
    return tmp_path / "run", SAVED / request.param / AFTER


def tensors(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    return {file.name: load_file(file) for file in checkpoint.glob("*.safetensors")}


def numbers(checkpoint: Path) -> dict[str, Any]:
    """What JSON holds of a checkpoint: step, documents, places in them, ...; not where it was made, and with what."""
    found = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))
    newer = ("tokens", "seconds", "held_out")  # how far the run has come in other units, and what it held out
    return {name: value for name, value in found.items() if name not in ("settings", "torch", *newer)}


def test_a_run_of_before_is_loaded_bit_for_bit(run_of_before: tuple[Path, Path]) -> None:
    """Saved again, it is what it was: weights, averages, moments, memory and the places in the documents."""
    out, _ = run_of_before
    before = tensors(out / BEFORE), numbers(out / BEFORE)
    settings = dataclasses.replace(saved_settings(out), out=out, data=(CORPUS,), resume=True)
    resume.save(assemble(settings), settings)
    assert_close(tensors(out / BEFORE), before[0], rtol=0, atol=0)
    assert numbers(out / BEFORE) == before[1]


def test_a_run_of_before_goes_on_as_it_went_on_then(run_of_before: tuple[Path, Path]) -> None:
    out, ended = run_of_before
    assert cli.main(["train", "--resume", "--out", str(out), "--data", str(CORPUS)]) == 0
    said, expected_said = numbers(out / AFTER), numbers(ended)
    here, there = said.pop("best"), expected_said.pop("best")
    assert said == expected_said
    assert (here["step"], here["loss_nats"]) == (there["step"], pytest.approx(there["loss_nats"], rel=1e-5))
    found, expected = (
        tensors(folder)["training.safetensors"]
        | {f"model/{name}": p.detach() for name, p in Memformer.from_pretrained(folder).named_parameters()}
        for folder in (out / AFTER, ended)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        kind, _, parameter = name.partition("/")
        atol, real = 1e-4 * float(tensor.abs().max()), torch.ones_like(tensor, dtype=torch.bool)
        if kind in ("model", "weights"):
            # Adam divides by the gradients' size: where they are zero but for rounding, its steps go anywhere.
            atol, real = 1e-5, expected[f"optimizer/{parameter}/exp_avg_sq"] > 1e-12
        assert_close(found[name][real], tensor[real], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["normalised", "gated", "encoder"])
def test_a_model_of_before(name: str) -> None:
    model = Memformer.from_pretrained(SAVED / name).eval()
    saved = load_file(SAVED / name / "model.safetensors")
    assert_close({name: model.state_dict()[name] for name in saved}, saved, rtol=0, atol=0)
    there = load_file(SAVED / name / "expected.safetensors")
    assert_close(model(there["src"])[1], there["mems"], rtol=1e-4, atol=1e-5)
    targets = () if model.config.encoder_only else (there["tgt"],)
    enc_out, mems, *loss = model(there["src"], *targets, mems=there["mems"], src_mask=there["src_mask"])
    kept = there["src_mask"]
    assert_close(enc_out[kept], there["enc_out"][kept], rtol=1e-4, atol=1e-5)
    assert_close(mems, there["after"], rtol=1e-4, atol=1e-5)
    if targets:
        assert_close(loss, [there["loss"]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["normalised", "gated"])
def test_a_state_of_before_goes_on(name: str) -> None:
    model = Memformer.from_pretrained(SAVED / name).eval()
    state = MemoryState.load(SAVED / name / "read.state", model)
    saved = load_file(SAVED / name / "read.state")
    assert_close({field: getattr(state, field) for field in saved}, saved, rtol=0, atol=0)
    tokens, _ = model.generate(None, 20, state=state, temperature=0)
    assert torch.equal(torch.stack(tokens), load_file(SAVED / name / "expected.safetensors")["greedy"])
