"""The configs that come with the package: their exact ratios, and that both stages' networks fit each other."""

from pathlib import Path

import pytest
import torch
from conftest import at

from pyramid_ldm.autoencoders.load import load_autoencoder
from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.condition import Context
from pyramid_ldm.config import AutoencoderTraining, FlowTraining, load_config
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp

ROOT = Path(__file__).parent.parent
PAPER = ("lsun_bedrooms_256", "lsun_churches_256", "celebahq_1024", "people2k", "scapes2k")
RATIOS = {
    "demo": 3 * 64 * 64 / (16 + 128 + 256 + 256),
    "photographs_256": 48.0,
    "lsun_bedrooms_256": 48.0,
    "lsun_churches_256": 48.0,
    "celebahq_1024": 256.0,
    "people2k": 204.8,
    "scapes2k": 204.8,
    "photographs_2k": 204.8,
    "scapes2k_cpu": 204.8,
}
FIXED_SHAPES = {"demo_pixels": (3, 32, 32), "demo_wavelet": (12, 32, 32)}
LATENTS = {
    "celebahq_1024": [(64, 8, 8), (32, 16, 16)],
    "people2k": [(64, 1, 1), (60, 4, 4), (48, 8, 8), (32, 16, 16), (48, 32, 32)],
    "scapes2k": [(16, 1, 2), (60, 2, 4), (48, 4, 8), (32, 8, 16), (48, 16, 32)],
}
LATENTS |= {"photographs_2k": LATENTS["people2k"], "scapes2k_cpu": LATENTS["scapes2k"]}
SIDES = {"photographs_256": [1, 4, 8, 16], "lsun_bedrooms_256": [1, 4, 8, 16], "lsun_churches_256": [4, 8, 16, 32]}


def test_both_folders_hold_the_same_configs_and_one_codebook():
    names = {
        kind: {p.stem for p in (ROOT / kind).glob("*.yaml")} for kind in ("autoencoder_configs", "diffusion_configs")
    }
    assert names["diffusion_configs"] == RATIOS.keys() | FIXED_SHAPES.keys()
    assert names["autoencoder_configs"] == RATIOS.keys() | FIXED_SHAPES.keys() | {"demo_vq"}


@pytest.mark.parametrize("name", FIXED_SHAPES)
def test_a_stage_one_without_parameters_and_its_network(name):
    autoencoder = load_autoencoder(ROOT / f"autoencoder_configs/{name}.yaml")
    config = load_config(FlowTraining, ROOT / f"diffusion_configs/{name}.yaml", ["data.root=x"])
    assert config.data.autoencoder == f"autoencoder_configs/{name}.yaml"
    config.resolve(autoencoder.image_size, autoencoder.levels)
    assert PyramidNCSNpp(config.model).shapes == [FIXED_SHAPES[name]]


def test_the_demos_flow_takes_the_latents_of_a_codebook():
    stage_one = load_config(AutoencoderTraining, ROOT / "autoencoder_configs/demo_vq.yaml", ["data.root=x"])
    stage_two = load_config(FlowTraining, ROOT / "diffusion_configs/demo.yaml", ["data.shards=x"])
    autoencoder = PyramidAutoencoder(stage_one.model).eval()
    stage_two.model.resolve(stage_one.image_size, stage_one.model.levels)
    with torch.no_grad():
        latents = autoencoder.encode(torch.zeros(1, 3, 64, 64)).mode()
        assert [v.shape for v in PyramidNCSNpp(stage_two.model)(latents, at(0.5))] == [z.shape for z in latents]


@pytest.mark.parametrize("name", RATIOS)
def test_config(name):
    stage_one = load_config(AutoencoderTraining, ROOT / f"autoencoder_configs/{name}.yaml", ["data.root=x"])
    stage_two = load_config(FlowTraining, ROOT / f"diffusion_configs/{name}.yaml", ["data.shards=x"])
    assert stage_two.scaling == ("paper" if name in PAPER else "unit")
    with torch.device("meta"):
        autoencoder = PyramidAutoencoder(stage_one.model)
        assert autoencoder.compression_ratio() == pytest.approx(RATIOS[name], abs=1e-9)
        stage_two.model.resolve(stage_one.image_size, stage_one.model.levels)
        flow = PyramidNCSNpp(stage_two.model)
        image = torch.empty(1, 3, *stage_one.image_size)
        latents = autoencoder.encode(image).mode()
        assert [tuple(z.shape[1:]) for z in latents] == LATENTS.get(name, flow.shapes)
        if name in SIDES:
            assert [z.shape[2] for z in latents] == SIDES[name]
        velocities = flow(latents, Context(torch.empty(1), torch.empty(1)))
        assert [v.shape for v in velocities] == [z.shape for z in latents]
    parameters = [sum(p.numel() for p in half.parameters()) for half in (autoencoder.encoder, autoencoder.decoder)]
    assert parameters[0] < parameters[1]
    assert stage_one.train.batch_size * stage_one.train.accumulate == (
        4 if "2k" in name else stage_one.train.batch_size
    )
