import math

import pytest
import torch
from conftest import randomise, tiny_flow, tiny_flow_config

from pyramid_ldm.errors import UserError
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp
from pyramid_ldm.nn.layers import spectral_layers
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.solvers import euler
from pyramid_ldm.pyramid import pyramid_noise


def latents(network, batch=2, seed=0):
    return pyramid_noise(network.shapes, seed, "test", range(batch))


VARIANTS = {
    "default": {},
    "one level": {"levels": ((8, 4),)},
    "three levels, 2:1": {"image_size": (32, 64), "levels": ((32, 8), (16, 4), (4, 2)), "widths": [8, 16, 16, 16]},
    "levels far apart": {"image_size": (64, 64), "levels": ((64, 8), (4, 2)), "widths": [8, 16, 16, 16, 16]},
    "deeper than the latents": {"image_size": (64, 64), "widths": [16, 16, 16, 16]},
    "no spectral norm": {"spectral_norm": False},
    "dropout": {"dropout": 0.35},
    "no branch blocks": {"branch_blocks": 0},
    "checkpointing": {"checkpoint": True},
    **{f"attention {kind}": {"attention": kind} for kind in ("spatial", "channel", "none")},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_builds_steps_saves_and_loads(changes, tmp_path):
    network = randomise(tiny_flow(**changes), 0.05).train()
    data, noise = latents(network), latents(network, seed=1)
    loss = RectifiedFlow().loss(network, data, noise, torch.tensor([0.2, 0.9]))
    loss.total.backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Neither attention at one position nor a key's bias has anything to choose between.
    assert not [n for n in without if not any(w in n for w in ("query", "key", "temperature"))], without
    network.eval()
    network.save_pretrained(tmp_path)
    loaded = PyramidNCSNpp.from_pretrained(tmp_path)
    assert not spectral_layers(loaded)
    with torch.no_grad():
        for a, b in zip(loaded(data, torch.tensor([0.2, 0.9])), data, strict=True):
            assert a.shape == b.shape
    assert [tuple(z.shape) for z in loaded(data, torch.tensor([0.2, 0.9]))] == [tuple(z.shape) for z in data]


def test_a_new_network_predicts_zero():
    network = tiny_flow()
    for level in network(latents(network), torch.tensor([0.1, 1.0])):
        assert level.abs().max() == 0


def test_every_level_depends_on_every_other():
    network = randomise(tiny_flow(image_size=(32, 32), levels=((32, 4), (16, 3), (8, 2)), widths=[16, 16, 16])).eval()
    inputs = tuple(z.requires_grad_() for z in latents(network, 1))
    for velocity in network(inputs, torch.tensor([0.5])):
        gradients = torch.autograd.grad(velocity.square().sum(), inputs, retain_graph=True)
        assert all(g.abs().max() > 1e-8 for g in gradients)


def test_a_branch_enters_and_leaves_at_its_own_resolution():
    network = tiny_flow(image_size=(64, 64), levels=((32, 4), (8, 2)), widths=[16, 16, 24])
    seen = {}

    def record(name):
        def hook(module, args, out):
            seen[name] = tuple(out.shape[1:])

        return hook

    network.branches["32"].enter.register_forward_hook(record("enter"))
    network.branches["32"].leave.register_forward_hook(record("leave"))
    network(latents(network, 1), torch.tensor([0.5]))
    assert seen == {"enter": (24, 2, 2), "leave": (24, 2, 2)}


def test_dropout_schedule_by_level():
    network = tiny_flow(image_size=(64, 64), levels=((64, 4), (8, 2)), widths=[16] * 4, dropout=0.35)
    rates = [level.blocks.residual[0].dropout.p for level in network.down_levels]
    assert rates == pytest.approx([0, 0.35 / 3, 0.7 / 3, 0.35])
    assert [level.blocks.residual[0].dropout.p for level in network.up_levels] == pytest.approx(rates[::-1])


def test_dropout_schedules_of_the_config():
    def rates(schedule):
        network = tiny_flow(widths=[16] * 2, dropout=0.4, dropout_schedule=schedule)
        return [level.blocks.residual[0].dropout.p for level in network.down_levels]

    assert rates("uniform") == [0.4, 0.4]
    assert rates("increasing") == [0.4, 0]  # fine to coarse


def test_too_few_widths_are_refused():
    with pytest.raises(UserError, match="need at least 3"):
        tiny_flow_config(image_size=(32, 32), levels=((32, 4), (8, 2)), widths=[8, 8])
    with pytest.raises(UserError, match="does not divide"):
        tiny_flow_config(image_size=(32, 32), levels=((16, 4), (8, 2)), widths=[8] * 6)


class TestRectifiedFlow:
    def test_time_reaches_one_exactly_and_starts_at_eps(self):
        flow = RectifiedFlow(eps=1e-3)
        t = flow.time(torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)))
        assert t.min() >= 1e-3
        assert t.max() == 1
        share = (t == 1).float().mean().item()
        assert share == pytest.approx(1e-3, abs=3 * math.sqrt(1e-3 / 1e6))

    def test_interpolation_runs_from_noise_to_data(self):
        flow = RectifiedFlow()
        data, noise = (torch.full((3, 1, 1, 1), 5.0),), (torch.full((3, 1, 1, 1), 1.0),)
        found = flow.interpolate(data, noise, torch.tensor([0.0, 0.25, 1.0]))[0].flatten()
        assert found.tolist() == [1, 2, 5]

    def test_a_shifted_level_is_ahead(self):
        flow = RectifiedFlow(level_shifts=[3, 1])
        data, noise = (torch.full((1, 1, 1, 1), 4.0),) * 2, (torch.zeros(1, 1, 1, 1),) * 2
        coarse, fine = flow.interpolate(data, noise, torch.tensor([0.5]))
        assert (coarse.item(), fine.item()) == (3, 2)  # at 3 * 0.5 / (1 + 2 * 0.5) = 0.75 and at 0.5 of the way

    def test_the_field_is_the_derivative_of_the_path(self):
        flow = RectifiedFlow(level_shifts=[3, 0.5])
        data, noise = (torch.full((1, 1, 1, 1), 4.0),) * 2, (torch.ones(1, 1, 1, 1),) * 2
        t, step = torch.tensor([0.3], dtype=torch.float64), 1e-6
        found = flow.field(lambda z, t: tuple(a - b for a, b in zip(data, noise, strict=True)))(noise, t)
        ends = [flow.interpolate(data, noise, t + side) for side in (step, -step)]
        for velocity, after, before in zip(found, *ends, strict=True):
            assert velocity.item() == pytest.approx((after - before).item() / (2 * step), rel=1e-4)

    @pytest.mark.parametrize("steps", [1, 10, 200])
    def test_euler_follows_a_constant_prediction_exactly(self, steps):
        flow = RectifiedFlow(level_shifts=[4.0, 0.25, 1.0])
        noise = (torch.zeros(2, 1, 1, 1),) * 3
        field = flow.field(lambda z, t: (torch.ones(2, 1, 1, 1),) * 3, steps)
        for level in euler(field, noise, steps=steps).latents:
            assert level.flatten().tolist() == pytest.approx([1, 1], abs=1e-5)

    @pytest.mark.parametrize("shifts", [None, [4.0, 1.0]])
    def test_a_shifted_flow_arrives_at_the_data(self, shifts):
        """The oracle of one image knows Z_1 - Z_0 from where it is: (Z_1 - Z) / (1 - tau)."""
        flow = RectifiedFlow(level_shifts=shifts)
        data = (torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 2, 2), -1.0))
        noise = pyramid_noise([(1, 1, 1), (1, 2, 2)], 0, "noise", [0, 1])

        def oracle(latents, t):
            clear = flow.interpolate([torch.ones(2, 1, 1, 1)] * 2, [torch.zeros(2, 1, 1, 1)] * 2, t)
            return tuple((z1 - z) / (1 - tau).clamp(min=1e-4) for z1, z, tau in zip(data, latents, clear, strict=True))

        found = euler(flow.field(oracle), noise, steps=400).latents
        for level, z1 in zip(found, data, strict=True):
            assert torch.allclose(level, z1, atol=0.02)

    def test_logit_normal_times(self):
        flow = RectifiedFlow(time_distribution="logit_normal")
        t = flow.time(torch.tensor([0.0, 0.5, 0.8413447, 1 - 1e-7]))
        assert t.tolist() == pytest.approx([1e-3, 0.5, 0.7310586, 0.9945], abs=2e-3)  # sigmoid of 0, 1, 5.2
        assert (flow.time(torch.rand(10_000)) - 0.5).abs().mean() < 0.2  # 0.25 were they uniform

    def test_loss_by_hand(self):
        data = (torch.ones(2, 1, 1, 1), torch.zeros(2, 2, 2, 2))
        noise = (torch.zeros(2, 1, 1, 1), torch.full((2, 2, 2, 2), 3.0))

        def velocity(z, t):
            return torch.full((2, 1, 1, 1), 3.0), torch.zeros(2, 2, 2, 2)

        t = torch.tensor([0.5, 0.5])
        loss = RectifiedFlow().loss(velocity, data, noise, t)
        assert loss.levels.tolist() == [4, 9]  # targets 1 and -3: (1 - 3)^2 and (-3 - 0)^2, means not sums
        assert loss.total.item() == 13
        assert RectifiedFlow(level_weights=[0.5, 2]).loss(velocity, data, noise, t).total.item() == 20
        with pytest.raises(ValueError, match="3 level_weights for 2 levels"):
            RectifiedFlow(level_weights=[1, 1, 1]).loss(velocity, data, noise, t)

    def test_levels_have_independent_noise(self):
        coarse, fine = pyramid_noise([(4, 8, 8), (4, 8, 8)], 0, "noise", range(100))
        correlation = torch.corrcoef(torch.stack([coarse.flatten(), fine.flatten()]))[0, 1]
        assert abs(correlation) < 0.02
