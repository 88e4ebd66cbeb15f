"""Between the stages: photographs to latent shards."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyramid_ldm.autoencoders.load import Build, load_autoencoder
from pyramid_ldm.autoencoders.protocol import Autoencoder
from pyramid_ldm.data.batch import BadFile, Batch
from pyramid_ldm.data.folder import Folder, ImageFile, fingerprint, scan, split_held_out, too_many_bad, with_known
from pyramid_ldm.data.images import UnreadableImage
from pyramid_ldm.data.latents import make_record
from pyramid_ldm.data.loading import load_batches
from pyramid_ldm.data.photographs import Preprocessing, load_pixels
from pyramid_ldm.data.plan import Plan, Row
from pyramid_ldm.data.shards import (
    AUTOENCODER,
    INDEX,
    check_plan,
    count_missing,
    has_shard,
    read_index,
    write_index,
    write_shard,
)
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.files import append_line, read_lines
from pyramid_ldm.ownership import claim, delete_file, held, keep_apart, replace_directory
from pyramid_ldm.training.runtime import Runtime

BATCH_PIXELS = 1 << 22  # of one image of 2048x2048: more at once is no faster, and takes as many times the memory
UNREADABLE = "unreadable.jsonl"  # what turned out to be no image, so that removing it makes no other cache


@dataclass(frozen=True)
class View:
    """One record to be: an image, which crop of it, mirrored or not."""

    file: ImageFile
    crop: int
    mirrored: bool
    split: str


class Views(Dataset[tuple[Tensor | BadFile, int]]):
    """Views as pixels (3, H, W) uint8; an unreadable file gives what is wrong with it instead."""

    def __init__(self, views: Sequence[View], plan: Plan) -> None:
        self.views, self.plan = views, plan
        self.cut = Preprocessing((plan.image_size[0], plan.image_size[1]), "random", plan.zoom, plan.flip, plan.upscale)
        self.loaded: tuple[View, Tensor] | None = None  # a mirrored view follows its plain one: one decoding for both

    def __getitem__(self, index: int) -> tuple[Tensor | BadFile, int]:
        view = self.views[index]
        plain = replace(view, mirrored=False)
        if self.loaded is None or self.loaded[0] != plain:
            place = (1.0, 0.5, 0.5)
            if view.crop > 0:
                place = self.cut.place(self.plan.seed, "crop-", int(view.file.digest[:8], 16), view.crop)
            try:
                pixels = load_pixels(view.file.path, self.cut.image_size, place, upscale=self.cut.upscale)
            except UnreadableImage as error:
                return BadFile(view.file.digest, str(error), error.of_content), index
            self.loaded = plain, pixels
        pixels = self.loaded[1]
        return (pixels.flip(-1) if view.mirrored else pixels), index


def collate_views(items: list[tuple[Tensor | BadFile, int]]) -> Batch:
    """Items of `Views` to one batch, the indices of the readable ones as its positions; it may hold no pixels."""
    good = [(pixels, index) for pixels, index in items if isinstance(pixels, Tensor)]
    stacked = [pixels.permute(1, 2, 0) for pixels, _ in good]
    return Batch(
        [index for _, index in good],
        pixels=torch.stack(stacked) if stacked else None,
        bad=[bad for bad, _ in items if isinstance(bad, BadFile)],
    )


def view_batches(
    views: Sequence[View], plan: Plan, indices: Sequence[int], options: "EncodeOptions"
) -> Iterator[Batch]:
    """The views of these indices, in order."""
    height, width = plan.image_size
    size = options.batch_size or max(1, min(8, BATCH_PIXELS // (height * width)))
    parts = [list(indices[i : i + size]) for i in range(0, len(indices), size)]
    return load_batches(Views(views, plan), collate_views, parts, workers=options.workers, prefetch=2)


@dataclass(frozen=True)
class EncodeOptions:
    """How a cache is made. `crops` 0 is the centre crop; K > 0 is K random crops an image."""

    crops: int = 0
    zoom: float = 1.0
    flip: bool = True
    validation: float = 0.05
    upscale: bool = False  # take photographs smaller than image_size, too
    max_bad_fraction: float = 0.01
    dtype: str = "float16"
    seed: int = 0
    batch_size: int | None = None  # None: 8, or fewer large images
    shard_size: int = 1024
    workers: int = 2


def encode(
    autoencoder_run: Path, data: Path, out: Path, options: EncodeOptions, runtime: Runtime, build: Build | None = None
) -> Path:
    """Writes, or finishes, the shard directory `out`; every process encodes its share of the shards. `build`: see
    `load_autoencoder`.

    Raises UserError where `out` is not ours, lies inside what is read or around it, holds latents of another
    autoencoder, other images or other preprocessing; where too many images cannot be read, or a disk fails. What is
    done by then stays, and the same command goes on.
    """
    keep_apart(out, "--out", {"AE_RUN": autoencoder_run, "--data": data})
    autoencoder = load_autoencoder(autoencoder_run, build)
    folder: Folder = runtime.first(lambda: scan(data))
    size = autoencoder.image_size[0], autoencoder.image_size[1]
    files, notes = folder.large_enough(size, options.upscale)
    if runtime.main:
        claim(out, "shards", "--out")
    with held(out, runtime.main):
        if runtime.main and not any(out.glob("*.safetensors")):  # nothing depends on these yet
            delete_file(out / UNREADABLE, "shards")
        runtime.barrier()
        known = {str(line.get("digest")): str(line.get("message")) for line in read_lines(out / UNREADABLE)}
        notes += [f"skipped {known[file.digest]}" for file in files if file.digest in known]
        for line in [*folder.notes(), *notes]:
            say(line, runtime)
        Encoding(autoencoder, files, folder, options, runtime, out, known).run()
    return out


class Encoding:
    """One `encode` into a directory that is ours."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        files: list[ImageFile],
        folder: Folder,
        options: EncodeOptions,
        runtime: Runtime,
        out: Path,
        known: dict[str, str],
    ) -> None:
        self.autoencoder, self.options, self.runtime, self.out = autoencoder, options, runtime, out
        self.folder = folder
        self.present = {file.digest for file in files}
        files = with_known(files, known)
        self.plan = make_plan(autoencoder, files, options, runtime)
        self.views = list_views(files, options)
        self.bad = dict(known)  # images that are none: digest, message
        self.gone: dict[str, str] = {}  # others that cannot be opened any more

    def run(self) -> None:
        """To the end, or to the first fault."""
        plan, runtime, out, options = self.plan, self.runtime, self.out, self.options
        views, index = self.views, out / INDEX
        if index.exists():
            check_plan(out, read_index(out).get("plan"), plan)
        shards = [views[i : i + options.shard_size] for i in range(0, len(views), options.shard_size)]
        todo = [n for n in range(len(shards)) if not has_shard(out, n, plan)]
        runtime.barrier()  # every process has looked before the first one writes
        if index.exists() and not todo:
            if runtime.main and not (out / AUTOENCODER).is_dir():
                replace_directory(out / AUTOENCODER, "model", self.autoencoder.save_pretrained)
            say(f"encode: {out} is complete{self.describe_missing()}", runtime)
            return
        if runtime.main:
            delete_file(index, "shards")
        say(
            f"encode: {len({view.file.digest for view in views})} images, {len(views)} records in {len(shards)} shards "
            f"({len(shards) - len(todo)} done), {len(plan.levels)} levels, "
            f"1:{self.autoencoder.compression_ratio():.1f}, {plan.dtype}; to {out}",
            runtime,
        )
        self.refuse_bad()
        if runtime.main:  # also over one that an interrupted encode of another autoencoder left
            replace_directory(out / AUTOENCODER, "model", self.autoencoder.save_pretrained)
        self.autoencoder.to(runtime.device).to(memory_format=torch.channels_last)
        mine = todo[runtime.rank :: runtime.ranks]
        with Progress("encode", sum(len(shards[n]) for n in mine), "records") as progress:
            for number in mine:
                self.encode_shard(shards[number], number, progress)
        runtime.barrier()
        if runtime.main:
            self.bad |= {str(line.get("digest")): "" for line in read_lines(out / UNREADABLE)}  # of all processes
            self.refuse_bad()
            missing = write_index(out, plan, len(shards), self.folder.unreadable)
            if missing:
                images = len({view.file.digest for view in views}) + len(self.folder.unreadable)
                say(f"encode: {missing} of {images} images are missing: they cannot be read", runtime)
        runtime.barrier()

    def describe_missing(self) -> str:
        """For a finished cache."""
        missing = count_missing(read_index(self.out))
        return f", without {missing} images that cannot be read" if missing else ""

    @torch.inference_mode()
    def encode_shard(self, views: Sequence[View], number: int, progress: Progress) -> None:
        """One shard; what cannot be read is named and left out."""
        records, rows, plan = [], [], self.plan
        todo = [i for i, view in enumerate(views) if view.file.digest not in self.bad]
        for batch in view_batches(views, plan, todo, self.options):
            for bad in batch.bad:
                self.report(bad, progress)
            if batch.positions:
                with self.runtime.autocast():
                    posterior = self.autoencoder.encode(batch.images(self.runtime.device))
                records.append(make_record(posterior.mean, posterior.log_variance, plan.dtype))
                chosen = [views[i] for i in batch.positions]
                rows += [Row(view.file.digest, view.mirrored, view.crop, view.split) for view in chosen]
                progress.advance(len(batch.positions))
        none = torch.empty(0, plan.record_length(), dtype=getattr(torch, plan.dtype))
        digests = {view.file.digest for view in views}
        missing, gone = ({d: m for d, m in found.items() if d in digests} for found in (self.bad, self.gone))
        write_shard(self.out, number, plan, torch.cat([none, *records]), rows, missing, gone)

    def report(self, bad: BadFile, progress: Progress) -> None:
        """Names a file once, remembers it, and stops where there are too many of its kind."""
        if bad.digest in self.bad or bad.digest in self.gone:
            return
        progress.say(f"skipped {bad.message}")
        if bad.of_content:
            self.bad[bad.digest] = bad.message
            append_line(self.out / UNREADABLE, {"digest": bad.digest, "message": bad.message})
        else:  # perhaps it comes back; its shard is made again by the next encode
            self.gone[bad.digest] = bad.message
        self.refuse_bad()

    def refuse_bad(self) -> None:
        """UserError where too many of the images that are there cannot be read."""
        unreadable = len(self.folder.unreadable)
        bad = len(self.present & (self.bad.keys() | self.gone.keys())) + unreadable
        images, share = len(self.present) + unreadable, self.options.max_bad_fraction
        error = too_many_bad(self.folder.root, bad, images, share, "--max-bad-fraction")
        if error is not None:
            raise error


def make_plan(autoencoder: Autoencoder, files: Sequence[ImageFile], options: EncodeOptions, runtime: Runtime) -> Plan:
    """What this cache will be."""
    if options.dtype not in ("float16", "float32"):
        raise UserError(f"--dtype {options.dtype}: choose float16 or float32")
    return Plan(
        autoencoder=autoencoder.fingerprint(),
        data=fingerprint(files),
        image_size=list(autoencoder.image_size),
        levels=autoencoder.levels,
        has_variance=autoencoder.has_variance,
        dtype=options.dtype,
        precision="bf16" if runtime.bf16 else "fp32",
        crops=options.crops,
        zoom=options.zoom,
        flip=options.flip,
        validation=options.validation,
        seed=options.seed,
        shard_size=options.shard_size,
        upscale=options.upscale,
    )


def list_views(files: Sequence[ImageFile], options: EncodeOptions) -> list[View]:
    """Every record in order. Held-out images are cut and mirrored as the others are, or the distance between the two
    splits' losses would not say what was learned by heart."""
    train, held_out = split_held_out(files, options.validation)
    views = []
    for split, part in (("train", train), ("held_out", held_out)):
        for file in part:
            for crop in range(1, options.crops + 1) if options.crops else [0]:
                views.append(View(file, crop, False, split))
                if options.flip:
                    views.append(View(file, crop, True, split))
    return views


def say(text: str, runtime: Runtime) -> None:
    """A line on stderr, from the first process."""
    if runtime.main:
        print(text, file=sys.stderr)
