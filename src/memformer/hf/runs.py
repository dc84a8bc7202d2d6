"""A training run around a pretrained model: the base of its settings, and checkpoints that hold what is trained alone.

A frozen base stays where it is: a checkpoint has a reference to it, as a memory has that is saved without its base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..around import BASE_WRITE_HEADS, BaseSettings
from ..config import LATER, a_path
from ..data.tokenizers import VOCABULARY_FILE, BaseTokenizer, BPETokenizer
from ..folders import model_in
from ..pretrained import read_config
from ..settings import ModelSettings
from ..state import MemoryState
from .bases import check_length, logits_of, text_config
from .configuration import MemoryConfig
from .model import MemoryForCausalLM
from .reference import check_same_base, reference_to
from .wrap import around

__all__ = ["AroundBase"]

FIELDS = (
    "base",
    "slots",
    "segment_length",
    "read_dim",
    "read_heads",
    "memory_writer",
    "write_heads",
    "write_temperature",
    "forgetting",
    "slot_parts",
)
"""What a checkpoint holds of the model's configuration, beside the adapter."""


class AroundBase(MemoryForCausalLM):
    """A :class:`MemoryForCausalLM` of ``memformer train --base``, as its checkpoints have it.

    The base's own dropout is off, so that a run needs no generator's state to go on.

    ``config.reference`` says which base that is; it is None where all weights are trained, and so saved.
    """

    kind = "AroundBase"

    # --- From settings ------------------------------------------------------------------------------------------------

    @classmethod
    def new(cls, settings: BaseSettings, sizes: ModelSettings, segment_length: int) -> Self:
        """The base of some settings with a new memory, on the CPU; of both, what is trained requires gradients.

        Raises:
            FileNotFoundError, ValueError: the folder or the file holds no such model, or a size does not fit it.
            ImportError: a library that is needed is not installed.
        """
        assert settings.base is not None
        return cls._around(
            load_base(settings.base, settings.gguf),
            settings,
            slots=sizes.slots,
            segment_length=segment_length,
            read_dim=settings.read_dim,
            read_heads=settings.read_heads,
            memory_writer=sizes.memory_writer,
            write_heads=sizes.writing_heads(BASE_WRITE_HEADS),
            write_temperature=sizes.write_temperature,
            forgetting=sizes.forgetting,
            slot_parts=sizes.slot_parts,
        )

    @classmethod
    def _around(cls, base: PreTrainedModel, settings: BaseSettings, **sizes: Any) -> Self:
        adapted = _with_lora(base, settings.lora) if settings.lora else base
        model: Self = around(cls, adapted, **sizes, gguf_file=settings.gguf)
        model.trainable(settings.trained)
        if not settings.train_base:
            looks = model._base_looked  # a moment ago
            model.config.reference = reference_to(model.base, model.config, looks, looks)
        return model

    @staticmethod
    def tokenizer_of(settings: BaseSettings, named: str, segment_length: int) -> BaseTokenizer:
        """The tokenizer of a base, for documents; what is missing of the base is found before anything takes long.

        Args:
            named: the path of its tokenizer.json; "bytes", the default of that setting, for the one in the folder.
            segment_length: which the base must be able to read at once.

        Raises:
            FileNotFoundError, ValueError: there is none that makes the base's ids, or it has no token that ends a text.
            ImportError: a library that is needed is not installed.
        """
        assert settings.base is not None
        if settings.lora:
            _peft()
        return _tokenizer(settings.base, settings.gguf, named, segment_length)

    def train(self, mode: bool = True) -> Self:
        """The memory's parts; the base stays without dropout."""
        super().train(mode)
        self.base.eval()
        return self

    def next_logits(self, state: MemoryState, opened: Any) -> Tensor:
        """Logits of each lane's next token, (batch, vocabulary). A document's first follows the state's start token."""
        begins = state.position == 0
        if not begins.any():
            return super().next_logits(state, opened)
        starts = torch.full_like(state.pending[:, :1], state.start)
        first = logits_of(self.base, self._hidden(starts, opened.memory, None))[:, 0]
        if begins.all():
            return first
        # A whole segment was read, as far as the others know: what comes of it here is not taken.
        others = dataclasses.replace(state, position=state.position.where(~begins, state.length))
        return torch.where(begins[:, None], first, super().next_logits(others, opened))

    # --- On disk ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **others: Any) -> None:  # type: ignore[override]
        """Write the whole model, the base in it, as transformers does; ``AutoModelForCausalLM`` reads it."""
        with _quiet():
            super().save_pretrained(folder, **others)

    def save_with(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write ``config.json`` and, in ``model.safetensors``, those of some weights that are trained."""
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        save_file({name: weights[name].detach().cpu().contiguous() for name in trained}, folder / "model.safetensors")
        self.write_config(folder)

    def described(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        fields = {name: getattr(self.config, name) for name in (*FIELDS, "adapter")}
        return {"model": self.kind, **fields, "reference": self.config.reference}

    def load_saved(self, folder: Path) -> None:
        """Take over the weights of a checkpoint of the same run.

        Raises:
            ValueError: it is of another base or other sizes, or damaged.
        """
        saved = _saved(folder)
        self._check_base_of(saved, folder)
        here = self.described()
        for name in FIELDS:
            if name != "base" and saved.get(name) != here[name]:
                raise ValueError(f"{folder}: its model has {name} {saved.get(name)}, expected {here[name]}")
        try:
            weights = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / 'model.safetensors'}: missing or damaged ({error})") from error
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        wrong = set(weights) ^ set(named) | {n for n in set(weights) & set(named) if weights[n].shape != named[n].shape}
        if wrong:
            raise ValueError(f"{folder}: damaged, or not the weights of {folder / 'config.json'}: {min(wrong)}")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(weights[name])

    def _check_base_of(self, saved: Mapping[str, Any], folder: Path) -> None:
        there, here = saved.get("reference"), self.config.reference
        if (there is None) != (here is None):
            raise ValueError(f"{folder}: of a run in which the base's own weights were trained, or the other way round")
        if there is not None and here is not None:  # which was taken of these weights, and they are frozen
            settings = MemoryConfig(**{name: saved[name] for name in FIELDS}).base_config
            check_same_base(there, here, settings, self.base, folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | Path, *args: Any, base_model: str | Path | None = None, **others: Any
    ) -> Self:
        """The model of a run's checkpoint, around the base that it names.

        Args:
            base_model: the folder of that base, where it has moved.

        Raises:
            FileNotFoundError: the checkpoint or its base is not there.
            ValueError: a file is damaged, or the base is another one.
        """
        folder = model_in(a_path("folder", folder))
        saved = _saved(folder)
        if "model_type" in saved:  # save_pretrained of transformers wrote it
            with _quiet():
                whole: Self = super().from_pretrained(folder, base_model=base_model, dtype=torch.float32)
            return whole.eval()
        there, adapter = saved.get("reference"), saved.get("adapter")
        if there is not None:
            base = load_base(Path(base_model or there["name"]), there["gguf_file"])
        elif base_model is not None:
            raise ValueError(f"base: {folder} holds one, which was trained with its memory; leave it out")
        else:
            config = MemoryConfig(**{name: saved[name] for name in FIELDS}).base_config
            base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        gguf, lora = there and there["gguf_file"], adapter["r"] if adapter else 0
        settings = BaseSettings(base=Path("."), gguf=gguf, lora=lora, train_base=there is None)
        model = cls._around(base, settings, **{name: saved[name] for name in FIELDS if name != "base"})
        model.load_saved(folder)
        return model.eval()


def _saved(folder: Path) -> dict[str, Any]:
    """What ``config.json`` holds; what older checkpoints do not name is as it was before it could be set."""
    return LATER | read_config(folder)[1]


# --- The base and its tokenizer


def load_base(folder: Path, gguf: str | None) -> PreTrainedModel:
    """A causal language model in float32, on the CPU, without dropout.

    Raises:
        FileNotFoundError, ValueError: there is none in the folder, or transformers does not know it.
        ImportError: a GGUF needs a library that is not installed.
    """
    with _loading(folder, gguf, "a causal language model"), torch.device("cpu"):
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **_file(gguf), dtype=torch.float32)
    return base.eval()


def _tokenizer(folder: Path, gguf: str | None, named: str, segment_length: int) -> BaseTokenizer:
    with _loading(folder, gguf, "the settings of a causal language model"):
        config = text_config(AutoConfig.from_pretrained(folder, **_file(gguf)))
    check_length(config, segment_length)
    end = config.eos_token_id
    if named != "bytes":
        tokenizer = BPETokenizer.from_file(named)
    else:
        if gguf is None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise FileNotFoundError(
                f"{folder}: no {VOCABULARY_FILE}, so no tokenizer was saved with this base; give the path of its own "
                "one with --tokenizer"
            )
        with _loading(folder, gguf, "a tokenizer"):
            own = AutoTokenizer.from_pretrained(folder, **_file(gguf))
        inner = getattr(own, "backend_tokenizer", None)
        if inner is None:
            raise ValueError(
                f"{folder}: {type(own).__name__} is not of the tokenizers library; give the path of a tokenizer.json "
                "with --tokenizer"
            )
        tokenizer, end = BPETokenizer(inner), end if own.eos_token_id is None else own.eos_token_id
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise ValueError(
            f"{folder}: neither the tokenizer nor the base names the token that ends a text; set eos_token_id in its "
            "config.json"
        )
    return tokenizer.of_base(config.vocab_size, end)


def _file(gguf: str | None) -> dict[str, str]:
    return {} if gguf is None else {"gguf_file": gguf}


_TOKENIZER_FILES = (VOCABULARY_FILE, "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


@contextlib.contextmanager
def _loading(folder: Path, gguf: str | None, what: str) -> Iterator[None]:
    """What transformers says of a folder, in a sentence; its bars of progress are not shown."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"base: {folder} is no folder; expected one with {what} of transformers. Where the base of a model "
            "has moved since, say so with --base, or base_model= in Python"
        )
    if gguf is not None and not (folder / gguf).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
        raise FileNotFoundError(f"gguf: no {gguf} in {folder}; the GGUF files there: {there}")
    if gguf is not None and importlib.util.find_spec("gguf") is None:
        raise ImportError("gguf: reading such a file needs the gguf library: pip install 'memformer-replay[gguf]'")
    if gguf is None and not (folder / "config.json").is_file():
        found = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"for the GGUF there add --gguf {found[0]}" if found else "save_pretrained of transformers writes one"
        raise FileNotFoundError(f"base: no config.json in {folder}; {hint}")
    try:
        with _quiet():
            yield
    except (OSError, struct.error, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"base: {folder / (gguf or '')} holds no such thing as {what} that transformers knows: {reason}"
        ) from error


def _with_lora(base: PreTrainedModel, rank: int) -> Any:
    peft = _peft()
    with warnings.catch_warnings():  # it calls what transformers has renamed
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of progress of transformers."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora: needs peft: pip install 'memformer-replay[hf]'") from error
    return peft
