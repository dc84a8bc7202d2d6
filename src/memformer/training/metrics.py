"""What a run measures, and where it is written: ``metrics.jsonl``, and TensorBoard's files where that is wanted."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation import HeldOut
from ..files import replace_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["MetricsLog", "StepMetrics"]


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics: averages since the previous line, unless marked as the last step's.

    Of steps whose loss is not finite, and which were left out, no loss counts.
    """

    step: int
    loss_nats: float
    bits_per_token: float
    tokens_per_second: float
    learning_rate: float
    """The last step's."""
    gradient_norm: float
    """The last step's, before clipping."""
    skipped: int
    """Steps since the run began that changed nothing, because their gradient was not finite."""
    horizon: int
    """The last step's."""
    memory_gradient: float | None
    """How far credit reaches: the gradient's norm at the memory before the last rollout's second segment, divided by
    the norm before its last segment. None where a rollout has fewer than three segments."""
    self_attention: float
    """The share of the writing attention that slots give themselves, in the last segment: 1 keeps all, 0 nothing."""
    slot_diversity: float
    """1 - the mean cosine of two slots: 0 where all hold the same."""


class MetricsLog:
    """Appends metrics to a run's files, after those of its first ``step`` steps; what a lost step wrote is dropped.

    Raises:
        ValueError: ``tensorboard`` is asked for and not installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, out: Path, step: int, tensorboard: bool):
        self._file = out / "metrics.jsonl"
        self._writer = _tensorboard(out / "tensorboard", step + 1) if tensorboard else None
        if self._file.is_file():
            lines = [line for line in self._file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            replace_file(self._file, "".join(line + "\n" for line in kept))

    def write(self, event: str, metrics: StepMetrics | HeldOut) -> None:
        """One more line, of an event such as "step"."""
        plain = dataclasses.asdict(metrics)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **plain}) + "\n")
        if self._writer is not None:
            for name, value in plain.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(f"{event}/{name}", value, metrics.step)

    def flush(self) -> None:
        """TensorBoard sees everything that was written."""
        if self._writer is not None:
            self._writer.flush()


def _tensorboard(folder: Path, next_step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: not installed; pip install 'memformer-replay[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=next_step)
