"""`pyramid-ldm reconstruct`."""

import argparse

from pyramid_ldm.cli.common import MOST, add_device, add_photographs, choice_of, find_stage_one, folder, whole

NAME = "reconstruct"
HELP = "originals beside reconstructions, with PSNR, SSIM and LPIPS of each image"
EXAMPLE = "pyramid-ldm reconstruct runs/scapes2k-ae --data photos/ --out reconstructions/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """AE_RUN, --data, --out and what to report."""
    parser.add_argument(
        "autoencoder",
        metavar="AE_RUN",
        type=folder,
        help="a run directory of train-ae, or a config of pixels or wavelets",
    )
    add_photographs(parser, held_out=True)
    parser.add_argument(
        "--out", type=folder, required=True, help="folder for the pairs, grid.png and reconstructions.jsonl"
    )
    parser.add_argument("-n", "--num", type=whole(1, MOST), help="first so many images (default: all)")
    parser.add_argument(
        "--lpips", metavar="WEIGHTS", help="imagenet, or a file with VGG-16's weights (default: no LPIPS)"
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.evaluation.reconstruction import reconstruct_to_folder
    from pyramid_ldm.training.runtime import start

    arguments.autoencoder = find_stage_one(str(arguments.autoencoder))
    runtime = start(arguments.device, arguments.precision)
    reconstruct_to_folder(
        arguments.autoencoder,
        arguments.data,
        arguments.out,
        choice=choice_of(arguments, arguments.autoencoder),
        count=arguments.num,
        lpips_weights=arguments.lpips,
        device=runtime.device,
        bf16=runtime.bf16,
    )
    return True
