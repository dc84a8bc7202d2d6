"""Pretrained models as they lie in folders, tiny and random."""

from __future__ import annotations

from pathlib import Path

import pytest
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


def save_gguf(folder: Path, name: str) -> None:
    """The base of :func:`save_base` in a folder, as a GGUF file beside it."""
    gguf = pytest.importorskip("gguf")
    base = LlamaForCausalLM.from_pretrained(folder)
    config, weights = base.config, {n: x.detach().numpy() for n, x in base.state_dict().items()}
    writer = gguf.GGUFWriter(folder / name, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(config.eos_token_id)
    for theirs, ours in (("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")):
        writer.add_tensor(f"{theirs}.weight", weights[f"{ours}.weight"])
    parts = dict(
        attn_norm="input_layernorm", attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj",
        attn_output="self_attn.o_proj", ffn_norm="post_attention_layernorm", ffn_gate="mlp.gate_proj",
        ffn_up="mlp.up_proj", ffn_down="mlp.down_proj",
    )  # fmt: skip
    for layer in range(config.num_hidden_layers):
        for theirs, ours in parts.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):  # there the halves that turn together stand side by side
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
