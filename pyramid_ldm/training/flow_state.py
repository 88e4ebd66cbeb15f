"""What a step of stage two changes, and the step's gradients."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyramid_ldm.config.flow import FlowTraining, RectifiedFlowConfig
from pyramid_ldm.data.latents import LatentBatch
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.pyramid import LatentScaling, unflatten
from pyramid_ldm.training.ema import PowerEma
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.step import NonFinite


@dataclass
class State:
    """Everything that a step changes, and what the run was begun with."""

    network: PyramidNCSNpp
    optimizer: torch.optim.Optimizer
    ema: PowerEma
    nonfinite: NonFinite
    metrics: Metrics
    images_seen: int = 0
    images_per_step: int = 0  # 0: not begun
    scaling: LatentScaling | None = None  # between raw latents and the network's, from the first step on
    cache: dict[str, Any] = field(default_factory=dict)  # what the latents are: the cache's plan and its rows

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        assert self.scaling is not None
        return {
            "images_seen": self.images_seen,
            "images_per_step": self.images_per_step,
            "scaling": self.scaling.to_dict(),
            "cache": self.cache,
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
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.nonfinite.load_state_dict(state["nonfinite"])
        self.metrics.load_state_dict(state["metrics"], next(self.network.parameters()).device)


def build_state(config: FlowTraining, device: torch.device) -> State:
    """Network, optimizer and averages at zero images, on `device`."""
    torch.manual_seed(config.seed)
    network = PyramidNCSNpp(config.model).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        network.parameters(),
        lr=config.train.learning_rate,
        betas=(config.train.beta1, config.train.beta2),
        fused=device.type in ("cuda", "cpu"),
    )
    return State(
        network, optimizer, PowerEma(network, config.ema.widths), NonFinite(config.train.max_nonfinite), Metrics()
    )


def build_flow(config: RectifiedFlowConfig) -> RectifiedFlow:
    """The objective that a config describes."""
    return RectifiedFlow(**asdict(config))


def accumulate(
    flow: RectifiedFlow, model: nn.Module, state: State, batch: LatentBatch, micro_steps: int
) -> dict[str, Tensor]:
    """One micro-batch: adds its gradient."""
    network = state.network
    assert state.scaling is not None
    device = next(network.parameters()).device
    latents, noise, time = (x.to(device, non_blocking=True) for x in (batch.latents, batch.noise, batch.uniform))
    data = state.scaling.scale(unflatten(latents, network.shapes))
    loss = flow.loss(model, data, unflatten(noise, network.shapes), flow.time(time))
    (loss.total / micro_steps).backward()
    return {"loss": loss.total} | named_levels(network, loss.levels)


def named_levels(network: PyramidNCSNpp, values: Tensor, prefix: str = "loss") -> dict[str, Tensor]:
    """{"loss_4x4": ...}: one value a level under its resolution."""
    return {f"{prefix}_{h}x{w}": value for (_, h, w), value in zip(network.shapes, values, strict=True)}
