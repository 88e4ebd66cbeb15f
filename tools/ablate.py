#!/usr/bin/env python3
"""Changes one thing at a time and says what it is worth: the tables of docs/EXPERIMENTS.md.

    tools/ablate.py autoencoder --data photos/ --vgg vgg16.safetensors --out ablate-ae/
    tools/ablate.py autoencoder ... --rows default "group norm" --seeds 0 1
    tools/ablate.py flow --shards latents/ --reference held-out/ --inception inception-2015-12-05.pt --out ablate-flow/

Every row is the recipe in tools/experiments/ with a few config keys of its own (tools/experiments/ablations.py). A row
that is done is not trained again; one that was interrupted goes on. Writes table.md into --out after each row.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from experiments.ablations import AUTOENCODER, AUTOENCODER_RECIPE, FLOW
from experiments.command import exit_code
from experiments.rows import Row, Task
from experiments.tables import draw_curves, markdown, spread
from experiments.unseen import bicubic_figures

from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.files import write_text

if TYPE_CHECKING:
    from pyramid_ldm.evaluation.reference import Reference


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for stage, rows in (("autoencoder", AUTOENCODER), ("flow", FLOW)):
        command = stages.add_parser(stage)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--rows", nargs="+", choices=rows, metavar="ROW", default=list(rows),
                             help="of: " + "; ".join(rows))  # fmt: skip
        command.add_argument("--seeds", nargs="+", type=int, default=[0])
        command.add_argument("--images", type=int, help="images that each sees, instead of the recipe's")
        command.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes every row")
        if stage == "autoencoder":
            command.add_argument("--data", type=Path, required=True, help="photographs; a fifth is held out")
            command.add_argument("--vgg", default="imagenet", help="VGG-16 weights for LPIPS")
        else:
            command.add_argument("--shards", type=Path, required=True, help="a cache made by `pyramid-ldm encode`")
            command.add_argument("--reference", type=Path, required=True, help="real images that it does not hold")
            command.add_argument("--inception", type=Path, required=True, help="inception-2015-12-05.pt")
            command.add_argument("--samples", type=int, default=256, help="samples that are judged")
            command.add_argument("--steps", nargs="+", type=int, default=[10, 20, 50, 200], help="of Euler")
    args = parser.parse_args(words)
    if args.images is not None:
        args.set.append(f"train.images={args.images}")
    return args


def ablate_autoencoder(args: argparse.Namespace) -> None:
    """Stage one: held-out reconstruction, and cost."""
    shared = (f"data.root={args.data}", f"loss.perceptual.weights={args.vgg}", *args.set)
    groups: dict[str, list[Any]] = {}
    thumbnails: dict[int, Any] = {}
    for seed in args.seeds:
        for name in args.rows:
            task = Task(Row(name, AUTOENCODER[name], recipe=AUTOENCODER_RECIPE), seed, args.out, shared)
            result = task.train()
            groups.setdefault(name, []).append(result)
            if not thumbnails:
                values = result["latent_values"]  # every row's
                perceptual = PerceptualLoss(args.vgg, torch.device("cpu"))
                thumbnails = {values: bicubic_figures(task.config(), values, perceptual)}
            write_text(args.out / "table.md", markdown(groups, thumbnails))
            draw_curves(groups, args.out / "curves.png")
            print(markdown({name: groups[name]}), flush=True)


def ablate_flow(args: argparse.Namespace) -> None:
    """Stage two: distances of samples from held-out images, loss per level, evaluations of RK45."""
    from experiments.flow_rows import FlowTask

    from pyramid_ldm.data.folder import find_images
    from pyramid_ldm.data.shards import LatentCache
    from pyramid_ldm.evaluation.frechet import Inception
    from pyramid_ldm.evaluation.reference import Reference
    from pyramid_ldm.pipeline import PyramidPipeline
    from pyramid_ldm.training.runtime import start

    height, width = LatentCache(args.shards).plan.image_size
    inception = Inception(args.inception, start("auto", "auto").device)
    reference = Reference.of_images(find_images(args.reference), (height, width), inception)
    groups: dict[str, list[dict[str, Any]]] = {}
    floor = ""
    for seed in args.seeds:
        for name in args.rows:
            task = FlowTask(name, FLOW[name], seed, args.out, (f"data.shards={args.shards}", *args.set))
            groups.setdefault(name, []).append(task.train(reference, inception, args.samples, args.steps))
            if not floor:  # once: every run has the cache's autoencoder
                autoencoder = PyramidPipeline.from_pretrained(task.run).to(inception.device).autoencoder
                floor = floor_line(reference, reference.floor(reference.half, inception, autoencoder), args.samples)
            table = flow_markdown(groups, args.steps) + floor
            write_text(args.out / "table.md", table)
            print(table, flush=True)


def flow_markdown(groups: dict[str, list[dict[str, Any]]], steps: list[int]) -> str:
    """A line a group of seeds."""
    levels = [key for key in next(iter(groups.values()))[0]["losses"] if key.startswith("held_out_")]
    losses = [f"{key.removeprefix('held_out_')}: held-out loss (gap)" for key in levels]
    head = [
        "",
        *(f"KID x 1000, Euler {n}" for n in steps),
        f"FID, Euler {steps[-1]}",
        *losses,
        "NFE of RK45 at 1e-3",
        "seeds",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, results in groups.items():
        cells = [name, *(spread([1000 * r[f"euler_{n}"]["kid"] for r in results], 1) for n in steps)]
        cells.append(spread([r[f"euler_{steps[-1]}"]["fid"] for r in results], 1))
        for key in levels:
            held_out = [r["losses"][key] for r in results]
            gaps = [r["losses"][key] - r["losses"][key.replace("held_out", "train")] for r in results]
            cells.append(f"{spread(held_out, 3)} ({mean(gaps):+.3f})")
        cells += [f"{mean(r['rk45_nfe'] for r in results):.0f}", str(len(results))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def floor_line(reference: "Reference", floor: dict[str, dict[str, float]], samples: int) -> str:
    """What the distances mean."""

    def both(key: str) -> str:
        return f"{1000 * floor[key]['kid']:.1f} (KID x 1000) and {floor[key]['fid']:.1f} (FID)"

    return (
        f"\n{samples} samples against {len(reference.images)} real images. Half of these, {reference.half}, are "
        f"{both('photographs')} from the other half, and {both('reconstructions')} after the autoencoder. FID grows as "
        "images become fewer, so that the table's cannot be compared with these two; KID does not.\n"
    )


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    work = {"autoencoder": ablate_autoencoder, "flow": ablate_flow}[args.stage]
    return exit_code("ablate", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
