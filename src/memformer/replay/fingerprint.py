"""Whether a replay meets what was recorded: each segment where that is asked, and a glance at one always."""

from __future__ import annotations

import torch
from torch import Tensor

from .environment import may_wait
from .inputs import PLAIN, carries_grad

CAUSE = (
    "The cell uses something besides segment, memory, parameters, buffers and torch's own generators (a counter, a "
    "tensor that it keeps, a private generator, numpy's or Python's random numbers), or that was changed in between."
)

SAMPLE = 64
"""About this many numbers of a leaf are looked at."""


def check_same(t: int, replayed: list[object], recorded: list[object]) -> None:
    """RuntimeError unless all leaves are close."""
    for new, old in zip(replayed, recorded, strict=True):
        try:
            if isinstance(old, Tensor | int | float | complex):
                torch.testing.assert_close(new, old, equal_nan=True)
            elif isinstance(old, PLAIN) and (type(new) is not type(old) or new != old):
                raise AssertionError(f"it gave {new!r}, and {old!r} when it was recorded")
        except AssertionError as error:
            raise RuntimeError(
                f"segment {t} differs in replay from its recording, so its gradient would be wrong: {error}\n{CAUSE}"
            ) from error


class Fingerprint:
    """A few numbers of what a segment returned.

    A replay in another world (a step of a fused optimizer in between, a state that the cell keeps for itself) differs
    in its first segment already. It is compared generously, for kernels may differ with the mode: by the square root
    of the precision, as a share of a leaf's norm, and by the rounding of the largest leaf, for a loss near zero may be
    nothing else.
    """

    def __init__(self, leaves: list[object], precision: float):
        self.precision = precision
        self.samples = [_sample(x) for x in leaves]

    def check(self, t: int, leaves: list[object]) -> None:
        pairs = zip(self.samples, map(_sample, leaves), strict=True)
        both = [(old, new) for old, new in pairs if old is not None and new is not None]
        norms = [_norm(old.masked_fill(~old.isfinite(), 0)) for old, _ in both]
        for (old, new), norm in zip(both, norms, strict=True):
            if old.shape != new.shape:
                continue
            precision = max(self.precision, torch.finfo(old.dtype).eps)
            same = (new == old) | (new.isnan() & old.isnan())  # of masked numbers -inf is the same as -inf
            difference = _norm((new - old).masked_fill(same, 0))
            if not difference <= precision**0.5 * norm + 16 * precision * max(norms):
                raise RuntimeError(
                    f"segment {t} differs in replay from its recording by {difference / max(norm, 1e-300):.1e} of its "
                    f"norm, so its gradient would be wrong. {CAUSE} check=True looks at each segment."
                )


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double()))


def _sample(x: object) -> Tensor | None:
    """Numbers from all over a tensor, moved to the CPU; None where there is nothing to compare."""
    if type(x) is not Tensor or x.layout != torch.strided or x.is_meta or not carries_grad(x) or not x.numel():
        return None
    if x.is_cuda and not may_wait():
        return None
    with torch.no_grad():
        sample = x.detach().flatten()[:: max(1, x.numel() // SAMPLE)].to("cpu", copy=True)
        if sample.is_complex():
            return torch.view_as_real(sample.resolve_conj())
        return sample.float() if sample.element_size() == 1 else sample  # float8 cannot be subtracted
