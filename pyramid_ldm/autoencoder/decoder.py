"""The heavy half: latent pyramid to image (PDM section 3.3, figure 5 right)."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyramid_ldm.nn.attention import build_attention
from pyramid_ldm.nn.layers import PixelNorm, conv2d, decreasing_dropout, full_precision
from pyramid_ldm.nn.resample import bilinear_up, nearest_up
from pyramid_ldm.nn.resblock import Resampling, ResidualBlock, TransformerBlock, position_encoding
from pyramid_ldm.pyramid import LatentLevel, Pyramid


class ResidualBranch(nn.Module):
    """A latent's way to the backbone: 1x1 convolution, then residual blocks, each followed by attention."""

    def __init__(
        self, latent_channels: int, width: int, *, blocks: int, attention: str, head_channels: int, dropout: float
    ) -> None:
        super().__init__()
        self.input = conv2d(latent_channels, width, 1)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(ResidualBlock(width, width, dropout=dropout, local=True, zero_init=False))
            self.blocks.append(build_attention(attention, width, head_channels=head_channels))

    def forward(self, latent: Tensor) -> Tensor:
        h: Tensor = self.input(latent)
        for block in self.blocks:
            h = block(h)
        return h


class TransformerBranch(nn.Module):
    """A latent's way to the backbone through a ViT with one token a position and sine-cosine positions."""

    def __init__(self, latent_channels: int, width: int, *, blocks: int, head_channels: int, dropout: float) -> None:
        super().__init__()
        self.input = conv2d(latent_channels, width, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, head_channels=head_channels, dropout=dropout) for _ in range(blocks)
        )

    def forward(self, latent: Tensor) -> Tensor:
        h: Tensor = self.input(latent)
        h = h + position_encoding(h.shape[1], h.shape[2], h.shape[3], h.device).to(h.dtype)
        for block in self.blocks:
            h = block(h)
        return h


class ToRGB(nn.Module):
    """Features to an addition to the RGB stream: norm, SiLU, 1x1 convolution (the output skip).

    `features` runs inside a level, `forward` outside, so that asking for the gradient of the last convolution alone
    recomputes no checkpointed level. The convolution and the stream are float32: bfloat16 has eight bits of mantissa,
    which would band a clear sky.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = PixelNorm(width)
        self.conv = conv2d(width, 3, 1)
        with torch.no_grad():
            self.conv.weight.mul_(0.1)  # RGB is summed over every resolution: start near grey, not with 1.5 of noise

    def features(self, h: Tensor) -> Tensor:
        """What the convolution sees."""
        return F.silu(self.norm(h))

    def forward(self, features: Tensor) -> Tensor:
        with full_precision(features.device):
            result: Tensor = self.conv(features.to(self.conv.weight.dtype))
        return result


class DecoderLevel(nn.Module):
    """Everything at one resolution: a latent enters through its branch, blocks, RGB leaves, the way up."""

    def __init__(
        self,
        width: int,
        *,
        branch: nn.Module | None,
        blocks: int,
        attention: str,
        head_channels: int,
        softmax_tokens: int,
        dropout: float,
        rgb_leaves: bool,
        next_width: int | None,
        residual: bool,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(ResidualBlock(width, width, dropout=dropout, local=True, zero_init=False))
            self.blocks.append(
                build_attention(attention, width, head_channels=head_channels, softmax_tokens=softmax_tokens)
            )
        self.to_rgb = ToRGB(width) if rgb_leaves else None
        self.up = Resampling(width, next_width, nearest_up, residual=residual) if next_width else None

    def forward(self, h: Tensor | None, latent: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(features or None, this level's latent or None) -> (features one resolution up, features of RGB or None)."""
        if self.branch is not None:
            entering = self.branch(latent)
            h = entering if h is None else h + entering
        assert h is not None, "the coarsest level always has a latent"
        for block in self.blocks:
            h = block(h)
        rgb = None if self.to_rgb is None else self.to_rgb.features(h)
        return h if self.up is None else self.up(h), rgb


class PyramidDecoder(nn.Module):
    """Each latent passes its own branch and is added to the backbone at its resolution; no spectral norm.

    Args:
        widths: channels at factor 1, 2, 4, ... down to the coarsest latent.
        levels: the latents, coarse to fine.
        blocks: residual blocks (each with attention where `attention_factors` says) a resolution.
        branch: "residual" or "vit", `branch_blocks` deep.
        skip: "skip" and "res_skip" sum RGB over resolutions, rgb = upsample(rgb) + to_rgb(h); "residual" and
            "res_skip" put a shortcut around every re-sampling (PDM figure 4).
        dropout: at the lowest resolution, falling linearly to 0 at the highest.
        checkpoint_factors: resolutions recomputed in the backward pass.

    Norms are per pixel, so above the attention levels an output pixel depends on its neighbourhood alone.
    """

    def __init__(
        self,
        widths: Sequence[int],
        levels: Sequence[LatentLevel],
        *,
        blocks: int = 2,
        branch: str = "residual",
        branch_blocks: int = 2,
        skip: str = "res_skip",
        attention: str = "spatial_channel",
        attention_factors: Sequence[int] = (),
        head_channels: int = 64,
        softmax_tokens: int = 4096,
        dropout: float = 0.35,
        checkpoint_factors: Sequence[int] = (),
    ) -> None:
        super().__init__()
        channels = {level.factor: level.channels for level in levels}
        factors = [1 << i for i in reversed(range(len(widths)))]  # coarse to fine, as the latents
        rates = decreasing_dropout(len(factors), dropout)

        def build_branch(factor: int, width: int, kind: str, rate: float) -> nn.Module | None:
            if factor not in channels:
                return None
            if branch == "vit":
                return TransformerBranch(
                    channels[factor], width, blocks=branch_blocks, head_channels=head_channels, dropout=rate
                )
            return ResidualBranch(
                channels[factor],
                width,
                blocks=branch_blocks,
                attention=kind,
                head_channels=head_channels,
                dropout=rate,
            )

        self.factors = factors
        self.latent_factors = frozenset(channels)
        self.checkpoint_factors = frozenset(checkpoint_factors)
        self.levels = nn.ModuleList()
        for factor, width, rate in zip(factors, reversed(widths), rates, strict=True):
            kind = attention if factor in attention_factors else "none"
            self.levels.append(
                DecoderLevel(
                    width,
                    branch=build_branch(factor, width, kind, rate),
                    blocks=blocks,
                    attention=kind,
                    head_channels=head_channels,
                    softmax_tokens=softmax_tokens,
                    dropout=rate,
                    rgb_leaves=factor == 1 or skip in ("skip", "res_skip"),
                    next_width=widths[factor.bit_length() - 2] if factor > 1 else None,
                    residual=skip in ("residual", "res_skip"),
                )
            )

    @property
    def last_weight(self) -> nn.Parameter:
        """The finest `to_rgb` weight, where the adaptive GAN weight compares gradients."""
        finest = self.levels[-1]
        assert isinstance(finest, DecoderLevel)
        assert finest.to_rgb is not None
        weight = finest.to_rgb.conv.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, latents: Pyramid) -> Tensor:
        """Latents, coarse to fine, (B, C_i, H/f_i, W/f_i) -> image (B, 3, H, W), in [-1, 1] up to overshoot."""
        waiting = list(latents)
        h: Tensor | None = None
        rgb: Tensor | None = None
        for factor, level in zip(self.factors, cast("list[DecoderLevel]", self.levels), strict=True):
            latent = waiting.pop(0) if factor in self.latent_factors else None
            if factor in self.checkpoint_factors and torch.is_grad_enabled():
                h, features = checkpoint(level, h, latent, use_reentrant=False)
            else:
                h, features = level(h, latent)
            if rgb is not None:
                rgb = bilinear_up(rgb)  # nearest would make every finer level learn to undo blocks
            if features is not None and level.to_rgb is not None:
                addition = level.to_rgb(features)
                rgb = addition if rgb is None else rgb + addition
        assert rgb is not None
        return rgb
