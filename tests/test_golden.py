"""Values these networks gave when they were written: a change here is a change of every trained model.

Tolerance 1e-3, relative: torch's CPU random numbers are the same on every machine, sums in another order are not, and
a few Adam steps amplify that; a changed constant, a lost term or another initialisation moves them by far more.
"""

import pytest
import torch
from conftest import tiny_autoencoder, tiny_network

from pyramid_ldm.nn.layers import advance_spectral_norm
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.pyramid import pyramid_noise

AUTOENCODER = [0.78378, 0.79428, 0.72142, 0.69514]
FLOW = [4.88373, 3.99964, 3.09892, 2.27902]


def curve(model, loss) -> list[float]:
    """The losses of four Adam steps, 1e-2."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    found = []
    for _ in range(4):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        advance_spectral_norm(model)
        found.append(value.item())
    return found


def test_autoencoder():
    model = tiny_autoencoder()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = pyramid_noise([(6, 2, 2), (4, 4, 4)], 0, "golden", [0, 1])

    def loss():
        output = model(image, noise)
        return (output.reconstruction - image).abs().mean() + 0.1 * output.posterior.kl()

    assert curve(model, loss) == pytest.approx(AUTOENCODER, rel=1e-3)


def test_flow():
    model = tiny_network()
    data, noise = (pyramid_noise(model.shapes, seed, "golden", [0, 1]) for seed in (1, 2))
    t = torch.tensor([0.2, 0.8])
    assert curve(model, lambda: RectifiedFlow().loss(model, data, noise, t).total) == pytest.approx(FLOW, rel=1e-3)
