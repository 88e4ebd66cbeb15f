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
from pyramid_ldm.randomness import generator, normal

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


LARGEST_BLOCK = 16  # pixels a side of the blocks that a linear base transforms


def base_block(factor: int, patch: int) -> tuple[int, int]:
    """Of a linear base for a latent at `factor`: (pixels a side that are averaged first, of these a side of a block). A
    block is a latent's position; patches of the decoder are never finer than what is averaged."""
    averaged = max(patch, factor // LARGEST_BLOCK)
    return averaged, factor // averaged


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


def flat_noise(
    shapes: Sequence[Shape], seed: int, purpose: str, indices: Sequence[int], device: torch.device | str = "cpu"
) -> Pyramid:
    """Independent standard normal noise for each sample and level, (B, C, H, W) a level, drawn on `device`, all levels
    of a sample at once; sample k depends on (seed, purpose, indices[k]) and the kind of device alone."""
    width = sum(math.prod(shape) for shape in shapes)
    rows = [
        torch.randn(width, generator=generator(seed, purpose, index, device=device), device=device) for index in indices
    ]
    return unflatten(torch.stack(rows), shapes)


def sinc_shared(noise: Pyramid) -> Pyramid:
    """The finest level's noise at every level: low-passed to a coarser one's band, of unit deviation and white in it
    (Layered Diffusion, section 3.2; interpolated noise would be fainter, and not white).

    Raises ValueError where levels differ in channels.
    """
    finest = noise[-1]
    if any(level.shape[1] != finest.shape[1] for level in noise):
        raise ValueError(f"levels of {[level.shape[1] for level in noise]} channels cannot share their noise")
    return (*(low_pass(finest, level.shape[-2], level.shape[-1]) for level in noise[:-1]), finest)


def low_pass(image: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) -> (B, C, height, width): the lowest frequencies, scaled so that white noise keeps its deviation."""
    spectrum = torch.fft.fft2(image.float(), norm="ortho")
    for axis, size in ((-2, height), (-1, width)):
        spectrum = _crop_spectrum(spectrum, axis, size)
    return torch.fft.ifft2(spectrum, norm="ortho").real


def _crop_spectrum(spectrum: Tensor, axis: int, size: int) -> Tensor:
    count = spectrum.shape[axis]
    if size == count:
        return spectrum
    # A pixel's place is the middle of those that it stands for, half of (count / size - 1) after the first of them.
    frequency = torch.fft.fftfreq(count, device=spectrum.device)
    turn = torch.exp(1j * math.pi * (count / size - 1) * frequency)
    spectrum = spectrum * (turn if axis == -1 else turn.unsqueeze(-1))
    half = (size - 1) // 2
    parts = [spectrum.narrow(axis, 0, half + 1), spectrum.narrow(axis, count - half, half)]
    if size % 2 == 0:  # both frequencies meet at half the new rate: their sum is symmetric, and keeps its deviation
        edge = spectrum.narrow(axis, half + 1, 1) + spectrum.narrow(axis, count - half - 1, 1)
        parts.insert(1, edge / math.sqrt(2))
    return torch.cat(parts, dim=axis)


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
