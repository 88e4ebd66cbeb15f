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
        level_shifts: one a level, coarse to fine; None for 1 each. Level i is at its own time
            tau_i(t) = s t / (1 + (s - 1) t): with s > 1 it becomes clear earlier than one with s = 1, and both arrive
            at t = 1. The network still predicts Z_1 - Z_0; `field` turns that into dZ/dt.
        time_distribution: what training draws t from. "uniform" (PDM); "logit_normal": sigmoid of a standard normal
            (Esser et al. 2024), more often in the middle.
    """

    eps: float = 1e-3
    level_weights: Sequence[float] | None = None
    level_shifts: Sequence[float] | None = None
    time_distribution: str = "uniform"

    def time(self, uniform: Tensor) -> Tensor:
        """t from uniform values in [0, 1): min(eps + u, 1), or the logit-normal's quantile of u, within [eps, 1]."""
        if self.time_distribution == "logit_normal":
            return torch.sigmoid(torch.special.ndtri(uniform)).clamp(self.eps, 1.0)
        return (uniform + self.eps).clamp(max=1.0)

    def interpolate(self, data: Pyramid, noise: Pyramid, t: Tensor) -> Pyramid:
        """Z_t = t Z_1 + (1 - t) Z_0 (equation 2) at each level's own time; t of shape (B,)."""
        times = [column(shifted(t, shift)) for shift in self._shifts(data)]
        return tuple(t_i * z1 + (1 - t_i) * z0 for t_i, z1, z0 in zip(times, data, noise, strict=True))

    def field(self, network: Velocity, steps: int | None = None) -> Velocity:
        """dZ/dt, to be solved, from a network that predicts Z_1 - Z_0: times d tau_i / dt = s / (1 + (s - 1) t)^2.

        Args:
            steps: for Euler with so many: the mean rate over the step that follows t instead, so that a constant
                prediction is followed exactly.
        """
        if self.level_shifts is None:
            return network

        def rate(t: Tensor, shift: float) -> Tensor:
            if steps is None:
                return shift / (1 + (shift - 1) * t) ** 2
            done = (t - self.eps) / (1 - self.eps)  # k / steps, on Euler's grid
            return steps * (shifted(done + 1 / steps, shift) - shifted(done, shift))

        def field(latents: Pyramid, t: Tensor) -> Pyramid:
            rates = [column(rate(t, shift)) for shift in self._shifts(latents)]
            return tuple(rate * v for rate, v in zip(rates, network(latents, t), strict=True))

        return field

    def _shifts(self, levels: Pyramid) -> Sequence[float]:
        return one_a_level("level_shifts", self.level_shifts, len(levels))

    def loss(self, velocity: Velocity, data: Pyramid, noise: Pyramid, t: Tensor) -> FlowLoss:
        """Sum over levels of weight_i * mean((Z_1,i - Z_0,i - v_i)^2) (equation 7)."""
        predicted = velocity(self.interpolate(data, noise, t), t)
        errors = torch.stack(
            [
                (z1 - z0 - v.float()).square().flatten(1).mean(dim=1)
                for z1, z0, v in zip(data, noise, predicted, strict=True)
            ]
        )  # (levels, B)
        weights = one_a_level("level_weights", self.level_weights, len(data))
        levels = errors.mean(dim=1)
        return FlowLoss((levels.new_tensor(weights) * levels).sum(), levels.detach())


def one_a_level(name: str, values: Sequence[float] | None, levels: int) -> Sequence[float]:
    """`values`, or ones for None. ValueError where there are not as many as levels."""
    if values is not None and len(values) != levels:
        raise ValueError(f"{len(values)} {name} for {levels} levels")
    return [1.0] * levels if values is None else values


def shifted(t: Tensor, shift: float) -> Tensor:
    """tau(t) = s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def column(t: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return t.view(-1, 1, 1, 1)
