"""Rectified flow between noise and data (PDM equations 1 to 7; Liu et al. 2022).

The one place that fixes the direction: **t = 0 is noise, t = 1 is data** (the opposite of diffusers), and a velocity
points from noise to data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_ldm.pyramid import Pyramid

Velocity = Callable[[Pyramid, Tensor], Pyramid]


@dataclass(frozen=True)
class FlowLoss:
    """The objective and its parts."""

    total: Tensor  # scalar: sum over levels of weight * level loss
    levels: Tensor  # (levels,): mean squared error of each level, unweighted


@dataclass(frozen=True)
class RectifiedFlow:
    """The objective on a latent pyramid.

    Attributes:
        eps: training draws t = min(U[eps, 1 + eps], 1); sampling runs from eps to 1 (PDM section 4.2).
        level_weights: one a level, coarse to fine; None for 1 each. A level's loss is a *mean* over its values, so
            that the finest level does not drown the others.
    """

    eps: float = 1e-3
    level_weights: Sequence[float] | None = None

    def time(self, uniform: Tensor) -> Tensor:
        """t from uniform values in [0, 1): min(eps + u, 1)."""
        return (uniform + self.eps).clamp(max=1.0)

    def interpolate(self, data: Pyramid, noise: Pyramid, t: Tensor) -> Pyramid:
        """Z_t = t Z_1 + (1 - t) Z_0 (equation 2), one t of shape (B,) for all levels."""
        return tuple(
            t.view(-1, 1, 1, 1) * z1 + (1 - t.view(-1, 1, 1, 1)) * z0 for z1, z0 in zip(data, noise, strict=True)
        )

    def loss(self, velocity: Velocity, data: Pyramid, noise: Pyramid, t: Tensor) -> FlowLoss:
        """Sum over levels of weight_i * mean((Z_1,i - Z_0,i - v_i)^2) (equation 7)."""
        predicted = velocity(self.interpolate(data, noise, t), t)
        errors = torch.stack(
            [
                (z1 - z0 - v.float()).square().flatten(1).mean(dim=1)
                for z1, z0, v in zip(data, noise, predicted, strict=True)
            ]
        )  # (levels, B)
        weights = [1.0] * len(data) if self.level_weights is None else self.level_weights
        if len(weights) != len(data):
            raise ValueError(f"{len(weights)} level_weights for {len(data)} levels")
        levels = errors.mean(dim=1)
        return FlowLoss((levels.new_tensor(weights) * levels).sum(), levels.detach())
