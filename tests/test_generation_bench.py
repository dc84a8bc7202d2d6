"""The benchmark of generation: its equality, its table, its refusal."""

import dataclasses

import pytest

from memformer.bench import generation
from memformer.cli import main
from memformer.nn.positions import Rotary


def test_the_report(capsys):
    command = "bench generate --tokens 1100 --segment-tokens 4 --dim 8 --heads 1 --enc-depth 1 --dec-depth 1 --slots 2"
    assert main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "logits equal those without a cache to" in lines[2]
    assert [line.split()[0] for line in lines[5:]] == ["1,000", "1,100"]
    assert len({line.split()[3] for line in lines[5:]}) == 1, "the state is of one size"


def test_a_wrong_cache_is_refused(monkeypatch):
    monkeypatch.setattr(Rotary, "place", lambda self, x, at: x)
    with pytest.raises(RuntimeError, match="logits differ from those without a cache by"):
        list(generation.run(generation.GenerationBenchmark(tokens=10, segment_tokens=8)))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="tokens: expected a whole number of at least 1, got 0"):
        generation.GenerationBenchmark(tokens=0)
    with pytest.raises(ValueError, match="dec_overlap: this benchmark is of a decoder without one, got 4"):
        generation.GenerationBenchmark(model=dataclasses.replace(generation.MODEL, dec_overlap=4))
