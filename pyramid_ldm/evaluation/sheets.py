"""Sheets of pictures."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pyramid_ldm.autoencoders.protocol import Autoencoder
from pyramid_ldm.data.images import to_pil
from pyramid_ldm.pyramid import Pyramid

GAP = 2
PAPER = (255, 255, 255)
INK = (32, 32, 32)
SHEET_SIDE = 4096  # sheets of 2K images are shrunk to this


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Images of one size in rows, with a thin gap; about square unless `columns` is given."""
    columns = columns or max(1, math.ceil(math.sqrt(len(images) * images[0].height / images[0].width)))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), PAPER)
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + GAP), i // columns * (height + GAP)))
    if max(sheet.size) > SHEET_SIDE:
        sheet.thumbnail((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
    return sheet


def comparison_grid(originals: Tensor, reconstructions: Tensor) -> Image.Image:
    """Originals (top) over reconstructions, (N, 3, H, W) in [-1, 1], pair by pair."""
    pairs = [
        grid([to_pil(original), to_pil(reconstruction)], columns=1)
        for original, reconstruction in zip(originals, reconstructions, strict=True)
    ]
    return grid(pairs, columns=min(len(pairs), 8))


@dataclass(frozen=True)
class Contributions:
    """What each level of a batch adds, images (B, 3, H, W): PDM figure 7, and the levels one after the other."""

    whole: Tensor  # from all of them
    only: list[Tensor]  # from level i alone
    without: list[Tensor]  # from all but level i
    coarsest: list[Tensor]  # from levels 0 to i


@torch.no_grad()
def latent_contributions(autoencoder: Autoencoder, latents: Pyramid, replacement: Pyramid) -> Contributions:
    """`replacement` stands in for a level that is left out; it broadcasts over the batch."""
    filler = tuple(r.expand_as(z) for r, z in zip(replacement, latents, strict=True))

    def decode(kept: Collection[int]) -> Tensor:
        return autoencoder.decode(
            tuple(z if n in kept else f for n, (z, f) in enumerate(zip(latents, filler, strict=True)))
        )

    count = range(len(latents))
    return Contributions(
        autoencoder.decode(latents),
        [decode([i]) for i in count],
        [decode([n for n in count if n != i]) for i in count],
        [decode(range(i + 1)) for i in count],
    )


def latents_sheet(autoencoder: Autoencoder, image: Tensor, replacement: Pyramid, scale: float = 1) -> Image.Image:
    """PDM figure 7 for one image (3, H, W): the whole reconstruction at the left; row 1 from only one latent, row 2
    from all but one, row 3 from one and all coarser ones, the latent's resolution under each."""
    latents = autoencoder.encode(image[None]).mode()
    parts = latent_contributions(autoencoder, latents, replacement)
    width, height = round(image.shape[2] * scale), round(image.shape[1] * scale)
    margin, label = 6, 18
    columns = len(latents) + 1
    sheet = Image.new("RGB", (columns * (width + margin) + margin, 3 * (height + label + margin) + margin), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)

    def place(picture: Tensor, column: int, row: int, text: str) -> None:
        left, top = margin + column * (width + margin), margin + row * (height + label + margin)
        sheet.paste(to_pil(picture[0].cpu()).resize((width, height), Image.Resampling.BICUBIC), (left, top))
        draw.text((left + width / 2, top + height + 2), text, INK, font=font, anchor="ma")

    place(parts.whole, 0, 0, "all latents")
    place(image[None], 0, 1, "original")
    for i, level in enumerate(latents):
        size = f"{level.shape[2]}x{level.shape[3]}"
        place(parts.only[i], i + 1, 0, f"only {size}")
        place(parts.without[i], i + 1, 1, f"all but {size}")
        place(parts.coarsest[i], i + 1, 2, f"up to {size}")
    return sheet
