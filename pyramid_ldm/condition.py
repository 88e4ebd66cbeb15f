"""What a network is told beside the noisy pyramid."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from pyramid_ldm.pyramid import Pyramid


@dataclass(frozen=True)
class Condition:
    """What the pictures of a batch are drawn for. Nothing yet: the toolkit's systems are unconditional."""


@dataclass(frozen=True)
class Context:
    """One evaluation's noise and condition, a row a sample."""

    label: Tensor  # (B,): how noisy the pyramid is, in whatever measure the process chose
    sigma: Tensor  # (B,): noise over data, sigma / alpha
    condition: Condition = field(default_factory=Condition)
    early: bool = False  # also what the network says on the way down, where it does, after its levels
    guidance: float = 1.0  # how far to go from there to what it says in the end; beyond 1 to extrapolate


class Network(Protocol):
    """(noisy pyramid, context) -> a pyramid of the same shapes; what it means is the process's affair."""

    def __call__(self, noisy: Pyramid, context: Context, /) -> Pyramid:
        """Levels (B, C_i, H / f_i, W / f_i), coarse to fine."""
        ...
