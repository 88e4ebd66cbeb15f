"""The paths between noise and data, what a network may predict on them, and the loss."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from pyramid_ldm.condition import Condition
from pyramid_ldm.config.flow import EDMConfig, FlowDataConfig, FlowTraining, VPConfig
from pyramid_ldm.errors import UserError
from pyramid_ldm.processes.build import build_process, process_from_dict, process_to_dict
from pyramid_ldm.processes.edm import EDM
from pyramid_ldm.processes.prediction import Prediction
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.vp import VariancePreserving
from pyramid_ldm.pyramid import low_pass, pyramid_noise, sinc_shared

PROCESSES = {
    "rectified flow": RectifiedFlow(),
    "rectified flow, a level ahead": RectifiedFlow(level_shifts=[3.0, 0.5]),
    "cosine": VariancePreserving(),
    "cosine, shifted": VariancePreserving(shift=0.25),
    "cosine, interpolated": VariancePreserving(shift=2.0, shift_at_noise=0.125),
    "cosine, a level ahead": VariancePreserving(level_shifts=[4.0, 1.0]),
    "linear beta": VariancePreserving(schedule="linear_beta"),
    "edm": EDM(),
    "edm, a level ahead": EDM(level_shifts=[2.0, 1.0]),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
INSIDE = torch.linspace(0.013, 0.987, 37, dtype=torch.float64)


def one(value, batch=1):
    return torch.full((batch, 1, 1, 1), float(value))


@every_process
def test_coefficients_are_what_log_snr_says_and_their_rates_are_derivatives(process):
    for shift in (1.0, 3.0):
        alpha, sigma = process.coefficients(INSIDE, shift)
        torch.testing.assert_close(2 * (alpha / sigma).log(), process.log_snr(INSIDE) + 2 * math.log(shift))
        step = 1e-7
        ends = [process.coefficients(INSIDE + side, shift) for side in (step, -step)]
        for rate, after, before in zip(process.rates(INSIDE, shift), *ends, strict=True):
            torch.testing.assert_close(rate, (after - before) / (2 * step), rtol=1e-5, atol=1e-5)


@every_process
def test_time_runs_from_noise_to_data_and_grows_with_its_quantile(process):
    assert (process.log_snr(INSIDE).diff() > 0).all()
    u = torch.linspace(0, 1 - 2**-24, 1001)
    t = process.time(u)
    assert torch.isfinite(t).all()
    assert (t.diff() >= 0).all()
    labels = process.label(t[1:-1])
    assert torch.isfinite(labels).all()
    assert (labels.diff() != 0).sum() > 990


@every_process
def test_time_of_is_the_inverse_of_log_snr(process):
    torch.testing.assert_close(process.time_of(process.log_snr(INSIDE)), INSIDE)


@every_process
def test_a_process_travels_as_plain_values(process):
    assert process_from_dict(process_to_dict(process)) == process


class TestRectifiedFlow:
    def test_time_reaches_one_exactly_and_starts_at_eps(self):
        t = RectifiedFlow(eps=1e-3).time(torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)))
        assert t.min() >= 1e-3
        assert t.max() == 1
        share = (t == 1).float().mean().item()
        assert share == pytest.approx(1e-3, abs=3 * math.sqrt(1e-3 / 1e6))

    def test_interpolation_runs_from_noise_to_data(self):
        data, noise = (one(5, 3),), (one(1, 3),)
        assert RectifiedFlow().interpolate(data, noise, torch.tensor([0.0, 0.25, 1.0]))[0].flatten().tolist() == [
            1,
            2,
            5,
        ]

    def test_a_shifted_level_is_ahead(self):
        flow = RectifiedFlow(level_shifts=[3, 1])
        coarse, fine = flow.interpolate((one(4),) * 2, (one(0),) * 2, torch.tensor([0.5]))
        assert (coarse.item(), fine.item()) == (3, 2)  # at 3 * 0.5 / (1 + 2 * 0.5) = 0.75 and at 0.5 of the way

    def test_logit_normal_times(self):
        flow = RectifiedFlow(time_distribution="logit_normal")
        t = flow.time(torch.tensor([0.0, 0.5, 0.8413447, 1 - 1e-7]))
        assert t.tolist() == pytest.approx([1e-3, 0.5, 0.7310586, 0.9945], abs=2e-3)  # sigmoid of 0, 1, 5.2
        assert (flow.time(torch.rand(10_000)) - 0.5).abs().mean() < 0.2  # 0.25 were they uniform

    def test_the_label(self):
        assert RectifiedFlow().label(torch.tensor([1 / 999, 1.0])).tolist() == pytest.approx(
            [0, math.log(999)], abs=1e-6
        )

    def test_loss_by_hand(self):
        data = (torch.ones(2, 1, 1, 1), torch.zeros(2, 2, 2, 2))
        noise = (torch.zeros(2, 1, 1, 1), torch.full((2, 2, 2, 2), 3.0))

        def network(z, context):
            return torch.full((2, 1, 1, 1), 3.0), torch.zeros(2, 2, 2, 2)

        t = torch.tensor([0.5, 0.5])
        loss = RectifiedFlow().loss(network, data, noise, t)
        assert loss.levels.tolist() == [4, 9]  # targets 1 and -3: (1 - 3)^2 and (-3 - 0)^2, means not sums
        assert loss.total.item() == 13
        assert RectifiedFlow(level_weights=[0.5, 2]).loss(network, data, noise, t).total.item() == 20
        with pytest.raises(ValueError, match="3 level_weights for 2 levels"):
            RectifiedFlow(level_weights=[1, 1, 1]).loss(network, data, noise, t)


class TestVariancePreserving:
    def test_alpha_cosine(self):
        """logSNR(s) = -2 log tan(pi s / 2), from 15 to -15."""
        process = VariancePreserving()
        found = process.log_snr(INSIDE)
        torch.testing.assert_close(found, -2 * torch.log(torch.tan(torch.pi * (1 - INSIDE) / 2)), atol=0.06, rtol=0)
        ends = process.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
        assert ends.tolist() == pytest.approx([-15, 15])
        alpha, sigma = process.coefficients(INSIDE)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))

    def test_a_shift_is_one_of_log_snr(self):
        plain, shifted = VariancePreserving(), VariancePreserving(shift=64 / 256)
        torch.testing.assert_close(shifted.log_snr(INSIDE), plain.log_snr(INSIDE) + 2 * math.log(64 / 256))

    def test_averaging_windows_multiplies_the_signal_to_noise_ratio(self):
        """Why the shift is what it is: s x s pixels of noise average to 1 / s of its deviation."""
        noise = torch.randn(64, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        for side in (2, 4, 8):
            ratio = (1 / F.avg_pool2d(noise, side).var()).log().item()
            assert ratio == pytest.approx(2 * math.log(side), abs=0.08)

    def test_interpolated(self):
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        both = VariancePreserving(shift=0.5, shift_at_noise=0.125)
        found = both.log_snr(ends)
        expected = [VariancePreserving(shift=shift).log_snr(ends)[i] for i, shift in enumerate((0.125, 0.5))]
        assert found.tolist() == pytest.approx([float(value) for value in expected])

    def test_linear_beta_is_latent_diffusions(self):
        from diffusers import DDIMScheduler

        theirs = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear").alphas_cumprod
        process = VariancePreserving(schedule="linear_beta")
        alpha, sigma = process.coefficients(1 - torch.arange(1000, dtype=torch.float64) / 999)
        torch.testing.assert_close(alpha**2, theirs.double(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(sigma**2, 1 - theirs.double(), rtol=1e-3, atol=1e-6)


class TestEDM:
    def test_sigma_runs_along_the_published_grid(self):
        process = EDM()
        steps = 18
        published = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)]
        times = torch.tensor(process.grid(steps), dtype=torch.float64)
        assert process.sigma(times).tolist() == pytest.approx(published)
        assert EDM().grid(1) == [0]

    def test_training_draws_a_log_normal(self):
        """The quartiles of sigma are those of exp(-1.2 + 1.2 N)."""
        process = EDM()
        sigma = process.sigma(process.time(torch.tensor([0.75, 0.5, 0.25])))
        assert sigma.tolist() == pytest.approx([0.1341, 0.3012, 0.6766], abs=1e-4)
        assert math.isfinite(process.sigma(process.time(torch.tensor([0.0, 1 - 2**-24]))).sum())

    def test_preconditioning_and_its_loss_by_hand(self):
        """x = c_skip z + c_out F(c_in z; c_noise), and lambda = 1 / c_out^2."""
        process, sigma, data, noise = EDM(), 0.7, 0.3, -1.1
        t = process.time_of(torch.tensor([-2 * math.log(sigma)], dtype=torch.float64)).float()
        z, seen = data + sigma * noise, []

        def network(noisy, context):
            seen.append((noisy[0].item(), context.label.item(), context.sigma.item()))
            return (0.2 * torch.ones_like(noisy[0]),)

        skip = 0.25 / (sigma**2 + 0.25)
        out = sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
        denoised = process.predict(network, (one(z),), t, Condition()).data[0].item()
        assert denoised == pytest.approx(skip * z + out * 0.2, rel=1e-4)
        assert seen[0] == pytest.approx((z / math.sqrt(sigma**2 + 0.25), math.log(sigma) / 4, sigma), rel=1e-4)
        loss = process.loss(network, (one(data),), (one(noise),), t).total.item()
        assert loss == pytest.approx((denoised - data) ** 2 / out**2, rel=1e-3)

    def test_the_target_has_unit_deviation(self):
        """What c_skip, c_out and c_in are for: whatever sigma, the network sees and is asked for values of about 1."""
        process = EDM(sigma_data=1.0)
        generator = torch.Generator().manual_seed(0)
        data, noise = (torch.randn(20_000, 1, 1, 1, generator=generator) for _ in range(2))
        for t in (0.05, 0.5, 0.9):
            seen = []

            def network(noisy, context, seen=seen):
                seen.append(noisy[0].std().item())
                return (torch.zeros_like(noisy[0]),)

            loss = process.loss(network, (data,), (noise,), torch.full((20_000,), t)).total.item()
            assert seen[0] == pytest.approx(1, abs=0.03)
            assert loss == pytest.approx(1, abs=0.03)


@every_process
@pytest.mark.parametrize("kind", ["velocity", "noise", "data", "v"])
def test_a_prediction_reads_the_same_whatever_the_output_is(process, kind):
    generator = torch.Generator().manual_seed(0)
    data, noise = (tuple(torch.randn(3, 2, 2, 2, generator=generator) for _ in range(2)) for _ in range(2))
    t = torch.tensor([0.2, 0.5, 0.8])
    alphas, sigmas = process.all_coefficients(t, 2)
    noisy = process.interpolate(data, noise, t)
    truth = {
        "data": data,
        "noise": noise,
        "velocity": tuple(x - e for x, e in zip(data, noise, strict=True)),
        "v": tuple(a * e - s * x for x, e, a, s in zip(data, noise, alphas, sigmas, strict=True)),
    }
    prediction = Prediction(kind, truth[kind], noisy, alphas, sigmas)
    for name, values in truth.items():
        for found, value, sigma in zip(prediction.read(name), values, sigmas, strict=True):
            scale = max(1.0, 1 / float(sigma.min()), float(sigma.max()))  # float32 of z / sigma
            torch.testing.assert_close(found, value, atol=2e-6 * scale * max(1.0, float(value.abs().max())), rtol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "v", "preconditioned"])
def test_an_exact_network_has_no_loss(prediction):
    """Of data that is one point: whatever is predicted, and in whichever reading the error is taken. At the ends of
    what training draws, where float32 says little, the loss is a number."""
    point = 0.4
    for base, ends in itertools.product((RectifiedFlow(), VariancePreserving(), EDM()), (False, True)):
        process = process_from_dict({**process_to_dict(base), "prediction": prediction})
        generator = torch.Generator().manual_seed(1)
        t, noise = torch.tensor([0.3, 0.6]), (torch.randn(2, 1, 2, 2, generator=generator),)
        if ends:
            t = process.time(torch.tensor([0.0, 1 - 2.0**-24]))
        data = (torch.full((2, 1, 2, 2), point),)
        alphas, sigmas = process.all_coefficients(t, 1)
        exact = Prediction("noise", noise, process.interpolate(data, noise, t), alphas, sigmas)

        def network(noisy, context, process=process, exact=exact, alphas=alphas, sigmas=sigmas, data=data):
            if process.prediction != "preconditioned":
                return exact.read(process.prediction)
            ratio = sigmas[0] / alphas[0]
            skip = 0.25 / (ratio**2 + 0.25)
            return ((data[0] - skip * exact.noisy[0] / alphas[0]) / (ratio * 0.5 / (ratio**2 + 0.25).sqrt()),)

        for error in (None, "data", "noise", "v", "velocity"):
            found = process_from_dict({**process_to_dict(process), "error": error}).loss(network, data, noise, t)
            assert math.isfinite(found.total.item()) if ends else found.total.item() < 1e-6, (process.NAME, error)


def test_what_depends_on_the_latents_scaling():
    """EDM's published 0.5 and -1.2 are of images; latents of unit deviation get as much noise beside them."""
    for scaling, deviation, mean in (("unit", 1.0, -1.2 + math.log(2)), ("paper", 0.5, -1.2), ("channel", 1, -0.5069)):
        process = build_process(FlowTraining("r", data=FlowDataConfig("s"), process="edm", scaling=scaling))
        assert process.sigma_data == deviation
        assert process.log_sigma_mean == pytest.approx(mean, abs=1e-4)
    section = EDMConfig(sigma_data=0.3, log_sigma_mean=-2.0)
    process = build_process(FlowTraining("r", data=FlowDataConfig("s"), process="edm", edm=section))
    assert (process.sigma_data, process.log_sigma_mean) == (0.3, -2.0)


@pytest.mark.parametrize("settings", [{"shift_at_noise": 25.0}, {"beta_start": 0.05}, {"shift": 1e4}])
def test_schedules_that_are_none(settings):
    with pytest.raises(UserError, match=r"vp\.\w+ is"):
        VPConfig(**settings)


def test_log_snr_grows_with_the_widest_interpolation():
    for schedule in ("cosine", "linear_beta"):
        process = VariancePreserving(schedule=schedule, shift=0.1, shift_at_noise=2.0)
        assert (process.log_snr(torch.linspace(0, 1, 1001, dtype=torch.float64)).diff() > 0).all()


def test_the_error_of_another_reading():
    """eps = sigma z + alpha v: an error of v is one of eps, alpha times as large (simple diffusion's choice)."""
    process = VariancePreserving(prediction="v", error="noise")
    t = torch.tensor([0.3, 0.7])
    data, noise = (one(0, 2),), (one(0, 2),)
    loss = process.loss(lambda noisy, context: (one(2, 2),), data, noise, t).total.item()
    alpha, _ = process.coefficients(t)
    assert loss == pytest.approx((2 * alpha).square().mean().item(), rel=1e-5)


def test_multiscale_by_hand():
    """Sides 4, 2 and 1, each over its side; noise that cancels in the average counts at its own side alone."""
    checks = torch.tensor([[1.0, -1.0] * 2, [-1.0, 1.0] * 2] * 2).view(1, 1, 4, 4)
    zero = torch.zeros(1, 1, 4, 4)
    t = torch.tensor([0.5])

    def loss(error, side):
        process = VariancePreserving(prediction="noise", multiscale=side)
        return process.loss(lambda noisy, context: (error,), (zero,), (zero,), t).total.item()

    assert loss(checks, 1) == pytest.approx(1 / 4)
    assert loss(checks + 3, 1) == pytest.approx(10 / 4 + 9 / 2 + 9)
    assert loss(checks + 3, 2) == pytest.approx(10 / 4 + 9 / 2)
    wide = torch.full((1, 1, 32, 32), 3.0)
    process = VariancePreserving(prediction="noise", multiscale=32)
    nothing = torch.zeros_like(wide)
    assert process.loss(lambda noisy, context: (wide,), (nothing,), (nothing,), t).total.item() == pytest.approx(9 / 32)


class TestSincNoise:
    """Layered Diffusion's noise: one draw, band-limited to every level."""

    noise = torch.randn(256, 3, 32, 32, generator=torch.Generator().manual_seed(3))

    @pytest.mark.parametrize("side", [1, 4, 8, 16, 21])
    def test_is_white_and_of_unit_deviation(self, side):
        found = low_pass(self.noise, side, side)
        assert found.var().item() == pytest.approx(1, abs=max(0.01, 4 * math.sqrt(2 / found.numel())))
        for axis in (-1, -2):
            if side > 1:
                lagged = (found * found.roll(1, axis)).mean().item()
                assert abs(lagged) < max(0.01, 4 / math.sqrt(found.numel()))

    def test_interpolation_is_neither(self):
        assert F.interpolate(self.noise, (16, 16), mode="bilinear").var().item() < 0.5

    def test_twice_half_is_a_quarter(self):
        torch.testing.assert_close(
            low_pass(low_pass(self.noise, 16, 16), 8, 8), low_pass(self.noise, 8, 8), atol=1e-4, rtol=0
        )

    def test_levels_share_it(self):
        process = RectifiedFlow(noise="sinc")
        independent = pyramid_noise([(3, 4, 4), (3, 16, 16)], 0, "noise", range(64))
        coarse, fine = process.correlated(independent)
        assert torch.equal(fine, independent[1])
        average = F.avg_pool2d(fine, 4) * 4
        assert torch.corrcoef(torch.stack([coarse.flatten(), average.flatten()]))[0, 1] > 0.78  # 0.51 half a pixel off
        assert RectifiedFlow().correlated(independent) is independent
        with pytest.raises(ValueError, match="cannot share"):
            sinc_shared((torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 2, 2)))

    def test_the_loss_sees_it(self):
        process = RectifiedFlow(noise="sinc")
        noise = (torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 2, 2))
        data = tuple(map(torch.zeros_like, noise))
        loss = process.loss(lambda noisy, context: data, data, noise, torch.tensor([0.5]))
        assert loss.levels.tolist() == pytest.approx([4, 1])  # the mean, times the two sides' ratio


def test_levels_have_independent_noise():
    coarse, fine = pyramid_noise([(4, 8, 8), (4, 8, 8)], 0, "noise", range(100))
    correlation = torch.corrcoef(torch.stack([coarse.flatten(), fine.flatten()]))[0, 1]
    assert abs(correlation) < 0.02


@pytest.mark.parametrize("prediction", ["data", "noise", "velocity"])
def test_jitter_is_seen_by_the_network_and_by_nothing_else(prediction):
    """A network that knows the answer has no error, whatever the error is taken in, and sees what was added."""
    process = RectifiedFlow(prediction=prediction, error="velocity")
    data, noise, jitter = ((torch.randn(3, 2, 4, 4, generator=torch.manual_seed(n)),) for n in range(3))
    t, seen = torch.tensor([0.1, 0.5, 0.9]), []
    answers = {"data": data, "noise": noise, "velocity": (data[0] - noise[0],)}

    def network(noisy, context):
        seen.append(noisy[0])
        return answers[prediction]

    assert process.loss(network, data, noise, t, None, jitter).total.item() == pytest.approx(0, abs=1e-6)
    assert process.loss(network, data, noise, t).total.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(seen[0] - seen[1], jitter[0])
