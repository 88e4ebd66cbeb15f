"""tools/ablate.py: rows that train, peers that are the published ones, tables that go on."""

import errno
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import ablate  # noqa: E402
import baselines  # noqa: E402
import front  # noqa: E402
import large_photographs  # noqa: E402

from pyramid_ldm.config import AutoencoderConfig, AutoencoderTraining, FlowTraining, load_config  # noqa: E402
from pyramid_ldm.config.autoencoder import AttentionConfig, DecoderConfig, EncoderConfig  # noqa: E402
from pyramid_ldm.config.base import to_yaml  # noqa: E402
from pyramid_ldm.config.fixed import FIXED, kind_of  # noqa: E402
from pyramid_ldm.data.images import to_tensor  # noqa: E402
from pyramid_ldm.demo.scenes import render_landscape  # noqa: E402
from pyramid_ldm.errors import UserError  # noqa: E402
from pyramid_ldm.evaluation import frechet  # noqa: E402
from pyramid_ldm.evaluation.metrics import psnr  # noqa: E402
from pyramid_ldm.pyramid import Level, latent_values  # noqa: E402
from pyramid_ldm.training import train_flow  # noqa: E402

STAGE_ONE = ["run_dir=r", "data.root=d", "loss.perceptual.weights=random"]
STAGE_TWO = ["run_dir=r", "data.shards=s"]
tools = pytest.mark.tools


def row(stage, name):
    if stage == "autoencoder":
        recipe = ablate.TOOLS / "ablation_recipe.yaml"
        return load_config(AutoencoderTraining, recipe, [*ablate.ROWS[stage][name], *STAGE_ONE])
    return load_config(FlowTraining, ablate.TOOLS / "flow.yaml", [*ablate.ROWS[stage][name], *STAGE_TWO])


@tools
def test_every_row_is_another_network_or_loss_on_as_many_values():
    levels = [Level(64, 16), Level(16, 8), Level(8, 4), Level(4, 1)]  # the demo's
    for stage in ("autoencoder", "network"):
        rows = ablate.ROWS[stage]
        default = to_yaml(row(stage, "default"))
        for name in rows:
            config = row(stage, name)
            assert (to_yaml(config) == default) == (name == "default"), name
            if stage == "autoencoder":
                assert latent_values(config.model.levels, config.image_size) == 512, name
            else:
                config.resolve([64, 64], levels)


@tools
@pytest.mark.parametrize(("stage", "least", "most"), [("both", 630, 656), ("photographs", 512, 512)])
def test_every_row_of_both_stages_is_another_one_of_as_many_values(stage, least, most):
    recipes = ablate.parse([stage, "--data", "d", "--reference", "r", "--inception", "i", "--out", "o"]).recipes
    seen = set()
    for name, row in ablate.ROWS[stage].items():
        config = load_config(AutoencoderTraining, recipes[0], [*front.flat(row.get("autoencoder", [])), *STAGE_ONE])
        flow = load_config(FlowTraining, recipes[1], [*front.flat(row.get("flow", [])), *STAGE_TWO])
        flow.resolve(config.image_size, config.model.levels)
        assert least <= latent_values(config.model.levels, config.image_size) <= most, name
        if row.get("network") not in ("sd-vae", "dc-ae"):  # which want diffusers, and are tested below
            assert baselines.builder(row.get("network", "ours"))(config.model).levels == config.model.levels
        seen.add(to_yaml(config) + to_yaml(flow) + row.get("network", ""))
    assert len(seen) == len(ablate.ROWS[stage])


@tools
def test_a_row_of_both_stages_is_judged_by_both_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    photographs, others = (folder for folder in (tmp_path / "photographs", tmp_path / "others"))
    for folder, numbers in ((photographs, range(6)), (others, range(10, 15))):
        folder.mkdir()
        for i in numbers:
            Image.fromarray(render_landscape(i, 64, 64)).save(folder / f"{i}.png")
    words = ["both", "--data", str(photographs), "--reference", str(others), "--inception", "none.pt", "--out",
             str(tmp_path / "out"), "--rows", "plain network", "linear codec", "--samples", "3", "--evaluations", "2",
             "--set", "train.images=4", "train.batch_size=2", "log.examined=1", "data.validation=0.2",
             "--set-flow", "train.images=4", "train.batch_size=2", "log.pictures=1", "samples.steps=2"]  # fmt: skip
    monkeypatch.setattr(frechet, "Inception", Colours)
    monkeypatch.setattr(train_flow, "EXAMINED", 4)
    monkeypatch.setattr(ablate, "CROPS", 4)
    monkeypatch.setattr(front, "FIT_CROPS", 4)
    for name, levels in (("plain network", 4), ("linear codec", 4)):
        monkeypatch.setitem(ablate.ROWS["both"][name], "flow", ["model.early=true", f"model.widths={[8] * levels}"])
    assert ablate.main([*words, "--guidance", "1", "2"]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert lines[2:] == ["plain network", "linear codec", "bicubic thumbnail"]
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1
    assert "KID x 1000, euler 2 | KID x 1000, euler 2 guided 2 |" in table
    assert (tmp_path / "out" / "front.png").stat().st_size > 1000
    assert (tmp_path / "out" / "plain-network-0" / "samples.png").is_file()
    monkeypatch.setattr(front, "train_autoencoder", None)  # what is done is not done again
    monkeypatch.setattr(front, "train_flow", None)
    assert ablate.main([*words, "--guidance", "1", "2"]) == 0
    assert (tmp_path / "out" / "table.md").read_text() == table


@tools
def test_the_linear_codec_has_as_many_values_and_says_what_they_can():
    """Images of few colours a block, exactly; whole or in part."""
    config = baselines.linear_config(4 * 9 + 15, 16, [32, 32])
    assert (config.levels, config.patch, config.decoder.widths) == ([Level(16, 12)], 1, [4] * 5)
    assert baselines.linear_config(100, 64, [64, 128]).levels == [Level(64, 50)]
    torch.manual_seed(0)
    colours = torch.nn.functional.interpolate(torch.randn(64, 3, 4, 4), scale_factor=8, mode="nearest")
    codec = baselines.linear(config, lambda: colours.split(16))
    with torch.no_grad():
        latents = codec.encode(colours[:2]).mode()
        decoded = codec.decode(latents)
        part = codec.decode(latents, (3, 5, 8, 9))
    assert [tuple(z.shape) for z in latents] == [(2, 12, 2, 2)]
    torch.testing.assert_close(decoded, colours[:2], atol=1e-3, rtol=0)
    torch.testing.assert_close(part, decoded[:, :, 3:11, 5:14])


class Colours:
    """Stands where the Inception network does: three features, the mean colour."""

    def __init__(self, path, device):
        self.device = device

    def __call__(self, images):
        return images.mean(dim=(2, 3))


@tools
def test_rows_of_stage_two_are_trained_once_and_measured_with_more_steps(tmp_path, finished, photographs, monkeypatch):
    words = ["network", "--shards", str(finished), "--reference", str(photographs), "--inception", "none.pt",
             "--out", str(tmp_path / "out"), "--rows", "default", "time logit-normal", "--images", "4",
             "--samples", "3", "--set", "model.widths=[8, 8]", "train.batch_size=2", "log.every=2"]  # fmt: skip
    monkeypatch.setattr(frechet, "Inception", Colours)
    monkeypatch.setattr(train_flow, "EXAMINED", 4)
    assert ablate.main([*words, "--evaluations", "2"]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    lines = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert lines[2:] == ["default", "time logit-normal"]
    assert re.search(r"3 samples against 12 real images\. Half of these, 6, are -?\d", table)
    monkeypatch.setattr(ablate, "train_flow", None)  # what is done is not trained again
    assert ablate.main([*words, "--evaluations", "2", "3"]) == 0
    more = (tmp_path / "out" / "table.md").read_text()
    assert "KID x 1000, euler 2 | KID x 1000, euler 3 | FID, euler 3" in more
    assert more.splitlines()[2].split("|")[2] == table.splitlines()[2].split("|")[2]


def build_peer(family, factor, channels, width):
    pytest.importorskip("diffusers")
    widths = [4] * factor.bit_length()
    config = AutoencoderConfig(
        image_size=[2 * factor, 2 * factor], levels=[Level(factor, channels)], encoder=EncoderConfig(widths),
        decoder=DecoderConfig(widths), attention=AttentionConfig(max_tokens=0),
    )  # fmt: skip
    torch.manual_seed(0)
    return baselines.PeerAutoencoder(config, family, width)


@tools
@pytest.mark.parametrize(("family", "factor", "channels", "millions"), [("sd-vae", 8, 4, 83.7), ("dc-ae", 32, 32, 323)])
def test_at_full_width_peers_are_the_published_ones(family, factor, channels, millions):
    with torch.device("meta"):
        model = build_peer(family, factor, channels, 1.0)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=3e-3)  # and our log-variances


@tools
@pytest.mark.parametrize(
    ("family", "width", "channels"), [("sd-vae", 1 / 4, 4), ("dc-ae", 1 / 8, 4), ("dc-ae", 1 / 8, 10)]
)
def test_a_peer_is_an_autoencoder_of_ours(family, width, channels):
    model = build_peer(family, 16, channels, width)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    output = model(image)
    assert output.reconstruction.shape == image.shape
    assert [tuple(level.shape) for level in output.posterior.mean] == [(1, channels, 2, 2)]
    assert output.posterior.log_variance[0].mean() < -4  # ours start at -6
    output.reconstruction.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.decoder.last_weight.shape[0] == (12 if family == "dc-ae" else 3)  # pixel shuffle: 2x2 pixels
    assert model.decoder.last_weight.grad.abs().sum() > 0


@tools
def test_predictability_of_known_pyramids():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(200, 4, 2, 2, generator=generator)
    news = torch.randn(200, 4, 4, 4, generator=generator)
    repeated = torch.nn.functional.interpolate(coarse, scale_factor=2)
    assert ablate.predictability((coarse + 3, news + 3))[1] == pytest.approx(0, abs=0.02)
    assert ablate.predictability((coarse[:, :, :1, :1], news))[0] is None
    assert ablate.predictability((coarse, repeated))[1] == pytest.approx(1, abs=0.02)
    mixed = ablate.predictability((coarse, (repeated + news) / 2**0.5))[1]
    assert 0.45 < mixed < 0.65  # half from below, and a little more from neighbours that share it


@tools
@pytest.mark.parametrize("fault", ["no such folder", "train.batch_sise", "are in"])
def test_wrong_input_is_one_line(tmp_path, photographs, capsys, monkeypatch, fault):
    monkeypatch.setattr(frechet, "Inception", Colours)
    folders = {"no such folder": (tmp_path / "none", photographs), "are in": (photographs, photographs)}
    folder, reference = folders.get(fault, (photographs, ROOT / "docs"))
    words = ["both", "--data", str(folder), "--reference", str(reference), "--inception", "none.pt",
             "--out", str(tmp_path / "out"), "--set", f"{fault}=1" if "batch" in fault else "seed=0"]  # fmt: skip
    assert ablate.main(words) == 2
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1


def test_a_jpeg_is_the_best_that_fits():
    picture = Image.fromarray(render_landscape(3, 64, 128))
    image = to_tensor(picture)
    sizes = [len(large_photographs.fit_jpeg(picture, most)) for most in (500, 900, 1500)]
    assert all(0.95 * most < size <= most for size, most in zip(sizes, (500, 900, 1500), strict=True))
    assert large_photographs.fit_jpeg(picture, 100) == b""
    near = [float(psnr(large_photographs.jpeg(image[None], most), image[None])) for most in (320, 500, 900, 1500)]
    assert near == sorted(near), "the first is of half the size"
    assert near[0] > 15


def test_patches_lie_side_by_side(monkeypatch):
    monkeypatch.setattr(large_photographs, "PATCH", 4)
    images = torch.rand(2, 3, 9, 12)
    found = large_photographs.patches(images)
    assert found.shape == (2 * 2 * 3, 3, 4, 4)
    assert torch.equal(found[6 + 1 * 3 + 2], images[1, :, 4:8, 8:12])


def test_the_part_with_the_most_detail_is_shown_or_all_of_a_smaller_image(monkeypatch):
    monkeypatch.setattr(large_photographs, "PART", 32)
    image = torch.zeros(3, 96, 128)
    image[:, 40:60, 100:120] = torch.rand(20, 20)
    rows, columns = large_photographs.detailed(image)
    assert (rows, columns) == (slice(32, 64), slice(96, 128))
    assert large_photographs.detailed(image[:, :20, :24]) == (slice(0, 20), slice(0, 20))


@tools
def test_a_stage_one_is_held_beside_a_jpeg(tmp_path, autoencoder_directory, photographs, monkeypatch, capsys):
    words = [str(autoencoder_directory), "--data", str(photographs), "--fit", str(photographs), "--vgg", "random",
             "--inception", "none.pt", "--out", str(tmp_path / "out")]  # fmt: skip
    assert large_photographs.main(words) == 2
    assert "is for 32x32" in capsys.readouterr().err
    for name, value in {
        "PATCH": 16,
        "PART": 16,
        "FIT_CROPS": 4,
        "BYTES": 8,
        "Inception": Colours,
    }.items():
        monkeypatch.setattr(large_photographs, name, value)
    assert large_photographs.main(words) == 0
    rows = [line.split(" | ") for line in (tmp_path / "out" / "table.md").read_text().splitlines()[2:-2]]
    assert [row[0].strip("| ") for row in rows] == ["trained", "bicubic thumbnail", "linear codec", "JPEG, 704 bytes"]
    measured = {row[0].strip("| "): float(row[1]) for row in rows}
    assert measured["JPEG, 704 bytes"] > measured["trained"], "which nothing was trained"
    with Image.open(tmp_path / "out" / "sheet.jpg") as sheet:
        assert sheet.size == (5 * 18 - 2, 6 * 18 - 2)


@tools
def test_a_full_disk_is_one_line_and_another_row_is_not_passed_off_as_this_one(tmp_path, capsys):
    def work():
        raise OSError(errno.ENOSPC, "No space left on device", "out/result.json")

    assert ablate.exit_code("ablate", work) == 2
    assert capsys.readouterr().err == "ablate: out/result.json: No space left on device\n"
    for images in (1, 1):
        ablate.remember(tmp_path / "out" / "row-0", {"images": images})
    assert json.loads((tmp_path / "out" / "row-0.json").read_text()) == {"images": 1}
    with pytest.raises(UserError, match="other options"):
        ablate.remember(tmp_path / "out" / "row-0", {"images": 2})


def test_a_spread_is_mean_and_standard_deviation():
    assert ablate.spread([20.0, 22.0], 2) == "21.00 ± 1.41"
    assert ablate.spread([20.0], 1) == "20.0"
    assert ablate.spread([], 1) == "-"


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
        key for stage in ("autoencoder", "network") for key in keys_of(yaml.safe_load(to_yaml(row(stage, "default"))))
    }
    assert len(named) > 20
    assert set(named) <= known


LEARNED = [path for path in sorted((ROOT / "autoencoder_configs").glob("*.yaml")) if kind_of(path) not in FIXED]


@pytest.mark.parametrize("path", LEARNED, ids=lambda path: path.stem)
def test_configs_named_after_the_papers_data_sets_keep_its_choices(path):
    config = load_config(AutoencoderTraining, path, ["data.root=x"])
    model = config.model
    assert model.skip == "res_skip"
    if path.stem in ("demo", "demo_vq", "photographs_256", "photographs_2k", "scapes2k_cpu"):  # ours
        assert (model.encoder.image_patch, model.decoder.branch_blocks, model.decoder.dropout) == (4, 1, 0)
        return
    assert (model.encoder.image_patch, model.decoder.branch_blocks, model.patch, model.base) == (1, 2, 1, "none")
    assert (config.train.optimizer, config.train.level_dropout) == ("adam", 0)
    assert model.encoder.spectral_norm
    assert model.attention.decoder == "spatial_channel"
    assert (model.encoder.pooling, model.decoder.dropout) == ("average", 0.35)
