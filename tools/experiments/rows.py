"""A row of a table: one network trained once, resumable, and what it costs."""

import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.latents import crops, latent_statistics
from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.config import AutoencoderConfig, AutoencoderTraining, load_config
from pyramid_ldm.config.base import to_yaml
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import write_text
from pyramid_ldm.info.memory import PeakMemory
from pyramid_ldm.pyramid import latent_values, level_shapes
from pyramid_ldm.serialization import load_model
from pyramid_ldm.training.autoencoder_state import Build, accumulate, build_state
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.runtime import start
from pyramid_ldm.training.step import take_step
from pyramid_ldm.training.train_autoencoder import train_autoencoder

COMPARISON = Path(__file__).parent / "comparison.yaml"
STATISTICS = 256  # random crops that latent statistics are taken of
FIGURES = ("held_out_psnr", "held_out_ssim", "held_out_lpips")


@dataclass(frozen=True)
class Row:
    """What is trained: overrides of the recipe, and a network of another family where `family` says so."""

    name: str
    overrides: tuple[str, ...] = ()
    family: str = "ours"  # ours | sd-vae | dc-ae
    width: float = 1.0  # of a peer: a factor on its published widths
    recipe: Path = COMPARISON

    def build(self) -> Build:
        """The network of a config."""
        if self.family == "ours":
            return PyramidAutoencoder
        from experiments.peers import PeerAutoencoder

        return partial(PeerAutoencoder, family=self.family, width=self.width)


@dataclass(frozen=True)
class Task:
    """A row with a seed and the options of the whole table."""

    row: Row
    seed: int
    directory: Path
    overrides: tuple[str, ...]  # of every row: data, images, loss

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.directory / f"{self.row.name}-{self.seed}".replace(" ", "-").replace("/", "-").replace(":", "-")

    def config(self) -> AutoencoderTraining:
        """The recipe, the row's overrides, then the table's."""
        own = (f"run_dir={self.run}", f"seed={self.seed}")
        return load_config(AutoencoderTraining, self.row.recipe, [*self.row.overrides, *self.overrides, *own])

    def train(self) -> dict[str, Any]:
        """Trains, or goes on, or reads what is done. Returns the row's figures."""
        result, config = self.run / "result.json", self.config()
        remember(self.run, {"config": to_yaml(config), "family": self.row.family, "width": self.row.width})
        if not result.is_file():
            _, finished = train_autoencoder(config, self.row.build())
            if not finished:
                raise KeyboardInterrupt
            found = autoencoder_costs(config, self.row.build())
            model = load_model(self.run / "model", self.row.build(), AutoencoderConfig)
            found |= latent_statistics(model, crops(config.data.root, config.image_size, STATISTICS, config.data.zoom))
            write_text(result, json.dumps(found, indent=1) + "\n")
        return json.loads(result.read_text()) | {"curve": read_curve(self.run)}

    def step_seconds(self) -> float:
        """Gradients and update of one batch, warm: the fastest of three. Without reading images, weight averages and
        the discriminator."""
        config = self.config()
        runtime = start(config.device, config.precision)
        state = build_state(config, runtime.device, self.row.build())
        pixels = torch.randint(0, 256, (config.train.batch_size, *config.image_size, 3), dtype=torch.uint8)
        batch = Batch(list(range(len(pixels))), pixels=pixels)
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            accumulate(config, state, state.autoencoder, state.discriminator, batch, runtime)
            take_step(state.optimizer, state.autoencoder, 1.0, runtime, Metrics(), "grad_norm")
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])


def remember(run: Path, options: dict[str, Any]) -> None:
    """Writes what a row is made with beside its run, or refuses another row of the same name there."""
    note = run.with_name(run.name + ".json")
    if note.is_file() and json.loads(note.read_text()) != options:
        raise UserError(f"{run}: was made with other options (see {note.name}); give another --out, or delete both")
    note.parent.mkdir(parents=True, exist_ok=True)
    write_text(note, json.dumps(options, indent=1) + "\n")


def read_curve(run: Path) -> list[dict[str, float]]:
    """Held-out figures over images seen."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [
        {key: math.nan if line.get(key) is None else line[key] for key in ("images_seen", *FIGURES)}
        for line in lines
        if FIGURES[0] in line
    ]


def autoencoder_costs(config: AutoencoderTraining, build: Build) -> dict[str, Any]:
    """Parameters, FLOPs (a multiply-add is two) and peak activation bytes (float32) of encoding and of decoding one
    image; values of the latents."""
    model = build(config.model).eval().requires_grad_(False)
    shapes = level_shapes(model.levels, config.image_size)
    found: dict[str, Any] = {
        "latent_values": latent_values(model.levels, config.image_size),
        "ratio": model.compression_ratio(),
    }
    with torch.inference_mode():
        inputs = {"encode": torch.zeros(1, 3, *config.image_size), "decode": tuple(torch.zeros(1, *s) for s in shapes)}
        for part, network in (("encode", model.encoder), ("decode", model.decoder)):
            counter = FlopCounterMode(display=False)
            with counter:
                network(inputs[part])
            with PeakMemory(model.parameters()) as memory:
                before = memory.live
                network(inputs[part])
            found |= {
                f"{part}_parameters": sum(p.numel() for p in network.parameters()),
                f"{part}_flops": counter.get_total_flops(),
                f"{part}_bytes": memory.peak - before,
            }
    return found
