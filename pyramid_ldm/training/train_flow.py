"""Stage two: cached latents to a rectified-flow network."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
from pyramid_ldm.config.common import LevelConfig
from pyramid_ldm.config.flow import FlowTraining, RectifiedFlowConfig
from pyramid_ldm.data.shards import LatentCache, LatentRecords, collate_latents
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.figures import grid
from pyramid_ldm.files import replace_directory
from pyramid_ldm.flow.ncsnpp import PyramidNCSNpp
from pyramid_ldm.flow.rectified_flow import RectifiedFlow
from pyramid_ldm.nn.layers import advance_spectral_norm
from pyramid_ldm.pipeline import PyramidPipeline, SolverOptions
from pyramid_ldm.pyramid import LatentScaling, level_shapes, unflatten
from pyramid_ldm.training.checkpoint import load_newest, prune, save_checkpoint
from pyramid_ldm.training.ema import PowerEma
from pyramid_ldm.training.encode import AUTOENCODER
from pyramid_ldm.training.log import Metrics, RunLog
from pyramid_ldm.training.run import batches, open_run
from pyramid_ldm.training.runtime import Runtime, start, stop_on_signal
from pyramid_ldm.training.schedule import due, learning_rate, whole_steps
from pyramid_ldm.training.step import NonFinite, per_step, rounding_note, set_learning_rate, take_step


@dataclass
class State:
    """Everything that a step changes."""

    network: PyramidNCSNpp
    optimizer: torch.optim.Optimizer
    ema: PowerEma
    nonfinite: NonFinite
    images_seen: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "images_seen": self.images_seen,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "nonfinite": self.nonfinite.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Strict."""
        self.images_seen = state["images_seen"]
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.nonfinite.load_state_dict(state["nonfinite"])


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
    return State(network, optimizer, PowerEma(network, config.ema.widths), NonFinite(config.train.max_nonfinite))


def build_flow(config: RectifiedFlowConfig) -> RectifiedFlow:
    """The objective that a config describes."""
    return RectifiedFlow(**asdict(config))


def train_flow(config: FlowTraining) -> tuple[Path, bool]:
    """Runs, or resumes, stage two. Returns (run directory, whether it reached `train.images`)."""
    runtime = start(config.device, config.precision)
    cache = LatentCache(Path(config.data.shards))
    config.model.resolve(cache.plan.image_size, [LevelConfig(f, c) for f, c in cache.plan.levels])
    for name in ("level_weights", "level_shifts"):
        values = getattr(config.rectified_flow, name)
        if values is not None and len(values) != len(cache.plan.levels):
            raise UserError(f"rectified_flow.{name} holds {len(values)} values for {len(cache.plan.levels)} levels")
    autoencoder = load_autoencoder(cache)
    run = open_run(config, f"{cache.plan.data}-{cache.plan.autoencoder}", runtime)
    state = build_state(config, runtime.device)
    resumed, skipped = load_newest(run)
    if resumed is not None:
        state.load_state_dict(resumed)
    model = runtime.wrap(state.network, config.compile)
    scaling = cache.scaling(config.scaling)
    flow = build_flow(config.rectified_flow)

    train = config.train
    step_images = per_step(train, runtime)
    total = whole_steps(train.images, step_images)
    feed = batches(
        LatentRecords(cache, cache.indices("train"), config.seed, config.data.posterior),
        collate_latents,
        start=state.images_seen,
        stop=state.images_seen + whole_steps(total - state.images_seen, step_images),
        batch_size=train.batch_size,
        workers=config.data.workers,
        runtime=runtime,
    )
    metrics = Metrics()

    with (
        stop_on_signal() as stop,
        RunLog(run, main=runtime.main, start=state.images_seen, total=total, name="train-flow") as log,
    ):
        for line in skipped:
            log.say(line)
        log.say(describe(config, cache, state, scaling, runtime, total))
        if state.images_seen >= total:
            log.say(f"trained already; model/ is written again: the average of ema.export={config.ema.export}")
            export(config, run, autoencoder, scaling, state, runtime)
        while state.images_seen < total and not runtime.any(stop.requested):
            before = state.images_seen
            rate = learning_rate(train, before)
            set_learning_rate(state.optimizer, rate)

            terms: list[dict[str, Tensor]] = []
            for micro in range(train.accumulate):
                latents, noise, time, _ = next(feed)
                runtime.seed_step(config.seed, before + micro * train.batch_size * runtime.ranks)
                with runtime.autocast():
                    terms.append(
                        accumulate(flow, model, scaling, state.network, latents, noise, time, train.accumulate)
                    )

            finite = take_step(state.optimizer, state.network, train.gradient_clip, runtime, metrics, "grad_norm")
            state.images_seen = before + step_images
            if state.nonfinite.record(finite, [f"positions {before} to {state.images_seen}"]):
                advance_spectral_norm(state.network)
                state.ema.update(state.network, state.images_seen, step_images)
                metrics.add_all(terms)

            log.advance(state.images_seen)
            last = state.images_seen >= total
            if due(config.log.every, before, state.images_seen) or last:
                values = runtime.mean(metrics.take())
                log.metrics(
                    state.images_seen, values | {"learning_rate": rate, "nonfinite": float(state.nonfinite.count)}
                )
            pictures = due(config.log.pictures_every, before, state.images_seen) or last
            if runtime.main and pictures:
                examine(config, cache, autoencoder, flow, scaling, state, runtime, log)
            if due(config.checkpoint.every, before, state.images_seen) or last:
                save(config, run, autoencoder, scaling, state, runtime)
        if state.images_seen < total:
            save(config, run, autoencoder, scaling, state, runtime)
    runtime.barrier()
    return run, state.images_seen >= total


def accumulate(
    flow: RectifiedFlow,
    model: nn.Module,
    scaling: LatentScaling,
    network: PyramidNCSNpp,
    latents: Tensor,
    noise: Tensor,
    time: Tensor,
    micro_steps: int,
) -> dict[str, Tensor]:
    """One micro-batch of raw latents (B, D), noise (B, D) and uniform values (B,): adds its gradient."""
    device = next(network.parameters()).device
    latents, noise, time = (x.to(device, non_blocking=True) for x in (latents, noise, time))
    data = scaling.scale(unflatten(latents, network.shapes))
    loss = flow.loss(model, data, unflatten(noise, network.shapes), flow.time(time))
    (loss.total / micro_steps).backward()
    return {"loss": loss.total} | named_levels(network, loss.levels)


def named_levels(network: PyramidNCSNpp, values: Tensor, prefix: str = "loss") -> dict[str, Tensor]:
    """{"loss_4x4": ...}: one value a level under its resolution."""
    return {f"{prefix}_{h}x{w}": value for (_, h, w), value in zip(network.shapes, values, strict=True)}


@torch.no_grad()
def examine(
    config: FlowTraining,
    cache: LatentCache,
    autoencoder: PyramidAutoencoder,
    flow: RectifiedFlow,
    scaling: LatentScaling,
    state: State,
    runtime: Runtime,
    log: RunLog,
) -> None:
    """The EMA network: loss per level on training and on held-out records, and samples of fixed seeds."""
    pipeline = make_pipeline(config, autoencoder, scaling, state).to(runtime.device)
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
        latents, noise, time = (x.to(runtime.device) for x in batch[:3])
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


def make_pipeline(
    config: FlowTraining, autoencoder: PyramidAutoencoder, scaling: LatentScaling, state: State
) -> PyramidPipeline:
    """The EMA network with its autoencoder."""
    averaged = state.ema.export(state.network, config.ema.export)
    return PyramidPipeline(averaged, autoencoder, scaling, build_flow(config.rectified_flow))


def export(
    config: FlowTraining,
    run: Path,
    autoencoder: PyramidAutoencoder,
    scaling: LatentScaling,
    state: State,
    runtime: Runtime,
) -> None:
    """model/: the network's average of width `ema.export`, with its autoencoder."""
    if runtime.main:
        replace_directory(run / "model", make_pipeline(config, autoencoder, scaling, state).save_pretrained)


def save(
    config: FlowTraining,
    run: Path,
    autoencoder: PyramidAutoencoder,
    scaling: LatentScaling,
    state: State,
    runtime: Runtime,
) -> None:
    """The exported pipeline and a checkpoint."""
    export(config, run, autoencoder, scaling, state, runtime)  # first: a kill in between only repeats work
    if runtime.main:
        save_checkpoint(run, state.images_seen, state.state_dict())
        prune(run, config.checkpoint.keep_last, config.checkpoint.keep_every, per_step(config.train, runtime))
    runtime.barrier()


def describe(
    config: FlowTraining, cache: LatentCache, state: State, scaling: LatentScaling, runtime: Runtime, total: int
) -> str:
    """What is about to happen, in a few lines."""
    levels = ", ".join(
        f"{h}x{w}x{c} std {sum(std) / len(std):.3g}"
        for (c, h, w), std in zip(level_shapes(state.network.levels, cache.plan.image_size), scaling.std, strict=True)
    )
    parameters = sum(p.numel() for p in state.network.parameters()) / 1e6
    beginning = f"resuming at {state.images_seen}" if state.images_seen else "from the start"
    return rounding_note(config.train.images, total) + (
        f"train-flow: {len(cache.indices('train'))} records to train on, {len(cache.indices('held_out'))} held out\n"
        f"latents {levels} (scaling: {config.scaling}); network {parameters:.1f} M parameters\n"
        f"{beginning}, to {total} images; {runtime.device}, {'bf16' if runtime.bf16 else 'fp32'}, "
        f"{runtime.ranks} process(es); run directory {config.run_dir}"
    )
