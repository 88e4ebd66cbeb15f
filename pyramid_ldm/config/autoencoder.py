"""Stage one's config: the model (saved beside its weights) and its training."""

from omegaconf import MISSING

from pyramid_ldm.config.common import (
    MOST_IMAGES,
    MOST_SEED,
    MOST_SIDE,
    CheckpointConfig,
    EmaConfig,
    LogConfig,
    TrainConfig,
    check_device,
    check_image_size,
    check_levels,
)
from pyramid_ldm.config.schema import Section, key, require
from pyramid_ldm.pyramid import Level, base_block

ATTENTION = ("spatial_channel", "spatial", "channel", "linear", "none")
MOST_CHANNELS = 2**16


class AttentionConfig(Section):
    """Where attention stands and of what kind (PDM section 3.3)."""

    NAME = "model.attention"

    encoder: str = key("linear", choices=ATTENTION)
    decoder: str = key("spatial_channel", choices=ATTENTION)
    max_tokens: int = key(4096, at_least=0)  # no attention on levels with more positions: these stay strictly local
    softmax_tokens: int = key(4096, at_least=0)  # above this the spatial half is linear attention
    head_channels: int = key(64, at_least=0, at_most=MOST_CHANNELS)  # 0: one head
    # Resolved from image_size and max_tokens; stored with the model.
    factors: list[int] | None = key(None, at_least=1, at_most=MOST_SIDE)


class EncoderConfig(Section):
    """Light: one block a level, spectral norm on all but the latent heads."""

    NAME = "model.encoder"

    widths: list[int] = key([32, 64, 128], at_least=4, at_most=MOST_CHANNELS)  # channels at factor 1, 2, 4, ...
    blocks: int = key(1, at_least=1, at_most=64)
    spectral_norm: bool = key(True)
    # Each from_rgb sees blocks of so many pixels a side (1: PDM's; 2, 4, 8, 16).
    image_patch: int = key(4, at_least=1, at_most=16, before=1)
    pooling: str = key("average", choices=("average", "max", "unshuffle"))  # unshuffle: 2x2 blocks to channels
    linear_heads: bool = key(True, before=False)  # a latent sees its features also as they are before the norm

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.image_patch in (1, 2, 4, 8, 16),
            f"model.encoder.image_patch is {self.image_patch}; choose one of 1, 2, 4, 8, 16",
        )


class DecoderConfig(Section):
    """Heavy: one block more a level than the encoder, and a branch for every latent."""

    NAME = "model.decoder"

    widths: list[int] = key([32, 64, 128], at_least=4, at_most=MOST_CHANNELS)
    branch: str = key("residual", choices=("residual", "vit"))
    branch_blocks: int = key(1, at_least=0, at_most=64)
    upsampling: str = key("nearest", choices=("nearest", "bilinear"))  # of features; RGB is always bilinear
    # Residual branches begin at zero, as a ViT's always do: a block is x / sqrt 2 at first.
    zero_init: bool = key(True, before=False)
    # Where a latent enters: scale at first of what comes up from coarser levels.
    coarse_init: float = key(0.1, above=0, at_most=1, before=1.0)
    dropout: float = key(0.35, at_least=0, below=1)  # at the lowest resolution, falling linearly to 0 at the highest


class AutoencoderConfig(Section):
    """The pyramid autoencoder (PDM section 3.3, figure 5)."""

    NAME, KIND = "model", "autoencoder"

    image_size: list[int] = key([], at_least=1, at_most=MOST_SIDE)  # [H, W]; training copies its own here
    levels: list[Level] = key([])  # coarse to fine
    latent: str = key("kl", choices=("kl", "vq"))
    codebook_size: int = key(1024, at_least=1, at_most=2**24)  # vq: entries per level
    skip: str = key("res_skip", choices=("res_skip", "residual", "skip", "none"))  # PDM figure 4
    # pixel, none: local in space; group: of the whole image, and nothing can be decoded in part then.
    norm: str = key("pixel", choices=("pixel", "none", "group"))
    # Pixels a side of the blocks that the encoder begins with and the decoder ends with; 1: pixels (PDM).
    patch: int = key(1, at_least=1, at_most=16)
    # What the finest latent and the image begin as, to which the networks add: nothing, a thumbnail, or a linear codec
    # that is fitted to the photographs before training.
    base: str = key("none", choices=("none", "thumbnail", "linear"))
    encoder: EncoderConfig = key(EncoderConfig)
    decoder: DecoderConfig = key(DecoderConfig)
    attention: AttentionConfig = key(AttentionConfig)
    # Recompute these levels in the backward pass.
    checkpoint_factors: list[int] = key([], at_least=1, at_most=MOST_SIDE, may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
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
        coarsest, finest = self.levels[0].factor, self.levels[-1].factor
        require(
            self.patch & (self.patch - 1) == 0 and self.patch <= finest,
            f"model.patch is {self.patch}; choose a power of two up to the finest latent's factor, {finest}",
        )
        channels, (_, side) = self.levels[-1].channels, base_block(finest, self.patch)
        require(self.base == "none" or self.latent == "kl", f"model.base={self.base} needs latent=kl")
        require(
            self.base != "thumbnail" or channels >= 3,
            "model.base=thumbnail needs at least three channels at the finest level",
        )
        require(
            self.base != "linear" or channels <= 3 * side**2,
            f"model.base=linear: the finest level has {channels} channels, but its blocks have {3 * side**2} values; "
            f"give it fewer",
        )
        depth = (coarsest // self.patch).bit_length()
        for name, widths in (("encoder", self.encoder.widths), ("decoder", self.decoder.widths)):
            require(
                len(widths) == depth,
                f"model.{name}.widths has {len(widths)} entries; factors {self.patch} to {coarsest} need {depth}",
            )
            require(all(w % 4 == 0 for w in widths), f"model.{name}.widths {widths}: multiples of 4 only")
        if self.attention.factors is None:
            height, width = image_size
            factors = [self.patch << i for i in range(depth)]
            self.attention.factors = [f for f in factors if height // f * (width // f) <= self.attention.max_tokens]


class ImageDataConfig(Section):
    """A folder of photographs and how training looks at them."""

    NAME = "data"

    root: str = key(MISSING, path=True, may_change=True)
    workers: int = key(4, at_least=0, at_most=1024, may_change=True)
    validation: float = key(0.05, at_least=0, below=1)  # share of the images held out, chosen by content
    crop: str = key("center", choices=("center", "random"))  # after resizing to cover image_size
    zoom: float = key(1.0, at_least=1, at_most=1024)  # random crops also enlarge by up to this much
    flip: bool = key(True)
    upscale: bool = key(False, before=True)  # take photographs that are smaller than image_size, too, enlarged
    # Unreadable files above this share stop the run.
    max_bad_fraction: float = key(0.01, at_least=0, at_most=1, may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.zoom == 1 or self.crop == "random", "data.zoom needs data.crop=random")


class PerceptualConfig(Section):
    """LPIPS with the VGG-16 network. Counts are images."""

    NAME = "loss.perceptual"

    weight: float = key(1.0, at_least=0)  # 0 turns it off
    start: int = key(0, at_least=0, at_most=MOST_IMAGES)  # it is not computed before
    ramp: int = key(0, at_least=0, at_most=MOST_IMAGES)  # its weight then rises linearly over so many images
    weights: str = key("imagenet", path=True)  # imagenet (torchvision's cache or host) | a file | random


class GanConfig(Section):
    """Hinge PatchGAN. Counts are images."""

    NAME = "loss.gan"

    weight: float = key(0.5, at_least=0)  # 0 turns the discriminator off
    mode: str = key("adaptive", choices=("adaptive", "constant"))
    start: int = key(50_000, at_least=0, at_most=MOST_IMAGES)  # the discriminator begins to learn
    disc_warmup: int = key(10_000, at_least=0, at_most=MOST_IMAGES)  # it learns this long before it acts
    ramp: int = key(10_000, at_least=0, at_most=MOST_IMAGES)  # its weight then rises linearly over so many images
    max_weight: float = key(1e4, at_least=0)
    channels: int = key(64, at_least=4, at_most=MOST_CHANNELS)
    layers: int = key(3, at_least=1, at_most=16)
    learning_rate: float | None = key(None, above=0, at_most=100)  # the autoencoder's, unless given


class LossConfig(Section):
    """All terms are means per pixel or per latent value, so that one weight means the same at 256 and at 2048."""

    NAME = "loss"

    l1: float = key(1.0, at_least=0)
    perceptual: PerceptualConfig = key(PerceptualConfig)
    kl: float = key(1e-8, at_least=0)
    codebook: float = key(1.0, at_least=0)
    # vq: entries that were not used for so many images become latents of the batch at hand (P22); 0: never.
    codebook_restart: int = key(2_000, at_least=0, at_most=MOST_IMAGES, before=0)
    gan: GanConfig = key(GanConfig)


class AutoencoderTrainConfig(TrainConfig):
    """How stage one looks at an image: the encoder and the levels with attention always see all of it."""

    # Reconstruct and judge only so many random parts of each image; 0: all of it.
    regions: int = key(0, at_least=0, at_most=2**16, may_change=True)
    region_size: int = key(512, at_least=1, at_most=MOST_SIDE, may_change=True)  # pixels a side
    # Share of the images that are decoded from some of their coarsest levels alone, zeros in place of the finer ones;
    # the discriminator does not see these.
    level_dropout: float = key(0.0, at_least=0, at_most=1)
    # What such a decoding is held against: the image, or what of it these levels' resolution shows.
    level_target: str = key("image", choices=("image", "low_pass"))


class AutoencoderTraining(Section):
    """Everything `train-ae` reads."""

    KIND = "train-ae"

    run_dir: str = key(MISSING, path=True, may_change=True)
    image_size: list[int] = key(MISSING, at_least=1, at_most=MOST_SIDE)
    seed: int = key(0, at_least=0, at_most=MOST_SEED)
    device: str = key("auto", may_change=True)
    precision: str = key("auto", choices=("auto", "bf16", "fp32"), may_change=True)
    compile: bool = key(False, may_change=True)
    model: AutoencoderConfig = key(AutoencoderConfig)
    data: ImageDataConfig = key(ImageDataConfig)
    loss: LossConfig = key(LossConfig)
    train: AutoencoderTrainConfig = key(AutoencoderTrainConfig)
    ema: EmaConfig = key(EmaConfig)
    log: LogConfig = key(LogConfig, may_change=True)
    checkpoint: CheckpointConfig = key(CheckpointConfig, may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        require(
            self.train.regions == 0 or self.model.norm != "group",
            "train.regions needs model.norm=pixel or none: with group norms every part of an image depends on all",
        )
        self.model.resolve(self.image_size)

    def unused(self) -> list[str]:
        """What is to be said of keys that are not read, and of terms that never act."""
        found, train, gan, perceptual = self.train.unused(), self.train, self.loss.gan, self.loss.perceptual
        for name, weight, start in (
            ("loss.perceptual", perceptual.weight, perceptual.start),
            ("loss.gan", gan.weight, gan.start + gan.disc_warmup),
        ):
            if weight > 0 and start >= train.images:
                found.append(f"{name} never acts: it begins at image {start}, and train.images is {train.images}")
        if train.level_dropout and len(self.model.levels) == 1:
            found.append(f"train.level_dropout={train.level_dropout:g} is not used: there is one level")
        if train.level_target != "image" and not train.level_dropout:
            found.append(f"train.level_target={train.level_target} is not used: train.level_dropout is 0")
        return found
