"""What several commands share."""

import argparse
from pathlib import Path

from pyramid_ldm.config.base import ConfigError


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


def add_training(parser: argparse.ArgumentParser) -> None:
    """CONFIG and key=value."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides, for example train.batch_size=8")
