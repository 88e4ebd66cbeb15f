"""Stage two: cached latents to a rectified-flow network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.config.flow import FlowTraining
from pyramid_ldm.data.latents import LatentRecords, collate_latents
from pyramid_ldm.data.loading import load_batches
from pyramid_ldm.data.order import PositionSampler
from pyramid_ldm.data.shards import AUTOENCODER, LatentCache
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.figures import grid
from pyramid_ldm.nn.layers import advance_spectral_norm
from pyramid_ldm.ownership import replace_directory
from pyramid_ldm.pipeline import PyramidPipeline, SolverOptions
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.pyramid import level_shapes, unflatten
from pyramid_ldm.training.checkpoint import load_newest, prune, save_checkpoint
from pyramid_ldm.training.flow_state import State, accumulate, build_flow, build_state, named_levels
from pyramid_ldm.training.log import RunLog
from pyramid_ldm.training.run import open_run, record_start, refuse_other_step
from pyramid_ldm.training.runtime import Interrupted, Runtime, start, stop_on_signal
from pyramid_ldm.training.schedule import due, learning_rate, whole_steps
from pyramid_ldm.training.step import per_step, rounding_note, set_learning_rate, take_step


def train_flow(config: FlowTraining) -> tuple[Path, bool]:
    """Runs, or resumes, stage two. Returns (run directory, whether it reached `train.images`)."""
    runtime = start(config.device, config.precision)
    shards = Path(config.data.shards)
    cache = LatentCache(shards)
    runtime.first(cache.verify)
    config.model.resolve(cache.plan.image_size, cache.plan.levels)
    for name in ("level_weights", "level_shifts"):
        values = getattr(config.rectified_flow, name)
        if values is not None and len(values) != len(cache.plan.levels):
            raise UserError(f"rectified_flow.{name} holds {len(values)} values for {len(cache.plan.levels)} levels")
    autoencoder = load_autoencoder(cache)
    with open_run(config, {"data.shards": shards}, runtime) as run:
        return run, _train(config, cache, autoencoder, run, runtime)


def _train(
    config: FlowTraining, cache: LatentCache, autoencoder: PyramidAutoencoder, run: Path, runtime: Runtime
) -> bool:
    train = config.train
    state = build_state(config, runtime.device)
    notes = resume(config, cache, state, run, runtime)
    model = runtime.wrap(state.network, config.compile)
    flow = build_flow(config.rectified_flow)

    step_images = per_step(train, runtime)
    total = whole_steps(train.images, step_images)
    feed = load_batches(
        LatentRecords(cache, cache.indices("train"), config.seed, config.data.posterior),
        collate_latents,
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
    failure: UserError | None = None

    with (
        stop_on_signal() as stop,
        RunLog(run, main=runtime.main, start=state.images_seen, total=total, name="train-flow") as log,
    ):
        for line in notes:
            log.say(line)
        log.say(describe(config, cache, state, runtime, total))

        def look_closely() -> None:
            examine(config, cache, autoencoder, flow, state, runtime, log)

        if state.images_seen >= total:
            log.say(f"trained already; model/ is written again: the average of ema.export={config.ema.export}")
            export(config, run, autoencoder, state, runtime)
        if log.picture_missing("samples", config.log.pictures_every, step_images, last=state.images_seen >= total):
            look_closely()  # a kill came between the checkpoint and its pictures
        while state.images_seen < total and not runtime.any(stop.requested):
            before = state.images_seen
            rate = learning_rate(train, before)
            set_learning_rate(state.optimizer, rate)

            try:  # all of a step's data first: whatever happens here, the state is that of a whole step
                batches = runtime.fetch(stop, feed, train.accumulate)
            except (Interrupted, UserError) as error:
                if runtime.ranks > 1:  # the others know nothing of it
                    raise
                failure = error if isinstance(error, UserError) else None
                break
            terms: list[dict[str, Tensor]] = []
            for micro, batch in enumerate(batches):
                runtime.seed_step(config.seed, before + micro * train.batch_size * runtime.ranks)
                with runtime.last_micro_step(micro == train.accumulate - 1, model), runtime.autocast():
                    terms.append(accumulate(flow, model, state, batch, train.accumulate))

            finite = take_step(state.optimizer, state.network, train.gradient_clip, runtime, state.metrics, "grad_norm")
            state.images_seen = before + step_images
            failure = state.nonfinite.record(finite, [f"positions {before} to {state.images_seen}"])
            if failure is not None:
                break
            if finite:
                advance_spectral_norm(state.network)
                state.ema.update(state.network, state.images_seen, step_images)
                state.metrics.add_all(terms)

            log.advance(state.images_seen)
            last = state.images_seen >= total
            if due(config.log.every, before, state.images_seen) or last:
                values = runtime.mean(state.metrics.take())
                log.metrics(
                    state.images_seen, values | {"learning_rate": rate, "nonfinite": float(state.nonfinite.count)}
                )
            if due(config.checkpoint.every, before, state.images_seen) or last:
                save(config, run, autoencoder, state, runtime)
            if due(config.log.pictures_every, before, state.images_seen) or last:
                look_closely()
        if 0 < state.images_seen < total and not state.nonfinite.exceeded:
            save(config, run, autoencoder, state, runtime)
    if failure is not None:
        raise failure
    runtime.barrier()
    return state.images_seen >= total


def resume(config: FlowTraining, cache: LatentCache, state: State, run: Path, runtime: Runtime) -> list[str]:
    """Loads the newest whole checkpoint, if there is one, into `state`, and records the start; returns what is to be
    said about it. UserError where the run was begun on other latents."""
    saved, skipped = load_newest(run)
    if saved is not None:
        refuse_other_step(run, saved["images_per_step"], config, runtime)
        refuse_other_cache(run, saved["cache"], cache)
        state.load_state_dict(saved)
    else:
        state.scaling, state.cache = cache.scaling(config.scaling), cache.identity()
    state.images_per_step = per_step(config.train, runtime)
    record_start(run, config, runtime, state.images_seen, f"{cache.plan.data}-{cache.plan.autoencoder}")
    return skipped


def refuse_other_cache(run: Path, before: dict[str, Any], cache: LatentCache) -> None:
    """UserError naming what of the latents is not as it was when the run was begun."""
    now = cache.identity()
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run}: was started on latents with {key} = {before.get(key)}, those in {cache.directory} have "
                f"{now.get(key)}; give the former as data.shards, or use a new run_dir"
            )


def examine(
    config: FlowTraining,
    cache: LatentCache,
    autoencoder: PyramidAutoencoder,
    flow: RectifiedFlow,
    state: State,
    runtime: Runtime,
    log: RunLog,
) -> None:
    """The averaged network: loss per level on training and on held-out records, and samples of fixed seeds. Whatever
    goes wrong here ends no run."""
    if not runtime.main:
        return
    try:
        _examine(config, cache, autoencoder, flow, state, runtime, log)
    except Exception as error:
        log.warn(f"no held-out figures and samples this time: {type(error).__name__}: {error}")


@torch.no_grad()
def _examine(
    config: FlowTraining,
    cache: LatentCache,
    autoencoder: PyramidAutoencoder,
    flow: RectifiedFlow,
    state: State,
    runtime: Runtime,
    log: RunLog,
) -> None:
    pipeline = make_pipeline(config, autoencoder, state).to(runtime.device)
    found: dict[str, Tensor] = {}
    for split in ("train", "held_out"):
        if cache.indices(split):
            losses = mean_losses(config, cache, split, pipeline, flow, runtime)
            found |= named_levels(state.network, losses, split)
    values = {name: float(value) for name, value in found.items()}
    log.metrics(state.images_seen, values)
    log.say("  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.startswith("held_out")))
    options = SolverOptions("euler", steps=config.samples.steps)
    indices = list(range(config.log.pictures))
    images = [
        image
        for output in pipeline.stream(indices, config.samples.seed, options, bf16=runtime.bf16)
        for image in output.images
    ]
    log.picture("samples", state.images_seen, grid(images))


def mean_losses(
    config: FlowTraining,
    cache: LatentCache,
    split: str,
    pipeline: PyramidPipeline,
    flow: RectifiedFlow,
    runtime: Runtime,
) -> Tensor:
    """(levels,): of the EMA network, without dropout, on up to 256 draws of a split: several times and noises for each
    image, the same in every run of a seed. Times are uniform whatever training draws, so that runs can be compared."""
    chosen = cache.indices(split)
    records = LatentRecords(cache, chosen, config.seed, config.data.posterior, shuffle=False)
    flow = replace(flow, time_distribution="uniform")
    found = []
    for start_at in range(0, min(256, 4 * len(chosen)), 32):
        batch = collate_latents([records[start_at + i] for i in range(32)])
        latents, noise, time = (x.to(runtime.device) for x in (batch.latents, batch.noise, batch.uniform))
        data = pipeline.scaling.scale(unflatten(latents, pipeline.flow.shapes))
        with runtime.autocast():
            loss = flow.loss(pipeline.flow, data, unflatten(noise, pipeline.flow.shapes), flow.time(time))
        found.append(loss.levels)
    return torch.stack(found).mean(dim=0)


def load_autoencoder(cache: LatentCache) -> PyramidAutoencoder:
    """The autoencoder that lies beside the shards; UserError unless it is the one that made them."""
    autoencoder = PyramidAutoencoder.from_pretrained(cache.directory / AUTOENCODER)
    if autoencoder.fingerprint() != cache.plan.autoencoder:
        raise UserError(
            f"{cache.directory / AUTOENCODER}: is not the autoencoder that made these shards; copy the shard directory "
            f"whole, or encode again"
        )
    return autoencoder


def make_pipeline(config: FlowTraining, autoencoder: PyramidAutoencoder, state: State) -> PyramidPipeline:
    """The EMA network with its autoencoder."""
    assert state.scaling is not None
    averaged = state.ema.export(state.network, config.ema.export)
    return PyramidPipeline(averaged, autoencoder, state.scaling, build_flow(config.rectified_flow))


def export(config: FlowTraining, run: Path, autoencoder: PyramidAutoencoder, state: State, runtime: Runtime) -> None:
    """model/: the network's average of width `ema.export`, with its autoencoder."""
    if runtime.main:
        about = {"validation": state.cache["validation"], "data": state.cache["data"]}
        replace_directory(run / "model", "model", make_pipeline(config, autoencoder, state).save_pretrained, **about)


def save(config: FlowTraining, run: Path, autoencoder: PyramidAutoencoder, state: State, runtime: Runtime) -> None:
    """The exported pipeline and a checkpoint."""
    export(config, run, autoencoder, state, runtime)  # first: a kill in between only repeats work
    if runtime.main:
        save_checkpoint(run, state.images_seen, state.state_dict())
        prune(run, config.checkpoint.keep_last, config.checkpoint.keep_every, per_step(config.train, runtime))
    runtime.barrier()


def describe(config: FlowTraining, cache: LatentCache, state: State, runtime: Runtime, total: int) -> str:
    """What is about to happen, in a few lines."""
    assert state.scaling is not None
    levels = ", ".join(
        f"{h}x{w}x{c} std {sum(std) / len(std):.3g}"
        for (c, h, w), std in zip(
            level_shapes(state.network.levels, cache.plan.image_size), state.scaling.std, strict=True
        )
    )
    parameters = sum(p.numel() for p in state.network.parameters()) / 1e6
    beginning = f"resuming at {state.images_seen}" if state.images_seen else "from the start"
    missing = f"; {cache.missing} images of the folder are missing in it" if cache.missing else ""
    return rounding_note(config.train.images, total) + (
        f"train-flow: {len(cache.indices('train'))} records to train on, {len(cache.indices('held_out'))} held out"
        f"{missing}\n"
        f"latents {levels} (scaling: {config.scaling}); network {parameters:.1f} M parameters\n"
        f"{beginning}, to {total} images; {runtime.device}, {'bf16' if runtime.bf16 else 'fp32'}, "
        f"{runtime.ranks} process(es); run directory {config.run_dir}"
    )
