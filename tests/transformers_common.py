"""The tests that transformers runs over its own models, over those of ``memformer.hf``. By hand, not in the suite.

They are in transformers' source, which has to be of the version that is installed::

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers
    pip install parameterized
    TRANSFORMERS_SOURCE=transformers python -m pytest -o addopts= -o filterwarnings=ignore tests/transformers_common.py

Its unpacked source distribution will do, too, with an empty file ``tests/__init__.py`` put into it, but has no tests of
generation. What cannot hold is in :data:`MEMORY` and :data:`OWN`, with the reason, and is counted as skipped;
docs/pretrained.md lists it.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from typing import Any, ClassVar

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig

from memformer.hf import (
    CausalMemformerForCausalLM,
    HFCausalConfig,
    HFMemformerConfig,
    MemformerForCausalLM,
    MemoryConfig,
    MemoryForCausalLM,
)
from memformer.hf.bases import settings_of

TOKENS, LENGTH, WIDTH, LAYERS, HEADS = 99, 8, 32, 2, 2
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

_NO_OTHERS = "generate refuses arguments that these models do not take, so none has to be passed on"
MEMORY = {
    "test_correct_missing_keys": "a folder of the base alone is refused; with_memory puts a memory around one",
    "test_prepare_inputs_for_generation_kwargs_forwards": _NO_OTHERS,
}
"""What does not hold for a memory around a base, and why."""
_FIXED = "the vocabulary of the library's own models is fixed, which resizing says"
OWN = {
    "test_prepare_inputs_for_generation_kwargs_forwards": _NO_OTHERS,
    "test_resize_tokens_embeddings": _FIXED,
    "test_model_get_set_embeddings": _FIXED,
    "test_retain_grad_hidden_states_attentions": "hidden states are joined from segments, not on the way to the logits",
}
"""What does not hold for the library's own models; beside it, they keep no attention weights (``has_attentions``)."""

ABSENT = {
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
}
"""What the tests import and a source distribution lacks."""


def _theirs() -> Any:
    source = os.environ.get("TRANSFORMERS_SOURCE")
    if not source:
        pytest.skip("TRANSFORMERS_SOURCE: expected the folder of transformers' source", allow_module_level=True)
    sys.path.insert(0, source)
    for name, parts in ABSENT.items():
        if not os.path.exists(os.path.join(source, *name.split(".")) + ".py"):
            sys.modules[name.rpartition(".")[0]] = types.ModuleType(name.rpartition(".")[0])
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(parts)
    return importlib.import_module("tests.test_modeling_common"), importlib.import_module(
        "tests.test_configuration_common"
    )


MODELS, CONFIGURATIONS = _theirs()


class Maker:
    """What their tests ask of a kind of model: a tiny configuration, and inputs."""

    batch_size, seq_length, is_training = 3, 13, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = TOKENS, WIDTH, LAYERS, HEADS

    def __init__(self, config: type[PreTrainedConfig], settings: dict[str, Any]):
        self.config, self.settings = config, settings

    def get_config(self) -> PreTrainedConfig:
        return self.config(**self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        tokens = torch.randint(5, TOKENS, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class Common:
    """All of their tests, of one of our classes."""

    config_class: ClassVar[type[PreTrainedConfig]]
    settings: ClassVar[dict[str, Any]]
    refused: ClassVar[dict[str, str]]

    def setUp(self) -> None:
        if reason := self.refused.get(self._testMethodName):  # type: ignore[attr-defined]
            self.skipTest(reason)  # type: ignore[attr-defined]
        self.model_tester = Maker(self.config_class, self.settings)
        self.config_tester = CONFIGURATIONS.ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality=True,
            common_properties=["hidden_size", "num_hidden_layers", "num_attention_heads"],
            **self.settings,
        )

    def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> Any:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)  # type: ignore[misc]
        return inputs | ({"labels": inputs["input_ids"].clone()} if return_labels else {})

    def check_training_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """In one segment, after which nothing reads what was written: they count on layers that run once in a call."""
        self.model_tester.seq_length, self.test_all_params_have_gradient = LENGTH, False
        super().check_training_gradient_checkpointing(*args, **kwargs)  # type: ignore[misc]

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class TestMemory(Common, MODELS.ModelTesterMixin, MODELS.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (MemoryForCausalLM,)
    config_class, refused = MemoryConfig, MEMORY
    settings: ClassVar[dict[str, Any]] = dict(
        base=settings_of(
            LlamaConfig(
                vocab_size=TOKENS, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
                num_attention_heads=HEADS, max_position_embeddings=64, **SPECIAL,
            )
        ),
        slots=3, segment_length=LENGTH, read_dim=8, read_heads=2, write_heads=2, **SPECIAL,
    )  # fmt: skip

    def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(self) -> Any:
        """One segment: hidden states that are joined from several are not on the way to the logits."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {name: x[:, :LENGTH] for name, x in inputs.items()}


class TestCausal(Common, MODELS.ModelTesterMixin, MODELS.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (CausalMemformerForCausalLM,)
    config_class, refused, has_attentions = HFCausalConfig, OWN, False
    settings: ClassVar[dict[str, Any]] = dict(
        dim=WIDTH, num_memory_slots=3, num_tokens=TOKENS, max_seq_len=LENGTH, depth=LAYERS, heads=HEADS,
        mem_update_attn_heads=2, start_token_id=1, end_token_id=1,
    )  # fmt: skip


class TestMemformer(Common, MODELS.ModelTesterMixin, MODELS.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (MemformerForCausalLM,)
    config_class, refused, has_attentions = HFMemformerConfig, OWN, False
    settings: ClassVar[dict[str, Any]] = dict(
        dim=WIDTH, num_memory_slots=3, enc_num_tokens=TOKENS, dec_num_tokens=TOKENS, enc_max_seq_len=LENGTH,
        dec_max_seq_len=LENGTH + 1, enc_depth=LAYERS, dec_depth=LAYERS, enc_heads=HEADS, dec_heads=HEADS, dec_overlap=2,
        mem_update_attn_heads=2, start_token_id=1, end_token_id=1,
    )  # fmt: skip
