"""RMS norm over the channels of each pixel, fused with the SiLU that follows it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 20  # values normalised at once on a CPU: 4 MiB of float32, which its caches hold
GPU_CHUNK = 1 << 25  # and in the backward pass elsewhere: half a dozen float32 temporaries of 128 MiB each


class PixelNorm(nn.Module):
    """RMS over the channels of each pixel with a learned scale: strictly local in space (as in DC-AE)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape, channels last in memory."""
        # Channels last in memory, so the permuted view is contiguous and the fused kernel applies.
        last = x.permute(0, 2, 3, 1)
        return F.rms_norm(last, (x.shape[1],), self.weight.to(x.dtype), self.eps).permute(0, 3, 1, 2)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)). For `PixelNorm`, only x is kept for the backward pass, which computes the rest again; on a CPU
    the work goes through the caches in chunks, in float32, three times faster than one operation after the other."""
    if not isinstance(norm, PixelNorm) or torch.compiler.is_compiling():
        return F.silu(norm(x))
    result: Tensor = _NormSiLU.apply(x.permute(0, 2, 3, 1).contiguous(), norm.weight, norm.eps)
    return result.permute(0, 3, 1, 2)


class _NormSiLU(torch.autograd.Function):
    """On x (..., C), contiguous, with a scale (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        if x.device.type != "cpu":
            return F.silu(F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps))
        out = torch.empty_like(x)
        for part, result in zip(chunks(x), chunks(out), strict=True):
            values = part.to(torch.promote_types(x.dtype, torch.float32), copy=True)
            result.copy_(F.silu(values.mul_(_inverse_rms(values, eps)).mul_(weight), inplace=True))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        wide = torch.promote_types(x.dtype, torch.float32)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        gradient = gradient.contiguous()
        for part, dy, result in zip(chunks(x), chunks(gradient), chunks(dx), strict=True):
            values = part.to(wide)
            inverse = _inverse_rms(values, ctx.eps)
            unit = values * inverse
            scaled = torch.ops.aten.silu_backward(dy.to(wide), unit * weight)
            dweight += (scaled * unit).sum(dim=0)
            scaled *= weight
            towards = torch.linalg.vecdot(scaled, unit)[:, None] / x.shape[-1]
            result.copy_(scaled.addcmul_(unit, towards, value=-1).mul_(inverse))
        return dx, dweight.to(weight.dtype), None


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """(..., C) as (pixels, C) in parts that the caches hold."""
    channels = x.shape[-1]
    size = CHUNK if x.device.type == "cpu" else GPU_CHUNK
    return x.view(-1, channels).split(max(1, size // channels))


def _inverse_rms(values: Tensor, eps: float) -> Tensor:
    norms = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return norms.square_().div_(values.shape[-1]).add_(eps).rsqrt_()
