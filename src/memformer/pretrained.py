"""A model in a folder: its settings in ``config.json``, its weights in ``model.safetensors``. Never pickle.

:class:`Pretrained` is what is needed of a model to store it, or something that belongs to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from .config import MemformerConfig, a_path
from .folders import model_in

__all__ = ["Pretrained", "plain_state", "unwrapped"]

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, DistributedDataParallel, FSDP and checkpointing call the module inside."""


class Pretrained(nn.Module):
    """A module that is made of its settings alone: the fields of its configuration are the keywords of its class.

    Attributes:
        config: its settings.
        config_class: of what type they are.
    """

    config: MemformerConfig
    config_class: ClassVar[type[MemformerConfig]] = MemformerConfig

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; the folder is made if need be.

        Equal settings and weights give equal files, byte by byte. A tensor with several names (``tie_embeddings``) is
        written once, under the first of them.

        Raises:
            OSError: the folder or a file cannot be written.
        """
        folder = a_path("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        named: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
        for name, tensor in sorted(plain_state(self).items()):
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    "save_pretrained: this model is quantised; save it as it was before, and quantise then"
                )
            named.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor.contiguous()))
        save_file(dict(named.values()), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model that :meth:`save_pretrained` wrote, on the CPU, in its dtype.

        Of a training run's folder its best checkpoint if it evaluates on its way, else its newest.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or does not fit the other.
        """
        folder = model_in(a_path("folder", folder))
        config_file, weights = folder / "config.json", folder / "model.safetensors"
        for file in (config_file, weights):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: not found; a model's folder holds config.json and model.safetensors")
        try:
            values = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config_file}: not a JSON file ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{config_file}: expected a JSON object with the model's settings")
        model = cls(**cls.config_class.from_dict(values).to_dict())
        try:
            dtypes = {tensor.dtype for tensor in load_file(weights).values()}
            model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
            load_model(model, weights)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{weights}: damaged, or not the weights of {config_file}: {error}") from error
        return model


def unwrapped(model: nn.Module) -> Pretrained:
    """The model itself, out of what torch.compile, DistributedDataParallel or FSDP put around it.

    Raises:
        ValueError: there is none.
    """
    inner: nn.Module | None = model
    while isinstance(inner, nn.Module) and not isinstance(inner, Pretrained):
        inner = next((inner._modules[name] for name in _WRAPPERS if name in inner._modules), None)
    if not isinstance(inner, Pretrained):
        raise ValueError(
            f"model: expected a Memformer, or one that was compiled or wrapped, got {type(model).__name__}"
        )
    return inner


def plain_state(model: Pretrained) -> dict[str, Any]:
    """A model's ``state_dict`` with whole tensors, under the names that they have where no part of it is wrapped."""
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): x.full_tensor()
        if hasattr(x, "full_tensor")
        else x
        for name, x in model.state_dict().items()
    }
