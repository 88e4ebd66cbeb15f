#!/usr/bin/env python3
"""A trained stage one beside what costs nothing to make: bicubic thumbnails and a linear codec of as many values, and
JPEG of as many bytes, on photographs of 256 pixels a side and more that nothing was trained on.

    tools/large_photographs.py runs/ae --data others/ --fit photos/ --vgg vgg16.safetensors \\
        --inception inception-2015-12-05.pt --out large/

Writes table.md, and sheet.jpg: of each photograph the part of at most 448 pixels a side with the most detail, pixel for
pixel, the original first. FID and KID are of patches, for whole images are few, and Inception sees 299 pixels a side.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import baselines
import torch
import torch.nn.functional as F
from ablate import exit_code, markdown, report
from PIL import Image
from torch import Tensor

from pyramid_ldm.autoencoders.load import load_autoencoder
from pyramid_ldm.autoencoders.protocol import Autoencoder
from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.data.folder import find_images
from pyramid_ldm.data.images import normalise, to_pil, to_tensor
from pyramid_ldm.data.photographs import Photographs, Preprocessing
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.evaluate import number, reconstruction_figures
from pyramid_ldm.evaluation.frechet import Inception
from pyramid_ldm.evaluation.metrics import bicubic
from pyramid_ldm.evaluation.reference import centre_crops, round_trip
from pyramid_ldm.evaluation.sheets import grid
from pyramid_ldm.files import write_atomic
from pyramid_ldm.pyramid import latent_values
from pyramid_ldm.training.runtime import start

BYTES = 2  # of a latent value, as float16 in the cache
PATCH = 256
SHOWN, PART = 6, 448  # photographs on the sheet, pixels a side at most
FIT_CROPS = 256  # of the linear codec
Way = Callable[[Tensor], Tensor]
TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "rfid": "patch FID", "rkid": "patch KID x 1000"}


def jpeg(images: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) through JPEGs of at most `size` bytes each, of the best quality that fits; halved first, as often as
    needed, where not even the worst does."""
    decoded = []
    for image in images:
        whole, picture = to_pil(image), to_pil(image)
        while not (fitting := fit_jpeg(picture, size)):
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
        small = Image.open(io.BytesIO(fitting)).convert("RGB")
        decoded.append(to_tensor(small.resize(whole.size, Image.Resampling.BICUBIC)))
    return torch.stack(decoded)


def fit_jpeg(picture: Image.Image, size: int) -> bytes:
    """The file of the highest quality that is not larger, by bisection; nothing where there is none."""
    best, low, high = b"", 1, 96
    while low < high:
        quality = (low + high) // 2
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= size:
            best, low = file.getvalue(), quality + 1
        else:
            high = quality
    return best


def fitted(autoencoder: Autoencoder, photographs: Path) -> PyramidAutoencoder:
    """A linear codec of as many values, at the finest factor."""
    height, width = autoencoder.image_size
    values = latent_values(autoencoder.levels, (height, width))
    crops = Photographs(find_images(photographs), Preprocessing((height, width), "random"), seed=1)
    config = baselines.linear_config(values, autoencoder.levels[-1].factor, (height, width))
    return baselines.linear(config, lambda: (normalise(crops[i][0])[None] for i in range(FIT_CROPS)))


def on_cpu(way: Way) -> Way:
    """Of images wherever they are."""
    return lambda images: way(images.cpu()).to(images.device)


def patches(images: Tensor) -> Tensor:
    """(N, 3, H, W) in (M, 3, PATCH, PATCH), side by side; what is left over at the edges is cut off."""
    rows = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (N, 3, rows, columns, PATCH, PATCH)
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def detailed(image: Tensor) -> tuple[slice, slice]:
    """Where, in (3, H, W), a square of PART pixels a side, or as many as there are, has the most gradient."""
    light, side = image.mean(dim=0).cpu(), min(PART, *image.shape[1:])
    steps = light.diff(dim=0)[:, 1:].abs() + light.diff(dim=1)[1:].abs()
    found = F.avg_pool2d(steps[None, None], side - 1, stride=32)[0, 0]
    top, left = (32 * int(i) for i in torch.unravel_index(found.argmax(), found.shape))
    return slice(top, top + side), slice(left, left + side)


def compare(args: argparse.Namespace) -> None:
    """The table and the sheet."""
    autoencoder = load_autoencoder(args.run)
    height, width = autoencoder.image_size
    if min(height, width) < PATCH:
        raise UserError(f"{args.run}: is for {height}x{width}, and patches of {PATCH} pixels a side are compared")
    device = start("auto", "auto").device
    inception, perceptual = Inception(args.inception, device), PerceptualLoss(args.vgg, device)
    values = latent_values(autoencoder.levels, (height, width))
    size = BYTES * values
    codec = fitted(autoencoder, args.fit)
    ways: dict[str, Way] = {
        "trained": partial(round_trip, autoencoder.to(device)),
        "bicubic thumbnail": on_cpu(partial(bicubic, values=values)),
        "linear codec": partial(round_trip, codec.to(device)),
        f"JPEG, {size} bytes": on_cpu(partial(jpeg, size=size)),
    }
    paths = [file.path for file in find_images(args.data)]
    args.out.mkdir(parents=True, exist_ok=True)
    count, found = reconstruction_figures(
        ways,
        (images.to(device) for _, images in centre_crops(paths, (height, width), "photographs")),
        perceptual.in_parts,
        lambda images: torch.cat([inception(part) for part in patches(images).split(16)]),
    )
    lines = [[name, *(number(key, figures[key]) for key in TITLES)] for name, figures in found.items()]
    note = f"\n{count} photographs, {height}x{width}; {values} values; patches of {PATCH} pixels a side.\n"
    report(args.out / "table.md", markdown(["", *TITLES.values()], lines) + note)
    chosen = paths[:: max(1, len(paths) // SHOWN)][:SHOWN]
    picture = sheet(chosen, (height, width), list(ways.values()), device)
    write_atomic(args.out / "sheet.jpg", lambda temporary: picture.save(temporary, format="JPEG", quality=88))


@torch.inference_mode()
def sheet(paths: Sequence[str], size: tuple[int, int], ways: Sequence[Way], device: torch.device) -> Image.Image:
    """A row a photograph."""
    cells = []
    for _, images in centre_crops(paths, size, "sheet"):
        for image in images.to(device):
            rows, columns = detailed(image)
            for shown in (image, *(way(image[None])[0] for way in ways)):
                cells.append(to_pil(shown[:, rows, columns].float().clamp(-1, 1).cpu()))
    return grid(cells, columns=1 + len(ways))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="of train-ae")
    parser.add_argument("--data", type=Path, required=True, help="photographs that nothing was trained on")
    parser.add_argument("--fit", type=Path, required=True, help="photographs that the linear codec is fitted on")
    parser.add_argument("--vgg", required=True, help="VGG-16 weights, for LPIPS")
    parser.add_argument("--inception", type=Path, required=True, help="inception-2015-12-05.pt")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """See `exit_code`."""
    args = parse(words)
    return exit_code("large_photographs", lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
