"""Pyramid latent diffusion: train your own model of 2K images from a folder of photographs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
    from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp
    from pyramid_ldm.pipeline import PyramidPipeline
    from pyramid_ldm.processes.rectified_flow import RectifiedFlow

__version__ = "0.1.0"
__all__ = ["PyramidAutoencoder", "PyramidNCSNpp", "PyramidPipeline", "RectifiedFlow", "__version__"]

_HOMES = {
    "PyramidAutoencoder": "pyramid_ldm.autoencoders.pyramid.autoencoder",
    "PyramidNCSNpp": "pyramid_ldm.networks.ncsnpp",
    "PyramidPipeline": "pyramid_ldm.pipeline",
    "RectifiedFlow": "pyramid_ldm.processes.rectified_flow",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `pyramid-ldm --help` answers at once.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
