"""The keys that both training configs share."""

from dataclasses import dataclass, field

from pyramid_ldm.config.base import require, require_choice


@dataclass
class LevelConfig:
    """One latent level: its factor (image pixels per latent pixel) and channels."""

    factor: int = 8
    channels: int = 4


@dataclass
class TrainConfig:
    """How long, how fast. Counts are images over all ranks; the learning rate is the one that is used."""

    images: int = 1_000_000
    batch_size: int = 4  # per process and micro-step
    accumulate: int = 1  # micro-steps per optimizer step
    learning_rate: float = 1e-4
    warmup: int = 0  # images over which the rate rises linearly from 0
    decay: str = "constant"  # constant | cosine: to 0 at train.images
    beta1: float = 0.9
    beta2: float = 0.999
    gradient_clip: float = 1.0  # maximum norm; 0 turns it off
    max_nonfinite: int = 10  # steps in a row without a finite loss before the run stops

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "accumulate", "max_nonfinite"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        require(self.learning_rate > 0, f"train.learning_rate is {self.learning_rate}; it must be above 0")
        require_choice("train.decay", self.decay, ("constant", "cosine"))


@dataclass
class EmaConfig:
    """Averages of the weights over training, with the power-function profile of EDM2 (Karras et al. 2024, eq. 3).

    A track's width is relative to the length of training, so that one value suits a minute and a week.
    """

    widths: list[float] = field(default_factory=lambda: [0.05, 0.1])
    export: float = 0.05  # the track that model/ holds

    def __post_init__(self) -> None:
        require(all(0 < w < 0.28 for w in self.widths), f"ema.widths {self.widths}: each must lie between 0 and 0.28")
        require(self.export in self.widths, f"ema.export is {self.export}; choose one of ema.widths {self.widths}")


@dataclass
class LogConfig:
    """Intervals in images, rounded up to whole optimizer steps."""

    every: int = 1_000
    pictures_every: int = 25_000  # grids and held-out figures
    pictures: int = 8  # images a grid

    def __post_init__(self) -> None:
        require(min(self.every, self.pictures_every, self.pictures) >= 1, "log.*: every value must be at least 1")


@dataclass
class CheckpointConfig:
    """Intervals in images, rounded up to whole optimizer steps."""

    every: int = 25_000
    keep_last: int = 2
    keep_every: int = 0  # also keep each that is a multiple of this many images; 0: none

    def __post_init__(self) -> None:
        require(self.every >= 1, f"checkpoint.every is {self.every}; it must be at least 1")
        require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}; it must be at least 1")


def check_image_size(image_size: list[int]) -> None:
    """Height and width, both positive."""
    require(
        len(image_size) == 2 and min(image_size) >= 1, f"image_size is {image_size}; give [height, width] in pixels"
    )


def check_levels(levels: list[LevelConfig], image_size: list[int]) -> None:
    """Factors are powers of two, strictly falling (coarse to fine), and divide the image."""
    require(len(levels) >= 1, "model.levels is empty; give at least one {factor: F, channels: C}")
    factors = [level.factor for level in levels]
    for level in levels:
        require(
            level.factor >= 1 and level.factor & (level.factor - 1) == 0,
            f"model.levels: factor {level.factor} is not a power of two",
        )
        require(level.channels >= 1, f"model.levels: factor {level.factor} has {level.channels} channels")
    require(
        factors == sorted(set(factors), reverse=True),
        f"model.levels: factors {factors} must fall from coarse to fine, each once",
    )
    require(
        all(side % factors[0] == 0 for side in image_size),
        f"image_size {image_size}: both sides must be multiples of the coarsest factor, {factors[0]}",
    )


def check_runtime(device: str, precision: str) -> None:
    """The values that `device` and `precision` may take."""
    require_choice("precision", precision, ("auto", "bf16", "fp32"))
    require(device in ("auto", "cpu", "mps") or device.startswith("cuda"), f"device is {device!r}; try auto, cpu, cuda")
