"""Averages of the weights with a power-function profile (EDM2: Karras et al. 2024, section 3.1)."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pyramid_ldm.nn.layers import fold_spectral_norm

Model = TypeVar("Model", bound=nn.Module)


def exponent(width: float) -> float:
    """The power gamma whose profile has relative standard deviation `width` (EDM2, equation 126): 0.05 -> 16.97,
    0.1 -> 6.94."""
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


class PowerEma:
    """Tracks of different width, by parameter name. Buffers (spectral-norm vectors) are not averaged: an exported
    model copies them from the live one."""

    def __init__(self, model: nn.Module, widths: Sequence[float]) -> None:
        self.exponents = {f"{width:g}": exponent(width) for width in widths}
        self.tracks = {
            key: {name: p.detach().clone() for name, p in model.named_parameters()} for key in self.exponents
        }

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, images_in_step: int) -> None:
        """After a step: track <- beta * track + (1 - beta) * weights, beta = (1 - step / seen)^(gamma + 1)."""
        live = dict(model.named_parameters())
        for key, track in self.tracks.items():
            if live.keys() != track.keys():
                raise ValueError(f"EMA and model differ in {sorted(live.keys() ^ track.keys())[:3]}")
            beta = (1 - images_in_step / images_seen) ** (self.exponents[key] + 1)
            torch._foreach_lerp_(list(track.values()), [live[name].detach() for name in track], 1 - beta)

    @torch.no_grad()
    def export(self, model: Model, width: float) -> Model:
        """A copy of `model` with one track's weights, spectral norm converged and folded, in eval mode."""
        copy = deepcopy(model).eval().requires_grad_(False)
        for name, parameter in copy.named_parameters():
            parameter.copy_(self.tracks[f"{width:g}"][name])
        fold_spectral_norm(copy, iterations=8)
        return copy

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """For the checkpoint."""
        return self.tracks

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Strict: the same tracks and names."""
        if state.keys() != self.tracks.keys():
            raise ValueError(f"EMA tracks {sorted(state)} in the checkpoint, {sorted(self.tracks)} in the config")
        for key, track in self.tracks.items():
            if state[key].keys() != track.keys():
                raise ValueError(f"EMA track {key}: parameters differ")
            for name, tensor in track.items():
                tensor.copy_(state[key][name])
