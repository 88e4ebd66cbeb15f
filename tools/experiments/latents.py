"""What a latent pyramid looks like to stage two: spread, and how much of it is predictable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.data.folder import find_images
from pyramid_ldm.data.images import normalise
from pyramid_ldm.data.photographs import Photographs, Preprocessing
from pyramid_ldm.pyramid import Pyramid


def predictability(latents: Pyramid) -> list[float | None]:
    """For each level, the share of its variance that a linear regression explains from every coarser level (at the
    same place) and from the left and upper neighbours: fitted on even images, measured on odd ones. 0: news to stage
    two; 1: redundant; None: nothing to predict it from."""
    found: list[float | None] = []
    for i, level in enumerate(latents):
        height, width = level.shape[2:]
        sources = [F.interpolate(coarse, size=(height, width), mode="nearest") for coarse in latents[:i]]
        padded = F.pad(level - level.mean(dim=(0, 2, 3), keepdim=True), (1, 0, 1, 0))
        sources += [padded[:, :, 1:, :-1], padded[:, :, :-1, 1:]] if height * width > 1 else []
        found.append(explained(torch.cat(sources, dim=1), level) if sources else None)
    return found


def explained(features: Tensor, targets: Tensor) -> float:
    """R^2 of ridge regression, position by position, both (N, C, H, W); at least 0."""

    def rows(x: Tensor) -> Tensor:
        return x.double().permute(0, 2, 3, 1).flatten(0, 2)

    x, y, x_test, y_test = (rows(part) for part in (features[::2], targets[::2], features[1::2], targets[1::2]))
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, x_test = x - x_mean, x_test - x_mean
    ridge = 1e-3 * x.square().mean() * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y_mean))
    residual = (y_test - y_mean - x_test @ weights).square().sum()
    return max(0.0, float(1 - residual / (y_test - y_test.mean(dim=0)).square().sum()))


@torch.inference_mode()
def latent_statistics(model: PyramidAutoencoder, images: Tensor) -> dict[str, Any]:
    """Of the posteriors of images (N, 3, H, W): standard deviation of each level's means, the posterior's own, and
    predictability."""
    posteriors = [model.encode(batch) for batch in images.split(16)]
    means: Pyramid = tuple(torch.cat(level) for level in zip(*(p.mean for p in posteriors), strict=True))
    own = [0.0] * len(means)
    if posteriors[0].log_variance is not None:
        levels = zip(*(p.log_variance or () for p in posteriors), strict=True)
        own = [float((0.5 * torch.cat(level)).exp().mean()) for level in levels]
    return {
        "latent_std": [float(level.std()) for level in means],
        "posterior_std": own,
        "predictable": predictability(means),
    }


def crops(folder: str, size: Sequence[int], count: int, zoom: float) -> Tensor:
    """`count` random crops of a folder's images."""
    files = find_images(Path(folder))
    photographs = Photographs(files, Preprocessing((size[0], size[1]), "random", zoom), seed=1)
    return torch.stack([normalise(photographs[i][0]) for i in range(count)])
