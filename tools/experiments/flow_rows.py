"""A row of stage two's table: one flow trained once, and how near its samples come to held-out images."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.rows import remember
from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
from pyramid_ldm.config import FlowTraining, load_config
from pyramid_ldm.config.base import to_yaml
from pyramid_ldm.data.images import find_images, to_tensor
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.evaluation.frechet import Inception, Moments, frechet_distance, kernel_distance
from pyramid_ldm.files import write_text
from pyramid_ldm.pipeline import PyramidPipeline, SolverOptions
from pyramid_ldm.training.train_flow import train_flow

RECIPE = Path(__file__).parent / "flow.yaml"


@dataclass(frozen=True)
class Reference:
    """Features of real images that no row was trained on."""

    images: list[Path]
    size: tuple[int, int]
    features: Tensor  # (N, 2048)
    moments: Moments

    @classmethod
    def of_folder(cls, folder: Path, size: tuple[int, int], inception: Inception) -> "Reference":
        """Centre crops of every image of a folder."""
        images = [file.path for file in find_images(folder)]
        features = torch.cat([inception(batch) for batch in centre_crops(images, size)])
        return cls(images, size, features, Moments.of([features]))

    def distances(self, features: Tensor) -> dict[str, float]:
        """Of samples from these images."""
        return {
            "fid": frechet_distance(Moments.of([features]), self.moments),
            "kid": kernel_distance(features, self.features),
        }

    @torch.inference_mode()
    def reconstructed(self, autoencoder: PyramidAutoencoder, inception: Inception) -> dict[str, float]:
        """Distances of these images through the autoencoder from themselves: what is left to a perfect flow."""
        decoded = (
            autoencoder.decode(autoencoder.encode(batch.to(inception.device)).mode()).clamp(-1, 1)
            for batch in centre_crops(self.images, self.size)
        )
        return self.distances(torch.cat([inception(batch) for batch in decoded]))

    def halves(self) -> dict[str, float]:
        """The same between two halves of the real images, to compare with; fewer images make FID larger."""
        a, b = self.features[::2], self.features[1::2]
        return {"fid": frechet_distance(Moments.of([a]), Moments.of([b])), "kid": kernel_distance(a, b)}


def centre_crops(paths: list[Path], size: tuple[int, int]) -> Iterator[Tensor]:
    """(B, 3, H, W) in [-1, 1], 32 at a time."""
    for first in range(0, len(paths), 32):
        yield torch.stack([load_crop(p, size, zoom=1.0, top=0.5, left=0.5) for p in paths[first : first + 32]])


@dataclass(frozen=True)
class FlowTask:
    """A row with a seed and the options of the whole table."""

    name: str
    row: tuple[str, ...]
    seed: int
    directory: Path
    overrides: tuple[str, ...]

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.directory / f"{self.name}-{self.seed}".replace(" ", "-")

    def config(self) -> FlowTraining:
        """The recipe, the row's overrides, then the table's."""
        own = (f"run_dir={self.run}", f"seed={self.seed}")
        return load_config(FlowTraining, RECIPE, [*self.row, *self.overrides, *own])

    def train(self, reference: Reference, inception: Inception, samples: int, steps: list[int]) -> dict[str, Any]:
        """Trains, or goes on, or reads what is done; numbers of steps that were not judged yet are. Returns the row's
        figures."""
        result = self.run / "result.json"
        about = {"config": to_yaml(self.config()), "samples": samples, "real": len(reference.features)}
        remember(self.run, about)
        found: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
        if not found:
            _, finished = train_flow(self.config())
            if not finished:
                raise KeyboardInterrupt
            found = {"losses": last_losses(self.run)}
        missing = [count for count in steps if f"euler_{count}" not in found]
        if missing or "rk45_nfe" not in found:
            pipeline = PyramidPipeline.from_pretrained(self.run).to(inception.device)
            for count in missing:
                features = [
                    inception(torch.stack([to_tensor(image) for image in output.images]))
                    for output in pipeline.stream(
                        list(range(samples)), 1, SolverOptions("euler", steps=count), batch_size=32
                    )
                ]
                found[f"euler_{count}"] = reference.distances(torch.cat(features))
            if "rk45_nfe" not in found:
                found["rk45_nfe"] = pipeline(num_images=16, seed=1, solver="rk45", rtol=1e-3, atol=1e-3).nfe
            write_text(result, json.dumps(found, indent=1) + "\n")
        return found


def last_losses(run: Path) -> dict[str, float]:
    """Losses of every level at the end, on training and held-out records (train_HxW, held_out_HxW)."""
    found: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found |= {key: value for key, value in record.items() if key.startswith(("train_", "held_out_"))}
    return found
