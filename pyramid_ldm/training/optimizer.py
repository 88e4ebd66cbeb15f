"""Adam, or Muon for the matrices of a network and Adam for the rest."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from pyramid_ldm.config.common import TrainConfig
from pyramid_ldm.training.runtime import use_bf16

LEAST = 32  # rows and columns of a matrix that is worth making orthogonal
MOMENTUM = 0.95
# Jordan et al. 2024: five of them bring every singular value from 0.01 to 1 near 1.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Muon:
    """Muon (Jordan et al. 2024): the matrix of a linear layer, or of a convolution with a row for every output channel,
    moves by its momentum (Nesterov's) made orthogonal, all directions alike. What has fewer than 32 rows or columns,
    and everything else, moves by Adam. One learning rate is for both: a step is scaled by 0.2 sqrt(max(rows, columns)),
    to the size of Adam's (Liu et al. 2025). Nothing else holds such weights back, and networks without norms diverge
    where they grow: with `max_norm` above 0 a row is never longer than that (Srivastava et al. 2014, section 5.1).

    As `torch.optim.Muon`, but convolutions are matrices, equal shapes are one product, and where a CPU does not compute
    in bfloat16, this does not either (fifty times faster there).
    """

    def __init__(
        self, model: nn.Module, rate: float, betas: tuple[float, float], *, max_norm: float, fused: bool, bf16: bool
    ) -> None:
        layers = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        self.matrices = [p for p in layers if min(p.shape[0], p[0].numel()) >= LEAST]
        known = {id(p) for p in self.matrices}
        self.rest = torch.optim.Adam(
            [p for p in model.parameters() if id(p) not in known], lr=rate, betas=betas, fused=fused
        )
        self.param_groups: list[dict[str, Any]] = [{"params": self.matrices, "lr": rate}, *self.rest.param_groups]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.max_norm, self.dtype = max_norm, torch.bfloat16 if bf16 else torch.float32

    @property
    def state(self) -> dict[Tensor, Any]:
        """Adam's."""
        return self.rest.state

    @torch.no_grad()
    def step(self) -> None:
        """By the gradients that there are."""
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, momentum in zip(self.matrices, self.momenta, strict=True):
            if p.grad is not None:
                momentum.lerp_(p.grad, 1 - MOMENTUM)
                ahead = p.grad.lerp(momentum, MOMENTUM).flatten(1)
                alike[ahead.shape[0], ahead.shape[1]].append((p, ahead))
        rate = self.param_groups[0]["lr"]
        for shape, pairs in alike.items():
            directions = orthogonal(torch.stack([ahead for _, ahead in pairs]).to(self.dtype))
            for (p, _), direction in zip(pairs, directions, strict=True):
                p.add_(direction.to(p.dtype).view(p.shape), alpha=-rate * 0.2 * max(shape) ** 0.5)
                if self.max_norm > 0:
                    lengths = torch.linalg.vector_norm(p, dim=tuple(range(1, p.ndim)), keepdim=True)
                    p.mul_((self.max_norm / lengths).clamp(max=1))
        self.rest.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of every weight."""
        for p in self.matrices:
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()
        self.rest.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"momenta": list(self.momenta), "rest": self.rest.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; ValueError where it is another network's."""
        for own, other in zip(self.momenta, state["momenta"], strict=True):
            own.copy_(other)
        self.rest.load_state_dict(state["rest"])
        self.param_groups[1:] = self.rest.param_groups


def orthogonal(matrices: Tensor) -> Tensor:
    """(N, rows, columns): the nearest matrices whose singular values are all about 1 (0.7 to 1.2), by Newton and
    Schulz's iteration.

    In float32 it iterates on x @ x.mT alone, which is smaller: a third of the time for a 3x3 convolution. In bfloat16
    squares of small singular values would drown.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    a, b, c = COEFFICIENTS
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    if x.dtype == torch.bfloat16:
        for _ in range(ITERATIONS):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x
    square, factor = x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)
    for _ in range(ITERATIONS):
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor, square = polynomial @ factor, polynomial @ square @ polynomial
    return factor @ x


Optimizer = torch.optim.Optimizer | Muon


def build_optimizer(
    model: nn.Module, train: TrainConfig, device: torch.device, *, precision: str, max_norm: float
) -> Optimizer:
    """What `train.optimizer` says. `max_norm` stands for a null."""
    betas, fused = (train.beta1, train.beta2), device.type in ("cuda", "cpu")
    if train.optimizer == "muon":
        max_norm = max_norm if train.max_norm is None else train.max_norm
        bf16 = use_bf16(precision, device)
        return Muon(model, train.learning_rate, betas, max_norm=max_norm, fused=fused, bf16=bf16)
    return torch.optim.Adam(model.parameters(), lr=train.learning_rate, betas=betas, fused=fused)
