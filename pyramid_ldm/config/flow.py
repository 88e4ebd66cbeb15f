"""Stage two's config: the network (saved beside its weights) and its training."""

from omegaconf import MISSING

from pyramid_ldm.config.common import (
    MOST_SEED,
    MOST_SIDE,
    CheckpointConfig,
    EmaConfig,
    LogConfig,
    TrainConfig,
    check_device,
    check_levels,
)
from pyramid_ldm.config.schema import Section, key, require
from pyramid_ldm.pyramid import Level


class FlowConfig(Section):
    """The pyramid NCSN++ (PDM section 3.3, figure 6). `image_size` and `levels` come from the shards."""

    NAME, KIND = "model", "flow"

    image_size: list[int] = key([], at_least=1, at_most=MOST_SIDE)  # [H, W] of the images behind the latents
    levels: list[Level] = key([])  # coarse to fine
    # Channels at the finest latent, then at half its resolution, ...
    widths: list[int] = key([128, 256, 256, 256], at_least=8, at_most=2**16)
    blocks: int = key(2, at_least=1, at_most=64)  # residual blocks a level on the way down; one more on the way up
    branch_blocks: int = key(1, at_least=0, at_most=64)  # of a branch, before it enters and again before it leaves
    attention: str = key("spatial_channel", choices=("spatial_channel", "spatial", "channel", "none"))
    attention_tokens: int = key(1024, at_least=0)  # levels with at most this many positions have attention
    # Resolved from attention_tokens; stored with the model.
    attention_factors: list[int] | None = key(None, at_least=1, at_most=MOST_SIDE)
    head_channels: int = key(64, at_least=0, at_most=2**16)  # 0: one head
    spectral_norm: bool = key(True)
    dropout: float = key(0.35, at_least=0, below=1)
    # decreasing: at the lowest resolution, linearly to 0 at the highest (PDM 3.3)
    dropout_schedule: str = key("decreasing", choices=("decreasing", "increasing", "uniform"))
    fourier_scale: float = key(16.0, above=0)  # of the time embedding
    fir_everywhere: bool = key(False)  # false: box and nearest re-sampling at 4x4 and below, where FIR loses signal
    checkpoint: bool = key(False, may_change=True)  # recompute blocks in the backward pass

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(w % 8 == 0 for w in self.widths), f"model.widths {self.widths}: multiples of 8 only")
        if self.image_size:
            self.resolve(self.image_size, self.levels)

    def resolve(self, image_size: list[int], levels: list[Level]) -> None:
        """Takes over the latents' shape and fixes where attention stands, once and for all."""
        require(
            self.image_size in ([], image_size) and self.levels in ([], levels),
            "model.image_size and model.levels come from the shards; leave them out",
        )
        self.image_size, self.levels = image_size, levels
        check_levels(levels, image_size)
        finest, coarsest = levels[-1].factor, levels[0].factor
        depth = (coarsest // finest).bit_length()
        require(
            len(self.widths) >= depth,
            f"model.widths has {len(self.widths)} entries; factors {finest} to {coarsest} need at least {depth}",
        )
        deepest = finest << (len(self.widths) - 1)
        require(
            all(side % deepest == 0 for side in image_size),
            f"model.widths has {len(self.widths)} entries: factor {deepest} does not divide image_size {image_size}",
        )
        if self.attention_factors is None:
            height, width = (side // finest for side in image_size)
            self.attention_factors = [
                finest << i for i in range(len(self.widths)) if (height >> i) * (width >> i) <= self.attention_tokens
            ]


class ShardDataConfig(Section):
    """A shard directory made by `encode`."""

    NAME = "data"

    shards: str = key(MISSING, path=True, may_change=True)
    workers: int = key(2, at_least=0, at_most=1024, may_change=True)
    posterior: str = key("sample", choices=("sample", "mode"))  # what a cached mean and log-variance become


class RectifiedFlowConfig(Section):
    """The objective (PDM equation 7)."""

    NAME = "rectified_flow"

    eps: float = key(1e-3, above=0, below=0.1)  # training t = min(U[eps, 1 + eps], 1); sampling from eps to 1
    level_weights: list[float] | None = key(None, at_least=0)  # one a level, coarse to fine; null: 1 each
    # Above 1, a level becomes clear earlier than the others; null: 1 each.
    level_shifts: list[float] | None = key(None, above=0, at_most=1e6)
    time_distribution: str = key("uniform", choices=("uniform", "logit_normal"))  # what training draws t from


class SampleLogConfig(Section):
    """How the pictures in the run directory are sampled."""

    NAME = "samples"

    seed: int = key(0, at_least=0, at_most=MOST_SEED)
    steps: int = key(50, at_least=1, at_most=10**6)  # Euler


class FlowTraining(Section):
    """Everything `train-flow` reads."""

    KIND = "train-flow"

    run_dir: str = key(MISSING, path=True, may_change=True)
    seed: int = key(0, at_least=0, at_most=MOST_SEED)
    device: str = key("auto", may_change=True)
    precision: str = key("auto", choices=("auto", "bf16", "fp32"), may_change=True)
    compile: bool = key(False, may_change=True)
    # unit: each level to standard deviation 1 | paper: only where it exceeds 1 | channel: mean and deviation of each
    scaling: str = key("unit", choices=("unit", "paper", "channel"))
    model: FlowConfig = key(FlowConfig)
    data: ShardDataConfig = key(ShardDataConfig)
    rectified_flow: RectifiedFlowConfig = key(RectifiedFlowConfig)
    samples: SampleLogConfig = key(SampleLogConfig, may_change=True)
    train: TrainConfig = key(TrainConfig)
    ema: EmaConfig = key(EmaConfig)
    log: LogConfig = key(LogConfig, may_change=True)
    checkpoint: CheckpointConfig = key(CheckpointConfig, may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
