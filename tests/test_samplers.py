import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from pyramid_ldm.errors import UserError
from pyramid_ldm.processes import rk45 as dormand_prince
from pyramid_ldm.processes.prediction import Prediction
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.solvers import SolverOptions, solve
from pyramid_ldm.pyramid import flatten


def solved(solver, velocity, noise, process=None, progress=None, **options):
    """By a velocity that is a function of the state and of the time that the network is told."""

    def predict(noisy, t, told):
        found = velocity(noisy, told.float().expand(noisy[0].shape[0]))
        return Prediction("velocity", found, noisy, (), ())

    return solve(SolverOptions(solver, **options), process or RectifiedFlow(), predict, noise, progress=progress)


def euler(velocity, noise, **options):
    return solved("euler", velocity, noise, **options)


def rk45(velocity, noise, **options):
    return solved("rk45", velocity, noise, **options)


def dopri5(velocity, noise, **options):
    return solved("dopri5", velocity, noise, **options)


def pyramid(batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in ((2, 1, 1), (3, 2, 4)))


class Recorded:
    """A velocity that remembers the times it was asked for."""

    def __init__(self, field):
        self.field, self.times = field, []

    def __call__(self, latents, t):
        assert t.shape == (latents[0].shape[0],)
        self.times.append(float(t[0]))
        return tuple(self.field(z, t.view(-1, 1, 1, 1)) for z in latents)


def test_euler_evaluates_on_the_reference_grid_and_moves_by_one():
    velocity = Recorded(lambda z, t: torch.ones_like(z))
    noise = pyramid()
    solution = euler(velocity, noise, steps=200)
    assert solution.nfe == len(velocity.times) == 200
    expected = [1e-3 + k * (1 - 1e-3) / 200 for k in range(200)]
    assert velocity.times == pytest.approx(expected, abs=1e-6)
    for z0, z1 in zip(noise, solution.latents, strict=True):
        torch.testing.assert_close(z1, z0 + 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", [rk45, dopri5])
@pytest.mark.parametrize("field", [lambda z, t: -2 * z, lambda z, t: torch.cos(5 * t) * z + t, lambda z, t: -(z**3)])
def test_rk45_agrees_with_scipy(field, solver):
    noise = pyramid(batch=1)
    velocity = Recorded(field)
    ours = flatten(solver(velocity, noise).latents)[0]

    def flat_field(t, y):
        return field(torch.from_numpy(y), torch.tensor(t)).numpy()

    start = flatten(noise)[0].double().numpy()
    theirs = solve_ivp(flat_field, (1e-3, 1), start, rtol=1e-10, atol=1e-10).y[:, -1]
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)  # steps are accepted at an RMS of 1e-5, in float32
    assert min(velocity.times) == pytest.approx(1e-3)
    assert max(velocity.times) <= 1
    assert max(velocity.times) == pytest.approx(1, abs=1e-6)


def test_rk45_never_asks_beyond_the_end_even_for_a_field_that_invites_large_steps():
    velocity = Recorded(lambda z, t: torch.zeros_like(z))
    rk45(velocity, pyramid())
    assert max(velocity.times) <= 1


@pytest.mark.parametrize("left", [1e-12, 1e-9, 5e-8, 1e-7, 4e-7, 2e-3])
def test_whatever_a_step_leaves_of_the_way_is_gone(left):
    """The first step is 0.01 long; where it would end a little before the end, float32 could not make the next."""
    constant = lambda states, times, derivative: derivative.fill_(2.0)  # noqa: E731
    end = 0.25 + 0.01 + left
    found, counts = dormand_prince.solve(constant, torch.zeros(1, 3), 0.25, end, rtol=1e-5, atol=1e-5, parts=[3])
    assert found == pytest.approx(torch.full((1, 3), 2 * (0.01 + left)).numpy(), rel=1e-5)
    assert counts == [1 + 6 * (2 if left > 1e-3 else 1)]


def test_a_level_of_one_value_has_a_say_of_its_own():
    """The error is the largest over levels, not their mean: a hundred quiet levels do not hide one that swings."""

    def velocity(latents, t):
        swing = torch.cos(60 * t).view(-1, 1, 1, 1)
        return (swing * torch.ones_like(latents[0]), *(torch.zeros_like(z) for z in latents[1:]))

    noise = tuple(torch.zeros(1, 1, 1, 1) for _ in range(100))
    alone, among = rk45(velocity, noise[:1], rtol=1e-4, atol=1e-4), rk45(velocity, noise, rtol=1e-4, atol=1e-4)
    assert among.sample_nfe == alone.sample_nfe
    assert among.latents[0].item() == pytest.approx(alone.latents[0].item(), rel=1e-3)


def stiffness_as_a_latent(latents, t):
    """A first level of one value a sample, its rate, stays; the others swing with it."""
    rate, *others = latents
    return torch.zeros_like(rate), *(rate * torch.cos(40 * t).view(-1, 1, 1, 1) * torch.ones_like(z) for z in others)


def test_rk45_solves_every_sample_of_a_batch_as_it_does_alone():
    """One stiff sample in a large easy batch is not averaged away, and does not make the others take its steps."""
    rates = torch.tensor([0.1] * 31 + [40.0]).view(-1, 1, 1, 1)
    noise = (rates, torch.ones(32, 1, 1, 1), torch.ones(32, 1, 8, 8))
    together = rk45(stiffness_as_a_latent, noise)
    exact = 1 + rates * (math.sin(40) - math.sin(0.04)) / 40
    for level in together.latents[1:]:
        assert (level - exact).abs().max() < 1e-3
    for k in (0, 31):
        alone = rk45(stiffness_as_a_latent, tuple(level[k : k + 1] for level in noise))
        assert alone.nfe == alone.sample_nfe[0] == together.sample_nfe[k]
        for a, b in zip(alone.latents, together.latents, strict=True):
            torch.testing.assert_close(a[0], b[k], atol=1e-5, rtol=0)
    assert together.sample_nfe[0] < together.sample_nfe[31] == together.nfe


def test_rk45_leaves_finished_samples_out():
    sizes = []

    def velocity(latents, t):
        sizes.append(len(t))
        return stiffness_as_a_latent(latents, t)

    rates = torch.tensor([40.0, 0.1, 0.1]).view(-1, 1, 1, 1)
    solution = rk45(velocity, (rates, torch.ones(3, 1, 2, 2)))
    assert sizes[0] == 3
    assert sizes[-1] == 1
    assert sum(sizes) == sum(solution.sample_nfe)


def test_rk45_takes_torchdiffeqs_path_with_one_sample():
    """The same tableau, control and first step: within a step, and as near to each other as to the truth."""
    for field in (lambda z, t: -2 * z, lambda z, t: torch.cos(5 * t) * z + t, lambda z, t: -(z**3)):
        ours, theirs = (solver(Recorded(field), pyramid(batch=1)) for solver in (rk45, dopri5))
        assert abs(ours.nfe - theirs.nfe) <= 6
        for a, b in zip(ours.latents, theirs.latents, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_small_level_is_not_drowned_by_a_large_one():
    noise = (torch.zeros(1, 1, 1, 1), torch.zeros(1, 16, 32, 32))

    def velocity(latents, t):
        return 100 * torch.cos(60 * t).view(-1, 1, 1, 1) * torch.ones_like(latents[0]), torch.zeros_like(latents[1])

    found = rk45(velocity, noise).latents[0].item()
    assert found == pytest.approx(100 * (math.sin(60) - math.sin(0.06)) / 60, abs=1e-3)


@pytest.mark.parametrize("solve", [lambda v, z: euler(v, z, steps=500), rk45])
def test_a_point_mass_is_reached(solve):
    """Data is one point x1: the exact velocity is (x1 - z) / (1 - t)."""
    target = torch.tensor(0.7)
    velocity = Recorded(lambda z, t: (target - z) / (1 - t).clamp(min=1e-4))
    for level in solve(velocity, pyramid()).latents:
        torch.testing.assert_close(level, target.expand_as(level), atol=5e-3, rtol=0)


def test_two_gaussians_are_reached():
    """Data is half N(-2, 0.3^2), half N(2, 0.3^2): the exact velocity E[z1 - z0 | z_t] is closed-form."""
    means, std = torch.tensor([-2.0, 2.0]), 0.3

    def field(z, t):
        z, t = z[..., None], t[..., None]
        variance = (t * std) ** 2 + (1 - t) ** 2
        weights = torch.softmax(-((z - t * means) ** 2) / (2 * variance), dim=-1)
        data = means + t * std**2 / variance * (z - t * means)
        noise = (1 - t) / variance * (z - t * means)
        return (weights * (data - noise)).sum(-1)

    noise = (torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0)),)
    for solution in (rk45(Recorded(field), noise), euler(Recorded(field), noise, steps=200)):
        z = solution.latents[0].flatten()
        assert (z > 0).float().mean() == pytest.approx(0.5, abs=0.03)
        for sign in (-1, 1):
            side = z[z * sign > 0]
            assert side.mean() == pytest.approx(2 * sign, abs=0.03)
            assert side.std() == pytest.approx(std, abs=0.02)


def test_limits_are_errors_that_say_what_to_do():
    with pytest.raises(UserError, match=r"max_nfe = 20.*--solver euler"):
        rk45(
            lambda z, t: tuple(torch.cos(500 * t).view(-1, 1, 1, 1) * torch.ones_like(x) for x in z),
            pyramid(),
            max_nfe=20,
        )
    with pytest.raises(UserError, match="not finite"):
        euler(lambda z, t: tuple(x / 0 for x in z), pyramid(), steps=5)
    with pytest.raises(UserError, match="at least 1"):
        euler(lambda z, t: z, pyramid(), steps=0)


def test_a_step_that_underflows_is_an_error_in_words():
    def rough(latents, t):
        generator = torch.Generator().manual_seed(int(float(t[0]) * 1e9))
        return tuple(1e6 * torch.randn(z.shape, generator=generator) for z in latents)

    with pytest.raises(UserError, match=r"step size vanished|max_nfe"):
        rk45(rough, pyramid(), max_nfe=100_000)
