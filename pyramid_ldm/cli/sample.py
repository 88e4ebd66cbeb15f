"""`pyramid-ldm sample`."""

import argparse
from pathlib import Path

from pyramid_ldm.cli.common import add_device, add_solver, solver_options

NAME = "sample"
HELP = "draw new images with a trained flow"
EXAMPLE = "pyramid-ldm sample runs/scapes2k-flow --num 16 --seed 0 --solver rk45 --out samples/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FLOW_RUN --num --out and how."""
    parser.add_argument("flow", metavar="FLOW_RUN", type=Path, help="a run directory of train-flow")
    parser.add_argument("-n", "--num", type=int, default=16, help="images (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="image k of a seed is always the same (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="index of the first image (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder for PNGs, grid.png and samples.jsonl")
    add_solver(parser)
    parser.add_argument("--compile", action="store_true", help="compile the network first; pays for many images")
    parser.add_argument("--batch-size", type=int, default=8, help="default: 8")
    add_device(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.errors import UserError
    from pyramid_ldm.evaluation.sampling import finish_folder, sample_to_folder
    from pyramid_ldm.training.runtime import start

    options = solver_options(arguments)
    if arguments.num < 1 or arguments.batch_size < 1 or arguments.first < 0:
        raise UserError("--num and --batch-size must be at least 1, --first at least 0")
    runtime = start(arguments.device, arguments.precision)
    indices = list(range(arguments.first, arguments.first + arguments.num))
    sample_to_folder(
        arguments.flow,
        arguments.out,
        indices[runtime.rank :: runtime.ranks],
        arguments.seed,
        options,
        batch_size=arguments.batch_size,
        device=runtime.device,
        bf16=runtime.bf16,
        compile_flow=arguments.compile,
    )
    runtime.barrier()
    if runtime.main:
        finish_folder(arguments.out, arguments.seed, indices)
    return True
