"""What the finest latent and the image begin as, for both halves to add to."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyramid_ldm.nn.spectral import full_precision
from pyramid_ldm.pyramid import Level, base_block

LEAST_VARIANCE = 1e-4  # that components are scaled by: images of one colour have none
RIDGE = 1e-6  # beside a component's variance of about one


class ThumbnailHalf(nn.Module):
    """Either half's: the first channels of the finest latent are a reduced image, in blocks of `side` x `side`."""

    SCALE = 2.0  # images have a deviation of about a half

    def __init__(self, finest: Level) -> None:
        super().__init__()
        self.side = 1
        while 3 * (2 * self.side) ** 2 <= finest.channels and 2 * self.side <= finest.factor:
            self.side *= 2
        self.channels, self.factor = 3 * self.side**2, finest.factor // self.side

    def of(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, channels, H / f, W / f), f of the finest latent."""
        return self.SCALE * F.pixel_unshuffle(F.avg_pool2d(image.float(), self.factor), self.side)

    def back(self, latent: Tensor) -> Tensor:
        """The finest latent (B, C, H / f, W / f) -> the reduced image, (B, 3, H / factor, W / factor)."""
        return F.pixel_shuffle(latent[:, : self.channels].float() / self.SCALE, self.side)


class LinearHalf(nn.Module):
    """Either half's: the finest latent begins as the principal components of each block of a reduced image, and the
    reduced image as what the 3x3 components around a position say of its block by least squares.

    Components keep their proportions, so that noise in any of them is worth as much in the image. What is fitted
    (`fit_base`) stays as it is while everything around it learns; all zeros before.

    Args:
        finest: the latent that it begins, all of its channels.
        patch: pixels a side of the decoder's last blocks.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, finest: Level, patch: int, *, decodes: bool) -> None:
        super().__init__()
        self.factor, self.side = base_block(finest.factor, patch)
        self.channels, values = finest.channels, 3 * self.side**2
        shape = (values, self.channels, 3, 3) if decodes else (self.channels, values, 1, 1)
        self.register_buffer("weight", torch.zeros(shape))
        self.register_buffer("bias", torch.zeros(shape[0]))

    def of(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, channels, H / f, W / f), f of the finest latent."""
        with full_precision(image.device):
            return F.conv2d(self.blocks(image), self.weight, self.bias)

    def back(self, latent: Tensor) -> Tensor:
        """The finest latent (B, C, H / f, W / f) -> the reduced image, (B, 3, H / factor, W / factor)."""
        with full_precision(latent.device):
            around = F.pad(latent.float(), (1, 1, 1, 1), mode="replicate")
            return F.pixel_shuffle(F.conv2d(around, self.weight, self.bias), self.side)

    def blocks(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> the reduced image's blocks as channels."""
        return F.pixel_unshuffle(F.avg_pool2d(image.float(), self.factor), self.side)


Base = ThumbnailHalf | LinearHalf


def build_base(kind: str, finest: Level, patch: int, *, decodes: bool) -> Base | None:
    """Of a half: "none", "thumbnail" or "linear"."""
    match kind:
        case "thumbnail":
            return ThumbnailHalf(finest)
        case "linear":
            return LinearHalf(finest, patch, decodes=decodes)
        case _:
            return None


@torch.no_grad()
def fit_base(encoder: LinearHalf, decoder: LinearHalf, images: Callable[[], Iterable[Tensor]], variance: float) -> None:
    """Both halves of a linear base, in closed form and double precision, on the CPU.

    Args:
        images: batches (B, 3, H, W), the same at each call: it is called twice. ValueError where they are not.
        variance: of noise in the components, with which what they say of a block is still the best.
    """
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for x in block_rows(encoder, images()):
        rows = x.flatten(0, 1)
        count, total, square = count + len(rows), total + rows.sum(dim=0), square + rows.T @ rows
    if not count:
        raise ValueError("no images to fit a linear base to")
    mean = total / count
    variances, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
    components = vectors.flip(1)[:, : encoder.channels]
    components /= variances.flip(0)[: encoder.channels].mean().clamp(min=LEAST_VARIANCE).sqrt()
    inputs = 9 * encoder.channels
    normal, moments = mean.new_zeros(inputs, inputs), mean.new_zeros(inputs, len(mean))
    again = 0
    for x in block_rows(encoder, images()):
        centred = x - mean
        latents = (centred @ components).permute(2, 0, 1)[None]
        around = F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3)[0].T
        again += len(around)
        normal += around.T @ around
        moments += around.T @ centred.flatten(0, 1)
    if again != count:
        raise ValueError(f"{count} blocks, then {again}: a linear base is fitted to the same images twice")
    ridge = count * (variance + RIDGE) * torch.eye(inputs, dtype=normal.dtype)
    solved = torch.linalg.solve(normal + ridge, moments)  # (inputs, values)
    encoder.weight.copy_(components.T[:, :, None, None])
    encoder.bias.copy_(-(mean @ components))
    decoder.weight.copy_(solved.T.reshape(decoder.weight.shape))
    decoder.bias.copy_(mean)


def block_rows(half: LinearHalf, images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Image by image: (rows, columns, values of a block), float64, which not every accelerator has."""
    for batch in images:
        for blocks in half.blocks(batch).cpu().double():
            yield blocks.permute(1, 2, 0)
