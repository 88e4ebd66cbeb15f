"""One optimizer step of each stage, through the toolkit's own training functions."""

from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor, nn

from bench import ours
from bench.measuring import parameters, tensors, time_once, time_runs
from bench.settings import Settings
from pyramid_ldm.condition import Condition
from pyramid_ldm.config import AutoencoderTraining, FlowTraining
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.nn.layers import advance_spectral_norm
from pyramid_ldm.processes.build import build_process
from pyramid_ldm.pyramid import LatentScaling, pyramid_noise
from pyramid_ldm.training import autoencoder_state, flow_state
from pyramid_ldm.training.ema import PowerEma
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.step import take_step

GAN_AT_ONCE = ("loss.perceptual.weights=random", "loss.gan.start=0", "loss.gan.disc_warmup=0", "loss.gan.ramp=0")


@dataclass
class Step:
    """`run()` is a whole step; `split` holds seconds of its two parts, a pair a run."""

    settings: Settings
    split: list[tuple[float, float]] = field(default_factory=list)

    def run(self) -> None:
        """Gradients, then the update."""
        gradients = time_once(self.accumulate, self.settings)
        self.split.append((gradients, time_once(self.update, self.settings)))

    def accumulate(self) -> None:
        """The gradients of one batch."""
        raise NotImplementedError

    def update(self) -> None:
        """What follows: clipping, optimizers, averages, spectral norm."""
        raise NotImplementedError

    @property
    def runtime(self) -> Runtime:
        """The settings as the toolkit's training knows them."""
        return Runtime(torch.device(self.settings.device), self.settings.precision == "bf16")


def stage_one_config(
    name: str, settings: Settings, batch: int, regions: int = 0, *overrides: str
) -> AutoencoderTraining:
    """A shipped config with LPIPS and GAN active from the first image."""
    keys = [f"train.batch_size={batch}", "train.accumulate=1", *GAN_AT_ONCE, *overrides]
    if regions:
        keys += [f"train.regions={regions}", f"train.region_size={settings.side(512)}"]
    return ours.autoencoder_config(name, settings, *keys)


class StageOne(Step):
    """L1, LPIPS through a random VGG-16, and GAN."""

    def __init__(self, config: AutoencoderTraining, settings: Settings) -> None:
        super().__init__(settings)
        self.config, self.metrics = config, Metrics()
        device, batch = self.runtime.device, config.train.batch_size
        self.state = autoencoder_state.build_state(config, device)
        pixels = torch.randint(0, 256, (batch, *config.image_size, 3), dtype=torch.uint8)
        self.batch = Batch([], pixels=pixels)
        fill_optimizer(self.state.optimizer)
        if self.state.disc_optimizer is not None:
            fill_optimizer(self.state.disc_optimizer)

    def accumulate(self) -> None:
        state = self.state
        first = state.images_seen  # positions choose regions and noise
        batch = replace(self.batch, positions=list(range(first, first + self.config.train.batch_size)))
        autoencoder_state.accumulate(self.config, state, state.autoencoder, state.discriminator, batch, self.runtime)

    def update(self) -> None:
        state, runtime, train = self.state, self.runtime, self.config.train
        take_step(state.optimizer, state.autoencoder, train.gradient_clip, runtime, self.metrics, "grad_norm")
        advance_spectral_norm(state.autoencoder)
        state.images_seen += train.batch_size
        state.ema.update(state.autoencoder, state.images_seen, train.batch_size)
        if state.disc_optimizer is not None and state.discriminator is not None:
            take_step(state.disc_optimizer, state.discriminator, 0.0, runtime, self.metrics, "disc_norm")
            state.loss.adaptive.finish_step(runtime.average)

    def encoder_seconds(self) -> float:
        """Forward and backward of the encoder alone, median."""
        images = self.batch.images(self.runtime.device)

        def both() -> None:
            with self.runtime.autocast():
                loss = torch.stack([part.float().mean() for part in tensors(self.state.autoencoder.encoder(images))])
            loss.sum().backward()
            self.state.optimizer.zero_grad(set_to_none=True)

        return median(time_runs(both, self.settings))

    def existing(self) -> list[Tensor]:
        """Weights, averages and optimizer states."""
        state = self.state
        found = training_state(state.autoencoder, state.optimizer, state.ema)
        if state.discriminator is not None and state.disc_optimizer is not None:
            found += training_state(state.discriminator, state.disc_optimizer)
        return found

    def parameters(self) -> int:
        """Of the autoencoder."""
        return parameters(self.state.autoencoder)


class StageTwo(Step):
    """The flow on random latents."""

    def __init__(self, config: FlowTraining, settings: Settings, batch: int) -> None:
        super().__init__(settings)
        self.config, self.metrics, self.batch_size = config, Metrics(), batch
        self.state = flow_state.build_state(config, self.runtime.device)
        self.process = build_process(config)
        shapes = self.state.network.shapes
        zeros, ones = (tuple((value,) * shape[0] for shape in shapes) for value in (0.0, 1.0))
        self.state.scaling = LatentScaling(zeros, ones)
        self.positions = list(range(batch))
        noise = pyramid_noise(shapes, 0, "latents", self.positions)
        self.latents = tuple(level.to(self.runtime.device) for level in noise)
        fill_optimizer(self.state.optimizer)

    def accumulate(self) -> None:
        with self.runtime.autocast():
            flow_state.accumulate(
                self.process, self.state.network, self.state, self.latents, self.positions, Condition(), self.config
            )

    def update(self) -> None:
        state, train = self.state, self.config.train
        take_step(state.optimizer, state.network, train.gradient_clip, self.runtime, self.metrics, "grad_norm")
        advance_spectral_norm(state.network)
        state.images_seen += self.batch_size
        state.ema.update(state.network, state.images_seen, self.batch_size)

    def existing(self) -> list[Tensor]:
        """Weights, averages and optimizer states."""
        return training_state(self.state.network, self.state.optimizer, self.state.ema)

    def parameters(self) -> int:
        """Of the network."""
        return parameters(self.state.network)


def fill_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Adam's moments, which the first step would make: a step without gradients to speak of."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: PowerEma | None = None) -> list[Tensor]:
    """Every tensor that outlives a step."""
    found = [*model.parameters(), *model.buffers(), *tensors(optimizer.state_dict()["state"])]
    return found + (tensors(ema.state_dict()) if ema is not None else [])
