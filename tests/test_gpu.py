"""What only a GPU can show: `pytest -m gpu`. `--accelerator cpu` tries the same bodies, smaller, without one.

On CUDA, training runs at shipped widths; what is compiled is tiny, as compiling takes its time either way.
"""

import contextlib
import gc
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise, tiny_autoencoder, tiny_network
from test_training import AE_CONFIG, FLOW_CONFIG
from torch.utils._python_dispatch import TorchDispatchMode

from pyramid_ldm import PyramidAutoencoder, PyramidPipeline
from pyramid_ldm.config import AutoencoderTraining, FlowTraining, load_config
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.data.folder import find_images
from pyramid_ldm.data.latents import LatentRecords, collate_latents
from pyramid_ldm.data.loading import load_batches
from pyramid_ldm.data.photographs import Photographs, Preprocessing, collate_images
from pyramid_ldm.data.shards import LatentCache
from pyramid_ldm.info.cost import estimate_autoencoder
from pyramid_ldm.info.memory import PeakMemory
from pyramid_ldm.nn.layers import advance_spectral_norm
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.pyramid import LatentScaling, pyramid_noise
from pyramid_ldm.training import autoencoder_state, flow_state
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.step import take_step
from pyramid_ldm.training.train_autoencoder import train_autoencoder
from pyramid_ldm.training.train_flow import train_flow

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent
ALL_TERMS = ("loss.perceptual.weight=1", "loss.perceptual.weights=random", "loss.gan.weight=0.5", "loss.gan.start=0",
             "loss.gan.disc_warmup=0", "loss.gan.ramp=0")  # fmt: skip
RUN = ("data.workers=1", "train.images=16", "log.pictures_every=1000", "log.pictures=1", "checkpoint.every=8")
STAGES = {
    1: (AutoencoderTraining, AE_CONFIG, train_autoencoder, "root",
        ("model.decoder.dropout=0", "loss.gan.start=0", "loss.gan.disc_warmup=4", "loss.gan.ramp=4",
         "train.decay=constant", "data.validation=0")),
    2: (FlowTraining, FLOW_CONFIG, train_flow, "shards", ("model.dropout=0", "samples.steps=2")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact(device):
    """float32 is float32, and no test leaves its settings behind."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def compiling(device, monkeypatch):
    """Without a GPU graphs are captured but not compiled: Inductor takes minutes on a CPU."""
    real = torch.compile
    if device.type == "cpu":
        monkeypatch.setattr(torch, "compile", lambda *a, mode=None, **k: real(*a, **(k | {"backend": "aot_eager"})))


def shipped(device) -> str:
    return "lsun_churches_256" if device.type == "cuda" else "demo"


def autoencoder_config(name: str, *overrides: str) -> AutoencoderTraining:
    keys = ["data.root=none", "train.accumulate=1", *ALL_TERMS, *overrides]
    return load_config(AutoencoderTraining, ROOT / "autoencoder_configs" / f"{name}.yaml", keys)


class Stage:
    """Steps on one batch of noise, through the functions that training calls."""

    def __init__(self, config, network, state, runtime: Runtime) -> None:
        self.config, self.network, self.state, self.runtime = config, network, state, runtime

    def step(self):
        state, update = self.state, partial(take_step, runtime=self.runtime, metrics=Metrics(), name="norm")
        terms = self.accumulate()
        assert update(state.optimizer, self.network, 1.0)
        state.images_seen += 2
        advance_spectral_norm(self.network)
        state.ema.update(self.network, state.images_seen, 2)
        if isinstance(self, StageOne):
            assert update(state.disc_optimizer, state.discriminator, 0.0)
            state.loss.adaptive.finish_step(self.runtime.average)
        return terms


class StageOne(Stage):
    def __init__(self, config: AutoencoderTraining, runtime: Runtime) -> None:
        state = autoencoder_state.build_state(config, runtime.device)
        super().__init__(config, state.autoencoder, state, runtime)
        generator = torch.Generator().manual_seed(0)
        shape = (config.train.batch_size, *config.image_size, 3)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self.batch = Batch(list(range(len(pixels))), pixels=pixels)

    def accumulate(self):
        state, inputs = self.state, (self.batch, self.runtime)
        return autoencoder_state.accumulate(self.config, state, state.autoencoder, state.discriminator, *inputs)


class StageTwo(Stage):
    def __init__(self, config: FlowTraining, runtime: Runtime) -> None:
        state = flow_state.build_state(config, runtime.device)
        super().__init__(config, state.network, state, runtime)
        shapes = state.network.shapes
        state.scaling = no_scaling(shapes)
        self.latents, self.noise = (
            tuple(z.to(runtime.device) for z in pyramid_noise(shapes, 0, name, [0, 1])) for name in ("latents", "noise")
        )
        self.time = torch.tensor([0.2, 0.7], device=runtime.device)

    def accumulate(self):
        with self.runtime.autocast():
            loss = RectifiedFlow().loss(self.network, self.latents, self.noise, self.time)
        loss.total.backward()
        return {"loss": loss.total}


def no_scaling(shapes) -> LatentScaling:
    zeros, ones = (tuple((value,) * shape[0] for shape in shapes) for value in (0.0, 1.0))
    return LatentScaling(zeros, ones)


def stage(number: int, device, *, bf16: bool):
    name, runtime = shipped(device), Runtime(device, bf16)
    stage_one = autoencoder_config(name, "train.batch_size=2")
    if number == 1:
        return StageOne(stage_one, runtime)
    config = load_config(FlowTraining, ROOT / "diffusion_configs" / f"{name}.yaml", ["data.shards=none"])
    config.model.dropout = 0.0  # its random numbers would differ between precisions
    config.model.resolve(stage_one.image_size, stage_one.model.levels)
    return StageTwo(config, runtime)


@pytest.mark.parametrize("number", [1, 2])
def test_training_steps_in_bf16_are_finite_and_move_weights_and_averages(number, device):
    trained = stage(number, device, bf16=True)
    before = {name: p.detach().clone() for name, p in trained.network.named_parameters()}
    for _ in range(3):
        terms = trained.step()
        assert all(bool(torch.isfinite(value).all()) for value in terms.values()), terms
    moved = [name for name, p in trained.network.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.95 * len(before)
    tracks = trained.state.ema.tracks
    assert all(t.device.type == device.type and t.isfinite().all() for track in tracks.values() for t in track.values())
    if number == 1:
        averaged = trained.state.ema.export(trained.network, trained.config.ema.export)
        with torch.no_grad(), trained.runtime.autocast():
            image = averaged.decode(averaged.encode(trained.batch.images(device)).mode())
        assert image.isfinite().all()
        assert {"l1", "lpips", "generator", "disc", "gan_weight", "kl"} <= terms.keys()


@pytest.mark.parametrize("number", [1, 2])
def test_gradients_in_bf16_point_where_those_in_float32_do(number, device):
    """Whole, and of each parameter with 1% of the norm or more; smaller ones may be sums that cancel. In float64:
    a float32 norm of millions of values is 5e-4 off on a CPU."""
    found = []
    for bf16 in (False, True):
        trained = stage(number, device, bf16=bf16)
        randomise(trained.network, 0.02)  # zero-initialised outputs would leave most gradients zero
        trained.accumulate()
        parameters = trained.network.named_parameters()
        found.append({name: p.grad.double().cpu().flatten() for name, p in parameters if p.grad is not None})
    whole = [torch.cat(list(gradients.values())) for gradients in found]
    cosine = partial(torch.cosine_similarity, dim=0)
    share = {name: float(gradient.norm() / whole[0].norm()) for name, gradient in found[0].items()}
    each = sorted((float(cosine(g, found[1][name])), share[name], name) for name, g in found[0].items() if share[name])
    print(f"stage {number}: cosine {float(cosine(*whole)):.5f}; (cosine, share of the norm) of the worst: {each[:3]}")
    assert 0.99 < cosine(*whole) < 1 + 1e-9
    assert min(value for value, part, _ in each if part >= 0.01) > 0.95
    assert whole[1].norm() / whole[0].norm() == pytest.approx(1, abs=0.1)


def region_model(device):
    if device.type == "cpu":
        return randomise(tiny_autoencoder(image_size=(128, 160), levels=((32, 6), (16, 4)), attention__max_tokens=32))
    with device:
        return PyramidAutoencoder(autoencoder_config("people2k").model)


def test_a_region_and_tiles_are_those_parts_of_the_whole_image(device):
    model = region_model(device).eval().to(memory_format=torch.channels_last)
    height, width = model.config.image_size
    shapes = [(level.channels, height // level.factor, width // level.factor) for level in model.levels]
    latents = tuple(z.to(device) for z in pyramid_noise(shapes, 0, "latents", [0]))
    side = height // 4
    with torch.no_grad():
        whole = model.decode(latents)
        close = partial(torch.testing.assert_close, atol=1e-4 * max(1.0, float(whole.abs().max())), rtol=0)
        for top, left in ((0, 0), (height - side, width - side), (height // 3 + 1, width // 2 + 1)):
            part = model.decode(latents, region=(top, left, side, side))
            close(part, whole[:, :, top : top + side, left : left + side])
        close(model.decode_tiled(latents, tile=side + 8), whole)


@contextlib.contextmanager
def peak(device):
    """Yields a list that afterwards holds the peak in bytes, of all that is on the device."""
    found = []
    if device.type == "cpu":
        with PeakMemory() as memory:
            yield found
        found.append(memory.peak)
        return
    torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(torch.cuda.max_memory_allocated())


@pytest.mark.parametrize(("regions", "limit"), [(0, 24e9), (2, 12e9)], ids=["whole images", "two regions"])
def test_stage_one_at_2048x2048_fits_with_lpips_and_gan(regions, limit, device):
    """people2k as shipped: checkpointing, batch 1; regions of 512. The estimate of `info --cost` holds within 25%."""
    name, side = ("demo", 24) if device.type == "cpu" else ("people2k", 512)
    config = autoencoder_config(name, "train.batch_size=1", f"train.regions={regions}", f"train.region_size={side}")
    estimate = estimate_autoencoder(config, bf16=True).step.peak
    trained = StageOne(config, Runtime(device, True))
    trained.step()  # Adam's moments come
    with peak(device) as found:
        trained.step()
    print(f"peak {found[0] / 2**30:.2f} GiB, estimated {estimate / 2**30:.2f} GiB")
    assert found[0] < min(limit, 1.25 * estimate)


def pipeline(device) -> PyramidPipeline:
    flow, autoencoder = randomise(tiny_network(), 0.05), randomise(tiny_autoencoder(), 0.05)
    return PyramidPipeline(flow, autoencoder, no_scaling(flow.shapes)).to(device)


class NoReading(TorchDispatchMode):
    """Refuses what would wait for a GPU: reading a value on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_synchronisation(device):
    """RuntimeError (on a CPU AssertionError) where the host waits for the device."""
    if device.type == "cpu":
        with NoReading():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_euler_steps_do_not_wait_for_the_device(device):
    """From the second evaluation to the fifteenth; the sampler looks at values at every sixteenth."""
    pipe, calls, guard = pipeline(device), [0], contextlib.ExitStack()
    noise = pyramid_noise(pipe.network.shapes, 0, "sample", [0, 1])
    pipe.solve(noise, SolverOptions("euler", steps=2))  # the first calls of a process may wait

    def watch(*_) -> None:
        calls[0] += 1
        if calls[0] == 2:
            guard.enter_context(no_synchronisation(device))
        if calls[0] == 15:
            guard.close()

    pipe.network.register_forward_pre_hook(watch)
    with guard:
        pipe.solve(noise, SolverOptions("euler", steps=15))
    assert calls == [15]
    if device.type == "cuda":
        with pytest.raises(RuntimeError, match="synchronizing"), no_synchronisation(device):
            float(torch.ones((), device=device))


def test_loaders_pin_memory_and_batches_travel_without_waiting(device, photographs, finished):
    pinned = device.type == "cuda"
    images = Photographs(find_images(photographs), Preprocessing((32, 32)), 0)
    cache = LatentCache(finished)
    records = LatentRecords(cache, cache.indices("train"), 0, "sample")
    settings = {"workers": 1, "pin": pinned}
    batch = next(load_batches(images, collate_images, [[0, 1, 2, 3]], **settings))
    found = next(load_batches(records, collate_latents, [[0, 1, 2, 3]], **settings))
    for tensor in (batch.pixels, found.latents):
        assert tensor.is_pinned() == pinned
        with no_synchronisation(device):
            tensor.to(device, non_blocking=True)
    with no_synchronisation(device):
        moved = batch.images(device)
    assert torch.equal(moved.cpu(), batch.images(torch.device("cpu")))


def test_noise_and_time_are_drawn_on_the_device_by_position(device):
    shapes = [(3, 1, 1), (2, 8, 8)]
    together, times = flow_state.draw(RectifiedFlow(), shapes, range(64), 0, device)
    alone, time = flow_state.draw(RectifiedFlow(), shapes, [63], 0, device)
    for level, own in zip(together, alone, strict=True):
        assert level.device.type == device.type
        assert torch.equal(level[63:], own)
    assert torch.equal(times[63:], time)
    assert abs(float(together[1].std()) - 1) < 0.05


def train(number: int, folder: Path, data: Path, device, *overrides: str) -> dict[int, float]:
    """A run of a tiny config, in this process; its loss by images seen."""
    schema, text, function, key, changes = STAGES[number]
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(text)
    keys = (f"data.{key}={data}", f"run_dir={folder / 'run'}", f"device={device.type}")
    run, done = function(load_config(schema, folder / "config.yaml", [*RUN, *changes, *keys, *overrides]))
    assert done
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["images_seen"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture
def data(number, photographs, finished) -> Path:
    return photographs if number == 1 else finished


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_resumes_from_its_checkpoint(number, data, device, tmp_path):
    whole = train(number, tmp_path / "whole", data, device)
    assert list(whole) == [4, 8, 12, 16]
    train(number, tmp_path / "parts", data, device, "train.images=8")
    parts = train(number, tmp_path / "parts", data, device)
    assert parts == pytest.approx(whole, rel=1e-3)
    states = [
        torch.load(tmp_path / name / "run/checkpoints/00000016/state.pt", map_location="cpu", weights_only=True)
        for name in ("whole", "parts")
    ]
    for a, b in zip(*(state["ema"]["0.05"].values() for state in states), strict=True):
        torch.testing.assert_close(a, b, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("number", [1, 2])
def test_compiled_training_steps_equal_eager_ones(number, data, device, compiling, tmp_path):
    eager, compiled = (
        train(number, tmp_path / flag, data, device, f"compile={flag}", "train.images=12") for flag in ("false", "true")
    )
    assert compiled == pytest.approx(eager, rel=2e-3)


def test_a_compiled_pipeline_draws_the_same_images(device, compiling):
    """Twice, with other noise: a CUDA graph's buffers are used again."""
    eager, compiled = pipeline(device), pipeline(device).compile()
    for seed in (0, 1):
        a, b = (
            pipe(num_images=4, batch_size=2, seed=seed, solver="euler", steps=6).images for pipe in (eager, compiled)
        )
        for x, y in zip(a, b, strict=True):
            difference = np.abs(np.asarray(x, dtype=int) - np.asarray(y, dtype=int))
            assert difference.max() <= 2
        assert np.asarray(a[0]).std() > 1
        assert not np.array_equal(np.asarray(a[0]), np.asarray(a[1]))
