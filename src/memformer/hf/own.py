"""This library's own models as transformers expects them: with its configurations, its ``generate`` and its folders.

An adapter holds a model and adds nothing to it. Whatever it is asked for is what the model was trained for: to continue
text, each token from all before it. What is *not* known here: other language models, see ``model.py``.

Shapes: tokens and masks (batch, tokens), logits (batch, tokens, vocabulary).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..causal import CausalMemformer
from ..checks import IGNORED, as_mask, as_tokens, check_labels, check_mask, check_tokens
from ..config import ModelConfig, check_count
from ..data.segments import cut
from ..data.tokenizers import CONFIG, Tokenizer, load_tokenizer
from ..interface import SegmentModel
from ..model import Memformer
from ..nn.causal import along
from ..nn.losses import each_loss
from ..nn.positions import Rotary
from ..pretrained import SHARDS, distinct, read_config, read_shards
from ..state import MemoryState
from ..writing import Writing, read_lanes
from .bases import CACHE, model_folder
from .cache import Carried, CarriedGenerationMixin, check_no_embeds
from .card import TAGS, write_card
from .places import kept_first
from .recording import States, Which, asked_for, states_of, wants_some

__all__ = [
    "CausalMemformerForCausalLM",
    "HFCausalConfig",
    "HFMemformerConfig",
    "MemformerForCausalLM",
    "StreamCache",
    "as_transformers",
]


class _OwnConfig(PreTrainedConfig):
    """The settings of a model of this library, by their own names, and those of the tokenizer's ids that matter.

    Attributes:
        start_token_id: the token that started documents in training. It is no text: where it is given, nothing is read.
        end_token_id: the token that ends a document, where the model has learned that; else None.
        special_token_ids: those that are not written.
    """

    kind: ClassVar[type[SegmentModel]]

    def __init__(
        self,
        start_token_id: int | None = None,
        end_token_id: int | None = None,
        special_token_ids: list[int] | None = None,
        **settings: Any,
    ):
        settings.pop("model", None)
        for field in dataclasses.fields(self.kind.config_class):
            default = None if field.default is dataclasses.MISSING else field.default
            setattr(self, field.name, settings.pop(field.name, default))
        self.start_token_id, self.end_token_id, self.special_token_ids = start_token_id, end_token_id, special_token_ids
        for name, token in (("bos", start_token_id), ("eos", end_token_id), ("pad", start_token_id)):
            setattr(self, f"{name}_token_id", settings.pop(f"{name}_token_id", token))  # as others look for them
        super().__init__(**settings)

    @property
    def settings(self) -> ModelConfig:
        """The model's own configuration. Raises ValueError, which names it, for a setting that is out of range."""
        fields = dataclasses.fields(self.kind.config_class)
        return self.kind.config_class(**{field.name: getattr(self, field.name) for field in fields})

    def to_dict(self) -> dict[str, Any]:
        """As ``config.json`` has it, which the library reads, too."""
        return {"model": self.kind.kind} | super().to_dict()

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is in ``config.json``, and what the tokenizer beside it says, if there is one."""
        folder = model_folder(pretrained_model_name_or_path)
        values, kwargs = super().get_config_dict(folder, **kwargs)
        if "start_token_id" not in values and (Path(folder) / CONFIG).is_file():
            values |= _ids(load_tokenizer(folder))
        return values, kwargs


class HFCausalConfig(_OwnConfig):
    """The settings of a :class:`CausalMemformerForCausalLM`: those of a :class:`~memformer.CausalMemformer`."""

    kind = CausalMemformer
    model_type = "memformer_causal"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "vocab_size": "num_tokens",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **settings: Any):  # transformers gives a class without one another
        super().__init__(**settings)


class HFMemformerConfig(_OwnConfig):
    """The settings of a :class:`MemformerForCausalLM`: those of a :class:`~memformer.Memformer`."""

    kind = Memformer
    model_type = "memformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "dec_depth",
        "num_attention_heads": "dec_heads",
        "vocab_size": "enc_num_tokens",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **settings: Any):  # transformers gives a class without one another
        super().__init__(**settings)


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "start_token_id": tokenizer.start,
        "end_token_id": tokenizer.end,
        "special_token_ids": list(tokenizer.special),
    }


class StreamCache(Carried):
    """The state of a stream, and what its model opens once per segment: what ``generate`` carries, of fixed size.

    A call extends it in place, as transformers' own; ``generate`` leaves the one that it is given as it is.
    """

    def __init__(self, writing: Writing):
        super().__init__()
        self.writing = writing

    @property
    def state(self) -> MemoryState:
        """As the library's own ``read``, ``stream`` and ``generate`` take it, and as it is saved; a copy."""
        return self.writing.state.clone()

    @property
    def batch_size(self) -> int:
        """How many lanes there are."""
        return self.writing.state.batch_size

    def copy(self) -> StreamCache:
        """Another one; what is done to it leaves this one as it is."""
        other = StreamCache(copy.copy(self.writing))
        other.select(torch.arange(self.batch_size))
        return other

    def select(self, lanes: Tensor) -> None:
        """Go on with those lanes alone, in that order; a lane may come more than once. In place."""
        self.writing.select(lanes.to(self.writing.state.position.device))


class _OwnForCausalLM(PreTrainedModel):
    """A model of this library that continues text. ``memformer`` is the model itself."""

    config: _OwnConfig  # type: ignore[assignment]
    base_model_prefix = "memformer"
    model_tags = TAGS
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    _is_stateful = True
    _supports_sdpa = True

    def __init__(self, config: _OwnConfig, model: SegmentModel | None = None):
        super().__init__(config)
        self.memformer = config.kind(**config.settings.to_dict()) if model is None else model
        self.memformer.check_writes(type(self).__name__)
        self._tied_weights_keys = self._ties()
        if self._table.weight.device.type != "meta":  # nothing is left to be initialised
            for part in self.modules():
                part._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()  # type: ignore[no-untyped-call]
        self.generation_config = _generation_config(config)
        self.register_load_state_dict_pre_hook(_as_named_here)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, model: SegmentModel, tokenizer: Tokenizer | None = None) -> Self:
        """An adapter for a model that exists; it is not copied."""
        ids = {} if tokenizer is None else _ids(tokenizer)
        weight = next(model.parameters())
        return cls(cls.config_class(**model.config.to_dict(), **ids, dtype=weight.dtype), model).train(model.training)

    @property
    @abstractmethod
    def _table(self) -> nn.Embedding:
        """The vectors of the tokens that are read."""

    @abstractmethod
    def _hidden(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """What each token is predicted from, (batch, tokens, dim), for :meth:`_head`; those kept come first."""

    @abstractmethod
    def _head(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> logits."""

    @property
    @abstractmethod
    def _layers(self) -> list[nn.Module]:
        """Those that predict, the first one first."""

    @abstractmethod
    def _predicting(self, states: list[Tensor]) -> Tensor:
        """What a layer gave for each segment, in the places of :meth:`_hidden`."""

    def _ties(self) -> dict[str, str]:
        """Which parameters are one, by name: the second is the one that is saved."""
        names: dict[int, str] = {}
        ties = {}
        for name, parameter in sorted(self.named_parameters(remove_duplicate=False)):
            first = names.setdefault(id(parameter), name)
            if first != name:
                ties[name] = first
        return ties

    def _init_weights(self, module: nn.Module) -> None:
        """What a checkpoint lacks is as at construction."""
        if isinstance(module, Rotary):
            module._apply(lambda x: x)  # makes its tables anew
        elif missing := [(n, p) for n, p in module.named_parameters(recurse=False) if not _initialised(p)]:
            name = next(name for name, part in self.memformer.named_modules() if part is module)
            fresh = self.config.kind(**self.config.settings.to_dict()).get_submodule(name)
            for key, parameter in missing:
                init.copy_(parameter, fresh.get_parameter(key).to(parameter))

    def get_input_embeddings(self) -> nn.Module:
        """The vectors of the tokens that are read."""
        return self._table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused. Raises ValueError."""
        raise ValueError(_FIXED)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refused. Raises ValueError."""
        raise ValueError(_FIXED)

    # --- One call -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: StreamCache | None = None,
        past_key_values: StreamCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: Which = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: None = None,
    ) -> CausalLMOutputWithPast:
        """Read tokens of any length from a document's beginning, or behind a cache, and predict what follows each.

        Args:
            input_ids: (batch, tokens).
            attention_mask: like ``input_ids``, True or 1 for tokens that exist, wherever they stand.
            labels: like ``input_ids``, and mostly the same: each is predicted from the tokens before it, a document's
                first one, too; -100 does not count. Not beside a cache.
            cache: what an earlier call with ``use_cache`` returned; it is extended in place, without gradients. Of a
                longer mask the last part is that of ``input_ids``. ``past_key_values`` is its older name.
            use_cache: return a cache to go on from.
            logits_to_keep: of so many last tokens alone; 0 for all.
            output_hidden_states: return the embeddings and what each layer gives, (batch, tokens, dim) each: from the
                last ones the logits are made. Numbers say of which layers alone. Not beside a cache.
            output_attentions: refused, for no weights are kept.
            inputs_embeds: None, as PEFT gives it; anything else is refused.

        Raises:
            ValueError: a shape, dtype or token id does not fit; the message says what was expected.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError(f"cache: past_key_values is its older name; give one, in this version {CACHE}")
        check_no_embeds(inputs_embeds)
        cache = past_key_values if cache is None else cache
        device, vocabulary = self._table.weight.device, self.memformer.config.vocabulary
        tokens, labels = as_tokens(input_ids, device), as_tokens(labels, device)
        mask = as_mask("attention_mask", attention_mask, device)
        if cache is not None and isinstance(mask, Tensor) and isinstance(tokens, Tensor):
            mask = mask[:, -tokens.shape[-1] :]
        check_tokens("input_ids", tokens, vocabulary, 2**62, "")
        check_mask("attention_mask", mask, tokens)
        check_count("logits_to_keep", logits_to_keep, least=0)
        which = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if output_attentions:
            raise ValueError("output_attentions: expected none, for the models of this library keep no weights")
        kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        if self.config.start_token_id is not None:
            kept = kept & (tokens != self.config.start_token_id)
        loss = states = None
        if cache is not None or (use_cache and labels is None):
            if wants_some(which):
                raise ValueError(
                    "output_hidden_states: expected no cache beside them, which keeps none; use_cache=False"
                )
            if labels is not None:
                raise ValueError("labels: expected none beside a cache, which has no gradients; give the whole text")
            logits, cache = self._go_on(tokens, kept, cache, logits_to_keep)
        else:
            if labels is not None:
                check_labels("labels", labels, tokens, vocabulary)
            logits, loss, states = self._whole(tokens, kept, labels, logits_to_keep, which)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output  # type: ignore[return-value]

    def _whole(
        self, tokens: Tensor, kept: Tensor, labels: Tensor | None, logits_to_keep: int, which: Which
    ) -> tuple[Tensor, Tensor | None, States | None]:
        order = kept_first(kept)
        # One more, which does not exist: what is predicted there follows the last one.
        first, exists = F.pad(tokens.gather(1, order), (0, 1)), F.pad(kept.gather(1, order), (0, 1))
        after, states = kept.cumsum(1), None  # so many tokens were read
        if not wants_some(which):
            hidden = self._hidden(first, exists)
        else:
            with states_of(self._layers) as runs:
                hidden = self._hidden(first, exists)
            layers = [self._predicting(list(x)) for x in zip(*runs, strict=True)]
            states = asked_for([along(x, after) for x in (*layers[:-1], hidden)], which)
        logits = self._logits(along(hidden, after[:, -logits_to_keep:]))
        if labels is None:
            return logits, None, states
        counted = kept & (labels != IGNORED)
        losses = each_loss(self._logits(along(hidden, (after - 1).clamp(min=0))), labels.where(counted, IGNORED))
        return logits, losses.sum() / counted.sum().clamp(min=1), states

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)[..., : self.memformer.config.vocabulary]

    @torch.no_grad()
    def _go_on(
        self, tokens: Tensor, kept: Tensor, cache: StreamCache | None, logits_to_keep: int
    ) -> tuple[Tensor, StreamCache]:
        """The library's own way to read and write a stream."""
        if cache is None:
            state = self.memformer.new_state(len(tokens), self._start)
        elif isinstance(cache, StreamCache) and cache.batch_size == len(tokens):
            self._check_state(cache.writing.state)
            state = cache.writing.state
        else:
            got = f"one of {cache.batch_size}" if isinstance(cache, StreamCache) else type(cache).__name__
            raise ValueError(
                f"cache: expected a StreamCache of {len(tokens)} lanes, as this model returns it, got {got}"
            )
        count = tokens.shape[1]
        if count > 1 and logits_to_keep == 1:
            lanes = [row[mask] for row, mask in zip(tokens, kept, strict=True)]
            writing = Writing(self.memformer, read_lanes(self.memformer, lanes, state))
            if cache is None:
                cache = StreamCache(writing)
            cache.writing = writing
            return self._logits_now(writing)[:, None], cache
        if cache is None:
            cache = StreamCache(Writing(self.memformer, state))
            cache.writing.logits()  # each takes in the last token before it
        logits = []
        for column in range(count):
            index = kept[:, column].nonzero()[:, 0]
            cache.writing.append(index.tolist(), tokens[index, column])
            logits.append(self._logits_now(cache.writing))
        return torch.stack(logits[-logits_to_keep:], 1), cache

    def _logits_now(self, writing: Writing) -> Tensor:
        return writing.logits()[..., : self.memformer.config.vocabulary]

    @property
    def _start(self) -> int:
        """The start token; a causal model does not read it."""
        start = self.config.start_token_id
        return 0 if start is None else start

    def _check_state(self, state: MemoryState) -> None:
        expected = self.memformer.new_state(1, state.start)
        for part in ("memory", "segment", "pending"):
            like, given = getattr(expected, part), getattr(state, part)
            if (like.shape[1:], like.dtype) != (given.shape[1:], given.dtype):
                raise ValueError(
                    f"cache: expected a {part} of {tuple(like.shape[1:])}, {like.dtype}, in each lane, got "
                    f"{tuple(given.shape[1:])}, {given.dtype}: is it of another model?"
                )

    # --- In a folder --------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: Any, *, state_dict: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """As transformers saves a model, with the names that ``load_model`` and the model's own class read, too."""
        for name, value in dataclasses.asdict(self.memformer.config).items():  # the model may have been changed
            setattr(self.config, name, value)
        state = self.state_dict() if state_dict is None else state_dict
        prefix = f"{self.base_model_prefix}."
        named = distinct({name.removeprefix(prefix): tensor for name, tensor in state.items()})
        super().save_pretrained(save_directory, state_dict=named, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        kind, parameters = type(self.memformer).__name__, sum(p.numel() for p in self.memformer.parameters())
        write_card(save_directory, f"A {kind}", f"A {kind} of {parameters:,} parameters.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """The model in a folder that this library or transformers wrote, in a run's folder, or of the hub."""
        folder = model_folder(pretrained_model_name_or_path)
        if folder is not None and (Path(folder) / SHARDS).is_dir():
            config = kwargs.pop("config", None) or cls.config_class.from_pretrained(folder)
            state = read_shards(Path(folder) / SHARDS, "model/")
            return super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
        return super().from_pretrained(folder, *args, **kwargs)


class CausalMemformerForCausalLM(_OwnForCausalLM, CarriedGenerationMixin):
    """A :class:`~memformer.CausalMemformer` as a causal language model of transformers; ``memformer`` is the model."""

    config_class = HFCausalConfig  # type: ignore[assignment]
    memformer: CausalMemformer

    @property
    def _table(self) -> nn.Embedding:
        return self.memformer.embedding

    def _hidden(self, tokens: Tensor, kept: Tensor) -> Tensor:
        mems, outputs = None, []
        for segment in cut(self.memformer.config.segment_length, tokens, None, kept):
            hidden, mems = self.memformer.step(segment.src, mems, segment.src_mask)
            outputs.append(hidden[:, :-1])
        return torch.cat(outputs, 1)

    def _head(self, hidden: Tensor) -> Tensor:
        return self.memformer.head(hidden)

    @property
    def _layers(self) -> list[nn.Module]:
        return list(self.memformer.stack.each_block())

    def _predicting(self, states: list[Tensor]) -> Tensor:
        return F.pad(torch.cat(states, 1), (0, 0, 1, 0))  # before the first token layers have given nothing


class MemformerForCausalLM(_OwnForCausalLM, CarriedGenerationMixin):
    """A :class:`~memformer.Memformer` that continues text, as ``memformer train`` makes it; ``memformer`` is the model.

    The decoder predicts each segment from the encoding of the one before. There is no source to give beside the text,
    so this is a causal language model, and no encoder-decoder, to transformers.

    Raises:
        ValueError: an encoder-only model, or one whose start token is not known.
    """

    config_class = HFMemformerConfig  # type: ignore[assignment]
    memformer: Memformer

    @property
    def _table(self) -> nn.Embedding:
        return self.memformer.encoder.embedding

    @property
    def _start(self) -> int:
        if self.config.start_token_id is None:
            raise ValueError(
                "start_token_id: expected the token that started documents in training, got None; give the tokenizer "
                "to as_transformers, or set model.config.start_token_id"
            )
        return self.config.start_token_id

    def _hidden(self, tokens: Tensor, kept: Tensor) -> Tensor:
        model = self.memformer
        decoder, mems, outputs = model.need_decoder("text"), None, []
        source, source_mask = torch.full_like(tokens[:, :1], self._start), None
        for segment in cut(model.config.segment_length, tokens, None, kept):
            encoded, mems = model.step(source, mems, source_mask)
            target = F.pad(segment.src[:, :-1], (1, 0), value=self._start)
            mask = F.pad(segment.src_mask[:, :-1], (1, 0), value=True)  # type: ignore[index]
            outputs.append(decoder(target, encoded, source_mask, mask, source, readout=lambda x, _: x))
            source, source_mask = segment.src, segment.src_mask
        return torch.cat(outputs, 1)

    def _head(self, hidden: Tensor) -> Tensor:
        return self.memformer.need_decoder("text").to_logits(hidden)

    @property
    def _layers(self) -> list[nn.Module]:
        return list(self.memformer.need_decoder("text").layers)

    def _predicting(self, states: list[Tensor]) -> Tensor:
        overlap = self.memformer.need_decoder("text").overlap
        return torch.cat([x[:, overlap:] for x in states], 1)


ADAPTERS = (CausalMemformerForCausalLM, MemformerForCausalLM)


def as_transformers(model: SegmentModel, tokenizer: Tokenizer | None = None) -> PreTrainedModel:
    """A model of this library for whatever takes a causal language model of transformers. It is not copied.

    Args:
        model: a :class:`~memformer.CausalMemformer` or a :class:`~memformer.Memformer`, trained to continue text.
        tokenizer: with which it was trained. It says which tokens begin and end a document and are not written; a
            Memformer needs the first.

    Raises:
        ValueError: another kind of model, or one that writes no text.
    """
    for adapter in ADAPTERS:
        if isinstance(model, adapter.config_class.kind):
            return adapter.of(model, tokenizer)
    raise ValueError(f"model: expected a CausalMemformer or a Memformer, got {type(model).__name__}")


def named_causal(adapter: type[PreTrainedModel]) -> None:
    """Let transformers know by its name that a model predicts the next token: ``Trainer`` then shifts labels when it
    smooths them, and pipelines take it."""
    kind: Any = adapter.config_class
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind.model_type] = adapter.__name__


def register() -> None:
    """Let the Auto classes know these models, also in folders that transformers has not written."""
    for adapter in ADAPTERS:
        AutoConfig.register(adapter.config_class.model_type, adapter.config_class, exist_ok=True)
        AutoModelForCausalLM.register(adapter.config_class, adapter, exist_ok=True)
        named_causal(adapter)
    plain = getattr(AutoConfig.from_pretrained, "__wrapped__", AutoConfig.from_pretrained)

    @functools.wraps(plain)
    def from_pretrained(pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        folder = model_folder(pretrained_model_name_or_path)
        config_class = _config_class_in(folder)
        if config_class is None:
            return plain(folder, **kwargs)
        for option in ("trust_remote_code", "code_revision"):
            kwargs.pop(option, None)
        return config_class.from_pretrained(folder, **kwargs)

    # A run's folder has no config.json, and the library's own says nothing of transformers.
    AutoConfig.from_pretrained = from_pretrained


def _config_class_in(folder: Any) -> type[_OwnConfig] | None:
    """What a folder's ``config.json`` is of that this library wrote."""
    if not isinstance(folder, str) or not (Path(folder) / "config.json").is_file():
        return None
    try:
        kind, values = read_config(Path(folder))
    except ValueError:
        return None  # transformers says what is wrong with it
    if "model_type" in values:
        return None
    known = {adapter.config_class.kind.kind: adapter.config_class for adapter in ADAPTERS}
    config_class = known.get(kind)
    return config_class if config_class is not None and "num_memory_slots" in values else None


def _generation_config(config: _OwnConfig) -> GenerationConfig:
    never = [token for token in config.special_token_ids or [] if token != config.end_token_id]
    return GenerationConfig(
        bos_token_id=config.start_token_id,
        eos_token_id=config.end_token_id,
        pad_token_id=config.start_token_id,
        suppress_tokens=never or None,
    )


def _as_named_here(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """The weights of a folder, which have the names of the model itself, as an adapter's; Trainer loads them so."""
    own, inner = [name for name in state if name.startswith(prefix)], f"{prefix}{_OwnForCausalLM.base_model_prefix}."
    if not any(name.startswith(inner) for name in own):
        for name in own:
            state[inner + name.removeprefix(prefix)] = state.pop(name)


def _initialised(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


_FIXED = "the vocabulary of a model of this library is fixed; build it with another num_tokens, and train that"
