"""The demo's pictures and report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.data.folder import find_images, split_held_out
from pyramid_ldm.data.images import to_pil, to_tensor
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.demo.photographs import LARGE
from pyramid_ldm.demo.report import Chart, Curve, Section, read_curve, write_report
from pyramid_ldm.evaluation.latents import psnr_by_level
from pyramid_ldm.evaluation.metrics import bicubic, psnr
from pyramid_ldm.evaluation.sheets import comparison_grid, grid, latents_sheet
from pyramid_ldm.files import write_json
from pyramid_ldm.pictures import write_png
from pyramid_ldm.pyramid import Pyramid, latent_values

SHOWN = 16  # held-out pairs, and samples with their neighbours
# Large images are shown reduced, and in parts as they are.
SHOWN_IN_PARTS, PART = 4, 512  # how many, and pixels a side
COMPARED = 64  # pixels of height at which images are compared with each other


@dataclass(frozen=True)
class Figures:
    """What the demo measured."""

    psnr: float  # dB, held-out images through the autoencoder
    bicubic_psnr: float  # dB, the same images reduced to as many values
    ratio: float
    nearest: float  # mean absolute difference, in levels of 255, of a sample and the training image nearest to it
    held_out_nearest: float  # the same for held-out images: what "not a copy" looks like
    by_level: dict[str, float]  # dB, decoded up to each level, beside what its resolution shows


def nearest_neighbours(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """For each query (N, 3, H, W): index of the candidate of least mean absolute difference, and that difference in
    levels of 255."""
    distances = torch.cdist(queries.flatten(1), candidates.flatten(1), p=1) / queries[0].numel() * 127.5
    least, index = distances.min(dim=1)
    return index, least


@torch.inference_mode()
def make_pictures(out: Path, seconds: float) -> Figures:
    """samples.png, reconstructions.png, latents.png and report.html in `out`, from what the commands left there."""
    autoencoder = PyramidAutoencoder.from_pretrained(out / "ae").to(memory_format=torch.channels_last)
    height, width = autoencoder.image_size
    large = height * width > LARGE
    scale, columns = (0.25, 2) if large else (2.0, 8)  # of pictures of pictures
    values = latent_values(autoencoder.levels, (height, width))
    train, held_out = split_held_out(find_images(out / "photographs"), 0.05)
    shown: list[tuple[Tensor, Tensor, Tensor]] = []  # original, reconstruction, thumbnail
    figures: list[tuple[float, float]] = []
    latents: Pyramid = ()
    for file in held_out:
        image = load_crop(file.path, (height, width))[None]
        latents = autoencoder.encode(image).mode()
        decoded, reduced = autoencoder.decode_tiled(latents).clamp(-1, 1), bicubic(image, values)
        figures.append((float(psnr(decoded, image)), float(psnr(reduced, image))))
        if len(shown) < (SHOWN_IN_PARTS if large else SHOWN):
            shown.append((image[0], decoded[0], reduced[0]))

    drawn = sorted((out / "samples").glob("seed*.png"))
    samples, training, unseen = (
        torch.stack([thumbnail(path) for path in paths])
        for paths in (drawn, [file.path for file in train], [file.path for file in held_out])
    )
    index, distance = nearest_neighbours(samples, training)
    originals, decodings, _ = (torch.stack(images) for images in zip(*shown, strict=True))
    zeros = tuple(torch.zeros_like(level) for level in latents)
    levels = [seen for seen, _ in psnr_by_level(autoencoder, originals, zeros)]
    found = Figures(
        psnr=mean(ours for ours, _ in figures),
        bicubic_psnr=mean(theirs for _, theirs in figures),
        ratio=autoencoder.compression_ratio(),
        nearest=float(distance.mean()),
        held_out_nearest=float(nearest_neighbours(unseen, training)[1].mean()),
        by_level=dict(zip(autoencoder.level_names, levels, strict=True)),
    )
    save(out / "samples.png", grid([resized(Image.open(path).convert("RGB"), scale) for path in drawn], columns))
    sheet = parts_sheet(shown) if large else resized(comparison_grid(originals, decodings), scale)
    save(out / "reconstructions.png", sheet)
    save(out / "neighbours.png", resized(comparison_grid(samples[:SHOWN], training[index[:SHOWN]]), 2.0))
    save(out / "latents.png", latents_sheet(autoencoder, originals[most_varied(originals)], zeros, scale=scale))
    write_json(out / "figures.json", {"kind": "demo", **vars(found)})
    report(out, found, seconds)
    return found


def thumbnail(path: str | Path) -> Tensor:
    """An image as small as it is compared with others, (3, h, w) in [-1, 1]."""
    with Image.open(path) as image:
        size = round(image.width * COMPARED / image.height), COMPARED
        image.draft("RGB", size)
        picture = image.convert("RGB")
    return to_tensor(picture if picture.size == size else picture.resize(size, Image.Resampling.BOX))


def parts_sheet(shown: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Image.Image:
    """Of each (original, reconstruction, thumbnail), (3, H, W), the part with the most detail, pixel for pixel."""
    rows = []
    for images in shown:
        change = (images[0][:, 1:, 1:] - images[0][:, :-1, :-1]).abs().mean(dim=0)[None]
        detail = F.avg_pool2d(change, PART - 1, stride=PART // 8)[0]
        top, left = (int(place) * (PART // 8) for place in divmod(int(detail.argmax()), detail.shape[1]))
        rows += [to_pil(image[:, top : top + PART, left : left + PART]) for image in images]
    return grid(rows, columns=3)


def most_varied(images: Tensor) -> int:
    """Index of the image with the most contrast: it shows best what a level carries."""
    return int(images.flatten(1).std(dim=1).argmax())


def resized(image: Image.Image, scale: float) -> Image.Image:
    """For looking at."""
    method = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS
    return image.resize((round(image.width * scale), round(image.height * scale)), method)


def save(path: Path, image: Image.Image) -> None:
    """As PNG, in one step."""
    write_png(image, path, {"what": path.stem})


def report(out: Path, figures: Figures, seconds: float) -> None:
    """report.html: pictures, curves, figures, and what to type next."""
    ae, flow = out / "ae" / "metrics.jsonl", out / "flow" / "metrics.jsonl"
    resolutions = sorted(
        {key for line in flow.read_text().splitlines() for key in json.loads(line) if key.startswith("loss_")},
        key=lambda key: int(key.split("_")[1].split("x")[0]),
    )
    sections = [
        Section(
            "New landscapes",
            "Drawn from noise by the flow network and turned into pixels by the decoder, none chosen; "
            "further down each stands beside the training image nearest to it.",
            out / "samples.png",
        ),
        Section(
            "Reconstructions",
            "Held-out landscapes, and what the autoencoder makes of their latents: below each, or, of large ones, "
            "the parts with the most detail, pixel for pixel; at the right bicubic thumbnails of as many values.",
            out / "reconstructions.png",
            {
                "Held-out PSNR": f"{figures.psnr:.1f} dB",
                "Bicubic reduction to as many values": f"{figures.bicubic_psnr:.1f} dB",
                "Compression (image values : latent values)": f"{figures.ratio:.1f} : 1",
            },
        ),
        Section(
            "What each latent level holds",
            "Upper row: the image from only one level. Middle row: from all but one (Pyramid Diffusion Model, figure "
            "7). Lower row: from one and all coarser ones. A level that is left out is replaced by zeros. Below: how "
            "near the lower row is to what its level's resolution shows of the image.",
            out / "latents.png",
            {f"PSNR up to {name}": f"{figure:.1f} dB" for name, figure in figures.by_level.items()},
        ),
        Section(
            "Are they copies?",
            "Samples (upper rows) and, below each, the training image nearest to it, by mean absolute difference.",
            out / "neighbours.png",
            {
                "Samples to nearest training image": f"{figures.nearest:.1f} levels of 255",
                "Held-out images to nearest training image": f"{figures.held_out_nearest:.1f} levels of 255",
            },
        ),
    ]
    charts = [
        Chart("Autoencoder: L1 error", [Curve("training", read_curve(ae, "l1"))], log_scale=True),
        Chart("Autoencoder: held-out PSNR (dB)", [Curve("held out", read_curve(ae, "held_out_psnr"))]),
        Chart(
            "Flow: loss by latent level",
            [Curve(key.removeprefix("loss_"), read_curve(flow, key)) for key in resolutions],
        ),
    ]
    write_report(
        out / "report.html",
        title="pyramid_ldm: the demo",
        lead=f"Two stages trained from nothing on {np.ceil(seconds / 60):.0f} minutes of this machine.",
        sections=sections,
        charts=charts,
        next_steps=[
            (
                "Train an autoencoder on your own photographs",
                "pyramid-ldm train-ae autoencoder_configs/photographs_2k.yaml data.root=photos/",
            ),
            ("Turn them into latents", "pyramid-ldm encode runs/photographs_2k-ae --data photos/ --out latents/"),
            (
                "Train the flow network",
                "pyramid-ldm train-flow diffusion_configs/photographs_2k.yaml data.shards=latents/",
            ),
            ("Draw new images", "pyramid-ldm sample runs/photographs_2k-flow --num 16 --out samples/"),
        ],
    )
