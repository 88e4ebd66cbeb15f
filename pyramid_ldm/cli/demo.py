"""`pyramid-ldm demo`."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pyramid_ldm.cli import encode, sample, train_ae, train_flow
from pyramid_ldm.cli.common import Number, find_config, folder, quoted

NAME = "demo"
HELP = "the whole job on built-in landscapes, on a CPU in minutes, or at 1024x2048 in an hour (run again to resume)"
EXAMPLE = "pyramid-ldm demo --out demo/"


@dataclass(frozen=True)
class Plan:
    """The whole job at one size."""

    autoencoder: str  # configs
    flow: str
    minutes: float  # what their image counts take on two cores
    photographs: int
    samples: int
    batch_size: int
    guidance: float  # of samples


PLANS = {
    "64x64": Plan("autoencoder_configs/demo.yaml", "diffusion_configs/demo.yaml", 8.0, 2000, 32, 32, 3.0),
    "1024x2048": Plan(
        "autoencoder_configs/scapes2k_cpu.yaml", "diffusion_configs/scapes2k_cpu.yaml", 60.0, 600, 8, 4, 1.5
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out, --size and --minutes."""
    parser.add_argument("--out", type=folder, default=Path("demo"), help="folder for everything (default: demo/)")
    parser.add_argument(
        "--size", choices=PLANS, default="64x64", help="of the landscapes, height x width (default: 64x64)"
    )
    parser.add_argument(
        "--minutes",
        type=Number(float, 0.0, 10_000.0, open_low=True),
        help="scales how many images training sees (default: what takes about so many minutes on two cores: "
        + ", ".join(f"{plan.minutes:g} for {size}" for size, plan in PLANS.items())
        + ")",
    )


def run(arguments: argparse.Namespace) -> bool:
    """Whether it reached its end."""
    from pyramid_ldm.config import AutoencoderTraining, FlowTraining, load_config
    from pyramid_ldm.demo.photographs import render_photographs
    from pyramid_ldm.demo.pictures import make_pictures
    from pyramid_ldm.errors import UserError
    from pyramid_ldm.ownership import claim, marker_of

    claim(arguments.out, "demo", "--out", size=arguments.size)
    before = marker_of(arguments.out).get("size", "64x64")
    if before != arguments.size:
        raise UserError(f"{arguments.out}: holds a demo of {before}, not {arguments.size}; give another --out")
    plan = PLANS[arguments.size]
    out, scale = arguments.out, (arguments.minutes or plan.minutes) / plan.minutes
    began = time.monotonic()
    photographs, autoencoder, latents, flow = (out / name for name in ("photographs", "ae", "latents", "flow"))
    stage_one = load_config(AutoencoderTraining, find_config(plan.autoencoder, "autoencoder_configs"), ["data.root=x"])
    stage_two = load_config(FlowTraining, find_config(plan.flow, "diffusion_configs"), ["data.shards=x"])
    images = [max(1, round(config.train.images * scale)) for config in (stage_one, stage_two)]
    size = stage_one.image_size
    say(f"demo: {plan.photographs} landscapes of {size[0]}x{size[1]} to {photographs}")
    render_photographs(photographs, plan.photographs, (size[0], size[1]))
    steps: list[tuple[ModuleType, list[object]]] = [
        (train_ae, [plan.autoencoder, f"data.root={photographs}", f"run_dir={autoencoder}",
                    f"train.images={images[0]}"]),
        (encode, [autoencoder, "--data", photographs, "--out", latents, "--batch-size", plan.batch_size]),
        (train_flow, [plan.flow, f"data.shards={latents}", f"run_dir={flow}",
                      f"train.images={images[1]}"]),
        (sample, [flow, "--num", plan.samples, "--batch-size", plan.batch_size, "--guidance", plan.guidance,
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
