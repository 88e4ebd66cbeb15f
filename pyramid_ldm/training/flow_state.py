"""What a step of stage two changes, and the step's gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyramid_ldm.condition import Condition
from pyramid_ldm.config.flow import FlowTraining
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp
from pyramid_ldm.processes.process import Process
from pyramid_ldm.pyramid import LatentScaling, Pyramid, Shape, flat_noise
from pyramid_ldm.randomness import uniform
from pyramid_ldm.training.ema import PowerEma
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.optimizer import Optimizer, build_optimizer
from pyramid_ldm.training.step import StepGuard

GOLDEN = (5**0.5 - 1) / 2


@dataclass
class State:
    """Everything that a step changes, and what the run was begun with."""

    network: PyramidNCSNpp
    optimizer: Optimizer
    ema: PowerEma
    nonfinite: StepGuard
    metrics: Metrics
    images_seen: int = 0
    images_per_step: int = 0  # 0: not begun
    scaling: LatentScaling | None = None  # between raw latents and the network's, from the first step on
    bad: dict[str, str] = field(default_factory=dict)  # photographs that are no images: digest, message
    cache: dict[str, Any] = field(default_factory=dict)  # the source's identity

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        assert self.scaling is not None
        return {
            "images_seen": self.images_seen,
            "images_per_step": self.images_per_step,
            "scaling": self.scaling.to_dict(),
            "cache": self.cache,
            "bad": dict(self.bad),
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "nonfinite": self.nonfinite.state_dict(),
            "metrics": self.metrics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Strict."""
        self.images_seen, self.images_per_step = state["images_seen"], state["images_per_step"]
        self.scaling, self.cache = LatentScaling.from_dict(state["scaling"]), state["cache"]
        self.bad = dict(state.get("bad", {}))  # older ones have none
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.nonfinite.load_state_dict(state["nonfinite"])
        self.metrics.load_state_dict(state["metrics"], next(self.network.parameters()).device)


def build_state(config: FlowTraining, device: torch.device) -> State:
    """Network, optimizer and averages at zero images, on `device`."""
    torch.manual_seed(config.seed)
    network = PyramidNCSNpp(config.model).to(device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(network, config.train, device, precision=config.precision, max_norm=0.0)
    return State(
        network, optimizer, PowerEma(network, config.ema.widths), StepGuard(config.train.max_nonfinite), Metrics()
    )


def accumulate(
    process: Process,
    model: nn.Module,
    state: State,
    raw: Pyramid,
    positions: list[int],
    condition: Condition,
    config: FlowTraining,
    given: Pyramid | None = None,
) -> dict[str, Tensor]:
    """One micro-batch of raw latents: adds its gradient. Noise and time are those of the positions; `given`: the noise
    that the latents were drawn from, instead."""
    assert state.scaling is not None
    noise, t = draw(process, state.network.shapes, positions, config.seed, raw[0].device, config.times)
    jitter = None
    if given is not None:
        jitter = tuple(config.data.jitter * level for level in noise) if config.data.jitter else None
        noise = given
    loss = process.loss(model, state.scaling.scale(raw), noise, t, condition, jitter)
    (loss.total / config.train.accumulate).backward()
    return {"loss": loss.total} | named_levels(state.network, loss.levels)


def draw(
    process: Process,
    shapes: Sequence[Shape],
    positions: Sequence[int],
    seed: int,
    device: torch.device,
    times: str = "independent",
) -> tuple[Pyramid, Tensor]:
    """(noise, t (B,)) of training at these positions of the run, on `device`.

    Args:
        times: "independent", or "low_discrepancy": quantiles are golden sections from a random one on, so that those of
            any stretch of positions, whatever the batch size, lie evenly (Kronecker's sequence).
    """
    if times == "low_discrepancy":
        first = uniform(seed, "time", 0)
        drawn = [(first + GOLDEN * position) % 1.0 for position in positions]
    else:
        drawn = [uniform(seed, "time", position) for position in positions]
    quantiles = torch.tensor(drawn).clamp(max=1 - 2**-24)
    noise = flat_noise(shapes, seed, "noise", positions, device)
    return noise, process.time(quantiles.to(device, non_blocking=True))


def named_levels(network: PyramidNCSNpp, values: Tensor, prefix: str = "loss") -> dict[str, Tensor]:
    """{"loss_4x4": ...}: one value a level under its resolution."""
    return {f"{prefix}_{h}x{w}": value for (_, h, w), value in zip(network.shapes, values, strict=True)}
