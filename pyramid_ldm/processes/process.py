"""What every process between noise and data has in common.

A process is a Gaussian path z_t = alpha(t) x + sigma(t) eps with **t = 0 noise, t = 1 data** (the opposite of
diffusers), and a reading of the network's output. A level of the pyramid may have a time of its own: a shift s of its
log-SNR, log(alpha^2 / sigma^2), by 2 log s (simple diffusion, section 3.2; Layered Diffusion's delays).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pyramid_ldm.condition import Condition, Context, Network
from pyramid_ldm.processes.prediction import Coefficient, Coefficients, Prediction, column, is_one
from pyramid_ldm.pyramid import Pyramid, sinc_shared

SPACINGS = ("uniform", "cosine", "karras")
FAINTEST = -6.0  # log-SNR
EARLY_WEIGHT = 0.5  # of the error of what a network says on the way down (Zhou et al. 2025, arXiv:2512.24176)
RHO = 7.0  # Karras et al. 2022, equation 5


@dataclass(frozen=True)
class Loss:
    """The objective and its parts."""

    total: Tensor  # scalar: sum over levels of weight * level loss
    levels: Tensor  # (levels,): error of each level, unweighted


@dataclass(frozen=True)
class Process(ABC):
    """A process on a pyramid; a subclass says what its path is.

    Attributes:
        prediction: what the network's output is. "preconditioned": F of x = c_skip z / alpha + c_out F (EDM, equation
            7), trained with EDM's weight, so that F's target has unit deviation; the network sees c_in z / alpha.
        error: in which reading the error is taken; None: in the output itself.
        level_weights: one a level, coarse to fine; None for 1 each. A level's error is a *mean* over its values, so
            that the finest level does not drown the others.
        level_shifts: one a level, coarse to fine; None for 1 each. Above 1, a level becomes clear earlier.
        multiscale: adds to each level's error those of its average-pooled halves down to this side, each over its
            side (simple diffusion, equation 8); None: the error alone.
        sigma_data: deviation of the data, for "preconditioned".
        noise: "independent" for each level, or "sinc": the finest level's, low-passed (Layered Diffusion, section 3.2).
    """

    prediction: str = "velocity"
    error: str | None = None
    level_weights: Sequence[float] | None = None
    level_shifts: Sequence[float] | None = None
    multiscale: int | None = None
    sigma_data: float = 0.5
    noise: str = "independent"

    NAME: ClassVar[str]
    # Whether sigma / alpha, in which a step of first order is straight, stands for time in Heun's steps (EDM), or
    # alpha / (alpha + sigma), which is finite at both ends.
    STRAIGHT_IN_SIGMA: ClassVar[bool] = False

    @abstractmethod
    def time(self, uniform: Tensor) -> Tensor:
        """What training draws: t from quantiles (B,) in [0, 1), growing with them."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), growing with t."""

    @abstractmethod
    def coefficients(self, t: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of a level with that shift, of t's shape."""

    @abstractmethod
    def rates(self, t: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """Their derivatives by t."""

    @abstractmethod
    def label(self, t: Tensor) -> Tensor:
        """What the network is told of t."""

    def with_uniform_time(self) -> "Process":
        """The same with the plainest distribution of time, in which runs are compared."""
        return self

    def evaluated_at(self, t: Tensor) -> Tensor:
        """The t that the network is told of when a solver of fixed steps stands at t."""
        return t

    @property
    def span(self) -> tuple[float, float]:
        """Between which times a solver of adaptive steps runs; if not to 1, the data seen from there is the result."""
        return self.begin, 1.0

    @property
    def begin(self) -> float:
        """Where sampling starts: 0; where noise is predicted, at a log-SNR of -6 in the level that is clear first, for
        the data are read from it by division by alpha, which multiplies the network's error."""
        if self.prediction != "noise":
            return 0.0
        ahead = 2 * math.log(max(self.level_shifts or [1.0]))
        return float(self.time_of(torch.tensor(FAINTEST - ahead, dtype=torch.float64)))

    @property
    def clean_at_end(self) -> bool:
        """Whether what such a solver finds at the end of `span` is the data."""
        return False

    def at_start(self, t: Tensor, shift: float = 1.0) -> Tensor:
        """What noise of unit deviation is multiplied by to start at t."""
        return self.coefficients(t, shift)[1]

    def grid(self, steps: int, spacing: str = "uniform") -> list[float]:
        """Where a solver of `steps` steps evaluates; after the last, there is no noise at all.

        "uniform" in t; "cosine": denser at both ends; "karras": sigma / alpha falls as in EDM (equation 5), from 80 or
        where the process begins to 0.002 or where it ends.
        """
        begin = self.begin
        if spacing in ("uniform", "cosine"):
            shares = [k / steps for k in range(steps)]
            if spacing == "cosine":
                shares = [(1 - math.cos(math.pi * share)) / 2 for share in shares]
            return [begin + (1 - begin) * share for share in shares]
        ends = self.log_snr(torch.tensor([max(begin, 1e-6), 1 - 1e-6], dtype=torch.float64))
        high, low = (-ends / 2).exp().tolist()
        high, low = min(high, 80.0) ** (1 / RHO), max(low, 0.002) ** (1 / RHO)
        ratio = (high + (low - high) * torch.linspace(0, 1, max(steps, 2), dtype=torch.float64)[:steps]) ** RHO
        times: list[float] = self.time_of(-2 * ratio.log()).tolist()
        return times

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`, float64, by bisection."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.log_snr(middle) < log_snr
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def shifts(self, levels: int) -> Sequence[float]:
        """One a level."""
        return one_a_level("level_shifts", self.level_shifts, levels)

    def all_coefficients(self, t: Tensor, levels: int) -> tuple[list[Coefficient], list[Coefficient]]:
        """alpha and sigma of every level, ready to be multiplied with it."""
        pairs = [self.coefficients(t, shift) for shift in self.shifts(levels)]
        return [column(alpha) for alpha, _ in pairs], [column(sigma) for _, sigma in pairs]

    def correlated(self, noise: Pyramid) -> Pyramid:
        """Independent noise as the process has it; the finest level stays."""
        return sinc_shared(noise) if self.noise == "sinc" else noise

    def interpolate(self, data: Pyramid, noise: Pyramid, t: Tensor) -> Pyramid:
        """z_t of clean data and noise; t of shape (B,)."""
        alphas, sigmas = self.all_coefficients(t, len(data))
        return tuple(a * x + s * e for a, s, x, e in zip(alphas, sigmas, data, noise, strict=True))

    def predict(
        self, network: Network, noisy: Pyramid, t: Tensor, condition: Condition, told: Tensor | None = None
    ) -> Prediction:
        """The network's view of `noisy`, at t of shape (B,), or (1,) on the CPU for the whole batch.

        Args:
            told: the t that the network is told, if another.
        """
        alphas, sigmas = self.all_coefficients(t, len(noisy))
        output = self._evaluate(
            network, noisy, alphas, sigmas, self.context(noisy, t if told is None else told, condition)
        )
        return self._prediction(output, noisy, alphas, sigmas)

    def context(self, noisy: Pyramid, t: Tensor, condition: Condition) -> Context:
        """What the network is told, a row a sample."""
        alpha, sigma = self.coefficients(t)
        like, count = noisy[0], noisy[0].shape[0]

        def rows(values: Tensor) -> Tensor:
            if is_one(values):
                return torch.full((count,), float(values), device=like.device)
            return values.float()

        return Context(rows(self.label(t)), rows(sigma / alpha), condition)

    def drift(self, prediction: Prediction, t: Tensor) -> Pyramid:
        """dz/dt = alpha' x + sigma' eps."""
        pairs = [self.rates(t, shift) for shift in self.shifts(len(prediction.noisy))]
        return tuple(
            column(alpha) * x + column(sigma) * e
            for (alpha, sigma), x, e in zip(pairs, prediction.data, prediction.noise, strict=True)
        )

    def loss(
        self,
        network: Network,
        data: Pyramid,
        noise: Pyramid,
        t: Tensor,
        condition: Condition | None = None,
        jitter: Pyramid | None = None,
    ) -> Loss:
        """Sum over levels of weight_i * error_i at t (B,); the error is a mean of squares, or `multiscale`'s sum.

        Args:
            data, noise: clean, and standard normal; (B, C_i, H_i, W_i) a level.
            jitter: added to what the network sees, and to nothing else (what a prediction means is read without it).
        """
        noise = self.correlated(noise)
        alphas, sigmas = self.all_coefficients(t, len(data))
        noisy = self.interpolate(data, noise, t)
        seen = noisy if jitter is None else tuple(z + j for z, j in zip(noisy, jitter, strict=True))
        context = replace(self.context(noisy, t, condition or Condition()), early=True)
        output = self._evaluate(network, seen, alphas, sigmas, context)
        output, early = output[: len(data)], output[len(data) :]
        kind = self.error or self.prediction
        target = self._target(kind, data, noise, noisy, alphas, sigmas)
        weights = one_a_level("level_weights", self.level_weights, len(data))

        def errors(said: Pyramid) -> Tensor:
            """(levels,)."""
            if kind != self.prediction:
                said = self._prediction(said, noisy, alphas, sigmas).read(kind)
            return torch.stack([self._mean_square(a - b) for a, b in zip(target, said, strict=True)]).mean(dim=1)

        levels = errors(output)
        total = (levels.new_tensor(weights) * levels).sum()
        if early:
            total = total + EARLY_WEIGHT * (levels.new_tensor(weights) * errors(early)).sum()
        return Loss(total, levels.detach())

    def _mean_square(self, error: Tensor) -> Tensor:
        """(B, C, H, W) -> (B,)."""
        if self.multiscale is None:
            return error.square().flatten(1).mean(dim=1)
        side = min(error.shape[-2:])
        total = error.square().flatten(1).mean(dim=1) / side
        while side % 2 == 0 and side // 2 >= self.multiscale:
            error, side = F.avg_pool2d(error, 2), side // 2
            total = total + error.square().flatten(1).mean(dim=1) / side
        return total

    def _evaluate(
        self, network: Network, noisy: Pyramid, alphas: Coefficients, sigmas: Coefficients, context: Context
    ) -> Pyramid:
        inputs = noisy
        if self.prediction == "preconditioned":
            inputs = tuple(
                self._preconditioning(alpha, sigma)[2] * z / alpha
                for z, alpha, sigma in zip(noisy, alphas, sigmas, strict=True)
            )
        return tuple(level.float() for level in network(inputs, context))

    def _prediction(self, output: Pyramid, noisy: Pyramid, alphas: Coefficients, sigmas: Coefficients) -> Prediction:
        if self.prediction != "preconditioned":
            return Prediction(self.prediction, output, noisy, alphas, sigmas)
        data = []
        for f, z, alpha, sigma in zip(output, noisy, alphas, sigmas, strict=True):
            skip, out, _ = self._preconditioning(alpha, sigma)
            data.append(skip * z / alpha + out * f)
        return Prediction("data", tuple(data), noisy, alphas, sigmas)

    def _target(
        self, kind: str, data: Pyramid, noise: Pyramid, noisy: Pyramid, alphas: Coefficients, sigmas: Coefficients
    ) -> Pyramid:
        """What an exact network's output, or that reading of it, is."""
        match kind:
            case "data":
                return data
            case "noise":
                return noise
            case "velocity":
                return tuple(x - e for x, e in zip(data, noise, strict=True))
            case "v":
                return tuple(a * e - s * x for a, s, x, e in zip(alphas, sigmas, data, noise, strict=True))
        target = []
        for x, z, alpha, sigma in zip(data, noisy, alphas, sigmas, strict=True):
            skip, out, _ = self._preconditioning(alpha, sigma)
            target.append((x - skip * z / alpha) / out)
        return tuple(target)

    def _preconditioning(self, alpha: Coefficient, sigma: Coefficient) -> tuple[Coefficient, Coefficient, Coefficient]:
        """c_skip, c_out and c_in of z / alpha, whose noise is sigma / alpha (EDM, table 1)."""
        ratio, deviation = sigma / alpha, self.sigma_data
        both = ratio**2 + deviation**2
        return deviation**2 / both, ratio * deviation / both**0.5, 1 / both**0.5


def one_a_level(name: str, values: Sequence[float] | None, levels: int) -> Sequence[float]:
    """`values`, or ones for None. ValueError where there are not as many as levels."""
    if values is not None and len(values) != levels:
        raise ValueError(f"{len(values)} {name} for {levels} levels")
    return [1.0] * levels if values is None else values
