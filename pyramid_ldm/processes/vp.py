"""Variance preserving diffusion: alpha^2 + sigma^2 = 1, so that a schedule of log-SNR is all there is to say.

The papers' time runs from data to noise, s = 1 - t: cosine, shifted and interpolated schedules are simple diffusion's
(section 3.2), linear beta is Latent Diffusion's.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from pyramid_ldm.processes.process import Process

# Of s at the limits of log-SNR, 15 and -15: -2 log tan(angle).
CLEAN, NOISY = (math.atan(math.exp(-log_snr / 2)) for log_snr in (15.0, -15.0))
STEPS = 1000  # of linear beta


@dataclass(frozen=True)
class VariancePreserving(Process):
    """The schedules of log-SNR.

    Attributes:
        schedule: "cosine": -2 log tan(pi s / 2), with s moved so that it runs from 15 to -15; "linear_beta": Latent
            Diffusion's thousand betas, the square root of which grows linearly, with log-SNR linear between them.
        shift: the whole schedule's: log-SNR + 2 log(shift). Simple diffusion: 64 over the side of the images.
        shift_at_noise: another one at the noise end, interpolated by s (simple diffusion, "interpolated"); None: the
            same.
        beta_start, beta_end: of linear beta.
        time_distribution: "uniform" or "logit_normal", of t.
    """

    schedule: str = "cosine"
    shift: float = 1.0
    shift_at_noise: float | None = None
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    time_distribution: str = "uniform"

    NAME: ClassVar[str] = "vp"

    def time(self, uniform: Tensor) -> Tensor:
        """u itself, or the logit-normal's quantile of it."""
        if self.time_distribution == "logit_normal":
            return torch.sigmoid(torch.special.ndtri(uniform))
        return uniform

    def with_uniform_time(self) -> "VariancePreserving":
        """The same with times drawn uniformly."""
        return replace(self, time_distribution="uniform")

    def log_snr(self, t: Tensor) -> Tensor:
        """Of the schedule, with its shifts."""
        return self._schedule(t)[0]

    def coefficients(self, t: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """Roots of the sigmoids of log-SNR and of its negative."""
        log_snr = self.log_snr(t) + 2 * math.log(shift)
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def rates(self, t: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """alpha sigma^2 / 2 and -sigma alpha^2 / 2, times the derivative of log-SNR."""
        alpha, sigma = self.coefficients(t, shift)
        half = self._schedule(t)[1] / 2
        return alpha * sigma**2 * half, -sigma * alpha**2 * half

    def label(self, t: Tensor) -> Tensor:
        """log-SNR / 4: log(alpha / sigma), over a range like that of rectified flow's label."""
        return self.log_snr(t) / 4

    def at_start(self, t: Tensor, shift: float = 1.0) -> Tensor:
        """1: what is there has unit deviation, be it noise alone or a last bit of data with it."""
        return torch.ones_like(t)

    def _schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log-SNR and its derivative by t."""
        s = 1 - t
        if self.schedule == "linear_beta":
            log_snr, rate = self._linear_beta(s)
        else:
            angle = CLEAN + s * (NOISY - CLEAN)
            log_snr, rate = -2 * torch.log(torch.tan(angle)), 4 * (NOISY - CLEAN) / torch.sin(2 * angle)
        data = 2 * math.log(self.shift)
        noise = data if self.shift_at_noise is None else 2 * math.log(self.shift_at_noise)
        return log_snr + data + s * (noise - data), rate + data - noise

    def _linear_beta(self, s: Tensor) -> tuple[Tensor, Tensor]:
        table = linear_beta_log_snr(self.beta_start, self.beta_end).to(s)
        place = (s * (STEPS - 1)).clamp(0, STEPS - 1)
        before = place.floor().clamp(max=STEPS - 2).long()
        low, high = table[before], table[before + 1]
        return low + (place - before) * (high - low), (STEPS - 1) * (low - high)


@lru_cache(maxsize=8)
def linear_beta_log_snr(start: float, end: float) -> Tensor:
    """log-SNR (1000,) after one to a thousand steps of noise, float64 (Latent Diffusion, `make_beta_schedule`)."""
    betas = torch.linspace(math.sqrt(start), math.sqrt(end), STEPS, dtype=torch.float64) ** 2
    kept = torch.log1p(-betas).cumsum(0)
    return kept - torch.log(-torch.expm1(kept))
