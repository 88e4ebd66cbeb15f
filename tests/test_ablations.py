"""tools/ablate.py: every row is one that trains, and the switches that docs/EXPERIMENTS.md names are config keys."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import ablate  # noqa: E402
from experiments import flow_rows  # noqa: E402
from experiments.ablations import AUTOENCODER, AUTOENCODER_RECIPE, FLOW  # noqa: E402

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder  # noqa: E402
from pyramid_ldm.config import AutoencoderTraining, FlowTraining, load_config  # noqa: E402
from pyramid_ldm.config.base import to_yaml  # noqa: E402
from pyramid_ldm.evaluation import frechet  # noqa: E402
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp  # noqa: E402
from pyramid_ldm.pyramid import Level, latent_values  # noqa: E402

STAGE_ONE = ["run_dir=r", "data.root=d", "loss.perceptual.weights=random"]
STAGE_TWO = ["run_dir=r", "data.shards=s"]


@pytest.mark.tools
@pytest.mark.parametrize("name", AUTOENCODER)
def test_every_row_of_stage_one_is_another_network_or_loss_with_as_many_values(name):
    config = load_config(AutoencoderTraining, AUTOENCODER_RECIPE, [*AUTOENCODER[name], *STAGE_ONE])
    default = load_config(AutoencoderTraining, AUTOENCODER_RECIPE, STAGE_ONE)
    assert (to_yaml(config) == to_yaml(default)) == (name == "default")
    with torch.device("meta"):
        model = PyramidAutoencoder(config.model)
    assert latent_values(model.levels, config.image_size) == 512


@pytest.mark.tools
@pytest.mark.parametrize("name", FLOW)
def test_every_row_of_stage_two_fits_the_demo(name):
    config = load_config(FlowTraining, flow_rows.RECIPE, [*FLOW[name], *STAGE_TWO])
    default = load_config(FlowTraining, flow_rows.RECIPE, STAGE_TWO)
    assert (to_yaml(config) == to_yaml(default)) == (name == "default")
    levels = [Level(64, 16), Level(16, 8), Level(8, 4), Level(4, 1)]
    config.model.resolve([64, 64], levels)
    with torch.device("meta"):
        PyramidNCSNpp(config.model)
    for of_levels in (config.rectified_flow.level_weights, config.rectified_flow.level_shifts):
        assert of_levels is None or len(of_levels) == len(levels)


class Colours:
    """Stands where the Inception network does: three features, the mean colour."""

    def __init__(self, path, device):
        self.device = device

    def __call__(self, images):
        return images.mean(dim=(2, 3))


@pytest.mark.tools
def test_ablations_of_the_flow_train_judge_and_go_on(tmp_path, finished, photographs, monkeypatch, capsys):
    words = ["ablate", "flow", "--shards", str(finished), "--reference", str(photographs), "--inception", "none.pt",
             "--out", str(tmp_path / "out"), "--rows", "default", "time logit-normal", "--images", "4",
             "--samples", "3", "--steps", "2", "--set", "model.widths=[8, 8]", "train.batch_size=2",
             "log.every=2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(frechet, "Inception", Colours)
    assert ablate.main() == 0, capsys.readouterr().err
    table = (tmp_path / "out" / "table.md").read_text()
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert lines[2:] == ["default", "time logit-normal"]
    assert re.search(r"3 samples against 12 real images\. Half of these, 6, are -?\d", table)
    monkeypatch.setattr(flow_rows, "train_flow", None)  # what is done is not trained again
    assert ablate.main() == 0
    assert (tmp_path / "out" / "table.md").read_text() == table
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "2", "3"])  # only judged with more steps
    assert ablate.main() == 0
    more = (tmp_path / "out" / "table.md").read_text()
    assert "KID x 1000, Euler 2 | KID x 1000, Euler 3 | FID, Euler 3" in more


def keys_of(config, before=""):
    for key, value in config.items():
        yield before + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{before}{key}.")


def test_every_switch_that_is_documented_is_a_key():
    text = (ROOT / "docs" / "EXPERIMENTS.md").read_text()
    table = text[text.index("## The switches") :]
    named = re.findall(r"`([a-z_.]+)`", "".join(line.split("|")[2] for line in table.splitlines() if "|" in line))
    known = {
        key
        for schema, recipe, words in (
            (AutoencoderTraining, AUTOENCODER_RECIPE, STAGE_ONE),
            (FlowTraining, flow_rows.RECIPE, STAGE_TWO),
        )
        for key in keys_of(yaml.safe_load(to_yaml(load_config(schema, recipe, words))))
    }
    assert len(named) > 20
    assert set(named) <= known


@pytest.mark.parametrize("path", sorted((ROOT / "autoencoder_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_named_after_the_papers_data_sets_keep_its_choices(path):
    config = load_config(AutoencoderTraining, path, ["data.root=x"])
    papers = path.stem not in ("demo", "demo_vq", "photographs_256")
    assert config.model.encoder.image_patch == (1 if papers else 4)
    assert config.model.decoder.branch_blocks == (2 if papers else 1)
    assert config.model.encoder.spectral_norm
    assert config.model.skip == "res_skip"
    assert config.model.attention.decoder == "spatial_channel"
    assert config.model.encoder.pooling == "average"
    assert config.model.decoder.dropout == (0.35 if papers else 0.0)
