"""`pyramid-ldm latents`."""

import argparse

from pyramid_ldm.cli.common import MOST, add_device, folder, whole

NAME = "latents"
HELP = "what each latent level holds: images from one, from all but one (PDM figure 7), from the coarsest up to one"
EXAMPLE = "pyramid-ldm latents runs/scapes2k-ae --data photos/ --out latents.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """AE_RUN --data --out and which."""
    parser.add_argument("autoencoder", metavar="AE_RUN", type=folder, help="a run directory of train-ae")
    parser.add_argument("--data", type=folder, required=True, help="folder of photographs")
    parser.add_argument("--out", type=folder, required=True, help="PNG file")
    parser.add_argument(
        "--image", type=whole(0, MOST), default=0, help="which image of the folder (default: the first)"
    )
    parser.add_argument("--fill", default="zero", choices=["zero", "mean"], help="stands in for a left-out level")
    add_device(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.evaluation.latents import latents_to_file
    from pyramid_ldm.training.runtime import start

    runtime = start(arguments.device, arguments.precision)
    table = latents_to_file(
        arguments.autoencoder, arguments.data, arguments.out, arguments.image, arguments.fill, runtime.device
    )
    print(table)
    print(f"done: {arguments.out}")
    return True
