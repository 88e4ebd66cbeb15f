"""What a trained autoencoder, a flow, or a folder of pictures is worth beside real photographs, in figures."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pyramid_ldm.autoencoders.load import load_autoencoder
from pyramid_ldm.autoencoders.protocol import Autoencoder
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.config.fixed import FIXED, kind_of
from pyramid_ldm.data.folder import ImageFile, list_images
from pyramid_ldm.data.images import image_size
from pyramid_ldm.data.shards import INDEX
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.frechet import Inception, Moments, frechet_distance, kernel_distance
from pyramid_ldm.evaluation.metrics import bicubic, periodic_error, psnr, ssim
from pyramid_ldm.evaluation.reference import (
    EVERY,
    Choice,
    Reference,
    centre_crops,
    distances,
    round_trip,
    sample_features,
)
from pyramid_ldm.files import read_lines, sha256, write_json
from pyramid_ldm.ownership import claim_file, keep_apart
from pyramid_ldm.pictures import read_record
from pyramid_ldm.pipeline import MANIFEST, PyramidPipeline
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.pyramid import latent_values
from pyramid_ldm.sample import OWN, SAMPLES

Scores = dict[str, float]  # psnr, ssim, lpips; with Inception also rfid, rkid
Metric = Callable[[Tensor, Tensor], Tensor | float]  # LPIPS of (1, 3, H, W) and its target
INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
FEW = 100  # photographs
KIND = "evaluation"  # of a JSON file


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate: where to compute and what with."""

    device: torch.device
    bf16: bool
    inception: Path | None = None
    lpips: str | None = None  # VGG-16's weights, for an autoencoder
    choice: Choice = EVERY  # which photographs
    count: int | None = None  # photographs for an autoencoder, samples of a flow, pictures of a folder
    seed: int = 0  # of samples
    options: SolverOptions = field(default_factory=SolverOptions)
    batch_size: int = 32  # of samples

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
            "held_out": self.choice.held_out, "precision": "bf16" if self.bf16 else "fp32", "inception": inception,
            "lpips": self.lpips,
        }  # fmt: skip


def evaluate(path: Path, data: Path, settings: Evaluation) -> tuple[dict[str, Any], str]:
    """Scores of `path`, a run or model of either stage, or a folder of pictures, beside the photographs of `data`; and
    the same as text. UserError where `path` is none of these."""
    homes = (path, path / "model")
    if any((home / MANIFEST).is_file() for home in homes):
        stage = evaluate_flow
    elif any((home / "model.safetensors").is_file() for home in homes) or (path.is_file() and kind_of(path) in FIXED):
        stage = evaluate_autoencoder
    elif any((path / name).exists() for name in ("config.yaml", "state.pt", INDEX)) or not path.is_dir():
        raise UserError(f"{path}: is no run that has saved a model, and no folder of pictures")
    else:
        stage = evaluate_pictures
    figures, text = stage(path, data, settings)
    if settings.inception is not None and figures["photographs"] < FEW:
        text += f"\nWith fewer than {FEW} photographs, FID and KID say little."
    return {"kind": KIND, "of": str(path), "data": str(data)} | figures | settings.record(), text


def photographs(path: Path, data: Path, size: tuple[int, int], settings: Evaluation) -> list[ImageFile]:
    """Those to compare with; says so."""
    files = settings.choice.files(data, size)
    share = "" if settings.choice.held_out is None else f" held out at {settings.choice.held_out:g}"
    print(f"evaluate: {path} beside {len(files)} photographs of {data}{share}; {settings.device}", file=sys.stderr)
    return files


def evaluate_autoencoder(path: Path, data: Path, settings: Evaluation) -> tuple[dict[str, Any], str]:
    """PSNR, SSIM, periodic error, LPIPS, rFID and rKID of centre crops reconstructed, and of thumbnails."""
    autoencoder = load_autoencoder(path).to(settings.device)
    height, width = autoencoder.image_size
    files = photographs(path, data, (height, width), settings)
    inception = settings.network() if settings.inception else None
    perceptual = PerceptualLoss(settings.lpips, settings.device).in_parts if settings.lpips else None
    values = latent_values(autoencoder.levels, (height, width))
    paths = [file.path for file in files[: settings.count]]
    crops = centre_crops(paths, (height, width), "photographs", settings.choice)
    ways = {
        "reconstructed": lambda images: round_trip(autoencoder, images, bf16=settings.bf16),
        "bicubic": lambda images: bicubic(images.cpu(), values).to(images.device),
    }
    count, found = reconstruction_figures(
        ways, (images.to(settings.device) for _, images in crops), perceptual, inception
    )
    figures = {"what": "autoencoder", "photographs": count, "size": [height, width], "values": values} | found
    titles = {
        "psnr": "PSNR, dB", "ssim": "SSIM", "periodic": "periodic error", "lpips": "LPIPS", "rfid": "rFID",
        "rkid": "rKID x 1000",
    }  # fmt: skip
    rows = [["", *(titles[key] for key in found["bicubic"])]]
    rows += [[name, *(number(key, value) for key, value in found[name].items())] for name in ways]
    ratio = autoencoder.compression_ratio()
    head = f"{count} photographs, {height}x{width}, and what is left of them after {values} values (1:{ratio:.1f})"
    return figures, "\n".join([head, *columns(rows)])


def evaluate_flow(path: Path, data: Path, settings: Evaluation) -> tuple[dict[str, Any], str]:
    """FID and KID of samples; and of as many photographs, as they are and through the autoencoder."""
    inception = settings.network()
    pipeline = PyramidPipeline.from_pretrained(path).to(settings.device)
    height, width = pipeline.autoencoder.image_size
    files = photographs(path, data, (height, width), settings)
    reference = Reference.of_images(files, (height, width), inception, settings.choice)
    features, evaluations = sample_features(
        pipeline, inception, settings.count or len(reference.images), settings.seed, settings.options,
        batch_size=settings.batch_size, bf16=settings.bf16,
    )  # fmt: skip
    solver = settings.options.describe()
    figures, lines = compare(features, reference, inception, settings, pipeline.autoencoder)
    figures |= {
        "what": "flow", "checkpoint": pipeline.checkpoint, "seed": settings.seed,
        "solver": settings.options.record(settings.bf16), "nfe": evaluations,
    }  # fmt: skip
    head = f"samples of {path}, seed {settings.seed}, {solver}, {evaluations:.0f} evaluations an image"
    return figures, "\n".join([head, *lines])


def evaluate_pictures(path: Path, data: Path, settings: Evaluation) -> tuple[dict[str, Any], str]:
    """The same of a folder of pictures, for example of `pyramid-ldm sample`; photographs are cut to their size."""
    inception = settings.network()
    pictures = pictures_of(path)[: settings.count]
    size = size_of(pictures, path)
    files = photographs(path, data, size, settings)
    features = [inception(batch) for _, batch in centre_crops(pictures, size, "pictures", settings.choice)]
    if not features:
        raise UserError(f"{path}: no picture could be read")
    reference = Reference.of_images(files, size, inception, settings.choice)
    figures, lines = compare(torch.cat(features), reference, inception, settings)
    return {"what": "pictures"} | figures, "\n".join([f"pictures of {path}", *lines])


def pictures_of(folder: Path) -> list[str]:
    """What `sample` drew there, without its grid; of another folder, every image. UserError where pictures of several
    checkpoints, or drawn in several ways, are mixed."""
    if (folder / SAMPLES).is_file():
        named = dict.fromkeys(str(line.get("file")) for line in read_lines(folder / SAMPLES) if line.get("file"))
        pictures = [str(folder / name) for name in named]
        if not pictures:
            raise UserError(f"{folder / SAMPLES}: names no picture; run `pyramid-ldm sample` again")
    else:
        pictures = list_images(folder).files
    refuse_mixtures(pictures, folder)
    return pictures


def refuse_mixtures(pictures: Sequence[str], folder: Path) -> None:
    """UserError where what the pictures say of themselves differs in more than seed, index and time."""
    first: tuple[str, dict[str, Any]] | None = None
    for path in pictures:
        record = read_record(Path(path))
        if record is None or "seed" not in record:
            continue
        settings = {key: value for key, value in record.items() if key not in OWN}
        if first is None:
            first = path, settings
        for key in [*first[1], *settings]:
            if first[1].get(key) != settings.get(key):
                raise UserError(
                    f"{folder}: pictures of different origin: {Path(first[0]).name} has {key} = {first[1].get(key)}, "
                    f"{Path(path).name} has {settings.get(key)}; give those of one checkpoint and solver in a folder "
                    f"of their own"
                )


def size_of(pictures: Sequence[str], folder: Path) -> tuple[int, int]:
    """(height, width) of all of them, upright. UserError where they differ."""
    sizes: dict[tuple[int, int], str] = {}
    for path in pictures:
        with suppress(OSError):  # named when it is read
            size = image_size(Path(path))
            if size is not None:
                sizes.setdefault(size, path)
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
    settings: Evaluation,
    autoencoder: Autoencoder | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Distances of all samples from all photographs, and of equal numbers of both; as figures and as lines."""
    whole = reference.distances(features)
    count = min(reference.half, len(features))
    equal = {"samples": distances(features[:count], reference.features[:count])}
    equal |= reference.floor(count, inception, autoencoder, bf16=settings.bf16)
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
) -> tuple[int, dict[str, Scores]]:
    """(images, means over them of each way to reconstruct); with the Inception network also the distances of all
    reconstructions from all originals. UserError without images.

    Args:
        batches: (B, 3, H, W) in [-1, 1], where the ways, `perceptual` and `inception` want them.
        real: features of all of them, where they are known already.
    """
    rows: dict[str, list[Scores]] = {name: [] for name in ways}
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


def nearness(images: Tensor, targets: Tensor, perceptual: Metric | None) -> list[Scores]:
    """PSNR, SSIM, LPIPS and periodic error of each."""
    found = []
    for image, target in zip(images.split(1), targets.split(1), strict=True):
        figures = {
            "psnr": float(psnr(image, target)), "ssim": float(ssim(image, target)),
            "periodic": float(periodic_error(image, target)),
        }  # fmt: skip
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


def report(path: Path, data: Path, settings: Evaluation, out: Path | None) -> None:
    """Prints the figures; writes them to a JSON file."""
    if out is not None:
        keep_apart(out, "--out", {"RUN": path, "--data": data})
        claim_file(out, "--out", lambda found: read_kind(found) == KIND)
    figures, text = evaluate(path, data, settings)
    print(text)
    if out is not None:
        write_json(out, figures)
        print(f"done: {out}", file=sys.stderr)


def read_kind(path: Path) -> Any:
    """What a JSON file says it is; None where it says nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("kind") if isinstance(found, dict) else None
