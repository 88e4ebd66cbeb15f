"""The keys that both training configs share."""

from pyramid_ldm.config.schema import Section, check_value, key, require
from pyramid_ldm.pyramid import Level

MOST_IMAGES = 10**15  # what a count of images may be
MOST_SEED = 2**63 - 1
MOST_SIDE = 2**20  # pixels
DEVICES = ("auto", "cpu", "mps")


class TrainConfig(Section):
    """How long, how fast. Counts are images over all ranks; the learning rate is the one that is used.

    What a resumed run must keep is images per step, batch_size * accumulate * processes.
    """

    NAME = "train"

    images: int = key(1_000_000, at_least=1, at_most=MOST_IMAGES, may_change=True)
    batch_size: int = key(4, at_least=1, at_most=2**20, may_change=True)  # per process and micro-step
    accumulate: int = key(1, at_least=1, at_most=2**20, may_change=True)  # micro-steps per optimizer step
    learning_rate: float = key(1e-4, above=0, at_most=100, may_change=True)
    warmup: int = key(0, at_least=0, at_most=MOST_IMAGES)  # images over which the rate rises linearly from 0
    decay: str = key("constant", choices=("constant", "cosine"))  # cosine: to 0 at train.images
    optimizer: str = key("adam", choices=("adam", "muon"))  # muon: of matrices; the others still move by Adam
    # muon: the weights of an output of such a matrix are at most so long, as a vector; 0: as long as they get; null:
    # 0.7 in stage one, 0 in stage two (docs/EXPERIMENTS.md).
    max_norm: float | None = key(None, at_least=0)
    beta1: float = key(0.9, at_least=0, below=1)
    beta2: float = key(0.999, at_least=0, below=1)
    gradient_clip: float = key(1.0, at_least=0)  # maximum norm; 0 turns it off
    max_nonfinite: int = key(10, at_least=1, may_change=True)  # steps left out in a row (see `StepGuard`) end it

    def unused(self) -> list[str]:
        """What is to be said of keys that are not read."""
        if self.max_norm is None or self.optimizer == "muon":
            return []
        return [f"train.max_norm={self.max_norm:g} is not used: it is for train.optimizer=muon"]


class EmaConfig(Section):
    """Averages of the weights over training, with the power-function profile of EDM2 (Karras et al. 2024, eq. 3).

    A track's width is relative to the length of training, so that one value suits a minute and a week.
    """

    NAME = "ema"

    widths: list[float] = key([0.05, 0.1], at_least=1e-3, below=0.28)
    export: float = key(0.05, at_least=1e-3, below=0.28, may_change=True)  # the track that model/ holds

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.export in self.widths, f"ema.export is {self.export}; choose one of ema.widths {self.widths}")


class LogConfig(Section):
    """Intervals in images, rounded up to whole optimizer steps."""

    NAME = "log"

    every: int = key(1_000, at_least=1, at_most=MOST_IMAGES)
    pictures_every: int = key(25_000, at_least=1, at_most=MOST_IMAGES)  # grids and held-out figures
    pictures: int = key(8, at_least=1, at_most=1024)  # images a grid
    examined: int = key(256, at_least=1, at_most=MOST_IMAGES)  # of each split, at most, for the figures


class CheckpointConfig(Section):
    """Intervals in images, rounded up to whole optimizer steps."""

    NAME = "checkpoint"

    every: int = key(25_000, at_least=1, at_most=MOST_IMAGES)
    keep_last: int = key(2, at_least=1, at_most=10**6)
    # Also keep each that is a multiple of this many images; 0: none.
    keep_every: int = key(0, at_least=0, at_most=MOST_IMAGES)


def check_image_size(image_size: list[int]) -> None:
    """Height and width."""
    require(len(image_size) == 2, f"image_size is {image_size}; give [height, width] in pixels")


def check_levels(levels: list[Level], image_size: list[int]) -> None:
    """Factors are powers of two, strictly falling (coarse to fine), and divide the image."""
    for level in levels:
        check_value("model.levels.factor", level.factor, {"at_least": 1, "at_most": MOST_SIDE}, level.factor)
        check_value("model.levels.channels", level.channels, {"at_least": 1, "at_most": 2**20}, level.channels)
    require(len(levels) >= 1, "model.levels is empty; give at least one {factor: F, channels: C}")
    factors = [level.factor for level in levels]
    for factor in factors:
        require(factor & (factor - 1) == 0, f"model.levels: factor {factor} is not a power of two")
    require(
        factors == sorted(set(factors), reverse=True),
        f"model.levels: factors {factors} must fall from coarse to fine, each once",
    )
    require(
        all(side % factors[0] == 0 for side in image_size),
        f"image_size {image_size}: both sides must be multiples of the coarsest factor, {factors[0]}",
    )


def check_device(device: str) -> None:
    """The values that `device` may take; whether it is there is seen later."""
    require(device in DEVICES or device.startswith("cuda"), f"device is {device!r}; try auto, cpu, cuda")
