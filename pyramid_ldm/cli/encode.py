"""`pyramid-ldm encode`."""

import argparse
from pathlib import Path

from pyramid_ldm.cli.common import add_device

NAME = "encode"
HELP = "photographs to latent shards with a trained autoencoder (run again to resume)"
EXAMPLE = "pyramid-ldm encode runs/scapes2k-ae --data photos/ --out latents/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """AE_RUN --data --out and how."""
    parser.add_argument("autoencoder", metavar="AE_RUN", type=Path, help="a run directory of train-ae")
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--out", type=Path, required=True, help="shard directory")
    parser.add_argument("--crops", type=int, default=0, help="random crops an image (default: the centre crop)")
    parser.add_argument("--zoom", type=float, default=1.0, help="random crops enlarge by up to this much (default: 1)")
    parser.add_argument("--no-flip", action="store_true", help="leave out the mirrored copies")
    parser.add_argument("--validation", type=float, help="held-out share (default: the autoencoder run's)")
    parser.add_argument("--dtype", default="float16", help="float16 or float32 (default: float16)")
    parser.add_argument("--seed", type=int, default=0, help="of the random crops (default: 0)")
    parser.add_argument("--batch-size", type=int, default=8, help="default: 8")
    parser.add_argument("--shard-size", type=int, default=1024, help="records a shard (default: 1024)")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images (default: 2)")
    add_device(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.errors import UserError
    from pyramid_ldm.training.encode import EncodeOptions, encode, say, trained_on
    from pyramid_ldm.training.runtime import start

    trained = trained_on(arguments.autoencoder)
    validation = arguments.validation
    if validation is None:  # so that both stages hold out the same images
        validation = trained.validation if trained else EncodeOptions.validation
    if min(arguments.batch_size, arguments.shard_size) < 1 or arguments.crops < 0 or arguments.zoom < 1:
        raise UserError("--batch-size and --shard-size must be at least 1, --crops at least 0, --zoom at least 1")
    if not 0 <= validation < 1:
        raise UserError(f"--validation {validation}: must lie in [0, 1)")
    options = EncodeOptions(
        crops=arguments.crops,
        zoom=arguments.zoom,
        flip=not arguments.no_flip,
        validation=validation,
        dtype=arguments.dtype,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        workers=arguments.workers,
    )
    runtime = start(arguments.device, arguments.precision)
    if trained and trained.crop == "random" and not arguments.crops:
        say(
            f"the autoencoder saw random crops; --crops 16 --zoom {trained.zoom:g} gives them to the flow, too", runtime
        )
    out = encode(arguments.autoencoder, arguments.data, arguments.out, options, runtime)
    if runtime.main:
        print(f"done: {out}\nnext: pyramid-ldm train-flow diffusion_configs/NAME.yaml data.shards={out}")
    return True
