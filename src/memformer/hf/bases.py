"""What is asked of a language model that gets a memory: its decoder, its layers and its head; and who is refused.

A base is a causal language model of transformers. Its modules, their names and its ways of attending stay as they are.
What is *not* known here: the memory.

Shapes: tokens and mask (batch, tokens), hidden states (batch, tokens, dim).
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..config import check_count
from ..folders import model_in
from ..interface import in_evaluation
from ..nn import losses

__all__ = [
    "CACHE",
    "add_adapter",
    "check_adapter",
    "check_base",
    "check_length",
    "check_router",
    "checkpoints_activations",
    "decode",
    "decoder_of",
    "layers_of",
    "logits_of",
    "losses_of",
    "model_folder",
    "settings_of",
    "without_peft",
]

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls a cache."""
LOGITS_AT_ONCE = 2**18
"""On a CPU: few enough that a loss needs no more memory than the layers do."""
ATTENDING = {"full_attention", "sliding_attention"}
"""The kinds of layers whose whole state is keys and values."""


def model_folder(name: Any) -> Any:
    """Where a run's folder has its model: its best checkpoint if it evaluates on its way, else its newest.

    Any other name, of a folder or of the hub, as it is.
    """
    return str(model_in(name)) if isinstance(name, (str, Path)) and Path(name).is_dir() else name


def text_config(base: PreTrainedModel | PreTrainedConfig) -> Any:
    """The settings of the language model proper, of a base or of its configuration."""
    return (base if isinstance(base, PreTrainedConfig) else base.config).get_text_config(decoder=True)


def decoder_of(base: PreTrainedModel) -> nn.Module:
    """The base without its head; the base itself where it has none of that name."""
    return base.base_model


def layers_of(base: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, the first one first; none where they are not found."""
    count = text_config(base).num_hidden_layers
    lists = (part for part in decoder_of(base).modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    return list(next(lists, ()))


def decode(
    base: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: DynamicCache | None = None,
) -> Tensor:
    """The base's last hidden states, after its last norm: what its head gets.

    Args:
        mask: of the tokens in the cache as well, True for those that exist.
        positions: like ``tokens``; None counts from 0.
        cache: is extended in place.
    """
    decoder = decoder_of(base)
    given: dict[str, Any] = {"attention_mask": None if mask is None else mask.long(), CACHE: cache}
    if positions is not None and "position_ids" in inspect.signature(decoder.forward).parameters:
        given["position_ids"] = positions
    output: Tensor = decoder(input_ids=tokens, use_cache=cache is not None, **given)[0]
    return output


def logits_of(base: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(batch, tokens, dim) -> the base's logits (batch, tokens, vocabulary), with whatever it does to them at last.

    It is the base's own ``forward`` that runs, with the hidden states in place of its decoder.
    """
    head = copy.copy(base)  # shares all weights; only the table of its modules is its own
    head._modules = {**base._modules, base.base_model_prefix: _Given()}
    output = type(base).forward(head, inputs_embeds=hidden, use_cache=False, return_dict=True)
    logits: Tensor = output.logits
    return logits


def losses_of(base: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss of each label in nats, (batch, tokens), given what it is predicted from; zero where it is -100.

    Of many tokens the logits, a model's largest tensor, are made some rows at a time, and once more in backward.
    """
    at_once = LOGITS_AT_ONCE if hidden.device.type == "cpu" else losses.LOGITS_ON_A_CARD
    rows = max(losses.FEWEST_ROWS, at_once // base.get_input_embeddings().weight.shape[0])
    function = functools.partial(_losses_of, base)
    if labels.numel() <= rows:
        return function(hidden, labels)
    if torch.is_grad_enabled():
        function = functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    parts = zip(hidden.flatten(0, 1).split(rows), labels.flatten().split(rows), strict=True)
    return torch.cat([function(part[None], some[None])[0] for part, some in parts]).view(labels.shape)


def _losses_of(base: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    return losses.each_loss(logits_of(base, hidden), labels)


class _Given(nn.Module):
    """Stands for a decoder that has run."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **others: Any) -> BaseModelOutputWithPast:
        return _Hidden(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> nn.Module:
        """As OPT calls it."""
        return self


class _Hidden(BaseModelOutputWithPast):
    """Whatever else a decoder returns is None: router logits, attentions over another sequence."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def without_peft(base: Any) -> tuple[Any, dict[str, Any] | None]:
    """A base out of PEFT's wrapper, where it has one, with its adapter in its layers; and the adapter's settings.

    Raises:
        ValueError: an adapter that is no LoRA, trains more than that or a head that is tied, or more than one.
    """
    adapters = getattr(base, "peft_config", None)  # transformers' add_adapter makes no wrapper, but this
    wrapped = hasattr(base, "get_base_model")
    if not adapters or not (wrapped or _adapter_layers(base)):  # settings may be left of one that was merged
        return base, None
    if len(adapters) != 1:
        raise ValueError(f"base: expected one adapter, got {', '.join(adapters)}; merge or delete the others")
    ((name, adapter),) = adapters.items()
    kind, beside = adapter.peft_type.value, ("modules_to_save", "trainable_token_indices", "bias")
    others = " and ".join(part for part in beside if getattr(adapter, part, None) not in (None, [], "none"))
    if kind != "LORA" or others:
        raise ValueError(
            f"base: expected a LoRA in its layers alone, got {kind}{' with ' + others if others else ''}; "
            "merge_and_unload it first"
        )
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in adapter.to_dict().items()}
    inner = base.get_base_model() if wrapped else base
    tied = getattr(text_config(inner), "tie_word_embeddings", False)
    if tied and inner.get_output_embeddings() in _adapter_layers(inner):
        raise ValueError(
            "base: expected no LoRA in the head, whose weights are those of the embeddings; leave it out of "
            f"target_modules, got {adapter.target_modules}"
        )
    return inner, {**settings, "peft_type": kind, "adapter_name": name}


def _adapter_layers(base: nn.Module) -> list[Any]:
    """What PEFT has put into its layers."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in base.modules() if isinstance(part, BaseTunerLayer)]


def check_router(base: PreTrainedModel) -> None:
    """Raise ValueError for a mixture of experts that asks for a loss of its router, which no memory computes."""
    if getattr(text_config(base), "output_router_logits", False):
        raise ValueError(
            "trainable: expected a base without output_router_logits, because the loss of its router is not computed "
            "with a memory; set base.config.output_router_logits = False to train all of it without that loss"
        )


def check_adapter(model: Any, known: bool) -> None:
    """Raise ValueError for a LoRA in another state than the one in which it is loaded: beside the weights, and on.

    Args:
        model: a memory with its base.
        known: whether its settings have one, in the base; another would be loaded by nobody.
    """
    layers = _adapter_layers(model.base if known else model) if known or "peft" in sys.modules else []
    if not known:
        if layers:
            raise ValueError(
                "lora: this model got one after its memory, and would be loaded without it. Save the PEFT model "
                "around it (its save_pretrained), merge it (merge_and_unload), or put it into the base before "
                "with_memory"
            )
        return
    wrong = {
        "is no longer there: call with_memory again, around the base as it is now": not layers,
        "is merged into them: unmerge_adapter() first": any(layer.merged for layer in layers),
        "is switched off: switch it on first": any(layer.disable_adapters for layer in layers),
    }
    for how, found in wrong.items():
        if found:
            raise ValueError(f"lora: expected it beside the base's weights and on, as it will be loaded; it {how}")


def add_adapter(base: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Put a new adapter into a base's layers, given what :func:`without_peft` said of the one before.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        from peft import get_peft_config, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("this model has a LoRA; install peft: pip install 'memformer-replay[hf]'") from error
    settings = dict(settings)
    name = settings.pop("adapter_name")
    inject_adapter_in_model(get_peft_config(settings), base, name)


def check_length(config: PreTrainedConfig, segment_length: int) -> None:
    """Raise ValueError unless a base of that configuration reads a segment at once."""
    check_count("segment_length", segment_length)
    most = getattr(text_config(config), "max_position_embeddings", None)
    if most is not None and segment_length > most:
        raise ValueError(
            f"segment_length: expected at most the base's {most} positions, got {segment_length}; the slots need none"
        )


def check_base(base: Any) -> None:
    """Raise ValueError, which names it, for a model that is no causal one, or has layers of another kind.

    Its forward runs on three tokens, to see that no token is seen by those before it, that each layer runs once, and
    that the logits are made of the last hidden states.
    """
    name = type(base).__name__
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"base: expected a causal language model of transformers, as AutoModelForCausalLM loads it, got {name}"
        )
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(f"base: {name} is an encoder and a decoder; a causal language model is expected")
    if base.get_output_embeddings() is None:
        raise ValueError(f"base: {name} has no head that predicts tokens; load it with AutoModelForCausalLM")
    if decoder_of(base) is base:
        raise ValueError(
            f"base: the decoder of {name} is not its {base.base_model_prefix!r}, as transformers has it; such a model "
            "cannot get a memory"
        )
    kinds = set(getattr(text_config(base), "layer_types", None) or ATTENDING)
    if getattr(base, "_is_stateful", False) or not kinds <= ATTENDING:
        others = ", ".join(sorted(kinds - ATTENDING)) or "a state of its own"
        raise ValueError(f"base: {name} has {others}; only models whose layers all attend can get a memory")
    if CACHE not in inspect.signature(decoder_of(base).forward).parameters:
        raise ValueError(
            f"base: the decoder of {name} takes no {CACHE}; a causal model that can write text is expected"
        )
    if not layers_of(base):
        raise ValueError(f"base: no list of {text_config(base).num_hidden_layers} layers was found in {name}")
    if base.device.type != "meta":
        _try(base, name)


def _try(base: PreTrainedModel, name: str) -> None:
    try:
        seen, shapes, hidden, placed, logits, whole = _run(base)
    except Exception as error:
        raise ValueError(
            f"base: {name} cannot be run as a memory runs it, its decoder first and its head after it, got "
            f"{type(error).__name__}: {error}"
        ) from error
    width, expected = hidden.shape[-1], text_config(base).hidden_size
    if width != expected:
        raise ValueError(f"base: what the head of {name} reads is {width} wide, expected {expected}, as its layers are")
    atol = 100 * torch.finfo(whole.dtype).eps * float(whole.abs().max())
    if not torch.allclose(logits[0, :2], logits[1, :2], rtol=0, atol=atol):
        raise ValueError(f"base: in {name} a token sees those after it; a causal model is expected (is_decoder=True)")
    if seen != layers_of(base) or not torch.allclose(logits, whole, rtol=0, atol=atol):
        raise ValueError(f"base: {name} does not run its layers one after the other, and its head after them")
    if others := sorted({shape for shape in shapes if shape != (*hidden.shape[:2], expected)}):
        raise ValueError(
            f"base: the layers of {name} give {others[0]} for tokens of {tuple(hidden.shape[:2])}; only models whose "
            "layers give (batch, tokens, width) can get a memory"
        )
    if not torch.allclose(placed, hidden, rtol=0, atol=100 * torch.finfo(hidden.dtype).eps * float(hidden.abs().max())):
        raise ValueError(
            f"base: {name} does not count positions from 0; such a model cannot go on where it has stopped"
        )


@torch.no_grad()
def _run(base: PreTrainedModel) -> tuple[list[nn.Module], list[tuple[int, ...]], Tensor, Tensor, Tensor, Tensor]:
    """The layers as they ran, the shapes that they gave, the last hidden states, the same with the positions given, the
    logits that are made of them, and those of one call."""
    layers, seen, shapes = layers_of(base), [], []

    def note(layer: nn.Module, _: Any, output: Any) -> None:
        seen.append(layer)
        shapes.append(tuple((output if isinstance(output, Tensor) else output[0]).shape))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    tokens = torch.tensor([[1, 2, 1], [1, 2, 2]], device=base.get_input_embeddings().weight.device)
    with in_evaluation(base):
        try:
            hidden = decode(base, tokens)
        finally:
            for hook in hooks:
                hook.remove()
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        placed = decode(base, tokens, positions=places)
        logits = logits_of(base, hidden)
        whole = base(input_ids=tokens, use_cache=False).logits
    return seen, shapes, hidden, placed, logits, whole


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A base's configuration as JSON has it, but for its dtype, which is the model's."""
    return {name: x for name, x in json.loads(config.to_json_string(use_diff=False)).items() if name != "dtype"}


def checkpoints_activations(module: nn.Module) -> bool:
    """Whether a part of a base computes its activations again in the backward pass."""
    return bool(getattr(module, "gradient_checkpointing", False)) and hasattr(module, "_gradient_checkpointing_func")
