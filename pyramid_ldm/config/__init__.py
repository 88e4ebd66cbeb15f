"""Typed configs: values only."""

from pyramid_ldm.config.autoencoder import AutoencoderConfig, AutoencoderTraining
from pyramid_ldm.config.base import load_config, load_saved, save_config
from pyramid_ldm.config.flow import FlowTraining, NCSNppConfig

__all__ = [
    "AutoencoderConfig",
    "AutoencoderTraining",
    "FlowTraining",
    "NCSNppConfig",
    "load_config",
    "load_saved",
    "save_config",
]
