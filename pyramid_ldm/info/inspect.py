"""What a directory is: a run, a model, a checkpoint or latent shards, as a few lines of text."""

import shlex
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyramid_ldm.config import AutoencoderConfig, AutoencoderTraining, NCSNppConfig, load_saved
from pyramid_ldm.config.fixed import FIXED, FixedConfig, load_stage_one
from pyramid_ldm.data.plan import Plan
from pyramid_ldm.data.shards import AUTOENCODER, INDEX, LatentCache
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import read_json
from pyramid_ldm.info.budget import describe_latents, flops, gib, kind_of_config, load_training, millions, table
from pyramid_ldm.info.cost import (
    build_autoencoder,
    build_network,
    count,
    measure_decode,
    measure_encode,
    measure_evaluation,
    without_values,
)
from pyramid_ldm.ownership import read_whole
from pyramid_ldm.pipeline import MANIFEST
from pyramid_ldm.pyramid import compression_ratio
from pyramid_ldm.training.checkpoint import checkpoint_directories, find_fault
from pyramid_ldm.training.runtime import Runtime

FP32 = Runtime(torch.device("cpu"), False)


def describe(path: Path) -> str:
    """What `path` is, a property a line. UserError where it is nothing of ours, or damaged."""
    if not path.exists():
        raise UserError(f"{path}: no such directory")
    if path.is_file():
        hint = "; what a config will cost: `pyramid-ldm info --cost`" if kind_of_config(path) else ""
        raise UserError(f"{path}: is a file; give a run, model, checkpoint or shard directory{hint}")
    if (path / INDEX).is_file() or any(path.glob("[0-9]*.safetensors")):
        return table(shards(path))
    if (path / MANIFEST).is_file():
        return table(model(path, "flow with its autoencoder"))
    if (path / "state.pt").is_file():
        return table(checkpoint(path))
    config = path / "config.yaml"
    match kind_of_config(config) if config.is_file() else None:
        case "train-ae" | "train-flow":
            return table(run(path))
        case "autoencoder" | "flow" as kind:
            return table(model(path, kind))
    raise UserError(f"{path}: is no run, model, checkpoint or shard directory of pyramid-ldm")


def run(path: Path) -> dict[str, str]:
    """A run directory of either stage."""
    config = load_training(path / "config.yaml")
    stage = "train-ae" if isinstance(config, AutoencoderTraining) else "train-flow"
    kept = checkpoint_directories(path)
    seen = int(kept[-1].name) if kept else 0
    rows = {
        "what": f"run directory of {stage}",
        "size": describe_files(path),
        "images seen": f"{seen} of {config.train.images}" + ("" if seen else "; no checkpoint yet"),
        "checkpoints": ", ".join(f"{d.name} ({gib(total_bytes([d]))})" for d in kept) or "none",
    }
    found = read_whole(path / "model", read_parts)
    if found is not None:
        rows |= describe_parts(found)
    elif isinstance(config, AutoencoderTraining):
        rows |= describe_autoencoder(config.model)
    return rows | provenance(path)


@dataclass(frozen=True)
class Parts:
    """What a model directory says of itself: quickly read, for a run that is training replaces it."""

    autoencoder: AutoencoderConfig | FixedConfig | None
    flow: NCSNppConfig | None
    scales: list[float]  # mean standard deviation a level


def read_parts(path: Path) -> Parts | None:
    """Of a model directory of either stage; None where there is none. UserError where it is incomplete."""
    if (path / MANIFEST).is_file():
        configs = {name: path / name / "config.yaml" for name in ("flow", "autoencoder")}
        for config in configs.values():
            if not config.is_file():
                raise UserError(f"{config}: not found; copy the model directory whole")
        manifest = read_json(path / MANIFEST, "copy the model directory whole")
        try:
            scales = [sum(level) / len(level) for level in manifest["scaling"]["std"]]
        except (KeyError, TypeError, ZeroDivisionError):
            raise UserError(f"{path / MANIFEST}: damaged; copy the model directory whole") from None
        configs_of_both = load_stage_one(configs["autoencoder"]), load_saved(NCSNppConfig, configs["flow"])
        return Parts(*configs_of_both, scales)
    if not (path / "config.yaml").is_file():
        return None
    if not (path / "model.safetensors").is_file():
        raise UserError(f"{path / 'model.safetensors'}: not found; copy the model directory whole")
    if kind_of_config(path / "config.yaml") in ("autoencoder", *FIXED):
        return Parts(load_stage_one(path / "config.yaml"), None, [])
    return Parts(None, load_saved(NCSNppConfig, path / "config.yaml"), [])


def describe_parts(found: Parts) -> dict[str, str]:
    """Its networks."""
    rows = {} if found.autoencoder is None else describe_autoencoder(found.autoencoder)
    rows |= {} if found.flow is None else describe_network(found.flow)
    return rows | ({"latent std": ", ".join(f"{scale:.3g}" for scale in found.scales)} if found.scales else {})


def model(path: Path, what: str) -> dict[str, str]:
    """A model directory."""
    found = read_whole(path, read_parts)
    assert found is not None, "its config was there a moment ago"
    return {"what": f"model directory: {what}", "size": describe_files(path), **describe_parts(found)}


def provenance(path: Path) -> dict[str, str]:
    """How a run was last started; empty where that is not known."""
    if not (path / "provenance.json").is_file():
        return {}
    starts = read_json(path / "provenance.json", "it only records how the run was started, delete it")
    starts = starts if isinstance(starts, list) else [starts]  # formerly the last one alone
    found = starts[-1] if starts and isinstance(starts[-1], dict) else {}
    versions = ", ".join(f"{name} {found.get(name)}" for name in ("pyramid_ldm", "torch", "python"))
    return {
        "starts": str(len(starts)),
        "versions": versions,
        "machine": f"{found.get('machine')}, {found.get('threads')} threads",
        "git commit": str(found.get("git_commit") or "none"),
        "command": shlex.join(map(str, found.get("argv", []))),
        "data": str(found.get("data_fingerprint")),
    }


def describe_autoencoder(config: AutoencoderConfig | FixedConfig) -> dict[str, str]:
    """Image size, latents, parameters, FLOPs of an image."""
    with without_values():
        model = build_autoencoder(config)
        encode, decode = measure_encode(model, 1, FP32), measure_decode(model, FP32)
    images, latents = f"{config.image_size[0]}x{config.image_size[1]}", describe_latents(config)
    if not isinstance(config, AutoencoderConfig):
        return {"images": images, "latents": latents, "autoencoder": f"{config.KIND}: without parameters"}
    encoder, decoder = count(model.encoder), count(model.decoder)
    return {
        "images": images,
        "latents": f"{latents}, {'codebooks' if config.latent == 'vq' else 'Gaussian'}",
        "autoencoder": f"encoder {millions(encoder)}, decoder {millions(decoder)} parameters; "
        f"FLOPs an image: encode {flops(encode.flops)}, decode {flops(decode.flops)}",
    }


def describe_network(config: NCSNppConfig) -> dict[str, str]:
    """Parameters and FLOPs of an evaluation."""
    with without_values():
        model = build_network(config)
        evaluation = measure_evaluation(model, FP32)
        parameters = count(model)
    return {
        "flow": f"{millions(parameters)} parameters; FLOPs an image: one evaluation {flops(evaluation.flops)}",
        "attention": f"{config.attention} at factors {', '.join(map(str, config.attention_factors or [])) or 'none'}",
    }


def checkpoint(path: Path) -> dict[str, str]:
    """A training state; its hash is checked."""
    fault = find_fault(path)
    if fault is not None:
        raise UserError(f"{path}: {fault}; `train-*` would fall back to the checkpoint before it")
    state: dict[str, Any] = torch.load(path / "state.pt", map_location="meta", weights_only=True, mmap=True)
    networks = [name for name in ("autoencoder", "discriminator", "network") if state.get(name)]
    stage = "train-ae" if "autoencoder" in networks else "train-flow"
    # Averages are of parameters; a network's own entry also holds buffers.
    parameters = sum(tensor.numel() for tensor in next(iter(state["ema"].values())).values())
    return {
        "what": f"checkpoint of {stage}, whole",
        "size": describe_files(path),
        "images seen": str(state["images_seen"]),
        "networks": ", ".join(networks) + f"; {millions(parameters)} parameters are averaged",
        "averages": "widths " + ", ".join(state["ema"]),
        "skipped steps": str(state.get("nonfinite", {}).get("count", "not recorded")),
        **({"run": str(path.parent.parent)} if (path.parent.parent / "config.yaml").is_file() else {}),
    }


def shards(path: Path) -> dict[str, str]:
    """A shard directory, finished or not."""
    rows = {"what": "latent shards", "size": describe_files(path)}
    if not (path / INDEX).is_file():
        done = len(list(path.glob("[0-9]*.safetensors")))
        again = "run the same `pyramid-ldm encode` (or `sample --pairs`) again"
        return rows | {"state": f"unfinished: {done} shards, no {INDEX}; {again}"}
    cache = LatentCache(path)
    plan, splits = cache.plan, Counter(row.split for row in cache.rows)
    shapes = " + ".join(f"{h}x{w}x{c}" for c, h, w in plan.shapes())
    stds = ", ".join(f"{level['std']:.3g}" for level in cache.statistics)
    rows |= {
        "records": f"{len(cache.rows)} in {len(cache.shards)} shards: {splits['train']} to train on, "
        f"{splits['held_out']} held out; {len({row.source for row in cache.rows})} images"
        + (f", {cache.missing} more are missing (they cannot be read)" if cache.missing else ""),
        "images": f"{plan.image_size[0]}x{plan.image_size[1]}, {describe_cuts(plan)}",
        "latents": f"{shapes}, 1:{compression_ratio(plan.levels, plan.image_size):.1f}; a record is "
        f"{plan.record_length()} values ({'mean and log-variance' if plan.has_variance else 'latents'}), {plan.dtype}",
        "latent std": stds,
        "encoded in" if plan.pairs is None else "drawn in": plan.precision,
        "data": plan.data,
        "autoencoder": plan.autoencoder,
    }
    saved = path / AUTOENCODER / "config.yaml"
    if saved.is_file():
        rows["autoencoder"] += "; " + describe_autoencoder(load_stage_one(saved))["autoencoder"]
    return rows


def describe_cuts(plan: Plan) -> str:
    """How photographs became images; of pairs, that they are a flow's."""
    if plan.pairs is not None:
        return "samples of a flow, with the noise that they were drawn from"
    cut = f"{plan.crops} random crops, zoom up to {plan.zoom:g}" if plan.crops else "centre crop"
    return f"{cut}, with mirrored copies" if plan.flip else cut


def describe_files(path: Path) -> str:
    """Total size, and that of each thing in it, the largest first."""
    entries = sorted(((total_bytes([entry]), entry) for entry in path.iterdir()), key=lambda pair: (-pair[0], pair[1]))
    shown = [f"{entry.name}{'/' if entry.is_dir() else ''} {gib(size)}" for size, entry in entries[:8]]
    more = f", and {len(entries) - 8} more" if len(entries) > 8 else ""
    return f"{gib(sum(size for size, _ in entries))}: " + ", ".join(shown) + more


def total_bytes(paths: Iterable[Path]) -> int:
    """Of files, and of everything below directories; what vanishes meanwhile counts nothing."""
    total = 0
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            with suppress(OSError):
                total += file.stat().st_size if file.is_file() else 0
    return total
