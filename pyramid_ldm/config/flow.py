"""Stage two's config: the network (saved beside its weights) and its training."""

import math
from dataclasses import asdict, fields
from typing import Any

from omegaconf import MISSING

from pyramid_ldm.config.autoencoder import ImageDataConfig
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

READINGS = ("velocity", "noise", "data", "v")
MOST_INTERPOLATED = 20.0  # the cosine schedule's log-SNR changes by at least 6.28 over all times, 2 log 23
PREDICTIONS = (*READINGS, "preconditioned")
PROCESSES = ("rectified_flow", "vp", "edm")


class NCSNppConfig(Section):
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
    # Also predicts on the way down, so that sampling may extrapolate from there (internal guidance).
    early: bool = key(False)
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


CUTS = ("validation", "upscale", "crop", "zoom", "flip")


class FlowDataConfig(Section):
    """A shard directory made by `encode`, which holds its autoencoder; or photographs and the autoencoder that they go
    through on the way."""

    NAME = "data"

    shards: str | None = key(None, path=True, may_change=True)
    root: str | None = key(None, path=True, may_change=True)
    # A run or model of stage one, or the config of one without parameters.
    autoencoder: str | None = key(None, path=True, may_change=True)
    workers: int = key(2, at_least=0, at_most=1024, may_change=True)
    # Of pairs of noise and latents: deviation of fresh noise on what the network sees, against learning them by heart.
    jitter: float = key(0.0, at_least=0, at_most=1)
    posterior: str = key("sample", choices=("sample", "mode"))  # what a mean and log-variance become
    # Of photographs; as in `train-ae`, where they are explained. null: as the autoencoder's run has them, so that both
    # stages hold out the same; 0.05 and false where it has none.
    validation: float | None = key(None, at_least=0, below=1)
    upscale: bool | None = key(None)
    crop: str = key("center", choices=("center", "random"))
    zoom: float = key(1.0, at_least=1, at_most=1024)
    flip: bool = key(True)
    max_bad_fraction: float = key(0.01, at_least=0, at_most=1, may_change=True)

    def check(self) -> None:
        """UserError unless it names one source of latents."""
        if self.shards is not None:
            require(self.root is None, "data.shards and data.root are both given; leave one of them out")
            for field in fields(self):  # type: ignore[arg-type]
                name = field.name
                require(
                    name not in CUTS or getattr(self, name) == field.default,
                    f"data.{name} is of photographs that data.root names; data.shards holds what `encode` cut of them",
                )
            return
        require(
            self.root is not None or self.autoencoder is not None,
            "data.shards is not set; give it as data.shards=VALUE",
        )
        require(self.root is not None, "data.root is not set; give the photographs as data.root=VALUE")
        require(
            self.autoencoder is not None, "data.autoencoder is not set; give whose latents as data.autoencoder=VALUE"
        )
        require(self.zoom == 1 or self.crop == "random", "data.zoom needs data.crop=random")

    def photographs(self, trained: ImageDataConfig | None) -> ImageDataConfig:
        """What it says of photographs; `trained`: what the autoencoder was trained on."""
        assert self.root is not None
        found = {name: getattr(self, name) for name in ("workers", "max_bad_fraction", *CUTS)}
        for name in ("validation", "upscale"):
            if found[name] is None and trained is not None:
                found[name] = getattr(trained, name)
        return ImageDataConfig(self.root, **{name: value for name, value in found.items() if value is not None})


class ProcessConfig(Section):
    """What the processes between noise and data have in common."""

    # What the network's output is, and in which reading its error is taken (null: as it is).
    prediction: str = key("velocity", choices=PREDICTIONS)
    error: str | None = key(None, choices=READINGS)
    level_weights: list[float] | None = key(None, at_least=0)  # one a level, coarse to fine; null: 1 each
    # Above 1, a level becomes clear earlier than the others: log-SNR + 2 log(shift); null: 1 each.
    level_shifts: list[float] | None = key(None, at_least=1e-3, at_most=1e3)
    # Adds the errors of average-pooled levels, down to this side, each over its side; null: none.
    multiscale: int | None = key(None, at_least=1, at_most=MOST_SIDE)
    # Deviation of the data, for prediction=preconditioned; null: 0.5 with scaling=paper, else 1, as scaling makes it.
    sigma_data: float | None = key(None, above=0, at_most=1e6)
    # independent for each level | sinc: the finest level's, low-passed; takes levels of as many channels
    noise: str = key("independent", choices=("independent", "sinc"))

    def settings(self, scaling: str) -> dict[str, Any]:
        """Every key's value, those that are null and depend on the latents' scaling, too."""
        deviation = 0.5 if scaling == "paper" else 1.0
        return asdict(self) | {"sigma_data": deviation if self.sigma_data is None else self.sigma_data}


class RectifiedFlowConfig(ProcessConfig):
    """PDM equation 7."""

    NAME = "rectified_flow"

    eps: float = key(1e-3, above=0, below=0.1)  # training t = min(U[eps, 1 + eps], 1); sampling from eps to 1
    time_distribution: str = key("uniform", choices=("uniform", "logit_normal"))  # what training draws t from


class VPConfig(ProcessConfig):
    """Variance preserving diffusion."""

    NAME = "vp"

    prediction: str = key("v", choices=PREDICTIONS)
    schedule: str = key("cosine", choices=("cosine", "linear_beta"))
    # log-SNR + 2 log(shift); simple diffusion: 64 / side of the images
    shift: float = key(1.0, at_least=1e-3, at_most=1e3)
    shift_at_noise: float | None = key(None, at_least=1e-3, at_most=1e3)  # another one at the noise end, interpolated
    beta_start: float = key(0.0015, at_least=1e-6, at_most=0.1)  # of linear_beta
    beta_end: float = key(0.0195, at_least=1e-6, at_most=0.1)
    time_distribution: str = key("uniform", choices=("uniform", "logit_normal"))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.beta_start <= self.beta_end,
            f"vp.beta_start is {self.beta_start}; it must be at most vp.beta_end, {self.beta_end}",
        )
        last = self.shift if self.shift_at_noise is None else self.shift_at_noise
        require(
            last <= MOST_INTERPOLATED * self.shift,
            f"vp.shift_at_noise is {last}; it must be at most {MOST_INTERPOLATED} times vp.shift, {self.shift}, or "
            "log-SNR would not grow everywhere",
        )


class EDMConfig(ProcessConfig):
    """EDM: data plus noise of deviation sigma."""

    NAME = "edm"

    prediction: str = key("preconditioned", choices=PREDICTIONS)
    sigma_max: float = key(80.0, above=0, at_most=1e6)
    sigma_min: float = key(0.002, above=0, at_most=1e6)
    # Training: log sigma is normal. null: -1.2 at the published sigma_data of 0.5, as much noise beside another's data.
    log_sigma_mean: float | None = key(None, at_least=-20, at_most=20)
    log_sigma_std: float = key(1.2, above=0, at_most=20)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sigma_min < self.sigma_max, f"edm.sigma_min is {self.sigma_min}; it must be below edm.sigma_max")

    def settings(self, scaling: str) -> dict[str, Any]:
        """See there."""
        found = super().settings(scaling)
        if self.log_sigma_mean is None:
            found["log_sigma_mean"] = math.log(found["sigma_data"] / 0.5) - 1.2
        return found


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
    model: NCSNppConfig = key(NCSNppConfig)
    data: FlowDataConfig = key(FlowDataConfig)
    # A run of the same network to begin with: its average of width ema.export, its latents' scale.
    init: str | None = key(None, path=True)
    process: str = key("rectified_flow", choices=PROCESSES)
    # How training draws its times' quantiles; low_discrepancy: evenly over any stretch of images.
    times: str = key("independent", choices=("independent", "low_discrepancy"))
    rectified_flow: RectifiedFlowConfig = key(RectifiedFlowConfig)
    vp: VPConfig = key(VPConfig)
    edm: EDMConfig = key(EDMConfig)
    samples: SampleLogConfig = key(SampleLogConfig, may_change=True)
    train: TrainConfig = key(TrainConfig)
    ema: EmaConfig = key(EmaConfig)
    log: LogConfig = key(LogConfig, may_change=True)
    checkpoint: CheckpointConfig = key(CheckpointConfig, may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        self.data.check()

    def unused(self) -> list[str]:
        """What is to be said of keys that are not read."""
        found = self.train.unused()
        if self.data.jitter and self.data.shards is None:
            found.append(f"data.jitter={self.data.jitter:g} is not used: it is for pairs of noise and latents")
        for name in PROCESSES:
            section, plain = getattr(self, name), type(getattr(self, name))()
            keys = [f.name for f in fields(section) if getattr(section, f.name) != getattr(plain, f.name)]
            if keys and name != self.process:
                named = ", ".join(f"{name}.{each}" for each in keys)
                found.append(f"{named}: not used, for process is {self.process}")
        return found

    def resolve(self, image_size: list[int], levels: list[Level]) -> None:
        """Takes over the latents' shape. UserError where something does not fit it."""
        self.model.resolve(image_size, levels)
        process = getattr(self, self.process)
        for name in ("level_weights", "level_shifts"):
            values = getattr(process, name)
            require(
                values is None or len(values) == len(levels),
                f"{self.process}.{name} holds {len(values or ())} values for {len(levels)} levels",
            )
        require(
            process.noise == "independent" or len({level.channels for level in levels}) == 1,
            f"{self.process}.noise=sinc takes levels of as many channels each, not "
            f"{[level.channels for level in levels]}",
        )
