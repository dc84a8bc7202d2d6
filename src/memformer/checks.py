"""What callers hand in: described, checked, and turned into the one form that the rest of the package knows.

Imports torch and numpy alone. Values are not read where there are none: in traced code, in meta and in fake tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "IGNORED",
    "as_mask",
    "as_paths",
    "as_tokens",
    "check_labels",
    "check_mask",
    "check_patterns",
    "check_tokens",
    "describe",
    "has_values",
    "ignored_as_masked",
    "is_tensor",
    "plural",
]

IGNORED = -100
"""The target id that ``torch.nn.functional.cross_entropy`` and Hugging Face's collators give to what does not count."""


def describe(x: object) -> str:
    """The dtype and shape of a tensor, or the type of anything else, for a message."""
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, (Tensor, np.ndarray)) else type(x).__name__


def is_tensor(x: object, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether it is a tensor of just that shape and dtype."""
    return isinstance(x, Tensor) and tuple(x.shape) == shape and x.dtype == dtype


def is_traced(x: Tensor) -> bool:
    """Whether it stands for others: it is compiled or exported, on the meta device, fake, or in a torch.func."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return traced or x.is_meta or isinstance(x, FakeTensor)


def has_values(x: Tensor) -> bool:
    """Whether Python may look at the values: a traced tensor has none to show.

    One on a card has none where a step is captured, or where torch is told to refuse whatever waits for the card.
    """
    if is_traced(x):
        return False
    return not (x.is_cuda and (torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() == 2))


def as_paths(name: str, paths: object) -> tuple[Path, ...]:
    """One path or several, each text or a path, as a tuple of paths; ``name`` is what the message calls them.

    Raises:
        ValueError: something else, or an empty path, which would be the working directory.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    if isinstance(given, Iterable) and not isinstance(given, (bytes, dict)):
        given = list(given)
        if all(isinstance(path, (str, os.PathLike)) for path in given):
            if any(os.fspath(path) == "" for path in given):
                raise ValueError(f"{name}: expected a path, got an empty one: is a variable of the shell not set?")
            return tuple(Path(path) for path in given)
    got = [type(path).__name__ for path in given] if isinstance(given, list) else type(paths).__name__
    raise ValueError(f"{name}: expected a path, or a list of paths, got {got}")


def check_patterns(name: str, patterns: Sequence[str]) -> None:
    """Raises ValueError, naming the patterns, where one of them is empty: it matches nothing."""
    if "" in patterns:
        raise ValueError(f"{name}: expected patterns such as '*.txt', got an empty one")


def as_tokens(x: Any, device: torch.device | None = None) -> Any:
    """Integers of whatever kind, as a tokenizer or a loader gives them, as a tensor of int64 (or int32, if they are).

    Arrays, lists, and tensors of any integer type; booleans stay booleans. What is something else comes back as it is,
    for the checks to name.
    """
    if isinstance(x, Sequence) and not isinstance(x, (str, bytes)) and not any(isinstance(part, Tensor) for part in x):
        try:
            x = np.asarray(x) if len(x) else np.empty(0, np.int64)
        except (ValueError, TypeError, OverflowError):  # lanes of unequal length, ids beyond all integers
            return x
    if isinstance(x, np.ndarray):
        if x.dtype != bool and not np.issubdtype(x.dtype, np.integer) and x.size:
            return x
        x = torch.from_numpy(x.astype(bool if x.dtype == bool else np.int64))
    if not isinstance(x, Tensor):
        return x
    if x.dtype not in (torch.int64, torch.int32, torch.bool) and not (x.is_floating_point() or x.is_complex()):
        x = x.to(torch.int64)
    return x if device is None else x.to(device)


def as_mask(name: str, mask: Any, device: torch.device | None = None) -> Tensor | None:
    """A mask of integers 0 and 1, as tokenizers give it, as booleans; booleans, and what is no tensor, as they are.

    Raises:
        ValueError: integers besides 0 and 1, or floating-point numbers; ``name`` is what the message calls the mask.
    """
    mask = as_tokens(mask, device)
    if not isinstance(mask, Tensor) or mask.dtype == torch.bool:
        return mask
    expected = f"{name}: expected torch.bool, or integers of 0 and 1, True or 1 for what exists"
    if mask.is_floating_point() or mask.is_complex():
        remedy = "If it is 1 for what exists, pass mask.bool(); if it is added to scores, pass mask == 0"
        raise ValueError(f"{expected}, got {describe(mask)}. {remedy}")
    if has_values(mask) and ((mask != 0) & (mask != 1)).any():
        low, high = (int(x) for x in mask.aminmax())
        raise ValueError(f"{expected}, got other integers, from {low} to {high}")
    return mask.bool()


def ignored_as_masked(tgt: Tensor, tgt_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Targets of :data:`IGNORED` as masked ones: they start nothing, are not seen, and are not predicted.

    ``tgt`` and ``tgt_mask`` (batch, tokens), the mask boolean; both come back as they are where nothing is ignored.
    Where there are no values to read, there is a mask whatever they are, as some may be ignored; where targets are
    traced, only if there was one: another would take the decoder off its fast path.

    Raises:
        ValueError: the mask is not boolean or not of the targets' shape.
    """
    if not isinstance(tgt, Tensor) or (tgt_mask is None and is_traced(tgt)):
        return tgt, tgt_mask
    kept = tgt != IGNORED
    if has_values(tgt) and kept.all():
        return tgt, tgt_mask
    check_mask("tgt_mask", tgt_mask, tgt)
    return tgt.where(kept, 0), kept if tgt_mask is None else tgt_mask & kept


def check_tokens(name: str, tokens: Tensor, vocabulary: int, max_len: int, prefix: str) -> None:
    """Raise ValueError unless these are (batch, tokens) ids of a stack whose settings begin with ``prefix``: "enc_"."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name}: expected token ids, torch.int64 or int32 of shape (batch, tokens), got {describe(tokens)}"
        )
    batch, length = tokens.shape
    if not batch or not length:
        raise ValueError(f"{name}: expected at least one lane and one token, got shape {tuple(tokens.shape)}")
    if length > max_len:
        raise ValueError(
            f"{name}: expected at most {prefix}max_seq_len = {max_len} tokens, got {length}. Cut it into segments and "
            "carry the memory (memory_replay_backprop does), or build the model with a longer one"
        )
    if not has_values(tokens):
        return
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name}: token id {low if low < 0 else high} is outside the table of {prefix}num_tokens = {vocabulary} "
            f"(ids 0 to {vocabulary - 1})"
        )


def check_labels(name: str, labels: Any, tokens: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless ``labels`` are like their tokens: ids below ``vocabulary``, or -100, which is ignored."""
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape:
        raise ValueError(f"{name}: expected the shape of the tokens, {tuple(tokens.shape)}, got {describe(labels)}")
    known = labels.masked_fill(labels == IGNORED, 0) if has_values(labels) else labels
    check_tokens(name, known, vocabulary, labels.shape[1], "")


def check_mask(name: str, mask: Tensor | None, like: Tensor) -> None:
    """Raise ValueError unless ``mask`` is None or boolean of the shape of ``like``, (batch, tokens)."""
    if mask is not None and not is_tensor(mask, tuple(like.shape), torch.bool):
        raise ValueError(
            f"{name}: expected torch.bool of its tokens' shape {tuple(like.shape)}, True for tokens that exist, "
            f"got {describe(mask)}"
        )


def check_reset(reset: Tensor | None, name: str, batch_size: int) -> None:
    """Raise ValueError unless a reset has one boolean for each lane of the tokens of that name."""
    if reset is not None and not is_tensor(reset, (batch_size,), torch.bool):
        raise ValueError(
            f"reset: expected torch.bool of shape ({batch_size},), one per lane of {name}, got {describe(reset)}"
        )


def plural(count: int, noun: str) -> str:
    """A number with its noun, for a message: "1 document", "1,332 bytes"."""
    return f"{count:,} {noun}" + "s" * (count != 1)
