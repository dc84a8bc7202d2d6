"""memformer generate."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import torch
import tyro
from torch import Tensor

from ..data import TextDecoder, TokenIds, Tokenizer, decoder_behind
from ..generation import Filters, Sampling, stream
from ..interface import SegmentModel
from ..state import MemoryState
from ..writing import Capture
from . import models

__all__ = ["GenerateCommand", "run", "write"]


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """Continue a text to any length, in constant memory; each token is printed as it comes."""

    checkpoint: Path
    """A run's folder, or one checkpoint in it."""
    prompt: str | None = None
    """The text to continue, which is printed first; empty: begin a document. Not given: read what is piped in."""
    prompt_file: Path | None = None
    """A file with the text to continue, of any length; - for standard input."""
    state: Path | None = None
    """Go on from the memory in this file if it exists, and save it there at the end, also after Ctrl-C."""
    interactive: bool = False
    """Read a line, continue it, and so on, with one memory; an empty line lets the model go on."""
    max_new_tokens: int = 300
    """How many tokens to write, after each line if interactive."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Stop after this text; may be given several times. A model that learned where documents end stops there, too."""
    seed: int = 0
    """Seed of the choices; a --state that goes on draws new numbers."""
    base: Path | None = None
    """Of a memory around a pretrained model, the folder of that one where it has moved since the training."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""
    capture: Capture = "auto"
    """On CUDA, launch each token as one graph; auto where that pays and can be, on or else refuse."""
    sampling: Filters = field(default_factory=lambda: Filters(temperature=0.9, top_p=0.95))
    writer: models.WriterOptions = field(default_factory=models.WriterOptions)


def run(command: GenerateCommand) -> int:
    """Print what a model writes; returns the exit status."""
    saving = _Saving(command)
    try:
        _run(command, saving)
    except KeyboardInterrupt:
        print(f"\nmemformer: stopped{saving.outcome}", file=sys.stderr)
        return 130
    return 0


_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd") | {ord("\r"): ""}
"""What a model that has learned little may write and a terminal would obey: to change its letters, or its colours."""


class _Saving:
    """Saves the state of what is being written when that ends, however it ends, and says what became of it."""

    def __init__(self, command: GenerateCommand):
        self._path, self._saved = command.state, False

    @property
    def outcome(self) -> str:
        if self._saved:
            return f"; {self._path} holds what was written so far"
        return f"; {self._path} is as it was saved last" if self._path and self._path.exists() else ""

    def save(self, state: MemoryState, model: SegmentModel) -> None:
        if self._path is not None:
            state.save(self._path, model)
            self._saved = True


class _Interrupts:
    """Ctrl-C while a token is made waits until it is whole; at any other time it interrupts at once."""

    def __init__(self) -> None:
        self._busy = self._asked = False

    def __enter__(self) -> _Interrupts:
        # Other threads than the main one get no signals, and programs in the background of a shell ignore this one.
        self._before = signal.getsignal(signal.SIGINT)
        self._listens = threading.current_thread() is threading.main_thread() and callable(self._before)
        if self._listens:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._busy or self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def whole(self, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
        while True:
            self._busy = True
            token = next(tokens, None)
            self._busy = False
            if token is None:
                return
            yield token
            if self._asked:
                raise KeyboardInterrupt


def write(model: SegmentModel, tokenizer: Tokenizer, command: GenerateCommand) -> None:
    """Print the prompt and its continuation, each character as soon as it is whole."""
    _continue(model, tokenizer, command, command.prompt or "", None, _generator(model, command, None), _Saving(command))


def _run(command: GenerateCommand, saving: _Saving) -> None:
    if command.state is not None:
        folder = command.state.resolve().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            lack = "cannot be written to" if folder.is_dir() else "is not a folder"
            raise ValueError(f"state: {folder} {lack}, so nothing could be saved there")
    model, tokenizer = models.load(command.checkpoint, command.device, command.writer, command.base)
    state = None
    if command.state is not None and command.state.exists():
        state = MemoryState.load(command.state, model)
        if state.batch_size != 1:
            raise ValueError(
                f"state: expected one lane in {command.state}, got {state.batch_size}; MemoryState.split separates them"
            )
    generator = _generator(model, command, state)
    for text in _texts(command):
        state = _continue(model, tokenizer, command, text, state, generator, saving)


def _texts(command: GenerateCommand) -> Iterator[str]:
    """What is to be continued, one after the other."""
    if command.prompt is not None and command.prompt_file is not None:
        raise ValueError("prompt: expected either --prompt or --prompt-file, got both")
    if command.prompt is not None:
        yield _utf8("prompt", command.prompt.encode("utf-8", "surrogateescape"))
    elif command.prompt_file is not None and command.prompt_file != Path("-"):
        yield _utf8(str(command.prompt_file), command.prompt_file.read_bytes())
    elif command.prompt_file is not None or (not command.interactive and _piped()):
        yield _utf8("standard input", sys.stdin.buffer.read())
    elif not command.interactive:
        yield ""
    if command.interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines)
    while command.interactive:
        try:
            with _expecting_utf8("standard input"):
                line = _decoded(input("> " if sys.stdin.isatty() else "").encode("utf-8", "surrogateescape"))
        except EOFError:
            return
        yield line + "\n" if line else ""


def _piped() -> bool:
    """Standard input is a pipe or a file: neither a terminal nor nothing."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _utf8(name: str, text: bytes) -> str:
    with _expecting_utf8(name):
        return _decoded(text)


def _decoded(text: bytes) -> str:
    """Without a byte order mark, which is no part of a text; nor is it where texts are trained on."""
    return text.decode("utf-8-sig")


@contextlib.contextmanager
def _expecting_utf8(name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8 text ({error})") from error


def _generator(model: SegmentModel, command: GenerateCommand, state: MemoryState | None) -> torch.Generator:
    """A stream that goes on must not draw the same numbers again."""
    before = 0 if state is None else int(state.position)
    device = next(model.parameters()).device
    return torch.Generator(device).manual_seed((command.seed + 1_000_003 * before) % 2**63)


def _continue(
    model: SegmentModel,
    tokenizer: Tokenizer,
    command: GenerateCommand,
    text: str,
    state: MemoryState | None,
    generator: torch.Generator,
    saving: _Saving,
) -> MemoryState:
    device, end = next(model.parameters()).device, tokenizer.end
    ids = tokenizer.encode(text).tolist() if text else []
    runs = _runs(tokenizer, command.stop) if isinstance(tokenizer, TokenIds) else []
    written = stream(
        model.eval(),
        torch.tensor([ids], dtype=torch.int64, device=device),
        command.max_new_tokens,
        start=tokenizer.start,
        state=state,
        sampling=Sampling(never=tokenizer.special, stop=[] if end is None else [end], **asdict(command.sampling)),
        generator=generator,
        capture=command.capture,
    )
    try:
        with _Interrupts() as interrupts:
            if command.prompt is not None and not command.interactive:
                sys.stdout.write(f"{text} " if isinstance(tokenizer, TokenIds) and text else text)
            decoder = decoder_behind(tokenizer, ids if ids or state is None else _last(state))
            _print(_until(interrupts.whole(written), runs), decoder, () if runs else command.stop)
    except (KeyboardInterrupt, OSError):  # whoever read it has left, or the disk is full
        saving.save(written.state, model)
        raise
    saving.save(written.state, model)
    return written.state


def _runs(tokenizer: TokenIds, stops: Sequence[str]) -> list[list[int]]:
    """The ids of the stops. What is shown as numbers is compared as ids: 26 has no 6 in it."""
    try:
        return [tokenizer.encode(stop).tolist() for stop in stops]
    except ValueError as error:
        raise ValueError(f"stop: {error}") from error


def _until(tokens: Iterator[Tensor], runs: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """All tokens up to the end of the first of these runs of ids."""
    last: list[int] = []
    for token in tokens:
        yield token
        last = [*last, int(token)][-max(map(len, runs), default=1) :]
        if any(last[-len(run) :] == run for run in runs):
            return


def _last(state: MemoryState) -> list[int]:
    """The last tokens that were read or written."""
    position = int(state.position[0])
    both = torch.cat([state.segment[0], state.pending[0, : position % state.length]])
    return both[max(0, len(both) - position) :].tolist()


def _print(tokens: Iterator[Tensor], decoder: TextDecoder, stops: Sequence[str]) -> None:
    """Each token's text as soon as its characters are whole, up to the end of the first stop."""
    written = ""
    controls = _CONTROLS if sys.stdout.isatty() else {}
    before = max(map(len, stops), default=1) - 1  # so many characters of a stop may have been written already
    for token in tokens:
        kept = written[len(written) - min(before, len(written)) :]
        written = kept + decoder.decode([int(token)])
        ends = [place + len(stop) for stop in stops if (place := written.find(stop)) >= 0]
        sys.stdout.write(written[len(kept) : min(ends, default=None)].translate(controls))
        sys.stdout.flush()
        if ends:
            break
    else:
        sys.stdout.write(decoder.flush().translate(controls))
    print(flush=True)
