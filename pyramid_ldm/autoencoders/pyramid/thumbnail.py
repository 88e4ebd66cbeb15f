"""A reduced image within the finest latent, for both halves to begin with."""

import torch.nn.functional as F
from torch import Tensor

from pyramid_ldm.pyramid import Level


class Thumbnail:
    """The first channels of the finest latent as an image: a reduced one, in blocks of `side` x `side` pixels."""

    SCALE = 2.0  # images have a deviation of about a half

    def __init__(self, finest: Level) -> None:
        self.side = 1
        while 3 * (2 * self.side) ** 2 <= finest.channels and 2 * self.side <= finest.factor:
            self.side *= 2
        self.channels, self.factor = 3 * self.side**2, finest.factor // self.side

    def of(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, channels, H / f, W / f)."""
        return self.SCALE * F.pixel_unshuffle(F.avg_pool2d(image.float(), self.factor), self.side)

    def back(self, latent: Tensor) -> Tensor:
        """The finest latent (B, C, H / f, W / f) -> the reduced image, (B, 3, H / factor, W / factor)."""
        return F.pixel_shuffle(latent[:, : self.channels].float() / self.SCALE, self.side)
