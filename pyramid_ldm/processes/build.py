"""A process by name."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pyramid_ldm.config.flow import FlowTraining
from pyramid_ldm.processes.edm import EDM
from pyramid_ldm.processes.process import Process
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.vp import VariancePreserving


def build_process(config: FlowTraining) -> Process:
    """The one that a config describes."""
    return process_from_dict({"name": config.process, **getattr(config, config.process).settings(config.scaling)})


def process_from_dict(values: Mapping[str, Any]) -> Process:
    """The inverse of `process_to_dict`. TypeError or ValueError where it is none."""
    settings = dict(values)
    match settings.pop("name", None):
        case "rectified_flow":
            return RectifiedFlow(**settings)
        case "vp":
            return VariancePreserving(**settings)
        case "edm":
            return EDM(**settings)
        case name:
            raise ValueError(f"no such process: {name}")


def process_to_dict(process: Process) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {"name": process.NAME, **asdict(process)}
