"""The data set of stage one: photographs by position, cropped and mirrored deterministically."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyramid_ldm.data.batch import BadFile, Batch
from pyramid_ldm.data.folder import ImageFile
from pyramid_ldm.data.images import UnreadableImage, load_image, normalise, resize_and_crop, to_pixels
from pyramid_ldm.data.order import item_at
from pyramid_ldm.errors import UserError
from pyramid_ldm.randomness import uniform

Place = tuple[float, float, float]  # zoom, top, left


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes a training image."""

    image_size: tuple[int, int]  # (height, width)
    crop: str = "center"  # center | random
    zoom: float = 1.0
    flip: bool = True
    upscale: bool = False  # whether smaller photographs are enlarged; otherwise they count as unreadable

    def place(self, seed: int, purpose: str, *index: int) -> Place:
        """Which crop: the centre, or what (seed, purpose, index) draws."""
        if self.crop == "center":
            return 1.0, 0.5, 0.5
        drawn = (uniform(seed, f"{purpose}{name}", *index) for name in ("zoom", "top", "left"))
        zoom, top, left = drawn
        return self.zoom**zoom, top, left


def load_pixels(path: str, size: tuple[int, int], place: Place, *, upscale: bool = False) -> Tensor:
    """One crop of `size` (height, width), (3, H, W) uint8. UnreadableImage also where the photograph is smaller, unless
    `upscale`."""
    zoom, top, left = place
    image = load_image(path, (int(size[0] * zoom + 1), int(size[1] * zoom + 1)))
    if not upscale and (image.height < size[0] or image.width < size[1]):
        raise UnreadableImage(
            f"{path}: {image.height}x{image.width}, smaller than {size[0]}x{size[1]} (height x width)"
        )
    return to_pixels(resize_and_crop(image, size, zoom=zoom, top=top, left=left))


def load_crop(
    path: str, size: tuple[int, int], *, zoom: float = 1.0, top: float = 0.5, left: float = 0.5, upscale: bool = False
) -> Tensor:
    """One crop, (3, H, W) float32 in [-1, 1]."""
    return normalise(load_pixels(path, size, (zoom, top, left), upscale=upscale))


class Photographs(Dataset[tuple[Tensor, int, str, list[BadFile]]]):
    """Training images by position of the run: item p is (pixels (3, H, W) uint8, p, file, what was skipped).

    Args:
        known_bad: digests of files that are not tried again; they keep their places, so that no other file moves.
    """

    def __init__(
        self, files: Sequence[ImageFile], preprocessing: Preprocessing, seed: int, known_bad: Collection[str] = ()
    ) -> None:
        self.files, self.preprocessing, self.seed = list(files), preprocessing, seed
        self.known_bad = frozenset(known_bad)

    def __getitem__(self, position: int) -> tuple[Tensor, int, str, list[BadFile]]:
        cut, bad = self.preprocessing, list[BadFile]()
        place = cut.place(self.seed, "", position)
        first = item_at(position, len(self.files), self.seed)
        for offset in range(len(self.files)):  # an unreadable file is replaced by the next one
            file = self.files[(first + offset) % len(self.files)]
            if file.digest in self.known_bad:
                continue
            try:
                pixels = load_pixels(file.path, cut.image_size, place, upscale=cut.upscale)
            except UnreadableImage as error:
                bad.append(BadFile(file.digest, str(error), error.of_content))
                continue
            if cut.flip and uniform(self.seed, "flip", position) < 0.5:
                pixels = pixels.flip(-1)
            return pixels, position, file.path, bad
        first_fault = f"; the first: {bad[0].message}" if bad else ""
        raise UserError(f"none of the {len(self.files)} images can be read{first_fault}")


def collate_images(items: list[tuple[Tensor, int, str, list[BadFile]]]) -> Batch:
    """Items of `Photographs` to one batch."""
    pixels, positions, files, bad = zip(*items, strict=True)
    batch = torch.stack([image.permute(1, 2, 0) for image in pixels])
    return Batch(list(positions), pixels=batch, files=list(files), bad=[one for part in bad for one in part])


def crops_to_examine(
    files: Sequence[ImageFile], cut: Preprocessing, seed: int, bad: list[BadFile]
) -> Iterator[tuple[ImageFile, Tensor]]:
    """(file, (3, H, W) in [-1, 1]) of each file that can be read, cut as training cuts, always at the same place;
    others are added to `bad`."""
    for file in files:
        try:
            place = cut.place(seed, "examine ", int(file.digest[:8], 16))
            pixels = load_pixels(file.path, cut.image_size, place, upscale=cut.upscale)
        except UnreadableImage as error:
            bad.append(BadFile(file.digest, str(error), error.of_content))
            continue
        yield file, normalise(pixels)
