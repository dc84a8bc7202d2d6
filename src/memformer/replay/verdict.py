"""Is replay right for a cell? Asked of the cell itself, by plain autograd over a few segments."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from .boundary import detach
from .environment import Environment
from .functions import memory_replay, scan
from .inputs import (
    Cell,
    Leaves,
    Params,
    Readout,
    Tree,
    call_cell,
    call_readout,
    captured_modules,
    carries_grad,
    chunks,
    innermost,
    name_of,
    owners,
    param_list,
    requires_grad,
    sum_of_losses,
)
from .own_state import OwnState
from .reach import held_by_somebody, walk
from .schedules import Binomial, Budget, EveryKth, EveryMemory, Offload, Plan, Schedule, check_schedule
from .segments import segment_list
from .sizes import Sizes, measure, noting_saved
from .storage import storages

TOLERANCES = {1e-15: 1e-9, 1e-6: 1e-4, 1e-3: 1e-2, 1.0: 5e-2}
"""What a gradient may be off by relative to its norm, where numbers are no coarser than: float64 to bfloat16."""


@dataclass(frozen=True)
class Outcome:
    """What :func:`verify` found under one schedule.

    Attributes:
        error: the largest error of a gradient, relative to plain autograd's; infinite where replay refused the cell or
            a gradient is missing.
        bytes_kept, bytes_planned: of stored memories and graphs between forward and backward.
        problems: what is wrong, in sentences.
        refused: replay raised an error; then that is the problem.
    """

    error: float
    bytes_kept: int
    bytes_planned: int
    problems: tuple[str, ...] = ()
    refused: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether replay is right for a cell. ``print(verdict)`` says it, and what to do.

    Attributes:
        outcomes: what was found, by schedule.
        problems: what is wrong with the cell itself: two plain runs of it differ.
        suspects: state of the cell's own that a run leaves otherwise than it found it.
        graphs_left: those of them that hold a tensor with its graph. A loss that is made of one outside of the cell
            gets no gradient by replay; this alone does not make a verdict wrong.
        tolerance: what a gradient may be off by, relative to its norm.
        summary: what was compared.
    """

    outcomes: dict[Schedule, Outcome]
    problems: tuple[str, ...]
    suspects: tuple[str, ...]
    graphs_left: tuple[str, ...]
    tolerance: float
    summary: str

    @property
    def ok(self) -> bool:
        """Whether every gradient, random number, buffer and number of bytes is as it should be."""
        return not self.problems and not any(outcome.problems for outcome in self.outcomes.values())

    def raise_if_wrong(self) -> None:
        """Raise RuntimeError, with the verdict as its message, unless :attr:`ok`."""
        if not self.ok:
            raise RuntimeError(str(self))

    def __str__(self) -> str:
        lines = [f"replay is {'right' if self.ok else 'WRONG'} for {self.summary}"]
        lines += [f"  {problem}" for problem in self.problems]
        under: dict[tuple[str, ...], list[str]] = {}
        for schedule, outcome in self.outcomes.items():
            kept = f"keeps {_size(outcome.bytes_kept)}, planned {_size(outcome.bytes_planned)}"
            lines.append(f"  {schedule}: largest error {outcome.error:.1e} of {self.tolerance:.0e}, {kept}")
            if outcome.problems:
                under.setdefault(outcome.problems, []).append(str(schedule))
        for problems, schedules in under.items():
            where = "every schedule" if len(schedules) == len(self.outcomes) else ", ".join(schedules)
            lines += [f"- Under {where}:", *(f"    {problem}" for problem in problems)]
        if self.suspects and not self.ok:
            lines.append(f"- A run of the cell changes {', '.join(self.suspects)}, and replay runs it again.")
            lines.append(
                "  Return such state as a part of the memory, draw from torch's default generators, or keep it "
                "constant for a rollout (model.eval() for running statistics)."
            )
        elif self.problems or any(outcome.problems and not outcome.refused for outcome in self.outcomes.values()):
            lines.append(
                "- Nothing that the cell keeps for itself was seen to change. Leave out parts of the cell until the "
                "verdict turns; until then replay.full_bptt is right, with the memory of plain autograd."
            )
        if self.graphs_left:
            lines.append(
                f"- A run leaves a graph in {', '.join(self.graphs_left)}. A loss that is made of it outside of the "
                "cell would get no gradient: return it as a part of the value."
            )
        return "\n".join(lines)


def verify(
    cell: Cell,
    segments: Sequence[Tree],
    memory: Tree,
    readout: Readout | None = None,
    *,
    params: Params = (),
    readout_segments: int = 1,
    schedules: Sequence[Schedule] | None = None,
) -> Verdict:
    """Compare replay with plain autograd, for this cell and under every schedule: the first thing to do with a new one.

    Compared are the gradients of everything that plain autograd reaches (parameters, the initial memory and the
    segments' tensors that require one, tensors that the cell captures), of the losses or values and of the final
    memory; the bytes kept between forward and backward with those of the plan; the random numbers drawn, and the
    buffers as a plain run leaves them.

    Parameters, ``.grad``, buffers, and the generators of torch, Python, numpy and the cell are afterwards as before;
    nothing is copied but buffers. The cell runs about 10 times per segment and schedule, and a plain graph of all
    segments is alive: give it three segments or so, as they come in training. Beside ``torch.func.grad`` in a cell,
    graphs that are kept are not counted.

    In float64 an error is an error. In float32 and below a wrong gradient that is small beside the others may hide
    within the tolerance: ask again with ``cell.double()``.

    Args:
        cell, segments, memory, readout, params, readout_segments: as for :func:`memory_replay`. Without ``readout`` a
            value may be any pytree, as for :func:`scan`.
        schedules: those to try; None for one of each kind.

    Returns:
        The verdict: ``verdict.ok``, ``print(verdict)``, ``verdict.raise_if_wrong()``.

    Raises:
        ValueError: no segments, no list of schedules, or nothing that requires a gradient.
        Exception: whatever the cell raises under plain autograd.
    """
    segments = segment_list(segments)
    if schedules is not None:
        if not isinstance(schedules, Iterable):
            raise ValueError(f"schedules: expected a list of schedules, got {schedules!r}: put it into one")
        schedules = list(schedules)
        for schedule in schedules:
            check_schedule(schedule)
    problem = _Problem(cell, segments, memory, readout, params, readout_segments)
    with torch.enable_grad(), problem.state_kept():
        plain = problem.run(problem.plain)
        if not plain.grads:
            raise ValueError(
                f"verify: under plain autograd {name_of(cell)} gives nothing that requires a gradient. Train "
                "something, or let the memory require one"
            )
        suspects = (*problem.state.changed(), *problem.changed_buffers(plain))
        graphs_left = tuple(problem.state.graphs_left())
        again = problem.run(problem.plain)
        problems = tuple(f"Two plain runs differ: {what}" for what in problem.differences(again, plain)[1])
        outcomes: dict[Schedule, Outcome] = {}
        if not problems:  # else nothing can be compared with a run
            sizes = problem.sizes()
            for schedule in schedules or _schedules(sizes):
                outcomes[schedule] = problem.outcome(schedule, plain, sizes)
    return Verdict(outcomes, problems, suspects, graphs_left, problem.tolerance, problem.summary(plain))


def _schedules(sizes: list[Sizes]) -> list[Schedule]:
    memory, graph = (max(size) for size in zip(*sizes, strict=True))
    return [
        EveryMemory(),
        EveryMemory(graphs=0),
        EveryMemory(graphs=len(sizes)),
        EveryKth(2),
        Binomial(1),
        Binomial(2),
        Budget(max(1, 2 * (memory + graph))),
        Offload(EveryMemory()),
    ]


class _Run(NamedTuple):
    """What one run of a rollout gave and left, by name."""

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]
    random_state: list[Tensor]
    buffers: dict[str, Tensor | None]


class _Buffer(NamedTuple):
    owner: nn.Module
    name: str
    tensor: Tensor | None
    value: Tensor | None


class _Problem:
    """A rollout that can be run again and again, from the same state."""

    def __init__(
        self,
        cell: Cell,
        segments: list[Tree],
        memory: Tree,
        readout: Readout | None,
        params: Params,
        readout_segments: int,
    ):
        self.cell, self.readout, self.readout_segments = cell, readout, readout_segments
        self.params = param_list(params)
        # Cut from graphs of the caller's, which one run would free for the next.
        self.memory, _ = Leaves(memory).cut(requires_grad)
        self.segments = [Leaves(segment).cut(requires_grad)[0] for segment in segments]
        self.befores: list[Tree] = []
        owned = [*owners(cell, self.params), *([] if readout is None else owners(readout, ())), *captured_modules(cell)]
        modules = list({id(owner): owner for owner in owned if isinstance(owner, nn.Module)}.values())
        self.tensors: dict[str, Tensor] = {}  # those that may have a gradient
        self.buffers: dict[str, _Buffer] = {}
        for module in modules:
            self._know({f"parameter '{name}'": p for name, p in module.named_parameters()})
            for path, part in module.named_modules():
                for name, x in part._buffers.items():
                    full = f"buffer '{path}{'.' if path else ''}{name}'"
                    self.buffers[_unlike(full, self.buffers)] = _Buffer(part, name, x, None if x is None else x.clone())
        self._know({f"params[{i}]": x for i, x in enumerate(self.params) if isinstance(x, Tensor)})
        self.parameters = list(self.tensors.values())
        self._know(_named("the initial memory", self.memory) | _named("segments", self.segments))
        self.environment = Environment(list(self.tensors.values()))
        self.random_state = self.environment.random_state()
        self.state = OwnState([cell, readout], modules)
        types = {x.dtype for x in self.tensors.values() if carries_grad(x)}
        types |= {dtype for _, dtype, enabled in self.environment.autocast if enabled}
        coarsest = max(types, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
        self.precision = torch.finfo(coarsest).eps
        self.tolerance = next(tolerance for eps, tolerance in TOLERANCES.items() if eps >= self.precision)
        self.numbers = str(coarsest).removeprefix("torch.")

    def _know(self, tensors: dict[str, Tensor]) -> None:
        known = {id(x) for x in self.tensors.values()}
        for name, x in tensors.items():
            if id(x) not in known:
                self.tensors[_unlike(name, self.tensors)] = x

    # What is run

    def plain(self) -> Tree:
        """The rollout by plain autograd: what replay has to equal."""
        values, memory, self.befores = [], self.memory, []
        for segment in self.segments:
            before = Leaves(memory)  # a cell may change its containers
            self.befores.append(before.tree())
            value, memory = call_cell(self.cell, Leaves(segment).tree(), before.tree())
            values.append(value)
        if self.readout is None:
            return values, memory
        losses = [
            call_readout(self.readout, values[part], self.segments[part], None)
            for part in chunks(len(values), self.readout_segments)
        ]
        return sum_of_losses(losses), memory

    def replayed(self, schedule: Schedule, cell: Cell | None = None) -> Tree:
        cell = cell or self.cell
        if self.readout is None:
            return scan(cell, self.segments, self.memory, params=self.params, schedule=schedule)
        rollout = memory_replay(
            cell,
            self.segments,
            self.memory,
            self.readout,
            params=self.params,
            schedule=schedule,
            readout_segments=self.readout_segments,
        )
        return rollout.loss, rollout.memory

    def run(self, rollout: Callable[[], Tree]) -> _Run:
        """Run forward and backward from the state at the beginning."""
        self.restore()
        outputs = _named("loss" if self.readout else "values", (result := rollout())[0])
        outputs |= _named("the final memory", result[1])
        del result
        self._know(_captured(outputs.values(), self.tensors.values()))
        ends = [x for x in outputs.values() if x.requires_grad]
        sources = {name: x for name, x in self.tensors.items() if x.requires_grad}
        found: Sequence[Tensor | None] = [None] * len(sources)
        if ends and sources:
            found = torch.autograd.grad(
                ends, list(sources.values()), [_upstream(x) for x in ends], retain_graph=True, allow_unused=True
            )
        grads: dict[str, Tensor | None] = dict(zip(sources, found, strict=True))
        for name, x in sources.items():  # a backward inside the cell's adds to .grad
            if x.is_leaf and x.grad is not None:
                grads[name] = x.grad if (grad := grads[name]) is None else grad + x.grad
                x.grad = None
        buffers = {name: b.owner._buffers[b.name] for name, b in self.buffers.items()}
        return _Run(
            {name: x.detach() for name, x in outputs.items()},
            {name: grad for name, grad in grads.items() if grad is not None},
            self.environment.random_state(),
            {name: None if x is None else x.clone() for name, x in buffers.items()},
        )

    # What is compared

    def outcome(self, schedule: Schedule, plain: _Run, sizes: list[Sizes]) -> Outcome:
        planned = kept = 0
        try:
            plan = schedule.plan(len(sizes), *sizes[0])  # as replay measures them
            planned = _bytes_after_forward(plan, sizes)
            error, problems = self.differences(self.run(lambda: self.replayed(schedule)), plain)
            kept = self.bytes_kept(schedule, at_most=1.1 * planned + _SLACK)
        except Exception as refusal:
            return Outcome(float("inf"), kept, planned, (f"{type(refusal).__name__}: {refusal}",), refused=True)
        if kept > 1.1 * planned + _SLACK:
            problems.append(
                f"keeps {_size(kept)} between forward and backward, where memories and graphs have {_size(planned)}: "
                "something holds on to what it was given or returned"
            )
        return Outcome(error, kept, planned, tuple(problems))

    def differences(self, run: _Run, plain: _Run) -> tuple[float, list[str]]:
        """The largest error of a gradient, and what is wrong in sentences, the worst first."""
        wrong = self._apart("", run.outputs, plain.outputs) + self._apart("the gradient of ", run.grads, plain.grads)
        worst = max((error for error, _ in self._errors(run.grads, plain.grads).values()), default=0.0)
        if not all(map(torch.equal, run.random_state, plain.random_state)):
            wrong.append("torch's random numbers stand elsewhere afterwards than after a plain run")
        buffers = [name for name, expected in plain.buffers.items() if not _same(run.buffers[name], expected)]
        if buffers:
            wrong.append(f"left otherwise than by a plain run: {', '.join(buffers)}")
        return worst, wrong

    def _errors(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, tuple[float, str]]:
        norms = {name: _norm(x) for name, x in expected.items()}
        # Below this share of all of them a tensor is rounding noise, such as the gradient of a bias before a norm.
        floor = 100 * self.precision * max(norms.values(), default=0.0) / self.tolerance
        result = {}
        for name in [*expected, *(name for name in found if name not in expected)]:
            norm = norms.get(name, 0.0)
            if name not in found:
                result[name] = (float("inf") if norm else 0.0), f"is missing; plain autograd's has norm {norm:.3g}"
                continue
            own = _norm(found[name])
            apart = _norm(found[name] - expected[name]) if name in expected else own
            if apart != apart or apart == float("inf"):  # NaN or infinite: then where plain autograd has it
                apart = 0.0 if name in expected and _same(found[name], expected[name]) else float("inf")
            error = apart / (norm + floor) if apart else 0.0
            result[name] = (
                error,
                f"is off by {error:.1e} of plain autograd's: has norm {own:.3g} in place of {norm:.3g}",
            )
        return result

    def _apart(self, what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
        errors = self._errors(found, expected)
        wrong = sorted((name for name in errors if not errors[name][0] <= self.tolerance), key=lambda n: -errors[n][0])
        sentences = [f"{what}{name} {errors[name][1]}" for name in wrong[:_AT_MOST]]
        return sentences + ([f"and {len(wrong) - _AT_MOST} more"] if len(wrong) > _AT_MOST else [])

    def sizes(self) -> list[Sizes]:
        """Of each segment, with the memories of the latest plain run."""
        self.restore()
        befores = [detach(memory) for memory in self.befores]
        return [
            measure(self.cell, segment, memory, params=self.params)
            for segment, memory in zip(self.segments, befores, strict=True)
        ]

    def bytes_kept(self, schedule: Schedule, at_most: float) -> int:
        """The bytes of memories and graphs that are alive after a forward pass."""
        self.restore()
        seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

        def note(tree: Tree) -> None:
            for storage in storages(x for x in tree_leaves(tree) if isinstance(x, Tensor)):
                seen[storage.data_ptr()] = weakref.ref(storage)

        def cell(segment: Tree, memory: Tree) -> tuple[Tree, Tree]:
            note(memory)
            result = call_cell(self.cell, segment, memory)
            note(result)
            return result

        cell.__wrapped__ = self.cell  # type: ignore[attr-defined]
        result = noting_saved(lambda: self.replayed(schedule, cell), note)
        others = [x for x in (*self.tensors.values(), *tree_leaves(result)) if isinstance(x, Tensor)]
        held = {storage.data_ptr() for storage in storages(others)}

        def alive() -> int:
            return sum(s.nbytes() for at, ref in seen.items() if at not in held and (s := ref()) is not None)

        if alive() > at_most:
            gc.collect()  # a cell may make cycles, which are gone some time later
        return alive()

    # What is put back

    def restore(self) -> None:
        """Buffers and torch's default generators, to the state at the beginning."""
        self.environment.set_random_state(self.random_state)
        for buffer in self.buffers.values():
            if buffer.owner._buffers.get(buffer.name) is not buffer.tensor:
                buffer.owner._buffers[buffer.name] = buffer.tensor
            if buffer.tensor is not None and buffer.value is not None and not _same(buffer.tensor, buffer.value):
                with torch.no_grad():
                    buffer.tensor.copy_(buffer.value)

    @contextlib.contextmanager
    def state_kept(self) -> Iterator[None]:
        leaves = [p for p in self.parameters if p.is_leaf]
        grads = [p.grad for p in leaves]
        for p in leaves:
            p.grad = None
        try:
            yield
        finally:
            self.restore()
            self.state.restore()
            for p, grad in zip(leaves, grads, strict=True):
                p.grad = grad

    def changed_buffers(self, run: _Run) -> list[str]:
        return [name for name, buffer in self.buffers.items() if not _same(run.buffers[name], buffer.value)]

    def summary(self, plain: _Run) -> str:
        name, count, grads = name_of(innermost(self.cell)), len(self.segments), len(plain.grads)
        return f"{name}: {count} segments, {self.numbers}, tensors with a gradient: {grads}"


_AT_MOST = 5
"""Sentences about tensors that are off; the others are counted."""
_SLACK = 4096
"""Bytes of scalars and the like, which no plan counts."""


def _unlike(name: str, others: Container[str]) -> str:
    """The name, or one like it that is not taken: two modules may have parameters of one name."""
    return next(n for n in itertools.chain([name], (f"{name} ({i})" for i in itertools.count(2))) if n not in others)


def _named(name: str, tree: Tree) -> dict[str, Tensor]:
    """The tensors of a tree, by their paths."""
    return {name + keystr(path): x for path, x in tree_flatten_with_path(tree)[0] if isinstance(x, Tensor)}


def _captured(outputs: Iterable[Tensor], known: Iterable[Tensor]) -> dict[str, Tensor]:
    """The leaves that a graph ends in besides the known ones, and besides those that a cell made for itself, with
    names."""
    _, ends = walk([x.grad_fn for x in outputs if x.grad_fn is not None])
    ids = {id(x) for x in known}
    others = list({id(node.variable): node.variable for node in ends if id(node.variable) not in ids}.values())
    held = list(itertools.compress(others, held_by_somebody(others)))
    return {f"captured tensor {i} of shape {tuple(leaf.shape)}": leaf for i, leaf in enumerate(held, 1)}


def _upstream(x: Tensor) -> Tensor:
    """A gradient to begin with: one for a scalar, else something unlike constants and unlike what it belongs to."""
    if not x.dim():
        return torch.ones_like(x)
    if type(x) is not Tensor or x.layout is not torch.strided:
        return x.detach()
    return x.detach() + torch.arange(x.numel(), device=x.device).cos().view(x.shape).to(x.dtype)


def _bytes_after_forward(plan: Plan, sizes: list[Sizes]) -> int:
    """The bytes of the memories and graphs that a plan keeps between forward and backward."""
    kept: dict[str, set[int]] = {"store": set(), "graph": set()}
    for kind, t in plan.recording:
        if kind in kept:
            kept[kind].add(t)
        elif kind in ("drop", "backward"):
            kept["store" if kind == "drop" else "graph"].remove(t)
    memories = [sizes[t - 1].memory_bytes for t in kept["store"] if t]  # the first is the caller's
    graphs = [sizes[t].graph_bytes for t in kept["graph"]]
    return sum(graphs) + (sum(memories) if plan.store_on in ("device", "cpu") else 0)


def _norm(x: Tensor) -> float:
    x = x.detach()
    if x.layout is not torch.strided:
        x = x.to_dense() if x.layout is not torch.jagged else x.values()
    return float(torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32))))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
