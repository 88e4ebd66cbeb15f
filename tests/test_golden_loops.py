"""What both training loops logged and exported when they were written: a change here is a change of every training.

Eight optimizer steps of two micro-batches, dropout on, averages, warm-up and a falling rate; stage one with the GAN
from its first image to its full weight, once with KL and once with VQ. `--write-goldens` writes `golden_loops.json`
anew; say in the commit what moved, and why.

Tolerance: where the file knows this build of PyTorch on this kind of CPU, the exported weights have to be equal bit for
bit. Elsewhere sums run in another order, and eight Adam steps carry a last bit far: every logged figure and two numbers
that the weights are projected on have to agree to 1e-3, which a lost term, another rate, seed or average exceeds.
"""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import AE_CONFIG, FLOW_CONFIG

from pyramid_ldm.cli import main
from pyramid_ldm.randomness import generator

GOLDENS = Path(__file__).with_name("golden_loops.json")
SHARED = [
    "train.images=32",
    "train.batch_size=2",
    "train.accumulate=2",
    "train.learning_rate=3.0e-3",
    "train.warmup=16",
    "train.decay=cosine",
    "log.every=4",
    "log.pictures_every=16",
    "log.examined=256",
    "checkpoint.every=32",
    "data.workers=0",
]
GAN = [*(f"loss.gan.{key}=8" for key in ("start", "disc_warmup", "ramp")), "loss.gan.learning_rate=2.0e-3"]
UNTRUE = ("images_per_second",)  # of the machine


@pytest.fixture(scope="module")
def runs(tmp_path_factory, photographs) -> dict[str, Path]:
    """The run directories by name."""
    home = tmp_path_factory.mktemp("goldens")
    (home / "ae.yaml").write_text(AE_CONFIG)
    (home / "flow.yaml").write_text(FLOW_CONFIG)
    data = f"data.root={photographs}"
    for name, extra in (("kl", []), ("vq", ["model.latent=vq", "model.codebook_size=16"])):
        words = ["train-ae", home / "ae.yaml", data, f"run_dir={home / name}", *SHARED, *GAN, *extra]
        assert main([str(word) for word in words]) == 0
    words = ["encode", home / "kl", "--data", photographs, "--out", home / "latents", "--workers", 0]
    words += ["--precision", "fp32"]  # auto is bf16 where a CPU has it
    assert main([str(word) for word in words]) == 0
    words = ["train-flow", home / "flow.yaml", f"data.shards={home / 'latents'}", f"run_dir={home / 'flow'}", *SHARED]
    assert main([str(word) for word in words]) == 0
    return {name: home / name for name in ("kl", "vq", "flow")}


def environment() -> str:
    """What the last bits of a sum depend on."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread"


def found(run: Path) -> dict:
    """Figures of every line of metrics.jsonl; of the exported weights a hash, their norm and a projection."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    file = run / "model" / "model.safetensors"
    weights = load_file(file if file.is_file() else run / "model" / "flow" / "model.safetensors")
    digest, square, projection = hashlib.sha256(), 0.0, 0.0
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
        square += float(tensor.double().square().sum())
        direction = torch.randn(tensor.shape, generator=generator(0, f"golden {name}"), dtype=torch.float64)
        projection += float((tensor.double() * direction).sum())
    return {
        "metrics": [{key: value for key, value in line.items() if key not in UNTRUE} for line in lines],
        "norm": math.sqrt(square),
        "projection": projection,
        "sha256": {environment(): digest.hexdigest()},
    }


@pytest.mark.parametrize("name", ["kl", "vq", "flow"])
def test_eight_steps(runs, name, request):
    now = found(runs[name])
    if request.config.getoption("--write-goldens"):
        every = json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {}
        GOLDENS.write_text(json.dumps(every | {name: now}, indent=1) + "\n")
    golden = json.loads(GOLDENS.read_text())[name]
    assert [set(line) for line in now["metrics"]] == [set(line) for line in golden["metrics"]]
    for line, expected in zip(now["metrics"], golden["metrics"], strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert now["norm"] == pytest.approx(golden["norm"], rel=1e-4)
    assert now["projection"] == pytest.approx(golden["projection"], abs=1e-3 * golden["norm"])
    if environment() in golden["sha256"]:
        assert now["sha256"][environment()] == golden["sha256"][environment()]
