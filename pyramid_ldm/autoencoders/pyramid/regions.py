"""Which rows and columns of every resolution a region of the image depends on (exact region decoding).

A level is computed on a *window* around what is needed of it. Convolutions pad a window's artificial borders with
zeros as they do the image's own; that error travels `reach` pixels inwards, and the window is that much larger than
what is used of it, except at the image's borders, where the zeros are right. Windows have one size for all regions
of a call (one at a border is shifted inwards, not shrunk), so that regions are a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_ldm.randomness import uniform

Region = tuple[int, int, int, int]  # (top, left, height, width) in image pixels


@dataclass(frozen=True)
class Cut:
    """Crops of one size out of a batch: entry j is `x[source, :, top : top + height, left : left + width]`."""

    height: int
    width: int
    places: tuple[tuple[int, int, int], ...]  # (source, top, left) an entry

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (entries, C, height, width)."""
        _, top, left = self.places[0]
        if self.places == tuple((source, top, left) for source in range(x.shape[0])):
            return x[:, :, top : top + self.height, left : left + self.width]
        return torch.cat([x[s : s + 1, :, t : t + self.height, c : c + self.width] for s, t, c in self.places])


@dataclass(frozen=True)
class Step:
    """How one level is entered when only windows of it are computed."""

    below: Cut  # of the next coarser level's output: what the way up reads
    above: Cut  # of that, up-sampled: this level's window
    latent: Cut  # this level's window of a whole latent


@dataclass(frozen=True)
class Regions:
    """Equally large parts of a batch's images: entry j is at `corners[j]` = (image, top, left)."""

    height: int
    width: int
    corners: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, region: Region, batch: int) -> "Regions":
        """The same region of every image."""
        top, left, height, width = region
        return cls(height, width, tuple((image, top, left) for image in range(batch)))

    @classmethod
    def draw(cls, count: int, side: int, image_size: Sequence[int], seed: int, positions: Sequence[int]) -> "Regions":
        """`count` squares of `side` pixels (or the image's, if smaller) in each image, from (seed, its position).

        They are drawn half a side beyond the borders and shifted inwards, or the corners would hardly be seen.
        """
        height, width = min(side, image_size[0]), min(side, image_size[1])

        def place(axis: str, extent: int, whole: int, position: int, k: int) -> int:
            low, high = -(extent // 2), whole - extent + extent // 2
            drawn = low + int(uniform(seed, f"region {axis}", position, k) * (high - low + 1))
            return min(max(drawn, 0), whole - extent)

        corners = tuple(
            (image, place("top", height, image_size[0], position, k), place("left", width, image_size[1], position, k))
            for image, position in enumerate(positions)
            for k in range(count)
        )
        return cls(height, width, corners)

    def cut(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (entries, C, height, width)."""
        return Cut(self.height, self.width, self.corners)(images)

    def check(self, batch: int, height: int, width: int) -> None:
        """ValueError where an entry does not lie inside its image."""
        for image, top, left in self.corners:
            inside = 0 <= top <= height - self.height and 0 <= left <= width - self.width and 0 <= image < batch
            if not inside or min(self.height, self.width) < 1:
                raise ValueError(
                    f"region (top {top}, left {left}, height {self.height}, width {self.width}) of image {image} "
                    f"does not lie inside {batch} image(s) of {height}x{width}"
                )


@dataclass(frozen=True)
class Window:
    """Equally large parts of one resolution, a (top, left) each."""

    height: int
    width: int
    corners: tuple[tuple[int, int], ...]

    def widened(self, reach: int, size: tuple[int, int]) -> "Window":
        """`reach` larger on every side, and shifted to lie inside `size`."""
        height, width = min(size[0], self.height + 2 * reach), min(size[1], self.width + 2 * reach)
        return Window(
            height,
            width,
            tuple(
                (min(max(top - reach, 0), size[0] - height), min(max(left - reach, 0), size[1] - width))
                for top, left in self.corners
            ),
        )

    def below(self, size: tuple[int, int], margin: int = 0) -> "Window":
        """What up-sampling by two and a 3x3 convolution read, on the coarser grid of `size`: pixel a of the finer
        lies over a // 2, and its neighbours may lie over the next one; `margin` further for interpolation."""
        corners = tuple(((top - 1) // 2, (left - 1) // 2) for top, left in self.corners)
        return Window(self.height // 2 + 2, self.width // 2 + 2, corners).widened(margin, size)

    def cut(self, arrays: Sequence[int], origins: Sequence[tuple[int, int]]) -> Cut:
        """The cut that takes entry j out of `arrays[j]`, which begins at `origins[j]`."""
        places = zip(arrays, self.corners, origins, strict=True)
        return Cut(self.height, self.width, tuple((array, top - y, left - x) for array, (top, left), (y, x) in places))


def plan(
    regions: Regions, sizes: Sequence[tuple[int, int]], reaches: Sequence[int], margin: int = 0
) -> tuple[list[Step], Cut]:
    """Windows for the finer levels of a decoder, which are computed in part; the level before them is whole.

    Args:
        regions: what is wanted.
        sizes: (height, width) of these levels, coarse to fine; the last is the image. None: all of it is whole.
        reaches: how many pixels away the output of each level depends on its input.
        margin: how many pixels of the coarser level up-sampling reads beside the one that it lies over: 0 for nearest.

    Returns:
        A step a level, and the cut from the finest window to the regions.
    """
    wanted = Window(regions.height, regions.width, tuple((top, left) for _, top, left in regions.corners))
    computed, needed = [], []  # a level: its window; what that reads of the coarser level's output
    inner = wanted
    for size, reach in zip(reversed(sizes), reversed(reaches), strict=True):
        window = inner.widened(reach, size)
        inner = window.below((size[0] // 2, size[1] // 2), margin)
        computed.append(window)
        needed.append(inner)

    sources = [image for image, _, _ in regions.corners]
    entries = list(range(len(sources)))
    arrays, origins = sources, [(0, 0)] * len(sources)  # of what is cut next: whole images, then the window before
    steps = []
    for window, need in zip(reversed(computed), reversed(needed), strict=True):
        twice = [(2 * top, 2 * left) for top, left in need.corners]
        below, above = need.cut(arrays, origins), window.cut(entries, twice)
        steps.append(Step(below, above, window.cut(sources, [(0, 0)] * len(sources))))
        arrays, origins = entries, list(window.corners)
    return steps, wanted.cut(arrays, origins)
