#!/usr/bin/env python3
"""Trains autoencoders of several families alike and says which reconstructs best.

    tools/compare_autoencoders.py --data photos/ --vgg vgg16.safetensors --out compare/
    tools/compare_autoencoders.py ... --ratios 96 --models ours sd-vae --seeds 0 1 --images 4000
    tools/compare_autoencoders.py ... --minutes 20          # the same time a model instead of the same images
    tools/compare_autoencoders.py ... --test unseen/ --inception inception-2015-12-05.pt    # judged on others, too

All see the same crops in the same order through `train-ae`'s own loop: the same loss, optimizer, schedule and weight
average. All have the same number of latent values. A row that is done is not trained again; one that was interrupted
goes on. Writes table.md and curves.png into --out after each row, with --test also test.md.
Needs: pip install -e '.[bench]'.

ours         the pyramid autoencoder of tools/experiments/comparison.yaml
ours-single  the same with all values in one latent; its trunk ends there, so that it has fewer parameters
sd-vae       Stable Diffusion's (diffusers' AutoencoderKL), deepened to the latent's factor, widths times --peer-width
dc-ae        DC-AE (diffusers' AutoencoderDC), likewise
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from experiments.command import exit_code
from experiments.rows import Row, Task
from experiments.tables import Result, draw_curves, markdown
from experiments.unseen import Figures, Unseen, bicubic_figures

from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.data.folder import find_images
from pyramid_ldm.files import write_text

# Latents of a 128x128 image, coarse to fine, factor: channels. Equal numbers of values: 256 (the nearest to 1:205 that
# DC-AE's channel averages allow), 512, 1024.
PYRAMIDS = {
    192: {128: 16, 64: 12, 32: 12},
    96: {128: 16, 64: 4, 32: 6, 16: 6},
    48: {128: 16, 64: 12, 32: 12, 16: 12},
}
SINGLE = {192: {32: 16}, 96: {16: 8}, 48: {16: 16}}
# Tried for each, not searched; see docs/EXPERIMENTS.md.
LEARNING_RATES = {"ours": 5e-4, "ours-single": 5e-4, "sd-vae": 2e-4, "dc-ae": 2e-4}


def levels(latents: dict[int, int]) -> str:
    """As an override."""
    return "model.levels=[" + ", ".join(f"{{factor: {f}, channels: {c}}}" for f, c in latents.items()) + "]"


def contender(name: str, ratio: int, peer_width: float, learning_rate: float | None) -> Row:
    """One of the models at one compression."""
    latents = PYRAMIDS[ratio] if name == "ours" else SINGLE[ratio]
    depth = max(latents).bit_length()
    overrides = [levels(latents), f"train.learning_rate={learning_rate or LEARNING_RATES[name]}"]
    if name in ("sd-vae", "dc-ae"):
        tiny = "[" + ", ".join(["4"] * depth) + "]"  # not looked at
        overrides += [f"model.encoder.widths={tiny}", f"model.decoder.widths={tiny}", "model.attention.max_tokens=0"]
        return Row(f"{name} 1:{ratio}", tuple(overrides), name, peer_width)
    encoder, decoder = (16, 32, 64, 128, 192, 256, 256, 256), (16, 40, 80, 160, 256, 256, 256, 256)
    overrides += [
        f"model.encoder.widths={list(encoder[:depth])}",
        f"model.decoder.widths={list(decoder[:depth])}",
    ]
    return Row(f"{name} 1:{ratio}", tuple(overrides))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs; a fifth is held out")
    parser.add_argument("--vgg", default="imagenet", help="VGG-16 weights for LPIPS: a file, imagenet or random")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--ratios", nargs="+", type=int, choices=PYRAMIDS, default=[192, 96])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=2000, help="images that each sees")
    parser.add_argument("--minutes", type=float, help="instead of --images: so long a model, from a timed step")
    parser.add_argument(
        "--peer-width",
        type=float,
        choices=(0.25, 0.5, 1.0),
        default=0.5,
        help="a factor on the peers' published widths",
    )
    parser.add_argument("--test", type=Path, help="other photographs, to judge every model on when it is trained")
    parser.add_argument("--inception", type=Path, help="inception-2015-12-05.pt: with --test, also rFID and rKID")
    parser.add_argument("--learning-rate", type=float, help="for all, instead of each model's own")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes the recipe for every row")
    args = parser.parse_args(words)
    if args.images < 1 or (args.minutes is not None and args.minutes <= 0):
        parser.error("--images is at least 1, --minutes above 0")
    if args.inception and not args.test:
        parser.error("--inception is for --test")
    return args


def tasks(args: argparse.Namespace) -> list[Task]:
    """Every row with every seed, the first seed of all first."""
    shared = (f"data.root={args.data}", f"loss.perceptual.weights={args.vgg}", f"train.images={args.images}", *args.set)
    rows = [
        contender(name, ratio, args.peer_width, args.learning_rate) for ratio in args.ratios for name in args.models
    ]
    return [Task(row, seed, args.out, shared) for seed in args.seeds for row in rows]


def run(args: argparse.Namespace) -> None:
    """Trains what is missing; writes tables and curves after each."""
    import matplotlib  # noqa: F401 - missing, it had better be missing now

    find_images(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    every = tasks(args)
    shared = every[0].config()
    perceptual = PerceptualLoss(args.vgg, torch.device("cpu"))
    unseen: Unseen | None = None
    if args.test:
        unseen = Unseen.of_folder(args.test, args.data, shared.image_size, shared.data.zoom, args.vgg, args.inception)
    seconds = timed(every, args.out / "seconds.json")
    groups: dict[str, list[Result]] = {}
    judged: dict[str, list[Figures]] = {}
    held_out: dict[int, Figures] = {}  # of thumbnails, by their values
    for task in every:
        if args.minutes:
            images = max(1, round(60 * args.minutes / seconds[task.row.name]))
            task = Task(task.row, task.seed, task.directory, (*task.overrides, f"train.images={images}"))
        result = task.train() | {"seconds_per_image": seconds[task.row.name]}
        values = result["latent_values"]
        groups.setdefault(task.row.name, []).append(result)
        if values not in held_out:
            held_out[values] = bicubic_figures(shared, values, perceptual)
        table = markdown(groups, held_out)
        write_text(args.out / "table.md", table)
        draw_curves(groups, args.out / "curves.png")
        print(table, flush=True)
        if unseen:
            judged.setdefault(task.row.name, []).append(unseen.judge(task))
            thumbnail = f"bicubic 1:{result['ratio']:.0f}"
            if thumbnail not in judged:
                judged[thumbnail] = [unseen.thumbnails(values)]
            table = unseen.markdown(judged)
            write_text(args.out / "test.md", table)
            print(table, flush=True)


def timed(every: list[Task], kept: Path) -> dict[str, float]:
    """Seconds of training an image, by row: one after the other on a machine in one mood, before anything is trained;
    those in `kept` are not taken again."""
    seconds: dict[str, float] = json.loads(kept.read_text()) if kept.is_file() else {}
    for task in every:
        if task.row.name not in seconds:
            seconds[task.row.name] = task.step_seconds() / task.config().train.batch_size
            print(f"{task.row.name}: {seconds[task.row.name]:.3f} s an image of training", flush=True)
            write_text(kept, json.dumps(seconds, indent=1) + "\n")
    return seconds


def main() -> int:
    args = parse()
    return exit_code("compare_autoencoders", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
