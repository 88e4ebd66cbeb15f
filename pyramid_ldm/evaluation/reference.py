"""Real photographs as a reference: how far pictures are from them, in the features of the Inception network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
from pyramid_ldm.data.images import UnreadableImage, to_tensor
from pyramid_ldm.data.photographs import load_crop
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.frechet import Inception, Moments, frechet_distance, kernel_distance
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.pipeline import PyramidPipeline, SolverOptions

Distances = dict[str, float]  # fid, kid


@dataclass(frozen=True)
class Reference:
    """Centre crops of photographs, and their features."""

    images: list[str]  # those that could be read
    size: tuple[int, int]  # (height, width)
    features: Tensor  # (N, 2048)
    moments: Moments

    @classmethod
    def of_images(cls, paths: Sequence[str], size: tuple[int, int], inception: Inception) -> "Reference":
        """UserError where fewer than four can be read: a half needs two."""
        images, features = [], []
        for read, batch in centre_crops(paths, size, "photographs"):
            images += read
            features.append(inception(batch))
        if len(images) < 4:
            raise UserError(f"{len(images)} photographs to compare with; distances need at least four")
        return cls(images, size, torch.cat(features), Moments.of(features))

    def distances(self, features: Tensor) -> Distances:
        """Frechet and kernel distance of (N, 2048) from these images. UserError with a single one."""
        if len(features) < 2:
            raise UserError(f"{len(features)} picture to compare; distances need at least two")
        return {
            "fid": frechet_distance(Moments.of([features]), self.moments),
            "kid": kernel_distance(features, self.features),
        }

    @torch.inference_mode()
    def reconstructed(self, autoencoder: PyramidAutoencoder, inception: Inception) -> Distances:
        """Of these images through the autoencoder from themselves: what is left to a perfect flow."""
        features = []
        for _, batch in centre_crops(self.images, self.size, "reconstructions"):
            latents = autoencoder.encode(batch.to(inception.device)).mode()
            features.append(inception(autoencoder.decode_tiled(latents).clamp(-1, 1)))
        return self.distances(torch.cat(features))

    def halves(self) -> Distances:
        """Between two halves of the real images, to compare with; fewer images make FID larger."""
        a, b = self.features[::2], self.features[1::2]
        return {"fid": frechet_distance(Moments.of([a]), Moments.of([b])), "kid": kernel_distance(a, b)}


def centre_crops(paths: Sequence[str], size: tuple[int, int], what: str) -> Iterator[tuple[list[str], Tensor]]:
    """(files, (B, 3, H, W) in [-1, 1]), a few million pixels at a time; a file that cannot be read is named and left
    out."""
    height, width = size
    count = max(1, min(32, 2**22 // (height * width)))
    read: list[str] = []
    images: list[Tensor] = []
    with Progress(what, len(paths)) as progress:
        for number, path in enumerate(progress.over(paths), start=1):
            try:
                images.append(load_crop(path, size, zoom=1.0, top=0.5, left=0.5))
                read.append(path)
            except UnreadableImage as error:
                progress.say(f"skipped {error}")
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
