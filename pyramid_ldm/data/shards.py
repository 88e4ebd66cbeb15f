"""Cached latents: safetensors shards of one tensor `records` (N, D), a row an image, and an `index.json`.

A row holds the means of all levels, then (KL) the log-variances of all levels, each coarse to fine in C, H, W order.
`NNNNN.json` beside a shard is its sidecar: it is written after the shard, so that a killed `encode` resumes at the
first shard without one. `index.json` is written last.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from pyramid_ldm.data.order import item_at
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import read_json, sha256, write_atomic, write_json
from pyramid_ldm.pyramid import LatentLevel, LatentScaling, Pyramid, flatten, level_shapes, unflatten
from pyramid_ldm.randomness import generator, uniform

FORMAT = 1
INDEX = "index.json"


@dataclass(frozen=True)
class Row:
    """Where a record comes from."""

    source: str  # the image's content hash
    mirrored: bool
    crop: int  # 0: the centre; k: the k-th random crop
    split: str  # train | held_out


@dataclass(frozen=True)
class Plan:
    """What a cache is made of; two caches with one plan hold the same records."""

    autoencoder: str  # fingerprint
    data: str  # fingerprint of the images
    image_size: list[int]
    levels: list[list[int]]  # [factor, channels], coarse to fine
    has_variance: bool
    dtype: str  # float16 | float32
    precision: str  # bf16 | fp32: what the encoder computed in
    crops: int
    zoom: float
    flip: bool
    validation: float
    seed: int
    shard_size: int

    def latent_levels(self) -> list[LatentLevel]:
        """The levels as objects."""
        return [LatentLevel(factor, channels) for factor, channels in self.levels]

    def record_length(self) -> int:
        """Values of a row: means and, where there are any, log-variances."""
        return sum(math.prod(shape) for shape in self.shapes()) * (2 if self.has_variance else 1)

    def shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of each level."""
        return level_shapes(self.latent_levels(), self.image_size)


def shard_paths(directory: Path, number: int) -> tuple[Path, Path]:
    """(shard, sidecar)."""
    return directory / f"{number:05d}.safetensors", directory / f"{number:05d}.json"


def write_shard(directory: Path, number: int, plan: Plan, records: Tensor, rows: Sequence[Row]) -> None:
    """The shard, then its sidecar, each atomically. UserError if a value does not fit float16."""
    if not torch.isfinite(records).all():
        raise UserError(
            f"{directory}: a latent of shard {number} is not finite in {plan.dtype}; encode with --dtype float32"
        )
    shard, sidecar = shard_paths(directory, number)
    write_atomic(shard, lambda path: save_file({"records": records.contiguous()}, path))
    write_json(
        sidecar,
        {
            "format": FORMAT,
            "plan": asdict(plan),
            "sha256": sha256(shard),
            "rows": [list(asdict(r).values()) for r in rows],
        },
    )


def has_shard(directory: Path, number: int, plan: Plan) -> bool:
    """Whether a shard is there, whole, and of this plan; UserError where it is of another."""
    shard, sidecar = shard_paths(directory, number)
    if not (shard.is_file() and sidecar.is_file()):
        return False
    found = read_json(sidecar, "delete the shard directory and run encode again")
    check_plan(directory, found.get("plan"), plan)
    return bool(found["sha256"] == sha256(shard))


def check_plan(directory: Path, found: Any, plan: Plan) -> None:
    """Refuses a cache made by another autoencoder, of other images, or with other preprocessing."""
    for key, value in asdict(plan).items():
        if not isinstance(found, dict) or found.get(key) != value:
            other = found.get(key) if isinstance(found, dict) else None
            raise UserError(
                f"{directory}: holds latents made with {key} = {other}, not {value}; use another --out, or delete it"
            )


def write_index(directory: Path, plan: Plan, count: int) -> None:
    """Statistics over the whole cache, then `index.json`."""
    shards, totals = [], _Totals(plan)
    for number in range(count):
        shard, sidecar = shard_paths(directory, number)
        content = read_json(sidecar, "run encode again")
        records = map_records(shard)
        totals.add(records)
        shards.append({"file": shard.name, "count": len(records), "sha256": content["sha256"]})
    write_json(
        directory / INDEX,
        {"format": FORMAT, "plan": asdict(plan), "statistics": totals.result(), "shards": shards},
    )


class _Totals:
    """Exact sums per channel, in float64."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        zeros = [np.zeros(channels) for _, channels in plan.levels]
        self.sum, self.square, self.variance = ([z.copy() for z in zeros] for _ in range(3))
        self.count = [0] * len(plan.levels)

    def add(self, records: NDArray[Any]) -> None:
        for start in range(0, len(records), 256):
            rows = torch.from_numpy(np.array(records[start : start + 256])).double()
            means, variances = split_record(rows, self.plan)
            for i, mean in enumerate(means):
                self.sum[i] += mean.sum(dim=(0, 2, 3)).numpy()
                self.square[i] += mean.square().sum(dim=(0, 2, 3)).numpy()
                if variances is not None:
                    self.variance[i] += variances[i].exp().sum(dim=(0, 2, 3)).numpy()
                self.count[i] += mean.numel() // mean.shape[1]

    def result(self) -> list[dict[str, Any]]:
        """Per level: std, and mean and std a channel; std^2 = Var(mean) + E[variance]."""
        found = []
        for i, n in enumerate(self.count):
            if n == 0:
                raise UserError("not one of the images could be read: there is nothing to encode")
            mean = self.sum[i] / n
            second = (self.square[i] + self.variance[i]) / n  # E[z^2] a channel
            whole = float(np.sqrt(np.maximum(second.mean() - mean.mean() ** 2, 1e-12)))
            channel = np.sqrt(np.maximum(second - mean**2, 1e-12))
            found.append(
                {
                    "std": whole,
                    "mean": float(mean.mean()),
                    "channel_mean": mean.tolist(),
                    "channel_std": channel.tolist(),
                }
            )
        return found


def split_record(rows: Tensor, plan: Plan) -> tuple[Pyramid, Pyramid | None]:
    """(B, D) -> means and log-variances (None for VQ), coarse to fine."""
    if not plan.has_variance:
        return unflatten(rows, plan.shapes()), None
    mean, log_variance = rows.chunk(2, dim=1)
    return unflatten(mean, plan.shapes()), unflatten(log_variance, plan.shapes())


def map_records(path: Path) -> NDArray[Any]:
    """The `records` tensor of a shard, memory-mapped: (N, D), float16 or float32."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))["records"]
    dtype = {"F16": np.float16, "F32": np.float32}[entry["dtype"]]
    if entry["shape"][0] == 0:  # no image of this shard could be read; an empty file cannot be mapped
        return np.zeros(tuple(entry["shape"]), dtype)
    return np.memmap(path, dtype, "r", offset=8 + length + entry["data_offsets"][0], shape=tuple(entry["shape"]))


class LatentCache:
    """A finished shard directory.

    Raises UserError where the index is missing (encode has not finished), of another version, or a shard is gone.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; make it with `pyramid-ldm encode AE_RUN --data DATA`")
        index = read_json(directory / INDEX, "encode has not finished: run the same `pyramid-ldm encode` again")
        if index.get("format") != FORMAT:
            raise UserError(f"{directory / INDEX}: format {index.get('format')}, this version reads {FORMAT}")
        self.directory = directory
        self.plan = Plan(**index["plan"])
        self.statistics: list[dict[str, Any]] = index["statistics"]
        self.shards: list[NDArray[Any] | None] = []
        self.rows: list[Row] = []
        self.place: list[tuple[int, int]] = []  # row -> (shard, row in it)
        for number, entry in enumerate(index["shards"]):
            path = directory / entry["file"]
            if not path.is_file():
                raise UserError(f"{path}: not found; copy the shard directory whole, or run encode again")
            try:
                self.shards.append(map_records(path))
            except (ValueError, KeyError, struct.error):
                raise UserError(f"{path}: truncated or damaged; copy it again, or run encode again") from None
            sidecar = read_json(path.with_suffix(".json"), "copy the shard directory whole, or run encode again")
            self.rows += [Row(*row) for row in sidecar["rows"]]
            self.place += [(number, i) for i in range(entry["count"])]

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker that is not forked gets a pickle: of paths, not of the maps' gigabytes.
        return self.__dict__ | {"shards": [None] * len(self.shards)}

    def indices(self, split: str) -> list[int]:
        """Rows of one split."""
        return [i for i, row in enumerate(self.rows) if row.split == split]

    def read(self, index: int) -> Tensor:
        """One record, (D,), float32."""
        number, row = self.place[index]
        shard = self.shards[number]
        if shard is None:
            shard = self.shards[number] = map_records(shard_paths(self.directory, number)[0])
        return torch.from_numpy(np.array(shard[row])).float()  # torch converts ten times as fast as NumPy

    def scaling(self, mode: str) -> LatentScaling:
        """unit: each level divided by its std; paper: only levels whose std exceeds 1 (PDM section 4.1); channel:
        each channel's mean subtracted and divided by its own std."""
        means, stds = [], []
        for (_, channels), level in zip(self.plan.levels, self.statistics, strict=True):
            std = level["std"]
            if mode == "channel":
                means.append(tuple(level["channel_mean"]))
                stds.append(tuple(level["channel_std"]))
                continue
            means.append((0.0,) * channels)
            stds.append((1.0 if mode == "paper" and std < 1 else std,) * channels)
        return LatentScaling(tuple(means), tuple(stds))


class LatentRecords(Dataset[tuple[Tensor, Tensor, Tensor, int]]):
    """Stage two's data by position of the run: item p is (raw latents (D/2,), noise (D/2,), uniform for t, p).

    Everything random at p is a function of (seed, p): the row, the posterior sample, the noise and the time.
    """

    def __init__(self, cache: LatentCache, rows: list[int], seed: int, posterior: str, shuffle: bool = True) -> None:
        self.cache, self.rows, self.seed, self.posterior, self.shuffle = cache, rows, seed, posterior, shuffle

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor, int]:
        place = item_at(position, len(self.rows), self.seed) if self.shuffle else position % len(self.rows)
        record = self.cache.read(self.rows[place])
        if self.cache.plan.has_variance:
            mean, log_variance = record.chunk(2)
            if self.posterior == "sample":
                noise = torch.randn(mean.shape, generator=generator(self.seed, "posterior", position))
                mean = mean + (0.5 * log_variance).exp() * noise
        else:
            mean = record
        noise = torch.randn(mean.shape, generator=generator(self.seed, "noise", position))
        return mean, noise, torch.tensor(uniform(self.seed, "time", position)), position


def collate_latents(items: list[tuple[Tensor, Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Items of `LatentRecords` to one batch."""
    latents, noise, time, positions = zip(*items, strict=True)
    return torch.stack(latents), torch.stack(noise), torch.stack(time), list(positions)


def make_record(mean: Pyramid, log_variance: Pyramid | None, dtype: str) -> Tensor:
    """(B, D) records of a batch, on the CPU."""
    parts = [flatten(mean)] + ([] if log_variance is None else [flatten(log_variance)])
    return torch.cat(parts, dim=1).to(getattr(torch, dtype)).cpu()
