"""A pyramid of pixels: a stage one without parameters.

One level of factor 1 is the image itself (simple diffusion); several are Layered Diffusion's and a cascade's.
"""

import torch.nn.functional as F
from torch import Tensor

from pyramid_ldm.autoencoders.fixed import FixedAutoencoder
from pyramid_ldm.config.fixed import PixelsConfig
from pyramid_ldm.pyramid import Pyramid


class Pixels(FixedAutoencoder):
    """Level i is the image, averaged over f_i x f_i pixels; the finest level alone is what is decoded."""

    config: PixelsConfig

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__(config)

    def transform(self, image: Tensor) -> Pyramid:
        """(B, 3, H, W) to (B, 3, H / f_i, W / f_i)."""
        return tuple(
            F.avg_pool2d(image, factor).contiguous() if factor > 1 else image for factor in self.config.factors
        )  # fmt: skip

    def inverse(self, latents: Pyramid) -> Tensor:
        """The finest level; bicubic where that is smaller than the image."""
        finest = latents[-1]
        if self.config.factors[-1] == 1:
            return finest
        height, width = self.config.image_size
        return F.interpolate(finest, (height, width), mode="bicubic", antialias=False)
