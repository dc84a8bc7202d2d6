"""A model in a folder: its settings in ``config.json``, its weights in ``model.safetensors``. Never pickle.

They may be in several files, as transformers writes those of a large model (:func:`read_weights`). A training run whose
processes each hold a part of the model leaves them in parts (:func:`read_shards`).

:class:`Pretrained` is what is needed of a model to store it, or something that belongs to it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import MemformerConfig, ModelConfig, a_path
from .device import seeded
from .folders import model_in

__all__ = [
    "SHARDS",
    "Pretrained",
    "distinct",
    "full",
    "plain_state",
    "read_config",
    "read_shards",
    "read_weights",
    "unwrapped",
]

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, DistributedDataParallel, FSDP and checkpointing call the module inside."""
DEFAULT_KIND = "Memformer"
"""The kind of model that a folder holds which does not say: there was no other."""
SHARDS = "shards"
"""The folder in a checkpoint with the tensors that each process of a run wrote for itself."""
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
"""Where transformers says which of several files a tensor is in."""


class Pretrained(nn.Module):
    """A module that is made of its settings alone: the fields of its configuration are the keywords of its class.

    Attributes:
        config: its settings.
        config_class: of what type they are.
        kind: what ``config.json`` calls such a model; where it has no ``model``, it is of a Memformer.
    """

    config: ModelConfig
    kind: ClassVar[str] = DEFAULT_KIND
    config_class: ClassVar[type[ModelConfig]] = MemformerConfig

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``; the folder is made if need be.

        Equal settings and weights give equal files, byte by byte. A tensor with several names (``tie_embeddings``) is
        written once, under the first of them.

        Raises:
            OSError: the folder or a file cannot be written.
        """
        folder = a_path("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = plain_state(self)
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError("save_pretrained: this model is quantised; save it as it was before, and quantise then")
        save_file(distinct(state), folder / "model.safetensors")
        self.write_config(folder)

    def save_with(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write what :meth:`save_pretrained` writes, with other weights: those of ``named_parameters``."""
        with seeded(0, cpu := torch.device("cpu")), cpu:
            plain = type(self)(**self.config.to_dict())
        plain.load_state_dict(weights, strict=False)
        plain.save_pretrained(folder)

    def load_saved(self, folder: Path) -> None:
        """Take over the weights in a folder with a model of these settings, dropout left out.

        Raises:
            FileNotFoundError, ValueError: as :meth:`from_pretrained`, or the model is another one.
        """
        config, expected = self.saved_config(folder), self.config
        if dataclasses.replace(config, dropout=expected.dropout) != expected:
            raise ValueError(f"{folder}: its model is {config}, expected {expected}")
        if not (folder / SHARDS).is_dir():
            self.load_state_dict(type(self).from_pretrained(folder).state_dict())

    def write_config(self, folder: Path) -> None:
        """Write ``config.json`` alone."""
        (folder / "config.json").write_text(json.dumps(self.described(), indent=2) + "\n", encoding="utf-8")

    def described(self) -> dict[str, Any]:
        """The settings and, unless it is the one there was first, the kind, as files have them."""
        kind = {} if self.kind == DEFAULT_KIND else {"model": self.kind}
        return kind | self.config.to_dict()

    @classmethod
    def saved_config(cls, folder: Path) -> ModelConfig:
        """The settings in a folder's ``config.json``.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is damaged, or of another kind of model.
        """
        kind, values = read_config(folder)
        if kind != cls.kind:
            raise ValueError(
                f"{folder / 'config.json'}: of a {kind}, expected that of a {cls.kind}; use {kind}.from_pretrained, or "
                "load_model for either"
            )
        if "model_type" in values:  # transformers wrote it, with settings of its own
            known = {field.name for field in dataclasses.fields(cls.config_class)}
            values = {name: value for name, value in values.items() if name in known}
        return cls.config_class.from_dict(values)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model that :meth:`save_pretrained` wrote, on the CPU, in its dtype.

        Of a training run's folder its best checkpoint if it evaluates on its way, else its newest.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or does not fit the other.
        """
        folder = model_in(a_path("folder", folder))
        with torch.device("cpu"):  # whatever the default device is
            model = cls(**cls.saved_config(folder).to_dict())
        try:
            tensors = read_weights(folder)
            dtypes = {tensor.dtype for tensor in tensors.values()}
            model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
            model.load_state_dict(_by_each_name(model, tensors))
        except (SafetensorError, RuntimeError) as error:
            damaged = next((folder / name for name in (SHARDS, INDEX) if (folder / name).exists()), folder / WEIGHTS)
            raise ValueError(f"{damaged}: damaged, or not the weights of {folder / 'config.json'}: {error}") from error
        return model


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """What kind of model a folder's ``config.json`` is of, and the settings in it.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file}: not found; a model's folder holds config.json and model.safetensors")
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file}: not a JSON file ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{config_file}: expected a JSON object with the model's settings")
    return str(values.pop("model", DEFAULT_KIND)), values


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
            "model: expected a Memformer, a CausalMemformer, or one that was compiled or wrapped, got "
            f"{type(model).__name__}"
        )
    return inner


def divided(model: nn.Module) -> bool:
    """Whether FSDP has divided a model's parameters among processes, so that none holds it whole."""
    return hasattr(next(model.parameters()), "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def plain_state(model: Pretrained) -> dict[str, Any]:
    """A model's ``state_dict`` with whole tensors, under the names that they have where no part of it is wrapped."""
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): full(x)
        for name, x in model.state_dict().items()
    }


def distinct(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under the first of its names, and contiguous: as a safetensors file has it."""
    named: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in sorted(state.items()):
        named.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor.contiguous()))
    return dict(named.values())


def _by_each_name(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under all names that a model has for them: in a file, one with several (``tie_embeddings``) is once."""
    places = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in model.state_dict().items()}
    found = {place: tensors[name] for name, place in places.items() if name in tensors}
    return tensors | {name: found[place] for name, place in places.items() if place in found}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A model's tensors, by name: from one file, from several with an index (as transformers writes a large model), or
    from what each process of a run wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the index is damaged, or a part is missing.
        SafetensorError: a file is damaged.
    """
    if (folder / SHARDS).is_dir():
        return read_shards(folder / SHARDS, "model/")
    names = {WEIGHTS}
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX}: damaged; expected a weight_map from tensors to files") from error
    if missing := sorted(str(name) for name in names if not (folder / Path(str(name)).name).is_file()):
        raise FileNotFoundError(
            f"{folder / missing[0]}: not found; a model's folder holds config.json and {WEIGHTS}, or the files that "
            f"{INDEX} names"
        )
    return {name: x for file in sorted(names) for name, x in load_file(folder / Path(file).name).items()}


def read_shards(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Tensors that several processes wrote a part of each, put together; those whose names begin with ``prefix``.

    The files are those of torch.distributed.checkpoint's ``HuggingFaceStorageWriter``: safetensors, each with the
    places of its parts in its header. This reads them without torch.distributed, which not every build of torch has.

    Returns:
        by name, without the prefix.

    Raises:
        ValueError: a part is missing.
        SafetensorError: a file is damaged.
    """
    places: dict[str, list[tuple[Path, list[int], list[int]]]] = {}  # of each tensor: file, begin, shape of the part
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            begins = json.loads((opened.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in (name for name in opened.keys() if name.startswith(prefix)):  # noqa: SIM118
                shape = opened.get_slice(name).get_shape()
                begin = begins[name]["saved_offsets"] if name in begins else [0] * len(shape)
                places.setdefault(name, []).append((file, begin, shape))
    if not places:
        raise ValueError(f"{folder}: expected tensors named {prefix}..., found none")
    whole: dict[str, Tensor] = {}
    for name, parts in places.items():
        ends = [[b + n for b, n in zip(begin, shape, strict=True)] for _, begin, shape in parts]
        size = [max(end) for end in zip(*ends, strict=True)]
        filled = 0
        for file, begin, shape in parts:
            with safe_open(file, framework="pt") as opened:
                part = opened.get_tensor(name)
            tensor = whole.setdefault(name, torch.empty(size, dtype=part.dtype, device="cpu"))
            tensor[tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))] = part
            filled += part.numel()
        if filled != whole[name].numel():
            raise ValueError(f"{folder}: {name}: expected {whole[name].numel():,} numbers, found {filled:,}")
    return {name.removeprefix(prefix): tensor for name, tensor in whole.items()}
