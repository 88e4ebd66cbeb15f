"""What travels from the data to the loss. Time is drawn there, by position, and noise, where it is not given."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyramid_ldm.condition import Condition
from pyramid_ldm.data.images import normalise
from pyramid_ldm.data.loading import Travelling


@dataclass(frozen=True)
class BadFile:
    """A file that was skipped."""

    digest: str
    message: str
    of_content: bool  # see UnreadableImage


@dataclass
class Batch(Travelling):
    """Images or latents of some positions of the run; what does not apply is None or empty."""

    positions: list[int]
    pixels: Tensor | None = None  # (B, H, W, 3) uint8
    latents: Tensor | None = None  # (B, D) raw, all levels in one row
    noise: Tensor | None = None  # (B, D): what these latents were drawn from
    condition: Condition = field(default_factory=Condition)
    files: list[str] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)  # what was skipped on the way

    def images(self, device: torch.device) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1], channels last, on `device`: a quarter of the bytes is moved."""
        assert self.pixels is not None
        return normalise(self.pixels.to(device, non_blocking=True).permute(0, 3, 1, 2))
