"""Typed configs: values only, nothing else of the package."""

from pyramid_ldm.config.autoencoder import AutoencoderConfig, AutoencoderTraining
from pyramid_ldm.config.base import load_config, load_saved, save_config
from pyramid_ldm.config.common import LevelConfig
from pyramid_ldm.config.flow import FlowConfig, FlowTraining
from pyramid_ldm.config.schema import ConfigError

__all__ = [
    "AutoencoderConfig",
    "AutoencoderTraining",
    "ConfigError",
    "FlowConfig",
    "FlowTraining",
    "LevelConfig",
    "load_config",
    "load_saved",
    "save_config",
]
