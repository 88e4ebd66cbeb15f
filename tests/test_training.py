"""Both loops as a user starts them: exact resume after kill -9, two processes, bad files, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pyramid_ldm.cli import main
from pyramid_ldm.training.checkpoint import checkpoint_directories

AE_CONFIG = """
run_dir: unset
image_size: [32, 32]
model:
  levels: [{factor: 16, channels: 6}, {factor: 8, channels: 4}]
  encoder: {widths: [8, 8, 16, 16, 16]}
  decoder: {widths: [8, 8, 16, 16, 16], branch_blocks: 1, dropout: 0.2}
  attention: {max_tokens: 16}
data: {workers: 0, validation: 0.1}
loss:
  kl: 1.0e-4
  perceptual: {weight: 0}
  gan: {start: 8, disc_warmup: 8, ramp: 8, channels: 8, layers: 2}
train: {images: 48, batch_size: 4, learning_rate: 1.0e-3, warmup: 8, decay: cosine}
precision: fp32
log: {every: 4, pictures_every: 24, pictures: 2}
checkpoint: {every: 8}
"""

FLOW_CONFIG = """
run_dir: unset
model: {widths: [16, 16], blocks: 1, dropout: 0.2, fourier_scale: 1.0}
data: {workers: 0}
train: {images: 48, batch_size: 4, learning_rate: 1.0e-3}
precision: fp32
samples: {steps: 4}
log: {every: 4, pictures_every: 24, pictures: 2}
checkpoint: {every: 8}
"""


def command(*arguments: object, processes: int = 1) -> list[str]:
    start = [sys.executable, "-m", "pyramid_ldm"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                 "-m", "pyramid_ldm"]  # fmt: skip
    return [*start, *map(str, arguments)]


def run(*arguments: object, processes: int = 1, code: int = 0) -> subprocess.CompletedProcess[str]:
    # One thread: two processes of one thread each must do the arithmetic of one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*arguments, processes=processes), capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def kill_after(arguments: tuple[object, ...], happened) -> None:
    """Starts a command and kills it with -9 as soon as `happened()`."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 100
    while not happened():
        assert process.poll() is None, "ended before it could be killed: " + process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def state_of(run_directory: Path) -> dict:
    return torch.load(checkpoint_directories(run_directory)[-1] / "state.pt", weights_only=True)


def assert_equal(a, b, path="") -> None:
    """Bit for bit, through nested dicts and lists."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}.{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def logged(run_directory: Path, key: str) -> dict[int, float]:
    lines = map(json.loads, (run_directory / "metrics.jsonl").read_text().splitlines())
    return {line["images_seen"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="module")
def home(tmp_path_factory, photographs) -> Path:
    """A folder with configs, a trained autoencoder, its shards and a trained flow."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "ae.yaml").write_text(AE_CONFIG)
    (folder / "flow.yaml").write_text(FLOW_CONFIG)
    run("train-ae", folder / "ae.yaml", f"data.root={photographs}", f"run_dir={folder / 'ae'}")
    run("encode", folder / "ae", "--data", photographs, "--out", folder / "latents", "--workers", 0, "--shard-size", 8)
    run("train-flow", folder / "flow.yaml", f"data.shards={folder / 'latents'}", f"run_dir={folder / 'flow'}")
    return folder


def test_a_run_directory_holds_what_it_promises(home):
    for name in ("ae", "flow"):
        files = {str(p.relative_to(home / name)) for p in (home / name).rglob("*") if p.is_file()}
        assert {"config.yaml", "provenance.json", "metrics.jsonl"} <= files
        assert {f"checkpoints/000000{n}/{f}" for n in (40, 48) for f in ("state.pt", "manifest.json")} <= files
        assert len(checkpoint_directories(home / name)) == 2
        assert any(f.startswith("events.out.tfevents") for f in files)
    assert (home / "ae/images/reconstructions-00000048.png").is_file()
    assert (home / "flow/images/samples-00000048.png").is_file()
    assert (home / "flow/model/pipeline.json").is_file()
    assert json.loads((home / "ae/provenance.json").read_text())["torch"] == torch.__version__


def test_the_autoencoder_learns(home):
    loss = logged(home / "ae", "l1")
    assert loss[48] < 0.7 * loss[4]


def test_held_out_figures_are_logged_at_the_end(home):
    """Finite, and of the same order on both sides: the averaged network, without dropout, on the same times."""
    assert 0 < logged(home / "ae", "held_out_ssim")[48] < 1
    names = [key for key in json.loads((home / "flow/metrics.jsonl").read_text().splitlines()[-1]) if "held" in key]
    assert len(names) >= 2
    for name in names:
        held_out, train = (logged(home / "flow", key)[48] for key in (name, name.replace("held_out", "train")))
        assert 0.3 < held_out / train < 3


def test_autoencoder_killed_and_resumed_ends_bit_for_bit_the_same(home, photographs, tmp_path):
    """Past the GAN's start, with dropout, EMA, both optimizers and the adaptive weight."""
    arguments = ("train-ae", home / "ae.yaml", f"data.root={photographs}", f"run_dir={tmp_path / 'ae'}")
    kill_after(arguments, (tmp_path / "ae/checkpoints/00000024").exists)
    resumed = run(*arguments)
    assert "resuming at" in resumed.stderr
    assert_equal(state_of(home / "ae"), state_of(tmp_path / "ae"))
    for key in ("loss", "generator", "gan_weight"):
        assert logged(home / "ae", key) == logged(tmp_path / "ae", key)
    a, b = ((folder / "ae/model/model.safetensors").read_bytes() for folder in (home, tmp_path))
    assert a == b


def test_flow_killed_and_resumed_ends_bit_for_bit_the_same(home, tmp_path):
    arguments = ("train-flow", home / "flow.yaml", f"data.shards={home / 'latents'}", f"run_dir={tmp_path / 'flow'}")
    kill_after(arguments, (tmp_path / "flow/checkpoints/00000024").exists)
    run(*arguments)
    assert_equal(state_of(home / "flow"), state_of(tmp_path / "flow"))
    assert logged(home / "flow", "loss") == logged(tmp_path / "flow", "loss")


@pytest.mark.parametrize("command", ["train-ae", "train-flow"])
def test_a_finished_run_exports_another_average(home, photographs, tmp_path, command):
    name, data = ("ae", photographs) if command == "train-ae" else ("flow", home / "latents")
    directory = tmp_path / name
    shutil.copytree(home / name, directory)
    weights = directory / ("model" if name == "ae" else "model/flow") / "model.safetensors"
    before, log = weights.read_bytes(), (directory / "metrics.jsonl").read_text()
    key = "data.root" if name == "ae" else "data.shards"
    words = [command, str(home / f"{name}.yaml"), f"{key}={data}", f"run_dir={directory}"]
    assert main([*words, "ema.export=0.1"]) == 0
    tracks, stored = state_of(directory)["ema"], load_file(weights)
    norms = [key for key in stored if key.endswith("norm.bias")]  # nothing is folded into these
    assert len(norms) > 1
    assert all(torch.equal(stored[key], tracks["0.1"][key]) for key in norms)
    assert not any(torch.equal(stored[key], tracks["0.05"][key]) for key in norms)
    assert main(words) == 0  # and back
    assert weights.read_bytes() == before
    assert (directory / "metrics.jsonl").read_text() == log
    assert_equal(state_of(directory), state_of(home / name))


def test_two_processes_give_the_single_processs_losses(home, photographs, tmp_path):
    """The same global batch: 4 in one process, 2 + 2 in two, 2 accumulated twice. Dropout 0 (it is drawn per rank)."""
    shared = ("data.workers=0", "train.images=24", "checkpoint.every=24", "log.pictures_every=1000")
    layouts = {"one": (1, 4, 1), "two": (2, 2, 1), "accumulated": (1, 2, 2)}
    for stage in ("ae", "flow"):
        for name, (processes, batch, accumulate) in layouts.items():
            data = f"data.root={photographs}" if stage == "ae" else f"data.shards={home / 'latents'}"
            dropout = "model.decoder.dropout=0" if stage == "ae" else "model.dropout=0"
            shared = (*shared, "train.regions=2", "train.region_size=24") if stage == "ae" else shared[:4]
            run(f"train-{stage}", home / f"{stage}.yaml", data, dropout, *shared, f"train.batch_size={batch}",
                f"train.accumulate={accumulate}", f"run_dir={tmp_path / stage / name}",
                processes=processes)  # fmt: skip
        reference = logged(tmp_path / stage / "one", "loss")
        assert len(reference) == 6
        for other in ("two", "accumulated"):
            assert logged(tmp_path / stage / other, "loss") == pytest.approx(reference, abs=1e-5, rel=1e-5)
        if stage == "ae":
            weight = logged(tmp_path / stage / "one", "gan_weight")
            assert max(weight.values()) > 0
            assert logged(tmp_path / stage / "two", "gan_weight") == pytest.approx(weight, rel=1e-3)


def test_ctrl_c_saves_and_the_same_command_goes_on(home, photographs, tmp_path):
    arguments = ("train-ae", home / "ae.yaml", f"data.root={photographs}", f"run_dir={tmp_path / 'ae'}")
    long = (
        *arguments,
        "train.images=100000",
        "checkpoint.every=100000",
        "log.pictures_every=100000",
        "train.decay=constant",
    )
    process = subprocess.Popen(
        command(*long),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "ae/metrics.jsonl"
    while not metrics.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "To resume, run the same command again" in errors
    (saved,) = checkpoint_directories(tmp_path / "ae")
    assert state_of(tmp_path / "ae")["images_seen"] == int(saved.name) > 0
    refused = run(*arguments, code=2)  # decay differs
    assert "train.decay=constant, now cosine" in refused.stderr


def test_a_damaged_newest_checkpoint_falls_back(home, photographs, tmp_path):
    import shutil

    shutil.copytree(home / "ae", tmp_path / "ae")
    newest = checkpoint_directories(tmp_path / "ae")[-1] / "state.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    done = run("train-ae", home / "ae.yaml", f"data.root={photographs}", f"run_dir={tmp_path / 'ae'}")
    assert "truncated; falling back" in done.stderr
    assert_equal(state_of(home / "ae"), state_of(tmp_path / "ae"))


def test_one_corrupt_file_is_named_once_and_skipped_many_stop_the_run(home, photographs, tmp_path):
    import shutil

    shutil.copytree(photographs, tmp_path / "photos")
    files = sorted((tmp_path / "photos").iterdir())
    files[3].write_bytes(files[3].read_bytes()[:300])
    # Six epochs: the file is met again and again, and stays one file.
    settings = (
        "train.images=64",
        "checkpoint.every=64",
        "log.pictures_every=1000",
        "data.workers=1",
        "data.validation=0",
    )
    data = f"data.root={tmp_path / 'photos'}"
    done = run("train-ae", home / "ae.yaml", data, f"run_dir={tmp_path / 'ae'}", *settings)
    assert done.stderr.count(f"skipped {files[3]}") == 1
    for file in files[4:10]:
        file.write_bytes(file.read_bytes()[:300])
    failed = run("train-ae", home / "ae.yaml", data, f"run_dir={tmp_path / 'ae2'}", *settings, code=2)
    assert "images cannot be read, more than data.max_bad_fraction=0.01" in failed.stderr.strip().splitlines()[-1]
    for file in files:
        file.write_bytes(file.read_bytes()[:300])
    failed = run("train-ae", home / "ae.yaml", data, f"run_dir={tmp_path / 'ae3'}", *settings, code=2)
    assert failed.stderr.strip().splitlines()[-1].startswith("pyramid-ldm: none of the")


def test_vq_random_crops_and_workers_resume_exactly(home, photographs, tmp_path):
    """12 images, then to 24; and on to 27, which is not a whole number of steps. Two random regions of each."""
    settings = (
        "model.latent=vq",
        "model.codebook_size=16",
        "data.crop=random",
        "data.zoom=1.5",
        "data.workers=2",
        "loss.gan.weight=0",
        "log.pictures_every=1000",
        "train.decay=constant",
        "train.regions=2",
        "train.region_size=16",
        f"data.root={photographs}",
    )
    for name in ("whole", "parts"):
        for images in (24,) if name == "whole" else (12, 24):
            run("train-ae", home / "ae.yaml", *settings, f"train.images={images}", f"run_dir={tmp_path / name}")
    assert_equal(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert logged(tmp_path / "whole", "codebook_perplexity") == logged(tmp_path / "parts", "codebook_perplexity")
    run("train-ae", home / "ae.yaml", *settings, "train.images=27", f"run_dir={tmp_path / 'whole'}")
    assert state_of(tmp_path / "whole")["images_seen"] == 28


def test_a_cached_posterior_mode_gives_the_loss_of_encoding_on_the_fly(home, photographs, tmp_path):
    """Float32 records, the posterior's mode, the same noise and times."""
    from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
    from pyramid_ldm.data.images import find_images
    from pyramid_ldm.data.photographs import load_crop
    from pyramid_ldm.data.shards import LatentCache, LatentRecords, collate_latents
    from pyramid_ldm.flow.rectified_flow import RectifiedFlow
    from pyramid_ldm.pipeline import PyramidPipeline
    from pyramid_ldm.pyramid import unflatten

    run("encode", home / "ae", "--data", photographs, "--out", tmp_path / "z", "--workers", 0, "--dtype", "float32",
        "--precision", "fp32", "--no-flip")  # fmt: skip
    cache = LatentCache(tmp_path / "z")
    pipeline = PyramidPipeline.from_pretrained(home / "flow")
    autoencoder = PyramidAutoencoder.from_pretrained(home / "ae")
    records = LatentRecords(cache, cache.indices("train"), 0, "mode", shuffle=False)
    cached, noise, time_, positions = collate_latents([records[i] for i in range(4)])
    by_digest = {file.digest: file.path for file in find_images(photographs)}
    sources = [by_digest[cache.rows[records.rows[p]].source] for p in positions]
    images = torch.stack([load_crop(path, (32, 32), zoom=1.0, top=0.5, left=0.5) for path in sources])
    shapes = pipeline.flow.shapes
    with torch.no_grad():
        fresh = autoencoder.encode(images).mode()
        losses = [
            RectifiedFlow().loss(pipeline.flow, pipeline.scaling.scale(z), unflatten(noise, shapes), time_).total
            for z in (unflatten(cached, shapes), fresh)
        ]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
