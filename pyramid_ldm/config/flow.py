"""Stage two's config: the network (saved beside its weights) and its training."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from pyramid_ldm.config.base import require, require_choice
from pyramid_ldm.config.common import (
    CheckpointConfig,
    EmaConfig,
    LevelConfig,
    LogConfig,
    TrainConfig,
    check_levels,
    check_runtime,
)


@dataclass
class FlowConfig:
    """The pyramid NCSN++ (PDM section 3.3, figure 6). `image_size` and `levels` come from the shards."""

    image_size: list[int] = field(default_factory=list)  # [H, W] of the images behind the latents
    levels: list[LevelConfig] = field(default_factory=list)  # coarse to fine
    widths: list[int] = field(default_factory=lambda: [128, 256, 256, 256])  # channels at the finest latent, then half
    blocks: int = 2  # residual blocks a level on the way down; one more on the way up
    branch_blocks: int = 1  # residual blocks of a branch, before it enters and again before it leaves
    attention: str = "spatial_channel"  # spatial_channel | spatial | channel | none
    attention_tokens: int = 1024  # levels with at most this many positions have attention
    attention_factors: list[int] | None = None  # resolved from attention_tokens; stored with the model
    head_channels: int = 64  # 0: one head
    spectral_norm: bool = True
    dropout: float = 0.35
    dropout_schedule: str = "decreasing"  # decreasing: at the lowest resolution, linearly to 0 at the highest (PDM 3.3)
    fourier_scale: float = 16.0  # of the time embedding
    fir_everywhere: bool = False  # false: box and nearest re-sampling at 4x4 and below, where FIR loses signal
    checkpoint: bool = False  # recompute blocks in the backward pass

    def __post_init__(self) -> None:
        require_choice("model.attention", self.attention, ("spatial_channel", "spatial", "channel", "none"))
        require_choice("model.dropout_schedule", self.dropout_schedule, ("decreasing", "increasing", "uniform"))
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must lie in [0, 1)")
        require(self.blocks >= 1, f"model.blocks is {self.blocks}; it must be at least 1")
        require(all(w >= 8 and w % 8 == 0 for w in self.widths), f"model.widths {self.widths}: multiples of 8 only")
        if self.image_size:
            self.resolve(self.image_size, self.levels)

    def resolve(self, image_size: list[int], levels: list[LevelConfig]) -> None:
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


@dataclass
class ShardDataConfig:
    """A shard directory made by `encode`."""

    shards: str = MISSING
    workers: int = 2
    posterior: str = "sample"  # sample | mode: what a cached mean and log-variance become

    def __post_init__(self) -> None:
        require_choice("data.posterior", self.posterior, ("sample", "mode"))


@dataclass
class RectifiedFlowConfig:
    """The objective (PDM equation 7)."""

    eps: float = 1e-3  # training t = min(U[eps, 1 + eps], 1); sampling runs from eps to 1
    level_weights: list[float] | None = None  # one a level, coarse to fine; null: 1 each
    level_shifts: list[float] | None = None  # above 1, a level becomes clear earlier than the others; null: 1 each
    time_distribution: str = "uniform"  # uniform | logit_normal: what training draws t from

    def __post_init__(self) -> None:
        require_choice("rectified_flow.time_distribution", self.time_distribution, ("uniform", "logit_normal"))
        require(
            all(shift > 0 for shift in self.level_shifts or []),
            f"rectified_flow.level_shifts {self.level_shifts}: each must be above 0",
        )
        require(0 < self.eps < 0.1, f"rectified_flow.eps is {self.eps}; it must lie between 0 and 0.1")


@dataclass
class SampleLogConfig:
    """How the pictures in the run directory are sampled."""

    seed: int = 0
    steps: int = 50  # Euler


@dataclass
class FlowTraining:
    """Everything `train-flow` reads."""

    run_dir: str = MISSING
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    scaling: str = "unit"  # unit: each level to standard deviation 1 | paper: only where it exceeds 1 | channel
    model: FlowConfig = field(default_factory=FlowConfig)
    data: ShardDataConfig = field(default_factory=ShardDataConfig)
    rectified_flow: RectifiedFlowConfig = field(default_factory=RectifiedFlowConfig)
    samples: SampleLogConfig = field(default_factory=SampleLogConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        check_runtime(self.device, self.precision)
        require_choice("scaling", self.scaling, ("unit", "paper", "channel"))
