"""A model on disk: `config.yaml` and `model.safetensors`. Nothing is ever unpickled, and reading never writes."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyramid_ldm.config.base import load_saved, save_config
from pyramid_ldm.errors import UserError
from pyramid_ldm.nn.layers import fold_spectral_norm, spectral_layers
from pyramid_ldm.ownership import claim, read_whole

Model = TypeVar("Model", bound=nn.Module)
T = TypeVar("T")


def save_model(directory: Path, config: Any, model: nn.Module) -> None:
    """Writes a model whose spectral norm is folded; one that still carries it is copied and folded first.

    UserError where `directory` holds something that is no model of ours.
    """
    claim(directory, "model", "directory")
    if spectral_layers(model):
        model = folded_copy(model)
    save_config(config, directory / "config.yaml")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, directory / "model.safetensors")


def folded_copy(model: nn.Module) -> nn.Module:
    """A copy with spectral norm iterated to convergence and folded into plain weights."""
    copy = deepcopy(model)
    fold_spectral_norm(copy, iterations=8)
    return copy


@dataclass(frozen=True)
class Stored:
    """What `save_model` wrote, not a network yet: quickly read, so that nothing is replaced meanwhile."""

    weights: Path
    config: Any
    tensors: dict[str, Tensor]


def read_stored(directory: Path, schema: type) -> Stored:
    """Config and weights of a model directory. UserError where one is missing or damaged."""
    config, weights = directory / "config.yaml", directory / "model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise UserError(f"{path}: not found; the model directory is incomplete, export it again or copy it whole")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{weights}: damaged ({error}); export it again or copy it whole") from None
    return Stored(weights, load_saved(schema, config), tensors)


def assemble(stored: Stored, build: Callable[[Any], Model]) -> Model:
    """The network, in eval mode; strict: every weight must be there and fit."""
    with torch.device("meta"):  # no random initialisation of weights that are about to be replaced
        model = build(stored.config)
    fold_spectral_norm(model)
    try:
        model.load_state_dict(stored.tensors, strict=True, assign=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "key(s)" in line or "mismatch" in line), lines[0]).strip()[:200]
        raise UserError(f"{stored.weights}: does not hold the weights that config.yaml describes ({reason})") from None
    return model.eval()


def load_model(directory: Path, build: Callable[[Any], Model], schema: type) -> Model:
    """The inverse of `save_model`."""
    return assemble(read_stored(directory, schema), build)


def read_model(directory: Path, command: str, read: Callable[[Path], T], marker: str = "model.safetensors") -> T:
    """`read` of `directory` itself if it holds `marker`, else of its `model/`, which may be replaced meanwhile: all
    that is read belongs together; the quicker, the better. UserError naming `command` where there is no model."""
    if not directory.exists():
        raise UserError(f"{directory}: no such directory; give a run directory that `pyramid-ldm {command}` made")

    def read_inner(home: Path) -> T:
        if not (home / marker).is_file():
            raise UserError(f"{directory}: holds no model; `pyramid-ldm {command}` writes one at its first checkpoint")
        return read(home)

    return read_whole(directory if (directory / marker).is_file() else directory / "model", read_inner)
