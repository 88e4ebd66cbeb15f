#!/usr/bin/env python3
"""Changes one thing at a time and says what it is worth: the tables of docs/EXPERIMENTS.md.

    tools/ablate.py autoencoder --data photos/ --vgg vgg16.safetensors --out ablate-ae/
    tools/ablate.py autoencoder ... --rows default "group norm" --seeds 0 1
    tools/ablate.py network --shards latents/ --reference held-out/ --inception inception-2015-12-05.pt --out net/
    tools/ablate.py network ... --rows default "predict data" --solvers euler abm2 --evaluations 10 20 50
    tools/ablate.py both --data photographs/ --reference landscapes/ --inception inception-2015-12-05.pt --out both/
    tools/ablate.py photographs --data photos/ --reference others/ --inception inception-2015-12-05.pt \\
        --vgg vgg16.safetensors --out photographs/

`both` (the demo's landscapes) and `photographs` judge a stage one by what it reconstructs and by what a flow of fixed
size and length draws in its latents.

Every row is a recipe with a few config keys of its own (tools/ablations.yaml). A row that is done is not trained again;
one that was interrupted goes on. Writes table.md into --out after each row.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.config import AutoencoderConfig, AutoencoderTraining, FlowTraining, load_config
from pyramid_ldm.config.base import to_yaml
from pyramid_ldm.data.folder import ImageFile, find_images, split_held_out
from pyramid_ldm.data.images import normalise
from pyramid_ldm.data.photographs import Photographs, Preprocessing, crops_to_examine
from pyramid_ldm.data.shards import LatentCache
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation import frechet
from pyramid_ldm.evaluation.evaluate import reconstruction_figures
from pyramid_ldm.evaluation.metrics import bicubic
from pyramid_ldm.evaluation.reference import Reference, sample_features
from pyramid_ldm.files import read_lines, write_json, write_text
from pyramid_ldm.info.cost import Work, count, empty_latents
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.pyramid import Pyramid, latent_values, level_shapes
from pyramid_ldm.serialization import load_model
from pyramid_ldm.training.autoencoder_state import Build
from pyramid_ldm.training.runtime import start
from pyramid_ldm.training.train_autoencoder import train_autoencoder
from pyramid_ldm.training.train_flow import train_flow

TOOLS = Path(__file__).resolve().parent
ROWS: dict[str, dict[str, Any]] = yaml.safe_load((TOOLS / "ablations.yaml").read_text(encoding="utf-8"))
CROPS = 256  # random ones that latents are described by
COLUMNS = (("psnr", "PSNR, dB", 2), ("ssim", "SSIM", 3), ("lpips", "LPIPS", 3))
SOLVERS = ("euler", "ancestral", "heun", "dpmpp_2m", "abm2")
Result = dict[str, Any]


def run_directory(out: Path, name: str, seed: int) -> Path:
    """Of a row with a seed."""
    return out / f"{name}-{seed}".replace(" ", "-").replace("/", "-").replace(":", "-")


def remember(run: Path, options: Result) -> None:
    """Writes what a row is made with beside its run, or refuses another row of the same name there."""
    note = run.with_name(run.name + ".json")
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != options:
        raise UserError(f"{run}: was made with other options (see {note.name}); give another --out, or delete both")
    write_json(note, options)


def autoencoder_row(config: AutoencoderTraining, build: Build = PyramidAutoencoder, kind: str = "ours") -> Result:
    """Trains an autoencoder, or goes on, or reads what is done: costs, latents, and held-out figures over images.

    Args:
        kind: says which networks `build` makes.
    """
    run = Path(config.run_dir)
    remember(run, {"config": to_yaml(config), "kind": kind})
    kept = run / "result.json"
    if not kept.is_file():
        _, finished = train_autoencoder(config, build)
        if not finished:
            raise KeyboardInterrupt
        model = load_model(run / "model", build, AutoencoderConfig)
        images = random_crops(Path(config.data.root), config.image_size, CROPS, config.data.zoom)
        write_json(kept, costs(model) | latent_statistics(model, images))
    curve = [line for line in read_lines(run / "metrics.jsonl") if "held_out_psnr" in line]
    if not curve:
        raise UserError(f"{run}: no held-out figures were measured; its log says why. Delete it to train it again")
    return json.loads(kept.read_text(encoding="utf-8")) | {"curve": curve}


def costs(model: PyramidAutoencoder) -> Result:
    """Values of the latents; parameters, FLOPs and peak activation bytes (float32) of either half, one image."""
    size = model.image_size
    found: Result = {"values": latent_values(model.levels, size), "ratio": model.compression_ratio()}
    inputs: dict[str, Any] = {
        "encoder": torch.zeros(1, 3, *size),
        "decoder": tuple(torch.zeros_like(z) for z in empty_latents(level_shapes(model.levels, size), 1)),
    }
    for half, given in inputs.items():
        network = getattr(model, half)
        with torch.no_grad(), Work(model.parameters()) as work:
            before = work.live
            network(given)
        found[half] = {"parameters": count(network), "flops": work.flops, "bytes": work.peak - before}
    return found


@torch.inference_mode()
def latent_statistics(model: PyramidAutoencoder, images: Tensor) -> Result:
    """Of the posteriors of images (N, 3, H, W), coarse to fine: standard deviation of the means, the posterior's own
    ("noise"), and predictability."""
    posteriors = [model.encode(batch) for batch in images.split(16)]
    means: Pyramid = tuple(torch.cat(level) for level in zip(*(p.mean for p in posteriors), strict=True))
    noise = [0.0] * len(means)
    if posteriors[0].log_variance is not None:
        levels = zip(*(p.log_variance or () for p in posteriors), strict=True)
        noise = [float((0.5 * torch.cat(level)).exp().mean()) for level in levels]
    return {"std": [float(level.std()) for level in means], "noise": noise, "predictable": predictability(means)}


def predictability(latents: Pyramid) -> list[float | None]:
    """For each level, the share of its variance that a linear regression explains from every coarser level (at the
    same place) and from the left and upper neighbours: fitted on even images, measured on odd ones. 0: news to stage
    two; 1: redundant; None: nothing to predict it from."""
    found: list[float | None] = []
    for i, level in enumerate(latents):
        sources = [F.interpolate(coarse, size=level.shape[2:], mode="nearest") for coarse in latents[:i]]
        padded = F.pad(level - level.mean(dim=(0, 2, 3), keepdim=True), (1, 0, 1, 0))
        sources += [padded[:, :, 1:, :-1], padded[:, :, :-1, 1:]] if level[0, 0].numel() > 1 else []
        found.append(explained(torch.cat(sources, dim=1), level) if sources else None)
    return found


def explained(features: Tensor, targets: Tensor) -> float:
    """R^2 of ridge regression, position by position, both (N, C, H, W); at least 0."""

    def rows(x: Tensor) -> Tensor:
        return x.double().permute(0, 2, 3, 1).flatten(0, 2)

    x, y, x_test, y_test = (rows(part) for part in (features[::2], targets[::2], features[1::2], targets[1::2]))
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, x_test = x - x_mean, x_test - x_mean
    ridge = 1e-3 * x.square().mean() * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y_mean))
    residual = (y_test - y_mean - x_test @ weights).square().sum()
    return max(0.0, float(1 - residual / (y_test - y_test.mean(dim=0)).square().sum()))


def random_crops(folder: Path, size: Sequence[int], number: int, zoom: float) -> Tensor:
    """Of a folder's images, the same at every call."""
    return random_crops_of(find_images(folder), size, number, zoom)


def random_crops_of(files: Sequence[ImageFile], size: Sequence[int], number: int, zoom: float) -> Tensor:
    """(number, 3, H, W), each image in turn."""
    photographs = Photographs(files, Preprocessing((size[0], size[1]), "random", zoom), seed=1)
    return torch.stack([normalise(photographs[i][0]) for i in range(number)])


def thumbnail(config: AutoencoderTraining, values: int, perceptual: PerceptualLoss) -> Result:
    """Figures of bicubic thumbnails of as many values, on the images that training measures itself by."""
    data, (height, width) = config.data, config.image_size
    files = split_held_out(find_images(Path(data.root)), data.validation)[1][: config.log.examined]
    cut = Preprocessing((height, width), data.crop, data.zoom, data.flip, data.upscale)
    images = torch.stack([crop for _, crop in crops_to_examine(files, cut, config.seed, [])])
    return reconstruction_figures({"": lambda x: bicubic(x, values)}, [images], perceptual, None)[1][""]


def spread(values: Iterable[float], digits: int) -> str:
    """Mean ± standard deviation; the value alone of one seed; a dash for none."""
    known = list(values)
    if not known:
        return "-"
    deviation = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{deviation}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


def autoencoder_table(groups: dict[str, list[Result]], thumbnails: dict[int, Result]) -> str:
    """A line a group of seeds; costs and latents (coarse to fine) are the first seed's. Below, for each number of
    values, a bicubic thumbnail's figures."""
    halves = ("encoder", "decoder")
    titles = [title for _, title, _ in COLUMNS]
    head = ["", "1:", "values", *halves, "encode", "its peak", "decode", "its peak", *titles]
    lines = []
    for name, results in groups.items():
        first = results[0]
        cells = [name, f"{first['ratio']:.0f}", str(first["values"])]
        cells += [f"{first[half]['parameters'] / 1e6:.1f} M" for half in halves]
        for half in halves:
            cells += [f"{first[half]['flops'] / 1e9:.1f} GFLOP", f"{first[half]['bytes'] / 2**20:.0f} MiB"]
        cells += [spread((r["curve"][-1][f"held_out_{key}"] for r in results), digits) for key, _, digits in COLUMNS]
        for key in ("std", "noise", "predictable"):
            cells.append(", ".join("-" if value is None else f"{value:.2f}" for value in first[key]))
        lines.append([*cells, str(len(results))])
    for values, found in thumbnails.items():
        cells = [f"{found[key]:.{digits}f}" for key, _, digits in COLUMNS]
        lines.append(["bicubic", "", f"at most {values}", *[""] * 6, *cells, *[""] * 4])
    return markdown([*head, "latent std", "noise", "predictable", "seeds"], lines)


def ablate_autoencoder(args: argparse.Namespace) -> None:
    """Stage one: held-out reconstruction, and cost."""
    groups: dict[str, list[Result]] = {}
    thumbnails: dict[int, Result] = {}
    for seed in args.seeds:
        for name in args.rows:
            keys = [*ROWS["autoencoder"][name], f"data.root={args.data}", f"loss.perceptual.weights={args.vgg}"]
            keys += [*args.set, f"run_dir={run_directory(args.out, name, seed)}", f"seed={seed}"]
            config = load_config(AutoencoderTraining, TOOLS / "ablation_recipe.yaml", keys)
            result = autoencoder_row(config)
            groups.setdefault(name, []).append(result)
            if not thumbnails:  # every row has as many values
                perceptual = PerceptualLoss(args.vgg, torch.device("cpu"))
                thumbnails = {result["values"]: thumbnail(config, result["values"], perceptual)}
            report(args.out / "table.md", autoencoder_table(groups, thumbnails))


def report(path: Path, table: str) -> None:
    """Written and shown."""
    write_text(path, table)
    print(table, flush=True)


def network_row(
    config: FlowTraining, reference: Reference, inception: frechet.Inception, args: argparse.Namespace
) -> Result:
    """Trains a network of stage two, or goes on, or reads what is done; what was not measured yet of the solvers and
    their evaluations is. Losses of every level at the end, distances of samples from the reference, evaluations of
    RK45."""
    run = Path(config.run_dir)
    remember(run, {"config": to_yaml(config), "samples": args.samples, "real": len(reference.features)})
    kept = run / "result.json"
    found: Result = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if not found:
        _, finished = train_flow(config)
        if not finished:
            raise KeyboardInterrupt
        last = {key: value for line in read_lines(run / "metrics.jsonl") for key, value in line.items()}
        found["losses"] = {key: value for key, value in last.items() if key.startswith(("train_", "held_out_"))}
    missing = {name: way for name, way in ways(args, early=config.model.early).items() if name not in found}
    if missing or "rk45_nfe" not in found:
        pipeline = PyramidPipeline.from_pretrained(run).to(inception.device)
        for name, options in missing.items():
            features, _ = sample_features(pipeline, inception, args.samples, 1, options)
            found[name] = reference.distances(features)
            write_json(kept, found)
        if "rk45_nfe" not in found:
            found["rk45_nfe"] = pipeline(num_images=16, seed=1, solver="rk45", rtol=1e-3, atol=1e-3).nfe
            write_json(kept, found)
    return found


def ways(args: argparse.Namespace, *, early: bool) -> dict[str, SolverOptions]:
    """How samples are drawn, by the name of what is measured of them; without guidance where a network has no early
    predictions."""
    found = {}
    for solver in args.solvers:
        for evaluations in args.evaluations:
            for guidance in args.guidance if early else [1.0]:
                steps = (evaluations + 1) // 2 if solver == "heun" else evaluations  # all but its last take two
                name = f"{solver}_{evaluations}" + ("" if guidance == 1 else f"_guided_{guidance:g}")
                found[name] = SolverOptions(solver, steps=steps, guidance=guidance)
    return found


def network_table(groups: dict[str, list[Result]], drawn: Sequence[str]) -> str:
    """A line a group of seeds: KID by each way to draw, FID by the last; of a way that its flows cannot go, nothing."""
    levels = [key for key in next(iter(groups.values()))[0]["losses"] if key.startswith("held_out_")]
    head = ["", *(f"KID x 1000, {each.replace('_', ' ')}" for each in drawn), f"FID, {drawn[-1].replace('_', ' ')}"]
    head += [f"{key.removeprefix('held_out_')}: held-out loss (gap)" for key in levels]
    lines = []
    for name, results in groups.items():
        cells = [name]
        for each in drawn:
            cells.append(spread([1000 * r[each]["kid"] for r in results if each in r], 1))
        cells.append(spread([r[drawn[-1]]["fid"] for r in results if drawn[-1] in r], 1))
        for key in levels:
            gap = mean(r["losses"][key] - r["losses"][key.replace("held_out", "train")] for r in results)
            cells.append(f"{spread((r['losses'][key] for r in results), 3)} ({gap:+.3f})")
        lines.append([*cells, f"{mean(r['rk45_nfe'] for r in results):.0f}", str(len(results))])
    return markdown([*head, "NFE of RK45 at 1e-3", "seeds"], lines)


def ablate_network(args: argparse.Namespace) -> None:
    """Stage two: distances of samples from held-out images, loss per level, evaluations of RK45."""
    height, width = LatentCache(args.shards).plan.image_size
    inception = frechet.Inception(args.inception, start("auto", "auto").device)
    reference = Reference.of_images(find_images(args.reference), (height, width), inception)
    groups: dict[str, list[Result]] = {}
    floor = ""
    for seed in args.seeds:
        for name in args.rows:
            keys = [*ROWS["network"][name], f"data.shards={args.shards}", *args.set]
            keys += [f"run_dir={run_directory(args.out, name, seed)}", f"seed={seed}"]
            config = load_config(FlowTraining, args.recipe, keys)
            found = network_row(config, reference, inception, args)
            groups.setdefault(name, []).append(found)
            if not floor:  # once: every run has the cache's autoencoder
                pipeline = PyramidPipeline.from_pretrained(Path(config.run_dir)).to(inception.device)
                least = reference.floor(reference.half, inception, pipeline.autoencoder)
                both = {key: f"{1000 * d['kid']:.1f} (KID x 1000) and {d['fid']:.1f} (FID)" for key, d in least.items()}
                floor = (
                    f"\n{args.samples} samples against {len(reference.images)} real images. Half of these, "
                    f"{reference.half}, are {both['photographs']} from the other half, and {both['reconstructions']} "
                    "after the autoencoder. FID grows as images become fewer, so that the table's cannot be compared "
                    "with these two; KID does not.\n"
                )
            report(args.out / "table.md", network_table(groups, list(ways(args, early=True))) + floor)


def ablate_both(args: argparse.Namespace) -> None:
    """Stage one judged by both stages."""
    import front

    inception = frechet.Inception(args.inception, start("auto", "auto").device)
    front.Front(args, ROWS[args.stage], inception).run()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for stage, rows in ROWS.items():
        command = stages.add_parser(stage)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--rows", nargs="+", choices=rows, metavar="ROW", default=list(rows), help="; ".join(rows))
        command.add_argument("--seeds", nargs="+", type=int, default=[0])
        command.add_argument("--images", type=int, help="images that each sees, instead of the recipe's")
        command.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes every row")
        if stage == "autoencoder":
            command.add_argument("--data", type=Path, required=True, help="photographs; a fifth is held out")
            command.add_argument("--vgg", default="imagenet", help="VGG-16 weights for LPIPS")
            continue
        command.add_argument("--reference", type=Path, required=True, help="real images that nothing was trained on")
        command.add_argument("--inception", type=Path, required=True, help="inception-2015-12-05.pt")
        command.add_argument("--samples", type=int, default=256, help="of each row")
        command.add_argument("--solvers", nargs="+", choices=SOLVERS, default=["euler"])
        two = stage != "network"
        counts = [20] if two else [10, 20, 50, 200]
        command.add_argument("--evaluations", nargs="+", type=int, default=counts, help="of each solver")
        command.add_argument("--guidance", nargs="+", type=float, default=[1.0], help="of flows with model.early")
        if two:
            demo = [TOOLS.parent / f"{each}_configs" / "demo.yaml" for each in ("autoencoder", "diffusion")]
            configs = demo if stage == "both" else [TOOLS / f"{stage}_{each}.yaml" for each in ("ae", "flow")]
            command.add_argument("--data", type=Path, required=True, help="photographs to train on")
            command.add_argument("--vgg", help="VGG-16 weights, to measure LPIPS and for recipes that want it")
            command.add_argument(
                "--crops", type=int, default=0 if stage == "both" else 40, help="of each, for the flow; 0: centre crops"
            )
            command.add_argument("--recipes", nargs=2, type=Path, default=configs, help="of the stages")
            command.add_argument("--set-flow", nargs="*", default=[], metavar="KEY=VALUE", help="changes every flow")
        else:
            command.add_argument("--shards", type=Path, required=True, help="a cache made by `pyramid-ldm encode`")
            command.add_argument("--recipe", type=Path, default=TOOLS / "flow.yaml", help="a config of train-flow")
    args = parser.parse_args(words)
    args.set += [] if args.images is None else [f"train.images={args.images}"]
    return args


def exit_code(name: str, work: Callable[[], object]) -> int:
    """0 done; 2 the input is wrong or the system fails, said in one line; 130 after Ctrl-C, when the same command goes
    on."""
    try:
        work()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{name}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """See `exit_code`."""
    args = parse(words)
    work = {
        "autoencoder": ablate_autoencoder,
        "network": ablate_network,
        "both": ablate_both,
        "photographs": ablate_both,
    }[args.stage]
    return exit_code("ablate", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
