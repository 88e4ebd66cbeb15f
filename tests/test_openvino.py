"""OpenVINO computes what PyTorch does."""

import pytest
import torch
from conftest import randomise, tiny_autoencoder, tiny_network

from pyramid_ldm import PyramidPipeline
from pyramid_ldm.errors import UserError
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.pyramid import LatentScaling, pyramid_noise
from pyramid_ldm.sample import settings_of


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
    """What is converted, for modules that PyTorch runs after all: converting a network takes a while."""
    found = []
    monkeypatch.setattr(
        "pyramid_ldm.openvino_backend.converted", lambda module, inputs, bf16: found.append((module, bf16)) or module
    )
    return found


def test_it_decodes_the_same_images(pipeline, monkeypatch):
    served = served_like(pipeline)
    latents = tuple(torch.randn(2, *shape) for shape in pipeline.network.shapes)
    exact, found = (torch.stack(list(pipe.decode(latents))) for pipe in (pipeline, served))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, exact), "it did not compute"
    monkeypatch.setattr("pyramid_ldm.pipeline.WHOLE", 0)
    assert torch.equal(torch.stack(list(served.decode(latents))), exact), "large ones are decoded in tiles"


def test_it_is_asked_for_whole_batches_and_made_once_a_way(pipeline, made):
    served = served_like(pipeline)
    how = {"seed": 2, "steps": 5, "batch_size": 2}
    for guidance in (1.0, 2.0):
        a, b = pipeline(3, guidance=guidance, **how), served(3, guidance=guidance, **how)  # the last batch is smaller
        for exact, found in zip(a.latents, b.latents, strict=True):
            torch.testing.assert_close(found, exact)
    assert [type(module).__name__ for module, _ in made] == ["_Evaluation", "_Decoding", "_Evaluation"]
    served(1, guidance=2.0, seed=2, steps=5, batch_size=2, bf16=True)
    assert [bf16 for _, bf16 in made[3:]] == [True, True]


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
    monkeypatch.setattr("pyramid_ldm.openvino_backend.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"OpenVINO is not installed; pip install 'pyramid-ldm\[openvino\]'"):
        PyramidPipeline(pipeline.network, pipeline.autoencoder, pipeline.scaling).compile("openvino")


def test_pictures_say_that_it_drew_them(pipeline):
    options = SolverOptions()
    assert "runtime" not in settings_of(pipeline, options, False)
    assert settings_of(served_like(pipeline), options, False)["runtime"] == "OpenVINO"
