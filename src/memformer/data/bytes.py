"""Text as bytes: token ids 0 to 255, and one more that starts a document and the decoder."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

__all__ = ["START", "VOCABULARY", "decode", "encode"]

START = 256
VOCABULARY = 257


def encode(text: str) -> np.ndarray:
    """The text's UTF-8 bytes, (length,) uint8."""
    return np.frombuffer(text.encode("utf-8"), np.uint8)


def decode(tokens: Iterable[int]) -> str:
    """The text of token ids; a byte that is not UTF-8 becomes a replacement character, START disappears."""
    return bytes(token for token in tokens if token != START).decode("utf-8", errors="replace")
