"""What a training run is made of, as :func:`~memformer.training.assemble` makes it of settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from .. import replay
from ..data import Document, Lanes, Tokenizer
from ..data.segments import Segment
from ..device import compile_error
from ..model import Memformer
from ..parallel import Ranks, gradient_sync
from ..rollouts import Tally, rollout

__all__ = ["Best", "Change", "Parts", "Progress", "RolloutLoss", "begun_anew", "only_finite"]


class Best(TypedDict):
    """The best evaluation so far."""

    step: int
    loss_nats: float


class Change(NamedTuple):
    """A setting that is another one from a step of a run on."""

    name: str
    before: object
    now: object
    meaning: str = ""
    """What follows from it."""

    def __str__(self) -> str:
        values = "" if self.before == self.now else f" {self.before} -> {self.now}"
        return f"{self.name}{values}{self.meaning and f' ({self.meaning})'}"


@dataclass
class Progress:
    """How far a run has come: what changes from step to step, beside what the parts know themselves."""

    step: int = 0
    """Steps that were taken."""
    memory: Tensor | None = None
    """(lanes of this process, slots, dim), carried from the last rollout; None before the first."""
    best: Best | None = None
    evaluations_since_best: int = 0
    skipped: int = 0
    """Steps that changed no weight, because their gradient was not finite."""
    skipped_in_a_row: int = 0
    """The newest ones, at most ``skip_non_finite``; those that fp16's scale made overflow are not among them."""
    tokens: int = 0
    """Targets that counted, of all processes."""
    seconds: float = 0.0
    """Time spent training, over all resumes; see StepMetrics.wall_seconds."""
    due: bool = False
    """Whether the evaluation of this step is still to be made."""


def only_finite(memory: Tensor) -> tuple[Tensor, Tensor]:
    """``(memory, lost)``: zeros for the lanes whose memory (lanes, slots, dim) is not finite, and how many they are.

    A memory of zeros, which no writer writes, begins anew: see :func:`begun_anew`.
    """
    lost = ~memory.isfinite().flatten(1).all(1)
    return memory.masked_fill(lost[:, None, None], 0), lost.sum()


def begun_anew(segment: Segment, memory: Tensor | None) -> Segment:
    """A segment that begins with the initial memory also in the lanes that :func:`only_finite` gave zeros."""
    if memory is None:
        return segment
    lost = (memory == 0).flatten(1).all(1)
    return segment._replace(reset=lost if segment.reset is None else segment.reset | lost)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run works with, already on its device, and divided among the processes.

    Attributes:
        training, held_out: the documents; of those held out, the ones that are evaluated.
        test: documents that training never looks at, for a test at its end; often none.
        fingerprint: of the training documents.
        held_out_fingerprint, test_fingerprint: of all that are held out, and of the test's.
        stream: the training documents as segments, in this process's lanes.
        model: has the newest weights.
        average: their moving average by name; empty where the run keeps none.
        rollouts: a :class:`RolloutLoss` of the model, or DistributedDataParallel around one.
        refused: what is wrong with checkpoints that were found damaged on resuming, and are set aside when it trains.
        changes: the settings that are others than the resumed run's, on purpose.
    """

    ranks: Ranks
    device: torch.device
    precision: torch.dtype
    training: Sequence[Document]
    held_out: Sequence[Document]
    fingerprint: str
    held_out_fingerprint: str
    tokenizer: Tokenizer
    stream: Lanes
    model: Memformer
    average: dict[str, Tensor]
    rollouts: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    refused: Sequence[str] = ()
    changes: Sequence[Change] = ()
    test: Sequence[Document] = ()
    test_fingerprint: str = ""


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
        tally: Tally | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the memory. Where FSDP divides the model the loss is back-propagated already, and detached.

        Args:
            segments: of one rollout, on the model's device.
            mems: (lanes, slots, dim), the memory before the first; None for the initial memory.
            divisor: what the summed loss is divided by.
            last: whether this is the step's last rollout, after which processes exchange gradients.
            watch: takes down the norms of the memory's gradient.
            tally: takes down the losses, see :func:`~memformer.rollouts.rollout`.
        """
        method: replay.Method = replay.memory_replay
        switch = gradient_sync(self.model)
        if switch is not None:

            def sync(last_backward: bool) -> None:
                switch(last and last_backward)

            method = functools.partial(replay.accumulate, sync=sync)
        options = dataclasses.replace(self.options, memory_gradients=watch)
        try:
            outcome = rollout(self.model, segments, mems, divisor=divisor, method=method, options=options, tally=tally)
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise ValueError(f"compile: {compile_error(error)}. Leave --compile out to train without it") from error
            raise
        return outcome.loss, outcome.memory
