"""The latent pyramid: a tuple of levels ordered coarse to fine, level i of shape (B, C_i, H / f_i, W / f_i).

A level is named by its *factor* f (image pixels per latent pixel), never by a pixel size, so that a 2048x1024 image
works as a 2048x2048 one does (PDM section 3.3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_ldm.errors import UserError
from pyramid_ldm.randomness import normal

Pyramid = tuple[Tensor, ...]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Level:
    """One level of the pyramid."""

    factor: int  # image pixels per latent pixel, a power of two
    channels: int

    def shape(self, image_size: Sequence[int]) -> Shape:
        """(channels, height, width) of this level for an image of `image_size` (height, width)."""
        height, width = image_size
        if height % self.factor or width % self.factor:
            raise UserError(
                f"image_size {height}x{width} cannot be divided by the latent factor {self.factor}: "
                f"both sides must be multiples of the largest factor"
            )
        return self.channels, height // self.factor, width // self.factor


def level_shapes(levels: Sequence[Level], image_size: Sequence[int]) -> list[Shape]:
    """Shape (C, H, W) of each level, coarse to fine."""
    return [level.shape(image_size) for level in levels]


def latent_values(levels: Sequence[Level], image_size: Sequence[int]) -> int:
    """Values of all levels of one image."""
    return sum(math.prod(shape) for shape in level_shapes(levels, image_size))


def compression_ratio(levels: Sequence[Level], image_size: Sequence[int]) -> float:
    """Values of an RGB image per value of its latents: 256.0 means 1:256 (PDM section 1)."""
    height, width = image_size
    return 3 * height * width / latent_values(levels, image_size)


def flatten(pyramid: Pyramid) -> Tensor:
    """(B, D): every level in C, H, W order, coarse to fine; the layout of a cached record."""
    return torch.cat([level.flatten(1) for level in pyramid], dim=1)


def unflatten(flat: Tensor, shapes: Sequence[Shape]) -> Pyramid:
    """The inverse of `flatten`. Raises ValueError where the width does not match the shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    if flat.shape[1] != sum(sizes):
        raise ValueError(f"{flat.shape[1]} values a sample, but the levels {list(shapes)} hold {sum(sizes)}")
    return tuple(part.unflatten(1, shape) for part, shape in zip(flat.split(sizes, dim=1), shapes, strict=True))


def pyramid_noise(shapes: Sequence[Shape], seed: int, purpose: str, indices: Sequence[int]) -> Pyramid:
    """Independent standard normal noise for each sample and level, (B, C, H, W) a level, on the CPU.

    Sample k depends on (seed, purpose, indices[k], level) alone: not on the batch it is drawn in.
    """
    return tuple(
        torch.stack([normal(shape, seed, purpose, index, level) for index in indices])
        for level, shape in enumerate(shapes)
    )


@dataclass(frozen=True)
class LatentScaling:
    """Per-level, per-channel affine map between raw latents and what the flow network sees (PDM section 4.1).

    `mean[i]` and `std[i]` hold C_i values: scaled = (raw - mean) / std. All zeros and ones for "no scaling".
    """

    mean: tuple[tuple[float, ...], ...]
    std: tuple[tuple[float, ...], ...]

    def scale(self, raw: Pyramid) -> Pyramid:
        """Raw latents to the flow's space; shapes unchanged."""
        return tuple((z - self._row(m, z)) / self._row(s, z) for z, m, s in zip(raw, self.mean, self.std, strict=True))

    def unscale(self, scaled: Pyramid) -> Pyramid:
        """The flow's space back to raw latents; shapes unchanged."""
        return tuple(z * self._row(s, z) + self._row(m, z) for z, m, s in zip(scaled, self.mean, self.std, strict=True))

    def to_dict(self) -> dict[str, list[list[float]]]:
        """Plain lists, for JSON."""
        return {"mean": [list(level) for level in self.mean], "std": [list(level) for level in self.std]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[Sequence[float]]]) -> "LatentScaling":
        """The inverse."""
        return cls(*(tuple(tuple(level) for level in values[name]) for name in ("mean", "std")))

    @staticmethod
    def _row(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
