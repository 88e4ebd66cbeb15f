"""`pyramid-ldm info`."""

import argparse
import sys
from pathlib import Path

from pyramid_ldm.cli.common import KINDS, find_config, folder

NAME = "info"
HELP = "what a run, model, checkpoint or shard directory is; with --cost, what a config will cost before anyone trains"
EXAMPLE = (
    "pyramid-ldm info runs/scapes2k-ae\n"
    "         pyramid-ldm info --cost autoencoder_configs/scapes2k.yaml train.batch_size=2\n"
    "         pyramid-ldm info --cost diffusion_configs/scapes2k.yaml --autoencoder autoencoder_configs/scapes2k.yaml"
)
WORKING = "info: one training step on tensors without values, which takes some seconds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, or --cost CONFIG [key=value ...]"""
    parser.add_argument("path", metavar="PATH", help="a directory; with --cost, a training config or a run directory")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="with --cost: overrides of the config")
    parser.add_argument("--cost", action="store_true", help="parameters, FLOPs and memory of a training config")
    parser.add_argument(
        "--autoencoder", metavar="CONFIG_OR_RUN", help="with --cost of a flow: whose latents, unless data.shards tells"
    )


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.errors import UserError

    if not arguments.cost:
        if arguments.overrides or arguments.autoencoder:
            raise UserError("key=value and --autoencoder are for --cost")
        from pyramid_ldm.info.inspect import describe

        print(describe(folder(arguments.path)))
        return True

    from pyramid_ldm.config import AutoencoderTraining
    from pyramid_ldm.info.budget import find_autoencoder, load_training, report_autoencoder, report_flow
    from pyramid_ldm.training.runtime import Runtime, choose_device, use_bf16

    config = load_training(config_file(arguments.path), arguments.overrides)
    device = choose_device(config.device)
    runtime = Runtime(device, use_bf16(config.precision, device))
    if isinstance(config, AutoencoderTraining):
        print(WORKING, file=sys.stderr)
        print(report_autoencoder(config, runtime))
    else:
        named = arguments.autoencoder or config.data.autoencoder
        source = None if named is None else Path(named)
        if source is not None and not source.exists():
            source = find_config(str(named), KINDS[0])
        autoencoder = find_autoencoder(config, source)
        print(WORKING, file=sys.stderr)
        print(report_flow(config, autoencoder, runtime))
    return True


def config_file(name: str) -> Path:
    """A config by path, of a run directory, or one that the package ships by its folder and name."""
    from pyramid_ldm.errors import UserError

    path = folder(name)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path}: holds no config.yaml; give a config file or a run directory")
        return path / "config.yaml"
    if path.is_file() or path.parent.name in KINDS:
        return find_config(name, path.parent.name)
    raise UserError(f"{name}: no such config file; those that come with the package are in {KINDS[0]}/ and {KINDS[1]}/")
