"""Samples to a folder: PNGs that say how they were made, a grid, and a line a picture in samples.jsonl."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.evaluation.sheets import grid
from pyramid_ldm.files import append_line, write_text
from pyramid_ldm.ownership import mark, marker_of
from pyramid_ldm.pictures import is_whole, read_record, write_png
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.processes.solvers import SolverOptions

GRID_IMAGES = 64
SAMPLES = "samples.jsonl"
# What tells one picture of a folder from another; all else is the same.
OWN = ("file", "seed", "index", "nfe", "seconds")


def settings_of(pipeline: PyramidPipeline, options: SolverOptions, bf16: bool) -> dict[str, Any]:
    """What all pictures of a folder have in common: networks and solver."""
    height, width = pipeline.autoencoder.image_size
    return {
        "checkpoint": pipeline.checkpoint,
        **options.record(bf16),
        **({"runtime": "OpenVINO"} if pipeline.openvino else {}),
        "size": [height, width],
        "ratio": round(pipeline.autoencoder.compression_ratio(), 3),
    }


def refuse_other_settings(out: Path, settings: dict[str, Any]) -> None:
    """UserError where a folder of samples holds those of another checkpoint, or drawn in another way; one that holds
    none is for these from now on."""
    before = marker_of(out).get("settings", settings)
    if before != settings and not any(out.glob("seed*.png")):
        mark(out, "samples", settings=settings)
        return
    for key in [*settings, *before]:
        if before.get(key) != settings.get(key):
            raise UserError(
                f"{out}: holds samples with {key} = {before.get(key)}, not {settings.get(key)}; give another --out"
            )


def sample_to_folder(
    pipeline: PyramidPipeline,
    out: Path,
    indices: list[int],
    seed: int,
    options: SolverOptions,
    *,
    batch_size: int,
    bf16: bool,
) -> list[int]:
    """Draws those of images `indices` of `seed` that the folder does not hold yet; returns which. Each is on disk as
    soon as its batch is done.

    Several processes may each draw their share (possibly none) into one folder; `finish_folder` then completes it.
    """
    settings = settings_of(pipeline, options, bf16)
    todo = [index for index in indices if not is_drawn(out, seed, index, settings)]
    height, width = settings["size"]
    there = f" ({len(indices) - len(todo)} of them are there)" if len(todo) < len(indices) else ""
    print(
        f"sample: {len(indices)} images{there} of {height}x{width}, seed {seed}, {options.describe()}, "
        f"{settings['precision']}, batch {batch_size}, {settings.get('runtime', pipeline.device)}; to {out}",
        file=sys.stderr,
    )
    if not todo:
        return []
    drawn = 0
    with Progress("sample", len(todo)) as progress:

        def tell(nfe: int, t: float) -> None:
            progress.bar.set_postfix_str(f"t {t:.3f}, {nfe} evaluations")

        began = time.monotonic()
        for output in pipeline.stream(todo, seed, options, batch_size=batch_size, bf16=bf16, progress=tell):
            seconds = (time.monotonic() - began) / len(output.images)
            for image, nfe in zip(output.images, output.image_nfe, strict=True):
                index = todo[drawn]
                record = {"seed": seed, "index": index, "nfe": nfe, "seconds": round(seconds, 3), **settings}
                path = picture_path(out, seed, index)
                write_png(image, path, record)
                append_line(out / SAMPLES, {"file": path.name, **record})
                drawn += 1
            progress.advance(len(output.images))
            began = time.monotonic()
    return todo


def is_drawn(out: Path, seed: int, index: int, settings: dict[str, Any]) -> bool:
    """Whether the folder holds that image, whole, drawn in this way."""
    path = picture_path(out, seed, index)
    record = read_record(path) if path.exists() else None
    wanted = {"seed": seed, "index": index, **settings}
    return record is not None and all(record.get(key) == value for key, value in wanted.items()) and is_whole(path)


def picture_path(out: Path, seed: int, index: int) -> Path:
    """Where image `index` of `seed` goes."""
    return out / f"seed{seed:04d}-{index:06d}.png"


def finish_folder(out: Path, seed: int, indices: list[int]) -> None:
    """grid.png of the first 64 of `indices`, and samples.jsonl with one line a picture, from what the pictures say."""
    pictures = []
    for index in indices[:GRID_IMAGES]:
        with Image.open(picture_path(out, seed, index)) as picture:
            pictures.append(picture.convert("RGB"))
    write_png(grid(pictures), out / "grid.png", {"what": "grid", "seed": seed, "indices": indices[:GRID_IMAGES]})
    records = {path.name: read_record(path) for path in sorted(out.glob("seed*.png"))}
    lines = [json.dumps({"file": name, **record}) + "\n" for name, record in records.items() if record]
    write_text(out / SAMPLES, "".join(lines))
    record = records[picture_path(out, seed, indices[-1]).name] or {}
    print(f"done: {len(indices)} images and grid.png in {out}; {record.get('nfe')} evaluations", file=sys.stderr)
