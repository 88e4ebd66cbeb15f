"""Stages one that the toolkit's is held beside: each a PyramidAutoencoder with foreign halves, so that posterior, loss,
data, optimizer, checkpoints and both commands after it stay the toolkit's, and a comparison differs in the network
alone."""

import math
from collections.abc import Callable, Sequence
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
from pyramid_ldm.nn.resample import bilinear_up
from pyramid_ldm.pyramid import Level, Pyramid

POINT = -30.0  # log-variance of what has none


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
    than its own RMS norms, which therefore stand everywhere.
    """
    encoder = peers.dc_ae(depth, 2 * channels, width).encoder
    decoder = peers.dc_ae(depth, channels, width, norms=("rms_norm",) * depth).decoder
    last: Any = decoder.conv_out  # published: no blocks at factor 1, so the last step is an up-sampling
    return ForeignEncoder(encoder), ForeignDecoder(decoder, last.conv)


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


FIT = 400, 16  # steps, images a step
SIDE = 16  # a latent pixel covers up to SIDE x SIDE pixels of the image as its level sees it, reduced
FREQUENCIES = 8  # of a cosine basis, each way, among which `start` chooses
OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))


class LinearHalf(nn.Module):
    """Either half of the linear codec: a kernel a level, coarse to fine. Windows overlap by half."""

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.factors = [level.factor for level in levels]
        self.sides = [min(SIDE, factor) for factor in self.factors]
        self.kernels = nn.ParameterList()
        for level, side in zip(levels, self.sides, strict=True):
            self.kernels.append(torch.zeros(level.channels, 3, side + side // 2 * 2, side + side // 2 * 2))

    def write(self, latent: Tensor, i: int) -> Tensor:
        """What one level says of the image as it sees it."""
        side = self.sides[i]
        cut = side + side // 2
        written = F.conv_transpose2d(F.pad(latent, (1,) * 4, mode="replicate"), self.kernels[i], stride=side)
        return written[..., cut:-cut, cut:-cut]

    def say(self, left: Tensor, i: int) -> Tensor:
        """A level's latent of what the coarser ones left out."""
        overlap = self.sides[i] // 2
        padded = F.pad(left, (overlap,) * 4, mode="replicate") if overlap else left
        return F.conv2d(padded, self.kernels[i], stride=self.sides[i])


class LinearCodec(PyramidAutoencoder):
    """A pyramid of lapped transforms, coarse to fine, each level says what the coarser ones left out; `fit` instead of
    training. Latents have a standard deviation of about 1."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        analysis, synthesis = LinearHalf(config.levels), LinearHalf(config.levels)
        self.encoder, self.decoder = analysis, LinearDecoder(synthesis)  # type: ignore[assignment]

    def analyse(self, image: Tensor, before: Callable[[int, Tensor], None] | None = None) -> tuple[Pyramid, Tensor]:
        """(latents, what the decoder makes of them). `before` sees what the coarser levels left out to each, first."""
        analysis: Any = self.encoder
        synthesis: Any = self.decoder.synthesis
        found: list[Tensor] = []
        base: Tensor | None = None
        for i, side in enumerate(analysis.sides):
            left = reduced(image.float(), analysis.factors[i] // side)
            if base is not None:
                base = enlarged(base, left.shape[-1])
                left = left - base
            if before is not None:
                before(i, left)
            found.append(analysis.say(left, i))
            part = synthesis.write(found[-1], i)
            base = part if base is None else base + part
        assert base is not None
        return tuple(found), enlarged(base, image.shape[-1])

    def encode(self, image: Tensor) -> Any:
        """A point."""
        from pyramid_ldm.autoencoders.posterior import DiagonalGaussian

        with torch.autocast(image.device.type, enabled=False):
            latents, _ = self.analyse(image)
        return DiagonalGaussian(latents, tuple(torch.full_like(z, POINT) for z in latents))

    def fit(self, batches: Callable[[int], Tensor], steps: int) -> float:
        """Least squares over `steps` batches, all kernels together, from the cosines of most energy in the first; then
        every channel is scaled to a deviation of 1. Returns the last error."""
        self.start(batches(0))
        kernels = list(self.parameters())
        rates = [0.02 * float(kernel.detach().square().mean().sqrt()) for kernel in kernels]
        optimizer = torch.optim.Adam([{"params": [kernel]} for kernel in kernels], betas=(0.9, 0.99))
        error, images = float("nan"), batches(0)
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / 20)
            images = batches(step + 1)
            loss = (self.analyse(images)[1] - images).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            error = float(loss.detach())
        with torch.no_grad():
            for i, latent in enumerate(self.analyse(images)[0]):
                self.rescale(i, latent.std(dim=(0, 2, 3)))
        return error

    def rescale(self, i: int, spread: Tensor) -> None:
        """Divides level i's channels by `spread`."""
        factor = spread[:, None, None, None] + 1e-6
        analysis: Any = self.encoder
        synthesis: Any = self.decoder.synthesis
        analysis.kernels[i].div_(factor)
        synthesis.kernels[i].mul_(factor)

    @torch.no_grad()
    def start(self, images: Tensor) -> None:
        """Without overlap, and at each level the cosines that have the most energy in what is left."""

        halves: list[Any] = [self.encoder, self.decoder.synthesis]

        def choose(i: int, left: Tensor) -> None:
            side, count = halves[0].sides[i], self.levels[i].channels
            cosines = cosine_basis(side)
            if count > len(cosines):
                raise ValueError(f"{count} channels for {len(cosines)} cosines")
            energy = F.conv2d(left, cosines, stride=side).square().mean(dim=(0, 2, 3))
            chosen = cosines[energy.argsort(descending=True)[:count]]
            for half in halves:
                half.kernels[i].copy_(F.pad(chosen, (side // 2,) * 4))
            self.rescale(i, F.conv2d(left, chosen, stride=side).std(dim=(0, 2, 3)))

        self.analyse(images, choose)


class LinearDecoder(nn.Module):
    """A pyramid to an image by the synthesis kernels."""

    def __init__(self, synthesis: LinearHalf) -> None:
        super().__init__()
        self.synthesis = synthesis

    def forward(self, latents: Pyramid, regions: Regions | None = None) -> Tensor:
        """(B, 3, H, W)."""
        base: Tensor | None = None
        with torch.autocast(latents[0].device.type, enabled=False):
            for i, latent in enumerate(latents):
                part = self.synthesis.write(latent.float(), i)
                base = part if base is None else enlarged(base, part.shape[-1]) + part
            assert base is not None
            image = enlarged(base, latents[0].shape[-1] * self.synthesis.factors[0])
        return image if regions is None else regions.cut(image)

    def tiled(self, latents: Pyramid, tile: int) -> Tensor:
        """Whole."""
        return self(latents)


def cosine_basis(side: int) -> Tensor:
    """Orthonormal two-dimensional cosines of opponent colours, (3 * n * n, 3, side, side)."""
    n = min(FREQUENCIES, side)
    k, x = torch.arange(n)[:, None], torch.arange(side)[None]
    waves = torch.cos(math.pi * (2 * x + 1) * k / (2 * side)) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    colours = F.normalize(torch.tensor(OPPONENT), dim=1)
    return torch.einsum("cd,uy,vx->cuvdyx", colours, waves, waves).reshape(-1, 3, side, side)


def reduced(image: Tensor, by: int) -> Tensor:
    """Means of blocks."""
    return image if by == 1 else F.avg_pool2d(image, by)


def enlarged(image: Tensor, width: int) -> Tensor:
    """Bilinear, to a width that is a power of two times as large."""
    while image.shape[-1] < width:
        image = bilinear_up(image)
    return image


Build = Callable[[AutoencoderConfig], PyramidAutoencoder]


def builder(name: str, width: float = 1.0) -> Build:
    """What builds a network by name: "ours", "linear", or a family of `PeerAutoencoder`."""
    if name == "ours":
        return PyramidAutoencoder
    return LinearCodec if name == "linear" else partial(PeerAutoencoder, family=name, width=width)
