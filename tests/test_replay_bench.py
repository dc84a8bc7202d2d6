"""The benchmarks run, compare gradients before they time anything, and their meters count."""

import pytest
import torch
from torch import nn

from memformer.bench import million
from memformer.bench import replay as bench
from memformer.bench.meters import (
    _Alive,
    _CountTensors,
    gradient_difference,
    live_bytes,
    peak_bytes,
    spread,
    take_gradients,
    taking_turns,
)
from memformer.settings import ModelSettings

SMALL = {
    "batch_size": 1,
    "segment_tokens": 4,
    "vocabulary": 11,
    "model": ModelSettings(dim=8, slots=2, enc_depth=1, dec_depth=1, heads=1, dec_overlap=0, tie_embeddings=False),
    "repeats": 1,
}


def test_replay_benchmark_gives_a_table_per_horizon():
    lines = list(bench.run(bench.ReplayBenchmark(horizons=(2, 6), **SMALL)))
    assert [line for line in lines if line.startswith("horizon")] == ["horizon 2", "horizon 6"]
    names = [
        "plain BPTT",
        "checkpoint per layer",
        "checkpoint per segment",
        "memory replay",
        "  + graphs of the last 6",
    ]
    for name in names:
        assert sum(line.startswith(name) for line in lines) >= 1, name


def test_a_method_with_other_gradients_is_refused(monkeypatch):
    wrong = lambda *args, **options: bench.replay.Rollout(bench.replay.full_bptt(*args).loss * 2, None)  # noqa: E731
    monkeypatch.setattr(bench.replay, "memory_replay", wrong)
    with pytest.raises(RuntimeError, match=r"memory replay: the gradient of .* is off by"):
        list(bench.run(bench.ReplayBenchmark(horizons=(2,), **SMALL)))


def test_million_tokens_reports():
    lines = list(million.run(million.MillionTokens(tokens=64, segment_tokens=4, dim=8, depth=1, stored_memories=2)))
    assert any("at most 2 stored memories" in line for line in lines)
    assert any(line.startswith("64 tokens in 16 segments of 4") for line in lines)
    assert lines[-1].startswith("plain BPTT would hold graphs of 16 segments")


def test_meters_count_bytes():
    weight = torch.ones(1000, requires_grad=True)

    def step():
        (weight.sin().sin() * weight).sum().backward()  # keeps both sines' inputs and the product's

    assert live_bytes(step, []) == 3 * 4000
    assert live_bytes(step, [weight]) == 2 * 4000
    assert 2 * 4000 < peak_bytes(step, torch.device("cpu")) < 8 * 4000


def test_a_card_counts_the_gradients_of_each_step(monkeypatch):
    """Also of the second, which frees those of the first."""
    alive, model = _Alive(), nn.Linear(1000, 100)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: alive.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: alive.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(alive, "most", alive.now))

    def step() -> None:
        model.zero_grad()
        model(torch.ones(1, 1000)).sum().backward()

    with _CountTensors(alive):
        peaks = [peak_bytes(step, torch.device("cuda"), model) for _ in range(3)]
    assert peaks[0] > 4 * 1000 * 100
    assert peaks[1:] == peaks[:1] * 2


def test_peak_counts_only_what_the_step_makes():
    """Views of older tensors are not new bytes."""
    weight = torch.ones(1000, 1000)
    assert peak_bytes(lambda: weight.t()[0] + 1, torch.device("cpu")) == 4000


def test_gradients_are_compared_by_name():
    layer, other = nn.Linear(2, 1), nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    expected = take_gradients(layer)
    assert layer.weight.grad is None
    near = {name: grad * (1 + 1e-5) for name, grad in expected.items()}
    assert gradient_difference("near", near, expected) == pytest.approx(1e-5, rel=0.05)
    with pytest.raises(RuntimeError, match=r"far: the gradient of weight is off by 1\.0e-02 of its norm"):
        gradient_difference("far", {name: grad * 1.01 for name, grad in expected.items()}, expected)
    with pytest.raises(RuntimeError, match="none: weight has a gradient where plain BPTT has none, or none where"):
        gradient_difference("none", take_gradients(other), expected)
    with pytest.raises(RuntimeError, match="nan: the gradient of weight is off by nan"):
        gradient_difference("nan", {name: grad * torch.nan for name, grad in expected.items()}, expected)


def test_steps_take_turns():
    seen = []
    steps = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = taking_turns(steps, 2, torch.device("cpu"))
    assert "".join(seen) == "ababab"
    assert [len(taken) for taken in times.values()] == [2, 2], "the first round does not count"
    assert spread([3.0, 1.0, 2.0, 7.0]) == (1.0, 2.5, 7.0)


@pytest.mark.parametrize(
    "settings",
    [{"horizons": ()}, {"batch_size": 0}, {"segment_tokens": 1}, {"model": ModelSettings(dropout=0.1)}],
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match="expected"):
        bench.ReplayBenchmark(**settings)
