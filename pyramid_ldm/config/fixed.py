"""Configs of the stages one that have nothing to learn: what they need is in them alone."""

from pathlib import Path

from omegaconf import MISSING

from pyramid_ldm.config.autoencoder import AutoencoderConfig
from pyramid_ldm.config.base import load_saved, read_yaml
from pyramid_ldm.config.common import MOST_SIDE, check_image_size, check_levels
from pyramid_ldm.config.schema import Section, key, require
from pyramid_ldm.pyramid import Level


class PixelsConfig(Section):
    """A pyramid of pixels."""

    KIND = "pixels"

    image_size: list[int] = key(MISSING, at_least=1, at_most=MOST_SIDE)  # [H, W]
    factors: list[int] = key([1], at_least=1, at_most=MOST_SIDE)  # image pixels per pixel of a level, coarse to fine

    def __post_init__(self) -> None:
        super().__post_init__()
        check_image_size(self.image_size)
        check_levels(self.levels, self.image_size)

    @property
    def levels(self) -> list[Level]:
        """Three channels each."""
        return [Level(factor, 3) for factor in self.factors]


class WaveletConfig(Section):
    """5/3 wavelets, one level."""

    KIND = "wavelet"

    image_size: list[int] = key(MISSING, at_least=1, at_most=MOST_SIDE)  # [H, W]
    depth: int = key(1, at_least=1, at_most=4)  # transforms of the coarsest band, each halving its sides

    def __post_init__(self) -> None:
        super().__post_init__()
        check_image_size(self.image_size)
        factor = self.levels[0].factor
        require(
            all(side % factor == 0 for side in self.image_size),
            f"image_size {self.image_size}: with depth={self.depth}, both sides must be multiples of {factor}",
        )

    @property
    def levels(self) -> list[Level]:
        """One, of as many values as the image."""
        return [Level(2**self.depth, 3 * 4**self.depth)]


FixedConfig = PixelsConfig | WaveletConfig
FIXED: dict[str, type[PixelsConfig] | type[WaveletConfig]] = {"pixels": PixelsConfig, "wavelet": WaveletConfig}


def kind_of(path: Path) -> str | None:
    """The `kind` of a YAML file, if it says so."""
    kind = read_yaml(path).get("kind")
    return kind if isinstance(kind, str) else None


def load_stage_one(path: Path) -> AutoencoderConfig | FixedConfig:
    """The config that lies beside the weights of a stage one of any kind."""
    match kind_of(path):
        case "pixels":
            return load_saved(PixelsConfig, path)
        case "wavelet":
            return load_saved(WaveletConfig, path)
    return load_saved(AutoencoderConfig, path)
