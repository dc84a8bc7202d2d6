"""The benchmark of reach: exact gradients in parts, what is judged by length and depth, and what is kept."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from memformer import replay
from memformer.bench import reach
from memformer.bench.contestants import OWN, Contestant, build
from memformer.cli import main
from memformer.tasks import InProse

SIZES = {"dim": 16, "heads": 2, "slots": 12, "enc_depth": 1, "dec_depth": 1}
TINY = {
    "contestants": ("causal",),
    **{"steps": 3, "batch_size": 2, "jobs": 1, "seeds": (0,), "episodes": 5, "depths": 2, "part": 3, "words": 150},
    **{"segment_tokens": 64, "train_tokens": 256, "lengths": (128, 1024), "questions": 2},
    "model": dataclasses.replace(reach.MODEL, **SIZES),
}
TRIAL = {"task": "qa1", "contestant": "causal", "learning_rate": 1e-3, "seed": 0}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(reach, "EVERY", 2)


def settings(**changes):
    return reach.ReachBenchmark(**TINY | changes)


def test_the_command(capsys, tmp_path):
    command = "bench reach --tasks qa1 needle --contestants causal --steps 2 --batch-size 2 --jobs 1 --seeds 0"
    command += " --episodes 4 --depths 2 --part 3 --words 150 --segment-tokens 64 --train-tokens 128 --questions 1"
    command += " --lengths 128 1024 " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SIZES.items())
    picture = tmp_path / "reach.png"
    assert main([*command.split(), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "chance 16.7" in next(line for line in printed if line.startswith("qa1: 1 seeds"))
    heads = [line for line in printed if line.startswith("contestant")]
    assert len(heads) == 2
    assert all("at 128" in head and "at 1,024" in head for head in heads)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_it_is_said_how_much_of_a_lesson_is_learned(monkeypatch, capsys):
    """By held-out texts of the lesson, while it lasts: 6 tokens hold a fact, 16 questions are asked one by one."""
    monkeypatch.setattr(reach, "EVERY", 1)
    monkeypatch.setattr("memformer.bench.trials.REPORT_EVERY", -1.0)
    read, lengths = reach._read, []

    def reading(given, model, task, *others):
        lengths.append(task.length)
        assert task.prose is held_out.prose
        return read(given, model, task, *others)

    task, held_out = reach._tasks(settings(), "qa1")
    model = build("causal", OWN, reach._config(settings(), task))
    monkeypatch.setattr(reach, "_read", reading)
    reach._learn(settings(steps=4), TRIAL, model, task, held_out)
    said = capsys.readouterr().err.splitlines()
    assert ["of the easier texts of this step" in line for line in said] == [True, True, True, False]
    shortest = task.eased(0).length
    assert lengths == [64, shortest, 64, shortest, 64, task.eased(0.5).length, 64]


@pytest.mark.parametrize("name", OWN)
def test_gradients_in_parts_are_those_of_the_whole_text(name):
    """Against plain back-propagation through the whole episode at once, in float64."""
    torch.manual_seed(0)
    given = settings()
    task, _ = reach._tasks(given, "qa1")
    model = build(name, OWN, reach._config(given, task)).double()
    whole, told = task.draw(2, torch.Generator().manual_seed(1)), task.tell(2, torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    expected = other(whole).loss(whole)
    expected.backward()
    loss = replay.memory_replay(reach._Cell(model), list(told.parts(3)), None).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters()) > 10
    for (parameter, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        zero = torch.zeros_like(one)
        grads = [zero if x.grad is None else x.grad for x in (one, two)]
        torch.testing.assert_close(*grads, msg=lambda text, name=parameter: f"{name}: {text}")


def test_results_by_length_and_depth(monkeypatch):
    """A model that finds the fact if it stands in the first half, and only in short texts."""
    task = reach._tasks(settings(), "qa1")[1]
    asked = {}

    class Knowing(Contestant):
        def read(self, episode, state):
            wanted = episode.tokens[:, episode.answers.any(2).any(0)]
            state = (0 if state is None else state) + episode.tokens.shape[1]
            logits = torch.nn.functional.one_hot(wanted, task.vocabulary).float()
            if wanted.shape[1]:
                early = asked["places"][asked["read"] : asked["read"] + len(wanted)] < asked["half"]
                asked["read"] += len(wanted)
                logits = logits * (early & (state < 10))[:, None, None, None]
            return logits, state, torch.zeros(())

    tell = type(task).tell

    def watched(self, *given, **keywords):
        told = tell(self, *given, **keywords)
        asked["places"] = torch.cat([asked["places"], told.places[:, 0]])
        asked["half"] = told.tokens / 2
        return told

    monkeypatch.setattr(type(task), "tell", watched)
    given = settings(episodes=25)
    for tokens in given.lengths:
        asked |= {"places": torch.zeros(0), "read": 0}
        judged = reach._judge(given, Knowing(torch.nn.Identity()), task, tokens)
        first, second = judged["by_depth"]
        assert first[1] + second[1] == judged["episodes"] == 25
        assert min(first[1], second[1]) > 4
        assert second[0] == 0
        assert first[0] == judged["right"] == (first[1] if tokens == 128 else 0)


def test_weights_are_kept_and_judged_again_at_other_lengths(tmp_path, monkeypatch):
    given = settings(weights=tmp_path)
    one = reach.train(
        dataclasses.replace(given, tasks=("qa1", "qa2")), OWN, TRIAL
    )  # beside one that is eased otherwise
    (file,) = tmp_path.iterdir()
    assert file.name == "qa1-causal-0.001-0.safetensors"
    monkeypatch.setattr(reach, "_learn", None)
    again = reach.train(dataclasses.replace(given, lengths=(128, 320)), OWN, TRIAL)
    assert again["curve"] == [list(point) for point in one["curve"]]
    timeless = [{**result["lengths"]["128"], "seconds": 0} for result in (one, again)]
    assert timeless[0] == timeless[1]
    with pytest.raises(ValueError, match=r"weights: .* was trained with other settings"):
        reach.train(dataclasses.replace(given, questions=1), OWN, TRIAL)
    file.write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"weights: .*qa1-causal-0.001-0.safetensors is damaged \(.*trained again"):
        reach.train(given, OWN, TRIAL)


def test_weights_that_cannot_be_written_are_an_error_before_the_first_run(tmp_path, monkeypatch):
    def refused(**_):
        raise PermissionError("of another user")

    monkeypatch.setattr(reach, "train", None)
    monkeypatch.setattr(reach.tempfile, "TemporaryFile", refused)
    with pytest.raises(PermissionError, match="of another user"):
        list(reach.run(settings(weights=tmp_path)))


def test_weights_that_are_not_written_whole_are_not_kept(tmp_path):
    file = tmp_path / "gone" / "weights.safetensors"
    with pytest.raises(OSError, match=r"weights: .*weights\.safetensors cannot be written"):
        reach._keep(torch.nn.Linear(1, 1), file, {})
    (tmp_path / "gone").mkdir()
    reach._keep(torch.nn.Linear(1, 1), file, {})
    assert list(file.parent.iterdir()) == [file]


def test_trials_are_kept_and_are_the_same_again(tmp_path, monkeypatch):
    out = tmp_path / "reach.json"
    printed = list(reach.run(settings(out=out)))
    held = json.loads(out.read_text())
    assert held["runs"][0]["run"] == TRIAL
    found = held["runs"][0]["result"]
    assert found["tokens"] <= 3 * 2 * 256
    again = reach.train(settings(), OWN, TRIAL)
    assert [list(point) for point in again["curve"]] == found["curve"]
    monkeypatch.setattr(reach, "train", lambda *_: pytest.fail("it is there"))
    assert list(reach.run(settings(out=out)))[-1] == printed[-1]
    with pytest.raises(ValueError, match="holds runs with episodes of 5, not 6"):
        list(reach.run(settings(out=out, episodes=6)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("qa7",)}, "tasks: expected some of qa1, qa2, qa3, needle, got 'qa7'"),
        ({"tasks": ()}, "tasks: expected one or more"),
        ({"contestants": ("RMT",)}, "contestants: expected some of memformer, .* got 'RMT'"),
        ({"lengths": (1000,)}, r"lengths: expected a multiple of segment_tokens \(64\), .* got 1000"),
        ({"train_tokens": 100}, "train_tokens: expected a multiple"),
        ({"lengths": (64,), "tasks": ("qa3",)}, "lengths: the facts of qa3 alone may have 192 tokens, got 64"),
        ({"train_tokens": 64, "tasks": ("qa3",)}, "train_tokens: the facts alone may fill 3 segments of 64, got 1"),
        ({"questions": 12}, "segment_tokens: questions and answers stand in one segment, .* 72 tokens, got 64"),
        ({"prose": (Path(__file__),)}, "prose: expected 10 sentences of prose or more"),
        ({"judge_temperature": 0.0}, r"judge_temperature: expected a finite number above 0, got 0\.0"),
        ({"sharpen_from": 1.5}, r"sharpen_from: expected 0 to 1, got 1\.5"),
        ({"judge_forgetting": -1.0}, r"judge_forgetting: expected a number of at least 0, got -1\.0"),
        ({"judge_segment_tokens": 128}, r"judge_segment_tokens: expected at most segment_tokens \(64\), .* got 128"),
        ({"judge_segment_tokens": 48}, r"judge_segment_tokens: .* lengths that it divides, got 48"),
        ({"judge_segment_tokens": 0}, "judge_segment_tokens: expected"),
        ({"judge_segment_tokens": 4}, "judge_segment_tokens: questions and answers stand in one segment, .*, got 4"),
        (
            {"judge_forgetting": 0.1, "model": dataclasses.replace(TINY["model"], memory_writer="gated")},
            r"judge_forgetting: expected 0 with the writer gated, which has no bias vector, got 0\.1",
        ),
        ({"part": 0}, "part: expected a whole number of at least 1, got 0"),
        ({"graphs": 0}, "graphs: expected a whole number of at least 1, got 0"),
        ({"seeds": (-1,)}, "seeds: expected whole numbers from 0"),
        ({"learning_rates": (0.0,)}, "learning_rates: expected a finite number above 0"),
        ({"learning_rates": (1e-3, math.inf)}, "learning_rates: expected a finite number above 0, got inf"),
        ({"learning_rates": (math.nan,)}, "learning_rates: expected a finite number above 0, got nan"),
        ({"device": "moon"}, "device: 'moon' cannot be used here"),
        ({"weights": Path("nowhere")}, "weights: expected a folder that exists, got nowhere"),
        ({"plot": Path("a.gif")}, "plot: expected the name of a .png file"),
        ({"include": ("",)}, r"include: expected patterns such as '\*\.txt', got an empty one"),
        ({"exclude": ("*.txt",)}, "exclude: says what is read of folders of prose, and none was given"),
    ],
)
def test_mistakes_are_refused_before_the_first_run(changes, message, monkeypatch):
    monkeypatch.setattr(reach, "train", None)
    with pytest.raises(ValueError, match=message):
        list(reach.run(settings(**changes)))


def test_patterns_say_what_is_prose_in_a_folder(tmp_path):
    """As for training; and what was learned of other files is not taken for the same."""
    for name in ("play_gut.txt", "play_gut_f.txt"):
        (tmp_path / name).write_text("\n\n".join(f"The {name[:4]} has a line {n} here." for n in range(20)))

    def of(**patterns):
        given = settings(prose=(tmp_path,), **patterns)
        return len(reach._tasks(given, "qa1")[0].prose.starts), reach._trained_with(given, given.tasks)

    (both, known), (one, of_one), (other, of_other) = of(), of(include=("*_gut.txt",)), of(exclude=("*_f.txt",))
    assert both - 1 == 2 * (one - 1) == 2 * (other - 1) == 32
    assert known.keys().isdisjoint(("include", "exclude")), "records of earlier versions are gone on with"
    assert (of_one["include"], of_other["exclude"]) == (["*_gut.txt"], ["*_f.txt"])
    (tmp_path / "play_gut.txt").write_text("\n\n".join(f"The rose has a line {n} here." for n in range(20)))
    assert of()[1]["texts"] not in (known["texts"], of_one["texts"]), "other texts of the same name"
    with pytest.raises(ValueError, match=r"include, exclude: the pattern '\*\.md' matches no file"):
        list(reach.run(settings(prose=(tmp_path,), include=("*.md",))))


def test_prose_of_ones_own(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(reach.run(settings(prose=(tmp_path / "nowhere",))))


def test_training_goes_from_easy_to_hard(monkeypatch):
    read, practice = [], InProse.practice

    def watched(task, *arguments):
        read.append((task.length, task.apart))
        return practice(task, *arguments)

    monkeypatch.setattr(InProse, "practice", watched)
    reach.train(settings(steps=10), OWN, TRIAL)
    assert read == [(6, True)] * 4 + [(12, True)] * 2 + [(24, True), (48, True)] + [(64, False)] * 2


def test_the_rate_falls_with_the_task_itself_or_with_length():
    assert reach._falling(0.4, 0.3) == pytest.approx(0.3)
    assert reach._falling(0.85, 0.15) == 0.15, "the task itself is not trained on"
    assert {reach._falling(*world.easing) > 0.1 for world in reach.WORLDS.values()} == {True}


def test_a_task_with_an_easing_of_its_own_says_so_and_the_others_do_not():
    one, both = settings(tasks=("qa1",)), settings(tasks=("qa1", "qa2"))
    assert reach._trained_with(one, one.tasks)["easing"] == [0.4, 0.3]
    assert "easing_of" not in reach._trained_with(one, one.tasks), "results of earlier versions are gone on with"
    assert reach._fixed(both)["easing_of"] == {"qa2": [0.85, 0.15]}
    assert reach._trained_with(both, ("qa1",)) == reach._trained_with(one, ("qa1",)), (
        "weights do not depend on the rest"
    )


def test_texts_are_judged_with_a_sharper_writer_than_that_of_training(monkeypatch):
    learn, seen = reach._learn, []

    def of(network):
        return network.config.write_temperature, network.config.forgetting

    def watched(given, trial, model, *tasks):
        seen.append(of(model.network))
        return learn(given, trial, model, *tasks)

    monkeypatch.setattr(reach, "_learn", watched)
    monkeypatch.setattr(reach, "_judge", lambda given, model, task, tokens: {"with": of(model.network)})
    for changes, expected in [
        ({}, (0.075, 0.0)),
        ({"judge_temperature": 0.2, "judge_forgetting": 0.001}, (0.2, 0.001)),
        ({"model": dataclasses.replace(TINY["model"], memory_writer="placed")}, (0.075, 0.001)),
    ]:
        result = reach.train(settings(**changes), OWN, TRIAL)
        assert [judged["with"] for judged in result["lengths"].values()] == [expected] * 2
    assert seen == [(0.25, 0.001)] * 3


def test_the_end_of_a_training_may_have_the_writer_of_judging(monkeypatch):
    build, descend, models, seen = reach.build, reach.descend, [], []

    def kept(*given):
        models.append(build(*given))
        return models[-1]

    def watched(*given):
        config = models[-1].network.config
        seen.append((config.write_temperature, config.forgetting))
        descend(*given)

    monkeypatch.setattr(reach, "build", kept)
    monkeypatch.setattr(reach, "descend", watched)
    monkeypatch.setattr(reach, "_judge", lambda *given: {})
    soft, sharp = (0.25, 0.001), (0.075, 0.0)
    for share, expected in [
        (1.0, [soft] * 4),
        (0.75, [soft] * 3 + [sharp]),
        (0.5, [soft] * 2 + [sharp] * 2),
        (0.0, [sharp] * 4),
    ]:
        seen.clear()
        reach.train(settings(steps=4, sharpen_from=share), OWN, TRIAL)
        assert seen == expected
    known = reach._trained_with(settings(), ("qa1",))
    assert not {"sharpen_from", "judge_temperature"} & known.keys(), "weights of earlier versions are gone on with"
    one, other = (reach._trained_with(settings(sharpen_from=0.5, judge_temperature=t), ("qa1",)) for t in (0.1, 0.2))
    assert one != other, "then weights depend on it"


def test_texts_may_be_judged_in_shorter_segments(monkeypatch):
    """So fewer facts share one. The texts are of the same lengths, and training is what it was."""
    read, tell = [], InProse.tell

    def watched(task, count, generator, segments):
        told = tell(task, count, generator, segments)
        read.append((task.length, segments, told.tokens))
        return told

    monkeypatch.setattr(InProse, "tell", watched)
    monkeypatch.setattr(reach, "_learn", lambda *given: {"curve": []})
    whole, short = settings(), settings(judge_segment_tokens=16)
    for given in (whole, short):
        reach.train(given, OWN, TRIAL)
    assert {(length, length * segments) for length, segments, _ in read} == {
        (length, tokens) for length in (64, 16) for tokens in whole.lengths
    }
    tokens = [told for _, _, told in read]
    assert tokens[: len(tokens) // 2] == tokens[len(tokens) // 2 :]
    assert "judge_segment_tokens" not in reach._fixed(whole), "records of earlier versions are gone on with"
    assert reach._fixed(short)["judge_segment_tokens"] == 16


def test_the_rate_falls_while_the_task_itself_is_trained_on_and_graphs_are_kept_as_is_said(monkeypatch):
    rates, schedules = [], []
    descend, memory_replay = reach.descend, replay.memory_replay

    def watched(loss, parameters, optimizer, schedule):
        rates.append(optimizer.param_groups[0]["lr"])
        descend(loss, parameters, optimizer, schedule)

    def watched_replay(*given, schedule):
        schedules.append(schedule)
        return memory_replay(*given, schedule=schedule)

    monkeypatch.setattr(reach, "WARM_UP", 2)
    monkeypatch.setattr(reach, "descend", watched)
    monkeypatch.setattr(replay, "memory_replay", watched_replay)
    reach.train(settings(steps=10, graphs=2), OWN, TRIAL)
    assert rates == pytest.approx([5e-4] + [1e-3] * 7 + [2e-3 / 3, 1e-3 / 3])
    assert schedules == [replay.EveryMemory(graphs=2)] * 10
