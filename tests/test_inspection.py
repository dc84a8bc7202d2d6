"""What is reported of a memory, against loops, and that looking changes nothing."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import VOCABULARY, WRITERS, mask, memory, take_grads, tiny, tokens
from memformer import Memformer
from memformer.cli import main
from memformer.cli.inspect import describe_life
from memformer.data import ByteTokenizer, Document
from memformer.data.segments import Segment
from memformer.inspection import KINDS, Inspection, MemoryHealth, inspect, kinds, memory_health, plot, slot_diversity
from memformer.pictures import new_figure
from memformer.training.history import Moment, _message, life


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("updates", [1, 2])
def test_memory_health_is_that_of_the_models_own_step(writer: str, updates: int) -> None:
    model = tiny(memory_writer=writer, num_mem_updates=updates)
    mems, reset = memory(model, 3), torch.tensor([False, True, False])
    segment = Segment(tokens(3, 6), mask("111111", "100000", "011100"), reset)
    before = torch.where(reset[:, None, None], model.get_initial_mem(3), mems)
    enc_out, after = model.step(segment.src, before, segment.src_mask)
    shares, written = [], before
    for _ in range(updates):
        shares.append(model.writer.attention_on_itself(written, enc_out, segment.src_mask))
        written = model.writer(written, enc_out, segment.src_mask)
    by_slot = torch.stack(shares).mean((0, 1))
    health = memory_health(model, segment, mems)
    expected = [by_slot.mean(), by_slot.min(), by_slot.max(), slot_diversity(after).mean()]
    torch.testing.assert_close(
        [health.self_attention, health.self_attention_min, health.self_attention_max, health.slot_diversity],
        torch.stack(expected).tolist(),
        rtol=1e-5,
        atol=1e-6,
    )
    assert 0 < health.self_attention_min < health.self_attention < health.self_attention_max < 1


def test_memory_health_leaves_out_lanes_without_a_token() -> None:
    model = tiny()
    src, mems = tokens(3, 6), memory(model, 3)
    padded = memory_health(model, Segment(src, mask("111111", "000000", "110000")), mems)
    kept = memory_health(model, Segment(src[[0, 2]], mask("111111", "110000")), mems[[0, 2]])
    assert vars(padded) == pytest.approx(vars(kept), rel=1e-6)
    # Where nothing at all is written, every slot attends itself alone.
    assert memory_health(model, Segment(src, torch.zeros(3, 6, dtype=torch.bool)), None).self_attention == 1


def test_memory_health_changes_nothing() -> None:
    """Not the generators, nor any part's mode, nor gradients, nor hooks; and dropout does not show."""
    model = tiny(dropout=0.5)
    model.decoder.eval()
    modes = [part.training for part in model.modules()]
    assert any(modes)
    assert not all(modes)
    segment, mems = Segment(tokens(2, 6)), memory(model, 2)
    generator = torch.get_rng_state()
    health = memory_health(model, segment, mems)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [part.training for part in model.modules()] == modes
    assert not any(grad is not None for grad in take_grads(model).values())
    assert not model.writer._forward_pre_hooks
    assert health == memory_health(model, segment, mems) == memory_health(model.eval(), segment, mems)


def test_memory_health_of_an_encoder_only_model_and_of_bfloat16() -> None:
    health = memory_health(tiny(encoder_only=True).bfloat16(), Segment(tokens(2, 6)), None)
    assert all(isinstance(number, float) for number in vars(health).values())
    assert isinstance(health, MemoryHealth)


def test_slot_diversity_equals_loops() -> None:
    slots = torch.randn(2, 4, 5, dtype=torch.float64)
    cosines = [[float(F.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(lane, 2)] for lane in slots]
    torch.testing.assert_close(slot_diversity(slots), 1 - torch.tensor(cosines, dtype=torch.float64).mean(1))
    torch.testing.assert_close(slot_diversity(torch.randn(2, 1, 5).expand(2, 4, 5)), torch.zeros(2), rtol=0, atol=1e-12)
    torch.testing.assert_close(slot_diversity(3 * torch.eye(4)[None]), torch.ones(1))
    assert slot_diversity(torch.randn(2, 1, 5)).tolist() == [0, 0]


# --- Documents --------------------------------------------------------------------------------------------------------

LENGTH = 5
"""Tokens per segment of ``tiny()``: its decoder reads 6, the first of which is the start token."""
START = VOCABULARY - 1


def documents(*lengths: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(START, size=length).astype(np.uint8) for i, length in enumerate(lengths)]


def as_read(read: list[np.ndarray], count: int) -> list[Segment]:
    """The start token alone, then the documents' segments; each with the segment that comes next as its target."""
    start = torch.full((len(read), 1), START)
    segments = torch.from_numpy(np.stack([d[: count * LENGTH] for d in read])).long().split(LENGTH, 1)
    sources = [start, *segments[:-1]]
    return [Segment(src, tgt=torch.cat([start, tgt], 1)) for src, tgt in zip(sources, segments, strict=True)]


@pytest.mark.parametrize("writer", WRITERS)
def test_an_inspection_equals_a_plain_reading(writer: str) -> None:
    model, read = tiny(memory_writer=writer, num_mem_updates=2), documents(20, 33)
    found = inspect(model, read, start=START, segments=9)
    memories, shares, diversity = [model.get_initial_mem(2)], [], []
    for segment in as_read(read, 4):
        memories[-1].retain_grad()
        out = model(segment.src, segment.tgt, memories[-1])
        once = model.writer(memories[-1], out.enc_out)
        shares.append(sum(model.writer.attention_on_itself(m, out.enc_out) for m in (memories[-1], once)) / 2)
        diversity.append(slot_diversity(out.mem))
        memories.append(out.mem)
    # Two lanes, each with its own mean loss.
    (2 * out.dec_out).backward()
    reach = [memory.grad.square().sum().div(2).sqrt() for memory in reversed(memories[:-1])]
    expected = (torch.stack(x).detach().float() for x in (shares, diversity, reach))
    for actual, plain in zip(
        (found.self_attention.transpose(0, 1), found.diversity.T, found.gradient_reach), expected, strict=True
    ):
        torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-7)
    assert (found.gradient_reach > 0).all()
    parameter = model.writer.get_parameter(model.writer.per_slot)
    lengths = parameter.detach().float().square().sum(-1).sqrt() * (0.001 if writer == "normalised" else 1.0)
    torch.testing.assert_close(found.slot_norms, lengths)
    assert found.slot_parameter == ("bias vector" if writer == "normalised" else "initial content")


def test_each_lane_is_read_as_if_alone() -> None:
    model, read = tiny(), documents(30, 30, 30)
    together = inspect(model, read, start=START)
    alone = [inspect(model, [document], start=START) for document in read]
    torch.testing.assert_close(together.self_attention, torch.cat([each.self_attention for each in alone]))
    torch.testing.assert_close(together.diversity, torch.cat([each.diversity for each in alone]))
    squares = torch.stack([each.gradient_reach.square() for each in alone])
    torch.testing.assert_close(together.gradient_reach, squares.mean(0).sqrt())


def test_an_inspection_changes_nothing() -> None:
    model = tiny(dropout=0.5)
    model.encoder.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes, generator = [part.training for part in model.modules()], torch.get_rng_state()
    first = inspect(model, documents(30), start=START)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [part.training for part in model.modules()] == modes
    assert all((grad == 1).all() for grad in take_grads(model).values())
    with torch.no_grad():
        again = inspect(model.eval().requires_grad_(False), documents(30), start=START)
    assert torch.equal(first.self_attention, again.self_attention)
    torch.testing.assert_close(first.gradient_reach, again.gradient_reach)
    with torch.inference_mode():
        again = inspect(model, documents(30), start=START)
    torch.testing.assert_close(first.gradient_reach, again.gradient_reach)


def test_the_three_kinds() -> None:
    shares = torch.tensor([0.0, 0.09, 0.1, 0.49, 0.5, 1.0])
    assert [KINDS[i] for i in kinds(shares)] == ["only the tokens"] * 2 + ["mixed"] * 2 + ["mostly themselves"] * 2
    attention = torch.tensor([[[1.0, 0.0, 0.0]] * 2 + [[0.2, 0.2, 0.0], [0.4, 0.6, 0.0]]])
    found = Inspection(attention, torch.zeros(1, 4), "bias vector", torch.zeros(3), torch.zeros(4))
    torch.testing.assert_close(found.by_slot, torch.tensor([0.3, 0.4, 0.0]))
    expected = torch.tensor([[1, 0, 2], [1, 0, 2], [0, 2, 1], [1, 1, 1]]) / 3
    torch.testing.assert_close(found.shares_of_kinds, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": 1}, r"segments: expected at least 2, for a gradient to reach back, got 1"),
        ({"documents": []}, r"documents: expected at least one, got none"),
        ({"documents": "a text"}, r"documents: expected a list of arrays of token ids, got str"),
        (
            {"documents": np.ones((2, 30), int)},
            r"documents: expected a list of arrays of token ids, got int64 of shape",
        ),
        ({"documents": [Document("a", b"text")]}, r"got Document at index 0; encode_documents"),
        ({"documents": [*documents(30), "text"]}, r"got str at index 1; encode_documents"),
        ({"documents": [*documents(30), 3]}, r"got int at index 1; encode_documents"),
        ({"documents": documents(30, 9)}, r"documents: expected at least 2 segments of 5 tokens of each, got 9 tokens"),
        ({"documents": [np.full(20, 11)]}, r"token id 11 is outside the table of .* = 11"),
        ({"documents": [np.zeros(20)]}, r"documents: .* integer"),
        ({"model": tiny(encoder_only=True)}, r"inspect: this model is encoder_only and has no decoder"),
    ],
)
def test_what_cannot_be_inspected(changes: dict[str, Any], message: str) -> None:
    arguments = {"model": tiny(), "documents": documents(30), "start": START, **changes}
    with pytest.raises(ValueError, match=message):
        inspect(**arguments)


# --- The picture ------------------------------------------------------------------------------------------------------


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    model = tiny(memory_writer="gated", num_memory_slots=40)
    plot(inspect(model, documents(30, 30), start=START), tmp_path / "memory.png")
    picture = (tmp_path / "memory.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert int.from_bytes(picture[16:20], "big") == 1650
    assert "matplotlib.pyplot" not in sys.modules, "it would choose a backend, and might open windows"


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = inspect(tiny(), documents(30), start=START)
    with pytest.raises(ImportError, match=r"a plot needs matplotlib: pip install 'memformer-replay\[plot\]'"):
        plot(found, tmp_path / "memory.png")


def test_a_diversity_above_1_is_not_clipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = new_figure(11, 7.5)
    monkeypatch.setattr("memformer.inspection.new_figure", lambda *_: figure)
    shares = torch.full((1, 4, 2), 0.5)
    found = Inspection(shares, torch.full((1, 4), 1.6), "bias vector", torch.ones(2), torch.ones(4))
    plot(found, tmp_path / "memory.png")
    (areas,) = [axes for axes in figure.axes if axes.get_ylabel() == "share of slots; diversity"]
    assert areas.get_ylim()[1] > 1.6
    assert figure.get_suptitle() == "When they are written, 2 slots attend: 2 mostly themselves"
    assert all(axes.get_xlabel() or axes.get_label() == "<colorbar>" for axes in figure.axes)


# --- A run's life -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder: 7 lines of steps, the first as an older version wrote it, 3 evaluations, and 2 checkpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    lines: list[dict[str, Any]] = [{"event": "step", "step": 1, "loss_nats": 5.5}]
    for step in range(10, 70, 10):
        numbers = {"loss_nats": 5 - step / 20, "self_attention": 0.9, "slot_diversity": 1.2, "memory_gradient": 0.25}
        totals = {"tokens_seen": 100 * step, "epoch": step / 40, "wall_seconds": 2.0 * step}
        lines.append({"event": "step", "step": step, **numbers, **totals})
    lines += [
        {"event": "held_out", "step": step, "loss_nats": loss} for step, loss in ((30, 4.0), (50, 3.0), (60, 3.5))
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (50, 60):
        tiny().save_pretrained(tmp_path / "run" / f"step-{step:06d}")
    return tmp_path / "run"


def test_a_life_is_read_from_the_metrics(run: Path) -> None:
    moments = life(run)
    assert [m.step for m in moments] == [1, 10, 20, 30, 40, 50, 60]
    assert [m.held_out_nats for m in moments] == [None, None, None, 4.0, None, 3.0, 3.5]
    assert [m.step for m in moments if m.kept] == [50, 60]
    assert (moments[0].loss_nats, moments[0].slot_diversity, moments[-1].loss_nats) == (5.5, None, 2.0)
    assert describe_life(moments).splitlines() == [
        "60 steps, 6,000 tokens, 1.50 times the documents, 2:00",
        "",
        "      step  training  held out on itself diversity     reach",
        "         1     5.500         -         -         -         -",
        "        10     4.500         -     0.900     1.200      0.25",
        "        20     4.000         -     0.900     1.200      0.25",
        "        30     3.500     4.000     0.900     1.200      0.25",
        "        40     3.000         -     0.900     1.200      0.25",
        "        50     2.500     3.000     0.900     1.200      0.25  best kept",
        "        60     2.000     3.500     0.900     1.200      0.25  kept",
        "",
        "training, held out: nats per token; on itself: the share of the writing attention that slots give",
        "themselves; reach: the gradient at a rollout's start by that at its end; kept: the checkpoint is there",
    ]


def test_a_life_repeats_no_measurement_where_there_was_none(run: Path) -> None:
    """A run that stopped early between two of its lines: the former line is not of the last step."""
    with (run / "metrics.jsonl").open("a") as file:
        for step in (61, 62):
            file.write(json.dumps({"event": "held_out", "step": step, "loss_nats": 3.0001}) + "\n")
    moments = life(run)
    assert [m.loss_nats for m in moments][-3:] == [2.0, None, None]
    table = describe_life(moments).splitlines()
    assert table[0] == "62 steps; at step 60, 6,000 tokens, 1.50 times the documents, 2:00"
    assert "        62         -     3.000         -         -         -" in table
    assert _message(moments) == "The held-out loss came to 3.000 nats per token at step 50"


def test_a_long_life_fits_a_screen_and_keeps_the_checkpoints() -> None:
    moments = [Moment(step, 2.0, 3.0 - step, kept=step in (1777, 3999)) for step in range(1, 4001)]
    steps = [line.split()[0] for line in describe_life(moments).splitlines()[3:-3]]
    assert 20 < len(steps) <= 30
    assert {"1", "1777", "3999", "4000"} <= set(steps)


def test_the_command_shows_a_life_and_draws_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--checkpoint", "run", "--life", "--plot", "life.png"]) == 0
    printed = capsys.readouterr().out
    assert printed == describe_life(life(run)) + "\n\nplot in life.png\n"
    assert (run.parent / "life.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", "--checkpoint", "run/step-000050", "--life"]) == 0
    assert capsys.readouterr().out in printed


def test_what_has_no_life(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_text("")
    assert main(["inspect", "--checkpoint", "run", "--life"]) == 2
    assert "metrics.jsonl: no line of metrics in it" in capsys.readouterr().err
    (run / "metrics.jsonl").unlink()
    assert main(["inspect", "--checkpoint", "run", "--life"]) == 2
    assert "no metrics.jsonl there, which every run writes" in capsys.readouterr().err
    assert main(["inspect", "--checkpoint", "run", "--life", "--data", "x"]) == 2
    assert "life: reads the run's metrics, so --data has no meaning with it" in capsys.readouterr().err


def test_the_message_of_a_picture() -> None:
    fell = [Moment(1, 5.0), Moment(50, 2.0)]
    assert _message(fell) == "The training loss went from 5.000 to 2.000 nats per token in 50 steps"
    scored = [Moment(10, 3.0, 3.0), Moment(20, 2.0, 2.5), Moment(30, 1.0, 2.75)]
    assert _message(scored) == "The held-out loss came to 2.500 nats per token at step 20, and was 2.750 at the end"
    assert _message([Moment(7, kept=True)]) == "7 steps"


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model of bytes and two texts."""
    tokenizer = ByteTokenizer()
    vocabulary = {"enc_num_tokens": tokenizer.vocabulary, "dec_num_tokens": tokenizer.vocabulary}
    tiny(**vocabulary, num_memory_slots=5).float().save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "a.txt").write_text("To read a long text, remember it. " * 2)
    (tmp_path / "b.txt").write_text("short")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prints_and_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inspect", "--checkpoint", "model", "--data", "a.txt", "--segments", "7", "--device", "cpu"]
    assert main([*command, "--plot", "a.png"]) == 0
    printed = capsys.readouterr().out.splitlines()
    model, text = Memformer.from_pretrained(folder / "model"), np.frombuffer((folder / "a.txt").read_bytes(), np.uint8)
    found = inspect(model, [text], start=ByteTokenizer().start, segments=7)
    assert printed[0] == "5 slots, read over 7 segments of 1 document"
    kind = kinds(found.by_slot).tolist()
    assert ", ".join(f"{kind.count(i)} {name}" for i, name in enumerate(KINDS)) in printed[2]
    slots = [line.split() for line in printed[5:7]]
    assert [len(line) for line in slots] == [4 * 3, 3]
    cells = slots[0] + slots[1]
    assert sorted(cells[::3]) == list("01234")
    assert cells[1::3] == sorted(cells[1::3], reverse=True)
    for slot, share, norm in zip(cells[::3], cells[1::3], cells[2::3], strict=True):
        assert float(share) == pytest.approx(float(found.by_slot[int(slot)]), abs=5e-4)
        assert float(norm) == pytest.approx(float(found.slot_norms[int(slot)]), rel=5e-3)
    tables = [line.split() for line in printed[8:14] if line]
    assert [line[-4:] for line in tables[:2]] == [
        ["1", "2", "4", "7"],
        [f"{float(found.self_attention[:, n - 1].mean()):.3f}" for n in (1, 2, 4, 7)],
    ]
    assert tables[2][-1] == f"{float(found.diversity[:, -1].mean()):.3f}"
    assert tables[3][-5:] == ["0", "1", "2", "4", "6"]
    assert [float(x) for x in tables[4][-5:]] == pytest.approx(found.gradient_reach[[0, 1, 2, 4, 6]].tolist(), rel=0.06)
    assert printed[-1] == "plot in a.png"
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere: no checkpoint there"),
        (["--data", "nothing.txt"], "nothing.txt: no such file or folder"),
        (["--data", "b.txt"], "documents: expected at least 2 segments of 5 tokens of each, got 5 tokens"),
        (["--segments", "1"], "segments: expected at least 2"),
        (["--lanes", "0"], "lanes: expected at least 1, got 0"),
        (["--device", "abacus"], "device: 'abacus' cannot be used here"),
        (["--plot", "a.sound"], "plot: expected the name of a .png file"),
        (["--plot", "nowhere/a.png"], "in a folder that exists, got nowhere/a.png"),
    ],
)
def test_the_commands_mistakes(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data" in options else ["--data", "a.txt"]
    assert main(["inspect", "--checkpoint", "model", *data, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("memformer: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_command_without_matplotlib(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", "--checkpoint", "model", "--data", "a.txt", "--plot", "a.png"]) == 2
    assert "pip install 'memformer-replay[plot]'" in capsys.readouterr().err
