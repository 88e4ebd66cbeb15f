"""What the finest latent and the image begin as, for both halves to add to."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyramid_ldm.nn.spectral import full_precision
from pyramid_ldm.pyramid import Level

LARGEST = 16  # pixels a side of the blocks that a linear base transforms; what a larger factor leaves is averaged


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

    Components keep their proportions: noise in any of them is worth as much in the image. (Each scaled to a deviation
    of one, they reconstruct alike, and stage two cannot draw them: docs/EXPERIMENTS.md.) All zeros until `fit_base`.

    Args:
        finest: the latent that it begins, all of its channels.
        patch: pixels a side of the decoder's last blocks; the reduced image is not finer.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, finest: Level, patch: int, *, decodes: bool) -> None:
        super().__init__()
        self.factor, self.channels = reduction(finest.factor, patch), finest.channels
        self.side = finest.factor // self.factor
        values = 3 * self.side**2
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


def reduction(factor: int, patch: int) -> int:
    """Pixels a side that are averaged before blocks are transformed, of a finest latent at `factor`."""
    return max(patch, factor // LARGEST)


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
def fit_base(
    encoder: LinearHalf, decoder: LinearHalf, images: Callable[[], Iterable[Tensor]], variance: float = 0.0
) -> None:
    """Both halves of a linear base, in closed form; deterministic.

    Args:
        images: batches (B, 3, H, W), the same at each call: it is called twice.
        variance: of noise in the components, with which what they say of a block is still the best.
    """
    count, total = 0, torch.zeros(())
    square: Tensor | None = None
    for batch in images():
        x = rows(encoder.blocks(batch))
        count, total = count + len(x), total + x.sum(dim=0)
        square = x.T @ x if square is None else square.addmm_(x.T, x)
    if square is None:
        raise ValueError("no images to fit a linear base to")
    mean = total / count
    variances, vectors = torch.linalg.eigh(square / count - mean[:, None] * mean)
    components = vectors.flip(1)[:, : encoder.channels].T
    components = components / variances.flip(0)[: encoder.channels].mean().clamp(min=1e-8).sqrt()
    encoder.weight.copy_(components[:, :, None, None])
    encoder.bias.copy_(-(components @ mean))
    inputs = 9 * encoder.channels
    normal, moments = mean.new_zeros(inputs, inputs), mean.new_zeros(inputs, len(mean))
    for batch in images():
        around = F.unfold(F.pad(encoder.of(batch), (1, 1, 1, 1), mode="replicate"), 3)
        z, y = around.transpose(1, 2).flatten(0, 1).cpu().double(), rows(encoder.blocks(batch)) - mean
        normal.addmm_(z.T, z)
        moments.addmm_(z.T, y)
    ridge = count * variance + 1e-6 * float(normal.diagonal().mean())
    solved = torch.linalg.solve(normal + ridge * torch.eye(inputs, dtype=normal.dtype), moments)  # (inputs, values)
    decoder.weight.copy_(solved.T.reshape(decoder.weight.shape))
    decoder.bias.copy_(mean)


def rows(blocks: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C), float64, which not every accelerator has."""
    return blocks.permute(0, 2, 3, 1).flatten(0, 2).cpu().double()
