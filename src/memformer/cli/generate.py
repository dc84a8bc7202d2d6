"""memformer generate."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..data import Tokenizer
from ..generation import Filters, Sampling
from ..model import Memformer
from ..state import MemoryState
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
    """Go on from the memory in this file if it exists, and save the memory there at the end."""
    interactive: bool = False
    """Read a line, continue it, and so on, with one memory; an empty line lets the model go on."""
    max_new_tokens: int = 300
    """How many tokens to write, after each line if interactive."""
    stop: str | None = None
    """Stop after this text; a model that learned where documents end stops there by itself."""
    seed: int = 0
    """Seed of the choices; a --state that goes on draws new numbers."""
    device: str = "auto"
    """Where to run: cpu, cuda, ... ; auto takes an accelerator if there is one."""
    sampling: Filters = field(default_factory=lambda: Filters(temperature=0.9, top_p=0.95))


def run(command: GenerateCommand) -> int:
    """Print what a model writes; returns the exit status."""
    try:
        _run(command)
    except KeyboardInterrupt:
        kept = f"; {command.state} is as it was saved last" if command.state and command.state.exists() else ""
        print(f"\nmemformer: stopped{kept}", file=sys.stderr)
        return 130
    return 0


def write(model: Memformer, tokenizer: Tokenizer, command: GenerateCommand) -> None:
    """Print the prompt and its continuation, each character as soon as it is whole."""
    _continue(model, tokenizer, command, command.prompt or "", None, _generator(model, command, None))


def _run(command: GenerateCommand) -> None:
    if command.state is not None and not command.state.resolve().parent.is_dir():
        raise ValueError(f"state: {command.state.resolve().parent} is not a folder, so nothing could be saved there")
    model, tokenizer = models.load(command.checkpoint, command.device)
    state = None
    if command.state is not None and command.state.exists():
        state = MemoryState.load(command.state, model)
        if state.batch_size != 1:
            raise ValueError(
                f"state: expected one lane in {command.state}, got {state.batch_size}; MemoryState.split separates them"
            )
    generator = _generator(model, command, state)
    for text in _texts(command):
        state = _continue(model, tokenizer, command, text, state, generator)
        if command.state is not None:
            state.save(command.state, model)


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
            line = input("> " if sys.stdin.isatty() else "")
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
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8 text ({error})") from error


def _generator(model: Memformer, command: GenerateCommand, state: MemoryState | None) -> torch.Generator:
    """A stream that goes on must not draw the same numbers again."""
    before = 0 if state is None else int(state.position)
    device = next(model.parameters()).device
    return torch.Generator(device).manual_seed((command.seed + 1_000_003 * before) % 2**63)


def _continue(
    model: Memformer,
    tokenizer: Tokenizer,
    command: GenerateCommand,
    text: str,
    state: MemoryState | None,
    generator: torch.Generator,
) -> MemoryState:
    device, end = next(model.parameters()).device, tokenizer.end
    ids = tokenizer.encode(text).tolist() if text else []
    stream = model.eval().stream(
        torch.tensor([ids], dtype=torch.int64, device=device),
        command.max_new_tokens,
        start=tokenizer.start,
        state=state,
        sampling=Sampling(never=tokenizer.special, stop=[] if end is None else [end], **asdict(command.sampling)),
        generator=generator,
    )
    if command.prompt is not None and not command.interactive:
        sys.stdout.write(text)
    decoder, written = tokenizer.decoder(), ""
    for token in stream:
        new = decoder.decode([int(token)])
        sys.stdout.write(new)
        sys.stdout.flush()
        if command.stop:
            written = (written + new)[-len(command.stop) - len(new) :]
            if command.stop in written:
                break
    print(decoder.flush())
    return stream.state
