"""Residual blocks: BigGAN's for both networks, a re-sampling step for the autoencoder, a transformer block."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyramid_ldm.nn.attention import head_count
from pyramid_ldm.nn.layers import ZeroConv2d, build_norm, conv2d, linear, rescaled_sum
from pyramid_ldm.nn.pixel_norm import norm_silu

Resample = Callable[[Tensor], Tensor]


class ResidualBlock(nn.Module):
    """BigGAN's residual block as NCSN++ has it: norm, SiLU, 3x3; norm, SiLU, dropout, 3x3; (shortcut + h) / sqrt 2.

    Args:
        inputs, outputs: channels.
        embedding: width of the time embedding added after the first convolution; 0 for none.
        resample: halves or doubles the resolution of both paths (after the first SiLU, and of the shortcut).
        dropout: probability.
        spectral_norm: normalise every convolution and linear layer.
        norm: "group"; "pixel" or "none", with which the block sees 5x5 pixels and no more. Without norms the sum is
            not divided by sqrt 2: features would fade, block by block.
        zero_init: the second convolution's output starts at zero.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        embedding: int = 0,
        resample: Resample | None = None,
        dropout: float = 0.0,
        spectral_norm: bool = False,
        norm: str = "group",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.rescale = norm != "none"
        self.norm1 = build_norm(norm, inputs)
        self.conv1 = conv2d(inputs, outputs, spectral_norm=spectral_norm)
        self.embedding = linear(embedding, outputs, spectral_norm=spectral_norm) if embedding else None
        self.norm2 = build_norm(norm, outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2: nn.Module = (
            ZeroConv2d(outputs, outputs, spectral_norm=spectral_norm)
            if zero_init
            else conv2d(outputs, outputs, spectral_norm=spectral_norm)
        )
        plain = inputs == outputs and resample is None
        self.shortcut = nn.Identity() if plain else conv2d(inputs, outputs, 1, spectral_norm=spectral_norm)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = norm_silu(self.norm1, x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        if self.embedding is not None:
            assert embedding is not None
            h = h + self.embedding(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(norm_silu(self.norm2, h)))
        x = self.shortcut(x)
        return rescaled_sum(x, h) if self.rescale else x + h


class Resampling(nn.Module):
    """The autoencoder's step between two resolutions: norm, SiLU, re-sample, 3x3; with `residual`, a re-sampled 1x1
    shortcut is added and the sum divided by sqrt 2 (PDM figure 4, middle and right).

    `gathered`: by how much re-sampling multiplies channels; convolutions then see them all.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        resample: Resample,
        *,
        residual: bool,
        spectral_norm: bool = False,
        norm: str = "pixel",
        gathered: int = 1,
    ) -> None:
        super().__init__()
        self.resample, self.gathered, self.rescale = resample, gathered, norm != "none"
        self.norm = build_norm(norm, inputs)
        self.conv = conv2d(inputs * gathered, outputs, spectral_norm=spectral_norm)
        self.shortcut = conv2d(inputs * gathered, outputs, 1, spectral_norm=spectral_norm) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv(self.resample(norm_silu(self.norm, x)))
        if self.shortcut is None:
            return h
        # On the way up the 1x1 convolution comes first, at a quarter of the positions.
        past = self.shortcut(self.resample(x)) if self.gathered > 1 else self.resample(self.shortcut(x))
        return rescaled_sum(past, h) if self.rescale else past + h


class TransformerBlock(nn.Module):
    """A pre-norm ViT block over the positions of (B, C, H, W): attention with heads of `head_channels`, then an MLP."""

    def __init__(self, channels: int, *, head_channels: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = head_count(channels, head_channels)
        self.norm1 = nn.LayerNorm(channels)
        self.query_key_value = linear(channels, 3 * channels)
        self.output = linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(linear(channels, 4 * channels), nn.GELU(), linear(4 * channels, channels))
        self.dropout = nn.Dropout(dropout)
        # As every residual branch here: a new block is the identity.
        nn.init.zeros_(self.output.weight)
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        tokens = rearrange(x, "b c h w -> b (h w) c")
        q, k, v = rearrange(self.query_key_value(self.norm1(tokens)), "b p (t n c) -> t b n p c", t=3, n=self.heads)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b n p c -> b p (n c)")
        tokens = tokens + self.dropout(self.output(mixed))
        tokens = tokens + self.dropout(self.mlp(self.norm2(tokens)))
        return rearrange(tokens, "b (h w) c -> b c h w", h=height)


def position_encoding(channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """2-D sine-cosine positions, (1, C, H, W), C a multiple of 4: half the channels for rows, half for columns."""
    quarter = channels // 4
    frequency = 10_000 ** (-torch.arange(quarter, device=device) / quarter)
    rows = torch.arange(height, device=device)[:, None] * frequency  # (H, C/4)
    columns = torch.arange(width, device=device)[:, None] * frequency  # (W, C/4)
    rows = torch.cat([rows.sin(), rows.cos()], dim=1).T[:, :, None].expand(-1, height, width)
    columns = torch.cat([columns.sin(), columns.cos()], dim=1).T[:, None, :].expand(-1, height, width)
    return torch.cat([rows, columns])[None]
