"""One page about one card: captured steps checked against eager ones, then timed beside them.

It needs what ``memformer`` imports and no more: no tyro, no network, about four minutes. What a machine cannot show is
said to be skipped; a part that fails is said to have failed, and the others run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memformer import Memformer, memory_replay_backprop, replay
from memformer.bench.meters import machine, peak_bytes
from memformer.config import check_count
from memformer.data.segments import Segment
from memformer.rollouts import rollout
from memformer.sampling import Sampling
from memformer.settings import ComputeSettings, TrainingConfig
from memformer.training import Run
from memformer.writing import AHEAD

from .example import SMALL as SMALL_EXAMPLE
from .example import Example
from .rivals import INSTALL_EARLIER, earlier_settings, importing

__all__ = ["Card", "run"]

Step = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Captured steps on a card: exactness, memory over many launches, and times beside eager ones and plain BPTT."""

    device: str = "cuda"
    """Where to run; on the CPU nothing is captured."""
    tiny: bool = False
    """Models of a few numbers, to see that everything runs."""
    launches: int = 1000
    """How many launches may not grow memory."""
    seconds: int = 220
    """After so many, what is left is skipped."""
    earlier: Path | None = None
    """Folder of the earlier library (pip install --no-deps --target FOLDER memformer==0.3.1 einops==0.8.2), which then
    runs beside."""

    def __post_init__(self) -> None:
        check_count("launches", self.launches)
        check_count("seconds", self.seconds)


def run(settings: Card) -> Iterator[str]:
    """Yield the lines of the page.

    Raises:
        ValueError: there is no such device, or the earlier library is not in its folder.
    """
    if settings.earlier is not None and not (settings.earlier / "memformer").is_dir():
        raise ValueError(f"earlier: expected a folder made by `{INSTALL_EARLIER}`, got {settings.earlier}")
    try:
        device = torch.zeros(1, device=settings.device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {settings.device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    began = time.perf_counter()
    yield machine(device)
    if device.type != "cuda":
        yield f"skipped: {device} captures nothing, so that steps are eager twice, and their memory is not measured"
    failed, skipped = 0, []
    for name, part in _PARTS.items():
        if time.perf_counter() - began > settings.seconds:
            skipped.append(name)
            continue
        yield ""
        yield name
        try:
            yield from part(settings, device)
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            yield f"  FAILED: {type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
    yield ""
    if skipped:
        yield f"skipped after {settings.seconds} seconds: {'; '.join(skipped)}"
    yield f"{'all parts ran' if not failed else f'{failed} FAILED'}, {time.perf_counter() - began:.0f} seconds"


# --- What is captured


class GRU(nn.Module):
    """A cell that is no Memformer: (batch, dim) -> its loss and memory, with dropout."""

    def __init__(self, dim: int = 32):
        super().__init__()
        self.rnn, self.dropout = nn.GRUCell(dim, dim), nn.Dropout(0.3)

    def forward(self, segment: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.rnn(self.dropout(segment), self.dropout(memory))
        return memory.square().mean(), memory


@dataclass(frozen=True)
class Size:
    """A Memformer and what it is trained on: segments of ``length`` tokens."""

    dim: int
    encoder: int
    decoder: int
    length: int
    slots: int
    vocabulary: int

    def model(self, device: torch.device, dropout: float = 0.0) -> Memformer:
        torch.manual_seed(0)
        return Memformer(
            dim=self.dim, num_memory_slots=self.slots, dropout=dropout, tie_embeddings=True,
            enc_num_tokens=self.vocabulary, enc_max_seq_len=self.length, enc_depth=self.encoder,
            dec_num_tokens=self.vocabulary, dec_max_seq_len=self.length + 1, dec_depth=self.decoder,
        ).to(device)  # fmt: skip

    def tokens(self, batch: int, horizon: int, device: torch.device) -> tuple[Tensor, Tensor]:
        shape = (horizon, batch, self.length)
        src = torch.randint(self.vocabulary, shape, device=device)
        return src, torch.randint(self.vocabulary, (*shape[:2], self.length + 1), device=device)


SMALL = Size(16, 1, 1, 8, 2, 32)
DEFAULT = Size(64, 1, 2, 32, 16, 260)
PAPER = Size(512, 4, 8, 64, 32, 32_000)


def _step(model: Memformer, method: replay.Method, **options: Any) -> Step:
    def step(src: Tensor, tgt: Tensor) -> Any:
        segments = [Segment(s, tgt=t) for s, t in zip(src, tgt, strict=True)]
        with torch.autocast(src.device.type, torch.bfloat16, enabled=src.is_cuda):
            done = rollout(model, segments, method=method, divisor=float(src.numel()), wavefront=False, **options)
        done.loss.backward()
        return done.loss, done.memory

    return step


def _gru(cell: GRU, method: Any, **options: Any) -> Step:
    def step(segments: Tensor, memory: Tensor) -> Any:
        done = method(cell, list(segments), memory, **options)
        if method is replay.scan:
            values, after = done
            loss = torch.stack(values).sum()
        else:
            loss, after = done.loss, done.memory
        loss.backward()
        return loss, after

    return step


# --- Exactness


def _exact(settings: Card, device: torch.device) -> Iterator[str]:
    cell = GRU().to(device).double()
    inputs = [torch.randn(*shape, 32, dtype=torch.float64, device=device) for shape in ((6, 4), (4,))]
    ways: dict[str, tuple[nn.Module, Step, list[Tensor]]] = {
        f"GRU, {name}": (cell, _gru(cell, method, **options), inputs)
        for name, method, options in (
            ("memory_replay", replay.memory_replay, {}),
            ("no graphs kept", replay.memory_replay, {"schedule": replay.EveryMemory(graphs=0)}),
            ("Binomial(2)", replay.memory_replay, {"schedule": replay.Binomial(2)}),
            ("scan", replay.scan, {}),
            ("full_bptt", replay.full_bptt, {}),
        )
    }
    size = SMALL if settings.tiny else DEFAULT
    model = size.model(device, dropout=0.3)
    batch = size.tokens(4, 6, device)
    ways["Memformer, rollout"] = model, _step(model, replay.memory_replay), list(batch)
    paper = _paper(memory_replay_backprop, model)
    ways["Memformer, memory_replay_backprop"] = model, paper, [batch[0].transpose(0, 1).flatten(1), batch[1][-1]]
    plain = size.model(device)
    ways["Memformer, rollout, no dropout"] = plain, _step(plain, replay.memory_replay), list(batch)
    yield "  gradients of three steps with dropout 0.3, one after the other, captured against eager"
    wrong = []
    for name, (module, step, given) in ways.items():
        try:
            captured = replay.captured(step, *given, mode="on" if device.type == "cuda" else "auto")
            expected, numbers = _gradients(module, step, given, device)
            found, same = _gradients(module, captured, given, device)
        except Exception as error:
            wrong.append(name)
            yield f"  {name:<36}FAILED: {type(error).__name__}: {str(error)[:300]}"
            continue
        worst = max(_apart(a, b) for a, b in zip(found, expected, strict=True))
        differs = _apart(expected[0], expected[1])
        verdict = "equal" if worst == 0 else f"differ by {worst:.1e}"
        drawn = "so are the next random numbers" if torch.equal(numbers, same) else "THE NEXT RANDOM NUMBERS DIFFER"
        yield f"  {name:<36}{verdict}; {drawn}; steps differ by {differs:.0e}"
        if not worst < 1e-5 or not torch.equal(numbers, same):
            wrong.append(name)
    if wrong:
        raise RuntimeError(f"captured is not eager: {'; '.join(wrong)}")


def _gradients(module: nn.Module, step: Step, given: list[Tensor], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Of three calls, each with its outputs, as one vector; and random numbers drawn after them."""
    torch.manual_seed(3)
    found = []
    for _ in range(3):
        module.zero_grad(set_to_none=True)
        loss, memory = step(*given)
        parts = [p.grad for p in module.parameters() if p.grad is not None]
        found.append(torch.cat([x.detach().double().flatten() for x in (*parts, loss, memory)]).clone())
    return found, torch.rand(8, device=device)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _memory(settings: Card, device: torch.device) -> Iterator[str]:
    size = SMALL if settings.tiny else DEFAULT
    model = size.model(device, dropout=0.3)
    given = size.tokens(4, 6, device)
    step = replay.captured(_step(model, replay.memory_replay), *given)
    losses = []
    for i in range(settings.launches + 10):
        model.zero_grad(set_to_none=True)
        loss, _ = step(*given)
        losses.append(loss)
        if i == 9 and device.type == "cuda":
            before = torch.cuda.memory_allocated()
    if device.type != "cuda":
        yield "  skipped"
        return
    grown = torch.cuda.memory_allocated() - before - 512 * settings.launches  # the losses, which are kept here
    different = len(set(torch.stack(losses).tolist()))
    launched = f"{step.launches:,} launches of {len(losses):,} steps"
    yield f"  memory grows by {max(0, grown):,} bytes in {launched}; {different:,} different losses"


# --- Times


def _median(step: Callable[[], object], device: torch.device, runs: int) -> float:
    taken = []
    for _ in range(runs + 1):
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _times(settings: Card, device: torch.device) -> Iterator[str]:
    rows = [("default", DEFAULT, 12, 6), ("paper", PAPER, 16, 8), ("paper", PAPER, 64, 8), ("default", DEFAULT, 256, 6)]
    rows += [("paper", PAPER, 64, 4), ("paper", PAPER, 16, 16), ("paper", PAPER, 16, 64)]
    if settings.tiny:
        rows = [("tiny", SMALL, 2, 3)]
    columns = f"{'eager':>9}{'peak':>10}{'captured':>11}{'faster':>8}{'tokens/s':>12}{'of BPTT: speed':>16}{'peak':>6}"
    yield f"  {'model':<9}{'batch':>6}{'horizon':>8}  {'method':<26}{columns}"
    methods: dict[str, tuple[replay.Method, dict[str, int]]] = {
        "plain BPTT": (replay.full_bptt, {"readout_segments": 1}),
        "replay, 4 a readout": (replay.memory_replay, {"readout_segments": 4}),
        "replay as rollout does it": (replay.memory_replay, {}),
    }
    for name, size, batch, horizon in rows:
        model, given = size.model(device), size.tokens(batch, horizon, device)
        bptt: tuple[float, int] | None = None
        for label, (method, options) in methods.items():
            begin = f"  {name:<9}{batch:>6}{horizon:>8}  {label:<26}"
            step = _step(model, method, **options)
            try:
                peak, eager, graph = _timed(model, step, given, device, 3 if horizon < 64 else 1)
            except torch.OutOfMemoryError:
                yield f"{begin}out of memory"
                continue
            begin += f"{1e3 * eager:>6.1f} ms{peak / 1e6:>7,.0f} MB"
            if graph is None:
                yield f"{begin} not captured"
                continue
            bptt = bptt or ((graph, peak) if method is replay.full_bptt else None)
            speed = batch * size.length * horizon / graph
            begin += f"{1e3 * graph:>8.1f} ms{eager / graph:>6.2f} x{speed:>12,.0f}"
            yield begin + ("" if bptt is None else f"{bptt[0] / graph:>14.2f} x{peak / max(1, bptt[1]):>6.2f}")
        del model, step
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _timed(
    model: nn.Module, step: Step, given: tuple[Tensor, ...], device: torch.device, runs: int = 3
) -> tuple[int, float, float | None]:
    """Of a step: bytes at its peak and seconds, both eager, and seconds captured; None where it cannot be."""
    eager = functools.partial(_cleared, model, step, given)
    peak, seconds = peak_bytes(eager, device, model), _median(eager, device, runs)
    captured = replay.captured(step, *given)
    if not captured.graphs:
        return peak, seconds, None
    return peak, seconds, _median(functools.partial(_cleared, model, captured, given), device, 5)


def _cleared(model: nn.Module, step: Step, given: tuple[Tensor, ...]) -> None:
    model.zero_grad(set_to_none=True)
    step(*given)


def _example(settings: Card, device: torch.device) -> Iterator[str]:
    """The source's README: 8 segments of 1024 tokens, dim 512; and the earlier library, where there is one."""
    example = SMALL_EXAMPLE if settings.tiny else Example(target_tokens=1024)
    columns = f"{'eager':>9}{'peak':>10}{'captured':>11}{'faster':>8}"
    theirs = "" if settings.earlier is None else f"{'earlier':>11}{'peak':>10}{'faster':>8}"
    yield f"  {'batch':>6}  {'precision':<10}{columns}{theirs}"
    model, arguments = Memformer(**example.config.to_dict()).to(device), earlier_settings(example.config)
    for batch, precision in itertools.product((1, 8), (torch.float32, torch.bfloat16)):
        given = tuple(x.to(device).repeat(batch, 1) for x in example.tokens())
        step = _paper(memory_replay_backprop, model, precision)
        peak, slow, graph = _timed(model, step, given, device)
        fast = graph or slow
        line = f"  {batch:>6}  {str(precision)[6:]:<10}"
        line += f"{1e3 * slow:>6.1f} ms{peak / 1e6:>7,.0f} MB{1e3 * fast:>8.1f} ms{slow / fast:>6.2f} x"
        if settings.earlier is not None:
            with importing(settings.earlier, "memformer") as package:
                other = package.Memformer(**arguments).to(device)
                masks = {
                    f"{name}_mask": torch.ones_like(x).bool() for name, x in zip(("src", "tgt"), given, strict=True)
                }
                run = _paper(package.memory_replay_backprop, other, precision, **masks)
                earlier = functools.partial(_cleared, other, run, given)
                peak, took = peak_bytes(earlier, device, other), _median(earlier, device, 3)
            line += f"{1e3 * took:>8.1f} ms{peak / 1e6:>7,.0f} MB{took / fast:>6.2f} x"
        yield line + (", not captured" if graph is None else "")


def _paper(
    method: Callable[..., Any], model: nn.Module, precision: torch.dtype = torch.float32, **masks: Tensor
) -> Step:
    def step(src: Tensor, tgt: Tensor) -> Any:
        with torch.autocast(src.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            return method(model, src=src, tgt=tgt, **masks)

    return step


def _compiled(settings: Card, device: torch.device) -> Iterator[str]:
    """As ``memformer train --compile`` has it: encoder and decoder through ``torch.compile``, inside the capture."""
    if device.type != "cuda" and not settings.tiny:
        yield "  skipped"
        return
    size, batch, horizon = (SMALL, 2, 3) if settings.tiny else (PAPER, 64, 8)
    model, given = size.model(device), size.tokens(batch, horizon, device)
    step, found = _step(model, replay.memory_replay), []
    yield f"  batch {batch}, horizon {horizon}, replay as rollout does it"
    for name in ("plain", "compiled"):
        began = time.perf_counter()
        if name == "compiled":
            model.compile_parts()
        _cleared(model, step, given)
        _wait(device)
        first = time.perf_counter() - began
        found.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
        peak, slow, graph = _timed(model, step, given, device)
        fast = graph or slow
        times = f"first step {first:>6.1f} s, eager {1e3 * slow:>6.1f} ms, captured {1e3 * fast:>6.1f} ms"
        speed = f"{batch * size.length * horizon / fast:>9,.0f} tokens/s, peak {peak / 1e6:,.0f} MB"
        yield f"  {name:<10}{times}, {speed}" + (", not captured" if graph is None else "")
    yield f"  gradients differ by {_apart(found[1], found[0]):.1e}"


def _training(settings: Card, device: torch.device) -> Iterator[str]:
    """As ``memformer train`` is by default, and whether its steps wait for the card."""
    steps, weights = (8 if settings.tiny else 120), {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.mkdir()
        for i in range(40):
            (data / f"{i}.txt").write_text(f"{i} was seen and is not forgotten. " * (20 if settings.tiny else 2000))
        for capture in ("off", "auto"):
            config = TrainingConfig(
                data=(data,), out=Path(folder, capture), steps=steps, device=str(device),
                compute=ComputeSettings(capture=capture),
            )  # fmt: skip
            config = dataclasses.replace(config, output=dataclasses.replace(config.output, save_every=10 * steps))
            run = Run(config)
            taking = run._stepper
            for _ in range(4):
                taking.take()
            _wait(device)
            began, tokens = time.perf_counter(), 0
            strict = device.type == "cuda" and not taking.waits
            if strict:
                torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(steps - 4):
                    tokens += taking.take().tokens
            finally:
                if strict:
                    torch.cuda.set_sync_debug_mode("default")
            taking.settle()
            _wait(device)
            speed = tokens / (time.perf_counter() - began)
            weights[capture] = torch.cat([p.detach().double().flatten().cpu() for p in run.model.parameters()])
            waits = "no step waited for the card" if strict else "each step waits"
            launched = f"{taking.launches} of {steps} rollouts launched"
            yield f"  --capture {capture}: {speed:,.0f} tokens/s, {launched}; {waits}"
    yield f"  after {steps} steps the weights differ by {_apart(weights['auto'], weights['off']):.1e}"


# --- Generation


def _generation(settings: Card, device: torch.device) -> Iterator[str]:
    """One launch per token beside eager, with the ends of segments, from the same generator."""
    size, count = (SMALL, 24) if settings.tiny else (PAPER, 128)
    model = size.model(device).eval()
    yield f"  {'batch':>7}  {'tokens':<8}{'eager':>12}{'captured':>12}{'faster':>9}{'tokens/s':>10}{'second token':>15}"
    differ = []
    for batch in (1, 2) if settings.tiny else (1, 32, 256):
        prompt = torch.randint(size.vocabulary - 1, (batch, size.length), device=device)
        for name, how in {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 1.0, "top_p": 0.95}}.items():
            eager, captured = (
                _written(model, prompt, count, mode, **how)
                for mode in ("off", "on" if device.type == "cuda" else "auto")
            )
            same = torch.equal(eager.tokens, captured.tokens)
            speed = f"{eager.seconds / captured.seconds:>7.2f} x{batch / captured.seconds:>10,.0f}"
            times = f"{1e3 * eager.seconds:>9.2f} ms{1e3 * captured.seconds:>9.2f} ms{speed}"
            waits = "; waits for nothing inside a segment" if captured.strict else ""
            verdict = f"{'equal' if same else 'DIFFERENT TOKENS'}{waits}"
            yield f"  {batch:>7}  {name:<8}{times}{1e3 * captured.second:>12.0f} ms  {verdict}"
            if not same:
                differ.append(f"{name} at batch {batch}")
    if differ:
        raise RuntimeError(f"other tokens than eager: {', '.join(differ)}")


@dataclass(frozen=True)
class Written:
    """Tokens (batch, count), seconds per token without the first two, and of the second, before which is captured."""

    tokens: Tensor
    seconds: float
    second: float
    strict: bool


def _written(model: Memformer, prompt: Tensor, count: int, mode: Any, **how: Any) -> Written:
    device = prompt.device
    generator = torch.Generator(device).manual_seed(0)
    stream = model.stream(
        prompt, count, start=model.config.vocabulary - 1, generator=generator, capture=mode, sampling=Sampling(**how)
    )
    tokens = [next(stream)]
    _wait(device)
    began = time.perf_counter()
    tokens.append(next(stream))
    _wait(device)
    second = time.perf_counter() - began
    strict = stream.launches > 0 and prompt.shape[1] > AHEAD  # a segment's end is looked at
    began = time.perf_counter()
    if strict:  # for fewer tokens than those after which is looked
        torch.cuda.set_sync_debug_mode("error")
    try:
        tokens += [next(stream) for _ in range(AHEAD - 3)] if strict else []
    finally:
        if strict:
            torch.cuda.set_sync_debug_mode("default")
    tokens += stream
    _wait(device)
    return Written(torch.stack(tokens, 1), (time.perf_counter() - began) / (count - 2), second, strict)


_PARTS: dict[str, Callable[[Card, torch.device], Iterator[str]]] = {
    "exactness": _exact,
    "memory": _memory,
    "training": _training,
    "generation": _generation,
    "one gradient": _times,
    "the source's example": _example,
    "compiled": _compiled,
}
