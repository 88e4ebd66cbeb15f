"""The whole job through the demo, on few and small things."""

import json
from dataclasses import replace
from pathlib import Path

from PIL import Image

from pyramid_ldm.cli import demo, main

ROOT = Path(__file__).parent.parent


def test_the_demo_leaves_its_pictures_and_report_and_resumes(tmp_path, monkeypatch, capsys):
    plan = replace(demo.PLANS["64x64"], photographs=16, samples=4, batch_size=4)
    for name, changes in (
        ("autoencoder", {"pictures: 16": "pictures: 2", "[8, 16, 32, 64, 96, 96, 96]": "[8, 8, 8, 8, 8, 8, 8]",
                         "[16, 32, 64, 96, 128, 128, 128]": "[8, 8, 8, 8, 8, 8, 8], branch_blocks: 1"}),
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
    assert "pyramid-ldm train-ae autoencoder_configs/scapes2k.yaml" in page
    figures = json.loads((out / "figures.json").read_text())
    assert figures["psnr"] > 5
    assert figures["bicubic_psnr"] > 20
    weights = (out / "flow/model/flow/model.safetensors").read_bytes()
    assert main(["demo", "--out", str(out), "--minutes", "0.01"]) == 0, "again: everything is there already"
    assert (out / "flow/model/flow/model.safetensors").read_bytes() == weights
