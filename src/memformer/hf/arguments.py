"""MemoryTrainingArguments: Trainer's, and what a rollout adds to them; and which of Trainer's a memory has no use for.

They are arguments and no keywords of the trainer, as in the other trainers around this one: so HfArgumentParser makes
flags of them, they are saved beside a checkpoint, and loggers and searches for hyperparameters see them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..config import check_count
from ..replay import Schedule
from ..settings import RolloutSettings

__all__ = ["MemoryTrainingArguments"]

_IN_THE_PROCESS = "the lanes are drawn in the training process, which costs next to nothing"
_WHOLE = "the memory's writer stays in float32"
_NO_LOGITS = "evaluation keeps no logits of whole documents; it gives the loss and the perplexity"
_ADDED_UP = "processes add up their gradients once a step, without DDP's buckets"
_DIVIDED = "a rollout does not call the model's forward, where it gathers what it has divided; use divide_base=True"
_REFUSED = {
    "auto_find_batch_size": "the number of lanes is part of a run's state",
    "label_smoothing_factor": "the loss is the tokens' own",
    "label_names": "documents have no labels; each of their tokens is predicted",
    "group_by_length": "lanes hold documents of any length side by side, without padding",
    "torch_compile": "a memory around a pretrained model is not compiled yet",
    "use_liger_kernel": "its kernels replace a forward that a rollout does not call",
    "fp16": "in float16 a memory can overflow, and stays so; bf16 has the range",
    "fp16_full_eval": _WHOLE,
    "bf16_full_eval": _WHOLE,
    "batch_eval_metrics": _NO_LOGITS,
    "include_for_metrics": _NO_LOGITS,
    "eval_accumulation_steps": _NO_LOGITS,
    "dataloader_drop_last": "there is no last batch: the next document begins where one ends",
    "dataloader_num_workers": _IN_THE_PROCESS,
    "dataloader_persistent_workers": _IN_THE_PROCESS,
    "dataloader_prefetch_factor": _IN_THE_PROCESS,
    "dataloader_multiprocessing_context": _IN_THE_PROCESS,
    "ignore_data_skip": "a checkpoint has the lanes' places, so nothing is read again on resuming",
    "ddp_find_unused_parameters": _ADDED_UP,
    "ddp_bucket_cap_mb": _ADDED_UP,
    "ddp_broadcast_buffers": _ADDED_UP,
    "ddp_static_graph": _ADDED_UP,
    "fsdp": _DIVIDED,
    "deepspeed": _DIVIDED,
    "parallelism_config": _DIVIDED,
}
"""Trainer's arguments that have to stay off, and why."""


@dataclass
class MemoryTrainingArguments(TrainingArguments):
    """The arguments of :class:`MemoryTrainer`: those of ``TrainingArguments``, and these.

    ``per_device_train_batch_size`` is the number of lanes of a process: documents that are read side by side. An epoch
    is as many steps as the documents have tokens for.

    Attributes:
        horizon: segments per rollout: how far gradients go back.
        schedule: which memories replay keeps: ``"every"``; ``"binomial:N"``, at most N; ``"budget:SIZE"`` (such as
            ``budget:2GB``), the fastest way that fits.
        readout_tokens: how many tokens' logits are computed at once; None for what suits the device.
        spread: cut documents that are longer than their fair share into stretches, so that the lanes read different
            text. A stretch begins with a fresh memory, as a document does.
        stretch: segments of a stretch at most, so that memories often begin anew; None for a lane's fair share.
        divide_base: divide the weights of a frozen base among the processes, by FSDP2, so that each holds a part of
            them. What is trained, the memory and a LoRA, is whole in each.

    Raises:
        ValueError: one of these is out of range, or one of Trainer's is set that a memory has no use for.
    """

    horizon: int = field(default=4, metadata={"help": "Segments per rollout: how far gradients go back."})
    schedule: str = field(
        default="every", metadata={"help": "Which memories replay keeps: every, binomial:N or budget:SIZE (2GB)."}
    )
    readout_tokens: int | None = field(
        default=None, metadata={"help": "Tokens whose logits are computed at once; by default what suits the device."}
    )
    spread: bool = field(
        default=True, metadata={"help": "Cut long documents into stretches, so that the lanes read different text."}
    )
    stretch: int | None = field(
        default=None, metadata={"help": "Segments of a stretch, at most; by default a lane's fair share."}
    )
    divide_base: bool = field(
        default=False, metadata={"help": "Divide the weights of a frozen base among the processes, by FSDP2."}
    )

    def __post_init__(self) -> None:
        self._refuse()  # before anything is done about it, such as setting a variable of the environment
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Raise ValueError, with one sentence, for what does not hold."""
        check_count("horizon", self.horizon)
        if self.readout_tokens is not None:
            check_count("readout_tokens", self.readout_tokens)
        if self.stretch is not None:
            check_count("stretch", self.stretch)
            if not self.spread:
                raise ValueError("stretch: with spread=False documents are not cut; leave one of the two out")
        self.replay_schedule()
        self._refuse()
        if not self.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices: the tokens of all processes count alike; leave it out")
        sampling = getattr(self, "train_sampling_strategy", "random")
        if sampling not in ("random", "sequential"):
            raise ValueError(f"train_sampling_strategy: expected random or sequential documents, got {sampling!r}")
        optimizer = str(getattr(self.optim, "value", self.optim))
        if "lomo" in optimizer or "layerwise" in optimizer:
            raise ValueError(
                f"optim: {optimizer} changes weights while gradients are still being added up; use another one"
            )
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name, None):
                raise ValueError(f"accelerator_config: {name} divides batches, but each process has lanes of its own")
        if self._checkpointing().get("use_reentrant"):
            raise ValueError("use_reentrant: expected False, because a rollout differentiates inside of its backward")

    def _refuse(self) -> None:
        for name, why in _REFUSED.items():
            if value := getattr(self, name, None):
                raise ValueError(f"{name}: {why}. Leave it out, got {value!r}")

    def replay_schedule(self) -> Schedule:
        """``schedule`` as the engine takes it."""
        return RolloutSettings(schedule=self.schedule).replay_schedule()

    @property
    def device(self) -> torch.device:
        """Trainer's, but a processor has no number: to cpu:0 transformers 5.0 cannot load an optimizer."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def documents_seed(self) -> int | None:
        """What shuffles the documents, anew in every epoch; None keeps their order."""
        if getattr(self, "train_sampling_strategy", "random") == "sequential":
            return None
        return self.seed if self.data_seed is None else self.data_seed

    def _checkpointing(self) -> Mapping[str, Any]:
        """What is said about checkpointing of activations, which older versions name after gradients."""
        given = (getattr(self, f"{what}_checkpointing_kwargs", None) for what in ("activation", "gradient"))
        return next((kwargs for kwargs in given if isinstance(kwargs, Mapping)), {})
