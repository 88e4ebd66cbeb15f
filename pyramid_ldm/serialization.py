"""A model on disk: `config.yaml` and `model.safetensors`. Nothing is ever unpickled."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pyramid_ldm.config.base import load_saved, save_config
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import recover_directory
from pyramid_ldm.nn.layers import fold_spectral_norm, spectral_layers

Model = TypeVar("Model", bound=nn.Module)


def save_model(directory: Path, config: Any, model: nn.Module) -> None:
    """Writes a model whose spectral norm is folded; one that still carries it is copied and folded first."""
    if spectral_layers(model):
        model = folded_copy(model)
    directory.mkdir(parents=True, exist_ok=True)
    save_config(config, directory / "config.yaml")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, directory / "model.safetensors")


def folded_copy(model: nn.Module) -> nn.Module:
    """A copy with spectral norm iterated to convergence and folded into plain weights."""
    copy = deepcopy(model)
    fold_spectral_norm(copy, iterations=100)
    return copy


def load_model(directory: Path, build: Callable[[Any], Model], schema: type) -> Model:
    """The inverse of `save_model`, strict: every weight must be there and fit."""
    weights = directory / "model.safetensors"
    for path in (directory / "config.yaml", weights):
        if not path.is_file():
            raise UserError(f"{path}: not found; the model directory is incomplete, export it again or copy it whole")
    config: Any = load_saved(schema, directory / "config.yaml")
    with torch.device("meta"):  # no random initialisation of weights that are about to be replaced
        model = build(config)
    fold_spectral_norm(model)
    try:
        model.load_state_dict(load_file(weights), strict=True, assign=True)
    except (SafetensorError, RuntimeError) as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "key(s)" in line or "mismatch" in line), lines[0]).strip()[:200]
        raise UserError(f"{weights}: does not hold the weights that config.yaml describes ({reason})") from None
    return model.eval()


def resolve_model_directory(directory: Path, command: str, marker: str = "model.safetensors") -> Path:
    """`directory` itself if it holds `marker`, else its `model/`; UserError naming `command` otherwise."""
    if not directory.exists():
        raise UserError(f"{directory}: no such directory; give a run directory that `pyramid-ldm {command}` made")
    if (directory / marker).is_file():
        return directory
    inner = directory / "model"
    recover_directory(inner)
    if not (inner / marker).is_file():
        raise UserError(f"{directory}: holds no model; `pyramid-ldm {command}` writes one at its first checkpoint")
    return inner
