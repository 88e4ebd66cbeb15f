"""Solving dZ/dt = v(Z, t) from noise at t = eps to data at t = 1 (PDM section 4.2).

A sampler takes a velocity callable, so it is tested on fields whose solution is known. No velocity is ever asked for
at t > 1. Every evaluation is counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchdiffeq
from torch import Tensor

from pyramid_ldm.errors import UserError
from pyramid_ldm.flow.rectified_flow import Velocity
from pyramid_ldm.pyramid import Pyramid, flatten, unflatten

Progress = Callable[[int, float], None]  # (evaluations so far, t)


class SamplerError(UserError):
    """The solve cannot go on; the message says why and what to try."""


@dataclass(frozen=True)
class Solution:
    """Z at t = 1 and the number of velocity evaluations it took."""

    latents: Pyramid
    nfe: int


class _Counted:
    """Counts evaluations, refuses what is not finite and more than `max_nfe` of them."""

    def __init__(self, velocity: Velocity, max_nfe: int, progress: Progress | None) -> None:
        self.velocity, self.max_nfe, self.progress, self.nfe = velocity, max_nfe, progress, 0

    def __call__(self, latents: Pyramid, t: Tensor) -> Pyramid:
        if self.nfe >= self.max_nfe:
            raise SamplerError(
                f"stopped at t = {float(t[0]):.4f} after max_nfe = {self.max_nfe} evaluations; raise --max-nfe, loosen "
                f"--rtol and --atol, --precision fp32, or --solver euler"
            )
        self.nfe += 1
        velocity = self.velocity(latents, t)
        if not all(bool(torch.isfinite(level).all()) for level in velocity):
            raise SamplerError(
                f"the velocity at t = {float(t[0]):.4f} is not finite; try --precision fp32, or train with a lower "
                f"learning rate"
            )
        if self.progress is not None:
            self.progress(self.nfe, float(t[0]))
        return velocity


def euler(
    velocity: Velocity,
    noise: Pyramid,
    *,
    steps: int = 200,
    eps: float = 1e-3,
    max_nfe: int = 100_000,
    progress: Progress | None = None,
) -> Solution:
    """`steps` uniform Euler steps: evaluated at t_k = eps + k (1 - eps) / N with step 1 / N, as the rectified-flow
    reference does (stepping (1 - eps) / N instead would leave 0.1% of the noise in)."""
    if steps < 1:
        raise SamplerError(f"steps is {steps}; it must be at least 1")
    counted = _Counted(velocity, max_nfe, progress)
    latents = tuple(level.float() for level in noise)
    batch = latents[0].shape[0]
    for k in range(steps):
        t = latents[0].new_full((batch,), eps + k * (1 - eps) / steps)
        latents = tuple(z + v.float() / steps for z, v in zip(latents, counted(latents, t), strict=True))
    return Solution(latents, counted.nfe)


def rk45(
    velocity: Velocity,
    noise: Pyramid,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    eps: float = 1e-3,
    max_nfe: int = 2_000,
    progress: Progress | None = None,
) -> Solution:
    """Dormand-Prince 5(4) with adaptive steps (torchdiffeq's dopri5).

    The error of a step is the *maximum* over samples and levels of the RMS of the scaled error: no level is drowned
    by a larger one, and a sample is solved at least as accurately in a batch as alone. A step ends exactly at t = 1:
    the plain solver would evaluate beyond and interpolate back.
    """
    shapes = [(level.shape[1], level.shape[2], level.shape[3]) for level in noise]
    counted = _Counted(velocity, max_nfe, progress)
    state = flatten(tuple(level.float() for level in noise))
    batch = state.shape[0]

    def field(t: Tensor, flat: Tensor) -> Tensor:
        v = counted(unflatten(flat, shapes), t.float().expand(batch))
        return flatten(tuple(level.float() for level in v))

    sizes = [math.prod(shape) for shape in shapes]

    def norm(flat: Tensor) -> Tensor:
        # Called with the error of the whole state; torchdiffeq reshapes nothing, so the rows are samples.
        return torch.stack([part.square().mean(dim=1) for part in flat.split(sizes, dim=1)]).max().sqrt()

    # Without a first step of ours, torchdiffeq probes at an unbounded t.
    options = {"norm": norm, "step_t": torch.tensor([1.0]), "first_step": 0.01}
    if state.device.type == "mps":  # no float64 there
        options["dtype"] = torch.float32
    times = torch.tensor([eps, 1.0], dtype=torch.float32 if state.device.type == "mps" else torch.float64)
    try:
        path = torchdiffeq.odeint(
            field, state, times.to(state.device), rtol=rtol, atol=atol, method="dopri5", options=options
        )
    except AssertionError as error:
        raise SamplerError(
            f"the step size vanished after {counted.nfe} evaluations ({error}); loosen --rtol and --atol, or use "
            f"--solver euler"
        ) from None
    return Solution(unflatten(path[-1], shapes), counted.nfe)
