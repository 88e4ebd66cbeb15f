"""What a decoder is made of at one resolution: branches, levels, and the way to RGB."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyramid_ldm.autoencoders.pyramid.regions import Step
from pyramid_ldm.nn.attention import build_attention
from pyramid_ldm.nn.layers import build_norm, conv2d, float32_conv2d
from pyramid_ldm.nn.pixel_norm import norm_silu
from pyramid_ldm.nn.resample import bilinear_up, nearest_up
from pyramid_ldm.nn.resblock import Resampling, ResidualBlock, TransformerBlock, position_encoding

UPSAMPLING = {"nearest": nearest_up, "bilinear": bilinear_up}


class ResidualBranch(nn.Module):
    """A latent's way to the backbone: 1x1 convolution, then residual blocks, each followed by attention."""

    def __init__(
        self,
        latent_channels: int,
        width: int,
        *,
        blocks: int,
        attention: str,
        head_channels: int,
        softmax_tokens: int,
        dropout: float,
        norm: str,
        zero_init: bool,
    ) -> None:
        super().__init__()
        self.input = conv2d(latent_channels, width, 1)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(ResidualBlock(width, width, dropout=dropout, norm=norm, zero_init=zero_init))
            self.blocks.append(
                build_attention(attention, width, head_channels=head_channels, softmax_tokens=softmax_tokens)
            )

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
    """Features to an addition to the RGB stream: norm, SiLU, 1x1 convolution (the output skip); with `patch` above 1,
    to that of the patch x patch pixels that a position covers.

    `features` runs inside a level, `forward` outside, so that asking for the gradient of the last convolution alone
    recomputes no checkpointed level. The convolution and the stream are float32: bfloat16 has eight bits of mantissa,
    which would band a clear sky.
    """

    def __init__(self, width: int, norm: str = "pixel", patch: int = 1) -> None:
        super().__init__()
        self.norm = build_norm(norm, width)
        self.conv = float32_conv2d(width, 3 * patch**2, 1)
        with torch.no_grad():
            self.conv.weight.mul_(0.1)  # RGB is summed over every resolution: start near grey, not with 1.5 of noise

    def features(self, h: Tensor) -> Tensor:
        """What the convolution sees."""
        return norm_silu(self.norm, h)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.conv(features)
        return result


class DecoderLevel(nn.Module):
    """Everything at one resolution: the way up to it, a latent enters through its branch, blocks, RGB leaves."""

    def __init__(
        self,
        previous_width: int | None,
        width: int,
        *,
        branch: nn.Module | None,
        blocks: int,
        attention: str,
        head_channels: int,
        softmax_tokens: int,
        dropout: float,
        rgb_leaves: bool,
        residual: bool,
        norm: str,
        upsampling: str,
        zero_init: bool,
        coarse_init: float,
        patch: int,
    ) -> None:
        super().__init__()
        self.local = norm != "group"
        self.up = (
            Resampling(previous_width, width, UPSAMPLING[upsampling], residual=residual, norm=norm)
            if previous_width
            else None
        )
        if self.up is not None and branch is not None:
            with torch.no_grad():
                for conv in filter(None, (self.up.conv, self.up.shortcut)):
                    conv.weight.mul_(coarse_init)
        self.branch = branch
        self.blocks = nn.Sequential()
        for _ in range(blocks):
            self.blocks.append(ResidualBlock(width, width, dropout=dropout, norm=norm, zero_init=zero_init))
            self.blocks.append(
                build_attention(attention, width, head_channels=head_channels, softmax_tokens=softmax_tokens)
            )
        self.to_rgb = ToRGB(width, norm, patch) if rgb_leaves else None

    @property
    def reach(self) -> int | None:
        """How many pixels away the output depends on what enters at this resolution; None: on all of it."""
        if isinstance(self.branch, TransformerBranch) or not self.local:
            return None
        layers = [*self.blocks, *(self.branch.blocks if isinstance(self.branch, ResidualBranch) else [])]
        if not all(isinstance(layer, ResidualBlock | nn.Identity) for layer in layers):
            return None
        return sum(2 for layer in layers if isinstance(layer, ResidualBlock))

    def forward(self, h: Tensor | None, latent: Tensor | None, step: Step | None) -> tuple[Tensor, Tensor | None]:
        """(output of the coarser level or None, this level's latent or None) -> (features, features of RGB or None).

        With `step`, h and the latent are cut, and only this level's windows are computed.
        """
        if h is not None and self.up is not None:
            h = self.up(h) if step is None else step.above(self.up(step.below(h)))
        if self.branch is not None and latent is not None:
            entering = self.branch(latent if step is None else step.latent(latent))
            h = entering if h is None else h + entering
        assert h is not None, "the coarsest level always has a latent"
        h = self.blocks(h)
        return h, None if self.to_rgb is None else self.to_rgb.features(h)


class ShuffleLevel(nn.Module):
    """A resolution finer than the patches that the decoder ends with: their pixels are spread out, nothing is
    computed."""

    reach = 0
    to_rgb = nn.Identity()

    def forward(self, h: Tensor, latent: None, step: Step | None) -> tuple[Tensor, Tensor | None]:
        """(3 p^2 values a position) -> (3 p^2 / 4 values twice as fine, the same where these are pixels)."""
        h = F.pixel_shuffle(h, 2) if step is None else step.above(F.pixel_shuffle(step.below(h), 2))
        return h, h if h.shape[1] == 3 else None
