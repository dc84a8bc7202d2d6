"""MemoryTrainer: its steps are plain back-propagation through the documents, and a resumed run is the same run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from memformer import Memformer
from memformer.hf import MemoryForCausalLM, MemoryTrainer, MemoryTrainingArguments, PretrainedMemory, with_memory
from memformer.hf.divided import check_frozen
from test_hf_own import CLASSES, adapter, both, some

pytestmark = [
    # PEFT still calls what transformers has renamed.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    # Trainer of transformers 5.0 counts tokens so.
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
    # Version 5.0 does not trust the times of checkpoints that are written within a second.
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),
]

TOKENS, LENGTH = 37, 4
WEIGHTS = "model.safetensors"
SIZES = dict(
    vocab_size=TOKENS, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=16,
)  # fmt: skip


def model_of(
    dropout: float = 0.0, lora: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: object
) -> MemoryForCausalLM:
    """A tiny one whose memory matters."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, attention_dropout=dropout, **settings), dtype=dtype)
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
    assert not torch.equal(model.writer.initial(1), model_of().writer.initial(1))


def test_stretches_have_a_limit(tmp_path):
    trainer = trainer_of(tmp_path, spread=True, stretch=1, max_steps=1)
    trainer.train()
    assert trainer._stream.stretches == sum(-(-len(row) // LENGTH) for row in TRAINING)
    with pytest.raises(ValueError, match="stretch: documents of an iterable, whose lengths are not known, are not cut"):
        trainer_of(tmp_path, spread=True, stretch=1, max_steps=1, train=iter(TRAINING)).train()


# --- Evaluation -------------------------------------------------------------------------------------------------------


def evaluate_by_hand(model: MemoryForCausalLM, rows: list[np.ndarray]) -> float:
    with torch.no_grad():
        sums = [summed(model, torch.as_tensor(row), None)[:2] for row in rows]
    return float(sum(nats for nats, _ in sums) / sum(count for _, count in sums))


def test_evaluation_reads_each_document_whole_and_once(tmp_path):
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row), "text": "?"} for row in HELD_OUT]
    seen = []

    class Watch(TrainerCallback):
        def on_prediction_step(self, args, state, control, **others):
            seen.append(1)

    trainer = trainer_of(tmp_path, callbacks=[Watch()], per_device_eval_batch_size=2)
    expected = evaluate_by_hand(trainer.model, HELD_OUT)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-12)
    assert found["eval_perplexity"] == pytest.approx(np.exp(expected), rel=1e-12)
    assert found["eval_tokens"] == sum(map(len, HELD_OUT)) - len(HELD_OUT)
    assert seen
    trainer.eval_dataset = {"one": rows[:1], "all": rows}
    found = trainer.evaluate()
    assert found["eval_all_loss"] == pytest.approx(expected, rel=1e-12)
    assert found["eval_one_loss"] == pytest.approx(evaluate_by_hand(trainer.model, HELD_OUT[:1]), rel=1e-12)
    with pytest.raises(ValueError, match=r"predict: logits of whole documents are not kept; evaluate\(documents\)"):
        trainer.predict(HELD_OUT)
    with pytest.raises(ValueError, match="prediction_step: documents are read whole"):
        trainer.prediction_step(trainer.model, {}, True)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def state_of(out: Path, step: int) -> dict:
    """All that a checkpoint holds, but for the time that was taken."""
    folder = out / f"checkpoint-{step}"
    with safe_open(folder / "memory.safetensors", "pt") as file:
        memory = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        lanes = json.loads(file.metadata()["lanes"])
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    history = [line for line in history if "loss" in line]  # the evaluation of an epoch comes after its checkpoint
    optimizer = torch.load(folder / "optimizer.pt")
    return dict(memory=memory, lanes=lanes, history=history, optimizer=optimizer, weights=load_file(folder / WEIGHTS))


class Stream:
    """Documents that can only be gone through."""

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(TRAINING)


@pytest.mark.parametrize(
    ("kind", "killed"),
    [
        (dict(num_train_epochs=2, max_steps=-1, eval_strategy="epoch"), [2, 3]),  # within an epoch, and at its end
        (dict(train=Stream(), max_steps=3), [2]),
    ],
    ids=["documents", "stream"],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, kind, killed):
    how = dict(kind, save_strategy="steps", save_steps=1, learning_rate=1e-2, lr_scheduler_type="linear")
    whole = trainer_of(tmp_path / "whole", model_of(dropout=0.3), **how)
    whole.train()
    steps = whole.state.global_step
    assert steps == (3 if "train" in kind else 6)
    expected = state_of(tmp_path / "whole", steps)
    for step in killed:
        out = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", out / f"checkpoint-{step}")
        torch.manual_seed(100)
        trainer = trainer_of(out, model_of(dropout=0.3), **how)
        trainer.train(resume_from_checkpoint=True)
        found = state_of(out, steps)
        assert_close(found, expected, rtol=0, atol=0)
        assert found["lanes"] == expected["lanes"]
        assert found["history"] == expected["history"]
        assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), whole.model.parameters(), strict=True))
    # And it is no run without the memory and the places.
    with safe_open(out / f"checkpoint-{killed[-1]}" / "memory.safetensors", "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["memory/slots"] += 1e-3
    save_file(tensors, out / f"checkpoint-{killed[-1]}" / "memory.safetensors", about)
    shutil.rmtree(out / f"checkpoint-{steps}")
    trainer = trainer_of(out, model_of(dropout=0.3), **how)
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{killed[-1]}"))
    assert losses(trainer) != losses(whole)


def test_a_checkpoint_in_the_middle_of_an_update_begins_it_again(tmp_path):
    """As Trainer saves one when a machine is about to be taken away: the memory and the places are those before it."""

    class Save(TrainerCallback):
        trainer: MemoryTrainer

        def on_substep_end(self, args, state, control, **others):
            if state.global_step == 1:
                self.trainer._save_checkpoint(self.trainer.model, None)

    how = dict(max_steps=2, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    save = Save()
    save.trainer = whole = trainer_of(tmp_path, callbacks=[save], **how)
    whole.train()
    expected = state_of(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoint-2")
    trainer = trainer_of(tmp_path, **how)
    trainer.train(resume_from_checkpoint=True)
    found = state_of(tmp_path, 2)
    assert found["lanes"] == expected["lanes"]
    assert_close(found["weights"], expected["weights"], rtol=0, atol=0)


OF_TWO = dict(learning_rate=1e-2, include_num_input_tokens_seen="non_padding")


def launched(out: Path) -> None:
    """What each process of a launcher runs; this file is its script."""
    how = dict(max_steps=2, save_strategy="steps", **OF_TWO)
    trainer = trainer_of(out / "plain", save_steps=2, **how)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    found = {"plain": [losses(trainer), trainer.evaluate()["eval_loss"]]}
    for tied in (False, True):
        name, how["divide_base"] = f"divided-{tied}", True
        trainer = trainer_of(out / name, frozen(tied), save_steps=1, **how)
        weights = dict(trainer.model.base.named_parameters())
        held = {n for n, p in weights.items() if hasattr(p, "full_tensor")}
        assert held == {n for n, p in weights.items() if not p.requires_grad and not (tied and "embed" in n)}
        trainer.train()
        found[name] = [losses(trainer), trainer.evaluate()["eval_loss"]]
        shutil.rmtree(out / name / "checkpoint-2", ignore_errors=True)
        dist.barrier()
        again = trainer_of(out / name, frozen(tied, seed=5), save_steps=1, **how)
        again.train(resume_from_checkpoint=str(out / name / "checkpoint-1"))
        found[f"{name}-resumed"] = [losses(again), again.evaluate()["eval_loss"]]
    (out / f"{trainer.args.process_index}.json").write_text(json.dumps(found))
    dist.destroy_process_group()  # or its threads may still be there when the process ends, which then aborts


def frozen(tied: bool, seed: int = 0) -> MemoryForCausalLM:
    return model_of(lora=True, seed=seed, tie_word_embeddings=tied).trainable("lora")


def launch(*flags: str, out: Path) -> list[dict]:
    """This file under ``accelerate launch``, as the documentation has it; returns what each process found."""
    out.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, "--num_processes", "2"]
    command += ["--main_process_port", str(free_port()), __file__, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert not done.returncode, done.stderr[-5000:]
    return [json.loads(file.read_text()) for file in sorted(out.glob("?.json"))]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(tmp_path):
    """In their losses, weights, memories and evaluation; and one goes on with what two have saved."""
    out, how = tmp_path / "two", dict(max_steps=3, save_strategy="steps", save_steps=1, **OF_TWO)
    how["per_device_train_batch_size"] = 4
    first, second = launch("--multi_gpu", out=out)
    assert first == second
    alone = trainer_of(tmp_path / "one", **how)
    alone.train()
    assert_close(first["plain"][0], losses(alone)[:2], rtol=1e-6, atol=0)
    two, one = state_of(out / "plain", 2), state_of(tmp_path / "one", 2)
    assert two["lanes"] == one["lanes"]
    for part in ("weights", "memory"):
        assert_close(two[part], one[part], rtol=0, atol=1e-9)
    seen = [state["history"][-1]["num_input_tokens_seen"] for state in (two, one)]
    assert seen[0] == seen[1] > 0
    between = model_of()
    between.load_state_dict(one["weights"])
    assert first["plain"][1] == pytest.approx(evaluate_by_hand(between, HELD_OUT), rel=1e-9)
    goes_on = trainer_of(out / "plain", **how)
    goes_on.train(resume_from_checkpoint=True)
    assert_close(goes_on.model.state_dict(), alone.model.state_dict(), rtol=0, atol=1e-9)
    # And where each holds a part of the base (FSDP2), also resumed.
    for tied in (False, True):
        name = f"divided-{tied}"
        alone = trainer_of(tmp_path / name, frozen(tied), **{**how, "max_steps": 2})
        alone.train()
        for found in (first[name], first[f"{name}-resumed"]):
            assert_close(found[0], losses(alone), rtol=1e-6, atol=0)
            assert found[1] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-9)
        two, one = state_of(out / name, 2), state_of(tmp_path / name, 2)
        for part in ("weights", "memory", "optimizer"):
            assert_close(two[part], one[part], rtol=0, atol=1e-9)


def test_one_process_where_several_were_asked_for_is_said(tmp_path, monkeypatch):
    """What ``accelerate launch --cpu --num_processes 2`` sets."""
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="starts one process, whatever --num_processes says"):
        trainer_of(tmp_path)


# --- What Trainer's users know ----------------------------------------------------------------------------------------


def test_a_run_as_users_know_it(tmp_path):
    """LoRA, checkpointing of activations, bf16, clipping, the best checkpoint kept and loaded, a folder that loads."""
    name = next(n for n in ("activation", "gradient") if f"{n}_checkpointing" in TrainingArguments.__dataclass_fields__)
    model = model_of(lora=True, dtype=torch.float32).trainable("lora")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    trainer = trainer_of(
        tmp_path, model, max_steps=3, bf16=True, max_grad_norm=0.1, learning_rate=1.0, load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1,
        **{f"{name}_checkpointing": True},
    )  # fmt: skip
    trainer.train()
    best = min((line for line in trainer.state.log_history if "eval_loss" in line), key=lambda line: line["eval_loss"])
    assert trainer.state.best_metric == best["eval_loss"]
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best['step']}"]
    trained = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert trained
    assert all("lora_" in n for n in trained if n.startswith("base."))
    assert any("lora_" in n for n in trained)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best['step']}")
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(horizon=0), "horizon: expected"),
        (dict(schedule="cosine"), "schedule: expected every, binomial:N"),
        (dict(readout_tokens=0), "readout_tokens: expected"),
        (dict(spread=True, stretch=0), "stretch: expected a whole number of at least 1, got 0"),
        (dict(stretch=3), "stretch: with spread=False documents are not cut; leave one of the two out"),
        (
            dict(label_smoothing_factor=0.1),
            "label_smoothing_factor: the loss is the tokens' own. Leave it out, got 0.1",
        ),
        (dict(dataloader_num_workers=2), "dataloader_num_workers: the lanes are drawn in the training process"),
        (dict(auto_find_batch_size=True), "auto_find_batch_size: the number of lanes is part of a run's state"),
        (dict(ignore_data_skip=True), "ignore_data_skip: a checkpoint has the lanes' places"),
        (dict(ddp_find_unused_parameters=True), "processes add up their gradients once a step"),
        (dict(fp16=True), "fp16: in float16 a memory can overflow, and stays so; bf16 has the range"),
        (dict(torch_compile=True), "torch_compile: a memory around a pretrained model is not compiled yet"),
        (dict(fsdp="full_shard"), "fsdp: a rollout does not call the model's forward, .* use divide_base=True"),
        (dict(average_tokens_across_devices=False), "the tokens of all processes count alike"),
        (dict(bf16_full_eval=True), "bf16_full_eval: the memory's writer stays in float32"),
        (dict(optim="adalomo"), "optim: adalomo changes weights while gradients are still being added up"),
        (dict(accelerator_config={"split_batches": True}), "split_batches divides batches, but each process has lanes"),
        (dict(gradient_checkpointing_kwargs={"use_reentrant": True}), "use_reentrant: expected False"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_arguments_that_a_memory_has_no_use_for(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_what_the_trainer_refuses(tmp_path):
    model, args = model_of(), arguments(tmp_path)
    for given, message in (
        (dict(data_collator=print), "data_collator: documents are cut into the segments of lanes, not collated"),
        (dict(compute_metrics=print), "compute_metrics: evaluation keeps no logits of whole documents; leave it out"),
        (dict(compute_loss_func=print), "compute_loss_func: the loss is that of the rollout's tokens"),
        (dict(args=TrainingArguments(str(tmp_path), use_cpu=True)), "args: expected memformer.hf.MemoryTrainingArg"),
        (dict(model=model.base), "model: expected a MemoryForCausalLM, got LlamaForCausalLM; memformer.hf.with_memory"),
        (dict(model=peft.get_peft_model(model_of(), peft.LoraConfig(target_modules=["q_proj"]))), "wrap the base with"),
        (dict(model=Memformer(dim=8, num_memory_slots=2, enc_num_tokens=9, enc_depth=1, enc_heads=1, enc_max_seq_len=4,
                              encoder_only=True, mem_update_attn_heads=1)), "trained by memformer.training"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            MemoryTrainer(**{"model": model, "args": args, **given})


def test_a_base_that_is_trained_is_not_divided():
    model = model_of(lora=True)
    with pytest.raises(ValueError, match="divide_base: expected a frozen base, because what is trained is whole"):
        check_frozen(model.trainable("all"))
    check_frozen(model.trainable("lora"))


def test_documents_that_do_not_fit(tmp_path):
    trainer = trainer_of(tmp_path)
    for rows, message in (
        (None, "train_dataset: training needs documents, got None"),
        (Stream(), "max_steps: expected at least 1, because the length of the documents is not known"),
        ([{"text": "a"}], "train_dataset: expected rows with input_ids, got text; tokenize them first"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], "expected rows without padding"),
        ([{"input_ids": [1, 2], "labels": [-100, 2]}], "other labels have no use; remove them"),
        ([[1, 2], []], "documents: expected non-empty one-dimensional integer arrays"),
        ([[1, 2, TOKENS]], f"train_dataset: token id {TOKENS} is outside"),
    ):
        trainer.args.max_steps = 0 if isinstance(rows, Stream) else 2
        trainer.train_dataset = rows
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_held_out_documents_that_do_not_fit(tmp_path):
    trainer = trainer_of(tmp_path)
    for rows, message in (
        (Stream(), "eval_dataset: expected documents that can be counted and indexed, got Stream"),
        ([], "eval_dataset: expected at least one document, got none"),
        ([[TOKENS]], f"eval_dataset: token id {TOKENS} is outside"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.evaluate(rows)


def test_a_checkpoint_that_does_not_fit(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, horizon=1)
    trainer.train()
    trainer.args.max_steps = 2
    for name, other, message in (
        ("per_device_train_batch_size", 3, "lanes: expected the 2 of the saved stream, got 3"),
        ("seed", 4, "seed: expected 3, that of the saved stream, got 4"),
        ("horizon", 0, "horizon: expected"),
    ):
        before = getattr(trainer.args, name)
        setattr(trainer.args, name, other)
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=True)
        setattr(trainer.args, name, before)
    trainer.train_dataset = TRAINING[1:]
    with pytest.raises(
        ValueError, match=r"the documents of .*, 7 documents of 72 tokens, got 6 documents of 63 tokens"
    ):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1" / "memory.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it has no memory\.safetensors, so the lanes' places are not known"):
        trainer.train(resume_from_checkpoint=True)


if __name__ == "__main__":
    launched(Path(sys.argv[1]))
    os._exit(0)  # a thread of gloo that is still there now and then aborts a process that ends as usual


# --- Trainer itself ---------------------------------------------------------------------------------------------------


def trainer_by_itself(out: Path, model: PreTrainedModel, tokens: Tensor, **changes: object) -> Trainer:
    given = dict(max_steps=2, save_steps=1, learning_rate=1e-3, report_to="none", disable_tqdm=True, use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    data, metrics = dict(train_dataset=rows, eval_dataset=rows), changes.pop("compute_metrics", None)
    return Trainer(model, TrainingArguments(str(out), **{**given, **changes}), compute_metrics=metrics, **data)


@both
def test_an_own_model_goes_on_from_a_checkpoint(kind, tmp_path):
    """The last one by another model, and the best one at the end: by that measure the first, whose loss is greater."""
    measure = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, greater_is_better=True)
    first = trainer_by_itself(tmp_path / "first", adapter(kind).float(), some(4, 9), **measure)
    first.train()
    other = trainer_by_itself(tmp_path / "other", adapter(kind, seed=5).float(), some(4, 9))
    other.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    states = [trainer.model.state_dict() for trainer in (first, other)]
    for step, state in zip((1, 2), states, strict=True):
        saved = CLASSES[kind].from_pretrained(tmp_path / "first" / f"checkpoint-{step}").state_dict()
        assert_close(state, saved, rtol=0, atol=0)
    assert not all(map(torch.equal, *(state.values() for state in states)))


def test_measures_are_of_the_logits_alone(tmp_path):
    for model, tokens in ((model_of(), torch.tensor(np.stack(documents(9, 9)))), (adapter("causal"), some(2, 9))):
        found = []
        trainer = trainer_by_itself(
            tmp_path, model, tokens, compute_metrics=lambda it, found=found: found.append(it.predictions) or {}
        )
        trainer.evaluate()
        assert_close(torch.tensor(found[0]), model(tokens).logits)


def test_smoothed_labels_are_those_of_the_next_tokens(tmp_path):
    """Without a label's share for others the smoothed loss is the loss of the labels that both count."""
    tokens = torch.tensor(np.stack(documents(9, 9)))
    found = [
        trainer_by_itself(tmp_path, model_of(), tokens, label_smoothing_factor=share).evaluate()["eval_loss"]
        for share in (0.0, 1e-9)
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    model, given = adapter("causal"), some(2, 9)
    expected = torch.nn.functional.cross_entropy(model(given).logits[:, :-1].flatten(0, 1), given[:, 1:].flatten())
    smoothed = trainer_by_itself(tmp_path, model, given, label_smoothing_factor=1e-9).evaluate()["eval_loss"]
    assert smoothed == pytest.approx(expected.item(), rel=1e-5)
