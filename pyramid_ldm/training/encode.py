"""Between the stages: photographs to latent shards."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
from pyramid_ldm.config import AutoencoderTraining, load_saved
from pyramid_ldm.config.autoencoder import ImageDataConfig
from pyramid_ldm.data.images import ImageFile, UnreadableImage, find_images, folder_fingerprint, split_held_out
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.data.shards import INDEX, Plan, Row, check_plan, has_shard, make_record, write_index, write_shard
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import read_json, replace_directory
from pyramid_ldm.randomness import uniform
from pyramid_ldm.training.runtime import Runtime

AUTOENCODER = "autoencoder"


@dataclass(frozen=True)
class View:
    """One record to be: an image, which crop of it, mirrored or not."""

    file: ImageFile
    crop: int
    mirrored: bool
    split: str


class Views(Dataset[tuple[Tensor | str, int]]):
    """Views as images (3, H, W); an unreadable file gives its message instead."""

    def __init__(self, views: list[View], plan: Plan) -> None:
        self.views, self.plan = views, plan
        self.loaded: tuple[View, Tensor] | None = None  # a mirrored view follows its plain one: one decoding for both

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        view, plan = self.views[index], self.plan
        plain = replace(view, mirrored=False)
        if self.loaded is not None and self.loaded[0] == plain:
            return (self.loaded[1].flip(-1) if view.mirrored else self.loaded[1]), index
        zoom, top, left = 1.0, 0.5, 0.5
        if view.crop > 0:
            place = (int(view.file.digest[:8], 16), view.crop)
            zoom = plan.zoom ** uniform(plan.seed, "crop-zoom", *place)
            top, left = uniform(plan.seed, "crop-top", *place), uniform(plan.seed, "crop-left", *place)
        try:
            image = load_crop(view.file.path, (plan.image_size[0], plan.image_size[1]), zoom=zoom, top=top, left=left)
        except UnreadableImage as error:
            return str(error), index
        self.loaded = plain, image
        return (image.flip(-1) if view.mirrored else image), index


@dataclass(frozen=True)
class EncodeOptions:
    """How a cache is made. `crops` 0 is the centre crop; K > 0 is K random crops an image."""

    crops: int = 0
    zoom: float = 1.0
    flip: bool = True
    validation: float = 0.05
    dtype: str = "float16"
    seed: int = 0
    batch_size: int = 8
    shard_size: int = 1024
    workers: int = 2


def encode(autoencoder_run: Path, data: Path, out: Path, options: EncodeOptions, runtime: Runtime) -> Path:
    """Writes, or finishes, the shard directory `out`; every process encodes its share of the shards.

    Raises UserError where `out` holds latents of another autoencoder, other images or other preprocessing.
    """
    autoencoder = PyramidAutoencoder.from_pretrained(autoencoder_run)
    files = find_images(data)
    plan = make_plan(autoencoder, files, options, runtime)
    index = out / INDEX
    finished = index.exists()
    if finished:
        check_plan(out, read_json(index, "delete the shard directory and run encode again").get("plan"), plan)
    views = list_views(files, options)
    shards = [views[i : i + options.shard_size] for i in range(0, len(views), options.shard_size)]
    todo = [n for n in range(len(shards)) if not has_shard(out, n, plan)]
    runtime.barrier()  # every process has looked before the first one writes
    if finished and not todo:
        say(f"encode: {out} is complete", runtime)
        return out
    out.mkdir(parents=True, exist_ok=True)
    if runtime.main:
        index.unlink(missing_ok=True)
    say(
        f"encode: {len(files)} images, {len(views)} records in {len(shards)} shards ({len(shards) - len(todo)} done), "
        f"{len(plan.levels)} levels, 1:{autoencoder.compression_ratio():.1f}, {plan.dtype}; to {out}",
        runtime,
    )
    if runtime.main:  # also over one that an interrupted encode of another autoencoder left
        replace_directory(out / AUTOENCODER, autoencoder.save_pretrained)
    autoencoder.to(runtime.device).to(memory_format=torch.channels_last)
    mine = todo[runtime.rank :: runtime.ranks]
    began = time.monotonic()
    with tqdm(
        total=sum(len(shards[n]) for n in mine), unit="img", desc="encode", disable=not sys.stderr.isatty()
    ) as bar:
        for number in mine:
            encode_shard(autoencoder, shards[number], number, plan, out, options, runtime, bar)
            if bar.disable:
                done = sum(len(shards[n]) for n in mine[: mine.index(number) + 1])
                print(f"encode: {done} of {bar.total} records, {time.monotonic() - began:.0f} s", file=sys.stderr)
    runtime.barrier()
    if runtime.main:
        write_index(out, plan, len(shards))
    runtime.barrier()
    return out


def make_plan(
    autoencoder: PyramidAutoencoder, files: list[ImageFile], options: EncodeOptions, runtime: Runtime
) -> Plan:
    """What this cache will be."""
    if options.dtype not in ("float16", "float32"):
        raise UserError(f"--dtype {options.dtype}: choose float16 or float32")
    config = autoencoder.config
    return Plan(
        autoencoder=autoencoder.fingerprint(),
        data=folder_fingerprint(files),
        image_size=list(config.image_size),
        levels=[[level.factor, level.channels] for level in autoencoder.levels],
        has_variance=config.latent == "kl",
        dtype=options.dtype,
        precision="bf16" if runtime.bf16 else "fp32",
        crops=options.crops,
        zoom=options.zoom,
        flip=options.flip,
        validation=options.validation,
        seed=options.seed,
        shard_size=options.shard_size,
    )


def list_views(files: list[ImageFile], options: EncodeOptions) -> list[View]:
    """Every record in order; held-out images contribute their centre crop only."""
    train, held_out = split_held_out(files, options.validation)
    views = []
    for file in train:
        for crop in range(1, options.crops + 1) if options.crops else [0]:
            views.append(View(file, crop, False, "train"))
            if options.flip:
                views.append(View(file, crop, True, "train"))
    return views + [View(file, 0, False, "held_out") for file in held_out]


@torch.inference_mode()
def encode_shard(
    autoencoder: PyramidAutoencoder,
    views: list[View],
    number: int,
    plan: Plan,
    out: Path,
    options: EncodeOptions,
    runtime: Runtime,
    bar: "tqdm[Any]",
) -> None:
    """One shard; unreadable images are named and left out."""
    records, rows = [], []
    for images, indices in readable_batches(Views(views, plan), options):
        with runtime.autocast():
            posterior = autoencoder.encode(
                images.to(runtime.device, non_blocking=True, memory_format=torch.channels_last)
            )
        records.append(make_record(posterior.mean, posterior.log_variance, plan.dtype))
        rows += [Row(views[i].file.digest, views[i].mirrored, views[i].crop, views[i].split) for i in indices]
        bar.update(len(indices))
    none = torch.empty(0, plan.record_length(), dtype=getattr(torch, plan.dtype))
    write_shard(out, number, plan, torch.cat([none, *records]), rows)


def readable_batches(views: Views, options: EncodeOptions) -> Iterator[tuple[Tensor, list[int]]]:
    """(images (B, 3, H, W), indices of the views); says which files were skipped."""
    loader = DataLoader(
        views, batch_size=options.batch_size, num_workers=options.workers, collate_fn=_as_list, prefetch_factor=2
        if options.workers else None,
    )  # fmt: skip
    for items in loader:
        good = [(image, index) for image, index in items if isinstance(image, Tensor)]
        for message in (image for image, _ in items if isinstance(image, str)):
            tqdm.write(f"skipped {message}", file=sys.stderr)
        if good:
            yield torch.stack([image for image, _ in good]), [index for _, index in good]


def _as_list(items: list[tuple[Tensor | str, int]]) -> list[tuple[Tensor | str, int]]:
    return items


def say(text: str, runtime: Runtime) -> None:
    """A line on stderr, from the first process."""
    if runtime.main:
        print(text, file=sys.stderr)


def trained_on(run: Path) -> ImageDataConfig | None:
    """`data` of an autoencoder run; None for a model directory that was moved away from its run."""
    config = run / "config.yaml"
    if config.is_file() and (run / "checkpoints").is_dir():
        return load_saved(AutoencoderTraining, config).data
    return None
