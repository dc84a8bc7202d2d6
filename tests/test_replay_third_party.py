"""What other libraries are made of, as cells; each is skipped where its library is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memformer import replay

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
BATCH, TOKENS, SLOTS, WIDTH, VOCABULARY = 2, 5, 2, 8, 17


def assert_right(cell: Any, segments: list[Any], memory: Any, readout: Any = None, **options: Any) -> None:
    verdict = replay.verify(cell, segments, memory, readout, **options)
    assert verdict.ok, str(verdict)
    assert max(outcome.error for outcome in verdict.outcomes.values()) < 1e-12


@pytest.mark.parametrize("adjoint", [True, False])
def test_ode_solver_between_the_steps_of_a_gru(adjoint: bool) -> None:
    """Its adjoint method calls autograd in its own backward."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint

    class Derivative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, time: Tensor, state: Tensor) -> Tensor:
            return torch.tanh(self.linear(state))

    class GRUODE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.derivative, self.gru, self.head = Derivative(), nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            times = torch.tensor([0.0, 1.0], dtype=x.dtype)
            state = solve(self.derivative, state, times, method="rk4", options={"step_size": 0.5})[-1]
            state = self.gru(x, state)
            return self.head(state).square().mean(), state

    segments = list(torch.randn(4, BATCH, WIDTH, dtype=torch.float64))
    assert_right(GRUODE().double(), segments, torch.zeros(BATCH, WIDTH, dtype=torch.float64, requires_grad=True))


def gpt2(**changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 2} | changes
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).double().train()


class MemoryTokens(nn.Module):
    """A recurrent memory transformer: memory tokens before and after the segment."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.initial = nn.Parameter(torch.randn(SLOTS, WIDTH, dtype=torch.float64))

    def forward(self, ids: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        if memory is None:
            memory = self.initial.expand(BATCH, -1, -1)
        embedded = torch.cat([memory, self.model.get_input_embeddings()(ids), memory], 1)
        out = self.model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1][:, SLOTS:-SLOTS], out.hidden_states[-1][:, -SLOTS:]

    def read_out(self, hidden: list[Tensor], segments: list[Tensor]) -> Tensor:
        logits = self.model.get_output_embeddings()(torch.cat(hidden)[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(segments)[:, 1:].flatten(), reduction="sum")


def ids(count: int = 3) -> list[Tensor]:
    return list(torch.randint(VOCABULARY, (count, BATCH, TOKENS)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_tokens_in_gpt2(checkpointing: bool) -> None:
    model = gpt2()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cell = MemoryTokens(model)
    assert_right(cell, ids(), None, cell.read_out, readout_segments=2)


def test_memory_tokens_in_llama_with_lora() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2
    )
    lora = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    cell = MemoryTokens(peft.get_peft_model(transformers.LlamaForCausalLM(config).double().train(), lora))
    assert_right(cell, ids(), None, cell.read_out)


def test_a_cache_of_keys_and_values_as_memory() -> None:
    """Its pytree computes when it is taken apart or put together."""
    masking = pytest.importorskip("transformers.integrations.executorch")
    cache_utils = pytest.importorskip("transformers.cache_utils")
    masking.register_dynamic_cache_export_support()
    model = gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)

    def cell(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        fresh = cache_utils.DynamicCache()
        for i, layer in enumerate(() if cache is None else cache.layers):
            fresh.update(layer.keys, layer.values, i)
        out = model(tokens, past_key_values=fresh, use_cache=True)
        loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return loss, out.past_key_values

    assert_right(cell, ids(), None, params=model)
