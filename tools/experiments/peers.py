"""Autoencoders of other shapes inside our training loop: diffusers' AutoencoderKL and AutoencoderDC.

Only the two halves are foreign. Posterior, loss, data, optimizer, averages and checkpoints are the toolkit's own, so
that a comparison differs in the network alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.encoder import INITIAL_LOG_VARIANCE
from pyramid_ldm.autoencoders.pyramid.regions import Regions
from pyramid_ldm.config import AutoencoderConfig
from pyramid_ldm.pyramid import Pyramid

SD_WIDTHS = (128, 256, 512, 512)  # Stable Diffusion's at factor 1, 2, 4, 8; further factors repeat the last
DC_WIDTHS = (128, 256, 512, 512, 1024, 1024, 2048)  # DC-AE f64c128's
DC_LAYERS = ((0, 4, 8, 2, 2, 2, 2), (0, 5, 10, 2, 2, 2, 2))  # encoder, decoder


class ForeignEncoder(nn.Module):
    """Image to a pyramid of one level. Log-variances start where ours do: at 0, noise would hide the latents."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Pyramid:
        """(B, 3, H, W) -> ((B, 2C, H/f, W/f),), mean and log-variance."""
        mean, log_variance = self.network(image).chunk(2, dim=1)
        return (torch.cat([mean, log_variance + INITIAL_LOG_VARIANCE], dim=1),)


class ForeignDecoder(nn.Module):
    """A pyramid of one level to an image; always whole."""

    def __init__(self, network: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._last = [last]  # a list, so that it is registered once

    @property
    def last_weight(self) -> nn.Parameter:
        """The last convolution's weight, where the adaptive GAN weight compares gradients."""
        weight = self._last[0].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, latents: Pyramid, regions: Regions | None = None) -> Tensor:
        """((B, C, H/f, W/f),) -> (B, 3, H, W)."""
        image: Tensor = self.network(latents[0])
        return image if regions is None else regions.cut(image)

    def tiled(self, latents: Pyramid, tile: int) -> Tensor:
        """Whole: these networks see all of the image through their norms."""
        return self(latents)


class PeerAutoencoder(PyramidAutoencoder):
    """A PyramidAutoencoder with foreign halves.

    Args:
        config: one KL level; the widths of encoder and decoder are not looked at.
        family: "sd-vae" or "dc-ae".
        width: a factor on every published width.
    """

    def __init__(self, config: AutoencoderConfig, family: str, width: float) -> None:
        super().__init__(config)
        level = config.levels[0]
        depth = level.factor.bit_length()
        if family == "sd-vae":
            self.encoder, self.decoder = sd_vae(depth, level.channels, width)  # type: ignore[assignment]
        else:
            self.encoder, self.decoder = dc_ae(depth, level.channels, width)  # type: ignore[assignment]


def sd_vae(depth: int, channels: int, width: float) -> tuple[ForeignEncoder, ForeignDecoder]:
    """Stable Diffusion's autoencoder with `depth` resolutions."""
    from diffusers import AutoencoderKL

    widths = [int(SD_WIDTHS[min(i, 3)] * width) for i in range(depth)]
    whole: Any = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
    )
    encoder = nn.Sequential(whole.encoder, whole.quant_conv)
    decoder = nn.Sequential(whole.post_quant_conv, whole.decoder)
    return ForeignEncoder(encoder), ForeignDecoder(decoder, whole.decoder.conv_out)


def dc_ae(depth: int, channels: int, width: float) -> tuple[ForeignEncoder, ForeignDecoder]:
    """DC-AE with `depth` resolutions, made to say a log-variance, too.

    The published decoder has batch norms at its three finest resolutions; with four images a batch these do worse
    than its own RMS norms, which therefore stand everywhere.
    """
    from diffusers.models.autoencoders.autoencoder_dc import Decoder, Encoder

    widths = tuple(int(w * width) for w in DC_WIDTHS[:depth])
    kinds = tuple("ResBlock" if i < 3 else "EfficientViTBlock" for i in range(depth))
    common: dict[str, Any] = {"attention_head_dim": 32, "block_out_channels": widths, "block_type": kinds}
    encoder = Encoder(
        in_channels=3,
        latent_channels=2 * channels,
        layers_per_block=DC_LAYERS[0][:depth],
        qkv_multiscales=((),) * depth,
        downsample_block_type="pixel_unshuffle",
        **common,
    )
    decoder = Decoder(
        in_channels=3,
        latent_channels=channels,
        layers_per_block=DC_LAYERS[1][:depth],
        qkv_multiscales=((),) * depth,
        norm_type="rms_norm",
        act_fn=tuple("relu" if i < 3 else "silu" for i in range(depth)),
        upsample_block_type="pixel_shuffle",
        **common,
    )
    last: Any = decoder.conv_out  # published: no blocks at factor 1, so the last step is an up-sampling
    return ForeignEncoder(encoder), ForeignDecoder(decoder, last.conv)
