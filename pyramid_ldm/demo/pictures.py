"""The demo's landscapes, pictures and report."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.data.folder import find_images, split_held_out
from pyramid_ldm.data.images import to_tensor
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.demo.report import Chart, Curve, Section, read_curve, write_report
from pyramid_ldm.demo.scenes import render_landscape
from pyramid_ldm.evaluation.metrics import bicubic, psnr
from pyramid_ldm.evaluation.sheets import comparison_grid, grid, latents_sheet
from pyramid_ldm.files import write_atomic, write_json
from pyramid_ldm.ownership import claim
from pyramid_ldm.pictures import write_png
from pyramid_ldm.pyramid import Pyramid

SCALE = 2  # pictures of pictures are enlarged by this
SHOWN = 16  # held-out pairs, and samples with their neighbours


@dataclass(frozen=True)
class Figures:
    """What the demo measured."""

    psnr: float  # dB, held-out images through the autoencoder
    bicubic_psnr: float  # dB, the same images reduced to as many values
    ratio: float
    nearest: float  # mean absolute difference, in levels of 255, of a sample and the training image nearest to it
    held_out_nearest: float  # the same for held-out images: what "not a copy" looks like


def render_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Landscapes 0 to `count` - 1 as PNGs; those already there are kept."""
    claim(folder, "photographs", "--out")
    for index in range(count):
        path = folder / f"{index:05d}.png"
        if not path.exists():
            image = Image.fromarray(render_landscape(index, *size))
            write_atomic(path, lambda temporary, image=image: image.save(temporary, format="PNG"))  # type: ignore[misc]


def nearest_neighbours(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """For each query (N, 3, H, W): index of the candidate of least mean absolute difference, and that difference in
    levels of 255."""
    distances = torch.cdist(queries.flatten(1), candidates.flatten(1), p=1) / queries[0].numel() * 127.5
    least, index = distances.min(dim=1)
    return index, least


@torch.inference_mode()
def make_pictures(out: Path, seconds: float) -> Figures:
    """samples.png, reconstructions.png, latents.png and report.html in `out`, from what the commands left there."""
    autoencoder = PyramidAutoencoder.from_pretrained(out / "ae")
    config = autoencoder.config
    train, held_out = split_held_out(find_images(out / "photographs"), 0.05)
    size = (config.image_size[0], config.image_size[1])
    images = torch.stack([load_crop(file.path, size) for file in held_out])
    latents = autoencoder.encode(images).mode()
    decoded = autoencoder.decode(latents).clamp(-1, 1)
    values = sum(level[0].numel() for level in latents)

    pictures = [Image.open(path).convert("RGB") for path in sorted((out / "samples").glob("seed*.png"))]
    samples = torch.stack([to_tensor(picture) for picture in pictures])
    training = torch.stack([to_tensor(Image.open(file.path).convert("RGB")) for file in train])
    index, distance = nearest_neighbours(samples, training)
    figures = Figures(
        psnr=float(psnr(decoded, images).mean()),
        bicubic_psnr=float(psnr(bicubic(images, values), images).mean()),
        ratio=autoencoder.compression_ratio(),
        nearest=float(distance.mean()),
        held_out_nearest=float(nearest_neighbours(images, training)[1].mean()),
    )
    save(out / "samples.png", enlarge(grid(pictures, columns=8)))
    save(out / "reconstructions.png", enlarge(comparison_grid(images[:SHOWN], decoded[:SHOWN])))
    save(out / "neighbours.png", enlarge(comparison_grid(samples[:SHOWN], training[index[:SHOWN]])))
    means: Pyramid = tuple(level.mean(dim=(0, 2, 3), keepdim=True) for level in latents)
    save(out / "latents.png", latents_sheet(autoencoder, images[most_varied(images)], means, scale=SCALE))
    write_json(out / "figures.json", {"kind": "demo", **vars(figures)})
    report(out, figures, seconds)
    return figures


def most_varied(images: Tensor) -> int:
    """Index of the image with the most contrast: it shows best what a level carries."""
    return int(images.flatten(1).std(dim=1).argmax())


def enlarge(image: Image.Image) -> Image.Image:
    """For looking at."""
    return image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.BICUBIC)


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
            "Held-out landscapes (upper rows) and what the autoencoder makes of their latents (below each).",
            out / "reconstructions.png",
            {
                "Held-out PSNR": f"{figures.psnr:.1f} dB",
                "Bicubic reduction to as many values": f"{figures.bicubic_psnr:.1f} dB",
                "Compression (image values : latent values)": f"{figures.ratio:.1f} : 1",
            },
        ),
        Section(
            "What each latent level holds",
            "Upper row: the image from only one level. Lower row: from all but one (Pyramid Diffusion Model, figure "
            "7). A level that is left out is replaced by its mean.",
            out / "latents.png",
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
                "pyramid-ldm train-ae autoencoder_configs/scapes2k.yaml data.root=photos/",
            ),
            ("Turn them into latents", "pyramid-ldm encode runs/scapes2k-ae --data photos/ --out latents/"),
            ("Train the flow network", "pyramid-ldm train-flow diffusion_configs/scapes2k.yaml data.shards=latents/"),
            ("Draw new images", "pyramid-ldm sample runs/scapes2k-flow --num 16 --out samples/"),
        ],
    )
