"""Text to token ids and back. Every tokenizer has the objectives' special tokens after its ordinary vocabulary.

``start`` begins a document in the encoder, and the decoder for continuation; ``infill`` and ``recall`` start the
decoder for those objectives; ``mask`` stands for one masked span. Where ends are learned, ``start`` is a document's
last target too, as ``end``: one document's end is where the next begins.
"""

from __future__ import annotations

import codecs
import copy
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import numpy as np

from ..folders import model_in
from .pieces import Encoded, encode_in_pieces

if TYPE_CHECKING:
    import tokenizers

from ..config import a_path, is_count

__all__ = [
    "BPETokenizer",
    "BaseTokenizer",
    "ByteTokenizer",
    "TextDecoder",
    "TokenIds",
    "Tokenizer",
    "decoder_behind",
    "load_tokenizer",
    "tokenizer_fingerprint",
]

CONFIG = "tokenizer_config.json"
"""The file that names a saved tokenizer's kind."""
VOCABULARY_FILE = "tokenizer.json"
"""The vocabulary of the ``tokenizers`` library, where there is one."""

SPECIAL = ("start", "infill", "recall", "mask")

_UNKNOWN_CHARACTER = "\ufffd"
_BLOCK = 1 << 20


class TextDecoder(Protocol):
    """Text as its tokens come: each character is returned once it is whole."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete."""

    def flush(self) -> str:
        """What was held back: half a character becomes U+FFFD."""


@runtime_checkable
class Tokenizer(Protocol):
    """What training, evaluation and generation need. Ids are 0 to ``vocabulary - 1``; ordinary ones come first."""

    @property
    def ordinary(self) -> int:
        """How many ids there are without the special ones."""

    @property
    def vocabulary(self) -> int:
        """How many ids there are with the special ones: ``num_tokens`` of a model."""

    @property
    def start(self) -> int: ...
    @property
    def infill(self) -> int: ...
    @property
    def recall(self) -> int: ...
    @property
    def mask(self) -> int: ...

    @property
    def end(self) -> int | None:
        """The start token, where a document's end is learned as its last target; else None."""

    def with_end(self, end: bool = True) -> Tokenizer:
        """The same with an ``end``, or without one."""

    @property
    def special(self) -> tuple[int, ...]:
        """All special ids."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """(length,) ids in the smallest unsigned type that holds the ordinary ones; bytes must be UTF-8."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the ids; special tokens disappear."""

    def decoder(self) -> TextDecoder:
        """For text that is shown while it is generated."""

    def save(self, folder: Path) -> None:
        """Write what :func:`load_tokenizer` reads."""


class _SpecialTokens:
    """The ids that all tokenizers have alike."""

    kind: str

    def __init__(self, ordinary: int):
        self.ordinary = ordinary
        self.start, self.infill, self.recall, self.mask = range(ordinary, ordinary + len(SPECIAL))
        self.end: int | None = None
        self.dtype = np.min_scalar_type(ordinary - 1)

    @property
    def vocabulary(self) -> int:
        return self.ordinary + len(SPECIAL)

    @property
    def special(self) -> tuple[int, ...]:
        return (self.start, self.infill, self.recall, self.mask)

    def with_end(self, end: bool = True) -> Self:
        """The same tokenizer for a model that learns where documents end: its ``end`` is the start token, else None.

        >>> ByteTokenizer().end, ByteTokenizer().with_end().end
        (None, 256)
        """
        ending = copy.copy(self)
        ending.end = ending.start if end else None
        return ending

    @property
    def fingerprint(self) -> str:
        """See :func:`tokenizer_fingerprint`."""
        return hashlib.sha256(f"{self.kind}\0{self.ordinary}".encode()).hexdigest()

    def _ordinary(self, tokens: Iterable[int]) -> list[int]:
        try:
            ids = list(map(int, tokens))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"tokens: expected the ids of one text ({error}); of several lanes decode each, as "
                "[tokenizer.decode(lane) for lane in tokens]"
            ) from error
        # A lane that has ended streams -1.
        return [token for token in ids if 0 <= token < self.ordinary]

    def save(self, folder: Path) -> None:
        """Write ``tokenizer_config.json``: the kind, the size and the special ids."""
        special = dict(zip(SPECIAL, self.special, strict=True))
        config = {"kind": self.kind, "ordinary": self.ordinary, **special, "end": self.end}
        (Path(folder) / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class ByteTokenizer(_SpecialTokens):
    """UTF-8 bytes are ids 0 to 255. Any text, nothing to train, 260 ids."""

    kind = "bytes"

    def __init__(self) -> None:
        super().__init__(256)

    def encode(self, text: str | bytes) -> np.ndarray:
        """The text's UTF-8 bytes, (length,) uint8."""
        _check_text(text)
        return np.frombuffer(text.encode("utf-8") if isinstance(text, str) else text, np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; a byte that is not UTF-8 becomes U+FFFD."""
        return bytes(self._ordinary(tokens)).decode("utf-8", errors="replace")

    def decoder(self) -> TextDecoder:
        return _ByteDecoder(self)


class _ByteDecoder:
    def __init__(self, tokenizer: ByteTokenizer):
        self._tokenizer, self._utf8 = tokenizer, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, tokens: Iterable[int]) -> str:
        return self._utf8.decode(bytes(self._tokenizer._ordinary(tokens)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class BPETokenizer(_SpecialTokens):
    """A vocabulary of the ``tokenizers`` library: trained on the corpus, or from any ``tokenizer.json``.

    One that :meth:`train` made is byte-level: it represents any text exactly. One from a file may not: what it
    normalises (case, accents) is lost, a space may be added in front, and a character without a token is refused if the
    vocabulary has an "unknown" token for it, and dropped by the library if not.
    """

    kind = "bpe"

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """``tokenizer``: a ``tokenizers.Tokenizer``. Its own special tokens are ordinary ones here, never added."""
        if not isinstance(tokenizer, _library().Tokenizer):
            raise ValueError(
                f"tokenizer: expected a tokenizers.Tokenizer, got {type(tokenizer).__name__}; from_file reads a "
                "tokenizer.json"
            )
        if tokenizer.truncation or tokenizer.padding:  # the caller's goes on as it is
            tokenizer = type(tokenizer).from_str(tokenizer.to_str())
            tokenizer.no_truncation()
            tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("tokenizer: expected one with a vocabulary, got an empty one")
        super().__init__(max(vocabulary.values()) + 1)
        self._tokenizer = tokenizer
        description = json.loads(tokenizer.to_str())
        self.byte_level = "ByteLevel" in json.dumps(description["pre_tokenizer"])
        self._cuts_words = description["model"]["type"] == "BPE"
        self._unknown = None if self.byte_level else _unknown_id(description["model"], vocabulary)

    @classmethod
    def train(cls, texts: Iterable[str | bytes], size: int) -> BPETokenizer:
        """A byte-level BPE of at most ``size`` ordinary tokens, the 256 bytes among them; fewer for a small corpus.

        Raises:
            ValueError: the size is below 256, or what should be texts is one string, or no strings.
            ImportError: the library is not installed.
        """
        if not is_count(size, 256):
            raise ValueError(f"size: expected a whole number of at least 256, for every byte is a token, got {size!r}")
        if isinstance(texts, str | bytes):
            raise ValueError(f"texts: expected several, such as [text], got one of type {type(texts).__name__}")
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=int(size),
            min_frequency=2,
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        blocks = (block for text in texts for block in text_blocks([text]))
        tokenizer.train_from_iterator(_without_long_words(blocks), trainer)
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: str | Path) -> BPETokenizer:
        """Any ``tokenizer.json``; the special tokens come after its ids.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not one.
            ImportError: the library is not installed.
        """
        path = a_path("path", path)
        if path.is_dir():
            inside = path / VOCABULARY_FILE
            hint = f"give {inside}" if inside.is_file() else "load_tokenizer reads a saved tokenizer's"
            raise ValueError(f"{path}: expected a tokenizer.json, got a folder; {hint}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected a tokenizer.json")
        library = _library()
        try:
            tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from error
        try:
            return cls(tokenizer)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def of_base(self, size: int, end: int) -> BaseTokenizer:
        """The same as that of a pretrained model with so many ids; see :class:`BaseTokenizer`."""
        return BaseTokenizer(self._tokenizer, size, end)

    def encode(self, text: str | bytes) -> np.ndarray:
        """(length,) ids in the smallest unsigned type that holds them.

        Raises:
            ValueError: a character has no token.
        """
        pieces = list(self.encode_pieces([text]))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def encode_pieces(self, texts: Iterable[str | bytes]) -> Iterator[np.ndarray]:
        """The ids of one long text that comes in parts (cut anywhere), piece by piece: those of the whole.

        Neither the text nor its ids are held whole; see :mod:`memformer.data.pieces` for how exact that is.

        Raises:
            ValueError: a character has no token, or the bytes are not UTF-8.
        """
        for piece in encode_in_pieces(self._encode, _strings(texts)):
            if self._unknown is not None and len(found := np.flatnonzero(piece.ids == self._unknown)):
                first, end = (int(places[piece.first + found[0]]) for places in (piece.block.starts, piece.block.ends))
                raise ValueError(
                    f"this tokenizer has no token for {piece.block.text[first:end][:100]!r} (character "
                    f"{piece.place + first} of the text): use a byte-level one"
                )
            yield piece.ids

    def _encode(self, text: str) -> Encoded:
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"the tokenizer cannot encode the text ({error})") from error
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        ids = np.array(encoding.ids, self.dtype)
        cuts = np.ones(len(ids), np.bool_)
        if not self._cuts_words and len(ids):
            words = np.array([-1 if word is None else word for word in encoding.word_ids])
            cuts[1:] = words[1:] != words[:-1]
        return Encoded(text, ids, places[:, 0], places[:, 1], cuts)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(self._ordinary(tokens), skip_special_tokens=False)

    def decoder(self) -> TextDecoder:
        return _PieceDecoder(self)

    @property
    def token_bytes(self) -> np.ndarray:
        """(ordinary,) how many bytes each id stands for, where the vocabulary is byte-level."""
        # Such a vocabulary writes every byte as one character.
        return np.array([len(self._tokenizer.id_to_token(token) or "") for token in range(self.ordinary)])

    @property
    def separators(self) -> list[int]:
        """The ids of the vocabulary's own special tokens, which stand between texts."""
        return [token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special]

    @functools.cached_property
    def fingerprint(self) -> str:
        """See :func:`tokenizer_fingerprint`."""
        content = json.dumps(json.loads(self._tokenizer.to_str()), sort_keys=True)
        return hashlib.sha256(f"{self.kind}\0{self.ordinary}\0{content}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
        super().save(folder)
        (Path(folder) / VOCABULARY_FILE).write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")


class BaseTokenizer(BPETokenizer):
    """That of a pretrained language model: its ids are the model's own, and no special ones come after them.

    ``start`` and ``end`` are the model's own token for the end of a text. Only continuation can be learned with it.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        size: how many ids the model has.
        end: the id that ends a text there.

    Raises:
        ValueError: the tokenizer has more ids than the model.
    """

    kind = "base"

    def __init__(self, tokenizer: tokenizers.Tokenizer, size: int, end: int):
        super().__init__(tokenizer)
        if self.ordinary > size or not 0 <= end < size:
            raise ValueError(
                f"tokenizer: expected ids below the {size} of the model, got one with {self.ordinary} ids whose text "
                f"ends with {end}: do they belong together?"
            )
        self.ordinary = size
        self.start = self.infill = self.recall = self.mask = end
        self.dtype = np.min_scalar_type(size - 1)

    @property
    def vocabulary(self) -> int:
        return self.ordinary

    def _ordinary(self, tokens: Iterable[int]) -> list[int]:
        return [token for token in super()._ordinary(tokens) if token != self.start]

    @functools.cached_property
    def fingerprint(self) -> str:
        """That of the same ``tokenizer.json`` by itself, which makes the same ids."""
        return BPETokenizer(self._tokenizer).fingerprint


class _PieceDecoder:
    """Decodes the newest pieces behind the ones shown last, for how a piece reads depends on what stands before it."""

    def __init__(self, tokenizer: BPETokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        """Those that were shown last, and those after them."""
        self._shown = 0
        """How many characters of their text were returned."""

    def decode(self, tokens: Iterable[int]) -> str:
        new = self._tokenizer._ordinary(tokens)
        if not new:
            return ""
        before = len(self._ids)
        self._ids += new
        text = self._tokenizer.decode(self._ids)
        # The end of a text that stops inside a character is U+FFFD, and may become another one.
        certain = text.rstrip(_UNKNOWN_CHARACTER)
        shown, self._shown = self._shown, max(self._shown, len(certain))
        if certain == text:
            self._ids = self._ids[before:]
            self._shown = len(self._tokenizer.decode(self._ids))
        return certain[shown:]

    def flush(self) -> str:
        rest = self._tokenizer.decode(self._ids)[self._shown :] if self._ids else ""
        self._ids, self._shown = [], 0
        return rest


class TokenIds(_SpecialTokens):
    """For a corpus that is token ids already, 0 to ``size - 1``, without a text; they are written as numbers."""

    kind = "ids"

    def __init__(self, size: int):
        if not is_count(size, 1):
            raise ValueError(f"size: expected at least 1 token, got {size!r}")
        super().__init__(int(size))

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text that is nothing but their numbers, as :meth:`decode` writes them.

        Raises:
            ValueError: it is another text.
        """
        _check_text(text)
        words = (text if isinstance(text, str) else text.decode("utf-8", errors="replace")).split()
        if not all(word.isascii() and word.isdigit() and int(word) < self.ordinary for word in words):
            raise ValueError(
                "this vocabulary is token ids without a text form: text needs bytes, or a BPE; ids are written as "
                f"numbers from 0 to {self.ordinary - 1} with spaces between them"
            )
        return np.array([int(word) for word in words], self.dtype)

    def decode(self, tokens: Iterable[int]) -> str:
        """The ordinary ids, separated by spaces."""
        return " ".join(map(str, self._ordinary(tokens)))

    def decoder(self) -> TextDecoder:
        return _IdDecoder(self)


class _IdDecoder:
    def __init__(self, tokenizer: TokenIds):
        self._tokenizer, self._before = tokenizer, ""

    def decode(self, tokens: Iterable[int]) -> str:
        text = self._tokenizer.decode(tokens)
        if not text:
            return ""
        text, self._before = self._before + text, " "
        return text

    def flush(self) -> str:
        return ""


def decoder_behind(tokenizer: Tokenizer, tokens: Sequence[int]) -> TextDecoder:
    """A decoder for text that goes on behind these tokens: some drop a space that stands at a text's beginning."""
    if isinstance(tokenizer, TokenIds):  # each of which is written alike wherever it stands
        return tokenizer.decoder()
    decoder, other = tokenizer.decoder(), tokenizer.decoder()
    for each in (decoder, other):
        each.decode(tokens[-_CONTEXT:])
    # A character that has begun was shown as U+FFFD already.
    return tokenizer.decoder() if other.flush() else decoder


_CONTEXT = 16
"""So many tokens decide how those behind them are written: the bytes of the last characters."""


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that was saved in a folder, or with a training run's model.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: it is damaged, or of a kind that this version does not know.
    """
    folder = model_in(a_path("folder", folder))
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG}, so no tokenizer was saved here")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, ordinary, special = config["kind"], config["ordinary"], tuple(config[name] for name in SPECIAL)
        end = config.get("end")  # there is none in older files
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    tokenizer: ByteTokenizer | TokenIds | BPETokenizer
    if kind == ByteTokenizer.kind:
        tokenizer = ByteTokenizer()
    elif kind == TokenIds.kind:
        tokenizer = TokenIds(ordinary)
    elif kind == BPETokenizer.kind:
        tokenizer = BPETokenizer.from_file(folder / VOCABULARY_FILE)
    elif kind == BaseTokenizer.kind:
        tokenizer = BPETokenizer.from_file(folder / VOCABULARY_FILE).of_base(ordinary, special[0])
    else:
        raise ValueError(f"{path}: expected a tokenizer of bytes, bpe, ids or base, got {kind!r}")
    if (tokenizer.ordinary, tokenizer.special) != (ordinary, special):
        raise ValueError(
            f"{path}: expected {ordinary} ordinary tokens and special ids {special}, got {tokenizer.ordinary} and "
            f"{tokenizer.special}: the files do not belong together"
        )
    if end not in (None, tokenizer.start):
        raise ValueError(f"{path}: end: expected null, or {tokenizer.start}, which starts the next document, got {end}")
    return tokenizer.with_end(end is not None)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of what a tokenizer makes of a text: equal for two that give the same ids, wherever they come from.

    It covers the kind, the number of ids and the vocabulary's file. Another version of the ``tokenizers`` library may
    write that file otherwise, so it is compared within one run, or with a file that can be made anew.
    """
    if isinstance(tokenizer, _SpecialTokens):
        return tokenizer.fingerprint
    digest = hashlib.sha256(f"{tokenizer.ordinary}\0".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _check_text(text: object) -> None:
    if not isinstance(text, str | bytes):
        raise ValueError(f"text: expected str or bytes, got {type(text).__name__}")


def _library() -> ModuleType:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ImportError(
            "this tokenizer needs the tokenizers library: pip install 'memformer-replay[bpe]'", name="tokenizers"
        ) from error
    return tokenizers


def _strings(texts: Iterable[str | bytes]) -> Iterator[str]:
    """The parts of a text, decoded: UTF-8 may be cut inside a character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for text in texts:
        _check_text(text)
        yield text if isinstance(text, str) else decoder.decode(text)
    yield decoder.decode(b"", final=True)


def text_blocks(texts: Iterable[str | bytes]) -> Iterator[str]:
    """A text that comes in parts, in blocks that end with a line if possible, for :meth:`BPETokenizer.train`."""
    rest = ""
    for text in _strings(texts):
        rest += text
        first = 0
        while len(rest) - first > _BLOCK:
            end = rest.rfind("\n", first, first + _BLOCK) + 1 or first + _BLOCK
            yield rest[first:end]
            first = end
        rest = rest[first:]
    yield rest


_LONG = re.compile(r"[^\W\d_]{1024}|\d{1024}|\s{1024}|[^\w\s]{1024}")
"""So much of what the trainer takes for one word (letters, digits, spaces, other signs) is cut off as one."""


def _without_long_words(blocks: Iterable[str]) -> Iterator[str]:
    """Blocks, cut where a word is very long (a genome): the trainer's time grows with its square."""
    for block in blocks:
        first = 0
        for long in _LONG.finditer(block):
            yield block[first : long.end()]
            first = long.end()
        yield block[first:]


def _unknown_id(model: Mapping[str, object], vocabulary: Mapping[str, int]) -> int | None:
    """The id that stands for whatever has no token, if there is one."""
    unknown = model.get("unk_id")  # of a unigram model; others name the token
    return unknown if isinstance(unknown, int) else vocabulary.get(str(model.get("unk_token") or ""))
