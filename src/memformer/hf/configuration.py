"""The settings of a memory around a pretrained language model, with the model's own inside."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from ..config import Writer, as_before, check_count, check_writing
from .bases import CACHE, check_length, settings_of, text_config

__all__ = ["MemoryConfig"]


def _of_the_base(name: str, text: str = "The base's.") -> Any:
    """A setting of the language model inside, to be read and set."""

    def get(config: MemoryConfig) -> Any:
        return getattr(text_config(config.base_config), name)

    def put(config: MemoryConfig, value: Any) -> None:
        base = config.base_config
        setattr(text_config(base), name, value)
        config.base = settings_of(base)

    return property(get, put, doc=text)


class MemoryConfig(PreTrainedConfig):
    """Every setting of a :class:`MemoryForCausalLM`; :func:`with_memory` describes them.

    Attributes:
        base: the base's configuration, as a dictionary.
        adapter: the settings of a LoRA in the base, as PEFT writes them; None without one.
        gguf_file: the file in the base's folder that it was loaded from, where that is a GGUF.
        reference: where the base is, for a folder that holds the memory alone: its name, GGUF file and fingerprint.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    model_type = "memformer_memory"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["memory", CACHE]

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        slots: int = 16,
        segment_length: int = 512,
        read_dim: int = 256,
        read_heads: int = 4,
        memory_writer: Writer = "normalised",
        write_heads: int = 8,
        write_temperature: float = 0.25,
        forgetting: float = 0.001,
        slot_parts: int = 1,
        adapter: dict[str, Any] | None = None,
        gguf_file: str | None = None,
        reference: dict[str, str | None] | None = None,
        **others: Any,
    ):
        self.base, self.adapter = base, adapter
        self.gguf_file, self.reference = gguf_file, reference
        self.slots, self.segment_length = slots, segment_length
        self.read_dim, self.read_heads = read_dim, read_heads
        self.memory_writer, self.write_heads, self.write_temperature = memory_writer, write_heads, write_temperature
        self.forgetting, self.slot_parts = forgetting, slot_parts
        super().__init__(**others)
        if base is not None:  # transformers compares with a configuration of defaults alone
            self.check()
            text = text_config(self.base_config)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if getattr(self, name, None) is None:
                    setattr(self, name, getattr(text, name, None))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does. Raises ValueError for the settings of another kind of model."""
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"expected a folder of a {cls.model_type}, got that of a {kind} without a memory: load it with "
                "AutoModelForCausalLM, and put a memory around it with memformer.hf.with_memory"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers has it, but for :func:`as_before`: so states of before are its own."""
        return as_before(super().to_dict())

    def check(self) -> None:
        """Raise ValueError where a setting is out of range or does not fit the base."""
        for name in ("slots", "read_dim", "read_heads", "write_heads", "slot_parts"):
            check_count(name, getattr(self, name))
        check_length(self.base_config, self.segment_length)
        check_writing(self.memory_writer, self.write_temperature, self.forgetting)
        for name, width, of in (
            ("read_heads", self.read_dim, "read_dim"),
            ("write_heads", self.hidden_size, "the base's width"),
        ):
            if width % getattr(self, name):
                raise ValueError(f"{name}: must divide {of}, got {getattr(self, name)} heads for {width}")
        if self.hidden_size % self.slot_parts:
            raise ValueError(f"slot_parts: must divide the base's width, got {self.slot_parts} for {self.hidden_size}")

    @property
    def base_config(self) -> PreTrainedConfig:
        """A new configuration of the base. Raises AttributeError where there is none."""
        if self.base is None:
            raise AttributeError("base: expected the configuration of a language model, got none; see with_memory")
        values = copy.deepcopy(self.base)
        return AutoConfig.for_model(values.pop("model_type"), **values)

    hidden_size = _of_the_base("hidden_size", "The width of the base, and of a slot.")
    num_hidden_layers = _of_the_base("num_hidden_layers")
    num_attention_heads = _of_the_base("num_attention_heads")
    vocab_size = _of_the_base("vocab_size")
    tie_word_embeddings = _of_the_base("tie_word_embeddings")
    max_position_embeddings = _of_the_base("max_position_embeddings")

    @property
    def vocabulary(self) -> int:
        """How many tokens can be read and written: ids from 0."""
        return self.vocab_size

    @property
    def vocabularies(self) -> dict[str, int | None]:
        """The settings that say how many tokens are known."""
        return {"vocab_size": self.vocab_size}

    @property
    def num_memory_slots(self) -> int:
        """The slots, as the other models of this library call them."""
        return self.slots
