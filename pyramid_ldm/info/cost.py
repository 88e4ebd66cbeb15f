"""What a training config will cost, before anyone trains: parameters, FLOPs, memory, cache size.

The real training step runs once on tensors without values (`pyramid_ldm.info.shapes`): it takes seconds and no memory,
and every tensor that a real step on a CPU makes is counted, gradient checkpointing included.
"""

import contextlib
import copy
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from pyramid_ldm.autoencoders.load import build_fixed
from pyramid_ldm.autoencoders.pyramid.autoencoder import PyramidAutoencoder
from pyramid_ldm.condition import Condition, Context
from pyramid_ldm.config import AutoencoderConfig, AutoencoderTraining, FlowTraining, NCSNppConfig
from pyramid_ldm.config.common import MOST_IMAGES
from pyramid_ldm.config.fixed import FixedConfig
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.info.memory import PeakMemory
from pyramid_ldm.info.shapes import Shapes
from pyramid_ldm.networks.ncsnpp import PyramidNCSNpp
from pyramid_ldm.nn import pixel_norm, spectral
from pyramid_ldm.nn.layers import fold_spectral_norm
from pyramid_ldm.pipeline import PyramidPipeline
from pyramid_ldm.processes.build import build_process
from pyramid_ldm.processes.solvers import SolverOptions
from pyramid_ldm.pyramid import LatentScaling, Pyramid, latent_values, level_shapes
from pyramid_ldm.training import autoencoder_state, flow_state
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.optimizer import Optimizer
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.step import take_step

CPU = torch.device("cpu")
BATCH = 8  # images at once in `encode` and `sample`, by default


class Work(PeakMemory):
    """Memory, and floating-point operations, a multiplication and an addition as two, in `flops`.

    Formulas are torch's. (`FlopCounterMode` itself hooks every module, which `torch.autograd.grad` refuses and which
    keeps tensors alive.)
    """

    flops = 0

    def watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Counts it."""
        result = super().watch(func, args, kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def restart(self) -> Self:
        """The peak begins anew at what lives now, and the operations at zero."""
        self.flops = 0
        return super().restart()


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Within, tensors have shapes and no memory; networks that are built here can be moved and trained."""
    with Shapes(), _no_repetitions():
        yield


@contextlib.contextmanager
def _no_repetitions() -> Iterator[None]:
    """Leaves out what takes time here and changes neither memory nor FLOPs: iterations that have nothing to converge
    to, and all but the first two and the last of the chunks that one pixel norm works through."""
    advance, chunks = spectral.advance, pixel_norm.chunks

    def few(x: Tensor) -> tuple[Tensor, ...]:
        parts = chunks(x)
        return parts if len(parts) < 4 else (*parts[:2], parts[-1])

    spectral.advance, pixel_norm.chunks = (lambda layers, iterations=1: None), few
    try:
        yield
    finally:
        spectral.advance, pixel_norm.chunks = advance, chunks


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
class NetworkCost:
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
    with without_values():
        with Work() as work:
            with contextlib.redirect_stderr(io.StringIO()):  # PerceptualLoss's warning about random weights
                state = autoencoder_state.build_state(config, CPU)
            state.images_seen = MOST_IMAGES
            state.loss.adaptive.value = 1.0
            trained: list[tuple[nn.Module, Optimizer]] = [(state.autoencoder, state.optimizer)]
            if state.discriminator is not None and state.disc_optimizer is not None:
                trained.append((state.discriminator, state.disc_optimizer))
            for network, optimizer in trained:
                _pretend_step(network, optimizer, train.accumulate, runtime)
            gradients = sum(p.grad.nbytes for network, _ in trained for p in network.parameters() if p.grad is not None)
            kept = work.restart().live - gradients
            pixels = torch.empty(train.batch_size, *config.image_size, 3, dtype=torch.uint8)
            batch = Batch(list(range(train.batch_size)), pixels=pixels)
            autoencoder_state.accumulate(config, state, state.autoencoder, state.discriminator, batch, runtime)
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
            step=Use(work.flops // train.batch_size, work.peak),
            encode=measure_encode(autoencoder, BATCH, runtime),
            decode=measure_decode(autoencoder, runtime),
        )


def estimate_flow(
    config: FlowTraining, autoencoder_config: AutoencoderConfig | FixedConfig, *, bf16: bool
) -> NetworkCost:
    """Cost of stage two on that autoencoder's latents. `config.model` may lack what the shards would tell."""
    config = copy.deepcopy(config)
    config.resolve(list(autoencoder_config.image_size), autoencoder_config.levels)
    runtime, train = Runtime(CPU, bf16), config.train
    with without_values():
        autoencoder = build_autoencoder(autoencoder_config)
        with Work(tensors([autoencoder])) as work:
            state = flow_state.build_state(config, CPU)
            state.scaling = no_scaling(autoencoder_config)
            process = build_process(config)
            _pretend_step(state.network, state.optimizer, train.accumulate, runtime)
            gradients = sum(p.grad.nbytes for p in state.network.parameters() if p.grad is not None)
            kept = work.restart().live - gradients
            latents = empty_latents(state.network.shapes, train.batch_size)
            positions = list(range(train.batch_size))
            with runtime.autocast():
                flow_state.accumulate(process, state.network, state, latents, positions, Condition(), config)
            take_step(state.optimizer, state.network, train.gradient_clip, runtime, Metrics(), "")
            state.ema.update(state.network, 2 * train.batch_size, train.batch_size)
        network = state.network.eval()
        del state
        parameters = count(network)
        fold_spectral_norm(network)
        return NetworkCost(
            parameters=parameters,
            state=kept,
            step=Use(work.flops // train.batch_size, work.peak),
            evaluation=measure_evaluation(network, runtime),
            sample=measure_sample(network, autoencoder, BATCH, bf16=config.precision == "bf16"),
        )


def _pretend_step(network: nn.Module, optimizer: Optimizer, accumulate: int, runtime: Runtime) -> None:
    """As after a first step: the optimizer has its states; gradients of another micro-batch wait if there are any."""

    def fill() -> None:
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)

    fill()
    take_step(optimizer, network, 0.0, runtime, Metrics(), "")
    if accumulate > 1:
        fill()


@contextlib.contextmanager
def measured(*networks: nn.Module) -> Iterator[Work]:
    """What runs within takes, without gradients; the networks' own memory included."""
    with torch.no_grad(), Work(tensors(networks)) as work:
        yield work


def measure_encode(autoencoder: PyramidAutoencoder, batch_size: int, runtime: Runtime) -> Use:
    """`encode`'s batch; under `without_values`, as all of these. What a further image adds is the same for each."""
    peaks = []
    for images in (1, 2):
        with measured(autoencoder) as work, runtime.autocast():
            batch = torch.empty(images, 3, *autoencoder.config.image_size)
            autoencoder.encode(batch.to(CPU, memory_format=torch.channels_last))
        peaks.append(work.peak)
    return Use(work.flops // 2, peaks[0] + (batch_size - 1) * (peaks[1] - peaks[0]))


def measure_decode(autoencoder: PyramidAutoencoder, runtime: Runtime) -> Use:
    """One image."""
    with measured(autoencoder) as work, runtime.autocast():
        autoencoder.decode(empty_latents(level_shapes(autoencoder.levels, autoencoder.config.image_size), 1))
    return Use(work.flops, work.peak)


def measure_evaluation(network: PyramidNCSNpp, runtime: Runtime) -> Use:
    """One evaluation for one image."""
    with measured(network) as work, runtime.autocast():
        network(empty_latents(network.shapes, 1), Context(torch.empty(1), torch.empty(1)))
    return Use(work.flops, work.peak)


def measure_sample(network: PyramidNCSNpp, autoencoder: Any, batch_size: int, *, bf16: bool) -> Use:
    """`sample`'s batch: an Euler step, which others repeat, then one image, as images are decoded one by one."""
    pipeline = PyramidPipeline(network, autoencoder, no_scaling(autoencoder.config)).to(CPU)
    with measured(network, autoencoder) as work:
        noise = empty_latents(network.shapes, batch_size)
        latents = pipeline.solve(noise, SolverOptions("euler", steps=1), bf16=bf16).latents
        work.flops = 0
        for _ in pipeline.decode(tuple(level[:1] for level in latents), bf16=bf16):
            pass
    return Use(work.flops, work.peak)


def build_autoencoder(config: AutoencoderConfig | FixedConfig) -> Any:
    """Ready for encoding and decoding; under `without_values`."""
    return _ready(PyramidAutoencoder(config) if isinstance(config, AutoencoderConfig) else build_fixed(config))


def build_network(config: NCSNppConfig) -> PyramidNCSNpp:
    """Ready for sampling; under `without_values`."""
    return _ready(PyramidNCSNpp(config))


def _ready(network: Any) -> Any:
    network = network.to(CPU).to(memory_format=torch.channels_last).eval()
    fold_spectral_norm(network)
    return network


def empty_latents(shapes: Iterable[tuple[int, int, int]], batch_size: int) -> Pyramid:
    """(B, C, H, W) a level."""
    return tuple(torch.empty(batch_size, *shape) for shape in shapes)


def no_scaling(config: AutoencoderConfig | FixedConfig) -> LatentScaling:
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


def has_variance(config: AutoencoderConfig | FixedConfig) -> bool:
    """Whether a cache holds log-variances, too."""
    return isinstance(config, AutoencoderConfig) and config.latent == "kl"


def cache_bytes(config: AutoencoderConfig | FixedConfig, images: int) -> int:
    """Records of `images` photographs in float16: means, log-variances unless VQ, and mirrored copies."""
    values = latent_values(config.levels, config.image_size)
    return images * values * 2 * (2 if has_variance(config) else 1) * 2
