"""`pyramid-ldm encode`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pyramid_ldm.cli.common import (
    MOST,
    Number,
    add_device,
    add_photographs,
    find_stage_one,
    folder,
    quoted,
    share,
    shipped,
    whole,
)

if TYPE_CHECKING:
    from pyramid_ldm.pyramid import Level

NAME = "encode"
HELP = "photographs to latent shards with a trained autoencoder (run again to resume)"
EXAMPLE = "pyramid-ldm encode runs/scapes2k-ae --data photos/ --out latents/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """AE_RUN, --data, --out and the crops."""
    parser.add_argument(
        "autoencoder",
        metavar="AE_RUN",
        type=folder,
        help="a run directory of train-ae, or a config of pixels or wavelets",
    )
    parser.add_argument("--out", type=folder, required=True, help="shard directory")
    parser.add_argument(
        "--crops", type=whole(0, 10**6), default=0, help="random crops an image (default: the centre crop)"
    )
    parser.add_argument(
        "--zoom", type=Number(float, 1.0, 1024.0), default=1.0, help="random crops enlarge by up to this (default: 1)"
    )
    parser.add_argument("--no-flip", action="store_true", help="leave out the mirrored copies")
    parser.add_argument("--validation", type=share(), help="held-out share (default: the autoencoder run's)")
    parser.add_argument("--dtype", default="float16", help="float16 or float32 (default: float16)")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of the random crops (default: 0)")
    parser.add_argument("--batch-size", type=whole(1, 2**20), help="default: 8, of large images fewer")
    parser.add_argument("--shard-size", type=whole(1, MOST), default=1024, help="records a shard (default: 1024)")
    parser.add_argument(
        "--workers", type=whole(0, 1024), default=2, help="processes that read images; 0: none (default: 2)"
    )
    add_photographs(parser, held_out=False)
    add_device(parser)


def run(arguments: argparse.Namespace) -> bool:
    """Always finishes."""
    from pyramid_ldm.autoencoders.load import trained_on
    from pyramid_ldm.encode import EncodeOptions, encode, say
    from pyramid_ldm.errors import UserError
    from pyramid_ldm.training.runtime import start

    arguments.autoencoder = find_stage_one(str(arguments.autoencoder))
    if arguments.zoom > 1 and not arguments.crops:
        raise UserError("--zoom is of random crops: give --crops, too")
    trained = trained_on(arguments.autoencoder)
    validation, upscale = arguments.validation, arguments.upscale
    if validation is None:  # so that both stages hold out the same images
        validation = trained.validation if trained else EncodeOptions.validation
    if upscale is None:
        upscale = trained.upscale if trained else False
    options = EncodeOptions(
        crops=arguments.crops,
        zoom=arguments.zoom,
        flip=not arguments.no_flip,
        validation=validation,
        upscale=upscale,
        max_bad_fraction=arguments.max_bad_fraction,
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
        following = quoted("pyramid-ldm", "train-flow", fitting_config(arguments), f"data.shards={out}")
        print(f"done: {out}\nnext: {following}")
    return True


def fitting_config(arguments: argparse.Namespace) -> str:
    """A config of stage two for these latents: that of the shipped stage one with their name or their shape, else the
    first that fits."""
    from pyramid_ldm.config import FlowTraining, load_config
    from pyramid_ldm.data.plan import Plan
    from pyramid_ldm.data.shards import read_index
    from pyramid_ldm.errors import UserError

    plan = Plan.from_dict(read_index(arguments.out)["plan"])
    name = arguments.autoencoder.resolve().name.removesuffix(".yaml").removesuffix("-ae")
    alike = [path.stem for path in shipped("autoencoder_configs") if shape_of(path) == (plan.image_size, plan.levels)]
    every = sorted(
        shipped("diffusion_configs"),
        key=lambda path: (path.stem != name, path.stem not in alike, path.stem != "photographs_256"),
    )
    for path in every:
        config = load_config(FlowTraining, path, ["data.shards=x"])
        try:
            config.resolve(plan.image_size, plan.levels)
        except UserError:
            continue
        return f"diffusion_configs/{path.name}"
    return "CONFIG.yaml"


def shape_of(path: Path) -> "tuple[list[int], list[Level]]":
    """Image size and levels of a stage one's config."""
    from pyramid_ldm.config import AutoencoderTraining, load_config
    from pyramid_ldm.config.fixed import FIXED, kind_of

    kind = kind_of(path)
    if kind in FIXED:
        fixed = load_config(FIXED[kind], path)
        return list(fixed.image_size), list(fixed.levels)
    config = load_config(AutoencoderTraining, path, ["data.root=x"])
    return list(config.image_size), list(config.model.levels)
