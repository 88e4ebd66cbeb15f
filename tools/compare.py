#!/usr/bin/env python3
"""Trains autoencoders of several families alike and says which reconstructs best.

    tools/compare.py --data photos/ --vgg vgg16.safetensors --out compare/
    tools/compare.py ... --ratios 96 --models ours sd-vae --seeds 0 1 --images 4000
    tools/compare.py ... --test unseen/ --inception inception-2015-12-05.pt    # measured on others, too

All see the same crops in the same order through `train-ae`'s own loop: the same loss, optimizer, schedule and weight
average. All have the same number of latent values. A row that is done is not trained again; one that was interrupted
goes on. Writes table.md and curves.png into --out after each row, with --test also test.md.
Needs: pip install -e '.[bench]'.

ours         the pyramid autoencoder of tools/comparison.yaml
ours-single  the same with all values in one latent; its trunk ends there, so that it has fewer parameters
sd-vae       Stable Diffusion's (diffusers' AutoencoderKL), deepened to the latent's factor, widths times --peer-width
dc-ae        DC-AE (diffusers' AutoencoderDC), likewise
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import ablate
import torch
from ablate import COLUMNS, TOOLS, Result
from baselines import builder
from torch import Tensor

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.config import AutoencoderConfig, AutoencoderTraining, load_config
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.data.folder import find_images
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.evaluate import reconstruction_figures
from pyramid_ldm.evaluation.frechet import Inception
from pyramid_ldm.evaluation.metrics import bicubic
from pyramid_ldm.files import write_json
from pyramid_ldm.serialization import load_model
from pyramid_ldm.training.autoencoder_state import Build, accumulate, build_state
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.runtime import start
from pyramid_ldm.training.step import take_step

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
TEST_CROPS = 4  # of each photograph


def contender(name: str, ratio: int, args: argparse.Namespace) -> tuple[list[str], Build]:
    """Overrides of the recipe for one of the models at one compression, and what builds it."""
    latents = PYRAMIDS[ratio] if name == "ours" else SINGLE[ratio]
    depth = max(latents).bit_length()
    levels = ", ".join(f"{{factor: {f}, channels: {c}}}" for f, c in latents.items())
    rate = args.learning_rate or LEARNING_RATES[name]
    keys = [f"model.levels=[{levels}]", f"train.learning_rate={rate}"]
    if name in ("sd-vae", "dc-ae"):
        keys += [f"model.{half}.widths={[4] * depth}" for half in ("encoder", "decoder")]  # not used
        build = builder(name, args.peer_width)
        return [*keys, "model.attention.max_tokens=0"], build
    unset = ["data.root=none", "run_dir=none", "loss.perceptual.weights=random"]
    model = load_config(AutoencoderTraining, TOOLS / "comparison.yaml", unset).model
    keys += [f"model.{half}.widths={getattr(model, half).widths[:depth]}" for half in ("encoder", "decoder")]
    return keys, PyramidAutoencoder


def time_steps(rows: dict[str, tuple[AutoencoderTraining, Build]], kept: Path) -> dict[str, float]:
    """Seconds of training an image, by row: one after the other on a machine in one mood, before anything is trained;
    those in `kept` are not taken again. Gradients and update, the fastest of three warm steps; without reading images,
    weight averages and the discriminator."""
    seconds: dict[str, float] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for name, (config, build) in rows.items():
        if name in seconds:
            continue
        runtime, size = start(config.device, config.precision), config.train.batch_size
        state = build_state(config, runtime.device, build)
        pixels = torch.randint(0, 256, (size, *config.image_size, 3), dtype=torch.uint8)
        times = [time.perf_counter()]
        for _ in range(4):
            batch = Batch(list(range(size)), pixels=pixels)
            accumulate(config, state, state.autoencoder, state.discriminator, batch, runtime)
            take_step(state.optimizer, state.autoencoder, 1.0, runtime, Metrics(), "grad_norm")
            times.append(time.perf_counter())
        seconds[name] = min(after - before for before, after in pairwise(times[1:])) / size
        print(f"{name}: {seconds[name]:.3f} s an image of training", flush=True)
        write_json(kept, seconds)
    return seconds


class Unseen:
    """Random crops of photographs that nothing was trained on, the same for every model. UserError where `data` holds
    one of them."""

    def __init__(self, args: argparse.Namespace, config: AutoencoderTraining) -> None:
        files, known = find_images(args.test), {file.digest for file in find_images(args.data)}
        twice = [file.path for file in files if file.digest in known]
        if twice:
            raise UserError(f"{args.test}: {len(twice)} of its photographs are in {args.data}, too, {twice[0]} first")
        self.runtime = start("auto", "auto")
        self.images = ablate.random_crops(args.test, config.image_size, TEST_CROPS * len(files), config.data.zoom)
        self.perceptual = PerceptualLoss(args.vgg, self.runtime.device)
        self.inception = Inception(args.inception, self.runtime.device) if args.inception else None
        self.about = f"{len(self.images)} crops of {len(files)} photographs"
        self.key = {"photographs": [file.digest for file in files], "inception": args.inception is not None}

    def measure(self, reconstruct: Callable[[Tensor], Tensor]) -> Result:
        """Means over the crops; with the Inception network also the distances of all reconstructions from all
        originals."""

        def autocast(images: Tensor) -> Tensor:
            with self.runtime.autocast():
                return reconstruct(images)

        batches = (batch.to(self.runtime.device) for batch in self.images.split(8))
        return reconstruction_figures({"": autocast}, batches, self.perceptual, self.inception)[1][""]

    def measure_row(self, run: Path, build: Build) -> Result:
        """Of a trained model; kept beside it, so that it is computed once."""
        kept = run / "unseen.json"
        found: Result = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if found.get("asked") != self.key:
            model = load_model(run / "model", build, AutoencoderConfig).to(self.runtime.device)
            found = {"asked": self.key, "means": self.measure(lambda images: model.decode(model.encode(images).mode()))}
            write_json(kept, found)
        return found["means"]

    def table(self, groups: dict[str, list[Result]]) -> str:
        """A line a group of seeds."""
        columns = [(key, title, digits, 1) for key, title, digits in COLUMNS]
        columns += [("rfid", "rFID", 1, 1), ("rkid", "rKID x 1000", 1, 1000)] if self.inception else []
        lines = [
            [
                name,
                *(ablate.spread((factor * r[key] for r in results), n) for key, _, n, factor in columns),
                str(len(results)),
            ]
            for name, results in groups.items()
        ]
        return ablate.markdown(["", *(title for _, title, _, _ in columns), "seeds"], lines) + f"\n{self.about}.\n"


def draw_curves(groups: dict[str, list[Result]], seconds: dict[str, float], path: Path) -> None:
    """Held-out figures over images seen (above) and over seconds: one line a run."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sheet, axes = plt.subplots(2, len(COLUMNS), figsize=(4 * len(COLUMNS), 6.4))
    for number, (name, results) in enumerate(groups.items()):
        for i, result in enumerate(results):
            for row, (scale, unit) in enumerate(((1.0, "images seen"), (seconds[name], "seconds of training"))):
                for axis, (key, title, _) in zip(axes[row], COLUMNS, strict=True):
                    points = [p for p in result["curve"] if p.get(f"held_out_{key}") is not None]
                    x, y = [p["images_seen"] * scale for p in points], [p[f"held_out_{key}"] for p in points]
                    axis.plot(x, y, color=f"C{number % 10}", label=None if i else name)
                    axis.set(title=f"{title}, held out", xlabel=unit)
                    axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    sheet.tight_layout()
    sheet.savefig(path, dpi=100)
    plt.close(sheet)


def shrunk(images: Tensor, values: int) -> Tensor:
    """Bicubic thumbnails of as many values, enlarged again."""
    return bicubic(images.cpu(), values).to(images.device)


def compare(args: argparse.Namespace) -> None:
    """Trains what is missing, the first seed of all first; writes tables and curves after each."""
    import matplotlib  # noqa: F401 - missing, it had better be missing now

    def row(name: str, ratio: int, seed: int) -> tuple[AutoencoderTraining, Build]:
        keys, build = contender(name, ratio, args)
        keys += [f"data.root={args.data}", f"loss.perceptual.weights={args.vgg}", f"train.images={args.images}"]
        keys += [*args.set, f"run_dir={ablate.run_directory(args.out, f'{name} 1:{ratio}', seed)}", f"seed={seed}"]
        return load_config(AutoencoderTraining, TOOLS / "comparison.yaml", keys), build

    find_images(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [(name, ratio) for ratio in args.ratios for name in args.models]
    firsts = {f"{name} 1:{ratio}": row(name, ratio, args.seeds[0]) for name, ratio in wanted}
    perceptual = PerceptualLoss(args.vgg, torch.device("cpu"))
    unseen = Unseen(args, next(iter(firsts.values()))[0]) if args.test else None
    seconds = time_steps(firsts, args.out / "seconds.json")
    groups: dict[str, list[Result]] = {}
    tested: dict[str, list[Result]] = {}
    thumbnails: dict[int, Result] = {}  # by their values
    for seed in args.seeds:
        for name, ratio in wanted:
            title, (config, build) = f"{name} 1:{ratio}", row(name, ratio, seed)
            kind = name if name.startswith("ours") else f"{name}, {args.peer_width:g} of the widths"
            result = ablate.autoencoder_row(config, build, kind)
            values = result["values"]
            groups.setdefault(title, []).append(result)
            if values not in thumbnails:
                thumbnails[values] = ablate.thumbnail(config, values, perceptual)
            ablate.report(args.out / "table.md", ablate.autoencoder_table(groups, thumbnails))
            draw_curves(groups, seconds, args.out / "curves.png")
            if unseen is not None:
                tested.setdefault(title, []).append(unseen.measure_row(Path(config.run_dir), build))
                if f"bicubic 1:{ratio}" not in tested:
                    tested[f"bicubic 1:{ratio}"] = [unseen.measure(partial(shrunk, values=values))]
                ablate.report(args.out / "test.md", unseen.table(tested))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs; a fifth is held out")
    parser.add_argument("--vgg", default="imagenet", help="VGG-16 weights for LPIPS: a file, imagenet or random")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--ratios", nargs="+", type=int, choices=PYRAMIDS, default=[192, 96])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=2000, help="images that each sees")
    parser.add_argument("--peer-width", type=float, choices=(0.25, 0.5, 1.0), default=0.5, help="of the published")
    parser.add_argument("--test", type=Path, help="other photographs, to measure every model on when it is trained")
    parser.add_argument("--inception", type=Path, help="inception-2015-12-05.pt: with --test, also rFID and rKID")
    parser.add_argument("--learning-rate", type=float, help="for all, instead of each model's own")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes the recipe for every row")
    args = parser.parse_args(words)
    if args.inception and not args.test:
        parser.error("--inception is for --test")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """See `exit_code`."""
    args = parse(words)
    return ablate.exit_code("compare", lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
