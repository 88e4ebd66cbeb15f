"""Stage one: a folder of photographs to a pyramid autoencoder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.loss import discriminator_learns
from pyramid_ldm.config.autoencoder import AutoencoderTraining
from pyramid_ldm.data.folder import Folder, ImageFile, fingerprint, scan, split_held_out, too_many_bad, with_known
from pyramid_ldm.data.loading import load_batches
from pyramid_ldm.data.order import PositionSampler
from pyramid_ldm.data.photographs import (
    BadFile,
    Photographs,
    Preprocessing,
    collate_images,
    crops_to_examine,
)
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.figures import comparison_grid
from pyramid_ldm.evaluation.metrics import local_lipschitz, psnr, ssim
from pyramid_ldm.nn.layers import advance_spectral_norm
from pyramid_ldm.ownership import replace_directory
from pyramid_ldm.pyramid import level_shapes
from pyramid_ldm.training.autoencoder_state import Build, State, accumulate, build_state, revive_codes
from pyramid_ldm.training.checkpoint import load_newest, prune, save_checkpoint
from pyramid_ldm.training.log import RunLog
from pyramid_ldm.training.run import open_run, record_start, refuse_other_step
from pyramid_ldm.training.runtime import Interrupted, Runtime, start, stop_on_signal
from pyramid_ldm.training.schedule import due, learning_rate, whole_steps
from pyramid_ldm.training.step import per_step, rounding_note, set_learning_rate, take_step


def train_autoencoder(config: AutoencoderTraining, build: Build = PyramidAutoencoder) -> tuple[Path, bool]:
    """Runs, or resumes, stage one. Returns (run directory, whether it reached `train.images`).

    Args:
        build: the network of a model config; another one is trained in exactly the same way, to be compared.
    """
    runtime = start(config.device, config.precision)
    with open_run(config, {"data.root": Path(config.data.root)}, runtime) as run:
        return run, _train(config, build, run, runtime)


def _train(config: AutoencoderTraining, build: Build, run: Path, runtime: Runtime) -> bool:
    folder: Folder = runtime.first(lambda: scan(Path(config.data.root)))
    size, train = (config.image_size[0], config.image_size[1]), config.train
    files, notes = folder.large_enough(size, config.data.upscale)
    state = build_state(config, runtime.device, build)
    notes = [*folder.notes(), *notes, *resume(config, state, run, runtime)]
    present = {file.digest for file in files}
    notes += [f"skipped {state.bad[file.digest]}" for file in files if file.digest in state.bad]
    files = with_known(files, state.bad)
    train_files, held_out_files = begin(config, state, files, run, runtime)
    model = runtime.wrap(state.autoencoder, config.compile)
    discriminator = runtime.wrap(state.discriminator) if state.discriminator is not None else None

    step_images = per_step(train, runtime)
    total = whole_steps(train.images, step_images)
    look = Preprocessing(size, config.data.crop, config.data.zoom, config.data.flip, config.data.upscale)
    photographs = Photographs(train_files, look, config.seed, state.bad)
    feed = load_batches(
        photographs,
        collate_images,
        PositionSampler(
            start=state.images_seen,
            stop=state.images_seen + whole_steps(total - state.images_seen, step_images),
            batch_size=train.batch_size,
            rank=runtime.rank,
            ranks=runtime.ranks,
        ),
        workers=config.data.workers,
        pin=runtime.device.type == "cuda",
    )
    disc_rate = config.loss.gan.learning_rate or train.learning_rate
    failure: UserError | None = None

    def refuse_bad() -> UserError | None:
        bad = len(present & (state.bad.keys() | state.gone)) + len(folder.unreadable)
        images = len(present) + len(folder.unreadable)
        key = "data.max_bad_fraction"
        error = too_many_bad(config.data.root, bad, images, config.data.max_bad_fraction, key)
        if not runtime.any(error is not None):
            return None
        return error or UserError(f"{config.data.root}: another process met more bad images than {key} allows")

    with (
        stop_on_signal() as stop,
        RunLog(run, main=runtime.main, start=state.images_seen, total=total, name="train-ae") as log,
    ):
        for line in notes:
            log.say(line)
        log.say(describe(config, state, runtime, len(train_files), len(held_out_files), total))

        def look_closely() -> None:
            examine(config, state, held_out_files, train_files, look, runtime, log)

        if state.images_seen >= total:
            log.say(f"trained already; model/ is written again: the average of ema.export={config.ema.export}")
            export(config, run, state, runtime)
        done = state.images_seen >= total
        if log.picture_missing("reconstructions", config.log.pictures_every, step_images, last=done):
            look_closely()  # a kill came between the checkpoint and its pictures
        while state.images_seen < total and not runtime.any(stop.requested):
            before = state.images_seen
            rate = learning_rate(train, before)
            set_learning_rate(state.optimizer, rate)
            if state.disc_optimizer is not None:
                set_learning_rate(state.disc_optimizer, rate * disc_rate / train.learning_rate)

            try:  # all of a step's data first: whatever happens here, the state is that of a whole step
                batches = runtime.fetch(stop, feed, train.accumulate)
            except (Interrupted, UserError) as error:
                if runtime.ranks > 1:  # the others know nothing of it
                    raise
                failure = error if isinstance(error, UserError) else None
                break
            report_bad([bad for batch in batches for bad in batch.bad], state, log)
            failure = refuse_bad()
            if failure is not None:
                break
            terms: list[dict[str, Tensor]] = []
            for micro, batch in enumerate(batches):
                runtime.seed_step(config.seed, before + micro * train.batch_size * runtime.ranks)
                with runtime.last_micro_step(micro == train.accumulate - 1, model, discriminator):
                    terms.append(accumulate(config, state, model, discriminator, batch, runtime))

            finite = take_step(
                state.optimizer, state.autoencoder, train.gradient_clip, runtime, state.metrics, "grad_norm"
            )
            state.images_seen = before + step_images
            if finite:
                advance_spectral_norm(state.autoencoder)
                state.ema.update(state.autoencoder, state.images_seen, step_images)
            if state.disc_optimizer is not None and state.discriminator is not None:
                if discriminator_learns(config.loss.gan, before):
                    finite &= take_step(
                        state.disc_optimizer, state.discriminator, 0.0, runtime, state.metrics, "disc_norm"
                    )
                state.loss.adaptive.finish_step(runtime.average)
            revive_codes(config, state, batches[-1], before, runtime)
            failure = state.nonfinite.record(finite, [name for batch in batches for name in batch.files])
            if failure is not None:
                break
            if finite:
                state.metrics.add_all(terms)

            log.advance(state.images_seen)
            last = state.images_seen >= total
            if due(config.log.every, before, state.images_seen) or last:
                values = runtime.mean(state.metrics.take())
                if state.codebook is not None:
                    values |= state.codebook.figures(state.autoencoder.level_names, runtime)
                values |= {"learning_rate": rate, "nonfinite": float(state.nonfinite.count)}
                log.metrics(state.images_seen, values)
            if due(config.checkpoint.every, before, state.images_seen) or last:
                save(config, run, state, runtime)
            if due(config.log.pictures_every, before, state.images_seen) or last:
                look_closely()
        if 0 < state.images_seen < total and not state.nonfinite.exceeded:
            save(config, run, state, runtime)
    if failure is not None:
        raise failure
    runtime.barrier()
    return state.images_seen >= total


def resume(config: AutoencoderTraining, state: State, run: Path, runtime: Runtime) -> list[str]:
    """Loads the newest whole checkpoint, if there is one, into `state`; returns what is to be said about it."""
    saved, skipped = load_newest(run)
    if saved is not None:
        refuse_other_step(run, saved["images_per_step"], config, runtime)
        state.load_state_dict(saved)
    return skipped


def begin(
    config: AutoencoderTraining, state: State, files: Sequence[ImageFile], run: Path, runtime: Runtime
) -> tuple[list[ImageFile], list[ImageFile]]:
    """Records the start; returns (training, held out). UserError where the run was begun on other photographs."""
    data = fingerprint(files)
    if state.images_seen and state.data != data:
        raise UserError(
            f"{run}: was started on other photographs ({state.data}, now {data}); use a new run_dir, or give those "
            f"back (files that could not be read may be missing)"
        )
    state.data, state.images_per_step = data, per_step(config.train, runtime)
    train_files, held_out_files = split_held_out(files, config.data.validation)
    record_start(run, config, runtime, state.images_seen, data)
    return train_files, held_out_files


def report_bad(found: Sequence[BadFile], state: State, log: RunLog) -> None:
    """Names each file that was skipped, once, from the process that met it."""
    for bad in found:
        if bad.digest in state.bad or bad.digest in state.gone:
            continue
        log.warn(f"skipped {bad.message}")
        if bad.of_content:
            state.bad[bad.digest] = bad.message
        else:
            state.gone.add(bad.digest)


def examine(
    config: AutoencoderTraining,
    state: State,
    held_out: list[ImageFile],
    train: list[ImageFile],
    look: Preprocessing,
    runtime: Runtime,
    log: RunLog,
) -> None:
    """Up to `log.examined` held-out and as many training images, cut as training cuts, through the averaged model:
    PSNR, SSIM, LPIPS of each split, and a grid of originals beside reconstructions. Whatever goes wrong here ends no
    run."""
    if not runtime.main:
        return
    try:
        bad: list[BadFile] = []
        _examine(config, state, held_out, train, look, runtime, log, bad)
        report_bad(bad, state, log)
    except Exception as error:
        log.warn(f"no held-out figures and pictures this time: {type(error).__name__}: {error}")


@torch.no_grad()
def _examine(
    config: AutoencoderTraining,
    state: State,
    held_out: list[ImageFile],
    train: list[ImageFile],
    look: Preprocessing,
    runtime: Runtime,
    log: RunLog,
    bad: list[BadFile],
) -> None:
    averaged = state.ema.export(state.autoencoder, config.ema.export)
    figures: dict[str, float] = {}
    shown: list[tuple[Tensor, Tensor]] = []  # original, reconstruction
    for split, files in (("held_out", held_out), ("train", train)):
        rows: list[dict[str, float]] = []
        chosen = [file for file in files if file.digest not in state.bad][: config.log.examined]
        for _, crop in crops_to_examine(chosen, look, config.seed, bad):
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


def export(config: AutoencoderTraining, run: Path, state: State, runtime: Runtime) -> None:
    """model/: the average of width `ema.export`; its marker says which photographs were held out."""
    if runtime.main:
        averaged = state.ema.export(state.autoencoder, config.ema.export)
        about = {"validation": config.data.validation, "data": state.data}
        replace_directory(run / "model", "model", averaged.save_pretrained, **about)


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
