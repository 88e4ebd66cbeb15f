"""5/3 wavelets: a stage one without parameters that loses nothing (simple diffusion, section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyramid_ldm.autoencoders.fixed import FixedAutoencoder
from pyramid_ldm.config.fixed import WaveletConfig
from pyramid_ldm.nn.wavelet import analyse, synthesise
from pyramid_ldm.pyramid import Pyramid


class Wavelet(FixedAutoencoder):
    """One level of factor 2^depth and 3 * 4^depth channels: the coarsest means, then the details from coarse to fine;
    those of finer bands as blocks of neighbours, so that all have one size."""

    config: WaveletConfig

    def __init__(self, config: WaveletConfig) -> None:
        super().__init__(config)

    def transform(self, image: Tensor) -> Pyramid:
        """(B, 3, H, W) to (B, 3 * 4^depth, H / 2^depth, W / 2^depth)."""
        details: list[Tensor] = []
        for step in range(self.config.depth):
            low, high = analyse(image, -2)
            image, right = analyse(low, -1)
            bands = torch.cat([right, *analyse(high, -1)], dim=1)
            details.insert(0, F.pixel_unshuffle(bands, 2 ** (self.config.depth - 1 - step)))
        return (torch.cat([image, *details], dim=1),)

    def inverse(self, latents: Pyramid) -> Tensor:
        """The same backwards."""
        depth = self.config.depth
        image, *details = latents[0].split([3, *(9 * 4**step for step in range(depth))], dim=1)
        for step, detail in enumerate(details):
            right, below, corner = F.pixel_shuffle(detail, 2**step).chunk(3, dim=1)
            image = synthesise(synthesise(image, right, -1), synthesise(below, corner, -1), -2)
        return image
