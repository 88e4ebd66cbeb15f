"""A row of stage two's table: one flow trained once, and how near its samples come to held-out images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.rows import remember
from pyramid_ldm.config import FlowTraining, load_config
from pyramid_ldm.config.base import to_yaml
from pyramid_ldm.evaluation.frechet import Inception
from pyramid_ldm.evaluation.reference import Reference, sample_features
from pyramid_ldm.files import write_text
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.training.train_flow import train_flow

RECIPE = Path(__file__).parent / "flow.yaml"


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
                features, _ = sample_features(pipeline, inception, samples, 1, SolverOptions("euler", steps=count))
                found[f"euler_{count}"] = reference.distances(features)
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
