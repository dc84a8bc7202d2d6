"""The repository's benchmarks, each as a user calls it, in a size that takes a second.

With other packages where the environment says in which folders they are: MEMFORMER_RIVALS and MEMFORMER_EARLIER.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import card, export, generate, overhead
from benchmarks.__main__ import main

from memformer import Memformer
from memformer.bench import learn
from memformer.bench.contestants import OWN
from memformer.tasks import AssociativeRetrieval

ROOT = Path(__file__).parents[1]
SIZES = ["--dim", "16", "--heads", "2", "--slots", "2"]
MODEL = [*SIZES, "--enc-depth", "1", "--dec-depth", "1"]


def report(capsys: pytest.CaptureFixture[str], *command: str) -> list[str]:
    assert main(command) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def folder(variable: str) -> str:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    return os.environ[variable]


def rows(lines: list[str], first: str) -> list[str]:
    """The names in the table whose head begins with ``first``."""
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    return [line.split("  ")[0] for line in lines[start + 1 :] if line.strip()]


GENERATE = [
    *("generate", "--contexts", "16", "32", "--read", "16", "--segment-tokens", "4"),
    *(*MODEL, "--rival-depth", "1", "--windows", "2"),
]


def test_generation(capsys: pytest.CaptureFixture[str]) -> None:
    lines = report(capsys, *GENERATE)
    assert "cached generation equals uncached: 8 tokens over two segments" in lines[1]
    tables = [i for i, line in enumerate(lines) if line.startswith("after ")]
    assert len(tables) == 2
    for place in tables:
        ours, plain = lines[place + 2 : place + 4]
        assert ours.startswith("this ")
        assert float(ours.split()[4]) == 2, "half of a segment's positions in the encoder, all of them in the decoder"
        assert plain.startswith("plain ")
        assert " x as fast, " in plain


def test_what_generation_keeps_is_counted() -> None:
    """State: memory, last segment, pending segment and position. At work also the cache, contexts, mask and memory."""
    settings = generate.Generate(segment_tokens=4, windows=1, contexts=(1024,))
    this = generate.This(settings)
    measured = this.measure(torch.randint(256, (1, 9)), 1)
    size = settings.model
    assert measured.carried == 4 * size.slots * size.dim + 8 * (2 * 4 + 1)
    keys_and_values = 2 * 4 * size.dec_depth * size.dim * 4  # of a segment of 4 tokens in 4 bytes each
    cache, contexts, mask, memory = keys_and_values, keys_and_values, 4, 4 * size.slots * size.dim
    assert measured.working - measured.carried == cache + contexts + mask + memory


def test_a_cache_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Memformer.decode
    monkeypatch.setattr(Memformer, "decode", lambda *given: -decode(*given))
    with pytest.raises(RuntimeError, match="this model's cache gives another text"):
        main(GENERATE)


def test_generation_beside_rivals(capsys: pytest.CaptureFixture[str]) -> None:
    lines = report(capsys, *GENERATE, "--rivals", folder("MEMFORMER_RIVALS"))
    names = ["this", "Transformer-XL", "x-transformers", "RMT", "RMT + XL", "plain"]
    assert [name for name in rows(lines, "after 16") if name in names] == 2 * names


def test_positions(capsys: pytest.CaptureFixture[str]) -> None:
    command = "positions --runs 1 --segments 2 --segment-tokens 4 --target-tokens 4"
    assert rows(report(capsys, *command.split(), *MODEL), "       ") == ["rotary", "relative", "bucketed"]


def test_the_earlier_library(capsys: pytest.CaptureFixture[str]) -> None:
    command = "earlier --runs 1 --segments 2 --segment-tokens 8 --target-tokens 4 --earlier"
    lines = report(capsys, *command.split(), folder("MEMFORMER_EARLIER"), *MODEL)
    assert "replay equals full BPTT in float64" in lines[1]
    assert rows(lines, " " * 12 + "seconds")[:2] == ["this", "earlier"]


def test_the_earlier_library_is_named_with_the_command_that_gets_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["earlier", "--earlier", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("benchmarks: error: earlier: expected a folder made by `pip install")


def test_the_lanes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} says häuser. " * 60)
    command = ["loader", "--data", str(tmp_path), "--runs", "1", "--steps", "3", "--training-steps", "1"]
    lines = report(capsys, *command)
    assert "each epoch has every token once" in lines[1]
    assert len(rows(lines, "tokens per second")) == 7


def test_a_text_in_few_and_many_files(capsys: pytest.CaptureFixture[str]) -> None:
    lines = report(capsys, "lanes", "--size", "3000", "--held-out", "300", "--steps", "2", "--lanes", "3")
    assert rows(lines, "      ") == ["cut into 3 files by hand", "one file, in stretches", "one file, in every lane"]
    assert [line.split()[-3] for line in lines[2:]] == ["3", "3", "1"]


def test_all_layers_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--dim", "16", "--segment-tokens", "4", "--reading", "4", "--horizon", "3", "--runs", "1"]
    lines = report(capsys, "wavefront", "--depths", "2", "3", "--batches", "1", "2", *sizes)
    assert lines[1].startswith("in float64 the gradients differ by ")
    assert [line.split()[:2] for line in lines[5:]] == [["2", "1"], ["2", "2"], ["3", "1"], ["3", "2"]]
    assert all(line.count("->") == line.count(" x") == 2 for line in lines[5:])


@pytest.mark.parametrize("models", [["memformer", "causal"], ["llama"]])
def test_the_peak(capsys: pytest.CaptureFixture[str], models: list[str]) -> None:
    if models == ["llama"]:
        pytest.importorskip("transformers")
    sizes = ["--dim", "16", "--depth", "2", "--segment-tokens", "4", "--slots", "2", "--vocabulary", "20"]
    lines = report(capsys, "peak", "--models", *models, "--segments", "2", "4", *sizes)
    assert lines[3].split() == ["model", "outputs", "2", "4", "last", "/", "first"]
    assert [line.split()[0] for line in lines[4:]] == [w for name in models for w in (name, name, "gradients")]


@pytest.mark.parametrize(
    "model",
    [MODEL, pytest.param(["--architecture", "causal", "--depth", "1", *SIZES], marks=pytest.mark.thorough)],
    ids=["memformer", "causal"],
)
def test_the_exported_steps(capsys: pytest.CaptureFixture[str], model: list[str]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    lines = report(capsys, "export", "--segment-tokens", "4", "--runs", "1", *model)
    assert any(line == "the likeliest 8 tokens are the same" for line in lines)
    assert rows(lines, "milliseconds") == ["encoder step", "decode step", "8 tokens of text"]


def test_exported_steps_need_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="onnxruntime, which is not installed"):
        list(export.run(export.Export()))


@pytest.mark.parametrize("memory", ["on", "off"])
def test_pixels(capsys: pytest.CaptureFixture[str], memory: str) -> None:
    pytest.importorskip("sklearn")
    lines = report(capsys, "pixels", "--minutes", "0.003", "--every", "1", "--memory", memory, *MODEL)
    assert "chance 2.468, solved from 1.974" in lines[1]
    assert lines[2].startswith(f"memory {memory}, step 1: best ")


@pytest.fixture
def small_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "EPISODES", 8)
    monkeypatch.setattr(learn, "LONGER", {})
    monkeypatch.setitem(learn.TASKS, "retrieval", AssociativeRetrieval(segments=2, pairs=2))


LEARN = ["learn", "--steps", "2", "--batch-size", "2", "--jobs", "1", "--seeds", "0", "--learning-rates", "1e-3"]
LEARN += ["--dim", "16", "--heads", "2", "--slots", "4"]


@pytest.mark.usefixtures("small_task")
def test_learning(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "runs.json"
    lines = report(capsys, *LEARN, "--out", str(out))
    assert lines[0].startswith("rivals: --rivals FOLDER, made by `pip install")
    assert rows(lines, "contestant") == list(OWN)
    assert len(json.loads(out.read_text())["runs"]) == len(OWN)
    assert main([*LEARN, "--contestants", "RMT"]) == 2
    assert "rivals: expected a folder made by `pip install" in capsys.readouterr().err


@pytest.mark.usefixtures("small_task")
def test_learning_beside_rivals(capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--rivals", folder("MEMFORMER_RIVALS"), "--earlier", folder("MEMFORMER_EARLIER")]
    names = [*OWN, "earlier", "RMT", "Transformer-XL", "Compressive"]
    assert rows(report(capsys, *LEARN, *folders, "--jobs", "2"), "contestant") == names


@pytest.fixture
def text_command(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from memformer.bench import text
    from memformer.data import Document

    documents = [Document(str(i), (f"{i} häuser, " * 300)[:900].encode()) for i in range(30)]
    monkeypatch.setattr(text, "standard_library", lambda: documents)
    for name in ("order2_bits_per_byte", "xz_bits_per_byte"):  # they count slowly, and have tests of their own
        monkeypatch.setattr(text, name, lambda *_: 1.0)
    options = "--steps 2 --lanes 2 --window 2 --horizon 2 --segment-tokens 8 --dec-overlap 2 --seeds 0 --jobs 1"
    return ["text", *options.split(), *MODEL]


def test_text(capsys: pytest.CaptureFixture[str], text_command: list[str]) -> None:
    """Without rivals it says where they come from; with names it needs none."""
    assert main(text_command) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("rivals: --rivals FOLDER, made by `pip install")
    assert "study: peers are other packages' models" in printed.err
    lines = report(capsys, *text_command, "--contestants", "memformer", "memory off")
    assert rows(lines, "             ")[:2] == ["memformer", "memory off"]


def test_text_beside_rivals(capsys: pytest.CaptureFixture[str], text_command: list[str]) -> None:
    folders = ["--rivals", folder("MEMFORMER_RIVALS"), "--transformer-xl", "1", "8"]
    names = ["RMT", "Transformer-XL x 1", "Transformer-XL x 8", "Compressive"]
    lines = report(capsys, *text_command, *folders)
    start = next(i for i, line in enumerate(lines) if line.startswith("held-out bits"))
    told = [line[:20].strip() for line in lines[start + 2 :]]
    assert told[: len(OWN) + 4] == [*OWN, *names]


def test_the_command_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in ("learn", "text", "generate", "earlier", "overhead", "positions", "loader", "export", "pixels"):
        assert f" • {name} " in done.stdout


def test_the_overhead_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    lines = report(capsys, "overhead", "--segments", "3", "--unused", "5", "--repeats", "1")
    head = [i for i, line in enumerate(lines) if line.startswith("method")]
    assert [line.split("  ")[0] for line in lines[head[0] + 1 : head[0] + 7]] == list(overhead.METHODS)
    assert [line.split("  ")[0] for line in lines[head[1] + 1 :]] == ["plain BPTT", "memory replay"]


def test_the_page_of_a_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without one, and without tyro: all runs in a small size, and what is not shown is said."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    compiled: list[Memformer] = []
    monkeypatch.setattr(Memformer, "compile_parts", lambda self: compiled.append(self))  # which takes most of a minute
    lines = report(capsys, "card", "--device", "cpu", "--tiny", "--launches", "2")
    assert len(compiled) == 1
    assert lines[-3].strip() == "gradients differ by 0.0e+00", "of the compiled model, which is the same here"
    assert lines[1].startswith("skipped: cpu captures nothing")
    assert sum("equal; so are the next random numbers" in line for line in lines) == 8
    assert sum(line.endswith(" ms  equal") for line in lines) == 4, "tokens, greedy and drawn, at two batches"
    assert not [line for line in lines if "WRONG" in line or "FAILED" in line]
    assert lines[-1].startswith("all parts ran, ")
    assert main(["card", "--device", "nowhere"]) == 2
    assert "device: 'nowhere' cannot be used here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["text"])
    assert "only card runs without it" in capsys.readouterr().err


def test_the_page_of_a_card_with_the_earlier_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_PARTS", {"example": card._example})
    lines = list(card.run(card.Card(device="cpu", tiny=True, earlier=Path(folder("MEMFORMER_EARLIER")))))
    heads = [line.split() for line in lines]
    assert ["earlier", "peak", "faster"] in [words[-3:] for words in heads]
    found = [words[:2] for words in heads if words[3:4] == ["ms"]]
    assert found == [[batch, precision] for batch in "18" for precision in ("float32", "bfloat16")]
    assert lines[-1].startswith("all parts ran, ")


def test_the_page_of_a_card_names_the_command_that_gets_the_earlier_library(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is timed, with tyro and without."""
    monkeypatch.setattr(card, "_PARTS", {})
    for find in (importlib.util.find_spec, lambda name: None):
        monkeypatch.setattr(importlib.util, "find_spec", find)
        assert main(["card", "--device", "cpu", "--earlier", str(tmp_path)]) == 2
        assert "earlier: expected a folder made by `pip install" in capsys.readouterr().err


def test_a_captured_step_that_is_another_one_is_a_failure_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(function: Callable[..., Any], *example: Any, **keywords: Any) -> Callable[..., Any]:
        if "paper" in function.__qualname__:
            raise ValueError("captured: no")

        def other(*given: Any) -> Any:
            torch.rand(1)
            return function(*given)

        return other

    monkeypatch.setattr(card, "_PARTS", {"exactness": card._exact})
    monkeypatch.setattr(card.replay, "captured", wrong)
    lines = list(card.run(card.Card(device="cpu", tiny=True)))
    assert sum("THE NEXT RANDOM NUMBERS DIFFER" in line for line in lines) == 7
    assert [line for line in lines if "FAILED: ValueError: captured: no" in line]
    assert [line for line in lines if "FAILED: RuntimeError: captured is not eager: GRU, memory_replay; " in line]


def test_a_part_of_the_page_that_fails_is_said_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(settings: card.Card, device: torch.device) -> Iterator[str]:
        raise RuntimeError("no such kernel")

    def slow(settings: card.Card, device: torch.device) -> Iterator[str]:
        time.sleep(1.1)
        yield "  done"

    monkeypatch.setattr(card, "_PARTS", {"first": fails, "second": slow, "third": slow})
    lines = list(card.run(card.Card(device="cpu", seconds=1)))
    assert [line for line in lines if "FAILED: RuntimeError: no such kernel (test_benchmarks.py:" in line]
    assert "  done" in lines
    assert lines[-2] == "skipped after 1 seconds: third"
    assert lines[-1].startswith("1 FAILED, ")
