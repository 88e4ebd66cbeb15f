"""PNGs that say how they were made, and that nothing but what pyramid-ldm drew is replaced by."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from pyramid_ldm.errors import UserError
from pyramid_ldm.files import write_atomic

CHUNK = "pyramid_ldm"  # of text
FAST = {"compress_level": 1, "compress_type": 3}  # zlib's run lengths: as small as its level 6 here, and faster


def write_png(image: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """A PNG with `record` as JSON in the text chunk "pyramid_ldm". UserError where there is another picture."""
    if path.exists() and not is_ours(path):
        raise UserError(
            f"{path}: exists, and does not say that pyramid-ldm drew it, or is damaged; move it away, or "
            f"give another --out"
        )
    text = PngInfo()
    text.add_text(CHUNK, json.dumps(record))
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=text, **FAST))


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_png` wrote into a picture; None where that is none, or damaged."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImageFile)
            record = json.loads(image.info[CHUNK])
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, RecursionError, Image.DecompressionBombError):
        return None
    return record if isinstance(record, dict) else None


def is_ours(path: Path) -> bool:
    """Whether `write_png` wrote it."""
    return read_record(path) is not None


def is_whole(path: Path) -> bool:
    """Whether all pixels of a picture can be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True
