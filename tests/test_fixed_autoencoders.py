"""Stages one without parameters: pixels and wavelets, alone and through the commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import AE_CONFIG

from pyramid_ldm.autoencoders.load import load_autoencoder
from pyramid_ldm.autoencoders.pixels import Pixels
from pyramid_ldm.autoencoders.wavelet import Wavelet
from pyramid_ldm.cli import main
from pyramid_ldm.config.fixed import PixelsConfig, WaveletConfig
from pyramid_ldm.data.folder import find_images, split_held_out
from pyramid_ldm.errors import UserError
from pyramid_ldm.nn.wavelet import analyse, synthesise
from pyramid_ldm.pyramid import Level


def image(height, width, seed=0):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TestWavelet53:
    def test_by_hand(self):
        """Le Gall's filters (-1, 2, 6, 2, -1) / 8 and (-1, 2, -1) / 2, inside and at the mirrored ends."""
        x = torch.tensor([1.0, 4.0, 2.0, 8.0, 5.0, 7.0])
        mean, difference = analyse(x, 0)
        at = [2, 1, 0, 1, 2, 3, 4, 5, 4, 3]  # x_{-2}, ..., x_7 of x_0, ..., x_5
        low = [sum(w * x[at[k + j]] for j, w in enumerate((-1, 2, 6, 2, -1))) / 8 for k in (0, 2, 4)]
        high = [sum(w * x[at[k + 2 + j]] for j, w in enumerate((-1, 2, -1))) / 2 for k in (0, 2, 4)]
        torch.testing.assert_close(mean / 2**0.5, torch.stack(low))
        torch.testing.assert_close(difference * 2**0.5, torch.stack(high))

    @pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 31, 64])
    def test_nothing_is_lost_at_odd_and_even_sizes(self, size):
        x = torch.randn(2, 3, size, 6, generator=torch.Generator().manual_seed(size))
        mean, difference = analyse(x, -2)
        assert mean.shape[-2] == (size + 1) // 2
        torch.testing.assert_close(synthesise(mean, difference, -2), x, atol=1e-6, rtol=0)

    def test_a_straight_line_has_no_details(self):
        _, difference = analyse(torch.arange(16.0), 0)
        assert difference[:-1].abs().max() < 1e-6  # the last one sees the mirrored end

    def test_the_gradient_of_there_and_back_is_one(self):
        x = torch.randn(5, 7, requires_grad=True)
        synthesise(*analyse(x, 0), 0).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones_like(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_wavelets_reconstruct_perfectly(depth):
    autoencoder = Wavelet(WaveletConfig([32, 48], depth))
    x = image(32, 48)
    latents = autoencoder.encode(x).mode()
    assert [tuple(level.shape) for level in latents] == [(2, 3 * 4**depth, 32 >> depth, 48 >> depth)]
    torch.testing.assert_close(autoencoder.decode(latents), x, atol=1e-6, rtol=0)
    assert autoencoder.compression_ratio() == 1


def test_details_lie_beside_the_means_they_belong_to():
    """One bright pixel changes latents near its own place alone, whatever the band."""
    autoencoder = Wavelet(WaveletConfig([64, 64], 3))
    x = torch.zeros(1, 3, 64, 64)
    x[..., 40, 16] = 1
    (latents,) = autoencoder.encode(x).mode()
    rows, columns = (latents.abs().sum(dim=(0, 1)) > 1e-6).nonzero().unbind(dim=1)
    assert (rows - 40 / 8).abs().max() <= 2
    assert (columns - 16 / 8).abs().max() <= 2


def test_pixels_are_averages_and_the_finest_is_decoded():
    autoencoder = Pixels(PixelsConfig([16, 32], [8, 2, 1]))
    assert autoencoder.levels == [Level(8, 3), Level(2, 3), Level(1, 3)]
    x = image(16, 32)
    coarse, middle, fine = autoencoder.encode(x).mode()
    torch.testing.assert_close(coarse[0, 1, 1, 2], x[0, 1, 8:16, 16:24].mean())
    assert middle.shape == (2, 3, 8, 16)
    assert torch.equal(autoencoder.decode((coarse * 0, middle * 0, fine)), x)
    assert torch.equal(autoencoder.decode((coarse, middle, fine), (4, 8, 6, 10)), x[..., 4:10, 8:18])


def test_coarser_pixels_are_enlarged():
    autoencoder = Pixels(PixelsConfig([32, 32], [4]))
    x = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32).contiguous()
    decoded = autoencoder.decode_tiled(autoencoder.encode(x).mode())
    assert decoded.shape == x.shape
    assert (decoded - x)[..., 10:-10].abs().max() < 0.011
    assert autoencoder.compression_ratio() == 16


@pytest.mark.parametrize("config", [PixelsConfig([16, 16], [2, 1]), WaveletConfig([16, 16], 2)])
def test_it_is_saved_by_its_config(tmp_path, config):
    one = Pixels(config) if isinstance(config, PixelsConfig) else Wavelet(config)
    one.save_pretrained(tmp_path)
    again = load_autoencoder(tmp_path)
    assert type(again) is type(one)
    assert again.config == config
    assert again.fingerprint() == one.fingerprint()
    other = PixelsConfig([16, 16], [1]) if isinstance(config, PixelsConfig) else WaveletConfig([16, 16], 1)
    assert type(one)(other).fingerprint() != one.fingerprint()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kind: pixels\nimage_size: [32, 30]\nfactors: [4, 1]", "multiples of the coarsest factor, 4"),
        ("kind: pixels\nimage_size: [32, 32]\nfactors: [1, 4]", "must fall"),
        ("kind: wavelet\nimage_size: [32, 36]\ndepth: 3", "multiples of 8"),
        ("kind: wavelet\nimage_size: [32, 36]\ndepth: 5", "at most 4"),
        ("image_size: [32, 36]", "kind: pixels or wavelet"),
    ],
)
def test_a_config_that_is_wrong(tmp_path, text, fault):
    (tmp_path / "stage_one.yaml").write_text(text)
    with pytest.raises(UserError, match=fault):
        load_autoencoder(tmp_path / "stage_one.yaml")


FLOW = """
run_dir: unset
device: cpu
precision: fp32
process: vp
scaling: channel
model: {widths: [8, 16], blocks: 1, dropout: 0.0}
data: {workers: 0}
train: {images: 16, batch_size: 4, learning_rate: 1.0e-3}
ema: {widths: [0.1], export: 0.1}
log: {every: 8, pictures_every: 16, pictures: 2}
checkpoint: {every: 8}
samples: {steps: 3}
"""


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture
def stage_one(tmp_path):
    (tmp_path / "wavelet.yaml").write_text("kind: wavelet\nimage_size: [16, 16]\ndepth: 1\n")
    (tmp_path / "flow.yaml").write_text(FLOW)
    return tmp_path / "wavelet.yaml"


def losses(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], {k for line in lines for k in line}


def test_photographs_are_encoded_on_the_way(tmp_path, photographs, stage_one):
    """The four commands without shards; killed and resumed, it ends where an undisturbed run does."""
    flow, data = tmp_path / "flow.yaml", f"data.root={photographs}"
    words = ["train-flow", flow, data, f"data.autoencoder={stage_one}", "data.crop=random", "data.zoom=1.5"]
    words.append("data.validation=0.2")
    assert run(*words, f"run_dir={tmp_path / 'whole'}") == 0
    found, names = losses(tmp_path / "whole")
    assert len(found) == 2
    assert {"held_out_8x8", "train_8x8"} <= names
    assert run(*words, f"run_dir={tmp_path / 'parts'}", "train.images=8", "train.decay=constant") == 0
    assert run(*words, f"run_dir={tmp_path / 'parts'}", "train.decay=constant") == 0
    assert losses(tmp_path / "parts")[0] == found
    sampled = ["sample", tmp_path / "whole", "-n", 2, "--solver", "ancestral", "--steps", 4, "--out", tmp_path / "out"]
    assert run(*sampled) == 0
    with Image.open(tmp_path / "out" / "seed0000-000001.png") as picture:
        assert picture.size == (16, 16)
        assert np.asarray(picture).std() > 1


def test_shards_of_wavelets_train_alike(tmp_path, photographs, stage_one, capsys):
    """encode CONFIG, then train-flow: the same latents in the same order. Neither scales them here: what each takes
    for the deviation is not of the very same images."""
    assert run("encode", stage_one, "--data", photographs, "--out", tmp_path / "z", "--dtype", "float32",
               "--no-flip", "--workers", 0, "--validation", 0.2) == 0  # fmt: skip
    flow = tmp_path / "flow.yaml"
    cached = [f"data.shards={tmp_path / 'z'}", "scaling=paper"]
    assert run("train-flow", flow, *cached, f"run_dir={tmp_path / 'cached'}", "data.autoencoder=other") == 0
    assert "data.autoencoder=other is not used" in capsys.readouterr().err
    direct = [
        "data.flip=false",
        "data.validation=0.2",
        "scaling=paper",
        f"data.root={photographs}",
        f"data.autoencoder={stage_one}",
    ]
    assert run("train-flow", flow, *direct, f"run_dir={tmp_path / 'direct'}") == 0
    assert losses(tmp_path / "cached")[0] == pytest.approx(losses(tmp_path / "direct")[0], rel=1e-4)
    assert run("info", tmp_path / "z") == 0
    assert run("reconstruct", stage_one, "--data", photographs, "--out", tmp_path / "pairs") == 0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["data.root={photographs}"], "data.autoencoder is not set"),
        (["data.autoencoder={stage_one}"], "data.root is not set"),
        (["data.root={photographs}", "data.shards={photographs}"], "both given"),
        (["data.shards={photographs}", "data.crop=random"], "data.crop is of photographs"),
        (["data.shards={photographs}", "data.validation=0.5"], "data.validation is of photographs"),
        ([], "data.shards is not set"),
        (["data.root={photographs}", "data.autoencoder={photographs}"], "holds no model"),
        (["data.root={photographs}", "data.autoencoder={stage_one}", "vp.noise=sinc", "vp.level_shifts=[1, 2]"],
         "vp.level_shifts holds 2 values for 1 levels"),
    ],
)  # fmt: skip
def test_what_is_not_a_source_of_latents(tmp_path, photographs, stage_one, capsys, words, fault):
    given = [word.format(photographs=photographs, stage_one=stage_one) for word in words]
    assert run("train-flow", tmp_path / "flow.yaml", f"run_dir={tmp_path / 'run'}", *given) == 2
    assert fault in capsys.readouterr().err


def test_a_learned_stage_one_encodes_on_the_way(tmp_path, photographs, capsys):
    """Samples of its posterior; killed and resumed the same; what it held out is held out again."""
    (tmp_path / "ae.yaml").write_text(AE_CONFIG)
    (tmp_path / "flow.yaml").write_text(FLOW)
    ae = tmp_path / "ae"
    training = ["train.images=4", "data.validation=0.4", "loss.gan.weight=0"]
    assert run("train-ae", tmp_path / "ae.yaml", f"data.root={photographs}", f"run_dir={ae}", *training) == 0
    words = ["train-flow", tmp_path / "flow.yaml", f"data.root={photographs}", f"data.autoencoder={ae}", "vp.shift=0.5",
             "edm.sigma_max=50", "log.every=4"]  # fmt: skip
    capsys.readouterr()
    assert run(*words, f"run_dir={tmp_path / 'whole'}") == 0
    said = capsys.readouterr().err
    held_out = split_held_out(find_images(photographs), 0.4)[1]
    assert f"{12 - len(held_out)} photographs to train on, {len(held_out)} held out" in said
    assert "edm.sigma_max: not used, for process is vp" in said
    assert "vp.shift" not in said
    whole = losses(tmp_path / "whole")[0]
    assert run(*words, f"run_dir={tmp_path / 'parts'}", "train.images=8", "train.decay=constant") == 0
    assert run(*words, f"run_dir={tmp_path / 'parts'}", "train.decay=constant") == 0
    assert losses(tmp_path / "parts")[0] == whole
    assert run(*words, f"run_dir={tmp_path / 'mode'}", "data.posterior=mode", "train.images=4") == 0
    assert losses(tmp_path / "mode")[0] != whole[:1]
    capsys.readouterr()
    assert run(*words, f"run_dir={tmp_path / 'other'}", "data.validation=0.1", "train.images=4") == 0
    assert "the two stages hold out different photographs" in capsys.readouterr().err


def test_photographs_that_cannot_be_read_are_named_in_either_split(tmp_path, photographs, stage_one, capsys):
    photos = shutil.copytree(photographs, tmp_path / "photos")
    train, held_out = split_held_out(find_images(photos), 0.3)
    broken = [train[0].path, train[1].path, held_out[0].path, held_out[1].path]
    for path in broken:
        Path(path).write_bytes(Path(path).read_bytes()[: Path(path).stat().st_size // 2])
    words = ["train-flow", tmp_path / "flow.yaml", f"data.root={photos}", f"data.autoencoder={stage_one}"]
    words += ["data.validation=0.3", f"run_dir={tmp_path / 'run'}"]
    assert run(*words, "data.max_bad_fraction=0.5") == 0
    said = capsys.readouterr().err
    assert [said.count(f"skipped {path}") for path in broken] == [1, 1, 1, 1]


def test_there_is_nothing_to_train(stage_one, photographs, capsys):
    assert run("train-ae", stage_one, f"data.root={photographs}") == 2
    assert "nothing to train; give it to encode" in capsys.readouterr().err


def test_other_photographs_than_the_run_began_with_are_refused(tmp_path, photographs, stage_one, capsys):
    words = ["train-flow", tmp_path / "flow.yaml", f"data.autoencoder={stage_one}", f"run_dir={tmp_path / 'run'}"]
    assert run(*words, f"data.root={photographs}", "train.images=8") == 0
    other = tmp_path / "other"
    other.mkdir()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(other / f"{seed}.png")
    assert run(*words, f"data.root={other}") == 2
    assert "give the former as data.root" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo_pixels", "demo_wavelet"])
def test_the_next_command_is_of_the_same_shape(tmp_path, photographs, capsys, name):
    shipped = Path(__file__).parent.parent / f"autoencoder_configs/{name}.yaml"
    (tmp_path / "mine.yaml").write_text(shipped.read_text())
    words = [
        "encode",
        tmp_path / "mine.yaml",
        "--data",
        photographs,
        "--out",
        tmp_path / "z",
        "--workers",
        0,
        "--upscale",
    ]
    assert run(*words) == 0
    assert f"train-flow diffusion_configs/{name}.yaml data.shards=" in capsys.readouterr().out


def test_a_stage_one_whose_name_is_wrong(tmp_path, photographs, capsys):
    assert run("encode", "configs/demo_pixels.yaml", "--data", photographs, "--out", tmp_path / "z") == 2
    assert "no such config file; did you mean autoencoder_configs/demo_pixels.yaml?" in capsys.readouterr().err


def test_a_shipped_stage_one_is_found_outside_of_a_clone(tmp_path, photographs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "autoencoder_configs/demo_pixels.yaml"
    assert run("encode", name, "--data", photographs, "--out", "z", "--workers", 0) == 0
    (tmp_path / "flow.yaml").write_text(FLOW)
    words = [f"data.root={photographs}", f"data.autoencoder={name}", "run_dir=run", "train.images=4"]
    assert run("train-flow", "flow.yaml", *words) == 0
