"""How far two sets of images are apart in the features of the Inception network: Frechet and kernel distance.

Both depend on the number of images, the network and how images are resized: report all three. The Frechet distance
(FID) is biased upwards, much below ten thousand images; the kernel distance (KID) is not.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pyramid_ldm.errors import UserError

Floats = NDArray[np.float64]


class Inception:
    """The Inception network of December 2015 as TorchScript, whose features FID is defined on: 2048 an image.

    Takes StyleGAN2-ADA's file, which scales pixels itself and knows `return_features`, and plain ones that expect
    (pixel - 128) / 128.

    Args:
        path: `inception-2015-12-05.pt`. UserError where it cannot be loaded.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file; give the TorchScript Inception network, inception-2015-12-05.pt")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript itself; the weights exist in no other form
                self.network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise UserError(f"{path}: is not a TorchScript network ({str(error).splitlines()[0]})") from None
        self.device = device
        self.scales = "return_features" in {argument.name for argument in self.network.forward.schema.arguments}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2048). Quantised to 8 bits, resized to 299x299 with anti-aliasing."""
        whole = (images.float().clamp(-1, 1) * 127.5 + 127.5).round()
        if whole.shape[2:] != (299, 299):
            whole = F.interpolate(whole, size=(299, 299), mode="bicubic", antialias=True, align_corners=False)
        whole = whole.clamp(0, 255).round().to(self.device)
        features: Tensor = (
            self.network(whole.to(torch.uint8), return_features=True)
            if self.scales
            else self.network((whole - 128) / 128)
        )
        return features.float().cpu()


@dataclass
class Moments:
    """Mean and covariance of features, a batch at a time."""

    count: int = 0
    total: Floats = field(default_factory=lambda: np.zeros(0))
    products: Floats = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, features: Tensor) -> None:
        """(B, D)."""
        rows = features.double().numpy()
        if self.count == 0:
            self.total, self.products = np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2)
        self.count += len(rows)
        self.total += rows.sum(axis=0)
        self.products += rows.T @ rows

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> "Moments":
        """Of all batches."""
        moments = cls()
        for batch in batches:
            moments.add(batch)
        return moments

    @property
    def mean(self) -> Floats:
        """(D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Floats:
        """(D, D), unbiased. ValueError with fewer than two images."""
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance; give at least two")
        return (self.products - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, equation 6)."""
    first, second = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    # (C_a C_b)^(1/2) has the trace of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric.
    mixed = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    return float(np.square(a.mean - b.mean).sum() + np.trace(first) + np.trace(second) - 2 * mixed)


def kernel_distance(a: Tensor, b: Tensor, *, paired: bool = False) -> float:
    """Unbiased squared maximum mean discrepancy of features (N, D) and (M, D) under the kernel (x y / D + 1)^3
    (Binkowski et al. 2018), of all images at once. May be slightly negative.

    Args:
        paired: row i of both is of the same image, as with reconstructions and their originals. The two sets are then
            not independent, and these pairs would make the distance too small: they are left out.
    """
    x, y = a.double(), b.double()
    within = sum(_kernel_sum(p, p, diagonal=False) / (len(p) * (len(p) - 1)) for p in (x, y))
    if paired:
        return within - 2 * _kernel_sum(x, y, diagonal=False) / (len(x) * (len(x) - 1))
    return within - 2 * _kernel_sum(x, y, diagonal=True) / (len(x) * len(y))


def _kernel_sum(x: Tensor, y: Tensor, *, diagonal: bool) -> float:
    """The sum of (x_i y_j / D + 1)^3, with or without i = j, a block of rows at a time."""
    total = 0.0
    for start in range(0, len(x), 1024):
        values = (x[start : start + 1024] @ y.T / x.shape[1] + 1) ** 3
        total += float(values.sum())
        if not diagonal:
            total -= float(values[:, start:].diagonal().sum())
    return total
