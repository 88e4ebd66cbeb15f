"""What a training config will cost, before anyone trains: parameters, FLOPs, memory, cache size.

The real training step runs once on fake tensors, which have shapes and no values: it takes seconds and no memory,
and every tensor that a real step on a CPU makes is counted, gradient checkpointing included.
"""

import contextlib
import copy
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pyramid_ldm.autoencoder.autoencoder import PyramidAutoencoder
from pyramid_ldm.config import AutoencoderConfig, AutoencoderTraining, FlowConfig, FlowTraining
from pyramid_ldm.data.photographs import ImageBatch
from pyramid_ldm.flow.ncsnpp import PyramidNCSNpp
from pyramid_ldm.memory import PeakMemory, decompose
from pyramid_ldm.nn.layers import SpectralNorm, fold_spectral_norm
from pyramid_ldm.pipeline import PyramidPipeline, SolverOptions
from pyramid_ldm.pyramid import LatentLevel, LatentScaling, Pyramid, latent_values, level_shapes
from pyramid_ldm.training import train_autoencoder, train_flow
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.step import take_step

aten = torch.ops.aten
CPU = torch.device("cpu")
BATCH = 8  # images at once in `encode` and `sample`, by default


class Flops(TorchDispatchMode):
    """Counts floating-point operations, a multiplication and an addition as two, in `total`.

    Formulas are torch's. (`FlopCounterMode` itself hooks every module, which `torch.autograd.grad` refuses and which
    keeps tensors alive.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = decompose(self, func, args, kwargs or {})
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class _Answers(TorchDispatchMode):
    """What depends on values that a fake tensor has not: `bool`, `float` and `int` of one are true, or 1 (training asks
    whether values are finite), and no codebook entry is beyond the last."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default):
            dtype = args[0].dtype
            return (
                True
                if dtype == torch.bool or func is aten.is_nonzero.default
                else 1.0
                if dtype.is_floating_point
                else 1
            )
        if func is aten.bincount.default:
            return args[0].new_zeros(args[2])  # minlength
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Within, tensors have shapes and no memory; networks that are built here can be moved and trained."""
    mode = FakeTensorMode()
    # The converter would remember new tensors by weak references, and a module with such parameters cannot be moved.
    mode.fake_tensor_converter.set_tensor_memo = lambda t, v: None  # type: ignore[method-assign]
    with mode, _Answers(), _nothing_to_converge():
        yield


@contextlib.contextmanager
def _nothing_to_converge() -> Iterator[None]:
    """Power iteration on values that are not there would be half of the time and, being small vectors, no memory."""
    advance = SpectralNorm.advance
    SpectralNorm.advance = lambda self, weight, iterations: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        SpectralNorm.advance = advance  # type: ignore[method-assign]


@dataclass(frozen=True)
class Use:
    """What a piece of work takes."""

    flops: int  # an image
    peak: int  # bytes, weights included


@dataclass(frozen=True)
class AutoencoderCost:
    """Of stage one."""

    encoder: int  # parameters
    decoder: int
    state: int  # bytes between two steps: weights, Adam's states, averages, LPIPS, discriminator
    step: Use  # one micro-batch and the optimizers' steps
    encode: Use  # of BATCH images
    decode: Use  # of one image


@dataclass(frozen=True)
class FlowCost:
    """Of stage two."""

    parameters: int
    state: int  # bytes between two steps: weights, Adam's states, averages, the autoencoder that pictures need
    step: Use  # one micro-batch and the optimizer's step
    evaluation: Use  # of the network, one image
    sample: Use  # of BATCH images, in float32 as `sample` does by default; FLOPs are those of decoding


def estimate_autoencoder(config: AutoencoderTraining, *, bf16: bool) -> AutoencoderCost:
    """Cost of stage one, with every term of the loss at work; LPIPS needs no weights for that."""
    config = copy.deepcopy(config)
    config.loss.perceptual.weights = "random"
    runtime, train = Runtime(CPU, bf16), config.train
    with fake_tensors():
        with PeakMemory() as memory, Flops() as flops:
            with contextlib.redirect_stderr(io.StringIO()):  # PerceptualLoss's warning about random weights
                state = train_autoencoder.build_state(config, CPU)
            gan = config.loss.gan
            state.images_seen = gan.start + gan.disc_warmup + gan.ramp + train.batch_size
            state.loss.adaptive.value = 1.0
            trained: list[tuple[nn.Module, torch.optim.Optimizer]] = [(state.autoencoder, state.optimizer)]
            if state.discriminator is not None and state.disc_optimizer is not None:
                trained.append((state.discriminator, state.disc_optimizer))
            for network, optimizer in trained:
                _pretend_step(network, optimizer, train.accumulate, runtime)
            gradients = sum(p.grad.nbytes for network, _ in trained for p in network.parameters() if p.grad is not None)
            kept = memory.restart().live - gradients
            flops.total = 0
            images = torch.empty(train.batch_size, 3, *config.image_size)
            batch = ImageBatch(images, list(range(train.batch_size)), [], [])
            train_autoencoder.accumulate(config, state, state.autoencoder, state.discriminator, batch, runtime)
            take_step(state.optimizer, state.autoencoder, train.gradient_clip, runtime, Metrics(), "")
            state.ema.update(state.autoencoder, state.images_seen, train.batch_size)
            if state.discriminator is not None and state.disc_optimizer is not None:
                take_step(state.disc_optimizer, state.discriminator, 0.0, runtime, Metrics(), "")
            state.loss.adaptive.finish_step(runtime.average)
        autoencoder = state.autoencoder.eval()
        del state, trained
        encoder, decoder = count(autoencoder.encoder), count(autoencoder.decoder)
        fold_spectral_norm(autoencoder)
        return AutoencoderCost(
            encoder=encoder,
            decoder=decoder,
            state=kept,
            step=Use(flops.total // train.batch_size, memory.peak),
            encode=measure_encode(autoencoder, BATCH, runtime),
            decode=measure_decode(autoencoder, runtime),
        )


def estimate_flow(config: FlowTraining, autoencoder_config: AutoencoderConfig, *, bf16: bool) -> FlowCost:
    """Cost of stage two on that autoencoder's latents. `config.model` may lack what the shards would tell."""
    config = copy.deepcopy(config)
    config.model.resolve(list(autoencoder_config.image_size), autoencoder_config.levels)
    runtime, train = Runtime(CPU, bf16), config.train
    with fake_tensors():
        autoencoder = build_autoencoder(autoencoder_config)
        with PeakMemory(tensors([autoencoder])) as memory, Flops() as flops:
            state = train_flow.build_state(config, CPU)
            scaling = no_scaling(autoencoder_config)
            flow = train_flow.build_flow(config.rectified_flow)
            _pretend_step(state.network, state.optimizer, train.accumulate, runtime)
            gradients = sum(p.grad.nbytes for p in state.network.parameters() if p.grad is not None)
            kept = memory.restart().live - gradients
            flops.total = 0
            values = sum(math.prod(shape) for shape in state.network.shapes)
            latents, noise = (torch.empty(train.batch_size, values) for _ in range(2))
            time = torch.empty(train.batch_size)
            with runtime.autocast():
                train_flow.accumulate(
                    flow, state.network, scaling, state.network, latents, noise, time, train.accumulate
                )
            take_step(state.optimizer, state.network, train.gradient_clip, runtime, Metrics(), "")
            state.ema.update(state.network, 2 * train.batch_size, train.batch_size)
        network = state.network.eval()
        del state
        parameters = count(network)
        fold_spectral_norm(network)
        return FlowCost(
            parameters=parameters,
            state=kept,
            step=Use(flops.total // train.batch_size, memory.peak),
            evaluation=measure_evaluation(network, runtime),
            sample=measure_sample(network, autoencoder, BATCH, bf16=config.precision == "bf16"),
        )


def _pretend_step(network: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int, runtime: Runtime) -> None:
    """As after a first step: the optimizer has its states; gradients of another micro-batch wait if there are any."""

    def fill() -> None:
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)

    fill()
    take_step(optimizer, network, 0.0, runtime, Metrics(), "")
    if accumulate > 1:
        fill()


@contextlib.contextmanager
def measured(*networks: nn.Module) -> Iterator[tuple[PeakMemory, Flops]]:
    """Memory, the networks' own included, and FLOPs of what runs within, without gradients."""
    with torch.no_grad(), PeakMemory(tensors(networks)) as memory, Flops() as flops:
        yield memory, flops


def measure_encode(autoencoder: PyramidAutoencoder, batch_size: int, runtime: Runtime) -> Use:
    """`encode`'s batch; under `fake_tensors`, as all of these. What a further image adds is the same for each."""
    peaks = []
    for images in (1, 2):
        with measured(autoencoder) as (memory, flops), runtime.autocast():
            batch = torch.empty(images, 3, *autoencoder.config.image_size)
            autoencoder.encode(batch.to(CPU, memory_format=torch.channels_last))
        peaks.append(memory.peak)
    return Use(flops.total // 2, peaks[0] + (batch_size - 1) * (peaks[1] - peaks[0]))


def measure_decode(autoencoder: PyramidAutoencoder, runtime: Runtime) -> Use:
    """One image."""
    with measured(autoencoder) as (memory, flops), runtime.autocast():
        autoencoder.decode(empty_latents(level_shapes(autoencoder.levels, autoencoder.config.image_size), 1))
    return Use(flops.total, memory.peak)


def measure_evaluation(network: PyramidNCSNpp, runtime: Runtime) -> Use:
    """One velocity of one image."""
    with measured(network) as (memory, flops), runtime.autocast():
        network(empty_latents(network.shapes, 1), torch.empty(1))
    return Use(flops.total, memory.peak)


def measure_sample(network: PyramidNCSNpp, autoencoder: PyramidAutoencoder, batch_size: int, *, bf16: bool) -> Use:
    """`sample`'s batch: an Euler step, which others repeat, then one image, as images are decoded one by one."""
    pipeline = PyramidPipeline(network, autoencoder, no_scaling(autoencoder.config)).to(CPU)
    with measured(network, autoencoder) as (memory, flops):
        noise = empty_latents(network.shapes, batch_size)
        latents = pipeline.solve(noise, SolverOptions("euler", steps=1), bf16=bf16).latents
        flops.total = 0
        for _ in pipeline.decode(tuple(level[:1] for level in latents), bf16=bf16):
            pass
    return Use(flops.total, memory.peak)


def build_autoencoder(config: AutoencoderConfig) -> PyramidAutoencoder:
    """Ready for encoding and decoding; under `fake_tensors`."""
    return _ready(PyramidAutoencoder(config))


def build_flow(config: FlowConfig) -> PyramidNCSNpp:
    """Ready for sampling; under `fake_tensors`."""
    return _ready(PyramidNCSNpp(config))


def _ready(network: Any) -> Any:
    network = network.to(CPU).to(memory_format=torch.channels_last).eval()
    fold_spectral_norm(network)
    return network


def empty_latents(shapes: Iterable[tuple[int, int, int]], batch_size: int) -> Pyramid:
    """(B, C, H, W) a level."""
    return tuple(torch.empty(batch_size, *shape) for shape in shapes)


def no_scaling(config: AutoencoderConfig) -> LatentScaling:
    """Every level as it is."""
    return LatentScaling(
        tuple((0.0,) * level.channels for level in config.levels),
        tuple((1.0,) * level.channels for level in config.levels),
    )


def tensors(networks: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters and buffers."""
    for network in networks:
        yield from network.parameters()
        yield from network.buffers()


def count(network: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def latent_levels(config: AutoencoderConfig | FlowConfig) -> list[LatentLevel]:
    """The config's levels as objects."""
    return [LatentLevel(level.factor, level.channels) for level in config.levels]


def cache_bytes(config: AutoencoderConfig, images: int) -> int:
    """Records of `images` photographs in float16: means, log-variances unless VQ, and mirrored copies."""
    values = latent_values(latent_levels(config), config.image_size)
    return images * values * 2 * (2 if config.latent == "kl" else 1) * 2
