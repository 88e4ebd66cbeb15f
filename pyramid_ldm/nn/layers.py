"""Convolutions, spectral norm, group norm and the decreasing dropout schedule."""

import math
from copy import deepcopy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyramid_ldm.nn import spectral
from pyramid_ldm.nn.pixel_norm import PixelNorm
from pyramid_ldm.nn.spectral import SpectralNorm, full_precision

Layer = TypeVar("Layer", bound=nn.Conv2d | nn.Linear)
Model = TypeVar("Model", bound=nn.Module)


class Conv2d(nn.Conv2d):
    """A convolution that is one matrix product where a CPU runs it on few positions (the library would spend most of
    such a call on bringing the weight into another layout), and at 1x1, where all else is padding, its centre."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        three = weight.shape[2] == 3
        if three and x.shape[2] == x.shape[3] == 1:
            return F.linear(x.flatten(1), weight[:, :, 1, 1], bias)[:, :, None, None]
        few = 256 if x.dtype == torch.bfloat16 else 16  # positions of all images; float32 products are slower
        few_here = three and x.shape[0] * x.shape[2] * x.shape[3] <= few
        if few_here and x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # (B, C, H, W, 3, 3)
            rows = patches.permute(0, 2, 3, 4, 5, 1).flatten(3)  # (B, H, W, 9C): as a weight, channels last
            return F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)
        return super()._conv_forward(x, weight, bias)


class SpectralConv2d(Conv2d):
    """A convolution with a normalised weight; plain once `fold_spectral_norm` has removed `spectral`."""

    spectral: SpectralNorm | None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.spectral is None else self.spectral(self.weight)
        return self._conv_forward(x, weight, self.bias)


class SpectralLinear(nn.Linear):
    """A linear layer with a normalised weight; plain once `fold_spectral_norm` has removed `spectral`."""

    spectral: SpectralNorm | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.spectral is None else self.spectral(self.weight), self.bias)


def spectral_layers(model: nn.Module) -> list[tuple[SpectralConv2d | SpectralLinear, SpectralNorm]]:
    """Every normalised layer and its norm."""
    return [
        (module, module.spectral)
        for module in model.modules()
        if isinstance(module, SpectralConv2d | SpectralLinear) and module.spectral is not None
    ]


def advance_spectral_norm(model: nn.Module, iterations: int = 1) -> None:
    """Every norm's vectors follow their weight; called once per optimizer step."""
    spectral.advance([(layer.weight, norm) for layer, norm in spectral_layers(model)], iterations)


@torch.no_grad()
def fold_spectral_norm(model: nn.Module, iterations: int = 0) -> None:
    """Replaces every normalised weight by its value, after `iterations` of `advance`, with the gain that follows it; in
    place."""
    layers = [pair for pair in spectral_layers(model) if pair[0].weight.device.type != "meta"]
    if iterations:
        spectral.advance([(layer.weight, norm) for layer, norm in layers], iterations)
    for layer, norm in layers:
        layer.weight.copy_(norm(layer.weight))
    for layer, _ in spectral_layers(model):
        layer.spectral = None
    for module in model.modules():
        if isinstance(module, ZeroConv2d) and module.gain is not None:
            assert module.conv.bias is not None
            module.conv.weight.mul_(module.gain[..., None])
            module.conv.bias.mul_(module.gain.flatten())
            module.gain = None


def conv2d(inputs: int, outputs: int, kernel: int = 3, *, spectral_norm: bool = False) -> nn.Conv2d:
    """Size-preserving convolution, Xavier-uniform, zero bias (NCSN++: variance scaling, fan_avg)."""
    kind = SpectralConv2d if spectral_norm else Conv2d
    return _initialised(kind(inputs, outputs, kernel, padding=kernel // 2))


class Float32Conv2d(nn.Conv2d):
    """A convolution in float32, whatever surrounds it: for what bfloat16 would spoil."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x.device):
            return super().forward(x.to(self.weight.dtype))


def float32_conv2d(inputs: int, outputs: int, kernel: int = 3) -> Float32Conv2d:
    """As `conv2d`."""
    return _initialised(Float32Conv2d(inputs, outputs, kernel, padding=kernel // 2))


def to_bfloat16(model: Model) -> Model:
    """A copy for inference under bfloat16 autocast, channels last, whose convolutions and linear layers hold bfloat16
    weights already: autocast would convert each of them at every call. `Float32Conv2d` and everything else stays as it
    is. No float32 copy is made on the way, unless spectral norm has to be folded first."""
    if spectral_layers(model):
        copy = deepcopy(model)
        fold_spectral_norm(copy)
        return to_bfloat16(copy)
    weights = {id(p): nn.Parameter(in_bfloat16(p), requires_grad=False) for p in bfloat16_weights(model)}
    return deepcopy(model, weights).requires_grad_(False).to(memory_format=torch.channels_last)


def cast_to_bfloat16(model: nn.Module) -> None:
    """`to_bfloat16` in place, for any model without spectral norm."""
    for parameter in bfloat16_weights(model):
        parameter.requires_grad_(False)
        parameter.data = in_bfloat16(parameter)


def bfloat16_weights(model: nn.Module) -> list[nn.Parameter]:
    """Those that bfloat16 does no harm."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not isinstance(module, Float32Conv2d)
        for parameter in module.parameters(recurse=False)
    ]


def in_bfloat16(parameter: Tensor) -> Tensor:
    """Channels last, where it has as many dimensions."""
    layout = torch.channels_last if parameter.ndim == 4 else torch.preserve_format
    return parameter.detach().to(torch.bfloat16, memory_format=layout)


def linear(inputs: int, outputs: int, *, spectral_norm: bool = False) -> nn.Linear:
    """Linear layer, Xavier-uniform, zero bias."""
    return _initialised((SpectralLinear if spectral_norm else nn.Linear)(inputs, outputs))


def _initialised(layer: Layer) -> Layer:
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    if isinstance(layer, SpectralConv2d | SpectralLinear):
        layer.spectral = SpectralNorm(layer.weight)
    return layer


class ZeroConv2d(nn.Module):
    """A convolution whose output is zero at the start of training.

    Plain: zero weights. Under spectral norm, which cannot normalise zero weights, an ordinary normalised convolution
    followed by a learned per-channel gain that starts at zero.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, spectral_norm: bool = False) -> None:
        super().__init__()
        self.conv = conv2d(inputs, outputs, kernel, spectral_norm=spectral_norm)
        if spectral_norm:
            self.gain: nn.Parameter | None = nn.Parameter(torch.zeros(outputs, 1, 1))
        else:
            self.gain = None
            nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if self.gain is None:
            y: Tensor = conv(x)
            return y
        # On the weight: the output may be thousands of times as large.
        weight = conv.spectral(conv.weight) if isinstance(conv, SpectralConv2d) and conv.spectral else conv.weight
        assert conv.bias is not None
        return conv._conv_forward(x, weight * self.gain[..., None], conv.bias * self.gain.flatten())


def group_norm(channels: int) -> nn.GroupNorm:
    """NCSN++'s: min(C / 4, 32) groups, so at least four channels a group, or 1x1 levels would be normalised to zero."""
    groups = min(channels // 4, 32)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=1e-6)


def build_norm(kind: str, channels: int) -> nn.Module:
    """ "pixel": `PixelNorm`, which is local in space; "none": no norm; "group": `group_norm`, which sees the whole
    image."""
    if kind == "none":
        return nn.Identity()
    return PixelNorm(channels) if kind == "pixel" else group_norm(channels)


def rescaled_sum(a: Tensor, b: Tensor) -> Tensor:
    """(a + b) / sqrt 2: keeps unit variance (NCSN++'s skip_rescale)."""
    return (a + b).mul_(math.sqrt(0.5))


def dropout_schedule(levels: int, highest: float, schedule: str = "decreasing") -> list[float]:
    """Dropout per level, lowest resolution first.

    Args:
        schedule: "decreasing": from `highest` linearly to 0 (PDM section 3.3, "Concept Aliasing"), so that one level
            alone, being the highest resolution, gets 0; "increasing": the reverse; "uniform": `highest` everywhere.
    """
    if schedule == "uniform":
        return [highest] * levels
    if levels == 1:
        return [0.0]
    rates = [highest * (1 - level / (levels - 1)) for level in range(levels)]
    return rates if schedule == "decreasing" else rates[::-1]
