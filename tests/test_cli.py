"""Wrong input gets one line and exit code 2."""

import argparse
import json
import shutil

import pytest
from conftest import tiny_autoencoder
from PIL import Image
from torch.distributed.run import get_args_parser

from pyramid_ldm.cli import COMMANDS, encode, main, sample, train_ae, train_flow
from pyramid_ldm.config import AutoencoderTraining, load_config, save_config

ROOT = __import__("pathlib").Path(__file__).parent.parent


def complaint(capsys, *arguments) -> str:
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2, captured
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.fixture
def ae_run(tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "ae/model")
    return tmp_path / "ae"


def test_every_command_has_help_with_an_example(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command.NAME, "--help"])
        assert stop.value.code == 0
        assert command.EXAMPLE in capsys.readouterr().out


def test_wrong_usage(capsys):
    assert "invalid choice: 'trian'" in complaint(capsys, "trian")
    assert "required: CONFIG" in complaint(capsys, "train-ae")
    assert "--num: invalid int value" in complaint(capsys, "sample", "x", "--out", "y", "--num", "many")


def test_wrong_configs(capsys, tmp_path):
    demo = "demo.yaml"
    assert "no such config file" in complaint(capsys, "train-ae", "nowhere.yaml")
    assert "did you mean 'train.images'" in complaint(capsys, "train-ae", demo, "trian.images=3")
    assert "data.root is not set" in complaint(capsys, "train-ae", demo)
    assert "train.batch_size" in complaint(capsys, "train-ae", demo, "data.root=x", "train.batch_size=four")
    assert "constant, cosine" in complaint(capsys, "train-flow", demo, "data.shards=x", "train.decay=linear")
    assert "not key=value" in complaint(capsys, "train-flow", demo, "data.shards")


def test_missing_things(capsys, tmp_path, ae_run, photographs):
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    run = f"run_dir={tmp_path / 'run'}"
    assert f"{nowhere}: no such folder" in complaint(capsys, "train-ae", "demo.yaml", f"data.root={nowhere}", run)
    assert f"{empty}: holds no images" in complaint(capsys, "train-ae", "demo.yaml", f"data.root={empty}", run)
    assert not (tmp_path / "run").exists()
    assert "encode AE_RUN" in complaint(capsys, "train-flow", "demo.yaml", f"data.shards={nowhere}", run)
    assert "run the same `pyramid-ldm encode` again" in complaint(
        capsys, "train-flow", "demo.yaml", f"data.shards={empty}", run
    )
    assert f"{nowhere}: no such directory" in complaint(capsys, "sample", nowhere, "--out", tmp_path / "s")
    assert f"{empty}: holds no model" in complaint(capsys, "sample", empty, "--out", tmp_path / "s")
    assert f"{empty}: holds no model" in complaint(capsys, "encode", empty, "--data", photographs, "--out", nowhere)
    assert f"{empty}: holds no images" in complaint(capsys, "encode", ae_run, "--data", empty, "--out", nowhere)
    assert "holds no images" in complaint(capsys, "reconstruct", ae_run, "--data", empty, "--out", nowhere)
    assert not nowhere.exists()


def test_values_out_of_range(capsys, tmp_path, ae_run, photographs):
    assert "--num" in complaint(capsys, "sample", ae_run, "--num", 0, "--out", tmp_path / "s")
    assert "--minutes -1" in complaint(capsys, "demo", "--minutes", -1, "--out", tmp_path / "d")
    data = ("--data", photographs, "--out", tmp_path / "z")
    assert "--validation" in complaint(capsys, "encode", ae_run, *data, "--validation", 2)
    assert "--dtype int8" in complaint(capsys, "encode", ae_run, *data, "--dtype", "int8")
    assert "--image 99" in complaint(
        capsys, "latents", ae_run, "--data", photographs, "--out", tmp_path / "l.png", "--image", 99
    )
    assert "CUDA" in complaint(capsys, "encode", ae_run, *data, "--device", "cuda:7")


def test_a_foreign_directory_is_not_overwritten(capsys, tmp_path, photographs):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    message = complaint(capsys, "train-ae", "demo.yaml", f"data.root={photographs}", f"run_dir={tmp_path / 'mine'}")
    assert "not empty and not a run" in message
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_said_in_one_line(capsys, tmp_path, ae_run, photographs, monkeypatch):
    import errno

    from pyramid_ldm.training import encode

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "z/00000.safetensors"))

    monkeypatch.setattr(encode, "write_shard", full)
    assert (
        main(["encode", str(ae_run), "--data", str(photographs), "--out", str(tmp_path / "z"), "--workers", "0"]) == 2
    )
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no space left on the disk" in last
    assert "00000.safetensors" in last


def test_encode_holds_out_what_the_run_did_and_says_that_it_saw_crops(capsys, tmp_path, ae_run, photographs):
    run = tmp_path / "run"
    shutil.copytree(ae_run / "model", run / "model")
    (run / "checkpoints").mkdir()
    words = ["data.root=x", "data.crop=random", "data.zoom=1.5", "data.validation=0.3"]
    save_config(load_config(AutoencoderTraining, ROOT / "autoencoder_configs/demo.yaml", words), run / "config.yaml")
    words = ["encode", str(run), "--data", str(photographs), "--workers", "0", "--out"]
    assert main([*words, str(tmp_path / "plain")]) == 0
    assert "--crops 16 --zoom 1.5 gives them" in capsys.readouterr().err
    assert json.loads((tmp_path / "plain/index.json").read_text())["plan"]["validation"] == 0.3
    assert main([*words, str(tmp_path / "crops"), "--crops", "1"]) == 0
    assert "random crops" not in capsys.readouterr().err


def test_reconstruct_and_latents_write_what_they_say(capsys, tmp_path, ae_run, photographs):
    out = tmp_path / "r"
    assert main(["reconstruct", str(ae_run), "--data", str(photographs), "--out", str(out), "--num", "3"]) == 0
    printed = capsys.readouterr().out
    assert "3 images, 1:34.9: PSNR" in printed
    assert "dB (bicubic at as many values " in printed
    assert len(list(out.glob("0*.png"))) == 3
    assert Image.open(next(out.glob("0*.png"))).size == (66, 32)
    sheet = tmp_path / "l.png"
    assert main(["latents", str(ae_run), "--data", str(photographs), "--out", str(sheet), "--fill", "mean"]) == 0
    assert Image.open(sheet).width > 3 * 32


@pytest.mark.parametrize("module", [train_ae, encode, train_flow, sample], ids=lambda module: module.NAME)
def test_torchrun_leaves_a_command_its_options(module):
    """It reads every option, and takes one that begins like its own (--num: --numa-binding) for that; hence -n."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    options = [action.option_strings[0] for action in parser._actions if action.option_strings]
    words = [word for option in options if option != "-h" for word in (option, "1")]
    found = get_args_parser().parse_args(["--nproc-per-node=4", "-m", "pyramid_ldm", module.NAME, "run", *words])
    assert found.training_script_args == [module.NAME, "run", *words]
