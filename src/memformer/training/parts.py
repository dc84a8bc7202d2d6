"""What a training run is made of, as :func:`~memformer.training.assemble` makes it of settings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import replay
from ..data import Document, Lanes, Tokenizer
from ..data.segments import Segment
from ..device import compile_error
from ..interface import Memory, SegmentModel
from ..parallel import Ranks, gradient_sync
from ..rollouts import Tally, layers_at_once, rollout

__all__ = [
    "Best",
    "Change",
    "Parts",
    "Progress",
    "RolloutLoss",
    "begun_anew",
    "by_name",
    "differentiate",
    "from_names",
    "only_finite",
    "trained",
]


GRAPHS_BYTES = 256 * 2**20
"""Where nobody says how many graphs to keep: a small model's rollout fits, and then no segment runs twice."""


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
    memory: Memory | None = None
    """Of this process's lanes, carried from the last rollout; None before the first."""
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


def only_finite(memory: Memory) -> tuple[Memory, Tensor]:
    """``(memory, lost)``: zeros for the lanes whose memory is not finite, and how many they are.

    A memory of zeros, which no writer writes, begins anew: see :func:`begun_anew`.
    """
    lost = ~_each_lane(memory, torch.isfinite)

    def cleared(part: Tensor) -> Tensor:
        return part.masked_fill(lost.view(-1, *[1] * (part.dim() - 1)), 0) if part.is_floating_point() else part

    return tree_map(cleared, memory), lost.sum()


def _each_lane(memory: Memory, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """(lanes,): whether it holds for all of a lane's numbers, token ids left out."""
    parts = [holds(part).flatten(1).all(1) for part in tree_leaves(memory) if part.is_floating_point()]
    return torch.stack(parts).all(0)


def by_name(memory: Memory) -> dict[str, Tensor]:
    """A memory's tensors, by the names that checkpoints have for them."""
    if isinstance(memory, Tensor):
        return {"memory": memory}
    return {f"memory/{name}": part for name, part in memory._asdict().items()}


def from_names(tensors: Mapping[str, Tensor], like: Memory) -> Memory:
    """The memory of such tensors, of the kind that ``like`` is of."""
    named = [tensors[name] for name in by_name(like)]
    return named[0] if isinstance(like, Tensor) else type(like)(*named)


def begun_anew(segment: Segment, memory: Memory | None) -> Segment:
    """A segment that begins with the initial memory also in the lanes that :func:`only_finite` gave zeros."""
    if memory is None:
        return segment
    lost = _each_lane(memory, lambda part: part == 0)
    return segment._replace(reset=lost if segment.reset is None else segment.reset | lost)


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that a run changes, by name: all but those of a frozen base."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def differentiate(
    parts: Parts,
    segments: Sequence[Segment],
    memory: Memory | None,
    divisor: Tensor | float,
    last: bool,
    watch: replay.MemoryGradients | None,
    tally: Tally | None,
) -> tuple[Tensor, Memory]:
    """The loss of a rollout and the memory after it, both detached; leaves the gradients. See :class:`RolloutLoss`."""
    segments = [begun_anew(segments[0], memory), *segments[1:]]
    with parts.autocast():
        loss, memory = parts.rollouts(segments, memory, divisor, last, watch, tally)
    if loss.requires_grad:
        parts.scaler.scale(loss).backward()
    return loss.detach(), replay.detach(memory)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run works with, already on its device, and divided among the processes.

    Attributes:
        training, held_out: the documents; of those held out, the ones that are evaluated.
        all_held_out: those of which ``eval_limit`` leaves the ones that are evaluated, before they are encoded.
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
    all_held_out: Sequence[Document]
    fingerprint: str
    held_out_fingerprint: str
    tokenizer: Tokenizer
    stream: Lanes
    model: SegmentModel
    average: dict[str, Tensor]
    rollouts: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    refused: Sequence[str] = ()
    changes: Sequence[Change] = ()
    test: Sequence[Document] = ()
    test_fingerprint: str = ""

    def autocast(self) -> torch.autocast:
        """The run's precision, for what the model computes inside."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)


class RolloutLoss(nn.Module):
    """The loss of a rollout as a module's call, for DistributedDataParallel to wrap.

    Args:
        model: one that predicts.
        options: how the gradients travel.
        keeping: the schedule that keeps so many graphs, in place of that of the options: as many as fit into
            ``GRAPHS_BYTES``. None: the options say it all.
        readout_tokens: see :func:`~memformer.rollouts.rollout`.
    """

    def __init__(
        self,
        model: SegmentModel,
        options: replay.Options,
        keeping: Callable[[int], replay.Schedule] | None = None,
        readout_tokens: int | None = None,
    ):
        super().__init__()
        self.model, self.options, self._keeping, self._readout_tokens = model, options, keeping, readout_tokens

    def forward(
        self,
        segments: Sequence[Segment],
        mems: Memory | None,
        divisor: Tensor | float,
        last: bool,
        watch: replay.MemoryGradients | None,
        tally: Tally | None = None,
    ) -> tuple[Tensor, Memory]:
        """The loss and the memory. Where FSDP divides the model the loss is back-propagated already, and detached.

        Args:
            segments: of one rollout, on the model's device.
            mems: the memory before the first; None for the initial memory.
            divisor: what the summed loss is divided by.
            last: whether this is the step's last rollout, after which processes exchange gradients.
            watch: takes down the norms of the memory's gradient, unless all layers work at once: then no memory is
                between two segments.
            tally: takes down the losses, see :func:`~memformer.rollouts.rollout`.
        """
        if self._keeping is not None:  # measured once: whatever is kept, the gradients are the same
            with _compiling():
                size = replay.measure(self.model.cell, segments[0], mems).graph_bytes
            schedule = self._keeping(max(1, GRAPHS_BYTES // max(1, size)))
            self.options, self._keeping = dataclasses.replace(self.options, schedule=schedule), None
        method: replay.Method = replay.memory_replay
        switch = gradient_sync(self.model)
        if switch is not None:

            def sync(last_backward: bool) -> None:
                switch(last and last_backward)

            method = functools.partial(replay.accumulate, sync=sync)
        at_once = layers_at_once(self.model, segments, self.options)
        options = dataclasses.replace(self.options, memory_gradients=None if at_once else watch)
        with _compiling():
            outcome = rollout(
                self.model,
                segments,
                mems,
                divisor=divisor,
                wavefront=at_once,
                method=method,
                options=options,
                readout_tokens=self._readout_tokens,
                tally=tally,
            )
        return outcome.loss, outcome.memory


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """What compiles when it runs may fail: with a sentence."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise ValueError(f"compile: {compile_error(error)}. Leave --compile out to train without it") from error
        raise
