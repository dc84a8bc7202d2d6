"""A model in a folder: its settings in ``config.json``, its weights in ``model.safetensors``. Never pickle.

:class:`Pretrained` is what is needed of a model to store it, or something that belongs to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from .config import MemformerConfig, ModelConfig

__all__ = ["Pretrained"]


class Pretrained(nn.Module):
    """A module that is made of its settings alone: the fields of its configuration are the keywords of its class.

    Attributes:
        config: its settings.
        config_class: of what type they are.
    """

    config: ModelConfig
    config_class: ClassVar[type[ModelConfig]] = MemformerConfig

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; the folder is made if need be.

        Equal settings and weights give equal files, byte by byte. A tensor with several names (``tie_embeddings``) is
        written once, under the first of them.

        Raises:
            OSError: the folder or a file cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
        for name, tensor in sorted(self.state_dict().items()):
            named.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor.contiguous()))
        save_file(dict(named.values()), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model that :meth:`save_pretrained` wrote, on the CPU, in its dtype.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or does not fit the other.
        """
        config_file, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
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
