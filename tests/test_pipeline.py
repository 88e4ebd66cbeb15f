import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import randomise, tiny_autoencoder, tiny_network

from pyramid_ldm import PyramidPipeline
from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.cli.common import add_device, add_solver, solver_options
from pyramid_ldm.errors import UserError
from pyramid_ldm.info.memory import PeakMemory
from pyramid_ldm.nn.layers import to_bfloat16
from pyramid_ldm.processes.edm import EDM
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.processes.vp import VariancePreserving
from pyramid_ldm.pyramid import LatentScaling, pyramid_noise


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    scaling = LatentScaling(((0.0,) * 6, (0.5,) * 4), ((2.0,) * 6, (0.5, 1.0, 2.0, 3.0)))
    pipeline = PyramidPipeline(
        randomise(tiny_network(), 0.05), randomise(tiny_autoencoder(), 0.05).eval(), scaling, RectifiedFlow(eps=2e-3)
    )
    pipeline.save_pretrained(folder / "model")
    return folder


def test_a_run_directory_and_its_model_directory_load_alike(directory):
    a, b = PyramidPipeline.from_pretrained(directory), PyramidPipeline.from_pretrained(directory / "model")
    assert a.checkpoint == b.checkpoint != ""
    assert a.process == RectifiedFlow(eps=2e-3)
    assert a.scaling.std[1] == (0.5, 1.0, 2.0, 3.0)


def test_shifted_levels_travel_with_the_pipeline(directory, tmp_path):
    plain = PyramidPipeline.from_pretrained(directory)
    shifted = PyramidPipeline(plain.network, plain.autoencoder, plain.scaling, RectifiedFlow(level_shifts=[3.0, 1.0]))
    shifted.save_pretrained(tmp_path)
    loaded = PyramidPipeline.from_pretrained(tmp_path)
    a, b, c = (pipe(1, solver="euler", steps=4).latents[0] for pipe in (plain, shifted, loaded))
    assert torch.equal(b, c)
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("form", [1, 2])
def test_older_pipelines_are_read(directory, tmp_path, form):
    shutil.copytree(directory / "model", tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "pipeline.json").read_text())
    shifts = {} if form == 1 else {"level_shifts": [3.0, 1.0]}
    process = {"eps": 3e-3} if form == 1 else {"rectified_flow": {"eps": 3e-3, **shifts}}
    old = {"format": form, "scaling": manifest["scaling"], **process}
    (tmp_path / "old" / "pipeline.json").write_text(json.dumps(old))
    pipe = PyramidPipeline.from_pretrained(tmp_path / "old")
    assert pipe.process == RectifiedFlow(eps=3e-3, **shifts)
    assert pipe.scaling == PyramidPipeline.from_pretrained(directory).scaling


def test_images_latents_and_count_of_evaluations(directory):
    pipeline = PyramidPipeline.from_pretrained(directory)
    out = pipeline(num_images=3, seed=1, solver="euler", steps=4, batch_size=2)
    assert [image.size for image in out.images] == [(32, 32)] * 3
    assert [tuple(z.shape) for z in out.latents] == [(3, 6, 2, 2), (3, 4, 4, 4)]
    assert out.nfe == 4
    # Latents are raw: decoding them gives the images.
    with torch.no_grad():
        decoded = pipeline.autoencoder.decode(out.latents)
    pixels = decoded.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    for image, expected in zip(out.images, pixels, strict=True):
        assert np.abs(np.asarray(image).astype(int) - expected.astype(int)).max() <= 1


def test_the_solvers_result_is_unscaled(directory):
    pipeline = PyramidPipeline.from_pretrained(directory)
    noise = pyramid_noise(pipeline.network.shapes, 5, "sample", [0])
    scaled = pipeline.solve(noise, SolverOptions("euler", steps=3)).latents
    raw = pipeline(1, seed=5, solver="euler", steps=3).latents
    torch.testing.assert_close(raw[0], scaled[0] * 2)
    torch.testing.assert_close(raw[1][:, 3], scaled[1][:, 3] * 3 + 0.5)


@pytest.mark.parametrize("solver", ["euler", "rk45"])
def test_image_k_of_a_seed_does_not_depend_on_the_batch(directory, solver):
    pipeline = PyramidPipeline.from_pretrained(directory)
    options = {"seed": 3, "solver": solver, **({"steps": 10} if solver == "euler" else {"rtol": 1e-3, "atol": 1e-3})}
    together = pipeline(4, batch_size=4, **options)
    apart = pipeline(4, batch_size=1, **options)
    third = pipeline(1, first_index=2, **options)
    for a, b in zip(together.images, apart.images, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1
    assert np.abs(np.asarray(together.images[2]).astype(int) - np.asarray(third.images[0]).astype(int)).max() <= 1
    assert not np.array_equal(together.images[0], together.images[1])


def test_what_is_missing_or_foreign_is_named(directory, tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        PyramidPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no model.*train-flow"):
        PyramidPipeline.from_pretrained(tmp_path)
    shutil.copytree(directory / "model", tmp_path / "model")
    weights = tmp_path / "model/flow/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        PyramidPipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="choose rk45, dopri5, euler"):
        PyramidPipeline.from_pretrained(directory)(1, solver="leap")


@pytest.mark.parametrize("process", [RectifiedFlow(), VariancePreserving(prediction="velocity"), EDM()])
def test_fresh_noise_is_an_images_own(directory, tmp_path, process):
    """Ancestral steps: image k of a seed is the same whatever is drawn beside it, also by a pipeline that was saved."""
    loaded = PyramidPipeline.from_pretrained(directory)
    pipeline = PyramidPipeline(loaded.network, loaded.autoencoder, loaded.scaling, process)
    pipeline.save_pretrained(tmp_path)
    options = {"seed": 3, "solver": "ancestral", "steps": 5}
    together = pipeline(3, **options).latents
    alone = PyramidPipeline.from_pretrained(tmp_path)(2, first_index=1, batch_size=1, **options).latents
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:], b, atol=1e-4, rtol=1e-4)
    assert (pipeline(1, **(options | {"eta": 0.0})).latents[0] - together[0][:1]).abs().max() > 1e-3


def test_sampling_keeps_no_graph(directory):
    out = PyramidPipeline.from_pretrained(directory)(1, solver="euler", steps=2)
    assert not any(level.requires_grad for level in out.latents)


def test_bfloat16_weights_are_converted_once_and_the_heads_stay_exact(directory):
    """A bfloat16 copy draws about the same picture; what is loaded stays as it is."""
    pipeline = PyramidPipeline.from_pretrained(directory)
    exact = pipeline(2, seed=1, solver="euler", steps=4)
    rounded = pipeline(2, seed=1, solver="euler", steps=4, bf16=True)
    assert pipeline._ready("autoencoder", bf16=True) is pipeline._ready("autoencoder", bf16=True)
    for network in (pipeline.network, pipeline.autoencoder):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    low = pipeline._ready("autoencoder", bf16=True)
    assert low.decoder.last_weight.dtype == torch.float32
    assert {p.dtype for n, p in low.named_parameters() if n.endswith("conv1.weight")} == {torch.bfloat16}
    for a, b in zip(exact.images, rounded.images, strict=True):
        difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
        assert 0 < difference.max() < 40
        assert difference.mean() < 4


def test_a_decode_that_bfloat16_cannot_hold_is_made_again_in_float32(directory, monkeypatch):
    pipe = PyramidPipeline.from_pretrained(directory)
    latents = tuple(torch.randn(2, *shape) for shape in pipe.network.shapes)
    exact = list(pipe.decode(latents))
    decode_tiled = PyramidAutoencoder.decode_tiled

    def overflowing(autoencoder, parts, tile):
        image = decode_tiled(autoencoder, parts, tile)
        if torch.is_autocast_enabled("cpu") and torch.equal(parts[0], latents[0][:1]):
            image[0, 0, 3, 3] = torch.inf
        return image

    monkeypatch.setattr(PyramidAutoencoder, "decode_tiled", overflowing)
    first, second = pipe.decode(latents, bf16=True)
    assert torch.equal(first, exact[0])
    assert not torch.equal(second, exact[1]), "of those that can be held nothing is computed twice"
    assert (second - exact[1]).abs().max() < 0.1


def test_adaptive_steps_are_computed_in_float32_unless_told_otherwise(directory):
    pipeline = PyramidPipeline.from_pretrained(directory)
    noise = pyramid_noise(pipeline.network.shapes, 5, "sample", [0])
    exact = pipeline.solve(noise, SolverOptions("rk45")).latents
    for options, same in (
        (SolverOptions("rk45"), True),
        (SolverOptions("rk45", rtol=1e-2, atol=1e-2, bf16=True), False),
    ):
        found = pipeline.solve(noise, options, bf16=True).latents
        assert torch.equal(found[0], exact[0]) is same


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "rk45"])
def test_a_compiled_network_draws_the_same_images(directory, solver):
    plain, compiled = PyramidPipeline.from_pretrained(directory), PyramidPipeline.from_pretrained(directory).compile()
    a, b = (pipeline(3, seed=2, solver=solver, steps=5, batch_size=2) for pipeline in (plain, compiled))
    for left, right in zip(a.images, b.images, strict=True):
        assert np.abs(np.asarray(left).astype(int) - np.asarray(right).astype(int)).max() <= 1


def test_guidance_of_the_command_line_is_the_solvers():
    parser = argparse.ArgumentParser()
    add_solver(parser)
    add_device(parser)
    options = solver_options(parser.parse_args(["--guidance", "2.5", "--steps", "7"]))
    assert (options.guidance, options.describe()) == (2.5, "abm2, 7 steps, guidance 2.5")
    assert solver_options(parser.parse_args([])).describe() == "abm2, 20 steps"


def test_guidance_is_for_networks_that_speak_early(directory, tmp_path):
    with pytest.raises(UserError, match=r"guidance is 2; this network was trained without model\.early"):
        PyramidPipeline.from_pretrained(directory)(1, guidance=2.0)
    scaling = LatentScaling(((0.0,) * 6, (0.0,) * 4), ((1.0,) * 6, (1.0,) * 4))
    network = randomise(tiny_network(early=True), 0.05)
    pipeline = PyramidPipeline(network, randomise(tiny_autoencoder(), 0.05).eval(), scaling)
    plain, guided = (pipeline(2, steps=4, guidance=scale).latents for scale in (1.0, 2.0))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, guided, strict=True))


def test_twenty_steps_of_abm2_unless_told_otherwise(directory):
    output = PyramidPipeline.from_pretrained(directory)(1)
    assert output.nfe == 20
    assert SolverOptions().record(False) == {"solver": "abm2", "steps": 20, "precision": "flow fp32, decoder fp32"}
    assert [SolverOptions(name).count for name in ("euler", "ddim", "ancestral", "heun", "dpmpp_2m")] == [200] * 3 + [
        20
    ] * 2


def test_bfloat16_needs_no_second_copy_in_float32(directory):
    pipeline = PyramidPipeline.from_pretrained(directory).to("cpu")
    before = list(pipeline.network.parameters())
    places = [p.data_ptr() for p in before]
    with PeakMemory(pipeline.network.state_dict().values()) as memory:
        loaded = memory.live
        low = to_bfloat16(pipeline.network)
    stays = sum(p.numel() * p.element_size() for p in low.state_dict().values())
    assert stays < 0.7 * sum(p.numel() * p.element_size() for p in before)
    assert memory.peak - loaded < 1.2 * stays
    pipeline(1, solver="euler", steps=1, bf16=True)
    assert [p.data_ptr() for p in pipeline.network.parameters()] == places, "as they were loaded"
