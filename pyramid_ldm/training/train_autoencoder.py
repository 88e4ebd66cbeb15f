"""Stage one: a folder of photographs to a pyramid autoencoder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.loss import discriminator_learns
from pyramid_ldm.config.autoencoder import AutoencoderTraining
from pyramid_ldm.data.batch import BadFile, Batch
from pyramid_ldm.data.order import PositionSampler
from pyramid_ldm.data.photographs import crops_to_examine
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.metrics import local_lipschitz, psnr, ssim
from pyramid_ldm.evaluation.sheets import comparison_grid
from pyramid_ldm.nn.layers import advance_spectral_norm
from pyramid_ldm.pyramid import level_shapes
from pyramid_ldm.signals import StopRequest
from pyramid_ldm.training.autoencoder_state import Build, State, accumulate, build_state, follow_codes
from pyramid_ldm.training.checkpoint import load_newest
from pyramid_ldm.training.log import RunLog
from pyramid_ldm.training.loop import Stage, train
from pyramid_ldm.training.photographs import TrainingPhotographs
from pyramid_ldm.training.run import open_run, record_start, refuse_other_step
from pyramid_ldm.training.runtime import Runtime, start
from pyramid_ldm.training.step import per_step, set_learning_rate, take_step

FIT_CROPS, FIT_BATCH = 256, 4  # for a linear base


def train_autoencoder(config: AutoencoderTraining, build: Build = PyramidAutoencoder) -> tuple[Path, bool]:
    """Runs, or resumes, stage one. Returns (run directory, whether it reached `train.images`).

    Args:
        build: the network of a model config; another one is trained in exactly the same way, to be compared.
    """
    runtime = start(config.device, config.precision)
    with open_run(config, {"data.root": Path(config.data.root)}, runtime) as run:
        return run, train(AutoencoderStage(config, run, runtime, build))


class AutoencoderStage(Stage):
    """Stage one in the loop."""

    NAME, PICTURES = "train-ae", "reconstructions"
    config: AutoencoderTraining
    state: State

    def __init__(self, config: AutoencoderTraining, run: Path, runtime: Runtime, build: Build) -> None:
        self.photographs = TrainingPhotographs(config.data, config.image_size, config.seed, runtime)
        state = build_state(config, runtime.device, build)
        super().__init__(config, run, runtime, state)
        skipped = resume(config, state, run, runtime)
        self.photographs.begin(state.bad)
        self.notes = [*config.unused(), *self.photographs.notes, *skipped]
        begin(config, state, self.photographs.fingerprint, run, runtime)
        self.model = runtime.wrap(state.autoencoder, config.compile)
        self.discriminator = runtime.wrap(state.discriminator) if state.discriminator is not None else None
        self.networks = [self.model] if self.discriminator is None else [self.model, self.discriminator]
        self.last_batch: Batch | None = None  # for codebook entries that are revived

    def describe(self, total: int) -> str:
        """Images, latents, networks."""
        counts = len(self.photographs.train), len(self.photographs.held_out)
        return describe(self.config, self.state, self.runtime, *counts, total)

    def batches(self, positions: PositionSampler) -> Iterator[Batch]:
        """Photographs."""
        return self.photographs.batches(positions)

    def set_rate(self, rate: float) -> None:
        """Both networks', in proportion."""
        set_learning_rate(self.state.optimizer, rate)
        if self.state.disc_optimizer is not None:
            base = self.config.train.learning_rate
            set_learning_rate(
                self.state.disc_optimizer, rate * (self.config.loss.gan.learning_rate or base) / base
            )  # fmt: skip

    def prepare(self, stop: StopRequest, log: RunLog) -> None:
        """A linear base is fitted."""
        if self.state.autoencoder.linear_base is not None:
            fit_base(self, stop, log)

    def received(self, batch: Batch, log: RunLog) -> None:
        """Names what could not be read."""
        self.last_batch = batch
        self.photographs.received(batch.bad, log)

    def refuse(self) -> UserError | None:
        """Where too many of the images cannot be read."""
        return self.photographs.refuse()

    def accumulate(self, batch: Batch) -> dict[str, Tensor]:
        """Of both networks."""
        return accumulate(self.config, self.state, self.model, self.discriminator, batch, self.runtime)

    def step(self, before: int) -> bool:
        """Each network's step is left out by itself; averages and spectral norm follow the autoencoder alone."""
        config, state, runtime = self.config, self.state, self.runtime
        clip, guard = config.train.gradient_clip, state.nonfinite
        finite = take_step(state.optimizer, state.autoencoder, clip, runtime, state.metrics, "grad_norm", guard)
        if finite:
            advance_spectral_norm(state.autoencoder)
            state.ema.update(state.autoencoder, state.images_seen, state.images_per_step)
        if state.disc_optimizer is not None and state.discriminator is not None:
            if discriminator_learns(config.loss.gan, before):
                finite &= take_step(state.disc_optimizer, state.discriminator, 0.0, runtime, state.metrics, "disc_norm")
            state.loss.adaptive.finish_step(runtime.average)
        assert self.last_batch is not None
        follow_codes(config, state, self.last_batch, before, runtime)
        return finite

    def figures(self) -> dict[str, float]:
        """How much of each codebook is used."""
        codebook = self.state.codebook
        return {} if codebook is None else codebook.figures(self.state.autoencoder.level_names, self.runtime)

    def examine(self, log: RunLog) -> None:
        """Up to `log.examined` held-out and as many training images, cut as training cuts, through the averaged model:
        PSNR, SSIM, LPIPS of each split, and a grid of originals beside reconstructions."""
        bad: list[BadFile] = []
        examine(self, log, bad)
        self.photographs.received(bad, log)

    def save_model(self, directory: Path) -> None:
        """The average of width `ema.export`."""
        self.state.ema.export(self.state.autoencoder, self.config.ema.export).save_pretrained(directory)

    def about(self) -> dict[str, Any]:
        """Which photographs were held out."""
        return {"validation": self.config.data.validation, "data": self.state.data}


def fit_base(stage: AutoencoderStage, stop: StopRequest, log: RunLog) -> None:
    """Of the first crops of training, by the first process. Interrupted after a signal, UserError where too many
    photographs cannot be read."""
    photographs, runtime, autoencoder = stage.photographs, stage.runtime, stage.state.autoencoder
    positions = [list(range(i, i + FIT_BATCH)) for i in range(0, FIT_CROPS, FIT_BATCH)]
    log.say(f"model.base=linear: fitting it to {FIT_CROPS} crops, twice read")

    def crops() -> Iterator[Tensor]:
        batches = photographs.batches(positions)
        for _ in positions:
            batch = runtime.fetch(stop, batches)
            photographs.received(batch.bad, log)
            if (fault := photographs.fault()) is not None:
                raise fault
            yield batch.images(runtime.device)

    def fitted() -> list[dict[str, Tensor]]:
        autoencoder.fit_base(crops)
        return [{name: t.cpu() for name, t in half.state_dict().items()} for half in autoencoder.linear_base or ()]

    for half, state in zip(autoencoder.linear_base or (), runtime.first(fitted), strict=True):
        half.load_state_dict(state)


def resume(config: AutoencoderTraining, state: State, run: Path, runtime: Runtime) -> list[str]:
    """Loads the newest whole checkpoint, if there is one, into `state`; returns what is to be said about it."""
    saved, skipped = load_newest(run)
    if saved is not None:
        refuse_other_step(run, saved["images_per_step"], config, runtime)
        state.load_state_dict(saved)
    return skipped


def begin(config: AutoencoderTraining, state: State, data: str, run: Path, runtime: Runtime) -> None:
    """Records the start. UserError where the run was begun on photographs of another fingerprint."""
    if state.images_seen and state.data != data:
        raise UserError(
            f"{run}: was started on other photographs ({state.data}, now {data}); use a new run_dir, or give those "
            f"back (files that could not be read may be missing)"
        )
    state.data, state.images_per_step = data, per_step(config.train, runtime)
    record_start(run, config, runtime, state.images_seen, data)


@torch.no_grad()
def examine(stage: AutoencoderStage, log: RunLog, bad: list[BadFile]) -> None:
    """Files that cannot be read are added to `bad`."""
    config, state, runtime = stage.config, stage.state, stage.runtime
    averaged = state.ema.export(state.autoencoder, config.ema.export)
    figures: dict[str, float] = {}
    shown: list[tuple[Tensor, Tensor]] = []  # original, reconstruction
    photographs = stage.photographs
    for split, files in (("held_out", photographs.held_out), ("train", photographs.train)):
        rows: list[dict[str, float]] = []
        chosen = [file for file in files if file.digest not in state.bad][: config.log.examined]
        for _, crop in crops_to_examine(chosen, photographs.preprocessing, config.seed, bad):
            image = crop[None].to(runtime.device)
            with runtime.autocast():
                decoded = averaged.decode_tiled(averaged.encode(image).mode()).float().clamp(-1, 1)
            row = {"psnr": float(psnr(decoded, image)), "ssim": float(ssim(decoded, image))}
            if state.loss.perceptual is not None:
                row["lpips"] = state.loss.perceptual.in_parts(decoded, image)
            rows.append(row)
            if len(shown) < config.log.pictures and not figures:  # of training images where no other can be read
                shown.append((image.cpu(), decoded.cpu()))
        if rows:
            figures |= {f"{split}_{key}": sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    if not shown:
        return
    figures["local_lipschitz"] = float(
        local_lipschitz(lambda x: averaged.encode(x).mode(), shown[0][0].to(runtime.device))
    )
    log.metrics(state.images_seen, figures)
    log.say("  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    originals, reconstructions = (torch.cat(images) for images in zip(*shown, strict=True))
    log.picture("reconstructions", state.images_seen, comparison_grid(originals, reconstructions))


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
    return (
        f"train-ae: {train} images to train on, {held_out} held out, {config.image_size[0]}x{config.image_size[1]}\n"
        f"latents {levels}, 1:{state.autoencoder.compression_ratio():.1f}; "
        f"encoder {encoder:.1f} M, decoder {decoder:.1f} M parameters{regions}\n"
        f"{beginning}, to {total} images; {runtime.device}, {'bf16' if runtime.bf16 else 'fp32'}, "
        f"{runtime.ranks} process(es); run directory {config.run_dir}"
    )
