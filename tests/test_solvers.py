"""Every solver on every process: data whose exact denoiser is known, and others' implementations."""

import argparse
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from pyramid_ldm.cli.common import add_solver
from pyramid_ldm.condition import Condition
from pyramid_ldm.errors import UserError
from pyramid_ldm.processes.build import process_from_dict, process_to_dict
from pyramid_ldm.processes.edm import EDM
from pyramid_ldm.processes.prediction import Prediction
from pyramid_ldm.processes.process import SPACINGS, Process
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.solvers import FIXED, SOLVERS, SolverOptions, solve
from pyramid_ldm.processes.steps import integrals
from pyramid_ldm.processes.vp import VariancePreserving

MEAN, DEVIATION = (0.3, -0.2), (0.5, 0.8)  # of the levels


@dataclass
class Exact:
    """The network that knows the data: each level normal, of these means and deviations."""

    process: Process

    def __call__(self, noisy, context):
        ratio = context.sigma.double().view(-1, 1, 1, 1)
        found = []
        for z, shift, mean, deviation in zip(noisy, self.process.shifts(2), MEAN, DEVIATION, strict=True):
            r = ratio / shift
            match self.process.NAME:
                case "rectified_flow":
                    alpha = 1 / (1 + r)
                case "vp":
                    alpha = 1 / (1 + r * r).sqrt()
                case _:
                    alpha = torch.ones_like(r)
            sigma, z = alpha * r, z.double()
            if self.process.prediction == "preconditioned":
                data_deviation = self.process.sigma_data
                z = z * alpha * (r * r + data_deviation**2).sqrt()
            gain = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2)
            data = mean + gain * (z - alpha * mean)
            # (z - alpha x) / sigma without the cancellation
            noise = sigma * (z - alpha * mean) / ((alpha * deviation) ** 2 + sigma**2)
            match self.process.prediction:
                case "data":
                    output = data
                case "noise":
                    output = noise
                case "velocity":
                    output = data - noise
                case "v":
                    output = alpha * noise - sigma * data
                case _:
                    skip = data_deviation**2 / (r * r + data_deviation**2)
                    output = (data - skip * z / alpha) / (r * data_deviation / (r * r + data_deviation**2).sqrt())
            found.append(output.float())
        return tuple(found)


def solved(process, options, noise, network=None, draw=None):
    network = network or Exact(process)

    def predict(noisy, t, told):
        return process.predict(network, noisy, t, Condition(), told)

    return solve(options, process, predict, noise, draw=draw)


PROCESSES = {
    "rectified flow": RectifiedFlow(),
    "rectified flow, a level ahead": RectifiedFlow(level_shifts=[3.0, 0.5]),
    "cosine": VariancePreserving(),
    "cosine, shifted": VariancePreserving(shift=0.5),
    "cosine, interpolated": VariancePreserving(shift=1.0, shift_at_noise=0.25),
    "cosine, a level ahead": VariancePreserving(level_shifts=[2.0, 1.0]),
    "edm": EDM(),
    "edm, a level ahead": EDM(level_shifts=[2.0, 1.0]),
}
STEPS = {"euler": 110, "heun": 36, "abm2": 30, "dpmpp_2m": 36}
SIGNS = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)  # of the noise: where the mean and one deviation of it go


PREDICTIONS = ("velocity", "noise", "data", "v", "preconditioned")
# Read by the same code as the path that they vary: two predictions suffice.
VARIANTS = [name for name in PROCESSES if "ahead" in name or "interpolated" in name]
CASES = [(name, kind) for name in PROCESSES for kind in PREDICTIONS if name not in VARIANTS or kind in PREDICTIONS[:2]]


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_the_mean_and_the_deviation_of_the_data_are_reached(name, prediction):
    """Every path of normal data is linear in its noise: no sampling, no tolerance for it."""
    process = process_from_dict({**process_to_dict(PROCESSES[name]), "prediction": prediction})
    noise = (SIGNS, SIGNS.expand(3, 1, 2, 2))
    for solver in (*STEPS, "rk45"):
        options = (
            SolverOptions(solver, steps=STEPS[solver])
            if solver in STEPS
            else SolverOptions(solver, rtol=1e-3, atol=1e-4)
        )
        found = solved(process, options, noise).latents
        for level, mean, deviation in zip(found, MEAN, DEVIATION, strict=True):
            low, middle, high = level[:, 0, 0, 0].tolist()
            # Where noise is predicted, the start has no trace of the data's mean, and should have.
            assert middle == pytest.approx(mean, abs=0.03 if prediction == "noise" else 0.02), solver
            assert (high - low) / 2 == pytest.approx(deviation, rel=0.03 if solver == "euler" else 0.02), solver


@pytest.mark.parametrize("name", PROCESSES)
def test_torchdiffeq_reaches_them_too(name):
    found = solved(PROCESSES[name], SolverOptions("dopri5", rtol=1e-3, atol=1e-4), (SIGNS, SIGNS)).latents
    for level, mean, deviation in zip(found, MEAN, DEVIATION, strict=True):
        low, middle, high = level.flatten().tolist()
        assert middle == pytest.approx(mean, abs=0.02)
        assert (high - low) / 2 == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("name", ["rectified flow", "cosine", "edm"])
def test_ancestral_steps_reach_them_with_fresh_noise(name):
    process = PROCESSES[name]
    generator = torch.Generator().manual_seed(0)
    count = 8_000

    def draw(step):
        return tuple(torch.randn(count, 1, 1, 1, generator=generator) for _ in range(2))

    found = solved(process, SolverOptions("ancestral", steps=300), draw(-1), draw=draw).latents
    for level, mean, deviation in zip(found, MEAN, DEVIATION, strict=True):
        assert level.mean().item() == pytest.approx(mean, abs=0.03)
        assert level.std().item() == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize("name", PROCESSES)
def test_without_fresh_noise_ancestral_steps_are_ddims(name):
    process, noise = PROCESSES[name], (SIGNS, SIGNS)
    a = solved(process, SolverOptions("ancestral", steps=13, eta=0.0), noise).latents
    b = solved(process, SolverOptions("ddim", steps=13), noise).latents
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-5)
    c = solved(process, SolverOptions("ancestral", steps=13, eta=1.0), noise).latents
    assert (a[0] - c[0]).abs().max() > 0.01


@pytest.mark.parametrize("spacing", ["uniform", "cosine", "karras"])
@pytest.mark.parametrize("name", PROCESSES)
def test_grids_run_from_noise_to_data(name, spacing):
    process = PROCESSES[name]
    for steps in (1, 2, 20):
        times = process.grid(steps, spacing)
        assert len(times) == steps
        assert times == sorted(times)
        assert 0 <= times[0] < 0.1
        assert times[-1] <= 1
    found = solved(process, SolverOptions("dpmpp_2m", steps=80, spacing=spacing), (SIGNS, SIGNS)).latents
    for level, mean, deviation in zip(found, MEAN, DEVIATION, strict=True):
        low, middle, high = level[:, 0, 0, 0].tolist()
        assert middle == pytest.approx(mean, abs=0.01)
        assert (high - low) / 2 == pytest.approx(deviation, rel=0.006)


@pytest.mark.parametrize("process", [RectifiedFlow(level_shifts=[16.0, 1.0]), EDM(level_shifts=[16.0, 1.0])])
@pytest.mark.parametrize("solver", ["rk45", "dpmpp_2m karras", "dpmpp_2m"])
def test_a_level_far_ahead_starts_with_as_much_noise_as_it_should_have(process, solver):
    name, _, spacing = solver.partition(" ")
    options = SolverOptions(name) if name == "rk45" else SolverOptions(name, steps=250, spacing=spacing or "uniform")
    level = solved(process, options, (SIGNS, SIGNS)).latents[0]
    assert (level[2] - level[0]).item() / 2 == pytest.approx(DEVIATION[0], rel=0.005)


@pytest.mark.parametrize("base", [RectifiedFlow(), VariancePreserving(), EDM(sigma_max=1000.0)])
def test_predicted_noise_starts_where_the_level_ahead_is_still_noise(base):
    process = process_from_dict({**process_to_dict(base), "prediction": "noise", "level_shifts": [8.0, 1.0]})
    t = torch.tensor([process.begin], dtype=torch.float64)
    alpha, sigma = process.coefficients(t, 8.0)
    assert (2 * (alpha / sigma).log()).item() == pytest.approx(-6, abs=0.01)
    assert process.grid(5, "karras")[0] >= process.begin - 1e-6


def test_fresh_and_first_noise_are_shared_as_the_process_says():
    process, shapes = RectifiedFlow(noise="sinc"), [(1, 4, 4), (1, 16, 16)]
    noise = tuple(torch.randn(64, *shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes))
    drawn = []

    def network(noisy, context):
        drawn.append(noisy)
        return tuple(map(torch.zeros_like, noisy))

    solved(
        process, SolverOptions("ancestral", steps=2), noise, network, draw=lambda step: tuple(z.flip(0) for z in noise)
    )

    def shared(levels):
        coarse, fine = (level.flatten() for level in (levels[0], F.avg_pool2d(levels[1], 4)))
        return torch.corrcoef(torch.stack([coarse, fine]))[0, 1]

    assert shared(noise) < 0.1
    assert shared(drawn[0]) > 0.78
    assert shared([b - a for a, b in zip(*drawn, strict=True)]) > 0.78


@pytest.mark.parametrize("base", [RectifiedFlow(), VariancePreserving(shift=0.5)])
def test_an_error_of_the_noise_is_not_blown_up(base):
    """A network that is a few percent off: from where there is no data at all, reading it would divide by nothing."""
    process = process_from_dict({**process_to_dict(base), "prediction": "noise"})
    assert float(process.log_snr(torch.tensor([process.begin], dtype=torch.float64))) == pytest.approx(-6, abs=0.01)
    exact = Exact(process)

    def network(noisy, context):
        return tuple(level * 1.03 for level in exact(noisy, context))

    for solver, steps in (("euler", 10), ("heun", 10), ("dpmpp_2m", 10), ("abm2", 10), ("euler", 400)):
        found = solved(process, SolverOptions(solver, steps=steps), (SIGNS, SIGNS), network).latents[0]
        assert (found - MEAN[0]).abs().max() < 2 * DEVIATION[0], solver
    assert solved(process, SolverOptions("rk45"), (SIGNS, SIGNS)).latents[0].mean() == pytest.approx(MEAN[0], abs=0.03)


def test_the_karras_grid_is_even_in_the_seventh_root():
    process = VariancePreserving()
    times = torch.tensor(process.grid(10, "karras"), dtype=torch.float64)
    roots = (-process.log_snr(times) / 2).exp() ** (1 / 7)
    torch.testing.assert_close(roots.diff(), (roots[-1] - roots[0]).expand(9) / 9)
    assert (roots[0] ** 7).item() == pytest.approx(80)


class OnSteps(VariancePreserving):
    """Latent Diffusion's process where diffusers' schedulers stand: at some of a thousand steps."""

    def grid(self, steps, spacing="uniform"):
        return [1 - float(step) / 999 for step in self.steps]


def wavy(sample):
    """A network that is no denoiser of anything, so that nothing cancels."""
    return torch.tanh(1.7 * sample) + 0.3 * torch.cos(5 * sample)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "ancestral"])
@pytest.mark.parametrize("prediction", ["noise", "data", "v"])
def test_steps_are_those_of_diffusers(solver, prediction):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    theirs = {"noise": "epsilon", "data": "sample", "v": "v_prediction"}[prediction]
    betas = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "prediction_type": theirs}
    if solver == "dpmpp_2m":
        scheduler = DPMSolverMultistepScheduler(
            **betas, timestep_spacing="trailing", final_sigmas_type="zero", lower_order_final=False
        )
    else:
        scheduler = DDIMScheduler(**betas, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(25)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 4, 4, generator=generator)
    fresh = [torch.randn(2, 3, 4, 4, generator=generator) for _ in range(25)]
    sample = noise
    for k, step in enumerate(scheduler.timesteps):
        extra = {"eta": 0.8, "variance_noise": fresh[k]} if solver == "ancestral" else {}
        sample = scheduler.step(wavy(sample), step, sample, **extra).prev_sample

    process = OnSteps(schedule="linear_beta", prediction=prediction)
    object.__setattr__(process, "steps", scheduler.timesteps.tolist())
    options = SolverOptions(solver, steps=25, eta=0.8 if solver == "ancestral" else None)
    found = solved(
        process, options, (noise,), lambda noisy, context: (wavy(noisy[0]),), draw=lambda k: (fresh[k],)
    ).latents[0]  # fmt: skip
    torch.testing.assert_close(found, sample, atol=1e-5 * float(sample.abs().max()), rtol=1e-5)


def test_heun_is_edms_algorithm():
    """Karras et al. 2022, algorithm 1 with S_churn = 0, written out."""
    steps = 18
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def denoise(z, sigma):
        return torch.tanh(z) / (1 + sigma)

    roots = [80 ** (1 / 7), 0.002 ** (1 / 7)]
    sigmas = [(roots[0] + i / (steps - 1) * (roots[1] - roots[0])) ** 7 for i in range(steps)] + [0.0]
    x = noise.double() * sigmas[0]
    for sigma, following in itertools.pairwise(sigmas):
        d = (x - denoise(x, sigma)) / sigma
        tried = x + (following - sigma) * d
        if following > 0:
            x = x + (following - sigma) * (d + (tried - denoise(tried, following)) / following) / 2
        else:
            x = tried

    process = EDM(prediction="data")

    def network(noisy, context):
        return (denoise(noisy[0], context.sigma.view(-1, 1, 1, 1)),)

    solution = solved(process, SolverOptions("heun", steps=steps), (noise,), network)
    assert solution.nfe == 2 * steps - 1
    torch.testing.assert_close(solution.latents[0].double(), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("abm2", 3)])
def test_errors_fall_with_the_order(solver, order):
    noise = torch.linspace(-2, 2, 41).view(-1, 1, 1, 1)

    def network(noisy, context):
        return (torch.sin(2 * noisy[0]),)

    process = RectifiedFlow(eps=1e-9)
    exact = solved(process, SolverOptions("heun", steps=500), (noise,), network).latents[0]

    def error(steps):
        found = solved(process, SolverOptions(solver, steps=steps), (noise,), network).latents[0]
        return (found - exact).abs().mean().item()

    assert error(10) / error(20) > 0.75 * 2**order


def test_abm2_beats_the_others_at_ten_evaluations():
    noise = torch.linspace(-2, 2, 41).view(-1, 1, 1, 1)

    def network(noisy, context):
        return (torch.cos(2 * noisy[0]) - noisy[0],)

    process = RectifiedFlow(eps=1e-9)
    exact = solved(process, SolverOptions("rk45", rtol=1e-7, atol=1e-7), (noise,), network).latents[0]
    options = [SolverOptions("abm2", steps=10), SolverOptions("heun", steps=5), SolverOptions("euler", steps=10)]
    found = [solved(process, option, (noise,), network) for option in options]
    assert [solution.nfe for solution in found] == [10, 9, 10]
    errors = [(solution.latents[0] - exact).abs().mean().item() for solution in found]
    assert errors == sorted(errors)
    assert errors[0] < errors[1] / 3


def test_integrals_are_exact_for_their_polynomials():
    """Adams-Bashforth's 3/2, -1/2 and Adams-Moulton's 5/12, 8/12, -1/12 on an even grid; cubics on any."""
    assert integrals([0, 1], 1, 2) == pytest.approx([-1 / 2, 3 / 2])
    assert integrals([0, 1, 2], 1, 2) == pytest.approx([-1 / 12, 8 / 12, 5 / 12])
    points = [0.1, 0.25, 0.7, 0.9]
    weights = integrals(points, 0.7, 0.9)
    assert sum(w * p**3 for w, p in zip(weights, points, strict=True)) == pytest.approx((0.9**4 - 0.7**4) / 4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted_and_limited(solver):
    process, noise = RectifiedFlow(), (SIGNS, SIGNS)
    solution = solved(process, SolverOptions(solver, steps=7 if solver in FIXED else None), noise)
    if solver in FIXED:
        assert solution.nfe == (13 if solver == "heun" else 7)
        with pytest.raises(UserError, match=f"{solver} with --steps 7 takes"):
            SolverOptions(solver, steps=7, max_nfe=6)
    else:
        with pytest.raises(UserError, match="max_nfe = 6"):
            solved(process, SolverOptions(solver, max_nfe=6), noise)
    assert len(solution.sample_nfe) == 3
    assert max(solution.sample_nfe) == solution.nfe


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_not_finite_is_said(solver):
    def broken(noisy, context):
        return tuple(z / 0 for z in noisy)

    with pytest.raises(UserError, match="not finite"):
        solved(RectifiedFlow(), SolverOptions(solver), (SIGNS, SIGNS), broken)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"solver": "leap"}, "choose rk45, dopri5, euler"),
        ({"spacing": "random"}, "choose uniform, cosine, karras"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"solver": "ddim", "eta": 0.5}, "ddim draws no fresh noise"),
        ({"solver": "rk45", "spacing": "karras"}, "rk45 finds its own steps"),
        ({"solver": "euler", "steps": 0}, "at least 1"),
        ({"rtol": math.inf}, "finite"),
        ({"solver": "rk45", "steps": 20}, "rk45 finds its own"),
        ({"solver": "euler", "atol": 1e-3}, "euler takes steps as they are"),
    ],
)
def test_options_out_of_range(settings, fault):
    with pytest.raises(UserError, match=fault):
        SolverOptions(**settings)


def test_the_command_line_offers_every_solver_and_grid():
    parser = argparse.ArgumentParser()
    add_solver(parser)
    offered = {action.dest: action.choices for action in parser._actions}
    assert set(offered["solver"]) == set(SOLVERS)
    assert set(offered["spacing"]) == set(SPACINGS)


def test_what_a_sample_depends_on_is_recorded():
    assert SolverOptions("euler", steps=5).record(False)["steps"] == 5
    assert SolverOptions("ancestral", steps=5, eta=0.5).record(False)["eta"] == 0.5
    assert SolverOptions("abm2", steps=5, spacing="cosine").record(False)["spacing"] == "cosine"
    assert SolverOptions("rk45").record(False) == {
        "solver": "rk45", "rtol": 1e-5, "atol": 1e-5, "precision": "flow fp32, decoder fp32"
    }  # fmt: skip


def test_a_prediction_of_one_number_for_the_batch_and_of_one_a_sample_agree():
    """A solver of fixed steps gives the first, training the second."""
    for process in PROCESSES.values():
        noisy = (SIGNS, SIGNS)
        one = process.predict(Exact(process), noisy, torch.tensor([0.4], dtype=torch.float64), Condition())
        many = process.predict(Exact(process), noisy, torch.full((3,), 0.4), Condition())
        assert isinstance(one, Prediction)
        for a, b in zip(one.data, many.data, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
