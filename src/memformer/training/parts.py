"""What a training run is made of, as :func:`~memformer.training.assemble` makes it of settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from .. import replay
from ..data import Document, Lanes, Tokenizer
from ..data.segments import Segment
from ..device import compile_error
from ..model import Memformer
from ..parallel import Ranks, gradient_sync
from ..rollouts import rollout

__all__ = ["Best", "Parts", "Progress", "RolloutLoss"]


class Best(TypedDict):
    """The best evaluation so far."""

    step: int
    loss_nats: float


@dataclass
class Progress:
    """How far a run has come: what changes from step to step, beside what the parts know themselves."""

    step: int = 0
    """Steps that were taken."""
    memory: Tensor | None = None
    """(lanes of this process, slots, dim), carried from the last rollout; None before the first."""
    best: Best | None = None
    evaluations_since_best: int = 0


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run works with, already on its device, and divided among the processes.

    Attributes:
        training, held_out: the documents; of those held out, the ones that are evaluated.
        fingerprint: of the training documents.
        stream: the training documents as segments, in this process's lanes.
        model: has the newest weights.
        average: their moving average by name; empty where the run keeps none.
        rollouts: a :class:`RolloutLoss` of the model, or DistributedDataParallel around one.
        refused: what is wrong with checkpoints that were damaged and set aside on resuming.
    """

    ranks: Ranks
    device: torch.device
    precision: torch.dtype
    training: Sequence[Document]
    held_out: Sequence[Document]
    fingerprint: str
    tokenizer: Tokenizer
    stream: Lanes
    model: Memformer
    average: dict[str, Tensor]
    rollouts: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    refused: Sequence[str] = ()


class RolloutLoss(nn.Module):
    """The loss of a rollout as a module's call, for DistributedDataParallel to wrap.

    Args:
        model: with a decoder.
        options: how the gradients travel.
    """

    def __init__(self, model: Memformer, options: replay.Options):
        super().__init__()
        self.model, self.options = model, options

    def forward(
        self,
        segments: Sequence[Segment],
        mems: Tensor | None,
        divisor: float,
        last: bool,
        watch: replay.MemoryGradients | None,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the memory. Where FSDP divides the model the loss is back-propagated already, and detached.

        Args:
            segments: of one rollout, on the model's device.
            mems: (lanes, slots, dim), the memory before the first; None for the initial memory.
            divisor: what the summed loss is divided by.
            last: whether this is the step's last rollout, after which processes exchange gradients.
            watch: takes down the norms of the memory's gradient.
        """
        method: replay.Method = replay.memory_replay
        switch = gradient_sync(self.model)
        if switch is not None:

            def sync(last_backward: bool) -> None:
                switch(last and last_backward)

            method = functools.partial(replay.accumulate, sync=sync)
        options = dataclasses.replace(self.options, memory_gradients=watch)
        try:
            outcome = rollout(self.model, segments, mems, divisor=divisor, method=method, options=options)
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise ValueError(f"compile: {compile_error(error)}. Leave --compile out to train without it") from error
            raise
        return outcome.loss, outcome.memory
