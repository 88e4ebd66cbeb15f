"""The data set of stage one: photographs by position, cropped and mirrored deterministically."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyramid_ldm.data.images import ImageFile, UnreadableImage, load_image, resize_and_crop, to_tensor
from pyramid_ldm.data.order import item_at
from pyramid_ldm.errors import UserError
from pyramid_ldm.randomness import uniform


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes a training image."""

    image_size: tuple[int, int]  # (height, width)
    crop: str = "center"  # center | random
    zoom: float = 1.0
    flip: bool = True


@dataclass
class ImageBatch:
    """Images of consecutive positions."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    positions: list[int]
    files: list[str]
    unreadable: list[str]  # messages of the files that were skipped on the way

    def pin_memory(self) -> "ImageBatch":
        """For the loader's pinned transfers."""
        return ImageBatch(self.images.pin_memory(), self.positions, self.files, self.unreadable)


def load_crop(path: str, size: tuple[int, int], *, zoom: float, top: float, left: float) -> Tensor:
    """One image, (3, H, W) in [-1, 1]."""
    needed = (int(size[0] * zoom + 1), int(size[1] * zoom + 1))
    return to_tensor(resize_and_crop(load_image(path, needed), size, zoom=zoom, top=top, left=left))


class Photographs(Dataset[tuple[Tensor, int, str, list[str]]]):
    """Training images by position of the run: item p is (image, p, file, what could not be read)."""

    def __init__(self, files: list[ImageFile], preprocessing: Preprocessing, seed: int) -> None:
        self.files, self.preprocessing, self.seed = files, preprocessing, seed

    def __getitem__(self, position: int) -> tuple[Tensor, int, str, list[str]]:
        look, seed = self.preprocessing, self.seed
        zoom, top, left = 1.0, 0.5, 0.5
        if look.crop == "random":
            zoom = look.zoom ** uniform(seed, "zoom", position)
            top, left = uniform(seed, "top", position), uniform(seed, "left", position)
        unreadable: list[str] = []
        first = item_at(position, len(self.files), seed)
        for offset in range(len(self.files)):  # an unreadable file is replaced by the next one
            path = self.files[(first + offset) % len(self.files)].path
            try:
                image = load_crop(path, look.image_size, zoom=zoom, top=top, left=left)
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            if look.flip and uniform(seed, "flip", position) < 0.5:
                image = image.flip(-1)
            return image, position, path, unreadable
        raise UserError(f"none of the {len(self.files)} images can be read; the first: {unreadable[0]}")


def collate_images(items: list[tuple[Tensor, int, str, list[str]]]) -> ImageBatch:
    """Items of `Photographs` to one batch."""
    images, positions, files, unreadable = zip(*items, strict=True)
    return ImageBatch(torch.stack(images), list(positions), list(files), [m for part in unreadable for m in part])


def load_held_out(files: list[ImageFile], size: tuple[int, int], count: int) -> Tensor:
    """Up to `count` centre crops, (N, 3, H, W); unreadable files are left out."""
    images: list[Tensor] = []
    for file in files:
        if len(images) == count:
            break
        try:
            images.append(load_crop(file.path, size, zoom=1.0, top=0.5, left=0.5))
        except UnreadableImage:
            continue
    if not images:
        raise UserError(f"none of {len(files)} held-out images can be read")
    return torch.stack(images)
