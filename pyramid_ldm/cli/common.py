"""What several commands share."""

import argparse
import math
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyramid_ldm.errors import UserError

if TYPE_CHECKING:
    from pyramid_ldm.evaluation.reference import Choice
    from pyramid_ldm.processes.solvers import SolverOptions

MOST = 10**12  # of anything that is counted
KINDS = ("autoencoder_configs", "diffusion_configs")


def shipped(kind: str) -> list[Path]:
    """The configs of a kind that come with the package."""
    package = Path(__file__).parent.parent
    home = package / kind if (package / kind).is_dir() else package.parent / kind
    return sorted(home.glob("*.yaml"))


def find_config(name: str, kind: str) -> Path:
    """A config file by path; `autoencoder_configs/NAME.yaml` and the like also without being in a clone."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    known = {f"{kind}/{config.name}": config for config in shipped(kind)}
    if name in known:
        return known[name]
    hint = f"; did you mean {kind}/{path.name}?" if f"{kind}/{path.name}" in known else ""
    raise UserError(f"{name}: no such config file{hint or f'; those that come with the package are in {kind}/'}")


def find_stage_one(name: str) -> Path:
    """A run, a model directory or a config of stage one; a shipped config also without being in a clone."""
    path = Path(os.path.expanduser(name))
    return find_config(name, KINDS[0]) if path.suffix in (".yaml", ".yml") and not path.is_dir() else path


class Number:
    """What argparse calls with an option's text: a number within bounds."""

    def __init__(self, kind: type, low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> None:
        self.kind, self.low, self.high, self.open_low, self.open_high = kind, low, high, open_low, open_high

    def __call__(self, text: str) -> Any:
        """ArgumentTypeError where it is none, or out of bounds."""
        try:
            value = self.kind(text)
        except (ValueError, OverflowError):
            what = "whole number" if self.kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what}") from None
        below = value < self.low or (self.open_low and value == self.low)
        above = value > self.high or (self.open_high and value == self.high)
        if below or above or not math.isfinite(value):
            low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
            high = f"{'below' if self.open_high else 'at most'} {self.high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; give a number {low} and {high}")
        return value


def whole(low: int, high: int) -> Number:
    """A whole number from `low` to `high`."""
    return Number(int, low, high)


def share(*, zero: bool = True, one: bool = False) -> Number:
    """A number from 0 to 1; without `zero` above 0, without `one` below 1."""
    return Number(float, 0.0, 1.0, open_low=not zero, open_high=not one)


def folder(text: str) -> Path:
    """A path; a leading ~ is the user's home. ArgumentTypeError where it is empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path; give a folder or a file")
    return Path(os.path.expanduser(text))


def quoted(*words: object) -> str:
    """A command line that can be pasted into a shell."""
    return shlex.join(map(str, words))


def first_process() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --precision."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="default: auto")


def add_solver(parser: argparse.ArgumentParser) -> None:
    """--solver and what it takes."""
    tolerance = Number(float, 0.0, 1.0, open_low=True)
    parser.add_argument(
        "--solver",
        default="abm2",
        choices=["rk45", "dopri5", "euler", "ddim", "ancestral", "heun", "dpmpp_2m", "abm2"],
        help="adaptive steps: rk45, dopri5; fixed steps: the others (default: abm2)",
    )
    parser.add_argument(
        "--steps", type=whole(1, 10**6), help="of fixed steps, how many (default: 20; 200 of euler, ddim and ancestral)"
    )
    parser.add_argument(
        "--spacing",
        default="uniform",
        choices=["uniform", "cosine", "karras"],
        help="of fixed steps: even in time, denser at both ends, or in EDM's measure of noise (default: uniform)",
    )
    parser.add_argument("--eta", type=share(one=True), help="ancestral's share of fresh noise; 0 is ddim (default: 1)")
    parser.add_argument(
        "--guidance",
        type=Number(float, 0.0, 100.0),
        default=1.0,
        help="internal guidance: extrapolate from what the network says on its way down, 1.5 to 3 for networks with "
        "model.early; 1: none (default: 1)",
    )
    parser.add_argument("--rtol", type=tolerance, help="of adaptive steps, relative tolerance (default: 1e-5)")
    parser.add_argument("--atol", type=tolerance, help="of adaptive steps, absolute tolerance (default: 1e-5)")
    parser.add_argument(
        "--max-nfe",
        type=whole(1, 10**9),
        help="give up after so many evaluations (default: 2000, or what fixed steps take)",
    )


def solver_options(arguments: argparse.Namespace) -> "SolverOptions":
    """What add_solver and add_device asked for."""
    from pyramid_ldm.processes.solvers import SolverOptions

    return SolverOptions(
        arguments.solver,
        arguments.steps,
        arguments.rtol,
        arguments.atol,
        arguments.max_nfe,
        bf16=None if arguments.precision == "auto" else arguments.precision == "bf16",
        spacing=arguments.spacing,
        eta=arguments.eta,
        guidance=arguments.guidance,
    )


def add_photographs(parser: argparse.ArgumentParser, *, held_out: bool) -> None:
    """--data, and which of its images."""
    parser.add_argument("--data", type=folder, required=True, help="folder of photographs")
    if held_out:
        parser.add_argument(
            "--held-out",
            type=Number(float, 0.0, 1.0, open_low=True, open_high=True),
            nargs="?",
            const=RUNS_SHARE,
            metavar="SHARE",
            help="only the photographs that training held out, at SHARE or at what the run says (default: all)",
        )
    parser.add_argument(
        "--upscale",
        action=argparse.BooleanOptionalAction,
        help="also take photographs smaller than the images, enlarged (default: leave them out)",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=share(one=True),
        default=0.01,
        metavar="SHARE",
        help="stop where more than this share cannot be read (default: 0.01; three are always allowed)",
    )


RUNS_SHARE = -1.0  # what --held-out stands for without a number


def choice_of(arguments: argparse.Namespace, run: Path) -> "Choice":
    """What add_photographs asked for. UserError where the run should say which share it held out, and does not."""
    from pyramid_ldm.errors import UserError
    from pyramid_ldm.evaluation.reference import Choice
    from pyramid_ldm.ownership import marker_of

    held_out = arguments.held_out
    if held_out == RUNS_SHARE:
        held_out = marker_of(run / "model").get("validation", marker_of(run).get("validation"))
        if not isinstance(held_out, float) or not 0 < held_out < 1:
            raise UserError(f"{run}: does not say which share was held out; give it, as in --held-out 0.05")
    return Choice(held_out, bool(arguments.upscale), arguments.max_bad_fraction)


def add_training(parser: argparse.ArgumentParser) -> None:
    """CONFIG and key=value."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides, for example train.batch_size=8")
