"""How well a model predicts documents that it was not trained on, each read whole with the memory carried on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import is_count
from .data import BPETokenizer, Document, Lanes, Tokenizer, Tokens, encode_documents
from .device import summing_device
from .interface import SegmentModel, in_evaluation, segment_model
from .parallel import Ranks
from .wavefront import read_segments

__all__ = ["ByDepth", "Depth", "DepthSum", "HeldOut", "evaluate", "read_stream", "streamed_once"]

LOGITS_AT_ONCE = 2**22
"""The losses are of as many segments at once as give this many logits, 16 MiB in float32."""
_BLOCK = 1 << 20
"""Ids whose bytes are counted at once."""


class Depth(NamedTuple):
    """The loss on the segments ``first`` to ``last`` (1 is a document's first) of all documents."""

    first: int
    last: int
    tokens: int
    bits_per_token: float


class DepthSum(NamedTuple):
    """What was added up on the segments ``first`` to ``last`` (1 is a document's first) of all documents."""

    first: int
    last: int
    counted: float
    loss: float


class ByDepth:
    """Sums by depth in the document: segment 1, 2, 3-4, 5-8, ...: does memory help?

    Attributes:
        sums: (2, 64), the losses and what they are counted per (tokens or bytes), by the depth's power of two.

    Args:
        device: of what is added; the CPU by default.
    """

    def __init__(self, device: torch.device | None = None):
        place = summing_device(device or torch.device("cpu"))
        self.sums = torch.zeros(2, 64, dtype=torch.float64, device=place)

    def add(self, depth: Tensor, losses: Tensor, counted: Tensor) -> None:
        """Three tensors (n,), the sums in float64; a document's first segment has the depth 1."""
        bucket = depth.double().log2().ceil().long().to(self.sums.device)
        self.sums[0].index_add_(0, bucket, losses)
        self.sums[1].index_add_(0, bucket, counted)

    def rows(self) -> list[DepthSum]:
        """Those depths at which anything was counted."""
        return [
            DepthSum(1 if i == 0 else 2 ** (i - 1) + 1, 2**i, counted, loss)
            for i, (loss, counted) in enumerate(self.sums.T.tolist())
            if counted
        ]


@dataclass(frozen=True)
class HeldOut:
    """Means over all tokens of some documents.

    ``bits_per_byte`` is None where they are ids of which the text is not known. Of ids that a byte-level tokenizer made
    it is; its special tokens, such as ``<|endoftext|>``, are not text and count no bytes.
    """

    step: int
    loss_nats: float
    perplexity: float
    bits_per_token: float
    bits_per_byte: float | None
    tokens: int
    documents: int
    seconds: float
    by_depth: tuple[Depth, ...]
    """By depth in the document: segment 1, 2, 3-4, 5-8, ...: does memory help?"""


@torch.no_grad()
def evaluate(
    model: SegmentModel,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    lanes: int = 16,
    memory: bool = True,
    step: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> HeldOut:
    """Read documents whole, at most ``lanes`` side by side, and count every token once.

    Under torch.distributed every process reads some of the lanes, and all get the result.

    Args:
        memory: carry the memory from segment to segment; otherwise each begins with the initial one, and sees one
            segment back (the decoder) or what layers carry of the last tokens (a causal model).
        step: of the training run, for the record.
        device: of the model; by default that of its first parameter.
        progress: called now and then with how many tokens were read in this process, and how many all documents have.

    Raises:
        ValueError: no document, an empty one, or the model has another vocabulary than the tokenizer.
    """
    model = segment_model(model)
    if not is_count(lanes, 1):
        raise ValueError(f"lanes: expected at least 1, got {lanes!r}")
    if not isinstance(documents, Sequence) or not all(isinstance(d, Document) for d in documents):
        raise ValueError(f"documents: expected a list of Document, got {type(documents).__name__}")
    if not documents:
        raise ValueError("documents: expected at least one, got none")
    if (empty := next((i for i, document in enumerate(documents) if not len(document)), None)) is not None:
        raise ValueError(f"documents: '{documents[empty].name}', at index {empty}, is empty; leave it out")
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"tokenizer: expected one with encode, decode and its ids, got {type(tokenizer).__name__}")
    for name, size in model.config.vocabularies.items():
        if size != tokenizer.vocabulary:
            raise ValueError(f"model: expected {name} of {tokenizer.vocabulary}, that of the tokenizer, got {size}")
    model.check_writes("evaluate")  # what it cannot write would not be counted
    began, ranks = time.perf_counter(), Ranks()
    sequences = encode_documents(documents, tokenizer)
    stream, total = (
        streamed_once(sequences, model.config.segment_length, lanes, tokenizer.start),
        sum(map(len, sequences)),
    )
    read = 0

    def report(tokens: int) -> None:
        nonlocal read
        read += tokens
        if progress is not None:
            progress(read, total)

    with in_evaluation(model):
        by_depth = read_stream(model, stream, memory, device or next(model.parameters()).device, report)
    by_depth.sums = ranks.sum(by_depth.sums).cpu()
    nats, tokens = by_depth.sums.sum(1).tolist()
    sizes = [_num_bytes(document, tokenizer) for document in documents]
    num_bytes = None if None in sizes else sum(size for size in sizes if size is not None)
    bits = nats / math.log(2)
    return HeldOut(
        step=step,
        loss_nats=nats / tokens,
        perplexity=math.exp(min(nats / tokens, 700.0)),
        bits_per_token=bits / tokens,
        bits_per_byte=None if num_bytes is None else bits / num_bytes,
        tokens=int(tokens),
        documents=len(documents),
        seconds=time.perf_counter() - began,
        by_depth=tuple(
            Depth(first, last, int(count), nats / count / math.log(2)) for first, last, count, nats in by_depth.rows()
        ),
    )


def _num_bytes(document: Document, tokenizer: Tokenizer) -> int | None:
    """Bytes of the text, also of ids that a byte-level tokenizer made; None where they are not known."""
    if document.num_bytes is not None or not isinstance(tokenizer, BPETokenizer) or not tokenizer.byte_level:
        return document.num_bytes
    sizes = tokenizer.token_bytes
    sizes[tokenizer.separators] = 0
    blocks = (document.content[i : i + _BLOCK] for i in range(0, len(document), _BLOCK))
    return sum(int(sizes[block].sum()) for block in blocks)


def streamed_once(sequences: Sequence[Tokens], length: int, lanes: int, start: int) -> Lanes:
    """This process's lanes of documents, the longest first, in no more lanes than stay busy until it ends.

    An idle lane costs as much.
    """
    ordered, ranks = sorted(sequences, key=lambda tokens: -len(tokens)), Ranks()
    busy = max(1, sum(map(len, ordered)) // len(ordered[0]))
    lanes = math.ceil(min(lanes, busy) / ranks.size) * ranks.size
    return Lanes(ordered, lanes=lanes, length=length, start=start, epochs=1, rank=ranks.rank, world_size=ranks.size)


def read_stream(
    model: SegmentModel,
    stream: Lanes,
    memory: bool,
    device: torch.device,
    report: Callable[[int], object],
) -> ByDepth:
    """Nats and tokens by depth, for this process's lanes to their end.

    Args:
        stream: with continuation as its target; of one pass.
        memory: carry it, see :func:`evaluate`.
        report: called with the number of tokens of each piece that is read.
    """
    at_once = max(1, LOGITS_AT_ONCE // (stream.rows * stream.length * model.config.vocabulary))
    mems, depth = None, torch.zeros(stream.rows, dtype=torch.long, device="cpu")
    by_depth = ByDepth(device)
    while segments := stream.rollout(at_once):
        report(sum(int(s.tgt_mask[:, 1:].sum()) for s in segments if s.tgt_mask is not None))
        depths = []
        for segment in segments:
            assert segment.reset is not None
            depth = torch.where(segment.reset, 1, depth + 1)
            depths.append(depth)  # (rows,)
        read = [model.of_stream(segment).to(device) for segment in segments]
        outputs: list[Tensor] = []
        if memory:
            mems = read_segments(model, read, mems, outputs.append)
        else:
            for segment in read:
                output, mems = model.cell(segment, None if mems is None else model.forget(mems))
                outputs.append(output)
        _, losses, counted, _ = model.token_losses(outputs, read)  # all of them in one call: (segments * rows, ...)
        sums = (x.to(by_depth.sums.device).double().sum(1) for x in (losses, counted))
        by_depth.add(torch.cat(depths).clamp(min=1), *sums)
    return by_depth
