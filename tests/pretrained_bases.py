"""Pretrained models as they lie in folders, tiny and random."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "To read a long text, remember it. "


def save_base(folder: Path, seed: int = 0, **settings: object) -> None:
    """A tiny Llama, whose embeddings have rows without a token, with a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(vocab_size=270, special_tokens=["<|end|>"], initial_alphabet=letters, show_progress=False),
    )
    sizes = dict(
        vocab_size=tokenizer.get_vocab_size() + 3, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, attention_dropout=0.1,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(sizes | settings))).save_pretrained(folder)
    end = {} if settings.get("eos_token_id", 0) is None else {"eos_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)
