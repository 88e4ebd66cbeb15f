"""Stage two: latents to a network that takes noise away."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyramid_ldm.autoencoders.load import Build
from pyramid_ldm.condition import Condition
from pyramid_ldm.config import load_saved
from pyramid_ldm.config.flow import FlowTraining
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.data.order import PositionSampler
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.sheets import grid
from pyramid_ldm.nn.layers import advance_spectral_norm
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.processes.build import build_process
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.pyramid import LatentScaling, level_shapes
from pyramid_ldm.training.checkpoint import load_newest
from pyramid_ldm.training.ema import PowerEma
from pyramid_ldm.training.flow_state import State, accumulate, build_state, draw, named_levels
from pyramid_ldm.training.log import RunLog
from pyramid_ldm.training.loop import Stage, train
from pyramid_ldm.training.run import open_run, record_start, refuse_other_step
from pyramid_ldm.training.runtime import Runtime, start
from pyramid_ldm.training.source import SPLITS, Source, open_source
from pyramid_ldm.training.step import per_step, set_learning_rate, take_step

EXAMINED, AT_ONCE = 256, 32  # draws of each split for the held-out figures


def train_flow(config: FlowTraining, build: Build | None = None) -> tuple[Path, bool]:
    """Runs, or resumes, stage two. Returns (run directory, whether it reached `train.images`). `build`: see
    `load_autoencoder`."""
    runtime = start(config.device, config.precision)
    source = open_source(config, runtime, build)
    config.resolve(source.image_size, source.levels)
    inputs = {f"data.{name}": getattr(config.data, name) for name in ("shards", "root", "autoencoder")}
    inputs["init"] = config.init
    with open_run(config, {name: Path(path) for name, path in inputs.items() if path}, runtime) as run:
        return run, train(FlowStage(config, source, run, runtime))


class FlowStage(Stage):
    """Stage two in the loop."""

    NAME, PICTURES = "train-flow", "samples"
    config: FlowTraining
    state: State

    def __init__(self, config: FlowTraining, source: Source, run: Path, runtime: Runtime) -> None:
        state = build_state(config, runtime.device)
        super().__init__(config, run, runtime, state)
        self.source, self.process = source, build_process(config)
        skipped = resume(config, source, state, run, runtime)
        self.notes = [*config.unused(), *source.notes, *skipped]
        self.model = runtime.wrap(state.network, config.compile)
        self.networks = [self.model]

    def describe(self, total: int) -> str:
        """Latents, network, process."""
        return describe(self.config, self.source, self.state, self.runtime, total)

    def batches(self, positions: PositionSampler) -> Iterator[Batch]:
        """The source's."""
        return self.source.batches(positions)

    def set_rate(self, rate: float) -> None:
        """The network's."""
        set_learning_rate(self.state.optimizer, rate)

    def received(self, batch: Batch, log: RunLog) -> None:
        """See the source."""
        self.source.received(batch, log)

    def refuse(self) -> UserError | None:
        """See the source."""
        return self.source.refuse()

    def accumulate(self, batch: Batch) -> dict[str, Tensor]:
        """One micro-batch: adds its gradient."""
        with self.runtime.autocast():
            raw, given = self.source.latents(batch), self.source.noise(batch)
            return accumulate(
                self.process, self.model, self.state, raw, batch.positions, batch.condition, self.config, given
            )  # fmt: skip

    def step(self, before: int) -> bool:
        """Network, spectral norm, averages."""
        state = self.state
        clip, guard = self.config.train.gradient_clip, state.nonfinite
        finite = take_step(state.optimizer, state.network, clip, self.runtime, state.metrics, "grad_norm", guard)
        if finite:
            advance_spectral_norm(state.network)
            state.ema.update(state.network, state.images_seen, state.images_per_step)
        return finite

    @torch.no_grad()
    def examine(self, log: RunLog) -> None:
        """The averaged network: loss per level on training and on held-out latents, and samples of fixed seeds."""
        config, state = self.config, self.state
        pipeline = self.make_pipeline().to(self.runtime.device)
        found: dict[str, Tensor] = {}
        for split in SPLITS:
            if self.source.counts[split]:
                found |= named_levels(state.network, self.mean_losses(split, pipeline, log), split)
        values = {name: float(value) for name, value in found.items()}
        log.metrics(state.images_seen, values)
        log.say("  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.startswith("held_out")))
        options = SolverOptions("euler", steps=config.samples.steps)
        outputs = pipeline.stream(
            list(range(config.log.pictures)), config.samples.seed, options, bf16=self.runtime.bf16
        )  # fmt: skip
        images = [image for output in outputs for image in output.images]
        log.picture("samples", state.images_seen, grid(images))

    def mean_losses(self, split: str, pipeline: PyramidPipeline, log: RunLog) -> Tensor:
        """(levels,): of the averaged network, without dropout, on up to 256 draws of a split: several times and noises
        for each image, the same in every run of a seed. Times are uniform whatever training draws, so that runs can be
        compared."""
        process, network = self.process.with_uniform_time(), pipeline.network
        count = min(EXAMINED, 4 * self.source.counts[split])
        parts = [list(range(first, first + AT_ONCE)) for first in range(0, count, AT_ONCE)]
        found = []
        for batch in self.source.to_examine(split, parts):
            self.source.received(batch, log)
            with self.runtime.autocast():
                raw = self.source.latents(batch)
                noise, t = draw(process, network.shapes, batch.positions, self.config.seed, raw[0].device)
                noise = self.source.noise(batch) or noise
                loss = process.loss(network, pipeline.scaling.scale(raw), noise, t, Condition())
            found.append(loss.levels)
        return torch.stack(found).mean(dim=0)

    def make_pipeline(self) -> PyramidPipeline:
        """The average of width `ema.export` with its autoencoder."""
        assert self.state.scaling is not None
        averaged = self.state.ema.export(self.state.network, self.config.ema.export)
        return PyramidPipeline(averaged, self.source.autoencoder, self.state.scaling, self.process)

    def save_model(self, directory: Path) -> None:
        """A pipeline."""
        self.make_pipeline().save_pretrained(directory)

    def about(self) -> dict[str, Any]:
        """Which photographs were held out."""
        return {"validation": self.state.cache["validation"], "data": self.state.cache["data"]}


def resume(config: FlowTraining, source: Source, state: State, run: Path, runtime: Runtime) -> list[str]:
    """Loads the newest whole checkpoint, if there is one, into `state`, and records the start; returns what is to be
    said about it. UserError where the run was begun on other latents."""
    saved, skipped = load_newest(run)
    if saved is not None:
        refuse_other_step(run, saved["images_per_step"], config, runtime)
        state.load_state_dict(saved)
    source.begin(state.bad)
    if saved is not None:
        refuse_other_latents(run, state.cache, source)
    else:
        state.scaling, state.cache = source.scaling(config.scaling), source.identity()
        if config.init is not None:
            begin_with(Path(config.init), config, state, of_pairs=source.of_pairs)
    state.images_per_step = per_step(config.train, runtime)
    record_start(run, config, runtime, state.images_seen, f"{state.cache['data']}-{state.cache['autoencoder']}")
    return skipped


def begin_with(parent: Path, config: FlowTraining, state: State, *, of_pairs: bool) -> None:
    """The parent's averaged weights and its latents' scale into `state`, averages included. UserError where it is no
    run, or of another network, process or autoencoder, or where pairs were drawn in another scale."""
    assert state.scaling is not None
    found, _ = load_newest(parent)
    if found is None or "network" not in found:
        raise UserError(f"init={parent}: holds no checkpoint of train-flow; give its run directory")
    width = f"{config.ema.export:g}"
    if width not in found["ema"]:
        raise UserError(f"init={parent}: has averages of width {', '.join(found['ema'])}, not ema.export={width}")
    weights = found["network"] | found["ema"][width]
    own = state.network.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            raise UserError(f"init={parent}: is a run of another network ({name}); take over its `model` section")
    now, before = build_process(config), build_process(load_saved(FlowTraining, parent / "config.yaml"))
    for name, old, new in (
        ("autoencoder", found["cache"]["autoencoder"], state.cache["autoencoder"]),
        *((f"process {key}", getattr(before, key), getattr(now, key)) for key in ("NAME", "prediction", "noise")),
    ):
        if old != new:
            raise UserError(f"init={parent}: was trained with another {name.lower()} ({old}, here {new})")
    scaling = LatentScaling.from_dict(found["scaling"])
    if of_pairs and scaling.to_dict() != state.scaling.to_dict():
        raise UserError(f"init={parent}: scales latents in another way than the flow that drew these pairs")
    state.network.load_state_dict(weights)
    state.scaling = scaling
    state.ema = PowerEma(state.network, config.ema.widths)


def refuse_other_latents(run: Path, before: dict[str, Any], source: Source) -> None:
    """UserError naming what of the latents is not as it was when the run was begun."""
    now = source.identity()
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run}: was started on latents with {key} = {before.get(key)}, those of {source.place} have "
                f"{now.get(key)}; give the former as {source.key}, or use a new run_dir"
            )


def describe(config: FlowTraining, source: Source, state: State, runtime: Runtime, total: int) -> str:
    """What is about to happen, in a few lines."""
    assert state.scaling is not None
    levels = ", ".join(
        f"{h}x{w}x{c} std {sum(std) / len(std):.3g}"
        for (c, h, w), std in zip(level_shapes(state.network.levels, source.image_size), state.scaling.std, strict=True)
    )
    parameters = sum(p.numel() for p in state.network.parameters()) / 1e6
    beginning = f"resuming at {state.images_seen}" if state.images_seen else "from the start"
    return (
        f"train-flow: {source.describe()}\n"
        f"latents {levels} (scaling: {config.scaling}); {config.process}; network {parameters:.1f} M parameters\n"
        f"{beginning}, to {total} images; {runtime.device}, {'bf16' if runtime.bf16 else 'fp32'}, "
        f"{runtime.ranks} process(es); run directory {config.run_dir}"
    )
