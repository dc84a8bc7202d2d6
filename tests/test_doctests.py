"""The examples in the docstrings of the model's public calls run as they stand."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

from memformer import CausalMemformer, Memformer, MemoryState
from memformer.generation import Sampling

CALLS = {
    "causal": ["CausalMemformer"],
    "interface": ["SegmentModel.resize_memory", "SegmentModel.set_writer"],
    "model": ["Memformer"],
    "generation": ["generate", "read", "stream"],
    "sampling": ["Sampling"],
    "state": ["MemoryState.load", "MemoryState.save"],
}
"""The calls that have an example, by module; the names that it may use are made below."""


@pytest.mark.parametrize("module", CALLS)
def test_examples_run_as_they_stand(module: str, tmp_path: Path) -> None:
    model = Memformer(
        dim=32, num_memory_slots=4, enc_num_tokens=257, enc_max_seq_len=16, enc_depth=1,
        dec_num_tokens=257, dec_max_seq_len=17, dec_depth=1,
    ).eval()  # fmt: skip
    names = {
        "torch": torch, "CausalMemformer": CausalMemformer, "Memformer": Memformer, "MemoryState": MemoryState,
        "Sampling": Sampling,
        "model": model, "folder": tmp_path,
    }  # fmt: skip
    found = doctest.DocTestFinder().find(importlib.import_module(f"memformer.{module}"), globs=names)
    examples = {test.name.removeprefix(f"memformer.{module}."): test for test in found if test.examples}
    assert sorted(examples) == CALLS[module]
    for test in examples.values():
        results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
        assert results.failed == 0
