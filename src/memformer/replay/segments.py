"""The segments of a rollout: held, or fetched when they are needed."""

from __future__ import annotations

import array
import collections
from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .inputs import Leaves, Tree, requires_grad

SAMPLE = 16
"""About this many numbers of a tensor tell whether a segment that is fetched again is the same."""

_UNSEEN = -(2**63)


def segment_list(segments: Iterable[Tree]) -> list[Tree]:
    """All of them; ValueError unless there is one."""
    scalar = isinstance(segments, Tensor) and segments.dim() == 0
    if scalar or isinstance(segments, (dict, str)) or not (isinstance(segments, Iterable) or _is_indexable(segments)):
        raise ValueError(f"segments: expected a sequence with one pytree per segment, got {type(segments).__name__}")
    result = list(segments) if isinstance(segments, Iterable) else [segments[t] for t in range(len(segments))]
    if not result:
        raise ValueError("segments: expected at least one segment, got none")
    return result


def _is_indexable(segments: object) -> bool:
    return hasattr(segments, "__len__") and hasattr(segments, "__getitem__")


class Segments:
    """Segments, taken apart: those of a list are held; those of a data set are fetched, and one is held at a time.

    Whatever has a length and an index and is no collection of Python's or torch's own counts as a data set. What it
    returns for an index must be the same each time, and may not require a gradient.
    """

    def __init__(self, segments: Iterable[Tree]):
        held = (list, tuple, collections.deque, dict, str)
        self.held: list[Leaves] = []
        self.source: Any = None
        if _is_indexable(segments) and not isinstance(segments, held) and not hasattr(segments, "__array__"):
            self.source, self.count = segments, len(segments)  # type: ignore[arg-type]
        if self.source is None or not self.count:
            self.held = [Leaves(segment) for segment in segment_list(segments)]
            self.count = len(self.held)
        # Asked once: what comes back in backward is a gradient for each of these, whatever is done to them since.
        self._want_grad = [list(map(requires_grad, leaves.leaves)) for leaves in self.held]
        self.digests = array.array("q", [_UNSEEN]) * (self.count if not self.held else 0)
        self.latest: tuple[int, Leaves] | None = None
        self.draw = False  # random numbers, when they are fetched

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, t: int) -> Leaves: ...
    @overload
    def __getitem__(self, t: slice) -> list[Leaves]: ...
    def __getitem__(self, t: int | slice) -> Leaves | list[Leaves]:
        if isinstance(t, slice):
            return self.held[t] if self.held else [self._taken(i) for i in range(*t.indices(self.count))]
        return self.fetch(t)

    def first(self) -> Leaves:
        """Segment 0, before the recording. If its fetch draws random numbers, these are put back, and the recording
        fetches it anew, as does each replay: then the cell finds the generator where plain autograd would."""
        if self.held:
            return self.held[0]
        with torch.random.fork_rng(devices=[]):
            before, leaves = torch.get_rng_state(), self.fetch(0)
            self.draw = not torch.equal(torch.get_rng_state(), before)
        self.draw_again()
        return leaves

    def draw_again(self) -> None:
        """Hold none where a fetch draws random numbers: the next one is to draw them, too."""
        if self.draw:
            self.let_go()

    def fetch(self, t: int) -> Leaves:
        """A segment, which is then the one that is held."""
        if self.held:
            return self.held[t]
        if self.latest is None or self.latest[0] != t:
            self.latest = None  # before there is another one
            self.latest = t, self._taken(t)
        return self.latest[1]

    def let_go(self) -> None:
        """Until the next is asked for, none that was fetched is held."""
        self.latest = None

    def tensors(self) -> list[Tensor]:
        """Those of held segments."""
        return [x for leaves in self.held for x in leaves.tensors()]

    def gradients(self, t: int) -> int:
        """How many tensors of a segment require a gradient."""
        return sum(self._want_grad[t]) if self.held else 0

    def cut(self, t: int) -> tuple[Tree, dict[int, Tensor]]:
        """A segment cut from its graph, and by position those of its tensors that are to have a gradient."""
        return self.fetch(t).cut(self._want_grad[t] if self.held else requires_grad)

    def tree(self, t: int) -> Tree:
        """A segment for a run without a graph: what requires a gradient is cut, for the cell may put hooks on it."""
        leaves = self.fetch(t)
        return self.cut(t)[0] if self.gradients(t) else leaves.tree()

    def _taken(self, t: int) -> Leaves:
        leaves = Leaves(self.source[t])
        if any(map(requires_grad, leaves.leaves)):
            raise ValueError(
                f"segments: number {t} requires a gradient, and would get none, for those of a "
                f"{type(self.source).__name__} are fetched when they are needed. Pass list(segments)"
            )
        digest = hash((leaves.spec.num_leaves, *map(_digest, leaves.leaves)))
        if self.digests[t] not in (_UNSEEN, digest):
            raise RuntimeError(
                f"segments: number {t} of the {type(self.source).__name__} is not the same when it is fetched again, "
                "so it cannot be replayed. Return the same for one index (no random crops or masks there), or pass "
                "list(segments)"
            )
        self.digests[t] = digest
        return leaves


def _digest(leaf: object) -> object:
    """Something that is equal for equal leaves, and hardly ever for others."""
    if not isinstance(leaf, Tensor):
        return repr(leaf) if isinstance(leaf, (bool, int, float, complex, str, type(None))) else type(leaf)
    described = leaf.shape, leaf.dtype, leaf.device
    if type(leaf) is not Tensor or leaf.layout is not torch.strided or leaf.is_meta or not leaf.numel():
        return described
    numbers = leaf.detach().flatten()[:: max(1, leaf.numel() // SAMPLE)].to("cpu").resolve_conj().resolve_neg()
    return *described, *numbers.contiguous().view(torch.uint8).tolist()  # of its bytes, for NaN is unlike itself


def trees(segments: Sequence[Leaves]) -> list[Tree]:
    return [leaves.tree() for leaves in segments]
