"""The whole job through the demo, on few and small things."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pyramid_ldm import workers
from pyramid_ldm.cli import demo, main
from pyramid_ldm.demo import pictures
from pyramid_ldm.ownership import claim, mark

ROOT = Path(__file__).parent.parent


def test_the_demo_leaves_its_pictures_and_report_and_resumes(tmp_path, monkeypatch, capsys):
    plan = replace(demo.PLANS["64x64"], photographs=16, samples=4, batch_size=4)
    for name, changes in (
        ("autoencoder", {"pictures: 16": "pictures: 2", "[32, 64, 96, 96, 96]": "[8, 8, 8, 8, 8]",
                         "[64, 96, 128, 128, 128]": "[8, 8, 8, 8, 8], branch_blocks: 1"}),
        ("flow", {"pictures: 16": "pictures: 2", "[48, 96, 128, 128, 128]": "[16, 16, 16, 16, 16]",
                  "precision:": "samples: {steps: 2}\nprecision:"}),
    ):  # fmt: skip
        text = (ROOT / getattr(plan, name)).read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / f"{name}.yaml").write_text(text)
        plan = replace(plan, **{name: str(tmp_path / f"{name}.yaml")})
    monkeypatch.setitem(demo.PLANS, "64x64", plan)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--minutes", "0.01"]) == 0
    said = capsys.readouterr().err
    for name in ("train-ae", "encode", "train-flow", "sample"):
        assert f"$ pyramid-ldm {name} " in said
    for name in ("samples.png", "reconstructions.png", "latents.png", "neighbours.png"):
        assert Image.open(out / name).width >= 2 * 64
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "pyramid-ldm train-ae autoencoder_configs/photographs_2k.yaml" in page
    figures = json.loads((out / "figures.json").read_text())
    assert figures["psnr"] > 5
    assert figures["bicubic_psnr"] > 20
    assert list(figures["by_level"]) == ["1x1", "4x4", "8x8", "16x16"]
    assert f"{figures['by_level']['4x4']:.1f} dB" in page
    weights = (out / "flow/model/flow/model.safetensors").read_bytes()
    assert main(["demo", "--out", str(out), "--minutes", "0.01"]) == 0, "again: everything is there already"
    assert (out / "flow/model/flow/model.safetensors").read_bytes() == weights


LARGE_AE = """
run_dir: r
image_size: [320, 640]
model:
  levels: [{factor: 64, channels: 8}, {factor: 32, channels: 12}]
  patch: 4
  norm: none
  base: thumbnail
  encoder: {widths: [8, 8, 8, 8, 8]}
  decoder: {widths: [8, 8, 8, 8, 8], dropout: 0.0}
data: {workers: 0}
loss: {perceptual: {weight: 0}, gan: {weight: 0}}
train: {images: 4, batch_size: 2, regions: 1, region_size: 64}
log: {pictures: 1, examined: 1}
"""
LARGE_FLOW = """
run_dir: r
model: {widths: [16, 16], blocks: 1, fourier_scale: 1.0}
data: {workers: 0}
train: {images: 4, batch_size: 2}
samples: {steps: 2}
log: {pictures: 1}
"""


def test_large_landscapes_are_jpegs_and_are_shown_reduced_and_in_parts(tmp_path, monkeypatch):
    for name, text in (("ae", LARGE_AE), ("flow", LARGE_FLOW)):
        (tmp_path / f"{name}.yaml").write_text(text)
    plan = demo.Plan(str(tmp_path / "ae.yaml"), str(tmp_path / "flow.yaml"), 1.0, 6, 2, 2, 1.0)
    monkeypatch.setitem(demo.PLANS, "1024x2048", plan)
    monkeypatch.setattr(pictures, "PART", 128)
    out = tmp_path / "demo"
    assert main(["demo", "--size", "1024x2048", "--out", str(out)]) == 0
    assert len(list((out / "photographs").glob("*.jpg"))) == 6
    assert Image.open(out / "photographs/00003.jpg").size == (640, 320)
    assert Image.open(out / "samples.png").size == (2 * 160 + 2, 80), "a quarter of the size"
    assert Image.open(out / "reconstructions.png").width == 3 * 128 + 2 * 2, "original, reconstruction, thumbnail"
    assert len(list((out / "samples").glob("seed*.png"))) == 2
    assert Image.open(out / "samples/seed0000-000000.png").size == (640, 320)


def test_a_demo_of_one_size_is_not_mixed_with_another(tmp_path, capsys):
    """Nothing is rendered into the other's photographs; a folder of before sizes is one of 64x64."""
    out = tmp_path / "demo"
    for about in ({}, {"size": "64x64"}):
        mark(out, "demo", **about) if out.exists() else claim(out, "demo", "--out", **about)
        assert main(["demo", "--size", "1024x2048", "--out", str(out)]) == 2
        assert f"{out}: holds a demo of 64x64, not 1024x2048; give another --out" in capsys.readouterr().err
        assert not (out / "photographs").exists()


def test_processes_that_render_multiply_with_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with workers.one_thread_each():
        assert {os.environ[name] for name in workers.THREADS} == {"1"}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OPENBLAS_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_rendering_stops_in_a_line_and_keeps_whole_landscapes(tmp_path, number):
    words = [sys.executable, "-m", "pyramid_ldm", "demo", "--size", "1024x2048", "--out", str(tmp_path / "out")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        folder = tmp_path / "out" / "photographs"
        while process.poll() is None and not list(folder.glob("*.jpg")):
            time.sleep(0.1)
        os.killpg(process.pid, number)  # as Ctrl-C does: the workers are sent it, too
        error = process.communicate()[1]
    assert process.returncode == 130
    assert error.splitlines()[-1] == "pyramid-ldm: stopped; what is whole stays, and the same command goes on"
    assert "Traceback" not in error
    for path in folder.glob("*.jpg"):
        with Image.open(path) as image:
            image.load()


def test_a_killed_process_of_those_that_render_is_said(tmp_path):
    words = [sys.executable, "-m", "pyramid_ldm", "demo", "--size", "1024x2048", "--out", str(tmp_path / "out")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob("out/photographs/*.jpg")):
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.is_file():
            process.kill()
            pytest.skip("this system does not say which processes are a process's")
        os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        error = process.communicate()[1]
    assert process.returncode == 2
    assert "a process was killed, perhaps because memory ran out; run again" in error.splitlines()[-1]
    assert "Traceback" not in error
