"""What the stages one without parameters have in common."""

from pathlib import Path

import torch
from torch import Tensor, nn

from pyramid_ldm.autoencoders.posterior import DiagonalGaussian
from pyramid_ldm.config.base import to_yaml
from pyramid_ldm.config.fixed import FixedConfig
from pyramid_ldm.pyramid import Pyramid, compression_ratio
from pyramid_ldm.randomness import derive_seed
from pyramid_ldm.serialization import save_model

Region = tuple[int, int, int, int]  # (top, left, height, width) in image pixels


class FixedAutoencoder(nn.Module):
    """An `Autoencoder` that a config alone describes. A subclass transforms there and back."""

    has_variance = False

    def __init__(self, config: FixedConfig) -> None:
        super().__init__()
        self.config, self.levels = config, config.levels

    @property
    def image_size(self) -> list[int]:
        """[H, W]."""
        return list(self.config.image_size)

    def transform(self, image: Tensor) -> Pyramid:
        """(B, 3, H, W) to levels, coarse to fine."""
        raise NotImplementedError

    def inverse(self, latents: Pyramid) -> Tensor:
        """Levels to (B, 3, H, W)."""
        raise NotImplementedError

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """A point: there is nothing random about it."""
        return DiagonalGaussian(self.transform(image), None)

    def decode(self, latents: Pyramid, region: Region | None = None) -> Tensor:
        """The image, or a region (top, left, height, width) of it."""
        image = self.inverse(latents)
        if region is None:
            return image
        top, left, height, width = region
        return image[..., top : top + height, left : left + width]

    @torch.no_grad()
    def decode_tiled(self, latents: Pyramid, tile: int = 512) -> Tensor:
        """The image; it takes no more memory than itself."""
        return self.inverse(latents)

    def compression_ratio(self) -> float:
        """1 for wavelets and for pixels as fine as the image; less where coarser ones come on top."""
        return compression_ratio(self.levels, self.config.image_size)

    def fingerprint(self) -> str:
        """A hash of the config."""
        return f"{derive_seed(0, to_yaml(self.config)):016x}"

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.yaml`, and weights of which there are none."""
        save_model(Path(directory), self.config, self)
