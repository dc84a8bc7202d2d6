"""Devices that the machine which tests does not have, and one that is the default where nobody asked for it."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import memformer
from helpers import tiny_run
from memformer import Memformer, MemoryState
from memformer.device import summing_device
from memformer.evaluation import ByDepth, evaluate
from memformer.training import Run


@pytest.fixture
def settings(tmp_path):
    return tiny_run(
        tmp_path, steps=3, log_every=1, eval_every=2, accumulate=2, ema=0.9, continuation=0.5, infilling=0.3, recall=0.2
    )


def numbers(lines):
    for line in lines:
        yield {k: v for k, v in dataclasses.asdict(line).items() if isinstance(v, float) and "second" not in k}


def write(model, device):
    """What a model writes: greedily, drawn, by beams, and after a state that was saved in between."""
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]], device=device)
    greedy = model.generate(prompt, 9, start=256, temperature=0)
    drawn = model.generate(prompt, 9, start=256, temperature=1, top_k=5, top_p=0.9, repetition_penalty=1.2)
    beams = model.generate(prompt, 9, start=256, beams=3, stop=[65])
    on = model.generate(prompt[:, :1], 4, state=greedy.state, temperature=0)
    return [x.cpu().tolist() for result in (greedy, beams, on) for x in result.tokens], len(drawn.tokens)


def everything(settings, where):
    """Train, go on training, evaluate with and without memory, write."""
    run = Run(dataclasses.replace(settings, steps=2))
    lines = list(run.train())
    run = Run(dataclasses.replace(settings, resume=True))
    lines += list(run.train())
    model = run.model.eval()
    for memory in (True, False):
        lines.append(evaluate(model, run.held_out, run.tokenizer, memory=memory))
    return list(numbers(lines)), write(model, where)


def test_sums_are_kept_where_there_are_doubles():
    assert summing_device(torch.device("mps")) == torch.device("cpu")
    assert summing_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert ByDepth(torch.device("mps")).sums.device == torch.device("cpu")
    assert ByDepth().sums.device == torch.device("cpu")


def test_random_numbers_of_other_cards_are_left_alone(settings, tmp_path, monkeypatch):
    """torch would begin to use each of them, with a warning, where a machine has more than one."""
    alone = Run(settings(out=tmp_path / "one", dropout=0.1))
    list(alone.train())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    before = torch.get_rng_state()
    run = Run(settings(dropout=0.1))
    list(run.train())
    assert torch.get_rng_state().equal(before)
    assert_close(dict(run.model.state_dict()), dict(alone.model.state_dict()), rtol=0, atol=0)


def test_no_double_is_made_on_apples_gpu():
    """torch cannot pretend such a device, so this reads the source: where a double is made, it says it is elsewhere.

    To be read again when a line is added: is its device the CPU, or :func:`summing_device`'s?
    """
    known = {
        "evaluation.py": 3,  # ByDepth, whose depths are on the CPU
        "generation.py": 3,  # the beams' scores
        "hf/reference.py": 1,  # of samples on the CPU
        "nn/losses.py": 1,  # compared with; none is made
        "nn/positions.py": 2,  # tables, on the CPU
        "training/averaging.py": 1,  # on the CPU
        "training/run.py": 2,  # what the processes sum up
        "replay/fingerprint.py": 1,  # of samples on the CPU
    }
    package = Path(memformer.__file__).parent
    found = {}
    for file in package.rglob("*.py"):
        code = [line.split("#")[0] for line in file.read_text(encoding="utf-8").splitlines()]
        count = sum(bool(re.search(r"torch\.float64|\.double\(\)", line)) for line in code if "``" not in line)
        if count and file.parent.name != "bench":
            found[file.relative_to(package).as_posix()] = count
    assert found == known


def test_a_default_device_changes_nothing(settings, tmp_path):
    """Whoever makes a tensor says where: what is forgotten would be on "meta", and have no numbers."""
    expected = everything(settings(out=tmp_path / "cpu"), "cpu")
    torch.set_default_device("meta")
    try:
        found = everything(settings(), "cpu")
        with torch.device("cpu"):
            model = Memformer.from_pretrained(tmp_path / "run" / "step-000003")
        state = model.read(torch.tensor([[72, 105], [72, 106]], device="cpu"), start=256)
        state.save(tmp_path / "state", model)
        again = MemoryState.load(tmp_path / "state", model)
        parts = MemoryState.cat([again.select([1]), again.split()[0]]).pad_to(3)
        assert parts.position.tolist() == [2, 2, 0]
    finally:
        torch.set_default_device(None)
    assert found == expected
    assert_close(again.memory, state.memory, rtol=0, atol=0)


@pytest.mark.slow
def test_what_compiling_lacks_is_named(tmp_path):
    """In a process of its own: what was compiled once is kept."""
    code = "import torch; from memformer.device import check_compiler; check_compiler(torch.device('cpu'))"
    nothing = {"PATH": "", "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    nothing |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=nothing)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: compile: torch.compile does not work here: InvalidCxxCompiler: "), last
    assert last.endswith("install what is missing, or leave --compile out")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, as it compiles
def test_a_model_that_cannot_be_compiled_is_refused_with_a_sentence(settings):
    def backend(graph, inputs):
        raise OSError("no such instruction")

    run = Run(settings())
    run.model.encoder.compile(backend=backend)
    with pytest.raises(ValueError, match=r"^compile: OSError: no such instruction. Leave --compile out"):
        list(run.train())


def test_without_a_compiler_nothing_is_trained(settings, monkeypatch, tmp_path):
    def missing(function):
        raise OSError("No working compiler.\nAnd more")

    monkeypatch.setattr(torch, "compile", missing)
    says = r"^compile: torch.compile does not work here: OSError: No working compiler. It needs a C\+\+ compiler"
    with pytest.raises(ValueError, match=says):
        Run(settings(compile=True))
    assert not (tmp_path / "run").exists()
