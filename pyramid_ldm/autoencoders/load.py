"""A stage one by where it lies."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from pyramid_ldm.autoencoders.pixels import Pixels
from pyramid_ldm.autoencoders.protocol import Autoencoder
from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.wavelet import Wavelet
from pyramid_ldm.config.autoencoder import AutoencoderConfig, AutoencoderTraining, ImageDataConfig
from pyramid_ldm.config.base import load_config, load_saved
from pyramid_ldm.config.fixed import FIXED, FixedConfig, PixelsConfig, WaveletConfig, kind_of
from pyramid_ldm.errors import UserError
from pyramid_ldm.serialization import Stored, assemble, read_model, read_stored

Build = Callable[[Stored], Autoencoder]


def load_autoencoder(place: Path, build: Build | None = None) -> Autoencoder:
    """A run or a model directory of stage one, or a config of one without parameters; in eval mode, on the CPU.

    Args:
        build: the network of what is stored, if it is not the toolkit's own, to be compared.

    Raises UserError where it is neither, or something is missing or does not fit.
    """
    if not place.is_file():
        return (build or build_autoencoder)(read_model(place, "train-ae", read_autoencoder))
    kind = kind_of(place)
    if kind not in FIXED:
        raise UserError(
            f"{place}: describes no stage one without parameters (kind: pixels or wavelet); train it, and give its run"
        )
    return build_fixed(load_config(FIXED[kind], place))


def read_autoencoder(directory: Path) -> Stored:
    """What `save_pretrained` of any stage one wrote."""
    config = directory / "config.yaml"
    kind = kind_of(config) if config.is_file() else None
    return read_stored(directory, FIXED.get(kind or "", AutoencoderConfig))


def trained_on(run: Path) -> ImageDataConfig | None:
    """`data` of an autoencoder run; None for a model directory that was moved away from its run."""
    config = run / "config.yaml"
    if config.is_file() and (run / "checkpoints").is_dir():
        return load_saved(AutoencoderTraining, config).data
    return None


def build_autoencoder(stored: Stored) -> Autoencoder:
    """The network that belongs to it."""
    if isinstance(stored.config, AutoencoderConfig):
        return assemble(stored, PyramidAutoencoder)
    return cast(Autoencoder, assemble(stored, build_fixed))


def build_fixed(config: FixedConfig) -> Pixels | Wavelet:
    """By the kind of config."""
    match config:
        case PixelsConfig():
            return Pixels(config).eval()
        case WaveletConfig():
            return Wavelet(config).eval()
