"""`pyramid-ldm evaluate`."""

import argparse
from pathlib import Path

from pyramid_ldm.cli.common import add_device, add_solver, solver_options

NAME = "evaluate"
HELP = (
    "figures beside photographs: PSNR, SSIM, LPIPS, rFID and rKID of an autoencoder; FID and KID of a flow's samples, "
    "or of a folder of pictures"
)
EXAMPLE = (
    "pyramid-ldm evaluate runs/scapes2k-flow --data photos/ --held-out 0.05 --inception inception-2015-12-05.pt\n"
    "         pyramid-ldm evaluate samples/ --data photos/ --inception inception-2015-12-05.pt --out figures.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN --data and how."""
    parser.add_argument("run_or_pictures", metavar="RUN", type=Path, help="a run of either stage, or pictures")
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs to compare with")
    parser.add_argument(
        "--held-out", type=float, metavar="SHARE", help="only the photographs held out at this data.validation"
    )
    parser.add_argument("--inception", type=Path, metavar="FILE", help="StyleGAN2-ADA's inception-2015-12-05.pt")
    parser.add_argument("--lpips", metavar="WEIGHTS", help="imagenet, or a file with VGG-16's weights")
    parser.add_argument(
        "--num", type=int, help="samples to draw (default: as many as photographs); of the others, only the first"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    add_solver(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="of samples (default: 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures there, as JSON")
    add_device(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.errors import UserError
    from pyramid_ldm.evaluation.evaluate import Evaluation, report
    from pyramid_ldm.training.runtime import start

    if arguments.batch_size < 1 or (arguments.num is not None and arguments.num < 1):
        raise UserError("--num and --batch-size must be at least 1")
    options = solver_options(arguments)
    runtime = start(arguments.device, arguments.precision)
    how = Evaluation(
        runtime.device,
        runtime.bf16,
        arguments.inception,
        arguments.lpips,
        arguments.held_out,
        arguments.num,
        arguments.seed,
        options,
        arguments.batch_size,
    )
    report(arguments.run_or_pictures, arguments.data, how, arguments.out)
    return True
