"""What the toolkit asks of a stage one, learned or not."""

from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor

from pyramid_ldm.autoencoders.posterior import DiagonalGaussian
from pyramid_ldm.pyramid import Level, Pyramid


class Autoencoder(Protocol):
    """Images (B, 3, H, W) in [-1, 1] to latent pyramids and back."""

    levels: list[Level]  # coarse to fine

    @property
    def image_size(self) -> list[int]:
        """[H, W]."""
        ...

    @property
    def has_variance(self) -> bool:
        """Whether the posterior is more than a point."""
        ...

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Images to posteriors."""
        ...

    def decode(self, latents: Pyramid, region: tuple[int, int, int, int] | None = None) -> Tensor:
        """Latents to images, or to a region (top, left, height, width) of them."""
        ...

    def decode_tiled(self, latents: Pyramid, tile: int = 512) -> Tensor:
        """The same image without gradients, in the memory of one tile."""
        ...

    def compression_ratio(self) -> float:
        """Image values per latent value."""
        ...

    def fingerprint(self) -> str:
        """Two autoencoders with one fingerprint encode alike."""
        ...

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what `load_autoencoder` reads."""
        ...

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As any module's."""
        ...

    def eval(self) -> Self:
        """As any module's."""
        ...
