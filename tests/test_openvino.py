"""OpenVINO computes what PyTorch does."""

import pytest
import torch
from conftest import randomise, tiny_autoencoder, tiny_network
from torch import nn

from pyramid_ldm import PyramidPipeline
from pyramid_ldm.errors import UserError
from pyramid_ldm.openvino_backend import converted
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.pyramid import LatentScaling, pyramid_noise
from pyramid_ldm.sample import settings_of


class Several(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return tuple(self.module(x) for x in inputs)


@pytest.fixture(scope="module")
def pipeline():
    scaling = LatentScaling(((0.0,) * 6, (0.5,) * 4), ((2.0,) * 6, (0.5, 1.0, 2.0, 3.0)))
    network = randomise(tiny_network(early=True), 0.05)
    return PyramidPipeline(network, randomise(tiny_autoencoder(), 0.05).eval(), scaling)


def served_like(pipeline):
    pytest.importorskip("openvino")
    return PyramidPipeline(pipeline.network, pipeline.autoencoder, pipeline.scaling).compile("openvino")


@pytest.fixture
def made(monkeypatch):
    """In what precision networks are converted, which PyTorch runs after all: converting one takes a while."""
    found = []
    monkeypatch.setattr(
        "pyramid_ldm.openvino_backend.converted", lambda module, inputs, bf16: found.append(bf16) or module
    )
    return found


def test_it_is_asked_for_whole_batches_and_made_once_a_way(pipeline, made):
    served = served_like(pipeline)
    how = {"seed": 2, "steps": 5, "batch_size": 2}
    for guidance in (1.0, 2.0):
        a, b = pipeline(3, guidance=guidance, **how), served(3, guidance=guidance, **how)  # the last batch is smaller
        for exact, found in zip(a.latents, b.latents, strict=True):
            torch.testing.assert_close(found, exact)
    served(2, guidance=2.0, bf16=True, **how)
    served(1, guidance=2.0, bf16=True, seed=2, steps=5, batch_size=1)
    assert made == [False, False, True, True]


def test_what_is_converted_computes_the_same():
    pytest.importorskip("openvino")
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2))
    x = torch.randn(2, 3, 8, 8)
    run = converted(Several(module), (x, x), False)
    a, b = run(x, 2 * x)
    torch.testing.assert_close((a, b), (module(x), module(2 * x)), rtol=1e-5, atol=1e-5)
    kept = a.clone()
    run(0 * x, x)
    assert torch.equal(a, kept), "what it returns is not overwritten"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "bf16", "tolerance"),
    [
        (SolverOptions(steps=5), False, 1e-5),
        (SolverOptions(steps=5, guidance=2.0), False, 1e-5),
        (SolverOptions(steps=5, guidance=2.0), True, 0.05),
        (SolverOptions("rk45"), True, 1e-3),
    ],
)
def test_it_draws_the_same_latents(pipeline, options, bf16, tolerance):
    noise = pyramid_noise(pipeline.network.shapes, 5, "sample", range(2))
    exact, found = (pipe.solve(noise, options, bf16=bf16).latents for pipe in (pipeline, served_like(pipeline)))
    for a, b in zip(exact, found, strict=True):
        assert 0 < (a - b).norm() <= tolerance * a.norm()


def test_it_has_to_be_there_and_on_a_cpu(pipeline, monkeypatch):
    elsewhere = PyramidPipeline(pipeline.network, pipeline.autoencoder, pipeline.scaling)
    elsewhere.device = torch.device("cuda")
    with pytest.raises(UserError, match="OpenVINO computes on the CPU here, not on cuda"):
        elsewhere.compile("openvino")
    served = served_like(pipeline)
    with pytest.raises(UserError, match="not on meta"):
        served.to("meta")
    assert served.device.type == "cpu"
    monkeypatch.setattr("pyramid_ldm.openvino_backend.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"OpenVINO is not installed; pip install 'pyramid-ldm\[openvino\]'"):
        PyramidPipeline(pipeline.network, pipeline.autoencoder, pipeline.scaling).compile("openvino")


def test_pictures_say_that_it_drew_them(pipeline):
    options = SolverOptions()
    assert "runtime" not in settings_of(pipeline, options, False)
    assert settings_of(served_like(pipeline), options, False)["runtime"] == "OpenVINO"
