"""What a run reads: its documents, the tokenizer that it has or trains, and their ids, which are made once.

``OUT/tokens`` keeps them: a folder of :mod:`memformer.data.tokenfiles` for the training documents and one for those
held out, named after the fingerprints of the documents and of the tokenizer, so that whatever changed is made anew. The
first process writes, all of them read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..data import (
    BPETokenizer,
    ByteTokenizer,
    Document,
    TokenIds,
    Tokenizer,
    check_documents,
    fingerprint,
    load_tokenizer,
    open_tokens,
    tokenizer_fingerprint,
    write_tokens,
)
from ..data.documents import blocks
from ..data.tokenfiles import is_token_folder, with_tokens
from ..data.tokenizers import text_blocks
from ..parallel import Ranks
from ..settings import TrainingConfig
from .callbacks import Report, nothing
from .documents import documents_for_test, documents_of, evaluated
from .resume import changes_since

__all__ = ["Corpus", "corpus_of", "train_bpe"]

_BLOCK = 1 << 20


class Corpus(NamedTuple):
    """The documents of a run, encoded where the tokenizer is not of bytes.

    Attributes:
        held_out: those that are evaluated.
        all_held_out: those of which ``eval_limit`` leaves these, before they are encoded.
        fingerprint: of the training documents.
        held_out_fingerprint: of all that are held out.
    """

    training: Sequence[Document]
    held_out: Sequence[Document]
    all_held_out: Sequence[Document]
    test: Sequence[Document]
    fingerprint: str
    held_out_fingerprint: str
    test_fingerprint: str
    tokenizer: Tokenizer


def corpus_of(
    settings: TrainingConfig,
    ranks: Ranks,
    checkpoint: Path | None,
    initial: Tokenizer | None = None,
    report: Report = nothing,
    documents: tuple[Sequence[Document], Sequence[Document]] | None = None,
) -> Corpus:
    """The documents and the tokenizer of a run.

    Args:
        checkpoint: whose tokenizer it is, where there is one.
        initial: the tokenizer of the model that a new run begins with.
        report: is told what takes time: reading, training a BPE, encoding.
        documents: ``(training, held_out)``, made in Python, in place of ``settings.data``.

    Raises:
        ValueError, FileNotFoundError: see :func:`~memformer.data.read_documents`; the tokenizer does not fit the
            documents; or the processes do not have the same.
    """
    folders = [path for path in settings.data if is_token_folder(path)]
    tokenizer = initial if checkpoint is None else load_tokenizer(checkpoint)
    if tokenizer is None:
        tokenizer = _ready(settings, folders)
    report("reading")
    ranks.first(lambda: [open_tokens(folder, check=True).num_tokens for folder in folders])
    training, held_out = documents_of(settings) if documents is None else _given(settings, documents)
    test = documents_for_test(settings)
    known = [fingerprint(part) for part in (training, held_out, test)]
    read = evaluated(held_out, settings.evaluation.eval_limit)
    ranks.agree(dict(zip(("training text", "held-out text", "text for the test"), known, strict=True)))
    if checkpoint is not None:
        changes_since(checkpoint, settings, known[0], known[1])  # before other documents are encoded
    if tokenizer is None:
        _check_texts([*training, *held_out, *test])
        tokenizer = _trained(settings, training, ranks, report)
    tokenizer = tokenizer.with_end(settings.documents.end)
    if ranks.size > 1:
        ranks.agree({"tokenizer": tokenizer_fingerprint(tokenizer)})
    place = settings.out / "tokens"
    if not isinstance(tokenizer, ByteTokenizer | TokenIds):  # theirs are read while they stream
        report("encoding")
    # What is evaluated is checked before anything that takes long.
    read, test, training = (
        _encoded(part, tokenizer, place, what, ranks)
        for part, what in ((read, "held-out"), (test, "test"), (training, "training"))
    )
    empty = [d for d in training if not d.text or not len(d)]
    check_documents([*empty, *read, *test], tokenizer)
    return Corpus(
        training=training,
        held_out=read,
        all_held_out=held_out,
        test=test,
        fingerprint=known[0],
        held_out_fingerprint=known[1],
        test_fingerprint=known[2],
        tokenizer=tokenizer,
    )


def _given(
    settings: TrainingConfig, documents: tuple[Sequence[Document], Sequence[Document]]
) -> tuple[Sequence[Document], Sequence[Document]]:
    training, held_out = documents
    if settings.data or settings.documents.held_out_data:
        raise ValueError("documents: given beside the settings' data or held_out_data; leave one of them out")
    if not training or not held_out:
        raise ValueError(
            f"documents: expected some to train on and some held out, got {len(training)} and {len(held_out)}; "
            "held_out_split divides them"
        )
    return training, held_out


# --- The tokenizer


def _ready(settings: TrainingConfig, folders: Sequence[Path]) -> Tokenizer | None:
    """The tokenizer of a new run, if it need not be trained; what is missing is found before anything is read."""
    how = settings.documents
    if folders:
        return _tokenizer_of(folders, how.tokenizer)
    if how.tokenizer == "bytes":
        return ByteTokenizer()
    if how.tokenizer == "ids":
        return TokenIds(how.vocabulary)
    if how.tokenizer != "bpe":
        return BPETokenizer.from_file(how.tokenizer)
    if importlib.util.find_spec("tokenizers") is None:
        raise ImportError("tokenizer: a bpe needs the tokenizers library: pip install 'memformer-replay[bpe]'")
    return None


def _trained(settings: TrainingConfig, training: Sequence[Document], ranks: Ranks, report: Report) -> Tokenizer:
    """A BPE of the training documents, which the first process trains."""
    how, place = settings.documents, settings.out / "tokens"
    # Without a checkpoint there may be one nevertheless, of a run that ended before its first.
    folder = place / f"bpe-{_key(fingerprint(training), str(how.vocabulary))}"

    def train() -> None:
        if not folder.is_dir():
            tokenizer = train_bpe(training, how.vocabulary)
            unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.unfinished")
            unfinished.mkdir(parents=True)
            try:
                tokenizer.save(unfinished)
                os.replace(unfinished, folder)
            except OSError:
                if not folder.is_dir():  # another run, begun at the same moment, had the same documents
                    raise
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

    report("training a BPE")
    ranks.first(train)
    return load_tokenizer(folder)


def train_bpe(documents: Sequence[Document], size: int) -> BPETokenizer:
    """A byte-level BPE of the documents, none of which is held whole.

    Raises:
        ValueError: the size is below 256, or there are token ids among them.
    """
    _check_texts(documents)
    texts = ((block.tobytes() for block in blocks(document.content, _BLOCK)) for document in documents)
    try:
        return BPETokenizer.train((block for text in texts for block in text_blocks(text)), size)
    except ValueError as error:
        raise ValueError(f"vocabulary: {str(error).removeprefix('size: ')}") from error


def _check_texts(documents: Sequence[Document]) -> None:
    if ids := next((document for document in documents if not document.text), None):
        raise ValueError(
            f"tokenizer: bpe is trained on text, and {ids.name} holds token ids: give the tokenizer.json that made "
            "them, or ids with their number as the vocabulary"
        )


def _tokenizer_of(folders: Sequence[Path], named: str) -> Tokenizer:
    """The one that made all the token files, which must be the one that the settings name, if they name any."""
    tokenizer = load_tokenizer(folders[0])
    known = tokenizer_fingerprint(tokenizer)
    for folder in folders[1:]:
        if tokenizer_fingerprint(load_tokenizer(folder)) != known:
            raise ValueError(f"data: {folder} was encoded by another tokenizer than {folders[0]}; use one for both")
    same = named == "bytes" or (
        named not in ("bpe", "ids") and tokenizer_fingerprint(BPETokenizer.from_file(named)) == known
    )
    if not same:  # bytes is the default
        raise ValueError(
            f"tokenizer: {folders[0]} was encoded by the tokenizer that lies in it, got {named}: leave it out, or "
            "encode the texts anew"
        )
    return tokenizer


# --- The ids


def _encoded(
    documents: Sequence[Document], tokenizer: Tokenizer, place: Path, what: str, ranks: Ranks
) -> list[Document]:
    """The documents, with the ids of those that are text in a folder of token files."""
    texts = [document for document in documents if document.text]
    if not texts or isinstance(tokenizer, ByteTokenizer | TokenIds):
        return list(documents)
    data, made_by = fingerprint(texts), tokenizer_fingerprint(tokenizer)
    folder = place / f"{what}-{_key(data, made_by)}"

    def make() -> None:
        if folder.is_dir():
            try:
                found = open_tokens(folder, check=True)
                if (found.data_fingerprint, found.tokenizer_fingerprint) == (data, made_by):
                    return
                problem = f"{folder}: of other documents or another tokenizer"
            except (ValueError, FileNotFoundError) as error:
                problem = str(error)
            warnings.warn(f"{problem}; the documents are encoded anew", stacklevel=2)
            shutil.rmtree(folder)
        write_tokens(texts, tokenizer, folder)

    ranks.first(make)
    ready = dict(zip(map(id, texts), with_tokens(texts, open_tokens(folder)), strict=True))
    lost = [text.name for text in texts if ready[id(text)] is None]
    if len(lost) == len(texts):
        raise ValueError(f"tokenizer: it makes no token of any of the {len(texts)} {what} documents, such as {lost[0]}")
    if lost and not ranks.rank:
        warnings.warn(
            f"{len(lost)} documents, such as {lost[0]}, are left out: this tokenizer makes no token of them",
            stacklevel=2,
        )
    known = [ready.get(id(document), document) for document in documents]
    return [document for document in known if document is not None]


def _key(*fingerprints: str) -> str:
    return hashlib.sha256("\0".join(fingerprints).encode()).hexdigest()[:16]
