"""Where stage two's latents come from: a cache of them, or photographs that are encoded on the way."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pyramid_ldm.autoencoders.load import Build, load_autoencoder, trained_on
from pyramid_ldm.autoencoders.protocol import Autoencoder
from pyramid_ldm.config.flow import FlowTraining
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.data.latents import LatentRecords, collate_latents
from pyramid_ldm.data.loading import load_batches
from pyramid_ldm.data.shards import AUTOENCODER, LatentCache, Totals, make_scaling
from pyramid_ldm.errors import UserError
from pyramid_ldm.pyramid import LatentScaling, Level, Pyramid, level_shapes, pyramid_noise, unflatten
from pyramid_ldm.training.log import RunLog
from pyramid_ldm.training.photographs import TrainingPhotographs
from pyramid_ldm.training.runtime import Runtime

SPLITS = ("train", "held_out")
SCALED_BY = 1024  # images that the scaling of latents is measured on where there is no cache


class Source(ABC):
    """Latents by position, and what is to be known about them."""

    autoencoder: Autoencoder
    levels: list[Level]
    counts: dict[str, int]  # of each split
    key: str  # what the user gives it as
    place: str

    def __init__(self, config: FlowTraining, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.notes: list[str] = []

    @property
    def image_size(self) -> list[int]:
        """[H, W]."""
        return self.autoencoder.image_size

    @abstractmethod
    def batches(self, positions: Iterable[list[int]]) -> Iterator[Batch]:
        """To train on."""

    @abstractmethod
    def to_examine(self, split: str, positions: Iterable[list[int]]) -> Iterator[Batch]:
        """Some of a split, the same whatever was trained."""

    @abstractmethod
    def latents(self, batch: Batch) -> Pyramid:
        """Raw latents of a batch, on the device."""

    @property
    def of_pairs(self) -> bool:
        """Whether latents come with the noise that they were drawn from."""
        return False

    def noise(self, batch: Batch) -> Pyramid | None:
        """What these latents were drawn from, where that is known, on the device."""
        return None

    @abstractmethod
    def scaling(self, mode: str) -> LatentScaling:
        """Between raw latents and the network's."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the latents are, wherever they lie."""

    @abstractmethod
    def describe(self) -> str:
        """How many there are."""

    def begin(self, bad: dict[str, str]) -> None:
        """Before all else; `bad`: files that turned out to be no images, digest and message, which grows."""
        return

    def received(self, batch: Batch, log: RunLog) -> None:
        """A batch has come."""
        return

    def refuse(self) -> UserError | None:
        """Why training cannot go on with what came; the same on every process."""
        return None


class CachedLatents(Source):
    """Those that `encode` wrote."""

    def __init__(self, config: FlowTraining, runtime: Runtime, build: Build | None = None) -> None:
        super().__init__(config, runtime)
        assert config.data.shards is not None
        self.key, self.place = "data.shards", config.data.shards
        self.cache = LatentCache(Path(config.data.shards))
        runtime.first(self.cache.verify)
        self.levels = self.cache.plan.levels
        home = self.cache.directory / AUTOENCODER
        self.autoencoder = load_autoencoder(home, build)
        if self.autoencoder.fingerprint() != self.cache.plan.autoencoder:
            raise UserError(
                f"{home}: is not the autoencoder that made these shards; copy the shard directory whole, or encode "
                f"again"
            )
        self.counts = {split: len(self.cache.indices(split)) for split in SPLITS}
        if config.data.jitter and not self.of_pairs:
            self.notes.append(f"data.jitter={config.data.jitter:g} is not used: it is for pairs of noise and latents")
        if config.data.posterior != "sample" and self.of_pairs:
            self.notes.append(f"data.posterior={config.data.posterior} is not used: pairs are points")
        if config.data.autoencoder is not None:
            self.notes += [f"data.autoencoder={config.data.autoencoder} is not used: {home} made these latents"]

    def batches(self, positions: Iterable[list[int]]) -> Iterator[Batch]:
        """Every record of an epoch once, in a fresh order."""
        records = LatentRecords(
            self.cache, self.cache.indices("train"), self.config.seed, self.config.data.posterior
        )  # fmt: skip
        pin = self.runtime.device.type == "cuda"
        return load_batches(records, collate_latents, positions, workers=self.config.data.workers, pin=pin)

    def to_examine(self, split: str, positions: Iterable[list[int]]) -> Iterator[Batch]:
        """Its records in order."""
        data = self.config.data
        rows = self.cache.indices(split)
        records = LatentRecords(self.cache, rows, self.config.seed, data.posterior, shuffle=False)
        return (collate_latents([records[position] for position in part]) for part in positions)

    def latents(self, batch: Batch) -> Pyramid:
        """The records."""
        assert batch.latents is not None
        flat = batch.latents.to(self.runtime.device, non_blocking=True)
        return unflatten(flat, level_shapes(self.levels, self.cache.plan.image_size))

    @property
    def of_pairs(self) -> bool:
        """Of a flow's own samples."""
        return self.cache.plan.pairs is not None

    def noise(self, batch: Batch) -> Pyramid | None:
        """Of pairs."""
        if batch.noise is None:
            return None
        flat = batch.noise.to(self.runtime.device, non_blocking=True)
        return unflatten(flat, level_shapes(self.levels, self.cache.plan.image_size))

    def scaling(self, mode: str) -> LatentScaling:
        """Exact, over the cache; of pairs that of the flow that drew them."""
        if self.cache.plan.pairs is not None:
            return LatentScaling.from_dict(self.cache.plan.pairs)
        return self.cache.scaling(mode)

    def identity(self) -> dict[str, Any]:
        """The cache's plan and its rows."""
        return self.cache.identity()

    def describe(self) -> str:
        """Records of each split."""
        missing = f"; {self.cache.missing} images of the folder are missing in it" if self.cache.missing else ""
        return f"{self.counts['train']} records to train on, {self.counts['held_out']} held out{missing}"


class EncodedPhotographs(Source):
    """Photographs, encoded on the way: crops are fresh, and nothing is stored twice."""

    def __init__(self, config: FlowTraining, runtime: Runtime, build: Build | None = None) -> None:
        super().__init__(config, runtime)
        assert config.data.root is not None
        assert config.data.autoencoder is not None
        self.key, self.place = "data.root", config.data.root
        self.autoencoder = load_autoencoder(Path(config.data.autoencoder), build).to(runtime.device)
        self.levels = list(self.autoencoder.levels)
        trained = trained_on(Path(config.data.autoencoder))
        data = config.data.photographs(trained)
        self.photographs = TrainingPhotographs(data, self.image_size, config.seed, runtime)
        if trained is not None and trained.validation != data.validation:
            self.photographs.notes.append(
                f"data.validation is {data.validation}, and the autoencoder held out {trained.validation}: the two "
                f"stages hold out different photographs"
            )

    def begin(self, bad: dict[str, str]) -> None:
        """Which are trained on."""
        self.photographs.begin(bad)
        self.notes = self.photographs.notes
        self.files = {"train": self.photographs.train, "held_out": self.photographs.held_out}
        self.counts = {split: len(files) for split, files in self.files.items()}

    def batches(self, positions: Iterable[list[int]]) -> Iterator[Batch]:
        """A fresh crop at every position."""
        return self.photographs.batches(positions)

    def to_examine(self, split: str, positions: Iterable[list[int]]) -> Iterator[Batch]:
        """Crops as training cuts them."""
        return self.photographs.to_examine(self.files[split], positions)

    @torch.no_grad()
    def latents(self, batch: Batch) -> Pyramid:
        """Encoded; a sample of the posterior, or its mode."""
        posterior = self.autoencoder.encode(batch.images(self.runtime.device))
        if not self.autoencoder.has_variance or self.config.data.posterior == "mode":
            return posterior.mode()
        shapes = level_shapes(self.levels, self.image_size)
        return posterior.sample(pyramid_noise(shapes, self.config.seed, "posterior", batch.positions))

    def scaling(self, mode: str) -> LatentScaling:
        """Measured on the crops of the first positions."""
        found: LatentScaling = self.runtime.first(lambda: self._measure(mode))
        return found

    def _measure(self, mode: str) -> LatentScaling:
        totals = Totals([level.channels for level in self.levels])
        count = min(SCALED_BY, 4 * self.counts["train"])
        parts = (list(range(first, min(first + 16, count))) for first in range(0, count, 16))
        for batch in self.to_examine("train", parts):
            totals.add(tuple(level.double().cpu() for level in self.latents(batch)), None)
        return make_scaling(totals.result(), mode)

    def identity(self) -> dict[str, Any]:
        """The photographs, the autoencoder and what is held out."""
        return {
            "data": self.photographs.fingerprint,
            "autoencoder": self.autoencoder.fingerprint(),
            "image_size": list(self.image_size),
            "validation": self.photographs.data.validation,
        }

    def describe(self) -> str:
        """Photographs of each split."""
        return f"{self.counts['train']} photographs to train on, {self.counts['held_out']} held out"

    def received(self, batch: Batch, log: RunLog) -> None:
        """Names what could not be read."""
        self.photographs.received(batch.bad, log)

    def refuse(self) -> UserError | None:
        """Where too many of the images cannot be read."""
        return self.photographs.refuse()


def open_source(config: FlowTraining, runtime: Runtime, build: Build | None = None) -> Source:
    """What `data` names. `build`: see `load_autoencoder`."""
    kind = CachedLatents if config.data.shards is not None else EncodedPhotographs
    return kind(config, runtime, build)
