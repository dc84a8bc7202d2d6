"""The benchmark of learning: equal data, resuming, the choice of a rate, the table and the picture."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from memformer.bench import learn
from memformer.bench.contestants import OWN, Contestant
from memformer.bench.trials import Record
from memformer.cli import main
from memformer.tasks import TASKS, AssociativeRetrieval, Copy, Episode, KeyValue, Pixels

MODEL = dataclasses.replace(learn.MODEL, dim=16, heads=2, slots=4)
SIZES = ["--dim", "16", "--heads", "2", "--slots", "4"]
TINY = {"steps": 3, "batch_size": 4, "jobs": 1, "model": MODEL}
TRIAL = {"task": "retrieval", "contestant": "memformer", "learning_rate": 1e-3, "seed": 0}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(learn, "EVERY", 2)
    monkeypatch.setattr(learn, "EPISODES", 8)
    monkeypatch.setattr(learn, "LONGER", {"retrieval": (6,)})
    monkeypatch.setitem(learn.TASKS, "retrieval", AssociativeRetrieval(segments=3, pairs=3))
    monkeypatch.setitem(learn.TASKS, "copy", Copy(segments=1, per_segment=2))
    monkeypatch.setitem(learn.TASKS, "pairs-4", KeyValue(pairs=2, symbols=3))


def lines(**settings):
    return list(learn.run(learn.LearningBenchmark(**TINY | settings)))


def result(**changes):
    plain = {"solved_at": None, "curve": [(3, 0.5, 2.0)]}
    return plain | changes


def test_the_command(capsys, tmp_path):
    command = "bench learn --steps 3 --batch-size 4 --jobs 1 --tasks retrieval copy --seeds 0 1 --learning-rates 1e-3"
    picture = tmp_path / "learn.png"
    assert main([*command.split(), *SIZES, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sum(" seed 0 " in line for line in printed) == sum(" seed 1 " in line for line in printed) == 2 * len(OWN)
    tables = [i for i, line in enumerate(printed) if line.startswith("contestant")]
    assert [printed[i - 1].split(":")[0] for i in tables] == ["retrieval", "copy"]
    assert "chance 12.5, solved from 99.0" in printed[tables[0] - 1]
    assert "at 3" in printed[tables[0]]
    assert "at 6" in printed[tables[0]]
    for i in tables:
        assert [printed[i + n].split("  ")[0] for n in range(1, len(OWN) + 1)] == list(OWN)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_all_contestants_see_the_same_data(monkeypatch):
    seen = {}

    class Watched(AssociativeRetrieval):
        def _draw(self, batch_size, segments, generator):
            episode = super()._draw(batch_size, segments, generator)
            if batch_size == TINY["batch_size"]:
                seen[current].append(episode.tokens)
            return episode

    monkeypatch.setitem(learn.TASKS, "watched", Watched(segments=3, pairs=3))
    settings = learn.LearningBenchmark(**TINY)
    for current in ("memformer", "memory off"):
        seen[current] = []
        learn.train(settings, OWN, TRIAL | {"task": "watched", "contestant": current})
    assert len(seen["memformer"]) == 3
    assert all(torch.equal(*pair) for pair in zip(*seen.values(), strict=True))
    assert len({tokens.shape for tokens in seen["memformer"]}) > 1, "the number of segments is drawn for each step"
    current = "seed 1"
    seen[current] = []
    learn.train(settings, OWN, TRIAL | {"task": "watched", "seed": 1})
    assert not torch.equal(seen[current][0], seen["memformer"][0])


def test_held_out_episodes_are_not_those_of_training():
    seeds = learn._VALIDATION, learn._TEST
    validation, test = (learn._episodes(TASKS["retrieval"], seed, 3)[0].tokens for seed in seeds)
    again = learn._episodes(TASKS["retrieval"], seeds[0], 3)[0].tokens
    assert torch.equal(validation, again)
    assert not torch.equal(validation, test)
    with pytest.raises(ValueError, match="seeds: expected whole numbers from 0 to 999,999"):
        learn.LearningBenchmark(seeds=(learn._VALIDATION,))


def test_a_file_is_gone_on_with(tmp_path, monkeypatch):
    out, few = tmp_path / "runs.json", {"contestants": ("memformer", "memory off")}
    lines(learning_rates=(1e-3,), seeds=(0,), out=out, **few)
    first = json.loads(out.read_text())["runs"]
    made = []
    train = learn.train
    monkeypatch.setattr(learn, "train", lambda *given: made.append(given[-1]) or train(*given))
    printed = lines(learning_rates=(1e-3, 3e-3), seeds=(0, 4), out=out, **few)
    runs = json.loads(out.read_text())["runs"]
    assert runs[: len(first)] == first
    assert [(run["learning_rate"], run["seed"]) for run in made[:2]] == [(3e-3, 0)] * 2
    assert [run["seed"] for run in made[2:]] == [4] * 2
    assert {"memformer", "machine", "date", "command"} <= runs[0]["made"].keys()
    made.clear()
    timed = ("s per run", "machine")
    again = lines(learning_rates=(1e-3, 3e-3), seeds=(0, 4), out=out, **few)
    assert not made
    assert [line for line in again if line not in printed and not any(t in line for t in timed)] == []
    with pytest.raises(ValueError, match="holds runs with steps of 3, not 5"):
        lines(steps=5, out=out)


def test_runs_are_the_same_in_one_process_and_another(tmp_path):
    """What the numbers depend on is in the run: no state of the process."""
    settings = learn.LearningBenchmark(**TINY)
    torch.manual_seed(5)
    one, two = (learn.train(settings, OWN, TRIAL) for _ in range(2))
    for key in one.keys() - {"seconds"}:
        assert one[key] == two[key], key


def test_a_task_is_solved_the_second_time_in_a_row_and_the_run_goes_on(monkeypatch):
    scores = iter([(0.2, 1.0), (1.0, 0.1), (0.5, 1.0), (1.0, 0.1), (1.0, 0.1)])
    monkeypatch.setattr(learn, "_judge", lambda *_: next(scores, (0.75, 0.5)))
    found = learn.train(learn.LearningBenchmark(**TINY | {"steps": 20}), OWN, TRIAL)
    assert found["solved_at"] == 10
    assert [point[0] for point in found["curve"]] == list(range(2, 21, 2))
    assert found["scores"]["3"] == (0.75, 0.5), "other episodes judge it"


def test_a_run_that_diverges_ends_and_does_not_stop_the_others():
    found = learn.train(learn.LearningBenchmark(**TINY), OWN, TRIAL | {"learning_rate": math.inf})
    assert found["diverged_at"] == 2
    assert found["solved_at"] is None
    assert found["curve"] == []
    assert learn._badness(TASKS["retrieval"], found) > learn._badness(TASKS["retrieval"], result())


def test_the_best_solves_soonest_then_scores_then_loses_least():
    task = TASKS["retrieval"]
    images = Pixels(images=torch.zeros(2, 4, dtype=torch.int64), levels=2, per_segment=2)
    soon, late = result(solved_at=100, curve=[(100, 0.99, 0.5)]), result(solved_at=200, curve=[(200, 1.0, 0.1)])
    better, surer = result(curve=[(3, 0.6, 3.0)]), result(curve=[(3, 0.5, 1.0)])
    for given, metric in (
        ((soon, late, better), task),
        ((better, surer, result()), task),
        ((surer, result(), better), images),
    ):
        assert sorted(given, key=lambda one: learn._badness(metric, one)) == list(given)


def test_a_run_that_diverged_keeps_its_last_score_in_the_picture():
    curves = [[(2, 0.1, 3.0), (4, 1.0, 0.1)], [(2, 0.2, 3.0), (4, 0.3, 2.0), (6, 0.4, 1.0)]]
    steps, scores = learn._over_steps(TASKS["retrieval"], curves)
    assert steps == [2, 4, 6]
    assert scores.tolist() == [[0.1, 1.0, 1.0], [0.2, 0.3, 0.4]]


def test_the_judge_counts_every_answer_once():
    class Fixed(Contestant):
        def read(self, episode, state):
            logits = torch.zeros(*episode.tokens[:, episode.answers.any(2).any(0)].shape, 51)
            logits[..., episode.tokens[0, -1, 0]] = 3.0
            return logits, None, logits.new_zeros(())

    episodes = learn._episodes(TASKS["retrieval"], 3, 3)
    wanted = torch.cat([x.tokens[x.answers] for x in episodes])
    accuracy, bits = learn._judge(Fixed(torch.nn.Identity()), TASKS["retrieval"], episodes)
    said = episodes[0].tokens[0, -1, 0]
    assert accuracy == float((wanted == said).float().mean())
    of_said = math.exp(3) / (math.exp(3) + 50)
    expected = [of_said if token == said else (1 - of_said) / 50 for token in wanted]
    assert bits == pytest.approx(-sum(map(math.log2, expected)) / len(wanted), rel=1e-5)


def test_an_exact_match_needs_all_answers_of_an_episode():
    class Knowing(Contestant):
        """Right wherever the wanted token is above 3."""

        def read(self, episode, state):
            tokens = episode.tokens[:, episode.answers.any(2).any(0)]
            return F.one_hot(tokens.clamp(min=4), 9).float(), None, torch.zeros(())

    tokens = torch.tensor([[[0, 0], [4, 5]], [[0, 0], [3, 5]], [[0, 0], [3, 3]]])
    answers = torch.tensor([[False, False], [True, True]]).expand(3, 2, 2)
    model = Knowing(torch.nn.Identity())
    episodes = [Episode(tokens, answers)]
    assert learn._judge(model, TASKS["pairs-4"], episodes)[0] == pytest.approx(1 / 3)
    assert learn._judge(model, TASKS["retrieval"], episodes)[0] == pytest.approx(1 / 2)


def test_pairs_are_judged_by_their_number(tmp_path):
    out = tmp_path / "pairs.json"
    only = {"seeds": (0,), "learning_rates": (1e-3,), "contestants": ("memformer",), "tasks": ("pairs-4",)}
    printed = lines(**only, questions=2, out=out)
    head = next(i for i, line in enumerate(printed) if line.startswith("contestant"))
    assert "of exact match in % by pairs in one segment; chance 11.1, solved from 99.0" in printed[head - 1]
    assert "at 2 " in printed[head]
    held = json.loads(out.read_text())
    assert held["runs"][0]["result"]["scores"].keys() == {"2"}
    assert held["settings"]["questions"] == 2
    with pytest.raises(ValueError, match="holds runs with questions of 2, not None"):
        lines(**only, out=out)


def test_the_sizes_are_those_of_the_command(capsys):
    command = "bench learn --steps 1 --batch-size 2 --jobs 1 --seeds 0 --learning-rates 1e-3 --contestants memformer"
    counts = []
    for dim in ("8", "16"):
        assert main([*command.split(), *SIZES, "--dim", dim]) == 0
        counts.append(int(capsys.readouterr().out.splitlines()[-1].split()[1].replace(",", "")))
    assert counts[0] < counts[1]


def test_flops_grow_with_segments_and_with_the_batch():
    task = TASKS["retrieval"]
    model = learn._contestant(learn.LearningBenchmark(**TINY), "memformer", OWN, task)
    episodes = [task.draw(4, torch.Generator(), segments) for segments in (1, 2, 3)]
    costs = [learn._flops(model, episode) for episode in episodes]
    assert costs[2] - costs[1] == costs[1] - costs[0] > 0, "each segment more costs the same"
    assert all(parameter.grad is None for parameter in model.parameters())
    whole = learn.flops(lambda: model(episodes[2]).loss(episodes[2]).backward())
    assert whole == 4 * costs[2]


def test_the_images_that_choose_a_rate_are_not_those_that_judge(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(learn, "EPISODES", 512)
    _, held_out = learn._tasks(learn.LearningBenchmark(tasks=("pixels",)), "pixels")

    def images(seed):
        episodes = learn._episodes(held_out, seed, held_out.segments)
        return {tuple(image) for episode in episodes for image in episode.tokens.flatten(1).tolist()}

    chosen, judged = images(learn._VALIDATION), images(learn._TEST)
    assert not chosen & judged
    assert len(chosen | judged) == len({tuple(image) for image in held_out.images.tolist()}) == 355


def test_pixels_are_compared_in_bits():
    pytest.importorskip("sklearn")
    printed = lines(tasks=("pixels",), learning_rates=(1e-3,), seeds=(0,), contestants=("memformer",))
    assert any("of bits in bits by segments of information; chance" in line for line in printed)
    assert sum(" bits at 7" in line for line in printed) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("chess",)}, r"tasks: expected some of copy, .*pixels, got 'chess'"),
        (
            {"contestants": ("RMT",)},
            r"contestants: expected some of memformer, memory off, causal, .*got 'RMT'\. .*-m benchmarks",
        ),
        ({"seeds": (1, 1)}, "seeds: expected one or more, all different, got 1, 1"),
        ({"learning_rates": ()}, "learning_rates: expected one or more"),
        ({"learning_rates": (0.0,)}, "learning_rates: expected a finite number above 0"),
        ({"questions": 2}, "questions: only tasks of pairs ask several, and tasks are retrieval"),
        ({"model": dataclasses.replace(MODEL, heads=3)}, "heads: "),
        ({"steps": 0}, "steps: expected a whole number of at least 1, got 0"),
        ({"plot": Path("a.gif")}, "plot: expected the name of a .png file"),
        ({"out": Path("nowhere/a.json")}, "out: expected a file in a folder that exists"),
    ],
)
def test_mistakes_are_refused_before_the_first_run(settings, message, monkeypatch):
    monkeypatch.setattr(learn, "train", None)
    with pytest.raises(ValueError, match=message):
        lines(**settings)


def test_whoever_is_handed_in_takes_part():
    """By name, in the table's order."""
    entrants = {"other": OWN["memory off"], "memformer": OWN["memformer"]}
    settings = learn.LearningBenchmark(**TINY, learning_rates=(1e-3,), seeds=(0,))
    printed = list(learn.run(settings, entrants))
    start = next(i for i, line in enumerate(printed) if line.startswith("contestant"))
    assert [line.split()[0] for line in printed[start + 1 :]] == ["other", "memformer"]
    assert " 0 " in printed[start + 1], "it carries nothing"


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("/somewhere/bin/memformer", "memformer bench learn --contestants 'memory off'"),
        ("/somewhere/memformer/__main__.py", "python -m memformer bench learn --contestants 'memory off'"),
    ],
)
def test_a_record_says_which_command_made_it(program, command, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", [program, "bench", "learn", "--contestants", "memory off"])
    record = Record(tmp_path / "runs.json", {})
    record.add({"seed": 0}, {"bits": 1})
    assert json.loads((tmp_path / "runs.json").read_text())["runs"][0]["made"]["command"] == command
    assert Record(tmp_path / "runs.json", {}).find({"seed": 0}) == {"bits": 1}


def test_a_contestant_given_twice_and_overlaps_that_fit_some_tasks():
    with pytest.raises(ValueError, match="contestants: expected each once, got memformer, memformer"):
        learn.LearningBenchmark(contestants=("memformer", "memformer"))
    overlapping = dataclasses.replace(MODEL, dec_overlap=2)
    few = {"contestants": ("memformer",), "seeds": (0,), "learning_rates": (1e-3,), "model": overlapping}
    assert any("copy" in line for line in lines(tasks=("copy",), **few))
    with pytest.raises(ValueError, match="dec_overlap: expected at most a segment's 2 tokens, got 3"):
        lines(tasks=("copy", "retrieval"), **few | {"model": dataclasses.replace(MODEL, dec_overlap=3)})
