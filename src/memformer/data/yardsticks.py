"""What a held-out text costs without a neural network, in bits per byte: an order-2 byte model, and ``xz``."""

from __future__ import annotations

import lzma
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from ..config import check_count

__all__ = ["order2_bits_per_byte", "xz_bits_per_byte"]

_PART = 1 << 20
"""How many bytes are counted at once."""


class _Text(Protocol):
    """A :class:`~memformer.data.Document`, of which parts can be read."""

    def __len__(self) -> int: ...
    def __bytes__(self) -> bytes: ...
    def part(self, start: int, stop: int, /) -> _Text: ...


def order2_bits_per_byte(training: Iterable[bytes], held_out: Sequence[bytes]) -> float:
    """Each byte predicted from the two before it, by counts over the training documents.

    The orders 2, 1 and 0 and the uniform distribution are interpolated by Witten and Bell's rule: an order with n
    observations of t distinct bytes in this context has the weight n / (n + t). A document begins with two zero bytes.
    """
    pairs, triples = np.zeros(1 << 16, np.int64), np.zeros(1 << 24, np.int32)
    for document in training:
        for _, pair, triple in _contexts(document):
            pairs += np.bincount(pair, minlength=1 << 16)
            np.add.at(triples, triple, 1)
    by_order = [pairs.reshape(256, 256).sum(0)[None], pairs.reshape(256, 256), triples.reshape(-1, 256)]
    nats, count = 0.0, 0
    for byte, pair, triple in (part for document in held_out for part in _contexts(document)):
        probability = np.full(len(byte), 1 / 256)
        for counts, context in zip(by_order, (np.zeros_like(byte), pair >> 8, triple >> 8), strict=True):
            seen, distinct = counts.sum(1), (counts > 0).sum(1)
            n, t = seen[context], distinct[context]
            mixed = (counts[context, byte] + t * probability) / np.maximum(n + t, 1)
            probability = np.where(n > 0, mixed, probability)
        nats -= float(np.log(probability).sum())
        count += len(byte)
    return nats / np.log(2) / count


def _contexts(document: bytes) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Each byte, with one and with two bytes before it, as one number; in parts, for they take much room."""
    padded = np.frombuffer(b"\0\0" + document, np.uint8)
    for start in range(0, len(document), _PART):
        part = padded[start : start + _PART + 2].astype(np.int64)
        byte, before, before2 = part[2:], part[1:-1], part[:-2]
        yield byte, before << 8 | byte, before2 << 16 | before << 8 | byte


def xz_bits_per_byte(held_out: Iterable[bytes | _Text], most: int | None = None) -> float:
    """Documents in one xz stream at its strongest setting, read in pieces; the first ``most`` bytes of them all.

    Raises:
        ValueError: there is no text.
    """
    if not isinstance(held_out, Iterable) or isinstance(held_out, (str, bytes)):
        raise ValueError(f"held_out: expected documents, or texts as bytes, got {type(held_out).__name__}")
    if most is not None:
        check_count("most", most)
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    count = size = 0
    for piece in _pieces(held_out, sys.maxsize if most is None else most):
        count += len(piece)
        size += len(compressor.compress(piece))
    if not count:
        raise ValueError("held_out: expected text, got none")
    return 8 * (size + len(compressor.flush())) / count


def _pieces(documents: Iterable[bytes | _Text], most: int) -> Iterator[bytes]:
    for document in documents:
        size = min(len(document), most)
        most -= size
        for start in range(0, size, _PART):
            stop = min(start + _PART, size)
            yield document[start:stop] if isinstance(document, bytes) else bytes(document.part(start, stop))
