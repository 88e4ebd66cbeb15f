"""The pyramid autoencoder as one module."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pyramid_ldm.autoencoders.posterior import DiagonalGaussian
from pyramid_ldm.autoencoders.pyramid.base import LinearHalf, fit_base
from pyramid_ldm.autoencoders.pyramid.decoder import PyramidDecoder
from pyramid_ldm.autoencoders.pyramid.decoder_level import DecoderLevel
from pyramid_ldm.autoencoders.pyramid.encoder import INITIAL_LOG_VARIANCE, PyramidEncoder
from pyramid_ldm.autoencoders.pyramid.regions import Region, Regions
from pyramid_ldm.config.autoencoder import AutoencoderConfig
from pyramid_ldm.nn.spectral import full_precision
from pyramid_ldm.pyramid import Pyramid, compression_ratio, level_shapes
from pyramid_ldm.serialization import assemble, read_model, read_stored, save_model

INITIAL_VARIANCE = math.exp(INITIAL_LOG_VARIANCE)


@dataclass(frozen=True)
class AutoencoderOutput:
    """One training pass."""

    reconstruction: Tensor  # (B, 3, H, W), or of the regions, (entries, 3, height, width)
    posterior: DiagonalGaussian
    codebook_loss: Tensor  # scalar, mean over levels; zero under KL
    codebook_indices: tuple[Tensor, ...]  # entries that were used, (B, H, W) a level; empty under KL


class PyramidAutoencoder(nn.Module):
    """Encoder, regularised latent pyramid, decoder (PDM section 3.3).

    Images are float, (B, 3, H, W), in [-1, 1]; latents are *raw* (unscaled) pyramids, coarse to fine.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = list(config.levels)
        factors = config.attention.factors or []
        self.encoder = PyramidEncoder(
            config.encoder.widths,
            self.levels,
            moments=2 if config.latent == "kl" else 1,
            blocks=config.encoder.blocks,
            skip=config.skip,
            patch=config.patch,
            image_patch=config.encoder.image_patch,
            norm=config.norm,
            pooling=config.encoder.pooling,
            linear_heads=config.encoder.linear_heads,
            attention=config.attention.encoder,
            attention_factors=factors,
            head_channels=config.attention.head_channels,
            softmax_tokens=config.attention.softmax_tokens,
            spectral_norm=config.encoder.spectral_norm,
            base=config.base,
            checkpoint_factors=config.checkpoint_factors,
        )
        self.decoder = PyramidDecoder(
            config.decoder.widths,
            self.levels,
            blocks=config.encoder.blocks + 1,
            branch=config.decoder.branch,
            branch_blocks=config.decoder.branch_blocks,
            skip=config.skip,
            attention=config.attention.decoder,
            attention_factors=factors,
            head_channels=config.attention.head_channels,
            softmax_tokens=config.attention.softmax_tokens,
            dropout=config.decoder.dropout,
            upsampling=config.decoder.upsampling,
            zero_init=config.decoder.zero_init,
            coarse_init=config.decoder.coarse_init,
            norm=config.norm,
            patch=config.patch,
            base=config.base,
            checkpoint_factors=config.checkpoint_factors,
        )
        self.quantizers = nn.ModuleList()
        if config.latent == "vq":
            from taming.modules.vqvae.quantize import VectorQuantizer2

            # legacy=True puts beta on the wrong term.
            self.quantizers.extend(
                VectorQuantizer2(config.codebook_size, level.channels, beta=0.25, legacy=False) for level in self.levels
            )

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """The posterior of an image's latents. ValueError where the image's sides do not fit the coarsest factor."""
        factor = self.levels[0].factor
        if image.shape[2] % factor or image.shape[3] % factor:
            raise ValueError(
                f"image of {image.shape[2]}x{image.shape[3]} pixels: both sides must be multiples of {factor}"
            )
        return DiagonalGaussian.from_moments(self.encoder(image), has_variance=self.config.latent == "kl")

    def quantize(self, latents: Pyramid) -> tuple[Pyramid, Tensor, tuple[Tensor, ...]]:
        """(nearest codebook entries with a straight-through gradient, loss, indices (B, H, W) a level). VQ only."""
        quantized, losses, used = [], [], []
        for level, quantizer in zip(latents, self.quantizers, strict=True):
            with full_precision(level.device):  # bfloat16 would choose other entries
                nearest, loss, (_, _, indices) = quantizer(level.float())
            quantized.append(nearest)
            losses.append(loss)
            used.append(indices.view(level.shape[0], *level.shape[2:]))
        return tuple(quantized), torch.stack(losses).mean(), tuple(used)

    def decode(self, latents: Pyramid, region: Region | None = None) -> Tensor:
        """Latents to an image (B, 3, H, W), in [-1, 1] up to overshoot; VQ latents are quantised first.

        Args:
            region: (top, left, height, width) in pixels: only this part, (B, 3, height, width), equal to the same
                part of the image. Above the levels with attention, only what it depends on is computed. ValueError
                where it does not lie inside the image.
        """
        if self.quantizers:
            latents, _, _ = self.quantize(latents)
        image: Tensor = self.decoder(latents, Regions.of(region, latents[0].shape[0]) if region else None)
        return image

    def decode_tiled(self, latents: Pyramid, tile: int = 512) -> Tensor:
        """`decode` without gradients, tile x tile pixels at a time: the same image, without seams, in the memory of
        one tile (and of the levels with attention)."""
        if tile < 1:
            raise ValueError(f"tile is {tile}; it must be at least 1")
        with torch.no_grad():
            if self.quantizers:
                latents, _, _ = self.quantize(latents)
            return self.decoder.tiled(latents, tile)

    def forward(
        self,
        image: Tensor,
        noise: Pyramid | None = None,
        regions: Regions | None = None,
        kept: Tensor | None = None,
    ) -> AutoencoderOutput:
        """A training pass: encode, sample with `noise` (fresh if None) or quantise, decode (only `regions`); of each
        image only the first `kept` (B,) of the levels, coarse to fine, zeros in place of the others."""
        posterior = self.encode(image)
        if self.quantizers:
            latents, loss, indices = self.quantize(posterior.mode())
        else:
            latents = posterior.sample(noise)
            loss, indices = latents[0].new_zeros(()), ()
        if kept is not None:
            latents = tuple(z * (kept > i)[:, None, None, None] for i, z in enumerate(latents))
        return AutoencoderOutput(self.decoder(latents, regions).float(), posterior, loss, indices)

    @property
    def linear_base(self) -> tuple[LinearHalf, LinearHalf] | None:
        """The encoder's and the decoder's, where `model.base` is `linear`."""
        encoder, decoder = (getattr(half, "base", None) for half in (self.encoder, self.decoder))
        if isinstance(encoder, LinearHalf) and isinstance(decoder, LinearHalf):
            return encoder, decoder
        return None

    def fit_base(self, images: Callable[[], Iterable[Tensor]], variance: float = INITIAL_VARIANCE) -> None:
        """Fits `linear_base` before training, by default to the noise that posteriors begin with; see `base.fit_base`.
        ValueError where there is none."""
        if self.linear_base is None:
            raise ValueError("model.base is not linear: there is nothing to fit")
        fit_base(*self.linear_base, images, variance)

    def compile(self, **options: Any) -> None:
        """Compiles in place, a part at a time: where windows are cut changes with every region, and stays outside."""
        for level in self.encoder.levels:
            level.compile(**options)
        for level in self.decoder.levels:
            if isinstance(level, DecoderLevel):
                for part in filter(None, (level.up, level.branch, level.blocks)):
                    part.compile(**options)

    @property
    def image_size(self) -> list[int]:
        """[H, W]."""
        return list(self.config.image_size)

    @property
    def has_variance(self) -> bool:
        """KL has one; VQ has not."""
        return self.config.latent == "kl"

    @property
    def level_names(self) -> list[str]:
        """ "4x4" (height x width) a level, coarse to fine."""
        return [f"{h}x{w}" for _, h, w in level_shapes(self.levels, self.config.image_size)]

    def compression_ratio(self) -> float:
        """Image values per latent value: 256.0 means 1:256."""
        return compression_ratio(self.levels, self.config.image_size)

    def fingerprint(self) -> str:
        """A hash of every weight: two autoencoders with one fingerprint encode alike."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.yaml` and `model.safetensors`, spectral norm folded into the weights."""
        save_model(Path(directory), self.config, self)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Loads a model directory, or a run directory's `model/`, in eval mode, float32, on the CPU.

        Raises UserError where something is missing or does not fit.
        """
        stored = read_model(Path(directory), "train-ae", lambda home: read_stored(home, AutoencoderConfig))
        return assemble(stored, cls)
