"""Text without an end: are the time per token and the process's memory those of the beginning?"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import check_count
from ..generation import Stream
from ..model import Memformer
from ..settings import ModelSettings
from .meters import ProcessMeter, check_no_dropout, machine

__all__ = ["GenerationBenchmark", "run"]

MODEL = ModelSettings(dim=128, slots=32, enc_depth=2, dec_depth=2, heads=2, dec_overlap=0, tie_embeddings=False)

_START = 256


@dataclass(frozen=True, kw_only=True)
class GenerationBenchmark:
    """Time per token and memory while one long text is written, a byte at a time."""

    tokens: int = 100_000
    """Length of the text."""
    segment_tokens: int = 128
    """Tokens in a segment."""
    model: ModelSettings = MODEL
    compiled: bool = False
    """Compile the decoder's step."""
    seed: int = 0
    """For parameters and choices."""

    def __post_init__(self) -> None:
        for name in ("tokens", "segment_tokens"):
            check_count(name, getattr(self, name))
        check_no_dropout(self.model)
        if self.model.dec_overlap:
            raise ValueError(f"dec_overlap: this benchmark is of a decoder without one, got {self.model.dec_overlap}")


def run(settings: GenerationBenchmark) -> Iterator[str]:
    """Yield the lines of a report; the process's growth is honest in a fresh process (Linux).

    Raises:
        RuntimeError: the text differs from one written without a cache.
    """
    yield machine(torch.device("cpu"))
    torch.manual_seed(settings.seed)
    config = settings.model.memformer_config(_START + 1, settings.segment_tokens)
    model = Memformer(**config.to_dict()).eval()
    parameters = sum(p.numel() for p in model.parameters())
    yield f"{parameters:,} parameters, segments of {settings.segment_tokens}, {config.num_memory_slots} slots"
    if settings.compiled:
        assert model.decoder is not None
        model.decoder.compile_step(fullgraph=True)
    yield f"logits equal those without a cache to {_largest_difference(model):.0e}, over three segments"

    stream = _stream(model, settings.tokens, torch.Generator().manual_seed(settings.seed))
    yield "over the last 1,000 tokens before each: the median does not see the segments' ends, the rate does"
    yield "     token   median ms per token   tokens/s   bytes of state   process grown since the first line"
    times: deque[float] = deque(maxlen=1_000)
    meter: ProcessMeter | None = None
    points = _points(settings.tokens)
    for count in range(1, settings.tokens + 1):
        begun = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - begun)
        if count in points:
            meter = meter or ProcessMeter()
            grown = meter.grown()
            row = f"{count:>10,}{statistics.median(times) * 1e3:>22.3f}{len(times) / sum(times):>11,.0f}"
            yield f"{row}{stream.state.nbytes:>17,}" + ("" if grown is None else f"{grown / 1e6:>32.1f} MB")


def _points(last: int) -> set[int]:
    """1,000, 2,000, 5,000, 10,000, ... and the last."""
    return {last} | {n for n in (x * 10**e for e in range(3, 12) for x in (1, 2, 5)) if n < last}


def _stream(model: Memformer, count: int, generator: torch.Generator) -> Stream:
    return model.stream(torch.empty(1, 0, dtype=torch.int64), count, start=_START, generator=generator)


@torch.no_grad()
def _largest_difference(model: Memformer) -> float:
    """Between the logits of a stream and those of the decoder called on each segment at once."""
    assert model.decoder is not None
    step, seen = model.decoder.step, list[Tensor]()

    def recording(*arguments: Any) -> Tensor:
        seen.append(step(*arguments))
        return seen[-1]

    model.decoder.step = recording  # type: ignore[method-assign, assignment]
    length = model.config.segment_length
    text = torch.cat(list(_stream(model, 3 * length, torch.Generator().manual_seed(0))))[None]
    model.decoder.step = step  # type: ignore[method-assign]
    source, memory, expected = torch.tensor([[_START]]), None, []
    for segment in text.split(length, 1):
        encoded, memory = model.encode(source, memory)
        expected.append(model.decode(torch.cat([torch.tensor([[_START]]), segment[:, :-1]], 1), encoded)[0])
        source = segment
    worst = float((torch.cat(seen) - torch.cat(expected)).abs().max())
    if worst > 1e-3:
        raise RuntimeError(f"logits differ from those without a cache by {worst:.1e}")
    return worst
