"""What a training config will cost, as text, and whether this machine has the memory."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from pyramid_ldm.config import (
    AutoencoderConfig,
    AutoencoderTraining,
    FlowTraining,
    load_config,
    load_saved,
)
from pyramid_ldm.config.base import read_yaml
from pyramid_ldm.config.fixed import FIXED, FixedConfig, load_stage_one
from pyramid_ldm.data.shards import AUTOENCODER
from pyramid_ldm.errors import UserError
from pyramid_ldm.info.cost import BATCH, cache_bytes, estimate_autoencoder, estimate_flow, has_variance
from pyramid_ldm.pyramid import compression_ratio, level_shapes
from pyramid_ldm.serialization import read_model
from pyramid_ldm.training.runtime import Runtime

MARGIN = 1.2  # what kernels and allocators add to tensors: a measured step of scapes2k's flow, 7.35 GiB for 5.57
PROCESS = 0.65 * 2**30  # bytes of main memory that Python and PyTorch take themselves
REGIONS = "let the loss see parts of an image with train.regions=2"
OF_FLOW = {field.name for field in fields(FlowTraining)} - {field.name for field in fields(AutoencoderTraining)}
Schema = TypeVar("Schema", AutoencoderTraining, FlowTraining)


def kind_of_config(path: Path) -> str | None:
    """What a YAML file configures: "train-ae", "train-flow", a saved "autoencoder" or "flow" network, or None."""
    try:
        loaded = read_yaml(path)
    except UserError:  # `load_config` says what is wrong
        return None
    kind = loaded.get("kind")
    if isinstance(kind, str):
        return kind if kind in ("train-ae", "train-flow", "autoencoder", "flow", *FIXED) else None
    data = loaded.get("data")
    if OF_FLOW & loaded.keys() or (isinstance(data, dict) and {"shards", "autoencoder"} & data.keys()):
        return "train-flow"
    if "model" in loaded:
        return "train-ae" if "image_size" in loaded else None
    if "levels" in loaded:
        return "autoencoder" if "encoder" in loaded else "flow" if "widths" in loaded else None
    return None


def load_training(path: Path, overrides: Sequence[str] = ()) -> AutoencoderTraining | FlowTraining:
    """The training config of either stage; folders that are not set yet get a placeholder.

    Raises:
        UserError: the file is not a training config.
        UserError: what it or an override says is wrong.
    """
    match kind_of_config(path):
        case "train-flow":
            return _load(FlowTraining, path, overrides)
        case "train-ae" | None if path.is_file():
            return _load(AutoencoderTraining, path, overrides)
        case _:
            raise UserError(f"{path}: is not a training config; give one such as autoencoder_configs/scapes2k.yaml")


def _load(schema: type[Schema], path: Path, overrides: Sequence[str]) -> Schema:
    # What the config leaves open costs nothing.
    written = read_yaml(path)
    data = written.get("data")
    given = {key for key, value in (data.items() if isinstance(data, dict) else ()) if value not in (None, "???")}
    given |= {text.partition("=")[0].removeprefix("data.") for text in overrides if text.startswith("data.")}
    unset: list[str] = ["run_dir=unset"] if written.get("run_dir") in (None, "???") else []
    wanted = ["root"]
    if schema is FlowTraining:
        wanted = ["root", "autoencoder"] if "root" in given and "shards" not in given else ["shards"]
    unset += [f"data.{name}=unset" for name in wanted if name not in given]
    return load_config(schema, path, [*unset, *overrides])


def find_autoencoder(config: FlowTraining, source: Path | None) -> AutoencoderConfig | FixedConfig:
    """The autoencoder whose latents a flow learns: of a config, run or model directory `source`, else of the shards.

    Raises UserError where there is neither.
    """
    if source is None:
        saved = Path(config.data.shards or "") / AUTOENCODER / "config.yaml"
        if saved.is_file():
            return load_stage_one(saved)
        raise UserError(
            "the cost of a flow depends on its latents: add --autoencoder autoencoder_configs/NAME.yaml (or a run of "
            "train-ae), or data.shards=LATENTS of a finished `pyramid-ldm encode`"
        )
    if source.is_dir():
        source = source / "config.yaml" if (source / "config.yaml").is_file() else _model_config(source)
    match kind_of_config(source):
        case "train-ae":
            return _load(AutoencoderTraining, source, ()).model
        case "autoencoder":
            return load_saved(AutoencoderConfig, source)
        case "pixels" | "wavelet":
            return load_stage_one(source)
    raise UserError(f"{source}: is not an autoencoder's config; give autoencoder_configs/NAME.yaml or a train-ae run")


def _model_config(run: Path) -> Path:
    return read_model(run, "train-ae", lambda home: home / "config.yaml")


def report_autoencoder(config: AutoencoderTraining, runtime: Runtime) -> str:
    """Cost of stage one and the verdict, a figure a line."""
    cost = estimate_autoencoder(config, bf16=runtime.bf16)

    def trial(changed: AutoencoderTraining) -> int:
        return estimate_autoencoder(changed, bf16=runtime.bf16).step.peak

    return table(
        {
            "stage one": f"pyramid autoencoder, images {config.image_size[0]}x{config.image_size[1]}",
            "latents": describe_latents(config.model),
            "parameters": f"encoder {millions(cost.encoder)}, decoder {millions(cost.decoder)}",
            "FLOPs an image": f"training {flops(cost.step.flops)}, encode {flops(cost.encode.flops)}, "
            f"decode {flops(cost.decode.flops)}",
            "memory, training": describe_step(config, cost.step.peak, cost.state, runtime),
            "memory, encode": f"{gib(cost.encode.peak)} for {BATCH} images at once, {precision(runtime)}",
            "memory, decode": f"{gib(cost.decode.peak)} for one image, {precision(runtime)}",
            "latent cache": describe_cache(config.model),
            "device": describe_device(runtime),
            "verdict": verdict(config, cost.step.peak, runtime, trial),
        }
    )


def report_flow(config: FlowTraining, autoencoder: AutoencoderConfig | FixedConfig, runtime: Runtime) -> str:
    """Cost of stage two and the verdict, a figure a line."""
    cost = estimate_flow(config, autoencoder, bf16=runtime.bf16)

    def trial(changed: FlowTraining) -> int:
        return estimate_flow(changed, autoencoder, bf16=runtime.bf16).step.peak

    return table(
        {
            "stage two": f"flow network, images {autoencoder.image_size[0]}x{autoencoder.image_size[1]}",
            "latents": describe_latents(autoencoder),
            "parameters": f"network {millions(cost.parameters)}",
            "FLOPs an image": f"training {flops(cost.step.flops)}, one evaluation {flops(cost.evaluation.flops)}, "
            f"decode {flops(cost.sample.flops)}",
            "memory, training": describe_step(config, cost.step.peak, cost.state, runtime),
            "memory, sample": f"{gib(cost.sample.peak)} for {BATCH} images at once, "
            f"{'bf16' if config.precision == 'bf16' else 'fp32'}",
            "latent cache": describe_cache(autoencoder),
            "device": describe_device(runtime),
            "verdict": verdict(config, cost.step.peak, runtime, trial),
        }
    )


def table(rows: dict[str, str]) -> str:
    """Names and values in two columns."""
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())


def describe_latents(config: AutoencoderConfig | FixedConfig) -> str:
    """ "1x1x64 + 4x4x60, 1:204.8"."""
    levels = config.levels
    shapes = " + ".join(f"{h}x{w}x{c}" for c, h, w in level_shapes(levels, config.image_size))
    return f"{shapes}, 1:{compression_ratio(levels, config.image_size):.1f}"


def describe_step(config: Any, peak: int, state: int, runtime: Runtime) -> str:
    """What a step needs, and how much of it lives between steps."""
    return (
        f"{gib(peak)} at train.batch_size={config.train.batch_size}, {precision(runtime)}; "
        f"{gib(state)} of it between steps (weights, optimizer, averages)"
    )


def describe_cache(config: AutoencoderConfig | FixedConfig) -> str:
    """The size that `encode` will write."""
    moments = "mean and log-variance" if has_variance(config) else "latents"
    return f"{cache_bytes(config, 1000) / 2**20:.0f} MiB per 1000 images (fp16, {moments}, with mirrored copies)"


def describe_device(runtime: Runtime) -> str:
    """ "cpu, 12.3 GiB free"."""
    free = free_memory(runtime.device)
    return f"{runtime.device}, " + ("free memory unknown" if free is None else f"{gib(free)} free")


def verdict(config: Any, peak: int, runtime: Runtime, trial: Callable[[Any], int]) -> str:
    """One line: fits, or what to change. `trial` gives the peak of a changed config."""
    free = free_memory(runtime.device)
    fixed = PROCESS if runtime.device.type == "cpu" else 0.0
    whole = peak * MARGIN + fixed
    needed = f"training takes {gib(whole)}, with what kernels, allocator and Python add"
    if free is None:
        return f"unknown: {needed}"
    if whole <= free:
        return f"fits: {needed}"
    if peak + fixed <= free:
        return f"barely fits: {needed}; should it run out of memory, {' or '.join(levers(config))}"
    return f"does not fit: {needed}; {remedy(config, peak, (free - fixed) / MARGIN, trial)}"


def levers(config: Any) -> list[str]:
    """What makes a step smaller, the least invasive first."""
    found = ["lower train.batch_size"] if config.train.batch_size > 1 else []
    if isinstance(config, FlowTraining):
        return found + ([] if config.model.checkpoint else ["set model.checkpoint=true"])
    return [*found, "recompute more with model.checkpoint_factors", *([] if config.train.regions else [REGIONS])]


def remedy(config: Any, peak: int, room: float, trial: Callable[[Any], int]) -> str:
    """What to change so that a step takes at most `room` bytes; `trial` finds out."""
    changed = copy.deepcopy(config)
    words = []
    train = config.train
    if train.batch_size > 1:
        changed.train.batch_size, images = 1, train.batch_size * train.accumulate
        least = trial(changed)
        fits = 1 + math.floor((room - least) / max(1.0, (peak - least) / (train.batch_size - 1)))
        batch_sizes = [size for size in range(1, fits + 1) if images % size == 0]
        if batch_sizes:
            size = batch_sizes[-1]
            return f"lower train.batch_size to {size} (train.accumulate={images // size}: a step sees as many images)"
        words.append("train.batch_size=1")
    if isinstance(config, FlowTraining):
        changed.model.checkpoint = True
        steps = ["model.checkpoint=true"]
    else:
        factors = {*config.model.checkpoint_factors, *(1 << i for i in range(5))}
        changed.model.checkpoint_factors = sorted(f for f in factors if f <= config.model.levels[0].factor)
        steps = [f"model.checkpoint_factors={changed.model.checkpoint_factors}".replace(" ", "")]
        if not config.train.regions and config.train.region_size < min(config.image_size):
            steps.append("train.regions=2")
    for step in steps:
        words.append(step)
        if step == "train.regions=2":
            changed.train.regions = 2
        least = trial(changed)
        if least <= room:
            break
    else:
        return f"even {' '.join(words)} takes {gib(least)}; narrow the network (model.*widths)"
    return f"set {' '.join(words)} ({gib(least)})"


def free_memory(device: torch.device) -> int | None:
    """Bytes that a new process could take, or None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        return found[0] if found else None
    return None


def precision(runtime: Runtime) -> str:
    """ "bf16" or "fp32"."""
    return "bf16" if runtime.bf16 else "fp32"


def gib(size: float) -> str:
    """ "1.5 GiB", or in the largest unit of which there is a whole one."""
    unit = next((i for i in (3, 2, 1) if size >= 1024**i), 0)
    return f"{size / 1024**unit:.1f} {'KMG'[unit - 1]}iB" if unit else f"{size:.0f} bytes"


def millions(parameters: int) -> str:
    """ "12.3 M"."""
    return f"{parameters / 1e6:.1f} M"


def flops(number: int) -> str:
    """ "1.2 T" or "3.4 G"; a multiplication and an addition are two."""
    return f"{number / 1e12:.2f} T" if number >= 1e12 else f"{number / 1e9:.1f} G"
