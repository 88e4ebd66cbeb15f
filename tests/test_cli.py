"""Wrong input gets one line and exit code 2."""

import argparse
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import randomise, tiny_autoencoder, tiny_network
from PIL import Image
from torch.distributed.run import get_args_parser

from pyramid_ldm.cli import COMMANDS, encode, main, sample, train_ae, train_flow
from pyramid_ldm.cli.common import Number, find_config
from pyramid_ldm.config import AutoencoderTraining, load_config, save_config
from pyramid_ldm.errors import UserError
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.pyramid import LatentScaling

ROOT = __import__("pathlib").Path(__file__).parent.parent
DEMO, DEMO_FLOW = "autoencoder_configs/demo.yaml", "diffusion_configs/demo.yaml"


def complaint(capsys, *arguments) -> str:
    capsys.readouterr()
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


@pytest.fixture
def flow_run(tmp_path):
    scaling = LatentScaling(((0.0,) * 6, (0.0,) * 4), ((1.0,) * 6, (1.0,) * 4))
    PyramidPipeline(randomise(tiny_network()), tiny_autoencoder(), scaling).save_pretrained(tmp_path / "flow/model")
    return tmp_path / "flow"


def test_every_command_has_help_with_an_example(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command.NAME, "--help"])
        assert stop.value.code == 0
        assert command.EXAMPLE in capsys.readouterr().out


def test_wrong_usage(capsys):
    assert "invalid choice: 'trian'" in complaint(capsys, "trian")
    assert "required: CONFIG" in complaint(capsys, "train-ae")
    assert "'many' is not a whole number" in complaint(capsys, "sample", "x", "--out", "y", "--num", "many")


def test_wrong_configs(capsys, tmp_path):
    assert "no such config file" in complaint(capsys, "train-ae", "nowhere.yaml")
    assert "did you mean 'train.images'" in complaint(capsys, "train-ae", DEMO, "trian.images=3")
    assert "data.root is not set" in complaint(capsys, "train-ae", DEMO)
    assert "train.batch_size" in complaint(capsys, "train-ae", DEMO, "data.root=x", "train.batch_size=four")
    assert "constant, cosine" in complaint(capsys, "train-flow", DEMO_FLOW, "data.shards=x", "train.decay=linear")
    assert "not key=value" in complaint(capsys, "train-flow", DEMO_FLOW, "data.shards")


def test_a_config_that_is_not_there_is_an_error(capsys, tmp_path, photographs):
    """Also where the package ships one of that file name: nobody asked for that."""
    for name in (
        "/home/me/experiments/demo.yaml",
        "demo.yaml",
        "../autoencoder_configs/demo.yaml",
        f"{tmp_path}/demo.yaml",
    ):
        message = complaint(capsys, "train-ae", name, f"data.root={photographs}", f"run_dir={tmp_path / 'run'}")
        assert f"{name}: no such config file; did you mean autoencoder_configs/demo.yaml?" in message
    assert "no such config file" in complaint(capsys, "info", "--cost", "/home/me/autoencoder_configs/demo.yaml")
    assert not (tmp_path / "run").exists()


def test_shipped_configs_are_found_by_the_name_that_is_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # not in a clone
    assert find_config(DEMO, "autoencoder_configs") == ROOT / DEMO
    with pytest.raises(UserError):
        find_config(DEMO, "diffusion_configs")
    (tmp_path / "autoencoder_configs").mkdir()
    (tmp_path / DEMO).write_text("mine")
    assert find_config(DEMO, "autoencoder_configs").read_text() == "mine", "one's own comes first"


def test_missing_things(capsys, tmp_path, ae_run, photographs):
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    run = f"run_dir={tmp_path / 'run'}"
    assert f"{nowhere}: no such folder" in complaint(capsys, "train-ae", DEMO, f"data.root={nowhere}", run)
    assert f"{empty}: holds no images" in complaint(capsys, "train-ae", DEMO, f"data.root={empty}", run)
    assert "encode AE_RUN" in complaint(capsys, "train-flow", DEMO_FLOW, f"data.shards={nowhere}", run)
    assert "run the same `pyramid-ldm encode` (or `sample --pairs`) again" in complaint(
        capsys, "train-flow", DEMO_FLOW, f"data.shards={empty}", run
    )
    assert f"{nowhere}: no such directory" in complaint(capsys, "sample", nowhere, "--out", tmp_path / "s")
    assert f"{empty}: holds no model" in complaint(capsys, "sample", empty, "--out", tmp_path / "s")
    assert f"{empty}: holds no model" in complaint(capsys, "encode", empty, "--data", photographs, "--out", nowhere)
    assert f"{empty}: holds no images" in complaint(capsys, "encode", ae_run, "--data", empty, "--out", nowhere)
    assert "holds no images" in complaint(capsys, "reconstruct", ae_run, "--data", empty, "--out", nowhere)
    assert not nowhere.exists()


def test_values_out_of_range(capsys, tmp_path, ae_run, photographs):
    data = ("--data", photographs, "--out", tmp_path / "z")
    assert "--dtype int8" in complaint(capsys, "encode", ae_run, *data, "--dtype", "int8")
    assert "--image 99" in complaint(
        capsys, "latents", ae_run, "--data", photographs, "--out", tmp_path / "l.png", "--image", 99
    )
    assert "CUDA" in complaint(capsys, "encode", ae_run, *data, "--device", "cuda:7")


def numeric_options():
    """(command, option, its bounds) of every option that takes a number."""
    for command in COMMANDS:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        for action in parser._actions:
            assert action.type not in (int, float), f"{command.NAME} {action.dest} has no bounds"
            if isinstance(action.type, Number):
                yield pytest.param(command, action, id=f"{command.NAME} {action.option_strings[-1]}")


@pytest.mark.parametrize(("command", "action"), list(numeric_options()))
def test_every_number_has_bounds_and_they_hold(capsys, command, action):
    """Generated from the commands' own parsers."""
    bounds = action.type
    wrong = ["nan", "inf", "-inf", "many", "", "1e400", f"{bounds.low - 1:.0f}"]
    wrong += [f"{bounds.high * 10 + 1:.0f}"] + (["0.5"] if bounds.kind is int else [])
    wrong += [f"{bounds.low:g}"] * bounds.open_low + [f"{bounds.high:g}"] * bounds.open_high
    required = ["run", "--data", "x", "--out", "y"]
    for value in wrong:
        assert action.option_strings[-1] in complaint(
            capsys,
            command.NAME,
            *required[: 1 if command.NAME in ("sample", "info") else 3],
            f"{action.option_strings[-1]}={value}",
        )


def test_a_foreign_directory_is_not_overwritten(capsys, tmp_path, photographs):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    message = complaint(capsys, "train-ae", DEMO, f"data.root={photographs}", f"run_dir={tmp_path / 'mine'}")
    assert "not empty and not a run" in message
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_outputs_do_not_touch_inputs_nor_what_is_not_ours(capsys, tmp_path, ae_run, flow_run, photographs):
    """Every command that writes, into what it reads, around it, and into somebody else's folder."""
    mine = tmp_path / "mine"
    shutil.copytree(photographs, mine / "autoencoder")
    (mine / "config.yaml").write_text("mine: 1")
    (mine / "model").mkdir()
    (mine / "model/net.py").write_text("code")
    Image.new("RGB", (4, 4)).save(mine / "grid.png")
    (mine / "figures.json").write_text('{"mine": 1}')
    data = mine / "autoencoder"
    size = ["image_size=[32,32]", "model.levels=[{factor: 16, channels: 6}]", "model.encoder.widths=[8,8,8,8,8]",
            "model.decoder.widths=[8,8,8,8,8]"]  # fmt: skip
    before = snapshot(mine), snapshot(ae_run), snapshot(flow_run)
    for command in (
        ["encode", ae_run, "--data", data, "--out", mine],  # holds what it reads
        ["encode", ae_run, "--data", data, "--out", data / "latents"],  # inside
        ["encode", ae_run, "--data", photographs, "--out", mine],  # somebody else's
        ["encode", ae_run, "--data", photographs, "--out", ae_run],
        ["encode", ae_run / "model", "--data", photographs, "--out", ae_run],
        ["train-ae", DEMO, *size, f"data.root={photographs}", f"run_dir={mine}"],
        ["train-ae", DEMO, *size, f"data.root={data}", f"run_dir={data / 'run'}"],
        ["train-ae", DEMO, *size, f"data.root={data}", f"run_dir={mine}"],
        ["sample", flow_run, "-n", 1, "--out", mine],
        ["sample", flow_run, "-n", 1, "--out", flow_run / "samples"],
        ["reconstruct", ae_run, "--data", data, "--out", mine],
        ["reconstruct", ae_run, "--data", photographs, "--out", mine],
        ["reconstruct", ae_run, "--data", data, "--out", data / "r"],
        ["latents", ae_run, "--data", photographs, "--out", mine / "grid.png"],
        ["latents", ae_run, "--data", data, "--out", data / "latents.png"],
        ["evaluate", ae_run, "--data", photographs, "--out", mine / "figures.json"],
        ["evaluate", ae_run, "--data", data, "--out", data / "figures.json"],
        ["demo", "--out", mine],
    ):
        complaint(capsys, *command)
        assert (snapshot(mine), snapshot(ae_run), snapshot(flow_run)) == before, command


def test_our_own_outputs_are_written_again(tmp_path, ae_run, photographs):
    """The marker is in the file: a second run of the same command replaces its own."""
    for _ in range(2):
        assert main(["latents", str(ae_run), "--data", str(photographs), "--out", str(tmp_path / "l.png")]) == 0
        words = ["evaluate", str(ae_run), "--data", str(photographs), "--num", "2", "--out", str(tmp_path / "f.json")]
        assert main(words) == 0
        assert (
            main(["reconstruct", str(ae_run), "--data", str(photographs), "--out", str(tmp_path / "r"), "-n", "2"]) == 0
        )


@pytest.mark.parametrize("number", [errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
                                    errno.EMFILE, errno.EIO, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.ESTALE,
                                    errno.ELOOP, errno.EPERM, errno.EBUSY, errno.ETXTBSY])  # fmt: skip
def test_any_error_of_the_system_is_one_line(capsys, tmp_path, ae_run, photographs, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "z/00000.safetensors"))

    monkeypatch.setattr("pyramid_ldm.encode.write_shard", fail)
    words = ["encode", str(ae_run), "--data", str(photographs), "--out", str(tmp_path / "z"), "--workers", "0"]
    assert main(words) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "00000.safetensors" in last
    assert (
        "no space left on the disk" if number in (errno.ENOSPC, errno.EDQUOT) else os.strerror(number).lower()
    ) in last


def test_what_the_system_really_says(capsys, tmp_path, ae_run, flow_run, photographs):
    """A file where a folder belongs, a name that is too long, a folder where a file belongs, a null byte."""
    (tmp_path / "file").write_text("x")
    draw = ("sample", flow_run, "-n", 1, "--solver", "euler", "--steps", 2, "--out")
    data = f"data.root={photographs}"
    assert "file: is a file; give a directory" in complaint(capsys, *draw, tmp_path / "file")
    assert "not a directory" in complaint(capsys, *draw, tmp_path / "file/x")
    assert "not a directory" in complaint(capsys, "train-ae", DEMO, data, f"run_dir={tmp_path / 'file/x'}")
    assert "file name too long" in complaint(capsys, *draw, tmp_path / ("x" * 300))
    (tmp_path / "folder").mkdir()
    words = ("latents", ae_run, "--data", photographs, "--out", tmp_path / "folder")
    assert "is a folder; give a file" in complaint(capsys, *words)
    assert "no such config file" in complaint(capsys, "train-ae", tmp_path, data)
    assert "is a file" in complaint(capsys, "info", tmp_path / "file")


def test_out_of_memory_is_one_line_that_names_what_helps(capsys, tmp_path, ae_run, photographs, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("pyramid_ldm.encode.write_shard", fail)
        words = ["encode", str(ae_run), "--data", str(photographs), "--out", str(tmp_path / "z"), "--workers", "0"]
        assert main(words) == 2
        assert "out of memory; lower train.batch_size" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_bug_is_not_hidden(tmp_path, ae_run, photographs, monkeypatch):
    monkeypatch.setattr("pyramid_ldm.encode.write_shard", lambda *_: 1 / 0)
    words = ["encode", str(ae_run), "--data", str(photographs), "--out", str(tmp_path / "z"), "--workers", "0"]
    with pytest.raises(ZeroDivisionError):
        main(words)


def test_a_reader_that_goes_away_is_no_traceback(ae_run):
    command = f"{shlex.quote(sys.executable)} -m pyramid_ldm --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_the_next_command_works_when_pasted(capsys, tmp_path, photographs):
    """Through the shell: folders with a space, a quote, a '#' and a '$'."""
    folder = tmp_path / "set #2 it's $HOME"
    shutil.copytree(photographs, folder / "photos")
    words = ["train-ae", DEMO, f"data.root={folder / 'photos'}", f"run_dir={folder / 'ae'}", "train.images=8",
             "image_size=[32,32]", "model.levels=[{factor: 8, channels: 4}]", "model.encoder.widths=[8,8]",
             "model.decoder.widths=[8,8]"]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    split = shlex.split(printed)
    assert split == ["pyramid-ldm", "encode", str(folder / "ae"), "--data", str(folder / "photos"), "--out", "latents"]
    assert main([*split[1:-1], str(folder / "latents"), "--workers", "0"]) == 0
    split = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    assert split[:2] == ["pyramid-ldm", "train-flow"]
    assert split[3] == f"data.shards={folder / 'latents'}"
    assert find_config(split[2], "diffusion_configs").is_file()
    assert main([*split[1:], f"run_dir={folder / 'flow'}", "train.images=1", "train.batch_size=1", "samples.steps=1",
                 "model.widths=[8, 8, 8]", "log.pictures=1"]) == 0  # fmt: skip
    split = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))
    assert split == ["pyramid-ldm", "sample", str(folder / "flow"), "--num", "16", "--out", "samples"]


def test_encode_holds_out_what_the_run_did_and_says_that_it_saw_crops(capsys, tmp_path, ae_run, photographs):
    run = tmp_path / "run"
    shutil.copytree(ae_run / "model", run / "model")
    (run / "checkpoints").mkdir()
    words = ["data.root=x", "data.crop=random", "data.zoom=1.5", "data.validation=0.3"]
    save_config(load_config(AutoencoderTraining, ROOT / DEMO, words), run / "config.yaml")
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
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["decoded", *(f"{h}x{w}" for h, w in ((2, 2), (4, 4))), "done:"]


def test_held_out_is_what_the_run_says(capsys, tmp_path, photographs):
    from pyramid_ldm.ownership import replace_directory

    for name, about in (("knows", {"validation": 0.5}), ("not", {})):
        replace_directory(tmp_path / name / "model", "model", tiny_autoencoder().save_pretrained, **about)
    words = ["--data", str(photographs), "--held-out", "--num", "99"]
    assert main(["reconstruct", str(tmp_path / "knows"), *words, "--out", str(tmp_path / "r")]) == 0
    some = int(capsys.readouterr().out.split()[0])
    assert main(["evaluate", str(tmp_path / "knows"), *words, "--out", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert (figures["held_out"], figures["photographs"]) == (0.5, some)
    assert 0 < some < 12
    message = complaint(capsys, "evaluate", tmp_path / "not", "--data", photographs, "--held-out")
    assert "does not say which share was held out; give it, as in --held-out 0.05" in message


@pytest.mark.parametrize("module", [train_ae, encode, train_flow, sample], ids=lambda module: module.NAME)
def test_torchrun_leaves_a_command_its_options(module):
    """It reads every option, and takes one that begins like its own (--num: --numa-binding) for that; hence -n."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    options = [action.option_strings[0] for action in parser._actions if action.option_strings]
    words = [word for option in options if option != "-h" for word in (option, "1")]
    found = get_args_parser().parse_args(["--nproc-per-node=4", "-m", "pyramid_ldm", module.NAME, "run", *words])
    assert found.training_script_args == [module.NAME, "run", *words]
