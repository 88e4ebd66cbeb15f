"""What a cache of latents is made of."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from pyramid_ldm.pyramid import Level, level_shapes


@dataclass(frozen=True)
class Row:
    """Where a record comes from."""

    source: str  # the image's content hash
    mirrored: bool
    crop: int  # 0: the centre; k: the k-th random crop
    split: str  # train | held_out


@dataclass(frozen=True)
class Plan:
    """What a cache is made of; two caches with one plan hold the same records."""

    autoencoder: str  # fingerprint
    data: str  # fingerprint of the images
    image_size: list[int]
    levels: list[Level]  # coarse to fine
    has_variance: bool
    dtype: str  # float16 | float32
    precision: str  # bf16 | fp32: what the encoder computed in
    crops: int
    zoom: float
    flip: bool
    validation: float
    seed: int
    shard_size: int
    # Of latents that a flow drew from noise `source` of the seed: its scale, in which the two belong together, and what
    # the noise was drawn for.
    pairs: dict[str, Any] | None = None
    upscale: bool = True  # whether photographs smaller than image_size are in it, enlarged

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; a level as [factor, channels]."""
        values = asdict(self) | {"levels": [[level.factor, level.channels] for level in self.levels]}
        if self.pairs is None:  # as older caches have it
            del values["pairs"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """The inverse."""
        return cls(**values | {"levels": [Level(factor, channels) for factor, channels in values["levels"]]})

    @property
    def noise(self) -> str:
        """What the noise of pairs was drawn for; caches of before say nothing, and have samples'."""
        purpose: str = (self.pairs or {}).get("noise", "sample")
        return purpose

    def record_length(self) -> int:
        """Values of a row: means and, where there are any, log-variances."""
        return sum(math.prod(shape) for shape in self.shapes()) * (2 if self.has_variance else 1)

    def shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of each level."""
        return level_shapes(self.levels, self.image_size)
