"""What a trained autoencoder, a flow, or a folder of pictures is worth beside real photographs, in figures."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoder.perceptual import PerceptualLoss
from pyramid_ldm.data.images import ImageFile, find_images, split_held_out
from pyramid_ldm.data.shards import INDEX
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.frechet import Inception, Moments, frechet_distance, kernel_distance
from pyramid_ldm.evaluation.metrics import bicubic, psnr, ssim
from pyramid_ldm.evaluation.reference import Reference, centre_crops, distances, round_trip, sample_features
from pyramid_ldm.files import recover_directory, sha256, write_json
from pyramid_ldm.pipeline import MANIFEST, PyramidPipeline, SolverOptions
from pyramid_ldm.pyramid import latent_values

Figures = dict[str, float]  # psnr, ssim, lpips; with Inception also rfid, rkid
Metric = Callable[[Tensor, Tensor], Tensor | float]  # LPIPS of (1, 3, H, W) and its target
INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
FEW = 100  # photographs


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate: where to compute and what with."""

    device: torch.device
    bf16: bool
    inception: Path | None = None
    lpips: str | None = None  # VGG-16's weights, for an autoencoder
    held_out: float | None = None  # only the photographs held out at this `data.validation`
    count: int | None = None  # photographs for an autoencoder, samples of a flow, pictures of a folder
    seed: int = 0  # of samples
    options: SolverOptions = field(default_factory=SolverOptions)
    batch_size: int = 32  # of samples

    def photographs(self, folder: Path) -> list[ImageFile]:
        """Those to compare with."""
        files = find_images(folder)
        if self.held_out is None:
            return files
        if not 0 < self.held_out < 1:
            raise UserError(f"--held-out {self.held_out:g}: give the run's data.validation, between 0 and 1")
        return split_held_out(files, self.held_out)[1]

    def network(self) -> Inception:
        """Inception. UserError where none was given."""
        if self.inception is None:
            raise UserError(f"FID and KID need --inception inception-2015-12-05.pt; StyleGAN2-ADA's is at {INCEPTION}")
        return Inception(self.inception, self.device)

    def record(self) -> dict[str, Any]:
        """What figures depend on."""
        inception = None
        if self.inception is not None:
            inception = {"sha256": sha256(self.inception)[:16], "resize": "299x299, bicubic, anti-aliased"}
        return {
            "held_out": self.held_out, "precision": "bf16" if self.bf16 else "fp32", "inception": inception,
            "lpips": self.lpips,
        }  # fmt: skip


def evaluate(path: Path, data: Path, how: Evaluation) -> tuple[dict[str, Any], str]:
    """Figures of `path`, a run or model of either stage, or a folder of pictures, beside the photographs of `data`; and
    the same as text. UserError where `path` is none of these."""
    if path.is_dir():
        recover_directory(path / "model")
    homes = (path, path / "model")
    if any((home / MANIFEST).is_file() for home in homes):
        stage = evaluate_flow
    elif any((home / "model.safetensors").is_file() for home in homes):
        stage = evaluate_autoencoder
    elif any((path / name).exists() for name in ("config.yaml", "state.pt", INDEX)) or not path.is_dir():
        raise UserError(f"{path}: is no run that has saved a model, and no folder of pictures")
    else:
        stage = evaluate_pictures
    files = how.photographs(data)
    share = "" if how.held_out is None else f" held out at {how.held_out:g}"
    print(f"evaluate: {path} beside {len(files)} photographs of {data}{share}; {how.device}", file=sys.stderr)
    figures, text = stage(path, files, how)
    if how.inception is not None and figures["photographs"] < FEW:
        text += f"\nWith fewer than {FEW} photographs, FID and KID say little."
    return {"of": str(path), "data": str(data)} | figures | how.record(), text


def evaluate_autoencoder(path: Path, files: Sequence[ImageFile], how: Evaluation) -> tuple[dict[str, Any], str]:
    """PSNR, SSIM, LPIPS, rFID and rKID of reconstructed centre crops, and of bicubic thumbnails of as many values."""
    autoencoder = PyramidAutoencoder.from_pretrained(path).to(how.device)
    height, width = autoencoder.config.image_size
    inception = how.network() if how.inception else None
    perceptual = PerceptualLoss(how.lpips, how.device).in_parts if how.lpips else None
    values = latent_values(autoencoder.levels, (height, width))
    crops = centre_crops([file.path for file in files[: how.count]], (height, width), "photographs")
    ways = {
        "reconstructed": lambda images: round_trip(autoencoder, images, bf16=how.bf16),
        "bicubic": lambda images: bicubic(images.cpu(), values).to(images.device),
    }
    count, found = reconstruction_figures(ways, (images.to(how.device) for _, images in crops), perceptual, inception)
    figures = {"what": "autoencoder", "photographs": count, "size": [height, width], "values": values} | found
    titles = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "rFID", "rkid": "rKID x 1000"}
    rows = [["", *(titles[key] for key in found["bicubic"])]]
    rows += [[name, *(number(key, value) for key, value in found[name].items())] for name in ways]
    ratio = autoencoder.compression_ratio()
    head = f"{count} photographs, {height}x{width}, and what is left of them after {values} values (1:{ratio:.1f})"
    return figures, "\n".join([head, *columns(rows)])


def evaluate_flow(path: Path, files: Sequence[ImageFile], how: Evaluation) -> tuple[dict[str, Any], str]:
    """FID and KID of samples; and of as many photographs, as they are and through the autoencoder."""
    inception = how.network()
    pipeline = PyramidPipeline.from_pretrained(path).to(how.device)
    height, width = pipeline.autoencoder.config.image_size
    reference = Reference.of_images(files, (height, width), inception)
    features, evaluations = sample_features(
        pipeline, inception, how.count or len(reference.images), how.seed, how.options,
        batch_size=how.batch_size, bf16=how.bf16,
    )  # fmt: skip
    euler = how.options.solver == "euler"
    solver = f"euler, {how.options.steps} steps" if euler else f"{how.options.solver}, tolerance {how.options.rtol:g}"
    figures, lines = compare(features, reference, inception, how, pipeline.autoencoder)
    figures |= {
        "what": "flow", "checkpoint": pipeline.checkpoint, "seed": how.seed, "solver": asdict(how.options),
        "nfe": evaluations,
    }  # fmt: skip
    head = f"samples of {path}, seed {how.seed}, {solver}, {evaluations:.0f} evaluations an image"
    return figures, "\n".join([head, *lines])


def evaluate_pictures(path: Path, files: Sequence[ImageFile], how: Evaluation) -> tuple[dict[str, Any], str]:
    """The same of a folder of pictures, for example of `pyramid-ldm sample`; photographs are cut to their size."""
    inception = how.network()
    pictures = pictures_of(path)[: how.count]
    size = size_of(pictures, path)
    features = [inception(batch) for _, batch in centre_crops(pictures, size, "pictures")]
    if not features:
        raise UserError(f"{path}: no picture could be read")
    reference = Reference.of_images(files, size, inception)
    figures, lines = compare(torch.cat(features), reference, inception, how)
    return {"what": "pictures"} | figures, "\n".join([f"pictures of {path}", *lines])


def pictures_of(folder: Path) -> list[str]:
    """What `sample` drew there, without its grid; of another folder, every image."""
    listed = folder / "samples.jsonl"
    if not listed.is_file():
        return [file.path for file in find_images(folder)]
    names: dict[str, None] = {}
    for line in listed.read_text(encoding="utf-8").splitlines():
        try:
            names[json.loads(line)["file"]] = None
        except (ValueError, KeyError, TypeError):
            continue  # a killed `sample` may leave half a line
    if not names:
        raise UserError(f"{listed}: names no picture; run `pyramid-ldm sample` again")
    return [str(folder / name) for name in names]


def size_of(pictures: Sequence[str], folder: Path) -> tuple[int, int]:
    """(height, width) of all of them. UserError where they differ."""
    sizes: dict[tuple[int, int], str] = {}
    for path in pictures:
        try:
            with Image.open(path) as picture:
                sizes.setdefault((picture.height, picture.width), path)
        except (OSError, SyntaxError):
            continue  # named when it is read
    if not sizes:
        raise UserError(f"{folder}: no picture could be read")
    if len(sizes) > 1:
        (first, a), (second, b) = list(sizes.items())[:2]
        raise UserError(
            f"{folder}: pictures of different sizes, {a} of {first[0]}x{first[1]} and {b} of {second[0]}x{second[1]}; "
            f"give those of one kind in a folder of their own"
        )
    return next(iter(sizes))


def compare(
    features: Tensor,
    reference: Reference,
    inception: Inception,
    how: Evaluation,
    autoencoder: PyramidAutoencoder | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Distances of all samples from all photographs, and of equal numbers of both; as figures and as lines."""
    whole = reference.distances(features)
    count = min(reference.half, len(features))
    equal = {"samples": distances(features[:count], reference.features[:count])}
    equal |= reference.floor(count, inception, autoencoder, bf16=how.bf16)
    figures = {
        "samples": len(features), "photographs": len(reference.images), "size": list(reference.size),
        "of_samples": whole, "equal_numbers": {"count": count} | equal,
    }  # fmt: skip
    names = {
        "samples": f"{count} samples",
        "reconstructions": f"{count} other photographs through the autoencoder",
        "photographs": f"{count} other photographs",
    }
    height, width = reference.size
    table = columns(
        [
            ["", "FID", "KID x 1000"],
            [f"{len(features)} samples from {len(reference.images)} photographs, {height}x{width}", *cells(whole)],
            [f"in equal numbers, from {count} of the photographs:", "", ""],
            *([f"  {names[key]}", *cells(equal[key])] for key in names if key in equal),
        ]
    )
    return figures, [*table, "FID grows as images become fewer: compare equal numbers only. KID does not."]


@torch.inference_mode()
def reconstruction_figures(
    ways: Mapping[str, Callable[[Tensor], Tensor]],
    batches: Iterable[Tensor],
    perceptual: Metric | None,
    inception: Callable[[Tensor], Tensor] | None,
    real: Tensor | None = None,
) -> tuple[int, dict[str, Figures]]:
    """(images, means over them of each way to reconstruct); with the Inception network also the distances of all
    reconstructions from all originals. UserError without images.

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
    if count < (1 if inception is None else 2):
        raise UserError(f"{count} photographs could be read; give more")
    found = {name: {key: mean(row[key] for row in every) for key in every[0]} for name, every in rows.items()}
    if inception is not None:
        target = real if real is not None else torch.cat(originals)
        for name in ways:
            every = torch.cat(features[name])
            found[name]["rfid"] = frechet_distance(Moments.of([every]), Moments.of([target]))
            found[name]["rkid"] = kernel_distance(every, target, paired=True)
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


def cells(found: Mapping[str, float]) -> list[str]:
    """Distances as text."""
    return [number(key, value) for key, value in found.items()]


def number(key: str, value: float) -> str:
    """With the digits that mean something."""
    if key.endswith("kid"):
        return f"{1000 * value:.1f}"
    return f"{value:.3f}" if key in ("ssim", "lpips") else f"{value:.2f}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines, names left, figures right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


def report(path: Path, data: Path, how: Evaluation, out: Path | None) -> None:
    """Prints the figures; writes them to a JSON file."""
    if out is not None:
        if out.is_dir() or (out.parent.exists() and not out.parent.is_dir()):
            raise UserError(f"--out {out}: give a file, in a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
    figures, text = evaluate(path, data, how)
    print(text)
    if out is not None:
        write_json(out, figures)
        print(f"done: {out}", file=sys.stderr)
