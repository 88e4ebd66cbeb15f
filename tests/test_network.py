from dataclasses import replace

import pytest
import torch
from conftest import at, randomise, tiny_network, tiny_network_config

from pyramid_ldm.errors import UserError
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp
from pyramid_ldm.nn.layers import spectral_layers
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
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
    "early": {"early": True},
    "early, one level": {"early": True, "levels": ((8, 4),)},
    **{f"attention {kind}": {"attention": kind} for kind in ("spatial", "channel", "none")},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_builds_steps_saves_and_loads(changes, tmp_path):
    network = randomise(tiny_network(**changes), 0.05).train()
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
        for a, b in zip(loaded(data, at(0.2, 0.9)), data, strict=True):
            assert a.shape == b.shape
    assert [tuple(z.shape) for z in loaded(data, at(0.2, 0.9))] == [tuple(z.shape) for z in data]


def test_a_new_network_predicts_zero():
    network = tiny_network()
    for level in network(latents(network), at(0.1, 1.0)):
        assert level.abs().max() == 0


def test_every_level_depends_on_every_other():
    network = randomise(
        tiny_network(image_size=(32, 32), levels=((32, 4), (16, 3), (8, 2)), widths=[16, 16, 16])
    ).eval()
    inputs = tuple(z.requires_grad_() for z in latents(network, 1))
    for velocity in network(inputs, at(0.5)):
        gradients = torch.autograd.grad(velocity.square().sum(), inputs, retain_graph=True)
        assert all(g.abs().max() > 1e-8 for g in gradients)


def test_a_branch_enters_and_leaves_at_its_own_resolution():
    network = tiny_network(image_size=(64, 64), levels=((32, 4), (8, 2)), widths=[16, 16, 24])
    seen = {}

    def record(name):
        def hook(module, args, out):
            seen[name] = tuple(out.shape[1:])

        return hook

    network.branches["32"].enter.register_forward_hook(record("enter"))
    network.branches["32"].leave.register_forward_hook(record("leave"))
    network(latents(network, 1), at(0.5))
    assert seen == {"enter": (24, 2, 2), "leave": (24, 2, 2)}


def test_dropout_schedule_by_level():
    network = tiny_network(image_size=(64, 64), levels=((64, 4), (8, 2)), widths=[16] * 4, dropout=0.35)
    rates = [level.blocks.residual[0].dropout.p for level in network.down_levels]
    assert rates == pytest.approx([0, 0.35 / 3, 0.7 / 3, 0.35])
    assert [level.blocks.residual[0].dropout.p for level in network.up_levels] == pytest.approx(rates[::-1])


def test_dropout_schedules_of_the_config():
    def rates(schedule):
        network = tiny_network(widths=[16] * 2, dropout=0.4, dropout_schedule=schedule)
        return [level.blocks.residual[0].dropout.p for level in network.down_levels]

    assert rates("uniform") == [0.4, 0.4]
    assert rates("increasing") == [0.4, 0]  # fine to coarse


def test_too_few_widths_are_refused():
    with pytest.raises(UserError, match="need at least 3"):
        tiny_network_config(image_size=(32, 32), levels=((32, 4), (8, 2)), widths=[8, 8])
    with pytest.raises(UserError, match="does not divide"):
        tiny_network_config(image_size=(32, 32), levels=((16, 4), (8, 2)), widths=[8] * 6)


def test_guidance_extrapolates_from_what_is_said_on_the_way_down():
    network = randomise(tiny_network(early=True), 0.05).eval()
    noisy, context = latents(network), at(0.4, 0.7)
    with torch.no_grad():
        plain = network(noisy, context)
        both = network(noisy, replace(context, early=True))
        late, early = both[:2], both[2:]
        for a, b in zip(plain, late, strict=True):
            assert torch.equal(a, b)
        for scale in (0.0, 0.5, 1.5):
            for a, b, c in zip(network(noisy, replace(context, guidance=scale)), early, late, strict=True):
                torch.testing.assert_close(a, b + scale * (c - b))


def test_what_is_said_early_knows_nothing_of_the_way_up():
    network = randomise(tiny_network(early=True), 0.05)
    early = network(latents(network), replace(at(0.4, 0.7), early=True))[2:]
    sum(level.square().sum() for level in early).backward()
    moved = {
        name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert "up_levels" not in moved
    assert {"down_levels", "branches", "input", "time"} <= moved


def test_the_early_loss_is_half_as_heavy():
    """Twin networks whose late prediction is zero: the loss is the target's size, and half of the early error."""
    network = tiny_network(early=True)
    data, noise = latents(network), latents(network, seed=1)
    t = torch.tensor([0.2, 0.9])
    loss = RectifiedFlow().loss(network, data, noise, t)
    size = sum((x - e).square().mean() for x, e in zip(data, noise, strict=True))
    torch.testing.assert_close(loss.total, 1.5 * size)  # it predicts zero both times
    torch.testing.assert_close(loss.levels.sum(), size)
