"""MemoryForCausalLM: a pretrained causal language model with a memory. See :func:`~memformer.hf.with_memory`.

Shapes: tokens (batch, tokens), slots (batch, slots, dim), hidden states (batch, tokens, dim). Nothing here knows the
replay engine.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init

from ..checks import IGNORED, as_mask, as_tokens, check_labels, check_mask, check_reset, check_tokens
from ..config import check_count
from ..data.segments import Segment, Targets, cut, each_as_tokens
from ..interface import Divisor, LanguageModel, Step, TokenLosses
from ..nn.causal import along
from ..nn.memory import SlotWriter, begun
from ..state import MemoryState
from .bases import (
    CACHE,
    add_adapter,
    check_adapter,
    check_router,
    checkpoints_activations,
    decode,
    layers_of,
    logits_of,
    losses_of,
    model_folder,
    settings_of,
)
from .cache import CarriedGenerationMixin, MemoryCache, MemoryOutput, PretrainedMemory, check_memory, check_no_embeds
from .card import TAGS, write_card
from .configuration import MemoryConfig
from .places import before_each, counted_labels, joined, kept_first
from .reading import HALF, Readers, writer_of
from .recording import Which, asked_for, looking
from .reference import found_base, load_own, looks_of, own_state, reference_to

__all__ = ["MemoryForCausalLM", "MemoryOutput", "PretrainedMemory", "memory_around"]

Part = Literal["memory", "lora", "all"]
M = TypeVar("M", bound="MemoryForCausalLM")


class Opened(NamedTuple):
    """What the tokens of a pending segment need: the memory before it, in parts. First dimension: batch."""

    memory: Tensor
    last: Tensor


class MemoryForCausalLM(PreTrainedModel, CarriedGenerationMixin, LanguageModel):
    """A causal language model of transformers with a memory; :func:`~memformer.hf.with_memory` makes one.

    Args:
        config: its settings.
        base: the language model; None makes one of ``config.base`` without its weights, as transformers does.
    """

    config: MemoryConfig  # type: ignore[assignment]
    config_class = MemoryConfig  # type: ignore[assignment]
    kind = "MemoryForCausalLM"
    base_model_prefix = "base"
    main_input_name = "input_ids"
    model_tags = TAGS
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _is_stateful = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: MemoryConfig, base: PreTrainedModel | None = None):
        attention = config._attn_implementation  # None where nobody asks for one: then the base chooses its own
        super().__init__(config)
        made = base is None
        if base is None:
            base = AutoModelForCausalLM.from_config(config.base_config, attn_implementation=attention)
            config._attn_implementation = base.config._attn_implementation
            if config.adapter is not None:
                add_adapter(base, config.adapter)
        self.base, self.dim = base, config.hidden_size
        self._base_looked: dict[str, str] | None = None  # when it got its memory; here it has no weights yet
        self.readers = Readers(layers_of(base), self.dim, config.read_dim, config.read_heads, config.slot_parts)
        self.write_norm = nn.LayerNorm(self.dim)
        self.writer = writer_of(config)
        # A slot changes by less than what bfloat16 can hold; PEFT keeps a LoRA in float32, too.
        lora = [] if config.adapter is None else ["lora_A", "lora_B"]
        self._keep_in_fp32_modules_strict = ["writer", *lora]
        if not made:
            for part in self.modules():  # nothing is left to be initialised
                part._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()  # type: ignore[operator]

    def _init_weights(self, module: nn.Module) -> None:
        """What a checkpoint lacks is as at construction."""
        if isinstance(module, SlotWriter):
            fresh = writer_of(self.config)
            for name, parameter in module.named_parameters():
                init.copy_(parameter, fresh.get_parameter(name))
        elif isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    @property
    def vocab_size(self) -> int:
        """The base's."""
        return self.config.vocab_size

    @property
    def table(self) -> Tensor:
        """The base's embeddings, (vocabulary, dim)."""
        return self.base.get_input_embeddings().weight

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the base another projection to logits."""
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Give the base another vocabulary; see transformers."""
        table: nn.Module = self.base.resize_token_embeddings(*args, **kwargs)
        self.config.base = settings_of(self.base.config)
        return table

    @property
    def depth(self) -> int:
        """The base's layers."""
        return len(self.readers.each)

    def trainable(self, part: Part) -> MemoryForCausalLM:
        """Let gradients reach only a part: the ``"memory"`` alone, it and the base's ``"lora"``, or ``"all"``.

        The memory is what reads and writes it, and its first slots. Returns the model itself.

        Raises:
            ValueError: another part, ``"lora"`` for a base without one, or ``"all"`` with a router's loss.
        """
        if part not in get_args(Part):
            raise ValueError(f"trainable: expected one of {', '.join(get_args(Part))}, got {part!r}")
        if part == "lora" and self.config.adapter is None:
            raise ValueError("trainable: the base has no LoRA; wrap it with peft.get_peft_model before with_memory")
        if part == "all":
            check_router(self.base)
        for name, parameter in self.named_parameters():
            wanted = not name.startswith("base.") or part == "all" or (part == "lora" and "lora_" in name)
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(wanted)
        return self

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **options: Any
    ) -> None:
        kept = self.readers.checkpointing(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, kept, **options)

    # --- In a folder --------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        *,
        base: Literal["saved", "referenced"] | None = None,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the model as transformers does; the other arguments are those of its ``save_pretrained``.

        Args:
            base: "referenced" writes the memory and a LoRA alone, and of a frozen base only its name, its GGUF file and
                a fingerprint of its weights. None: so of a quantised base, any other is "saved".

        Raises:
            ValueError: another word, a base that cannot be referenced (it has no name, is not frozen, or is not as it
                was loaded), or a quantised one that is to be saved; or a LoRA that is merged, unloaded, off, or newer.
        """
        check_adapter(self, known=self.config.adapter is not None)
        self.config.base = settings_of(self.base.config)
        quantised = getattr(self.base, "hf_quantizer", None) is not None
        base = base or ("referenced" if quantised else "saved")
        if base not in ("saved", "referenced"):
            raise ValueError(f"base: expected 'saved' or 'referenced', got {base!r}")
        if quantised and base == "saved":
            raise ValueError(
                "base: expected 'referenced', because this one is quantised and is not written with a memory, got "
                "'saved'; give the base itself when loading: MemoryForCausalLM.from_pretrained(folder, base_model=base)"
            )
        before, self.config.reference = self.config.reference, None
        try:
            if base == "referenced":
                state_dict = own_state(self.state_dict() if state_dict is None else state_dict)
                self.config.reference = reference_to(self.base, self.config, self._base_looked)
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)  # type: ignore[call-arg]
        finally:
            self.config.reference = before
        if not kwargs.get("is_main_process", True):
            return
        about = "{0.slots} memory slots, read beside each layer, written after each {0.segment_length} tokens."
        missing = " The weights of the base are not in this folder." if base == "referenced" else ""
        write_card(save_directory, "A memory", about.format(self.config) + missing, self.base.name_or_path)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, base_model: Any = None, **kwargs: Any
    ) -> Self:
        """The model in a folder, in a run's folder, or of the hub; the other arguments are those of transformers.

        Args:
            base_model: for a folder with the memory alone, where its base is now, or the base itself. Then the other
                arguments are for loading the base, which is frozen.

        Raises:
            FileNotFoundError: the base is not there.
            ValueError: the base is another one, or is given beside a folder that holds one.
        """
        folder, given = model_folder(pretrained_model_name_or_path), kwargs.pop("config", None)
        if (older := kwargs.pop("torch_dtype", None)) is not None:
            kwargs.setdefault("dtype", older)
        config = given
        if folder is not None and config is None:
            config = cls.config_class.from_pretrained(folder, **kwargs)
        if config is None or config.reference is None:
            if base_model is not None:
                raise ValueError(
                    f"base_model: expected none, because {folder} holds one, got {type(base_model).__name__}"
                )
            return super().from_pretrained(folder, *args, config=given, **kwargs)  # type: ignore[call-arg]
        options = {"dtype": config.dtype} | {k: v for k, v in kwargs.items() if not hasattr(config, k)}
        reference, config.reference = config.reference, None
        model = found_base(reference, config.base_config, base_model, folder, **options)
        if config.adapter is not None:
            add_adapter(model, config.adapter)
        made = memory_around(cls, model, config)
        load_own(made, folder, reference)
        return made.trainable("memory" if config.adapter is None else "lora").eval()

    # --- One call -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        memory: PretrainedMemory | None = None,
        attention_mask: Tensor | None = None,
        reset: Tensor | None = None,
        labels: Tensor | None = None,
        cache: MemoryCache | None = None,
        past_key_values: MemoryCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: Which = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: None = None,
    ) -> MemoryOutput:
        """Read tokens of any length, a segment at a time, and predict what follows each.

        Args:
            input_ids: (batch, tokens).
            memory: what an earlier call returned; None for a document's beginning.
            attention_mask: like ``input_ids``, True or 1 for tokens that exist, wherever they stand. The others change
                nothing, and take no place in a segment.
            reset: (batch,) boolean or integer, lanes that begin a new document here.
            labels: like ``input_ids``, and mostly the same: what is to be predicted at each place, from the tokens
                before it; -100 does not count, nor does a masked place, nor a document's first.
            cache: what an earlier call with ``use_cache`` returned, in place of ``memory``. Of a longer mask the last
                part is that of ``input_ids``. ``past_key_values`` is its older name.
            use_cache: the last segment stays open, and a cache is returned to go on in it, in place of a memory.
            logits_to_keep: of so many last tokens alone; 0 for all.
            output_hidden_states: return the embeddings and what each layer gives, with what it has read of the memory;
                the last ones after the base's last norm. Numbers say of which layers alone.
            output_attentions: return the base's attention weights; a token attends to its own segment alone. Not beside
                a cache. Of both the config has the default.
            inputs_embeds: None, as PEFT gives it; anything else is refused.

        Returns:
            ``loss`` (the mean over the labels that count, in nats), ``logits`` (batch, tokens, vocabulary) of what
            follows each token, ``memory``, and ``cache`` or ``past_key_values``, as this version of transformers calls
            it. ``hidden_states`` are (batch, tokens, dim), ``attentions`` (batch, heads, tokens, tokens).

        Raises:
            ValueError: a shape, dtype or token id does not fit; the message says what was expected.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError(f"cache: past_key_values is its older name; give one, in this version {CACHE}")
        check_no_embeds(inputs_embeds)
        cache = past_key_values if cache is None else cache
        device = self.table.device
        tokens, labels = as_tokens(input_ids, device), as_tokens(labels, device)
        mask, reset = as_mask("attention_mask", attention_mask, device), as_mask("reset", reset, device)
        if cache is not None and isinstance(mask, Tensor) and isinstance(tokens, Tensor):
            mask = mask[:, -tokens.shape[-1] :]
        self._check(tokens, memory, mask, reset, labels, names=("input_ids", "attention_mask", "labels"))
        check_count("logits_to_keep", logits_to_keep, least=0)
        order = None
        if mask is not None and not mask.all():
            order = kept_first(mask)
            tokens, mask = tokens.gather(1, order), mask.gather(1, order)
            labels = None if labels is None else labels.gather(1, order)
        elif mask is not None:
            mask = None
        which = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if with_attentions and (cache is not None or use_cache):
            raise ValueError("output_attentions: expected no cache beside it, which holds one segment; use_cache=False")
        with looking(self.base, which, bool(with_attentions)) as seen:
            if cache is not None or use_cache:
                before, hidden, cache, taken = self._go_on(tokens, mask, memory, reset, cache)
                after = None
            else:
                before, hidden, after, taken = self._read(tokens, mask, memory, reset)
        loss = None
        if labels is not None:
            fresh = before.eq(0).all(-1) if reset is None or memory is None else before.eq(0).all(-1) | reset
            given = torch.cat([before[:, None].to(hidden.dtype), hidden[:, :-1]], 1)
            counted = counted_labels(labels, mask, fresh)
            losses = losses_of(self.base, given, labels.where(counted, IGNORED))
            loss = losses.sum() / counted.sum().clamp(min=1)
        if order is not None:
            order = order.argsort(1)
            hidden = along(hidden, order)
        logits = logits_of(self.base, hidden[:, -logits_to_keep:])
        output = MemoryOutput(
            loss=loss,
            logits=logits,
            hidden_states=asked_for(seen.hidden_states(hidden, taken, order), which),
            attentions=seen.attentions(order) if with_attentions else None,
            memory=after,
            **{CACHE: cache},
        )
        return output.to_tuple() if return_dict is False else output  # type: ignore[return-value]

    def _read(
        self, tokens: Tensor, mask: Tensor | None, memory: PretrainedMemory | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, PretrainedMemory, list[list[int]]]:
        """All segments of some tokens, those that exist first.

        Returns:
            the hidden state before them, theirs, the memory after them, and how many tokens each lane has taken of each
            segment.
        """
        memory = self._started(memory, reset, len(tokens))
        before, outputs = memory.last, []
        for part in cut(self.config.segment_length, tokens, None, mask):
            hidden, memory = self.step(part.src, memory, part.src_mask)
            outputs.append(hidden)
        taken = [[x.shape[1]] * len(tokens) for x in outputs]
        return before, joined(outputs, taken, tokens.shape[1]), memory, taken

    def step(
        self, tokens: Tensor, memory: PretrainedMemory, mask: Tensor | None = None
    ) -> tuple[Tensor, PretrainedMemory]:
        """Read one segment and write the memory: the hidden states (batch, tokens, dim), and the memory after them."""
        hidden = self._hidden(tokens, memory.slots, mask)
        _, last = before_each(hidden, memory.last, mask)
        return hidden, PretrainedMemory(self._written(memory.slots, hidden, mask), last)

    def _hidden(self, tokens: Tensor, slots: Tensor, mask: Tensor | None) -> Tensor:
        """The last hidden states of a segment that reads those slots."""
        with self.readers.reading(self.readers.contexts(slots)):
            if mask is None:
                return decode(self.base, tokens)
            # Behind all tokens, padding is seen by none of them: the base needs no mask.
            order = kept_first(mask)
            return along(decode(self.base, tokens.gather(1, order)), order.argsort(1))

    def _written(self, slots: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        written = self.writer(slots, self.write_norm(hidden).to(slots), mask)
        return written if mask is None else torch.where(mask.any(1)[:, None, None], written, slots)

    def _started(self, memory: PretrainedMemory | None, reset: Tensor | None, batch_size: int) -> PretrainedMemory:
        """The memory that a segment begins with."""
        initial = self.get_initial_mem(batch_size)
        before = (None, None) if memory is None else memory
        return PretrainedMemory(*(begun(x, new, reset) for x, new in zip(before, initial, strict=True)))

    # --- Going on in a segment ----------------------------------------------------------------------------------------

    def _go_on(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        memory: PretrainedMemory | None,
        reset: Tensor | None,
        cache: MemoryCache | None,
    ) -> tuple[Tensor, Tensor, MemoryCache, list[list[int]]]:
        """Tokens of any length behind those of a cache; each lane's segments are cut where its own tokens stand.

        Args:
            tokens, mask: (batch, tokens), those that exist first.

        Returns:
            the hidden state before the tokens, theirs, the cache after them, and how many tokens each lane has taken of
            each piece.
        """
        if self.training and any(checkpoints_activations(part) for part in self.base.modules()):
            raise ValueError(
                "use_cache: with checkpointing of activations transformers keeps no keys in training; call eval() first"
            )
        if cache is None:
            slots, last = self._started(memory, reset, len(tokens))
            cache = MemoryCache(slots, last, self.readers.contexts(slots))
        elif memory is not None or reset is not None or not isinstance(cache, MemoryCache):
            raise ValueError(
                "cache: expected a MemoryCache, as this model returns it, without memory and reset beside it, got "
                f"{type(cache).__name__}"
            )
        elif cache.batch_size != len(tokens) or cache.slots.shape[1:] != (self.config.slots, self.dim):
            raise ValueError(
                f"cache: expected {len(tokens)} lanes of {self.config.slots} slots of {self.dim}, got "
                f"{cache.batch_size} of {tuple(cache.slots.shape[1:])}: is it of another model or batch?"
            )
        before, length = cache.last, tokens.shape[1]
        left = [length] * len(tokens) if mask is None else mask.sum(1).tolist()
        done, pieces, taken = [0] * len(tokens), [], []
        while any(left):
            cache, piece, some = self._extend(cache, tokens, done, left)
            pieces.append(piece)
            taken.append(some)
            done = [d + t for d, t in zip(done, some, strict=True)]
            left = [n - t for n, t in zip(left, some, strict=True)]
        hidden = joined(pieces, taken, length) if pieces else before.new_zeros(*tokens.shape, self.dim)
        return before, hidden, cache, taken

    def _extend(
        self, cache: MemoryCache, tokens: Tensor, done: list[int], left: list[int]
    ) -> tuple[MemoryCache, Tensor, list[int]]:
        """So many more tokens of each lane as its segment has place for; where it is full, the memory is written.

        Returns:
            the cache after them, their hidden states (batch, most tokens, dim), and how many each lane has taken.
        """
        cache, most, device = cache.copy(), self.config.segment_length, tokens.device
        taken = [min(n, most - f) for n, f in zip(left, cache.filled, strict=True)]
        width, columns = max(taken), cache.hidden.shape[1]
        place = torch.arange(width, device=device)
        starts = torch.tensor(done, device=device)[:, None]
        new = tokens.gather(1, (starts + place).clamp(max=tokens.shape[1] - 1))
        positions = (torch.tensor(cache.filled, device=device)[:, None] + place).clamp(max=most - 1)
        # Behind a lane's new tokens, padding is seen by none of them; only what other lanes have before has to be hid.
        old, new_kept = cache.visible(), place < torch.tensor(taken, device=device)[:, None]
        visible = None if old is None else torch.cat([old, torch.ones_like(new_kept)], 1)
        pending = cache.pending()
        with self.readers.reading(cache.contexts):
            hidden = decode(self.base, new, visible, positions, pending)
        cache.layers = pending.layers
        cache.hidden = torch.cat([cache.hidden, hidden], 1)
        ends = torch.tensor(taken, device=device)
        found = along(hidden, (ends - 1).clamp(min=0)[:, None])[:, 0]
        cache.last = torch.where(ends[:, None] > 0, found, cache.last)
        full = [f + t == most for f, t in zip(cache.filled, taken, strict=True)]
        if any(full):
            lanes, kept = torch.tensor(full, device=device)[:, None, None], None
            if old is not None or min(taken) < width:
                old = new_kept.new_ones(len(tokens), columns) if old is None else old
                kept = torch.cat([old, new_kept], 1)
            cache.slots = torch.where(lanes, self._written(cache.slots, cache.hidden, kept), cache.slots)
            cache.contexts = self.readers.contexts(cache.slots)
        cache.align(
            [
                [] if over else [*range(columns - f, columns + t)]
                for over, f, t in zip(full, cache.filled, taken, strict=True)
            ]
        )
        return cache, hidden, taken

    # --- What generate() of transformers asks for ---------------------------------------------------------------------

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The tokens that were not read yet; a memory and resets are of the first call alone."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if inputs.get(CACHE) is not None:
            inputs["memory"] = inputs["reset"] = None
        return inputs

    def _expand_inputs_for_generation(self, expand_size: int = 1, **given: Any) -> tuple[Tensor, dict[str, Any]]:
        input_ids, given = super()._expand_inputs_for_generation(expand_size=expand_size, **given)
        if expand_size > 1 and given.get("memory") is not None:
            given["memory"] = PretrainedMemory(*(x.repeat_interleave(expand_size, 0) for x in given["memory"]))
        return input_ids, given

    # --- What a rollout asks for --------------------------------------------------------------------------------------

    def get_initial_mem(self, batch_size: int) -> PretrainedMemory:
        """The learned memory before a document."""
        slots = self.writer.initial(batch_size)
        return PretrainedMemory(slots, self.write_norm.weight.new_zeros(batch_size, self.dim))

    def resize_memory(self, num_memory_slots: int, *, generator: torch.Generator | None = None) -> None:
        """Give the memory another number of slots, in place; see :meth:`SegmentModel.resize_memory`."""
        check_count("num_memory_slots", num_memory_slots)
        self.writer.resize(num_memory_slots, generator)
        self.config.slots = num_memory_slots

    def _config_with(self, changes: Mapping[str, Any]) -> MemoryConfig:
        config = copy.deepcopy(self.config)
        for name, value in changes.items():
            setattr(config, name, value)
        config.check()
        return config

    def resize_mems(self, mems: PretrainedMemory) -> PretrainedMemory:
        """A memory carried from before :meth:`resize_memory`, for the model as it is now."""
        self._check_memory(mems, len(mems[0]), mems[0].shape[1])
        initial = self.get_initial_mem(len(mems.last)).slots
        kept = mems.slots[:, : self.config.slots]
        return mems._replace(slots=torch.cat([kept, initial[:, kept.shape[1] :]], 1))

    def forget(self, memory: PretrainedMemory) -> PretrainedMemory:
        """The initial slots, and the last hidden state."""
        return memory._replace(slots=self.get_initial_mem(len(memory.last)).slots)

    def cell(self, segment: Segment, memory: PretrainedMemory | None) -> tuple[Tensor, PretrainedMemory]:
        """One segment: the hidden state before each of its tokens, (batch, tokens, dim), and the memory after it."""
        memory = self._started(memory, segment.reset, len(segment.src))
        hidden, after = self.step(segment.src, memory, segment.src_mask)
        before, _ = before_each(hidden, memory.last, segment.src_mask)
        return before, after

    def counted(self, segment: Segment) -> Tensor:
        """Which labels count, (batch, tokens): not a document's first, before which nothing stands."""
        return counted_labels(self.target(segment), segment.src_mask, segment.reset)

    def token_losses(
        self, outputs: Sequence[Tensor], segments: Sequence[Segment], divisor: Divisor | None = None
    ) -> TokenLosses:
        """The losses of several segments' labels, from one call of the base's head."""
        longest = max(segment.src.shape[1] for segment in segments)
        hidden = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in outputs])
        labels, counted = self.joined_labels(segments, longest)
        losses = losses_of(self.base, hidden, labels.where(counted, IGNORED))
        total = None if divisor is None else (losses / divisor(counted)).sum()
        return TokenLosses(labels, losses, counted, total)

    def segments(
        self,
        src: Any,
        tgt: Targets,
        src_mask: Any,
        tgt_mask: Targets,
        reset: Targets,
        mems: PretrainedMemory | None,
    ) -> list[Segment]:
        """What :func:`~memformer.memory_replay_backprop` is given, checked, and cut as :meth:`forward` cuts it.

        Raises:
            ValueError: as :meth:`forward`.
        """
        self.refuse_mask_of_labels(tgt_mask)
        device, length = self.table.device, self.config.segment_length
        tokens, mask = as_tokens(src, device), as_mask("src_mask", src_mask, device)
        reset = each_as_tokens("reset", reset, device)
        labels = [as_tokens(x, device) for x in tgt] if isinstance(tgt, (list, tuple)) else as_tokens(tgt, device)
        whole = labels if isinstance(labels, Tensor) else None
        self._check(tokens, mems, mask, None, whole, names=("src", "src_mask", "tgt"))
        if mask is not None:
            order = kept_first(mask)
            tokens, mask = tokens.gather(1, order), mask.gather(1, order)
            if isinstance(labels, list):
                raise ValueError("tgt: expected labels of the shape of src beside src_mask, got one for each segment")
            labels = None if labels is None else labels.gather(1, order)
        found = cut(
            length, tokens, labels.split(length, 1) if isinstance(labels, Tensor) else labels, mask, None, reset
        )
        found = [segment._replace(reset=as_mask("reset", segment.reset)) for segment in found]
        if mems is None:
            found[0] = found[0]._replace(reset=torch.ones(len(tokens), dtype=torch.bool, device=device))
        for s in found:
            self._check(s.src, None, s.src_mask, s.reset, s.tgt, names=("src", "src_mask", "tgt"))
        if mems is not None:  # a document's first token has nothing before it, also where the memory is the initial one
            counted = counted_labels(self.target(found[0]), found[0].src_mask, mems.last.eq(0).all(-1))
            found[0] = found[0]._replace(tgt=self.target(found[0]).where(counted, IGNORED))
        return found

    def compile_parts(self) -> None:
        """Refused: what of a base may be compiled is not the same for all. Raises ValueError."""
        raise ValueError("compile: a memory around a pretrained model is not compiled yet; leave it out")

    def steps(self) -> dict[str, Step]:
        """Refused. Raises ValueError."""
        raise ValueError("export: a memory around a pretrained model is not exported yet; use save_pretrained")

    def writers(self) -> list[SlotWriter]:
        """The one that there is."""
        return [self.writer]

    def slots_of(self, memory: PretrainedMemory) -> Tensor:
        """(batch, 1, slots, dim)."""
        return memory.slots[:, None]

    # --- What generation of this library asks for ---------------------------------------------------------------------

    def new_state(self, batch_size: int, start: int) -> MemoryState:
        """Lanes that have read nothing. The start token fills up what a state has no tokens for, and is not read."""
        return MemoryState.new(batch_size, self.config.segment_length, start, self.get_initial_mem(1).slots[0])

    def packed(self, memory: PretrainedMemory) -> Tensor:
        """The slots: what comes last is read again."""
        return memory.slots

    def resumed(self, state: MemoryState) -> tuple[list[Segment], PretrainedMemory]:
        """Each lane's last whole segment."""
        initial, fresh = self.get_initial_mem(state.batch_size), state.fresh
        mask = ~fresh[:, None].expand_as(state.segment)
        return [Segment(state.segment, mask, fresh)], initial._replace(slots=state.memory)

    def open(self, state: MemoryState) -> Opened:
        """The memory after each lane's last whole segment."""
        segments, memory = self.resumed(state)
        for segment in segments:
            _, memory = self.cell(segment, memory)
        return Opened(memory.slots, memory.last)

    def next_logits(self, state: MemoryState, opened: Opened) -> Tensor:
        """Logits of each lane's next token, (batch, vocabulary). The pending segment is read again for each.

        Raises:
            ValueError: a lane has read nothing, so there is nothing to predict its first token from.
        """
        if not state.position.all():
            raise ValueError("prompt: expected at least one token in each lane, such as the tokenizer's bos_token_id")
        filled, states = state.filled, opened.last[:, None]
        tokens = state.pending[:, : int(filled.max())]
        if tokens.shape[1]:
            mask = torch.arange(tokens.shape[1], device=tokens.device) < filled[:, None]
            states = torch.cat([states, self._hidden(tokens, opened.memory, mask)], 1)
        return logits_of(self.base, along(states, filled[:, None]))[:, 0]

    # --- Checks -------------------------------------------------------------------------------------------------------

    def _check(
        self,
        tokens: Tensor,
        memory: PretrainedMemory | None,
        mask: Tensor | None,
        reset: Tensor | None,
        labels: Tensor | None,
        names: tuple[str, str, str],
    ) -> None:
        vocabulary = self.table.shape[0]
        check_tokens(names[0], tokens, vocabulary, sys.maxsize, "")
        check_mask(names[1], mask, tokens)
        batch = len(tokens)
        if memory is not None:
            self._check_memory(memory, batch, self.config.slots)
        check_reset(reset, names[0], batch)
        if labels is not None:
            check_labels(names[2], labels, tokens, vocabulary)

    def _check_memory(self, memory: PretrainedMemory, batch: int, slots: int) -> None:
        dtypes = self.writer.initial(1).dtype, self.write_norm.weight.dtype
        check_memory(memory, ((batch, slots, self.dim), dtypes[0]), ((batch, self.dim), dtypes[1]))


def memory_around(kind: type[M], model: PreTrainedModel, config: MemoryConfig) -> M:
    """A new memory around a base, in its dtype and on its devices."""
    checkpoints = next((m._gradient_checkpointing_func for m in model.modules() if checkpoints_activations(m)), None)
    made = kind(config, model)
    half = model.dtype in HALF
    device = model.get_input_embeddings().weight.device
    for part in (made.readers, made.write_norm, made.writer):  # the base's tables of positions keep their dtype
        part.to(device, torch.float32 if half and part is made.writer else model.dtype)
    for reader, layer in zip(made.readers.each, layers_of(model), strict=True):
        reader.to(next(layer.parameters()).device)
    if checkpoints is not None:
        made._set_gradient_checkpointing(True, checkpoints)
    if device.type != "meta":
        made._base_looked = looks_of(model)
    generation: Any = copy.deepcopy(model.generation_config)
    generation.cache_implementation = None  # it has its own
    made.generation_config = generation
    return made
