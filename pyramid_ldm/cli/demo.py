"""`pyramid-ldm demo`."""

import argparse
import sys
import time
from pathlib import Path
from types import ModuleType

from pyramid_ldm.cli import encode, sample, train_ae, train_flow
from pyramid_ldm.cli.common import Number, find_config, folder, quoted

NAME = "demo"
HELP = "the whole job on built-in landscapes, on a CPU in a few minutes (run again to resume)"
EXAMPLE = "pyramid-ldm demo --out demo/"
FULL_MINUTES = 8.0  # what the configs' image counts take on two cores
PHOTOGRAPHS = 2000
SAMPLES = 32
STEPS = 100
AUTOENCODER, FLOW = "autoencoder_configs/demo.yaml", "diffusion_configs/demo.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out and --minutes."""
    parser.add_argument("--out", type=folder, default=Path("demo"), help="folder for everything (default: demo/)")
    parser.add_argument(
        "--minutes",
        type=Number(float, 0.0, 10_000.0, open_low=True),
        default=FULL_MINUTES,
        help="scales how many images training sees; 8 takes about eight minutes on two cores (default: 8)",
    )


def run(arguments: argparse.Namespace) -> bool:
    """Whether it reached its end."""
    from pyramid_ldm.config import AutoencoderTraining, FlowTraining, load_config
    from pyramid_ldm.demo.pictures import make_pictures, render_photographs
    from pyramid_ldm.ownership import claim

    claim(arguments.out, "demo", "--out")
    out, scale = arguments.out, arguments.minutes / FULL_MINUTES
    began = time.monotonic()
    photographs, autoencoder, latents, flow = (out / name for name in ("photographs", "ae", "latents", "flow"))
    stage_one = load_config(AutoencoderTraining, find_config(AUTOENCODER, "autoencoder_configs"), ["data.root=x"])
    stage_two = load_config(FlowTraining, find_config(FLOW, "diffusion_configs"), ["data.shards=x"])
    images = [max(1, round(config.train.images * scale)) for config in (stage_one, stage_two)]
    size = stage_one.image_size
    say(f"demo: {PHOTOGRAPHS} landscapes of {size[0]}x{size[1]} to {photographs}")
    render_photographs(photographs, PHOTOGRAPHS, (size[0], size[1]))
    steps: list[tuple[ModuleType, list[object]]] = [
        (train_ae, [AUTOENCODER, f"data.root={photographs}", f"run_dir={autoencoder}",
                    f"train.images={images[0]}"]),
        (encode, [autoencoder, "--data", photographs, "--out", latents, "--batch-size", 32]),
        (train_flow, [FLOW, f"data.shards={latents}", f"run_dir={flow}",
                      f"train.images={images[1]}"]),
        (sample, [flow, "--num", SAMPLES, "--batch-size", SAMPLES, "--solver", "euler", "--steps", STEPS,
                  "--out", out / "samples"]),
    ]  # fmt: skip
    for module, words in steps:
        text = [str(word) for word in words]
        say(f"\n$ {quoted('pyramid-ldm', module.NAME, *text)}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        if not module.run(parser.parse_args(text)):
            return False
    figures = make_pictures(out, time.monotonic() - began)
    say(
        f"\ndone in {(time.monotonic() - began) / 60:.1f} minutes: samples.png, reconstructions.png, latents.png and "
        f"report.html in {out}; held-out PSNR {figures.psnr:.1f} dB (bicubic at the same number of values: "
        f"{figures.bicubic_psnr:.1f} dB)"
    )
    return True


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)
