"""`pyramid-ldm evaluate`."""

import argparse

from pyramid_ldm.cli.common import (
    MOST,
    add_device,
    add_photographs,
    add_solver,
    find_stage_one,
    folder,
    solver_options,
    whole,
)

NAME = "evaluate"
HELP = (
    "figures beside photographs: PSNR, SSIM, LPIPS, rFID and rKID of an autoencoder; FID and KID of a flow's samples, "
    "or of a folder of pictures"
)
EXAMPLE = (
    "pyramid-ldm evaluate runs/scapes2k-flow --data photos/ --held-out --inception inception-2015-12-05.pt\n"
    "         pyramid-ldm evaluate samples/ --data photos/ --inception inception-2015-12-05.pt --out figures.json"
)

PROTOCOLS = {  # the paper's data sets: how many samples it draws (PDM section 4.1)
    "lsun_bedrooms_256": 50_000, "lsun_churches_256": 50_000, "celebahq_1024": 30_000, "scapes2k": 10_000,
    "people2k": 5_000,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, --data and what else."""
    parser.add_argument("run_or_pictures", metavar="RUN", type=folder, help="a run of either stage, or pictures")
    add_photographs(parser, held_out=True)
    parser.add_argument(
        "--inception",
        type=folder,
        metavar="FILE",
        help="inception-2015-12-05.pt, for FID and KID; an autoencoder can do without",
    )
    parser.add_argument(
        "--lpips",
        metavar="WEIGHTS",
        help="of an autoencoder: imagenet, or a file of VGG-16's weights (default: none)",
    )
    parser.add_argument(
        "-n",
        "--num",
        type=whole(1, MOST),
        help="of a flow: samples (default: as many as photographs); otherwise: images to use",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="of a flow: as many samples as the paper draws on this data set, beside all photographs",
    )
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of a flow's samples (default: 0)")
    add_solver(parser)
    parser.add_argument("--batch-size", type=whole(1, 2**20), default=8, help="of a flow's samples (default: 8)")
    parser.add_argument("--out", type=folder, metavar="FILE", help="also write the figures there, as JSON")
    add_device(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.cli.common import choice_of
    from pyramid_ldm.errors import UserError
    from pyramid_ldm.evaluation.evaluate import Evaluation, report
    from pyramid_ldm.pipeline import MANIFEST
    from pyramid_ldm.training.runtime import start

    options = solver_options(arguments)
    if arguments.protocol is not None:
        places = (arguments.run_or_pictures, arguments.run_or_pictures / "model")
        if not any((place / MANIFEST).is_file() for place in places):
            raise UserError(f"--protocol draws samples, and {arguments.run_or_pictures} is no run of train-flow")
        if arguments.num is not None or arguments.held_out is not None:
            raise UserError("--protocol says how many samples and which photographs; leave out --num and --held-out")
        arguments.num = PROTOCOLS[arguments.protocol]
    arguments.run_or_pictures = find_stage_one(str(arguments.run_or_pictures))
    runtime = start(arguments.device, arguments.precision)
    if runtime.ranks > 1:
        raise UserError("evaluate runs in one process; `sample` draws in several, then evaluate its folder")
    settings = Evaluation(
        device=runtime.device,
        bf16=runtime.bf16,
        inception=arguments.inception,
        lpips=arguments.lpips,
        choice=choice_of(arguments, arguments.run_or_pictures),
        count=arguments.num,
        seed=arguments.seed,
        options=options,
        batch_size=arguments.batch_size,
    )
    report(arguments.run_or_pictures, arguments.data, settings, arguments.out)
    return True
