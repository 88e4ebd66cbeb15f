"""Reading one photograph: one way for training, encoding and evaluation."""

import importlib.util
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)
from torch import Tensor

from pyramid_ldm.data.colours import UnknownValuesError, profile_name, to_srgb
from pyramid_ldm.data.digests import UnreadableFileError, with_retries

HEIF = importlib.util.find_spec("pillow_heif") is not None
PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)  # fmt: skip - importing one registers what it opens
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".tif", ".tiff", ".bmp"}
    | ({".avif"} if features.check("avif") else set())
    | ({".heic", ".heif", ".hif"} if HEIF else set())
)
MAX_PIXELS = 400_000_000  # a decompression bomb above this; the largest cameras make 150 million
MAX_BYTES = 4 * 2**30  # of a file
MAX_PROFILE = 2**24  # bytes of a colour profile
ORIENTATION = 0x0112  # EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

if HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()


class UnreadableImage(Exception):
    """A file that is not a whole image, or cannot be opened; the message names it.

    `of_content`: whether the bytes are at fault, so that the file will be unreadable wherever it lies.
    """

    def __init__(self, message: str, of_content: bool = True) -> None:
        super().__init__(message, of_content)
        self.of_content = of_content

    def __str__(self) -> str:
        return str(self.args[0])


def load_image(path: str, at_least: tuple[int, int] | None = None) -> Image.Image:
    """A file as an RGB image in sRGB: upright, ICC profile converted, values scaled from their declared range,
    transparent pixels over white. The first picture of several. What is wrong with metadata does not matter.

    Args:
        at_least: (height, width) that will be needed: JPEGs may be decoded at a reduced size not below it.

    Raises:
        UnreadableImage: truncated, corrupt, not an image, of an unknown range, more than `MAX_PIXELS`; gone, or without
            permission.
        UserError: the disk fails.
    """
    return decode_image(read_bytes(path), path, at_least)


def decode_image(data: bytes, path: str, at_least: tuple[int, int] | None = None) -> Image.Image:
    """`load_image` of a file's content; `path` is what messages call it."""
    try:
        try:
            return _decode(io.BytesIO(data), None, at_least)
        except (UnreadableImage, UnknownValuesError, MemoryError):
            raise
        except Exception:  # plugins raise nearly anything
            bare, profile = without_metadata(data)
            if bare is None:
                raise
            return _decode(io.BytesIO(bare), profile, at_least)
    except (UnreadableImage, UnknownValuesError) as error:
        raise UnreadableImage(f"{path}: {error}") from None
    except Exception as error:
        raise UnreadableImage(f"{path}: {type(error).__name__}: {_one_line(error)}") from None


def read_bytes(path: str) -> bytes:
    """A whole file, of a sane size; a disk that fails is asked again (`with_retries`)."""

    def read() -> bytes:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UnreadableImage(f"{path}: more than {MAX_BYTES >> 30} GiB")
        return data

    try:
        return with_retries(Path(path), read)
    except UnreadableFileError as error:
        raise UnreadableImage(f"{path}: {error.strerror}", of_content=False) from None
    except ValueError as error:  # a name that no file can have
        raise UnreadableImage(f"{path!r}: {error}", of_content=False) from None


def image_size(path: Path) -> tuple[int, int] | None:
    """(height, width) of a file's image when upright, from its header; None where that does not tell."""
    with path.open("rb") as file:
        try:
            with _open(file) as image:
                width, height = image.size
                turned = _orientation(image, file) in (5, 6, 7, 8)
        except MemoryError:
            raise
        except Exception:
            return None
    return (width, height) if turned else (height, width)


def conversions(data: bytes) -> list[str]:
    """What `load_image` changes of a file's picture to have it upright, in eight bits and in sRGB, in a few words each;
    nothing where it is no image."""
    found, file = [], io.BytesIO(data)
    with suppress(Exception), _open(file) as image:
        layout = str(getattr(image, "tile", ""))  # how values are stored, until something is decoded
        if _orientation(image, file) in UPRIGHT:
            found.append("turned upright (EXIF)")
        if getattr(image, "n_frames", 1) > 1:
            found.append("the first of several pictures")
        clear = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
        if clear:
            found.append("transparency over white")
        if image.mode == "F" or image.mode.startswith("I") or ";16" in layout:
            found.append("more than eight bits")
        if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
            found.append("grey")
        elif image.mode in ("P", "PA", "CMYK", "LAB", "YCbCr", "HSV"):
            found.append({"P": "palette", "PA": "palette"}.get(image.mode, image.mode))
        name = profile_name(image.info.get("icc_profile"))
        if name is not None and "srgb" not in name.lower():
            found.append(f"colour profile {name}")
    return found


def _open(file: IO[bytes]) -> Image.Image:
    """As Image.open does it, but of the formats above alone and without its limit on pixels, which is a global of the
    process; ours is checked instead."""
    start = file.read(16)
    file.seek(0)
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or (accept is not None and not _accepts(accept, start)):
            continue
        image: Image.Image = factory(file, "")
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImage(f"{image.width}x{image.height} pixels exceed {MAX_PIXELS}")
        return image
    raise UnreadableImage(f"begins like no image that is read here ({', '.join(FORMATS)})")


def _accepts(accept: Any, start: bytes) -> bool:
    found = accept(start)
    return bool(found) and not isinstance(found, str)  # a string says why not


def _decode(file: IO[bytes], profile: bytes | None, at_least: tuple[int, int] | None) -> Image.Image:
    with _open(file) as image:
        if at_least is not None and image.format == "JPEG":
            side = max(at_least)  # the image may be turned later
            image.draft("RGB", (side, side) if min(image.size) >= side else image.size)
        image.load()
        profile = profile or image.info.get("icc_profile")
        turn = UPRIGHT.get(_orientation(image, None))
        found = to_srgb(image, profile)
    return found.transpose(turn) if turn is not None else found


def _orientation(image: Image.Image, file: IO[bytes] | None) -> int:
    """EXIF's, 1 to 8; 1 where there is none or it is damaged. `file`: of an image that is not to be decoded for it."""
    with suppress(Exception):
        if file is not None and image.format == "PNG" and "exif" not in image.info:  # Pillow would decode all of it
            chunks = (body for kind, body in _png_chunks(file) if kind == b"eXIf")
            exif = Image.Exif()
            exif.load(b"Exif\0\0" + next(chunks, b""))
            return int(exif.get(ORIENTATION, 1))
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def _png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(type, content) of every chunk; pixels are stepped over and come without content."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT" or length > MAX_PROFILE:
            file.seek(length + 4, io.SEEK_CUR)
            yield kind, b""
            continue
        body = file.read(length)
        file.seek(4, io.SEEK_CUR)
        yield kind, body


def without_metadata(data: bytes) -> tuple[bytes | None, bytes | None]:
    """(the same picture without what is not needed for its pixels, its colour profile); None for other formats than
    PNG and JPEG."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _bare_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _bare_jpeg(data), None
    return None, None


def _bare_png(data: bytes) -> tuple[bytes, bytes | None]:
    kept, profile, at = [data[:8]], None, 8
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + length
        if kind == b"iCCP":
            _, _, packed = data[at + 8 : end - 4].partition(b"\0")
            with suppress(zlib.error):
                profile = zlib.decompressobj().decompress(packed[1:], MAX_PROFILE) or None
        elif not kind[:1].islower() or kind in (b"tRNS", b"eXIf"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept), profile


def _bare_jpeg(data: bytes) -> bytes:
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        application = 0xE0 <= marker <= 0xEF or marker == 0xFE
        # JFIF and Adobe say how colours are stored; a profile is what its name says.
        needed = marker in (0xE0, 0xEE) or data[at + 4 : at + 15] == b"ICC_PROFILE"
        if not application or needed:
            kept.append(data[at : at + 2 + length])
        at += 2 + length
    return b"".join([*kept, data[at:]])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def resize_and_crop(
    image: Image.Image, size: tuple[int, int], *, zoom: float = 1.0, top: float = 0.5, left: float = 0.5
) -> Image.Image:
    """Resizes to cover `size` (height, width) times `zoom`, keeping the aspect ratio, and cuts `size` out of it.

    `top` and `left` in [0, 1] place the cut; 0.5 is the centre. One Lanczos pass; where nothing is to be resized, the
    image's own pixels (an odd one more at the bottom or right is left out).
    """
    height, width = size
    scale = max(height / image.height, width / image.width) * zoom  # target pixels per source pixel
    if scale == 1:
        x, y = int((image.width - width) * left), int((image.height - height) * top)
        return image if image.size == (width, height) else image.crop((x, y, x + width, y + height))
    box_width, box_height = min(width / scale, image.width), min(height / scale, image.height)
    at_x, at_y = (image.width - box_width) * left, (image.height - box_height) * top
    box = (at_x, at_y, at_x + box_width, at_y + box_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) uint8, channels last in memory."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]; shape and memory layout unchanged."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    return normalise(to_pixels(image))


def to_uint8(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [-1, 1] -> uint8, rounded to nearest."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
