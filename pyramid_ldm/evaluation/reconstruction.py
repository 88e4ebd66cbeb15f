"""Photographs through the autoencoder and back, with figures."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image

from pyramid_ldm.autoencoders.load import load_autoencoder
from pyramid_ldm.autoencoders.protocol import Autoencoder
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.data.images import UnreadableImage, to_pil
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.metrics import bicubic, psnr, ssim
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.evaluation.reference import EVERY, Choice, round_trip
from pyramid_ldm.evaluation.sheets import grid
from pyramid_ldm.files import write_text
from pyramid_ldm.ownership import claim, held, keep_apart
from pyramid_ldm.pictures import write_png
from pyramid_ldm.pyramid import latent_values

GRID_PAIRS = 16


@dataclass(frozen=True)
class Summary:
    """Means over the images; LPIPS is None without weights."""

    images: int
    psnr: float
    bicubic_psnr: float  # of the images reduced to as many values
    ssim: float
    lpips: float | None


def reconstruct_to_folder(
    autoencoder_run: Path,
    data: Path,
    out: Path,
    *,
    choice: Choice = EVERY,
    count: int | None = None,
    lpips_weights: str | None = None,
    device: torch.device,
    bf16: bool,
) -> Summary:
    """Writes NAME.png (original left, reconstruction right), grid.png and reconstructions.jsonl; prints the means.

    UserError where `out` is not ours, or lies inside what is read or around it.
    """
    keep_apart(out, "--out", {"AE_RUN": autoencoder_run, "--data": data})
    autoencoder = load_autoencoder(autoencoder_run).to(device)
    size = (autoencoder.image_size[0], autoencoder.image_size[1])
    paths = [file.path for file in choice.files(data, size)[:count]]
    perceptual = PerceptualLoss(lpips_weights, device) if lpips_weights else None
    claim(out, "reconstructions", "--out")
    with held(out):
        rows, pairs = _reconstruct(autoencoder, paths, out, choice, perceptual, device, bf16)
        if not rows:
            raise UserError(f"{data}: no image could be read")
        write_png(grid(pairs), out / "grid.png", {"what": "grid"})
        shown = [{key: value for key, value in row.items() if key != "bicubic_psnr"} for row in rows]
        write_text(out / "reconstructions.jsonl", "".join(json.dumps(row) + "\n" for row in shown))

    def average(key: str) -> float:
        return mean(row[key] for row in rows)

    lpips = None if perceptual is None else average("lpips")
    summary = Summary(len(rows), average("psnr"), average("bicubic_psnr"), average("ssim"), lpips)
    figures = (
        f"PSNR {summary.psnr:.2f} dB (bicubic at as many values {summary.bicubic_psnr:.2f} dB), SSIM {summary.ssim:.4f}"
    )
    figures += "" if lpips is None else f", LPIPS {lpips:.4f}"
    print(f"{summary.images} images, 1:{autoencoder.compression_ratio():.1f}: {figures}; pictures in {out}")
    return summary


@torch.inference_mode()
def _reconstruct(
    autoencoder: Autoencoder,
    paths: list[str],
    out: Path,
    choice: Choice,
    perceptual: PerceptualLoss | None,
    device: torch.device,
    bf16: bool,
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """(figures of each image, the first pairs)."""
    size = (autoencoder.image_size[0], autoencoder.image_size[1])
    values = latent_values(autoencoder.levels, size)
    rows: list[dict[str, Any]] = []
    pairs: list[Image.Image] = []
    bad = 0
    with Progress("reconstruct", len(paths)) as progress:
        for number, path in enumerate(progress.over(paths)):
            try:
                image = load_crop(path, size, upscale=choice.upscale)[None].to(device)
            except UnreadableImage as error:
                progress.say(f"skipped {error}")
                bad += 1
                choice.check(bad, len(paths), "reconstruct")
                continue
            decoded = round_trip(autoencoder, image, bf16=bf16)
            row = {"psnr": float(psnr(decoded, image)), "ssim": float(ssim(decoded, image))}
            if perceptual is not None:
                row["lpips"] = perceptual.in_parts(decoded, image)
            row["bicubic_psnr"] = float(psnr(bicubic(image.cpu(), values), image.cpu()))
            pair = grid([to_pil(image[0]), to_pil(decoded[0])], columns=2)
            name = f"{number:05d}-{Path(path).stem[:100]}.png"
            write_png(pair, out / name, {"what": "reconstruction", "file": path, **row})
            rows.append({"file": path, "picture": name, **row})
            if len(pairs) < GRID_PAIRS:
                pairs.append(pair)
    return rows, pairs
