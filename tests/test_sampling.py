"""`pyramid-ldm sample`: a folder that says how it was made, goes on after a kill, and mixes nothing."""

import json
import shutil

import numpy as np
import pytest
from conftest import randomise, tiny_autoencoder, tiny_network
from PIL import Image

from pyramid_ldm import PyramidPipeline
from pyramid_ldm.cli import main
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation.evaluate import pictures_of
from pyramid_ldm.pictures import read_record
from pyramid_ldm.pyramid import LatentScaling

SCALING = LatentScaling(((0.0,) * 6, (0.0,) * 4), ((1.0,) * 6, (1.0,) * 4))


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    """Two runs that differ in their weights."""
    found = []
    for number in range(2):
        run = tmp_path_factory.mktemp("flow")
        network = randomise(tiny_network(), 0.05 + 0.01 * number)
        PyramidPipeline(network, tiny_autoencoder().eval(), SCALING).save_pretrained(run / "model")
        found.append(run)
    return found


def sample(flow, out, *words, code=0):
    settings = ["--precision", "fp32", "--batch-size", "2"]
    settings += [] if "rk45" in words else ["--solver", "euler", "--steps", "4"]
    assert main(["sample", str(flow), "--out", str(out), *settings, *map(str, words)]) == code


def lines(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def pixels(out):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("seed*.png"))}


def test_every_picture_says_how_to_draw_it_again(flows, tmp_path):
    sample(flows[0], tmp_path / "s", "-n", 3, "--seed", 7)
    pipeline = PyramidPipeline.from_pretrained(flows[0])
    for k, line in enumerate(lines(tmp_path / "s")):
        record = {"seed": 7, "index": k, "nfe": 4, "checkpoint": pipeline.checkpoint, "solver": "euler", "steps": 4,
                  "precision": "flow fp32, decoder fp32", "size": [32, 32], "ratio": 34.909}  # fmt: skip
        assert line["file"] == f"seed0007-{k:06d}.png"
        assert {key: line[key] for key in record} == record
        assert read_record(tmp_path / "s" / line["file"]) == {key: line[key] for key in line if key != "file"}
        drawn = pipeline(1, seed=7, first_index=k, solver="euler", steps=4).images[0]
        assert np.abs(pixels(tmp_path / "s")[line["file"]].astype(int) - np.asarray(drawn)).max() <= 1
    sample(flows[0], tmp_path / "r", "-n", 1, "--solver", "rk45", "--rtol", "1e-2", "--atol", "2e-2")
    (line,) = lines(tmp_path / "r")
    assert (line["solver"], line["rtol"], line["atol"]) == ("rk45", 1e-2, 2e-2)


def test_a_killed_sample_goes_on_with_what_is_missing(flows, tmp_path, capsys, monkeypatch):
    """Half a line in samples.jsonl, half a picture under its name, one of five there."""
    sample(flows[0], tmp_path / "whole", "-n", 5)
    whole, out = pixels(tmp_path / "whole"), tmp_path / "s"
    sample(flows[0], out, "-n", 2)
    half = out / "seed0000-000001.png"
    half.write_bytes(half.read_bytes()[:-300])
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"file": "seed0000-0000')
    kept = (out / "seed0000-000000.png").stat().st_mtime_ns
    drawn, stream = [], PyramidPipeline.stream

    def watched(self, todo, *rest, **options):
        drawn.extend(todo)
        return stream(self, todo, *rest, **options)

    monkeypatch.setattr(PyramidPipeline, "stream", watched)
    sample(flows[0], out, "-n", 5)
    assert drawn == [1, 2, 3, 4]
    assert (out / "seed0000-000000.png").stat().st_mtime_ns == kept
    assert "5 images (1 of them are there)" in capsys.readouterr().err
    assert [line["index"] for line in lines(out)] == [0, 1, 2, 3, 4]
    for name, image in pixels(out).items():
        assert np.abs(image.astype(int) - whole[name]).max() <= 1
    drawn.clear()
    sample(flows[0], out, "-n", 5)
    assert drawn == []


def test_a_folder_holds_samples_of_one_checkpoint_and_solver(flows, tmp_path, capsys):
    out = tmp_path / "s"
    sample(flows[0], out, "-n", 1)
    before = pixels(out)
    for flow, words, fault in (
        (flows[1], [], "holds samples with checkpoint = "),
        (flows[0], ["--steps", 5], "holds samples with steps = 4, not 5; give another --out"),
        (flows[0], ["--solver", "rk45"], "holds samples with solver = euler, not rk45"),
        (flows[0], ["--precision", "bf16"], "holds samples with precision = "),
    ):
        sample(flow, out, "-n", 2, *words, code=2)
        assert fault in capsys.readouterr().err.splitlines()[-1]
    assert pixels(out).keys() == before.keys()
    sample(flows[0], out, "-n", 1, "--seed", 3)
    sample(flows[0], out, "-n", 1, "--first", 9)
    assert [(line["seed"], line["index"]) for line in lines(out)] == [(0, 0), (0, 9), (3, 0)]
    assert len(pictures_of(out)) == 3


def test_evaluate_refuses_a_mixture(flows, tmp_path):
    """Pictures of two folders copied together, with or without samples.jsonl."""
    for name, words in (("a", []), ("b", ["--steps", 5])):
        sample(flows[0], tmp_path / name, "-n", 2, "--seed", {"a": 0, "b": 1}[name], *words)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("a", "b"):
        for path in (tmp_path / name).glob("seed*.png"):
            shutil.copy(path, mixed)
    with pytest.raises(UserError, match=r"pictures of different origin: .* has steps = 4, .* has 5; give those of one"):
        pictures_of(mixed)
    text = "".join((tmp_path / name / "samples.jsonl").read_text() for name in ("a", "b"))
    (mixed / "samples.jsonl").write_text(text)
    with pytest.raises(UserError, match="pictures of different origin"):
        pictures_of(mixed)


def test_pictures_that_are_not_ours_stay(flows, tmp_path, capsys):
    out = tmp_path / "s"
    out.mkdir()
    Image.new("RGB", (9, 9)).save(out / "grid.png")
    sample(flows[0], out, "-n", 1, code=2)
    assert "is not empty and not a folder of samples" in capsys.readouterr().err
    (out / "grid.png").unlink()
    sample(flows[0], out, "-n", 1)
    Image.new("RGB", (9, 9)).save(out / "grid.png")
    sample(flows[0], out, "-n", 2, code=2)
    assert "grid.png: exists, and does not say that pyramid-ldm drew it" in capsys.readouterr().err
    assert Image.open(out / "grid.png").size == (9, 9)


@pytest.mark.parametrize("out", [".", "model", "model/samples", "samples"])
def test_samples_do_not_go_into_the_run(flows, tmp_path, out, capsys):
    sample(flows[0], flows[0] / out, "-n", 1, code=2)
    assert "FLOW_RUN" in capsys.readouterr().err
    assert sorted(path.name for path in flows[0].iterdir()) == ["model"]


def test_euler_below_its_steps_is_refused_at_once(flows, tmp_path, capsys):
    sample(flows[0], tmp_path / "s", "--steps", 50, "--max-nfe", 49, code=2)
    assert "takes 50 evaluations, more than --max-nfe 49" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    sample(flows[0], tmp_path / "s", "-n", 1, "--steps", 6, "--max-nfe", 6)


def test_sizes_are_told(flows, tmp_path, capsys):
    sample(flows[0], tmp_path / "s", "-n", 1)
    said = capsys.readouterr().err
    assert "1 images of 32x32, seed 0, euler, 4 steps, flow fp32, decoder fp32, batch 2, cpu" in said
