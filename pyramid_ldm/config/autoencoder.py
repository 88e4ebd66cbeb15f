"""Stage one's config: the model (saved beside its weights) and its training."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from pyramid_ldm.config.base import require, require_choice
from pyramid_ldm.config.common import (
    CheckpointConfig,
    EmaConfig,
    LevelConfig,
    LogConfig,
    TrainConfig,
    check_image_size,
    check_levels,
    check_runtime,
)

ATTENTION = ("spatial_channel", "spatial", "channel", "linear", "none")


@dataclass
class AttentionConfig:
    """Where attention stands and of what kind (PDM section 3.3)."""

    encoder: str = "linear"
    decoder: str = "spatial_channel"
    max_tokens: int = 4096  # no attention on levels with more positions: these stay strictly local
    softmax_tokens: int = 4096  # above this the spatial half is linear attention
    head_channels: int = 64
    factors: list[int] | None = None  # resolved from image_size and max_tokens; stored with the model

    def __post_init__(self) -> None:
        require_choice("model.attention.encoder", self.encoder, ATTENTION)
        require_choice("model.attention.decoder", self.decoder, ATTENTION)


@dataclass
class EncoderConfig:
    """Light: one block a level, spectral norm on all but the latent heads."""

    widths: list[int] = field(default_factory=lambda: [32, 64, 128])  # channels at factor 1, 2, 4, ...
    blocks: int = 1
    spectral_norm: bool = True
    image_patch: int = 4  # each from_rgb sees blocks of so many pixels a side (1: PDM's; 2, 4, 8, 16)
    pooling: str = "average"  # average | max | unshuffle: 2x2 blocks to channels
    linear_heads: bool = True  # a latent sees its features also as they are before the norm

    def __post_init__(self) -> None:
        require_choice("model.encoder.pooling", self.pooling, ("average", "max", "unshuffle"))
        require(
            self.image_patch in (1, 2, 4, 8, 16),
            f"model.encoder.image_patch is {self.image_patch}; choose one of 1, 2, 4, 8, 16",
        )
        require(self.blocks >= 1, f"model.encoder.blocks is {self.blocks}; it must be at least 1")


@dataclass
class DecoderConfig:
    """Heavy: one block more a level than the encoder, and a branch for every latent."""

    widths: list[int] = field(default_factory=lambda: [32, 64, 128])
    branch: str = "residual"  # residual | vit
    branch_blocks: int = 1
    upsampling: str = "nearest"  # nearest | bilinear: of features; RGB is always bilinear
    zero_init: bool = True  # residual branches begin at zero, as a ViT's always do: a block is x / sqrt 2 at first
    coarse_init: float = 0.1  # where a latent enters: scale at first of what comes up from coarser levels
    dropout: float = 0.35  # at the lowest resolution, falling linearly to 0 at the highest

    def __post_init__(self) -> None:
        require_choice("model.decoder.branch", self.branch, ("residual", "vit"))
        require_choice("model.decoder.upsampling", self.upsampling, ("nearest", "bilinear"))
        require(self.branch_blocks >= 0, f"model.decoder.branch_blocks is {self.branch_blocks}; 0 or more")
        require(0 < self.coarse_init <= 1, f"model.decoder.coarse_init is {self.coarse_init}; it must lie in (0, 1]")
        require(0 <= self.dropout < 1, f"model.decoder.dropout is {self.dropout}; it must lie in [0, 1)")


@dataclass
class AutoencoderConfig:
    """The pyramid autoencoder (PDM section 3.3, figure 5)."""

    image_size: list[int] = field(default_factory=list)  # [H, W]; training copies its own here
    levels: list[LevelConfig] = field(default_factory=list)  # coarse to fine
    latent: str = "kl"  # kl | vq
    codebook_size: int = 1024  # vq: entries per level
    skip: str = "res_skip"  # res_skip | residual | skip | none (PDM figure 4)
    norm: str = "pixel"  # pixel: local in space | group: of the whole image; nothing can be decoded in part then
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    checkpoint_factors: list[int] = field(default_factory=list)  # recompute these levels in the backward pass

    def __post_init__(self) -> None:
        require_choice("model.latent", self.latent, ("kl", "vq"))
        require_choice("model.skip", self.skip, ("res_skip", "residual", "skip", "none"))
        require_choice("model.norm", self.norm, ("pixel", "group"))
        if self.image_size:
            self.resolve(self.image_size)

    def resolve(self, image_size: list[int]) -> None:
        """Checks what depends on the image's size and fixes where attention stands, once and for all."""
        require(
            self.image_size in ([], image_size),
            f"model.image_size is {self.image_size}, but image_size is {image_size}; leave it to the latter",
        )
        self.image_size = image_size
        check_image_size(image_size)
        check_levels(self.levels, image_size)
        depth = self.levels[0].factor.bit_length()
        for name, widths in (("encoder", self.encoder.widths), ("decoder", self.decoder.widths)):
            require(
                len(widths) == depth,
                f"model.{name}.widths has {len(widths)} entries; factors 1 to {self.levels[0].factor} need {depth}",
            )
            require(all(w >= 4 and w % 4 == 0 for w in widths), f"model.{name}.widths {widths}: multiples of 4 only")
        if self.attention.factors is None:
            height, width = image_size
            self.attention.factors = [
                1 << i for i in range(depth) if (height >> i) * (width >> i) <= self.attention.max_tokens
            ]


@dataclass
class ImageDataConfig:
    """A folder of photographs and how training looks at them."""

    root: str = MISSING
    workers: int = 4
    validation: float = 0.05  # share of the images held out, chosen by content
    crop: str = "center"  # center | random: after resizing to cover image_size
    zoom: float = 1.0  # random crops also enlarge by up to this much
    flip: bool = True
    max_bad_fraction: float = 0.01  # unreadable files above this share stop the run

    def __post_init__(self) -> None:
        require_choice("data.crop", self.crop, ("center", "random"))
        require(0 <= self.validation < 1, f"data.validation is {self.validation}; it must lie in [0, 1)")
        require(self.zoom >= 1, f"data.zoom is {self.zoom}; it must be at least 1")
        require(self.zoom == 1 or self.crop == "random", "data.zoom needs data.crop=random")


@dataclass
class PerceptualConfig:
    """LPIPS with the VGG-16 network."""

    weight: float = 1.0
    weights: str = "imagenet"  # imagenet (torchvision's cache or host) | a file | random


@dataclass
class GanConfig:
    """Hinge PatchGAN. Counts are images."""

    weight: float = 0.5  # 0 turns the discriminator off
    mode: str = "adaptive"  # adaptive | constant
    start: int = 50_000  # the discriminator begins to learn
    disc_warmup: int = 10_000  # it learns this long before it acts on the autoencoder
    ramp: int = 10_000  # its weight then rises linearly over this many images
    max_weight: float = 1e4
    channels: int = 64
    layers: int = 3
    learning_rate: float | None = None  # the autoencoder's, unless given

    def __post_init__(self) -> None:
        require(self.channels >= 4, f"loss.gan.channels is {self.channels}; it must be at least 4")
        require_choice("loss.gan.mode", self.mode, ("adaptive", "constant"))


@dataclass
class LossConfig:
    """All terms are means per pixel or per latent value, so that one weight means the same at 256 and at 2048."""

    l1: float = 1.0
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    kl: float = 1e-8
    codebook: float = 1.0
    gan: GanConfig = field(default_factory=GanConfig)


@dataclass
class AutoencoderTrainConfig(TrainConfig):
    """How stage one looks at an image: the encoder and the levels with attention always see all of it."""

    regions: int = 0  # reconstruct and judge only so many random parts of each image; 0: all of it
    region_size: int = 512  # pixels a side

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.regions >= 0, f"train.regions is {self.regions}; give 0 or more")
        require(self.region_size >= 1, f"train.region_size is {self.region_size}; it must be at least 1")


@dataclass
class AutoencoderTraining:
    """Everything `train-ae` reads."""

    run_dir: str = MISSING
    image_size: list[int] = MISSING
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: AutoencoderTrainConfig = field(default_factory=AutoencoderTrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_runtime(self.device, self.precision)
        require(
            self.train.regions == 0 or self.model.norm == "pixel",
            "train.regions needs model.norm=pixel: with group norms every part of an image depends on all of it",
        )
        self.model.resolve(self.image_size)
