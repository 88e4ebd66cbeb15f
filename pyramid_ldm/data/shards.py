"""Cached latents: safetensors shards of one tensor `records` (N, D), a row an image, and an `index.json`.

A row holds the means of all levels, then (KL) the log-variances of all levels, each coarse to fine in C, H, W order.
`NNNNN.json` beside a shard is its sidecar: it is written after the shard, so that a killed `encode` resumes at the
first shard without one. `index.json` is written last. Both say what their own content hashes to.
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pyramid_ldm.data.digests import Facts, UnreadableFileError, facts_of, with_retries
from pyramid_ldm.data.plan import Plan, Row
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import read_sealed, sealed, sha256, write_atomic, write_json
from pyramid_ldm.pyramid import LatentScaling, Pyramid, unflatten

FORMAT = 2
INDEX = "index.json"
AUTOENCODER = "autoencoder"  # what made the latents, beside them
DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
MOST_HEADER = 2**20  # bytes; ours are a hundred


def shard_paths(directory: Path, number: int) -> tuple[Path, Path]:
    """(shard, sidecar)."""
    return directory / f"{number:05d}.safetensors", directory / f"{number:05d}.json"


def write_shard(
    directory: Path,
    number: int,
    plan: Plan,
    records: Tensor,
    rows: Sequence[Row],
    missing: dict[str, str],
    gone: dict[str, str],
) -> None:
    """The shard, then its sidecar, each atomically. UserError if a value does not fit float16.

    Args:
        missing: files that should be in it and are no images: digest, message.
        gone: images that should be in it and could not be opened; the next `encode` makes the shard again.
    """
    if not torch.isfinite(records).all():
        mend = "encode with --dtype float32" if plan.pairs is None else "the flow that drew it has diverged"
        raise UserError(f"{directory}: a latent of shard {number} is not finite in {plan.dtype}; {mend}")
    shard, sidecar = shard_paths(directory, number)
    write_atomic(shard, lambda path: save_file({"records": records.contiguous()}, path))
    write_json(
        sidecar,
        sealed(
            {
                "format": FORMAT,
                "plan": plan.to_dict(),
                "sha256": sha256(shard),
                "missing": missing,
                "gone": gone,
                "rows": [list(asdict(r).values()) for r in rows],
            }
        ),
    )


def has_shard(directory: Path, number: int, plan: Plan) -> bool:
    """Whether a shard is there, whole, with all that can be in it, and of this plan; UserError where of another."""
    shard, sidecar = shard_paths(directory, number)
    if not (shard.is_file() and sidecar.is_file()):
        return False
    try:
        found = read_sealed(sidecar, "", FORMAT)
    except UserError:  # it is written again
        return False
    check_plan(directory, found.get("plan"), plan)
    return found["sha256"] == sha256(shard) and not found.get("gone")


def check_plan(directory: Path, found: Any, plan: Plan) -> None:
    """Refuses a cache made by another autoencoder, of other images, or with other preprocessing."""
    for key, value in plan.to_dict().items():
        other = found.get(key) if isinstance(found, dict) else None
        if other != value:
            raise UserError(
                f"{directory}: holds latents made with {key} = {other}, not {value}; use another --out, or delete it"
            )


def write_index(directory: Path, plan: Plan, count: int, unopened: Sequence[str]) -> int:
    """Statistics over the whole cache, then `index.json`. Returns how many images are missing.

    Args:
        unopened: a message for each file of the folder that nothing is known of, for it could not be opened.
    """
    shards, missing = [], dict[str, str]()
    totals = Totals([level.channels for level in plan.levels])
    for number in range(count):
        path, sidecar = shard_paths(directory, number)
        content = read_sealed(sidecar, "run encode again", FORMAT)
        shard = Shard.open(path, plan)
        for start in range(0, shard.count, 256):
            totals.add(*split_record(shard.read(start, min(256, shard.count - start)).double(), plan))
        missing |= content["missing"] | content["gone"]
        shards.append({"file": path.name, "count": shard.count, "sha256": content["sha256"]})
    statistics = totals.result()
    index = {
        "format": FORMAT, "plan": plan.to_dict(), "statistics": statistics, "missing": missing,
        "unopened": list(unopened), "shards": shards,
    }  # fmt: skip
    write_json(directory / INDEX, sealed(index))
    return count_missing(index)


def read_index(directory: Path) -> dict[str, Any]:
    """`index.json` of a finished cache."""
    return read_sealed(directory / INDEX, "delete it and run encode again", FORMAT)


def count_missing(index: dict[str, Any]) -> int:
    """How many images of the folder a finished cache lacks."""
    return len(index.get("missing", ())) + len(index.get("unopened", ()))


class Totals:
    """Exact sums per channel of each level, in float64."""

    def __init__(self, channels: Sequence[int]) -> None:
        zeros = [np.zeros(count) for count in channels]
        self.sum, self.square, self.variance = ([z.copy() for z in zeros] for _ in range(3))
        self.count = [0] * len(channels)

    def add(self, means: Pyramid, log_variances: Pyramid | None) -> None:
        """Latents (B, C, H, W) a level, float64, on the CPU."""
        for i, mean in enumerate(means):
            self.sum[i] += mean.sum(dim=(0, 2, 3)).numpy()
            self.square[i] += mean.square().sum(dim=(0, 2, 3)).numpy()
            if log_variances is not None:
                self.variance[i] += log_variances[i].exp().sum(dim=(0, 2, 3)).numpy()
            self.count[i] += mean.numel() // mean.shape[1]

    def result(self) -> list[dict[str, Any]]:
        """Per level: std, and mean and std a channel; std^2 = Var(mean) + E[variance]."""
        found = []
        for i, n in enumerate(self.count):
            if n == 0:
                raise UserError("not one of the images could be read: there is nothing to encode")
            mean, second = self.sum[i] / n, (self.square[i] + self.variance[i]) / n  # E[z], E[z^2] a channel
            whole = float(np.sqrt(np.maximum(second.mean() - mean.mean() ** 2, 1e-12)))
            channel = np.sqrt(np.maximum(second - mean**2, 1e-12))
            channels = {"channel_mean": mean.tolist(), "channel_std": channel.tolist()}
            found.append({"std": whole, "mean": float(mean.mean()), **channels})
        return found


def split_record(rows: Tensor, plan: Plan) -> tuple[Pyramid, Pyramid | None]:
    """(B, D) -> means and log-variances (None for VQ), coarse to fine."""
    if not plan.has_variance:
        return unflatten(rows, plan.shapes()), None
    mean, log_variance = rows.chunk(2, dim=1)
    return unflatten(mean, plan.shapes()), unflatten(log_variance, plan.shapes())


def _state_of(file: IO[bytes]) -> tuple[int, ...]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Shard:
    """Where the records of a shard lie. A read opens it and closes it again: caches have thousands of shards."""

    path: Path
    dtype: str  # F16 | F32
    count: int
    width: int
    offset: int  # bytes before the first record
    state: tuple[int, ...]  # device, inode, size and time of the file

    @classmethod
    def open(cls, path: Path, plan: Plan) -> "Shard":
        """Reads the header. UserError where the file is not whole, or not a shard of this plan."""

        def read() -> tuple[tuple[int, ...], bytes]:
            with path.open("rb") as file:
                state, start = _state_of(file), file.read(8)
                length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
                return state, file.read(length) if 0 < length <= MOST_HEADER else b""

        try:
            state, header = with_retries(path, read)
            entry = json.loads(header)["records"]
            dtype, (count, width), (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(isinstance(n, int) and n >= 0 for n in (count, width, begin, end))
            offset = 8 + len(header) + begin
            expected = {"float16": "F16", "float32": "F32"}[plan.dtype]
            whole &= dtype == expected and width == plan.record_length() and 8 + len(header) + end == state[2]
            whole &= end - begin == count * width * DTYPES[expected].itemsize
        except UnreadableFileError as error:
            raise UserError(f"{path}: {error.strerror}; copy the shard directory whole, or run encode again") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise UserError(f"{path}: truncated or damaged; copy it again, or run the same encode again")
        return cls(path, dtype, count, width, offset, state)

    def read(self, row: int, count: int = 1) -> Tensor:
        """Records from `row` on, (count, D), float16 or float32. UserError where the file is not as it was opened."""
        kind = DTYPES[self.dtype]
        size = count * self.width * kind.itemsize

        def read() -> bytes | None:
            with self.path.open("rb") as file:
                if _state_of(file) != self.state:
                    return None
                file.seek(self.offset + row * self.width * kind.itemsize)
                return file.read(size)

        try:
            data = with_retries(self.path, read)
        except UnreadableFileError as error:
            raise UserError(f"{self.path}: {error.strerror}; it was there when training began") from None
        if data is None or len(data) != size:
            raise UserError(f"{self.path}: has changed since it was opened; run the same command again to go on")
        return torch.from_numpy(np.frombuffer(bytearray(data), kind).reshape(count, self.width))


class LatentCache:
    """A finished shard directory.

    Raises UserError where the index is missing (encode has not finished), of another version, or a shard is gone or
    damaged, as far as headers and sidecars tell; `verify` looks at every byte.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; make it with `pyramid-ldm encode AE_RUN --data DATA`")
        again = "copy the shard directory whole, or run the same `pyramid-ldm encode` (or `sample --pairs`) again"
        if not (directory / INDEX).exists():
            again = "encode has not finished: run the same `pyramid-ldm encode` (or `sample --pairs`) again"
        index = read_sealed(directory / INDEX, again, FORMAT)
        try:
            self.plan = Plan.from_dict(index["plan"])
            self.statistics: list[dict[str, Any]] = index["statistics"]
            self.missing = count_missing(index)
            entries = [(entry["file"], entry["count"], entry["sha256"]) for entry in index["shards"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{directory / INDEX}: was written by another version; run encode again") from None
        self.directory = directory
        self.shards: list[Shard] = []
        self.hashes: list[str] = []
        self.rows: list[Row] = []
        self.place: list[tuple[int, int]] = []  # row -> (shard, row in it)
        for number, (name, count, digest) in enumerate(entries):
            path = directory / Path(name).name
            shard = Shard.open(path, self.plan)
            sidecar = read_sealed(path.with_suffix(".json"), again, FORMAT)
            if shard.count != count or sidecar.get("sha256") != digest or len(sidecar.get("rows", ())) != count:
                raise UserError(f"{path}: is not the shard that {INDEX} lists; {again}")
            self.shards.append(shard)
            self.hashes.append(digest)
            self.rows += [Row(*row) for row in sidecar["rows"]]
            self.place += [(number, i) for i in range(count)]

    def verify(self) -> None:
        """Holds every shard against its hash (one that was whole before and is unchanged is not read again)."""
        paths = [shard.path for shard in self.shards]
        facts = facts_of(paths, "shard", lambda path: "", f"{self.directory}: checking shards")
        for path, found, digest in zip(paths, facts, self.hashes, strict=True):
            if not (isinstance(found, Facts) and digest.startswith(found.digest)):
                raise UserError(f"{path}: damaged (not what {INDEX} says); copy it again, or run the same encode again")

    def identity(self) -> dict[str, Any]:
        """What the latents are, wherever they lie: two caches with one identity hold the same records in one order."""
        rows = hashlib.sha256(json.dumps([list(asdict(row).values()) for row in self.rows]).encode())
        return self.plan.to_dict() | {"rows": rows.hexdigest()[:16]}

    def indices(self, split: str) -> list[int]:
        """Rows of one split."""
        return [i for i, row in enumerate(self.rows) if row.split == split]

    def read(self, index: int) -> Tensor:
        """One record, (D,), float32."""
        number, row = self.place[index]
        return self.shards[number].read(row)[0].float()

    def scaling(self, mode: str) -> LatentScaling:
        """See `make_scaling`."""
        return make_scaling(self.statistics, mode)


def make_scaling(statistics: Sequence[dict[str, Any]], mode: str) -> LatentScaling:
    """unit: each level divided by its std; paper: only levels whose std exceeds 1 (PDM section 4.1); channel: each
    channel's mean subtracted and divided by its own std. `statistics` are a level's as `Totals` has them."""
    means, stds = [], []
    for level in statistics:
        std, channels = level["std"], len(level["channel_mean"])
        if mode == "channel":
            means.append(tuple(level["channel_mean"]))
            stds.append(tuple(level["channel_std"]))
            continue
        means.append((0.0,) * channels)
        stds.append((1.0 if mode == "paper" and std < 1 else std,) * channels)
    return LatentScaling(tuple(means), tuple(stds))
