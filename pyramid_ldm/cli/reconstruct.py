"""`pyramid-ldm reconstruct`."""

import argparse
from pathlib import Path

from pyramid_ldm.cli.common import add_device

NAME = "reconstruct"
HELP = "originals beside reconstructions, with PSNR, SSIM and LPIPS of each image"
EXAMPLE = "pyramid-ldm reconstruct runs/scapes2k-ae --data photos/ --out reconstructions/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """AE_RUN --data --out and how."""
    parser.add_argument("autoencoder", metavar="AE_RUN", type=Path, help="a run directory of train-ae")
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the pairs, grid.png and reconstructions.jsonl"
    )
    parser.add_argument("-n", "--num", type=int, help="first so many images (default: all)")
    parser.add_argument(
        "--held-out", type=float, metavar="SHARE", help="only the images held out at this data.validation"
    )
    parser.add_argument(
        "--lpips", metavar="WEIGHTS", help="imagenet, or a file with VGG-16's weights (default: no LPIPS)"
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.evaluation.reconstruction import reconstruct_to_folder
    from pyramid_ldm.training.runtime import start

    runtime = start(arguments.device, arguments.precision)
    reconstruct_to_folder(
        arguments.autoencoder,
        arguments.data,
        arguments.out,
        count=arguments.num,
        held_out=arguments.held_out,
        lpips_weights=arguments.lpips,
        device=runtime.device,
        bf16=runtime.bf16,
    )
    return True
