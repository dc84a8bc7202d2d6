"""memformer encode."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..data import BPETokenizer, read_documents, write_tokens
from ..training.corpus import train_bpe
from .typed import check_fields

__all__ = ["EncodeCommand", "run"]


@dataclass(frozen=True, kw_only=True)
class EncodeCommand:
    """Encode texts once, into a folder that memformer train, evaluate and inspect take as --data.

    The tokenizer goes into the folder, so that no command needs to be told it again.
    """

    data: tuple[Path, ...]
    """Files and folders: text, or rows (.jsonl, .csv, .parquet, ...), compressed or not."""
    out: Path
    """The folder to write; it must not exist."""
    tokenizer: str = "bpe"
    """bpe, trained on these documents; or the path of a tokenizer.json."""
    vocabulary: int = 2048
    """The most tokens of a bpe that is trained here."""
    text_field: str = "text"
    """The field that holds the text, in rows of .jsonl, .json, .csv, .parquet and the like."""


def run(command: EncodeCommand) -> int:
    """Write the token files, and print how many there are; returns the exit status."""
    if command.tokenizer in ("bytes", "ids"):
        what = "bytes need no encoding" if command.tokenizer == "bytes" else "ids are encoded already"
        raise ValueError(f"tokenizer: {what}: give the data to memformer train; expected bpe, or a tokenizer.json")
    if command.out.exists():
        raise FileExistsError(f"{command.out}: exists already; remove it, or choose another --out")
    command.out.absolute().parent.mkdir(parents=True, exist_ok=True)  # before anything that takes long
    if not command.data:
        raise ValueError("data: expected files or folders, got none")
    if command.tokenizer != "bpe" and command.vocabulary != EncodeCommand.vocabulary:
        raise ValueError(
            f"vocabulary: {command.vocabulary} has no meaning with a tokenizer that is there; leave it out"
        )
    check_fields({"text_field": command.text_field}, command.data)
    documents = read_documents(command.data, text_field=command.text_field, content="text")
    if ids := next((document for document in documents if not document.text), None):
        raise ValueError(f"{ids.name}: holds token ids, which are encoded already: give it to memformer train")
    size = sum(map(len, documents))
    with _progress(size) as (phase, show):
        if command.tokenizer == "bpe":
            phase("training the tokenizer")
            tokenizer = train_bpe(documents, command.vocabulary)
        else:
            tokenizer = BPETokenizer.from_file(command.tokenizer)
        phase("encoding")
        files = write_tokens(documents, tokenizer, command.out, show)
    print(f"data        {len(documents):,} documents ({size:,} bytes)")
    if empty := len(documents) - len(files.documents):
        print(f"left out    {empty:,} documents of which the tokenizer makes no token")
    print(f"tokenizer   {tokenizer.ordinary:,} tokens")
    per_token = f"{size / files.num_tokens:.3f} bytes per token" if files.num_tokens else "none at all"
    print(f"tokens      {files.num_tokens:,}, {per_token}")
    print(f"\nwritten to  {command.out}. Try:\n  memformer train --data {shlex.quote(str(command.out))}")
    return 0


@contextlib.contextmanager
def _progress(size: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """A bar on a terminal, on stderr; elsewhere nothing."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=size)
        yield lambda name: bar.update(task, description=name), lambda read: bar.update(task, completed=read)
