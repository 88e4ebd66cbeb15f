"""Real photographs as a reference: how far pictures are from them, in the features of the Inception network."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyramid_ldm.autoencoders.protocol import Autoencoder
from pyramid_ldm.data.folder import ImageFile, scan, split_held_out, too_many_bad
from pyramid_ldm.data.images import UnreadableImage, to_tensor
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.frechet import Inception, Moments, frechet_distance, kernel_distance
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.processes.solvers import SolverOptions

Distances = dict[str, float]  # fid, kid


@dataclass(frozen=True)
class Choice:
    """Which photographs of a folder are looked at."""

    held_out: float | None = None  # only those held out at this `data.validation`; None: all
    upscale: bool = False  # also those that are smaller, enlarged
    max_bad_fraction: float = 0.01  # more that cannot be read are an error

    def files(self, folder: Path, size: tuple[int, int]) -> list[ImageFile]:
        """Those of a folder, by path; says what is left out. UserError where there is none."""
        found = scan(folder)
        files, notes = found.large_enough(size, self.upscale)
        for line in [*found.notes(), *notes]:
            print(line, file=sys.stderr)
        self.check(len(found.unreadable), len(files) + len(found.unreadable), folder)
        if self.held_out is None:
            return files
        chosen = {file.digest for file in split_held_out(files, self.held_out)[1]}
        if not chosen:
            raise UserError(f"{folder}: none of {len(files)} photographs is held out at {self.held_out:g}")
        return [file for file in files if file.digest in chosen]

    def check(self, bad: int, files: int, where: object) -> None:
        """UserError where too many files cannot be read."""
        error = too_many_bad(where, bad, files, self.max_bad_fraction, "--max-bad-fraction")
        if error is not None:
            raise error


EVERY = Choice()


@dataclass(frozen=True)
class Reference:
    """Centre crops of photographs, and their features."""

    images: list[str]  # those that could be read
    size: tuple[int, int]  # (height, width)
    features: Tensor  # (N, 2048)
    choice: Choice = EVERY

    @classmethod
    def of_images(
        cls, files: Sequence[ImageFile], size: tuple[int, int], inception: Inception, choice: Choice = EVERY
    ) -> "Reference":
        """Ordered by content, so that halves are alike. UserError where fewer than four can be read: a half needs
        two."""
        paths = [file.path for file in sorted(files, key=lambda file: file.digest)]
        images, features = [], []
        for read, batch in centre_crops(paths, size, "photographs", choice):
            images += read
            features.append(inception(batch))
        if len(images) < 4:
            raise UserError(f"{len(images)} photographs to compare with; distances need at least four")
        return cls(images, size, torch.cat(features), choice)

    def distances(self, features: Tensor) -> Distances:
        """Frechet and kernel distance of (N, 2048) from all these images, which are others. UserError with a single
        one."""
        return distances(features, self.features)

    @property
    def half(self) -> int:
        """As many photographs as each of two equal halves holds."""
        return len(self.images) // 2

    def floor(
        self, count: int, inception: Inception, autoencoder: Autoencoder | None = None, *, bf16: bool = False
    ) -> dict[str, Distances]:
        """What to hold the distances of `count` samples against, at most `half`, from the first `count` photographs:
        those of as many other photographs, as they are and through the autoencoder (all that a flow can reach)."""
        target = self.features[:count]
        found = {"photographs": distances(self.features[-count:], target)}
        if autoencoder is not None:
            crops = centre_crops(self.images[-count:], self.size, "reconstructions", self.choice)
            decoded = (round_trip(autoencoder, images.to(inception.device), bf16=bf16) for _, images in crops)
            found["reconstructions"] = distances(torch.cat([inception(images) for images in decoded]), target)
        return found


def distances(features: Tensor, target: Tensor) -> Distances:
    """Frechet and kernel distance of two sets of different images. UserError with a single one."""
    if min(len(features), len(target)) < 2:
        raise UserError("one picture to compare; distances need at least two")
    return {
        "fid": frechet_distance(Moments.of([features]), Moments.of([target])),
        "kid": kernel_distance(features, target),
    }


@torch.inference_mode()
def round_trip(autoencoder: Autoencoder, images: Tensor, *, bf16: bool = False) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] through the autoencoder, float32 in [-1, 1]."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
        decoded = autoencoder.decode_tiled(autoencoder.encode(images).mode()).float()
    if bf16 and not torch.isfinite(decoded).all():  # too large for bfloat16's rounding to survive
        return round_trip(autoencoder, images)
    return decoded.clamp(-1, 1)


def centre_crops(
    paths: Sequence[str], size: tuple[int, int], what: str, choice: Choice = EVERY
) -> Iterator[tuple[list[str], Tensor]]:
    """(files, (B, 3, H, W) in [-1, 1]), a few million pixels at a time; a file that cannot be read is named and left
    out. UserError where these are too many."""
    height, width = size
    count = max(1, min(32, 2**22 // (height * width)))
    read: list[str] = []
    images: list[Tensor] = []
    bad = 0
    with Progress(what, len(paths)) as progress:
        for number, path in enumerate(progress.over(paths), start=1):
            try:
                images.append(load_crop(path, size, upscale=choice.upscale))
                read.append(path)
            except UnreadableImage as error:
                progress.say(f"skipped {error}")
                bad += 1
                choice.check(bad, len(paths), what)
            if images and (len(images) == count or number == len(paths)):
                yield read, torch.stack(images)
                read, images = [], []


def sample_features(
    pipeline: PyramidPipeline,
    inception: Inception,
    count: int,
    seed: int,
    options: SolverOptions,
    *,
    batch_size: int = 32,
    bf16: bool = False,
) -> tuple[Tensor, float]:
    """((count, 2048), mean evaluations of the flow) of samples 0 to `count` - 1 of a seed."""
    features: list[Tensor] = []
    evaluations = 0
    with Progress("samples", count) as progress:
        for output in pipeline.stream(list(range(count)), seed, options, batch_size=batch_size, bf16=bf16):
            features.append(inception(torch.stack([to_tensor(image) for image in output.images])))
            evaluations += sum(output.image_nfe)
            progress.advance(len(output.images))
    return torch.cat(features), evaluations / count
