"""What several commands share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pyramid_ldm.config.base import ConfigError

if TYPE_CHECKING:
    from pyramid_ldm.pipeline import SolverOptions


def find_config(name: str, kind: str) -> Path:
    """A config file by path, or one that the package ships by `autoencoder_configs/NAME` and the like."""
    path = Path(name)
    package = Path(__file__).parent.parent
    for candidate in (path, package / kind / path.name, package.parent / kind / path.name):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{name}: no such config file; those that come with the package are in {kind}/")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --precision."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="default: auto")


def add_solver(parser: argparse.ArgumentParser) -> None:
    """--solver and what it takes."""
    parser.add_argument("--solver", default="rk45", choices=["rk45", "euler", "dopri5"], help="default: rk45")
    parser.add_argument("--steps", type=int, default=200, help="Euler's steps (default: 200)")
    parser.add_argument("--rtol", type=float, default=1e-5, help="RK45's relative tolerance (default: 1e-5)")
    parser.add_argument("--atol", type=float, default=1e-5, help="RK45's absolute tolerance (default: 1e-5)")
    parser.add_argument("--max-nfe", type=int, default=2_000, help="give up after so many evaluations (default: 2000)")


def solver_options(arguments: argparse.Namespace) -> "SolverOptions":
    """What add_solver and add_device asked for."""
    from pyramid_ldm.pipeline import SolverOptions

    return SolverOptions(
        arguments.solver,
        arguments.steps,
        arguments.rtol,
        arguments.atol,
        arguments.max_nfe,
        bf16=None if arguments.precision == "auto" else arguments.precision == "bf16",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """CONFIG and key=value."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides, for example train.batch_size=8")
