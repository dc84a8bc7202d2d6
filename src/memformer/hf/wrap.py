"""with_memory: a memory around a causal language model that is there already."""

from __future__ import annotations

from typing import Any

from ..config import Writer
from .bases import check_base, settings_of, without_peft
from .configuration import MemoryConfig
from .model import M, MemoryForCausalLM, memory_around

__all__ = ["around", "with_memory"]


def with_memory(
    base: Any,
    slots: int = 16,
    segment_length: int = 512,
    *,
    read_dim: int = 256,
    read_heads: int = 4,
    memory_writer: Writer = "normalised",
    write_heads: int = 8,
    write_temperature: float = 0.25,
    forgetting: float = 0.001,
    slot_parts: int = 1,
    gguf_file: str | None = None,
) -> MemoryForCausalLM:
    """A memory around a causal language model. At construction it predicts a segment exactly as the model does.

    The base is not copied, and keeps its weights, names, dtype, device and ways of attending. Beside each of its layers
    the tokens attend to the slots; the slots are written from the last hidden states.

    Args:
        base: as ``AutoModelForCausalLM`` loads it, or a ``peft.PeftModel`` with LoRA around one.
        slots: of the memory; each is as wide as the base.
        segment_length: tokens that the base reads at once, at most as many as it has positions.
        read_dim, read_heads: width and heads of the attention over the slots.
        memory_writer, write_heads, write_temperature, forgetting: how the slots are written, as in
            :class:`~memformer.Memformer`.
        slot_parts: in how many parts a slot is read; must divide the base's width. 1 reads slots whole.
        gguf_file: from which the base was loaded, for a memory that is saved with a reference to it.

    Raises:
        ValueError: the base is no causal model, or a setting does not fit it; the message says what was expected.
    """
    return around(
        MemoryForCausalLM,
        base,
        slots=slots,
        segment_length=segment_length,
        read_dim=read_dim,
        read_heads=read_heads,
        memory_writer=memory_writer,
        write_heads=write_heads,
        write_temperature=write_temperature,
        forgetting=forgetting,
        slot_parts=slot_parts,
        gguf_file=gguf_file,
    )


def around(kind: type[M], base: Any, **sizes: Any) -> M:
    """:func:`with_memory`, as a model of that kind."""
    model, adapter = without_peft(base)
    check_base(model)
    config = MemoryConfig(
        base=settings_of(model.config),
        **sizes,
        adapter=adapter,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )
    return memory_around(kind, model, config).train(model.training)
