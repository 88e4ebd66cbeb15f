"""Estimates on tensors without values against real steps, and live bytes by hand."""

import gc

import pytest
import torch
from conftest import tiny_autoencoder, tiny_autoencoder_config, tiny_network
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pyramid_ldm.condition import Condition
from pyramid_ldm.config import AutoencoderTraining, FlowTraining, load_config
from pyramid_ldm.config.common import TrainConfig
from pyramid_ldm.config.flow import FlowDataConfig, NCSNppConfig
from pyramid_ldm.data.batch import Batch
from pyramid_ldm.info.budget import free_memory, remedy, verdict
from pyramid_ldm.info.cost import (
    CPU,
    Work,
    cache_bytes,
    estimate_autoencoder,
    estimate_flow,
    measure_decode,
    measure_encode,
    measured,
    no_scaling,
    without_values,
)
from pyramid_ldm.info.memory import PeakMemory, Watch
from pyramid_ldm.processes.rectified_flow import RectifiedFlow
from pyramid_ldm.pyramid import unflatten
from pyramid_ldm.training import autoencoder_state, flow_state
from pyramid_ldm.training.log import Metrics
from pyramid_ldm.training.runtime import Runtime
from pyramid_ldm.training.step import take_step

MIB = 2**20


STAGE_ONE = """
run_dir: x
image_size: [64, 64]
model:
  levels: [{factor: 16, channels: 6}, {factor: 8, channels: 4}]
  encoder: {widths: [8, 8, 16, 16, 16]}
  decoder: {widths: [8, 8, 16, 16, 16], branch_blocks: 1}
  attention: {max_tokens: 16}
  checkpoint_factors: [1]
data: {root: x}
loss: {perceptual: {weight: 0}, gan: {channels: 8, layers: 2}}
train: {batch_size: 2, accumulate: 2}
"""


@pytest.fixture
def stage_one(tmp_path) -> AutoencoderTraining:
    (tmp_path / "config.yaml").write_text(STAGE_ONE)
    return load_config(AutoencoderTraining, tmp_path / "config.yaml")


def stage_two() -> FlowTraining:
    model = NCSNppConfig(widths=[16, 16], blocks=1, dropout=0.2)
    return FlowTraining(run_dir="x", data=FlowDataConfig(shards="x"), train=TrainConfig(batch_size=8), model=model)


def test_live_and_peak_bytes_by_hand():
    with PeakMemory() as memory:
        a = torch.zeros(MIB)
        assert memory.live == 4 * MIB
        b = a + 1
        assert memory.live == memory.peak == 8 * MIB
        del a
        assert (memory.live, memory.peak) == (4 * MIB, 8 * MIB)
        b.add_(1).mul_(2)
        part = b[5:].view(1, -1).T
        assert (memory.live, memory.peak) == (4 * MIB, 8 * MIB)
        del b
        assert memory.live == 4 * MIB, "a view keeps the storage"
        assert memory.restart().peak == 4 * MIB
        b = part.exp()
        del part
    del b
    assert (memory.live, memory.peak) == (0, 8 * MIB - 20)  # the five left out of b are not in its exponential


def test_tensors_from_before_count_from_the_start_or_from_their_first_use():
    weight, other = nn.Parameter(torch.zeros(1000)), torch.zeros(10)
    with PeakMemory([weight, weight]) as memory:
        assert memory.live == 4000
        other += 1
        assert memory.live == 4040


def test_what_is_saved_for_the_backward_pass_counts_unless_it_is_recomputed():
    def live(recompute):
        x = torch.ones(MIB, requires_grad=True)
        with PeakMemory([x]) as memory:
            total = (checkpoint(chain, x, use_reentrant=False) if recompute else chain(x)).sum()
            assert total.requires_grad
            return memory.live // (4 * MIB)

    def chain(y):
        return y.sin().sin().sin().sin()

    assert live(False) == 4, "x and three sines; the last is not needed for its own gradient"
    assert live(True) == 1


def test_operations_arrive_whole_in_inference_mode_and_count_alike():
    x, linear = torch.randn(4, 16), nn.Linear(16, 8)
    found = []
    for context in (torch.no_grad, torch.inference_mode):
        with context(), Work() as work:
            linear(x)
        found.append((work.peak, work.flops))
    assert found[0] == found[1]
    assert found[0][1] == 2 * 4 * 16 * 8


def test_flops_are_those_of_torchs_counter():
    model, x = tiny_autoencoder().eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode(x)
    with without_values():
        fake = tiny_autoencoder().eval()
        assert measure_encode(fake, 1, Runtime(CPU, False)).flops == counter.get_total_flops()


class Operations(Watch):
    """Every operation, with shapes, strides and types of what it gives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def watch(self, func, args, kwargs):
        result = func(*args, **kwargs)
        self.seen.append(
            (str(func), [describe(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)])
        )
        return result


def describe(tensor):
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tuple(tensor.shape), strides, tensor.dtype


@pytest.mark.parametrize("training", [False, True])
def test_without_values_the_same_operations_give_the_same_shapes(training):
    def run():
        model = tiny_autoencoder().to(memory_format=torch.channels_last)
        images = torch.zeros(2, 3, 32, 32).to(memory_format=torch.channels_last)
        noise = tuple(torch.zeros(2, *shape) for shape in [(6, 2, 2), (4, 4, 4)])
        with Operations() as operations, torch.set_grad_enabled(training):
            if training:
                output = model(images, noise)
                (output.reconstruction.abs().mean() + output.posterior.kl()).backward()
            else:
                model.eval().decode(model.eval().encode(images).mode())
        return operations.seen

    real = run()
    with without_values():
        assert run() == real
    assert len(real) > 200


def real_autoencoder_step(config, runtime):
    """Peak bytes of the second step."""
    with PeakMemory() as memory:
        state = autoencoder_state.build_state(config, CPU)
        state.images_seen, state.loss.adaptive.value = 10**6, 1.0
        for _ in range(2):
            gc.collect()
            memory.restart()
            for _ in range(config.train.accumulate):
                pixels = torch.zeros(config.train.batch_size, *config.image_size, 3, dtype=torch.uint8)
                batch = Batch(list(range(len(pixels))), pixels=pixels)
                autoencoder_state.accumulate(config, state, state.autoencoder, state.discriminator, batch, runtime)
            take_step(state.optimizer, state.autoencoder, 1.0, runtime, Metrics(), "")
            take_step(state.disc_optimizer, state.discriminator, 0.0, runtime, Metrics(), "")
            state.loss.adaptive.finish_step(runtime.average)
        return memory.peak


def test_the_estimated_step_of_stage_one_is_the_real_one(stage_one):
    """bfloat16, two micro-batches, a recomputed level, the discriminator at work."""
    config = stage_one
    cost = estimate_autoencoder(config, bf16=True)
    assert cost.step.peak == pytest.approx(real_autoencoder_step(config, Runtime(CPU, True)), rel=0.01)
    model = tiny_autoencoder(image_size=(64, 64))
    assert cost.encoder == sum(p.numel() for p in model.encoder.parameters())
    assert cost.decoder == sum(p.numel() for p in model.decoder.parameters())
    weights = 4 * (cost.encoder + cost.decoder)
    assert 5 * weights < cost.state < 6 * weights, "weights, two states, two averages; the discriminator is smaller"
    assert 3 * (cost.encode.flops + cost.decode.flops) < cost.step.flops


def test_encoding_and_decoding_take_what_they_really_take():
    runtime = Runtime(CPU, False)
    with without_values():
        fake = tiny_autoencoder(image_size=(64, 64)).eval()
        encode, decode = measure_encode(fake, 8, runtime), measure_decode(fake, runtime)
    model = tiny_autoencoder(image_size=(64, 64)).eval()
    with measured(model) as memory:
        images = torch.empty(8, 3, 64, 64)
        latents = model.encode(images.to(memory_format=torch.channels_last)).mode()
    assert encode.peak == pytest.approx(memory.peak, rel=0.001)
    latents = tuple(level[:1].clone() for level in latents)
    with measured(model) as memory:
        model.decode(latents)
    assert decode.peak == pytest.approx(memory.peak, rel=0.001)


def test_the_estimated_step_of_stage_two_is_the_real_one():
    autoencoder, runtime, config = tiny_autoencoder_config(), Runtime(CPU, False), stage_two()
    cost = estimate_flow(config, autoencoder, bf16=False)
    config.model.resolve(list(autoencoder.image_size), autoencoder.levels)
    flow = RectifiedFlow()
    model = tiny_autoencoder()
    with PeakMemory([*model.parameters(), *model.buffers()]) as memory:
        state = flow_state.build_state(config, CPU)
        state.scaling = no_scaling(autoencoder)
        for _ in range(2):
            latents = unflatten(torch.randn(8, 88), state.network.shapes)
            with runtime.autocast():
                flow_state.accumulate(flow, state.network, state, latents, list(range(8)), Condition(), config)
            take_step(state.optimizer, state.network, 1.0, runtime, Metrics(), "")
    assert cost.step.peak == pytest.approx(memory.peak, rel=0.02)
    assert cost.parameters == sum(p.numel() for p in tiny_network(dropout=0.2, fourier_scale=16.0).parameters())
    assert cost.evaluation.flops > 0
    assert cost.sample.peak > 4 * cost.parameters


def test_the_cache_of_a_thousand_images():
    values = 6 * 2 * 2 + 4 * 4 * 4
    assert cache_bytes(tiny_autoencoder_config(), 1000) == 1000 * values * 2 * 2 * 2
    assert cache_bytes(tiny_autoencoder_config(latent="vq"), 1000) == 1000 * values * 2 * 2


def test_the_verdict(monkeypatch, stage_one):
    free = 10 * 2**30
    monkeypatch.setattr("pyramid_ldm.info.budget.free_memory", lambda device: free)
    runtime, config = Runtime(CPU, False), stage_one
    gib = 2**30
    assert verdict(config, gib, runtime, lambda c: 0).startswith("fits: training takes 1.9 GiB")
    assert "lower train.batch_size or recompute" in verdict(config, 9 * gib, runtime, None)
    assert verdict(config, 20 * gib, runtime, lambda c: 2 * gib).startswith("does not fit")
    config.train.batch_size, config.train.accumulate = 8, 3
    assert remedy(config, 9 * gib, 7.5 * gib, lambda c: (1 + c.train.batch_size) * gib).startswith(
        "lower train.batch_size to 6 (train.accumulate=4"
    )
    config.train.batch_size = 1
    assert remedy(config, 10 * gib, 6 * gib, lambda c: 3 * gib) == "set model.checkpoint_factors=[1,2,4,8,16] (3.0 GiB)"
    config.train.region_size = 32
    settings = "model.checkpoint_factors=[1,2,4,8,16] train.regions=2"
    assert remedy(config, 10 * gib, 6 * gib, lambda c: (9 - 2 * c.train.regions) * gib).startswith(f"set {settings}")
    assert remedy(stage_two(), 10 * gib, 6 * gib, lambda c: 3 * gib if c.model.checkpoint else 7 * gib).startswith(
        "set train.batch_size=1 model.checkpoint=true"
    )
    assert "narrow the network" in remedy(stage_two(), 10 * gib, gib, lambda c: 3 * gib)


def test_free_memory_is_what_the_system_says():
    free = free_memory(CPU)
    assert free is None or 2**20 < free < 2**50
