"""Encoding a folder of JPEGs, against the limit of reading them."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench import ours
from bench.measuring import measure
from bench.results import Figures
from bench.section import Section
from bench.sections.coding import label
from bench.settings import Item, Settings
from bench.tables import IMAGES, PEAK, RSS, TIME, Column, times
from pyramid_ldm.data.folder import scan
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.demo.scenes import render_landscape
from pyramid_ldm.encode import EncodeOptions, Encoding, view_batches
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.ownership import claim
from pyramid_ldm.training.runtime import Runtime

CONFIG, COUNT = "people2k", 16
READ, LOADER, ENCODE = "reading alone, one thread", "reading alone, loader", "ours: encode"
WORKERS = (0, 1, 2)


def items(settings: Settings) -> list[Item]:
    """The limit first."""
    group = f"{COUNT} JPEGs of {label(settings.image_size(ours.SIZES[CONFIG]))}"
    found = [Item("encode_files", group, READ, alone=False)]
    for name in (LOADER, ENCODE):
        for workers in WORKERS:
            params, reference = {"workers": workers, "kind": name}, (name, workers) == (ENCODE, WORKERS[-1])
            found.append(Item("encode_files", group, f"{name}, {workers} workers", params, reference, alone=False))
    return found


@cache
def temporary() -> Path:
    """A folder that goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="pyramid-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def photographs(height: int, width: int) -> Path:
    """Procedural landscapes, enlarged, with grain: about as heavy as photographs."""
    folder = temporary() / "photographs"
    folder.mkdir()
    for i in range(COUNT):
        small = Image.fromarray(render_landscape(i, height // 4, width // 4))
        large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = np.random.default_rng(i).normal(0, 6, large.shape[:2]).astype(np.float32)
        noisy = np.clip(large + grain[..., None], 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:02d}.jpg", quality=90)
    return folder


def measure_item(item: Item, settings: Settings) -> Figures:
    """Images a second over the whole folder; files are in the page cache."""
    size = settings.image_size(ours.SIZES[CONFIG])
    folder = scan(photographs(*size))
    files = folder.files
    figures = {"images": len(files), "bytes": sum(Path(file.path).stat().st_size for file in files)}
    if item.name == READ:
        return figures | measure(
            lambda: [load_crop(file.path, size, zoom=1.0, top=0.5, left=0.5) for file in files], settings
        )
    device = torch.device(settings.device)
    options = EncodeOptions(flip=False, validation=0.0, shard_size=len(files), workers=item.params["workers"])
    runtime = Runtime(device, settings.precision == "bf16")
    autoencoder = ours.autoencoder(CONFIG, settings, device).requires_grad_(False)
    autoencoder.to(memory_format=torch.channels_last)
    out = temporary() / "shards"
    claim(out, "shards", "--out")
    work = Encoding(autoencoder, files, folder, options, runtime, out, set())
    views = work.views
    if item.params["kind"] == LOADER:
        return figures | measure(lambda: list(view_batches(views, work.plan, range(len(views)), options)), settings)

    def encode() -> None:
        with Progress("encode", len(views), "records") as progress:
            work.encode_shard(views, 0, progress)

    return figures | measure(encode, settings, autoencoder.parameters())


SECTION = Section(
    title="Encoding a folder",
    about="Worker processes of the loader share the machine's cores with the network. "
    "`encode` reads, encodes in batches of 8 and writes a shard.",
    columns=(
        TIME,
        IMAGES,
        Column("bytes_per_second", "JPEG MB/s", times(1e-6)),
        PEAK,
        RSS,
        Column("ratio", "time / encode", times(1)),
    ),
    items=items,
    measure=measure_item,
)
