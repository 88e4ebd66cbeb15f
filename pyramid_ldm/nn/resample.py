"""Halving and doubling resolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

_TAPS = (1.0, 3.0, 3.0, 1.0)


def _fir_kernel(x: Tensor, gain: float) -> Tensor:
    taps = torch.tensor(_TAPS, device=x.device, dtype=x.dtype)
    kernel = torch.outer(taps, taps) * (gain / taps.sum().square())
    return kernel.expand(x.shape[1], 1, 4, 4)


def fir_down(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H/2, W/2), filtered with [1, 3, 3, 1] (NCSN++). Zero padding: dims small images."""
    return F.conv2d(x, _fir_kernel(x, 1.0), stride=2, padding=1, groups=x.shape[1])


def fir_up(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W), filtered with [1, 3, 3, 1] (NCSN++)."""
    return F.conv_transpose2d(x, _fir_kernel(x, 4.0), stride=2, padding=1, groups=x.shape[1])


def box_down(x: Tensor) -> Tensor:
    """Mean of each 2x2 block."""
    return F.avg_pool2d(x, 2)


def max_down(x: Tensor) -> Tensor:
    """Maximum of each 2x2 block."""
    return F.max_pool2d(x, 2)


def nearest_up(x: Tensor) -> Tensor:
    """Each value becomes a 2x2 block."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def bilinear_up(x: Tensor) -> Tensor:
    """Twice the resolution, bilinear, borders repeated: reaches one pixel further than `nearest_up`."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
