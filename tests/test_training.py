"""Both loops as a user starts them: exact resume after kill -9, two processes, Ctrl-C, what a resumed run is."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.cli import main
from pyramid_ldm.data.folder import find_images, split_held_out
from pyramid_ldm.data.photographs import Preprocessing
from pyramid_ldm.errors import UserError
from pyramid_ldm.files import sealed, write_json
from pyramid_ldm.training.checkpoint import checkpoint_directories
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.step import StepGuard

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
log: {every: 4, pictures_every: 32, pictures: 2, examined: 2}
checkpoint: {every: 16}
"""

FLOW_CONFIG = """
run_dir: unset
model: {widths: [16, 16], blocks: 1, dropout: 0.2, fourier_scale: 1.0}
data: {workers: 0}
train: {images: 48, batch_size: 4, learning_rate: 1.0e-3}
precision: fp32
samples: {steps: 4}
log: {every: 4, pictures_every: 32, pictures: 2}
checkpoint: {every: 16}
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pyramid_ldm", *map(str, arguments)]


@dataclass
class Done:
    stdout: str
    stderr: str


def run(*arguments: object, code: int = 0) -> Done:
    """One command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main([str(argument) for argument in arguments])
    assert found == code, out.getvalue() + err.getvalue()
    return Done(out.getvalue(), err.getvalue())


def start_child(*arguments: object) -> "subprocess.Popen[str]":
    """The program itself."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def fork_child(*arguments: object) -> multiprocessing.Process:
    """A copy of this process, in which PyTorch is loaded already: several seconds less."""
    child = multiprocessing.get_context("fork").Process(target=_end_with_code_of, args=arguments)
    child.start()
    return child


def _end_with_code_of(*arguments: object) -> None:
    sys.exit(main([str(argument) for argument in arguments]))


def wait_until(happened, alive) -> None:
    deadline = time.monotonic() + 100
    while not happened():
        assert alive(), "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_after(arguments: tuple[object, ...], happened) -> None:
    """Starts a command and kills it with -9 as soon as `happened()`."""
    child = fork_child(*arguments)
    wait_until(happened, child.is_alive)
    child.kill()
    child.join()


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
        assert {f"checkpoints/000000{n}/{f}" for n in (32, 48) for f in ("state.pt", "manifest.json")} <= files
        assert len(checkpoint_directories(home / name)) == 2
        assert any(f.startswith("events.out.tfevents") for f in files)
    assert (home / "ae/images/reconstructions-00000048.png").is_file()
    assert (home / "flow/images/samples-00000048.png").is_file()
    assert (home / "flow/model/pipeline.json").is_file()
    (start,) = json.loads((home / "ae/provenance.json").read_text())
    assert start["torch"] == torch.__version__


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
    kill_after(arguments, (tmp_path / "ae/checkpoints/00000016").exists)
    resumed = run(*arguments)
    assert "resuming at" in resumed.stderr
    assert_equal(state_of(home / "ae"), state_of(tmp_path / "ae"))
    for key in ("loss", "generator", "gan_weight"):
        assert logged(home / "ae", key) == logged(tmp_path / "ae", key)
    a, b = ((folder / "ae/model/model.safetensors").read_bytes() for folder in (home, tmp_path))
    assert a == b


def test_flow_killed_and_resumed_ends_bit_for_bit_the_same(home, tmp_path):
    arguments = ("train-flow", home / "flow.yaml", f"data.shards={home / 'latents'}", f"run_dir={tmp_path / 'flow'}")
    kill_after(arguments, (tmp_path / "flow/checkpoints/00000016").exists)
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


RANKS = """
import sys
from pathlib import Path
from pyramid_ldm.cli import _leave_processes, main
import pyramid_ldm.cli
from torch.nn.parallel import DistributedDataParallel
pyramid_ldm.cli._leave_processes = lambda: None  # one process group for all commands
alone, no_sync = [0], DistributedDataParallel.no_sync
def counted(model):
    alone[0] += 1
    return no_sync(model)
DistributedDataParallel.no_sync = counted
for line in Path(sys.argv[1]).read_text().splitlines():
    words = line.split("|")
    if main(words):
        sys.exit(1)
    print(f"micro-steps without reduction: {alone[0]}", flush=True)
_leave_processes()
"""


def test_two_processes_do_what_one_does(home, photographs, tmp_path):
    """The same global batch: 4 at once in one process, 1 accumulated twice in each of two. Dropout 0 (it is drawn per
    rank). And the same latents and pictures. One torchrun for all of it."""
    shared = ("data.workers=0", "train.images=16", "checkpoint.every=16", "log.pictures_every=1000")
    stage_one = ("model.decoder.dropout=0", "model.base=linear", "train.regions=2", "train.region_size=24",
                 "loss.gan.start=4", "loss.gan.disc_warmup=4", "loss.gan.ramp=4",
                 f"data.root={photographs}")  # fmt: skip
    own = {"ae": stage_one, "flow": ("model.dropout=0", f"data.shards={home / 'latents'}")}
    encoding = ("encode", home / "ae", "--data", photographs, "--workers", 0, "--shard-size", 8, "--precision", "fp32")
    drawing = ("sample", home / "flow", "-n", 3, "--solver", "euler", "--steps", 4, "--precision", "fp32")

    def training(stage, name, batch, accumulate):
        return (f"train-{stage}", home / f"{stage}.yaml", *own[stage], *shared, f"train.batch_size={batch}",
                f"train.accumulate={accumulate}", f"run_dir={tmp_path / stage / name}")  # fmt: skip

    lines = [training("ae", "two", 1, 2), training("flow", "two", 1, 2), (*encoding, "--out", tmp_path / "z2"),
             (*drawing, "--out", tmp_path / "s2")]  # fmt: skip
    (tmp_path / "lines").write_text("\n".join("|".join(map(str, words)) for words in lines))
    (tmp_path / "ranks.py").write_text(RANKS)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, str(tmp_path / "ranks.py"), str(tmp_path / "lines")], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: ") == 3, "said once, not by every process"
    # Gradients travel once a step: not in 4 of 8 micro-steps, of two networks and then of one.
    said = re.findall(r"reduction: (8|12)", done.stdout)  # two processes write into one line now and then
    assert [said.count(number) for number in ("8", "12")] == [2, 2 * 3]
    for stage in ("ae", "flow"):
        run(*training(stage, "one", 4, 1))
        reference = logged(tmp_path / stage / "one", "loss")
        assert len(reference) == 4
        assert logged(tmp_path / stage / "two", "loss") == pytest.approx(reference, abs=1e-5, rel=1e-5)
    weight = logged(tmp_path / "ae/one", "gan_weight")
    assert max(weight.values()) > 0
    assert logged(tmp_path / "ae/two", "gan_weight") == pytest.approx(weight, rel=1e-3)
    # Another number of processes must not change what a step sees.
    refused = run(*training("ae", "two", 1, 2), code=2)
    assert "saw 4 images, now 1 (train.batch_size) x 2" in refused.stderr
    assert "set train.accumulate=4" in refused.stderr
    run(*training("ae", "two", 1, 4))
    run(*encoding, "--out", tmp_path / "z1")
    for path in (tmp_path / "z1").glob("0*"):
        assert path.read_bytes() == (tmp_path / "z2" / path.name).read_bytes()
    run(*drawing, "--out", tmp_path / "s1")
    for path in (tmp_path / "s1").glob("seed*.png"):
        a, b = (np.asarray(Image.open(folder / path.name), dtype=int) for folder in (tmp_path / "s1", tmp_path / "s2"))
        assert np.abs(a - b).max() <= 1


def test_ctrl_c_saves_and_the_same_command_goes_on(home, photographs, tmp_path):
    arguments = ("train-ae", home / "ae.yaml", f"data.root={photographs}", f"run_dir={tmp_path / 'ae'}")
    endless = ("train.images=100000", "checkpoint.every=100000", "log.pictures_every=100000", "train.decay=constant")
    process = start_child(*arguments, *endless)
    wait_until((tmp_path / "ae/metrics.jsonl").exists, lambda: process.poll() is None)
    refused = run(*arguments, *endless, code=2)
    assert "another pyramid-ldm is writing there" in refused.stderr
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "To resume, run the same command again" in errors
    (saved,) = checkpoint_directories(tmp_path / "ae")
    assert state_of(tmp_path / "ae")["images_seen"] == int(saved.name) > 0
    refused = run(*arguments, code=2)  # decay differs
    assert "train.decay=constant, now cosine" in refused.stderr


def test_a_damaged_newest_checkpoint_falls_back(home, photographs, tmp_path):
    shutil.copytree(home / "ae", tmp_path / "ae")
    newest = checkpoint_directories(tmp_path / "ae")[-1] / "state.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    done = run("train-ae", home / "ae.yaml", f"data.root={photographs}", f"run_dir={tmp_path / 'ae'}")
    assert "truncated; falling back" in done.stderr
    assert_equal(state_of(home / "ae"), state_of(tmp_path / "ae"))


def test_vq_random_crops_and_workers_resume_exactly(home, photographs, tmp_path):
    """8 images, then to 16; and on to 19, which is not a whole number of steps. Two random regions of each."""
    settings = (
        "model.latent=vq",
        "model.codebook_size=16",
        "loss.codebook_restart=4",
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
        for images in (16,) if name == "whole" else (8, 16):
            run("train-ae", home / "ae.yaml", *settings, f"train.images={images}", f"run_dir={tmp_path / name}")
    assert_equal(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    for key in ("codebook_perplexity_2x2", "codebook_usage_4x4", "loss"):
        assert logged(tmp_path / "whole", key) == logged(tmp_path / "parts", key)
    assert sum(logged(tmp_path / "whole", "codebook_revived").values()) > 0
    run("train-ae", home / "ae.yaml", *settings, "train.images=19", f"run_dir={tmp_path / 'whole'}")
    assert state_of(tmp_path / "whole")["images_seen"] == 20


@pytest.mark.parametrize("stage", ["train-ae", "train-flow"])
def test_muon_level_dropout_and_even_times_resume_exactly(home, photographs, tmp_path, stage):
    """8 images, then to 16."""
    settings = {
        "train-ae": [
            home / "ae.yaml", f"data.root={photographs}", "train.level_dropout=0.5", "loss.gan.weight=0",
            "model.norm=none", "model.patch=2", "model.encoder.widths=[8, 32, 32, 32]",
            "model.decoder.widths=[8, 32, 32, 32]", "model.base=linear",
        ],
        "train-flow": [
            home / "flow.yaml", f"data.shards={home / 'latents'}", "times=low_discrepancy", "model.early=true",
            "model.widths=[32, 32]",
        ],
    }[stage]  # fmt: skip
    settings += ["train.optimizer=muon", "train.decay=constant", "log.pictures_every=1000"]
    for name in ("whole", "parts"):
        for images in (16,) if name == "whole" else (8, 16):
            run(stage, *settings, f"train.images={images}", f"run_dir={tmp_path / name}")
    assert_equal(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert len(state_of(tmp_path / "whole")["optimizer"]["momenta"]) > 4


def test_a_linear_base_is_fitted_to_the_photographs_once_before_training(home, photographs, tmp_path, monkeypatch):
    """After one step of nearly nothing, held-out photographs are many times nearer than without."""
    settings = [
        home / "ae.yaml", f"data.root={photographs}", "train.learning_rate=1e-9", "loss.gan.weight=0",
        "model.norm=none",
    ]  # fmt: skip
    error = {}
    for base in ("none", "linear"):
        done = run("train-ae", *settings, "train.images=4", f"model.base={base}", f"run_dir={tmp_path / base}")
        psnr = logged(tmp_path / base, "held_out_psnr")
        error[base] = 10 ** (-psnr[max(psnr)] / 10)
        assert ("fitting it to 256 crops" in done.stderr) == (base == "linear")
    assert error["linear"] < error["none"] / 10
    before = PyramidAutoencoder.from_pretrained(tmp_path / "linear").decoder.base.weight
    assert before.std() > 0
    monkeypatch.setattr(PyramidAutoencoder, "fit_base", None)
    run("train-ae", *settings, "train.images=8", "model.base=linear", f"run_dir={tmp_path / 'linear'}")
    assert torch.equal(PyramidAutoencoder.from_pretrained(tmp_path / "linear").decoder.base.weight, before)


def test_photographs_that_a_linear_base_cannot_read_are_named_and_counted(home, photographs, tmp_path):
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    for number in range(9):
        (folder / f"broken-{number}.jpg").write_bytes(b"\xff\xd8\xff" + bytes([number]) * 100)
    settings = (home / "ae.yaml", f"data.root={folder}", "model.base=linear", f"run_dir={tmp_path / 'run'}")
    refused = run("train-ae", *settings, code=2)
    assert "data.max_bad_fraction" in refused.stderr
    assert refused.stderr.count("skipped ") > 3
    assert "images/s" not in refused.stderr, "no step was taken"


def test_a_cached_posterior_mode_gives_the_loss_of_encoding_on_the_fly(home, photographs, tmp_path):
    """Float32 records, the posterior's mode, the same noise and times."""
    from pyramid_ldm.data.latents import LatentRecords, collate_latents
    from pyramid_ldm.data.photographs import load_crop
    from pyramid_ldm.data.shards import LatentCache
    from pyramid_ldm.pipeline import PyramidPipeline
    from pyramid_ldm.processes.rectified_flow import RectifiedFlow
    from pyramid_ldm.pyramid import unflatten
    from pyramid_ldm.training.flow_state import draw

    run("encode", home / "ae", "--data", photographs, "--out", tmp_path / "z", "--workers", 0, "--dtype", "float32",
        "--precision", "fp32", "--no-flip")  # fmt: skip
    cache = LatentCache(tmp_path / "z")
    pipeline = PyramidPipeline.from_pretrained(home / "flow")
    autoencoder = PyramidAutoencoder.from_pretrained(home / "ae")
    records = LatentRecords(cache, cache.indices("train"), 0, "mode", shuffle=False)
    batch = collate_latents([records[i] for i in range(4)])
    cached, positions = batch.latents, batch.positions
    by_digest = {file.digest: file.path for file in find_images(photographs)}
    sources = [by_digest[cache.rows[records.rows[p]].source] for p in positions]
    images = torch.stack([load_crop(path, (32, 32), zoom=1.0, top=0.5, left=0.5) for path in sources])
    shapes = pipeline.network.shapes
    noise, t = draw(RectifiedFlow(), shapes, positions, 0, torch.device("cpu"))
    with torch.no_grad():
        fresh = autoencoder.encode(images).mode()
        losses = [
            RectifiedFlow().loss(pipeline.network, pipeline.scaling.scale(z), noise, t).total
            for z in (unflatten(cached, shapes), fresh)
        ]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)


def test_metrics_go_on_where_a_checkpoint_fell_between_two_lines(home, photographs, tmp_path):
    words = ["log.every=12", "checkpoint.every=8", "checkpoint.keep_last=9", "train.images=24", "train.decay=constant"]
    words += [f"data.root={photographs}", f"run_dir={tmp_path / 'ae'}"]
    run("train-ae", home / "ae.yaml", *words)
    whole = logged(tmp_path / "ae", "loss")
    assert list(whole) == [12, 24]
    for later in ("00000016", "00000024"):
        shutil.rmtree(tmp_path / "ae/checkpoints" / later)
    assert "resuming at 8" in run("train-ae", home / "ae.yaml", *words).stderr
    assert logged(tmp_path / "ae", "loss") == whole


def test_pictures_that_a_kill_cost_are_made_by_the_next_start(home, tmp_path):
    """They come after saving, so that they cost no checkpoint."""
    shutil.copytree(home / "flow", tmp_path / "flow")
    picture = tmp_path / "flow/images/samples-00000048.png"
    before = picture.read_bytes()
    picture.unlink()
    run("train-flow", home / "flow.yaml", f"data.shards={home / 'latents'}", f"run_dir={tmp_path / 'flow'}")
    assert picture.read_bytes() == before


def test_what_a_step_had_begun_when_its_data_failed_is_forgotten(home, photographs, tmp_path, monkeypatch):
    """Micro-batches are fetched as they are needed: the second of a step may be the one that fails. Gradients, figures
    and the codes that it used."""
    codebook = ["model.latent=vq", "model.codebook_size=8", "loss.codebook_restart=8"]
    words = ["train-ae", home / "ae.yaml", f"data.root={photographs}", "train.batch_size=2", "train.accumulate=2"]
    words += ["train.images=16", *codebook]
    run(*words, f"run_dir={tmp_path / 'whole'}")
    fetch, count = Runtime.fetch, 0

    def fails_once(self, stop, batches):
        nonlocal count
        count += 1
        if count == 6:
            raise UserError("the disk has gone")
        return fetch(self, stop, batches)

    monkeypatch.setattr(Runtime, "fetch", fails_once)
    assert "the disk has gone" in run(*words, f"run_dir={tmp_path / 'parts'}", code=2).stderr
    assert state_of(tmp_path / "parts")["images_seen"] == 8, "two whole steps of four"
    run(*words, f"run_dir={tmp_path / 'parts'}")
    assert_equal(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    for key in ("loss", "codebook_perplexity_2x2"):
        assert logged(tmp_path / "whole", key) == logged(tmp_path / "parts", key)


def test_pictures_come_after_saving_and_end_no_run(home, photographs, tmp_path, monkeypatch):
    seen = []

    def fail(stage, *rest):
        newest = [int(path.name) for path in checkpoint_directories(tmp_path / "ae")][-1:]
        seen.append(newest == [stage.state.images_seen])
        raise RuntimeError("no figure today")

    monkeypatch.setattr("pyramid_ldm.training.train_autoencoder.examine", fail)
    done = run("train-ae", home / "ae.yaml", f"data.root={photographs}", f"run_dir={tmp_path / 'ae'}")
    assert seen == [True, True]
    assert done.stderr.count("no held-out figures and pictures this time: RuntimeError: no figure today") == 2


@pytest.mark.parametrize("stage", ["ae", "flow"])
def test_a_run_that_diverges_ends_with_its_last_checkpoint(home, photographs, tmp_path, monkeypatch, stage):
    """From 24 images on, gradients are a thousand times as long."""
    place = tmp_path / stage
    data = f"data.root={photographs}" if stage == "ae" else f"data.shards={home / 'latents'}"
    words = [{"ae": "train-ae", "flow": "train-flow"}[stage], home / f"{stage}.yaml", data, f"run_dir={place}"]
    monkeypatch.setattr(StepGuard, "MEMORY", 4)
    clip = torch.nn.utils.clip_grad_norm_
    steps = {"done": 0}

    def longer(parameters, most):
        norm = clip(list(parameters), most)
        steps["done"] += most < math.inf  # the discriminator's is not clipped
        return norm * (1000 if steps["done"] > 6 and most < math.inf else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", longer)
    error = run(*words, "train.max_nonfinite=3", code=2).stderr
    assert "3 steps in a row had a gradient that is not finite, or 100 times the usual: training has diverged" in error
    newest = checkpoint_directories(place)[-1]
    assert int(newest.name) == 32, "the weights of 24"
    assert state_of(place)["nonfinite"]["in_a_row"] == 2
    monkeypatch.undo()
    run(*words)
    assert [int(path.name) for path in checkpoint_directories(place)][-1] == 48


def test_the_loaded_checkpoint_is_let_go(home, photographs, tmp_path, monkeypatch):
    from pyramid_ldm.training import train_autoencoder

    class Saved(dict):
        """So that it can be watched."""

    kept, load = [], train_autoencoder.load_newest

    def watched(directory):
        state, skipped = load(directory)
        saved = Saved(state)
        kept.append(weakref.ref(saved))
        return saved, skipped

    alive = []
    monkeypatch.setattr(train_autoencoder, "load_newest", watched)
    monkeypatch.setattr(train_autoencoder, "describe", lambda *_: alive.append(kept[0]() is not None) or "")
    shutil.copytree(home / "ae", tmp_path / "ae")
    words = [f"data.root={photographs}", f"run_dir={tmp_path / 'ae'}", "train.images=52"]
    run("train-ae", home / "ae.yaml", *words)
    assert alive == [False]


def test_figures_are_of_the_whole_share_and_of_as_many_training_images(home, photographs, tmp_path, monkeypatch):
    """Cut as training cuts, by the averaged model, on both sides."""
    from pyramid_ldm.training import train_autoencoder

    looked = []
    crops = train_autoencoder.crops_to_examine

    def watch(files, cut, *rest):
        looked.append((len(files), cut.crop))
        return crops(files, cut, *rest)

    monkeypatch.setattr(train_autoencoder, "crops_to_examine", watch)
    words = ["data.validation=0.5", "data.crop=random", "data.zoom=1.5", "train.images=8", "log.pictures=2",
             "log.examined=256"]  # fmt: skip
    run("train-ae", home / "ae.yaml", f"data.root={photographs}", f"run_dir={tmp_path / 'ae'}", *words)
    train, held_out = split_held_out(find_images(photographs), 0.5)
    assert looked == [(len(held_out), "random"), (len(train), "random")]
    for split, files in (("held_out", held_out), ("train", train)):
        model = PyramidAutoencoder.from_pretrained(tmp_path / "ae")
        expected = []
        cut = Preprocessing((32, 32), "random", 1.5)
        for _, crop in crops(files, cut, 0, []):
            decoded = model.decode(model.encode(crop[None]).mode()).detach().clamp(-1, 1)
            expected.append(float(10 * torch.log10(4 / (decoded - crop).square().mean())))
        found = logged(tmp_path / "ae", f"{split}_psnr")[8]
        assert found == pytest.approx(sum(expected) / len(expected), abs=1e-3)


def test_a_flow_goes_on_with_its_own_latents_and_scale_alone(home, photographs, tmp_path):
    """Another cache has another scale, or trains on what was held out: it is the run's state that counts."""
    run("encode", home / "ae", "--data", photographs, "--out", tmp_path / "other", "--workers", 0, "--validation", 0.4)
    settings = ("train.images=8", f"run_dir={tmp_path / 'flow'}")
    run("train-flow", home / "flow.yaml", f"data.shards={home / 'latents'}", *settings)
    before = state_of(tmp_path / "flow")["scaling"]
    refused = run("train-flow", home / "flow.yaml", f"data.shards={tmp_path / 'other'}", *settings, code=2)
    assert "was started on latents with rows = " in refused.stderr or "validation = 0.1" in refused.stderr
    shutil.copytree(home / "latents", tmp_path / "moved")
    index = json.loads((tmp_path / "moved/index.json").read_text())
    for level in index["statistics"]:
        level["std"] *= 3  # as if they were estimated anew, otherwise
    write_json(tmp_path / "moved/index.json", sealed(index))
    run("train-flow", home / "flow.yaml", f"data.shards={tmp_path / 'moved'}", *settings, "train.images=12")
    assert state_of(tmp_path / "flow")["scaling"] == before
    manifest = json.loads((tmp_path / "flow/model/pipeline.json").read_text())
    assert manifest["scaling"] == before


def test_reading_a_run_while_it_trains_disturbs_neither(home, photographs, tmp_path):
    """A checkpoint a step; meanwhile the model is loaded, described and drawn with as fast as can be."""
    often = ("checkpoint.every=4", "log.pictures_every=1000", "train.images=40", "train.decay=constant")
    where = (f"data.root={photographs}", f"run_dir={tmp_path / 'ae'}")
    child = fork_child("train-ae", home / "ae.yaml", *where, *often)
    wait_until((tmp_path / "ae/model/model.safetensors").exists, child.is_alive)
    prints, reads = set(), 0
    while child.is_alive():
        prints.add(PyramidAutoencoder.from_pretrained(tmp_path / "ae").fingerprint())
        if reads == 0:
            assert "run directory of train-ae" in run("info", tmp_path / "ae").stdout
        reads += 1
    assert child.exitcode == 0
    assert reads > 5
    assert len(prints) > 3
    assert not list((tmp_path / "ae").glob(".*.tmp")) + list((tmp_path / "ae").glob(".*.previous"))
