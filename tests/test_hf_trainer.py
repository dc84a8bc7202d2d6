"""MemoryTrainer: its steps are plain back-propagation through the documents, and a resumed run is the same run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback, TrainingArguments

from memformer import Memformer
from memformer.hf import MemoryForCausalLM, MemoryTrainer, MemoryTrainingArguments, PretrainedMemory, with_memory
from processes import two_processes

# PEFT still calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

TOKENS, LENGTH = 37, 4
SIZES = dict(
    vocab_size=TOKENS, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=16,
)  # fmt: skip


def model_of(dropout: float = 0.0, lora: bool = False, dtype: torch.dtype = torch.float64) -> MemoryForCausalLM:
    """A tiny one whose memory matters."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attention_dropout=dropout), dtype=dtype)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if lora:
        base = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).to(dtype)
    model = with_memory(base, 3, LENGTH, read_dim=8, read_heads=2, write_heads=2)
    for reader in model.readers.each:
        torch.nn.init.normal_(reader.to_out.weight, std=0.5)
    return model


def documents(*lengths: int, seed: int = 1) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, TOKENS, length) for length in lengths]


TRAINING = documents(9, 17, 1, 23, 6, 12, 4)
HELD_OUT = documents(5, 14, 1, 9, seed=2)


def arguments(out: Path, **changes: object) -> MemoryTrainingArguments:
    given = dict(
        per_device_train_batch_size=2, horizon=2, max_steps=2, gradient_accumulation_steps=2, learning_rate=0.05,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", spread=False, seed=3,
        use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    return MemoryTrainingArguments(str(out), **{**given, **changes})


def trainer_of(out: Path, model: MemoryForCausalLM | None = None, callbacks: list | None = None, **changes: object):
    model = model_of() if model is None else model
    data = dict(train_dataset=changes.pop("train", TRAINING), eval_dataset=changes.pop("held_out", HELD_OUT))
    optimizers = changes.pop("optimizers", (None, None))
    args = arguments(out, **changes)
    return MemoryTrainer(model, args, callbacks=callbacks, optimizers=optimizers, **data)


def losses(trainer: MemoryTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


# --- A plain loop: lane by lane, every graph kept, no masks -----------------------------------------------------------


def lanes_by_hand(rows: list[np.ndarray], lanes: int, seed: int) -> Iterator[list[tuple[Tensor, bool]]]:
    """For each segment, each lane's tokens, and whether they begin a document."""

    def endless() -> Iterator[np.ndarray]:
        epoch = 0
        while True:
            yield from (rows[i] for i in np.random.default_rng([seed, epoch]).permutation(len(rows)))
            epoch += 1

    source, left = endless(), [np.empty(0, np.int64)] * lanes
    while True:
        parts = []
        for lane in range(lanes):
            fresh = not len(left[lane])
            rest = next(source) if fresh else left[lane]
            parts.append((torch.as_tensor(rest[:LENGTH]), fresh))
            left[lane] = rest[LENGTH:]
        yield parts


def summed(model: MemoryForCausalLM, tokens: Tensor, memory: PretrainedMemory | None) -> tuple[Tensor, int, object]:
    """The nats of some tokens, how many count, and the memory after them."""
    output = model(tokens[None], memory, labels=tokens[None])
    counted = len(tokens) - (memory is None)
    return output.loss * counted, counted, output.memory


def train_by_hand(
    model: MemoryForCausalLM, rows: list[np.ndarray], lanes: int, updates: int, accumulate: int, horizon: int
) -> list[float]:
    """Stochastic gradient descent, written down; returns the losses."""
    stream, found = lanes_by_hand(rows, lanes, seed=3), []
    memories: list[PretrainedMemory | None] = [None] * lanes
    for _ in range(updates):
        nats, count = [], 0
        for _ in range(accumulate):
            memories = [m and PretrainedMemory(*(x.detach() for x in m)) for m in memories]
            for _ in range(horizon):
                for lane, (tokens, fresh) in enumerate(next(stream)):
                    loss, counted, memories[lane] = summed(model, tokens, None if fresh else memories[lane])
                    nats.append(loss)
                    count += counted
        loss = torch.stack(nats).sum() / count
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("accumulate", "horizon", "schedule"), [(2, 3, "every"), (1, 2, "binomial:1")])
def test_training_is_plain_bptt(tmp_path, accumulate, horizon, schedule):
    """Through borders of documents, with the memory carried from step to step, accumulated and in float64."""
    expected, model = model_of(), model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    trainer = trainer_of(
        tmp_path, model, optimizers=(optimizer, None), max_steps=3, gradient_accumulation_steps=accumulate,
        horizon=horizon, schedule=schedule, max_grad_norm=0.0, readout_tokens=3,
    )  # fmt: skip
    trainer.train()
    wanted = train_by_hand(expected, TRAINING, 2, 3, accumulate, horizon)
    assert_close(losses(trainer), wanted, rtol=1e-6, atol=1e-6)
    assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=1e-11)
    assert not torch.equal(model.writer.state_dict()["initial_memory"], model_of().writer.state_dict()["initial_memory"])
