"""Decoded pixels of any kind to sRGB: ranges, palettes, transparency, colour profiles."""

import io
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, ImageCms

BACKGROUND = (255, 255, 255)  # under transparent pixels


class UnknownValuesError(ValueError):
    """Values whose range the file does not say."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Any mode that Pillow decodes to RGB in sRGB. The profile counts before transparency does.

    Raises UnknownValuesError where nobody can say which value is white.
    """
    colour, alpha = _split_alpha(_to_bytes(image))
    rgb = _apply_profile(colour, profile)
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, BACKGROUND), alpha)


def _to_bytes(image: Image.Image) -> Image.Image:
    """Eight bits a value, from the range that the file declares; with its transparency as a band."""
    mode, clear = image.mode, image.info.get("transparency")
    if mode == "F" or mode.startswith("I"):
        return _scaled(image)
    if mode == "1":
        return image.convert("L")
    if mode in ("P", "PA", "RGBa") or (clear is not None and mode in ("L", "RGB")):
        return image.convert("RGBA" if clear is not None or mode != "P" else "RGB")
    if mode == "La":
        return image.convert("LA")
    return image.convert("RGB") if mode in ("YCbCr", "HSV", "RGBX") else image


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of more than eight bits, or of floating point."""
    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    bits = _tag(tags, 258) or (32 if image.mode == "I" else 16)
    if image.mode == "F":
        low, high = _float_range(values, tags)
    else:
        low, high = (
            float(_tag(tags, 340) or 0),
            _tag(tags, 341) or _tag(tags, 281) or (2**bits - 1 if bits <= 16 else 0),
        )
        if high == 0:
            raise UnknownValuesError(f"whole numbers of {bits} bits, and the file does not say what white is")
        if values.size and values.min() < 0:
            raise UnknownValuesError("values below zero, and the file does not say what black is")
    if high <= low:
        raise UnknownValuesError(f"says that its values run from {low} to {high}")
    inverted = _tag(tags, 262) == 0  # white is zero; Pillow sees to it below nine bits
    clear = image.info.get("transparency")
    out = np.empty(values.shape, np.uint8)
    for rows in range(0, len(values), 256):  # a few rows at a time, in little memory
        part = np.rint((values[rows : rows + 256].astype(np.float64) - low) * (255 / (high - low))).clip(0, 255)
        out[rows : rows + 256] = 255 - part if inverted else part
    grey = Image.fromarray(out)
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _tag(tags: Any, number: int) -> Any:
    """The first value of a TIFF tag; None where there is none."""
    found = tags.get(number)
    return found[0] if isinstance(found, tuple) else found


def _float_range(values: Any, tags: Any) -> tuple[float, float]:
    """Black and white of floating-point values: as declared, or 1, 255 or 65535, the next above the largest value."""
    if not np.isfinite(values).all():
        raise UnknownValuesError("values that are not finite")
    least, largest = float(values.min()), float(values.max())
    low, high = _tag(tags, 340), _tag(tags, 341)
    if low is not None and high is not None and (low >= high or low <= least <= largest <= high):
        return float(low), float(high)
    if least < 0 or largest > 65535:
        raise UnknownValuesError(f"floating-point values from {least:g} to {largest:g}, whose range cannot be known")
    return 0.0, next(white for white in (1.0, 255.0, 65535.0) if largest <= white)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(L, RGB, CMYK or LAB, transparency)."""
    if image.mode in ("LA", "RGBA"):
        *bands, alpha = image.split()
        colour = bands[0] if len(bands) == 1 else Image.merge("RGB", bands)
        return colour, None if alpha.getextrema() == (255, 255) else alpha
    return image, None


def profile_name(profile: bytes | None) -> str | None:
    """What a colour profile calls itself; None where there is none that can be read."""
    if not profile:
        return None
    with suppress(ImageCms.PyCMSError, OSError):
        return " ".join(ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).split())[:60]
    return None


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """To RGB in sRGB; a broken profile, or one for another mode, does not count."""
    with suppress(ImageCms.PyCMSError, OSError):
        if image.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        elif profile and image.mode in ("RGB", "CMYK", "L"):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        else:
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(source), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        if converted is not None:
            return converted
    return image.convert("RGB")
