"""A base that is not written with its memory, but named: where it was loaded from, and by what it is known again.

Shapes: none; weights as they are in the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from .bases import text_config
from .configuration import MemoryConfig

__all__ = ["check_base", "fingerprint", "found_base", "own_state", "reference_to", "weight_files"]

_REWRITING = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""How a LoRA's ``init_lora_weights`` begins where it takes its first weights out of those of the base."""
_SAMPLES = 4096
"""Numbers of each weight that a fingerprint looks at; training changes all of them."""


def fingerprint(base: PreTrainedModel) -> str:
    """A hash of a base's weights, but for a LoRA's: their names, shapes, and up to 4,096 numbers of each."""
    digest = hashlib.sha256()
    for name, weight in sorted((_plain(name), p) for name, p in base.named_parameters() if "lora_" not in name):
        try:
            flat = weight.detach().flatten()
        except NotImplementedError:  # quantised by torchao
            flat = weight.detach().dequantize().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLES)].to("cpu", torch.float64)
        digest.update(f"{name}\0{tuple(weight.shape)}\0".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def own_state(state: dict[str, Any]) -> dict[str, Any]:
    """Of a model's weights those that are not the base's: the memory's, and a LoRA's in the base."""
    return {name: x for name, x in state.items() if not name.startswith("base.") or "lora_" in name}


def reference_to(base: PreTrainedModel, config: MemoryConfig) -> dict[str, str | None]:
    """What :func:`found_base` needs of the base of a memory with that configuration.

    Raises:
        ValueError: the base has no name, is being trained, or is not as it was loaded: its LoRA has begun with a part
            of its weights, or its vocabulary is another one.
    """
    if not (name := base.name_or_path):
        raise ValueError(
            "base: expected one that from_pretrained has loaded from a folder or the hub, got one without a name; save "
            "it with the memory (base='saved'), or by itself, load it from there, and call with_memory again"
        )
    if any(p.requires_grad for name, p in base.named_parameters() if "lora_" not in name):
        raise ValueError(
            "base: expected a frozen one, because a referenced base is not written; call trainable('memory') or "
            "trainable('lora') before training, or save it with the memory (base='saved')"
        )
    if str(start := (config.adapter or {}).get("init_lora_weights")).startswith(_REWRITING):
        raise ValueError(
            "base: expected one that its LoRA has left as it was, because a referenced base is not written, got "
            f"init_lora_weights={start!r}; save it with the memory (base='saved')"
        )
    name = str(Path(name).absolute()) if Path(name).is_dir() else name
    _check_vocabulary(base, name, config.gguf_file)
    return {"name": name, "gguf_file": config.gguf_file, "fingerprint": fingerprint(base)}


def _check_vocabulary(base: PreTrainedModel, name: str, gguf_file: str | None) -> None:
    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        loaded = type(base.config).from_pretrained(name, local_files_only=True, **gguf)
    except OSError:  # it is no longer there: nothing to compare with
        return
    expected, tokens = text_config(loaded).vocab_size, base.get_input_embeddings().weight.shape[0]
    if tokens != expected:
        raise ValueError(
            f"base: expected the {expected} tokens of {name!r}, because a referenced base is not written, got {tokens} "
            "tokens; save it with the memory (base='saved'), or by itself, load it from there, and call with_memory"
        )


def found_base(reference: dict[str, str | None], base: Any, folder: Any, **options: Any) -> PreTrainedModel:
    """The base of a reference.

    Args:
        base: where it is now, or the model itself; None: where the reference says.
        folder: of the memory, for messages.
        options: of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is another one.
    """
    model = base
    if not isinstance(base, PreTrainedModel):
        place = reference["name"] if base is None else str(base)
        gguf = {"gguf_file": reference["gguf_file"]} if reference["gguf_file"] else {}
        try:
            model = AutoModelForCausalLM.from_pretrained(place, **gguf, **options)
        except OSError as error:
            raise FileNotFoundError(
                f"{folder}: holds a memory alone; its base {place!r} was not found ({str(error).splitlines()[0]}). Say "
                "where it is: from_pretrained(folder, base_model=...)"
            ) from error
    check_base(reference, fingerprint(model), model, folder)
    return model


def check_base(reference: Mapping[str, str | None], looked: str | None, model: PreTrainedModel, folder: Any) -> None:
    """Whether a base is that of a reference.

    Args:
        looked: its fingerprint.
        folder: of the memory, for the message.

    Raises:
        ValueError: it is another one.
    """
    if looked != reference["fingerprint"]:
        raise ValueError(
            f"{folder}: the memory was trained around {reference['name']!r} with other weights than those of "
            f"{getattr(model, 'name_or_path', '') or type(model).__name__!r}; give that base, with base_model=... to "
            "from_pretrained, or with --base"
        )


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors of a model's folder, or of the hub's."""
    if Path(folder).is_dir():
        return sorted(Path(folder).glob("model*.safetensors"))
    file = cached_file(str(folder), "model.safetensors")
    return [Path(str(file))]
