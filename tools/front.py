"""Reconstruction against generation: a stage one, then a flow of fixed size and length on its latents, judged by both
(`tools/ablate.py both`)."""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import ablate
import baselines
import torch
from torch import Tensor

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.config import AutoencoderConfig, AutoencoderTraining, FlowTraining, load_config
from pyramid_ldm.config.base import to_yaml
from pyramid_ldm.data.folder import find_images, split_held_out
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.encode import EncodeOptions, encode
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation import frechet
from pyramid_ldm.evaluation.evaluate import reconstruction_figures
from pyramid_ldm.evaluation.metrics import bicubic
from pyramid_ldm.evaluation.reference import Reference, round_trip, sample_features
from pyramid_ldm.evaluation.sheets import comparison_grid, grid
from pyramid_ldm.files import read_lines, write_json
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.pyramid import latent_values
from pyramid_ldm.serialization import Stored, assemble, load_model
from pyramid_ldm.training.runtime import start
from pyramid_ldm.training.train_autoencoder import train_autoencoder
from pyramid_ldm.training.train_flow import train_flow

Result = dict[str, Any]
SHOWN = 32  # samples a sheet
MEASURED = 256  # unseen images, at most, that reconstruction is measured on
FIT_CROPS = 3_200  # crops, of a linear codec


class Front:
    """The rows asked for, one after the other; each is kept as it grows, and goes on where it was interrupted.
    UserError where what they are measured on is among what they are trained on."""

    def __init__(self, args: argparse.Namespace, rows: dict[str, Any], inception: frechet.Inception) -> None:
        self.args, self.rows, self.inception = args, rows, inception
        keys = [*args.set, "run_dir=x", "data.root=x", *([f"loss.perceptual.weights={args.vgg}"] if args.vgg else [])]
        size = load_config(AutoencoderTraining, args.recipes[0], keys).image_size
        self.size = (size[0], size[1])
        self.files, known = find_images(args.reference), {file.digest for file in find_images(args.data)}
        twice = [file.path for file in self.files if file.digest in known]
        if twice:
            raise UserError(f"{args.reference}: {len(twice)} of its images are in {args.data}, too, {twice[0]} first")
        self.fingerprint = hashlib.sha256("".join(sorted(file.digest for file in self.files)).encode()).hexdigest()[:12]
        self.reference = Reference.of_images(self.files, self.size, inception)
        self.perceptual = PerceptualLoss(args.vgg, torch.device("cpu")) if args.vgg else None

    def run(self) -> None:
        """Writes table.md and front.png after each row."""
        groups: dict[str, list[Result]] = {}
        for seed in self.args.seeds:
            for name in self.args.rows:
                groups.setdefault(name, []).append(self.row(name, seed))
                thumbnails = self.thumbnails(max(group[0]["values"] for group in groups.values()))
                drawn = list(ablate.ways(self.args, early=True))
                ablate.report(self.args.out / "table.md", table(groups, thumbnails, drawn, self.notes()))
                draw(groups, thumbnails, drawn, self.args.out / "front.png")

    def notes(self) -> str:
        """What the figures depend on."""
        floor = self.reference.floor(self.reference.half, self.inception)["photographs"]["kid"]
        return (
            f"\n{self.args.samples} samples against {len(self.files)} unseen images; of these, one half is "
            f"{1000 * floor:.1f} from the other by KID x 1000, and so are reconstructions of it measured.\n"
        )

    @cached_property
    def images(self) -> Tensor:
        """Unseen ones, (N, 3, H, W)."""
        return torch.stack([load_crop(file.path, self.size) for file in self.files[:MEASURED]])

    def thumbnails(self, values: int) -> Result:
        """Figures of bicubic thumbnails of as many values."""
        kept = self.args.out / f"thumbnails-{values}-{self.fingerprint}.json"
        if not kept.is_file():
            half = self.reference.half
            paths = self.reference.images[-half:]
            decoded = bicubic(torch.stack([load_crop(path, self.size) for path in paths]), values)
            features = torch.cat([self.inception(batch) for batch in decoded.split(32)])
            rkid = frechet.kernel_distance(features, self.reference.features[:half])
            measured = self.measure(lambda images: bicubic(images, values))
            write_json(kept, measured | {"rkid": rkid, "values": values})
        found: Result = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def measure(self, reconstruct: Callable[[Tensor], Tensor]) -> Result:
        """PSNR, SSIM and, with VGG, LPIPS."""
        perceptual = self.perceptual.in_parts if self.perceptual else None
        return reconstruction_figures({"": reconstruct}, self.images.split(8), perceptual, None)[1][""]

    def row(self, name: str, seed: int) -> Result:
        """Trains an autoencoder, encodes, trains a flow, draws and measures."""
        args, row = self.args, self.rows[name]
        run = ablate.run_directory(args.out, name, seed)
        vgg = [f"loss.perceptual.weights={args.vgg}"] if args.vgg else []
        places = [f"data.root={args.data}", f"run_dir={run / 'ae'}", f"seed={seed}"]
        keys = [*flat(row.get("autoencoder", [])), *args.set, *vgg, *places]
        config = load_config(AutoencoderTraining, args.recipes[0], keys)
        flow_keys = [*flat(row.get("flow", [])), *args.set_flow, f"data.shards={run / 'latents'}"]
        flow_keys += [f"run_dir={run / 'flow'}", f"seed={seed}"]
        flow = load_config(FlowTraining, args.recipes[1], flow_keys)
        network = row.get("network", "ours")
        build = baselines.builder(network, row.get("width", 1.0))
        run.mkdir(parents=True, exist_ok=True)
        asked = {
            "ae": to_yaml(config), "network": network, "width": row.get("width", 1.0), "flow": to_yaml(flow),
            "crops": args.crops, "samples": args.samples, "reference": self.fingerprint,
        }  # fmt: skip
        ablate.remember(run, asked)

        def rebuild(stored: Stored) -> PyramidAutoencoder:
            return assemble(stored, build)

        kept = run / "result.json"
        found: Result = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if "rkid" not in found:
            whole, began = not (run / "ae").exists(), time.perf_counter()
            model = self.stage_one(config, build, network)
            found["minutes_ae"] = (time.perf_counter() - began) / 60 if whole else None
            crops = ablate.random_crops(Path(config.data.root), config.image_size, ablate.CROPS, config.data.zoom)
            found |= {"values": latent_values(model.levels, self.size), **ablate.latent_statistics(model, crops)}
            found |= self.measure(lambda images: round_trip(model, images))
            floor = self.reference.floor(self.reference.half, self.inception, model)
            found["rkid"] = floor["reconstructions"]["kid"]
            originals = self.images[:16]
            comparison_grid(originals, round_trip(model, originals)).save(run / "reconstructions.png")
            write_json(kept, found)
        if "losses" not in found:
            whole, began = not (run / "flow").exists(), time.perf_counter()
            options = EncodeOptions(batch_size=32, crops=args.crops, zoom=config.data.zoom)
            encode(run / "ae", args.data, run / "latents", options, start("auto", "auto"), rebuild)
            _, finished = train_flow(flow, rebuild)
            if not finished:
                raise KeyboardInterrupt
            last = {k: v for line in read_lines(run / "flow" / "metrics.jsonl") for k, v in line.items()}
            found["losses"] = {key: value for key, value in last.items() if key.startswith(("train_", "held_out_"))}
            found["minutes_flow"] = (time.perf_counter() - began) / 60 if whole else None
            write_json(kept, found)
        ways = ablate.ways(args, early=flow.model.early)
        missing = [name for name in ways if name not in found]
        if missing or not (run / "samples.png").is_file():
            pipeline = PyramidPipeline.from_pretrained(run / "flow", rebuild).to(self.inception.device)
            for each in missing:
                features, _ = sample_features(pipeline, self.inception, args.samples, 1, ways[each])
                found[each] = self.reference.distances(features)
                write_json(kept, found)
            guidance = list(ways.values())[-1].guidance
            drawn = pipeline(num_images=SHOWN, seed=1, guidance=guidance, batch_size=SHOWN)
            grid(drawn.images, 8).save(run / "samples.png")
        return found

    def stage_one(
        self, config: AutoencoderTraining, build: Callable[[AutoencoderConfig], PyramidAutoencoder], network: str
    ) -> PyramidAutoencoder:
        """Trained, or fitted, or read."""
        run = Path(config.run_dir)
        if network != "linear":
            _, finished = train_autoencoder(config, build)
            if not finished:
                raise KeyboardInterrupt
            return load_model(run / "model", build, AutoencoderConfig)
        train, _ = split_held_out(find_images(Path(config.data.root)), config.data.validation)
        crops = ablate.random_crops_of(train, config.image_size, FIT_CROPS, config.data.zoom)
        codec = baselines.linear(config.model, lambda: crops.split(16))
        codec.save_pretrained(run / "model")
        return codec


def flat(keys: Iterable[Any]) -> list[str]:
    """Lists within lists, which YAML's anchors leave, as one."""
    return [key for each in keys for key in (flat(each) if isinstance(each, list) else [each])]


def table(groups: dict[str, list[Result]], thumbnails: Result, drawn: Sequence[str], notes: str) -> str:
    """A line a group of seeds."""
    head = ["", "values", *(title for _, title, _ in ablate.COLUMNS), "rKID x 1000"]
    head += [f"KID x 1000, {each.replace('_', ' ')}" for each in drawn]
    lines = []
    for name, results in groups.items():
        cells = [name, str(results[0]["values"])]
        for key, _, digits in ablate.COLUMNS:
            cells.append(ablate.spread([r[key] for r in results if r.get(key) is not None], digits))
        cells.append(ablate.spread((1000 * r["rkid"] for r in results), 1))
        for each in drawn:
            cells.append(ablate.spread([1000 * r[each]["kid"] for r in results if each in r], 1))
        first = results[0]
        cells.append(", ".join(f"{v:.2f}" for key, v in first["losses"].items() if key.startswith("held_out_")))
        for key in ("std", "noise", "predictable"):
            cells.append(", ".join("-" if value is None else f"{value:.2f}" for value in first[key]))
        minutes = ([r[key] for r in results if r[key] is not None] for key in ("minutes_ae", "minutes_flow"))
        cells.append(" + ".join(f"{mean(each):.1f}" if each else "-" for each in minutes))  # of those in one go
        lines.append([*cells, str(len(results))])
    cells = [f"{thumbnails[key]:.{digits}f}" if key in thumbnails else "-" for key, _, digits in ablate.COLUMNS]
    blank = [""] * (len(drawn) + 6)
    lines.append(
        ["bicubic thumbnail", f"at most {thumbnails['values']}", *cells, f"{1000 * thumbnails['rkid']:.1f}", *blank]
    )
    head += ["held-out loss", "latent std", "noise", "predictable", "minutes", "seeds"]
    return ablate.markdown(head, lines) + notes


def draw(groups: dict[str, list[Result]], thumbnails: Result, drawn: Sequence[str], path: Path) -> None:
    """PSNR to the right, KID of samples upwards, so that the front is below and to the right: one point a seed, by the
    last of `drawn` that its flow can be drawn by."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sheet, axis = plt.subplots(figsize=(7.5, 5.5))
    for number, (name, results) in enumerate(groups.items()):
        x = [r["psnr"] for r in results]
        y = [1000 * next((r[each]["kid"] for each in reversed(drawn) if each in r), math.nan) for r in results]
        axis.scatter(x, y, color=f"C{number % 10}", marker="osD^v"[number // 10 % 5], label=name)
        axis.plot(x, y, color=f"C{number % 10}", linewidth=0.7)
    axis.axvline(thumbnails["psnr"], color="grey", linestyle=":", label="bicubic thumbnail")
    axis.set(xlabel="PSNR of reconstructions, dB", ylabel="KID x 1000 of samples")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    sheet.tight_layout()
    sheet.savefig(path, dpi=100)
    plt.close(sheet)
