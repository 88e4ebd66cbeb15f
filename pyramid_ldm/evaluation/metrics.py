"""How near two images are, and how far an encoder carries a small change."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pyramid_ldm.data.images import to_pil, to_tensor
from pyramid_ldm.pyramid import Pyramid, flatten


def psnr(image: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of images (B, 3, H, W) in [-1, 1] (peak to peak 2)."""
    error = (image.float() - target.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """Structural similarity, (B,), of images (B, C, H, W) in [-1, 1] (Wang et al. 2004): an 11x11 Gaussian window of
    sigma 1.5, K = (0.01, 0.03), no padding, mean over channels."""
    offsets = torch.arange(11, device=image.device) - 5
    weights = torch.exp(-offsets.float().square() / (2 * 1.5**2))
    window = torch.outer(weights, weights)
    channels = image.shape[1]
    kernel = (window / window.sum()).expand(channels, 1, 11, 11)
    x, y = ((z.float() + 1) / 2 for z in (image, target))  # the luminance term compares means: of light, black is zero

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, kernel, groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.flatten(1).mean(dim=1)


def periodic_error(image: Tensor, target: Tensor, period: int = 16) -> Tensor:
    """How much of the error repeats every `period` pixels or a whole part of that, (B,): 1 for none, more for the
    hatching that patches, pixel shuffles and GANs leave.

    The power of the error at these frequencies, horizontal and vertical, over the power at the next ones (a ratio of
    means over frequencies; 1 where nothing differs). Images are (B, C, H, W), cut to multiples of the period, which is
    halved until at least four fit in a side.
    """
    while min(image.shape[2:]) < 4 * period:
        period //= 2
    if period < 2:
        raise ValueError(f"images of {image.shape[2]}x{image.shape[3]} are too small for a period")
    height, width = (side - side % period for side in image.shape[2:])
    error = (image.double() - target.double())[..., :height, :width]
    power = torch.fft.fft2(error).abs().square().sum(dim=1)
    at, beside = torch.zeros(len(error), 2, dtype=power.dtype, device=power.device).unbind(1)
    for profile in (power.mean(dim=1), power.mean(dim=2)):  # over vertical frequencies, over horizontal ones
        side = profile.shape[1]
        peaks = torch.arange(1, period, device=power.device) * (side // period)
        at = at + profile[:, peaks].mean(dim=1)
        beside = beside + (profile[:, peaks - 1] + profile[:, peaks + 1]).mean(dim=1) / 2
    return torch.where(beside > 0, at / beside, 1.0).float()


def bicubic(images: Tensor, values: int) -> Tensor:
    """(N, 3, H, W) in [-1, 1] reduced by bicubic resampling to at most `values` values each, and enlarged again: what
    an autoencoder of as many latent values has to beat."""
    height, width = images.shape[2:]
    scale = math.sqrt(values / (3 * height * width))
    small = (max(1, math.floor(width * scale)), max(1, math.floor(height * scale)))
    reduced = (to_pil(image).resize(small, Image.Resampling.BICUBIC) for image in images)
    return torch.stack([to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC)) for picture in reduced])


def local_lipschitz(encode: Callable[[Tensor], Pyramid], images: Tensor, size: float = 1e-2) -> Tensor:
    """||E(x + d) - E(x)|| / ||d|| for one random d of RMS `size` an image, (B,).

    PDM (section 3.3) says that spectral norm keeps this below 1. It need not: residual sums and attention are not
    1-Lipschitz, and a convolution's norm is not its reshaped matrix's. So it is measured.
    """
    change = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device) * size
    moved = flatten(encode(images + change)) - flatten(encode(images))
    return moved.float().norm(dim=1) / change.flatten(1).norm(dim=1)
