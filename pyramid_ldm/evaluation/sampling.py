"""Samples to a folder: PNGs that say how they were made, a grid, and a line a picture in samples.jsonl."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from pyramid_ldm.evaluation.figures import grid
from pyramid_ldm.files import write_atomic, write_text
from pyramid_ldm.pipeline import PyramidPipeline, SolverOptions

GRID_IMAGES = 64


def sample_to_folder(
    flow: Path,
    out: Path,
    indices: list[int],
    seed: int,
    options: SolverOptions,
    *,
    batch_size: int,
    device: torch.device,
    bf16: bool,
    compile_flow: bool = False,
) -> list[Path]:
    """Draws images `indices` of `seed`; returns their paths. Each is on disk as soon as its batch is done.

    Several processes may each draw their share (possibly none) into one folder; `finish_folder` then completes it.
    """
    if not indices:
        return []
    pipeline = PyramidPipeline.from_pretrained(flow).to(device)
    if compile_flow:
        pipeline.compile()
    out.mkdir(parents=True, exist_ok=True)
    solver = (
        f"euler, {options.steps} steps"
        if options.solver == "euler"
        else f"{options.solver}, tolerance {options.rtol:g}"
    )
    height, width = pipeline.autoencoder.config.image_size
    print(
        f"sample: {len(indices)} images of {height}x{width}, seed {seed}, {solver}, batch {batch_size}, {device}; "
        f"to {out}",
        file=sys.stderr,
    )
    paths: list[Path] = []
    with tqdm(total=len(indices), unit="img", desc="sample", disable=not sys.stderr.isatty()) as bar:

        def progress(nfe: int, t: float) -> None:
            bar.set_postfix_str(f"t {t:.3f}, {nfe} evaluations")

        began = time.monotonic()
        stream = pipeline.stream(indices, seed, options, batch_size=batch_size, bf16=bf16, progress=progress)
        for output in stream:
            seconds = (time.monotonic() - began) / len(output.images)
            for image, nfe in zip(output.images, output.image_nfe, strict=True):
                index = indices[len(paths)]
                record = {
                    "seed": seed, "index": index, "solver": options.solver, "nfe": nfe,
                    "checkpoint": pipeline.checkpoint,
                }  # fmt: skip
                path = picture_path(out, seed, index)
                write_png(image, path, record)
                append_line(out / "samples.jsonl", {"file": path.name, **record, "seconds": round(seconds, 3)})
                paths.append(path)
            bar.update(len(output.images))
            if bar.disable:
                print(f"sample: {len(paths)} of {len(indices)}, {seconds:.2f} s an image", file=sys.stderr)
            began = time.monotonic()
    return paths


def picture_path(out: Path, seed: int, index: int) -> Path:
    """Where image `index` of `seed` goes."""
    return out / f"seed{seed:04d}-{index:06d}.png"


def finish_folder(out: Path, seed: int, indices: list[int]) -> None:
    """grid.png of the first 64 of `indices`, and samples.jsonl with one line a picture, the newest."""
    pictures = [Image.open(picture_path(out, seed, index)) for index in indices[:GRID_IMAGES]]
    sheet = grid([picture.convert("RGB") for picture in pictures])
    write_atomic(out / "grid.png", lambda temporary: sheet.save(temporary, format="PNG"))
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    newest = {json.loads(line)["file"]: line for line in lines}
    write_text(out / "samples.jsonl", "".join(newest[name] + "\n" for name in sorted(newest)))
    record = json.loads(newest[picture_path(out, seed, indices[-1]).name])
    print(f"done: {len(indices)} images and grid.png in {out}; {record['nfe']} evaluations", file=sys.stderr)


def write_png(image: Image.Image, path: Path, record: dict[str, object]) -> None:
    """A PNG with `record` as JSON in the text chunk "pyramid_ldm"."""
    text = PngInfo()
    text.add_text("pyramid_ldm", json.dumps(record))
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=text))


def append_line(path: Path, record: dict[str, object]) -> None:
    """One JSON line in one write, so that several processes may append."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
