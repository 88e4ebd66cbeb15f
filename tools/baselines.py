"""Stages one that the toolkit's is held beside: each a PyramidAutoencoder, with foreign halves or untrained, so that
posterior, loss, data, optimizer, checkpoints and both commands after it stay the toolkit's, and a comparison differs in
the network alone."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.encoder import INITIAL_LOG_VARIANCE
from pyramid_ldm.autoencoders.pyramid.regions import Regions
from pyramid_ldm.config import AutoencoderConfig
from pyramid_ldm.config.autoencoder import AttentionConfig, DecoderConfig, EncoderConfig
from pyramid_ldm.pyramid import Level, Pyramid, base_block


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
    """A pyramid of one level to an image; always whole, as these networks see all of it through their norms."""

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
        """Whole."""
        return self(latents)


class PeerAutoencoder(PyramidAutoencoder):
    """Of a published family.

    Args:
        config: one KL level; the widths of encoder and decoder are not used.
        family: "sd-vae", "dc-ae" or "plain".
        width: a factor on every published width.
    """

    def __init__(self, config: AutoencoderConfig, family: str, width: float) -> None:
        super().__init__(config)
        level = config.levels[0]
        build = {"sd-vae": sd_vae, "dc-ae": dc_ae, "plain": plain}[family]
        halves = build(level.factor.bit_length(), level.channels, width)
        self.encoder, self.decoder = halves  # type: ignore[assignment]


def sd_vae(depth: int, channels: int, width: float) -> tuple[ForeignEncoder, ForeignDecoder]:
    """Stable Diffusion's autoencoder with `depth` resolutions."""
    whole = peers.sd_vae(depth, channels, width)
    decoder = ForeignDecoder(nn.Sequential(whole.post_quant_conv, whole.decoder), whole.decoder.conv_out)
    return ForeignEncoder(nn.Sequential(whole.encoder, whole.quant_conv)), decoder


def dc_ae(depth: int, channels: int, width: float) -> tuple[ForeignEncoder, ForeignDecoder]:
    """DC-AE with `depth` resolutions, made to say a log-variance, too.

    The published decoder has batch norms at its three finest resolutions; with four images a batch these do worse
    than its own RMS norms, which therefore stand everywhere. Its shortcuts want channels of latents that divide its
    widest layer: where they do not, the next that do, and a 1x1 convolution.
    """
    widest = int(peers.DC_WIDTHS[depth - 1] * width)
    said, read = (next(n for n in range(wanted, widest + 1) if widest % n == 0) for wanted in (2 * channels, channels))
    encoder = peers.dc_ae(depth, said, width).encoder
    decoder = peers.dc_ae(depth, read, width, norms=("rms_norm",) * depth).decoder
    last: Any = decoder.conv_out  # published: no blocks at factor 1, so the last step is an up-sampling
    down = encoder if said == 2 * channels else nn.Sequential(encoder, nn.Conv2d(said, 2 * channels, 1))
    up = decoder if read == channels else nn.Sequential(nn.Conv2d(channels, read, 1), decoder)
    return ForeignEncoder(down), ForeignDecoder(up, last.conv)


class Block(nn.Module):
    """x plus two 3x3 convolutions, nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        out: Tensor = x + self.second(F.silu(self.first(F.silu(x))))
        return out


def plain(depth: int, channels: int, width: float) -> tuple[ForeignEncoder, ForeignDecoder]:
    """The dumb one: blocks of 4x4 pixels as channels, two residual blocks a resolution, unshuffle and shuffle between
    resolutions, no norm."""
    widths = [round(w * width) for w in (64, 96, 128, 128, 128)][: depth - 2]
    down: list[nn.Module] = [nn.PixelUnshuffle(4), nn.Conv2d(48, widths[0], 3, padding=1)]
    up: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1)]
    for a, b in zip(widths, [*widths[1:], 0], strict=True):
        down += [Block(a), Block(a)]
        if b:
            down += [nn.PixelUnshuffle(2), nn.Conv2d(4 * a, b, 3, padding=1)]
    for a, b in zip(reversed(widths), [*reversed(widths[:-1]), 0], strict=True):
        up += [Block(a), Block(a)]
        if b:
            up += [nn.Conv2d(a, 4 * b, 3, padding=1), nn.PixelShuffle(2)]
    down.append(nn.Conv2d(widths[-1], 2 * channels, 3, padding=1))
    last = nn.Conv2d(widths[0], 48, 3, padding=1)
    return ForeignEncoder(nn.Sequential(*down)), ForeignDecoder(nn.Sequential(*up, last, nn.PixelShuffle(4)), last)


def linear(config: AutoencoderConfig, images: Callable[[], Iterable[Tensor]]) -> PyramidAutoencoder:
    """A linear codec, fitted to images: principal components, and what they say by least squares, of which nothing
    else has learned anything. See `fit_base` for `images`."""
    if config.base != "linear" or len(config.levels) != 1:
        raise ValueError("a linear codec has one level, and model.base=linear")
    codec = PyramidAutoencoder(config).eval()
    for parameter in codec.parameters():
        if parameter.dim() > 1:  # drawn at random, it would make log-variances noise; biases are what they begin as
            nn.init.zeros_(parameter)
    codec.fit_base(images, variance=0.0)
    return codec


def linear_config(values: int, finest: int, image_size: Sequence[int]) -> AutoencoderConfig:
    """Of one level at the factor `finest`, with as many channels as `values` of an image allow."""
    positions = math.prod(image_size) // finest**2
    patch, side = base_block(finest, 1)
    widths = [4] * side.bit_length()
    return AutoencoderConfig(
        image_size=list(image_size),
        levels=[Level(finest, min(values // positions, 3 * side**2))],
        base="linear",
        patch=patch,
        norm="none",
        encoder=EncoderConfig(widths, spectral_norm=False),
        decoder=DecoderConfig(widths),
        attention=AttentionConfig(max_tokens=0),
    )


Build = Callable[[AutoencoderConfig], PyramidAutoencoder]


def builder(name: str, width: float = 1.0) -> Build:
    """What builds a network by name: "ours", "linear" (which `linear` fits), or a family of `PeerAutoencoder`."""
    return PyramidAutoencoder if name in ("ours", "linear") else partial(PeerAutoencoder, family=name, width=width)
