"""MemoryTrainer: Trainer of transformers, whose steps are rollouts through the documents in its lanes.

What is *not* Trainer's here: the order of the text (:class:`~memformer.data.Lanes`), the loss of a batch (a rollout
through replay), how processes add up gradients, and what is evaluated (whole documents). All else is.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from .. import replay
from ..checks import check_tokens, plural
from ..data import Lanes
from ..data.lanes import LanesState
from ..data.segments import Segment
from ..evaluation import read_stream, streamed_once
from ..interface import SegmentModel, in_evaluation
from ..parallel import Ranks
from ..rollouts import rollout
from ..training.parts import by_name, from_names
from .arguments import MemoryTrainingArguments
from .divided import check_frozen, divide, whole_state
from .model import MemoryForCausalLM, PretrainedMemory

__all__ = ["MemoryTrainer"]

_FILE = "memory.safetensors"
"""What a checkpoint has beside Trainer's files: each lane's memory, and its place in the documents."""


class _Standing(NamedTuple):
    """Where training stood before a step: the number of steps so far, the lanes' places, and their memory."""

    step: int
    lanes: LanesState
    memory: PretrainedMemory | None


class MemoryTrainer(Trainer):
    """Trains a :class:`MemoryForCausalLM` on whole documents, as ``Trainer`` trains other models on rows.

    A step reads ``horizon`` segments in each of ``per_device_train_batch_size`` lanes and back-propagates through all
    of them by replay, at the memory of one. Lanes go on where they stood, with the memory that they had; where a
    document ends, the next one begins in that lane with a fresh memory. Losses are nats per token. A checkpoint has the
    memory and the lanes' places, so a run that is killed and resumed is the run that was not, bit for bit.

    Args:
        model: a :class:`MemoryForCausalLM`; :func:`with_memory` makes one.
        args: a :class:`MemoryTrainingArguments`.
        train_dataset: the documents: a sequence of one-dimensional arrays of token ids, or a dataset whose rows have
            them as ``input_ids``; each row is a document, of any length. ``labels`` must be these tokens, and an
            ``attention_mask`` without zeros; other columns are not looked at. Where rows can only be gone through (a
            stream), ``max_steps`` is needed, they are not shuffled, and resuming goes through them again.
        eval_dataset: the same, or a dictionary of several. :meth:`evaluate` reads each document once, whole, with a
            memory of its own, and gives ``eval_loss`` in nats per token, ``eval_perplexity`` and ``eval_tokens``.
        processing_class, model_init, callbacks, optimizers, optimizer_cls_and_kwargs: as of ``Trainer``.
        data_collator, compute_loss_func, compute_metrics, preprocess_logits_for_metrics: refused.

    Raises:
        ValueError: the model or the arguments are of another kind, or something is asked for that a memory cannot do;
            when it is read, a row with padding, or with labels that leave out some of its tokens.
    """

    args: MemoryTrainingArguments
    model: MemoryForCausalLM
    control: Any

    def __init__(
        self,
        model: MemoryForCausalLM | None = None,
        args: MemoryTrainingArguments | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., MemoryForCausalLM] | None = None,
        compute_loss_func: None = None,
        compute_metrics: None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: None = None,
    ):
        for name, given, why in (
            ("data_collator", data_collator, "documents are cut into the segments of lanes, not collated"),
            ("compute_loss_func", compute_loss_func, "the loss is that of the rollout's tokens"),
            ("compute_metrics", compute_metrics, "evaluation keeps no logits of whole documents"),
            ("preprocess_logits_for_metrics", preprocess_logits_for_metrics, "evaluation keeps no logits"),
        ):
            if given is not None:
                raise ValueError(f"{name}: {why}; leave it out")
        args = MemoryTrainingArguments() if args is None else args
        if not isinstance(args, MemoryTrainingArguments):
            raise ValueError(
                f"args: expected memformer.hf.MemoryTrainingArguments, which has Trainer's and the horizon, got "
                f"{type(args).__name__}"
            )
        if model is not None:
            _check_model(model)
        self._divided = args.divide_base and args.world_size > 1
        self._whole_state: dict[str, Any] | None = None
        if self._divided:
            if model is None:
                raise ValueError("divide_base: expected the model itself, got model_init")
            divide(model, args.device)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        _check_model(self.model)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} accelerators in one process: start a process for each, with torchrun or accelerate "
                "launch, or show it one alone (CUDA_VISIBLE_DEVICES=0)"
            )
        _warn_of_one_process(os.environ)
        kind = self.accelerator.distributed_type.value
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise ValueError(
                f"{kind}: choose plain data parallelism (accelerate launch --multi_gpu, or torchrun); the argument "
                "divide_base=True divides a frozen base among the processes, by FSDP2"
            )
        if (
            getattr(self.accelerator.state, "dynamo_plugin", None)
            and self.accelerator.state.dynamo_plugin.backend != "NO"
        ):
            raise ValueError("dynamo: a memory around a pretrained model is not compiled yet; choose no backend")
        if self._divided:
            # DDP would wrap a model that nobody calls, and knows no divided weights.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
            for parameter in self.model.parameters():
                if not hasattr(parameter, "full_tensor"):
                    dist.broadcast(parameter.data, src=0)
        self.model_accepts_loss_kwargs = True  # a loss is divided by the tokens of all of an update's rollouts
        self._resumed_from: str | None = None
        self._stream: Lanes | None = None
        self._memory: PretrainedMemory | None = None
        self._before: _Standing | None = None

    # --- The text, in lanes -------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As ``Trainer.train``.

        Raises:
            ValueError: the documents do not fit the model; or those of a checkpoint were others, or had other lanes.
        """
        self._resumed_from = resume_from_checkpoint or None  # type: ignore[assignment]
        if resume_from_checkpoint is True:
            self._resumed_from = get_last_checkpoint(self.args.output_dir)
        self._stream = self._memory = self._before = None
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def get_train_dataloader(self) -> DataLoader:
        """The numbers of an epoch's rollouts; the text itself is drawn from the lanes when its turn comes.

        So Trainer may skip what was trained before it was resumed, without reading it again.
        """
        if self._stream is None:
            self._begin()
        assert self._stream is not None
        if self._stream.sizes is None:
            if self.args.max_steps <= 0:
                raise ValueError("max_steps: expected at least 1, because the length of the documents is not known")
            return _numbers(self.args.max_steps * self.args.gradient_accumulation_steps)
        segments = int((-(-self._stream.sizes // self._stream.length)).sum())
        return _numbers(math.ceil(segments / (self._stream.rows * self.accelerator.num_processes * self.args.horizon)))

    def num_examples(self, dataloader: DataLoader) -> int:
        """What Trainer counts as examples: rollouts of one lane."""
        return len(dataloader) * self.args.train_batch_size * self.accelerator.num_processes

    def _begin(self) -> None:
        """Put the documents into lanes, at their beginning or where a checkpoint stood."""
        self.args.check()  # they may have been changed since
        if self.args.divide_base:
            check_frozen(self.model)
        documents = self.train_dataset
        if documents is None:
            raise ValueError("train_dataset: training needs documents, got None")
        processes, indexed = self.accelerator.num_processes, _indexed(documents)
        if self.args.stretch is not None and not indexed:
            raise ValueError(
                "stretch: documents of an iterable, whose lengths are not known, are not cut; leave it out"
            )
        once = not indexed and iter(documents) is documents
        self._stream = Lanes(
            _Documents("train_dataset", documents) if indexed else documents,
            lanes=self.args.train_batch_size * processes,
            length=self.model.config.segment_length,
            start=0,  # which such a model does not read
            seed=self.args.documents_seed if indexed else None,
            epochs=1 if once else None,
            rank=self.accelerator.process_index,
            world_size=processes,
            encode=None if indexed else functools.partial(_tokens, "train_dataset"),
            spread=indexed and self.args.spread,
            stretch=self.args.stretch,
        )
        if self._resumed_from is not None:
            self._restore(self._resumed_from)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The rollouts of an update, and how many tokens of all processes count in them.

        A rollout is ``input_ids`` and ``attention_mask``, (lanes, horizon * segment_length), and ``reset``,
        (lanes, horizon), True where a document begins.
        """
        assert self._stream is not None
        self._before = _Standing(self.state.global_step, self._stream.state_dict(), self._memory)
        batches, counted = [], 0
        for _ in itertools.islice(epoch_iterator, num_batches):
            segments = [self.model.of_stream(segment) for segment in self._stream.rollout(self.args.horizon)]
            if not segments:
                break
            counted += sum(int(self.model.counted(segment).sum()) for segment in segments)
            batches.append(_batch(segments))
            check_tokens("train_dataset", batches[-1]["input_ids"], self.model.config.vocabulary, sys.maxsize, "")
        total = self.accelerator.gather(torch.tensor(counted, device=device)).sum()
        return batches, total.clamp(min=1)

    # --- One step -----------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The gradients of a rollout. After the last one of an update, those of all processes are added up."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._add_up()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of a rollout, by replay: its nats over the tokens of the whole update. Advances the lanes' memory.

        Raises:
            ValueError: outputs are asked for, or the tokens of the update are not given.
        """
        if return_outputs or num_items_in_batch is None:
            raise ValueError("compute_loss: expected to be called in a step of train(); evaluate() gives other losses")
        with self.accelerator.autocast():
            outcome = rollout(
                self.model,
                _segments(inputs, self.model.config.segment_length),
                self._memory,
                divisor=num_items_in_batch / self.accelerator.num_processes,  # the processes' losses become their mean
                method=replay.accumulate if self._divided else replay.memory_replay,
                schedule=self.args.replay_schedule(),
                readout_tokens=self.args.readout_tokens,
            )
        self._memory = replay.detach(outcome.memory)
        # The gradients that accumulate has added are there: Trainer's backward has nothing left to do.
        return outcome.loss.requires_grad_() if self._divided else outcome.loss

    def _add_up(self) -> None:
        """The mean of the processes' gradients. One that no rollout reached (the writer's, at horizon 1) is zero.

        Replay gives each parameter's gradient at its end, so nothing is lost by waiting for the last one.
        """
        gradients = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        processes = self.accelerator.num_processes
        if processes > 1:
            for waiting in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                waiting.wait()
            torch._foreach_div_(gradients, processes)

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Lanes:
        """The held-out documents, or those of that name, in this process's lanes, each once."""
        documents = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(documents, str):
            documents = self.eval_dataset[documents]
        if documents is None or not _indexed(documents):
            raise ValueError(
                f"eval_dataset: expected documents that can be counted and indexed, got {type(documents).__name__}"
            )
        if not len(documents):
            raise ValueError("eval_dataset: expected at least one document, got none")
        sequences = list(_Documents("eval_dataset", documents))
        stream = streamed_once(sequences, self.model.config.segment_length, self.args.eval_batch_size, 0)
        for tokens in sequences:
            ids = torch.as_tensor(np.asarray(tokens), dtype=torch.int64)
            check_tokens("eval_dataset", ids[None], self.model.config.vocabulary, sys.maxsize, "")
        return stream

    def evaluation_loop(
        self,
        dataloader: Lanes,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Read documents whole, and count each token once. The metrics are nats per token, and the perplexity."""

        def report(tokens: int) -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        self.callback_handler.eval_dataloader = dataloader
        if callable(getattr(self.optimizer, "eval", None)):  # of optimizers that train other weights than they give
            self.optimizer.eval()
        with in_evaluation(self.model), torch.no_grad(), self.accelerator.autocast():
            sums = read_stream(self.model, dataloader, True, self.args.device, report).sums
        nats, tokens = Ranks().sum(sums).sum(1).tolist()
        loss = nats / max(tokens, 1)
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(tokens)}
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(dataloader.documents),  # type: ignore[arg-type]
        )

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused. Raises ValueError."""
        raise ValueError("predict: logits of whole documents are not kept; evaluate(documents) gives their loss")

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Refused. Raises ValueError."""
        raise ValueError("prediction_step: documents are read whole, see evaluation_loop; call evaluate(documents)")

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self.args.save_only_model:
            self._save_lanes(os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer.save_model``; all processes have to call it."""
        self._whole_state = whole_state(self.model) if self._divided else None
        super().save_model(output_dir, _internal_call)
        self._whole_state = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, self._whole_state if state_dict is None else state_dict)

    def _save_lanes(self, folder: str) -> None:
        """Written before all else, so that a checkpoint which is whole has it."""
        stream = self._stream
        assert stream is not None
        lanes, memory = stream.state_dict(), self._memory
        if self._before is not None and self._before.step == self.state.global_step:  # in the middle of an update
            _, lanes, memory = self._before
        tensors = {} if memory is None else {name: Ranks().gather(x) for name, x in by_name(memory).items()}
        if not self.args.should_save:
            return
        os.makedirs(folder, exist_ok=True)
        tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
        about = {"lanes": json.dumps(lanes), "documents": _described(stream)}
        save_file(tensors, os.path.join(folder, _FILE), metadata=about)

    def _restore(self, folder: str) -> None:
        """The lanes and their memory, as a checkpoint has them; with another number of processes, too."""
        path, stream = os.path.join(folder, _FILE), self._stream
        assert stream is not None
        if not os.path.isfile(path):
            raise ValueError(
                f"{folder}: it has no {_FILE}, so the lanes' places are not known; is it a checkpoint of "
                "MemoryTrainer, without save_only_model?"
            )
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["documents"] != _described(stream):
            raise ValueError(
                f"train_dataset: expected the documents of {folder}, {about['documents']}, got {_described(stream)}"
            )
        stream.load_state_dict(json.loads(about["lanes"]))
        if tensors:
            memory = from_names(tensors, self.model.get_initial_mem(1))
            self._memory = tree_map(lambda part: Ranks().own(part).to(self.args.device), memory)


class _Documents(Sequence):
    """The rows of a dataset that can be counted and indexed, as tokens."""

    def __init__(self, name: str, rows: Any):
        self._name, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        return _tokens(self._name, self._rows[index])


def _tokens(name: str, row: Any) -> Any:
    """The token ids of a row.

    Raises:
        ValueError: it has none, or padding, or labels that are not the tokens themselves.
    """
    if not isinstance(row, Mapping):
        return row
    if "input_ids" not in row:
        raise ValueError(f"{name}: expected rows with input_ids, got {', '.join(map(str, row))}; tokenize them first")
    tokens = row["input_ids"]
    if not np.all(np.asarray(row.get("attention_mask", 1))):
        raise ValueError(f"{name}: expected rows without padding; tokenize with padding=False")
    if "labels" in row and not np.array_equal(np.asarray(row["labels"]), np.asarray(tokens)):
        raise ValueError(f"{name}: each token of a document is predicted, so other labels have no use; remove them")
    return tokens


def _indexed(documents: Any) -> bool:
    return hasattr(documents, "__len__") and hasattr(documents, "__getitem__")


def _described(stream: Lanes) -> str:
    """What can be told of the documents without reading them again."""
    if stream.sizes is None:
        return "a stream"
    return f"{plural(len(stream.sizes), 'document')} of {plural(int(stream.sizes.sum()), 'token')}"


def _numbers(count: int) -> DataLoader:
    return DataLoader(range(count), batch_size=1)  # type: ignore[arg-type]


def _batch(segments: Sequence[Segment]) -> dict[str, Tensor]:
    """The segments of a rollout as one batch, by the names that Trainer knows."""
    sources, masks, resets = zip(*(segment[:3] for segment in segments), strict=True)
    return {
        "input_ids": torch.cat(sources, 1),
        "attention_mask": torch.cat(masks, 1),
        "reset": torch.stack(resets, 1),
    }


def _segments(batch: Mapping[str, Tensor], length: int) -> list[Segment]:
    """What :func:`_batch` was given."""
    parts = batch["input_ids"].split(length, 1), batch["attention_mask"].split(length, 1), batch["reset"].unbind(1)
    return [Segment(*each) for each in zip(*parts, strict=True)]


def _warn_of_one_process(environment: Mapping[str, str]) -> None:
    """``accelerate launch --cpu`` tells where processes meet if it is asked for several, and starts one."""
    alone = not any(environment.get(name) for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if alone and environment.get("ACCELERATE_USE_CPU") == "True" and environment.get("MASTER_PORT"):
        warnings.warn(
            "accelerate launch --cpu starts one process, whatever --num_processes says, unless mpirun starts the "
            "others: for several on a CPU use accelerate launch --multi_gpu --num_processes N, or torchrun, and the "
            "argument use_cpu=True",
            stacklevel=3,
        )


def _check_model(model: Any) -> None:
    """Raise ValueError unless it is a model with a memory, and PEFT is inside of it."""
    if isinstance(model, MemoryForCausalLM):
        return
    name = type(model).__name__
    hint = "memformer.hf.with_memory makes one"
    if hasattr(model, "peft_config") and isinstance(getattr(model, "base_model", None), nn.Module):
        hint = "wrap the base with PEFT first, then with_memory, and train trainable('lora')"
    elif isinstance(model, SegmentModel):
        hint = "the library's own models are trained by memformer.training"
    raise ValueError(f"model: expected a MemoryForCausalLM, got {name}; {hint}")
