"""Reading photographs: one way for training, encoding and evaluation."""

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from pyramid_ldm.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"})
MAX_PIXELS = 400_000_000  # a decompression bomb above this; the largest cameras make 150 million
BACKGROUND = (255, 255, 255)  # under transparent pixels

Image.MAX_IMAGE_PIXELS = None  # our own limit above is checked before decoding, and names the file


class UnreadableImage(Exception):
    """A file that is not a whole image; the message names it."""


@dataclass(frozen=True)
class ImageFile:
    """A photograph and what its bytes hash to."""

    path: str
    digest: str  # hex; by content, so that moving or renaming a file changes nothing


def find_images(root: Path) -> list[ImageFile]:
    """Every image file under `root`, sorted by relative path.

    Raises UserError where the folder is missing or holds no image.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give a folder of photographs")
    paths = sorted(
        p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
    if not paths:
        raise UserError(f"{root}: holds no images ({', '.join(sorted(SUFFIXES))})")
    return [ImageFile(str(path), content_digest(path)) for path in paths]


def content_digest(path: Path) -> str:
    """A hash of a file's size and its first and last 64 KiB: enough to tell photographs apart, and fast on large
    folders."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(65536))
        if size > 65536:
            file.seek(max(65536, size - 65536))
            digest.update(file.read(65536))
    return digest.hexdigest()


def folder_fingerprint(files: list[ImageFile]) -> str:
    """A hash of a set of images, whatever their names and order."""
    return hashlib.sha256("".join(sorted(file.digest for file in files)).encode()).hexdigest()[:16]


def split_held_out(files: list[ImageFile], fraction: float) -> tuple[list[ImageFile], list[ImageFile]]:
    """(training, held out): each file by its own content hash, so that adding files moves no other; the same in both
    stages. With a fraction above 0 and two files or more, at least one is held out and one is trained on."""
    threshold = int(fraction * 2**32)
    held = [file for file in files if int(file.digest[:8], 16) < threshold]
    ranked = sorted(files, key=lambda file: file.digest)
    if fraction > 0 and not held and len(files) > 1:
        held = ranked[:1]
    if len(held) == len(files):
        held = ranked[: len(files) // 2]
    chosen = {file.digest for file in held}  # copies of one photograph stay on one side
    return [file for file in files if file.digest not in chosen], [file for file in files if file.digest in chosen]


def load_image(path: str, at_least: tuple[int, int] | None = None) -> Image.Image:
    """A file as an RGB image in sRGB: EXIF rotation applied, ICC profile converted, 16 bits scaled to 8, transparent
    pixels over white.

    Args:
        at_least: (height, width) that will be needed: JPEGs may be decoded at a reduced size not below it.

    Raises:
        UnreadableImage: truncated, corrupt, not an image, or more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on odd EXIF data help nobody here
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(f"{path}: {image.width}x{image.height} pixels exceed {MAX_PIXELS}")
                if at_least is not None and image.format == "JPEG":
                    side = max(at_least)  # the image may be rotated later
                    image.draft("RGB", (side, side) if min(image.size) >= side else image.size)
                return _to_srgb(ImageOps.exif_transpose(image))
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on corrupt files
        raise UnreadableImage(f"{path}: {type(error).__name__}: {error}") from None


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8), "L")
    elif image.mode == "F":
        image = Image.fromarray(np.clip(np.rint(np.asarray(image)), 0, 255).astype(np.uint8), "L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile, or one for another mode: the values as they are
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image, size: tuple[int, int], *, zoom: float = 1.0, top: float = 0.5, left: float = 0.5
) -> Image.Image:
    """Resizes to cover `size` (height, width) times `zoom`, keeping the aspect ratio, and cuts `size` out of it.

    `top` and `left` in [0, 1] place the cut; 0.5 is the centre. One Lanczos pass.
    """
    height, width = size
    scale = max(height / image.height, width / image.width) * zoom  # target pixels per source pixel
    box_width, box_height = min(width / scale, image.width), min(height / scale, image.height)
    x, y = (image.width - box_width) * left, (image.height - box_height) * top
    if (box_width, box_height) == (width, height) == image.size:
        return image
    return image.resize(
        (width, height), Image.Resampling.LANCZOS, box=(x, y, x + box_width, y + box_height), reducing_gap=3.0
    )


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [-1, 1] -> uint8, rounded to nearest."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
