"""PDM figure 7 from the command line."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import mean

import torch

from pyramid_ldm.autoencoders.load import load_autoencoder
from pyramid_ldm.autoencoders.protocol import Autoencoder
from pyramid_ldm.data.folder import find_images
from pyramid_ldm.data.images import UnreadableImage
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.evaluate import columns
from pyramid_ldm.evaluation.metrics import psnr
from pyramid_ldm.evaluation.sheets import latents_sheet
from pyramid_ldm.nn.resample import box_low_pass
from pyramid_ldm.ownership import claim_file, keep_apart
from pyramid_ldm.pictures import read_record, write_png
from pyramid_ldm.pyramid import Pyramid, level_shapes

MEAN_IMAGES, MEASURED = 64, 8


@torch.inference_mode()
def psnr_by_level(
    autoencoder: Autoencoder, images: Iterable[torch.Tensor], filler: Pyramid
) -> list[tuple[float, float]]:
    """Decoded from the coarsest level up to each, `filler` in place of the others: mean PSNR (dB) beside what that
    level's resolution shows of the images, (3, H, W) in [-1, 1], and beside the images."""
    found: list[list[tuple[float, float]]] = [[] for _ in autoencoder.levels]
    for image in images:
        latents = autoencoder.encode(image[None]).mode()
        for i, level in enumerate(autoencoder.levels):
            kept = (z if n <= i else f.expand_as(z) for n, (z, f) in enumerate(zip(latents, filler, strict=True)))
            decoded = autoencoder.decode_tiled(tuple(kept)).float().clamp(-1, 1)
            near, whole = (
                float(psnr(decoded, seen)) for seen in (box_low_pass(image[None], level.factor), image[None])
            )
            found[i].append((near, whole))
    return [(mean(near for near, _ in pairs), mean(whole for _, whole in pairs)) for pairs in found]


@torch.inference_mode()
def latents_to_file(
    autoencoder_run: Path, data: Path, out: Path, number: int, fill: str, device: torch.device, scale: int = 1
) -> str:
    """Writes the sheet for image `number` of the folder. `fill`: "zero" or "mean" (of up to 64 images' latents).
    Returns a table of `psnr_by_level` over it and up to eight others that can be read."""
    keep_apart(out, "--out", {"AE_RUN": autoencoder_run, "--data": data})
    if out.suffix.lower() != ".png" and not out.is_dir():
        raise UserError(f"--out {out}: is written as PNG; give a name that ends in .png")
    claim_file(out, "--out", lambda path: (read_record(path) or {}).get("what") == "latents")
    autoencoder = load_autoencoder(autoencoder_run).to(device)
    files = find_images(data)
    if not 0 <= number < len(files):
        raise UserError(f"--image {number}: {data} holds images 0 to {len(files) - 1}")
    size = (autoencoder.image_size[0], autoencoder.image_size[1])

    def load(path: str) -> torch.Tensor:
        return load_crop(path, size, upscale=True).to(device)

    try:
        image = load(files[number].path)
        chosen = files[:: max(1, len(files) // MEAN_IMAGES)] if fill == "mean" else files[number : number + 1]
        parts = [autoencoder.encode(load(file.path)[None]).mode() for file in chosen]
    except UnreadableImage as error:
        raise UserError(str(error)) from None

    def measured() -> Iterator[torch.Tensor]:
        yield image
        for file in files[:: -(-len(files) // MEASURED)]:
            if file is not files[number]:
                with suppress(UnreadableImage):
                    yield load(file.path)

    means: Pyramid = tuple(torch.cat(level).mean(dim=(0, 2, 3), keepdim=True) for level in zip(*parts, strict=True))
    filler = means if fill == "mean" else tuple(torch.zeros_like(level) for level in means)
    sheet = latents_sheet(autoencoder, image, filler, scale)
    write_png(sheet, out, {"what": "latents", "image": files[number].path, "fill": fill})
    shapes = level_shapes(autoencoder.levels, list(size))
    rows = [["decoded up to", "PSNR, dB, beside what its resolution shows", "beside the image"]]
    for (_, height, width), figures in zip(shapes, psnr_by_level(autoencoder, measured(), filler), strict=True):
        rows.append([f"{height}x{width}", *(f"{figure:.2f}" for figure in figures)])
    return "\n".join(columns(rows))
