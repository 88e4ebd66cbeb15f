"""What a step of stage one changes, and the step's gradients."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.discriminator import PatchDiscriminator, hinge_loss, judged_mean
from pyramid_ldm.autoencoders.pyramid.loss import AutoencoderLoss, discriminator_learns
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.autoencoders.pyramid.regions import Regions
from pyramid_ldm.config.autoencoder import AutoencoderConfig, AutoencoderTraining
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.nn.resample import box_low_pass
from pyramid_ldm.pyramid import level_shapes, pyramid_noise
from pyramid_ldm.randomness import uniform
from pyramid_ldm.training.codebook import CodebookUse
from pyramid_ldm.training.ema import PowerEma
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.optimizer import Optimizer, build_optimizer
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.schedule import due
from pyramid_ldm.training.step import StepGuard

MAX_NORM = 0.7  # ours, of 0.35 to 2 (docs/EXPERIMENTS.md)
Build = Callable[[AutoencoderConfig], PyramidAutoencoder]


@dataclass
class State:
    """Everything that a step changes, and what the run was begun with."""

    autoencoder: PyramidAutoencoder
    discriminator: PatchDiscriminator | None
    optimizer: Optimizer
    disc_optimizer: torch.optim.Optimizer | None
    ema: PowerEma
    loss: AutoencoderLoss
    nonfinite: StepGuard
    codebook: CodebookUse | None
    metrics: Metrics
    images_seen: int = 0
    images_per_step: int = 0  # 0: not begun
    data: str = ""  # fingerprint of the photographs; empty: not begun
    bad: dict[str, str] = field(default_factory=dict)  # photographs that are no images: digest, message
    codes_used: list[tuple[Tensor, ...]] = field(default_factory=list)  # by the micro-batches of the step at hand

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "images_seen": self.images_seen,
            "images_per_step": self.images_per_step,
            "data": self.data,
            "bad": dict(self.bad),
            "autoencoder": self.autoencoder.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator": self.discriminator.state_dict() if self.discriminator else None,
            "disc_optimizer": self.disc_optimizer.state_dict() if self.disc_optimizer else None,
            "adaptive_weight": self.loss.adaptive.value,
            "codebook": self.codebook.state_dict() if self.codebook else None,
            "nonfinite": self.nonfinite.state_dict(),
            "metrics": self.metrics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Strict."""
        self.images_seen, self.images_per_step = state["images_seen"], state["images_per_step"]
        self.data, self.bad = state["data"], dict(state["bad"])
        self.autoencoder.load_state_dict(state["autoencoder"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss.adaptive.value = state["adaptive_weight"]
        self.nonfinite.load_state_dict(state["nonfinite"])
        self.metrics.load_state_dict(state["metrics"], next(self.autoencoder.parameters()).device)
        if self.codebook is not None:
            self.codebook.load_state_dict(state["codebook"])
        if self.discriminator is not None and self.disc_optimizer is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.disc_optimizer.load_state_dict(state["disc_optimizer"])


def build_state(config: AutoencoderTraining, device: torch.device, build: Build = PyramidAutoencoder) -> State:
    """Networks, optimizers, averages and loss at zero images, on `device`."""
    loss_config, train = config.loss, config.train
    torch.manual_seed(config.seed)
    autoencoder = build(config.model).to(device).to(memory_format=torch.channels_last)
    discriminator = disc_optimizer = None
    betas, fused = (train.beta1, train.beta2), device.type in ("cuda", "cpu")
    if loss_config.gan.weight > 0:
        discriminator = PatchDiscriminator(loss_config.gan.channels, loss_config.gan.layers)
        discriminator = discriminator.to(device).to(memory_format=torch.channels_last)
        rate = loss_config.gan.learning_rate or train.learning_rate
        disc_optimizer = torch.optim.Adam(discriminator.parameters(), lr=rate, betas=betas, fused=fused)
    perceptual = PerceptualLoss(loss_config.perceptual.weights, device) if loss_config.perceptual.weight > 0 else None
    sizes = [config.model.codebook_size] * len(autoencoder.quantizers)
    return State(
        autoencoder,
        discriminator,
        build_optimizer(autoencoder, train, device, precision=config.precision, max_norm=MAX_NORM),
        disc_optimizer,
        PowerEma(autoencoder, config.ema.widths),
        AutoencoderLoss(loss_config, perceptual, discriminator),
        StepGuard(train.max_nonfinite),
        CodebookUse(sizes, loss_config.codebook_restart, device) if sizes else None,
        Metrics(),
    )


def accumulate(
    config: AutoencoderTraining,
    state: State,
    model: nn.Module,
    discriminator: nn.Module | None,
    batch: Batch,
    runtime: Runtime,
) -> dict[str, Tensor]:
    """One micro-batch: adds the gradients of both networks' objectives, each to its own parameters."""
    images = batch.images(runtime.device)
    shapes = level_shapes(state.autoencoder.levels, config.image_size)
    noise = None
    if config.model.latent == "kl":
        noise = pyramid_noise(shapes, config.seed, "posterior", batch.positions)
    scale, train = 1 / config.train.accumulate, config.train
    regions = None
    if train.regions:
        regions = Regions.draw(train.regions, train.region_size, config.image_size, config.seed, batch.positions)
    kept, target = draw_levels(config, images, batch.positions)
    judged = None if kept is None else kept == len(config.model.levels)  # what coarse levels lack cannot look real
    if judged is not None and regions is not None:
        judged = judged[[image for image, _, _ in regions.corners]]
    with runtime.autocast():
        output = model(images, noise, regions, kept)
        target = target if regions is None else regions.cut(target)
        terms = state.loss.accumulate_gradients(
            output, target, state.autoencoder.decoder.last_weight, state.images_seen, scale, judged
        )
        if discriminator is not None and discriminator_learns(config.loss.gan, state.images_seen):
            real, fake = discriminator(torch.cat([target, output.reconstruction.detach()])).chunk(2)
            disc = hinge_loss(real, fake, judged)
            logits = {"logits_real": judged_mean(real, judged), "logits_fake": judged_mean(fake, judged)}
            terms |= {"disc": disc.detach(), **logits}
    if "disc" in terms:
        (disc * scale).backward()
    if state.codebook is not None:
        state.codes_used.append(output.codebook_indices)
    return terms


def draw_levels(config: AutoencoderTraining, images: Tensor, positions: list[int]) -> tuple[Tensor | None, Tensor]:
    """(how many of the coarsest levels each image is decoded from, (B,), or None for all; what that is held against),
    by position."""
    train, levels = config.train, config.model.levels
    if train.level_dropout == 0 or len(levels) == 1:
        return None, images
    draws = [(uniform(config.seed, "drop levels", p), uniform(config.seed, "levels", p)) for p in positions]
    kept = [1 + int(u * (len(levels) - 1)) if drop < train.level_dropout else len(levels) for drop, u in draws]
    target = images
    if train.level_target == "low_pass":
        factors = [levels[k - 1].factor if k < len(levels) else 1 for k in kept]
        target = torch.cat([box_low_pass(image, f) for image, f in zip(images.split(1), factors, strict=True)])
    return torch.tensor(kept, device=images.device), target


def follow_codes(config: AutoencoderTraining, state: State, batch: Batch, before: int, runtime: Runtime) -> None:
    """After a step that began at `before` images: records the codebook entries that it used and, now and then, gives
    new values to those that have not been used for long."""
    codebook = state.codebook
    if codebook is None:
        return
    for used in state.codes_used:
        codebook.record(used, before + 1)
    state.codes_used.clear()
    if not due(max(1, codebook.restart // 4), before, state.images_seen):
        return
    with torch.no_grad(), runtime.autocast():
        latents = state.autoencoder.encode(batch.images(runtime.device)).mode()
    count = codebook.revive(
        list(state.autoencoder.quantizers), latents, state.images_seen, config.seed, state.optimizer, state.ema,
        "quantizers", runtime,
    )  # fmt: skip
    state.metrics.add({"codebook_revived": torch.tensor(float(count), device=runtime.device)})
