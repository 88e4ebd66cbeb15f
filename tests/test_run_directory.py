"""Opening and re-opening a run."""

import dataclasses
import json
from copy import deepcopy

import pytest
import torch
from conftest import tiny_autoencoder_config

from pyramid_ldm.config import AutoencoderTraining, LevelConfig, load_saved
from pyramid_ldm.config.autoencoder import AutoencoderTrainConfig, ImageDataConfig
from pyramid_ldm.errors import UserError
from pyramid_ldm.training.checkpoint import save_checkpoint
from pyramid_ldm.training.run import open_run
from pyramid_ldm.training.runtime import Runtime

CPU = Runtime(torch.device("cpu"), False)


@pytest.fixture
def config(tmp_path):
    return AutoencoderTraining(
        run_dir=str(tmp_path / "run"),
        image_size=[32, 32],
        model=tiny_autoencoder_config(),
        data=ImageDataConfig(root="photos"),
        train=AutoencoderTrainConfig(images=100),
    )


def changed(config, key, value):
    """A copy with one dotted key changed."""
    copy = deepcopy(config)
    *parts, last = key.split(".")
    target = copy
    for part in parts:
        target = getattr(target, part)
    assert getattr(target, last) != value
    setattr(target, last, value)
    return copy


@pytest.fixture
def run(config):
    run = open_run(config, "f1", CPU)
    save_checkpoint(run, 10, {"images_seen": 10})
    return run


def test_a_run_holds_its_config_and_where_it_comes_from(run, config):
    assert load_saved(AutoencoderTraining, run / "config.yaml") == config
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["data_fingerprint"] == "f1"
    assert provenance["torch"] == torch.__version__
    assert {"argv", "git_commit", "pyramid_ldm", "python"} <= provenance.keys()


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("train.batch_size", 8, "4"),
        ("train.learning_rate", 1.0, "0.0001"),
        ("seed", 1, "0"),
        ("data.flip", False, "True"),
        ("loss.gan.weight", 0.0, "0.5"),
        ("model.levels", [LevelConfig(16, 6), LevelConfig(8, 5)], ".*"),
    ],
)
def test_another_config_is_refused_by_key(run, config, key, value, old):
    with pytest.raises(UserError, match=rf"was started with {key}={old}, now .*; use a new run_dir") as caught:
        open_run(changed(config, key, value), "f1", CPU)
    assert "\n" not in str(caught.value)
    assert load_saved(AutoencoderTraining, run / "config.yaml") == config


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.images", 500), ("data.root", "moved"), ("data.workers", 0), ("log.every", 7), ("checkpoint.keep_last", 5),
     ("device", "cpu"), ("precision", "fp32")],
)  # fmt: skip
def test_length_place_and_intervals_may_change(run, config, key, value):
    longer = changed(config, key, value)
    assert open_run(longer, "f1", CPU) == run
    assert load_saved(AutoencoderTraining, run / "config.yaml") == longer


def test_other_data_is_refused(run, config):
    with pytest.raises(UserError, match=r"was started on other data \(f1, now f2\)"):
        open_run(config, "f2", CPU)
    assert json.loads((run / "provenance.json").read_text())["data_fingerprint"] == "f1"


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="run: is not empty and not a run"):
        open_run(config, "f1", CPU)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_only_the_first_process_writes(config, tmp_path):
    other = dataclasses.replace(CPU, rank=1)
    assert open_run(config, "f1", other) == tmp_path / "run"
    assert not (tmp_path / "run").exists()
