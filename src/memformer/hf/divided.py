"""A base whose frozen weights are divided among the processes of a run (FSDP2); a layer gathers its own for its turn.

What is trained is whole in each process, so its gradients, its optimizer and its checkpoints are as without. So is a
table that embeds tokens and predicts them, for FSDP cannot share a matrix between two parts of a model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..parallel import Ranks, like
from ..pretrained import full
from .bases import decoder_of, layers_of
from .model import MemoryForCausalLM
from .reference import looks_of

__all__ = ["check_frozen", "divide", "whole_state"]


def divide(model: MemoryForCausalLM, device: torch.device) -> None:
    """Divide the frozen weights of a model's base, in place, and move each process's part to a device.

    Whole weights can be loaded afterwards, in all processes together.

    Raises:
        ValueError: weights of the base are trained, or differ between the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    check_frozen(model)
    ranks, base = Ranks(), model.base
    ranks.agree({"base": looks_of(base)["fingerprint"]})
    decoder, head = decoder_of(base), base.get_output_embeddings()
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    kept = trained | {*decoder.parameters()} & {*head.parameters()}
    mesh = init_device_mesh(device.type, (ranks.size,))
    # A rollout calls the decoder and the head, not the model: each is a root of its own, which must not keep what it
    # has gathered.
    for part in (*layers_of(base), decoder, head):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    model.register_load_state_dict_pre_hook(_as_divided)  # type: ignore[no-untyped-call]


def check_frozen(model: MemoryForCausalLM) -> None:
    """Raise ValueError where some of the base's own weights are trained."""
    if any(parameter.requires_grad and "lora_" not in name for name, parameter in model.base.named_parameters()):
        raise ValueError(
            "divide_base: expected a frozen base, because what is trained is whole in each process; call "
            "model.trainable('memory') or trainable('lora') before, or leave divide_base out"
        )


def whole_state(model: MemoryForCausalLM) -> dict[str, Any]:
    """The ``state_dict`` of a divided model with whole tensors; in the first process alone, but all have to call it."""
    first, state = not Ranks().rank, {}
    for name, tensor in model.state_dict().items():
        gathered = full(tensor)
        if first:
            state[name] = gathered.cpu() if gathered is not tensor else tensor
    return state


def _as_divided(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name, own in model.state_dict().items():  # in one order in all processes
        if name in state:
            state[name] = like(state[name], own)
