"""What a trained autoencoder, a flow, or a folder of pictures is worth beside real photographs, in figures."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoder.perceptual import PerceptualLoss
from pyramid_ldm.data.images import ImageFile, UnreadableImage, find_images, load_image, split_held_out
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.frechet import Inception, Moments, frechet_distance, kernel_distance
from pyramid_ldm.evaluation.metrics import bicubic, psnr, ssim
from pyramid_ldm.evaluation.reference import Reference, centre_crops, sample_features
from pyramid_ldm.files import write_json
from pyramid_ldm.pipeline import MANIFEST, PyramidPipeline, SolverOptions
from pyramid_ldm.pyramid import latent_values

Figures = dict[str, float]  # psnr, ssim, lpips; with Inception also rfid, rkid
Metric = Callable[[Tensor, Tensor], Tensor]  # LPIPS of (B, 3, H, W) and its target
INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
FEW = "FID grows as images become fewer: compare equal numbers only. KID does not."


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate: where to compute and what with."""

    device: torch.device
    bf16: bool
    inception: Path | None = None
    lpips: str | None = None  # VGG-16's weights
    held_out: float | None = None  # only the photographs held out at this `data.validation`
    count: int | None = None  # photographs for an autoencoder, samples of a flow, pictures of a folder
    seed: int = 0
    options: SolverOptions = field(default_factory=SolverOptions)
    batch_size: int = 32

    def photographs(self, folder: Path) -> list[str]:
        """Those to compare with."""
        files: list[ImageFile] = find_images(folder)
        if self.held_out is not None:
            files = split_held_out(files, self.held_out)[1]
        return [file.path for file in files]

    def features(self) -> Inception:
        """The network. UserError where none was given."""
        if self.inception is None:
            raise UserError(f"FID and KID need --inception inception-2015-12-05.pt; StyleGAN2-ADA's is at {INCEPTION}")
        return Inception(self.inception, self.device)


def evaluate(path: Path, data: Path, how: Evaluation) -> tuple[dict[str, Any], str]:
    """Figures of `path`, a run or model of either stage, or a folder of pictures; and the same as text.

    UserError where `path` is none of these.
    """
    print(f"evaluate: {path} beside the photographs of {data}; {how.device}", file=sys.stderr)
    homes = (path, path / "model")
    if any((home / MANIFEST).is_file() for home in homes):
        return evaluate_flow(path, data, how)
    if any((home / "model.safetensors").is_file() for home in homes):
        return evaluate_autoencoder(path, data, how)
    if path.is_dir() and not (path / "config.yaml").is_file():
        return evaluate_pictures(path, data, how)
    raise UserError(f"{path}: is no run with a model in it, and no folder of pictures")


def evaluate_autoencoder(path: Path, data: Path, how: Evaluation) -> tuple[dict[str, Any], str]:
    """PSNR, SSIM, LPIPS, rFID and rKID of reconstructed centre crops, and of bicubic thumbnails of as many values."""
    autoencoder = PyramidAutoencoder.from_pretrained(path).to(how.device)
    height, width = autoencoder.config.image_size
    inception = how.features() if how.inception else None
    perceptual = PerceptualLoss(how.lpips, how.device) if how.lpips else None
    values = latent_values(autoencoder.levels, (height, width))

    def reconstruct(images: Tensor) -> Tensor:
        with torch.autocast(how.device.type, dtype=torch.bfloat16, enabled=how.bf16):
            return autoencoder.decode_tiled(autoencoder.encode(images).mode())

    paths = how.photographs(data)[: how.count]
    batches = (images.to(how.device) for _, images in centre_crops(paths, (height, width), "evaluate"))
    ways = {"reconstructed": reconstruct, "bicubic": lambda images: bicubic(images.cpu(), values).to(images.device)}
    count, found = reconstruction_figures(ways, batches, perceptual, inception)
    if not count:
        raise UserError(f"{data}: no image could be read")
    figures = {"what": "autoencoder", "photographs": count, "size": [height, width], "values": values} | found
    ratio = f"{autoencoder.compression_ratio():.1f}"
    lines = [
        f"{count} photographs of {data}, {height}x{width}, and what is left of them after {values} values (1:{ratio})"
    ]
    titles = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFID", "rkid": "rKID x 1000"}
    rows = [["", *(titles[key] for key in found["bicubic"])]]
    rows += [[name, *(number(key, value) for key, value in found[name].items())] for name in ways]
    return figures, "\n".join(lines + columns(rows) + ([FEW] if inception else []))


def evaluate_flow(path: Path, data: Path, how: Evaluation) -> tuple[dict[str, Any], str]:
    """FID and KID of samples, of the autoencoder alone, and of two halves of the photographs."""
    inception = how.features()
    pipeline = PyramidPipeline.from_pretrained(path).to(how.device)
    height, width = pipeline.autoencoder.config.image_size
    reference = Reference.of_images(how.photographs(data), (height, width), inception)
    count = how.count or len(reference.images)
    features, evaluations = sample_features(
        pipeline, inception, count, how.seed, how.options, batch_size=how.batch_size, bf16=how.bf16
    )
    solver = f"euler, {how.options.steps} steps" if how.options.solver == "euler" else how.options.solver
    figures = {
        "what": "flow", "checkpoint": pipeline.checkpoint, "photographs": len(reference.images),
        "samples": count, "seed": how.seed, "solver": solver, "nfe": evaluations,
        "of_samples": reference.distances(features),
        "of_reconstructions": reference.reconstructed(pipeline.autoencoder, inception),
        "of_halves": reference.halves(),
    }  # fmt: skip
    head = f"{count} samples of {path} (seed {how.seed}, {solver}, {evaluations:.0f} evaluations an image)"
    return figures, distances_text(head, figures, reference, data)


def evaluate_pictures(path: Path, data: Path, how: Evaluation) -> tuple[dict[str, Any], str]:
    """FID and KID of a folder of pictures, for example of `pyramid-ldm sample`; photographs are cut to their size."""
    inception = how.features()
    pictures = pictures_of(path)[: how.count]
    try:
        width, height = load_image(pictures[0]).size
    except UnreadableImage as error:
        raise UserError(str(error)) from None
    features = [inception(batch) for _, batch in centre_crops(pictures, (height, width), "pictures")]
    reference = Reference.of_images(how.photographs(data), (height, width), inception)
    count = sum(len(part) for part in features)
    figures = {
        "what": "pictures", "photographs": len(reference.images), "samples": count,
        "of_samples": reference.distances(torch.cat(features)), "of_halves": reference.halves(),
    }  # fmt: skip
    return figures, distances_text(f"{count} pictures of {path}", figures, reference, data)


def pictures_of(folder: Path) -> list[str]:
    """What `sample` drew there, without its grid; of another folder, every image."""
    listed = folder / "samples.jsonl"
    if listed.is_file():
        names = dict.fromkeys(json.loads(line)["file"] for line in listed.read_text(encoding="utf-8").splitlines())
        return [str(folder / name) for name in names]
    return [file.path for file in find_images(folder)]


@torch.inference_mode()
def reconstruction_figures(
    ways: Mapping[str, Callable[[Tensor], Tensor]],
    batches: Iterable[Tensor],
    perceptual: Metric | None,
    inception: Callable[[Tensor], Tensor] | None,
    real: Tensor | None = None,
) -> tuple[int, dict[str, Figures]]:
    """(images, means over them of each way to reconstruct); with the Inception network also the distances of all
    reconstructions from all originals.

    Args:
        batches: (B, 3, H, W) in [-1, 1], where the ways, `perceptual` and `inception` want them.
        real: features of all of them, where they are known already.
    """
    rows: dict[str, list[Figures]] = {name: [] for name in ways}
    features: dict[str, list[Tensor]] = {name: [] for name in ways}
    originals: list[Tensor] = []
    for images in batches:
        if inception is not None and real is None:
            originals.append(inception(images))
        for name, way in ways.items():
            decoded = way(images).float().clamp(-1, 1)
            rows[name] += nearness(decoded, images, perceptual)
            if inception is not None:
                features[name].append(inception(decoded))
    count = len(next(iter(rows.values())))
    if not count:
        return 0, {}
    found = {name: {key: mean(row[key] for row in every) for key in every[0]} for name, every in rows.items()}
    if inception is not None:
        target = real if real is not None else torch.cat(originals)
        if len(target) < 2:
            raise UserError("one image; rFID needs at least two")
        for name in ways:
            every = torch.cat(features[name])
            found[name]["rfid"] = frechet_distance(Moments.of([every]), Moments.of([target]))
            found[name]["rkid"] = kernel_distance(every, target)
    return count, found


def nearness(images: Tensor, targets: Tensor, perceptual: Metric | None) -> list[Figures]:
    """PSNR, SSIM and LPIPS of each."""
    found = []
    for image, target in zip(images.split(1), targets.split(1), strict=True):
        figures = {"psnr": float(psnr(image, target)), "ssim": float(ssim(image, target))}
        if perceptual is not None:
            figures["lpips"] = float(perceptual(image, target))
        found.append(figures)
    return found


def distances_text(head: str, figures: Mapping[str, Any], reference: Reference, data: Path) -> str:
    """Distances as lines."""
    height, width = reference.size
    names = {
        "of_samples": "these",
        "of_reconstructions": "the photographs through the autoencoder",
        "of_halves": f"half of the photographs from the other half ({len(reference.images) // 2} each)",
    }
    rows = [["", "FID", "KID x 1000"]]
    rows += [
        [names[key], *(number(name, value) for name, value in figures[key].items())] for key in names if key in figures
    ]
    lines = [head, f"against {len(reference.images)} photographs of {data}, {height}x{width}", *columns(rows), FEW]
    return "\n".join(lines)


def number(key: str, value: float) -> str:
    """With the digits that mean something."""
    if key.endswith("kid"):
        return f"{1000 * value:.1f}"
    return f"{value:.3f}" if key in ("ssim", "lpips") else f"{value:.2f}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines, names left, figures right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def report(path: Path, data: Path, how: Evaluation, out: Path | None) -> None:
    """Prints the figures; writes them to a JSON file."""
    figures, text = evaluate(path, data, how)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"of": str(path), "data": str(data)} | figures)
        print(f"done: {out}", file=sys.stderr)
