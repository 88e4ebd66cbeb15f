"""Tiny models and photographs that many tests share."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.autoencoders.pyramid.base import LinearHalf
from pyramid_ldm.autoencoders.pyramid.perceptual import PerceptualLoss
from pyramid_ldm.condition import Context
from pyramid_ldm.config import AutoencoderConfig, NCSNppConfig
from pyramid_ldm.config.autoencoder import AttentionConfig, DecoderConfig, EncoderConfig
from pyramid_ldm.demo.scenes import render_landscape
from pyramid_ldm.encode import EncodeOptions, encode
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp
from pyramid_ldm.pyramid import Level
from pyramid_ldm.training import train_flow
from pyramid_ldm.training.runtime import Runtime

torch.set_num_threads(1)  # what tests compute is too small for two
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pyramid-ldm-tests-")  # hashes of tests' files
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption(
        "--accelerator",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where tests marked gpu run; cpu tries them, smaller, on a machine without one",
    )
    parser.addoption("--write-goldens", action="store_true", help="write tests/golden_loops.json anew")


LONG = (
    "test_training",
    "test_faults",
    "test_cli",
    "test_fixed_autoencoders",
    "test_solvers",
    "test_regions",
    "test_demo",
)


def pytest_collection_modifyitems(items):
    """Long files first: nobody waits for them at the end when several processes share the tests."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def few_draws_are_examined(monkeypatch):
    """What `train-flow` in this process looks at from time to time; 256 are for networks that learn something."""
    monkeypatch.setattr(train_flow, "EXAMINED", 16)


def at(*times: float) -> Context:
    """What rectified flow tells a network."""
    t = torch.tensor(times)
    return Context(torch.log(999 * t), (1 - t) / t)


@pytest.fixture
def device(request) -> torch.device:
    """Of a test marked gpu."""
    name = request.config.getoption("--accelerator")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} sees no CUDA device; --accelerator cpu tries this on the CPU")
    return torch.device(name)


def tiny_autoencoder_config(image_size=(32, 32), levels=((16, 6), (8, 4)), **changes) -> AutoencoderConfig:
    """A few thousand parameters. `changes` are fields of AutoencoderConfig, or of its parts as part__field."""
    depth = (levels[0][0] // changes.get("patch", 1)).bit_length()
    widths = [8, 8, 16, 16, 16, 16, 16, 16][:depth]
    parts = {
        "encoder": EncoderConfig(widths=widths),
        "decoder": DecoderConfig(widths=widths, branch_blocks=1, dropout=0.0),
        "attention": AttentionConfig(max_tokens=16),
    }
    for key in [k for k in changes if "__" in k]:
        part, field = key.split("__")
        setattr(parts[part], field, changes.pop(key))
    return AutoencoderConfig(image_size=list(image_size), levels=[Level(f, c) for f, c in levels], **parts, **changes)


def tiny_autoencoder(**changes) -> PyramidAutoencoder:
    torch.manual_seed(0)
    return PyramidAutoencoder(tiny_autoencoder_config(**changes))


def tiny_network_config(image_size=(32, 32), levels=((16, 6), (8, 4)), **changes) -> NCSNppConfig:
    settings = {"widths": [16, 16], "blocks": 1, "dropout": 0.0, "fourier_scale": 1.0} | changes
    return NCSNppConfig(image_size=list(image_size), levels=[Level(f, c) for f, c in levels], **settings)


def tiny_network(**changes) -> PyramidNCSNpp:
    torch.manual_seed(0)
    return PyramidNCSNpp(tiny_network_config(**changes))


def randomise(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Moves every parameter, so that what starts at zero takes part; so does what is fitted, not learned."""
    generator = torch.Generator().manual_seed(1)
    fitted = [buffer for part in model.modules() if isinstance(part, LinearHalf) for buffer in part.buffers()]
    with torch.no_grad():
        for parameter in [*model.parameters(), *fitted]:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * std)
    return model


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """Twelve landscapes of 48x64 pixels, PNG and JPEG."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(12):
        suffix = "png" if i % 2 else "jpg"
        Image.fromarray(render_landscape(i, 48, 64)).save(folder / f"{i:02d}.{suffix}", quality=95)
    return folder


@pytest.fixture(scope="session")
def perceptual() -> PerceptualLoss:
    """Through an untrained VGG-16; never changed by a test."""
    torch.manual_seed(0)
    return PerceptualLoss("random", torch.device("cpu"))


CPU = Runtime(torch.device("cpu"), False)
OPTIONS = EncodeOptions(validation=0.3, dtype="float32", batch_size=4, shard_size=6, workers=0)
SIZES = (6 * 2 * 2, 4 * 4 * 4)  # values of the two levels of an image of 32x32
WIDTH = sum(SIZES)


def lively_autoencoder(seed_shift=0.0, **changes):
    """Latents with different means and variances in every channel."""
    model = randomise(tiny_autoencoder(**changes), 0.2)
    with torch.no_grad():
        for module in model.encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.bias.add_(torch.linspace(-0.5, 0.5, len(module.bias)) + seed_shift)
    return model


@pytest.fixture(scope="session")
def autoencoder_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("autoencoder")
    lively_autoencoder().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def finished(autoencoder_directory, photographs, tmp_path_factory):
    """Never changed by a test."""
    return encode(autoencoder_directory, photographs, tmp_path_factory.mktemp("shards") / "kl", OPTIONS, CPU)
