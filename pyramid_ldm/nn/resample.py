"""Halving and doubling resolution."""

import torch.nn.functional as F
from torch import Tensor


def fir_down(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H/2, W/2), filtered with [1, 3, 3, 1] (NCSN++). Zero padding: dims small images.

    [1, 3, 3, 1] is [1, 1] convolved with itself twice, so three box filters do it, several times faster than a grouped
    convolution.
    """
    return F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(x, 2, stride=1, padding=1), 2, stride=1), 2)


def fir_up(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W), filtered with [1, 3, 3, 1] (NCSN++): bilinear, with zeros beyond the border."""
    return bilinear_up(F.pad(x, (1, 1, 1, 1)))[..., 2:-2, 2:-2]


def box_down(x: Tensor) -> Tensor:
    """Mean of each 2x2 block."""
    return F.avg_pool2d(x, 2)


def max_down(x: Tensor) -> Tensor:
    """Maximum of each 2x2 block."""
    return F.max_pool2d(x, 2)


def unshuffle_down(x: Tensor) -> Tensor:
    """Each 2x2 block becomes four channels: nothing is lost. (B, C, H, W) -> (B, 4C, H/2, W/2)."""
    return F.pixel_unshuffle(x, 2)


def nearest_up(x: Tensor) -> Tensor:
    """Each value becomes a 2x2 block."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def bilinear_up(x: Tensor) -> Tensor:
    """Twice the resolution, bilinear, borders repeated: reaches one pixel further than `nearest_up`."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def box_low_pass(images: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) as so many times fewer pixels show it: means of blocks, enlarged bilinearly, two times at a time."""
    small = F.avg_pool2d(images, factor)
    while factor > 1:
        small, factor = bilinear_up(small), factor // 2
    return small
