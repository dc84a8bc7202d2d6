"""A base that is not written with its memory, but named: where it was loaded from, and by what it is known again.

Shapes: none; weights as they are in the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .bases import settings_of, text_config
from .configuration import MemoryConfig

__all__ = ["check_same_base", "found_base", "load_own", "looks_of", "own_state", "reference_to"]

_REWRITING = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""How a LoRA's ``init_lora_weights`` begins where it takes its first weights out of those of the base."""
_SAMPLES = 4096
"""Numbers of each weight that a fingerprint looks at; training changes all of them."""


def looks_of(base: PreTrainedModel) -> dict[str, str]:
    """By what a base is known again: its dtype, and a hash of its weights, but for a LoRA's.

    The hash is of their names and shapes, and of up to 4,096 numbers of each.
    """
    digest = hashlib.sha256()
    for name, weight in sorted((_plain(name), p) for name, p in base.named_parameters() if "lora_" not in name):
        try:
            flat = weight.detach().flatten()
        except NotImplementedError:  # quantised by torchao
            flat = weight.detach().dequantize().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLES)].to("cpu", torch.float64)
        digest.update(f"{name}\0{tuple(weight.shape)}\0".encode() + some.numpy().tobytes())
    return {"fingerprint": digest.hexdigest(), "dtype": _dtype(base)}


def _dtype(base: PreTrainedModel) -> str:
    return str(base.dtype).removeprefix("torch.")


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def own_state(state: dict[str, Any]) -> dict[str, Any]:
    """Of a model's weights those that are not the base's: the memory's, and a LoRA's in the base."""
    return {name: x for name, x in state.items() if not name.startswith("base.") or "lora_" in name}


def reference_to(
    base: PreTrainedModel,
    config: MemoryConfig,
    before: Mapping[str, str] | None,
    now: Mapping[str, str] | None = None,
) -> dict[str, str | None]:
    """What :func:`found_base` needs of the base of a memory with that configuration.

    Args:
        before: its looks when it got the memory, which are compared unless it has another dtype since; None for one
            that was made with its memory, of one folder.
        now: its looks; None for whoever has not looked.

    Raises:
        ValueError: the base has no name, is being trained, or is not as it was loaded: its weights have changed since
            it has a memory, its LoRA has begun with a part of them, or its vocabulary is another one.
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
    now = now or looks_of(base)
    if before is None or (before["dtype"] == now["dtype"] and before != now):
        got = "one that was saved with its memory" if before is None else "one that was trained or changed since"
        raise ValueError(
            f"base: expected the weights of {name!r}, because a referenced base is not written, got {got}; save it "
            "with the memory (base='saved'), or by itself, load it from there, and call with_memory"
        )
    return {"name": name, "gguf_file": config.gguf_file, **now}


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


def found_base(
    reference: dict[str, str | None], settings: PreTrainedConfig, base: Any, folder: Any, **options: Any
) -> PreTrainedModel:
    """The base of a reference.

    Args:
        settings: of the base, when the memory was saved.
        base: where it is now, or the model itself; None: where the reference says.
        folder: of the memory, for messages.
        options: of ``AutoModelForCausalLM.from_pretrained``. With another ``dtype`` than that of the reference it is
            loaded twice: in that it is known again.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is another one, or an option would be asked of the base that is meant for the memory's folder.
    """
    for option in ("subfolder", "variant", "output_loading_info"):
        if options.get(option):
            raise ValueError(
                f"{option}: not known for a folder with the memory alone, whose base is loaded from elsewhere; leave "
                "it out, and give the path of the folder itself"
            )
    if isinstance(base, PreTrainedModel):
        check_same_base(reference, looks_of(base), settings, base, folder)
        return base
    place = reference["name"] if base is None else str(base)
    gguf = {"gguf_file": reference["gguf_file"]} if reference["gguf_file"] else {}
    asked = options.pop("dtype", None)
    known = reference.get("dtype") or asked  # what was written before does not say it
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place, dtype=known, **gguf, **options)
        check_same_base(reference, looks_of(model), settings, model, folder)
        if asked not in (known, "auto", model.dtype):
            model = AutoModelForCausalLM.from_pretrained(place, dtype=asked, **gguf, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"{folder}: holds a memory alone; its base {place!r} was not found ({str(error).splitlines()[0]}). Say "
            "where it is: from_pretrained(folder, base_model=...)"
        ) from error
    return model


def check_same_base(
    reference: Mapping[str, Any],
    looks: Mapping[str, Any],
    settings: PreTrainedConfig,
    model: PreTrainedModel,
    folder: Any,
) -> None:
    """Whether a base is that of a reference.

    Args:
        looks: the base's.
        settings: those of the reference's.
        folder: of the memory, for the message.

    Raises:
        ValueError: it is another one.
    """
    if looks["fingerprint"] != reference["fingerprint"]:
        there, here = reference.get("dtype"), looks["dtype"]
        raise ValueError(
            f"{folder}: the memory was trained around {reference['name']!r} with other weights than those of "
            f"{getattr(model, 'name_or_path', '') or type(model).__name__!r}; give that base, with base_model=... to "
            "from_pretrained, or with --base"
            + ("" if there in (None, here) else f". They were {there} there, and are {here} here")
        )
    before, now = (_leaves(settings_of(config)) for config in (settings, model.config))
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            raise ValueError(
                f"{folder}: the memory was trained around a base with {name} {before[name]!r}, and "
                f"{getattr(model, 'name_or_path', '') or type(model).__name__!r} has {now[name]!r}, with the same "
                "weights; put its config.json back"
            )


def _leaves(settings: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """What changes logits, by names such as ``text_config.rope_theta``."""
    found: dict[str, Any] = {}
    for name, x in settings.items():
        if name not in _CHANGE_NO_LOGITS:
            found |= _leaves(x, f"{of}{name}.") if isinstance(x, Mapping) else {of + name: x}
    return found


_CHANGE_NO_LOGITS = {
    *("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "quantization_config"),
    *("use_cache", "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "problem_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "chunk_size_feed_forward", "initializer_range", "pretraining_tp"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
}
"""Settings of a base that change no logits."""


def load_own(model: PreTrainedModel, folder: Any, reference: Mapping[str, Any]) -> None:
    """Load the weights of a memory that was saved without its base; a LoRA's in their own dtypes, and all others if the
    base has that of before.

    Raises:
        ValueError: the file holds other weights.
    """
    state = {name: x for file in _weight_files(folder) for name, x in load_file(file).items()}
    lacking = own_state(model.state_dict()).keys() ^ state.keys()
    if lacking:
        raise ValueError(f"{folder}: expected the weights of its config.json; {', '.join(sorted(lacking))} do not fit")
    for name, weight in state.items():
        if "lora_" in name or reference.get("dtype") in (None, _dtype(model)):
            model.get_parameter(name).data = model.get_parameter(name).to(weight.dtype)
    model.load_state_dict(state, strict=False)


def _weight_files(folder: str | Path) -> list[Path]:
    """The safetensors of a model's folder, or of the hub's."""
    if Path(folder).is_dir():
        return sorted(Path(folder).glob("model*.safetensors"))
    file = cached_file(str(folder), "model.safetensors")
    return [Path(str(file))]
