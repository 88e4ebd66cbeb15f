"""`pyramid-ldm info`: what directories are, and what configs cost."""

import shutil

import pytest
import torch
from conftest import CPU, lively_autoencoder, tiny_autoencoder, tiny_network
from test_cli import complaint
from test_training import AE_CONFIG, FLOW_CONFIG

from pyramid_ldm.cli import main
from pyramid_ldm.config import AutoencoderTraining, FlowTraining, load_config, save_config
from pyramid_ldm.files import read_json, sealed, write_json
from pyramid_ldm.info import budget
from pyramid_ldm.info.budget import find_autoencoder, load_training
from pyramid_ldm.info.cost import NetworkCost, Use
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.pyramid import LatentScaling, Level
from pyramid_ldm.training import autoencoder_state, flow_state
from pyramid_ldm.training.checkpoint import save_checkpoint
from pyramid_ldm.training.run import describe_start


def info(capsys, *arguments) -> dict[str, str]:
    assert main(["info", *map(str, arguments)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in lines)}


@pytest.fixture(scope="module")
def ae_run(tmp_path_factory):
    """A run directory as `train-ae` leaves it, without the training."""
    run = tmp_path_factory.mktemp("ae")
    (run / "ae.yaml").write_text(AE_CONFIG)
    config = load_config(AutoencoderTraining, run / "ae.yaml", ["data.root=photos"])
    (run / "ae.yaml").unlink()
    save_config(config, run / "config.yaml")
    write_json(run / "provenance.json", [describe_start(config, CPU, 0, "abc")])
    state = autoencoder_state.build_state(config, torch.device("cpu"))
    state.images_seen = 24
    save_checkpoint(run, 24, state.state_dict())
    state.autoencoder.save_pretrained(run / "model")
    return run


@pytest.fixture(scope="module")
def flow_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("flow")
    (run / "flow.yaml").write_text(FLOW_CONFIG)
    config = load_config(FlowTraining, run / "flow.yaml", ["data.shards=latents"])
    save_config(config, run / "config.yaml")
    network = tiny_network()
    scaling = LatentScaling(((0.0,) * 6, (0.0,) * 4), ((2.0,) * 6, (0.5,) * 4))
    PyramidPipeline(network, tiny_autoencoder(), scaling).save_pretrained(run / "model")
    config.model = network.config
    state = flow_state.build_state(config, CPU.device)
    state.scaling = scaling
    save_checkpoint(run, 8, state.state_dict() | {"images_seen": 8})
    return run


def test_runs(capsys, ae_run, flow_run):
    rows = info(capsys, ae_run)
    assert rows["what"] == "run directory of train-ae"
    assert rows["images seen"] == "24 of 48"
    assert rows["latents"] == "2x2x6 + 4x4x4, 1:34.9, Gaussian"
    assert "pyramid_ldm 0.1.0" in rows["versions"]
    assert rows["command"]
    parameters = sum(p.numel() for p in tiny_autoencoder(decoder__dropout=0.2).encoder.parameters())
    assert f"encoder {parameters / 1e6:.1f} M" in rows["autoencoder"]
    rows = info(capsys, flow_run)
    assert rows["what"] == "run directory of train-flow"
    assert rows["images seen"] == "8 of 48"
    assert "one evaluation" in rows["flow"]
    assert rows["latent std"] == "2, 0.5"


def test_a_run_before_its_first_checkpoint(capsys, ae_run, tmp_path):
    shutil.copy(ae_run / "config.yaml", tmp_path)
    rows = info(capsys, tmp_path)
    assert "no checkpoint yet" in rows["images seen"]
    assert "encoder" in rows["autoencoder"]


def test_models_and_checkpoints(capsys, ae_run, flow_run, tmp_path):
    assert info(capsys, ae_run / "model")["what"] == "model directory: autoencoder"
    assert info(capsys, flow_run / "model")["what"] == "model directory: flow with its autoencoder"
    assert info(capsys, flow_run / "model/flow")["what"] == "model directory: flow"
    rows = info(capsys, ae_run / "checkpoints/00000024")
    assert rows["what"] == "checkpoint of train-ae, whole"
    assert rows["networks"].startswith("autoencoder, discriminator; ")
    assert info(capsys, flow_run / "checkpoints/00000008")["what"] == "checkpoint of train-flow, whole"
    broken = shutil.copytree(ae_run / "checkpoints/00000024", tmp_path / "00000024")
    with (broken / "state.pt").open("ab") as file:
        file.write(b"x")
    assert "state.pt is missing or truncated" in complaint(capsys, "info", broken)


def test_shards(capsys, finished, tmp_path):
    rows = info(capsys, finished)
    assert rows["what"] == "latent shards"
    assert "12 images" in rows["records"]
    assert "a record is 176 values (mean and log-variance), float32" in rows["latents"]
    assert lively_autoencoder().config.image_size == [32, 32]
    half = shutil.copytree(finished, tmp_path / "half")
    (half / "index.json").unlink()
    assert "unfinished" in info(capsys, half)["state"]
    index = read_json(finished / "index.json", "")
    del index["plan"]["precision"]
    write_json(half / "index.json", index)
    assert "index.json: damaged" in complaint(capsys, "info", half)
    write_json(half / "index.json", sealed(index))
    assert "another version" in complaint(capsys, "info", half)


def test_wrong_paths(capsys, tmp_path, ae_run):
    assert "no such directory" in complaint(capsys, "info", tmp_path / "nowhere")
    assert "is no run, model" in complaint(capsys, "info", tmp_path)
    assert "info --cost" in complaint(capsys, "info", ae_run / "config.yaml")
    assert "are for --cost" in complaint(capsys, "info", ae_run, "train.images=3")
    empty = tmp_path / "model"
    shutil.copytree(ae_run / "model", empty)
    (empty / "model.safetensors").unlink()
    assert "copy the model directory whole" in complaint(capsys, "info", empty)


def test_the_cost_of_configs(capsys, monkeypatch, tmp_path, ae_run, finished):
    ae, flow = tmp_path / "ae.yaml", tmp_path / "flow.yaml"
    ae.write_text(AE_CONFIG.replace("run_dir: unset", "run_dir: ???"))
    flow.write_text(FLOW_CONFIG)
    rows = info(capsys, "--cost", ae_run, "train.batch_size=3")
    assert "at train.batch_size=3, fp32" in rows["memory, training"]
    assert rows["verdict"].startswith("fits: ")
    use = Use(2 * 10**12, 3 * 2**30)
    monkeypatch.setattr(budget, "estimate_flow", lambda *_, bf16: NetworkCost(5_000_000, 2**30, use, use, use))
    rows = info(capsys, "--cost", flow, "--autoencoder", ae)
    assert rows["memory, training"].startswith("3.0 GiB at train.batch_size=4, fp32; 1.0 GiB of it")
    assert rows["latents"] == "2x2x6 + 4x4x4, 1:34.9"
    assert rows["parameters"] == "network 5.0 M"
    config = load_training(flow, [f"data.shards={finished}"])
    levels = [Level(16, 6), Level(8, 4)]
    for source in (ae_run, ae_run / "model", ae_run / "model/config.yaml", None):
        assert find_autoencoder(config, source).levels == levels


def test_the_cost_of_a_flow_on_photographs(capsys, monkeypatch, tmp_path):
    flow = tmp_path / "flow.yaml"
    flow.write_text("process: edm\nmodel: {widths: [16, 16]}\n")  # nothing but the process says which stage it is of
    use = Use(2 * 10**12, 3 * 2**30)
    monkeypatch.setattr(budget, "estimate_flow", lambda *_, bf16: NetworkCost(5_000_000, 2**30, use, use, use))
    named = "data.autoencoder=autoencoder_configs/demo_wavelet.yaml"
    for words in ([named, "data.root=photos"], ["data.root=photos", "--autoencoder", named.partition("=")[2]]):
        assert info(capsys, "--cost", flow, *words)["latents"] == "32x32x12, 1:1.0"


def test_wrong_costs(capsys, tmp_path, ae_run):
    flow, network = tmp_path / "flow.yaml", ae_run / "model/config.yaml"
    flow.write_text(FLOW_CONFIG)
    assert "--autoencoder autoencoder_configs/NAME.yaml" in complaint(capsys, "info", "--cost", flow)
    assert "is not an autoencoder's config" in complaint(capsys, "info", "--cost", flow, "--autoencoder", flow)
    assert "no such config" in complaint(capsys, "info", "--cost", flow, "--autoencoder", "nowhere.yaml")
    assert "is not a training config" in complaint(capsys, "info", "--cost", network)
    assert "no such config file" in complaint(capsys, "info", "--cost", "scapes2k.yaml")
    assert "holds no config.yaml" in complaint(capsys, "info", "--cost", tmp_path)
    assert "did you mean 'train.images'" in complaint(capsys, "info", "--cost", ae_run, "trian.images=3")
    flow.write_text("a: [1")
    assert "not valid YAML" in complaint(capsys, "info", "--cost", flow)
