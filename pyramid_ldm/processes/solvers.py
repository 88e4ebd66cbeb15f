"""Solving a process from noise to data, on what a network predicts.

A solver takes `predict(noisy, t, told)`, so that it is tested on predictions whose solution is known. Those of fixed
steps stand on `process.grid`, at one host time for the whole batch; those of adaptive steps follow dz/dt. Every
evaluation is counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyramid_ldm.errors import UserError
from pyramid_ldm.processes import rk45 as dormand_prince
from pyramid_ldm.processes.prediction import Prediction
from pyramid_ldm.processes.process import SPACINGS, Process
from pyramid_ldm.processes.steps import Draw, Walk, abm2, ancestral, dpmpp_2m, first_order, heun, on_host, times
from pyramid_ldm.pyramid import Pyramid, flatten, unflatten

Predict = Callable[[Pyramid, Tensor, Tensor], Prediction]  # (noisy, t, the t that the network is told)
Progress = Callable[[int, float], None]  # (evaluations so far, t)

FIXED = ("euler", "ddim", "ancestral", "heun", "dpmpp_2m", "abm2")
ADAPTIVE = ("rk45", "dopri5")
SECOND_ORDER = ("heun", "dpmpp_2m", "abm2")
SOLVERS = (*ADAPTIVE, *FIXED)


@dataclass(frozen=True)
class SolverOptions:
    """How a process is solved.

    Attributes:
        solver: "rk45" (a step size a sample) or "dopri5" (one for the batch): adaptive, of order 5. "euler", also
            called "ddim": first order. "ancestral": the same with fresh noise (DDPM). "heun": second order, two
            evaluations a step but the last. "dpmpp_2m": DPM-Solver++(2M). "abm2": Adams-Bashforth, corrected by
            Adams-Moulton through the next evaluation.
        steps, spacing: of those of fixed steps; None: 20 of those of second order, 200 of the others. See
            `Process.grid`.
        eta: of "ancestral", how much of DDPM's noise is fresh: 1 (None) all, 0 none.
        rtol, atol: of those of adaptive steps, 1e-5 (None).
        guidance: how far to go from what the network says on its way down to what it says in the end: 1 all the way,
            more extrapolates (internal guidance; for networks with `model.early`).
        max_nfe: evaluations after which it gives up. None: 2000, or as many as fixed steps take.
        bf16: whether the network computes in bfloat16. None: as the decoder with fixed steps, no with adaptive ones,
            which would take its rounding for error.
    """

    solver: str = "abm2"
    steps: int | None = None
    rtol: float | None = None
    atol: float | None = None
    max_nfe: int | None = None
    bf16: bool | None = None
    spacing: str = "uniform"
    eta: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"solver is {self.solver!r}; choose {', '.join(SOLVERS[:-1])} or {SOLVERS[-1]}")
        if self.spacing not in SPACINGS:
            raise UserError(f"spacing is {self.spacing!r}; choose {', '.join(SPACINGS)}")
        rtol, atol = self.tolerances
        if not (0 < rtol < math.inf and 0 < atol < math.inf):
            raise UserError(f"rtol is {rtol:g}, atol {atol:g}; both must be finite and above 0")
        if self.solver in ADAPTIVE and self.steps is not None:
            raise UserError(
                f"steps is {self.steps}, and {self.solver} finds its own; choose a solver of fixed steps, such as euler"
            )
        if self.solver in FIXED and (self.rtol, self.atol) != (None, None):
            raise UserError(f"rtol and atol are for solver rk45 and dopri5; {self.solver} takes steps as they are")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta:g}; it must be from 0 to 1")
        if self.eta is not None and self.solver != "ancestral":
            raise UserError(f"eta is {self.eta:g}, and {self.solver} draws no fresh noise; it is for solver ancestral")
        if self.spacing != "uniform" and self.solver in ADAPTIVE:
            raise UserError(
                f"spacing is {self.spacing}, and {self.solver} finds its own steps; choose one of fixed steps"
            )
        if not 0 <= self.guidance < math.inf:
            raise UserError(f"guidance is {self.guidance:g}; it must be finite and at least 0")
        if min(self.count, self.most) < 1:
            raise UserError(f"steps is {self.count}, max_nfe {self.most}; both must be at least 1")
        if self.solver in FIXED and self.most < self.evaluations:
            raise UserError(
                f"{self.solver} with --steps {self.count} takes {self.evaluations} evaluations, more than --max-nfe "
                f"{self.most}; lower the one or raise the other"
            )

    @property
    def count(self) -> int:
        """`steps`, or what stands for None."""
        if self.steps is not None:
            return self.steps
        return 20 if self.solver in SECOND_ORDER else 200

    @property
    def tolerances(self) -> tuple[float, float]:
        """`rtol` and `atol`, or what stands for None."""
        return 1e-5 if self.rtol is None else self.rtol, 1e-5 if self.atol is None else self.atol

    @property
    def evaluations(self) -> int:
        """Of fixed steps."""
        return 2 * self.count - 1 if self.solver == "heun" else self.count

    @property
    def fresh(self) -> float:
        """`eta`, or what stands for None."""
        return 1.0 if self.eta is None else self.eta

    @property
    def most(self) -> int:
        """`max_nfe`, or what stands for None."""
        if self.max_nfe is not None:
            return self.max_nfe
        return max(2_000, self.evaluations if self.solver in FIXED else 0)

    def record(self, bf16: bool) -> dict[str, object]:
        """What a sample depends on besides its noise and the networks; `bf16`: of the decoder."""
        settings: dict[str, object] = dict(zip(("rtol", "atol"), self.tolerances, strict=True))
        if self.solver in FIXED:
            settings = {"steps": self.count}
            if self.spacing != "uniform":
                settings["spacing"] = self.spacing
        if self.guidance != 1:
            settings["guidance"] = self.guidance
        if self.solver == "ancestral":
            settings["eta"] = self.fresh
        words = {True: "bf16", False: "fp32"}
        precision = f"flow {words[self.network_in_bf16(bf16)]}, decoder {words[bf16]}"
        return {"solver": self.solver, **settings, "precision": precision}

    def describe(self) -> str:
        """In a few words."""
        if self.solver not in FIXED:
            how = f"{self.solver}, tolerance {self.tolerances[0]:g}"
        else:
            how = f"{self.solver}, {self.count} steps"
        return how if self.guidance == 1 else f"{how}, guidance {self.guidance:g}"

    def network_in_bf16(self, bf16: bool) -> bool:
        """Whether the network computes in bfloat16, where the decoder does or does not."""
        return self.bf16 if self.bf16 is not None else bf16 and self.solver in FIXED


@dataclass(frozen=True)
class Solution:
    """The data and what it took."""

    latents: Pyramid
    nfe: int  # evaluations of the network
    sample_nfe: tuple[int, ...]  # those that each sample took part in


class _Counted:
    """Counts evaluations and refuses more than `max_nfe` of them; looks now and then whether values are finite
    (looking stalls a GPU until it has caught up)."""

    LOOK_EVERY = 16

    def __init__(self, predict: Predict, max_nfe: int, progress: Progress | None) -> None:
        self.predict, self.max_nfe, self.progress, self.nfe = predict, max_nfe, progress, 0

    def __call__(self, noisy: Pyramid, t: Tensor, told: Tensor, time: float) -> Prediction:
        """`time` is the earliest of `told`, on the host."""
        if self.nfe >= self.max_nfe:
            raise UserError(
                f"stopped at t = {time:.4f} after max_nfe = {self.max_nfe} evaluations; raise --max-nfe, loosen "
                f"--rtol and --atol, --precision fp32, or --solver euler"
            )
        prediction = self.predict(noisy, t, told)
        if self.nfe % self.LOOK_EVERY == 0:
            require_finite(prediction.output, time)
        self.nfe += 1
        if self.progress is not None:
            self.progress(self.nfe, time)
        return prediction


def require_finite(values: Pyramid, time: float) -> None:
    """UserError where a prediction, or a state, is not finite."""
    if not all(bool(torch.isfinite(level).all()) for level in values):
        raise UserError(
            f"the network's prediction is not finite (seen at t = {time:.4f}); try --precision fp32, or train with a "
            f"lower learning rate"
        )


def solve(
    options: SolverOptions,
    process: Process,
    predict: Predict,
    noise: Pyramid,
    *,
    draw: Draw | None = None,
    progress: Progress | None = None,
) -> Solution:
    """The data from standard normal noise (B, C_i, H_i, W_i).

    Args:
        draw: the fresh noise of "ancestral"; None: torch's own.

    Raises UserError where the solve cannot go on.
    """
    counted = _Counted(predict, options.most, progress)
    noise = process.correlated(tuple(level.float() for level in noise))
    if options.solver in ADAPTIVE:
        return _adaptive(options, process, counted, noise)
    walk = Walk(process, counted, process.grid(options.count, options.spacing), noise)
    match options.solver:
        case "heun":
            latents = heun(walk)
        case "dpmpp_2m":
            latents = dpmpp_2m(walk)
        case "abm2":
            latents = abm2(walk)
        case "ancestral":
            fresh = draw or (lambda k: tuple(map(torch.randn_like, noise)))
            latents = ancestral(walk, options.fresh, lambda k: process.correlated(fresh(k)))
        case _:
            latents = first_order(walk)
    require_finite(latents, 1.0)
    return Solution(latents, counted.nfe, (counted.nfe,) * noise[0].shape[0])


def _adaptive(options: SolverOptions, process: Process, counted: _Counted, noise: Pyramid) -> Solution:
    """dz/dt from one end of the process's span to the other; what is left to t = 1 in one step."""
    begin, end = process.span
    shapes = [(level.shape[1], level.shape[2], level.shape[3]) for level in noise]
    scales = [float(process.at_start(on_host(begin), shift)) for shift in process.shifts(len(noise))]
    start = flatten(tuple(times(z, scale) for z, scale in zip(noise, scales, strict=True)))

    def drift(flat: Tensor, t: Tensor, reached: float) -> Pyramid:
        prediction = counted(unflatten(flat, shapes), t, t, reached)
        return process.drift(prediction, t)

    integrate = _rk45 if options.solver == "rk45" else _dopri5
    sizes = [math.prod(shape) for shape in shapes]
    try:
        state, counts = integrate(drift, start, begin, end, sizes, options)
    except ArithmeticError as error:
        raise UserError(
            f"{error} after {counted.nfe} evaluations; loosen --rtol and --atol, or use --solver euler"
        ) from None
    latents = unflatten(state, shapes)
    if not process.clean_at_end:
        t = on_host(end)
        latents, counts = counted(latents, t, t, end).data, [count + 1 for count in counts]
    require_finite(latents, 1.0)
    return Solution(latents, counted.nfe, tuple(counts))


Drift = Callable[[Tensor, Tensor, float], Pyramid]  # (states (B, D), t (B,), the earliest t)


def _rk45(
    drift: Drift, start: Tensor, begin: float, end: float, sizes: list[int], options: SolverOptions
) -> tuple[Tensor, list[int]]:
    """Dormand-Prince 5(4) with a step size for each sample.

    The error of a step is the *maximum* over levels of the RMS of the scaled error: no level is drowned by a larger
    one. A sample's path does not depend on the others in its batch; those that arrive first leave it. The last step
    ends exactly at `end`.
    """
    reached = begin

    def field(flat: Tensor, t: Tensor, derivative: Tensor) -> None:
        for part, level in zip(derivative.split(sizes, dim=1), drift(flat, t, reached), strict=True):
            part.copy_(level.flatten(1))

    def at(time: float) -> None:
        nonlocal reached
        reached = time

    rtol, atol = options.tolerances
    return dormand_prince.solve(field, start, begin, end, rtol=rtol, atol=atol, parts=sizes, at=at)


def _dopri5(
    drift: Drift, start: Tensor, begin: float, end: float, sizes: list[int], options: SolverOptions
) -> tuple[Tensor, list[int]]:
    """torchdiffeq's Dormand-Prince: the same method with one step size for the whole batch, to check `rk45` against.

    The error is the maximum over samples and levels; the last step ends exactly at `end` (the plain solver would
    evaluate beyond and interpolate back).
    """
    import torchdiffeq  # a second, with SciPy

    batch = start.shape[0]
    evaluations = 0

    def field(t: Tensor, flat: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return flatten(drift(flat, t.float().expand(batch), float(t)))

    def norm(flat: Tensor) -> Tensor:
        # Called with the error of the whole state; torchdiffeq reshapes nothing, so the rows are samples.
        return torch.stack([part.square().mean(dim=1) for part in flat.split(sizes, dim=1)]).max().sqrt()

    time_type = torch.float32 if start.device.type == "mps" else torch.float64  # no float64 there
    # Without a first step of ours, torchdiffeq probes at an unbounded t.
    settings = {"norm": norm, "step_t": torch.tensor([end]), "first_step": 0.01, "dtype": time_type}
    times = torch.tensor([begin, end], dtype=time_type, device=start.device)
    rtol, atol = options.tolerances
    try:
        path = torchdiffeq.odeint(field, start, times, rtol=rtol, atol=atol, method="dopri5", options=settings)
    except AssertionError as error:
        raise ArithmeticError(f"the step size vanished ({error})") from None
    return path[-1], [evaluations] * batch
