"""Python's callers get the sentence that flags get: wrong types are refused by name, numpy's integers are integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memformer import Memformer, MemformerConfig
from memformer.config import Typed
from memformer.settings import (
    ComputeSettings,
    DocumentSettings,
    EvaluationSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    OutputSettings,
    RolloutSettings,
    TrainingConfig,
    to_yaml,
)

SETTINGS = [
    ComputeSettings,
    DocumentSettings,
    EvaluationSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    OutputSettings,
    RolloutSettings,
    TrainingConfig,
]
SMALL = dict(
    dim=8, num_memory_slots=2, mem_update_attn_heads=2, enc_num_tokens=300, enc_depth=1, enc_heads=2,
    enc_max_seq_len=4, dec_num_tokens=300, dec_depth=1, dec_heads=2, dec_max_seq_len=5,
)  # fmt: skip


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_python_gives_settings_as_files_do() -> None:
    settings = TrainingConfig(data=["a", Path("b")], out="x", steps=np.int64(3), seed=np.uint8(2))  # type: ignore[arg-type]
    assert settings == TrainingConfig(data=(Path("a"), Path("b")), out=Path("x"), steps=3, seed=2)
    assert type(settings.steps) is int
    assert "steps: 3\n" in to_yaml(settings)
    assert TrainingConfig(data="one.txt").data == (Path("one.txt"),)  # type: ignore[arg-type]
    assert OptimizerSettings(learning_rate=np.float32(0.5)).learning_rate == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(steps=3.5), r"steps: expected a whole number, got 3\.5"),
        (lambda: TrainingConfig(steps="3"), "steps: expected a whole number, got '3'"),
        (lambda: TrainingConfig(steps=True), "steps: expected a whole number, got True"),
        (lambda: TrainingConfig(device=3), "device: expected text, got 3"),
        (lambda: TrainingConfig(out=""), "out: expected a path, got ''"),
        (lambda: TrainingConfig(out=None), "out: expected a path, got None"),
        (lambda: TrainingConfig(data=[3]), "data: expected a path, got 3"),
        (lambda: TrainingConfig(data=[""]), "data: expected a path, got ''"),
        (lambda: TrainingConfig(resume=1), "resume: expected true or false, got 1"),
        (lambda: TrainingConfig(model={"dim": 3}), r"model: expected ModelSettings\(\.\.\.\), got {'dim': 3}"),
        (lambda: ComputeSettings(precision="float16"), "precision: expected one of auto, .*, fp16, got 'float16'"),
        (lambda: ComputeSettings(precision=[]), r"precision: expected one of auto, .*, fp16, got \[\]"),
        (lambda: OptimizerSettings(learning_rate="fast"), "learning_rate: expected a number, got 'fast'"),
        (lambda: OptimizerSettings(learning_rate=float("nan")), "learning_rate: expected a number, got nan"),
        (lambda: RolloutSettings(schedule=None), "schedule: expected text, got None"),
        (lambda: MemformerConfig(**{**SMALL, "dim": "64"}), "dim: expected a whole number of at least 1, got '64'"),
        (lambda: MemformerConfig(**{**SMALL, "enc_heads": 2.0}), "enc_heads: expected a whole number .* got 2.0"),
        (lambda: MemformerConfig(**{**SMALL, "dim": True}), "dim: expected a whole number of at least 1, got True"),
        (lambda: MemformerConfig(**{**SMALL, "tie_embeddings": "no"}), "tie_embeddings: expected true or false"),
        (lambda: MemformerConfig(**{**SMALL, "dropout": False}), "dropout: expected a number, got False"),
    ],
)
def test_a_wrong_type_is_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize("cls", [*SETTINGS, MemformerConfig])
def test_every_field_of_every_settings_class_is_checked(cls: type) -> None:
    assert issubclass(cls, Typed)
    given = SMALL if cls is MemformerConfig else {}
    for field in dataclasses.fields(cls):
        for wrong in (object(), [object()], b"x", {}):
            with pytest.raises(ValueError, match=f"{field.name}: "):
                cls(**{**given, field.name: wrong})


def test_a_model_of_numpys_integers_can_be_saved(tmp_path: Path) -> None:
    model = Memformer(**{name: np.int32(x) for name, x in SMALL.items()})
    model.save_pretrained(tmp_path)
    assert Memformer.from_pretrained(tmp_path).config == MemformerConfig(**SMALL) == model.config
