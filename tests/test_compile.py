"""`compile: true` computes what eager code computes."""

import copy

import pytest
import torch
from conftest import at, randomise, tiny_autoencoder, tiny_network
from torch._dynamo.utils import counters

from pyramid_ldm.autoencoders.pyramid.regions import Regions
from pyramid_ldm.pyramid import pyramid_noise
from pyramid_ldm.training.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), False)
pytestmark = pytest.mark.slow


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_stage_one_with_regions_that_move():
    """Values, gradients, and no compilation after the first step although regions are cut elsewhere."""
    torch._dynamo.reset()
    eager = randomise(tiny_autoencoder(levels=((8, 4),), attention__max_tokens=16), 0.05).train()
    model = copy.deepcopy(eager)
    compiled = RUNTIME.wrap(model, compile_model=True)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    noise = pyramid_noise([(4, 4, 4)], 0, "noise", [0, 1])
    frames = []
    for step in range(3):
        regions = Regions.draw(2, 8, (32, 32), 0, [2 * step, 2 * step + 1])
        for network in (eager, compiled):
            network.zero_grad()
            network(image, noise, regions).reconstruction.square().mean().backward()
        for a, b in zip(gradients(eager), gradients(model), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        frames.append(counters["frames"]["ok"])
    assert frames[0] > 0
    assert frames[0] == frames[-1]
    assert copy.deepcopy(model)(image, noise).reconstruction.shape == image.shape  # as the average is exported


def test_stage_two():
    torch._dynamo.reset()
    eager = randomise(tiny_network(), 0.05)
    model = copy.deepcopy(eager)
    compiled = RUNTIME.wrap(model, compile_model=True)
    latents, context = pyramid_noise(eager.shapes, 0, "noise", [0, 1]), at(0.2, 0.8)
    for network in (eager, compiled):
        sum(level.square().sum() for level in network(latents, context)).backward()
    for a, b in zip(gradients(eager), gradients(model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
