"""A step of training, rollout and backward, captured once as a CUDA graph and launched as one.

On a card Python issues kernels more slowly than they run. A rollout is plain control flow over fixed shapes, so all of
its kernels (recording, replay, readout, gradients) can be captured once for each set of shapes, and launched as one.

The bookkeeping is tested on the CPU, where a function that is run again stands for a graph; ``python -m benchmarks
card`` checks the rest on a card.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import linecache
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from .boundary import detach
from .environment import left_alone
from .inputs import Tree, captured_modules, holds_a_tensor, name_of, owners, version
from .places import Places, Read, Rehearsed
from .schedules import at_least

__all__ = ["Captured", "captured"]

Mode = Literal["auto", "on", "off"]

Launch = Callable[[], None]

MANY_MOVES = 5
"""After so many captures for what was put in another place there is a warning."""


def captured(function: Callable[..., Tree], *example: Tree, mode: Mode = "auto", most: int = 4) -> Captured:
    """``function``, which makes a rollout and its backward, as one CUDA graph for each set of shapes.

    A call of the result is a call of the function: it adds to ``.grad`` of what the function differentiates, draws the
    numbers that the function would draw, and returns what it returns, detached.

    What the function does in Python happens when it is captured and not in a launch. So a number that differs from call
    to call must be a tensor, and an input. A weight may be changed in place, as optimizers and ``load_state_dict`` do;
    where one, or a buffer, or a module, is replaced by another, it is captured anew. Before a capture the function is
    run three times; gradients, random numbers and the buffers of its modules are afterwards as before.

    Args:
        function: ``function(*inputs)`` calls ``backward`` itself, if it is to, and returns a pytree of tensors.
        example: inputs for which it is captured at once; without them it is captured when it is first called.
            Inputs are pytrees of tensors, all on one card, and of things that can be compared, such as numbers.
        mode: "auto" runs eagerly what cannot be captured, and warns once (not on a CPU); "on" raises; "off" always runs
            eagerly.
        most: for how many sets of shapes, and of modules that train and of weights that want a gradient; others run
            eagerly. Each keeps its inputs, outputs and gradients on the card; what is in use only during a launch is
            shared among them.

    Raises:
        ValueError: a wrong ``mode`` or ``most``; an input that has a graph. With "on" also whatever cannot be captured:
            the message names the tensor, or the line that waits for the card.
    """
    step = Captured(function, mode=mode, most=most)
    if example:
        step._graph(*_taken_apart(example))
    return step


class Captured:
    """What :func:`captured` returns.

    Attributes:
        launches: how many calls were launches of a graph; the others ran eagerly.
    """

    def __init__(self, function: Callable[..., Tree], *, mode: Mode = "auto", most: int = 4):
        if mode not in get_args(Mode):
            raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
        at_least("most", most)
        self.function, self.mode, self.most = function, mode, most
        self.launches = self._moves = 0
        self._modules = [x for x in owners(function, ()) if isinstance(x, nn.Module)] + captured_modules(function)
        self._places = Places(self._modules)
        self._graphs: dict[object, _Graph] = {}
        self._cards: dict[torch.device, Card] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which captures for itself: a graph reads and writes the tensors of the original."""
        return {**vars(self), "_graphs": {}, "_cards": {}}

    @property
    def graphs(self) -> int:
        """For how many sets of shapes it is captured."""
        return len(self._graphs)

    def prepare(self, *inputs: Tree) -> None:
        """Capture it for inputs like these, if it is not yet, without calling it."""
        self._graph(*_taken_apart(inputs))

    def __call__(self, *inputs: Tree) -> Tree:
        """What ``function(*inputs)`` returns and leaves, from a launch where it is captured."""
        leaves, spec = _taken_apart(inputs)
        graph = self._graph(leaves, spec)
        if graph is None:
            return detach(self.function(*inputs))
        self.launches += 1
        for other in self._graphs.values():
            if other is not graph:
                other.let_go()
        return graph.launch(leaves)

    def forget(self) -> None:
        """Drop all graphs: the next call captures again."""
        self._graphs.clear()
        self._cards.clear()  # torch refuses a pool of memory that no graph uses any more

    def _graph(self, leaves: list[Any], spec: TreeSpec) -> _Graph | None:
        """The graph for these inputs, captured if need be; None where the function runs eagerly."""
        if self.mode == "off":
            return None
        key = self._key(leaves, spec)
        found = self._graphs.get(key)
        if found is not None and not found.moved():
            return found
        if found is not None or not self._places.same():
            del found
            self._drop_the_moved()
            self._places = Places(self._modules)
            key = self._key(leaves, spec)
        if len(self._graphs) >= self.most:
            return None
        try:
            card = self._card(leaves, spec)
            if card is not None:
                graph = self._graphs[key] = _Graph(card, self.function, leaves, spec, self._modules)
                return graph
        except NotCapturedError as reason:
            if self.mode == "on":
                raise ValueError(f"captured: {reason}") from reason.__cause__
            self.mode = "off"
            self.forget()
            warnings.warn(f"captured: {reason}. It runs eagerly", stacklevel=3)
        return None

    def _drop_the_moved(self) -> None:
        """Graphs of what is not there any more. Where that comes again and again, it is said once."""
        kept = {key: graph for key, graph in self._graphs.items() if not graph.moved()}
        dropped = [graph for key, graph in self._graphs.items() if key not in kept]
        for graph in dropped:
            graph.let_go()
        self._moves += bool(dropped)
        if self._moves == MANY_MOVES and dropped:
            warnings.warn(
                f"captured: what {name_of(self.function)} reads or trains was replaced {MANY_MOVES} times (or is on "
                "another device and was changed), and each time it was captured anew, which takes as long as some "
                "dozens of calls: change it in place",
                stacklevel=4,
            )
        self._graphs = kept
        if not kept:
            self.forget()

    def _key(self, leaves: list[Any], spec: TreeSpec) -> object:
        """What a graph is for: shapes, and whatever else of the surroundings a launch could not follow."""
        described = tuple(
            (x.shape, x.dtype, x.device, x.requires_grad)
            if isinstance(x, Tensor)
            else (type(x), None if isinstance(x, float) and math.isnan(x) else x)
            for x in leaves
        )
        grad_enabled = torch.is_grad_enabled()
        kinds = {x.device.type for x in leaves if isinstance(x, Tensor)}
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        )
        modes = self._places.modes(), self._places.trained() if grad_enabled else None
        key = described, str(spec), autocast, modes, grad_enabled
        try:
            hash(key)
        except TypeError:
            odd = next(x for x in leaves if not isinstance(x, Tensor) and not _hashable(x))
            raise ValueError(f"captured: an input holds a {type(odd).__name__}, which cannot be compared") from None
        return key

    def _card(self, leaves: list[Any], spec: TreeSpec) -> Card | None:
        """The card that the inputs are on; None on other devices, where "auto" has nothing to do."""
        found = {x.device for x in leaves if isinstance(x, Tensor)}
        cards = sorted((device for device in found if can_capture(device)), key=str)
        named = tree_flatten_with_path(tree_unflatten(leaves, spec))[0]
        for path, x in named:
            if isinstance(x, Tensor) and (self.mode == "on" or cards) and (x.device not in cards[:1]):
                expected = f"expected it on {cards[0]} like the others" if cards else "expected a CUDA device"
                raise NotCapturedError(f"inputs{keystr(path)} is on {x.device}; {expected}")
        if not found and self.mode == "on":
            raise NotCapturedError("expected a tensor among the inputs, which says on which card")
        if not cards:
            return None
        for path, x in named:
            if not isinstance(x, Tensor) and holds_a_tensor(x):
                raise NotCapturedError(
                    f"inputs{keystr(path)} is a {type(x).__name__}, whose tensors no launch would read anew: give these"
                )
        return self._cards.setdefault(cards[0], Card(cards[0]))


def can_capture(device: torch.device) -> bool:
    """Whether steps can be captured on a device."""
    return device.type == "cuda"


class NotCapturedError(Exception):
    """Why something is not captured."""


class _Graph:
    """A function captured for one set of shapes: its static inputs, outputs and gradients."""

    def __init__(
        self,
        card: Card,
        function: Callable[..., Tree],
        leaves: list[Any],
        spec: TreeSpec,
        modules: Sequence[nn.Module],
    ):
        self.inputs = [_buffer(x) if isinstance(x, Tensor) else x for x in leaves]
        self.sources = [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]
        inputs = tree_unflatten(self.inputs, spec)
        name = name_of(function)
        self.targets: list[Tensor] = []
        given = [x for x in self.inputs if isinstance(x, Tensor)]

        def run() -> list[Any]:
            """Returns the leaves of the outputs, then the gradients."""
            for x in self.targets:
                x.grad = None
            with _own_casts():
                outputs, self.spec = tree_flatten(function(*inputs))
            return [*detach(list(outputs)), *(x.grad for x in self.targets)]

        def run_with_marks() -> bool:
            for x in self.targets:
                x.grad = torch.full_like(x, _mark(x))
            with _own_casts():
                function(*inputs)
            return all(map(_only_added_to, self.targets))

        with _as_before(card, modules) as drawn, Rehearsed(function, modules, NotCapturedError) as rehearsed:
            # Kernels are loaded and chosen in the first of three runs; in the last none may wait for the card.
            versions = [version(x) for x in given]
            with _training_refused(name):
                card.rehearse(run)  # whatever it raises is not about capturing
            rehearsed.once()
            self.changed = [x for x, before in zip(given, versions, strict=True) if version(x) != before]
            sources = {id(x) for x in self.sources}
            there = _alive(Tensor, DistributedDataParallel)
            others = [x for x in _leaves_with_gradients(there, card.device) if id(x) not in sources]
            self.targets = [*self.sources, *others]
            _refuse_parallel(self.targets, there)
            draws = drawn(name)
            try:
                self._fill(leaves)  # what the run before has changed
                only_added_to = card.rehearse(run_with_marks)
                rehearsed.twice()
                if not only_added_to:
                    raise NotCapturedError(
                        f"{name} clears or changes .grad, of which a launch has its own part alone: do it outside"
                    )
                self._fill(leaves)
                with Read(card.device) as self._read:
                    _refuse_elsewhere(card.rehearse(run, strict=True), card.device, name)
                for x in self.targets:
                    x.grad = None
                self._read.keep()
                self.static, self.start = card.record(run, draws)
            except (RuntimeError, NotCapturedError) as error:
                raise _explained(error, name) from error
            self.grads = self.static[len(self.static) - len(self.targets) :]
            self.outputs = self.static[: len(self.static) - len(self.targets)]
        self.places, self.addresses = Places(modules), self._addresses()

    def _addresses(self) -> list[int]:
        return [x.data_ptr() for x in self.targets]

    def moved(self) -> bool:
        """Whether what it reads or trains lies elsewhere now."""
        return self.addresses != self._addresses() or not self.places.same() or self._read.changed()

    def _fill(self, leaves: list[Any]) -> None:
        with torch.no_grad():
            for static, given in zip(self.inputs, leaves, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(given)

    def let_go(self) -> None:
        """Of gradients that lie in its memory, which another graph's launch may use."""
        for x, grad in zip(self.targets, self.grads, strict=True):
            x.grad = _kept(x.grad, grad)

    def launch(self, leaves: list[Any]) -> Tree:
        self._fill(leaves)
        with torch.no_grad():
            sources = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
            owners = [*sources, *self.targets[len(sources) :]]
            # What the last launch left would be overwritten by this one.
            before = [_kept(x.grad, grad) for x, grad in zip(owners, self.grads, strict=True)]
            self.start()
            for x, old in zip(owners, before, strict=True):
                x.grad = old
            for static, x in zip(self.inputs, leaves, strict=True):
                if any(static is changed for changed in self.changed):
                    x.copy_(static)
            for i, (x, grad) in enumerate(zip(owners, self.grads, strict=True)):
                if grad is not None and x.grad is not None:  # that was there, or of the same tensor given twice
                    x.grad.add_(grad)
                elif grad is not None:  # a caller's tensor outlives this graph's buffers
                    x.grad = grad.clone() if i < len(sources) else grad
            outputs = [x.clone() if isinstance(x, Tensor) else x for x in self.outputs]
        return tree_unflatten(outputs, self.spec)


def _refuse_elsewhere(outputs: list[Any], device: torch.device, name: str) -> None:
    for i, x in enumerate(outputs):
        if isinstance(x, Tensor) and x.device != device:
            raise NotCapturedError(f"output {i} of {name} is on {x.device}, which no launch would change")


def _mark(x: Tensor) -> complex | float:
    """A gradient so large that nothing which is added changes it; in float16, whose numbers end too soon, infinite."""
    large = math.inf if x.dtype is torch.float16 else 2.0 ** (math.frexp(torch.finfo(x.dtype).max)[1] - 2)
    return complex(large, large) if x.is_complex() else large


def _only_added_to(x: Tensor) -> bool:
    """Whether its gradient, which was marked, is so still. One that is not finite says nothing."""
    return x.grad is not None and not bool(((x.grad != _mark(x)) & x.grad.isfinite()).any())


def _kept(grad: Tensor | None, static: Tensor | None) -> Tensor | None:
    if grad is None or static is None or grad.layout != static.layout:
        return grad
    same = grad is static or (grad.layout == torch.strided and grad.data_ptr() == static.data_ptr())
    return grad.clone() if same else grad


@contextlib.contextmanager
def _training_refused(name: str) -> Iterator[None]:
    """Optimizers' steps and the clearing of gradients, before they do anything."""

    def refusing(what: str, when: str) -> Callable[..., None]:
        def refuse(*_: object, **__: object) -> None:
            raise NotCapturedError(f"{name} {what}, which each run before a capture would do: do it {when} the call")

        return refuse

    steps, clears = refusing("calls an optimizer", "after"), refusing("clears gradients", "before")
    refused: list[tuple[Any, str, Any]] = [(nn.Module, "zero_grad", clears), (Optimizer, "zero_grad", clears)]
    refused += [(GradScaler, "unscale_", steps), (GradScaler, "step", steps)]
    handle = register_optimizer_step_pre_hook(steps)
    try:
        with _replaced(refused):
            yield
    finally:
        handle.remove()


class Card:
    """What is done with one CUDA device. A pool of memory is shared by all that a function is captured for there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool: Any = None

    @property
    def generator(self) -> torch.Generator:
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        return torch.cuda.default_generators[index]

    def rehearse(self, function: Callable[[], Any], strict: bool = False) -> Any:
        """Run it, on the stream that captures. Strictly, whatever waits for the card is a RuntimeError."""
        with torch.cuda.device(self.device):
            here, stream = torch.cuda.current_stream(), _stream(torch.cuda.current_device())
            stream.wait_stream(here)
            try:
                with torch.cuda.stream(stream), _waiting_refused() if strict else _waiting("default"):
                    return function()
            finally:  # whatever it raised: what is put back then comes after all that it has begun
                here.wait_stream(stream)

    def record(self, function: Callable[[], list[Any]], draws: bool) -> tuple[list[Any], Launch]:
        """Capture it: what it returned, which a launch writes anew, and the launch. ``draws``: random numbers."""
        generator = self.generator
        # A capture that fails leaves the state of the generator unusable, so it gets one of its own. Whatever reads and
        # sets it inside (torch takes that since 2.10) sees how far the launch has come.
        own, here = generator.clone_state(), generator.graphsafe_get_state()
        with torch.cuda.device(self.device), torch.cuda.stream(stream := _stream(torch.cuda.current_device())):
            # Kept if this succeeds: nobody knows what a capture that fails leaves in a pool.
            pool, self.pool = self.pool or torch.cuda.graph_pool_handle(), None
            graph = torch.cuda.CUDAGraph()
            generator.graphsafe_set_state(own)
            try:
                with (
                    contextlib.nullcontext() if draws else left_alone(self.device),
                    torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
                ):
                    static = function()
            finally:
                generator.graphsafe_set_state(here)
            self.pool = pool

        def launch() -> None:
            if draws:
                own.set_state(generator.get_state())
            graph.replay()
            if draws:
                generator.set_state(own.get_state())

        return static, launch


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """On which all captures of a card are made: cuBLAS keeps memory for each stream that it meets."""
    return torch.cuda.Stream(index)


@contextlib.contextmanager
def _waiting(mode: str) -> Iterator[None]:
    """What torch does, inside, where Python waits for a card: "default" is to wait, "error" to raise."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype, and does not find everything
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _waiting_refused() -> Iterator[None]:
    """By torch, and by the calls that do nothing else, which it lets through and which would spoil the capture."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    waits: list[tuple[Any, str]] = [(torch.cuda, "synchronize")]
    waits += [(kind, "synchronize") for kind in (torch.cuda.Event, torch.cuda.Stream)]
    with _waiting("error"), _replaced([(owner, method, refuse) for owner, method in waits]):
        yield


@contextlib.contextmanager
def _replaced(methods: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Of an owner, the attribute of this name by another, inside."""
    before = [getattr(owner, name) for owner, name, _ in methods]
    for owner, name, other in methods:
        setattr(owner, name, other)
    try:
        yield
    finally:
        for (owner, name, _), own in zip(methods, before, strict=True):
            setattr(owner, name, own)


@contextlib.contextmanager
def _own_casts() -> Iterator[None]:
    """A weight that autocast converted before is not the one of a launch, and one of a launch is nobody else's."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextlib.contextmanager
def _as_before(card: Card, modules: Sequence[nn.Module]) -> Iterator[Callable[[str], bool]]:
    """Gradients, generators and buffers are afterwards as they were. Inside, all leaves begin without a gradient.

    Gives a function that tells whether random numbers of the card were drawn.
    """
    # A node that adds to a gradient belongs to the stream on which it was made: one that an eager step left behind in a
    # cycle would draw the default stream into the capture.
    with _nothing_frozen():
        gc.collect()
    stashed = [(x, x.grad) for x in _leaves_with_gradients(_alive(Tensor), card.device)]
    buffers = {id(b): (b, b.clone()) for module in modules for b in module.buffers() if b.device == card.device}
    on_card, on_cpu = card.generator.get_state(), torch.get_rng_state()

    def drawn(name: str) -> bool:
        if card.generator is not torch.default_generator and not torch.equal(on_cpu, torch.get_rng_state()):
            raise NotCapturedError(f"{name} draws random numbers on the CPU, which would be the same in each launch")
        return not torch.equal(on_card, card.generator.get_state())

    for x, _ in stashed:
        x.grad = None
    try:
        yield drawn
    finally:
        for x in _leaves_with_gradients(_alive(Tensor), card.device):
            x.grad = None
        for x, grad in stashed:
            x.grad = grad
        torch.set_rng_state(on_cpu)
        card.generator.set_state(on_card)
        with torch.no_grad():
            for buffer, before in buffers.values():
                buffer.copy_(before)


@contextlib.contextmanager
def _nothing_frozen() -> Iterator[None]:
    """With the garbage collector seeing what ``gc.freeze`` hides from it, as long trainings do to spare its time."""
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    try:
        yield
    finally:
        if frozen:
            gc.freeze()


def _alive(*kinds: type) -> list[Any]:
    """All objects of these classes that there are: a step need not say what it trains, and none of it is forgotten."""
    with _nothing_frozen():
        objects = gc.get_objects()
    # There are a thousand times as many objects as types; what an object says of its class itself is not asked.
    wanted: dict[int, bool] = {}
    found = []
    for x in objects:
        of = type(x)
        if id(of) not in wanted:
            wanted[id(of)] = issubclass(of, kinds)
        if wanted[id(of)]:
            found.append(x)
    return found


def _leaves_with_gradients(there: Sequence[Any], device: torch.device) -> list[Tensor]:
    tensors = [x for x in there if isinstance(x, Tensor)]
    return [x for x in tensors if x.requires_grad and x.is_leaf and x.device == device and x.grad is not None]


def _refuse_parallel(targets: Sequence[Tensor], there: Sequence[Any]) -> None:
    ids = {id(x) for x in targets}
    for wrapper in there:
        if isinstance(wrapper, DistributedDataParallel) and any(id(p) in ids for p in wrapper.parameters()):
            raise NotCapturedError(
                "what it trains is wrapped in DistributedDataParallel, whose exchange of gradients is not captured: "
                "exchange them after the step, or run it eagerly"
            )


def _taken_apart(inputs: tuple[Tree, ...]) -> tuple[list[Any], TreeSpec]:
    leaves, spec = tree_flatten(inputs)
    for x in leaves:
        if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf:
            raise ValueError("captured: an input has a graph, into which no gradient could flow: detach it")
    return leaves, spec


def _buffer(x: Tensor) -> Tensor:
    with torch.inference_mode(False):  # later calls may be outside of one, and write into it
        return x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad)


def _hashable(x: object) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


# --- What stands in the way, in a sentence


def _explained(error: BaseException, name: str) -> NotCapturedError:
    if isinstance(error, NotCapturedError):
        return error
    while error.__context__ is not None and _frames(error)[-1][0].endswith(_GRAPHS):
        error = error.__context__  # the end of a capture that has failed raises another one
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = _line_of(error)
    if isinstance(error, torch.OutOfMemoryError):
        return NotCapturedError(f"there is not enough memory on the card to capture {name} ({text})")
    if "synchroniz" in text or "cannot be captured" in text or "capturing" in text or "during CUDA graph" in text:
        if "CUDAGeneratorImpl" in text:
            return NotCapturedError(
                f"{where} reads or sets the state of the card's random numbers in a way that this torch does not "
                f"capture ({text})"
            )
        return NotCapturedError(f"{where} waits for the card, or copies from or to the CPU, in {name} ({text})")
    return NotCapturedError(f"{where} failed when {name} was captured ({text})")


_GRAPHS = str(Path("torch", "cuda", "graphs.py"))
_NOT_THEIRS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def _frames(error: BaseException) -> list[tuple[str, int]]:
    """File and line of each call, the innermost at the end."""
    frames, at = [], error.__traceback__
    while at is not None:
        frames.append((at.tb_frame.f_code.co_filename, at.tb_lineno))
        at = at.tb_next
    return frames or [("", 0)]


def _line_of(error: BaseException) -> str:
    """``file:line (its text)`` of the innermost call that is neither torch's nor of this package."""
    frames = _frames(error)
    file, line = ([frame for frame in frames if not frame[0].startswith(_NOT_THEIRS)] or frames)[-1]
    text = linecache.getline(file, line).strip()
    return f"{file}:{line}" + (f" (`{text}`)" if text else "")
