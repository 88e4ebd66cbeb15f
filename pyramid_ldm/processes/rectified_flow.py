"""Rectified flow (PDM equations 1 to 7; Liu et al. 2022): z_t = t x + (1 - t) eps."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pyramid_ldm.processes.prediction import Prediction, column
from pyramid_ldm.processes.process import Process
from pyramid_ldm.pyramid import Pyramid


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """The straight path. A level's shift s is its own time tau(t) = s t / (1 + (s - 1) t), whose log-SNR is t's plus
    2 log s.

    Attributes:
        eps: training draws t = min(U[eps, 1 + eps], 1); the network is never told a smaller t (PDM section 4.2).
        time_distribution: what training draws t from. "uniform" (PDM); "logit_normal": sigmoid of a standard normal
            (Esser et al. 2024), more often in the middle.
    """

    eps: float = 1e-3
    time_distribution: str = "uniform"

    NAME: ClassVar[str] = "rectified_flow"

    def time(self, uniform: Tensor) -> Tensor:
        """min(eps + u, 1), or the logit-normal's quantile of u, within [eps, 1]; where the network does not predict
        the velocity, at most 1 - eps, for nothing else can be read from it at 1."""
        last = self._last
        if self.time_distribution == "logit_normal":
            return torch.sigmoid(torch.special.ndtri(uniform)).clamp(self.eps, last)
        return (uniform + self.eps).clamp(max=last)

    def with_uniform_time(self) -> "RectifiedFlow":
        """The same with times drawn uniformly."""
        return replace(self, time_distribution="uniform")

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(t / (1 - t))."""
        return 2 * torch.logit(t)

    def coefficients(self, t: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """tau and 1 - tau."""
        tau = shift * t / (1 + (shift - 1) * t)
        return tau, 1 - tau

    def rates(self, t: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """tau' and -tau'."""
        rate = shift / (1 + (shift - 1) * t) ** 2
        return rate, -rate

    def label(self, t: Tensor) -> Tensor:
        """log(999 t), as the reference of rectified flow has it."""
        return torch.log(999 * t)

    def evaluated_at(self, t: Tensor) -> Tensor:
        """eps + (1 - eps) t: N steps of 1 / N from noise to data, each by the velocity a little later, as the reference
        does (steps of (1 - eps) / N would leave 0.1% of the noise in)."""
        return self.eps + (1 - self.eps) * t if self.clean_at_end else t

    @property
    def begin(self) -> float:
        """0; where the network does not predict the velocity, nothing can be read from it there: at least eps."""
        return super().begin if self.clean_at_end else max(super().begin, self.eps)

    @property
    def span(self) -> tuple[float, float]:
        """eps to 1; where the network does not predict the velocity, which has no limit at 1, to 1 - eps."""
        return max(self.begin, self.eps), self._last

    @property
    def _last(self) -> float:
        return 1.0 if self.clean_at_end else 1 - self.eps

    @property
    def clean_at_end(self) -> bool:
        """Whether the velocity can be asked for at t = 1."""
        return self.prediction == "velocity"

    def at_start(self, t: Tensor, shift: float = 1.0) -> Tensor:
        """sigma, but 1 at t = eps, where PDM starts with the noise itself (section 4.2); a level that is ahead has too
        little of it by then."""
        sigma = super().at_start(t, shift)
        if self.clean_at_end and shift == 1:
            return torch.where(t <= self.eps, torch.ones_like(sigma), sigma)
        return sigma

    def drift(self, prediction: Prediction, t: Tensor) -> Pyramid:
        """tau' (x - eps)."""
        if self.level_shifts is None:
            return prediction.velocity
        rates = [column(self.rates(t, shift)[0]) for shift in self.shifts(len(prediction.noisy))]
        return tuple(rate * v for rate, v in zip(rates, prediction.velocity, strict=True))
