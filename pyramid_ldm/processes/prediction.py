"""One output of a network and what can be read from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyramid_ldm.pyramid import Pyramid

Coefficient = Tensor | float  # (B, 1, 1, 1), or one for the whole batch
Coefficients = Sequence[Coefficient]  # one a level


@dataclass(frozen=True)
class Prediction:
    """One output of a network and its readings, each worked out when it is asked for.

    `data` is x, `noise` is eps, `velocity` is x - eps and `v` is alpha eps - sigma x (Salimans & Ho 2022), of
    z = alpha x + sigma eps.
    """

    kind: str  # which of the readings the output is
    output: Pyramid
    noisy: Pyramid
    alpha: Coefficients
    sigma: Coefficients

    @cached_property
    def data(self) -> Pyramid:
        """The clean pyramid."""
        match self.kind:
            case "data":
                return self.output
            case "noise":
                return tuple((z - s * f) / a for f, z, a, s in self._levels())
            case "v":
                return tuple((a * z - s * f) / (a * a + s * s) for f, z, a, s in self._levels())
        return tuple((z + s * f) / (a + s) for f, z, a, s in self._levels())

    @cached_property
    def noise(self) -> Pyramid:
        """The noise in it."""
        match self.kind:
            case "data":
                return tuple((z - a * f) / s for f, z, a, s in self._levels())
            case "noise":
                return self.output
            case "v":
                return tuple((s * z + a * f) / (a * a + s * s) for f, z, a, s in self._levels())
        return tuple((z - a * f) / (a + s) for f, z, a, s in self._levels())

    @cached_property
    def velocity(self) -> Pyramid:
        """data - noise."""
        if self.kind == "velocity":
            return self.output
        return tuple(x - e for x, e in zip(self.data, self.noise, strict=True))

    @cached_property
    def v(self) -> Pyramid:
        """alpha noise - sigma data."""
        if self.kind == "v":
            return self.output
        return tuple(
            a * e - s * x for x, e, a, s in zip(self.data, self.noise, self.alpha, self.sigma, strict=True)
        )  # fmt: skip

    def read(self, kind: str) -> Pyramid:
        """`data`, `noise`, `velocity` or `v` by name."""
        found: Pyramid = getattr(self, kind)
        return found

    def _levels(self) -> "zip[tuple[Tensor, Tensor, Coefficient, Coefficient]]":
        return zip(self.output, self.noisy, self.alpha, self.sigma, strict=True)


def is_one(values: Tensor) -> bool:
    """Whether it is the host's one value for a whole batch: float64, which no device's time is."""
    return values.numel() == 1 and values.dtype == torch.float64


def column(values: Tensor) -> Coefficient:
    """(B,) -> (B, 1, 1, 1); the one value of a host tensor as a number."""
    if is_one(values):
        return float(values)
    return values.view(-1, 1, 1, 1)
