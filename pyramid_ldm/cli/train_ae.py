"""`pyramid-ldm train-ae`."""

import argparse
import sys

from pyramid_ldm.cli.common import add_training, find_config, first_process, quoted

NAME = "train-ae"
HELP = "stage one: train the pyramid autoencoder on a folder of photographs (run again to resume)"
EXAMPLE = "pyramid-ldm train-ae autoencoder_configs/scapes2k.yaml data.root=photos/"
KIND = "autoencoder_configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...]"""
    add_training(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Whether training reached its end."""
    from pyramid_ldm.config import AutoencoderTraining, load_config
    from pyramid_ldm.config.fixed import FIXED, kind_of
    from pyramid_ldm.errors import UserError

    path = find_config(arguments.config, KIND)
    if kind_of(path) in FIXED:
        raise UserError(
            f"{path}: there is nothing to train; give it to encode, or to train-flow as data.autoencoder={path}"
        )
    config = load_config(AutoencoderTraining, path, arguments.overrides)
    from pyramid_ldm.training.train_autoencoder import train_autoencoder

    directory, finished = train_autoencoder(config)
    if finished and first_process():
        following = quoted("pyramid-ldm", "encode", directory, "--data", config.data.root, "--out", "latents")
        print(f"done: {directory}\nnext: {following}")
    elif not finished:
        print(f"stopped in {directory}. To resume, run the same command again.", file=sys.stderr)
    return finished
