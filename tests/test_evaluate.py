"""`pyramid-ldm evaluate`: figures of what is known, for a run of either stage and for a folder of pictures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import lively_autoencoder, randomise, tiny_network
from PIL import Image

from pyramid_ldm.cli import evaluate as evaluate_command
from pyramid_ldm.cli import main
from pyramid_ldm.data.folder import find_images, split_held_out
from pyramid_ldm.data.images import to_tensor
from pyramid_ldm.demo.scenes import render_landscape
from pyramid_ldm.errors import UserError
from pyramid_ldm.evaluation import progress as progress_module
from pyramid_ldm.evaluation.evaluate import pictures_of, reconstruction_figures
from pyramid_ldm.evaluation.frechet import Moments, frechet_distance, kernel_distance
from pyramid_ldm.evaluation.metrics import bicubic
from pyramid_ldm.evaluation.progress import Progress
from pyramid_ldm.evaluation.reference import Reference, centre_crops
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.pyramid import LatentScaling

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of TorchScript


class MeanColour(torch.nn.Module):
    """Three features in [0, 1] where Inception has 2048; takes bytes, as StyleGAN2-ADA's file does."""

    def forward(self, image: torch.Tensor, return_features: bool) -> torch.Tensor:
        return image.float().mean(dim=(2, 3)) / 255


def colours(images):
    return images.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "net.pt"
    torch.jit.script(MeanColour()).save(str(path))
    return path


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A pipeline of random networks, as a run directory holds it."""
    run = tmp_path_factory.mktemp("flow")
    network = randomise(tiny_network())
    scaling = LatentScaling(((0.0,), (0.0,)), ((1.0,), (1.0,)))
    PyramidPipeline(network, lively_autoencoder(), scaling).save_pretrained(run / "model")
    return run


def figures_of(tmp_path, *words):
    assert main(["evaluate", *map(str, words), "--out", str(tmp_path / "figures.json"), "--precision", "fp32"]) == 0
    return json.loads((tmp_path / "figures.json").read_text())


def shifted(folder, change):
    """Copies of plain grey pictures, each a little different, with `change` added to every pixel."""
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (32, 32), (100 + 10 * i + change,) * 3).save(folder / f"{i}.png")
    return folder


def test_pictures_a_known_distance_away(tmp_path, inception, capsys):
    """A shift of the mean by 20 of 255 levels in three features, nothing else: FID is its square."""
    real, others = shifted(tmp_path / "real", 0), shifted(tmp_path / "others", 20)
    found = figures_of(tmp_path, others, "--data", real, "--inception", inception)
    assert found["of_samples"]["fid"] == pytest.approx(3 * (20 / 255) ** 2, rel=1e-4)
    grey = np.array([100 + 10 * i for i in range(6)]) / 255
    kernel = {(a, b): (np.outer(grey + a, grey + b) + 1) ** 3 for a in (0, 20 / 255) for b in (0, 20 / 255)}
    within = sum((kernel[k, k].sum() - kernel[k, k].trace()) / 30 for k in (0, 20 / 255))
    assert found["of_samples"]["kid"] == pytest.approx(within - 2 * kernel[0, 20 / 255].mean(), rel=1e-3)
    assert found["samples"] == found["photographs"] == 6
    equal = found["equal_numbers"]
    assert (equal["count"], set(equal)) == (3, {"count", "samples", "photographs"})
    printed = capsys.readouterr().out
    assert "6 samples from 6 photographs, 32x32" in printed
    assert "in equal numbers, from 3 of the photographs:" in printed
    assert "With fewer than 100 photographs" in printed
    same = figures_of(tmp_path, real, "--data", real, "--inception", inception)
    assert same["of_samples"]["fid"] == pytest.approx(0, abs=1e-8)


def test_what_sample_drew_is_without_its_grid(tmp_path):
    folder = shifted(tmp_path / "samples", 0)
    (folder / "samples.jsonl").write_text('{"file": "1.png"}\n{"file": "0.png"}\n{"file": "1.png"}\n{"fi')
    assert pictures_of(folder) == [str(folder / "1.png"), str(folder / "0.png")]
    (folder / "samples.jsonl").write_text("")
    with pytest.raises(UserError, match="names no picture"):
        pictures_of(folder)


def test_an_autoencoder_beside_a_thumbnail(tmp_path, autoencoder_directory, photographs, inception, capsys):
    found = figures_of(tmp_path, autoencoder_directory, "--data", photographs, "--inception", inception,
                       "--lpips", "random", "--num", 5)  # fmt: skip
    assert (found["what"], found["photographs"], found["values"]) == ("autoencoder", 5, 6 * 4 + 4 * 16)
    assert set(found["reconstructed"]) == set(found["bicubic"]) == {"psnr", "ssim", "periodic", "lpips", "rfid", "rkid"}
    images = torch.cat([batch for _, batch in centre_crops(sorted(map(str, photographs.iterdir()))[:5], (32, 32), "")])
    error = (bicubic(images, 6 * 4 + 4 * 16) - images).square().flatten(1).mean(dim=1)
    expected = (10 * torch.log10(4 / error)).mean().item()
    assert found["bicubic"]["psnr"] == pytest.approx(expected, abs=1e-4)
    assert found["bicubic"]["psnr"] > found["reconstructed"]["psnr"]  # nothing was trained
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["PSNR,", "dB", "SSIM", "periodic", "error", "LPIPS", "rFID", "rKID", "x", "1000"]
    assert table[3].split()[:2] == ["bicubic", f"{expected:.2f}"]


def test_a_flow_is_held_against_the_held_out_share(tmp_path, flow, photographs, inception):
    words = ["--data", photographs, "--inception", inception, "--solver", "euler", "--steps", 3, "--held-out", 0.5]
    found = figures_of(tmp_path, flow, *words, "--num", 4, "--batch-size", 3)
    held_out = split_held_out(find_images(photographs), 0.5)[1]
    assert (found["photographs"], found["held_out"], found["precision"]) == (len(held_out), 0.5, "fp32")
    assert (found["samples"], found["nfe"], found["solver"]["steps"]) == (4, 3, 3)
    pipeline = PyramidPipeline.from_pretrained(flow)
    samples = torch.stack([to_tensor(image) for image in pipeline(num_images=4, solver="euler", steps=3).images])
    in_order = [file.path for file in sorted(held_out, key=lambda file: file.digest)]
    real = torch.cat([batch for _, batch in centre_crops(in_order, (32, 32), "")])
    half = len(real) // 2
    with torch.no_grad():
        decoded = pipeline.autoencoder.decode(pipeline.autoencoder.encode(real[-half:]).mode())

    def apart(images, others):  # as bytes, in units of 255: what the network here sees
        a, b = (((x.clamp(-1, 1) + 1) * 127.5).round().mean(dim=(2, 3)) / 255 for x in (images, others))
        return frechet_distance(Moments.of([a]), Moments.of([b])), kernel_distance(a, b)

    equal = found["equal_numbers"]
    count = min(half, 4)
    assert equal["count"] == count
    for given, images, target in (
        (found["of_samples"], samples, real),
        (equal["samples"], samples[:count], real[:count]),
        (equal["photographs"], real[-count:], real[:count]),
        (equal["reconstructions"], decoded[-count:], real[:count]),
    ):
        # 32 pixels are resized to 299 and rounded, which moves a mean by at most a few thousandths
        assert (given["fid"], given["kid"]) == pytest.approx(apart(images, target), rel=0.05, abs=2e-3)
    assert figures_of(tmp_path, flow, *words, "--num", 4, "--seed", 1)["of_samples"] != found["of_samples"]
    assert figures_of(tmp_path, flow, *words)["samples"] == found["photographs"]


def test_rkid_does_not_shrink_with_fewer_images():
    """Reconstructions and originals are pairs, not two draws; with them in, rKID of few images falls below nothing."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(4000, 8, generator=generator)
    decoded = 0.9 * original + 0.3 * torch.randn(4000, 8, generator=generator) + 0.1
    whole = kernel_distance(decoded, original, paired=True)
    parts = zip(decoded.split(10), original.split(10), strict=True)
    few = torch.tensor([kernel_distance(a, b, paired=True) for a, b in parts])
    assert abs(few.mean() - whole) < 3 * few.std() / 400**0.5
    parts = zip(decoded.split(10), original.split(10), strict=True)
    biased = torch.tensor([kernel_distance(a, b) for a, b in parts])
    assert biased.mean() < whole - 10 * biased.std() / 400**0.5
    assert kernel_distance(original[:1500], decoded[1500:], paired=False) == pytest.approx(
        kernel_distance(decoded[1500:], original[:1500]), rel=1e-9
    )  # in blocks of rows, whichever comes first


def test_figures_of_known_reconstructions():
    images = 0.5 * torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ways = {"same": lambda batch: batch, "darker": lambda batch: batch - 0.2}
    count, found = reconstruction_figures(ways, images.split(4), lambda image, target: (target - image).mean(), colours)
    assert count == 6
    same, darker = found["same"], found["darker"]
    assert (same["ssim"], same["lpips"]) == (pytest.approx(1), 0)
    assert same["rfid"] == pytest.approx(0, abs=1e-6)
    assert darker["psnr"] == pytest.approx(10 * math.log10(4 / 0.2**2), abs=1e-4)
    assert darker["lpips"] == pytest.approx(0.2)
    assert darker["rfid"] == pytest.approx(3 * 0.2**2, abs=1e-5)
    assert same["rkid"] == pytest.approx(0, abs=1e-12)  # pairs are left out on both sides
    assert darker["rkid"] > 1e-3


def test_a_file_that_cannot_be_read_is_named_and_left_out(tmp_path, capsys):
    folder = shifted(tmp_path / "real", 0)
    (folder / "3.png").write_bytes(b"nothing")
    (folder / "5.png").write_bytes(b"nothing, either")
    files = find_images(folder)
    reference = Reference.of_images(files, (32, 32), colours)
    assert sorted(reference.images) == [file.path for file in files if file.path[-5] not in "35"]
    assert len(reference.features) == 4
    assert capsys.readouterr().err.count("skipped") == 2
    (folder / "4.png").write_bytes(b"nothing as well")
    with pytest.raises(UserError, match="3 photographs"):
        Reference.of_images(files, (32, 32), colours)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--data", "PHOTOS"], "nowhere: is no run that has saved a model, and no folder of pictures"),
        (["SHARDS", "--data", "PHOTOS"], "is no run that has saved a model"),
        (["FLOW", "--data", "PHOTOS", "--held-out", "5"], "--held-out: 5 is out of range; give a number above 0"),
        (["FLOW", "--data", "PHOTOS", "--held-out", "nan"], "--held-out: nan is out of range"),
        (["FLOW", "--data", "PHOTOS", "--out", "PHOTOS"], "are the same place; give another --out"),
        (["MIXED", "--data", "PHOTOS", "--inception", "NET"], "pictures of different sizes"),
        (["PHOTOS", "--data", "PHOTOS"], "FID and KID need --inception"),
        (["FLOW", "--data", "PHOTOS"], "FID and KID need --inception"),
        (["FLOW", "--data", "nowhere", "--inception", "NET"], "nowhere: no such folder"),
        (["FLOW", "--data", "PHOTOS", "--inception", "NET", "--num", "0"], "--num: 0 is out of range"),
        (["FLOW", "--data", "PHOTOS", "--inception", "NET", "--num", "1", "--steps", "1", "--solver", "euler"],
         "one picture to compare; distances need at least two"),
        (["PHOTOS", "--data", "PHOTOS", "--inception", "NET", "--num", "1"], "one picture to compare"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(tmp_path, flow, finished, photographs, inception, capsys, words, message):
    Image.new("RGB", (20, 30)).save(shifted(tmp_path / "mixed", 0) / "6.png")
    places = {"FLOW": flow, "PHOTOS": photographs, "NET": inception, "SHARDS": finished, "MIXED": tmp_path / "mixed"}
    try:
        code = main(["evaluate", *(str(places.get(word, word)) for word in words)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    seconds = iter(range(0, 1000, 15))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(seconds))
    with Progress("evaluate", 5) as progress:
        assert list(progress.over("abcde")) == list("abcde")
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: 2 of 5 images, 0.07 images/s, 45 s left",
        "evaluate: 4 of 5 images, 0.07 images/s, 15 s left",
        "evaluate: 5 of 5 images, 0.07 images/s, 0 s left",
    ]


def test_landscapes_are_nearer_to_landscapes_than_grey_is(tmp_path, photographs, inception):
    """The whole way, with pictures that differ as pictures do."""
    others = tmp_path / "others"
    others.mkdir()
    for i in range(50, 62):
        Image.fromarray(render_landscape(i, 48, 64)).save(others / f"{i}.png")
    near = figures_of(tmp_path, others, "--data", photographs, "--inception", inception)
    far = figures_of(tmp_path, shifted(tmp_path / "grey", 100), "--data", photographs, "--inception", inception)
    assert far["of_samples"]["fid"] > 2 * near["of_samples"]["fid"]
    assert far["of_samples"]["kid"] > near["of_samples"]["kid"]


def test_the_papers_protocol_draws_as_many_samples_beside_all_photographs(
    tmp_path, monkeypatch, capsys, flow, photographs, inception
):
    monkeypatch.setitem(evaluate_command.PROTOCOLS, "people2k", 5)
    words = [flow, "--data", photographs, "--inception", inception, "--steps", "2"]
    found = figures_of(tmp_path, *words, "--protocol", "people2k")
    assert (found["samples"], found["photographs"], found["held_out"]) == (5, 12, None)
    for extra in (["--num", "3"], ["--held-out", "0.3"]):
        assert main(["evaluate", *map(str, words), "--protocol", "people2k", *extra]) == 2
        assert "leave out --num and --held-out" in capsys.readouterr().err
    assert main(["evaluate", str(photographs), *map(str, words[1:]), "--protocol", "people2k"]) == 2
    assert "is no run of train-flow" in capsys.readouterr().err


def test_the_papers_protocol_is_in_the_configs():
    counts = {"lsun_bedrooms_256": 50_000, "lsun_churches_256": 50_000, "celebahq_1024": 30_000, "scapes2k": 10_000,
              "people2k": 5_000}  # fmt: skip
    assert counts == evaluate_command.PROTOCOLS
    for name, count in counts.items():
        text = (Path(__file__).parent.parent / "diffusion_configs" / f"{name}.yaml").read_text(encoding="utf-8")
        assert f"{count:,} samples" in text
        assert f"--protocol {name}" in text
