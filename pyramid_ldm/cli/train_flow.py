"""`pyramid-ldm train-flow`."""

import argparse
import sys

from pyramid_ldm.cli.common import add_training, find_config, find_stage_one, first_process, quoted

NAME = "train-flow"
HELP = "stage two: train the network on latent shards, or on photographs (run again to resume)"
EXAMPLE = "pyramid-ldm train-flow diffusion_configs/scapes2k.yaml data.shards=latents/"
KIND = "diffusion_configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...]"""
    add_training(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Whether training reached its end."""
    from pyramid_ldm.config import FlowTraining, load_config

    config = load_config(FlowTraining, find_config(arguments.config, KIND), arguments.overrides)
    if config.data.autoencoder is not None:
        config.data.autoencoder = str(find_stage_one(config.data.autoencoder))
    from pyramid_ldm.training.train_flow import train_flow

    directory, finished = train_flow(config)
    if finished and first_process():
        following = quoted("pyramid-ldm", "sample", directory, "--num", 16, "--out", "samples")
        print(f"done: {directory}\nnext: {following}")
    elif not finished:
        print(f"stopped in {directory}. To resume, run the same command again.", file=sys.stderr)
    return finished
