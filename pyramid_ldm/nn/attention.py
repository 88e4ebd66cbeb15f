"""Spatial-channel attention (PDM section 3.3, equation 8) and linear attention.

Each kind maps q, k, v of shape (B, C, H, W) to features of the same shape; `SpatialChannelAttention` and
`LinearAttention` put norm, projections and the residual sum around them.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyramid_ldm.nn.layers import ZeroConv2d, conv2d, group_norm, rescaled_sum


def spatial_weight(positions: int, channels: int) -> float:
    """Weight of the spatial half in equation 8, HW / (HW + C); the channel half has the rest."""
    return positions / (positions + channels)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax over the H * W positions: O((HW)^2)."""
    height = q.shape[2]
    q, k, v = (rearrange(x, "b (n c) h w -> b n (h w) c", n=heads) for x in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        mixed = _by_rows(q, k, v)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v)
    return rearrange(mixed, "b n (h w) c -> b (n c) h w", h=height)


def _by_rows(q: Tensor, k: Tensor, v: Tensor, rows: int = 512) -> Tensor:
    """Softmax attention, a block of queries at a time: on a CPU, bfloat16 matrix products are over twice as fast as
    PyTorch's fused kernel, which multiplies in smaller blocks."""
    q = q * q.shape[-1] ** -0.5
    return torch.cat([(part @ k.transpose(-1, -2)).softmax(dim=-1) @ v for part in q.split(rows, dim=2)], dim=2)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax of k over positions and of q over channels, so that k^T v comes first: O(HW) (Shen et al. 2021)."""
    height = q.shape[2]
    q, k, v = (rearrange(x, "b (n c) h w -> b n c (h w)", n=heads) for x in (q, k, v))
    context = torch.einsum("bncp,bndp->bncd", k.softmax(dim=-1), v)
    mixed = torch.einsum("bncd,bncp->bndp", context, q.softmax(dim=-2))
    return rearrange(mixed, "b n c (h w) -> b (n c) h w", h=height)


def channel_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax over the C x C affinity of channels.

    q and k are RMS-normalised over the channels of each pixel and their product is a mean over positions, so the
    affinity does not depend on the image's size and has a finite gradient at 1x1 (an L2 norm over one position
    would be sign(q)).
    """
    height = q.shape[2]
    q, k, v = (rearrange(x, "b c h w -> b c (h w)") for x in (q, k, v))
    q, k = (x * torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + eps).to(x.dtype) for x in (q, k))
    affinity = torch.einsum("bcp,bdp->bcd", q, k) * (temperature / q.shape[-1])
    return rearrange(affinity.softmax(dim=-1) @ v, "b c (h w) -> b c h w", h=height)


class SpatialChannelAttention(nn.Module):
    """F = HW/(HW+C) * F_spatial + C/(HW+C) * F_channel, both from one GroupNorm and one q, k, v (PDM equation 8).

    Args:
        channels: C.
        kind: "spatial_channel", or one half alone with weight 1: "spatial", "channel".
        head_channels: channels of a spatial head; 0 for one head.
        softmax_tokens: above this many positions the spatial half is linear attention (a warning says so).
        spectral_norm: normalise all four projections.
        rescale: (x + attention) / sqrt 2, as NCSN++ does, instead of x + attention.

    The output projection starts at zero, so a new module is the identity (up to `rescale`).
    """

    def __init__(
        self,
        channels: int,
        *,
        kind: str = "spatial_channel",
        head_channels: int = 64,
        softmax_tokens: int = 4096,
        spectral_norm: bool = False,
        rescale: bool = False,
    ) -> None:
        super().__init__()
        self.kind, self.rescale, self.softmax_tokens = kind, rescale, softmax_tokens
        self.heads = head_count(channels, head_channels)
        self.norm = group_norm(channels)
        self.query, self.key, self.value = (
            conv2d(channels, channels, 1, spectral_norm=spectral_norm) for _ in range(3)
        )
        self.output = ZeroConv2d(channels, channels, 1, spectral_norm=spectral_norm)
        self.temperature = nn.Parameter(torch.ones(())) if kind in ("spatial_channel", "channel") else None

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        mixed = self.output(self.mix(self.query(normed), self.key(normed), self.value(normed)))
        return rescaled_sum(x, mixed) if self.rescale else x + mixed

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention proper; (B, C, H, W) in and out."""
        match self.kind:
            case "spatial":
                return self.spatial(q, k, v)
            case "channel":
                return self.channel(q, k, v)
            case _:
                weight = spatial_weight(q.shape[2] * q.shape[3], q.shape[1])
                return weight * self.spatial(q, k, v) + (1 - weight) * self.channel(q, k, v)

    def spatial(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """F_spatial."""
        tokens = q.shape[2] * q.shape[3]
        if tokens <= self.softmax_tokens:
            return softmax_attention(q, k, v, self.heads)
        warnings.warn(
            f"{tokens} positions exceed softmax_tokens={self.softmax_tokens}: the spatial half is linear attention",
            stacklevel=2,
        )
        return linear_attention(q, k, v, self.heads)

    def channel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """F_channel."""
        assert self.temperature is not None
        return channel_attention(q, k, v, self.temperature)


class LinearAttention(nn.Module):
    """x + output(linear attention), the encoder's light kind (PDM section 3.3, "On AutoEncoder")."""

    def __init__(self, channels: int, *, head_channels: int = 64, spectral_norm: bool = False) -> None:
        super().__init__()
        self.heads = head_count(channels, head_channels)
        self.norm = group_norm(channels)
        self.query_key_value = conv2d(channels, 3 * channels, 1, spectral_norm=spectral_norm)
        self.output = ZeroConv2d(channels, channels, 1, spectral_norm=spectral_norm)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(self.norm(x)).chunk(3, dim=1)
        return x + self.output(linear_attention(q, k, v, self.heads))


def head_count(channels: int, head_channels: int) -> int:
    """Heads of at most `head_channels` channels that divide `channels` evenly; one head for 0."""
    heads = 1 if head_channels == 0 else max(1, math.ceil(channels / head_channels))
    while channels % heads:
        heads += 1
    return heads


def build_attention(
    kind: str,
    channels: int,
    *,
    head_channels: int,
    softmax_tokens: int = 4096,
    spectral_norm: bool = False,
    rescale: bool = False,
) -> nn.Module:
    """The module of one kind; "none" is the identity."""
    match kind:
        case "none":
            return nn.Identity()
        case "linear":
            return LinearAttention(channels, head_channels=head_channels, spectral_norm=spectral_norm)
        case _:
            return SpatialChannelAttention(
                channels,
                kind=kind,
                head_channels=head_channels,
                softmax_tokens=softmax_tokens,
                spectral_norm=spectral_norm,
                rescale=rescale,
            )
