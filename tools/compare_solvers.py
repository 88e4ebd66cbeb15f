#!/usr/bin/env python3
"""Trained networks x solvers x numbers of evaluations: how near their samples come to photographs.

    python tools/compare_solvers.py --runs runs/a runs/b --data photos/ --inception inception-2015-12-05.pt \
        --out solvers.json --evaluations 10 20 50 --samples 128

Every cell has the same noise and the same photographs beside it. What --out holds already is not measured again; a
Markdown table is printed at the end. KID is given times 1000.
"""

import argparse
import json
import sys
from pathlib import Path

from pyramid_ldm.data.folder import find_images
from pyramid_ldm.evaluation.frechet import Inception
from pyramid_ldm.evaluation.reference import Reference, sample_features
from pyramid_ldm.files import write_text
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.training.runtime import start

SOLVERS = ("euler", "ancestral", "heun", "dpmpp_2m", "abm2")


def main() -> None:
    """Fills --out, then prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run directories of train-flow")
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs to compare with")
    parser.add_argument("--inception", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--spacing", default="uniform", choices=["uniform", "cosine", "karras"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--photographs", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    found = json.loads(options.out.read_text()) if options.out.is_file() else {}
    device = start(options.device, "fp32").device
    inception = Inception(options.inception, device)
    reference: Reference | None = None
    for count in options.evaluations:
        for solver in options.solvers:
            for run in options.runs:
                key = cell(run, solver, count, options)
                if key in found:
                    continue
                pipeline = PyramidPipeline.from_pretrained(run).to(device)
                if reference is None:
                    height, width = pipeline.autoencoder.image_size
                    files = find_images(options.data)[: options.photographs]
                    reference = Reference.of_images(files, (height, width), inception)
                features, nfe = sample_features(
                    pipeline, inception, options.samples, options.seed, solver_options(solver, count, options.spacing)
                )
                found[key] = {**reference.distances(features), "nfe": nfe}
                write_text(options.out, json.dumps(found, indent=1) + "\n")
                print(key, found[key], file=sys.stderr)
    print(table(found, options))


def solver_options(solver: str, evaluations: int, spacing: str) -> SolverOptions:
    """With at most so many evaluations: Heun's steps take two but for the last."""
    steps = (evaluations + 1) // 2 if solver == "heun" else evaluations
    return SolverOptions(solver, steps=steps, spacing=spacing)


def cell(run: Path, solver: str, evaluations: int, options: argparse.Namespace) -> str:
    """What --out calls a figure."""
    return f"{run.name} {solver} {evaluations} {options.spacing} seed {options.seed} x {options.samples}"


def table(found: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """KID x 1000: a row a run and solver, a column a number of evaluations."""
    lines = ["| network | solver | " + " | ".join(map(str, options.evaluations)) + " |"]
    lines.append("|---|---|" + "---|" * len(options.evaluations))
    for run in options.runs:
        for solver in options.solvers:
            kids = [found[cell(run, solver, count, options)]["kid"] for count in options.evaluations]
            cells = [f"{1000 * kid:.1f}" for kid in kids]
            lines.append(f"| {run.name} | {solver} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
