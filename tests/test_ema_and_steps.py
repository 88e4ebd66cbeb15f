"""Weight averages, schedules and guarded steps."""

import math
import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import randomise, tiny_network
from torch import nn

from pyramid_ldm.config.common import TrainConfig
from pyramid_ldm.errors import UserError
from pyramid_ldm.nn.layers import advance_spectral_norm, spectral_layers
from pyramid_ldm.training.checkpoint import load_newest, save_checkpoint
from pyramid_ldm.training.ema import PowerEma, exponent
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.schedule import due, learning_rate, whole_steps
from pyramid_ldm.training.step import StepGuard, set_learning_rate, take_step

CPU = Runtime(torch.device("cpu"), False)


def test_exponents_of_edm2():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    for width in (0.02, 0.05, 0.1, 0.2):  # equation 126: the deviation of t^gamma on [0, 1]
        gamma = exponent(width)
        deviation = math.sqrt((gamma + 1) / ((gamma + 3) * (gamma + 2) ** 2))
        assert deviation == pytest.approx(width, rel=1e-9)


def scalar_model(value):
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def test_a_track_is_the_power_function_average_of_the_weights():
    values, images = [3.0, -1.0, 4.0, 1.0, -5.0], 16
    model = scalar_model(100.0)  # what it starts with is forgotten at the first step
    ema = PowerEma(model, [0.1, 0.2])
    for step, value in enumerate(values, start=1):
        model.weight.data.fill_(value)
        ema.update(model, images * step, images)
    for width in (0.1, 0.2):
        power = exponent(width) + 1
        # the mean of a piecewise constant function of t in [0, 5] under the density t^gamma
        weights = np.diff(np.arange(6) ** power) / 5**power
        assert weights.sum() == pytest.approx(1)
        assert ema.tracks[f"{width:g}"]["weight"].item() == pytest.approx(np.dot(weights, values), rel=1e-12)


class Pair(nn.Module):
    def __init__(self, order):
        super().__init__()
        for name in order:
            self.register_parameter(name, nn.Parameter(torch.full((2,), {"a": 1.0, "b": 2.0, "c": 3.0}[name])))


def test_tracks_go_by_name_not_by_order():
    ema = PowerEma(Pair("ab"), [0.1])
    swapped = Pair("ba")
    for step in range(1, 5):
        ema.update(swapped, step, 1)
    assert ema.tracks["0.1"]["a"].tolist() == pytest.approx([1, 1])
    assert ema.tracks["0.1"]["b"].tolist() == pytest.approx([2, 2])
    exported = ema.export(Pair("ba"), 0.1)
    assert exported.a.tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match=r"differ in \['c'\]"):
        ema.update(Pair("abc"), 9, 1)


def test_export_averages_weights_copies_buffers_and_folds():
    network = randomise(tiny_network())
    ema = PowerEma(network, [0.1])
    before = deepcopy(network)
    randomise(network, 0.3)
    advance_spectral_norm(network, 3)
    network.register_buffer("seen", torch.tensor([7.0]))
    ema.update(network, 100, 10)
    assert not any("spectral" in name for name in ema.tracks["0.1"])
    live = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    exported = ema.export(network, 0.1)
    assert exported.seen.tolist() == [7.0]
    assert not spectral_layers(exported)
    assert not exported.training
    assert not any(p.requires_grad for p in exported.parameters())
    assert all(torch.equal(live[name], tensor) for name, tensor in network.state_dict().items())
    assert spectral_layers(network), "the live one keeps its norms"
    normalised = {id(layer.weight) for layer, _ in spectral_layers(network)}
    old, new = dict(before.named_parameters()), dict(network.named_parameters())
    beta = 0.9 ** (exponent(0.1) + 1)
    checked = [0, 0]
    for name, parameter in exported.named_parameters():
        average = (beta * old[name] + (1 - beta) * new[name]).detach()
        gain = name.removesuffix(".conv.weight").removesuffix(".conv.bias") + ".gain"
        if gain in new:  # folded, too
            factor = (beta * old[gain] + (1 - beta) * new[gain]).detach()
            parameter = parameter / (factor[..., None] if parameter.dim() == 4 else factor.flatten())
        if id(new[name]) in normalised:
            sigma = float(average.norm() / parameter.norm())
            torch.testing.assert_close(parameter, average / sigma)
            # power iteration reaches the largest singular value from below
            assert 0.95 < sigma / float(torch.linalg.matrix_norm(average.flatten(1), 2)) < 1.0001
        else:
            torch.testing.assert_close(parameter, average)
        checked[id(new[name]) in normalised] += 1
    assert min(checked) > 5


def test_tracks_survive_a_checkpoint_and_refuse_others(tmp_path):
    model = scalar_model(1.0)
    ema = PowerEma(model, [0.05, 0.1])
    model.weight.data.fill_(2.0)
    ema.update(model, 20, 10)
    save_checkpoint(tmp_path, 20, {"ema": ema.state_dict()})
    saved = load_newest(tmp_path)[0]["ema"]
    fresh = PowerEma(scalar_model(9.0), [0.05, 0.1])
    fresh.load_state_dict(saved)
    assert {k: t["weight"].item() for k, t in fresh.tracks.items()} == {
        k: t["weight"].item() for k, t in ema.tracks.items()
    }
    with pytest.raises(ValueError, match="EMA tracks"):
        PowerEma(model, [0.05]).load_state_dict(saved)
    with pytest.raises(ValueError, match="parameters differ"):
        PowerEma(Pair("ab"), [0.05, 0.1]).load_state_dict(saved)


def test_the_rate_rises_linearly_then_stays():
    config = TrainConfig(images=1000, learning_rate=0.8, warmup=100)
    rates = [learning_rate(config, seen) for seen in (0, 49, 99, 100, 999, 5000)]
    assert rates == pytest.approx([0.008, 0.4, 0.8, 0.8, 0.8, 0.8])
    assert learning_rate(TrainConfig(learning_rate=0.8), 0) == 0.8


def test_the_rate_falls_along_a_cosine_to_zero():
    config = TrainConfig(images=1100, learning_rate=0.8, warmup=100, decay="cosine")
    # cos 60 degrees is a half: 0.75 of the rate after a third
    rates = [learning_rate(config, seen) for seen in (49, 100, 100 + 1000 / 3, 600, 1100, 2000)]
    assert rates == pytest.approx([0.4, 0.8, 0.6, 0.4, 0, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("interval", "before", "after", "expected"),
    [
        (100, 0, 99, False),
        (100, 0, 100, True),
        (100, 100, 199, False),
        (100, 96, 128, True),
        (100, 100, 100, False),
        (100, 150, 450, True),
        (0, 0, 1000, False),
    ],
)
def test_an_interval_is_due_once_a_multiple_is_passed(interval, before, after, expected):
    assert due(interval, before, after) is expected


def test_counts_are_rounded_up_to_whole_steps():
    assert [whole_steps(n, 48) for n in (1, 47, 48, 49, 1000)] == [48, 48, 48, 96, 1008]


def test_too_many_bad_steps_in_a_row_stop_the_run_with_their_files():
    guard = StepGuard(3)
    assert [guard.record(ok, ["x.jpg"]) for ok in (False, False, True, False, False)] == [None] * 5
    assert (guard.count, guard.in_a_row) == (4, 2)
    error = guard.record(False, ["a.jpg", "b.png"])
    assert isinstance(error, UserError)
    assert re.search(r"3 steps in a row.*train\.learning_rate.*: a\.jpg, b\.png", str(error))


def one_step(gradient, clip=0.0):
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    set_learning_rate(optimizer, 0.5)
    model.weight.grad = torch.tensor([gradient])
    metrics = Metrics()
    done = take_step(optimizer, model, clip, CPU, metrics, "norm")
    assert model.weight.grad is None
    return done, model.weight[0].tolist(), metrics.take()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(bad):
    assert one_step([1.0, bad]) == (False, [1.0, 1.0], {})


def test_a_step_moves_the_weights_by_the_clipped_gradient():
    assert one_step([3.0, 4.0]) == (True, [-0.5, -1.0], {"norm": 5.0})
    done, weights, metrics = one_step([3.0, 4.0], clip=1.0)
    assert done
    assert weights == pytest.approx([1 - 0.3, 1 - 0.4], abs=1e-5)
    assert metrics == {"norm": 5.0}, "the norm before clipping"


def test_a_gradient_out_of_all_proportion_is_left_out():
    guard = StepGuard(2)
    norms = [10.0 ** (i % 3 - 1) for i in range(150)]  # two orders of magnitude are nothing unusual
    assert all(guard.accepts(norm) for norm in norms)
    assert guard.mean_log_norm == pytest.approx(0.0, abs=0.05), "the logarithm of 1"
    again = StepGuard(2)
    again.load_state_dict(guard.state_dict())
    for one in (guard, again):
        assert one.accepts(99 * math.exp(one.mean_log_norm))
        assert not one.accepts(200 * math.exp(one.mean_log_norm))
        assert not one.accepts(math.nan)
        assert one.accepts(1.0), "and the next may be taken"


def test_nothing_is_out_of_proportion_at_first():
    guard = StepGuard(2)
    assert all(guard.accepts(10.0**i) for i in range(-6, 6))
    guard = StepGuard(2)
    guard.load_state_dict({"count": 3, "in_a_row": 1})  # of a checkpoint that knows no norms
    assert guard.accepts(1e6)
    assert (guard.count, guard.in_a_row) == (3, 1)


def test_the_guard_keeps_the_weights():
    guard = StepGuard(2)
    for _ in range(StepGuard.MEMORY):
        guard.accepts(1.0)
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    taken = []
    for gradient in (300.0, 1.0):
        model.weight.grad = torch.tensor([[gradient, 0.0]])
        taken.append(take_step(optimizer, model, 0.0, CPU, Metrics(), "norm", guard))
    assert taken == [False, True]
    assert model.weight[0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("growth", [1.06, 1.5, 3.0])
def test_norms_that_grow_step_by_step_are_found(growth):
    guard = StepGuard(2)
    assert all(guard.accepts(1.0) for _ in range(200))
    norms = [growth**i for i in range(500) if growth**i < 1e30]
    assert [guard.accepts(norm) for norm in norms][-2:] == [False, False]


def test_a_hundred_gradients_of_zero_do_not_forbid_another():
    guard = StepGuard(2)
    assert all(guard.accepts(0.0) for _ in range(200))
    assert guard.accepts(1.0)
