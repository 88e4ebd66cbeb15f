"""What the encoder says about a latent pyramid."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_ldm.pyramid import Pyramid

LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class DiagonalGaussian:
    """An independent normal distribution for every latent value (LDM's KL regularisation, per level).

    `mean` and `log_variance` are pyramids, coarse to fine. `log_variance` is None for VQ: the posterior is a point.
    """

    mean: Pyramid
    log_variance: Pyramid | None

    @classmethod
    def from_moments(cls, moments: Pyramid, has_variance: bool) -> "DiagonalGaussian":
        """Splits the encoder's output (B, 2C, H, W) a level; log-variance is clamped to [-30, 20]."""
        moments = tuple(level.float() for level in moments)
        if not has_variance:
            return cls(moments, None)
        mean, log_variance = zip(*(level.chunk(2, dim=1) for level in moments), strict=True)
        return cls(mean, tuple(v.clamp(*LOG_VARIANCE_RANGE) for v in log_variance))

    def mode(self) -> Pyramid:
        """The most likely latents."""
        return self.mean

    def sample(self, noise: Pyramid | None = None) -> Pyramid:
        """mean + std * noise; fresh standard normal noise unless given."""
        if self.log_variance is None:
            return self.mean
        if noise is None:
            noise = tuple(torch.randn_like(level) for level in self.mean)
        return tuple(
            m + (0.5 * v).exp() * n.to(m.device) for m, v, n in zip(self.mean, self.log_variance, noise, strict=True)
        )

    def kl(self) -> Tensor:
        """KL divergence to the standard normal: one mean over all latent values of all levels; a scalar, in nats."""
        if self.log_variance is None:
            return self.mean[0].new_zeros(())
        total = torch.stack(
            [(0.5 * (m.square() + v.exp() - 1 - v)).sum() for m, v in zip(self.mean, self.log_variance, strict=True)]
        ).sum()
        return total / sum(level.numel() for level in self.mean)
