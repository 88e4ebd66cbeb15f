"""What a solver adds to the evaluations of the network."""

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import ours
from bench.measuring import measure, time_runs
from bench.results import Figures
from bench.section import Section
from bench.settings import Item, Settings
from bench.tables import TIME, Column, significant
from pyramid_ldm.processes.process import Prediction
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.solvers import SolverOptions, solve
from pyramid_ldm.pyramid import Pyramid, flatten, pyramid_noise, unflatten

BATCH, STEPS, EPS, TOLERANCE = 8, 100, 1e-3, 1e-5
SOLVERS = {"ours: euler": "", "ours: rk45": "", "torchdiffeq dopri5, flat": "", "scipy RK45, flat": "scipy"}


def items(settings: Settings) -> list[Item]:
    """Ours and two plain ones."""
    shapes = ours.latent_shapes("people2k", settings)
    group = f"{BATCH} x {sum(math.prod(s) for s in shapes)} values"
    return [
        Item("solver", group, name, reference=name == "ours: rk45", alone=False, needs=needs)
        for name, needs in SOLVERS.items()
    ]


def measure_item(item: Item, settings: Settings) -> Figures:
    """Time of a solve, less what its evaluations of a trivial velocity take."""
    device = torch.device(settings.device)
    shapes = ours.latent_shapes("people2k", settings)
    noise = tuple(z.to(device) for z in pyramid_noise(shapes, 0, "noise", list(range(BATCH))))
    field = tuple(torch.randn_like(z[:1]) for z in noise)  # one for all, however many rows are not at the end yet
    count = [0]

    def velocity(latents: Pyramid, t: Tensor) -> Pyramid:
        count[0] += 1
        wave = torch.cos(9 * t).view(-1, 1, 1, 1)
        return tuple(wave * v for v in field)

    solve = SOLVE[item.name](velocity, noise, shapes)
    with torch.inference_mode():
        figures = measure(solve, settings)
        count[0] = 0
        solve()
        evaluations = count[0]
        t = torch.full((BATCH,), 0.5, device=device)
        own = median(time_runs(lambda: velocity(noise, t), settings))
    figures["evaluations"] = evaluations
    figures["overhead_seconds"] = median(figures["seconds"]) / evaluations - own
    return figures


def by_ours(solver: str, velocity: Any, noise: Pyramid) -> Callable[[], object]:
    """On rectified flow."""

    def predict(noisy: Pyramid, t: Tensor, told: Tensor) -> Prediction:
        rows = told.to(noisy[0].device, torch.float32).expand(noisy[0].shape[0])
        return Prediction("velocity", velocity(noisy, rows), noisy, (), ())

    return lambda: solve(SolverOptions(solver, steps=STEPS), RectifiedFlow(), predict, noise)


def flat_field(velocity: Any, shapes: list[tuple[int, int, int]]) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity of a state (B, D)."""
    return lambda t, state: flatten(velocity(unflatten(state, shapes), t.float().expand(BATCH)))


def solve_dopri5(velocity: Any, noise: Pyramid, shapes: list[tuple[int, int, int]]) -> Callable[[], object]:
    """torchdiffeq with its own norm and steps."""
    import torchdiffeq

    state, field = flatten(noise), flat_field(velocity, shapes)
    times = torch.tensor([EPS, 1.0], dtype=torch.float64, device=state.device)
    return lambda: torchdiffeq.odeint(field, state, times, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")


def solve_scipy(velocity: Any, noise: Pyramid, shapes: list[tuple[int, int, int]]) -> Callable[[], object]:
    """scipy on float64, with the copies that this asks for."""
    from scipy.integrate import solve_ivp

    state, field = flatten(noise), flat_field(velocity, shapes)

    def of_arrays(t: float, values: Any) -> Any:
        flat = torch.from_numpy(values).to(state.device, torch.float32).view_as(state)
        return field(torch.tensor(t, device=state.device), flat).double().cpu().numpy().ravel()

    start = state.double().cpu().numpy().ravel()
    return lambda: solve_ivp(of_arrays, (EPS, 1.0), start, rtol=TOLERANCE, atol=TOLERANCE, method="RK45")


SOLVE: dict[str, Callable[..., Callable[[], object]]] = {
    "ours: euler": lambda velocity, noise, shapes: by_ours("euler", velocity, noise),
    "ours: rk45": lambda velocity, noise, shapes: by_ours("rk45", velocity, noise),
    "torchdiffeq dopri5, flat": solve_dopri5,
    "scipy RK45, flat": solve_scipy,
}
SECTION = Section(
    title="Overhead of the solver",
    about="A velocity that costs next to nothing and whose own time is subtracted; rtol = atol = 1e-5.",
    columns=(
        TIME,
        Column("evaluations", "evaluations", str),
        Column("overhead_seconds", "overhead an evaluation", lambda v: f"{significant(v * 1000)} ms"),
    ),
    items=items,
    measure=measure_item,
)
