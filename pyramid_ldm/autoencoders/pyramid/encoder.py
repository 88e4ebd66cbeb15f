"""The light half: image to moments of every latent level (PDM section 3.3, figure 5 left)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyramid_ldm.autoencoders.pyramid.base import build_base
from pyramid_ldm.nn.attention import build_attention
from pyramid_ldm.nn.layers import build_norm, conv2d, float32_conv2d
from pyramid_ldm.nn.pixel_norm import norm_silu
from pyramid_ldm.nn.resample import box_down, max_down, unshuffle_down
from pyramid_ldm.nn.resblock import Resampling, ResidualBlock
from pyramid_ldm.pyramid import Level, Pyramid

INITIAL_LOG_VARIANCE = -6.0
POOLING = {"average": box_down, "max": max_down, "unshuffle": unshuffle_down}


class LatentHead(nn.Module):
    """Features to a latent's moments; exempt from spectral norm, which would bound the latent's scale.

    The convolution is float32: its output is what gets cached, and bfloat16's rounding can exceed a posterior's
    standard deviation. Log-variances start at -6: at 0, noise as large as the latents would hide them for long.
    With `linear`, a second convolution sees the features as they are, as the norm forgets how large they are.
    """

    def __init__(self, inputs: int, channels: int, moments: int, norm: str = "pixel", linear: bool = True) -> None:
        super().__init__()
        self.norm = build_norm(norm, inputs)
        self.conv = float32_conv2d(inputs, moments * channels, 1)
        self.linear = float32_conv2d(inputs, moments * channels, 1) if linear else None
        if moments == 2:
            assert self.conv.bias is not None
            nn.init.constant_(self.conv.bias[channels:], INITIAL_LOG_VARIANCE)

    def begin_at_zero(self, channels: int) -> None:
        """The first means are zero, for something else to be added to."""
        for conv in filter(None, (self.conv, self.linear)):
            nn.init.zeros_(conv.weight[:channels].data)

    def forward(self, x: Tensor) -> Tensor:
        moments: Tensor = self.conv(norm_silu(self.norm, x))
        return moments if self.linear is None else moments + self.linear(x)


class EncoderLevel(nn.Module):
    """Everything at one resolution: the image enters, blocks, a latent leaves, the way down."""

    def __init__(
        self,
        width: int,
        *,
        blocks: int,
        attention: str,
        head_channels: int,
        softmax_tokens: int,
        spectral_norm: bool,
        image_channels: int,
        latent_channels: int,
        moments: int,
        next_width: int | None,
        residual: bool,
        pooling: str,
        norm: str,
        linear_head: bool,
    ) -> None:
        super().__init__()
        self.from_rgb = conv2d(image_channels, width, 1, spectral_norm=spectral_norm) if image_channels else None
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(ResidualBlock(width, width, spectral_norm=spectral_norm, norm=norm))
            self.blocks.append(
                build_attention(
                    attention,
                    width,
                    head_channels=head_channels,
                    softmax_tokens=softmax_tokens,
                    spectral_norm=spectral_norm,
                )
            )
        self.head = LatentHead(width, latent_channels, moments, norm, linear_head) if latent_channels else None
        self.down = (
            Resampling(
                width,
                next_width,
                POOLING[pooling],
                residual=residual,
                spectral_norm=spectral_norm,
                norm=norm,
                gathered=4 if pooling == "unshuffle" else 1,
            )
            if next_width
            else None
        )

    def forward(self, h: Tensor, image: Tensor) -> tuple[Tensor | None, Tensor]:
        """(features, what `from_rgb` sees here) -> (moments or None, features one resolution down)."""
        if self.from_rgb is not None:
            h = h + self.from_rgb(image)
        for block in self.blocks:
            h = block(h)
        moments = None if self.head is None else self.head(h)
        return moments, h if self.down is None else self.down(h)


class PyramidEncoder(nn.Module):
    """No branches; one residual block a resolution and, where `attention_factors` says, linear attention.

    Args:
        widths: channels at factor `patch`, 2 `patch`, ... down to the coarsest latent.
        levels: the latents, coarse to fine.
        moments: values per latent channel (2: mean and log-variance; 1: the latent itself).
        skip: "skip" and "res_skip" let the pooled image in at every resolution through a 1x1 `from_rgb`;
            "residual" and "res_skip" put a shortcut around every re-sampling (PDM figure 4).
        patch: pixels a side of the blocks whose pixels the first convolution sees as channels.
        image_patch: how many times finer, each way, than its level the image is that a `from_rgb` sees, blocks of its
            pixels as channels; 1: one pooled pixel a position (PDM, StyleGAN2).
        norm: "pixel", "none" or "group".
        base: "thumbnail" or "linear": added to the finest latent, which begins as that (see `base`).
        pooling: "average", "max", or "unshuffle" (2x2 blocks to channels: the convolution sees all of them).
        linear_heads: a latent is also a linear function of the features, not of the normalised ones alone.
        checkpoint_factors: resolutions recomputed in the backward pass.
    """

    def __init__(
        self,
        widths: Sequence[int],
        levels: Sequence[Level],
        *,
        moments: int,
        blocks: int = 1,
        skip: str = "res_skip",
        patch: int = 1,
        image_patch: int = 4,
        norm: str = "pixel",
        pooling: str = "average",
        linear_heads: bool = True,
        attention: str = "linear",
        attention_factors: Sequence[int] = (),
        head_channels: int = 64,
        softmax_tokens: int = 4096,
        spectral_norm: bool = True,
        base: str = "none",
        checkpoint_factors: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.base = build_base(base, levels[-1], patch, decodes=False)
        channels = {level.factor: level.channels for level in levels}
        factors = [patch << i for i in range(len(widths))]
        self.stem = conv2d(3 * patch**2, widths[0], spectral_norm=spectral_norm)
        enters = skip in ("skip", "res_skip")
        # At most the image itself; 1 where no from_rgb would look.
        self.patches = [patch, *(min(image_patch, factor) if enters else 1 for factor in factors[1:])]
        self.patch = patch
        self.checkpointed = [factor in checkpoint_factors for factor in factors]
        self.levels = nn.ModuleList(
            EncoderLevel(
                width,
                blocks=blocks,
                attention=attention if factors[i] in attention_factors else "none",
                head_channels=head_channels,
                softmax_tokens=softmax_tokens,
                spectral_norm=spectral_norm,
                image_channels=3 * self.patches[i] ** 2 if i > 0 and enters else 0,
                latent_channels=channels.get(factors[i], 0),
                moments=moments,
                next_width=widths[i + 1] if i + 1 < len(widths) else None,
                residual=skip in ("residual", "res_skip"),
                pooling=pooling,
                norm=norm,
                linear_head=linear_heads,
            )
            for i, width in enumerate(widths)
        )
        if self.base is not None:
            finest = next(module for module in self.modules() if isinstance(module, LatentHead))
            finest.begin_at_zero(self.base.channels)

    def forward(self, image: Tensor) -> Pyramid:
        """(B, 3, H, W) in [-1, 1] -> moments of each latent level, coarse to fine, (B, moments * C_i, H/f_i, W/f_i)."""
        found: list[Tensor] = []
        small = None if self.base is None else self.base.of(image)
        h, finer = self.stem(F.pixel_unshuffle(image, self.patch)), self.patch  # times finer than the level `image` is
        for level, patch, recompute in zip(self.levels, self.patches, self.checkpointed, strict=True):
            while finer > patch:
                image, finer = box_down(image), finer // 2
            seen = F.pixel_unshuffle(image, patch)
            if recompute and torch.is_grad_enabled():
                moments, h = checkpoint(level, h, seen, use_reentrant=False)
            else:
                moments, h = level(h, seen)
            finer *= 2
            if moments is not None:
                if small is not None and not found:
                    moments = moments + F.pad(small, (0, 0, 0, 0, 0, moments.shape[1] - small.shape[1]))
                found.append(moments)
        return tuple(reversed(found))
