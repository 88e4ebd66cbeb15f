"""tools/compare_autoencoders.py: the same number of latent values for all, one loop, tables that go on."""

import errno
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.tools
TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import compare_autoencoders as compare  # noqa: E402
from experiments import latents, rows, tables, unseen  # noqa: E402
from experiments.command import exit_code  # noqa: E402

from pyramid_ldm.config import AutoencoderConfig  # noqa: E402
from pyramid_ldm.config.autoencoder import AttentionConfig, DecoderConfig, EncoderConfig  # noqa: E402
from pyramid_ldm.demo.scenes import render_landscape  # noqa: E402
from pyramid_ldm.errors import UserError  # noqa: E402
from pyramid_ldm.pyramid import Level  # noqa: E402
from pyramid_ldm.training.runtime import start  # noqa: E402


def peer_config(factor, channels):
    widths = [4] * factor.bit_length()
    return AutoencoderConfig(
        image_size=[2 * factor, 2 * factor],
        levels=[Level(factor, channels)],
        encoder=EncoderConfig(widths),
        decoder=DecoderConfig(widths),
        attention=AttentionConfig(max_tokens=0),
    )


def build_peer(family, factor, channels, width):
    pytest.importorskip("diffusers")
    from experiments.peers import PeerAutoencoder

    torch.manual_seed(0)
    return PeerAutoencoder(peer_config(factor, channels), family, width)


@pytest.mark.parametrize(("family", "factor", "channels", "millions"), [("sd-vae", 8, 4, 83.7), ("dc-ae", 32, 32, 323)])
def test_at_full_width_peers_are_the_published_ones(family, factor, channels, millions):
    with torch.device("meta"):
        model = build_peer(family, factor, channels, 1.0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        millions, rel=3e-3
    )  # and our log-variances


@pytest.mark.parametrize("family", ["sd-vae", "dc-ae"])
@pytest.mark.parametrize("factor", [16, 32])
def test_a_peer_is_an_autoencoder_of_ours(family, factor):
    model = build_peer(family, factor, 4, 1 / 8 if family == "dc-ae" else 1 / 4)
    image = torch.randn(1, 3, 2 * factor, 2 * factor, generator=torch.Generator().manual_seed(1))
    output = model(image)
    assert output.reconstruction.shape == image.shape
    assert [tuple(level.shape) for level in output.posterior.mean] == [(1, 4, 2, 2)]
    assert output.posterior.log_variance[0].mean() < -4  # ours start at -6
    output.reconstruction.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.decoder.last_weight.shape[0] == (12 if family == "dc-ae" else 3)  # pixel shuffle: 2x2 pixels
    assert model.decoder.last_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("ratio", compare.PYRAMIDS)
def test_every_contender_has_the_same_number_of_values(ratio):
    def values(latents):
        return sum((128 // factor) ** 2 * channels for factor, channels in latents.items())

    pyramid, single = compare.PYRAMIDS[ratio], compare.SINGLE[ratio]
    assert values(pyramid) == values(single)
    assert 3 * 128**2 / values(pyramid) == ratio


def landscapes(folder, numbers):
    """As large as the recipe's crops."""
    folder.mkdir()
    for i in numbers:
        Image.fromarray(render_landscape(i, 128, 140)).save(folder / f"{i}.png")
    return folder


def test_a_comparison_trains_all_alike_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    photographs, others = landscapes(tmp_path / "photographs", range(6)), landscapes(tmp_path / "others", (10, 11))
    words = ["compare", "--data", str(photographs), "--out", str(tmp_path / "out"), "--vgg", "random",
             "--ratios", "192", "--models", "ours", "sd-vae", "--images", "2", "--peer-width", "0.25",
             "--test", str(others),
             "--set", "train.batch_size=1", "precision=fp32", "model.encoder.blocks=1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(rows, "STATISTICS", 4)
    monkeypatch.setattr(unseen, "CROPS", 1)
    assert compare.main() == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| ours 1:192 |" in table
    assert "| sd-vae 1:192 |" in table
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    for name in ("ours", "sd-vae"):
        result = json.loads((tmp_path / "out" / f"{name}-1-192-0" / "result.json").read_text())
        assert result["latent_values"] == 256
    assert "| bicubic |  | at most 256 |" in table
    judged = (tmp_path / "out" / "test.md").read_text()
    assert judged.startswith("| | PSNR, dB | SSIM | LPIPS | seeds |")
    assert all(f"| {name} 1:192 |" in judged for name in ("ours", "sd-vae", "bicubic"))
    assert judged.endswith("2 crops of 2 photographs.\n")
    monkeypatch.setattr(rows, "train_autoencoder", None)  # nothing is trained, or judged, twice
    monkeypatch.setattr(unseen, "load_model", None)
    assert compare.main() == 0
    again = (tmp_path / "out" / "table.md").read_text()
    thumbnail = again.index("| bicubic")  # through an untrained VGG-16, another one each time
    assert again[:thumbnail] == table[:thumbnail]


def test_figures_on_unseen_photographs_of_known_reconstructions():
    images = 0.5 * torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    judge = unseen.Unseen(
        "six",
        {},
        images,
        perceptual=lambda image, target: 3 * (target - image).mean(),
        inception=lambda batch: batch.mean(dim=(2, 3)),  # three features: the mean colour
        real=images.mean(dim=(2, 3)),
        runtime=start("cpu", "fp32"),
    )
    same = judge.figures(lambda batch: batch)
    assert same["ssim"] == pytest.approx(1)
    assert same["lpips"] == 0
    assert same["rfid"] == pytest.approx(0, abs=1e-6)
    darker = judge.figures(lambda batch: batch - 0.2)
    assert darker["psnr"] == pytest.approx(10 * math.log10(4 / 0.2**2), abs=1e-4)
    assert darker["lpips"] == pytest.approx(0.6)
    assert darker["rfid"] == pytest.approx(3 * 0.2**2, abs=1e-5)  # means differ by 0.2 in three features, nothing else
    assert same["ssim"] > darker["ssim"]


def test_photographs_that_were_trained_on_judge_nothing(photographs):
    with pytest.raises(UserError, match=r"are in .*, too"):
        unseen.Unseen.of_folder(photographs, photographs, (32, 32), 1.0, "random", None)


def test_predictability_of_known_pyramids():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(200, 4, 2, 2, generator=generator)
    news = torch.randn(200, 4, 4, 4, generator=generator)
    repeated = torch.nn.functional.interpolate(coarse, scale_factor=2)
    assert latents.predictability((coarse + 3, news + 3))[1] == pytest.approx(0, abs=0.02)
    assert latents.predictability((coarse[:, :, :1, :1], news))[0] is None
    assert latents.predictability((coarse, repeated))[1] == pytest.approx(1, abs=0.02)
    mixed = latents.predictability((coarse, (repeated + news) / 2**0.5))[1]
    assert 0.45 < mixed < 0.65  # half from below, and a little more from neighbours that share it


@pytest.mark.parametrize("fault", ["no such folder", "train.batch_size"])
def test_wrong_input_is_one_line(tmp_path, photographs, capsys, monkeypatch, fault):
    folder, key = (photographs, "train.batch_sise=1") if "batch" in fault else (tmp_path / "none", "seed=0")
    words = ["compare", "--data", str(folder), "--out", str(tmp_path / "out"), "--vgg", "random",
             "--models", "ours", "--ratios", "192", "--set", key]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    assert compare.main() == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1


def test_a_row_of_other_options_is_not_passed_off_as_this_one(tmp_path):
    rows.remember(tmp_path / "out" / "row-0", {"images": 1})
    rows.remember(tmp_path / "out" / "row-0", {"images": 1})
    with pytest.raises(UserError, match="other options"):
        rows.remember(tmp_path / "out" / "row-0", {"images": 2})


def test_a_spread_is_mean_and_standard_deviation():
    assert tables.spread([20.0, 22.0], 2) == "21.00 ± 1.41"
    assert tables.spread([20.0], 1) == "20.0"


def test_a_full_disk_is_one_line(capsys):
    def work():
        raise OSError(errno.ENOSPC, "No space left on device", "out/result.json")

    assert exit_code("ablate", work) == 2
    assert capsys.readouterr().err == "ablate: out/result.json: No space left on device\n"
