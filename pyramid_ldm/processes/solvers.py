"""Solving dZ/dt = v(Z, t) from noise at t = eps to data at t = 1 (PDM section 4.2).

A sampler takes a velocity callable, so it is tested on fields whose solution is known. No velocity is ever asked for
at t > 1. Every evaluation is counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_ldm.errors import UserError
from pyramid_ldm.processes import rk45 as dormand_prince
from pyramid_ldm.processes.rectified_flow import Velocity
from pyramid_ldm.pyramid import Pyramid, flatten, unflatten

Progress = Callable[[int, float], None]  # (evaluations so far, t)


@dataclass(frozen=True)
class Solution:
    """Z at t = 1 and what it took."""

    latents: Pyramid
    nfe: int  # evaluations of the network
    sample_nfe: tuple[int, ...]  # those that each sample took part in


class _Counted:
    """Counts evaluations and refuses more than `max_nfe` of them; looks now and then whether values are finite
    (looking stalls a GPU until it has caught up)."""

    LOOK_EVERY = 16

    def __init__(self, velocity: Velocity, max_nfe: int, progress: Progress | None) -> None:
        self.velocity, self.max_nfe, self.progress, self.nfe = velocity, max_nfe, progress, 0

    def __call__(self, latents: Pyramid, t: Tensor, time: float) -> Pyramid:
        """`time` is the earliest of `t`, on the host."""
        if self.nfe >= self.max_nfe:
            raise UserError(
                f"stopped at t = {time:.4f} after max_nfe = {self.max_nfe} evaluations; raise --max-nfe, loosen "
                f"--rtol and --atol, --precision fp32, or --solver euler"
            )
        velocity = self.velocity(latents, t)
        if self.nfe % self.LOOK_EVERY == 0:
            require_finite(velocity, time)
        self.nfe += 1
        if self.progress is not None:
            self.progress(self.nfe, time)
        return velocity


def require_finite(values: Pyramid, time: float) -> None:
    """UserError where a velocity, or a state, is not finite."""
    if not all(bool(torch.isfinite(level).all()) for level in values):
        raise UserError(
            f"the velocity is not finite (seen at t = {time:.4f}); try --precision fp32, or train with a lower "
            f"learning rate"
        )


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
        raise UserError(f"steps is {steps}; it must be at least 1")
    counted = _Counted(velocity, max_nfe, progress)
    latents = tuple(level.float() for level in noise)
    batch = latents[0].shape[0]
    for k in range(steps):
        time = eps + k * (1 - eps) / steps
        found = counted(latents, latents[0].new_full((batch,), time), time)
        latents = tuple(torch.add(z, v.float(), alpha=1 / steps) for z, v in zip(latents, found, strict=True))
    require_finite(latents, 1.0)
    return Solution(latents, counted.nfe, (counted.nfe,) * batch)


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
    """Dormand-Prince 5(4) with adaptive steps, a step size for each sample.

    The error of a step is the *maximum* over levels of the RMS of the scaled error: no level is drowned by a larger
    one. A sample's path does not depend on the others in its batch; those that arrive first leave it. The last step
    ends exactly at t = 1.
    """
    shapes = [(level.shape[1], level.shape[2], level.shape[3]) for level in noise]
    counted = _Counted(velocity, max_nfe, progress)
    reached = eps

    def field(flat: Tensor, t: Tensor, derivative: Tensor) -> None:
        found = counted(unflatten(flat, shapes), t, reached)
        for part, level in zip(unflatten(derivative, shapes), found, strict=True):
            part.copy_(level)

    def at(time: float) -> None:
        nonlocal reached
        reached = time

    start = flatten(tuple(level.float() for level in noise))
    sizes = [math.prod(shape) for shape in shapes]
    try:
        state, counts = dormand_prince.solve(field, start, eps, 1.0, rtol=rtol, atol=atol, parts=sizes, at=at)
    except dormand_prince.StepVanishedError as error:
        raise UserError(
            f"{error} after {counted.nfe} evaluations; loosen --rtol and --atol, or use --solver euler"
        ) from None
    latents = unflatten(state, shapes)
    require_finite(latents, 1.0)
    return Solution(latents, counted.nfe, tuple(counts))


def dopri5(
    velocity: Velocity,
    noise: Pyramid,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    eps: float = 1e-3,
    max_nfe: int = 2_000,
    progress: Progress | None = None,
) -> Solution:
    """torchdiffeq's Dormand-Prince: the same method with one step size for the whole batch, to check `rk45` against.

    The error is the maximum over samples and levels; the last step ends exactly at t = 1 (the plain solver would
    evaluate beyond and interpolate back).
    """
    import torchdiffeq  # a second, with SciPy

    shapes = [(level.shape[1], level.shape[2], level.shape[3]) for level in noise]
    sizes = [math.prod(shape) for shape in shapes]
    counted = _Counted(velocity, max_nfe, progress)
    state = flatten(tuple(level.float() for level in noise))
    batch = state.shape[0]

    def field(t: Tensor, flat: Tensor) -> Tensor:
        found = counted(unflatten(flat, shapes), t.float().expand(batch), float(t))
        return flatten(tuple(level.float() for level in found))

    def norm(flat: Tensor) -> Tensor:
        # Called with the error of the whole state; torchdiffeq reshapes nothing, so the rows are samples.
        return torch.stack([part.square().mean(dim=1) for part in flat.split(sizes, dim=1)]).max().sqrt()

    time_type = torch.float32 if state.device.type == "mps" else torch.float64  # no float64 there
    # Without a first step of ours, torchdiffeq probes at an unbounded t.
    options = {"norm": norm, "step_t": torch.tensor([1.0]), "first_step": 0.01, "dtype": time_type}
    times = torch.tensor([eps, 1.0], dtype=time_type, device=state.device)
    try:
        path = torchdiffeq.odeint(field, state, times, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:
        raise UserError(
            f"the step size vanished after {counted.nfe} evaluations ({error}); loosen --rtol and --atol, or use "
            f"--solver euler"
        ) from None
    latents = unflatten(path[-1], shapes)
    require_finite(latents, 1.0)
    return Solution(latents, counted.nfe, (counted.nfe,) * batch)
