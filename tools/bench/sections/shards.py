"""Reading cached latents in random order."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import ours
from bench.measuring import measure
from bench.results import Figures
from bench.section import Section
from bench.sections.encode_files import temporary
from bench.settings import Item, Settings
from bench.tables import RSS, TIME, Column, significant, times
from pyramid_ldm.data.latents import LatentRecords, collate_latents
from pyramid_ldm.data.plan import Plan, Row
from pyramid_ldm.data.shards import LatentCache, write_index, write_shard
from pyramid_ldm.pyramid import unflatten

BATCH, TOTAL = 256, 2**28  # records; bytes of a cache
CONFIGS = ("celebahq_1024", "people2k")
Reader = Callable[[list[int]], object]


def items(settings: Settings) -> list[Item]:
    """Every reader, on records of two sizes."""
    found = []
    for config in CONFIGS:
        size = plan(config, settings).record_length() * 2
        group = f"{config}, records of {significant(size / 1000)} kB"
        for name in READERS:
            found.append(Item("shards", group, name, {"config": config}, name == ROWS, alone=False))
    return found


def plan(config: str, settings: Settings) -> Plan:
    """A cache of float16 records with variance."""
    model = ours.autoencoder_config(config, settings).model
    return Plan(
        autoencoder="none", data="none", image_size=list(model.image_size),
        levels=model.levels, has_variance=True, dtype="float16",
        precision="fp32", crops=0, zoom=1.0, flip=False, validation=0.0, seed=0, shard_size=BATCH,
    )  # fmt: skip


@cache
def cached(config: str, settings: Settings) -> LatentCache:
    """Random records, written as `encode` writes them."""
    chosen = plan(config, settings)
    shards = 2 if settings.quick else max(2, TOTAL // (2 * chosen.record_length()) // BATCH)
    folder = temporary() / config
    rows = [Row(f"{i:032x}", False, 0, "train") for i in range(BATCH)]
    for number in range(shards):
        write_shard(folder, number, chosen, torch.randn(BATCH, chosen.record_length()).half(), rows, {}, {})
    write_index(folder, chosen, shards, [])
    return LatentCache(folder)


def read_records(cache: LatentCache, config: str) -> Reader:
    """What training sees: rows, posterior samples, noise and times."""
    records = LatentRecords(cache, cache.indices("train"), 0, "sample")
    fetch = getattr(records, "__getitems__", lambda places: [records[i] for i in places])
    return lambda places: collate_latents(fetch(places))


def read_rows(cache: LatentCache, config: str) -> Reader:
    """Rows alone."""
    return lambda places: torch.stack([cache.read(i) for i in places])


def read_levels(cache: LatentCache, config: str) -> Reader:
    """A memory-mapped file a level."""
    folder = temporary() / f"{config}-levels"
    folder.mkdir(exist_ok=True)
    shapes = cache.plan.shapes() * 2  # means, then log-variances
    whole = unflatten(torch.stack([cache.read(i).half() for i in range(len(cache.rows))]), shapes)
    for number, level in enumerate(whole):
        np.save(folder / f"{number}.npy", level.numpy())
    maps = [np.load(folder / f"{number}.npy", mmap_mode="r") for number in range(len(shapes))]

    def read(places: list[int]) -> list[Tensor]:
        return [torch.stack([torch.from_numpy(level[i].astype(np.float32)) for i in places]) for level in maps]

    return read


def read_files(cache: LatentCache, config: str) -> Reader:
    """A .npy file a record."""
    folder = temporary() / f"{config}-files"
    folder.mkdir(exist_ok=True)
    for i in range(len(cache.rows)):
        np.save(folder / f"{i}.npy", cache.read(i).half().numpy())

    def load(path: Path) -> Tensor:
        return torch.from_numpy(np.load(path).astype(np.float32))

    return lambda places: torch.stack([load(folder / f"{i}.npy") for i in places])


ROWS = "ours: rows alone"
READERS: dict[str, Callable[[LatentCache, str], Reader]] = {
    ROWS: read_rows,
    "ours: LatentRecords, with posterior and noise": read_records,
    "memory-mapped, a file a level": read_levels,
    "a file a record": read_files,
}


def measure_item(item: Item, settings: Settings) -> Figures:
    """Every record once, in batches; files are in the page cache."""
    cache = cached(item.params["config"], settings)
    read = READERS[item.name](cache, item.params["config"])
    order = torch.randperm(len(cache.rows), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    figures = measure(lambda: [None for places in batches if read(places) is None], settings)
    return figures | {"images": len(order), "bytes": len(order) * cache.plan.record_length() * 2}


SECTION = Section(
    title="Reading shards",
    about=f"Random order, batches of {BATCH}, to float32, one thread, files in the page cache. Records are means and "
    "log-variances in float16.",
    columns=(
        TIME,
        Column("images_per_second", "records/s", times(1)),
        Column("bytes_per_second", "MB/s", times(1e-6)),
        RSS,
        Column("ratio", "time / rows", times(1)),
    ),
    items=items,
    measure=measure_item,
)
