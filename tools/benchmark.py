#!/usr/bin/env python3
"""What the toolkit costs, beside its peers, on this machine.

    tools/benchmark.py                                   # everything; hours on a CPU
    tools/benchmark.py --only decode evaluation --device cuda --out benchmark.json
    tools/benchmark.py --scale small                     # the demo's networks, tiny peers: does it run at all?

Prints a Markdown table a measurement. Weights are random on both sides, and both compute alike: bfloat16 weights and
autocast (unless --precision fp32), channels_last, inference mode, the same threads. The first line of a group is ours;
every other one takes turns with it in this process, so that a machine that slows down slows both, and `time / ours` is
the median over turns of the one's time over the other's. A line that does not fit into memory or into --limit says so.
The peers are diffusers' classes, torchdiffeq and scipy: pip install -e '.[bench]'; what is missing is said.
"""

import argparse
import inspect
import math
import os
import platform
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peers
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from pyramid_ldm import PyramidAutoencoder, PyramidNCSNpp, PyramidPipeline
from pyramid_ldm.allocator import keep_freed_memory
from pyramid_ldm.condition import Condition, Context
from pyramid_ldm.config import AutoencoderTraining, FlowTraining, load_config
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.data.folder import scan
from pyramid_ldm.data.images import to_pil
from pyramid_ldm.data.latents import LatentRecords, collate_latents
from pyramid_ldm.data.plan import Plan
from pyramid_ldm.data.plan import Row as Record
from pyramid_ldm.data.shards import LatentCache, write_index, write_shard
from pyramid_ldm.demo.scenes import render_landscape
from pyramid_ldm.encode import EncodeOptions, Encoding, view_batches
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.files import write_json
from pyramid_ldm.info.cost import Work, no_scaling
from pyramid_ldm.nn.layers import advance_spectral_norm, cast_to_bfloat16, fold_spectral_norm
from pyramid_ldm.openvino_backend import Evaluation, converted
from pyramid_ldm.ownership import claim
from pyramid_ldm.pictures import FAST
from pyramid_ldm.processes.build import build_process
from pyramid_ldm.processes.prediction import Prediction
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.solvers import SolverOptions, solve
from pyramid_ldm.pyramid import Pyramid, flatten, level_shapes, pyramid_noise, unflatten
from pyramid_ldm.training import autoencoder_state, flow_state
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.run import git_commit
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.step import take_step

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
BYTES = {"state_bytes": "state", "peak_bytes": "peak beside it"}  # headings
RK45_EVALUATIONS = 70  # assumed: how many it takes on random weights says nothing
MOST_TURNS, LONG_ENOUGH = 200, 1.0  # short calls take more turns than --repeats, until they add up to so many seconds


@dataclass(frozen=True)
class Case:
    """Something that is built and waits to be timed.

    Attributes:
        existing: tensors from before the call; where they are given, FLOPs and the peak beside them are counted.
        first: a shorter call to warm up with.
        about: more of its row.
    """

    call: Callable[[], object]
    images: int = 1
    existing: Sequence[Tensor] = ()
    first: Callable[[], object] | None = None
    about: Row = field(default_factory=dict)


class TimeLimit(BaseException):
    """A line takes too long. No Exception: nothing on the way may take it for an error of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimit within, at the first operation that begins after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def warm_up(case: Case, device: torch.device) -> Row:
    """The first, untimed call: FLOPs (a multiply-add is two) and the most bytes that lived beside what existed."""
    call = case.first or case.call
    if not case.existing:
        call()
        return {}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    with Work(case.existing) as work:
        before = work.live
        call()
    peak = work.peak - before
    if device.type == "cuda":  # the kernels' own included
        peak = torch.cuda.max_memory_allocated() - allocated
    return {"peak_bytes": peak, "flops": work.flops}


def take_turns(cases: Sequence[Case], args: argparse.Namespace) -> list[list[float]]:
    """Seconds of each case, called one after another, `--repeats` times; fewer where --limit would not suffice, more of
    short ones."""
    device, began = args.runtime.device, time.perf_counter()
    seconds: list[list[float]] = [[] for _ in cases]
    enough = 0.0 if args.small else LONG_ENOUGH
    while True:
        for case, found in zip(cases, seconds, strict=True):
            found.append(timed(case.call, device))
        turns, spent = len(seconds[0]), time.perf_counter() - began
        if turns >= args.repeats and (turns >= MOST_TURNS or spent >= enough):
            return seconds
        if spent * (turns + 1) / turns > args.limit / 2:  # the other half was for building and warming up
            return seconds


def side_by_side(args: argparse.Namespace, of: str, builders: Mapping[str, Callable[[], Case]]) -> list[Row]:
    """A row a case; the first is ours, and the others take turns with it. One that fails is a remark."""
    rows: list[Row] = []
    own: Case | None = None
    for name, build in builders.items():
        row: Row = {"of": of, "what": name}
        rows.append(row)
        print(f"{of}: {name} ...", file=sys.stderr, flush=True)
        try:
            with time_limit(args.limit):
                case = build()
                row |= case.about | {"images": case.images}
                row |= warm_up(case, args.runtime.device)
                seconds = take_turns([case] if own is None else [own, case], args)
        except TimeLimit:
            row["remark"] = f"given up after {args.limit:g} s"
        except Exception as error:
            row["remark"] = reason(error)
        else:
            row["seconds"] = seconds[-1]
            if own is not None:
                rows[0]["seconds"] += seconds[0]
                row["ratios"] = [other / ours for ours, other in zip(*seconds, strict=True)]
            elif len(rows) == 1:
                own = case
        case = None  # type: ignore[assignment]  # its memory, before the next one is built
    return rows


def reason(error: Exception) -> str:
    """Why there is no figure."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, ImportError):
        return f"not measured: {lines[0]}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return "does not fit in memory"
    traceback.print_exc()
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


# Our networks at their shipped configs.


def stage_one(name: str, *overrides: str) -> AutoencoderTraining:
    """A shipped config."""
    path = ROOT / "autoencoder_configs" / f"{name}.yaml"
    return load_config(AutoencoderTraining, path, ["data.root=none", *overrides])


def stage_two(name: str) -> FlowTraining:
    """A shipped config on the latents of the autoencoder of the same name."""
    config = load_config(FlowTraining, ROOT / "diffusion_configs" / f"{name}.yaml", ["data.shards=none"])
    model = stage_one(name).model
    config.resolve(model.image_size, model.levels)
    return config


def beside_peers(args: argparse.Namespace) -> tuple[str, int, int]:
    """The config that is held beside the peers, and its images' height and width."""
    name = "demo" if args.small else args.config
    height, width = stage_one(name).image_size
    return name, height, width


def built(network: Callable[[Any], nn.Module], config: object, args: argparse.Namespace) -> Any:
    """For inference on the device: spectral norm folded."""
    with args.runtime.device:
        model = network(config)
    fold_spectral_norm(model)
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def random_latents(name: str, batch: int = 1) -> list[Tensor]:
    """Of a config, coarse to fine."""
    model = stage_one(name).model
    return [torch.randn(batch, *shape) for shape in level_shapes(model.levels, model.image_size)]


def inference(
    args: argparse.Namespace,
    make: Callable[[], nn.Module],
    inputs: Callable[[], Sequence[Tensor]],
    call: Callable[..., object],
    images: int = 1,
) -> Case:
    """`call(model, *inputs)`, as both sides are called."""
    with args.runtime.device:
        model = make().eval().requires_grad_(False)
        given = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs()]
    parameters = sum(p.numel() for p in model.parameters())
    if args.runtime.bf16:
        cast_to_bfloat16(model)  # once, as for sampling: autocast would at every call
    model.to(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode(), args.runtime.autocast():
            call(model, *given)

    return Case(run, images, [*model.parameters(), *model.buffers(), *given], about={"parameters": parameters})


# The measurements.


def decode(args: argparse.Namespace) -> list[Row]:
    """Latents to one image. `decode_tiled` computes the same image piece by piece."""
    name, height, width = beside_peers(args)

    def ours(way: str) -> Case:
        make = partial(built, PyramidAutoencoder, stage_one(name).model, args)
        return inference(args, make, lambda: random_latents(name), lambda model, *z: getattr(model, way)(z))

    def peer(other: str) -> Case:
        factor, channels = peers.AUTOENCODERS[other]
        make = partial(peers.autoencoder, other, args.small)
        inputs = lambda: [torch.randn(1, channels, height // factor, width // factor)]  # noqa: E731
        return inference(args, make, inputs, lambda model, z: model.decode(z, return_dict=False))

    builders = {f"ours: {name}, {way}": partial(ours, way) for way in ("decode", "decode_tiled")}
    return side_by_side(
        args, f"{height}x{width}", builders | {other: partial(peer, other) for other in peers.AUTOENCODERS}
    )


def encode(args: argparse.Namespace) -> list[Row]:
    """One image to the mean of its latents."""
    name, height, width = beside_peers(args)

    def mean(model: Any, x: Tensor) -> object:
        found = model.encode(x)
        return found.latent if hasattr(found, "latent") else getattr(found, "latent_dist", found).mode()

    makes = {f"ours: {name}": partial(built, PyramidAutoencoder, stage_one(name).model, args)}
    makes |= {other: partial(peers.autoencoder, other, args.small) for other in peers.AUTOENCODERS}

    def case(make: Callable[[], nn.Module]) -> Case:
        return inference(args, make, lambda: [torch.rand(1, 3, height, width) * 2 - 1], mean)

    return side_by_side(args, f"{height}x{width}", {what: partial(case, make) for what, make in makes.items()})


def evaluation(args: argparse.Namespace) -> list[Row]:
    """One evaluation of the network that draws, without guidance, on the latents of images of the given size: f4 of 3
    channels, f8 of 4, f32 of 32, f64 of 128; ours: the pyramid of the config."""
    name, height, width = beside_peers(args)

    def ours(batch: int) -> Case:
        make = partial(built, PyramidNCSNpp, stage_two(name).model, args)
        inputs = lambda: [torch.full((batch,), 0.5), *random_latents(name, batch)]  # noqa: E731
        return inference(args, make, inputs, lambda model, t, *z: model(z, Context(t, t)), batch)

    def peer(other: str, batch: int) -> Case:
        factor, channels, patch = peers.GENERATORS[other]

        def call(model: Any, latents: Tensor, step: Tensor, label: Tensor) -> object:
            return model(latents, step, *([label] if patch else []), return_dict=False)

        def inputs() -> list[Tensor]:
            latents = torch.randn(batch, channels, height // factor, width // factor)
            return [latents, torch.full((batch,), 500), torch.full((batch,), 1)]

        return inference(args, partial(peers.generator, other, height // factor, args.small), inputs, call, batch)

    rows: list[Row] = []
    for batch, others in ((1, list(peers.GENERATORS)), (8, list(peers.GENERATORS)[-1:])):  # the cheapest is the last
        builders = {f"ours: {name}": partial(ours, batch)} | {other: partial(peer, other, batch) for other in others}
        rows += side_by_side(args, f"{height}x{width}, batch {batch}", builders)
    return rows


def runtimes(args: argparse.Namespace) -> list[Row]:
    """The same evaluation at batch 1 by PyTorch as sampling calls it, by torch.compile with frozen weights (minutes to
    compile), and by OpenVINO and ONNX Runtime where they are installed (`pip install openvino onnxruntime onnxscript`);
    ONNX Runtime in float32, for it has no bfloat16 on a CPU."""
    name, height, width = beside_peers(args)

    def network() -> nn.Module:
        return Evaluation(built(PyramidNCSNpp, stage_two(name).model, args)).eval()

    def inputs() -> list[Tensor]:
        return [torch.full((1,), 0.5), torch.full((1,), 1.0), *random_latents(name)]

    def compiled() -> Case:
        import torch._inductor.config as inductor

        inductor.freezing = True
        case = inference(args, lambda: torch.compile(network()), inputs, lambda model, *x: model(*x))  # type: ignore
        return Case(case.call)  # counting FLOPs would compile anew

    def openvino() -> Case:
        given = inputs()
        run = converted(network(), tuple(given), args.runtime.bf16)
        return Case(lambda: run(*given))

    def onnx() -> Case:
        import onnxruntime

        given = inputs()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "network.onnx"
            program = torch.onnx.export(network(), tuple(given), dynamo=True, verbose=False)
            program.save(path, external_data=True)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {each.name: x.numpy() for each, x in zip(session.get_inputs(), given, strict=True)}
        return Case(partial(session.run, None, feed))

    builders = {f"ours: {name}": lambda: inference(args, network, inputs, lambda model, *x: model(*x))}
    builders |= {"torch.compile, frozen": compiled, "OpenVINO": openvino, "ONNX Runtime": onnx}
    return side_by_side(args, f"{height}x{width}", builders)


def train(args: argparse.Namespace) -> list[Row]:
    """An optimizer step. Stage one: the config's loss, LPIPS through a random VGG-16 and the GAN at work, where it has
    them; whole images, large ones one at a time, and two regions of 512. State is weights, averages and Adam's moments;
    the peak comes on top."""
    rows: list[Row] = []
    for name in ("demo",) if args.small else ("scapes2k", "people2k", "photographs_2k", "demo"):
        height, width = stage_one(name).image_size
        one, two = (2, 2) if args.small else (1 if height > 512 else stage_one(name).train.batch_size, 16)
        builders = {f"{name}, whole": partial(step_one, args, name, f"train.batch_size={one}", "train.regions=0")}
        if min(height, width) > 512:
            keys = (f"train.batch_size={one}", "train.regions=2", "train.region_size=512")
            builders[f"{name}, 2 regions of 512"] = partial(step_one, args, name, *keys)
        rows += side_by_side(args, f"stage one, {height}x{width}, batch {one}", builders)
        rows += side_by_side(args, f"stage two, batch {two}", {name: partial(step_two, args, name, two)})
    return rows


def step_one(args: argparse.Namespace, name: str, *overrides: str) -> Case:
    """A step of stage one on random pixels."""
    at_once = ("loss.perceptual.weights=random", "loss.gan.start=0", "loss.gan.disc_warmup=0", "loss.gan.ramp=0")
    config = stage_one(name, "train.accumulate=1", *at_once, *overrides)
    runtime, train, metrics = args.runtime, config.train, Metrics()
    state = autoencoder_state.build_state(config, runtime.device)
    pixels = torch.randint(0, 256, (train.batch_size, *config.image_size, 3), dtype=torch.uint8)

    def step() -> None:
        positions = list(range(state.images_seen, state.images_seen + train.batch_size))  # choose regions and noise
        batch = Batch(positions, pixels=pixels)
        autoencoder_state.accumulate(config, state, state.autoencoder, state.discriminator, batch, runtime)
        take_step(state.optimizer, state.autoencoder, train.gradient_clip, runtime, metrics, "grad_norm")
        advance_spectral_norm(state.autoencoder)
        state.images_seen += train.batch_size
        state.ema.update(state.autoencoder, state.images_seen, train.batch_size)
        if state.disc_optimizer is not None and state.discriminator is not None:
            take_step(state.disc_optimizer, state.discriminator, 0.0, runtime, metrics, "disc_norm")
            state.loss.adaptive.finish_step(runtime.average)

    return training(step, state, state.autoencoder, train.batch_size)


def step_two(args: argparse.Namespace, name: str, size: int) -> Case:
    """A step of stage two on random latents."""
    config, runtime, metrics = stage_two(name), args.runtime, Metrics()
    config.train.accumulate = 1
    state, process = flow_state.build_state(config, runtime.device), build_process(config)
    state.scaling = no_scaling(stage_one(name).model)
    latents = tuple(level.to(runtime.device) for level in random_latents(name, size))

    def step() -> None:
        positions = list(range(state.images_seen, state.images_seen + size))
        with runtime.autocast():
            flow_state.accumulate(process, state.network, state, latents, positions, Condition(), config)
        take_step(state.optimizer, state.network, config.train.gradient_clip, runtime, metrics, "grad_norm")
        advance_spectral_norm(state.network)
        state.images_seen += size
        state.ema.update(state.network, state.images_seen, size)

    return training(step, state, state.network, size)


def training(step: Callable[[], None], state: Any, network: nn.Module, images: int) -> Case:
    """A step whose optimizers have their moments already."""
    step()
    existing = {id(x): x for x in tree_iter(state.state_dict()) if isinstance(x, Tensor)}
    about = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "state_bytes": sum(x.nbytes for x in existing.values()),
    }
    return Case(step, images, list(existing.values()), about=about)


def sample(args: argparse.Namespace) -> list[Row]:
    """Noise to PNG files by ABM2, the default, with several numbers of evaluations in turns, and the parts of it. RK45
    computes in float32; the number of evaluations that it takes on random weights says nothing, so its line is computed
    from the parts."""
    (name, height, width), bf16 = beside_peers(args), args.runtime.bf16
    network = built(PyramidNCSNpp, stage_two(name).model, args)
    autoencoder = built(PyramidAutoencoder, stage_one(name).model, args)
    pipe = PyramidPipeline(network, autoencoder, no_scaling(autoencoder.config)).to(args.runtime.device)
    noise, eight = pyramid_noise(network.shapes, 0, "sample", [0]), {}
    evaluations = pipe.solve(noise, SolverOptions("rk45")).nfe
    image = to_pil(next(iter(pipe.decode(noise, bf16=bf16))))
    with tempfile.TemporaryDirectory() as folder:

        def draw(images: int, steps: int, pipe: PyramidPipeline = pipe) -> None:
            out = pipe(num_images=images, batch_size=images, steps=steps, bf16=bf16)
            for i, picture in enumerate(out.images):
                picture.save(f"{folder}/{i}.png", **FAST)

        def drawing(images: int, steps: int, pipe: PyramidPipeline = pipe) -> Callable[[], Case]:
            return partial(Case, partial(draw, images, steps, pipe), images, first=partial(draw, images, 2, pipe))

        of = f"{height}x{width}"
        one = {f"ABM2, {steps} evaluations, noise to PNG": drawing(1, steps) for steps in (10, 1, 2, 4, 20)}
        if args.device == "cpu" and find_spec("openvino"):
            served = PyramidPipeline(network, autoencoder, pipe.scaling).compile("openvino")
            one |= {f"the same with {steps}, by OpenVINO": drawing(1, steps, served) for steps in (10, 20)}
            eight = {"the same with 10, by OpenVINO, 8 at once": drawing(8, 10, served)}
        rows = side_by_side(args, of, one)
        rk45, decoding, writing = f"RK45, {evaluations} evaluations", "decoding", "writing the PNG"
        alone = (
            {f"ABM2, {steps} evaluations, noise to PNG, 8 at once": drawing(8, steps) for steps in (10, 20)}
            | eight
            | {
                rk45: partial(Case, lambda: pipe.solve(noise, SolverOptions("rk45"))),
                decoding: partial(Case, lambda: list(pipe.decode(noise, bf16=bf16))),
                writing: partial(Case, lambda: image.save(f"{folder}/0.png", **FAST)),
                "writing a JPEG": partial(Case, lambda: image.save(f"{folder}/0.jpg", quality=92)),
            }
        )
        rows += [side_by_side(args, of, {what: build})[0] for what, build in alone.items()]
    measured = {row["what"]: row["seconds"] for row in rows if "seconds" in row}
    parts = [median(measured[what]) for what in (rk45, decoding, writing) if what in measured]
    if len(parts) == 3:
        seconds = [RK45_EVALUATIONS / evaluations * parts[0] + parts[1] + parts[2]]
        what = f"RK45, noise to PNG, if it takes {RK45_EVALUATIONS} evaluations"
        rows.append({"of": of, "what": what, "seconds": seconds, "remark": "computed from the parts"})
    return rows


def files(args: argparse.Namespace) -> list[Row]:
    """A folder of JPEGs, in the page cache, to a shard: `encode` reads, encodes and writes; beside it
    reading alone. The loader's workers share the machine's cores with the network."""
    (name, height, width), count = beside_peers(args), 4 if args.small else 16
    autoencoder = built(PyramidAutoencoder, stage_one(name).model, args)
    with tempfile.TemporaryDirectory() as temporary:
        photographs, out = Path(temporary) / "photographs", Path(temporary) / "latents"
        photographs.mkdir()
        for i in range(count):
            grain = np.random.default_rng(i).normal(0, 6, (height, width, 1))  # as heavy as photographs
            pixels = np.clip(render_landscape(i, height, width) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(photographs / f"{i:02d}.jpg", quality=90)
        folder = scan(photographs)
        claim(out, "shards", "--out")

        def case(workers: int, whole: bool) -> Case:
            options = EncodeOptions(flip=False, validation=0.0, shard_size=count, workers=workers)
            work = Encoding(autoencoder, folder.files, folder, options, args.runtime, out, {})

            def encode_all() -> None:
                with Progress("encode", count, "records") as progress:
                    work.encode_shard(work.views, 0, progress)

            def read_all() -> None:
                list(view_batches(work.views, work.plan, range(count), options))

            return Case(encode_all if whole else read_all, count)

        builders = {
            f"{what}, {workers} workers": partial(case, workers, whole)
            for what, whole in (("ours: encode", True), ("reading alone", False))
            for workers in (2, 0)
        }
        return side_by_side(args, f"{count} JPEGs of {height}x{width}", builders)


def shards(args: argparse.Namespace) -> list[Row]:
    """Every record of a cache once, in random order, in batches of 256, to float32; files are in the page cache.
    `LatentRecords` is what training asks for: it also draws from the posterior."""
    names = ("demo",) if args.small else ("celebahq_1024", "people2k")
    return [row for name in names for row in read_shards(args, name)]


def read_shards(args: argparse.Namespace, name: str) -> list[Row]:
    """Of one config's latents."""
    batch, size = (16, 2**19) if args.small else (256, 2**28)
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder), name, batch, size)
        order = torch.randperm(len(cache.rows), generator=torch.Generator().manual_seed(0)).split(batch)
        records = LatentRecords(cache, cache.indices("train"), 0, "sample")
        arrays = [Path(folder) / f"{i}.npy" for i, _ in enumerate(cache.plan.levels * 2)]  # means, then log-variances
        whole = torch.stack([cache.read(i).half() for i in range(len(cache.rows))])
        for path, level in zip(arrays, unflatten(whole, cache.plan.shapes() * 2), strict=True):
            np.save(path, level.numpy())
        maps = [np.load(path, mmap_mode="r") for path in arrays]

        def single(array: Any) -> Tensor:
            return torch.from_numpy(np.asarray(array, dtype=np.float32))

        def every(read: Callable[[list[int]], object]) -> Case:
            def call() -> None:
                for places in order:
                    read(places.tolist())

            return Case(call, len(cache.rows))

        ways: dict[str, Callable[[list[int]], object]] = {
            "ours: rows alone": lambda at: torch.stack([cache.read(i) for i in at]),
            "ours: LatentRecords": lambda at: collate_latents([records[i] for i in at]),
            "memory-mapped, a file a level": lambda at: [torch.stack([single(m[i]) for i in at]) for m in maps],
        }
        of = f"{name}, records of {cache.plan.record_length() * 2 / 1000:.3g} kB"
        return side_by_side(args, of, {what: partial(every, way) for what, way in ways.items()})


def write_cache(folder: Path, name: str, batch: int, size: int) -> LatentCache:
    """About `size` bytes of random records, written as `encode` writes them."""
    model = stage_one(name).model
    plan = Plan(
        autoencoder="none", data="none", image_size=list(model.image_size), levels=model.levels, has_variance=True,
        dtype="float16", precision="fp32", crops=0, zoom=1.0, flip=False, validation=0.0, seed=0, shard_size=batch,
    )  # fmt: skip
    count = max(2, size // (2 * plan.record_length()) // batch)
    rows = [Record(f"{i:032x}", False, 0, "train") for i in range(batch)]
    for number in range(count):
        write_shard(folder, number, plan, torch.randn(batch, plan.record_length()).half(), rows, {}, {})
    write_index(folder, plan, count, [])
    return LatentCache(folder)


def solvers(args: argparse.Namespace) -> list[Row]:
    """A velocity that costs next to nothing and whose own time is subtracted; rtol = atol = 1e-5, Euler with 100 steps.
    Peers see the pyramid as one flat vector."""
    model, batch, begin, tolerance = stage_one(beside_peers(args)[0]).model, 8, 1e-3, 1e-5
    shapes, device = level_shapes(model.levels, model.image_size), args.runtime.device
    noise = tuple(z.to(device) for z in pyramid_noise(shapes, 0, "noise", list(range(batch))))
    direction = tuple(torch.randn_like(z[:1]) for z in noise)  # one for all, whatever rows are not at the end yet
    calls = [0]

    def velocity(t: Tensor) -> Pyramid:
        calls[0] += 1
        wave = torch.cos(9 * t).view(-1, 1, 1, 1)
        return tuple(wave * v for v in direction)

    def ours(solver: str) -> object:
        def predict(noisy: Pyramid, t: Tensor, told: Tensor) -> Prediction:
            rows = told.to(device, torch.float32).expand(noisy[0].shape[0])
            return Prediction("velocity", velocity(rows), noisy, (), ())

        return solve(SolverOptions(solver, steps=100 if solver == "euler" else None), RectifiedFlow(), predict, noise)

    def flat_velocity(t: Tensor, state: Tensor) -> Tensor:
        unflatten(state, shapes)  # a network would need the pyramid
        return flatten(velocity(t.float().expand(batch)))

    def dopri5() -> object:
        import torchdiffeq

        times = torch.tensor([begin, 1.0], dtype=torch.float64, device=device)
        return torchdiffeq.odeint(flat_velocity, flatten(noise), times, rtol=tolerance, atol=tolerance, method="dopri5")

    def rk45() -> object:
        from scipy.integrate import solve_ivp

        state = flatten(noise)

        def of_arrays(t: float, values: Any) -> Any:  # float64, with the copies that this asks for
            flat = torch.from_numpy(values).to(device, torch.float32).view_as(state)
            return flat_velocity(torch.tensor(t, device=device), flat).double().cpu().numpy().ravel()

        start = state.double().cpu().numpy().ravel()
        return solve_ivp(of_arrays, (begin, 1.0), start, rtol=tolerance, atol=tolerance, method="RK45")

    def case(solver: Callable[[], object]) -> Case:
        def call() -> None:
            with torch.inference_mode():
                solver()

        calls[0] = 0
        call()
        evaluations, half = calls[0], torch.full((batch,), 0.5, device=device)
        own = median(timed(lambda: velocity(half), device) for _ in range(100))
        return Case(call, batch, about={"evaluations": evaluations, "velocity_seconds": own})

    by_name: dict[str, Callable[[], object]] = {
        "ours: rk45": partial(ours, "rk45"), "ours: euler": partial(ours, "euler"),
        "torchdiffeq dopri5": dopri5, "scipy RK45": rk45,
    }  # fmt: skip
    builders = {name: partial(case, solver) for name, solver in by_name.items()}
    rows = side_by_side(args, f"{batch} x {sum(map(math.prod, shapes))} values", builders)
    for row in rows:
        if "seconds" in row:
            row["overhead_seconds"] = median(row["seconds"]) / row["evaluations"] - row["velocity_seconds"]
    return rows


MEASUREMENTS = (decode, evaluation, runtimes, train, sample, encode, files, shards, solvers)  # what matters most first


# Tables.


def significant(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{significant(seconds)} s" if abs(seconds) >= 1 else f"{significant(1000 * seconds)} ms"


def size_of(count: float) -> str:
    """GiB, or MiB below a tenth of one."""
    return f"{significant(count / 2**30)} GiB" if count >= 2**30 / 10 else f"{significant(count / 2**20)} MiB"


def cells(row: Row) -> dict[str, str]:
    """What the table shows of a row, by heading."""
    seconds, ratios, images = row.get("seconds"), row.get("ratios"), row.get("images", 1)
    found = {"of": row["of"], "what": row["what"]}
    if "parameters" in row:
        found["parameters"] = f"{significant(row['parameters'] / 1e6)} M"
    if "flops" in row:
        found["TFLOP"] = significant(row["flops"] / 1e12)
    if seconds:
        found["time (fastest to slowest)"] = between(seconds, duration)
        found["turns"] = str(len(seconds))
        found |= {"images/s": significant(images / median(seconds))} if images > 1 else {}
    if "overhead_seconds" in row:
        found["evaluations"] = str(row["evaluations"])
        found["overhead an evaluation"] = duration(row["overhead_seconds"])
    found |= {heading: size_of(row[key]) for key, heading in BYTES.items() if key in row}
    found |= {"time / ours": between(ratios, significant)} if ratios else {}
    return found | ({"remark": row["remark"]} if "remark" in row else {})


def between(values: Sequence[float], write: Callable[[float], str]) -> str:
    """The median, and in brackets the least and the most."""
    return f"{write(median(values))} ({write(min(values))} to {write(max(values))})"


def markdown(rows: Sequence[Row]) -> str:
    """A table; what was not measured is a dash."""
    lines = [cells(row) for row in rows]
    headings = list(dict.fromkeys(heading for line in lines for heading in line))
    headings.sort(key=lambda heading: heading == "remark")  # the last
    table = [headings, ["---"] * len(headings), *([line.get(h, "-") for h in headings] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def about(args: argparse.Namespace) -> dict[str, str]:
    """What the figures depend on."""
    packages = [name for name in ("torch", "diffusers", "scipy", "torchdiffeq") if find_spec(name)]
    processor = platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.argv]),
        "CPU": f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, {memory:.1f} GiB",
        "GPU": torch.cuda.get_device_name() if args.device == "cuda" else "not used",
        "system": platform.platform(),
        "versions": ", ".join(
            [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
        ),
        "commit": git_commit() or "unknown",
        "precision": "bfloat16 weights and autocast" if args.runtime.bf16 else "float32",
    }


def limit_memory() -> None:
    """Allocations beyond what is free now fail with a message, instead of pushing other programs out of memory."""

    def kibibytes(path: str, name: str) -> int:
        return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(name))

    with suppress(OSError, ValueError, StopIteration):
        data = kibibytes("/proc/self/status", "VmData:") + kibibytes("/proc/meminfo", "MemAvailable:")
        resource.setrlimit(resource.RLIMIT_DATA, (data * 1024, resource.RLIM_INFINITY))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [measure.__name__ for measure in MEASUREMENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--config", default="people2k", metavar="NAME", help="of ours beside peers (default: people2k)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--scale", choices=("full", "small"), default="full", help="small: a smoke test")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each line at least, where --limit allows")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for one line, building included")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="every figure, written after each measurement")
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: PyTorch {torch.__version__} sees no CUDA device here")
    if args.repeats < 1 or args.limit <= 0:
        parser.error("--repeats is at least 1, --limit above 0")
    args.small, args.runtime = args.scale == "small", Runtime(torch.device(args.device), args.precision == "bf16")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """1 where a line failed that should not."""
    args = parse(words)
    torch.manual_seed(0)
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.runtime.bf16
    found: dict[str, Any] = {"about": about(args), "measurements": {}}
    print("\n".join(f"- {key}: {value}" for key, value in found["about"].items()))
    for measure in MEASUREMENTS:
        if measure.__name__ in args.only:
            rows = found["measurements"][measure.__name__] = measure(args)
            print(f"\n## {measure.__name__}\n\n{inspect.getdoc(measure)}\n\n{markdown(rows)}", flush=True)
            if args.out is not None:
                write_json(args.out, found)
    remarks = [row.get("remark", "") for rows in found["measurements"].values() for row in rows]
    return int(any(remark.startswith("failed") for remark in remarks))


if __name__ == "__main__":
    keep_freed_memory()
    limit_memory()
    sys.exit(main())
