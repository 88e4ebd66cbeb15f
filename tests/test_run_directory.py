"""Opening and re-opening a run."""

import dataclasses
import json
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from conftest import tiny_autoencoder_config

from pyramid_ldm.config import AutoencoderTraining, load_saved
from pyramid_ldm.config.autoencoder import AutoencoderTrainConfig, ImageDataConfig
from pyramid_ldm.errors import UserError
from pyramid_ldm.pyramid import Level
from pyramid_ldm.training.checkpoint import save_checkpoint
from pyramid_ldm.training.run import open_run, record_start, refuse_other_step
from pyramid_ldm.training.runtime import Runtime

CPU = Runtime(torch.device("cpu"), False)


@pytest.fixture
def config(tmp_path):
    return AutoencoderTraining(
        run_dir=str(tmp_path / "run"),
        image_size=[32, 32],
        model=tiny_autoencoder_config(),
        data=ImageDataConfig(root=str(tmp_path / "photos")),
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


def begin(config, images_seen=0, runtime=CPU):
    with open_run(config, {}, runtime) as run:
        record_start(run, config, runtime, images_seen, "f1")
    return run


@pytest.fixture
def run(config):
    run = begin(config)
    save_checkpoint(run, 10, {"images_seen": 10})
    return run


def test_a_run_holds_its_config_and_where_it_comes_from(run, config):
    assert load_saved(AutoencoderTraining, run / "config.yaml") == config
    (start,) = json.loads((run / "provenance.json").read_text())
    assert start["data_fingerprint"] == "f1"
    assert start["torch"] == torch.__version__
    assert {"argv", "git_commit", "pyramid_ldm", "python", "started", "processes"} <= start.keys()


def test_every_start_is_remembered(run, config):
    begin(changed(config, "train.learning_rate", 0.5), 10)
    starts = json.loads((run / "provenance.json").read_text())
    assert [(start["images_seen"], start["learning_rate"]) for start in starts] == [(0, 1e-4), (10, 0.5)]


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("train.warmup", 8, "0"),
        ("train.beta1", 0.5, "0.9"),
        ("seed", 1, "0"),
        ("data.flip", False, "True"),
        ("loss.gan.weight", 0.0, "0.5"),
        ("model.levels", [Level(16, 6), Level(8, 5)], ".*"),
    ],
)
def test_another_config_is_refused_by_key(run, config, key, value, old):
    with pytest.raises(UserError, match=rf"was started with {key}={old}, now .*; use a new run_dir") as caught:
        begin(changed(config, key, value))
    assert "\n" not in str(caught.value)
    assert load_saved(AutoencoderTraining, run / "config.yaml") == config


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.images", 500), ("data.root", "moved"), ("data.workers", 0), ("log.every", 7), ("checkpoint.keep_last", 5),
     ("device", "cpu"), ("precision", "fp32"), ("train.learning_rate", 1.0), ("train.batch_size", 2)],
)  # fmt: skip
def test_length_place_and_remedies_may_change(run, config, key, value):
    begin(changed(config, key, value))
    assert load_saved(AutoencoderTraining, run / "config.yaml") == changed(config, key, value)


def test_a_step_keeps_its_images(config, tmp_path):
    """The remedies for "out of memory" keep them; a second process alone would double them without a word."""
    config.train.batch_size, config.train.accumulate = 4, 2
    refuse_other_step(tmp_path, 8, config, CPU)
    two = dataclasses.replace(CPU, ranks=2)
    with pytest.raises(
        UserError, match=r"saw 8 images, now 4 .* x 2 .* x 2 \(processes\) = 16; set train.accumulate=1"
    ):
        refuse_other_step(tmp_path, 8, config, two)
    config.train.batch_size, config.train.accumulate = 2, 2
    refuse_other_step(tmp_path, 8, config, two)
    with pytest.raises(UserError, match=r"set train.accumulate=4 so that it stays 8"):
        refuse_other_step(tmp_path, 8, config, CPU)


def test_a_folder_of_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine: 1")
    with pytest.raises(UserError, match="run: is not empty and not a run directory"):
        begin(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine: 1"


def test_only_the_first_process_writes(config, tmp_path):
    begin(config, runtime=dataclasses.replace(CPU, rank=1))
    assert not (tmp_path / "run").exists()


HOLD = "import sys, time; from pathlib import Path; from pyramid_ldm.ownership import held\n"
HOLD += "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_another_command_is_kept_off_until_the_first_is_gone_however_it_went(run, config):
    other = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another pyramid-ldm is writing there \(process {other.pid} on "):
        begin(config)
    other.kill()
    other.wait()
    begin(config)


def test_inputs_and_outputs_are_kept_apart(config, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (tmp_path / "link").symlink_to(photos)
    for run_dir, data, words in (
        (photos / "run", photos, "lies inside data.root"),
        (tmp_path / "link" / "run", photos, "lies inside data.root"),
        (photos, tmp_path / "link", "are the same place"),
        (tmp_path, photos, "data.root .* lies inside run_dir"),
    ):
        config.run_dir = str(run_dir)
        with pytest.raises(UserError, match=words), open_run(config, {"data.root": data}, CPU):
            pass
    assert not any(photos.iterdir())
