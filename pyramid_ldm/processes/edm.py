"""EDM (Karras et al. 2022), the process of eDiff-I: z = x + sigma eps, with sigma from 80 to 0.002."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pyramid_ldm.processes.process import RHO, Process


@dataclass(frozen=True)
class EDM(Process):
    """Time t is even in sigma^(1 / 7), so that the uniform grid of t is EDM's own (equation 5).

    Attributes:
        sigma_max, sigma_min: where sampling starts, and where it is last evaluated.
        log_sigma_mean, log_sigma_std: of training's normal distribution (P_mean, P_std).
    """

    prediction: str = "preconditioned"
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    log_sigma_mean: float = -1.2
    log_sigma_std: float = 1.2

    NAME: ClassVar[str] = "edm"
    STRAIGHT_IN_SIGMA: ClassVar[bool] = True

    def time(self, uniform: Tensor) -> Tensor:
        """sigma is the log-normal's quantile of 1 - u, within float32's resolution of u; t may lie a little outside
        [0, 1], as EDM's sigma does."""
        upper = (1 - uniform).clamp(2.0**-25, 1 - 2.0**-24)
        sigma = (self.log_sigma_mean + self.log_sigma_std * torch.special.ndtri(upper)).exp()
        high, low = self._roots
        return (sigma ** (1 / RHO) - high) / (low - high)

    def sigma(self, t: Tensor) -> Tensor:
        """Deviation of the noise, falling with t."""
        high, low = self._roots
        return (high + t * (low - high)) ** RHO

    def log_snr(self, t: Tensor) -> Tensor:
        """-2 log sigma."""
        return -2 * self.sigma(t).log()

    def coefficients(self, t: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """1 and sigma, less by the shift."""
        sigma = self.sigma(t) / shift
        return torch.ones_like(sigma), sigma

    def rates(self, t: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """0 and the derivative of sigma."""
        high, low = self._roots
        rate = RHO * (high + t * (low - high)) ** (RHO - 1) * (low - high) / shift
        return torch.zeros_like(rate), rate

    def label(self, t: Tensor) -> Tensor:
        """c_noise: log(sigma) / 4."""
        return self.sigma(t).log() / 4

    def grid(self, steps: int, spacing: str = "uniform") -> list[float]:
        """Equation 5, "karras", where uniform: the last evaluation is at sigma_min."""
        if spacing in ("uniform", "karras"):
            begin = self.begin
            return [begin + (1 - begin) * k / max(steps - 1, 1) for k in range(steps)]
        return super().grid(steps, spacing)

    @property
    def _roots(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / RHO), self.sigma_min ** (1 / RHO)
