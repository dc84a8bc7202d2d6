"""The optimizer of a run: which parameter is stepped by what, and which decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..interface import SegmentModel
from ..settings import OptimizerSettings

__all__ = ["MuonBesideAdamW", "linear_maps", "make_optimizer"]


def make_optimizer(model: SegmentModel, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings name, with the model's parameters in groups.

    Decay pulls a matrix towards zero, which keeps what it multiplies in proportion. So it is for the matrices of linear
    maps. A bias, a scale, an embedding or a slot of the initial memory has no such meaning, and the writer looks at its
    slots' direction alone: of them decay would change the length, and through it the learning rate.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in linear_maps(model) if p.requires_grad]
    decaying = hidden if settings.decay_of == "linear" else [p for p in parameters if p.dim() >= 2]
    by_muon = hidden if settings.optimizer == "muon" else []
    taken = {id(p) for p in [*by_muon, *decaying]}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decaying if all(p is not other for other in by_muon)]},
        {"params": [p for p in parameters if id(p) not in taken], "weight_decay": 0.0},
    ]
    rest = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    if not by_muon:
        return rest
    muon = torch.optim.Muon(
        by_muon,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonBesideAdamW(muon, rest)


def linear_maps(model: SegmentModel) -> list[nn.Parameter]:
    """The matrices of the linear maps inside a model, in its order: neither an embedding nor the output projection."""
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = [getattr(module, "to_logits", None) for module in model.modules()]
    base: Any = getattr(model, "base", None)  # of a pretrained model, whose head has a name of its own
    heads += [] if base is None else [base.get_output_embeddings()]
    outside |= {id(head.weight) for head in heads if isinstance(head, nn.Linear)}
    maps = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return [p for p in model.parameters() if id(p) in maps - outside]


class MuonBesideAdamW(torch.optim.Optimizer):
    """Two optimizers, each with parameters of its own, as one: its groups are theirs, its state that of both.

    Args:
        muon: with one group.
        rest: of whatever else the model has.
    """

    def __init__(self, muon: torch.optim.Muon, rest: torch.optim.AdamW):
        self._muon, self._rest = muon, rest
        super().__init__([*muon.param_groups, *rest.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both, with the learning rates that the groups have."""
        loss: Tensor | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, groups in ((self._muon, self.param_groups[:1]), (self._rest, self.param_groups[1:])):
            optimizer.param_groups, optimizer.state = groups, self.state  # which load_state_dict may have replaced
            optimizer.step()  # type: ignore[no-untyped-call]
        return loss
