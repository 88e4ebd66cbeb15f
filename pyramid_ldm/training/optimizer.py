"""Adam, or Muon for the matrices of a network and Adam for the rest."""

from typing import Any

import torch
from torch import Tensor, nn

from pyramid_ldm.config.common import TrainConfig

LEAST = 32  # rows and columns of a matrix that is worth making orthogonal


class Muon:
    """Muon (Jordan et al. 2024): the matrix of a linear layer, or of a convolution with a row for every output channel,
    moves by its momentum made orthogonal, all directions alike. What has fewer than 32 rows or columns, and everything
    else, moves by Adam. One learning rate is for both: Muon's steps are scaled to the size of Adam's (Liu et al. 2025).

    `param_groups`, `state` and so on are those of any optimizer. Weights have to stay where they are in memory.
    """

    def __init__(self, model: nn.Module, rate: float, betas: tuple[float, float], fused: bool) -> None:
        layers = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        chosen = [p for p in layers if min(p.shape[0], p[0].numel()) >= LEAST]
        known = {id(p) for p in chosen}
        rest = [p for p in model.parameters() if id(p) not in known]
        self.pairs = [(p, nn.Parameter(as_matrix(p.detach()))) for p in chosen]
        for p, matrix in self.pairs:
            if p.data_ptr() != matrix.data_ptr():
                raise ValueError(f"a weight of {tuple(p.shape)} has its memory in another order than channels first or last")
        self.muon = torch.optim.Muon(
            [matrix for _, matrix in self.pairs], lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.Adam(rest, lr=rate, betas=betas, fused=fused)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both."""
        return [*self.muon.param_groups, *self.adam.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        """Adam's."""
        return self.adam.state

    def step(self) -> None:
        """Both."""
        for p, matrix in self.pairs:
            matrix.grad = None if p.grad is None else as_matrix(p.grad)
        self.muon.step()
        self.adam.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the weights and of the matrices."""
        for p, matrix in self.pairs:
            p.grad = matrix.grad = None
        self.adam.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def as_matrix(weight: Tensor) -> Tensor:
    """A weight (outputs, ...) as (outputs, all else), a view where its memory is in order, channels first or last."""
    if weight.ndim == 2:
        return weight
    last = weight.permute(0, 2, 3, 1)
    return last.reshape(len(weight), -1) if last.is_contiguous() else weight.reshape(len(weight), -1)


Optimizer = torch.optim.Optimizer | Muon


def build_optimizer(model: nn.Module, train: TrainConfig, device: torch.device) -> Optimizer:
    """What `train.optimizer` says."""
    betas, fused = (train.beta1, train.beta2), device.type in ("cuda", "cpu")
    if train.optimizer == "muon":
        return Muon(model, train.learning_rate, betas, fused)
    return torch.optim.Adam(model.parameters(), lr=train.learning_rate, betas=betas, fused=fused)
