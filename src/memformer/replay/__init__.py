"""Memory replay back-propagation (MRBP) for any recurrent cell: exact gradients, at the memory that you choose.

A *cell* maps ``(segment, memory)`` to ``(value, memory)``. Three functions run it over a rollout and agree in every
number:

- :func:`full_bptt` is plain autograd: the reference, whose graph grows with the number of segments;
- :func:`memory_replay` records memories without a graph, then replays segment by segment (paper, Algorithm 1);
- :func:`scan` does the same for outputs that are used further downstream.

:func:`accumulate` is memory replay that adds to ``.grad`` on the spot, for parameters that FSDP shards.
Memories, segments and values are pytrees of tensors (tuples, lists, dicts, ``None``). This package needs torch alone,
and nothing else of memformer.

How it works. One ``torch.autograd.Function`` has the parameters, the initial memory and the segments as inputs, so that
each gradient leaves it once: an optimizer, a gradient scaler, clipping and DistributedDataParallel see an ordinary
loss. A schedule's plan lists the actions of its forward and of its backward (``Run`` in ``engine`` carries them out):
by default forward stores the memory before each segment, and only the last segment is run with a graph, and not twice
(the first one's is freed at once: it shows whether the cell keeps a tensor that it made there);
backward walks from the last segment to the first and frees each graph before it builds the next.

What is not known here: whether replaying a cell gives the same numbers as recording it. Random numbers of torch's own
generators, autocast, modes and buffers are put back; a cell that keeps other state of its own (a Python counter, a
private ``torch.Generator``) is outside what can be replayed. The first replayed segment is compared with its recording,
at a few numbers; ``check=True`` compares all of them.
"""

from .boundary import burn_in, check_equal_across_ranks, detach, reset
from .capture import Captured, captured
from .functions import (
    Method,
    Rollout,
    accumulate,
    full_bptt,
    memory_replay,
    scan,
)
from .gradients import MemoryGradients
from .options import Options
from .schedules import Action, Binomial, Budget, EveryKth, EveryMemory, Offload, Plan, Schedule
from .sizes import Sizes, measure
from .verdict import Outcome, Verdict, verify

__all__ = [
    "Action",
    "Binomial",
    "Budget",
    "Captured",
    "EveryKth",
    "EveryMemory",
    "MemoryGradients",
    "Method",
    "Offload",
    "Options",
    "Outcome",
    "Plan",
    "Rollout",
    "Schedule",
    "Sizes",
    "Verdict",
    "accumulate",
    "burn_in",
    "captured",
    "check_equal_across_ranks",
    "detach",
    "full_bptt",
    "measure",
    "memory_replay",
    "reset",
    "scan",
    "verify",
]
