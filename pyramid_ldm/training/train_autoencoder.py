"""Stage one: a folder of photographs to a pyramid autoencoder."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoder.discriminator import PatchDiscriminator, hinge_loss
from pyramid_ldm.autoencoder.loss import AutoencoderLoss, discriminator_learns
from pyramid_ldm.autoencoder.perceptual import PerceptualLoss
from pyramid_ldm.autoencoder.regions import Regions
from pyramid_ldm.config.autoencoder import AutoencoderConfig, AutoencoderTraining
from pyramid_ldm.data.images import ImageFile, find_images, folder_fingerprint, split_held_out
from pyramid_ldm.data.photographs import ImageBatch, Photographs, Preprocessing, collate_images, load_held_out
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.figures import comparison_grid
from pyramid_ldm.evaluation.metrics import local_lipschitz, psnr, ssim
from pyramid_ldm.files import replace_directory
from pyramid_ldm.nn.layers import advance_spectral_norm
from pyramid_ldm.pyramid import level_shapes, pyramid_noise
from pyramid_ldm.training.checkpoint import load_newest, prune, save_checkpoint
from pyramid_ldm.training.ema import PowerEma
from pyramid_ldm.training.log import Metrics, RunLog
from pyramid_ldm.training.run import batches, open_run
from pyramid_ldm.training.runtime import Runtime, start, stop_on_signal
from pyramid_ldm.training.schedule import due, learning_rate, whole_steps
from pyramid_ldm.training.step import NonFinite, per_step, rounding_note, set_learning_rate, take_step

Build = Callable[[AutoencoderConfig], PyramidAutoencoder]


@dataclass
class State:
    """Everything that a step changes."""

    autoencoder: PyramidAutoencoder
    discriminator: PatchDiscriminator | None
    optimizer: torch.optim.Optimizer
    disc_optimizer: torch.optim.Optimizer | None
    ema: PowerEma
    loss: AutoencoderLoss
    nonfinite: NonFinite
    images_seen: int = 0
    unreadable: set[str] = field(default_factory=set)  # a message a file

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "images_seen": self.images_seen,
            "unreadable": sorted(self.unreadable),
            "autoencoder": self.autoencoder.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator": self.discriminator.state_dict() if self.discriminator else None,
            "disc_optimizer": self.disc_optimizer.state_dict() if self.disc_optimizer else None,
            "adaptive_weight": self.loss.adaptive.value,
            "nonfinite": self.nonfinite.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Strict."""
        self.images_seen, self.unreadable = state["images_seen"], set(state["unreadable"])
        self.autoencoder.load_state_dict(state["autoencoder"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss.adaptive.value = state["adaptive_weight"]
        self.nonfinite.load_state_dict(state["nonfinite"])
        if self.discriminator is not None and self.disc_optimizer is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.disc_optimizer.load_state_dict(state["disc_optimizer"])


def build_state(config: AutoencoderTraining, device: torch.device, build: Build = PyramidAutoencoder) -> State:
    """Networks, optimizers, averages and loss at zero images, on `device`."""
    runtime_seed, loss_config, train = config.seed, config.loss, config.train
    torch.manual_seed(runtime_seed)
    autoencoder = build(config.model).to(device).to(memory_format=torch.channels_last)
    discriminator = disc_optimizer = None
    betas, fused = (train.beta1, train.beta2), device.type in ("cuda", "cpu")
    if loss_config.gan.weight > 0:
        discriminator = PatchDiscriminator(loss_config.gan.channels, loss_config.gan.layers)
        discriminator = discriminator.to(device).to(memory_format=torch.channels_last)
        rate = loss_config.gan.learning_rate or train.learning_rate
        disc_optimizer = torch.optim.Adam(discriminator.parameters(), lr=rate, betas=betas, fused=fused)
    perceptual = PerceptualLoss(loss_config.perceptual.weights, device) if loss_config.perceptual.weight > 0 else None
    return State(
        autoencoder,
        discriminator,
        torch.optim.Adam(autoencoder.parameters(), lr=train.learning_rate, betas=betas, fused=fused),
        disc_optimizer,
        PowerEma(autoencoder, config.ema.widths),
        AutoencoderLoss(loss_config, perceptual, discriminator),
        NonFinite(train.max_nonfinite),
    )


def train_autoencoder(config: AutoencoderTraining, build: Build = PyramidAutoencoder) -> tuple[Path, bool]:
    """Runs, or resumes, stage one. Returns (run directory, whether it reached `train.images`).

    Args:
        build: the network of a model config; another one is trained in exactly the same way, to be compared.
    """
    runtime = start(config.device, config.precision)
    files = find_images(Path(config.data.root))
    train_files, held_out_files = split_held_out(files, config.data.validation)
    run = open_run(config, folder_fingerprint(files), runtime)
    state = build_state(config, runtime.device, build)
    resumed, skipped = load_newest(run)
    if resumed is not None:
        state.load_state_dict(resumed)
    model = runtime.wrap(state.autoencoder, config.compile)
    judge = runtime.wrap(state.discriminator) if state.discriminator is not None else None

    train = config.train
    step_images = per_step(train, runtime)
    total = whole_steps(train.images, step_images)
    size = (config.image_size[0], config.image_size[1])
    looks = Preprocessing(size, config.data.crop, config.data.zoom, config.data.flip)
    feed = batches(
        Photographs(train_files, looks, config.seed),
        collate_images,
        start=state.images_seen,
        stop=state.images_seen + whole_steps(total - state.images_seen, step_images),
        batch_size=train.batch_size,
        workers=config.data.workers,
        runtime=runtime,
    )
    disc_rate = config.loss.gan.learning_rate or train.learning_rate
    metrics = Metrics()

    with (
        stop_on_signal() as stop,
        RunLog(run, main=runtime.main, start=state.images_seen, total=total, name="train-ae") as log,
    ):
        for line in skipped:
            log.say(line)
        log.say(describe(config, state, runtime, len(train_files), len(held_out_files), total))
        if state.images_seen >= total:
            log.say(f"trained already; model/ is written again: the average of ema.export={config.ema.export}")
            export(config, run, state, runtime)
        while state.images_seen < total and not runtime.any(stop.requested):
            before = state.images_seen
            rate = learning_rate(train, before)
            set_learning_rate(state.optimizer, rate)
            if state.disc_optimizer is not None:
                set_learning_rate(state.disc_optimizer, rate * disc_rate / train.learning_rate)

            seen_files: list[str] = []
            terms: list[dict[str, Tensor]] = []
            for micro in range(train.accumulate):
                batch = next(feed)
                report_unreadable(batch, state, log)
                seen_files += batch.files
                runtime.seed_step(config.seed, before + micro * train.batch_size * runtime.ranks)
                terms.append(accumulate(config, state, model, judge, batch, runtime))

            refuse_many_unreadable(config, state, len(train_files), runtime)
            finite = take_step(state.optimizer, state.autoencoder, train.gradient_clip, runtime, metrics, "grad_norm")
            state.images_seen = before + step_images
            if finite:
                advance_spectral_norm(state.autoencoder)
                state.ema.update(state.autoencoder, state.images_seen, step_images)
            if state.disc_optimizer is not None and state.discriminator is not None:
                if discriminator_learns(config.loss.gan, before):
                    finite &= take_step(state.disc_optimizer, state.discriminator, 0.0, runtime, metrics, "disc_norm")
                state.loss.adaptive.finish_step(runtime.average)
            if state.nonfinite.record(finite, seen_files):
                metrics.add_all(terms)

            log.advance(state.images_seen)
            last = state.images_seen >= total
            if due(config.log.every, before, state.images_seen) or last:
                values = runtime.mean(metrics.take())
                log.metrics(
                    state.images_seen, values | {"learning_rate": rate, "nonfinite": float(state.nonfinite.count)}
                )
            if due(config.log.pictures_every, before, state.images_seen) or last:
                examine(config, state, held_out_files, train_files, size, runtime, log)
            if due(config.checkpoint.every, before, state.images_seen) or last:
                save(config, run, state, runtime)
        if state.images_seen < total:
            save(config, run, state, runtime)
    runtime.barrier()
    return run, state.images_seen >= total


def accumulate(
    config: AutoencoderTraining,
    state: State,
    model: nn.Module,
    judge: nn.Module | None,
    batch: ImageBatch,
    runtime: Runtime,
) -> dict[str, Tensor]:
    """One micro-batch: adds the gradients of both networks' objectives, each to its own parameters."""
    images = batch.images.to(runtime.device, non_blocking=True, memory_format=torch.channels_last)
    shapes = level_shapes(state.autoencoder.levels, config.image_size)
    noise = None
    if config.model.latent == "kl":
        noise = pyramid_noise(shapes, config.seed, "posterior", batch.positions)
    scale, train = 1 / config.train.accumulate, config.train
    regions = None
    if train.regions:
        regions = Regions.draw(train.regions, train.region_size, config.image_size, config.seed, batch.positions)
    with runtime.autocast():
        output = model(images, noise, regions)
        target = images if regions is None else regions.cut(images)
        terms = state.loss.accumulate_gradients(
            output, target, state.autoencoder.decoder.last_weight, state.images_seen, scale
        )
        if judge is not None and discriminator_learns(config.loss.gan, state.images_seen):
            real, fake = judge(torch.cat([target, output.reconstruction.detach()])).chunk(2)
            disc = hinge_loss(real, fake)
            terms |= {"disc": disc.detach(), "logits_real": real.mean(), "logits_fake": fake.mean()}
    if "disc" in terms:
        (disc * scale).backward()
    if config.model.latent == "vq":
        terms["codebook_perplexity"] = output.codebook_perplexity
    return terms


def report_unreadable(batch: ImageBatch, state: State, log: RunLog) -> None:
    """Names each file that was skipped, once, from the process that met it."""
    for message in batch.unreadable:
        if message not in state.unreadable:
            state.unreadable.add(message)
            log.warn(f"skipped {message}")


def refuse_many_unreadable(config: AutoencoderTraining, state: State, files: int, runtime: Runtime) -> None:
    """Stops the run, on every process, when more files than `data.max_bad_fraction` (and than 3) cannot be read."""
    if runtime.any(len(state.unreadable) > max(3, config.data.max_bad_fraction * files)):
        raise UserError(
            f"{config.data.root}: {len(state.unreadable)} of {files} images cannot be read, more than "
            f"data.max_bad_fraction={config.data.max_bad_fraction}; mend or remove them"
        )


@torch.no_grad()
def examine(
    config: AutoencoderTraining,
    state: State,
    held_out: list[ImageFile],
    train: list[ImageFile],
    size: tuple[int, int],
    runtime: Runtime,
    log: RunLog,
) -> None:
    """Held-out images (training images where none are held out) through the EMA model: PSNR, SSIM, LPIPS, and a grid of
    originals beside reconstructions."""
    if not runtime.main:
        return
    averaged = state.ema.export(state.autoencoder, config.ema.export)
    images = load_held_out(held_out or train, size, config.log.pictures).to(runtime.device)
    shown, values = [], []
    for image in images.split(1):
        with runtime.autocast():
            decoded = averaged.decode_tiled(averaged.encode(image).mode()).float().clamp(-1, 1)
        shown.append(decoded)
        lpips = float("nan") if state.loss.perceptual is None else state.loss.perceptual.in_parts(decoded, image)
        values.append((float(psnr(decoded, image)), float(ssim(decoded, image)), lpips))
    mean_psnr, mean_ssim, mean_lpips = torch.tensor(values).mean(dim=0).tolist()
    ratio = local_lipschitz(lambda x: averaged.encode(x).mode(), images[:1])
    kind = "held_out" if held_out else "train"
    found = {f"{kind}_psnr": mean_psnr, f"{kind}_ssim": mean_ssim, "local_lipschitz": float(ratio)}
    if state.loss.perceptual is not None:
        found[f"{kind}_lpips"] = mean_lpips
    log.metrics(state.images_seen, found)
    log.say("  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    log.picture("reconstructions", state.images_seen, comparison_grid(images.cpu(), torch.cat(shown).cpu()))


def export(config: AutoencoderTraining, run: Path, state: State, runtime: Runtime) -> None:
    """model/: the average of width `ema.export`."""
    if runtime.main:
        averaged = state.ema.export(state.autoencoder, config.ema.export)
        replace_directory(run / "model", averaged.save_pretrained)


def save(config: AutoencoderTraining, run: Path, state: State, runtime: Runtime) -> None:
    """The exported model and a checkpoint."""
    export(config, run, state, runtime)  # first: a kill in between only repeats work
    if runtime.main:
        save_checkpoint(run, state.images_seen, state.state_dict())
        prune(run, config.checkpoint.keep_last, config.checkpoint.keep_every, per_step(config.train, runtime))
    runtime.barrier()


def describe(config: AutoencoderTraining, state: State, runtime: Runtime, train: int, held_out: int, total: int) -> str:
    """What is about to happen, in a few lines."""
    encoder, decoder = (
        sum(p.numel() for p in part.parameters()) / 1e6
        for part in (state.autoencoder.encoder, state.autoencoder.decoder)
    )
    levels = " + ".join(f"{h}x{w}x{c}" for c, h, w in level_shapes(state.autoencoder.levels, config.image_size))
    regions = (
        f"; the loss sees {config.train.regions} random regions of {config.train.region_size} pixels a side"
        if config.train.regions
        else ""
    )
    beginning = f"resuming at {state.images_seen}" if state.images_seen else "from the start"
    return rounding_note(config.train.images, total) + (
        f"train-ae: {train} images to train on, {held_out} held out, {config.image_size[0]}x{config.image_size[1]}\n"
        f"latents {levels}, 1:{state.autoencoder.compression_ratio():.1f}; "
        f"encoder {encoder:.1f} M, decoder {decoder:.1f} M parameters{regions}\n"
        f"{beginning}, to {total} images; {runtime.device}, {'bf16' if runtime.bf16 else 'fp32'}, "
        f"{runtime.ranks} process(es); run directory {config.run_dir}"
    )
