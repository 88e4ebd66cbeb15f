"""Photographs through the autoencoder and back, with figures."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoder.perceptual import PerceptualLoss
from pyramid_ldm.data.images import UnreadableImage, find_images, split_held_out, to_pil
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.figures import grid
from pyramid_ldm.evaluation.metrics import bicubic, psnr, ssim
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.files import write_atomic, write_text
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


@torch.inference_mode()
def reconstruct_to_folder(
    autoencoder_run: Path,
    data: Path,
    out: Path,
    *,
    count: int | None = None,
    held_out: float | None = None,
    lpips_weights: str | None = None,
    device: torch.device,
    bf16: bool,
) -> Summary:
    """Writes NAME.png (original left, reconstruction right), grid.png and reconstructions.jsonl; prints the means."""
    autoencoder = PyramidAutoencoder.from_pretrained(autoencoder_run).to(device)
    files = find_images(data)
    if held_out is not None:
        files = split_held_out(files, held_out)[1]
    perceptual = PerceptualLoss(lpips_weights, device) if lpips_weights else None
    size = (autoencoder.config.image_size[0], autoencoder.config.image_size[1])
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    values: list[tuple[float, float, float, float]] = []
    numbers = latent_values(autoencoder.levels, size)
    pairs: list[Image.Image] = []
    files = files[:count]
    with Progress("reconstruct", len(files)) as progress:
        for number, file in enumerate(progress.over(files)):
            try:
                image = load_crop(file.path, size, zoom=1.0, top=0.5, left=0.5)[None].to(device)
            except UnreadableImage as error:
                progress.say(f"skipped {error}")
                continue
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                decoded = autoencoder.decode(autoencoder.encode(image).mode()).float().clamp(-1, 1)
            lpips = float("nan") if perceptual is None else float(perceptual(decoded, image))
            thumbnail = float(psnr(bicubic(image.cpu(), numbers), image.cpu()))
            values.append((float(psnr(decoded, image)), float(ssim(decoded, image)), lpips, thumbnail))
            pair = grid([to_pil(image[0]), to_pil(decoded[0])], columns=2)
            name = f"{number:05d}-{Path(file.path).stem}.png"
            write_atomic(out / name, lambda temporary, pair=pair: pair.save(temporary, format="PNG"))  # type: ignore[misc]
            row = {"file": file.path, "picture": name, "psnr": values[-1][0], "ssim": values[-1][1]}
            rows.append(row | ({} if perceptual is None else {"lpips": lpips}))
            if len(pairs) < GRID_PAIRS:
                pairs.append(pair)
    if not rows:
        raise UserError(f"{data}: no image could be read")
    sheet = grid(pairs)
    write_atomic(out / "grid.png", lambda temporary: sheet.save(temporary, format="PNG"))
    write_text(out / "reconstructions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    means = torch.tensor(values).mean(dim=0).tolist()
    summary = Summary(len(rows), means[0], means[3], means[1], None if perceptual is None else means[2])
    figures = (
        f"PSNR {summary.psnr:.2f} dB (bicubic at as many values {summary.bicubic_psnr:.2f} dB), SSIM {summary.ssim:.4f}"
    )
    figures += "" if summary.lpips is None else f", LPIPS {summary.lpips:.4f}"
    print(f"{summary.images} images, 1:{autoencoder.compression_ratio():.1f}: {figures}; pictures in {out}")
    return summary
